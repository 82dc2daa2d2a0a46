"""From the `tracker` section (name -> settings) to trackers; what is missing is said before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from left_bench.core.errors import UserError, nearest
from left_bench.core.extensions import Registry
from left_bench.core.paths import is_installed
from left_bench.tracker.base import NoTracker, Tracker, TrackerKind
from left_bench.tracker.several import Shielded, Together

TRACKERS: Registry[TrackerKind] = Registry("left_bench.tracker.kinds", "TRACKER", group="left_bench.trackers")
"""Name -> tracker: a module in `kinds`, or an entry point of another package."""


def check_trackers(section: Mapping[str, Any]) -> None:
    """Refuse what no tracker knows and trackers whose package is not installed; nothing is imported or opened.

    Raises:
        UserError: naming the key and what to write or install instead.
    """
    for name, settings in section.items():
        if name not in TRACKERS:
            hint = nearest(name, TRACKERS) or f"; trackers are {', '.join(TRACKERS)}"
            raise UserError(f"tracker.{name}: no such tracker{hint} (settings are written tracker.NAME.KEY=VALUE)")
        kind = TRACKERS[name]
        if not isinstance(settings, Mapping):
            raise UserError(f"tracker.{name}={settings!r}: no settings; they are written tracker.{name}.KEY=VALUE")
        for key in settings:
            if key not in kind.settings:
                hint = nearest(key, kind.settings) or f"; {name} has {', '.join(kind.settings)}"
                raise UserError(f"tracker.{name}.{key}: no such setting{hint}")
        missing = [package for package in kind.packages if not is_installed(package)]
        if missing:
            what = f"'left-bench[{kind.extra}]'" if kind.extra else missing[0]
            raise UserError(
                f"tracker={name}: the package {missing[0]} is not installed; pip install {what}, "
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
    kind = TRACKERS[name]
    return kind.make(store=store, **{**kind.settings, **settings})


def defaults_of(name: str) -> dict[str, Any]:
    """A tracker's settings and what they are where nothing else is said."""
    return dict(TRACKERS[name].settings)
