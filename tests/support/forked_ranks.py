"""Process groups that tests start, forked from one process that did the imports.

Importing torch, transformers and Opacus takes a rank longer than most of what tests have it
compute. The launcher forks its ranks for that reason, and tests use the same host.

A program is a module whose `main` takes strings; it runs in every rank, under torch's launcher.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpsgd_track.launcher.fork_client import WorkerHost
from dpsgd_track.launcher.fork_server import Request
from tests.support import warm

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE_S = 5.0
# What the ranks' programs import, and what they would import later.
_PRELOADED = (
    "tests.support.opacus_defects",
    "tests.support.torchrun_library",
    "tests.support.torchrun_modes",
    "tests.support.torchrun_regimes",
    "opacus.grad_sample",
    "opacus.optimizers",
    "torch.distributed.device_mesh",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.roberta.modeling_roberta",
    "transformers.models.vit.modeling_vit",
)


@dataclass(frozen=True)
class Ended:
    """How a process group went."""

    code: int
    """0 where every rank succeeded."""
    log: str
    """What its ranks and torch's launcher said."""


class ForkedRanks:
    """Starts process groups, one after the other."""

    def __init__(self, host: WorkerHost, folder: Path) -> None:
        """
        Args:
            folder: for jobs and logs.
        """
        self._host, self._folder, self._num_groups = host, folder, 0

    def run(
        self,
        program: str,
        *arguments: str,
        num_ranks: int,
        on_gpus: bool = False,
        timeout_s: float = 280.0,
    ) -> Ended:
        """Run `main(*arguments)` of the module `program` in every rank."""
        self._num_groups += 1
        folder = self._folder / f"{self._num_groups}-{program}"
        folder.mkdir()
        job, log = folder / "job.json", folder / "output.log"
        job.write_text(json.dumps([program, *arguments]))
        request = Request(job_file=str(job), log=str(log), num_ranks=num_ranks, grace_s=GRACE_S)
        with contextlib.nullcontext() if on_gpus else warm.imports_done():
            self._host.start(request, _environment(on_gpus=on_gpus))
        deadline = time.monotonic() + timeout_s
        try:
            while (code := self._host.poll()) is None:
                assert time.monotonic() < deadline, f"still running: {log.read_text()[-3000:]}"
                time.sleep(0.02)
        finally:
            self._host.end()
        return Ended(code, log.read_text())


@contextmanager
def forked_ranks(folder: Path) -> Iterator[ForkedRanks]:
    """Process groups whose logs are in `folder`."""
    with WorkerHost("tests.support.forked_ranks") as host:
        yield ForkedRanks(host, folder)


def _environment(*, on_gpus: bool) -> dict[str, str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        # Counting GPUs through CUDA would spoil it for the processes forked afterwards.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    # Differs from test to test, and another environment is another host.
    environment.pop("PYTEST_CURRENT_TEST", None)
    if not on_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def preload() -> None:
    """Import what ranks would, in the process that they are forked from."""
    for name in _PRELOADED:
        importlib.import_module(name)


def main(job_file: str) -> int:
    """Run the program of a job; what it raises, torch's launcher says."""
    program, *arguments = json.loads(Path(job_file).read_text())
    importlib.import_module(program).main(*arguments)
    return 0
