"""This package's modes: compositions of a norm rule, a pass strategy and a sharding."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dpsgd_track.config import PER_LAYER
from dpsgd_track.distributed.reduction import Fsdp2Sharder, GradientSharder, LocalSharder
from dpsgd_track.distributed.sharding import as_local, build_mesh, shard_fsdp2, sum_gradients
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.table import ModeSpec
from dpsgd_track.privacy.bare_parameters import SpreadParameters
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer, WatchedLayer
from dpsgd_track.privacy.clipping import ClippedSum, SampleRecord
from dpsgd_track.privacy.engine import Engine
from dpsgd_track.privacy.expanded import ExpandedLayer
from dpsgd_track.privacy.fused_linear import FusedLayer, can_fuse
from dpsgd_track.privacy.memory_budget import MemoryBudget
from dpsgd_track.privacy.norms import NORM_RULES
from dpsgd_track.privacy.per_sample_weights import RmsNormPerSample, takes_weight_per_sample
from dpsgd_track.privacy.replay import Replays
from dpsgd_track.privacy.strategies import LAYER_BY_LAYER, STRATEGIES, WITHIN_BUDGET

_ONE_PASS, _TWO_PASS = "bookkeeping", "two_pass"


class ComposedMode(Mode):
    """A mode composed as its line in the table says."""

    is_atomic = True

    def __init__(self, spec: ModeSpec, model: nn.Module, context: ModeContext) -> None:
        super().__init__(context)
        self.clips = spec.is_private
        self.model = model
        is_by_layer = spec.is_private and context.privacy.clipping == PER_LAYER
        strategy = LAYER_BY_LAYER if is_by_layer else spec.strategy
        if strategy == _ONE_PASS and context.memory_budget is not None:
            strategy = WITHIN_BUDGET if context.memory_budget else _TWO_PASS
        capture, late = (
            _capture(spec, model, context, strategy) if spec.is_private else (None, frozenset())
        )
        sharder = self._shard(spec, late)
        self.optimizer = context.make_optimizer(model.parameters())
        self.engine = Engine(
            model,
            sharder,
            self.max_grad_norm,
            context.loss,
            STRATEGIES[strategy],
            capture,
            context.privacy.clipping,
        )
        # FSDP2 rounds parameters itself.
        if not isinstance(model, FSDPModule) and context.param_dtype.itemsize < 4:
            self.engine.rounded_dtype = context.param_dtype
            if capture is not None:
                capture.has_copies = True
        self.replays = Replays(self.engine) if context.capture else None
        """Records batches as CUDA graphs and replays them, if the mode was built so."""
        # Computed now, while no parameter is gathered.
        assert self._layouts is not None

    def accumulate(self, batch: Batch) -> SampleRecord:
        """Add one micro-batch's clipped gradients; an empty one takes part and adds nothing."""
        record = (self.replays or self.engine).add(batch)
        self.note_bound()
        return record

    def set_max_grad_norm(self, max_grad_norm: float) -> None:
        """Clip at another C from the next micro-batch on."""
        super().set_max_grad_norm(max_grad_norm)
        self.engine.max_grad_norm = max_grad_norm

    def clipped_sum(self) -> ClippedSum:
        """The clipped sum. The baseline's sensitivity is infinite, or C if a test adds noise to it.

        Raises:
            RuntimeError: `.grad` has a gradient from a backward outside of the mode.
        """
        if not self.clips:
            clipped = super().clipped_sum()
            has_bound = self.context.privacy.noise_multiplier > 0
            return clipped if has_bound else replace(clipped, sensitivity=math.inf)
        sums = self.engine.sharder.sums
        for layout, parameter in self._layouts:
            _refuse_unclipped(layout.name, parameter)
            if layout.name not in sums:
                sums[layout.name] = torch.zeros_like(as_local(parameter))
        return ClippedSum(dict(sums), self.sensitivity)

    def zero_grad(self) -> None:
        """Drop the step's gradients."""
        self.engine.sharder.sums.clear()
        super().zero_grad()

    def norm_plan(self) -> dict[str, str]:
        """Plan for the norm of each linear layer's weight so far."""
        capture = self.engine.capture
        return capture.norm_planner.summary() if capture is not None else {}

    def _shard(self, spec: ModeSpec, late: frozenset[str]) -> GradientSharder:
        context = self.context
        if spec.sharding == "none":
            return LocalSharder(self.model)
        if isinstance(self.model, FSDPModule):
            # Sharded already, in units of the user's choice.
            sum_gradients(self.model)
        else:
            mesh = build_mesh(context.device, context.num_replicas)
            shard_fsdp2(self.model, mesh, context.param_dtype)
        return Fsdp2Sharder(self.model, late)


def _capture(
    spec: ModeSpec, model: nn.Module, context: ModeContext, strategy: str
) -> tuple[Capture, frozenset[str]]:
    """The capture, and the parameters whose gradients arrive at the end of a backward."""
    rule = NORM_RULES[spec.norm_rule]
    budget = None
    if strategy == WITHIN_BUDGET:
        assert context.memory_budget is not None
        budget = MemoryBudget(context.memory_budget)
    keep = spec.strategy == _ONE_PASS and strategy != _TWO_PASS
    capture = Capture(model, rule, keep=keep, norm_plan=context.norm_plan, budget=budget)
    late: set[str] = set()
    for layer in capture.layers:
        kind: type[CapturedLayer] = WatchedLayer
        if layer.is_bare:
            kind = SpreadParameters
        elif layer.rule is None:
            kind = ExpandedLayer
        elif rule.is_fused and can_fuse(layer):
            kind = FusedLayer
        elif takes_weight_per_sample(layer):
            kind = RmsNormPerSample
        capture.register(kind(capture, layer))
        if kind in (SpreadParameters, ExpandedLayer, RmsNormPerSample):
            late.update(layer.names.values())
    return capture, frozenset(late)


def _refuse_unclipped(name: str, parameter: nn.Parameter) -> None:
    if parameter.grad is not None and bool(as_local(parameter.grad).any()):
        raise RuntimeError(
            f"{name}: expected no gradient but the mode's own, found one in .grad. A backward of "
            "another loss has left it there, and it is not clipped."
        )
