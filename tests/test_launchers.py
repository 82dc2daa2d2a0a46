"""One sweep under every launcher, a cell killed in each: the runs folders hold equal records but for time and speed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from left_bench.spec.record import METRICS, RECORD_NAME, Record, read_record

CELLS = [
    *("peft=lora,full", "quantization=none,nf4", "model=tiny_llama", "precision=fp32", "hardware=cpu"),
    *("hardware.threads=1", "hardware.timeout=120", "training.steps=2", "training.batch_size=4"),
    *("training.warmup_ratio=0", "data.train_rows=8", "data.test_rows=4", "eval.forgetting=false"),
    *("eval.generate=false", "tracker=none", "hydra.job.name=four"),
]
KILLED = "tiny_llama-none-full-"
LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local", "at_once=2"],
    "ray": [
        "hydra/launcher=ray",
        "+hydra.launcher.ray.init.num_cpus=2",
        "+hydra.launcher.ray.init.include_dashboard=false",
    ],
}
EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "ray": "ray"}
PLUGINS = {"joblib": "hydra_joblib_launcher", "submitit_local": "hydra_submitit_launcher", "ray": "hydra_ray_launcher"}
# one cell measures for all, or the rest of the machine is measured: which one and how much is chance
_CHANCE = {"other_cpu_share"}
_REPEATED = ("started_at", "finished_at", "phases")


def installed(launcher: str) -> bool:
    try:
        return launcher == "basic" or importlib.util.find_spec(f"hydra_plugins.{PLUGINS[launcher]}") is not None
    except ModuleNotFoundError:
        return False


def sweep(launcher: str, place: Path) -> dict[str, Record]:
    """Run the four cells, end one cell's worker from outside, and read what is left."""
    command = [sys.executable, "-m", "left_bench", "-m", *CELLS, *LAUNCHERS[launcher]]
    environment = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": "/tmp",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with (place / "out.log").open("w") as out:
        process = subprocess.Popen(command, cwd=place, env=environment, stdout=out, stderr=subprocess.STDOUT)
        killed = False
        while process.poll() is None:
            killed = killed or kill_worker(place)
            time.sleep(0.01)
    said = (place / "out.log").read_text()
    assert killed, said
    assert process.returncode == 1, said  # a cell crashed
    assert "crashed" in (place / "reports" / "four.md").read_text(), said
    results = [read_record(path) for path in sorted(place.glob(f"runs/*/{RECORD_NAME}"))]
    manifest = json.loads((place / "runs" / "sweeps" / "four.json").read_text())
    assert sorted(manifest["cells"]) == sorted(record.cell_id for record in results)
    assert manifest["finished_at"] is not None
    return {record.cell_id: record for record in results}


def kill_worker(place: Path) -> bool:
    """End the worker of the cell to be killed: the process whose output goes to that cell's log."""
    logs = list(place.glob(f"runs/{KILLED}*/worker.log"))
    if not logs:
        return False
    log = str(logs[0].resolve())
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if str(output.readlink()) == log:
                os.kill(int(output.parts[2]), signal.SIGKILL)
                return True
        except OSError:
            continue
    return False


def lasting(record: Record) -> dict[str, Any]:
    """What must not depend on the launcher: everything but times, speeds and the last bytes of memory.

    A killed cell got as far as it got: of it the status and the signal count. The matrix peak (phase `peak`) is
    measured by the first cell for all.
    """
    plain = record.model_dump(mode="json", exclude=set(_REPEATED))
    kinds = {name: METRICS[name.removeprefix("base_")].kind for name in record.metrics}
    if record.status == "crashed":
        return {"cell": record.cell_id, "config": record.config, "signal": "SIGKILL" in (record.reason or "")}
    plain["metrics"] = {
        name: value
        for name, value in record.metrics.items()
        if kinds[name] != "speed" and not name.endswith("memory_bytes") and name not in _CHANCE
    }
    plain["memory_breakdown"].pop("workspace", None)
    plain["phases"] = [phase.name for phase in record.phases if phase.name != "peak"] if record.status == "ok" else []
    for point in plain["curve"] or ():
        point.pop("seconds")
    effective = plain["environment"].get("effective", {})
    for name in ("concurrent_cells", "peak_flops_per_second", "peak_other_cpu_share", "utilization_withheld"):
        effective.pop(name, None)
    plain["provenance"] = {"sweep": record.provenance["sweep"]}
    return plain


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    return sweep("basic", tmp_path_factory.mktemp("basic"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds the worker to kill through /proc")
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_every_launcher_leaves_the_same_records(launcher, alone, tmp_path):
    if not installed(launcher):
        pytest.skip(f"needs left-bench[{EXTRAS[launcher]}]")
    result = sweep(launcher, tmp_path)
    assert sorted(record.status for record in alone.values()) == ["crashed", "ok", "ok", "unsupported"]
    assert result.keys() == alone.keys()
    for cell_id, record in alone.items():
        assert lasting(result[cell_id]) == lasting(record)
    [crashed] = [record for record in result.values() if record.status == "crashed"]
    assert crashed.cell_id.startswith(KILLED)
    assert "SIGKILL" in (crashed.reason or "")
    at_once = {r.environment["effective"]["concurrent_cells"] for r in result.values() if r.status == "ok"}
    assert at_once == {min(2, len(os.sched_getaffinity(0)))}
    assert {r.environment["effective"]["concurrent_cells"] for r in alone.values() if r.status == "ok"} == {1}
