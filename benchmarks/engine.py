"""left_bench's training loop beside a bare loop, HF Trainer and TRL, on the same rows: `python benchmarks/engine.py`.

    pip install -e ".[benchmarks]"
    python benchmarks/engine.py --data lamini_docs.jsonl [--steps 18] [--out reports/benchmarks]
    python benchmarks/engine.py --data lamini_docs.jsonl --steps 5 precision=fp32  # losses agree far more closely

Every contender lives in a process of its own and holds the same model, adapter, optimizer and rows. They take their
steps in turn, one step each (A B C A B C), and sleep in between, so whatever else the machine does falls on all of
them, and each step is compared with the others' step on the same rows. A ratio is that of tokens/s over all counted
steps, between the ends of its 95 % interval over resampled steps (paired: a step is drawn for both). Memory is the
high-water mark of the process in training, over what it held before the model was loaded. Losses must agree, or the
run fails: speed on other work is no speed.

All contenders hold their models at once, so the free memory is looked at first (see `needed_bytes`). Where it does not
hold them all, they run in groups, one after the other, with the packed one in each: ratios are within a group.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

WARM_UP = 3
# the largest difference of a step's loss that arithmetic in another order explains, nats, by the dtype it is done in
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}
RESAMPLED = 2000
PACKED = "left_bench packed"
PADDING_FREE = "TRL, padding-free, liger"
CONTENDERS = {
    PACKED: ["training.batching=packed"],
    "left_bench packed, liger": [
        "training.batching=packed",
        "training.output_head=liger",
        "training.kernels=liger",
    ],
    "left_bench packed, compiled": ["training.batching=packed", "training.compile=true"],
    "left_bench padded": [],
    "left_bench padded, plain loss": ["training.output_head=all"],
    "bare loop": None,
    "HF Trainer": None,
    "TRL": None,
    PADDING_FREE: None,
}
WANTS_CUDA = ("left_bench packed, liger", "left_bench packed, compiled", PADDING_FREE)
"""Contenders whose kernels are Triton's; compiling for a CPU takes minutes."""
SAME_WORK = ("left_bench padded, plain loss", "bare loop")
PROCESS_BYTES = 2**30
"""A contender's imports, before it has a model: torch, transformers, peft, trl."""
PEERS_HOLD = 1.7
"""How many times what the plain loss holds the peers do: 1.65 at most in reports/benchmarks/engine.md."""
LEFT_FREE = 0.1
"""Part of the free memory that is nobody's: predictions are that far off, and the machine does other things."""


class Pause:
    """Called after each step: reports its seconds and loss, then sleeps until it is this process's turn again."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def ready(self, **facts: Any) -> None:
        self.connection.send(facts)
        self._wait()

    def __call__(self, loss: float) -> None:
        self.connection.send({"seconds": time.perf_counter() - self.resumed, "loss": loss})
        self._wait()

    def _wait(self) -> None:
        self.connection.recv()
        self.resumed = time.perf_counter()


def compose_cell(overrides: list[str]) -> Any:
    import hydra

    from left_bench.core.paths import config_root
    from left_bench.grid.command_line import open_section, register_resolvers, register_sweeps
    from left_bench.grid.compose import compose

    register_resolvers()
    register_sweeps()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_root() / "conf")):
        config = hydra.compose(
            "config", overrides=[open_section(override) for override in overrides], return_hydra_config=True
        )
        return compose(config, config.hydra)[0]


def needed_bytes(names: Sequence[str], overrides: list[str]) -> dict[str, int | None]:
    """About what each contender's process holds at its peak, by the plan of what it trains; None: not predictable."""
    from left_bench.plan.predict import predict

    planned: dict[tuple[str, ...], int | None] = {}
    result: dict[str, int | None] = {}
    for name in names:
        own = CONTENDERS[name]
        options = ("training.output_head=all",) if own is None else tuple(item for item in own if _is_planned(item))
        if options not in planned:
            planned[options] = predict(compose_cell([*overrides, *options])).peak_bytes
        peak = planned[options]
        held = 1.0 if own is not None else PEERS_HOLD
        result[name] = None if peak is None else int(peak * held) + PROCESS_BYTES
    return result


def _is_planned(override: str) -> bool:
    """Other people's kernels and compiled layers hold no more than what they replace."""
    return "liger" not in override and "compile" not in override


