"""What test files share, and in which order they start."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator

import pytest

from dpsgd_track.launcher.hardware import count_gpus


def _compute_on_one_core() -> None:
    """Keep this process to one thread; what it starts has as many as where a user starts it.

    Another worker computes beside this one, and threads that wait for each other spin. The
    variable is read as the libraries are loaded.

    Raises:
        RuntimeError: torch is loaded already.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch: expected to be imported here first, on one thread")
    is_chosen = "OMP_NUM_THREADS" in os.environ
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("scipy.linalg", "torch"):
        importlib.import_module(name)
    if not is_chosen:
        del os.environ["OMP_NUM_THREADS"]


if count_gpus() == 0:
    # Read as Triton is imported, which torch and transformers do before the tests of its kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")
_compute_on_one_core()

pytest.register_assert_rewrite("tests.support")

import torch.distributed as dist  # noqa: E402

from tests.support.forked_ranks import ForkedRanks, forked_ranks  # noqa: E402

LONGEST = (
    "test_detection.py",
    "test_modes_distributed.py",
    "test_several_machines.py",
    "test_end_to_end.py",
    "test_launcher_modes.py",
    "test_training_noise.py",
    "test_opacus_defects.py",
    "test_launcher_variants.py",
    "test_training_probe.py",
    "test_report_browser.py",
    "test_examples.py",
    "test_launcher_life.py",
    "test_launcher_stores.py",
    "test_precision.py",
    "test_precision_bias.py",
)
"""Files that start first: a long one at the end would leave a worker without work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, and leave the rest as it is."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def rank_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRanks]:
    """Starts process groups."""
    with forked_ranks(tmp_path_factory.mktemp("ranks")) as found:
        yield found


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    store = f"file://{tmp_path_factory.mktemp('store') / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
