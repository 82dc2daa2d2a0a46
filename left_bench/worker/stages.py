"""The stages of a run, in the order in which `run.work` calls them.

Each takes the run (`RunContext`) and the model from the stage before. Results go into `RunContext.draft`, the draft of
the record, as soon as they are known, so that a run that fails in a later stage keeps them.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from left_bench.core.files import write_atomically
from left_bench.core.paths import versions_of
from left_bench.evaluation import evaluate, harness, judge, merge_check, sampling, scorer, shared_baseline
from left_bench.measure import energy, method_buffers
from left_bench.measure.cpu_contention import Neighbours, Quiet
from left_bench.measure.device import Device, describe_machine, open_device
from left_bench.measure.meter import Meter, logical_numel, policy_curve, stored_bytes
from left_bench.methods import attach, verify
from left_bench.model import liger, load, quantized_cache
from left_bench.model.positions import check_generation
from left_bench.model.quantization_error import quantization_error
from left_bench.pretrained import local_files
from left_bench.processes import ranks
from left_bench.processes.ranks import Team
from left_bench.processes.resources import assigned_cores, concurrent_cells
from left_bench.spec.cell import Cell
from left_bench.spec.events import ROW_COUNTS, VALIDATION_COUNTS, EventWriter, progress_of
from left_bench.spec.record import RECORDED_PACKAGES
from left_bench.spec.run_files import ADAPTER_NAME, ROWS_NAME
from left_bench.training import float8, loop, packing
from left_bench.training.curve import Curve, check_curve
from left_bench.training.flops import step_flops
from left_bench.training.loss import AnswerLoss
from left_bench.training.policy import GRPO, Rollouts
from left_bench.training.preferences import make_objective, with_reference
from left_bench.training.sharding import put_whole_weights, whole_weights
from left_bench.worker.adapter_readme import write_readme
from left_bench.worker.classify_error import NoRoomToCheck, status_of
from left_bench.worker.earlier_cell import combined_cells, reward_cell, started_from


@dataclass(kw_only=True)
class RunContext:
    """The shared state of the stages of one cell's run."""

    cell: Cell
    run_dir: Path
    draft: dict[str, Any]
    """The future record: `environment`, `phases`, `metrics`, `memory_breakdown`, `provenance`, `scores`, `samples`."""
    events: EventWriter
    team: Team
    device: Device
    gpu: Any
    """The accelerator's energy counter, which also reads its clocks."""
    meter: Meter
    folder: str
    """The base model's files."""
    tokenizer: Any
    splits: Any
    test: Sequence[Any]
    """The held-out rows to score: all, or the first `eval.rows` of them; none in a trial of a tuning."""
    tasks: Any
    """Loaded tasks of lm-evaluation-harness; None: none."""
    base_modules: Any = field(default=None)
    """The base model's modules before a method was attached."""

    @property
    def effective(self) -> dict[str, Any]:
        """The settings in effect, which may differ from the requested ones: `environment.effective`."""
        effective: dict[str, Any] = self.draft["environment"]["effective"]
        return effective

    @property
    def rows_at_hand(self) -> Sequence[Any]:
        """Rows for timing and comparing models: held-out ones if there are any."""
        return self.test or self.splits.train

    @property
    def is_sharded(self) -> bool:
        return self.cell.hardware.sharding is not None