def groups_of(names: Sequence[str], needed: Mapping[str, int | None], *, free: int) -> list[list[str]]:
    """The contenders that run at the same time, the packed one in each group; where nothing is predicted, in pairs.

    The two that do the same work stay together if they can.

    Raises:
        SystemExit: the packed one and one other are too much.
    """

    def bytes_of(group: Sequence[str]) -> float:
        sizes = [needed[name] for name in group]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else float("inf")

    units = [[name] for name in names if name != PACKED]
    pair = [name for name in SAME_WORK if name in names]
    if len(pair) == 2 and bytes_of([PACKED, *pair]) <= free:
        units = [pair if unit == pair[:1] else unit for unit in units if unit != pair[1:]]
    groups: list[list[str]] = []
    for unit in units:
        least = bytes_of([PACKED, *unit])
        if free < least < float("inf"):
            raise SystemExit(
                f"{free / 2**30:.1f} GiB of memory are free for this, and '{PACKED}' beside '{unit[0]}' takes about "
                f"{least / 2**30:.1f} GiB; lower --batch-size, or name fewer with --only"
            )
        if groups and bytes_of([*groups[-1], *unit]) <= free:
            groups[-1] += unit
        else:
            groups.append([PACKED, *unit])
    return groups or [[PACKED]]


def free_bytes(kind: str) -> int:
    """The memory that contenders may take: the machine's, or the first accelerator's where it tells."""
    if kind == "cuda":
        import torch

        free = torch.cuda.mem_get_info()[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    return int(free * (1 - LEFT_FREE))


def contend(name: str, overrides: list[str], connection: Any) -> None:
    """The process of one contender."""
    import torch
    from peft import LoraConfig, get_peft_model

    from left_bench.data import load_data, step_rows
    from left_bench.measure.device import open_device
    from left_bench.methods import attach as adapter
    from left_bench.model import load as models

    cell = compose_cell([*overrides, *(CONTENDERS[name] or [])])
    device = open_device(cell.hardware.device)
    folder, tokenizer = models.open_pretrained(cell)
    rows = load_data(cell.data, tokenizer, max_length=cell.training.max_length).train
    order = list(
        step_rows(len(rows), rows_per_step=cell.training.batch_size, steps=cell.training.steps, seed=cell.seed)
    )
    device.set_baseline()
    base, _ = models.load_model(cell, folder=folder, device=device.kind)
    if CONTENDERS[name] is None:  # peers get the adapter as peft makes it
        torch.manual_seed(cell.seed)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **cell.peft.config))
    else:
        model = adapter.attach_adapter(base, cell, tokenizer=tokenizer, rows=rows)
    device.reset_peak()
    pause = Pause(connection)
    chosen = [[rows[index] for index in step] for step in order]
    facts = {
        "tokens": [sum(row.length for row in step) for step in chosen],
        "answer_tokens": [sum(len(row.answer_ids) for row in step) for step in chosen],
        "pairs": [sum(row.length**2 for row in step) for step in chosen],
        "longest": max(row.length for step in chosen for row in step),
        "threads": torch.get_num_threads(),
    }
    pause.ready(**facts)
    peers = {"bare loop": bare_loop, "HF Trainer": hf_trainer, "TRL": trl_trainer}
    peers[PADDING_FREE] = partial(trl_trainer, padding_free=True, use_liger_kernel=True)
    run: Callable[..., None] = peers.get(name, ours)
    run(model, tokenizer, rows, chosen, cell, device, pause)
    peak = device.peak_bytes()
    with models.autocast(cell, device=device.kind):  # as the adapter's layers were set for ours; nothing to the peers'
        flops = _flops(model, facts)
    connection.send({"peak_memory_bytes": peak, "flops": flops})


def _flops(model: Any, facts: dict[str, Any]) -> list[float]:
    from left_bench.measure.meter import Step
    from left_bench.training.flops import step_flops

    counted = step_flops(model)
    return [
        counted.of([Step(seconds=1, tokens=tokens, answer_tokens=labels, rows=0, loss=0, pairs=pairs)])
        for tokens, labels, pairs in zip(facts["tokens"], facts["answer_tokens"], facts["pairs"], strict=True)
    ]


