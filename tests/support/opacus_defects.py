"""Opacus's known defects, each the way a user walks into it: modes, and the conditions they need.

`main` is run in every rank, with the name of a part and a folder. The part `conditions` runs the
oracle, two modes of ours and Opacus under each condition, as the step loop does, and leaves
OUTPUT/CONDITION/MODE.npz, or MODE.txt with the error; then what the step loop has no place for:
replicas, and an empty batch on one rank. `empty-batch` is that of Opacus. The modes enter by
`--mode tests.support.opacus_defects:NAME` too.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from opacus_as_used import (
    Ghost,
    LossInsideTheModel,
    RootOnly,
    SummedLoss,
    TokensAsSamples,
    TwoBackwards,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from dpsgd_track.config import (
    CLIP,
    PLAIN,
    DataConfig,
    JobConfig,
    ModelConfig,
    PerformanceConfig,
    PrivacyConfig,
    RegimeConfig,
)
from dpsgd_track.distributed.sharding import LocalPart
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.opacus import OpacusMode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.loss import PerSampleLoss, causal_lm_loss, classification_loss
from dpsgd_track.privacy.noise import NoiseSource
from dpsgd_track.training.data import RankBatch
from dpsgd_track.training.loop import RegimeRun
from tests.support.torchrun_modes import largest_error, whole

CPU = torch.device("cpu")
T, VOCAB = 16, 61
OURS = ("flash_fsdp", "flash_fsdp_bk")
SIGMA = 0.7


class Replicas(Ghost):
    """HSDP: every rank a replica, with Opacus's own noise."""

    def shard(self, model: nn.Module) -> nn.Module:
        shape = (dist.get_world_size(), 1)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
        return fully_shard(model, mesh=mesh)


class SometimesShallow(nn.Module):
    """A classifier that leaves a layer out in batches that say so."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 12)
        self.extra = nn.Linear(12, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, input_ids: Tensor, is_shallow: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        if not is_shallow.all():
            x = x + self.extra(x)
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


class OneRow(nn.Module):
    """A classifier by one number: the head's weight has a single row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        score: Tensor = self.head(self.norm(self.embedding(input_ids)).mean(dim=1))
        return torch.cat([score, -score], dim=1)


