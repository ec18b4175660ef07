#!/usr/bin/env python
"""Measure a private step on one GPU beside ordinary training, eager, compiled and captured.

    python benchmarks/single_gpu.py benchmarks/single_gpu.csv

Base-size models as people fine-tune them, bfloat16, SGD. Contestants of a model live in one process
and step in turn. Memory is what torch has reserved after its cache was emptied and three steps were
taken, each contestant in a process of its own. Opacus's modes need opacus.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

# Also as a file, from the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dpsgd_track.distributed.sharding import transformer_blocks

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
NUM_WARM_UP, NUM_ROUNDS = 10, 15
MODE = "flash_bk"
CONTESTANTS = (
    "no_dp",
    "no_dp captured",
    "no_dp compiled",
    "no_dp compiled blocks",
    MODE,
    f"{MODE} captured",
    f"{MODE} compiled blocks",
    "opacus ghost",
    "opacus hooks",
)
CLASSES, VOCABULARY = 3, 30_000


@dataclass(frozen=True)
class Workload:
    """A model, and the shape of a batch."""

    build: Callable[[], nn.Module]
    num_samples: int
    num_positions: int
    """0 for images."""
    has_segments: bool = False

    def batch(self) -> tuple[dict[str, Tensor], Tensor]:
        """Random inputs and targets."""
        B, T = self.num_samples, self.num_positions
        y = torch.randint(0, CLASSES, (B,), device=DEVICE)
        if not T:
            return {"pixel_values": torch.randn(B, 3, 224, 224, device=DEVICE)}, y
        tokens = torch.randint(1, VOCABULARY, (B, T), device=DEVICE)
        x = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        x["position_ids"] = torch.arange(T, device=DEVICE).expand(B, T).contiguous()
        if self.has_segments:
            x["token_type_ids"] = torch.zeros_like(tokens)
        return x, y


def _bert() -> nn.Module:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertForSequenceClassification(hf.BertConfig(num_labels=CLASSES, **off))


def _gpt2() -> nn.Module:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = hf.GPT2Config(num_labels=CLASSES, pad_token_id=0, **off)
    return hf.GPT2ForSequenceClassification(config)


def _vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(num_labels=CLASSES))


def _llama() -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_labels=CLASSES,
        pad_token_id=0,
    )
    return hf.LlamaForSequenceClassification(config)


WORKLOADS = {
    "bert-base": Workload(_bert, 32, 128, has_segments=True),
    "vit-base": Workload(_vit, 64, 0),
    "gpt2": Workload(_gpt2, 16, 512),
    "llama-200m": Workload(_llama, 8, 512),
}


class Contestant:
    """A model that is trained in one way."""

    def __init__(self, name: str, workload: Workload) -> None:
        self.name, self.workload = name, workload
        self.times: list[float] = []
        torch.manual_seed(0)
        with DEVICE:
            self.model = workload.build().train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.loss = nn.CrossEntropyLoss()
        if "blocks" in name:
            for block in transformer_blocks(self.model):
                block.compile()
        elif "compiled" in name:
            self.model.compile()
        self._step = self._private() if MODE in name else self._ordinary()
        for _ in range(NUM_WARM_UP):
            self.step()

    def step(self) -> float:
        """Take a step; returns its time in ms."""
        x, y = self.workload.batch()
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        started.record()
        self._step(x, y)
        ended.record()
        torch.cuda.synchronize()
        return started.elapsed_time(ended)

    def _private(self) -> Callable[[Any, Tensor], None]:
        import dpsgd_track

        private = dpsgd_track.make_private(
            self.model,
            self.optimizer,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=self.workload.num_samples,
            mode=MODE,
            param_dtype=DTYPE,
            capture="captured" in self.name,
        )

        def step(x: Any, y: Tensor) -> None:
            private.backward(x, y)
            self.optimizer.step()

        return step

    def _ordinary(self) -> Callable[[Any, Tensor], None]:
        if self.name.startswith("opacus"):
            self._make_opacus()

        def step(x: Any, y: Tensor) -> None:
            self.optimizer.zero_grad()
            with torch.autocast("cuda", DTYPE, cache_enabled="captured" not in self.name):
                logits = self.model(**x).logits
            self.loss(logits.float(), y).backward()
            self.optimizer.step()

        return self._captured(step) if "captured" in self.name else step

    def _captured(self, step: Callable[[Any, Tensor], None]) -> Callable[[Any, Tensor], None]:
        own_x, own_y = self.workload.batch()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(own_x, own_y)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(own_x, own_y)

        def replay(x: Any, y: Tensor) -> None:
            for name, own in own_x.items():
                own.copy_(x[name])
            own_y.copy_(y)
            graph.replay()

        return replay

    def _make_opacus(self) -> None:
        from opacus import PrivacyEngine
        from torch.utils.data import DataLoader, TensorDataset

        B = self.workload.num_samples
        kind = self.name.split()[1]
        made = PrivacyEngine().make_private(
            module=self.model,
            optimizer=self.optimizer,
            data_loader=DataLoader(TensorDataset(torch.zeros(B, 1), torch.zeros(B)), B),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=kind,
            **({"criterion": self.loss} if kind == "ghost" else {}),
        )
        if kind == "ghost":
            self.model, self.optimizer, self.loss, _ = made
        else:
            self.model, self.optimizer, _ = made


def times(model: str, names: list[str]) -> dict[str, list[float]]:
    """Times of the contestants' steps in ms; they step in turn. Those that fail are left out."""
    contestants = []
    for name in names:
        try:
            contestants.append(Contestant(name, WORKLOADS[model]))
        except Exception as error:
            print(f"{model}, {name}: {type(error).__name__}: {error}", file=sys.stderr)
    gc.collect()
    gc.freeze()
    found: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(NUM_ROUNDS):
        for contestant in contestants:
            found[contestant.name].append(contestant.step())
    return found


