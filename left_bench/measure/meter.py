"""Meter: seconds, tokens and memory peaks of a run; and the bytes that tensors really occupy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from left_bench.measure.device import Device
from left_bench.measure.energy import Energy
from left_bench.quantization import constants
from left_bench.spec.record import POLICY_FIELDS, Phase, PolicyPoint

if TYPE_CHECKING:
    import torch

    from left_bench.processes.ranks import Team
    from left_bench.spec.events import EventWriter


@dataclass(kw_only=True)
class Step:
    """The measurements of one optimizer step."""

    seconds: float
    tokens: int
    answer_tokens: int
    rows: int
    loss: float
    pairs: int = 0
    """Sum of squared token counts over the rows."""
    policy: dict[str, float] = field(default_factory=dict)
    """Of a step of policy optimization: rewards and the like, by the names of `PolicyPoint`."""


_PARTS = [part for part in fields(Step) if part.name != "policy"]


def step_of_event(event: Mapping[str, Any]) -> Step | None:
    """The step of a line of `events.jsonl`; None if a part of it is missing."""
    try:
        # fields with a default were added later: older events are still valid steps
        known = {part.name: event[part.name] for part in _PARTS if part.default is MISSING or part.name in event}
        return Step(**known, policy={name: event[name] for name in POLICY_FIELDS if name in event})
    except KeyError:
        return None


@dataclass(kw_only=True)
class PhaseCounts:
    """Counts that a phase's code may fill in while it runs."""

    steps: int | None = None
    tokens: int | None = None


@dataclass(kw_only=True)
class _Aside:
    """Work within a phase that is not part of it, and the phase's own peaks before that work."""

    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    before: int | None = None
    reserved_before: int | None = None


