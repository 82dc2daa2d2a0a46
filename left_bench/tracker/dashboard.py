"""`left-bench dashboard`: a Weights & Biases workspace and report for a sweep, built as code with wandb-workspaces.

Building is pure: it asks nobody anything and gives the same panels every time. Saving needs a login.

Panels name what `kinds.wandb` logs. Options are read from the resolved cell (`peft.name`), which is nested as the
app expects; the flat `axis.peft` beside it is for filters and exports.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from left_bench.compat.wandb_workspaces import as_saved
from left_bench.core.errors import UserError, nearest
from left_bench.core.files import write_atomically
from left_bench.spec.record import METRICS, SCORER_PREFIX, find_metric

_PHASES = ("load", "attach", "train", "evaluate", "merge")
_AXES = ("model", "quantization", "peft", "precision", "optimizer", "data")
# Okabe and Ito's colours for every eye, then darker ones
_COLORS = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#000000"),
    *("#004c77", "#8f6300", "#00563f", "#7f3900"),
)


def main(argv: list[str]) -> int:
    """`left-bench dashboard --sweep NAME [--out FILE]`: print where it is; 2 where it cannot be built or saved."""
    parser = argparse.ArgumentParser(
        prog="left-bench dashboard",
        description="Build a Weights & Biases workspace and report that compare a sweep's cells.",
    )
    parser.add_argument("--sweep", required=True, metavar="NAME", help="the sweep's name, as in +sweep=NAME")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where its records lie (default: %(default)s)")
    parser.add_argument("--metric", metavar="NAME", help="quality to plot (default: the first that was measured)")
    parser.add_argument("--project", default="left_bench", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--entity", metavar="NAME", help="your user or team (default: the login's own)")
    parser.add_argument("--out", metavar="FILE", help="write the specification as JSON in place of saving; no login")
    options = parser.parse_args(argv)
    if options.metric is not None and find_metric(options.metric) is None:
        raise UserError(f"--metric {options.metric}: no such metric{nearest(options.metric, METRICS)}")
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("dashboard: the package wandb-workspaces is not installed; pip install 'left-bench[dashboard]'")
    methods, measured = _cells_of(options.sweep, Path(options.runs))
    named: dict[str, Any] = {
        "sweep": options.sweep,
        "project": options.project,
        "metric": options.metric or quality_metric(measured),
        "colors": method_colors(methods),
    }
    if options.out:
        print(write_atomically(Path(options.out), json.dumps(specification(**named), indent=1) + "\n"))
        return 0
    for address in _save(named, entity=options.entity):
        print(address)
    return 0


def quality_metric(measured: Sequence[str]) -> str:
    """The metric a sweep is judged by: the first quality of METRICS that is scored on answers, else the loss."""
    own = [name for name in measured if name.startswith(SCORER_PREFIX)]
    for name in (*own, "exact_match", "accuracy", "number_match", "rouge_l", "f1", "bleu"):
        if name in measured:
            return name
    return "eval_loss"


def method_colors(methods: Mapping[str, str]) -> dict[str, str]:
    """Run id -> colour: runs of one method share one.

    Args:
        methods: run id -> the method's name.
    """
    names = sorted(set(methods.values()))
    return {run_id: _COLORS[names.index(method) % len(_COLORS)] for run_id, method in methods.items()}


def panels(metric: str) -> dict[str, list[Any]]:
    """Section -> its panels, in order."""
    import wandb_workspaces.reports.v2 as wr

    def at(x: int, y: int, width: int = 12, height: int = 9) -> Any:
        return wr.Layout(x=x, y=y, w=width, h=height)

    memory: list[Any] = [wr.SummaryMetric(f"peak_memory_gib/{phase}") for phase in _PHASES]
    axes = [wr.ParallelCoordinatesPlotColumn(wr.Config(f"{axis}.name"), display_name=axis) for axis in _AXES]
    ends = [
        wr.ParallelCoordinatesPlotColumn(wr.Config("training.learning_rate"), display_name="learning rate", log=True),
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric("peak_memory_gib"), display_name="peak memory (GiB)"),
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric("train_tokens_per_second"), display_name="tokens/s"),
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(metric), display_name=metric),
    ]
    legend = "${config:peft.name} ${config:quantization.name}"
    return {
        "Quality, memory, speed": [
            wr.ScatterPlot(
                title=f"{metric} against peak memory, coloured by method",
                x=wr.SummaryMetric("peak_memory_gib"),
                y=wr.SummaryMetric(metric),
                legend_template=legend,
                layout=at(0, 0),
            ),
            wr.BarPlot(
                title="Peak memory by phase",
                metrics=memory,
                groupby=wr.Config("peft.name"),
                title_x="GiB",
                orientation="h",
                layout=at(12, 0),
            ),
        ],
        "Axes": [
            wr.ParallelCoordinatesPlot(
                title="What was chosen, what came of it", columns=[*axes, *ends], layout=at(0, 0, 24)
            )
        ],
        "Training": [
            wr.LinePlot(
                title="Training loss over tokens",
                x="train/tokens",
                y=["train/loss"],
                title_x="tokens",
                title_y="loss",
                legend_template=legend,
                max_runs_to_show=100,
                layout=at(0, 0),
            ),
            wr.LinePlot(
                title="Gradient norm",
                x="train/step",
                y=["train/gradient_norm"],
                log_y=True,
                max_runs_to_show=100,
                layout=at(12, 0),
            ),
            *(
                wr.LinePlot(
                    title=f"Validation loss over {axis}",
                    x=f"eval/{axis}",
                    y=["eval/validation_loss"],
                    title_x=axis,
                    title_y="nats per answer token",
                    legend_template=legend,
                    max_runs_to_show=100,
                    layout=at(x, 9),
                )
                for axis, x in (("tokens", 0), ("seconds", 12))
            ),
            wr.LinePlot(title="Tokens per second", x="train/step", y=["train/tokens_per_second"], layout=at(0, 18)),
            wr.LinePlot(title="Memory (GiB)", x="train/step", y=["train/memory_gib"], layout=at(12, 18)),
        ],
        "Cells side by side": [wr.RunComparer(diff_only="split", layout=at(0, 0, 24, 15))],
    }


def build_workspace(*, sweep: str, project: str, metric: str, colors: Mapping[str, str], entity: str = "") -> Any:
    """The workspace: the sweep's cells, coloured by method, in sections that are all open."""
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"left_bench {sweep}",
        sections=[ws.Section(name=name, panels=shown, is_open=True) for name, shown in panels(metric).items()],
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Config("sweep_name") == sweep],
            run_settings={run_id: ws.RunSettings(color=color) for run_id, color in colors.items()},
            pinned_columns=["run:displayName", "summary:status", f"summary:{metric}", "summary:peak_memory_gib"],
        ),
    )


