"""`_target_` names in YAML become objects: only from the packages listed here, with keys checked before the call."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any

from left_bench.core.errors import UserError, nearest
from left_bench.core.extensions import extension_packages

ALLOWED_PACKAGES = (
    *("left_bench.methods", "left_bench.fivebit", "left_bench.hqq", "peft", "transformers", "torchao"),
    *("torch.optim", "bitsandbytes.optim", "galore_torch", "apollo_torch"),
)
"""The one place that says whose classes a configuration may name, beside packages that were installed as extensions of
left_bench. Other classes of these libraries start processes, unpickle files or fetch code when they are made."""
_SETTINGS_ALONE = ("left_bench.", "peft.", "transformers.", "torchao.")
"""Of these packages only classes that hold settings: those whose name ends in `Config`; the others hold optimizers."""


def instantiate(target: str, arguments: dict[str, Any], *, key: str) -> Any:
    """Call the class that `target` names with keyword arguments.

    Raises:
        UserError: the package is not allowed, the name does not exist, or an argument is not one of the callee's or is
            refused by it; `key` is the configuration group to name.
    """
    callee = locate(target, key=key)
    arguments = {name: _nested(value, key=f"{key}.config.{name}") for name, value in arguments.items()}
    try:
        parameters = dict(inspect.signature(callee).parameters)
    except ValueError:  # built-ins without a signature: let the call itself decide
        parameters = {}
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [name for name in arguments if parameters and name not in parameters]
    try:
        made = callee(**arguments) if open_ended or not unknown else None
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}.config: {target} refuses it ({' '.join(str(error).split())[:300]})") from error
    for name in unknown:
        if not _keeps(made, name):  # some classes take any keyword and drop what they do not know
            hint = nearest(name, parameters) or f"; it takes {', '.join(parameters)}"
            raise UserError(f"{key}.config.{name}: {target} has no such argument{hint}")
    return made


def _nested(value: Any, *, key: str) -> Any:
    """An argument that names a class of its own (`{_target_: ..., argument: ...}`) is made first."""
    if not isinstance(value, dict) or "_target_" not in value:
        return value
    return instantiate(value["_target_"], {name: item for name, item in value.items() if name != "_target_"}, key=key)


def _keeps(made: Any, name: str) -> bool:
    kept = vars(made) if hasattr(made, "__dict__") else {}
    return name in kept or any(isinstance(value, dict) and name in value for value in kept.values())


def check_targets(section: Any, *, key: str) -> None:
    """Refuse a `_target_` anywhere in a section that names no allowed package; nothing is imported for it.

    Raises:
        UserError: naming the key and the packages that are allowed.
    """
    if isinstance(section, dict):
        for name, value in section.items():
            if name == "_target_" and isinstance(value, str):
                _check_package(value, key=key)
            check_targets(value, key=f"{key}.{name}")
    elif isinstance(section, list):
        for value in section:
            check_targets(value, key=key)


def _check_package(target: str, *, key: str) -> None:
    # a slip in the ending is answered by `locate`, with the nearest name
    if not _allowed(target) or (_holds_settings_alone(target) and "Conf" not in target.rpartition(".")[2]):
        raise _refused(target, key=key)


def _allowed(target: str) -> bool:
    return any(target.startswith(f"{package}.") for package in (*ALLOWED_PACKAGES, *extension_packages()))


def _holds_settings_alone(target: str) -> bool:
    others = tuple(f"{package}." for package in extension_packages())
    return target.startswith((*_SETTINGS_ALONE, *others))


def _refused(target: str, *, key: str) -> UserError:
    return UserError(
        f"{key}._target_={target[:200]!r}: only configurations and optimizers of {', '.join(ALLOWED_PACKAGES)} "
        "may be named"
    )


def takes_argument(target: str, name: str, *, key: str = "peft") -> bool:
    """Whether the class that `target` names has such an argument."""
    try:
        return name in inspect.signature(locate(target, key=key)).parameters
    except ValueError:  # a built-in without a signature
        return False


def locate(target: str, *, key: str) -> Any:
    """The object behind a dotted name, from an allowed package alone."""
    package, _, _ = target.partition(".")
    if not _allowed(target):
        raise _refused(target, key=key)
    module_name, _, name = target.rpartition(".")
    if any(part.startswith("_") for part in target.split(".")):
        raise UserError(f"{key}._target_={target!r}: private names may not be named")
    try:
        module = importlib.import_module(module_name)
        result = getattr(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{key}._target_={target!r}: install the package {package}") from error
        hint = nearest(name, dir(importlib.import_module(package)))
        raise UserError(f"{key}._target_={target!r}: no such class{hint}") from error
    if not inspect.isclass(result):
        raise UserError(f"{key}._target_={target!r}: not a class")
    own = f"{result.__module__}.{result.__name__}"  # it may be an import of theirs
    if not _allowed(own) or (_holds_settings_alone(own) and not own.endswith("Config")):
        raise _refused(target, key=key)
    return result
