#!/usr/bin/env python
"""Measure private steps under FSDP2 beside ordinary training, on one rank and on several.

    python benchmarks/scaling.py OUT.csv --workload 1b-T4096-B2 --ranks 1,2

Llama shapes with random weights, SGD, noise on; on GPUs bfloat16 with float32 reductions. The
contestants of a workload live in the same processes and step in turn; a time is that of the slowest
rank. Memory is the most that torch allocated on a rank during a step, without what belongs to the
other contestants. One CSV row for each workload, number of ranks and contestant. With several
numbers of ranks a picture of the overhead is drawn beside the CSV. Exits with 1 where a contestant
failed.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

# Also as a file, from the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.svg import BLUE, GREY, RED, WIDTH, Picture
from dpsgd_track.distributed.sharding import build_mesh, shard_fsdp2, transformer_blocks
from dpsgd_track.library import make_private

BASELINE, COMPILED, PER_LAYER = "no_dp", "compiled", "per_layer"
EAGER = (
    BASELINE,
    "flash_fsdp_fuse_bk",
    "flash_fsdp_bk",
    f"flash_fsdp {PER_LAYER}",
    f"flash_fsdp_bk {PER_LAYER}",
)
BOTH_COMPILED = (f"{BASELINE} {COMPILED}", f"flash_fsdp_fuse_bk {COMPILED}")
NUM_WARM_UP, NUM_ROUNDS = 4, 15
"""Steps of each contestant. The engine checks itself in the first, the second and the 32nd."""
CLASSES = 3
BUDGET = "2GiB"
"""Memory that one pass may keep, as an option of a contestant."""
CHOICES = (*EAGER, f"flash_fsdp_fuse_bk {BUDGET}", *BOTH_COMPILED)
COLORS = (BLUE, RED, GREY)
PRINTED = ("workload", "world_size", "contestant", "ms", "ratio", "memory_gib", "memory_ratio")
GIB = 2**30

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, and a micro-batch of one rank."""

    shape: str
    num_positions: int
    num_samples: int
    is_checkpointed: bool = False
    lora_rank: int = 0
    """Rank of adapters on all linear layers, with everything else frozen; 0 for no adapters."""
    contestants: tuple[str, ...] = EAGER + BOTH_COMPILED


# A GPU has no room for more models of this shape.
_8B = Workload(
    shape="8b",
    num_positions=2048,
    num_samples=1,
    is_checkpointed=True,
    contestants=(
        BASELINE,
        "flash_fsdp_fuse_bk",
        f"flash_fsdp_fuse_bk {BUDGET}",
        f"flash_fsdp_bk {PER_LAYER}",
    ),
)
_8B_LORA = replace(
    _8B,
    num_positions=1024,
    num_samples=4,
    lora_rank=16,
    contestants=(BASELINE, "flash_fsdp_fuse_bk"),
)
WORKLOADS = {
    "tiny": Workload(shape="tiny", num_positions=64, num_samples=4),
    "tiny-lora": Workload(
        shape="tiny", num_positions=64, num_samples=4, lora_rank=4, is_checkpointed=True
    ),
    "1b-T512-B16": Workload(shape="1b", num_positions=512, num_samples=16),
    "1b-T1024-B2": Workload(shape="1b", num_positions=1024, num_samples=2),
    "1b-T1024-B8": Workload(shape="1b", num_positions=1024, num_samples=8),
    "1b-T4096-B2": Workload(shape="1b", num_positions=4096, num_samples=2),
    "1b-lora": Workload(shape="1b", num_positions=1024, num_samples=4, lora_rank=16),
    "8b": _8B,
    "8b-compiled": replace(_8B, contestants=BOTH_COMPILED),
    "8b-lora": _8B_LORA,
    "8b-lora-compiled": replace(_8B_LORA, contestants=BOTH_COMPILED),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of one contestant."""

    workload: str
    shape: str
    seq_length: int
    batch_size: int
    checkpointing: bool
    lora_rank: int
    world_size: int
    num_replicas: int
    contestant: str
    ms: float
    p20: float
    p80: float
    ratio: float | None
    """Time over that of ordinary training that is compiled alike."""
    memory_gib: float | None
    memory_ratio: float | None
    device: str
    torch: str
    transformers: str


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained product of low rank beside it (Hu et al., 2021)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., P]."""
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def build(workload: Workload, device: torch.device, num_replicas: int, *, compiles: bool) -> Any:
    """The sharded model. No rank ever holds it whole."""
    config = hf.LlamaConfig(
        **SHAPES[workload.shape], num_labels=CLASSES, pad_token_id=0, use_cache=False
    )
    with torch.device("meta"):
        model = hf.LlamaForSequenceClassification(config).train()
        if workload.lora_rank:
            model.requires_grad_(requires_grad=False)
            for block in transformer_blocks(model):
                _add_adapters(block, workload.lora_rank)
    if workload.is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiles:
        for block in transformer_blocks(model):
            block.compile()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shard_fsdp2(model, build_mesh(device, num_replicas), dtype)
    model.to_empty(device=device)
    # A buffer that a checkpoint does not hold.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


def _add_adapters(block: nn.Module, rank: int) -> None:
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoraLinear(child, rank))


