"""Times a base model on this machine and counts its rows: at most five seconds of passes, cached for the user.

The launching process has no torch, so a separate process does it (`main`): it loads the model as the cells will,
unquantized, and times a few passes of growing size. Its imports, downloads and tokenized rows also serve the first
cell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from left_bench.core import interrupt
from left_bench.core.errors import UserError
from left_bench.core.files import write_atomically
from left_bench.core.paths import cache_dir, versions_of
from left_bench.launch.estimate.arithmetic import Line, Measured, Rates, Row, Rows
from left_bench.launch.supervise import worker_environment
from left_bench.measure.auto_precision import what_makes_it_fast
from left_bench.processes import start_process as processes
from left_bench.processes.resources import Seat, available_cores, share_of
from left_bench.spec.cell import Cell, Quantization, fingerprint

SECONDS = 5.0
"""Time for loading and timing all models of a launch; each gets at least `_LEAST_SECONDS`."""
_LEAST_SECONDS = 1.5
_LONGEST = 4.0
"""Factor by which it may take longer if other processes use the processor."""
_LARGEST_WEIGHTS = 2**31
"""Largest size of the weight files, bytes: loading more would use up the time."""
_PATIENCE_SECONDS = 180.0
"""Time limit, including imports and tokenization, which the cells need anyway."""
_MOST_ROWS = 2000
_ORDER, _ROWS, _RATES = "order.json", "rows.json", "rates.json"
_SHORT_PROMPT, _SHORTEST_PROMPT, _SHORT_ANSWER = 28, 4, 4
_SHARES = {"forward": 0.5, "decode": 0.4, "step": 1.0}
"""Share of the remaining time for each kind of work, in this order; the others build on the first."""
_STEPS, _UPDATED = 4, 2**22
_Kept = TypeVar("_Kept", bound=BaseModel)


def rates_path(cell: Cell, *, at_once: int) -> Path:
    """The cache file of a model's rates on this machine, independent of the cell's method, quantization, data and
    steps."""
    facts = [what_makes_it_fast(), versions_of(["torch", "transformers"]), len(available_cores()), at_once]
    hardware = [cell.hardware.device, cell.hardware.threads]
    kernels = [cell.training.attention, cell.training.kernels, cell.training.output_head == "all"]
    model = [cell.identity["model"], cell.identity["precision"]]
    return cache_dir() / "speeds" / f"model-{fingerprint([facts, hardware, kernels, model])}.json"


def rows_path(cell: Cell) -> Path:
    """The cache file of the rows' lengths."""
    decides = [cell.identity["model"], cell.identity["data"], cell.training.max_length]
    return cache_dir() / "speeds" / f"rows-{fingerprint([*decides, versions_of(['transformers'])])}.json"


def kept(cell: Cell, *, at_once: int) -> Measured | None:
    """The measurements in the cache; None if something is missing or damaged."""
    rates, rows = _read(rates_path(cell, at_once=at_once), Rates), _read(rows_path(cell), Rows)
    return None if rates is None or rows is None else Measured(rates, rows)


def why_not(cell: Cell) -> str | None:
    """Why a cell's model is not timed beforehand, as a clause after "because"; None if it can be."""
    if cell.device_type != "cpu":
        return f"{cell.hardware.device} is not timed beforehand"
    if cell.hardware.processes > 1:
        return "a cell has several processes"
    if cell.quantization.checkpoint_method is not None:
        return f"{cell.model.name} is already quantized"
    from left_bench.pretrained import fetch, fetched, local_files, source

    try:
        if source(cell.model) == "hub":
            folder = fetched(cell.model)
        else:
            fetch(cell.model, dtype=cell.precision.weights_dtype)
            folder = fetched(cell.model, dtype=cell.precision.weights_dtype)
        files = local_files(cell.model, folder) if folder is not None else None
        if files is None:
            return f"{cell.model.name} is not on this machine yet"
        if sum(path.stat().st_size for path in files.glob("*.safetensors")) > _LARGEST_WEIGHTS:
            return f"the weights of {cell.model.name} take more than {_LARGEST_WEIGHTS >> 30} GiB"
    except (UserError, MemoryError, RuntimeError, OSError):  # the cell's record will report the error
        return f"{cell.model.name} is not available"
    return None


