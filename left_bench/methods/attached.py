"""The base of our own methods: a model with a method attached, of which only the trained parameters are saved.

peft's registry of methods is closed (a new one needs an entry in its `PeftType` enumeration), so these are separate,
with the part of `PeftModel`'s interface that the rest of left_bench uses.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from left_bench.core.errors import UserError
from left_bench.spec.task import new_layers_of

WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method's settings; a subclass decides in `prepare` which parameters are trained."""

    mergeable: ClassVar[bool] = True
    """Whether the trained model has the base model's own architecture."""

    def prepare(self, model: PreTrainedModel, *, adapter_dtype: torch.dtype) -> None:
        """Change the frozen base model in place; afterwards the parameters to train require a gradient.

        `adapter_dtype` applies to added weights; base weights that are trained keep their dtype.

        Raises:
            UserError: the method has nothing to train in this model.
        """
        raise NotImplementedError

    def attach(self, model: PreTrainedModel, *, adapter_dtype: torch.dtype = torch.float32) -> Attached:
        """Freeze the base model and attach the method to it, in place."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.prepare(model, adapter_dtype=adapter_dtype)
        for name in new_layers_of(model):  # every method trains them in full
            model.get_submodule(name).requires_grad_(True)
        return Attached(model, self)


class Attached(torch.nn.Module):
    """A base model with a method attached; other attributes are looked up in the base model, as with `PeftModel`."""

    def __init__(self, base_model: PreTrainedModel, method: Method) -> None:
        super().__init__()
        self.base_model = base_model
        self.method = method
        self.train(base_model.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet: looking it up there would recurse forever
                raise
            return getattr(self.base_model, name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.base_model(*arguments, **named)

    def get_base_model(self) -> PreTrainedModel:
        return self.base_model

    def merge_and_unload(self) -> PreTrainedModel:
        """The trained model without this wrapper.

        Raises:
            UserError: the method adds layers that the base model's architecture does not have.
        """
        if not self.method.mergeable:
            raise UserError(f"{type(self.method).__name__}: non-linear adapters cannot be merged into the base weights")
        return self.base_model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trained parameters as safetensors, and the method's settings as JSON."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: parameter.detach().cpu().contiguous() for name, parameter in _trained(self.base_model).items()}
        save_file(trained, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        settings = {"left_bench_method": type(self.method).__name__, **dataclasses.asdict(self.method)}
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def method_in(folder: Path) -> Method | None:
    """The method that `save_pretrained` wrote to a folder; None if something else (peft) wrote it."""
    from left_bench import methods

    path = folder / CONFIG_NAME
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    name = settings.pop("left_bench_method", None)
    return None if name is None else getattr(methods, name)(**settings)


def load_attached(
    model: PreTrainedModel, folder: Path, *, method: Method, adapter_dtype: torch.dtype = torch.float32
) -> Attached:
    """Attach the method to a fresh base model and load the parameters saved in `folder`.

    Raises:
        UserError: the saved parameters do not match those that the method trains in this model.
    """
    attached = method.attach(model, adapter_dtype=adapter_dtype)
    saved, trained = load_file(folder / WEIGHTS_NAME), _trained(model)
    wrong = set(saved.keys() ^ trained.keys())
    wrong |= {name for name in saved.keys() & trained.keys() if saved[name].shape != trained[name].shape}
    if wrong:
        raise UserError(f"{folder}: '{min(wrong)}' does not fit this base model; load the one it was trained on")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    return attached


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