class Contestant:
    """A model that is trained in one way."""

    def __init__(
        self, name: str, workload: Workload, device: torch.device, num_replicas: int
    ) -> None:
        self.name, self.workload, self.device = name, workload, device
        before = _allocated(device)
        mode, *how = name.split()
        self.model = build(workload, device, num_replicas, compiles=COMPILED in how)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-4)
        self._step = self._ordinary if mode == BASELINE else self._private(mode, how)
        for _ in range(NUM_WARM_UP):
            self.step()
            self.optimizer.zero_grad()
        self.resident = _allocated(device) - before
        """Bytes that it holds between steps."""
        self.times: list[float] = []
        self.peak = 0

    def _ordinary(self, tokens: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        logits = self.model(input_ids=tokens).logits
        (F.cross_entropy(logits.float(), y) / dist.get_world_size()).backward()
        self.optimizer.step()

    def _private(self, mode: str, how: Sequence[str]) -> Callable[[Tensor, Tensor], None]:
        private = make_private(
            self.model,
            self.optimizer,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=self.workload.num_samples * dist.get_world_size(),
            mode=mode,
            clipping=PER_LAYER if PER_LAYER in how else "flat",
            param_dtype=torch.bfloat16 if self.device.type == "cuda" else torch.float32,
            memory_budget=BUDGET if BUDGET in how else None,
        )

        def step(tokens: Tensor, y: Tensor) -> None:
            private.backward({"input_ids": tokens}, y)
            self.optimizer.step()

        return step

    def step(self) -> float:
        """Take a step on new samples; returns its time in ms."""
        B, T = self.workload.num_samples, self.workload.num_positions
        size = self.model.config.vocab_size
        tokens = torch.randint(1, size, (B, T), device=self.device)
        y = torch.randint(CLASSES, (B,), device=self.device)
        dist.barrier()
        self._synchronize()
        start = time.perf_counter()
        self._step(tokens, y)
        self._synchronize()
        return 1e3 * (time.perf_counter() - start)

    def measure(self) -> None:
        """Take a step whose time and memory count."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        others = _allocated(self.device) - self.resident
        self.times.append(self.step())
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - others)
        # What the next contestant has no room for.
        self.optimizer.zero_grad()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def run_rank(
    rank: int, world_size: int, name: str, names: Sequence[str], num_replicas: int, folder: str
) -> None:
    """Measure a workload on one of `world_size` ranks; the first leaves the rows in `folder`."""
    warnings.simplefilter("ignore")
    workload, has_gpus = WORKLOADS[name], torch.cuda.is_available()
    device = torch.device("cuda", rank) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if has_gpus else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        device_id=device if has_gpus else None,
    )
    contestants = [Contestant(which, workload, device, num_replicas) for which in names]
    for _ in range(NUM_ROUNDS):
        for contestant in contestants:
            contestant.measure()
    found = torch.tensor([[*c.times, c.peak] for c in contestants], dtype=torch.float64)
    slowest = found.to(device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if rank == 0:
        every = rows(name, names, num_replicas, slowest.cpu(), device)
        Path(folder, "rows.json").write_text(json.dumps([asdict(row) for row in every]))
    dist.destroy_process_group()


def rows(
    name: str, names: Sequence[str], num_replicas: int, found: Tensor, device: torch.device
) -> list[Row]:
    """A row for each contestant; `found` is [contestants, rounds + 1]: times, and peak memory."""
    workload = WORKLOADS[name]
    times = dict(zip(names, found[:, :-1].tolist(), strict=True))
    peaks = dict(zip(names, found[:, -1].tolist(), strict=True))
    result = []
    for contestant, steps in times.items():
        base = f"{BASELINE} {COMPILED}" if COMPILED in contestant else BASELINE
        p20, *_, p80 = statistics.quantiles(steps, n=5)
        median, memory = statistics.median(steps), peaks[contestant]
        result.append(
            Row(
                workload=name,
                shape=workload.shape,
                seq_length=workload.num_positions,
                batch_size=workload.num_samples,
                checkpointing=workload.is_checkpointed,
                lora_rank=workload.lora_rank,
                world_size=dist.get_world_size(),
                num_replicas=num_replicas,
                contestant=contestant,
                ms=round(median, 1),
                p20=round(p20, 1),
                p80=round(p80, 1),
                ratio=round(median / statistics.median(times[base]), 3),
                memory_gib=round(memory / GIB, 2) if memory else None,
                memory_ratio=round(memory / peaks[base], 3) if memory else None,
                device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
                torch=torch.__version__,
                transformers=hf.__version__,
            )
        )
    return result


def measure(
    name: str, names: Sequence[str], world_size: int, num_replicas: int
) -> list[dict[str, Any]]:
    """Rows of a workload in new processes; none if they failed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(
                run_rank, (world_size, name, names, num_replicas, folder), nprocs=world_size
            )
        except (torch.multiprocessing.ProcessRaisedException, RuntimeError) as error:
            print(f"{name}, {world_size} ranks: {str(error)[-2000:]}", file=sys.stderr, flush=True)
            return []
        found: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text())
        return found


