"""Run DP-SGD implementations side by side, track every step, say whether they agree."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpsgd_track.library import PrivateTraining, make_private
    from dpsgd_track.privacy.adaptive import AdaptiveClipping
    from dpsgd_track.trainer import PrivacyArguments, PrivateTrainer

__version__ = "0.2.0"
__all__ = [
    "AdaptiveClipping",
    "PrivacyArguments",
    "PrivateTrainer",
    "PrivateTraining",
    "make_private",
]


def __getattr__(name: str) -> Any:
    # The half that compares runs does without torch, which these need.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    homes = {
        "AdaptiveClipping": "privacy.adaptive",
        "PrivateTraining": "library",
        "make_private": "library",
    }
    return getattr(import_module(f"dpsgd_track.{homes.get(name, 'trainer')}"), name)
