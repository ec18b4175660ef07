"""Test for a model of the hub: one fast request tells if it can be had. Imports no torch.

transformers itself retries a hub that does not answer, and does so in every rank.
"""

from __future__ import annotations

import json
from pathlib import Path

from dpsgd_track.config import require

TIMEOUT_S = 5.0
"""Longest wait for an answer of the hub."""
_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDICES = tuple(f"{name}.index.json" for name in _WEIGHTS)


def check_hub_model(name: str) -> None:
    """Raise unless the model is in the cache or the hub lets this user read it.

    Args:
        name: a hub id, `org/model`.

    Raises:
        ValueError: it is gated, unknown to the hub, or neither in the cache nor to be reached.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    log_in = "log in with `hf auth login`, or set HF_TOKEN or --token"
    page = f"{constants.ENDPOINT}/{name}"
    try:
        if _is_cached(name):
            return
        get_hf_file_metadata(hf_hub_url(name, _CONFIG), timeout=TIMEOUT_S)
    except GatedRepoError:
        advice = f"It is gated: ask for access at {page}, then {log_in}."
        require(False, "model_name", name, "a model that you may read", advice)
    except RepositoryNotFoundError:
        advice = f"{page} is not there, or private: check the name, or {log_in}."
        require(False, "model_name", name, "a model that the hub has", advice)
    except EntryNotFoundError:
        require(False, "model_name", name, f"a model with a {_CONFIG}, which {page} lacks")
    except HFValidationError as error:
        require(False, "model_name", name, "a hub id such as org/model", str(error))
    # Each HTTP client of the hub's library has exceptions of its own.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        advice = (
            f"{constants.HF_HUB_CACHE} does not have all of it, and {constants.ENDPOINT} was not "
            f"reached: {reason}. Connect, or name a preset, such as llama-3.2-1b, or a folder."
        )
        require(False, "model_name", name, "a model in the cache, or a hub that answers", advice)


def _is_cached(name: str) -> bool:
    """True if the configuration and all weights of a model are in the cache."""
    if _cached(name, _CONFIG) is None:
        return False
    if any(_cached(name, file) for file in _WEIGHTS):
        return True
    indices = filter(None, (_cached(name, file) for file in _INDICES))
    return any(all(_cached(name, file) for file in _shards(index)) for index in indices)


def _cached(name: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, file)
    return Path(path) if isinstance(path, str) else None


def _shards(index: Path) -> set[str]:
    """Files that an index of weights names."""
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
