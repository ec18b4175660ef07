"""Settings of a suite where nothing else is chosen, by the device that it runs on."""

from __future__ import annotations

from dataclasses import dataclass

from dpsgd_track.launcher.choices import MINILM
from dpsgd_track.record.plan import Suite


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Model, shape, steps and compute type by default."""

    model_name: str = "llama-tiny"
    seq_length: int = 64
    """Tokens in a sample, or the model's limit if that is lower."""
    num_iter: int = 10
    """Recorded steps of the regimes whose number of steps the user chooses."""
    param_dtype: str = "float32"


_QUICK = Recipe(model_name=MINILM, num_iter=5)
_ACCURACY_TEST = Recipe(
    model_name="llama-3.2-1b", seq_length=1024, num_iter=5, param_dtype="bfloat16"
)
"""The accuracy test as it is published; its other settings are the defaults of the options."""


def recipe_of(suite: Suite, device: str) -> Recipe:
    """The recipe of `suite` on cpu or cuda."""
    if suite is Suite.QUICK:
        return _QUICK
    return _ACCURACY_TEST if suite is Suite.FULL and device == "cuda" else Recipe()
