"""Image files in one folder for each class. Imports no torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from dpsgd_track.config import SYNTHETIC, require

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Names of image files end like this, in small or capital letters."""
_LAYOUT = f"{SYNTHETIC}, or a folder with a folder of images for each class"


@dataclass(frozen=True)
class LabelledImages:
    """Image files and their classes."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    """Class index of each file."""
    label_names: tuple[str, ...]
    """Names of the classes, which are those of the folders, sorted."""

    def __len__(self) -> int:
        return len(self.files)


def read_images(source: str) -> LabelledImages:
    """List the images of a folder; none is decoded. Files and folders that begin with a dot are
    left out.

    Raises:
        ValueError: there is no such folder, it has fewer than two classes, a class is empty, or a
            file is no image by its name; or Pillow, which decodes them, is not installed.
    """
    folder = Path(source).expanduser()
    require(folder.is_dir(), "data", source, _LAYOUT)
    classes = [path for path in _visible(folder) if path.is_dir()]
    advice = f"It has {len(classes)} of them."
    require(len(classes) >= 2, "data", source, "a folder of images for each of two classes", advice)
    files: list[Path] = []
    labels: list[int] = []
    for label, each in enumerate(classes):
        found = _visible(each)
        require(bool(found), "data", str(each), "at least one image in each class")
        for file in found:
            allowed = f"image files, whose names end in {', '.join(SUFFIXES)}"
            require(file.suffix.lower() in SUFFIXES, "data", str(file), allowed, "Move it away.")
        files += found
        labels += [label] * len(found)
    require(
        importlib.util.find_spec("PIL") is not None,
        "data",
        source,
        f"{SYNTHETIC}, as Pillow, which decodes images, is not installed",
        "Run: pip install pillow.",
    )
    return LabelledImages(tuple(files), tuple(labels), tuple(path.name for path in classes))


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
