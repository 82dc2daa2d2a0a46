"""Task: a kind of model to fine-tune, and everything that differs between kinds; all else is one path for all.

A task is one object, `TASK` in a module of `tasks/` (or an entry point of another package). The launching process asks
it too, so what needs torch is named in it, as `module:function`, and imported where it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from left_bench.core.extensions import Registry, named

if TYPE_CHECKING:
    from left_bench.spec.cell import Cell

DEFAULT_TASK = "causal_lm"
REWARD_TASK = "reward_model"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of model. Functions are named `module:function`; each says here what it is called with."""

    auto_class: str
    """The class of `transformers` that loads it."""
    peft_type: str | None = None
    """`peft.TaskType`; None: peft has no word for it and wraps the model as it is."""
    reads: Literal["text", "pictures"] = "text"
    """What a row shows the model."""
    writes: bool = True
    """Whether it answers by writing text; else it names one of the data's classes."""
    has_encoder: bool = False
    """Whether an encoder reads the prompt for a decoder that writes: each is padded on its own."""
    reader: str = "AutoTokenizer"
    """The class of `transformers` that makes inputs of a row."""
    open_reader: str = "left_bench.pretrained:load_tokenizer"
    """(folder, model section) -> the reader."""
    load_rows: str = "left_bench.model.rows:decoder_rows"
    """(cell, reader, folder=) -> `data.Splits`. A row has `length`, `labels`, `prompt`, `reference` and `identity`; one
    that is no `data.Example` has a static `collate(rows, pad_id=)` too, whose batch has what `data.ClassBatch` has: the
    loss needs to know no task."""
    save_random: str = "left_bench.pretrained.make:save_random_writer"
    """(architecture, folder, dtype=, task=): write a model with random weights, and its reader, into the folder."""
    predict: str = "left_bench.evaluation.evaluate:written_answers"
    """(model, reader, rows, cell, device=, shared=, tell=) -> an answer for each row, or None where none is asked for;
    `shared` is what the prompts begin with, where that has been read (`evaluation.shared_prompt`). Metrics
    (`eval.metrics`) score them against the rows' references."""
    probe: str | None = None
    """(model, tokens=) -> arguments of a forward pass over little that means nothing; None: a few tokens."""
    hub_task: tuple[str, str] = ("text-generation", "Text Generation")
    """The hub's task and its name, for model cards."""
    rules: tuple[tuple[Callable[[Cell], bool], str], ...] = ()
    """What does not go together with it, each with the reason; asked of this task's cells alone."""

    @property
    def new_output(self) -> bool:
        """Whether the output layer is made new for the data's classes: the base model knows nothing of them yet, and
        every method trains that layer whole."""
        return not self.writes

    @property
    def is_decoder(self) -> bool:
        """Whether it is a decoder alone, which goes on with a text."""
        return self.writes and not self.has_encoder

    def is_of(self, model: Any) -> bool:
        """Whether a model of `transformers` is of this kind, by its class."""
        return self.auto_class.removeprefix("AutoModel") in type(model).__name__


TASKS: Registry[Task] = Registry("left_bench.spec.tasks", "TASK", group="left_bench.tasks")
"""`model.task` -> what differs."""


def rules() -> Iterator[tuple[Callable[[Cell], bool], str]]:
    """Every task's rules, each refusing cells of that task alone."""
    for task in TASKS.values():
        yield from ((_asked_of(task, refuses), reason) for refuses, reason in task.rules)


def _asked_of(task: Task, refuses: Callable[[Cell], bool]) -> Callable[[Cell], bool]:
    return lambda cell: cell.task is task and refuses(cell)


def new_layers_of(model: Any) -> list[str]:
    """Names of the layers that the data's classes come from, new for every set of them; none for a model that writes.

    They are what stands beside the pretrained body: one linear layer (`classifier`, `score`) or a few.
    """
    import torch

    if not any(task.new_output and task.is_of(model) for task in TASKS.values()):
        return []
    children = {name for name, layer in model.named_children() if any(True for _ in layer.parameters())}
    if model.base_model_prefix in children:
        return sorted(children - {model.base_model_prefix})
    linear = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    fitting = [name for name in linear if model.get_submodule(name).out_features == model.config.num_labels]
    return fitting[-1:]


def is_within(name: str, layers: Iterable[str]) -> bool:
    """Whether a parameter or module is one of the layers, or part of one."""
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


def probe_inputs(model: Any, *, tokens: int = 2) -> dict[str, Any]:
    """Arguments of a forward pass over little that means nothing: to see what a model does, not what it says."""
    import torch

    own = next((task.probe for task in TASKS.values() if task.probe is not None and task.is_of(base_of(model))), None)
    if own is not None:
        inputs: dict[str, Any] = named(own)(model, tokens=tokens)
        return inputs
    ids = torch.ones(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


def base_of(model: Any) -> Any:
    """The model of `transformers` below whatever is attached to it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