def calibrate(cells: Iterable[Cell], *, at_once: int, cells_follow: bool) -> bool:
    """Measure what is missing in the cache for these cells, as far as time allows.

    Disturbed measurements are repeated, once per launch, until one is undisturbed.

    Args:
        at_once: cells that will run at the same time on this machine.
        cells_follow: the cells are started from this process too, so they can use its fork server's imports.

    Returns:
        Whether a process was started whose imports the first cell can use.
    """
    cells = list(cells)
    rates = {path: cell for cell in cells if _is_wanted(path := rates_path(cell, at_once=at_once))}
    rows = {path: cell for cell in cells if not (path := rows_path(cell)).exists()}
    seconds = SECONDS / max(1, len(rates))
    for path, cell in rates.items():
        _delegate(cell, {_RATES: path, _ROWS: rows_path(cell)}, seconds=seconds, at_once=at_once, fork=cells_follow)
    of_others = {rows_path(cell) for cell in rates.values()}
    for path, cell in rows.items():
        if path not in of_others:
            _delegate(cell, {_ROWS: path}, seconds=None, at_once=at_once, fork=cells_follow)
    return cells_follow and bool(rates or rows)


def _is_wanted(path: Path) -> bool:
    rates = _read(path, Rates)
    return rates is None or rates.disturbed_by is not None


def _delegate(cell: Cell, answers: dict[str, Path], *, seconds: float | None, at_once: int, fork: bool) -> None:
    with contextlib.suppress(OSError, EOFError), tempfile.TemporaryDirectory() as name:  # no room, no process
        folder = Path(name)
        order = {"cell": cell.model_dump(mode="json", by_alias=True), "seconds": seconds, "at": time.time()}
        (folder / _ORDER).write_text(json.dumps(order), encoding="utf-8")
        cores = available_cores()
        at_once = min(at_once, len(cores))
        seat = Seat(cores=share_of(cores, at_once, number=0) if at_once > 1 else (), at_once=at_once)
        processes.run_within(
            _PATIENCE_SECONDS,
            folder,
            environment=worker_environment(cell) | seat.environment(cell.hardware.device),
            fork=fork,
            program="left_bench.launch.estimate.calibrate",
        )
        for file, path in answers.items():
            if (folder / file).exists():
                write_atomically(path, (folder / file).read_text(encoding="utf-8"))
    interrupt.check()  # a terminal's Ctrl-C also ends a fork server that is still importing


def _read(path: Path, kind: type[_Kept]) -> _Kept | None:
    with contextlib.suppress(OSError, ValueError):
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    return None


# --- in the separate process ---


def main(argv: Sequence[str], *, forked: bool = False) -> int:
    """Carry out the order in a folder, and write the results there."""
    from left_bench.processes.start_process import die_with_parent
    from left_bench.worker.stages import set_threads

    if forked:
        die_with_parent()
    folder, begun = Path(argv[0]), time.time()
    order = json.loads((folder / _ORDER).read_text(encoding="utf-8"))
    cell = Cell.model_validate(order["cell"])
    set_threads(cell)

    from left_bench.model import load as models

    models.apply_precision(cell, device=cell.device_type)
    files, tokenizer = models.open_pretrained(cell)
    splits = models.load_rows_of(cell, tokenizer, folder=files)
    write_atomically(folder / _ROWS, count_rows(cell, splits, tokenizer).model_dump_json())
    if order["seconds"] is not None:
        rates = measure(cell, splits, tokenizer, folder=files, seconds=order["seconds"])
        started = rates.model_copy(update={"start": max(0.0, begun - order["at"])})
        write_atomically(folder / _RATES, started.model_dump_json())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the results are written; tearing down torch's threads takes a second


