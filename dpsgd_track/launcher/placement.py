"""Machines, store and folders of a group: settings that do not change its results."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dpsgd_track.config import NodesConfig, Settings, require
from dpsgd_track.program import command


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The store, the folders and the machines of one launch."""

    settings: Settings
    group: str | None = None
    """Name chosen by the user; None for SUITE-DATE-TIME."""
    output: Path | None = None
    """JSON file for the results of `single`, CSV file for the figures of a profile."""
    is_offline: bool = False
    """True to keep records in the spool and use no store."""
    nodes: NodesConfig = field(default_factory=NodesConfig)
    """Machines that the group runs on, this one among them."""
    rendezvous_timeout_s: float = 600.0
    """Longest wait of the machines for each other before anything starts."""

    def __post_init__(self) -> None:
        timeout_s = self.rendezvous_timeout_s
        require(timeout_s > 0, "rdzv_timeout", timeout_s, "seconds, above 0")
        is_shared = not self.settings.tracking_uri.startswith("sqlite:")
        require(
            self.nodes.num_nodes == 1 or self.is_offline or is_shared,
            "tracking_uri",
            self.settings.tracking_uri,
            "a server, as --nnodes is not 1",
            "Give --tracking-uri http://..., or --offline and ship with "
            f"`{command('sync')}` later.",
        )
