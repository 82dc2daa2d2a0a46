"""The measured run of one cell, in a process of its own: `python -m left_bench.worker.run RUN_DIR`.

It reads `cell.json`, tells its parent about progress through `events.jsonl`, and leaves a record in `outcome.json`.
Read `work` from top to bottom: that is the run.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from left_bench.core.clock import utc_now
from left_bench.core.files import write_atomically
from left_bench.core.paths import versions_of
from left_bench.processes import memory_limit, ranks
from left_bench.processes.ranks import OUTCOME_NAME, Team
from left_bench.processes.resources import assigned_cores, concurrent_cells
from left_bench.processes.start_process import STACK_SIGNAL, die_with_parent
from left_bench.spec.cell import Cell
from left_bench.spec.events import EVENTS_NAME, ROW_COUNTS, EventWriter, NullEventWriter, progress_of
from left_bench.spec.record import Record, Status
from left_bench.worker.classify_error import NoRoomToCheck, disk_full, out_of_memory_reason, status_of

CELL_NAME, ADAPTER_NAME, ROWS_NAME = "cell.json", "adapter", "rows.jsonl"
VERSIONS = (
    *("left-bench", "torch", "transformers", "peft", "bitsandbytes", "accelerate"),
    *("datasets", "evaluate", "tokenizers", "safetensors", "numpy", "llvmlite", "lm-eval"),
)
NO_OUTCOME = 74  # sysexits.h: EX_IOERR


def work(
    cell: Cell,
    *,
    run_dir: Path,
    found: dict[str, Any],
    events: EventWriter,
    exceeded: Callable[[int], None] = lambda used: None,
    reloads: Callable[[Path], bool] | None = None,
    team: Team = ranks.ALONE,
) -> None:
    """Fine-tune and measure one cell; everything learned goes into `found` as soon as it is known.

    `exceeded` is told, from another thread, of memory in use beyond `hardware.memory_limit`. `reloads` says whether
    the run's saved adapter gives back its losses, for `eval.check_reload`. Every rank of `team` runs this; the first
    alone evaluates and saves.

    Raises:
        Exception: whatever went wrong; `found` then holds what was measured before.
    """
    from left_bench.evaluation import evaluate, harness, judge, merge_check, scorer, shared_baseline
    from left_bench.measure import method_buffers
    from left_bench.measure.cpu_contention import Neighbours, Quiet
    from left_bench.measure.device import describe_machine, open_device
    from left_bench.measure.energy import Energy, open_counters
    from left_bench.measure.meter import Meter, logical_numel, stored_bytes
    from left_bench.methods import attach, verify
    from left_bench.model import liger, load, quantized_cache
    from left_bench.model.positions import check_generation
    from left_bench.model.quantization_error import quantization_error
    from left_bench.pretrained import local_files
    from left_bench.training import float8, loop, packing
    from left_bench.training.flops import step_flops
    from left_bench.training.loss import AnswerLoss
    from left_bench.training.objective import make_objective, with_reference
    from left_bench.training.sharding import put_whole_weights, whole_weights
    from left_bench.worker.adapter_readme import write_readme

    team.meet(cell.hardware.device)
    device = open_device(cell.hardware.device)
    found["environment"] = {"machine": describe_machine(device), "versions": versions_of(VERSIONS), "effective": {}}
    set_threads(cell, team)  # after the machine is described: a seat's cores are not all it has
    load.apply_precision(cell, device=device.kind)
    liger.check(cell, device=device.kind)
    float8.check(cell, device=device.kind)
    effective = found["environment"]["effective"]
    effective |= {"threads": threads_in_use() * team.size, "processes": team.size, "peak_memory": device.peak_source}
    effective["concurrent_cells"] = concurrent_cells(os.environ)
    gpu, counters = open_counters(device.kind, os.environ, first=team.first)
    if facts := gpu.facts():
        found["environment"]["machine"]["gpu"] = facts
    energy = Energy(counters)
    if energy.sources:
        effective["energy"] = energy.sources

    folder, tokenizer = load.open_pretrained(cell)
    splits = load.load_rows_of(cell, tokenizer, folder=folder)
    test = splits.test if cell.eval.rows is None else splits.test[: cell.eval.rows]
    if not test:
        effective["held_out"] = "no rows: all were trained on, and nothing is scored"
    elif splits.classes is None:
        longest_prompt = max(len(row.prompt_ids) for row in test)
        check_generation(cell, load.config_of(cell, folder), longest_prompt=longest_prompt)
    tasks = harness.load_tasks(cell) if team.first else None  # what cannot be had shows now, and not after training

    load.make_ready(cell, device=device.kind)
    meter = Meter(device, events, energy=energy)
    found |= {"phases": meter.phases, "metrics": meter.metrics, "memory_breakdown": meter.memory_breakdown}
    meter.metrics |= counted_rows(splits, scored=len(test), cell=cell)
    events.write("data", shape=splits.shape, **{name: meter.metrics[name] for name in ROW_COUNTS})
    found["provenance"]["rows"] = splits.fingerprint
    if cell.hardware.memory_limit is not None:

        def end_phase_too(used: int) -> None:
            meter.close_phase()
            exceeded(used)

        effective["memory_limit"] = device.limit(
            cell.hardware.memory_limit, run_dir=ranks.folder_of(run_dir, team.rank), exceeded=end_phase_too
        )

    circumstances = {"machine": found["environment"]["machine"]["id"]}
    circumstances |= {key: effective[key] for key in ("threads", "concurrent_cells")}
    base_model, loaded = quantized_cache.load_base(
        cell,
        folder=folder,
        device=team.place(device.kind),
        meter=meter,
        circumstances=circumstances,
        classes=splits.classes,
    )
    if splits.classes is None:
        load.check_tokenizer(tokenizer, base_model)
    effective |= loaded
    meter.metrics |= load.base_metrics(base_model)
    meter.memory_breakdown["weights"] = int(meter.metrics["weights_bytes"])
    if team.first and cell.quantization.target is not None:
        with meter.phase("quantization_error"):
            error = quantization_error(base_model, local_files(cell.model, folder))
        if error is not None:
            meter.metrics["quantization_error"] = error
    # after it: with the first forward pass an int8 layer lets go of the scales that it reads
    load.check_causal(base_model, cell, device=device.kind)

    before = None
    # random weights and a new output layer know nothing yet
    if team.first and test and cell.model.weights != "random" and splits.classes is None:
        before, source = shared_baseline.evaluate_base(
            base_model, tokenizer, test, cell, meter=meter, runs_dir=run_dir.parent, tasks=tasks
        )
        found["provenance"]["base_scores_from"] = source

    of_base, base_modules = [name for name, _ in base_model.named_parameters()], method_buffers.modules_of(base_model)
    with meter.phase("attach"):
        model = attach.attach_adapter(base_model, cell, tokenizer=tokenizer, rows=splits.train)
    trainable = attach.trainable_parameters(model)
    meter.metrics["trainable_params"] = sum(logical_numel(parameter) for parameter in trainable)
    if cell.peft.target is not None:
        # what a method trains in place is among the weights already
        meter.memory_breakdown["adapter"] = stored_bytes(attach.added_parameters(model, base=of_base))
    effective |= {
        "learning_rate": cell.learning_rate,
        "trainable_dtype": "+".join(sorted({str(p.dtype).removeprefix("torch.") for p in trainable})),
        "autocast": cell.precision.compute_dtype if cell.autocast else "off",
    }

    if cell.peft.init_text is not None and base_model.config.is_encoder_decoder:
        effective["init_text"] = "not used by an encoder with a decoder"  # its prompt leaves no cache to start from

    pad_id = evaluate.pad_of(tokenizer)
    measured_peak = partial(
        shared_baseline.shared_peak,
        cell,
        meter=meter,
        runs_dir=run_dir.parent,
        threads=threads_in_use(),
        at_once=effective["concurrent_cells"],
    )
    # float8 products have another peak than those of the compute dtype, and it is not measured
    peak = measured_peak() if team.first and not cell.training.float8 else None
    with load.autocast(cell, device=device.kind):
        verify.check_forward(model)
        everywhere, whole = cell.training.output_head == "all", cell.hardware.sharding is None
        by_liger = cell.training.output_head == "liger"
        loss = AnswerLoss(model, everywhere=everywhere, in_chunks=whole, by_liger=by_liger)
        flops = step_flops(model)

    def sum_up(peak: Quiet | None) -> None:
        possible = None if peak is None else team.size * peak.value
        meter.finish(measure_after=cell.training.measure_after, flops=flops.of if flops else None, peak_flops=possible)
        effective.pop("utilization_withheld", None)
        if peak is not None:
            effective.update(shared_baseline.peak_facts(peak, processes=team.size, above=meter.above_peak))

    with (
        packing.laid_out(model, loss, splits.train, cell, pad_id=pad_id, device=device.kind) as layout,
        float8.in_float8(model, cell) as converted,
    ):
        effective |= {"output_head": loss.output_head, **layout.effective, **converted}
        if loss.output_head_fallback is not None:
            effective["output_head_fallback"] = loss.output_head_fallback
        common: dict[str, Any] = {"pad_id": pad_id, "packed": layout.packed}
        rows, compiling = splits.train, None
        if cell.training.sft_steps:
            first = cell.sft_before()
            with meter.phase("sft") as counts, meter.apart("sft_step"):
                objective = make_objective(first, loss, **common)
                loop.train(model, rows, first, objective=objective, meter=meter, counts=counts, team=team, earlier=True)
        if cell.training.objective == "dpo":
            with meter.phase("reference"):
                rows = with_reference(rows, cell, loss=loss, device=device.kind, **common)
        objective = make_objective(cell, loss, **common)
        if cell.training.compile:
            with meter.phase("compile"):
                compiling = loop.compile_model(model, rows, cell, objective=objective, device=device.kind)
        neighbours = Neighbours(beside=team.pids)
        try:
            with meter.phase("train") as counts, loop.embedding_noise(model, cell.training.neftune_alpha):
                states = loop.train(
                    model,
                    rows,
                    cell,
                    objective=objective,
                    meter=meter,
                    counts=counts,
                    compiling=compiling,
                    team=team,
                    base=base_modules if whole else None,  # sharded, what is frozen counts among the weights
                )
        finally:
            others = neighbours.share()
            if others is not None:
                meter.metrics["other_cpu_share"] = others
            if facts:
                facts |= gpu.clocks()  # before they fall
            if meter.starts[1:]:
                found["provenance"]["resumed_after_steps"] = meter.starts[1:]
            sum_up(peak)
    effective["optimizer_state_dtype"] = states
    if meter.above_peak is not None:  # measured beside other load, most likely, and kept
        sum_up(measured_peak(doubted=True))
    if compiling is not None:
        meter.metrics |= {"compile_seconds": compiling.seconds, "compiled_graphs": compiling.graphs}
    if team.size > 1:
        effective["rank_peak_memory_bytes"] = meter.take_in_peaks(team)
        meter.take_in_energy(team)
    trained = {} if whole else whole_weights(model)
    if not team.first:
        return
    if not whole:  # what follows is this rank's alone, and wants a model that is no shard
        place = team.place(device.kind)
        base_model, _ = load.load_model(cell, folder=folder, device=place, classes=splits.classes)
        model = attach.attach_adapter(base_model, cell, tokenizer=tokenizer, rows=splits.train)
        put_whole_weights(model, trained)
    loop.uncompile(model)
    account_for_peak(meter.memory_breakdown, meter.metrics)

    speed = partial(evaluate.generation_speed, tokenizer=tokenizer, rows=test or splits.train, device=device)
    if test:
        tell = progress_of(events)
        with meter.phase("evaluate") as counts:
            after = evaluate.evaluate_model(model, tokenizer, test, cell, device=device.kind, tell=tell)
            counts.tokens = after.tokens
            if tasks is not None:
                room = evaluate.room_of(model, cell)
                with costing_its_scores("tasks", effective, events):
                    after.tasks = harness.ask(tasks, model, tokenizer, cell, device=device.kind, room=room, tell=tell)
            if cell.generates:
                meter.metrics["generate_tokens_per_second"] = speed(model, cell=cell)
        by_row = evaluate.row_scores(after, test, cell)
        if cell.model.weights != "random":  # those have no quality worth a number
            found["scores"] = evaluate.scores(after, before, test, cell)
            found["samples"] = evaluate.samples(after, before, test, cell)
            base_answers = before.predictions if before is not None else None
            if cell.eval.scorer is not None and after.predictions is not None:
                with meter.phase("score"), costing_its_scores("scorer", effective, events):
                    made, of_rows = scorer.score_answers(cell, test, after.predictions, base_answers, tell=tell)
                    found["scores"] += made
                    by_row |= of_rows
            if cell.eval.judge is not None and after.predictions is not None and base_answers is not None:
                with meter.phase("judge"), costing_its_scores("judge", effective, events):
                    made, facts_of_judge = judge.judge_answers(cell, test, after.predictions, base_answers, tell=tell)
                    found["scores"] += made
                    meter.metrics |= facts_of_judge
            for score in found["scores"]:
                meter.metrics[score.metric] = score.value
                if score.base_value is not None:
                    meter.metrics[f"base_{score.metric}"] = score.base_value
        write_rows(run_dir / ROWS_NAME, after, before, test, by_row)

    # p-tuning saves what its encoder makes of the virtual tokens: by the same arithmetic as evaluated, or it is another
    with meter.phase("save"), load.autocast(cell, device=device.kind):
        saved = attach.save_trained(model, run_dir / ADAPTER_NAME, tokenizer=tokenizer)
        meter.metrics["adapter_file_bytes"] = saved
    ends = None if splits.classes else evaluate.end_tokens(base_model, tokenizer)
    write_readme(run_dir / ADAPTER_NAME, cell, base=folder, tokenizer=tokenizer, ends=ends)
    if reloads is not None and test:
        with meter.phase("reload"):
            try:
                meter.metrics["reload_ok"] = float(reloads(run_dir))
            except NoRoomToCheck as error:
                effective["reload"] = f"not checked: {error}"

    if cell.peft.target is not None:
        compared = (test or splits.train)[:8]
        with meter.phase("merge"):
            merged, effective["merge"] = merge_check.merge(model, compared, cell, meter=meter, pad_id=pad_id)
            if merged is not None and cell.generates:
                meter.metrics["merged_generate_tokens_per_second"] = speed(merged, cell=cell.without_adapter())
    meter.finish_cell()


@contextmanager
def costing_its_scores(key: str, effective: dict[str, Any], events: EventWriter) -> Iterator[None]:
    """A fault of what `eval.<key>` names is noted and said, and ends no cell: its training is worth a record.

    Running out of memory is a fault of the cell.
    """
    from left_bench.evaluation.judge import JudgeFailed
    from left_bench.evaluation.scorer import ScorerFailed

    try:
        yield
    except Exception as error:
        status, reason = status_of(error)
        if status == "oom":
            raise
        reason = str(error) if isinstance(error, (ScorerFailed, JudgeFailed)) else reason
        traceback.print_exc()
        effective[key] = f"failed: {reason}"
        events.write("note", text=f"eval.{key}: no score, {reason}")


def counted_rows(splits: Any, *, scored: int, cell: Cell) -> dict[str, float]:
    """What became of the data's rows, by the names of METRICS."""
    rows_per_step = cell.training.batch_size * cell.training.gradient_accumulation
    return {
        "train_rows": len(splits.train),
        "test_rows": scored,
        "dropped_rows": splits.dropped_rows,
        "repeated_rows": splits.repeated_rows,
        "truncated_rows": splits.truncated_rows,
        "truncated_test_rows": splits.truncated_test_rows,
        "train_epochs": cell.training.steps * rows_per_step / len(splits.train),
    }