def begin(
    cell: Cell,
    *,
    run_dir: Path,
    draft: dict[str, Any],
    events: EventWriter,
    exceeded: Callable[[int], None],
    team: Team,
) -> RunContext:
    """Open device and counters, load tokenizer and rows, take the memory baseline and set the memory limit."""
    team.meet(cell.hardware.device)
    device = open_device(cell.hardware.device)
    effective: dict[str, Any] = {}
    draft["environment"] = {"machine": describe_machine(device), "versions": versions_of(RECORDED_PACKAGES)}
    draft["environment"]["effective"] = effective
    set_threads(cell, team)  # after describing the machine, which has more cores than the seat
    load.apply_precision(cell, device=device.kind)
    liger.check(cell, device=device.kind)
    float8.check(cell, device=device.kind)
    effective |= {"threads": threads_in_use() * team.size, "processes": team.size, "peak_memory": device.peak_source}
    effective["concurrent_cells"] = concurrent_cells(os.environ)
    gpu, counters = energy.open_counters(device.kind, os.environ, first=team.first)
    if facts := gpu.facts():
        draft["environment"]["machine"]["gpu"] = facts
    joules = energy.Energy(counters)
    if joules.sources:
        effective["energy"] = joules.sources

    folder, tokenizer = load.open_pretrained(cell)
    splits = load.load_rows_of(cell, tokenizer, folder=folder)
    test = splits.test if cell.eval.rows is None else splits.test[: cell.eval.rows]
    if cell.eval.trial:
        test = []
        effective["held_out"] = "a trial: the test rows are left unread"
    elif not test:
        effective["held_out"] = "no rows: all were trained on, and nothing is scored"
    elif cell.task.writes:
        longest_prompt = max(len(row.prompt_ids) for row in test)
        check_generation(cell, load.config_of(cell, folder), longest_prompt=longest_prompt)
    check_curve(cell, rows=len(splits.validation))
    # missing tasks fail now, not after training
    tasks = harness.load_tasks(cell) if team.first and not cell.eval.trial else None

    load.make_ready(cell, device=device.kind)
    meter = Meter(device, events, energy=joules)
    draft |= {"phases": meter.phases, "metrics": meter.metrics, "memory_breakdown": meter.memory_breakdown}
    meter.metrics |= counted_rows(splits, scored=len(test), cell=cell)
    counts = {name: meter.metrics[name] for name in (*ROW_COUNTS, *VALIDATION_COUNTS)}
    events.write("data", shape=splits.shape, **counts)
    draft["provenance"]["rows"] = splits.fingerprint
    draft["provenance"]["splits"] = used_for(splits, scored=len(test))
    if cell.hardware.memory_limit is not None:

        def end_phase_too(used: int) -> None:
            meter.close_phase()
            exceeded(used)

        effective["memory_limit"] = device.limit(
            cell.hardware.memory_limit, run_dir=ranks.folder_of(run_dir, team.rank), exceeded=end_phase_too
        )
    return RunContext(
        cell=cell,
        run_dir=run_dir,
        draft=draft,
        events=events,
        team=team,
        device=device,
        gpu=gpu,
        meter=meter,
        folder=folder,
        tokenizer=tokenizer,
        splits=splits,
        test=test,
        tasks=tasks,
    )


def load_base(run: RunContext) -> Any:
    """Load and quantize the base model, measure its quantization error, and check that it is causal."""
    cell, meter, effective = run.cell, run.meter, run.effective
    circumstances = {"machine": run.draft["environment"]["machine"]["id"]}
    circumstances |= {key: effective[key] for key in ("threads", "concurrent_cells")}
    base_model, loaded = quantized_cache.load_base(
        cell,
        folder=run.folder,
        device=run.team.place(run.device.kind),
        meter=meter,
        circumstances=circumstances,
        classes=run.splits.classes,
    )
    if cell.task.reads == "text":
        load.check_tokenizer(run.tokenizer, base_model)
    effective |= loaded
    meter.metrics |= load.base_metrics(base_model)
    meter.memory_breakdown["weights"] = int(meter.metrics["weights_bytes"])
    if run.team.first and cell.quantization.target is not None:
        with meter.phase("quantization_error"):
            error = quantization_error(base_model, local_files(cell.model, run.folder))
        if error is not None:
            meter.metrics["quantization_error"] = error
    # afterwards, because an int8 layer's first forward pass drops the scales that it needs
    load.check_causal(base_model, cell, device=run.device.kind)
    return base_model


def score_base(run: RunContext, base_model: Any) -> Any:
    """The base model's evaluation, shared with other cells; None if it is untrained for the task or no row is held
    out."""
    cell = run.cell
    # random weights and a new output layer are untrained
    if not run.team.first or not run.test or cell.model.weights == "random" or cell.task.new_output:
        return None
    before, source = shared_baseline.evaluate_base(
        base_model, run.tokenizer, run.test, cell, meter=run.meter, runs_dir=run.run_dir.parent, tasks=run.tasks
    )
    run.draft["provenance"]["base_scores_from"] = source
    return before