def save_workspace(*, kept: Path, entity: str, project: str, sweep: str, **named: Any) -> str:
    """Save the sweep's workspace and return its address; one that was saved before is changed in place.

    Args:
        kept: a JSON file of addresses by entity, project and sweep; written anew.
    """
    import wandb_workspaces.workspaces as ws

    built = build_workspace(entity=entity, project=project, sweep=sweep, **named)
    key = f"{entity}/{project}/{sweep}"
    addresses: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        addresses = dict(json.loads(kept.read_text(encoding="utf-8")))
    if key in addresses:
        with contextlib.suppress(Exception):  # deleted since, or out of reach: a new one is made
            before = ws.Workspace.from_url(addresses[key])
            before.sections, before.runset_settings = built.sections, built.runset_settings
            built = before
    address = str(built.save().url)
    write_atomically(kept, json.dumps(addresses | {key: address}, indent=1) + "\n")
    return address


def build_report(*, sweep: str, project: str, metric: str, colors: Mapping[str, str], entity: str = "") -> Any:
    """The report: the same panels with a sentence to each, over the same runs."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.P(f"Cells of the sweep {sweep}. Every number is defined in left_bench's docs/metrics.md.")]
    for name, shown in panels(metric).items():
        runset = wr.Runset(
            entity=entity,
            project=project if entity else "",  # with both the app is asked for the project's id
            name=sweep,
            filters=f"Config('sweep_name') = '{sweep}'",
            run_settings={run_id: wr.RunSettings(color=color) for run_id, color in colors.items()},
        )
        blocks += [wr.H2(name), wr.PanelGrid(runsets=[runset], panels=shown)]
    return wr.Report(
        project=project,
        entity=entity,
        title=f"left_bench: {sweep}",
        description="Quality per byte and per second.",
        blocks=blocks,
        width="fluid",
    )


def specification(*, sweep: str, project: str, metric: str, colors: Mapping[str, str]) -> dict[str, Any]:
    """What would be saved, as plain data."""
    named: dict[str, Any] = {"sweep": sweep, "project": project, "metric": metric, "colors": colors}
    built = {"workspace": build_workspace(**named), "report": build_report(**named)}
    return {name: as_saved(item) for name, item in built.items()}


def _cells_of(sweep: str, runs_dir: Path) -> tuple[dict[str, str], list[str]]:
    """Run id -> method, and the metrics that were measured; empty where the records are not here.

    Raises:
        UserError: there are records, and none of this sweep.
    """
    from left_bench.report.load import read_runs, read_sweeps
    from left_bench.tracker.base import Attempt

    if not runs_dir.is_dir():
        return {}, []
    sweeps, _ = read_sweeps(runs_dir)
    result = next((item for item in sweeps if item.name == sweep), None)
    if result is None:
        if not sweeps:
            return {}, []
        names = [item.name for item in sweeps]
        hint = nearest(sweep, names) or f"; there is {', '.join(names)}"
        raise UserError(f"--sweep {sweep}: there is no such sweep in {runs_dir}{hint}")
    runs, _ = read_runs(runs_dir)
    mine = [run for run in runs if run.record.cell_id in result.cells]
    ids = {Attempt.of(run.record, run_dir=run.path.parent).id: run.record.choices.get("peft", "") for run in mine}
    return ids, sorted({name for run in mine for name in run.record.metrics})


def _save(named: dict[str, Any], *, entity: str | None) -> list[str]:
    """Save both and return their addresses.

    Raises:
        UserError: there is no login.
    """
    import wandb

    from left_bench.tracker.kinds.wandb import logged_in

    if os.environ.get("WANDB_MODE") in ("offline", "disabled") or not logged_in():
        raise UserError(
            "dashboard: saving needs a login; run `wandb login` or set WANDB_API_KEY (and leave WANDB_MODE alone), "
            "or write the specification with --out FILE"
        )
    entity = entity or str(wandb.Api().default_entity)
    workspace = build_workspace(entity=entity, **named).save()
    report = build_report(entity=entity, **named).save()
    return [workspace.url, report.url]
