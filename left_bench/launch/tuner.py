"""Tuning before a comparison: the same number of trials for each method of a sweep, by validation loss.

`Search` asks Optuna what one method tries next; `Tuner` has a search for each method, makes cells of what they ask,
and gives the comparison's jobs what was found. Both are deterministic: with the same answers they ask the same
questions, so a tuning that was interrupted goes on from the records of its trials.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from left_bench.core.errors import UserError
from left_bench.core.paths import versions_of
from left_bench.grid.tuning import Point, Tuning, chosen_overrides, method_of, sizes_of, trial_overrides
from left_bench.launch.composed import Composed
from left_bench.spec.cell import Cell
from left_bench.spec.record import Record

_REPEATS = 20
"""Proposals of a point that was tried before, until it is taken nevertheless: its record is there already."""
End = Literal["lower", "upper"]


class Asked(NamedTuple):
    """A run that a search wants next."""

    number: int
    """Of the trial, from 1."""
    point: Point
    steps: int
    widening: bool
    """It lies beyond an end of the first space."""


class Tried(NamedTuple):
    """How a trial ended."""

    point: Point
    steps: int
    """Those of its last rung."""
    loss: float | None
    """Validation loss; infinite where training diverged, None where there is none."""
    pruned: bool


class Search:
    """One method's trials, asked one after the other."""

    def __init__(self, tuning: Tuning, *, own: float, sizes: Sequence[float], steps: int, name: str) -> None:
        """`own` is the method's own learning rate, the first that is tried if it lies in the space."""
        self._tuning, self._own, self._sizes, self._name = tuning, own, list(sizes), name
        self._rungs = tuning.steps(steps)
        self.low, self.high = own * tuning.lower, own * tuning.upper
        self.tried: list[Tried] = []
        self.widened: End | None = None
        self.widened_to: tuple[float, float] | None = None
        self._asked: Asked | None = None
        self._trial: Any = None
        self._rung = 0
        self._begin(self.low, self.high, tuning.trials, _spread(self.low, self.high, own, tuning.trials // 2 + 1))

    def _begin(self, low: float, high: float, trials: int, spread: Sequence[float]) -> None:
        import optuna

        self._low, self._high = low, high
        self._end = len(self.tried) + trials
        self._study = optuna.create_study(
            study_name=f"{self._name}-{len(self.tried)}",  # hyperband makes its brackets from it
            direction="minimize",
            sampler=_sampler(self._tuning),
            pruner=_pruner(self._tuning, self._rungs),
        )
        own_size = {"size": 1.0} if len(self._sizes) > 1 and 1.0 in self._sizes else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna 2 calls it experimental
            for rate in spread:
                self._study.enqueue_trial({"rate": rate} | own_size)

    def ask(self) -> Asked | None:
        """The run that is wanted now, the same until `tell`; None when the search is over."""
        if self._asked is not None:
            return self._asked
        if len(self.tried) == self._end and not self._widen():
            return None
        if self._trial is None:
            self._point = self._propose()
            self._rung = 0
        number = len(self.tried) + 1
        self._asked = Asked(number, self._point, self._rungs[self._rung], self.widened is not None)
        return self._asked

    def tell(self, loss: float | None) -> None:
        """How the run that was asked for ended: its validation loss, infinite if it diverged, None without one."""
        from optuna.trial import TrialState

        assert self._asked is not None
        asked, self._asked = self._asked, None
        pruned, last = False, self._rung == len(self._rungs) - 1
        if loss is not None and math.isfinite(loss) and not last:
            self._trial.report(loss, asked.steps)
            pruned = self._trial.should_prune()
            if not pruned:
                self._rung += 1
                return
        if pruned:
            self._study.tell(self._trial, state=TrialState.PRUNED)
        elif loss is None:
            self._study.tell(self._trial, state=TrialState.FAIL)
        else:
            self._study.tell(self._trial, loss)
        self._trial = None
        self.tried.append(Tried(asked.point, asked.steps, loss, pruned))

    def _propose(self) -> Point:
        from optuna.trial import TrialState

        for repeats in range(_REPEATS):
            self._trial = self._study.ask()
            rate = self._trial.suggest_float("rate", self._low, self._high, log=True)
            size = self._trial.suggest_categorical("size", self._sizes) if len(self._sizes) > 1 else self._sizes[0]
            rate = self._own if math.isclose(rate, self._own, rel_tol=1e-9) else float(f"{rate:.3g}")
            point = Point(rate, size)
            before = next((item for item in self.tried if item.point == point), None)
            if before is None or repeats == _REPEATS - 1:
                break
            if before.loss is None or before.pruned:
                self._study.tell(self._trial, state=TrialState.FAIL)
            else:
                self._study.tell(self._trial, before.loss)
        return point

    @property
    def best(self) -> Tried | None:
        """The lowest loss after all steps, the first of equals."""
        whole = [item for item in self.tried if not item.pruned and item.loss is not None and math.isfinite(item.loss)]
        return min(whole, key=lambda item: item.loss or 0.0, default=None)

    @property
    def edge(self) -> End | None:
        """The end of what was tried at which the best lies: no rate beyond it was seen to be worse."""
        best = self.best
        rates = [item.point.rate for item in self.tried if item.loss is not None]
        if best is None:
            return None
        if best.point.rate == max(rates):
            return "upper"
        return "lower" if best.point.rate == min(rates) else None

    @property
    def left(self) -> int:
        """Trials to come, those of a widening aside until it has begun."""
        return self._end - len(self.tried)

    def _widen(self) -> bool:
        """Begin further trials beyond the end at which the best lies, once; whether there are any."""
        trials, edge, best = self._tuning.widening_trials, self.edge, self.best
        if edge is None or best is None or self.widened is not None or not trials:
            return False
        stretch = math.sqrt(self.high / self.low)
        self.widened = edge
        if edge == "upper":
            low, high = best.point.rate, self.high * stretch
        else:
            low, high = self.low / stretch, best.point.rate
        self.widened_to = low, high
        known, other = (low, high) if edge == "upper" else (high, low)
        number = max(1, trials // 2)
        self._begin(low, high, trials, [known * (other / known) ** (i / number) for i in range(1, number)] + [other])
        return True


def _spread(low: float, high: float, own: float, number: int) -> list[float]:
    """At most so many rates spread evenly over the space, its ends among them, the method's own first.

    Every method's are the same multiples of its own.
    """
    number -= 1 - number % 2
    inside = [own] if low <= own <= high else []
    if number < 3:
        return inside or [math.sqrt(low * high)]
    even = [low, *(low * (high / low) ** (i / (number - 1)) for i in range(1, number - 1)), high]
    others = [rate for rate in even if not any(math.isclose(rate, own, rel_tol=1e-6) for own in inside)]
    return [*inside, *sorted(others, key=lambda rate: round(abs(math.log(rate / own)), 6))][:number]


def _sampler(tuning: Tuning) -> Any:
    import optuna

    if tuning.sampler == "qmc":
        sampler = getattr(optuna.samplers, "QMCSampler")  # noqa: B009 (Optuna 2 has none)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental, as Optuna has it
            return sampler(qmc_type="sobol", scramble=True, seed=tuning.seed, warn_independent_sampling=False)
    if tuning.sampler == "random":
        return optuna.samplers.RandomSampler(seed=tuning.seed)
    return optuna.samplers.TPESampler(seed=tuning.seed, n_startup_trials=1)  # after those that are spread evenly


def _pruner(tuning: Tuning, rungs: Sequence[int]) -> Any:
    import optuna

    if tuning.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=rungs[0], reduction_factor=tuning.reduction)
    if tuning.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=rungs[0], max_resource=rungs[-1], reduction_factor=tuning.reduction
        )
    return optuna.pruners.NopPruner()


def get_optuna_ready(tuning: Tuning) -> None:
    """Its warnings alone; what the installed version lacks is refused.

    Raises:
        UserError: naming what to install.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if tuning.sampler == "qmc" and not hasattr(optuna.samplers, "QMCSampler"):
        raise UserError(
            f"tune.sampler=qmc: Optuna {optuna.__version__} has no such sampler; pip install 'optuna>=4', which does "
            "without the extra optuna (its plugin wants an older one), or give tune.sampler=tpe"
        )


class Method(NamedTuple):
    """One method of the comparison, whatever the seed."""

    job: Composed
    """The first of its cells, as it is without tuning."""
    search: Search
    spent: dict[str, Record]
    """Cell -> record, of its trials."""


class Run(NamedTuple):
    """A trial's run that is to come."""

    method: Method
    asked: Asked
    job: Composed


class Tuner:
    """The searches of all methods of a sweep."""

    def __init__(self, tuning: Tuning, jobs: Sequence[Composed], compose: Callable[[list[str]], Composed]) -> None:
        """`jobs` are those of the comparison that no rule refuses; `compose` makes a job of overrides."""
        get_optuna_ready(tuning)
        self._tuning, self._compose = tuning, compose
        self._methods: dict[str, Method] = {}
        for job in jobs:
            name, cell = method_of(job.cell), job.cell
            if name not in self._methods:
                sizes = sizes_of(cell, tuning)
                search = Search(tuning, own=cell.learning_rate, sizes=sizes, steps=cell.training.steps, name=name)
                self._methods[name] = Method(job, search, {})

    @property
    def methods(self) -> int:
        return len(self._methods)

    @property
    def left(self) -> int:
        """Trials to come, as far as is known."""
        return sum(method.search.left for method in self._methods.values())

    def take_up(self, finished: Callable[[Cell], Record | None]) -> int:
        """Go on from the records there are; how many runs they answer for."""
        taken = 0
        for method in self._methods.values():
            while (run := self._next(method)) is not None and (record := finished(run.job.cell)) is not None:
                self.tell(run, record)
                taken += 1
        return taken

    def ask(self) -> list[Run]:
        """The next run of each method, which may run side by side; none when all searches are over."""
        return [run for method in self._methods.values() if (run := self._next(method)) is not None]

    def tell(self, run: Run, record: Record | None) -> None:
        """How a run ended."""
        if record is not None:
            run.method.spent[record.cell_id] = record
        run.method.search.tell(None if record is None else loss_of(record))

    def planned(self) -> list[tuple[Cell, int]]:
        """What is to run, for an estimate: a cell of each method and rung, and how many; without a widening."""
        result = []
        for method in self._methods.values():
            search, cell = method.search, method.job.cell
            for rung, steps in enumerate(self._tuning.steps(cell.training.steps)):
                share = -(-search.left // self._tuning.reduction**rung)
                if share:
                    own = trial_overrides(
                        method.job.overrides, cell, self._tuning, Point(cell.learning_rate), steps=steps
                    )
                    result.append((self._compose(own).cell, share))
        return result

    def settled(self, job: Composed) -> Composed:
        """A job of the comparison with what was found for its method, and how it was found.

        A method none of whose trials had a value keeps its own rate, and says so.
        """
        method = self._methods.get(method_of(job.cell))
        if method is None:
            return job
        best = method.search.best
        if best is not None:
            found = self._compose([*job.overrides, *chosen_overrides(method.job.cell, best.point)])
            job = found._replace(trial=job.trial)
        return job._replace(provenance={"tuned": self._told(method)})

    def _next(self, method: Method) -> Run | None:
        asked = method.search.ask()
        if asked is None:
            return None
        cell = method.job.cell
        own = trial_overrides(method.job.overrides, cell, self._tuning, asked.point, steps=asked.steps)
        told = {"method": method_of(cell), "trial": asked.number, "by": self._tuning.name}
        if asked.widening:
            told["beyond"] = method.search.widened
        return Run(method, asked, self._compose(own)._replace(provenance={"tuning": told}))

    def _told(self, method: Method) -> dict[str, Any]:
        """`provenance.tuned` of the comparison's records."""
        search, tuning, spent = method.search, self._tuning, [*method.spent.values()]
        best, edge = search.best, search.edge
        told: dict[str, Any] = {
            "by": tuning.name,
            "trials": min(len(search.tried), tuning.trials),
            "learning_rate": method.job.cell.learning_rate if best is None else best.point.rate,
            "own_learning_rate": method.job.cell.learning_rate,
            "space": [float(f"{end:.3g}") for end in (search.low, search.high)],
            "at_edge": edge is not None,
        }
        if best is None:
            told["without_value"] = True
        else:
            told["validation_loss"] = best.loss
        if edge is not None:
            told["edge"] = edge
        if best is not None and sizes_of(method.job.cell, tuning) != [1.0]:
            told["size"] = best.point.size
        if search.widened is not None and search.widened_to is not None:
            ends = [float(f"{end:.3g}") for end in search.widened_to]
            more = len(search.tried) - tuning.trials
            told["widened"] = {"end": search.widened, "trials": more, "space": ends}
        told |= {
            "runs": len(spent),
            "steps": sum(int(record.metrics.get("train_steps", 0)) for record in spent),
            "seconds": round(sum(record.metrics.get("wall_seconds", 0.0) for record in spent), 3),
        }
        joules = [record.metrics.get("cell_joules") for record in spent]
        if spent and None not in joules:
            told["joules"] = round(sum(value for value in joules if value is not None), 3)
        told |= {
            "sampler": tuning.sampler,
            "pruner": tuning.pruner,
            "seed": tuning.seed,
            "optuna": versions_of(["optuna"])["optuna"],
            "tried": [_as_plain(item) for item in search.tried],
        }
        return told


def loss_of(record: Record) -> float | None:
    """What a trial's record says: its validation loss, infinite if training diverged, None if there is none."""
    if record.status == "diverged":
        return math.inf
    return record.metrics.get("validation_loss") if record.status == "ok" else None


def is_finished(record: Record) -> bool:
    """Whether a trial need not be run again: a rate at which training diverges is an answer."""
    return record.status in ("ok", "diverged")


def _as_plain(tried: Tried) -> Mapping[str, Any]:
    """For a record, whose numbers are finite: a loss that is not there is left out, and why is said."""
    result: dict[str, Any] = {"learning_rate": tried.point.rate}
    if tried.point.size != 1.0:
        result["size"] = tried.point.size
    if tried.loss is None:
        return result | {"ended": "no value"}
    if not math.isfinite(tried.loss):
        return result | {"ended": "diverged"}
    result["validation_loss"] = tried.loss
    return result | ({"ended": f"pruned after {tried.steps} steps"} if tried.pruned else {})
