"""From the `tracker` section (name -> settings) to trackers; what is missing is said before anything runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from left_bench.core.errors import UserError, nearest
from left_bench.tracker.base import NoTracker, Tracker
from left_bench.tracker.several import Shielded, Together

Settings = Mapping[str, Any]


def _wandb(settings: Settings, store: Path) -> Tracker:
    from left_bench.tracker.wandb import WandbTracker

    return WandbTracker(store=store, **settings)


def _trackio(settings: Settings, store: Path) -> Tracker:
    from left_bench.tracker.trackio import TrackioTracker

    return TrackioTracker(**settings)


def _mlflow(settings: Settings, store: Path) -> Tracker:
    from left_bench.tracker.mlflow import MlflowTracker

    return MlflowTracker(store=store, **settings)


def _tensorboard(settings: Settings, store: Path) -> Tracker:
    from left_bench.tracker.tensorboard import TensorboardTracker

    return TensorboardTracker(store=store, **settings)


def _jsonl(settings: Settings, store: Path) -> Tracker:
    from left_bench.tracker.jsonl import JsonlTracker

    return JsonlTracker(store=store, **settings)


class _Kind:
    def __init__(self, make: Callable[[Settings, Path], Tracker], *packages: str, **defaults: Any) -> None:
        self.make, self.packages, self.defaults = make, packages, defaults


_KINDS = {
    "wandb": _Kind(_wandb, "wandb", project="left_bench", entity=None, artifacts=True),
    "trackio": _Kind(_trackio, "trackio", project="left_bench"),
    "mlflow": _Kind(
        _mlflow, "mlflow", "sqlalchemy", "alembic", project="left_bench", tracking_uri=None, artifacts=False
    ),
    "tensorboard": _Kind(_tensorboard, "tensorboard", folder=None),
    "jsonl": _Kind(_jsonl, folder=None),
}
TRACKERS = tuple(_KINDS)


def check_trackers(section: Mapping[str, Any]) -> None:
    """Refuse what no tracker knows and trackers whose package is not installed; nothing is imported or opened.

    Raises:
        UserError: naming the key and the mend.
    """
    for name, settings in section.items():
        if name not in _KINDS:
            hint = nearest(name, TRACKERS) or f"; trackers are {', '.join(TRACKERS)}"
            raise UserError(f"tracker.{name}: no such tracker{hint} (settings are written tracker.NAME.KEY=VALUE)")
        kind = _KINDS[name]
        if not isinstance(settings, Mapping):
            raise UserError(f"tracker.{name}={settings!r}: no settings; they are written tracker.{name}.KEY=VALUE")
        for key in settings:
            if key not in kind.defaults:
                hint = nearest(key, kind.defaults) or f"; {name} has {', '.join(kind.defaults)}"
                raise UserError(f"tracker.{name}.{key}: no such setting{hint}")
        missing = [package for package in kind.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(
                f"tracker={name}: the package {missing[0]} is not installed; pip install 'left-bench[{name}]', "
                "or choose another tracker (tracker=none)"
            )


def open_tracker(section: Mapping[str, Any], *, store: Path) -> Tracker:
    """The trackers of a section as one, each shielded; no package is imported before the first run starts.

    Args:
        section: name -> settings; empty: none.
        store: the runs folder, below which local stores lie.

    Raises:
        UserError: see `check_trackers`.
    """
    check_trackers(section)
    shielded = [Shielded(make_tracker(name, settings, store=store), name) for name, settings in section.items()]
    if not shielded:
        return NoTracker()
    return shielded[0] if len(shielded) == 1 else Together(shielded)


def make_tracker(name: str, settings: Mapping[str, Any], *, store: Path) -> Tracker:
    """One tracker as it is, its failures not caught."""
    kind = _KINDS[name]
    return kind.make(kind.defaults | dict(settings), store)


def defaults_of(name: str) -> dict[str, Any]:
    """A tracker's settings and what they are where nothing else is said."""
    return dict(_KINDS[name].defaults)
