"""A folder that a user works in: commands of the checkout, run there with their imports done."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from dpsgd_track.config import Settings
from dpsgd_track.store.reader import Group, open_client, read_group
from tests.support import ROOT, warm


class Workspace:
    """A folder that a user works in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.search_path: list[str] = []
        """Folders with modes of the user's own."""

    def run(
        self, script: str, *arguments: str, timeout_s: float = 280
    ) -> subprocess.CompletedProcess[str]:
        search_path = os.pathsep.join([*self.search_path, str(ROOT)])
        return warm.run(
            str(ROOT / script),
            *arguments,
            cwd=self.folder,
            environment={**os.environ, "PYTHONPATH": search_path, "CUDA_VISIBLE_DEVICES": ""},
            timeout_s=timeout_s,
        )

    def group(self, name: str) -> Group:
        return read_group(open_client(self.uri), Settings(tracking_uri=self.uri), name)