@dataclass
class Meter:
    """Collects phases, steps and metrics of one run; the device is synchronized before every clock reading."""

    device: Device
    events: EventWriter
    phases: list[Phase] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    memory_breakdown: dict[str, int] = field(default_factory=dict)
    starts: list[int] = field(default_factory=lambda: [0])
    """Indices of steps at which a process began: 0, and wherever a later attempt resumed from a checkpoint."""
    peak_before: int = 0
    """The highest memory of the steps taken over from earlier attempts."""
    energy: Energy = field(default_factory=Energy)
    joules_of_others: float | None = 0.0
    """Joules of the other ranks' accelerators up to the end of their work; None: unknown."""

    above_peak: float | None = None
    """The utilization if it exceeds 1: the measured peak is then wrong, and no utilization is reported."""

    _asides: dict[str, _Aside] = field(default_factory=dict)
    """Work that is not part of the running phase, by name."""
    _close: Callable[[], None] | None = None
    _event_name: str = "step"
    _counted: tuple[int, int] = (0, 0)
    """Range [first, end) of the steps for which joules were counted."""

    def __post_init__(self) -> None:
        self.metrics["baseline_memory_bytes"] = self.device.set_baseline()

    @contextmanager
    def phase(self, name: str) -> Iterator[PhaseCounts]:
        """Measure a part of the run, also if it ends with an exception."""
        counts = PhaseCounts()
        self._asides = {}
        self.events.write("phase", name=name)
        self.device.reset_peak()  # peaks persist across phases unless reset
        self.device.synchronize()
        start = time.perf_counter()

        def close() -> None:
            asides, self._asides = self._asides, {}
            phase = Phase(
                name=name,
                seconds=time.perf_counter() - start - sum(aside.seconds for aside in asides.values()),
                steps=counts.steps,
                tokens=counts.tokens,
                peak_memory_bytes=_highest(self.device.peak_bytes(), *(aside.before for aside in asides.values())),
                peak_reserved_bytes=_highest(
                    self.device.peak_reserved_bytes(), *(aside.reserved_before for aside in asides.values())
                ),
            )
            parts = [
                Phase(name=name, seconds=aside.seconds, peak_memory_bytes=aside.peak_memory_bytes)
                for name, aside in asides.items()
            ]
            for ended in (phase, *parts):
                self.phases.append(ended)
                self.events.write("phase_end", **ended.model_dump(exclude_none=True))

        self._close = close
        try:
            yield counts
        finally:
            self.device.synchronize()
            self.close_phase()

    def close_phase(self) -> None:
        """End the running phase now; called by its own code, or by a watchdog that is about to end the process."""
        close, self._close = self._close, None
        if close is not None:
            close()

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Work inside this context does not belong to the running phase: it is excluded from its seconds, joules and
        peak.

        When the running phase ends, all such work under the same name becomes one separate phase.
        """
        device = self.device
        device.synchronize()
        start = time.perf_counter()
        done = self._asides.setdefault(name, _Aside())
        done.before = _highest(done.before, device.peak_bytes())
        done.reserved_before = _highest(done.reserved_before, device.peak_reserved_bytes())
        device.forget_peak()
        try:
            with self.energy.paused():
                yield
                device.synchronize()
        finally:
            done.peak_memory_bytes = _highest(done.peak_memory_bytes, device.peak_bytes())
            device.forget_peak()
            done.seconds += time.perf_counter() - start

    @contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """Inside the context, steps are written as events called `name`, and count for no metric."""
        steps, self.steps, self._event_name = self.steps, [], name
        energy, self.energy = self.energy, Energy()
        try:
            yield
        finally:
            self.steps, self._event_name, self.energy = steps, "step", energy

    def begin_measured(self) -> None:
        """Start counting joules: the first step that counts for speed begins."""
        self.device.synchronize()
        self._counted = len(self.steps), len(self.steps)
        self.energy.start()

    def end_measured(self) -> None:
        """Stop counting joules: the last step has been recorded."""
        self.energy.stop()
        self._counted = self._counted[0], len(self.steps)

    def step(self, step: Step, **extra: float) -> None:
        """Record one optimizer step and write its event."""
        self.steps.append(step)
        peak = _highest(self.device.peak_bytes(), *(aside.before for aside in self._asides.values()))
        self.events.write(
            self._event_name,
            step=len(self.steps),
            **{part.name: getattr(step, part.name) for part in _PARTS},
            **step.policy,
            tokens_per_second=step.tokens / step.seconds,
            **({} if peak is None else {"peak_memory_bytes": peak}),  # of the phase so far, in case the run is killed
            **extra,
        )

    def take_over(
        self, events: Sequence[Mapping[str, Any]], *, starts: Sequence[int], memory_breakdown: Mapping[str, int]
    ) -> None:
        """Count the steps of earlier attempts, from their events, which are written again."""
        for event in events:
            self.events.write(**event)
        self.steps = [step for event in events if (step := step_of_event(event)) is not None]
        self.starts = [*starts, len(events)]
        self.peak_before = max((event.get("peak_memory_bytes", 0) for event in events), default=0)
        self.memory_breakdown |= memory_breakdown

    def take_in_peaks(self, team: Team) -> list[int]:
        """Replace the memory peaks by the highest of all ranks; returns every rank's peak of the train phase."""
        names = ("load_peak_memory_bytes", "peak_memory_bytes")
        of_ranks = team.gather(*(self.metrics.get(name, math.nan) for name in names))
        results: list[int] = []
        for name, numbers in zip(names, zip(*of_ranks, strict=True), strict=True):
            results = [int(number) for number in numbers if not math.isnan(number)]  # some devices keep no peak
            if results:
                self.metrics[name] = max(results)
        return results

    def take_in_energy(self, team: Team) -> None:
        """Replace the steps' joules by the sum over all ranks' accelerators; rank 0 counts the CPU packages.

        If one rank could not read a value, the sum is unknown.
        """
        if self.device.kind == "cpu":
            return
        names = ("train_joules", "joules_per_1000_tokens", "train_watts")
        mine = [self.metrics.get(name, math.nan) for name in names]
        of_ranks = team.gather(*mine, self.energy.of_cell().get("cell_joules", math.nan))
        *sums, _ = (sum(numbers) for numbers in zip(*of_ranks, strict=True))
        for name, total in zip(names, sums, strict=True):
            self.metrics.pop(name, None)
            if not math.isnan(total):
                self.metrics[name] = total
        others = sum(numbers[-1] for number, numbers in enumerate(of_ranks) if number != team.rank)
        self.joules_of_others = None if math.isnan(others) else others

    def finish_cell(self) -> None:
        """Record the joules of the whole cell so far, unless those of an earlier attempt are unknown."""
        if self.starts[1:]:
            return
        result = self.energy.of_cell()
        if (own := result.pop("cell_joules", None)) is not None and self.joules_of_others is not None:
            result["cell_joules"] = own + self.joules_of_others
        self.metrics |= result

    def finish(
        self, *, measure_after: int, flops: Callable[[list[Step]], float] | None = None, peak_flops: float | None = None
    ) -> dict[str, float]:
        """All metrics of the run, computed from its phases and steps.

        Args:
            flops: function from steps to FLOPs, for `model_flops_utilization` relative to `peak_flops` (FLOP/s).
        """
        by_name = {phase.name: phase for phase in self.phases}
        result: dict[str, float | None] = {}
        if train := by_name.get("train"):
            before = sum(step.seconds for step in self.steps[: self.starts[-1]])
            result["train_seconds"] = before + train.seconds
            if train.peak_memory_bytes is not None:
                result["peak_memory_bytes"] = max(train.peak_memory_bytes, self.peak_before)
        if load := by_name.get("load"):
            result["load_seconds"] = load.seconds
            result["load_peak_memory_bytes"] = load.peak_memory_bytes
        result.update(summarize_steps(self.steps, measure_after=measure_after, starts=self.starts))
        if self.steps and flops is not None and peak_flops is not None:
            measured = measured_steps(self.steps, measure_after=measure_after, starts=self.starts)
            seconds = sum(step.seconds for step in measured)
            utilization = flops(measured) / seconds / peak_flops
            self.above_peak = utilization if utilization > 1 else None
            result["model_flops_utilization"] = None if utilization > 1 else utilization
        first, end = self._counted
        result |= self.energy.of_steps(tokens=sum(step.tokens for step in self.steps[first:end]))
        if self.starts[1:]:  # the joules of earlier attempts' measured steps are unknown
            result |= {"train_joules": None, "cpu_train_joules": None}
        self.metrics.update({name: value for name, value in result.items() if value is not None})
        return self.metrics


