from __future__ import annotations

import sys

import pytest

from left_bench.core.errors import UserError
from left_bench.spec.instantiate import ALLOWED_PACKAGES, instantiate, locate


def test_an_upstream_class():
    config = instantiate("peft.LoraConfig", {"r": 3, "target_modules": "all-linear"}, key="peft")
    assert (type(config).__name__, config.r) == ("LoraConfig", 3)


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "subprocess.run", "peft_evil.X", "numpy.array", "", ".", "LoraConfig", "_io.open"],
)
def test_other_packages_are_refused(target):
    with pytest.raises(
        UserError, match=r"quantization\._target_=.*only configurations and optimizers of " + ALLOWED_PACKAGES[0]
    ):
        locate(target, key="quantization")


@pytest.mark.parametrize(
    "target",
    [
        "peft.os.system",  # a module another module imported
        "torch._C.something",
        "left_bench.launch.supervise.subprocess.run",
        "torch.os.system",
        "transformers.utils.os.remove",
        "left_bench.spec.instantiate.importlib.import_module",
        "torch.hub.load",
        "torch.load",
        "left_bench.launch.supervise.Path",
        "torch.utils.cpp_extension.load_inline",
    ],
)
def test_a_way_out_of_the_allowed_packages_is_refused(target):
    with pytest.raises(UserError, match=r"peft\._target_="):
        locate(target, key="peft")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("peft.LoraConfg", "did you mean 'LoraConfig'"),
        ("peft.nowhere.LoraConfig", "no such class"),
        ("peft.__version__", "private"),
        ("transformers.BitsAndByteConfig", "did you mean 'BitsAndBytesConfig'"),
        ("peft.tuners", "not a class"),
    ],
)
def test_a_wrong_name(target, words):
    with pytest.raises(UserError, match=words):
        locate(target, key="peft")


def test_a_wrong_argument_names_the_nearest():
    with pytest.raises(
        UserError, match=r"peft\.config\.lora_alfa: peft\.LoraConfig has no .*did you mean 'lora_alpha'"
    ):
        instantiate("peft.LoraConfig", {"lora_alfa": 3}, key="peft")
    with pytest.raises(UserError, match=r"peft\.config\.zzzzzz: .*; it takes .*\br\b"):
        instantiate("peft.LoraConfig", {"zzzzzz": 3}, key="peft")


def test_a_keyword_that_an_open_ended_class_would_swallow():
    """BitsAndBytesConfig takes any keyword and drops what it does not know: the model would stay as it is."""
    with pytest.raises(UserError, match=r"quantization\.config\.load_in_4bits.*did you mean 'load_in_4bit'"):
        instantiate("transformers.BitsAndBytesConfig", {"load_in_4bits": True}, key="quantization")


def test_a_value_the_class_refuses_is_the_users_to_mend():
    with pytest.raises(UserError, match=r"peft\.config: peft\.LoraConfig refuses it \(.*layers_to_transform"):
        instantiate("peft.LoraConfig", {"target_modules": "all-linear", "layers_to_transform": 1}, key="peft")


def test_importing_a_target_imports_nothing_else():
    before = set(sys.modules)
    with pytest.raises(UserError):
        locate("antigravity.fly", key="peft")
    assert "antigravity" not in set(sys.modules) - before
