"""Images and their classes: reading, splitting, and preprocessing with the model's own image processor."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from left_bench.core.errors import UserError, nearest
from left_bench.data.batches import ClassBatch
from left_bench.data.lazy import LazyRows
from left_bench.data.rows import brings_split, validation_rows_wanted
from left_bench.data.tokens import Splits
from left_bench.spec.cell import Data

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """One preprocessed image with its class."""

    not_packed: ClassVar[str] = "images all have the same length"
    pixels: np.ndarray
    """float32 (channels, height, width)."""
    label: int
    prompt: str
    """A name for the image: `picture` and its index in the source."""
    reference: str
    """The right class, by name."""
    patches: int
    """Number of patches the model divides the image into; they count as tokens."""

    @property
    def length(self) -> int:
        return self.patches

    @property
    def labels(self) -> int:
        """One class carries loss."""
        return 1

    @property
    def identity(self) -> list[Any]:
        """The values that distinguish this image from others: its pixels and its class."""
        return [hashlib.sha256(self.pixels.tobytes()).hexdigest(), self.reference]

    @staticmethod
    def collate(pictures: Sequence[Picture], *, pad_id: int) -> ClassBatch:
        """One batch of images of the same size; nothing is padded."""
        import numpy as np
        import torch

        return ClassBatch(
            arguments={"pixel_values": torch.from_numpy(np.stack([picture.pixels for picture in pictures]))},
            targets=torch.tensor([picture.label for picture in pictures]),
            tokens=sum(picture.length for picture in pictures),
        )


class Pictures(LazyRows[Picture]):
    """Images that are preprocessed on access, so that a large data set is never fully in memory."""

    def __init__(self, source: Any, indices: Sequence[int], *, read: Callable[[Any, int], Picture]) -> None:
        self._source, self._indices, self._read = source, indices, read

    def __len__(self) -> int:
        return len(self._indices)

    def row(self, index: int) -> Picture:
        return self._read(self._source[self._indices[index]], self._indices[index])


def load_pictures(section: Data, processor: Any, *, patches: int) -> Splits:
    """Training, validation and test images, shuffled by `data.seed`. The test images do not depend on the numbers of
    the others.

    Args:
        processor: the model's image processor of `transformers`.
        patches: number of patches per image.

    Raises:
        UserError: a source, column or count that cannot be used; the message names the key and the fix.
    """
    source, names, own = _source(section)
    order = list(range(len(source)))
    random.Random(section.seed).shuffle(order)
    where = _name_of(section)
    if len(order) < section.test_rows + 1:
        raise UserError(
            f"data.test_rows={section.test_rows}: {where} has {len(order)} images, and one must be left to train on; "
            f"set data.test_rows={max(1, len(order) - 1)} or lower"
        )
    test, train = order[: section.test_rows], order[section.test_rows :]
    if section.train_rows is not None and section.train_rows > len(train):
        raise UserError(
            f"data.train_rows={section.train_rows}: {where} leaves only {len(train)} training images besides "
            f"{section.test_rows} test images; set data.train_rows={len(train)} or lower, or null for all"
        )
    train, validation = _for_validation(section, train, where, apart=own is not None)
    if own is not None:
        order = list(range(len(own)))
        random.Random(section.seed).shuffle(order)
        validation = order[: validation_rows_wanted(section)]
    if not section.hold_out:
        train, test = [*train, *test], []
    column, label_column = str(section.image_column), section.answer_column

    def read(row: Any, index: int) -> Picture:
        image: Image = row[column]
        pixels = processor([image.convert("RGB")], return_tensors="np")["pixel_values"][0]
        label = int(row[label_column])
        return Picture(pixels=pixels, label=label, prompt=f"picture {index}", reference=names[label], patches=patches)

    return Splits(
        train=Pictures(source, train, read=read),
        test=Pictures(source, test, read=read),
        validation=Pictures(source if own is None else own, validation, read=read),
        truncated_rows=0,
        fingerprint=_fingerprint(source, [*train, *test], label_column, section),
        classes=names,
    )


def probe(model: Any, *, tokens: int) -> dict[str, Any]:
    """Arguments of a forward pass over one black image of the model's input size."""
    import torch

    size, first = model.config.image_size, next(model.parameters())
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.zeros(1, model.config.num_channels, height, width, device=first.device)}


