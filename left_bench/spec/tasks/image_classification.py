"""A model that predicts an image's class, with a new output layer for the data's classes."""

from left_bench.spec.task import Task

_SEEN = "(seen with peft 0.21.2, bitsandbytes 0.50.2)"
_FOR_TEXT = ("PromptTuning", "PrefixTuning", "PromptEncoder", "Cartridge", "AdaptionPrompt")

TASK = Task(
    auto_class="AutoModelForImageClassification",
    reads="pictures",
    writes=False,
    reader="AutoImageProcessor",
    open_reader="left_bench.pretrained:load_processor",
    load_rows="left_bench.model.rows:picture_rows",
    save_random="left_bench.pretrained.make:save_random_classifier",
    predict="left_bench.evaluation.evaluate:classify",
    probe="left_bench.data.pictures:probe",
    hub_task=("image-classification", "Image Classification"),
    example=("vit_base", "digits"),
    rules=(
        (
            lambda cell: cell.peft.is_one_of(*_FOR_TEXT),
            "this method adds virtual tokens to a text or attends to them, and images have none",
        ),
        (
            lambda cell: cell.peft.is_one_of("IA3", "Lora") and cell.peft.config.get("target_modules") is None,
            "peft has no default target modules for this method in an image model; set peft.config.target_modules "
            f"{_SEEN}",
        ),
    ),
)
