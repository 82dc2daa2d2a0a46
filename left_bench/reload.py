"""Does what was saved give back what was measured? `python -m left_bench.reload RUN_DIR`, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from left_bench.cell import Cell
from left_bench.worker import ADAPTER_NAME, CELL_NAME, ROWS_NAME


def gives_the_same_loss(run_dir: Path) -> bool:
    """Load base model and adapter in a new process; True when every held-out row's loss is bit for bit the recorded.

    Raises:
        RuntimeError: loading or evaluating failed; the message is the new process's last line.
    """
    done = subprocess.run(
        [sys.executable, "-m", "left_bench.reload", str(run_dir)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the saved adapter cannot be used again: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return done.stdout.strip().splitlines()[-1] == "equal"


def main(argv: list[str]) -> int:
    """Print `equal`, or the largest difference of a row's loss."""
    import torch

    from left_bench import adapter, evaluate
    from left_bench import model as models
    from left_bench.data import load_data
    from left_bench.worker import set_threads

    run_dir = Path(argv[0])
    cell = Cell.model_validate_json((run_dir / CELL_NAME).read_text(encoding="utf-8"))
    device = cell.hardware.device
    set_threads(cell)
    models.apply_precision(cell, device=device)
    folder, tokenizer = models.open_pretrained(cell)
    test = load_data(cell.data, tokenizer, max_length=cell.training.max_length).test
    test = test if cell.eval.rows is None else test[: cell.eval.rows]
    base, _ = models.load_model(cell, folder=folder, device=device)
    model = adapter.load_trained(base, run_dir / ADAPTER_NAME)
    model.eval()
    with torch.no_grad(), models.autocast(cell, device=device):
        found = evaluate.row_losses(model, test, cell, pad_id=evaluate.pad_of(tokenizer), device=device).nll
    lines = (run_dir / ROWS_NAME).read_text(encoding="utf-8").splitlines()
    recorded = [json.loads(line)["nll"] for line in lines]
    difference = max(abs(one - other) for one, other in zip(found, recorded, strict=True))
    print("equal" if found == recorded else f"largest difference {difference:g} nats")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