def attach_method(run: RunContext, base_model: Any) -> Any:
    """Attach the cell's method to the model, and count its parameters and bytes."""
    cell, meter, effective = run.cell, run.meter, run.effective
    of_base = [name for name, _ in base_model.named_parameters()]
    run.base_modules = method_buffers.modules_of(base_model)
    earlier = started_from(cell)
    if earlier is not None:
        run.draft["provenance"]["started_from"] = earlier.chain
    if parts := combined_cells(cell):
        run.draft["provenance"]["combined"] = [part.chain[-1] for part in parts]
    with meter.phase("attach"):
        model = _attach(run, base_model)
    trainable = attach.trainable_parameters(model)
    meter.metrics["trainable_params"] = sum(logical_numel(parameter) for parameter in trainable)
    if cell.peft.target is not None:
        # base weights that a method trains in place are already counted among the weights
        meter.memory_breakdown["adapter"] = stored_bytes(attach.added_parameters(model, base=of_base))
    effective |= {
        "learning_rate": cell.learning_rate,
        "trainable_dtype": "+".join(sorted({str(p.dtype).removeprefix("torch.") for p in trainable})),
        "autocast": cell.precision.compute_dtype if cell.autocast else "off",
    }
    if cell.peft.init_text is not None and not cell.task.is_decoder:
        kind = "an encoder with a decoder" if cell.task.has_encoder else "a model that does not generate text"
        effective["init_text"] = f"not used by {kind}"  # there is no cache to start from
    return model


def _attach(run: RunContext, base_model: Any) -> Any:
    """The cell's method, as new, as an earlier cell has left it, or made of several of those."""
    if parts := combined_cells(run.cell):
        return attach.combine_adapters(base_model, run.cell, [part.adapter for part in parts])
    earlier = started_from(run.cell)
    return attach.attach_adapter(
        *(base_model, run.cell),
        tokenizer=run.tokenizer,
        rows=run.splits.train,
        start=None if earlier is None else earlier.adapter,
    )


def train(run: RunContext, model: Any) -> None:
    """Train: optional supervised steps, reference margins and compilation first, then the cell's own steps."""
    cell, meter, effective, team, kind = run.cell, run.meter, run.effective, run.team, run.device.kind
    if cell.training.objective == "combine":  # nothing is trained
        meter.finish(measure_after=0)
        meter.metrics["train_epochs"] = 0.0
        run.draft["provenance"]["splits"]["train"]["used_for"] = []
        return
    pad_id = evaluate.pad_of(run.tokenizer)
    measured_peak = partial(
        shared_baseline.shared_peak,
        cell,
        meter=meter,
        runs_dir=run.run_dir.parent,
        threads=threads_in_use(),
        at_once=effective["concurrent_cells"],
    )
    # float8 products have a different peak than the compute dtype's, which is not measured
    peak = measured_peak() if team.first and not cell.training.float8 else None
    with load.autocast(cell, device=kind):
        verify.check_forward(model)
        everywhere, by_liger = (cell.training.output_head == name for name in ("all", "liger"))
        loss = AnswerLoss(model, everywhere=everywhere, in_chunks=not run.is_sharded, by_liger=by_liger)
        flops = step_flops(model)

    def sum_up(peak: Quiet | None) -> None:
        possible = None if peak is None else team.size * peak.value
        meter.finish(measure_after=cell.training.measure_after, flops=flops.of if flops else None, peak_flops=possible)
        effective.pop("utilization_withheld", None)
        if peak is not None:
            effective.update(shared_baseline.peak_facts(peak, processes=team.size, above=meter.above_peak))

    with (
        packing.laid_out(model, loss, run.splits.train, cell, pad_id=pad_id, device=kind) as layout,
        float8.in_float8(model, cell) as converted,
    ):
        if cell.task.writes:  # elsewhere every label has its own few logits
            effective["output_head"] = loss.output_head
        effective |= {**layout.effective, **converted}
        if loss.output_head_fallback is not None:
            effective["output_head_fallback"] = loss.output_head_fallback
        common: dict[str, Any] = {"pad_id": pad_id, "packed": layout.packed}
        rows, compiling = run.splits.train, None
        if cell.training.sft_steps:
            first = cell.sft_before()
            with meter.phase("sft") as counts, meter.apart("sft_step"):
                objective = make_objective(first, loss, **common)
                loop.train(model, rows, first, objective=objective, meter=meter, counts=counts, team=team, earlier=True)
        if cell.training.has_reference:
            with meter.phase("reference"):
                rows = with_reference(rows, cell, loss=loss, device=kind, **common)
        if cell.training.objective == "grpo":
            objective = _policy(run, model, loss, **common)
        else:
            objective = make_objective(cell, loss, **common)
        if cell.training.compile:
            with meter.phase("compile"):
                compiling = loop.compile_model(model, rows, cell, objective=objective, device=kind)
        curve = curve_of(run, model)
        neighbours = Neighbours(own_pids=team.pids)
        try:
            with meter.phase("train") as counts, loop.embedding_noise(model, cell.training.neftune_alpha):
                trained = loop.train(
                    model,
                    rows,
                    cell,
                    objective=objective,
                    meter=meter,
                    counts=counts,
                    compiling=compiling,
                    team=team,
                    # if sharded, frozen tensors count among the weights
                    base=None if run.is_sharded else run.base_modules,
                    curve=curve,
                )
                curve.finish(model)
        finally:
            others = neighbours.share()
            if others is not None:
                meter.metrics["other_cpu_share"] = others
            if facts := run.draft["environment"]["machine"].get("gpu"):
                facts |= run.gpu.clocks()  # before they drop
            run.draft["policy"] = policy_curve(meter.steps)
            if meter.starts[1:]:
                run.draft["provenance"]["resumed_after_steps"] = meter.starts[1:]
            sum_up(peak)
    effective["optimizer_state_dtype"] = trained.optimizer_state_dtypes
    note_end(run, trained.ended, curve)
    if meter.above_peak is not None:  # the stored peak was probably measured under other load
        sum_up(measured_peak(doubted=True))
    if compiling is not None:
        meter.metrics |= {"compile_seconds": compiling.seconds, "compiled_graphs": compiling.graphs}
    if team.size > 1:
        effective["rank_peak_memory_bytes"] = meter.take_in_peaks(team)
        meter.take_in_energy(team)


