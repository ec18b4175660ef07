"""Run DP-SGD implementations side by side, track every step, say whether they agree."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpsgd_track.library import PrivateTraining, make_private
    from dpsgd_track.privacy.adaptive import AdaptiveClipping
    from dpsgd_track.report.training_page import write_training_page
    from dpsgd_track.step_metrics import StepMetrics
    from dpsgd_track.trainer import PrivacyArguments, PrivateTrainer

__version__ = "0.2.0"
__all__ = [
    "AdaptiveClipping",
    "PrivacyArguments",
    "PrivateTrainer",
    "PrivateTraining",
    "StepMetrics",
    "make_private",
    "write_training_page",
]


def __getattr__(name: str) -> Any:
    # The half that compares runs does without torch, which these need.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    homes = {
        "AdaptiveClipping": "privacy.adaptive",
        "PrivateTraining": "library",
        "StepMetrics": "step_metrics",
        "make_private": "library",
        "write_training_page": "report.training_page",
    }
    return getattr(import_module(f"dpsgd_track.{homes.get(name, 'trainer')}"), name)
