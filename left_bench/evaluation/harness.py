"""Tasks of EleutherAI's lm-evaluation-harness (package `lm-eval`), run on the model in the worker (`eval.tasks`).

A task's name or file is checked before anything runs, and its rows are loaded before the model, so that an unavailable
data set costs no training.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_bench.compat.lm_eval import weights_left_tied
from left_bench.core.errors import UserError, nearest
from left_bench.core.paths import file_sha256, is_installed
from left_bench.spec.cell import Cell, fingerprint, is_task_file
from left_bench.spec.record import TASK_PREFIX, Score

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PACKAGE = "lm-eval"
_BATCH_SIZE = 8  # rows; the harness keeps the logits of all their tokens in memory, twice
_RESAMPLES = 1000  # of the bootstrap, for standard errors without a formula
_FEWSHOT_SEED = 1234  # the harness's own
_TASK = re.compile(rb"^[\"']?task[\"']?[ \t]*:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*(?:#.*)?\r?$", re.MULTILINE)
_GROUP = re.compile(rb"^[\"']?(?:group|tag)[\"']?[ \t]*:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*(?:#.*)?\r?$", re.MULTILINE)


def with_content(cell: Cell, folders: Sequence[Path]) -> Cell:
    """The cell with its task files' paths and fingerprint; checks that every task exists.

    Args:
        folders: of options (`--config-dir`), where files are looked for if they are not in the working directory.

    Raises:
        UserError: the package is missing, a task does not exist, a file is not a task, or the model generates no text.
    """
    tasks = cell.eval.tasks
    if not tasks:
        return cell
    if not cell.task.writes:
        raise UserError(f"eval.tasks={_list(tasks)}: they need a model that generates text, not a classifier")
    if not is_installed("lm_eval"):
        raise UserError(
            f"eval.tasks={_list(tasks)}: lm-evaluation-harness is not installed; pip install 'left-bench[lm-eval]'"
        )
    result, contents = [], []
    for task in tasks:
        if not is_task_file(task):
            _check_name(task)
            result.append(task)
            continue
        named = Path(task).expanduser()
        path = next((path for path in (named, *(folder / named for folder in folders)) if path.is_file()), None)
        if path is None:
            others = [item.name for item in named.parent.glob("*.y*ml")] if named.parent.is_dir() else []
            raise UserError(f"eval.tasks: there is no file {task}{nearest(named.name, others) or '; check the path'}")
        contents.append(_content(path))
        result.append(str(path))
    changed = {"tasks": result, "tasks_content": fingerprint(contents) if contents else None}
    return cell.model_copy(update={"eval": cell.eval.model_copy(update=changed)})


def _list(tasks: Sequence[str]) -> str:
    return f"[{','.join(tasks)}]"


def _check_name(task: str) -> None:
    tasks, groups = _names()
    if task in tasks or task in groups or not tasks:
        return
    # it may be a tag in a list, or in a template that tasks include (a file whose name ends in `_yaml`)
    word = re.compile(rb"(?<![\w-])" + re.escape(task.encode()) + rb"(?![\w-])")
    if not any(word.search(path.read_bytes()) for path in _files("*yaml")):
        hint = nearest(task, (*tasks, *groups))
        hint = hint or "; `lm-eval ls tasks` lists them, and your own task files end in .yaml"
        raise UserError(f"eval.tasks: lm-evaluation-harness has no task {task!r}{hint}")


def _files(pattern: str = "*.yaml") -> list[Path]:
    spec = importlib.util.find_spec("lm_eval")
    folders = spec.submodule_search_locations if spec is not None else None
    return sorted(path for folder in folders or () for path in (Path(folder) / "tasks").rglob(pattern))


@functools.cache
def _names() -> tuple[dict[str, list[Path]], set[str]]:
    """The harness's tasks with the files that define them; groups and tags.

    Found by searching the files' lines: the harness's own index parses all 14,000 files, which takes over ten seconds.
    """
    tasks: dict[str, list[Path]] = {}
    groups: set[str] = set()
    for path in _files():
        text = path.read_bytes()
        for name in _TASK.findall(text):
            tasks.setdefault(name.decode(), []).append(path)
        groups |= {name.decode() for name in _GROUP.findall(text)}
    return tasks, groups


def _folder_of(task: str) -> Path | None:
    """The folder of a task's file in the harness; None for groups and tags, whose members may be anywhere."""
    tasks, groups = _names()
    files = tasks.get(task, [])
    return files[0].parent if len(files) == 1 and task not in groups else None


def _content(path: Path) -> str:
    """A fingerprint of a task's file and of the files it refers to: templates, rows, functions."""
    read: dict[Path, str] = {}
    _read(path, read)
    return fingerprint(sorted((item.name, sha256) for item, sha256 in read.items()))


def _read(path: Path, read: dict[Path, str]) -> None:
    import yaml

    if path.resolve() in read:
        return
    read[path.resolve()] = file_sha256(path)
    if path.suffix not in (".yaml", ".yml"):
        return
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"eval.tasks: {path}{line} is not valid YAML ({getattr(error, 'problem', error)})") from error
    keys = {key.value for key, _ in node.value} if isinstance(node, yaml.MappingNode) else set()
    if len(read) == 1 and not keys & {"task", "group"}:
        raise UserError(f"eval.tasks: {path} defines no task; it needs a line `task: NAME`, like the harness's own")
    for named in _files_named(node, path.parent):
        _read(named, read)


def _group_in(path: Path) -> str | None:
    """The name of the group that a file defines; None if it defines a task."""
    import yaml

    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    result = {key.value: value.value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}
    return str(result["group"]) if "group" in result else None


