"""Our own modes: a norm rule, a pass strategy and a sharding, put together from the table."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from dpsgd_track.distributed.sharding import Fsdp2Sharder, shard_fsdp2
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.modes.table import ModeSpec
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.clipping import ClippedSum, SampleRecord
from dpsgd_track.privacy.engine import Batch, Engine
from dpsgd_track.privacy.fused_linear import connect, fuse_linears
from dpsgd_track.privacy.norms import NORM_RULES
from dpsgd_track.privacy.strategies import STRATEGIES


class ComposedMode(Mode):
    """A mode as its line in the table says."""

    def __init__(self, spec: ModeSpec, model: nn.Module, context: ModeContext) -> None:
        super().__init__(context)
        self.clips = spec.is_private
        capture = _capture(spec, model) if spec.is_private else None
        mesh = init_device_mesh(context.device.type, (dist.get_world_size(),))
        shard_fsdp2(model, mesh, context.param_dtype)
        self.model = model
        self.optimizer = context.make_optimizer(model.parameters())
        self.engine = Engine(model, Fsdp2Sharder(model), self.max_grad_norm, context.loss, capture)
        self.strategy = STRATEGIES[spec.strategy]

    def accumulate(self, batch: Batch) -> SampleRecord:
        """Add one micro-batch's clipped gradients."""
        return self.strategy(self.engine, batch)

    def set_max_grad_norm(self, max_grad_norm: float) -> None:
        """Clip at another C from the next micro-batch on."""
        super().set_max_grad_norm(max_grad_norm)
        self.engine.max_grad_norm = max_grad_norm

    def clipped_sum(self) -> ClippedSum:
        """The clipped sum; unbounded for the baseline, unless its test lends it C for the noise."""
        clipped = super().clipped_sum()
        if self.clips or self.context.privacy.noise_multiplier > 0:
            return clipped
        return ClippedSum(clipped.gradients, math.inf)


def _capture(spec: ModeSpec, model: nn.Module) -> Capture:
    rule = NORM_RULES[spec.norm_rule]
    if rule.fuses_linear:
        fuse_linears(model)
    capture = Capture(model, rule, keep=spec.strategy == "bookkeeping")
    connect(model, capture)
    return capture
