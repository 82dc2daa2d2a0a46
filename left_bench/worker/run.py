"""The measured run of one cell, in its own process: `python -m left_bench.worker.run RUN_DIR`.

It reads `cell.json`, reports progress to its parent through `events.jsonl`, and writes a record to `outcome.json`. Read
`work` from top to bottom: that is the run.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from left_bench.core.clock import utc_now
from left_bench.core.files import write_atomically
from left_bench.processes import memory_limit, ranks
from left_bench.processes.ranks import OUTCOME_NAME, Team
from left_bench.processes.start_process import STACK_SIGNAL, die_with_parent
from left_bench.spec.cell import Cell
from left_bench.spec.events import EVENTS_NAME, EventWriter, NullEventWriter
from left_bench.spec.record import Status, outcome_of
from left_bench.spec.run_files import ADAPTER_NAME, CELL_NAME
from left_bench.worker.classify_error import disk_full, out_of_memory_reason, status_of

NO_OUTCOME = 74  # sysexits.h: EX_IOERR


def work(
    cell: Cell,
    *,
    run_dir: Path,
    draft: dict[str, Any],
    events: EventWriter,
    exceeded: Callable[[int], None] = lambda used: None,
    reloads: Callable[[Path], bool] | None = None,
    team: Team = ranks.ALONE,
) -> None:
    """Fine-tune and measure one cell; results go into `draft` as soon as they are known.

    `exceeded` is called from another thread if memory use exceeds `hardware.memory_limit`. `reloads` returns whether
    the saved adapter reproduces its losses, for `eval.check_reload`. Every rank of `team` runs this; only the first
    evaluates and saves.

    Raises:
        Exception: any error; `draft` then holds what was measured before.
    """
    from left_bench.worker import stages

    run = stages.begin(cell, run_dir=run_dir, draft=draft, events=events, exceeded=exceeded, team=team)
    base_model = stages.load_base(run)
    before = stages.score_base(run, base_model)
    model = stages.attach_method(run, base_model)
    stages.train(run, model)
    base_model, model = stages.gather_shards(run, base_model, model)
    if not team.first:
        return
    stages.evaluate_adapted(run, model, before)
    stages.save(run, base_model, model)
    stages.check_reload(run, reloads)
    stages.check_merge(run, model)
    run.meter.finish_cell()


def main(argv: list[str], *, forked: bool = False) -> int:
    """Run the cell in `RUN_DIR` and write its outcome, whatever its status; exit code NO_OUTCOME if that fails.

    `RUN_DIR RANK` starts another rank of a cell with several processes. `forked`: this process came from the fork
    server, or is a fork of one that did, and has done nothing yet.
    """
    run_dir, rank = Path(argv[0]), int(argv[1]) if len(argv) > 1 else 0
    faulthandler.enable()  # a segfault leaves its stack in worker.log
    if STACK_SIGNAL is not None:
        faulthandler.register(STACK_SIGNAL)  # and so does a hanging run, when its parent asks
    die_with_parent()
    cell = Cell.model_validate_json((run_dir / CELL_NAME).read_text(encoding="utf-8"))
    team = Team(run_dir, rank=rank, size=cell.hardware.processes)
    team.start(partial(main, forked=True) if forked else None)
    reloads = None
    if cell.eval.check_reload and team.first:
        from left_bench.worker import reload_check

        reloads = reload_check.start_reload_checker() if forked else reload_check.gives_the_same_loss
    events = EventWriter(run_dir / EVENTS_NAME) if team.first else NullEventWriter(run_dir / EVENTS_NAME)
    started = utc_now()
    result: dict[str, Any] = {"provenance": {}}
    ended = threading.Lock()

    def end(status: Status, reason: str | None) -> None:
        """Write the outcome and exit; called by the run itself or its memory watchdog, whichever is first."""
        ended.acquire()
        memory_limit.lift()  # a run that is out of memory needs some to report it
        # JSON has no NaN; a loss that is not a number is given in the reason
        result["metrics"] = {name: value for name, value in dict(result.get("metrics", {})).items() if isfinite(value)}
        outcome = outcome_of(cell, status, reason, started_at=started, measured=result)
        try:
            write_atomically(ranks.folder_of(run_dir, rank) / OUTCOME_NAME, outcome.model_dump_json(exclude_none=True))
        except OSError as error:
            print(f"no outcome: {error}", file=sys.stderr, flush=True)
            os._exit(NO_OUTCOME)
        team.dismiss()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # the outcome is on disk; tearing down torch's threads takes a second and can hang

    def exceeded(used_bytes: int) -> None:
        used = f"{used_bytes / 2**20:.0f} MiB resident"
        end("oom", out_of_memory_reason(used, limit_bytes=cell.hardware.memory_limit))

    team.watch(end)
    status: Status = "ok"
    reason = None
    try:
        work(cell, run_dir=run_dir, draft=result, events=events, exceeded=exceeded, reloads=reloads, team=team)
    except Exception as error:
        memory_limit.lift()
        status, reason = team.why_lost(error) or status_of(
            error, limit_bytes=cell.hardware.memory_limit, device=cell.device_type
        )
        if disk_full(error):  # an incomplete adapter is useless, and the outcome needs its space
            shutil.rmtree(run_dir / ADAPTER_NAME, ignore_errors=True)
        traceback.print_exc()
    end(status, reason)
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
