"""The curve: validation loss measured during training; early stopping by it; the best weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from left_bench.compat.torch import run_eagerly
from left_bench.core.errors import UserError
from left_bench.data import Example, collate
from left_bench.measure.meter import Meter
from left_bench.model.load import autocast, layers_of
from left_bench.processes.ranks import ALONE, Team
from left_bench.spec.cell import Cell
from left_bench.spec.events import Tell
from left_bench.spec.record import CurvePoint
from left_bench.training.checkpoint import CHECKPOINTS_NAME
from left_bench.training.objective import Objective

Scores = Callable[[], Mapping[str, float]]
"""Returns the current scores of the model's answers to the validation rows."""


def check_curve(cell: Cell, *, rows: int) -> None:
    """Refuse options that need validation rows if there are none.

    Raises:
        UserError: names the key and the fix.
    """
    if rows or not cell.data.hold_out:
        return
    wanted: dict[str, object] = {
        "training.stop_patience": cell.training.stop_patience,
        "eval.every": cell.eval.every,
        "eval.trial": "true" if cell.eval.trial else None,
    }
    for key, value in wanted.items():
        if value is not None:
            raise UserError(
                f"{key}={value}: there are no validation rows; set data.validation_rows=NUMBER, or"
                " data.validation_path=FILE"
            )