def ours(model: Any, tokenizer: Any, rows: Any, chosen: Any, cell: Any, device: Any, pause: Pause) -> None:
    from left_bench.evaluation import evaluate
    from left_bench.measure.meter import Meter, PhaseCounts, Step
    from left_bench.model import load as models
    from left_bench.spec.events import EventWriter
    from left_bench.training import packing
    from left_bench.training.loop import compile_model, train
    from left_bench.training.loss import AnswerLoss
    from left_bench.training.objective import make_objective

    class Paused(Meter):
        def step(self, step: Step, **extra: float) -> None:
            super().step(step, **extra)
            pause(step.loss)

    pad_id = evaluate.pad_of(tokenizer)
    with models.autocast(cell, device=device.kind):
        head = cell.training.output_head
        loss = AnswerLoss(model, everywhere=head == "all", by_liger=head == "liger")
    with (
        tempfile.TemporaryDirectory() as folder,
        packing.laid_out(model, loss, rows, cell, pad_id=pad_id, device=device.kind) as layout,
    ):
        assert layout.packed == (cell.training.batching == "packed")
        meter = Paused(device, EventWriter(Path(folder) / "events.jsonl"))
        objective = make_objective(cell, loss, pad_id=pad_id, packed=layout.packed)
        compiling = None
        if cell.training.compile:  # in its first turn, which is not counted
            compiling = compile_model(model, rows, cell, objective=objective, device=device.kind)
        train(model, rows, cell, objective=objective, meter=meter, counts=PhaseCounts(), compiling=compiling)


def _padded(examples: Any, pad_id: int) -> dict[str, Any]:
    from left_bench.data import collate

    batch = collate(examples, pad_id=pad_id)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}