def _for_validation(section: Data, train: list[int], where: str, *, apart: bool) -> tuple[list[int], list[int]]:
    """Split the training images into those to train on and those for validation, as `data.validation_rows` says;
    `apart`: validation images come from a split of their own."""
    used = len(train) if section.train_rows is None else section.train_rows
    if apart:
        return train[:used], []
    wanted = validation_rows_wanted(section)
    held_out = train[used : used + wanted]
    if section.validation_rows is None or len(held_out) == wanted:
        return train[:used], held_out
    if section.train_rows is not None or wanted >= len(train):
        most = len(train) - (section.train_rows or 1)
        raise UserError(
            f"data.validation_rows={wanted}: {where} leaves only {most} images besides those for training and test;"
            f" set data.validation_rows={most} or lower"
        )
    return train[:-wanted], train[-wanted:]


def _source(section: Data) -> tuple[Any, list[str], Any]:
    """Rows with an image and a class number; the class names; the rows of the split `validation`, or None."""
    if section.validation_path is not None:
        raise UserError(
            f"data.validation_path={section.validation_path}: images are not read from a file; a split"
            " `validation` is used if there is one; otherwise set data.validation_rows=NUMBER"
        )
    if section.source == "scikit_learn":
        return *_digits(section), None
    import datasets

    where = _name_of(section)
    if section.path is None and section.source == "folder":
        raise UserError("data.path is missing; set data.path=DIR to a folder with a subfolder of images for each class")
    if section.path is not None:
        folder = Path(section.path).expanduser()
        if not folder.is_dir():
            raise UserError(f"data.path={section.path}: no such folder; give one with a subfolder of images per class")
        options: dict[str, Any] = {"path": "imagefolder", "data_dir": str(folder)}
        columns = {"image": section.image_column, "label": section.answer_column}
    else:
        options, columns = {"path": section.hub_id}, {}
    dataset: Any
    own: Any = None
    try:
        dataset = datasets.load_dataset(**options, **{"split": "train", **section.config})
        if validation_rows_wanted(section) and brings_split(dataset, section, "validation"):
            own = datasets.load_dataset(**options, **section.config | {"split": "validation"})
    except Exception as error:  # errors of the hub and of local folders share no base class
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{where}: cannot be loaded ({reason}); check it, or point data.path= at a folder of images"
        ) from error
    others = {old: new for old, new in columns.items() if old != new and old in dataset.column_names}
    dataset, own = (None if rows is None else rows.rename_columns(others) for rows in (dataset, own))
    for key, column in (("data.image_column", section.image_column), ("data.answer_column", section.answer_column)):
        if column not in dataset.column_names:
            hint = nearest(str(column), dataset.column_names)
            raise UserError(
                f"{key}={column!r}: {where} has no such column{hint}; it has {', '.join(dataset.column_names)}"
            )
    feature = dataset.features[section.answer_column]
    if not isinstance(feature, datasets.ClassLabel):
        raise UserError(
            f"data.answer_column={section.answer_column!r}: {where} has no classes in it; name the column that does"
        )
    return dataset, list(feature.names), own


@functools.cache
def _digit_images() -> Any:
    from sklearn.datasets import load_digits

    return load_digits()


def _digits(section: Data) -> tuple[Any, list[str]]:
    if section.task != "digits":
        raise UserError(
            f"data.task={section.task!r}: of scikit-learn's images, only digits are supported; set data.task=digits"
        )
    from PIL import Image

    result = _digit_images()
    pictures = [Image.fromarray((image * (255 / 16)).astype("uint8")) for image in result.images]
    rows = [
        {str(section.image_column): picture, section.answer_column: int(label)}
        for picture, label in zip(pictures, result.target, strict=True)
    ]
    return rows, [str(name) for name in result.target_names]


def _name_of(section: Data) -> str:
    if section.source == "scikit_learn":
        return f"data.task={section.task}"
    return f"data.hub_id={section.hub_id}" if section.path is None else f"data.path={section.path}"


def _fingerprint(source: Any, indices: Sequence[int], label_column: str, section: Data) -> str:
    """Hash of which images are used in which order, from their classes and the source's own fingerprint; no image is
    decoded."""
    labels = source[label_column] if hasattr(source, "features") else [row[label_column] for row in source]
    parts = [getattr(source, "_fingerprint", section.task), [(index, int(labels[index])) for index in indices]]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]
