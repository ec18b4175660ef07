"""Run DP-SGD implementations side by side, track every step, say whether they agree."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpsgd_track.library import PrivateTraining, make_private

__version__ = "0.1.0"
__all__ = ["PrivateTraining", "make_private"]


def __getattr__(name: str) -> Any:
    # The half that compares runs does without torch, which these need.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dpsgd_track import library

    return getattr(library, name)
