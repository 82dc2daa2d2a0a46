"""Task: a kind of model to fine-tune, and everything that differs between kinds; all other code is shared.

A task is one object, `TASK` in a module of `tasks/` (or an entry point of another package). The launching process uses
it too, so functions that need torch are given as `module:function` and imported only when called.
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
    """A kind of model. Functions are given as `module:function`; each field states the arguments."""

    auto_class: str
    """The `transformers` class that loads it."""
    peft_type: str | None = None
    """`peft.TaskType`; None: peft has no such type and wraps the model unchanged."""
    reads: Literal["text", "pictures"] = "text"
    """What the model reads."""
    writes: bool = True
    """Whether it generates text; otherwise a new output layer gives its answer (one of the data's classes, a number),
    or it `embeds`."""
    embeds: bool = False
    """Whether it answers with vectors by which texts are compared; the base model already produces them."""
    likelihood: bool = True
    """Whether its loss is the negative log-likelihood of the right answer, which has a perplexity."""
    reads_pairs: bool = False
    """Whether a row may be a pair of texts (`data.second_column`)."""
    has_encoder: bool = False
    """Whether an encoder reads the prompt and a decoder writes the answer; each is padded separately."""
    reader: str = "AutoTokenizer"
    """The `transformers` class that turns a row into inputs."""
    open_reader: str = "left_bench.pretrained:load_tokenizer"
    """(folder, model section) -> the reader."""
    load_rows: str = "left_bench.model.rows:decoder_rows"
    """(cell, reader, folder=) -> `data.Splits`. A row has `length`, `labels`, `prompt`, `reference` and `identity`; a
    row that is not a `data.Example` also has a static `collate(rows, pad_id=)`, whose batch has the attributes of
    `data.ClassBatch`, so that the loss is independent of the task."""
    save_random: str = "left_bench.pretrained.make:save_random_writer"
    """(architecture, folder, dtype=, task=): write a model with random weights and its reader into the folder."""
    predict: str = "left_bench.evaluation.evaluate:written_answers"
    """(model, reader, rows, cell, device=, shared=, tell=) -> an answer for each row, or None where none is requested;
    `shared` is the prompts' common prefix if it has been processed (`evaluation.shared_prompt`). Metrics
    (`eval.metrics`) score the answers against the rows' references."""
    probe: str | None = None
    """(model, tokens=) -> arguments of a small forward pass over dummy inputs; None: a few tokens."""
    hub_task: tuple[str, str] = ("text-generation", "Text Generation")
    """The hub's task id and its name, for model cards."""
    rules: tuple[tuple[Callable[[Cell], bool], str], ...] = ()
    """What cannot be combined with it, each with the reason; applied only to cells of this task."""
    example: tuple[str, str] | None = None
    """The options of model and data for which `left-bench list methods` asks the rules; None: it has no column."""

    @property
    def new_output(self) -> bool:
        """Whether a new output layer is created for the data's answers: the base model has not learned them, and every
        method trains this layer in full."""
        return not (self.writes or self.embeds)

    @property
    def is_decoder(self) -> bool:
        """Whether it is a decoder-only model."""
        return self.writes and not self.has_encoder

    def is_of(self, model: Any) -> bool:
        """Whether a `transformers` model is of this kind, judged by its class."""
        kind, name = self.auto_class.removeprefix("AutoModel"), type(model).__name__
        return kind in name if kind else name.endswith("Model")


TASKS: Registry[Task] = Registry("left_bench.spec.tasks", "TASK", group="left_bench.tasks")
"""`model.task` -> its task object."""


def rules() -> Iterator[tuple[Callable[[Cell], bool], str]]:
    """Every task's rules, each of which refuses only cells of that task."""
    for task in TASKS.values():
        yield from ((_only_for(task, refuses), reason) for refuses, reason in task.rules)


def _only_for(task: Task, refuses: Callable[[Cell], bool]) -> Callable[[Cell], bool]:
    return lambda cell: cell.task is task and refuses(cell)


def new_layers_of(model: Any) -> list[str]:
    """Names of the new layers that predict the data's classes; none for a model that generates text.

    They are the layers next to the pretrained body: one linear layer (`classifier`, `score`) or a few.
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
    """Arguments of a small forward pass over dummy inputs, to test how a model behaves."""
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
    """The `transformers` model without whatever is attached to it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
