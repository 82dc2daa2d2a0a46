"""Quantized weights from disk are the weights that quantizing gave, and a cell cannot tell the two apart."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from left_bench.measure.meter import plain_parts
from left_bench.model import load as models
from left_bench.model import quantized_cache
from left_bench.model.load import base_metrics, quantized_weights
from left_bench.model.quantization_error import quantization_error
from left_bench.spec.run_files import CELL_NAME, ROWS_NAME
from left_bench.worker import reload_check

FORMATS = ["int8", "nf4", "nf4_dq", "fp4", "nf5", "nf5_dq", "int5"]
SINCE = {"machine": "this one", "threads": 1, "concurrent_cells": 1}


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch):
    """Tiny models are quantized in no time; here they are kept all the same, and never found to load slower."""
    monkeypatch.setattr(quantized_cache, "_WORTH_KEEPING", 0.0)


@pytest.fixture(autouse=True)
def own_cache(session_cache):
    """The session's models, none of them quantized yet."""
    models = session_cache / "models"
    for path in models.glob("quantized-*"):
        shutil.rmtree(path)
    return models


class Meter:
    """Phases by name; every load from the cache takes `cached_seconds`, every other a second."""

    def __init__(self, cached_seconds=0.1):
        self.device = dataclasses.make_dataclass("Device", [("kind", str)])("cpu")
        self.phases, self.metrics, self.cached_seconds = [], {}, cached_seconds

    def phase(self, name):
        import contextlib

        from left_bench.spec.record import Phase

        @contextlib.contextmanager
        def measured():
            yield
            seconds = self.cached_seconds if name == "load_cached" else 1.0
            self.phases.append(Phase(name=name, seconds=seconds, peak_memory_bytes=7))

        return measured()

    @property
    def names(self):
        return [phase.name for phase in self.phases]


@pytest.fixture
def load(tiny_cell):
    """`load(cell)`: a model as a worker loads it, what was found, and the meter."""

    def load(cell, *, meter=None, since=SINCE, folder=None):
        meter = meter or Meter()
        folder = folder or models.open_pretrained(cell)[0]
        model, result = quantized_cache.load_base(cell, folder=folder, device="cpu", meter=meter, circumstances=since)
        return model, result, meter

    return load


