"""What a cell trained, as a folder for other programs: an adapter for peft, a model for transformers or llama.cpp.

A folder is written under another name and put in its place when it is whole and was found to be the trained model.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from left_bench.core.errors import UserError, nearest
from left_bench.pretrained import source
from left_bench.report.export import HUB_ID, card_block
from left_bench.result.trained import Finished, few_rows, find_finished, on_this_machine, quiet_libraries
from left_bench.spec.cell import Cell
from left_bench.spec.redact import redacted
from left_bench.worker.load_trained import load_base, with_adapter

KINDS = ("adapter", "merged", "gguf")
GGUF_NAME = "model.gguf"
_CONVERTER = "convert_hf_to_gguf.py"


class Differs(Exception):
    """What was written is not the model that was trained; the message says by how much."""


class Order(NamedTuple):
    """What `left-bench export CELL --to KIND DIR` was asked for."""

    kind: str
    folder: Path
    force: bool = False
    """Write into a folder that holds something."""
    push: str | None = None
    """A repository of the hub, `owner/name`."""
    llama_cpp: Path | None = None
    """A folder of llama.cpp's source."""
    trust_remote_code: bool = False


def export_model(name: str, order: Order, *, runs_dir: str) -> list[str]:
    """Write the folder, and send it to the hub where that is asked for; what was done, in lines.

    Raises:
        UserError: the cell, the folder or an option cannot be used.
        Differs: a merged model's logits are not the trained model's; nothing was written.
    """
    _check(order)
    finished = find_finished(name, runs_dir, trust_remote_code=order.trust_remote_code)
    _check_kind(finished, order)
    quiet_libraries()
    from left_bench.model import load as models

    cell = on_this_machine(finished.cell)
    base, tokenizer = models.open_pretrained(cell)
    with _made_aside(order) as folder:
        if order.kind == "adapter":
            told = _write_adapter(finished, cell, folder, base=base, tokenizer=tokenizer)
        elif order.kind == "merged":
            told = _write_merged(finished, cell, folder, base=base, tokenizer=tokenizer)
        else:
            merged = folder / "merged"
            told = _write_merged(finished, cell, merged, base=base, tokenizer=tokenizer)
            _convert(merged, folder / GGUF_NAME, order)
            shutil.rmtree(merged)
        _write_card(finished, folder, base=base, tokenizer=tokenizer)
    lines = [f"{order.folder}: {told}"]
    if order.push is not None:
        lines.append(push(order.folder, order.push, cell_id=finished.record.cell_id))
    return lines


# --- what is asked for ---


def _check(order: Order) -> None:
    if order.kind not in KINDS:
        raise UserError(f"--to {order.kind}: no such kind{nearest(order.kind, KINDS)} (one of {', '.join(KINDS)})")
    if order.folder.exists() and not order.folder.is_dir():
        raise UserError(f"--to {order.kind} {order.folder}: is a file; give a folder")
    if not order.force and order.folder.is_dir() and any(order.folder.iterdir()):
        raise UserError(f"--to {order.kind} {order.folder}: is not empty; give another folder, or --force to replace")
    if order.push is not None and not HUB_ID.fullmatch(order.push):
        raise UserError(f"--push {order.push}: no repository of the hub; write it as owner/name")
    if order.kind != "gguf":
        return
    if order.llama_cpp is None:
        raise UserError(
            f"--to gguf {order.folder}: llama.cpp's converter comes with its source and in no package; give its folder "
            f"with --llama-cpp FOLDER, or export --to merged DIR and run `python llama.cpp/{_CONVERTER} DIR --outfile "
            f"{GGUF_NAME}`, then `llama-quantize {GGUF_NAME} small.gguf Q4_K_M` for fewer bits"
        )
    if not (order.llama_cpp / _CONVERTER).is_file():
        raise UserError(
            f"--llama-cpp {order.llama_cpp}: there is no {_CONVERTER}; give the folder of llama.cpp's source"
        )