def count_rows(cell: Cell, splits: Any, tokenizer: Any) -> Rows:
    """The lengths of at most `_MOST_ROWS` rows of each kind."""
    from left_bench.evaluation.evaluate import general_passages
    from left_bench.evaluation.shared_prompt import common_beginning

    def counted(rows: Sequence[Any]) -> list[Row]:
        if cell.task.reads == "pictures":  # all of one size, and slow to read
            return [Row(rows[0].length, 0)] * min(len(rows), _MOST_ROWS)
        places = range(0, len(rows), -(-len(rows) // _MOST_ROWS))
        read = (rows[place] for place in places)
        if not cell.task.writes:
            return [Row(row.length, 0) for row in read]
        return [Row(len(row.prompt_ids), len(row.answer_ids), len(row.rejected_ids or [])) for row in read]

    # with `eval.rows`, the first test rows are scored
    test = splits.test[:_MOST_ROWS]
    general = [row.length for row in general_passages(tokenizer)] if cell.task.is_decoder else []
    return Rows(
        train=counted(splits.train),
        test=counted(test),
        test_rows=len(splits.test),
        validation_rows=len(splits.validation),
        general=general,
        shared=len(common_beginning(test)),
    )


def measure(cell: Cell, splits: Any, tokenizer: Any, *, folder: str, seconds: float) -> Rates:
    """Time the cell's unquantized base model for about `seconds`; a running pass is finished."""
    import torch
    from transformers import StoppingCriteriaList

    from left_bench.data import collate
    from left_bench.evaluation import evaluate
    from left_bench.measure.cpu_contention import DISTURBED, Neighbours
    from left_bench.measure.device import open_device
    from left_bench.model import load as models
    from left_bench.training.loss import AnswerLoss

    base = cell.model_copy(update={"quantization": Quantization(name="none")}).without_adapter()
    device, threads, neighbours = open_device(cell.hardware.device), torch.get_num_threads(), Neighbours()
    begun, spent = time.perf_counter(), time.process_time()
    model: Any
    model, _ = models.load_model(base, folder=folder, device=device.kind, classes=splits.classes)
    load = time.perf_counter() - begun
    model.requires_grad_(False)
    pad = evaluate.pad_of(tokenizer)
    with models.autocast(base, device=device.kind):
        loss = AnswerLoss(model, everywhere=base.training.output_head == "all")
    # under other load the same work takes longer; with less work the measurement would be useless
    elapsed = time.perf_counter() - begun
    longer = min(_LONGEST, max(1.0, elapsed / max(1e-9, time.process_time() - spent)))
    end = begun + elapsed + longer * max(_LEAST_SECONDS, seconds - elapsed / longer)

    def timed(work: Callable[[], object]) -> float:
        device.synchronize()
        start = time.perf_counter()
        with models.autocast(base, device=device.kind):
            work()
        device.synchronize()
        return time.perf_counter() - start

    def forward(rows: Sequence[Any]) -> tuple[int, float]:
        batch = collate(rows, pad_id=pad).to(device.kind)
        with torch.no_grad():
            return _size(batch), timed(lambda: loss.of_tokens(batch))

    def step(rows: Sequence[Any]) -> tuple[int, float]:
        batch = collate(rows, pad_id=pad).to(device.kind)
        return _size(batch), timed(lambda: loss.summed(batch).backward())

    def decode(rows: Sequence[Any]) -> tuple[int, float]:
        prompts = [_short(row, prompt=_SHORTEST_PROMPT) for row in rows]
        inputs, _ = evaluate.prompt_inputs(prompts, pad, device=device.kind)
        clock = _Clock(device, until=until)
        options: dict[str, Any] = {"do_sample": False, "use_cache": True, "pad_token_id": pad}
        options |= {
            "min_new_tokens": _STEPS,
            "max_new_tokens": _STEPS,
            "stopping_criteria": StoppingCriteriaList([clock]),
        }
        with torch.no_grad(), models.autocast(base, device=device.kind):
            model.generate(**inputs, **options)
        return len(rows), clock.seconds

    def share(of: str) -> float:
        return time.perf_counter() + max(0.0, end - time.perf_counter()) * _SHARES[of]

    model.eval()
    test, train = splits.test[: cell.eval.batch_size], splits.train[: cell.training.batch_size]
    longest = max(row.length for row in [*test, *train])

    def of_rows(line: Line, count: int) -> float:
        return line.of(count * longest)

    def of_answers(line: Line, count: int) -> float:
        return _STEPS * line.of(count) + of_forward.of(count * _SHORTEST_PROMPT)

    def from_a_short(size: int, took: float) -> Line:
        """A line halfway between a constant and a proportional cost."""
        return Line(took / 2, took / 2 / size)

    of_forward = ladder(forward, test, guess=from_a_short, cost=of_rows, until=share("forward"))
    until, of_decode = share("decode"), Line(0.0, 0.0)
    if cell.task.writes:  # one more row is one more token of a pass
        more = of_forward.each
        of_decode = ladder(
            decode, test, guess=lambda _, took: Line(max(0.0, took - more), more), cost=of_answers, until=until
        )
    model.train()
    entrances = {
        model.get_input_embeddings(),
        *(module for module in model.modules() if isinstance(module, torch.nn.Embedding)),
    }
    for entrance in entrances:  # so that gradients flow through activations but to no weight
        entrance.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    of_step = ladder(
        step,
        train,
        guess=lambda size, took: of_forward.times(took / of_forward.of(size)),
        cost=of_rows,
        until=share("step"),
    )
    others = max(0.0, (neighbours.share() or 0.0) - max(0.0, 1 - threads / (os.cpu_count() or 1)))
    return Rates(
        load=load,
        forward=of_forward,
        step=of_step,
        decode=of_decode,
        update=_update(models.DTYPES[base.precision.weights_dtype], device),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        threads=threads,
        disturbed_by=others if others > DISTURBED else None,
    )


def ladder(
    take: Callable[[Sequence[Any]], tuple[int, float]],
    rows: Sequence[Any],
    *,
    guess: Callable[[int, float], Line],
    cost: Callable[[Line, int], float],
    until: float,
) -> Line:
    """Seconds as a line over size, from a short row and from as many whole rows as time allows.

    Args:
        take: does the work on rows and returns its size and seconds.
        guess: the line from a short row's size and seconds only.
        cost: seconds of the whole work on a number of rows, by a line.
        until: end, in `time.perf_counter`'s time.
    """
    points = [take([_short(rows[0])])]  # selects kernels and reads the weights; only used if there is no time for more
    if time.perf_counter() + cost(guess(*points[0]), 1) < until:
        points = [take([_short(rows[0])])]
    line, taken = guess(*points[0]), 0
    while True:
        count = len(rows)
        while count and time.perf_counter() + cost(line, count) > until:
            count //= 2
        if count < max(1, 1.5 * taken):
            break
        points.append(take(rows[:count]))
        line, taken = Line.through([points[0], points[-1]]), count
    # kernels are selected by now, and other load varies; more seconds per unit than for a short row must be a
    # disturbance
    odd = points[-1][1] / points[-1][0] > points[0][1] / points[0][0]
    if taken and (odd or time.perf_counter() + cost(line, taken) < until):
        largest = min(points[-1], take(rows[:taken]), key=lambda point: point[1])
        line = Line.through([points[0], largest])
    return line


class _Clock:
    """A stopping criterion that records the time of every token."""

    def __init__(self, device: Any, *, until: float) -> None:
        self._device, self._until, self._ticks = device, until, list[float]()

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        self._device.synchronize()
        self._ticks.append(time.perf_counter())
        over = len(self._ticks) > 1 and self._ticks[-1] > self._until
        return torch.full((len(input_ids),), over, dtype=torch.bool, device=input_ids.device)

    @property
    def seconds(self) -> float:
        """Median seconds between two tokens; the first comes with the prompt."""
        return statistics.median(after - before for before, after in itertools.pairwise(self._ticks))


def _short(row: Any, *, prompt: int = _SHORT_PROMPT) -> Any:
    if not hasattr(row, "prompt_ids"):
        return row
    cut = {"prompt_ids": row.prompt_ids[-prompt:], "answer_ids": row.answer_ids[:_SHORT_ANSWER]}
    return dataclasses.replace(row, **cut)


def _size(batch: Any) -> int:
    """Number of computed tokens, including padding; for images, of patches."""
    parts = [getattr(batch, name, None) for name in ("input_ids", "decoder_input_ids")]
    return sum(part.numel() for part in parts if part is not None) or int(batch.tokens)


def _update(dtype: Any, device: Any) -> float:
    """Seconds of an AdamW step per parameter, for more parameters than fit in the processor's caches."""
    import torch

    parameter = torch.nn.Parameter(torch.zeros(_UPDATED, dtype=dtype, device=device.kind))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()  # creates the states
    device.synchronize()
    start = time.perf_counter()
    optimizer.step()
    device.synchronize()
    return (time.perf_counter() - start) / _UPDATED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
