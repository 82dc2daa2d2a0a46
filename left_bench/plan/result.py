"""What is asked about a cell's memory, and what a plan answers: plain numbers, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rows:
    """How long rows are, where the data is not to be asked."""

    longest: int | None = None
    """Tokens of the longest row; None: the training rows tell, or `training.max_length` where they are not here."""
    mean: int | None = None
    """Tokens of a row on the average, with `longest`."""
    with_mean: bool = False
    """Whether the step of ordinary rows is planned beside that of the longest."""


@dataclass(frozen=True)
class Pass:
    """The shape of a step's pass, by default the largest there is."""

    rows: int
    length: int
    """Tokens of its longest row."""
    answer_tokens: int
    measured: bool
    """Whether the training rows were looked at; else every row is taken to be as long as it may be."""
    packed: bool = False
    """Rows end to end: planned as one row of `length` tokens, whose attention is the memory of its kernel alone."""


@dataclass
class Plan:
    """Bytes by the names of a record's `memory_breakdown`; what could not be predicted is absent and in `unknown`."""

    largest: Pass
    total_params: int = 0
    trainable_params: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    paged_optimizer_bytes: int = 0
    """Optimizer states in CUDA's managed memory, which no allocator counts: beside the parts and the peak."""
    unknown: list[str] = field(default_factory=list)
    """What was not predicted, and why, in words."""
    mean: Pass | None = None
    """The pass of ordinary rows, where it was asked for."""
    mean_activations_bytes: int | None = None
    """What a step of such passes holds beyond its parts."""

    @property
    def peak_bytes(self) -> int | None:
        """The most that a step holds at once; None when a part of it is not known."""
        wanted = {"weights", "gradients", "optimizer", "activations_and_workspace"}
        return sum(self.parts.values()) if wanted <= self.parts.keys() else None

    @property
    def mean_bytes(self) -> int | None:
        """The most that a step of ordinary rows holds; None where that was not asked, or is not known."""
        if self.peak_bytes is None or self.mean_activations_bytes is None:
            return None
        return self.peak_bytes - self.parts["activations_and_workspace"] + self.mean_activations_bytes

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Plan:
        """What `plain` was made of."""
        mean = None if plain["mean"] is None else Pass(**plain["mean"])
        return cls(**{**plain, "largest": Pass(**plain["largest"]), "mean": mean})