def _check_kind(finished: Finished, order: Order) -> None:
    cell = finished.cell
    inside = order.folder.resolve().is_relative_to(finished.run_dir.resolve())
    if inside or finished.run_dir.resolve().is_relative_to(order.folder.resolve()):
        raise UserError(f"--to {order.kind} {order.folder}: the run itself lies there; give another folder")
    if order.kind == "adapter" and cell.peft.target is None:
        raise UserError(
            f"{finished.record.cell_id}: full fine-tuning has no adapter, {finished.adapter} is a model; take --to "
            "merged"
        )
    if order.kind == "gguf" and not cell.task.is_decoder:
        raise UserError(f"{finished.record.cell_id}: --to gguf is for decoders, and model.task is {cell.model.task}")
    if order.kind == "adapter" and order.push is not None and source(cell.model) != "hub":
        raise UserError(
            f"--push {order.push}: the base model {cell.model.name_or_path} is not on the hub, and an adapter is of no "
            "use without it; take --to merged"
        )


# --- folders ---


@contextmanager
def _made_aside(order: Order) -> Iterator[Path]:
    """A folder beside the one asked for, put in its place at the end; an error leaves nothing."""
    target = order.folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside:
        made = Path(aside) / target.name
        made.mkdir()
        yield made
        if target.is_dir():
            # weights of an earlier export would be loaded with these; whatever else is there is somebody's
            for stale in [*target.glob("*.safetensors"), *target.glob("*.safetensors.index.json")]:
                stale.unlink()
            for path in made.iterdir():
                path.replace(target / path.name)
        else:
            made.replace(target)


def _write_adapter(finished: Finished, cell: Cell, folder: Path, *, base: str, tokenizer: Any) -> str:
    from left_bench.methods.data_init import START_NAME, save_as_plain_lora

    tokenizer.save_pretrained(folder)
    if not (finished.adapter / START_NAME).is_file():
        for path in finished.adapter.iterdir():
            if path.suffix in (".safetensors", ".json"):
                shutil.copyfile(path, folder / path.name)
        return "adapter"
    rows, _, which = few_rows(cell, tokenizer, folder=base)
    model = with_adapter(load_base(cell, folder=base), cell, finished.adapter)
    logits = _logits(model, rows, cell, tokenizer)
    save_as_plain_lora(model, finished.adapter, load_base(cell, folder=base), folder)
    del model
    gc.collect()
    again = _logits(with_adapter(load_base(cell, folder=base), cell, folder), rows, cell, tokenizer)
    return f"adapter, written as plain LoRA; {_compared(logits, again, cell, which)}"


def _write_merged(finished: Finished, cell: Cell, folder: Path, *, base: str, tokenizer: Any) -> str:
    import transformers

    from left_bench.evaluation import merge_check
    from left_bench.methods import Attached
    from left_bench.model.load import DTYPES, quantized_weights
    from left_bench.model.quantization_error import make_dense

    rows, classes, which = few_rows(cell, tokenizer, folder=base)
    fresh = load_base(cell, folder=base, classes=classes)
    dtype = DTYPES[cell.precision.weights_dtype]
    quantized = bool(quantized_weights(fresh))
    model: Any = with_adapter(fresh, cell, finished.adapter)
    logits = _logits(model, rows, cell, tokenizer)
    if quantized:  # added to a quantized weight, a small change would be rounded away
        del model, fresh
        gc.collect()
        fresh = load_base(cell, folder=base, classes=classes)
        make_dense(fresh, dtype=dtype)
        model = with_adapter(fresh, cell, finished.adapter)
    if isinstance(model, Attached):
        model = model.merge_and_unload()
    elif cell.peft.target is not None:
        if (refusal := merge_check.why_not(model)) is not None:
            raise UserError(f"{finished.record.cell_id}: {refusal.removeprefix('not merged: ')}; take --to adapter")
        try:
            model = merge_check.fold_in(model)
        except (NotImplementedError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"{finished.record.cell_id}: {cell.peft.name} cannot be merged ({type(error).__name__}: {why}); take "
                "--to adapter"
            ) from error
    model.requires_grad_(False)
    if model.can_generate():
        model.generation_config = _generation_config(cell, base, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model, fresh
    gc.collect()
    auto_class = getattr(transformers, cell.task.auto_class)
    loaded = auto_class.from_pretrained(folder, dtype=dtype, trust_remote_code=cell.model.trust_remote_code)
    again = _logits(loaded.to(cell.device_type), rows, cell.without_adapter(), tokenizer)
    what = "model" if cell.peft.target is None else "merged model"
    what += f", its {cell.quantization.name} weights written as {cell.precision.weights_dtype}" if quantized else ""
    return f"{what}; {_compared(logits, again, cell, which)}"


def _write_card(finished: Finished, folder: Path, *, base: str, tokenizer: Any) -> None:
    from left_bench.worker.adapter_readme import README_NAME, write_readme

    cell = finished.cell
    card = card_block(finished.record, whole=not (folder / "adapter_config.json").is_file())
    if (folder / GGUF_NAME).is_file():
        text = f"{card}# {cell.model.name}, {cell.peft.name}\n\nFor llama.cpp: `llama-cli -m {GGUF_NAME}`.\n"
        (folder / README_NAME).write_text(text, encoding="utf-8")
        return
    ends = _ends(cell, base, tokenizer) if cell.task.writes else None
    write_readme(folder, cell, base=base, tokenizer=tokenizer, ends=ends, card=card)


def _ends(cell: Cell, base: str, tokenizer: Any) -> set[int]:
    from left_bench.evaluation.evaluate import end_tokens

    model: Any = SimpleNamespace(generation_config=_of_checkpoint(cell, base))
    return end_tokens(model, tokenizer)


def _of_checkpoint(cell: Cell, base: str) -> Any:
    from transformers import AutoConfig, GenerationConfig

    revision = cell.model.revision if source(cell.model) == "hub" else None
    try:
        return GenerationConfig.from_pretrained(base, revision=revision or "main")
    except OSError:  # a checkpoint need not have the file
        code = cell.model.trust_remote_code
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=code)
        return GenerationConfig.from_model_config(config)


