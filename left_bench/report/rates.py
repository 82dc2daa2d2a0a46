"""How each row's learning rate was come by: tuned, the method's own, set by hand, shared; and what the tuning took."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from left_bench.report.cells import Row, option
from left_bench.report.curves import Told, as_markdown
from left_bench.report.markdown import details, escape
from left_bench.report.report import Report
from left_bench.report.tables import cut_line
from left_bench.report.values import ABSENT, format_value, one_line

_BY_HAND = ("training.learning_rate=", "peft.learning_rate=")
_KEY = "training.learning_rate"
_OWN_IS_NOT_TUNED = (
    "`own default` is the rate that comes with the method: the package's authors chose it on the default model and "
    "data, with more trials for some methods than for others, or for none. `+tune=rates` tries as many for each."
)


class Point(NamedTuple):
    """A trial."""

    rate: float
    loss: float | None
    """Validation loss; None: training diverged, or there is no value."""
    ended: str | None
    """Why it is not like the others: `diverged`, `pruned after 5 steps`, `no value`."""
    size: float


class Tuned(NamedTuple):
    """What a record says of the tuning behind it (`provenance.tuned`)."""

    rate: float
    own: float | None
    trials: int
    further: int
    """Beyond an end of the first space."""
    edge: str | None
    """The end of what was tried at which the best lies, `upper` or `lower`; None: inside."""
    space: tuple[float, float] | None
    """With what it was widened to."""
    size: float | None
    loss: float | None
    """Of the best trial; None: none had a value."""
    seed: Any
    runs: int
    seconds: float | None
    joules: float | None
    points: tuple[Point, ...]

    @property
    def without_value(self) -> bool:
        return self.loss is None


def tuned_of(row: Row) -> Tuned | None:
    """What the row's records say of their tuning; None where they say nothing that can be read."""
    for run in row.runs:
        plain = run.record.provenance.get("tuned") if run.record else None
        if isinstance(plain, Mapping) and (result := _read(plain)) is not None:
            return result
    return None


def rate_of(row: Row) -> float | None:
    """The learning rate in force; None where the record does not tell."""
    return _number(row.section("training").get("learning_rate"))


def how_rates_came(rows: Sequence[Row]) -> list[str]:
    """For each row its learning rate and where it comes from, in words; a dash where there is no record."""
    plain = [_plainly(row) for row in rows]
    by_hand = [(row, rate_of(row)) for row, how in zip(rows, plain, strict=True) if how == "set by hand"]
    optimizers = {option(row, "optimizer") for row in rows if row.record}
    shared = len({rate for _, rate in by_hand}) == 1 and len({option(row, "peft") for row, _ in by_hand}) > 1
    others = [(option(row, "peft"), rate_of(row)) for row, how in zip(rows, plain, strict=True) if how == "own default"]
    result = []
    for row, how in zip(rows, plain, strict=True):
        tuned, rate = tuned_of(row), rate_of(row)
        if rate is None:
            result.append(ABSENT)
        elif tuned is not None:
            result.append(_in_words(tuned))
        elif how == "set by hand" and shared:
            result.append(f"shared, set by hand, {format_rate(rate)}")
        elif how == "own default" and len(optimizers) > 1 and len(set(others)) == 1 and len(others) > 1:
            result.append(f"shared by the optimizers, the method's own default, {format_rate(rate)}")
        else:
            result.append(f"{how}, {format_rate(rate)}")
    return result


def rates_column(report: Report, rows: Sequence[Row]) -> list[str] | None:
    """The leaderboard's column, escaped; None where the rate is what the rows are compared in."""
    if any(axis.key == _KEY for axis in report.axes) or not any(row.record for row in rows):
        return None
    known = dict(zip(map(id, report.rows), how_rates_came(report.rows), strict=True))
    return [escape(known[id(row)]) for row in rows]


def about_rates(report: Report) -> Iterator[str]:
    """What `own default` means, where a row has one."""
    told = how_rates_came(report.rows)
    if len(report.rows) > 1 and any("own default" in text for text in told):
        yield _OWN_IS_NOT_TUNED


def rates_told(rows: Sequence[Row], labels: Sequence[str]) -> Told | None:
    """A table of how the rates were come by and what that took; None where none was tuned."""
    found = [tuned_of(row) for row in rows]
    if not any(found):
        return None
    joules = any(tuned is not None and tuned.joules is not None for tuned in found)
    header = ["cell", "learning rate", "own", "tried from", "to", "best validation loss", "trials", "tuning took"]
    header += ["energy"] if joules else []
    lines = []
    for label, tuned, how in zip(labels, found, how_rates_came(rows), strict=True):
        line = [label, how]
        if tuned is None:
            lines.append(line + [ABSENT] * (len(header) - 2))
            continue
        line.append(ABSENT if tuned.own is None else format_rate(tuned.own))
        line += [ABSENT, ABSENT] if tuned.space is None else [format_rate(end) for end in tuned.space]
        line.append(format_value("validation_loss", tuned.loss))
        line.append(f"{tuned.trials}{f' + {tuned.further}' if tuned.further else ''}")
        line.append(format_value("wall_seconds", tuned.seconds))
        line += [format_value("cell_joules", tuned.joules)] if joules else []
        lines.append(line)
    return Told("Learning rates, and what finding them took", header, lines, list(_remarks(rows, found)))