def _policy(run: RunContext, model: Any, loss: AnswerLoss, *, pad_id: int, packed: bool) -> GRPO:
    """What samples answers from the model and rewards them; the model as it is now is the reference."""
    cell, kind, settings = run.cell, run.device.kind, run.cell.training
    judge = None
    if (earlier := reward_cell(cell)) is not None:
        run.draft["provenance"]["rewarded_by"] = earlier.chain
        with run.meter.phase("load_reward_model"):
            folder, _ = load.open_pretrained(earlier.cell)
            judge = sampling.load_reward_model(
                *(earlier.cell, earlier.adapter), folder=folder, device=kind, batch_size=cell.eval.batch_size
            )
    rollouts = Rollouts(
        *(cell, model),
        sample=lambda rows: sampling.sampled_answers(model, run.tokenizer, rows, cell, device=kind),
        reward=sampling.reward_of_answers(cell, model, run.tokenizer, judge=judge),
        device=run.device,
        pad_id=pad_id,
    )
    if rollouts.reference is not None:
        run.meter.memory_breakdown["reference"] = stored_bytes(rollouts.reference.tensors)
    return GRPO(
        loss=loss, rollouts=rollouts, kl_weight=settings.kl_weight, clip=settings.clip, pad_id=pad_id, packed=packed
    )


def curve_of(run: RunContext, model: Any) -> Curve:
    """The curve that measures the validation loss during training, and with `eval.curve_scores` answers' scores."""
    cell, rows, kind = run.cell, run.splits.validation, run.device.kind

    def scores() -> dict[str, float]:
        return evaluate.answer_scores(model, run.tokenizer, rows, cell, device=kind)

    curve = Curve(
        *(cell, rows),
        meter=run.meter,
        team=run.team,
        tell=progress_of(run.events),
        scores=scores if cell.eval.curve_scores and (cell.generates or not cell.task.writes) else None,
    )
    run.draft["curve"] = curve.points
    return curve


def note_end(run: RunContext, ended: str, curve: Curve) -> None:
    """Record why training ended, from which step the weights are, their validation loss, and how validation rows were
    used."""
    meter, kept, splits = run.meter, curve.kept, run.draft["provenance"]["splits"]
    steps = len(meter.steps)
    meter.metrics["train_epochs"] = run.cell.training.rows_of(steps) / len(run.splits.train)
    of_step = kept.step if kept is not None else steps
    run.draft["provenance"]["training_ended"] = {"by": ended, "steps": steps, "weights_of_step": of_step}
    if kept is not None:
        meter.metrics["validation_loss"] = kept.validation_loss
    if curve.points:
        splits["validation"]["used_for"].append("the curve along training")
    if run.cell.eval.trial and "validation" in splits:
        splits["validation"]["used_for"].append("the choice between the trials of a tuning")
    if run.cell.training.stop_patience is not None and curve.points:
        splits["validation"]["used_for"].append("the step whose weights are taken (training.stop_patience)")


