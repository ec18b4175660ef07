"""Warnings are a mode's own if its code, or what it drives, raised them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dpsgd_track.config import VariantConfig
from dpsgd_track.training import data
from dpsgd_track.training.heard import HeardWarnings
from tests.support.synthetic_group import job, setup

CODE = """
import warnings

def fall_back(level=1):
    warnings.warn("Falling back\\n to hooks.", stacklevel=level)
"""


@pytest.fixture
def library(tmp_path: Path) -> ModuleType:
    """A library of somebody's."""
    path = tmp_path / "library.py"
    path.write_text(CODE)
    spec = importlib.util.spec_from_file_location("library", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[HeardWarnings]:
    """The warnings of a variant's run from now on."""
    fork = VariantConfig(name="fork", path="fork", root=str(tmp_path))
    heard = HeardWarnings(replace(job("opacus:flash", setup("clip")), variant=fork))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        heard.listen()
        yield heard


def test_a_warning_of_the_code_under_test_is_kept_once_and_on_one_line(library, heard):
    library.fall_back()
    library.fall_back()
    assert heard.sentences == ("Falling back to hooks",)


def test_whose_a_warning_is_does_not_depend_on_its_stacklevel(library, heard):
    library.fall_back(level=2)
    assert heard.sentences == ("Falling back to hooks",)


def test_warnings_of_what_all_modes_run_on_are_no_modes(heard):
    code = compile("warn('from torch')", torch.__file__, "exec")
    exec(code, {"warn": warnings.warn})
    code = compile("warn('from this package')", data.__file__, "exec")
    exec(code, {"warn": warnings.warn})
    code = compile("warn('from Python')", warnings.__file__.replace("warnings", "json/x"), "exec")
    exec(code, {"warn": warnings.warn})
    assert heard.sentences == ()