def rates_section(report: Report, pictures: Sequence[tuple[str, str]]) -> Iterator[str]:
    """The table as Markdown, folded, and its plot."""
    told = rates_told(report.rows, report.labels)
    if told is None:
        return
    yield "## Learning rates"
    yield escape(told.remarks[0])
    yield details(told.title, f"{as_markdown(told)}\n\n{escape(' '.join(told.remarks[1:]))}")
    yield from cut_line(len(told.lines))
    for file, shown in pictures:
        yield f"![{escape(shown)}]({file})"


def format_rate(rate: float) -> str:
    """`1e-3`, `1.25e-4`."""
    number, _, power = f"{rate:.2e}".partition("e")
    return f"{number.rstrip('0').rstrip('.')}e{int(power)}"


def _plainly(row: Row) -> str:
    """Where an untuned rate comes from, by what was typed and what the configuration holds."""
    if row.record is None:
        return ABSENT
    given = row.record.provenance.get("overrides")
    typed = [str(item).lstrip("+") for item in given] if isinstance(given, list) else []
    if any(item.startswith(_BY_HAND) for item in typed):
        return "set by hand"
    own, scale = row.section("peft").get("learning_rate"), row.section("training").get("learning_rate_scale", 1.0)
    rate = rate_of(row)
    known = _number(own) is not None and _number(scale) is not None and rate is not None
    return "own default" if known and math.isclose(own * scale, rate or 0.0, rel_tol=1e-9) else "set by hand"


def _in_words(tuned: Tuned) -> str:
    trials = f"{tuned.trials}{f' + {tuned.further}' if tuned.further else ''} trials"
    if tuned.without_value:
        return f"own default, {format_rate(tuned.rate)} ({trials}, none with a value)"
    where = "inside" if tuned.edge is None else f"at the {tuned.edge} edge"
    size = "" if tuned.size is None else f"size ×{tuned.size:g}, "
    return f"tuned ({trials}, {format_rate(tuned.rate)}, {size}{where})"


def _remarks(rows: Sequence[Row], found: Sequence[Tuned | None]) -> Iterator[str]:
    tuned = [item for item in found if item is not None]
    trials, seeds = sum(item.trials + item.further for item in tuned), {one_line(item.seed) for item in tuned}
    took = [item.seconds for item in tuned if item.seconds is not None]
    spent = [run.record.metrics.get("wall_seconds") for row in rows for run in row.runs if run.record]
    cost = f"{trials:,} trials took {format_value('wall_seconds', math.fsum(took))}"
    joules = [item.joules for item in tuned]
    if joules and None not in joules:
        cost += f" and {format_value('cell_joules', math.fsum(value for value in joules if value is not None))}"
    known = [seconds for seconds in spent if seconds is not None]
    beside = f", beside {format_value('wall_seconds', math.fsum(known))} of the cells compared" if known else ""
    several = len({item.trials for item in tuned}) > 1
    same = (
        "Not every method had the same number of trials"
        if several
        else f"Each tuned method had {tuned[0].trials} trials"
    )
    yield f"{same}, chosen between by validation loss: no test row was read before the comparison. {cost}{beside}."
    yield f"Trials ran under seed {', '.join(sorted(seeds))}, which no compared cell has."
    if any(item.further for item in tuned):
        yield (
            "Where the best of the first trials lay at an end of its space, the space was widened there once; the "
            "trials after the plus sign are those, and the other methods had none of them."
        )
    if any(item.edge is not None for item in tuned):
        yield "At an edge: a rate beyond all that were tried may be better still, and the method with it."


def _read(plain: Mapping[str, Any]) -> Tuned | None:
    """From a record, which may hold anything."""
    rate, trials = _number(plain.get("learning_rate")), _number(plain.get("trials"))
    if rate is None or rate <= 0 or trials is None:
        return None
    more = plain.get("widened")
    widened: Mapping[str, Any] = more if isinstance(more, Mapping) else {}
    ends = [*_numbers(plain.get("space")), *_numbers(widened.get("space"))]
    edge = plain.get("edge")
    tried = plain.get("tried")
    points = [_point(item) for item in tried] if isinstance(tried, list) else []
    return Tuned(
        rate=rate,
        own=_number(plain.get("own_learning_rate")),
        trials=int(trials),
        further=int(_number(widened.get("trials")) or 0),
        edge=edge if edge in ("upper", "lower") else None,
        space=(min(ends), max(ends)) if ends else None,
        size=_number(plain.get("size")),
        loss=None if plain.get("without_value") else _number(plain.get("validation_loss")),
        seed=plain.get("seed"),
        runs=int(_number(plain.get("runs")) or 0),
        seconds=_number(plain.get("seconds")),
        joules=_number(plain.get("joules")),
        points=tuple(sorted((item for item in points if item is not None), key=lambda item: item.rate)),
    )


def _point(item: Any) -> Point | None:
    rate = _number(item.get("learning_rate")) if isinstance(item, Mapping) else None
    if rate is None or rate <= 0:
        return None
    ended = item.get("ended")
    return Point(
        rate,
        _number(item.get("validation_loss")),
        None if ended is None else one_line(ended),
        _number(item.get("size")) or 1.0,
    )


def _numbers(value: Any) -> list[float]:
    return [number for item in value if (number := _number(item)) is not None] if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if plain else None
