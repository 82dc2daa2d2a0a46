"""`left-bench data [overrides]`: rows as a model would read them, before anybody pays for a run. No model is loaded."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from left_bench.core.errors import UserError
from left_bench.processes.start_process import output_discarded
from left_bench.spec.cell import Cell, fingerprint

if TYPE_CHECKING:
    from rich.console import Console

    from left_bench.data.tokens import Example, Splits

_BINS, _BAR = 8, 32
_LONGEST_RUN = 1500  # characters of a stretch of text that are shown; --json has every token
_BIDI = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}  # they would reorder what stands beside


def main(argv: list[str]) -> int:
    """Show each different set of rows of the command line's cells; 2 when they cannot be used."""
    parser = argparse.ArgumentParser(
        prog="left-bench data",
        allow_abbrev=False,
        usage="left-bench data [GROUP=OPTION | KEY=VALUE ...] [--rows N] [--json]",
        description="The rows of a run as its model will read them: what was found, dropped and cut, how long rows are,"
        " and the first of them with the tokens that carry loss. Takes the overrides of a run; no model is loaded.",
    )
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="training rows to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object on a line for each different set of rows")
    options, overrides = parser.parse_known_args(argv)
    if options.rows < 0:
        raise UserError(f"--rows={options.rows}: give the number of rows to show, 0 or more")
    from rich.console import Console

    from left_bench.cli.plan import cells_of

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with _busy("composing"):
        cells = {_what_decides_rows(cell): cell for cell in reversed(list(cells_of(overrides, command="data")))}
    console = Console(file=sys.stdout, highlight=False)
    for cell in reversed(cells.values()):
        with _busy(f"reading the rows of data={cell.data.name} as {cell.model.name} will"):
            result = describe(cell, rows=options.rows)
        if options.json:
            print(json.dumps(result))
        else:
            _print(result, cell, console)
    return 0


def _what_decides_rows(cell: Cell) -> str:
    model, data = cell.identity["model"], cell.identity["data"]
    return fingerprint([model, data, cell.training.max_length, cell.one_answer_a_row])


@contextlib.contextmanager
def _busy(what: str) -> Iterator[None]:
    """Says on standard error what takes its time, where somebody looks; what libraries print meanwhile is not shown."""
    from rich.console import Console

    with (
        os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors="replace") as terminal,
        Console(file=terminal).status(f"{what} …"),
        output_discarded(),
    ):
        yield


def describe(cell: Cell, *, rows: int) -> dict[str, Any]:
    """What became of the cell's rows, how long they are, and the first `rows` training rows token by token; as JSON.

    Raises:
        UserError: what a run would be refused for once its rows are read.
    """
    from left_bench.grid.rules import why_unsupported
    from left_bench.model import load as models
    from left_bench.model.positions import check_generation
    from left_bench.worker.stages import counted_rows

    folder, tokenizer = _opened(cell)
    splits = models.load_rows_of(cell, tokenizer, folder=folder)
    test = splits.test if cell.eval.rows is None else splits.test[: cell.eval.rows]
    if cell.task.writes and folder:
        longest_prompt = max(len(row.prompt_ids) for row in test)
        check_generation(cell, models.config_of(cell, folder), longest_prompt=longest_prompt)
    result: dict[str, Any] = {
        "data": cell.data.name,
        "model": cell.model.name,
        "unsupported": why_unsupported(cell),
        "shape": splits.shape,
        **counted_rows(splits, scored=len(test), cell=cell),
        "steps": cell.training.steps,
        "max_length": cell.training.max_length,
        "longest_row": splits.longest_row,
        "test_there": splits.test_there,
        "dropped": list(splits.dropped_where),
    }
    if not cell.task.writes:
        classes = {} if splits.classes is None else {"classes": splits.classes}
        read = [{"text": row.prompt, "answer": row.reference, "tokens": row.length} for row in splits.train[:rows]]
        return result | classes | ({"read": read} if cell.task.reads == "text" else {})
    return result | _lengths(splits) | {"rows": [_row(item, tokenizer) for item in splits.train[:rows]]}


def _opened(cell: Cell) -> tuple[str, Any]:
    """The model's folder and its tokenizer (an image processor). Random weights are not made for it: no folder then."""
    from left_bench.model import load as models
    from left_bench.pretrained import fetched, source
    from left_bench.pretrained.make import byte_tokenizer

    drawn = source(cell.model) == "random" and cell.task.is_decoder
    if drawn and fetched(cell.model, dtype=cell.precision.weights_dtype) is None:
        return "", byte_tokenizer()
    return models.open_pretrained(cell)


def _lengths(splits: Splits) -> dict[str, Any]:
    from left_bench.data.tokens import Examples

    assert isinstance(splits.train, Examples)
    context, answer = splits.train.lengths()
    return {
        "train_tokens": sum(context) + sum(answer),
        "loss_tokens": sum(answer),
        "lengths": {
            name: {
                "median": statistics.median(lengths),
                "longest": max(lengths),
                "histogram": [item._asdict() for item in histogram(lengths)],
            }
            for name, lengths in (("without_loss", context), ("with_loss", answer))
        },
    }


class Bin(NamedTuple):
    """Rows of a like length."""

    tokens_from: int
    tokens_to: int
    """The last length that is counted here."""
    rows: int