def draw(name: str, found: Sequence[dict[str, Any]]) -> str:
    """Step time over ordinary training's against the number of ranks, as SVG."""
    private = [row for row in found if not row["contestant"].startswith(BASELINE)]
    names = list(dict.fromkeys(row["contestant"] for row in private))
    sizes = sorted({row["world_size"] for row in private})
    picture = Picture(
        title=f"Step time of private training over ordinary training, {name}",
        left=52,
        top=20 + 18 * len(names),
        width=WIDTH - 80,
        height=200,
    )
    lowest = min(0.95, *(row["ratio"] for row in private))
    highest = max(1.2, *(row["ratio"] for row in private))
    bottom = picture.top + picture.height

    def y_of(ratio: float) -> float:
        return bottom - picture.height * (ratio - lowest) / (highest - lowest)

    def x_of(world_size: int) -> float:
        step = picture.width / max(len(sizes) - 1, 1)
        return picture.left + step * sizes.index(world_size)

    picture.frame()
    for size in sizes:
        picture.text(x_of(size), bottom + 18, str(size), anchor="middle")
    picture.text(picture.left + picture.width / 2, bottom + 40, "ranks", anchor="middle")
    for ratio in (lowest, highest):
        picture.text(picture.left - 8, y_of(ratio) + 5, f"{ratio:.2f}", anchor="end")
    for number, contestant in enumerate(names):
        color = COLORS[number % len(COLORS)]
        places = [
            (x_of(row["world_size"]), y_of(row["ratio"]))
            for row in private
            if row["contestant"] == contestant
        ]
        picture.line(*places, color=color)
        for point in places:
            picture.dot(*point, color)
        picture.text(picture.left, 16 + 18 * number, f"{contestant}, × no_dp", color=color)
    return picture.svg()


def main() -> int:
    """Measure, and write the CSV and the pictures; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--workload", action="append", choices=WORKLOADS, required=True)
    parser.add_argument("--contestant", action="append", choices=CHOICES)
    parser.add_argument("--ranks", default="2", help="numbers of ranks, separated by commas")
    parser.add_argument("--replicas", type=int, default=1, help="copies of the model (HSDP)")
    args = parser.parse_args()
    sizes, has_failed = [int(size) for size in args.ranks.split(",")], False
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for name in args.workload:
            chosen = args.contestant or WORKLOADS[name].contestants
            names = [which for which in WORKLOADS[name].contestants if which in chosen]
            every = [measure(name, names, size, args.replicas) for size in sizes]
            has_failed |= not all(every)
            found = [row for rows_of_size in every for row in rows_of_size]
            for row in found:
                writer.writerow(row)
                print(*(f"{key}={row[key]}" for key in PRINTED), flush=True)
            file.flush()
            if len(sizes) > 1 and found:
                picture = args.csv.with_name(f"{args.csv.stem}_{name}.svg")
                picture.write_text(draw(name, found), encoding="utf-8")
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
