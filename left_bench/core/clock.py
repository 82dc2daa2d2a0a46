"""Dates as records hold them."""

from __future__ import annotations

import datetime


def utc_now() -> str:
    """Now, in ISO 8601 with seconds: `2026-11-27T23:00:00+00:00`."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