def memory(model: str, name: str) -> float:
    """GiB that torch has reserved for a contestant's steps."""
    contestant = Contestant(name, WORKLOADS[model])
    gc.collect()
    torch.cuda.empty_cache()
    for _ in range(3):
        contestant.step()
    return torch.cuda.memory_reserved() / 2**30


def _apart(*arguments: str) -> Any:
    """Result of this program in a process of its own; None if it failed."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, __file__, file.name, *arguments]
        done = subprocess.run(command, check=False)
        return json.loads(Path(file.name).read_text()) if done.returncode == 0 else None


def rows(model: str, names: list[str]) -> Iterator[dict[str, object]]:
    """A row for each contestant that ran."""
    found = _apart("--times", model, *names) or {}
    workload = WORKLOADS[model]
    base = statistics.median(found["no_dp"])
    for name, steps in found.items():
        p20, *_, p80 = statistics.quantiles(steps, n=5)
        reserved = _apart("--memory", model, name)
        yield {
            "model": model,
            "batch_size": workload.num_samples,
            "seq_length": workload.num_positions or 197,
            "contestant": name,
            "ms": round(statistics.median(steps), 2),
            "p20": round(p20, 2),
            "p80": round(p80, 2),
            "ratio": round(statistics.median(steps) / base, 3),
            "memory_gib": None if reserved is None else round(reserved, 2),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "transformers": hf.__version__,
        }


def main() -> int:
    """Measure all workloads, or one part for another process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", choices=WORKLOADS, action="append")
    parser.add_argument("--contestant", choices=CONTESTANTS, action="append")
    parser.add_argument("--times", nargs="+")
    parser.add_argument("--memory", nargs=2)
    args = parser.parse_args()
    if args.times:
        args.output.write_text(json.dumps(times(args.times[0], args.times[1:])))
        return 0
    if args.memory:
        args.output.write_text(json.dumps(memory(*args.memory)))
        return 0
    names = args.contestant or list(CONTESTANTS)
    with args.output.open("w", newline="") as file:
        writer = None
        for row in itertools.chain.from_iterable(rows(m, names) for m in args.model or WORKLOADS):
            print(json.dumps(row), flush=True)
            writer = writer or csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
