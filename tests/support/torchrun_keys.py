"""Program of ranks that draw a key of the operating system together."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from dpsgd_track.privacy.noise import fresh_key


def main(folder: str) -> None:
    """Leave this rank's key."""
    dist.init_process_group("gloo")
    (Path(folder) / f"key{dist.get_rank()}").write_text(fresh_key(None, torch.device("cpu")))
    dist.destroy_process_group()