def stored(model):
    """Every tensor there is, with all that quantization keeps beside it."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: [type(tensor).__name__, tensor.requires_grad, *plain_parts(tensor)] for name, tensor in tensors}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_weights_are_the_same_bit_for_bit(name, precision, tiny_cell, load):
    cell = tiny_cell(f"quantization={name}", f"precision={precision}")
    fresh, result, meter = load(cell)
    again, found_again, meter_again = load(cell)
    assert (meter.names, meter_again.names) == (["load", "keep_quantized"], ["load_cached"])
    assert result == found_again | {"weights_from": "checkpoint"}
    assert found_again["weights_from"] == "quantized_cache"
    one, other = stored(fresh), stored(again)
    assert one.keys() == other.keys()
    for key in one:
        assert one[key][:2] == other[key][:2], key
        for left, right in zip(one[key][2:], other[key][2:], strict=True):
            assert left.dtype == right.dtype, key
            assert torch.equal(left, right), key
    assert base_metrics(fresh) == base_metrics(again)
    folder = models.open_pretrained(cell)[0]
    assert quantization_error(fresh, Path(folder)) == quantization_error(again, Path(folder))
    assert fresh.config.dtype == again.config.dtype
    assert fresh.name_or_path == again.name_or_path == again.config._name_or_path == folder
    assert fresh.generation_config.to_dict() == again.generation_config.to_dict()
    assert fresh.config._attn_implementation == again.config._attn_implementation
    assert [p.data_ptr() % 64 for _, p in again.named_parameters()] == [0] * len(list(again.parameters()))


@pytest.mark.parametrize("name", FORMATS)
def test_a_cell_cannot_tell_the_two_apart(name, tiny_cell, work_in_process):
    """Losses, scores, merging and the reload in another process: equal to the last bit with and without."""
    cell = tiny_cell(f"quantization={name}", "model.weights=pretrained", "model.wheel=null")
    cell = cell.model_copy(
        update={"model": cell.model.model_copy(update={"name_or_path": models.open_pretrained(tiny_cell())[0]})}
    )
    first, second = work_in_process(cell), work_in_process(cell)
    assert first["environment"]["effective"]["weights_from"] == "checkpoint"
    assert second["environment"]["effective"]["weights_from"] == "quantized_cache"
    assert second["phases"][0].name == "load_cached"
    ours, theirs = [(run["run_dir"] / ROWS_NAME).read_text() for run in (first, second)]
    assert ours == theirs
    assert "nll" in ours
    timed = ("per_second", "seconds", "peak", "baseline", "share", "utilization")
    plain = [{k: v for k, v in run["metrics"].items() if not any(t in k for t in timed)} for run in (first, second)]
    assert plain[0] == plain[1]
    assert {"train_loss", "eval_loss", "weights_bytes", "quantization_error", "quantized_modules"} <= plain[0].keys()
    # the load from the checkpoint, measured in the first, is what both say
    for metric in ("load_seconds", "load_peak_memory_bytes"):
        assert first["metrics"][metric] == second["metrics"][metric]
    for run in (first, second):
        (run["run_dir"] / CELL_NAME).write_text(cell.model_dump_json(by_alias=True))
        assert reload_check.compare_losses(run["run_dir"]) == reload_check.EQUAL


def test_off_means_off(tiny_cell, load, own_cache):
    cell = tiny_cell("quantization=nf4", "quantization.cache=false")
    for _ in range(2):
        assert load(cell)[2].names == ["load"]
    assert not list(own_cache.glob("quantized-*"))
    assert cell.id == tiny_cell("quantization=nf4").id  # the same bits, the same memory after loading


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
@pytest.mark.parametrize("name", FORMATS)
def test_nothing_loaded_refers_to_the_mapped_file(name, tiny_cell, load):
    """One small constant that is a view of it would keep the whole file in the cell's memory."""
    cell = tiny_cell(f"quantization={name}")
    load(cell)
    model, result, _ = load(cell)  # the model is alive while the maps are read
    assert result["weights_from"] == "quantized_cache"
    assert "quantized-" not in Path("/proc/self/maps").read_text(), type(model)


@pytest.mark.parametrize("overrides", [[], ["quantization=hqq_4"]])
def test_what_is_not_quantized_or_not_known_to_come_back_is_not_kept(overrides, tiny_cell):
    cell = tiny_cell(*overrides)
    assert quantized_cache._place(cell, folder=models.open_pretrained(cell)[0], device="cpu") is None


def test_quick_quantizing_is_not_kept(tiny_cell, load, own_cache, monkeypatch):
    monkeypatch.setattr(quantized_cache, "_WORTH_KEEPING", 2.0)
    assert load(tiny_cell("quantization=nf4"))[2].names == ["load"]
    assert not list(own_cache.glob("quantized-*"))


def test_other_weights_formats_and_dtypes_are_other_folders(tiny_cell, tmp_path):
    cells = [
        tiny_cell("quantization=nf4"),
        tiny_cell("quantization=fp4"),
        tiny_cell("quantization=nf4", "quantization.config.bnb_4bit_use_double_quant=true"),
        tiny_cell("quantization=nf4", "precision=bf16"),
        tiny_cell("quantization=nf4", "training.attention=eager"),
        tiny_cell("quantization=nf4", "model=tiny_opt"),
    ]
    places = [quantized_cache._place(cell, folder=models.open_pretrained(cell)[0], device="cpu") for cell in cells]
    assert len(set(places)) == len(cells)
    # nothing else that a sweep goes over
    assert (
        quantized_cache._place(
            tiny_cell("quantization=nf4", "peft=ia3", "seed=3"),
            folder=models.open_pretrained(cells[0])[0],
            device="cpu",
        )
        == places[0]
    )
    copy = tmp_path / "model"
    shutil.copytree(models.open_pretrained(cells[0])[0], copy)
    before = quantized_cache._place(cells[0], folder=str(copy), device="cpu")
    os.utime(copy / "model.safetensors", ns=(1, 1))  # written again
    assert quantized_cache._place(cells[0], folder=str(copy), device="cpu") != before


