"""Run by torch.distributed.run: every mode against the oracle, errors written as JSON.

Usage: torchrun_modes.py OUTPUT DTYPE MODE...
"""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

from dpsgd_track.config import PrivacyConfig
from dpsgd_track.distributed.sharding import as_sharded
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.engine import Batch
from dpsgd_track.privacy.noise import NoiseSource

SIGMA = 0.7
# Sizes that are equal to no other, and that neither 2 nor 3 ranks divide.
T, MICRO, BATCH, VOCAB = 17, 2, 3, 97


def _models() -> dict[str, Any]:
    llama = LlamaConfig(
        hidden_size=40,
        intermediate_size=67,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        attention_bias=True,
        pad_token_id=0,
        use_cache=False,
    )
    bert = BertConfig(
        hidden_size=44,
        intermediate_size=71,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=19,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return {"llama": llama, "bert": bert}


def _build(config: Any, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).train()
    with torch.no_grad():
        # No parameter at its special starting value: zero biases and unit norms hide errors.
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return model.to(device)


def _batches(device: torch.device, is_bert: bool) -> list[Batch]:
    """This rank's micro-batches: ragged rows with repeated tokens, unlike on every rank."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(100 + rank)
    batches = []
    for _ in range(MICRO):
        ids = torch.randint(1, VOCAB, (BATCH, T), generator=generator)
        lengths = torch.randint(T // 2, T + 1, (BATCH, 1), generator=generator)
        mask = (torch.arange(T) < lengths).long()
        ids = ids * mask
        ids[:, 1] = ids[:, 0]
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs["position_ids"] = torch.arange(T).repeat(BATCH, 1)
        if is_bert:
            inputs["token_type_ids"] = torch.zeros_like(ids)
        target = torch.randint(0, 2, (BATCH,), generator=generator)
        batches.append(Batch({k: v.to(device) for k, v in inputs.items()}, target.to(device)))
    return batches


def _context(max_grad_norm: float, device: torch.device, dtype: torch.dtype) -> ModeContext:
    return ModeContext(
        privacy=PrivacyConfig(
            noise_multiplier=SIGMA,
            max_grad_norm=max_grad_norm,
            expected_batch_size=dist.get_world_size() * MICRO * BATCH,
        ),
        device=device,
        param_dtype=dtype,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )


def _whole(mode: Mode, shards: dict[str, Tensor]) -> dict[str, Tensor]:
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


def _run(mode: Mode, batches: list[Batch]) -> dict[str, Any]:
    # A discarded first step, as warm-up does: nothing of it may remain.
    mode.accumulate(batches[0])
    mode.clipped_sum()
    mode.zero_grad()
    records = [mode.accumulate(batch) for batch in batches]
    clipped = mode.clipped_sum()
    summed = _whole(mode, clipped.gradients)
    noised = _whole(mode, mode.privatize(clipped, NoiseSource("1/common", 0)))
    mode.step()
    mode.zero_grad()
    weights = _whole(mode, {p.name: p.local for p in mode.weight_parts()})
    return {
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


def _error(
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
    dist.init_process_group("nccl", device_id=device)
    return device


def _bounds(model: nn.Module, batches: list[Batch], device: torch.device) -> dict[str, float]:
    """C that clips none, some and all samples."""
    mode = build_mode("reference", copy.deepcopy(model), _context(1e30, device, torch.float32))
    norms = torch.cat([mode.accumulate(b).norm_B for b in batches])
    everyone = [torch.empty_like(norms) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, norms)
    everything = torch.cat(everyone)
    return {
        "none": 1e4,
        "mixed": everything.median().item(),
        "all": 0.4 * everything.min().item(),
    }


def main(output: str, dtype_name: str, modes: list[str]) -> None:
    warnings.simplefilter("ignore")
    device = _device()
    dtype = getattr(torch, dtype_name)
    rows = []
    for model_name, config in _models().items():
        model = _build(config, device)
        batches = _batches(device, model_name == "bert")
        for regime, bound in _bounds(model, batches, device).items():
            context = _context(bound, device, dtype)
            oracle = _run(build_mode("reference", copy.deepcopy(model), context), batches)
            for name in modes:
                found = _run(build_mode(name, copy.deepcopy(model), context), batches)
                rows.append(_row(model_name, regime, bound, name, found, oracle))
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def _row(
    model: str,
    regime: str,
    bound: float,
    mode: str,
    found: dict[str, Any],
    want: dict[str, Any],
) -> dict[str, Any]:
    norm_error = None
    if found["norm"] is not None:
        errors = torch.abs(found["norm"] - want["norm"]) / want["norm"]
        worst = errors.max()
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        norm_error = worst.item()
    clipped = (want["norm"] > bound).double().mean()
    dist.all_reduce(clipped)
    sum_error, sum_where = _error(found["sum"], want["sum"], want["terms"])
    return {
        "model": model,
        "regime": regime,
        "mode": mode,
        "clipped": clipped.item() / dist.get_world_size(),
        "norm_error": norm_error,
        "norm_dtype": found["norm_dtype"],
        "sum_error": sum_error,
        "sum_where": sum_where,
        "noised_error": _error(found["noised"], want["noised"])[0],
        "weights_error": _error(found["weights"], want["weights"])[0],
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