class TwoRows(OneRow):
    """The same with a row for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.embedding(input_ids)).mean(dim=1))
        return logits


def _llama(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        pad_token_id=0,
        use_cache=False,
        **more,
    )


def _classifier(**more: Any) -> nn.Module:
    model: nn.Module = AutoModelForSequenceClassification.from_config(_llama(**more))
    return model


def _language_model(**more: Any) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_config(_llama(**more))
    return model


def _checkpointed() -> nn.Module:
    model: Any = _classifier()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found: nn.Module = model
    return found


def _tokens(index: int) -> Tensor:
    return torch.randint(1, VOCAB, (T,), generator=torch.Generator().manual_seed(index))


def _classes(indices: list[int], step: int) -> Batch:
    ids = torch.stack([_tokens(i) for i in indices])
    return Batch({"input_ids": ids}, torch.tensor(indices) % 2)


def _texts(indices: list[int], step: int) -> Batch:
    ids = torch.stack([_tokens(i) for i in indices])
    return Batch({"input_ids": ids}, ids)


def _left_padded(indices: list[int], step: int) -> Batch:
    """Mostly padding, and no mask."""
    batch = _classes(indices, step)
    batch.inputs["input_ids"][:, : T - 3] = 0
    return batch


def _shallow_at_last(indices: list[int], step: int) -> Batch:
    batch = _classes(indices, step)
    batch.inputs["is_shallow"] = torch.full((len(indices),), step > 0)
    return batch


def _same_everywhere(indices: list[int], step: int) -> Batch:
    """The step's one sample on every rank: the clipped sum is then W times its gradient."""
    return _classes([1000 + step] * len(indices), step)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a defect needs to show."""

    mode: type[OpacusMode] = Ghost
    model: Callable[[], nn.Module] = _classifier
    batch: Callable[[list[int], int], Batch] = _classes
    """(global indices of the samples, step) -> a micro-batch."""
    loss: PerSampleLoss = classification_loss
    batch_size: int = 3
    micro_batches: int = 1
    num_iter: int = 2
    sigma: float = 0.0
    param_dtype: str = "float32"


CONDITIONS = {
    "healthy": Condition(micro_batches=2, sigma=SIGMA),
    "loss-inside-the-model": Condition(mode=LossInsideTheModel),
    "tokens-as-samples": Condition(
        mode=TokensAsSamples, model=_language_model, batch=_texts, loss=causal_lm_loss, batch_size=1
    ),
    "tied-embeddings": Condition(
        mode=RootOnly,
        model=lambda: _language_model(tie_word_embeddings=True),
        batch=_texts,
        loss=causal_lm_loss,
    ),
    "two-backwards": Condition(mode=TwoBackwards, micro_batches=2),
    "summed-loss": Condition(mode=SummedLoss, sigma=SIGMA),
    "left-padding": Condition(batch=_left_padded),
    "skipped-layer": Condition(model=SometimesShallow, batch=_shallow_at_last),
    "checkpointing": Condition(model=_checkpointed),
    "one-row": Condition(model=OneRow),
    "bfloat16": Condition(batch=_same_everywhere, batch_size=1, num_iter=8, param_dtype="bfloat16"),
}


@dataclass(frozen=True)
class _Sampler:
    """Cuts steps as the tool's own does, out of a condition's samples."""

    condition: Condition
    population = None
    sizes = ()
    dataset = SimpleNamespace(num_tokens=T)

    @property
    def expected_batch_size(self) -> int:
        return self.condition.batch_size * self.condition.micro_batches * dist.get_world_size()

    def rank_batch(self, step: int) -> RankBatch:
        condition = self.condition
        share = condition.batch_size * condition.micro_batches
        first = step * self.expected_batch_size + dist.get_rank() * share
        indices = list(range(first, first + share))
        batches = [
            condition.batch(indices[at : at + condition.batch_size], step)
            for at in range(0, share, condition.batch_size)
        ]
        return RankBatch(tuple(indices), tuple(indices), tuple(batches))


class _Run(RegimeRun):
    """The step loop over a condition's model and samples."""

    def __init__(
        self, condition: Condition, mode: str, bounds: tuple[float, ...], replay: str = ""
    ) -> None:
        regime = RegimeConfig(
            name=CLIP,
            num_iter=condition.num_iter,
            micro_batches=condition.micro_batches,
            noise_multiplier=condition.sigma,
            max_grad_norms=bounds,
            noise_matched=True,
            replay=replay,
        )
        self.job = JobConfig(
            mode=mode,
            model=ModelConfig(name="made here"),
            data=DataConfig(seq_length=T, batch_size=condition.batch_size),
            performance=PerformanceConfig(param_dtype=condition.param_dtype),
            regimes=(regime,),
        )
        self.regime, self.device = regime, CPU
        self.sampler: Any = _Sampler(condition)
        torch.manual_seed(0)
        model = condition.model().train()
        self._begin(model, replace(self._context(model), loss=condition.loss), build_mode)