class Curve:
    """Measures a point of the curve when one is due, decides about early stopping, and keeps the best weights if
    wanted.

    Every rank has one, all with the same points.

    Attributes:
        points: the points so far.
    """

    def __init__(
        self,
        cell: Cell,
        rows: Sequence[Example],
        *,
        meter: Meter,
        team: Team = ALONE,
        tell: Tell = lambda *_: None,
        scores: Scores | None = None,
    ) -> None:
        self.points: list[CurvePoint] = []
        self._cell, self._rows, self._meter, self._team = cell, rows, meter, team
        self._tell, self._scores = tell, scores
        self._number = cell.curve_points(len(rows))
        self._steps = _due_steps(cell, self._number) if rows else set()
        self._crossed = 0
        self._patience = cell.training.stop_patience if rows else None
        self._kept_by_checkpoint: int | None = None

    @property
    def best(self) -> CurvePoint | None:
        """The point with the lowest loss; the first of several equal ones."""
        return min(self.points, key=lambda point: point.validation_loss, default=None)

    @property
    def kept(self) -> CurvePoint | None:
        """The point whose weights the model has after `finish`; None if they belong to no point."""
        if self._patience is not None:
            return self.best
        last = self.points[-1] if self.points else None
        return last if last is not None and last.step == len(self._meter.steps) else None

    def after(
        self,
        step: int,
        *,
        spent: float,
        model: torch.nn.Module,
        network: torch.nn.Module,
        objective: Objective,
        last: bool,
    ) -> bool:
        """Measure a point after this step if one is due; returns whether to stop because the loss no longer improves.

        Args:
            spent: seconds of training by the ranks' common clock, for a cell with a time limit.
            network: the model as wrapped for training.
            objective: the objective of `network`.
            last: no step follows, whatever is returned.
        """
        if not self._steps or not (self._is_due(step, spent) or last):
            return False
        meter = self._meter
        with (
            meter.aside("validate"),
            torch.random.fork_rng(devices=_devices(meter.device.kind)),
            run_eagerly(layers_of(model)),
        ):
            point = CurvePoint(
                step=step,
                seconds=sum(item.seconds for item in meter.steps),
                tokens=sum(item.tokens for item in meter.steps),
                joules=self._joules(),
                validation_loss=self._loss(model, network, objective),
                scores=dict(self._scores()) if self._scores is not None else None,
            )
            network.train()
            self.points.append(point)
            meter.events.write("curve", **point.model_dump(exclude_none=True))
            best = self.best
            if self._patience is not None and point is best and self._team.first:
                self._keep(model, step)
        late = sum(item.step > best.step for item in self.points) if best is not None else 0
        return self._patience is not None and late >= self._patience

    def finish(self, model: torch.nn.Module) -> None:
        """Restore the best weights if they were kept; only on rank 0, because the other ranks end after training."""
        best = self.best
        if self._patience is None or best is None or not self._team.first:
            return
        from safetensors.torch import load_file

        if best.step != len(self._meter.steps):
            weights = load_file(self._file(best.step))
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for name, weight in weights.items():
                    parameters[name].copy_(weight)
        for path in self._folder.glob("best-*"):
            path.unlink()

    def state(self) -> list[dict[str, Any]]:
        """The state to store in a checkpoint."""
        best = self.best
        self._kept_by_checkpoint = None if best is None else best.step
        return [point.model_dump() for point in self.points]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Continue from `state`; the events of its points are written again."""
        self.points[:] = [CurvePoint.model_validate(item) for item in state]
        if self.points:
            self._crossed = self._count(self.points[-1].step, self.points[-1].seconds)
        for point in self.points:
            self._meter.events.write("curve", **point.model_dump(exclude_none=True))

    def _is_due(self, step: int, spent: float) -> bool:
        if self._cell.training.max_seconds is None or self._cell.eval.every is not None:
            return step in self._steps
        before, self._crossed = self._crossed, self._count(step, spent)
        return self._crossed > before

    def _count(self, step: int, spent: float) -> int:
        """How many points are due by then, evenly spaced over the steps or the time, whichever ends first."""
        training = self._cell.training
        share = step / training.steps
        if training.max_seconds is not None:
            share = max(share, min(1.0, spent / training.max_seconds))
        return int(self._number * share)

    def _joules(self) -> float | None:
        """Joules of all ranks' accelerators, or of the CPU packages; None if some are unknown."""
        if self._meter.starts[1:]:  # those of earlier attempts are lost
            return None
        own = self._meter.energy.of_training()
        if self._team.size == 1 or self._meter.device.kind == "cpu":
            return own
        everyones = [item for (item,) in self._team.gather(float("nan") if own is None else own)]
        total = sum(everyones)
        return total if total == total else None

    def _loss(self, model: torch.nn.Module, network: torch.nn.Module, objective: Objective) -> float:
        """Nats per answer token over the validation rows, which are divided among the ranks.

        Passes are at most as large as in training, and equally many on each rank: if a model is sharded, every rank
        takes part in every pass.
        """
        settings, device, size = self._cell.training, self._meter.device.kind, self._team.size
        order = sorted(range(len(self._rows)), key=lambda index: -self._rows[index].length)
        real = len(order)
        order += order[-1:] * (-real % size)
        per_pass = max(1, settings.batch_size // size)
        mine = [(self._rows[index], place < real) for place, index in enumerate(order)][self._team.rank :: size]
        nats, tokens = 0.0, 0
        network.eval()
        with torch.no_grad(), autocast(self._cell, device=device):
            for start in range(0, len(mine), per_pass):
                part = mine[start : start + per_pass]
                rows = [row for row, _ in part]
                batch = collate(rows, pad_id=objective.pad_id, packed=objective.packed).to(_place(model))
                of_rows = objective.loss.of_tokens(batch).split(batch.answer_lengths)
                counted = [losses for losses, (_, is_real) in zip(of_rows, part, strict=True) if is_real]
                nats += float(sum(losses.sum() for losses in counted))
                tokens += sum(len(losses) for losses in counted)
                self._tell("validation loss", min(start + per_pass, len(mine)), len(mine))
        parts = self._team.gather(nats, tokens)
        return sum(part for part, _ in parts) / sum(count for _, count in parts)

    # --- the best weights ---

    @property
    def _folder(self) -> Path:
        return self._meter.events.path.parent / CHECKPOINTS_NAME

    def _file(self, step: int) -> Path:
        return self._folder / f"best-{step:09d}.safetensors"

    def _keep(self, model: torch.nn.Module, step: int) -> None:
        """Save them to disk: a copy in memory would count towards the measured peak."""
        from safetensors.torch import save_file

        self._folder.mkdir(exist_ok=True)
        trained = {name: p.data.contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, self._file(step))
        needed = {self._file(step), *([self._file(kept)] if (kept := self._kept_by_checkpoint) is not None else [])}
        for path in set(self._folder.glob("best-*")) - needed:
            path.unlink()


def _due_steps(cell: Cell, points: int) -> set[int]:
    steps, every = cell.training.steps, cell.eval.every
    if every is not None:
        return {*range(every, steps + 1, every), steps}
    return {max(1, round(steps * number / points)) for number in range(1, points + 1)}


def _place(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _devices(kind: str) -> list[int]:
    return [torch.cuda.current_device()] if kind == "cuda" else []