def test_a_load_measured_in_other_circumstances_is_not_taken_over(tiny_cell, load):
    cell = tiny_cell("quantization=nf4")
    assert load(cell)[2].metrics == {}  # `Meter.finish` has them from the phase
    assert load(cell)[2].metrics == {"load_seconds": 1.0, "load_peak_memory_bytes": 7}
    assert load(cell, since=SINCE | {"threads": 2})[2].metrics == {}


def test_where_loading_is_slower_it_is_quantized_again(tiny_cell, load):
    cell = tiny_cell("quantization=nf4")
    names = [load(cell, meter=Meter(cached_seconds=1.5))[2].names for _ in range(3)]
    assert names == [["load", "keep_quantized"], ["load_cached"], ["load"]]


@pytest.mark.parametrize("harm", ["cut", "gone", "no facts"])
def test_a_damaged_folder_is_made_anew(harm, tiny_cell, load, own_cache):
    cell = tiny_cell("quantization=nf4")
    load(cell)
    [kept] = own_cache.glob("quantized-*")
    weights = kept / "model.safetensors"
    if harm == "cut":
        os.truncate(weights, weights.stat().st_size // 2)
    else:
        (weights if harm == "gone" else kept / "load.json").unlink()
    assert load(cell)[2].names == ["load", "keep_quantized"]
    assert load(cell)[2].names == ["load_cached"]


def test_a_full_disk_costs_no_cell(tiny_cell, load, own_cache, monkeypatch):
    cell = tiny_cell("quantization=nf4")
    models.open_pretrained(cell)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    assert quantized_weights(load(cell)[0])
    assert not [
        path for path in own_cache.iterdir() if path.name.endswith(".tmp") or path.name.startswith("quantized-")
    ]


def test_kept_weights_are_the_users_alone_and_hold_no_pickle(tiny_cell, load, own_cache):
    load(tiny_cell("quantization=nf4"))
    [kept] = own_cache.glob("quantized-*")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert {path.suffix for path in kept.iterdir()} == {".json", ".safetensors"}
    assert set(json.loads((kept / "load.json").read_text())) == {"metrics", "circumstances", "files"}


def test_cells_at_the_same_time_leave_one_whole_folder(tiny_cell, load, own_cache, monkeypatch):
    """Threads for processes: the models are loaded in turn (from_pretrained patches classes), and kept at once."""
    cell = tiny_cell("quantization=nf4")
    in_turn, all_are_loaded = threading.Lock(), threading.Barrier(3, timeout=60)

    def load_model(*args, **kwargs):
        with in_turn:
            loaded = models.load_model(*args, **kwargs)
        all_are_loaded.wait()
        return loaded

    with monkeypatch.context() as patch, ThreadPoolExecutor(3) as at_once:
        patch.setattr(quantized_cache, "load_model", load_model)
        results = [future.result()[1]["weights_from"] for future in [at_once.submit(load, cell) for _ in range(3)]]
    assert results == ["checkpoint"] * 3
    assert len(list(own_cache.glob("quantized-*"))) == 1
    assert load(cell)[2].names == ["load_cached"]


def test_beyond_the_bound_the_longest_unused_goes(tiny_cell, load, own_cache, monkeypatch):
    load(tiny_cell("quantization=nf4"))
    load(tiny_cell("quantization=fp4"))
    old, used = own_cache.glob("quantized-*-nf4-*"), own_cache.glob("quantized-*-fp4-*")
    [old], [used] = list(old), list(used)
    os.utime(old, (0, 0))
    monkeypatch.setattr(quantized_cache, "LARGEST_TOTAL", 1)
    load(tiny_cell("quantization=int8"))
    assert not old.exists()
    assert used.exists()  # a cell may be about to open it


def test_training_over_kept_weights_moves_the_adapter_alone(tiny_cell, load):
    """What was mapped from the file is the process's own memory: nothing can be written back."""
    cell = tiny_cell("quantization=nf4")
    load(cell)
    model, _, _ = load(cell)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data += 1
    assert not torch.equal(model.model.norm.weight, load(cell)[0].model.norm.weight)
