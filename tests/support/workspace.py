"""A folder that a user works in: commands of the checkout, run there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dpsgd_track.config import Settings
from dpsgd_track.store.reader import Group, open_client, read_group
from tests.support import ROOT


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
        return subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": search_path, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def group(self, name: str) -> Group:
        return read_group(open_client(self.uri), Settings(tracking_uri=self.uri), name)