def _highest(*numbers: int | None) -> int | None:
    return max((number for number in numbers if number is not None), default=None)


def measured_steps(steps: list[Step], *, measure_after: int, starts: Sequence[int] = (0,)) -> list[Step]:
    """The steps that count for speed: all but the warm-up, which is at most half of them.

    Every process warms up, so an attempt that resumed from a checkpoint leaves out warm-up steps again.
    """
    counted: list[Step] = []
    for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
        counted += steps[start + warm_up(end - start, measure_after=measure_after) : end]
    return counted


def warm_up(steps: int, *, measure_after: int) -> int:
    """The number of warm-up steps among a process's steps."""
    return min(measure_after, steps // 2)


def summarize_steps(steps: list[Step], *, measure_after: int, starts: Sequence[int] = (0,)) -> dict[str, float | None]:
    """Throughput and percentiles over the measured steps, totals over all of them."""
    if not steps:
        return {}
    measured = measured_steps(steps, measure_after=measure_after, starts=starts)
    seconds = np.array([step.seconds for step in measured])
    last = steps[-max(1, len(steps) // 10) :]
    return _of_policy(steps, last) | {
        # totals over totals: the mean of per-step rates would overweight short steps
        "train_tokens_per_second": sum(step.tokens for step in measured) / float(seconds.sum()),
        "train_samples_per_second": sum(step.rows for step in measured) / float(seconds.sum()),
        "step_seconds_p50": float(np.percentile(seconds, 50)),
        "step_seconds_p95": float(np.percentile(seconds, 95)),
        "train_steps": len(steps),
        "train_tokens": sum(step.tokens for step in steps),
        "train_answer_tokens": sum(step.answer_tokens for step in steps),
        "first_train_loss": steps[0].loss,
        "train_loss": float(np.mean([step.loss for step in last])),
    }


def _of_policy(steps: Sequence[Step], last: Sequence[Step]) -> dict[str, float | None]:
    if not steps[0].policy:
        return {}
    results: dict[str, float | None] = {"first_train_reward": steps[0].policy["reward"]}
    for name, metric in (
        ("reward", "train_reward"),
        ("kl_nats", "policy_kl_nats"),
        ("entropy_nats", "policy_entropy_nats"),
    ):
        if all(name in step.policy for step in last):
            results[metric] = float(np.mean([step.policy[name] for step in last]))
    for name in ("generated_tokens", "generating_seconds"):
        results[name] = sum(step.policy[name] for step in steps)
    return results


def policy_curve(steps: Sequence[Step]) -> list[PolicyPoint]:
    """What each step of policy optimization told; empty where training is another."""
    return [PolicyPoint(step=number, **step.policy) for number, step in enumerate(steps, start=1) if step.policy]


def stored_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that the tensors' storages really occupy, including constants and subclass parts; shared storage counts
    once.

    Nominal dtypes are not used: bitsandbytes keeps its constants in `quant_state` (4-bit) or `SCB` (8-bit) outside the
    weight, and tensor subclasses hold inner tensors of another dtype than they report.
    """
    seen: dict[tuple[str, int], int] = {}
    for tensor in tensors:
        for part in plain_parts(tensor):
            storage = part.untyped_storage()
            seen[(str(part.device), storage.data_ptr())] = storage.nbytes()
    return sum(seen.values())


def logical_numel(parameter: torch.Tensor) -> int:
    """Number of logical elements of the weight, also where 4-bit storage packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    if state is not None and getattr(state, "shape", None) is not None:
        return int(np.prod(tuple(state.shape)))
    return parameter.numel()


def plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors of a parameter: itself, a subclass's inner tensors, its quantization constants."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is not None:
        for part in (getattr(tensor, name) for name in inner()[0]):
            if hasattr(part, "untyped_storage"):  # a sharded tensor's mesh is a part, but not a tensor
                yield from plain_parts(part)
    elif tensor.device.type != "meta":
        yield tensor
    for owner, name in constants(tensor):
        yield getattr(owner, name)