def main(argv: list[str], *, forked: bool = False) -> int:
    """Run the cell in `RUN_DIR` and leave its outcome, whatever its status; exit code NO_OUTCOME where that fails.

    `RUN_DIR RANK` is one of the other processes of a cell that has several. `forked`: this process came from the fork
    server, or is a fork of one that did, and has done nothing yet.
    """
    run_dir, rank = Path(argv[0]), int(argv[1]) if len(argv) > 1 else 0
    faulthandler.enable()  # a segfault leaves its stack in worker.log
    if STACK_SIGNAL is not None:
        faulthandler.register(STACK_SIGNAL)  # and so does a run that the parent finds hanging
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
    found: dict[str, Any] = {"provenance": {}}
    ended = threading.Lock()

    def end(status: Status, reason: str | None) -> None:
        """Leave the outcome and go: the run itself or its memory watchdog, whichever comes first."""
        ended.acquire()
        memory_limit.lift()  # a run that is out of memory needs some to say so
        # JSON has no NaN, and a loss that is none is in the reason, not a number to compare
        found["metrics"] = {name: value for name, value in dict(found.get("metrics", {})).items() if isfinite(value)}
        outcome = Record(
            cell_id=cell.id,
            status=status,
            reason=reason,
            started_at=started,
            finished_at=utc_now(),
            choices=cell.choices,
            config=cell.sections(),
            **found,
        )
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
        work(cell, run_dir=run_dir, found=found, events=events, exceeded=exceeded, reloads=reloads, team=team)
    except Exception as error:
        memory_limit.lift()
        status, reason = team.why_lost(error) or status_of(
            error, limit_bytes=cell.hardware.memory_limit, device=cell.hardware.device
        )
        if disk_full(error):  # half an adapter is of no use, and its room is wanted for the outcome
            shutil.rmtree(run_dir / ADAPTER_NAME, ignore_errors=True)
        traceback.print_exc()
    end(status, reason)
    return 0


