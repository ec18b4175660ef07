"""What test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forked_ranks import ForkedRanks, forked_ranks


@pytest.fixture(scope="session")
def rank_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRanks]:
    """Starts process groups."""
    with forked_ranks(tmp_path_factory.mktemp("ranks")) as found:
        yield found