def _generation_config(cell: Cell, base: str, tokenizer: Any) -> Any:
    """The checkpoint's own, with what ends an answer here among its end tokens; greedy where that cannot be saved."""
    from transformers import GenerationConfig

    config = _of_checkpoint(cell, base)
    ends = sorted(_ends(cell, base, tokenizer))
    config.eos_token_id = ends if len(ends) > 1 else ends[0]
    try:
        config.validate(strict=True)
    except ValueError:
        kept = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        return GenerationConfig(do_sample=False, **{name: getattr(config, name, None) for name in kept})
    return config


# --- is it the same model? ---


def _logits(model: Any, rows: Sequence[Any], cell: Cell, tokenizer: Any) -> Any:
    from left_bench.evaluation.evaluate import pad_of
    from left_bench.evaluation.merge_check import answer_logits

    return answer_logits(model, rows, cell, pad_id=pad_of(tokenizer), device=cell.device_type).cpu()


def _compared(trained: Any, written: Any, cell: Cell, which: str) -> str:
    """How far apart the logits are, in words.

    The bound is the square root of the weights' rounding, half of their digits: what sums of rounded products come to
    is well below it, and another model well above.

    Raises:
        Differs: they are further apart than rounding explains.
    """
    import torch

    from left_bench.model.load import DTYPES

    dtype = DTYPES[cell.precision.weights_dtype]
    largest = (written - trained).abs().max().item()
    # of several logits those of one place are told apart by their differences; a single one is a number as it stands
    spread = (trained - trained.mean(-1, keepdim=True)).norm() if trained.shape[-1] > 1 else trained.norm()
    share, bound = ((written - trained).norm() / spread).item(), torch.finfo(dtype).eps ** 0.5
    told = (
        f"on {which} its logits differ from the trained model's by at most {largest:.2g}, and in all by {share:.2g} of "
        "their spread"
    )
    if not share <= bound:  # NaN too
        raise Differs(f"not written: {told}, and rounding in {cell.precision.weights_dtype} explains {bound:.2g}")
    return told


# --- other programs ---


def _convert(merged: Path, target: Path, order: Order) -> None:
    assert order.llama_cpp is not None
    command = [sys.executable, str(order.llama_cpp / _CONVERTER), str(merged), "--outfile", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not target.is_file():
        last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        raise UserError(
            f"--llama-cpp {order.llama_cpp}: its converter failed ({last[:300]}); install what it asks for, or take "
            "--to merged and convert that elsewhere"
        )


def push(folder: Path, repo: str, *, cell_id: str) -> str:
    """Upload a folder to the hub as `repo`, made private where it is new; what was done, in words.

    The token is the hub's own business: it is read from the login or from HF_TOKEN, and never seen here.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id=repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"left_bench: {cell_id}")
    except Exception as error:  # the hub's errors and its transport's share no base class
        why = redacted(" ".join(str(error).split()))[:300] or type(error).__name__
        raise UserError(
            f"--push {repo}: the hub did not take it ({why}); {folder} is whole: log in with `hf auth login`, then "
            "give the same command with --force"
        ) from error
    return f"{repo}: uploaded to the hub, private unless it was there before"
