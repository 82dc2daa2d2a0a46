"""What `precision=auto` is on machines of several kinds, and what is said where a precision is emulated."""

from __future__ import annotations

import pytest
from recorded.committed import RECORDS

from left_bench.grid.compose import compose
from left_bench.grid.sweep import jobs_of
from left_bench.measure import auto_precision, instruction_sets
from left_bench.measure.auto_precision import (
    advice,
    emulated,
    emulation_note,
    fast_precision,
    product_speeds,
)
from left_bench.measure.instruction_sets import FLAGS_VARIABLE, capabilities_in, cuda_capability, flags_of
from left_bench.report.load import read_sweeps
from left_bench.spec.cell import Cell

X86 = "fpu sse2 ssse3 fma avx f16c"
# flags as /proc/cpuinfo has them
CPUS = {
    "avx2": (f"flags\t\t: {X86} avx2 bmi2", "fp32"),
    "avx512 without bf16": (f"flags\t\t: {X86} avx2 avx512f avx512dq avx512_vnni", "fp32"),
    "avx512_bf16": (f"flags\t\t: {X86} avx2 avx512f avx512_vnni avx512_bf16", "bf16"),
    "amx": (f"flags\t\t: {X86} avx2 avx512f amx_bf16 amx_tile amx_int8", "bf16"),
    "avx_ne_convert": (f"flags\t\t: {X86} avx2 avx_vnni avx_ne_convert", "bf16"),
    "ARM with bf16": ("Features\t: fp asimd atomics fphp asimdhp sve i8mm bf16", "bf16"),
    "ARM without": ("Features\t: fp asimd atomics fphp asimdhp", "fp32"),
}
GPUS = {(7, 5): "fp16_mixed", (6, 1): "fp16_mixed", (8, 0): "bf16", (9, 0): "bf16", (12, 0): "bf16"}


@pytest.fixture
def machine(monkeypatch):
    """`machine(flags, capability)`: this machine has those."""

    def machine(flags: str = "avx2", capability: tuple[int, int] | None = None) -> None:
        monkeypatch.setenv(FLAGS_VARIABLE, flags)
        monkeypatch.setattr(auto_precision, "cuda_capability", lambda: capability)
        monkeypatch.setattr(auto_precision, "is_rocm", lambda: False)

    return machine


@pytest.fixture
def cell_of(composed):
    def cell_of(*overrides: str) -> Cell:
        config = composed(*overrides)
        return compose(config, config.hydra)[0]

    return cell_of


@pytest.mark.parametrize(("line", "option"), CPUS.values(), ids=CPUS)
def test_a_processor_gets_what_it_has_instructions_for(line, option, machine, cell_of):
    result = flags_of(["processor\t: 0", line, "processor\t: 1"])
    assert result is not None
    machine(" ".join(result))
    cell, named = cell_of("hardware=cpu"), cell_of("hardware=cpu", f"precision={option}")
    assert cell.choices["precision"] == cell.precision.name == option
    assert cell == named and cell.id == named.id


@pytest.mark.parametrize(("capability", "option"), GPUS.items())
def test_a_gpu_gets_what_it_has_instructions_for(capability, option, machine, cell_of):
    machine("avx2", capability)  # the processor has no say in it
    cell, named = cell_of("hardware=cuda"), cell_of("hardware=cuda", f"precision={option}")
    assert cell.choices["precision"] == option
    assert cell == named and cell.id == named.id


def test_other_devices(machine, monkeypatch, cell_of):
    machine("bf16")
    assert [fast_precision(device).option for device in ("mps", "xpu", "cuda")] == ["fp32", "fp32", "bf16"]
    assert "no GPU" in fast_precision("cuda").why
    monkeypatch.setattr(auto_precision, "is_rocm", lambda: True)
    assert fast_precision("cuda") == ("bf16", "ROCm")
    assert cell_of("hardware.device=mps").choices["precision"] == "fp32"


def test_a_system_that_does_not_tell_gets_float32(monkeypatch):
    monkeypatch.delenv(FLAGS_VARIABLE, raising=False)
    monkeypatch.setattr(instruction_sets, "_cpu_flags", lambda: None)
    assert instruction_sets.instruction_sets() is None
    assert fast_precision("cpu").option == "fp32"
    assert not emulated("cpu", "bfloat16"), "nothing is known, and nothing said"


def test_on_a_machine_with_bfloat16_the_ids_are_those_of_the_committed_records(machine, composed):
    machine("avx2 avx512f avx512_bf16")
    config = composed("+sweep=peft_methods", "seed=0,1,2", "hardware=cpu")
    ids = {compose(job, job.hydra)[0].id for _, job in jobs_of(config)}
    assert ids == set(read_sweeps(RECORDS / "peft_methods.jsonl")[0][0].cells)


@pytest.mark.parametrize("flags", ["avx2", "avx512_bf16"])
def test_what_a_quantization_computes_in_follows(flags, machine, cell_of):
    machine(flags)
    dtype = "bfloat16" if "bf16" in flags else "float32"
    for quantization, key in (("nf4", "bnb_4bit_compute_dtype"), ("nf5", "compute_dtype"), ("hqq_4", "compute_dtype")):
        cell = cell_of("hardware=cpu", f"quantization={quantization}")
        assert cell.quantization.config[key] == dtype == cell.precision.compute_dtype
    assert cell_of("hardware=cpu", "peft=qlora").quantization.config["bnb_4bit_compute_dtype"] == dtype


