"""The Slurm launcher against a stand-in for Slurm's commands: what is submitted, and a cell that is requeued.

`sbatch` starts the tasks of an array as plain processes of this machine, with the variables that Slurm sets; `srun`
runs what it is given; `scontrol requeue` starts a task again. submitit, Hydra's launcher and the cells are real.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from left_bench.spec.record import RECORD_NAME, read_record

SBATCH = """#!/bin/bash
cp "$1" "$SLURM_STAND_IN/submitted.sh"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
for task in $(seq 0 "$last"); do "$SLURM_STAND_IN/task" "$task" & done
echo "Submitted batch job 77"
"""
TASK = """#!/bin/bash
export SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$1 SLURM_JOB_ID=$((78 + $1)) SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1
export SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=node1
exec bash "$SLURM_STAND_IN/submitted.sh" >> "$SLURM_STAND_IN/task-$1.log" 2>&1
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --output || $1 == --error ]] && shift; shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$SLURM_STAND_IN/requeued"
"$SLURM_STAND_IN/task" "${2#77_}" > /dev/null 2>&1 &
"""
SACCT = """#!/bin/bash
printf 'JobID|State|NodeList\\n77_0|RUNNING|node1\\n77_1|RUNNING|node1\\n'
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None or not Path("/proc/self/fd").is_dir(),
    reason="needs left-bench[slurm], and /proc to find the process to signal",
)


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "task": TASK, "srun": SRUN, "scontrol": SCONTROL, "sacct": SACCT}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    return folder


def test_a_cell_that_slurm_ends_early_is_requeued_and_run_again(slurm, tmp_path):
    command = [
        *(sys.executable, "-m", "left_bench", "-m", "seed=0,1", "model=tiny_llama", "precision=fp32", "hardware=cpu"),
        *("hardware.threads=1", "hardware.timeout=120", "training.steps=2", "training.batch_size=4", "peft=lora"),
        *("training.warmup_ratio=0", "data.train_rows=8", "data.test_rows=4", "eval.forgetting=false"),
        *("eval.generate=false", "tracker=none", "hydra.job.name=queued", "hydra/launcher=submitit_slurm"),
        *("hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=1", "hydra.launcher.cpus_per_task=8"),
        *("hydra.launcher.mem_gb=64", "hydra.launcher.timeout_min=240", "hydra.launcher.max_num_timeout=3"),
        *("hydra.launcher.array_parallelism=16", "+hydra.launcher.additional_parameters.mail-type=FAIL"),
    ]
    environment = os.environ | {
        "PATH": f"{slurm}{os.pathsep}{os.environ['PATH']}",
        "SLURM_STAND_IN": str(slurm),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with (tmp_path / "out.log").open("w") as out:
        launched = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.STDOUT)
        signalled = False
        while launched.poll() is None:
            signalled = signalled or (any(tmp_path.glob("runs/*-s0-*/worker.log")) and preempt(task=0))
            time.sleep(0.01)
    said = (tmp_path / "out.log").read_text() + "".join(path.read_text() for path in slurm.glob("*.log"))
    assert signalled, said
    assert launched.returncode == 0, said
    assert (slurm / "requeued").read_text().split() == ["requeue", "77_0"]
    results = {record.config["seed"]: record for record in map(read_record, tmp_path.glob(f"runs/*/{RECORD_NAME}"))}
    assert {seed: record.status for seed, record in results.items()} == {0: "ok", 1: "ok"}
    assert (results[0].attempt, results[1].attempt) == (2, 1)
    assert (tmp_path / "reports" / "queued.md").is_file()
    submitted = (slurm / "submitted.sh").read_text()
    for line in ("array=0-1%2", "cpus-per-task=8", "gpus-per-node=1", "mem=64GB", "mail-type=FAIL", "time=240"):
        assert f"#SBATCH --{line}\n" in submitted
    assert "#SBATCH --partition=gpu\n" in submitted


def preempt(*, task: int) -> bool:
    """Slurm's warning, to the process of an array's task."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                b"submitit.core._submit" in (process / "cmdline").read_bytes()
                and f"SLURM_ARRAY_TASK_ID={task}\0".encode() in (process / "environ").read_bytes()
                and process.joinpath("environ").read_bytes().find(b"SLURM_STAND_IN") >= 0
            ):
                os.kill(int(process.name), signal.SIGUSR2)
                return True
        except OSError:
            continue
    return False