def run(condition: Condition, folder: Path) -> None:
    """Every mode under `condition`; an error must be one of all ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    oracle = _Run(condition, "reference", ())
    modes = {
        "reference (plain)": "reference",
        **{mode: mode for mode in OURS},
        "opacus": f"tests.support.opacus_defects:{condition.mode.__name__}",
    }
    _save(oracle, folder / "reference")
    for title, mode in modes.items():
        replay = PLAIN if title.endswith("(plain)") else ""
        try:
            found = _Run(condition, mode, oracle.max_grad_norms, replay)
            _save(found, folder / title)
        except Exception as error:
            (folder / f"{title}.txt").write_text(f"{type(error).__name__}: {error}")


def _save(found: _Run, path: Path) -> None:
    for _ in found.steps():
        pass
    if dist.get_rank() == 0:
        found.records[0].trajectory().save(path.with_name(f"{path.name}.npz"))


def _context(condition: Condition, *, num_replicas: int = 1) -> ModeContext:
    return ModeContext(
        privacy=PrivacyConfig(
            noise_multiplier=SIGMA,
            max_grad_norm=1e-2,
            expected_batch_size=condition.batch_size * dist.get_world_size(),
        ),
        device=CPU,
        param_dtype=torch.float32,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss=condition.loss,
        num_replicas=num_replicas,
    )


def _build(mode: str, condition: Condition, **more: int) -> Mode:
    torch.manual_seed(0)
    return build_mode(mode, condition.model(), _context(condition, **more))


def _clipped_sum(mode: Mode, batch: Batch) -> dict[str, Tensor]:
    """Whole, on every rank. The oracle takes no empty batch."""
    if len(batch) or not mode.replicated:
        mode.accumulate(batch)
    return whole(mode, mode.clipped_sum().gradients)


def empty_batch(modes: tuple[str, ...]) -> dict[str, Any]:
    """Error of the clipped sum where the last rank has no sample."""
    condition = Condition(model=TwoRows)
    batch = condition.batch([0, 1, 2], 0)
    if dist.get_rank() == dist.get_world_size() - 1:
        batch = Batch({name: t[:0] for name, t in batch.inputs.items()}, batch.targets[:0])
    wanted = _clipped_sum(_build("reference", condition), batch)
    return {
        mode: largest_error(_clipped_sum(_build(mode, condition), batch), wanted)[0]
        for mode in modes
    }


def _farthest(parts: list[LocalPart]) -> float:
    """Largest difference of a weight between two ranks that hold it whole."""
    weights = torch.cat([part.local.flatten() for part in parts])
    assert weights.numel() == sum(part.num_elements for part in parts)
    everyone = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, weights)
    return max((other - everyone[0]).abs().max().item() for other in everyone)


def replicas_of_ours(mode_name: str) -> float:
    """How far replicas are apart after a step with noise."""
    condition = Condition()
    mode = _build(mode_name, condition, num_replicas=dist.get_world_size())
    mode.accumulate(condition.batch([3 * dist.get_rank() + i for i in range(3)], 0))
    mode.privatize(mode.clipped_sum(), NoiseSource("0/common", 0))
    mode.step()
    return _farthest(mode.weight_parts())


def replicas_of_opacus(*, seed_by_rank: bool) -> float:
    """The same, where each rank seeded torch by its number or all alike."""
    condition = Condition(mode=Replicas)
    torch.manual_seed(0)
    mode = Replicas(condition.model(), _context(condition))
    mode.accumulate(condition.batch([3 * dist.get_rank() + i for i in range(3)], 0))
    torch.manual_seed(dist.get_rank() if seed_by_rank else 0)
    mode.optimizer.step()
    shards: list[Any] = [p.detach() for p in mode.model.parameters()]
    return _farthest([LocalPart("", s.to_local(), 0, s.numel()) for s in shards])


def _attempt(function: Callable[[], float]) -> float | str:
    """What `function` finds, or the error; it must be one of all ranks."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(part: str, folder: str) -> None:
    """Run a part, and leave what was found in `folder`."""
    output = Path(folder)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    if part == "conditions":
        for name, condition in CONDITIONS.items():
            run(condition, output / name)
        found: dict[str, Any] = {mode: _attempt(partial(replicas_of_ours, mode)) for mode in OURS}
        found["opacus"] = replicas_of_opacus(seed_by_rank=False)
        found["opacus, seed by rank"] = replicas_of_opacus(seed_by_rank=True)
        _write(output / "replicas.json", found)
        _write(output / "empty-batch.json", empty_batch(OURS))
    else:
        empty_batch(("tests.support.opacus_defects:Ghost",))
    dist.barrier()
    dist.destroy_process_group()


def _write(path: Path, found: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        path.write_text(json.dumps(found))
