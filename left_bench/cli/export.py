"""`left-bench export`: a cell's model as a folder (`result.export_model`), its scores as a model card's metadata, or
records as a table for other tools (`report.export`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from left_bench.core.errors import UserError
from left_bench.core.files import write_atomically
from left_bench.report.export import FORMATS, check_format, csv_text, model_card, only_run, write_parquet
from left_bench.report.frame import choose, frame_of
from left_bench.report.load import find_runs


def main(argv: list[str]) -> int:
    """`left-bench export CELL`: print or write it; 1 when a merged model is not the trained one, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="left-bench export",
        allow_abbrev=False,
        description="What a cell trained, as a folder for peft, transformers or llama.cpp (--to); or its scores as the "
        "`model-index` block of a Hugging Face model card, or records as CSV or Parquet (--format).",
    )
    parser.add_argument("cell", metavar="CELL", help="a cell's folder, its id, or how that begins; a record; or RUNS")
    parser.add_argument(
        "--runs", default="runs", metavar="DIR", help="where a cell id is looked up (default: %(default)s)"
    )
    model = parser.add_argument_group("a model")
    model.add_argument(
        "--to",
        nargs=2,
        metavar=("KIND", "DIR"),
        help="write a folder: adapter (peft loads it), merged (transformers loads it) or gguf (llama.cpp loads it)",
    )
    model.add_argument("--force", action="store_true", help="write into a folder that holds something")
    model.add_argument("--push", metavar="REPO", help="upload the folder to the hub, as owner/name")
    model.add_argument("--llama-cpp", metavar="FOLDER", help="llama.cpp's source, whose converter writes GGUF")
    model.add_argument("--trust-remote-code", action="store_true", help="run the code that a model's author ships")
    records = parser.add_argument_group("records")
    records.add_argument("--format", help=f"one of {', '.join(FORMATS)} (default: {FORMATS[0]})")
    records.add_argument("--where", metavar="CONDITION", help="of several records, those that fulfil it")
    records.add_argument("--out", metavar="FILE", help="write there (default: standard output; Parquet needs it)")
    options = parser.parse_args(argv)
    try:
        return _model(options) if options.to is not None else _records(options)
    except UserError as error:
        print(f"left-bench export: {error}", file=sys.stderr)
        return 2


def _model(options: argparse.Namespace) -> int:
    from left_bench.result.export_model import Differs, Order, export_model

    for key in ("format", "where", "out"):
        if getattr(options, key) is not None:
            raise UserError(f"--{key}: --to writes a model's folder, and --{key} is of records; leave one of them out")
    kind, folder = options.to
    order = Order(
        kind,
        Path(folder),
        force=options.force,
        push=options.push,
        llama_cpp=None if options.llama_cpp is None else Path(options.llama_cpp),
        trust_remote_code=options.trust_remote_code,
    )
    try:
        for line in export_model(options.cell, order, runs_dir=options.runs):
            print(line)
    except Differs as error:
        print(f"left-bench export: {error}", file=sys.stderr)
        return 1
    return 0


def _records(options: argparse.Namespace) -> int:
    for key in ("force", "push", "llama_cpp", "trust_remote_code"):
        if getattr(options, key):
            raise UserError(f"--{key.replace('_', '-')}: it is of a model's folder; name that with --to KIND DIR")
    name = options.format or FORMATS[0]
    check_format(name, options.out)
    runs, problems = find_runs(options.cell, options.runs)
    for problem in problems:
        print(f"left-bench export: left out, not readable: {problem}", file=sys.stderr)
    runs = choose(runs, options.where) if options.where else runs
    if name == "parquet":
        write_parquet(frame_of(runs), Path(options.out))
        return 0
    text = model_card(only_run(runs, options.cell)) if name == "model-card" else csv_text(frame_of(runs))
    if options.out is None:
        sys.stdout.write(text)
    else:
        write_atomically(Path(options.out), text)
    return 0
