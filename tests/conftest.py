"""What test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from forked_ranks import ForkedRanks, forked_ranks

from dpsgd_track.launcher.machine import count_gpus

if count_gpus() == 0:
    # Read as Triton is imported, which torch and transformers do before the tests of its kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def rank_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRanks]:
    """Starts process groups."""
    with forked_ranks(tmp_path_factory.mktemp("ranks")) as found:
        yield found
