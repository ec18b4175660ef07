"""Run in every rank: modes against the oracle on models of the zoo, errors as JSON."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from dpsgd_track.config import AUTO, GRADIENTS, PrivacyConfig
from dpsgd_track.distributed.reduction import Fsdp2Sharder
from dpsgd_track.distributed.sample_exchange import SampleExchange
from dpsgd_track.distributed.sharding import as_sharded, transformer_blocks
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.composed import ComposedMode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.table import takes_norm_plan
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.noise import NoiseSource
from tests.support.model_zoo import ZOO, batch, build

SIGMA = 0.7


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What one process group runs."""

    models: list[str]
    modes: list[str]
    cut: list[list[int]]
    """For each rank, the size of each micro-batch. The samples stay the same, however cut."""
    regimes: list[str]
    """none, mixed, all: which samples C clips."""
    dtype: str = "float32"
    replicas: int = 1
    is_checkpointing: bool = False
    is_compiled: bool = False
    """True if torch.compile has compiled every block, before the modes shard it."""
    is_sent_early: bool = False
    """True if per-sample gradients are sent while the backward runs."""
    budget: int | None = None
    """Bytes that modes of one backward keep, when they run once more within a budget."""


def model_of(spec: Spec, name: str, device: torch.device) -> nn.Module:
    model: Any = build(name).to(device)
    if spec.is_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def copy_of(spec: Spec, model: nn.Module) -> nn.Module:
    """The model that a mode runs."""
    copied = copy.deepcopy(model)
    if spec.is_compiled:
        torch.compiler.reset()
        counters.clear()
        for block in transformer_blocks(copied):
            # The graphs of forward and backward are formed as for any compiler, and then run as
            # they are.
            block.compile(backend="aot_eager")
    return copied


def batches_of(spec: Spec, name: str, device: torch.device) -> list[Batch]:
    """This rank's micro-batches out of the common samples."""
    sizes = [size for cells in spec.cut for size in cells]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    everything = batch(name, sum(sizes), seed=1)
    first = dist.get_rank() * len(spec.cut[0])
    mine = zip(ends, sizes, strict=True)
    cells = [slice(end - size, end) for end, size in mine][first : first + len(spec.cut[0])]

    def pick(t: Tensor, cell: slice) -> Tensor:
        return t[cell].to(device)

    return [
        Batch(
            {key: pick(t, cell) for key, t in everything.inputs.items()},
            pick(everything.targets, cell),
            args=tuple(pick(t, cell) for t in everything.args),
        )
        for cell in cells
    ]


def context_of(spec: Spec, name: str, max_grad_norm: float, device: torch.device) -> ModeContext:
    return ModeContext(
        privacy=PrivacyConfig(
            noise_multiplier=SIGMA,
            max_grad_norm=max_grad_norm,
            expected_batch_size=sum(map(sum, spec.cut)),
        ),
        device=device,
        param_dtype=getattr(torch, spec.dtype),
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss=ZOO[name].loss,
        num_replicas=spec.replicas,
    )


def _runs(spec: Spec) -> list[tuple[str, int | None]]:
    """Modes, and the budget of each."""
    budgeted = ("flash_fsdp_bk", "flash_fsdp_fuse_bk")  # one of each way to watch
    within = [mode for mode in budgeted if spec.budget and mode in spec.modes]
    return [(mode, None) for mode in spec.modes] + [(mode, spec.budget) for mode in within]


def _planned(spec: Spec, context: ModeContext, mode: str, regime: str) -> ModeContext:
    """`context` with what a mode would keep of larger models, but where it clips some samples."""
    is_large = regime != "mixed" or spec.is_sent_early
    keeps_gradients = is_large and takes_norm_plan(mode, GRADIENTS)
    return replace(context, norm_plan=GRADIENTS if keeps_gradients else AUTO)


def _count_sent(spec: Spec, mode: Mode) -> Callable[[], int]:
    """Have a mode send gradients early, if the spec says so; counts batches that did."""
    sharder = mode.engine.sharder if isinstance(mode, ComposedMode) else None
    if not isinstance(sharder, Fsdp2Sharder) or not spec.is_sent_early:
        return lambda: 0
    # As of larger models on GPUs.
    sharder.sends_samples, sharder.min_operations, sharder.max_bytes = True, 0, 64
    offers, offer = [], sharder.offer

    def offer_and_note(*args: Any) -> SampleExchange | None:
        offers.append(offer(*args))
        return offers[-1]

    sharder.offer = offer_and_note  # type: ignore[method-assign]
    return lambda: sum(exchange is not None and exchange.num_samples > 0 for exchange in offers)


