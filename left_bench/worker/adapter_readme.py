"""The README next to a trained adapter or model: Python code that loads it and prompts it as in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from left_bench.data.rows import filled
from left_bench.methods import method_in
from left_bench.methods.data_init import START_NAME
from left_bench.spec.cell import Cell

README_NAME = "README.md"
_OF_SEVERAL_TASKS = ("peft.PolyConfig", "peft.MultitaskPromptTuningConfig")
_QUESTION = "Your question."


def write_readme(folder: Path, cell: Cell, *, base: str, tokenizer: Any, ends: set[int] | None, card: str = "") -> Path:
    """Write `README.md` into a folder that holds an adapter or a whole model; its code runs in that folder.

    Args:
        base: the base model for `from_pretrained`: a folder or a hub id.
        ends: ids of the tokens that end an answer; None: it generates no answers.
        card: the metadata of a model card, to put at the top.
    """
    text = f"{card}# {cell.model.name}, {cell.peft.name}\n\nTrained by left_bench, cell `{cell.id}`.\n"
    if (folder / START_NAME).is_file():
        text += (
            "\nThis method starts from weights that peft does not save: over the base model, peft alone loads it as "
            f"something else, or not at all. What it learned as plain LoRA: `left-bench export {cell.id} --to adapter "
            "DIR`. The lines below load it here.\n"
        )
    text += f"\nIn this folder:\n\n```python\n{_loading(folder, cell, base=base)}\n```\n"
    if ends is not None:
        asking = _asking(cell, chat=bool(getattr(tokenizer, "chat_template", None)), ends=ends)
        text += f"\nAsk it as it was trained:\n\n```python\n{asking}\n```\n"
    path = folder / README_NAME
    path.write_text(text, encoding="utf-8")
    return path


def _loading(folder: Path, cell: Cell, *, base: str) -> str:
    auto_class, reader = cell.task.auto_class, cell.task.reader
    code = ", trust_remote_code=True" if cell.model.trust_remote_code else ""
    dtype = f'dtype="{cell.precision.weights_dtype}"{code}'
    if (folder / "config.json").is_file():
        return "\n".join(
            [
                f"from transformers import {auto_class}, {reader}",
                "",
                f'model = {auto_class}.from_pretrained(".", {dtype}).eval()',
                f'tokenizer = {reader}.from_pretrained("."{code})',
            ]
        )
    revision = f", revision={cell.model.revision!r}" if cell.model.revision else ""
    imports, arguments = [f"from transformers import {auto_class}, {reader}"], dtype + revision
    if cell.quantization.target is not None:
        module, _, name = cell.quantization.target.rpartition(".")
        imports.append(f"from {module} import {name}")
        settings = ", ".join(f"{key}={value!r}" for key, value in cell.quantization.config.items())
        arguments += f", quantization_config={name}({settings})"
    ours = method_in(folder) is not None or (folder / START_NAME).is_file()
    imports.append("from left_bench.methods.attach import load_trained" if ours else "from peft import PeftModel")
    if ours:
        imports.insert(0, "from pathlib import Path\n")
    # an export includes the tokenizer, a run's folder does not
    own = any(folder.glob("tokenizer*")) or any(folder.glob("preprocessor_config.json"))
    attach = 'load_trained(base, Path("."))' if ours else 'PeftModel.from_pretrained(base, ".")'
    place = '"."' if own else f"{base!r}{revision}"
    return "\n".join(
        [
            *imports,
            "",
            f"base = {auto_class}.from_pretrained({base!r}, {arguments})",
            f"model = {attach}.eval()",
            f"tokenizer = {reader}.from_pretrained({place}{code})",
        ]
    )


def _asking(cell: Cell, *, chat: bool, ends: set[int]) -> str:
    # JSON strings are valid Python, and cannot end the code block
    question, instruction = (json.dumps(text) for text in (filled(cell.data, _QUESTION), cell.data.instruction))
    lines = []
    if cell.task.has_encoder:
        head = f"{instruction} + '\\n' + " if cell.data.instruction else ""
        lines.append(f'inputs = tokenizer({head}{question}, return_tensors="pt")')
    elif chat:
        system = [f'{{"role": "system", "content": {instruction}}}'] if cell.data.instruction else []
        turns = ", ".join([*system, f'{{"role": "user", "content": {question}}}'])
        lines.append(f"messages = [{turns}]")
        lines.append(
            "inputs = tokenizer.apply_chat_template("
            'messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)'
        )
    else:
        head = f"{instruction} + '\\n' + " if cell.data.instruction else ""
        lines.append(f"inputs = tokenizer({head}{question} + '\\n', return_tensors=\"pt\")")
    more = ""
    if cell.peft.target in _OF_SEVERAL_TASKS:
        lines.insert(0, "import torch\n")
        more = ", task_ids=torch.zeros(1, dtype=torch.long)"
    longest = cell.eval.max_new_tokens or cell.data.max_new_tokens
    lines.append('inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}')
    lines.append(
        f"answer = model.generate(**inputs, max_new_tokens={longest}, do_sample=False, "
        f"eos_token_id={sorted(ends)}{more})"
    )
    shown = "answer[0]" if cell.task.has_encoder else 'answer[0, inputs["input_ids"].shape[1]:]'
    lines.append(f"print(tokenizer.decode({shown}, skip_special_tokens=True))")
    return "\n".join(lines)