def account_for_peak(breakdown: dict[str, int], metrics: dict[str, float]) -> None:
    """What the peak holds beyond the parts that were counted: activations, temporary copies, allocator slack."""
    peak = metrics.get("peak_memory_bytes")
    if peak is not None:
        breakdown["activations_and_workspace"] = max(0, int(peak) - sum(breakdown.values()))


def write_rows(path: Path, after: Any, before: Any, rows: Any, by_row: Mapping[str, Sequence[float]]) -> None:
    """Per-row results, for paired comparisons between cells.

    Args:
        by_row: metric -> the score of each row, where it cannot be told from answer and reference alone.
    """
    answers = after.predictions or [None] * len(rows)
    base_answers = (before and before.predictions) or [None] * len(rows)
    lines = [
        json.dumps(
            {
                "row": index,
                "nll": after.nll[index],
                "base_nll": before.nll[index] if before else None,
                "answer_tokens": after.answer_tokens[index],
                **({} if after.rejected_nll is None else {"rejected_nll": after.rejected_nll[index]}),
                "reference": row.reference,
                "prediction": answers[index],
                "base_prediction": base_answers[index],
                **({"scores": {name: values[index] for name, values in by_row.items()}} if by_row else {}),
            }
        )
        for index, row in enumerate(rows)
    ]
    write_atomically(path, "\n".join(lines) + "\n")


def set_threads(cell: Cell, team: Team = ranks.ALONE) -> None:
    """Take the threads the cell names, else one for each core of its seat, else torch's choice: all it may use.

    Ranks divide them, and the seat's cores.
    """
    import torch

    cores = assigned_cores(os.environ)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, team.cores(cores))
    threads = cell.hardware.threads or len(cores)
    if team.size > 1:
        threads = max(1, (threads or torch.get_num_threads()) // team.size)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # else accelerate sets another number
    if threads:
        torch.set_num_threads(threads)


def threads_in_use() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    main(sys.argv[1:])