def gather_shards(run: RunContext, base_model: Any, model: Any) -> tuple[Any, Any]:
    """Base and adapted model for the remaining stages, which run on rank 0 only and need an unsharded model."""
    trained = whole_weights(model) if run.is_sharded else {}  # every rank takes part
    if not run.team.first:
        return base_model, model
    if run.is_sharded:
        place = run.team.place(run.device.kind)
        base_model, _ = load.load_model(run.cell, folder=run.folder, device=place, classes=run.splits.classes)
        model = _attach(run, base_model)
        put_whole_weights(model, trained)
    loop.uncompile(model)
    account_for_peak(run.meter.memory_breakdown, run.meter.metrics)
    return base_model, model


def evaluate_adapted(run: RunContext, model: Any, before: Any) -> None:
    """Score the held-out rows, and run the cell's tasks, scorer and judge."""
    if not run.test:
        return
    cell, meter, test, effective, events = run.cell, run.meter, run.test, run.effective, run.events
    tell = progress_of(events)
    with meter.phase("evaluate") as counts:
        after = evaluate.evaluate_model(model, run.tokenizer, test, cell, device=run.device.kind, tell=tell)
        counts.tokens = after.tokens
        if run.splits.validation and "validation_loss" not in meter.metrics:
            meter.metrics["validation_loss"] = evaluate.mean_token_loss(
                *(model, run.splits.validation, cell),
                pad_id=evaluate.pad_of(run.tokenizer),
                device=run.device.kind,
                tell=tell,
            )
        if run.tasks is not None:
            room = evaluate.room_of(model, cell)
            with costing_its_scores("tasks", effective, events):
                after.tasks = harness.ask(
                    run.tasks, model, run.tokenizer, cell, device=run.device.kind, room=room, tell=tell
                )
        if cell.generates:
            meter.metrics["generate_tokens_per_second"] = _generation_speed(run, model, cell)
    by_row = evaluate.row_scores(after, test, cell)
    if cell.model.weights != "random":  # random weights have no meaningful quality
        scores = run.draft["scores"] = evaluate.scores(after, before, test, cell, by_row=by_row)
        run.draft["samples"] = evaluate.samples(after, before, test, cell)
        base_answers = before.predictions if before is not None else None
        if cell.eval.verifier and after.predictions is not None:
            with costing_its_scores("verifier", effective, events):
                made_by_verifier, by_row["verifier_score"] = sampling.verifier_scores(
                    cell, test, after.predictions, base_answers
                )
                scores.append(made_by_verifier)
        if cell.eval.scorer is not None and after.predictions is not None:
            with meter.phase("score"), costing_its_scores("scorer", effective, events):
                made, of_rows = scorer.score_answers(cell, test, after.predictions, base_answers, tell=tell)
                scores += made
                by_row |= of_rows
        if cell.eval.judge is not None and after.predictions is not None and base_answers is not None:
            with meter.phase("judge"), costing_its_scores("judge", effective, events):
                made, facts_of_judge = judge.judge_answers(cell, test, after.predictions, base_answers, tell=tell)
                scores += made
                meter.metrics |= facts_of_judge
        for score in scores:
            meter.metrics[score.metric] = score.value
            if score.base_value is not None:
                meter.metrics[f"base_{score.metric}"] = score.base_value
    write_rows(run.run_dir / ROWS_NAME, after, before, test, by_row)


def save(run: RunContext, base_model: Any, model: Any) -> None:
    """Save what was trained in a folder that peft or transformers can load, with a README that shows how."""
    if run.cell.eval.trial:
        return
    folder = run.run_dir / ADAPTER_NAME
    # p-tuning saves its encoder's output for the virtual tokens, which must be computed as in the evaluation
    with run.meter.phase("save"), load.autocast(run.cell, device=run.device.kind):
        run.meter.metrics["adapter_file_bytes"] = attach.save_trained(model, folder, tokenizer=run.tokenizer)
    ends = evaluate.end_tokens(base_model, run.tokenizer) if run.cell.task.writes else None
    write_readme(folder, run.cell, base=run.folder, tokenizer=run.tokenizer, ends=ends)