def whole(mode: Mode, shards: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, parameter in mode.model.named_parameters():
        local = shards[name].detach().double().clone()
        if isinstance(parameter, DTensor):
            local = as_sharded(local, parameter).full_tensor()
        found[name] = local
    return found


def _terms(records: list[SampleRecord]) -> dict[str, Tensor]:
    """sum_i c_i ||g_i|| of each parameter over all ranks, where the mode tells."""
    terms: dict[str, Tensor] = {}
    for record in records:
        for name, norm_B in (record.norm_by_parameter_B or {}).items():
            assert record.clip_factor_B is not None
            clipped = (record.clip_factor_B * norm_B).sum().double()
            terms[name] = terms.get(name, torch.zeros_like(clipped)) + clipped
    for term in terms.values():
        dist.all_reduce(term)
    return terms


def _share_dropped(mode: Mode) -> float:
    """Fraction of the parameters that the last batch has dropped to keep to the budget."""
    capture = mode.engine.capture if isinstance(mode, ComposedMode) else None
    return len(capture.split.dropped) / len(capture.shapes) if capture is not None else 0.0


def one_step(mode: Mode, batches: list[Batch]) -> dict[str, Any]:
    # A discarded first step, as warm-up does: nothing of it may remain.
    mode.accumulate(batches[0])
    mode.clipped_sum()
    mode.zero_grad()
    records, dropped = [], []
    for micro_batch in batches:
        records.append(mode.accumulate(micro_batch))
        dropped.append(_share_dropped(mode))
    clipped = mode.clipped_sum()
    summed = whole(mode, clipped.gradients)
    noised = whole(mode, mode.privatize(clipped, NoiseSource("1/common", 0)))
    mode.step()
    mode.zero_grad()
    weights = whole(mode, {p.name: p.local for p in mode.weight_parts()})
    return {
        "dropped": dropped,
        "loss": torch.cat([r.loss_B.double() for r in records]),
        "norm": None
        if records[0].norm_B is None
        else torch.cat([r.norm_B.double() for r in records if r.norm_B is not None]),
        "norm_dtype": None if records[0].norm_B is None else str(records[0].norm_B.dtype),
        "sum": summed,
        "terms": _terms(records),
        "noised": noised,
        "weights": weights,
    }


def largest_error(
    found: dict[str, Tensor], wanted: dict[str, Tensor], terms: dict[str, Tensor] | None = None
) -> tuple[float, str]:
    """Largest relative error over parameters, and where.

    A gradient that is zero by symmetry (a key's bias under softmax) holds rounding alone: none is
    measured against less than a hundredth of the whole. And where samples cancel (a classifier's
    bias adds up p - y), what is left holds the rounding of its terms: none is measured against
    less than a tenth of `terms`, the sum of the clipped samples' norms.
    """
    total = torch.stack([w.norm() for w in wanted.values()]).norm()
    errors = {}
    for name, w in wanted.items():
        least = 1e-2 * total if terms is None else torch.maximum(1e-2 * total, 0.1 * terms[name])
        errors[name] = ((found[name] - w).norm() / torch.maximum(w.norm(), least)).item()
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def _device() -> torch.device:
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.device_count() < local_size:
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # Convolutions round to 10 bits by default.
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group("nccl", device_id=device)
    return device


def bounds(oracle: Mode, batches: list[Batch]) -> dict[str, float]:
    """C that clips none, some and all samples."""
    norms = torch.cat([oracle.accumulate(b).norm_B for b in batches])
    oracle.zero_grad()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, norms.tolist())
    everything = torch.tensor([norm for part in everyone for norm in part], dtype=torch.float64)
    return {
        "none": 1e4,
        "mixed": everything.median().item(),
        "all": 0.4 * everything[everything > 0].min().item(),
    }


def main(output: str, spec_json: str) -> None:
    """Run a `Spec`, given as JSON."""
    spec = Spec(**json.loads(spec_json))
    warnings.simplefilter("ignore")
    device = _device()
    rows = []
    for name in spec.models:
        model = model_of(spec, name, device)
        batches = batches_of(spec, name, device)
        oracle = build_mode("reference", copy.deepcopy(model), context_of(spec, name, 1e30, device))
        for regime, bound in bounds(oracle, batches).items():
            if regime not in spec.regimes:
                continue
            context = context_of(spec, name, bound, device)
            wanted = one_step(build_mode("reference", copy.deepcopy(model), context), batches)
            for mode, budget in _runs(spec):
                try:
                    planned = replace(_planned(spec, context, mode, regime), memory_budget=budget)
                    built = build_mode(mode, copy_of(spec, model), planned)
                    num_sent = _count_sent(spec, built)
                    found = one_step(built, batches)
                except Exception as error:  # one of all ranks, or the group hangs
                    refused = {"model": name, "regime": regime, "mode": mode, "error": str(error)}
                    rows.append(refused)
                else:
                    row = row_of(name, regime, bound, mode, found, wanted)
                    rows.append(row | {"budget": budget, "dropped": found["dropped"]})
                    rows[-1]["num_sent"] = num_sent()
                    rows[-1]["num_breaks"] = sum(counters["graph_break"].values())
                    rows[-1]["num_graphs"] = counters["stats"]["unique_graphs"]
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def row_of(
    model: str,
    regime: str,
    bound: float,
    mode: str,
    found: dict[str, Any],
    want: dict[str, Any],
) -> dict[str, Any]:
    norm_error = None
    if found["norm"] is not None:
        # A sample without targets has a gradient of zero.
        norm_error = _largest((found["norm"] - want["norm"]).abs() / want["norm"].clamp(min=1e-9))
    # A gradient of zero cannot be clipped, and is not counted.
    counts = torch.stack([(want["norm"] > bound).sum(), (want["norm"] > 0).sum()])
    dist.all_reduce(counts)
    sum_error, sum_where = largest_error(found["sum"], want["sum"], want["terms"])
    return {
        "model": model,
        "regime": regime,
        "mode": mode,
        "clipped": (counts[0] / counts[1]).item(),
        "loss_error": _largest((found["loss"] - want["loss"]).abs()),
        "norm_error": norm_error,
        "norm_dtype": found["norm_dtype"],
        "sum_error": sum_error,
        "sum_where": sum_where,
        "noised_error": largest_error(found["noised"], want["noised"])[0],
        "weights_error": largest_error(found["weights"], want["weights"])[0],
    }


def _largest(errors: Tensor) -> float:
    """Over all ranks' samples; a rank may have none."""
    worst = torch.cat([errors, errors.new_zeros(1)]).max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item()
