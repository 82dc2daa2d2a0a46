"""TensorBoard event files: `<store>/tensorboard/<group>/<name>-<run id>`, written without torch or tensorflow."""

from __future__ import annotations

import shutil
import time as clock
from pathlib import Path
from typing import Any

from left_bench.spec.record import Record
from left_bench.tracker.base import (
    SAMPLE_COLUMNS,
    Attempt,
    Comparison,
    TrackerKind,
    curve_copies,
    file_name,
    flat_environment,
    markdown_table,
    numbers_of,
    sample_rows,
)

# five of each are what TensorBoard's HPARAMS opens with
_FIRST_AXES = ("axis.model", "axis.peft", "axis.precision", "axis.quantization", "status")
_HEADLINES = ("eval_loss", "exact_match", "peak_memory_gib", "train_tokens_per_second", "trainable_params")


class TensorboardTracker:
    """A folder a run; one that is there already is removed first."""

    def __init__(self, *, store: Path, folder: str | None) -> None:
        self._folder = Path(folder) if folder else store / "tensorboard"
        self._file: Any = None
        self._writer: Any = None
        self._attempt: Attempt | None = None
        self._last = (0, 0.0)  # step and time of the last event: where the summary is put

    def start(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._open(attempt.group, f"{file_name(attempt.name)}-{attempt.id}")

    def log(self, step: int, *, time: float, **metrics: float) -> None:
        self._last = (step, time)
        self._scalars({f"train/{name}": value for name, value in metrics.items()})

    def log_validation(self, step: int, *, time: float, **metrics: float) -> None:
        self._last = (step, time)
        self._scalars({f"eval/{name}": value for name, value in metrics.items()})
        # a chart of TensorBoard has steps or the clock below it: these have tokens and seconds of training
        for name, value, axis in curve_copies(metrics):
            self._last = (int(metrics[axis]), time)
            self._scalars({f"eval/{name}": value})
        self._last = (step, time)

    def finish(self, record: Record) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        assert self._attempt is not None
        axes = {f"axis.{group}": option for group, option in record.choices.items()} | {"status": record.status}
        self._write(_columns(list(axes)))
        self._write(hparams_pb(axes, trial_id=self._attempt.id))
        # a name of its own for each kind: TensorBoard makes its sections of what is before the slash
        named = {name if "/" in name else f"record/{name}": value for name, value in numbers_of(record).items()}
        self._scalars(named)
        facts = {"status": record.status, "reason": record.reason, **flat_environment(record)}
        self._text("record", markdown_table(["", ""], [[key, value] for key, value in facts.items()]))
        if record.samples:
            self._text("samples", markdown_table(list(SAMPLE_COLUMNS), sample_rows(record)))
        self._close()

    def report(self, comparison: Comparison) -> None:
        self._open(comparison.group, comparison.id)
        self._text("comparison", markdown_table(comparison.columns, comparison.rows))
        self._text("report", comparison.markdown.read_text(encoding="utf-8"))
        for path in comparison.plots:
            self._image(f"plot/{path.stem}", path.read_bytes())
        self._close()

    def _open(self, group: str | None, name: str) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._close()
        folder = self._folder / group / name if group else self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._last = (0, clock.time())
        # tensorboard's own EventFileWriter would put the host's name into the file's
        self._file = (folder / f"events.out.tfevents.{int(self._last[1]):010d}.left_bench").open("wb")
        self._writer = RecordWriter(self._file)
        self._event(file_version="brain.Event:2")

    def _scalars(self, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def _text(self, tag: str, text: str) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._write(text_pb(tag, text))

    def _image(self, tag: str, png: bytes) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # the PNG's header chunk
        image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=4)
        self._write(Summary(value=[Summary.Value(tag=tag, image=image)]))

    def _write(self, summary: Any) -> None:
        self._event(summary=summary)

    def _event(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        step, time = self._last
        self._writer.write(Event(step=step, wall_time=time, **fields).SerializeToString())
        self._file.flush()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = self._writer = None


TRACKER = TrackerKind(
    make=TensorboardTracker, settings={"folder": None}, packages=("tensorboard",), extra="tensorboard"
)


def _columns(axes: list[str]) -> Any:
    """Which columns HPARAMS opens with: left to itself it takes the first of the alphabet."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb

    metrics = [Metric(f"record/{name}", display_name=name) for name in _HEADLINES]
    summary = hparams_config_pb(hparams=[HParam(name) for name in axes], metrics=metrics)
    plugin = summary.value[0].metadata.plugin_data
    told = HParamsPluginData.FromString(plugin.content)
    for axis in told.experiment.hparam_infos:
        axis.differs = axis.name in _FIRST_AXES  # what differs is shown first
    plugin.content = told.SerializeToString()
    return summary
