"""Images of a task: standard normal pixels, or files that a library decodes.

Shapes: C channels, S pixels of a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpsgd_track.config import require
from dpsgd_track.training.labelled_images import LabelledImages
from dpsgd_track.training.sample import PIXELS, TOKENS, Sample, generator, row_at

DEFAULT_SIZE, DEFAULT_CHANNELS = 224, 3


@dataclass(frozen=True, kw_only=True)
class SyntheticImages:
    """Standard normal pixels and random classes."""

    seed: int
    num_channels: int
    size: int
    num_labels: int
    num_tokens = 1
    num_samples = None

    def sample(self, index: int) -> Sample:
        """pixel_values [C, S, S]."""
        shape = (self.num_channels, self.size, self.size)
        pixels = generator(self.seed, PIXELS, index).standard_normal(shape, dtype=np.float32)
        label = generator(self.seed, TOKENS, index).integers(0, self.num_labels)
        return Sample({"pixel_values": pixels}, np.array(label, np.int64))


@dataclass(frozen=True, kw_only=True)
class DecodedImages:
    """Image files, decoded by Pillow and prepared by transformers, in a new order each epoch."""

    seed: int
    images: LabelledImages
    processor: Any
    """transformers' image processor."""
    size: int
    num_tokens = 1

    @property
    def num_samples(self) -> int:
        """Images."""
        return len(self.images)

    def sample(self, index: int) -> Sample:
        """pixel_values [3, S, S]."""
        from PIL import Image

        row = row_at(index, num_rows=len(self.images), seed=self.seed)
        file = self.images.files[row]
        try:
            with Image.open(file) as image:
                made = self.processor(image.convert("RGB"), return_tensors="np")
        except OSError as error:
            raise ValueError(
                f"data={str(file)!r}: expected an image that Pillow decodes. {error}."
            ) from None
        pixels = np.asarray(made["pixel_values"][0], dtype=np.float32)
        allowed = f"a processor that makes 3 x {self.size} x {self.size} pixels, as the model takes"
        is_fit = pixels.shape == (3, self.size, self.size)
        require(is_fit, "image_size", pixels.shape, allowed, "Choose another --image-size.")
        return Sample({"pixel_values": pixels}, np.array(self.images.labels[row], np.int64))


def image_size_of(config: Any, chosen: int | None) -> int:
    """Side of the images of a model.

    Args:
        config: transformers' configuration of the model; None for others.
        chosen: the size that the user chose.
    Raises:
        ValueError: the model takes another size than chosen, or images that are not square.
    """
    own = getattr(config, "image_size", None)
    if isinstance(own, list | tuple) and len(set(own)) == 1:
        own = own[0]
    if own is None:
        return chosen or DEFAULT_SIZE
    require(isinstance(own, int), "model_name", own, "a model of square images", "It has none.")
    advice = "Leave --image-size out."
    require(chosen in (None, own), "image_size", chosen, f"{own}, as the model has", advice)
    return int(own)


def processor_of(path: str | None, size: int) -> Any:
    """The model's own image processor; without one, images in [-1, 1], as of a ViT."""
    from transformers import AutoImageProcessor, ViTImageProcessor
    from transformers.utils import logging

    # It tells of the backend that it chose.
    logging.set_verbosity_error()
    if path is not None and (not Path(path).is_dir() or _has_processor(Path(path))):
        return AutoImageProcessor.from_pretrained(path)
    return ViTImageProcessor(size={"height": size, "width": size})


def _has_processor(folder: Path) -> bool:
    names = ("preprocessor_config.json", "processor_config.json")
    return any((folder / name).is_file() for name in names)
