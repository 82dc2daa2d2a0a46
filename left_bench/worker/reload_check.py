"""Checks in a separate process that the saved adapter reproduces the measured losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from left_bench.processes.start_process import die_with_parent
from left_bench.spec.run_files import ADAPTER_NAME, ROWS_NAME
from left_bench.worker.classify_error import NoRoomToCheck, says_out_of_memory

EQUAL = "equal"


def gives_the_same_loss(run_dir: Path) -> bool:
    """Load base model and adapter in a new process; True if every held-out row's loss equals the recorded one exactly.

    Raises:
        NoRoomToCheck: the new process ran out of memory.
        RuntimeError: loading or evaluating failed; the message is the new process's last line.
    """
    done = subprocess.run(
        [sys.executable, "-m", "left_bench.worker.reload_check", str(run_dir)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise _unusable((done.stderr.strip().splitlines() or ["?"])[-1])
    return done.stdout.strip().splitlines()[-1] == EQUAL


def start_reload_checker() -> Callable[[Path], bool]:
    """The same check by a fork of this process, which is created now and sleeps until it is needed.

    For a worker that was itself forked after the imports, before it has loaded anything or started a torch thread: the
    fork is then as fresh as a new interpreter, and saves the ten seconds of its imports.
    """
    request, send = os.pipe()
    answer, reply = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(send)
        os.close(answer)
        _wait_and_reply(request, reply)
    os.close(request)
    os.close(reply)

    def gives_the_same_loss(run_dir: Path) -> bool:
        os.write(send, f"{run_dir}\n".encode())
        os.close(send)
        with os.fdopen(answer, encoding="utf-8") as lines:
            result = lines.read().strip()
        os.waitpid(child, 0)
        if result.startswith("error: ") or not result:
            raise _unusable(result.removeprefix("error: ") or "the process ended without an answer")
        return result == EQUAL

    return gives_the_same_loss


def _wait_and_reply(request: int, reply: int) -> None:
    try:
        die_with_parent()
        with os.fdopen(request, encoding="utf-8") as lines:
            run_dir = lines.readline().strip()
        if run_dir:  # otherwise the run ended without a request
            os.write(reply, compare_losses(Path(run_dir)).encode())
    except BaseException as error:
        traceback.print_exc()
        os.write(reply, f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}".encode())
    finally:
        os._exit(0)


def compare_losses(run_dir: Path) -> str:
    """`equal`, or the largest difference between a row's loss with the reloaded adapter and in `rows.jsonl`."""
    import torch

    from left_bench.evaluation import evaluate
    from left_bench.evaluation.shared_prompt import read_shared_prompt
    from left_bench.model import load as models
    from left_bench.processes.ranks import Team
    from left_bench.worker.load_trained import cell_of, load_base, with_adapter
    from left_bench.worker.stages import set_threads

    cell = cell_of(run_dir)
    device = cell.device_type
    set_threads(cell, Team(size=cell.hardware.processes))  # the same number as in the evaluation
    folder, tokenizer = models.open_pretrained(cell)
    splits = models.load_rows_of(cell, tokenizer, folder=folder)
    test = splits.test
    test = test if cell.eval.rows is None else test[: cell.eval.rows]
    model = with_adapter(load_base(cell, folder=folder, classes=splits.classes), cell, run_dir / ADAPTER_NAME)
    with torch.no_grad(), models.autocast(cell, device=device):
        common: dict[str, Any] = {"pad_id": evaluate.pad_of(tokenizer), "device": device}
        shared = read_shared_prompt(model, test, cell, **common)
        result = evaluate.row_losses(model, test, cell, shared=shared, **common).nll
    lines = (run_dir / ROWS_NAME).read_text(encoding="utf-8").splitlines()
    recorded = [json.loads(line)["nll"] for line in lines]
    difference = max(abs(one - other) for one, other in zip(result, recorded, strict=True))
    return EQUAL if result == recorded else f"largest difference {difference:g} nats"


def _unusable(why: str) -> RuntimeError:
    if says_out_of_memory(why) or why.startswith("MemoryError"):
        return NoRoomToCheck(why)
    return RuntimeError(f"the saved adapter cannot be used again: {why}")


def main(argv: list[str]) -> int:
    """Print the result of `compare_losses` for `RUN_DIR`."""
    print(compare_losses(Path(argv[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