def histogram(lengths: Sequence[int]) -> list[Bin]:
    """Rows counted in at most eight bins of equal width, a power of two, from the first to the last that has rows."""
    width = 1
    low, high = min(lengths), max(lengths)
    while high // width - low // width >= _BINS:
        width *= 2
    counted = Counter(length // width for length in lengths)
    places = range(low // width, high // width + 1)
    return [Bin(place * width, (place + 1) * width - 1, counted[place]) for place in places]


def _row(example: Example, tokenizer: Any) -> dict[str, Any]:
    ids = example.prompt_ids + example.answer_ids
    carries = [False] * len(example.prompt_ids) + example.of_answer
    if not example.prompt_ids and example.decoder_start is None:
        carries[0] = False  # nothing precedes it
    pieces = tokenizer.convert_ids_to_tokens(ids)
    runs = [
        {"loss": loss, "text": tokenizer.decode([ids[place] for place in places], clean_up_tokenization_spaces=False)}
        for loss, group in itertools.groupby(range(len(ids)), key=carries.__getitem__)
        if (places := list(group))
    ]
    result: dict[str, Any] = {
        "loss_tokens": example.labels,
        "runs": runs,
        "tokens": [
            {"id": id, "token": piece, "loss": loss} for id, piece, loss in zip(ids, pieces, carries, strict=True)
        ],
    }
    return result if example.rejected_ids is None else result | {"worse": tokenizer.decode(example.rejected_ids)}


# --- for people ---


def _print(facts: dict[str, Any], cell: Cell, console: Console) -> None:
    from rich.text import Text

    from left_bench.spec.events import rows_in_words

    def say(text: str | Text = "", style: str = "") -> None:
        line = text if isinstance(text, Text) else Text(_printable(text, console.encoding), style=style)
        console.print(line, soft_wrap=True)

    say(f"data={facts['data']} for {facts['model']}", "bold")
    say(rows_in_words(facts, max_length=facts["max_length"]))
    if facts["unsupported"]:
        say(f"this cell will not run: {facts['unsupported']}", "yellow")
    if facts["dropped"]:
        more = int(facts["dropped_rows"]) - len(facts["dropped"])
        say(f"dropped: {'; '.join(facts['dropped'])}{f'; and {more:,} more' if more > 0 else ''}")
    if facts["test_there"] is not None and facts["test_rows"] < facts["test_there"]:
        there = facts["test_there"]
        say(f"the test set has {there:,} different questions; data.test_rows={there} asks all of them")
    if "rows" not in facts:
        classes = facts.get("classes", ())
        listed = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
        if "read" not in facts:
            say(f"pictures of {len(classes)} classes ({listed}): no tokens to show")
        elif classes:
            say(f"the model tells {listed}" if len(classes) == 1 else f"{len(classes)} classes: {listed}")
        for number, row in enumerate(facts.get("read", ()), start=1):
            say()
            say(f"training row {number}: {row['tokens']:,} tokens", "bold")
            say(f"{_clipped(row['text'])}\n→ {_clipped(row['answer'])}")
        return
    if facts["longest_row"] > facts["max_length"]:
        longest = facts["longest_row"]
        say(f"the longest training row has {longest:,} tokens: from training.max_length={longest} on none is cut")
    share = facts["loss_tokens"] / facts["train_tokens"]
    say(f"{facts['train_tokens']:,} tokens in training rows, {facts['loss_tokens']:,} of them with loss ({share:.0%})")
    for name, of in facts["lengths"].items():
        say()
        if len(of["histogram"]) == 1:
            say(f"tokens {name.replace('_', ' ')}: {of['longest']:,} in every row", "bold")
            continue
        say(f"tokens {name.replace('_', ' ')} in a row: median {of['median']:g}, longest {of['longest']:,}", "bold")
        for line in _bars(of["histogram"], mark="█" if console.encoding.startswith("utf") else "#"):
            say(line)
    coloured = console.is_terminal and not console.no_color
    opening, closing = ("", "") if coloured else ("⟦", "⟧") if console.encoding.startswith("utf") else ("[[", "]]")
    for number, row in enumerate(facts["rows"], start=1):
        say()
        shown = "green" if coloured else f"between {opening} and {closing}"
        say(f"training row {number}: {len(row['tokens']):,} tokens, {row['loss_tokens']:,} with loss ({shown})", "bold")
        text = Text()
        for run in row["runs"]:
            part = _printable(_clipped(run["text"]), console.encoding)
            text.append(f"{opening}{part}{closing}" if run["loss"] else part, style="green" if run["loss"] else "")
        say(text)
        if "worse" in row:
            say("the worse answer:", "bold")
            say(_clipped(row["worse"]))


def _bars(bins: Sequence[dict[str, int]], *, mark: str) -> Iterator[str]:
    most = max(item["rows"] for item in bins)
    names = [
        f"{item['tokens_from']}"
        if item["tokens_from"] == item["tokens_to"]
        else f"{item['tokens_from']}-{item['tokens_to']}"
        for item in bins
    ]
    width = max(map(len, names))
    for name, item in zip(names, bins, strict=True):
        bar = mark * max(round(_BAR * item["rows"] / most), 1 if item["rows"] else 0)
        yield f"{name:>{width}}  {bar}{' ' if bar else ''}{item['rows']:,}"


def _clipped(text: str) -> str:
    if len(text) <= _LONGEST_RUN:
        return text
    half = _LONGEST_RUN // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def _printable(text: str, encoding: str) -> str:
    """The text with what would steer a terminal, or what it cannot show, as escapes."""
    shown = (
        f"\\x{ord(letter):02x}"
        if (unicodedata.category(letter) == "Cc" and letter not in "\n\t") or letter in _BIDI
        else letter
        for letter in text
    )
    return "".join(shown).encode(encoding, "backslashreplace").decode(encoding)
