"""A failure has a kind, and names the innermost line outside of torch and whose code it is."""

from __future__ import annotations

import errno
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import opacus
import pytest
import torch

from dpsgd_track.config import VariantConfig, require
from dpsgd_track.modes.protocol import ProtocolError
from dpsgd_track.record.failure import Failure, FailureKind
from dpsgd_track.store.client import TrackingError
from dpsgd_track.training.diagnosis import diagnose
from dpsgd_track.training.loop import NotFiniteError
from dpsgd_track.training.noise_samples import UnequalNoiseError
from tests.support.synthetic_group import job, setup

CODE = """
import json
import torch
from torch import nn

def value_error():
    raise ValueError("no such thing")

def deep_in_torch():
    return nn.Linear(3, 4)(torch.ones(2, 5))

def deep_in_python():
    return json.loads("{")

def our_setting(require):
    require(False, "hat", "red", "blue")
"""


def failure_of(call: Callable[[], Any], mode: str = "flash", **more: Any) -> Failure:
    """The diagnosis of what `call` raises."""
    planned = replace(job(mode, setup("clip")), **more)
    try:
        call()
    except BaseException as error:
        return diagnose(error, planned, regime=0, step=3, rank=1)
    raise AssertionError("nothing was raised")


@pytest.fixture
def code(tmp_path: Path) -> Any:
    """A module of a user's."""
    path = tmp_path / "my_mode.py"
    path.write_text(CODE)
    spec = importlib.util.spec_from_file_location("my_mode", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["my_mode"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["my_mode"]


@pytest.mark.parametrize(
    ("name", "line"), [("value_error", 7), ("deep_in_torch", 10), ("deep_in_python", 13)]
)
def test_an_error_of_a_users_mode_is_the_modes_and_names_its_line(
    code: Any, name: str, line: int
) -> None:
    found = failure_of(getattr(code, name), "my_mode:MyMode")
    assert found.kind is FailureKind.MODE
    assert found.place == f"in my_mode.py:{line} of mode my_mode:MyMode"
    assert found.reason.startswith(
        f"the mode raised an exception at step 3, rank 1 in my_mode.py:{line} of mode"
    )


def test_a_file_that_is_no_python_is_the_modes(tmp_path: Path) -> None:
    path = tmp_path / "my_mode.py"
    path.write_text("x = 1\ndef (\n")
    spec = importlib.util.spec_from_file_location("my_mode", path)
    assert spec is not None
    assert spec.loader is not None
    loader, module = spec.loader, importlib.util.module_from_spec(spec)
    found = failure_of(lambda: loader.exec_module(module), "my_mode:MyMode")
    assert found.kind is FailureKind.MODE
    assert found.place == "in my_mode.py:2 of mode my_mode:MyMode"


def test_an_error_of_a_variant_names_the_variant(code: Any, tmp_path: Path) -> None:
    fork = VariantConfig(name="fork", path="../fork", root=str(tmp_path))
    found = failure_of(code.value_error, "ghost", variant=fork)
    assert (found.kind, found.place) == (FailureKind.MODE, "in my_mode.py:7 of variant fork")


def test_an_error_of_an_installed_library_names_the_library() -> None:
    def call() -> None:
        opacus.PrivacyEngine(accountant="nobody's")

    found = failure_of(call, "ghost")
    assert found.kind is FailureKind.MODE
    assert found.place.endswith("of opacus")


def test_a_setting_that_our_code_refuses_is_a_setting(code: Any) -> None:
    found = failure_of(lambda: code.our_setting(require), "my_mode:MyMode")
    assert found.kind is FailureKind.SETTING
    assert found.reason.endswith(
        "a setting does not fit at step 3, rank 1: hat='red': expected blue."
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TrackingError("no room"), FailureKind.TRACKING),
        (OSError(errno.ENOSPC, "full"), FailureKind.DISK_FULL),
        (NotFiniteError("loss became nan at step 3"), FailureKind.NOT_FINITE),
        (UnequalNoiseError("ranks 0 and 1 differ"), FailureKind.UNEQUAL_NOISE),
        (ProtocolError("accumulate() of X: expected a SampleRecord"), FailureKind.PROTOCOL),
        (SystemExit(3), FailureKind.MODE),
        (MemoryError(), FailureKind.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), FailureKind.OUT_OF_MEMORY),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            FailureKind.OUT_OF_MEMORY,
        ),
        (torch.distributed.DistNetworkError("gone"), FailureKind.PEER),
        (json.JSONDecodeError("x", "y", 0), FailureKind.MODE),
        (RuntimeError("the read timed out"), FailureKind.MODE),
        (KeyError("weight"), FailureKind.MODE),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_each_error_has_its_kind(error: BaseException, kind: FailureKind) -> None:
    def call() -> None:
        raise error

    assert failure_of(call, "elsewhere:Mode").kind is kind