def test_a_field_can_be_set_over_it(machine, cell_of):
    machine("avx2")
    cell = cell_of("hardware=cpu", "precision.compute_dtype=bfloat16")
    assert (cell.precision.weights_dtype, cell.precision.compute_dtype) == ("float32", "bfloat16")


def test_each_device_of_a_sweep_gets_its_own(machine, composed):
    machine("avx2", (8, 0))
    config = composed("-m", "hardware=cpu,cuda")
    cells = [compose(job, job.hydra)[0] for _, job in jobs_of(config)]
    assert [cell.choices["precision"] for cell in cells] == ["fp32", "bf16"]


# --- emulated ---


@pytest.mark.parametrize(
    ("flags", "device", "capability", "dtypes"),
    [
        ("avx2", "cpu", None, ["bfloat16", "float16"]),
        ("avx512f avx512_bf16", "cpu", None, ["float16"]),
        ("amx_bf16 avx512_fp16", "cpu", None, []),
        ("avx2", "cuda", (7, 5), ["bfloat16"]),
        ("avx2", "cuda", (8, 0), []),
        ("avx2", "cuda", None, []),
        ("avx2", "mps", None, []),
    ],
)
def test_what_is_emulated(flags, device, capability, dtypes, machine):
    machine(flags, capability)
    assert [dtype for dtype in ("float32", "bfloat16", "float16") if emulated(device, dtype)] == dtypes


def test_the_note_says_how_much_slower_and_what_to_type(machine, monkeypatch):
    machine("avx2")
    speeds = {"float32": 52e9, "bfloat16": 4e9}
    monkeypatch.setattr(auto_precision, "product_speeds", lambda *_: speeds)
    note = emulation_note("cpu", "bfloat16", ["bf16", "bf16_mixed"])
    assert note is not None and "\n" not in note
    assert (
        "precision=bf16,bf16_mixed" in note
        and "13 times as long" in note
        and "precision=auto chooses precision=fp32 here" in note
    )
    speeds["bfloat16"] = 60e9
    assert emulation_note("cpu", "bfloat16", ["bf16"]) is None, "it is no slower"
    monkeypatch.setattr(auto_precision, "product_speeds", lambda *_: None)
    note = emulation_note("cpu", "bfloat16", ["bf16"])
    assert note is not None and "could not be measured" in note


def test_speeds_are_measured_in_a_process_of_their_own_and_kept(machine, monkeypatch, tmp_path):
    machine("avx2")
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path))
    result = product_speeds("cpu", "float16")
    assert result is not None and min(result.values()) > 1e6

    def refuse(*_args, **_how):
        raise AssertionError("measured twice")

    monkeypatch.setattr("subprocess.run", refuse)
    assert product_speeds("cpu", "float16") == result
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # another speed
    with pytest.raises(AssertionError, match="twice"):
        product_speeds("cpu", "float16")


def test_what_cannot_be_measured_is_not_made_up(machine, monkeypatch, tmp_path):
    machine("avx2")
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "none"))
    assert product_speeds("cpu", "float16") is None


def test_the_advice_of_doctor_is_words(machine):
    machine("avx2")
    text = advice("cpu", {"float32": 52e9, "bfloat16": 4e9})
    assert "is fp32 here" in text and "13 times as long" in text
    machine("avx512_bf16")
    assert advice("cpu", {"float32": 200e9, "bfloat16": 400e9}).endswith("is bf16 here (avx512_bf16)")
    assert "try precision=fp32" in advice("cpu", {"float32": 200e9, "bfloat16": 4e9})


# --- how a GPU and a Mac tell ---


def test_the_lowest_capability_of_the_visible_gpus_counts(monkeypatch):
    monkeypatch.setattr(instruction_sets, "_capabilities", lambda: ((8, 0), (7, 5), (9, 0)))
    for visible, result in ((None, (7, 5)), ("0", (8, 0)), ("0,2", (8, 0)), ("2,1", (7, 5)), ("GPU-5f2c", (7, 5))):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert cuda_capability() == result, visible
    monkeypatch.setattr(instruction_sets, "_capabilities", lambda: ())
    assert cuda_capability() is None


def test_what_nvidia_smi_prints():
    assert capabilities_in("7.5\n12.0\n") == ((7, 5), (12, 0))
    assert capabilities_in("") == capabilities_in("No devices were found\n") == ()


def test_what_the_drivers_library_answers():
    class Library:
        closed = False

        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetCount_v2(self, count):
            count._obj.value = 2
            return 0

        def nvmlDeviceGetHandleByIndex_v2(self, index, device):
            device._obj.value = 100 + index
            return 0

        def nvmlDeviceGetCudaComputeCapability(self, device, major, minor):
            major._obj.value, minor._obj.value = (8, 6) if device.value == 100 else (7, 0)
            return 0

        def nvmlShutdown(self):
            self.closed = True

    library = Library()
    assert instruction_sets._from_nvml(library) == ((8, 6), (7, 0))
    assert library.closed


def test_what_a_mac_tells():
    told = "hw.optional.neon: 1\nhw.optional.arm.FEAT_BF16: 1\nhw.optional.arm.FEAT_FP16: 1\nhw.optional.avx2_0: 0\n"
    assert instruction_sets._macos_flags(told) == {"asimd", "bf16", "asimdhp"}
    assert instruction_sets._macos_flags(None) is None