def check_reload(run: RunContext, reloads: Callable[[Path], bool] | None) -> None:
    """Check that the saved adapter, reloaded, reproduces the losses of the held-out rows."""
    if reloads is None or not run.test:
        return
    with run.meter.phase("reload"):
        try:
            run.meter.metrics["reload_ok"] = float(reloads(run.run_dir))
        except NoRoomToCheck as error:
            run.effective["reload"] = f"not checked: {error}"


def check_merge(run: RunContext, model: Any) -> None:
    """Measure how merging the adapter changes the model; `model` must not be used afterwards."""
    cell, meter = run.cell, run.meter
    if cell.peft.target is None or cell.eval.trial:
        return
    pad_id = evaluate.pad_of(run.tokenizer)
    with meter.phase("merge"):
        merged, run.effective["merge"] = merge_check.merge(
            model, run.rows_at_hand[:8], cell, meter=meter, pad_id=pad_id
        )
        if merged is not None and cell.generates:
            speed = _generation_speed(run, merged, cell.without_adapter())
            meter.metrics["merged_generate_tokens_per_second"] = speed


def _generation_speed(run: RunContext, model: Any, cell: Cell) -> float:
    return evaluate.generation_speed(
        model, tokenizer=run.tokenizer, rows=run.rows_at_hand, device=run.device, cell=cell
    )


@contextmanager
def costing_its_scores(key: str, effective: dict[str, Any], events: EventWriter) -> Iterator[None]:
    """An error of what `eval.<key>` names is recorded and reported, but does not end the cell, whose training is valid.

    Running out of memory still ends the cell.
    """
    try:
        yield
    except Exception as error:
        status, reason = status_of(error)
        if status == "oom":
            raise
        reason = str(error) if isinstance(error, (scorer.ScorerFailed, judge.JudgeFailed)) else reason
        traceback.print_exc()
        effective[key] = f"failed: {reason}"
        events.write("note", text=f"eval.{key}: no score, {reason}")


def counted_rows(splits: Any, *, scored: int, cell: Cell) -> dict[str, float]:
    """The numbers of rows used, dropped and truncated, under the names in METRICS."""
    return {
        "train_rows": len(splits.train),
        "validation_rows": len(splits.validation),
        "test_rows": scored,
        "dropped_rows": splits.dropped_rows,
        "repeated_rows": splits.repeated_rows,
        "repeated_validation_rows": splits.repeated_validation_rows,
        "truncated_rows": splits.truncated_rows,
        "truncated_test_rows": splits.truncated_test_rows,
        "train_epochs": cell.training.rows_of(cell.training.steps) / len(splits.train),
    }


def used_for(splits: Any, *, scored: int) -> dict[str, dict[str, Any]]:
    """Split -> number of rows, and what they were used for."""
    result: dict[str, dict[str, Any]] = {"train": {"rows": len(splits.train), "used_for": ["training"]}}
    if splits.validation:
        result["validation"] = {"rows": len(splits.validation), "used_for": ["validation_loss"]}
    if scored:
        result["test"] = {"rows": scored, "used_for": ["scores, before and after training"]}
    return result


def account_for_peak(breakdown: dict[str, int], metrics: dict[str, float]) -> None:
    """Add the part of the peak beyond the counted ones: temporary copies, kernels' workspace, allocator slack; and
    activations where they were not counted."""
    peak = metrics.get("peak_memory_bytes")
    if peak is not None:
        rest = "workspace" if "activations" in breakdown else "activations_and_workspace"
        breakdown[rest] = max(0, int(peak) - sum(breakdown.values()))


def write_rows(path: Path, after: Any, before: Any, rows: Any, by_row: Mapping[str, Sequence[float]]) -> None:
    """Per-row results, for paired comparisons between cells.

    Args:
        by_row: metric -> the score of each row, for metrics that need more than answer and reference.
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
    """Set the number of threads: the cell's, else one per core of its seat, else torch's default (all it may use).

    Threads and the seat's cores are divided among the ranks.
    """
    cores = assigned_cores(os.environ)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, team.cores(cores))
    threads = cell.hardware.threads or len(cores)
    if team.size > 1:
        threads = max(1, (threads or torch.get_num_threads()) // team.size)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # otherwise accelerate sets another number
    if threads:
        torch.set_num_threads(threads)


def threads_in_use() -> int:
    return torch.get_num_threads()