def _files_named(node: Any, folder: Path) -> Iterator[Path]:
    """Files that a YAML node's texts refer to, relative to its own file or to the working directory."""
    if isinstance(node.value, list):
        for inner in node.value:
            for item in inner if isinstance(inner, tuple) else (inner,):
                yield from _files_named(item, folder)
    elif isinstance(node.value, str) and 0 < len(node.value) < 300 and "\n" not in node.value:
        function = node.tag == "!function"  # `!function utils.score` is in utils.py
        name = f"{node.value.rpartition('.')[0]}.py" if function else node.value
        for base in (folder,) if function else (folder, Path()):
            try:
                if (base / name).is_file():
                    yield base / name
                    return
            except (OSError, ValueError):  # a text that cannot be a file name
                return


def load_tasks(cell: Cell) -> dict[str, Any] | None:
    """The cell's tasks with their rows; None if it has none, or has random weights, which are not scored.

    Raises:
        UserError: a task cannot be loaded; includes the harness's own message.
    """
    if not cell.eval.tasks or cell.model.weights == "random":
        return None
    from lm_eval.tasks import TaskManager

    for module in ("lm_eval.evaluator", "lm_eval.models.huggingface"):
        importlib.import_module(module)  # now, because later imports would count as a phase's memory

    files = [Path(task) for task in cell.eval.tasks if is_task_file(task)]
    groups = {str(path): name for path in files if (name := _group_in(path)) is not None}
    tasks = [groups.get(task, task) for task in cell.eval.tasks]  # a group's file is loaded by its name
    folders = {_folder_of(task) for task in cell.eval.tasks if not is_task_file(task)}
    try:
        if groups or None in folders:  # needs the whole index, over ten seconds
            loaded: Any = TaskManager(include_path=sorted({str(path.parent) for path in files})).load(tasks)
        else:
            loaded = TaskManager(include_path=sorted(map(str, folders)), include_defaults=False).load(tasks)
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"eval.tasks={_list(cell.eval.tasks)}: cannot be loaded ({type(error).__name__}: {reason}); a task's data "
            "come from the hub unless its file names local files"
        ) from error
    for task in loaded["tasks"].values():
        shots = cell.eval.task_shots
        own_shots = task.get_config("num_fewshot")
        if own_shots is None or (shots is not None and own_shots != 0):  # as in the harness: a task's own 0 is kept
            task.set_config(key="num_fewshot", value=shots or 0)
    result: dict[str, Any] = loaded
    return result


def ask(
    tasks: dict[str, Any],
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
    *,
    device: str,
    room: int | None,
    tell: Callable[[str, int, int], None],
) -> list[Score]:
    """A model's scores on loaded tasks, with the harness's standard errors.

    Args:
        room: maximum number of tokens of prompt and answer; None: from the model's configuration.
    """
    import torch
    from lm_eval import evaluator

    from left_bench.model.load import autocast

    model.eval()
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # the bootstrap would fork a process that contains a model
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    try:
        with torch.no_grad(), autocast(cell, device=device), torch.random.fork_rng(devices=devices):
            for task in tasks["tasks"].values():
                task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # the same examples for every model
            results: Any = evaluator.evaluate(
                lm=_with_progress(model, tokenizer, cell, room=room, tell=tell),
                task_dict=tasks,
                limit=cell.eval.task_rows,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
                apply_chat_template=cell.eval.task_chat_template,
                fewshot_as_multiturn=cell.eval.task_chat_template,
            )
    finally:
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before
    return list(_scores(results, tasks))


def _with_progress(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
    *,
    room: int | None,
    tell: Callable[[str, int, int], None],
) -> Any:
    """The model wrapped for the harness, with progress reports."""
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):
        _done = _total = 0

        def _begin(self, requests: Sequence[Any]) -> None:
            self._done, self._total = 0, len(requests)
            tell("tasks", 0, self._total)

        def _go_on(self, rows: int) -> None:
            self._done = min(self._done + rows, self._total)
            tell("tasks", self._done, self._total)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._begin(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._begin(requests)
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._begin(requests)
            return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            result = super()._model_call(inps, *args, **kwargs)
            self._go_on(len(inps))
            return result

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            result = super()._model_generate(context, *args, **kwargs)
            self._go_on(len(context))
            return result

    with weights_left_tied(model):
        return Watched(
            pretrained=model,
            backend="seq2seq" if cell.task.has_encoder else "causal",
            tokenizer=copy.deepcopy(tokenizer),  # HFLM changes its padding
            batch_size=cell.eval.task_batch_size or min(_BATCH_SIZE, cell.eval.batch_size),
            max_length=room,
        )


def _scores(results: dict[str, Any], tasks: dict[str, Any]) -> Iterator[Score]:
    """The requested scores: a group's own scores, without those of its members."""
    members = {child for children in tasks.get("group_map", {}).values() for child in children}
    rows = {name: counts["effective"] for name, counts in results["n-samples"].items()}
    for name, group in tasks.get("groups", {}).items():
        rows[name] = sum(rows.get(task.task_name, 0) for task in group.get_all_tasks())
    for name in dict.fromkeys([*tasks.get("groups", {}), *tasks["tasks"]]):
        measured = results["results"].get(name, {}) | results.get("groups", {}).get(name, {})
        for key, value in measured.items() if name not in members else ():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = measured.get(f"{metric}_stderr,{kind}")
            named = "_".join([name, metric, *([] if kind == "none" else [kind])])
            yield Score(
                task=name,
                metric=TASK_PREFIX + re.sub(r"\W+", "_", named, flags=re.ASCII),
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                n=rows[name],
            )
