"""Creates objects from `_target_` names in YAML: only from the packages listed here, with arguments checked first."""

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
"""The packages whose classes a configuration may name, in addition to installed extensions of left_bench. Other classes
of these libraries start processes, unpickle files or fetch code when they are created."""
_ONLY_CONFIGS = ("left_bench.", "peft.", "transformers.", "torchao.")
"""From these packages, only configuration classes (names that end in `Config`); the others contain optimizers."""


def instantiate(target: str, arguments: dict[str, Any], *, key: str) -> Any:
    """Call the class that `target` names with keyword arguments.

    Raises:
        UserError: the package is not allowed, the name does not exist, or an argument is unknown or refused; `key` is
        the configuration group to name in the message.
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
        if not _keeps(made, name):  # some classes accept any keyword and drop unknown ones
            hint = nearest(name, parameters) or f"; it takes {', '.join(parameters)}"
            raise UserError(f"{key}.config.{name}: {target} has no such argument{hint}")
    return made


def _nested(value: Any, *, key: str) -> Any:
    """An argument that is itself a class (`{_target_: ..., argument: ...}`) is created first."""
    if not isinstance(value, dict) or "_target_" not in value:
        return value
    return instantiate(value["_target_"], {name: item for name, item in value.items() if name != "_target_"}, key=key)


def _keeps(made: Any, name: str) -> bool:
    attributes = vars(made) if hasattr(made, "__dict__") else {}
    return name in attributes or any(isinstance(value, dict) and name in value for value in attributes.values())


def check_targets(section: Any, *, key: str) -> None:
    """Refuse a `_target_` anywhere in a section that names no allowed package, without importing anything.

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
    # `locate` handles a misspelled ending and suggests the nearest name
    if not _allowed(target) or (_allows_only_configs(target) and "Conf" not in target.rpartition(".")[2]):
        raise _refused(target, key=key)


def _allowed(target: str) -> bool:
    return any(target.startswith(f"{package}.") for package in (*ALLOWED_PACKAGES, *extension_packages()))


def _allows_only_configs(target: str) -> bool:
    others = tuple(f"{package}." for package in extension_packages())
    return target.startswith((*_ONLY_CONFIGS, *others))


def _refused(target: str, *, key: str) -> UserError:
    return UserError(
        f"{key}._target_={target[:200]!r}: only configurations and optimizers of {', '.join(ALLOWED_PACKAGES)} "
        "may be named"
    )


def takes_argument(target: str, name: str, *, key: str = "peft") -> bool:
    """Whether the class that `target` names has this argument."""
    try:
        return name in inspect.signature(locate(target, key=key)).parameters
    except ValueError:  # a built-in without a signature
        return False


def locate(target: str, *, key: str) -> Any:
    """The object behind a dotted name, from allowed packages only."""
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
    own = f"{result.__module__}.{result.__name__}"  # the module may have imported it from elsewhere
    if not _allowed(own) or (_allows_only_configs(own) and not own.endswith("Config")):
        raise _refused(target, key=key)
    return result
