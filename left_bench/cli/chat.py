"""`left-bench chat`: ask a finished cell's model, and its base model beside it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from left_bench.core.errors import UserError
from left_bench.report.values import clean
from left_bench.result.trained import Finished, find_finished, on_this_machine, quiet_libraries
from left_bench.spec.cell import Cell
from left_bench.worker.load_trained import load_base, with_adapter

if TYPE_CHECKING:
    import torch

_ENDS = ("exit", "quit")
Turn = Mapping[str, str]


def main(argv: list[str]) -> int:
    """Answer `--prompt`, or what is typed or piped in, until it ends; 2 when the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog="left-bench chat",
        allow_abbrev=False,
        description="Ask a finished cell's model, the base model beside it. Questions are put as training put them: "
        "the data's template and system message, the model's chat template. Ctrl-D or `exit` ends it.",
    )
    parser.add_argument("cell", metavar="CELL", help="a cell's folder, its id, or how that begins")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    parser.add_argument("--only", choices=("adapted", "base"), help="one of the two, and its answer without a label")
    parser.add_argument(
        "--conversation", action="store_true", help="let a question follow what was said before (default: each alone)"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the cell's own)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="draw answers (default: 0, greedy)")
    parser.add_argument(
        "--runs", default="runs", metavar="DIR", help="where a cell id is looked up (default: %(default)s)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that a model's author ships")
    options = parser.parse_args(argv)
    try:
        if options.max_new_tokens is not None and options.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {options.max_new_tokens}: give 1 or more")
        if not options.temperature >= 0:
            raise UserError(f"--temperature {options.temperature}: give 0, which is greedy, or more")
        finished = find_finished(options.cell, options.runs, trust_remote_code=options.trust_remote_code)
        if not finished.cell.task.writes:
            raise UserError(f"{finished.record.cell_id}: it writes nothing, and so answers no question")
        quiet_libraries()
        models = Models(
            finished,
            only=options.only,
            most=options.max_new_tokens,
            temperature=options.temperature,
        )
        asked = iter([options.prompt]) if options.prompt is not None else _questions()
        earlier: dict[str, list[Turn]] = {name: [] for name in models.names}
        for question in asked:
            for name in models.names:
                answer = models.answer(name, question, earlier[name])
                print(answer if options.only else f"{name + ':':8} {answer}", flush=True)
                if options.conversation:
                    earlier[name] += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    except UserError as error:
        print(f"left-bench chat: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _questions() -> Iterator[str]:
    """Lines that are typed, behind a mark, or piped in."""
    typed = sys.stdin.isatty()
    while True:
        if typed:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        question = line.strip()
        if not line or question in _ENDS:
            if typed and not line:
                print()
            return
        if question:
            yield question


class Models:
    """The adapted model and its base, which is the same weights wherever switching the adapter off gives it back."""

    def __init__(self, finished: Finished, *, only: str | None, most: int | None, temperature: float) -> None:
        """Load what is asked for.

        Args:
            only: `base` or `adapted`; None: both.
            most: tokens of an answer; None: the cell's own.
            temperature: of drawing tokens; 0: the likeliest.
        """
        from left_bench.model import load as models

        self._cell = on_this_machine(finished.cell)
        self._most = most or self._cell.eval.max_new_tokens or self._cell.data.max_new_tokens
        self._drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0}
        if temperature == 0:
            self._drawn = {"do_sample": False}
        self.names = (only,) if only else ("base", "adapted")
        self._folder, self._tokenizer = models.open_pretrained(self._cell)
        self._base: Any = None
        self._adapted: Any = None
        fresh = load_base(self._cell, folder=self._folder)
        self._config = fresh.config
        if only == "base":
            self._base = fresh
            return
        before = None if only else self._probe(fresh)
        self._adapted = with_adapter(fresh, self._cell, finished.adapter)
        if before is not None and not self._switched_off_is(before):
            self._base = load_base(self._cell, folder=self._folder)

    def answer(self, name: str, question: str, earlier: list[Turn]) -> str:
        """What one of `names` answers to a question that follows `earlier`."""
        import torch

        from left_bench.data import prompt_of
        from left_bench.evaluation.evaluate import end_tokens, pad_of
        from left_bench.model.load import autocast

        encoder = self._config.is_encoder_decoder
        ids = prompt_of(question, self._cell.data, self._tokenizer, earlier=earlier, encoder=encoder)
        cell = self._cell if name == "adapted" else self._cell.without_adapter()
        device = cell.device_type
        inputs = torch.tensor([ids], device=device)
        switch, model = self._model(name)
        ends = end_tokens(model, self._tokenizer)
        with switch, torch.no_grad(), autocast(cell, device=device):
            output = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self._most,
                eos_token_id=sorted(ends),
                pad_token_id=pad_of(self._tokenizer),
                use_cache=True,
                **self._drawn,
            )[0].tolist()
        result = output[1 if encoder else len(ids) :]
        while result and result[-1] in ends:
            result.pop()
        return clean(self._tokenizer.decode(result, skip_special_tokens=True)).strip()

    def _model(self, name: str) -> tuple[Any, Any]:
        """What to enter while it answers, and the model."""
        if name == "adapted":
            return nullcontext(), self._adapted
        if self._base is not None:
            return nullcontext(), self._base
        return self._adapted.disable_adapter(), self._adapted.get_base_model()

    def _probe(self, model: Any) -> torch.Tensor:
        """Logits over a few tokens, to know the base model again by."""
        import torch

        from left_bench.model.load import autocast
        from left_bench.spec.task import probe_inputs

        cell: Cell = self._cell.without_adapter()
        with torch.no_grad(), autocast(cell, device=cell.device_type):
            logits: torch.Tensor = model(**probe_inputs(model, tokens=8)).logits.float()
        return logits

    def _switched_off_is(self, before: torch.Tensor) -> bool:
        """Some methods begin by moving the base weights, some train them, and some cannot be switched off."""
        from peft import PeftModel

        if not isinstance(self._adapted, PeftModel):
            return False
        try:
            with self._adapted.disable_adapter():
                after = self._probe(self._adapted.get_base_model())
        except (AttributeError, NotImplementedError, ValueError):
            return False
        return bool((after - before).abs().max() <= 1e-4 * before.std())
