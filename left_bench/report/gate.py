"""`--fail-on 'train_tokens_per_second<-5%'`: the change at which a comparison fails."""

from __future__ import annotations

import re
from typing import NamedTuple

from left_bench.core.errors import UserError, nearest
from left_bench.spec.record import METRICS, find_metric

MISSING = "missing"
_FORM = re.compile(r"\s*([A-Za-z0-9_]+)\s*(<=|>=|<|>)\s*([+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(%?)\s*")


class Gate(NamedTuple):
    """A bound on the change of a metric from A to B."""

    text: str
    metric: str
    sign: str
    bound: float
    relative: bool
    """Whether the bound is a share of A's value (`-5%`) or a difference in the metric's own unit (`-0.02`)."""

    def hit(self, before: float, after: float) -> bool:
        """Whether the change from `before` to `after` is beyond the bound."""
        change = after - before
        if self.relative:
            if before == 0:  # no share of nothing: any change in the bound's direction is beyond it
                return change < 0 if self.sign.startswith("<") else change > 0
            change = change / abs(before)
        bound = self.bound
        return {"<": change < bound, "<=": change <= bound, ">": change > bound, ">=": change >= bound}[self.sign]


def parse_gate(text: str) -> Gate:
    """A gate from its text.

    Raises:
        UserError: it is no comparison, or there is no such metric.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise UserError(
            f"--fail-on {text}: write METRIC, < or >, and a change, as 'train_tokens_per_second<-5%' or "
            f"'exact_match<-0.02', or '{MISSING}'"
        )
    metric, sign, number, percent = match.groups()
    if find_metric(metric) is None:
        raise UserError(f"--fail-on {text}: there is no metric '{metric}'{nearest(metric, METRICS)}")
    scale = 100 if percent else 1
    return Gate(text=text, metric=metric, sign=sign, bound=float(number) / scale, relative=bool(percent))