def bare_loop(model: Any, tokenizer: Any, rows: Any, chosen: Any, cell: Any, device: Any, pause: Pause) -> None:
    """What one writes in ten lines: the model's own loss over labels, backward, clip, step."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cell.learning_rate, weight_decay=0.0, fused=True)
    model.train()
    for examples in chosen:
        batch = _padded(examples, tokenizer.pad_token_id)
        loss = model(**{name: tensor.to(device.kind) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pause(loss.item())


def _trainer_settings(cell: Any, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": cell.training.steps,
        "per_device_train_batch_size": cell.training.batch_size,
        "learning_rate": cell.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": cell.hardware.device == "cpu",
        # on a CPU the weights being bfloat16 is enough, and autocast would only add casts; on a GPU it is the usual
        # recipe, and without it peft's float32 adapters would be multiplied in float32
        "bf16": cell.precision.compute_dtype == "bfloat16" and cell.hardware.device != "cpu",
        "remove_unused_columns": False,
    }


def _run_trainer(kind: Any, pause: Pause, **arguments: Any) -> None:
    import torch
    from transformers import PrinterCallback, TrainerCallback

    class Turns(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                pause(logs["loss"])

    class InOrder(kind):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(callbacks=[Turns()], **arguments)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _dataset(chosen: Any) -> Any:
    from datasets import Dataset

    flat = [row for step in chosen for row in step]
    return Dataset.from_list(
        [
            {
                "input_ids": row.prompt_ids + row.answer_ids,
                "attention_mask": [1] * row.length,
                "labels": [-100] * len(row.prompt_ids) + row.answer_ids,
            }
            for row in flat
        ]
    )


def hf_trainer(model: Any, tokenizer: Any, rows: Any, chosen: Any, cell: Any, device: Any, pause: Pause) -> None:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        _run_trainer(
            Trainer,
            pause,
            model=model,
            args=TrainingArguments(**_trainer_settings(cell, folder)),
            train_dataset=_dataset(chosen),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )


def trl_trainer(
    model: Any, tokenizer: Any, rows: Any, chosen: Any, cell: Any, device: Any, pause: Pause, **more: Any
) -> None:
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        settings = _trainer_settings(cell, folder) | {"max_length": None, "gradient_checkpointing": False, **more}
        _run_trainer(
            SFTTrainer,
            pause,
            model=model,
            args=SFTConfig(**settings),
            train_dataset=_dataset(chosen).remove_columns("attention_mask"),
            processing_class=tokenizer,
        )


def measure(names: list[str], overrides: list[str], *, steps: int) -> dict[str, Any]:
    """The steps of contenders that run at the same time, in turn."""
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Any] = {}
    processes = []
    facts: dict[str, Any] = {}
    began = time.perf_counter()

    def left_out(name: str) -> None:
        if name == PACKED:
            raise SystemExit(f"{PACKED} ended; its traceback is above")
        print(f"left out, for its process ended: {name}", flush=True)

    def hear(name: str) -> None:
        try:
            facts[name] = connections[name].recv()
        except EOFError:
            left_out(name)
        else:
            print(f"{time.perf_counter() - began:.0f} s: {name} is ready", flush=True)

    on_cpu = compose_cell(overrides).hardware.device == "cpu"
    for name in names:
        mine, theirs = context.Pipe()
        process = context.Process(target=contend, args=(name, overrides, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        connections[name] = mine
        if on_cpu:  # one loads at a time: the others' pages would be read from a disk that is busy
            hear(name)
    for name in set(names) - facts.keys():
        hear(name)
    names = [name for name in names if name in facts]
    result: dict[str, Any] = {name: {"seconds": [], "losses": []} for name in names}
    for step in range(steps):
        for name in names[step % len(names) :] + names[: step % len(names)]:
            if name not in result:
                continue
            try:
                connections[name].send("go")
                said = connections[name].recv()
            except (EOFError, OSError):
                left_out(name)
                del result[name]
                continue
            result[name]["seconds"].append(said["seconds"])
            result[name]["losses"].append(said["loss"])
        print(f"{time.perf_counter() - began:.0f} s: step {step + 1}/{steps}", end="\r", flush=True)
    names = [name for name in names if name in result]
    for name in names:
        connections[name].send("go")
        result[name] |= connections[name].recv()
    for process in processes:
        process.join(30)
    first = facts[names[0]]
    assert all(facts[name] == first for name in names), "contenders see other rows"
    return {"contenders": result, **first}


def summarize(run: dict[str, Any], *, peak_flops: float, group: int = 1) -> list[dict[str, Any]]:
    """One row per contender: tokens/s, utilization, memory, and what packed of the same group is beside it."""
    counted = slice(WARM_UP, None)
    tokens = sum(run["tokens"][counted])
    packed = run["contenders"][PACKED]
    rows = []
    for name, item in run["contenders"].items():
        seconds = sum(item["seconds"][counted])
        ratio, low, high = faster(run, PACKED, name)
        rows.append(
            {
                "group": group,
                "contender": name,
                "tokens_per_second": tokens / seconds,
                "model_flops_utilization": sum(item["flops"][counted]) / seconds / peak_flops,
                "peak_memory_bytes": item["peak_memory_bytes"],
                "packed_is_faster": ratio,
                "packed_is_faster_low": low,
                "packed_is_faster_high": high,
                "packed_needs": packed["peak_memory_bytes"] / item["peak_memory_bytes"],
                "largest_loss_difference": max(
                    abs(a - b) for a, b in zip(item["losses"], packed["losses"], strict=True)
                ),
            }
        )
    return rows


def faster(run: dict[str, Any], one: str, other: str) -> tuple[float, float, float]:
    """How many times `one`'s tokens/s are `other`'s over the counted steps, and the ends of the 95 % interval."""
    pairs = list(zip(*(run["contenders"][name]["seconds"][WARM_UP:] for name in (one, other)), strict=True))
    draw = random.Random(0)
    resampled = [_ratio(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLED)]
    cuts = statistics.quantiles(resampled, n=40)
    return _ratio(pairs), cuts[0], cuts[-1]


def _ratio(pairs: list[tuple[float, float]]) -> float:
    ours, theirs = map(sum, zip(*pairs, strict=True))
    return theirs / ours


def markdown(runs: list[dict[str, Any]], rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    from left_bench.report.markdown import table

    cells = [
        [
            row["contender"] + (f" (group {row['group']})" if len(runs) > 1 else ""),
            f"{row['tokens_per_second']:.0f}",
            _interval(row["packed_is_faster"], row["packed_is_faster_low"], row["packed_is_faster_high"])
            if row["contender"] != PACKED
            else "",
            f"{100 * row['model_flops_utilization']:.0f} %",
            f"{row['peak_memory_bytes'] / 2**20:.0f} MiB",
            f"{row['packed_needs']:.2f}" if row["contender"] != PACKED else "",
            f"{row['largest_loss_difference']:.2g}" if row["contender"] != PACKED else "",
        ]
        for row in rows
    ]
    head = [
        "",
        "tokens/s",
        "packed is faster by (95 % interval)",
        "FLOPs utilization",
        "peak memory",
        "packed needs of it",
        "loss difference to packed, nats, at most",
    ]
    lines = [
        "## Training loop",
        "",
        f"{facts['what']} {facts['machine']}, {facts['threads']} threads, torch {facts['torch']}, "
        f"transformers {facts['transformers']}, trl {facts['trl']}; {facts['steps']} steps, the first {WARM_UP} left "
        f"out; the machine's measured matrix-product peak is {facts['peak_flops'] / 1e9:.0f} GFLOP/s in "
        f"{facts['dtype']}. Tokens are non-padding tokens. Ratios are of tokens/s over steps on the same rows, taken "
        "in turn, with intervals over resampled steps. TRL has its default loss, and gradient checkpointing off: all "
        "contenders keep their activations.",
        *([f"Free memory did not hold all at once: {len(runs)} groups, one after the other."] if len(runs) > 1 else []),
        "",
        table(head, cells),
        "",
    ]
    for run in runs:
        if all(name in run["contenders"] for name in SAME_WORK):
            result = _interval(*faster(run, *SAME_WORK))
            lines += [f"`{SAME_WORK[0]}` is {result} times as fast as the bare loop, which does the same work.", ""]
    return "\n".join(lines)


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="JSON lines with `question` and `answer`; default: the cell's own data")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--only", nargs="*", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, help="write engine.json and engine.md into this folder")
    parser.add_argument("overrides", nargs="*", help="of the cell, for all contenders: model=..., peft=...")
    arguments = parser.parse_args()
    if arguments.steps < WARM_UP + 2:
        parser.error(f"--steps={arguments.steps}: the first {WARM_UP} are left out; give at least {WARM_UP + 2}")
    if PACKED not in arguments.only:
        parser.error(f"--only: the others are compared with '{PACKED}'; name it too")
    overrides = [
        *("peft=lora", "precision=bf16", "training.schedule=constant", "training.warmup_ratio=0"),
        *(f"training.steps={arguments.steps}", f"training.batch_size={arguments.batch_size}"),
        *(["data=lamini_docs", f"data.path={Path(arguments.data).resolve()}"] if arguments.data else []),
        *arguments.overrides,
    ]
    cell = compose_cell(overrides)
    names = [name for name in CONTENDERS if name in arguments.only]
    names = [name for name in names if cell.hardware.device == "cuda" or name not in WANTS_CUDA]
    groups = groups_of(names, needed_bytes(names, overrides), free=free_bytes(cell.hardware.device))
    if len(groups) > 1:
        print(f"free memory does not hold all at once; {len(groups)} groups: {'; '.join(map(', '.join, groups))}")
    runs = [measure(group, overrides, steps=arguments.steps) for group in groups]
    run = runs[0]
    assert all(other["tokens"] == run["tokens"] for other in runs), "groups see other rows"

    from importlib.metadata import version

    from left_bench.measure.device import describe_machine, matrix_product_peak, open_device

    machine = describe_machine(open_device(cell.hardware.device))
    dtype = cell.precision.compute_dtype
    peak = matrix_product_peak(cell.hardware.device, dtype, seconds=2)
    rows = [row for number, one in enumerate(runs, 1) for row in summarize(one, peak_flops=peak, group=number)]
    adapter = ", ".join(f"{key}={value}" for key, value in cell.peft.config.items())
    tokens_a_row = sum(run["tokens"]) / arguments.steps / arguments.batch_size
    facts = {
        "what": f"{cell.model.name} in {dtype}, {cell.peft.name} ({adapter}), batches of {arguments.batch_size} rows "
        f"of {Path(arguments.data).stem if arguments.data else cell.data.name} (mean {tokens_a_row:.0f} tokens, "
        f"longest {run['longest']}).",
        "machine": machine["device_name"] or machine["cpu"],
        "threads": run["threads"],
        "steps": arguments.steps,
        "peak_flops": peak,
        "dtype": dtype,
        **{name: version(name) for name in ("torch", "transformers", "peft", "trl")},
    }
    text = markdown(runs, rows, facts)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "engine.json").write_text(json.dumps({"facts": facts, "rows": rows, "runs": runs}, indent=1))
        (arguments.out / "engine.md").write_text(text)
    allowed = TOLERANCE[dtype]
    apart = [row["contender"] for row in rows if row["largest_loss_difference"] > allowed]
    if apart:
        raise SystemExit(f"losses differ by more than {allowed} nats: {', '.join(apart)}")


if __name__ == "__main__":
    main()
