"""Diagnosis of a worker's failure: the kind of an exception, and the owner of the code at fault."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from dpsgd_track.config import JobConfig
from dpsgd_track.modes.code_owner import OURS, is_of_python, is_of_torch, owner_of
from dpsgd_track.modes.protocol import ProtocolError
from dpsgd_track.record.failure import Failure, FailureKind, names_lost_peer
from dpsgd_track.store.client import TrackingError
from dpsgd_track.training.loop import NotFiniteError
from dpsgd_track.training.noise_samples import UnequalNoiseError

_SENTENCES = (
    FailureKind.SETTING,
    FailureKind.NOT_FINITE,
    FailureKind.UNEQUAL_NOISE,
    FailureKind.PROTOCOL,
)
"""These say what is wrong in a sentence; of others the exception's type is half of it."""
_NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Out-of-memory messages of CUDA and NCCL, torch on CPUs, and cuBLAS in plain RuntimeErrors."""


def diagnose(
    error: BaseException, job: JobConfig, *, regime: int, step: int | None, rank: int
) -> Failure:
    """The failure for an exception in a worker."""
    frame, owner = _innermost_frame(error, job)
    kind = _kind_of(error, owner)
    text = str(error).strip()
    is_sentence = kind in _SENTENCES
    is_placed = kind in (FailureKind.MODE, FailureKind.ERROR) and frame is not None
    return Failure(
        kind=kind,
        message=text if is_sentence else f"{type(error).__name__}: {text}",
        place=f"in {Path(frame.filename).name}:{frame.lineno} of {owner}"
        if is_placed and frame
        else "",
        regime=regime,
        step=step,
        rank=rank,
    )


def _kind_of(error: BaseException, owner: str) -> FailureKind:
    text = str(error)
    match error:
        case TrackingError():
            return FailureKind.TRACKING
        case OSError() if error.errno == errno.ENOSPC:
            return FailureKind.DISK_FULL
        case NotFiniteError():
            return FailureKind.NOT_FINITE
        case UnequalNoiseError():
            return FailureKind.UNEQUAL_NOISE
        case ProtocolError():
            return FailureKind.PROTOCOL
        case torch.OutOfMemoryError() | MemoryError():
            return FailureKind.OUT_OF_MEMORY
        case RuntimeError() if any(words in text for words in _NO_MEMORY):
            return FailureKind.OUT_OF_MEMORY
        case dist.DistBackendError() | dist.DistNetworkError() | dist.DistStoreError():
            return FailureKind.PEER
        case RuntimeError() if _is_collective(error) and names_lost_peer(text):
            return FailureKind.PEER
        # The project's form of "this setting does not fit"; a mode's own ValueError is not one.
        case ValueError() if owner == OURS:
            return FailureKind.SETTING
    return FailureKind.ERROR if owner == OURS else FailureKind.MODE


def _is_collective(error: BaseException) -> bool:
    """True if the exception was raised in torch.distributed."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and is_of_torch(Path(frames[-1].filename))


def _innermost_frame(
    error: BaseException, job: JobConfig
) -> tuple[traceback.FrameSummary | None, str]:
    """The innermost line outside of torch and the standard library, and its owner."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        # Raised by whoever imports the file.
        frames.append(traceback.FrameSummary(error.filename, error.lineno, "<module>"))
    for frame in reversed(frames):
        path = Path(frame.filename)
        if is_of_torch(path) or is_of_python(path):
            continue
        return frame, owner_of(path, job)
    return None, OURS
