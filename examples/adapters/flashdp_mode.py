"""FlashDP on one rank; its torch path stands in for its Triton kernel, as in its own tuner.

Its noise is its own in the noise regime. Elsewhere it is 0, and the common noise is added instead.
"""

import flashdp.core.linear_clip as linear
import flashdp.core.transformers_conv1d_clip as conv1d
import torch
from flashdp import wrap_with_flashdp_layers
from transformers.pytorch_utils import Conv1D

from dpsgd_track.config import NOISE, kind_of
from dpsgd_track.modes.protocol import Mode
from dpsgd_track.privacy.clipping import SampleRecord

linear.bmtm_clip = linear._weight_grad_block_clip
conv1d.bmtm_clip = conv1d._weight_grad_block_clip


class FlashDP(Mode):
    replicated = True
    takes_empty_batches = False
    takes_several_ranks = False

    def __init__(self, model, context):
        super().__init__(context)
        self.is_noisy = kind_of(context.regime) == NOISE
        sigma = context.privacy.noise_multiplier if self.is_noisy else 0.0
        kinds = [torch.nn.Linear, Conv1D]
        self.model = wrap_with_flashdp_layers(
            model, target_modules=kinds, C=self.max_grad_norm, noise_multiplier=sigma
        )
        self.layers = [m for m in self.model.modules() if getattr(m, "dp", False)]
        for module in self.layers:
            if hasattr(module, "runtime_tuner"):
                module.runtime_tuner.enable = False
        self.private = {p for m in self.layers for p in m.parameters(recurse=False)}
        self.optimizer = context.make_optimizer(self.model.parameters())

    def set_max_grad_norm(self, max_grad_norm):
        super().set_max_grad_norm(max_grad_norm)
        for module in self.layers:
            module.C = max_grad_norm

    def accumulate(self, batch):
        before = {p: p.grad for p in self.model.parameters()}
        for parameter in before:
            parameter.grad = None
        loss_B = self.context.loss(batch.run(self.model), batch.targets)
        loss_B.sum().backward()
        for parameter, earlier in before.items():
            total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            # Its layers return the mean over the batch.
            total = total * len(batch) if parameter in self.private else total
            parameter.grad = total if earlier is None else earlier + total
        return SampleRecord(loss_B.detach())

    def privatize(self, clipped, source):
        if not self.is_noisy:
            return super().privatize(clipped, source)
        for gradient in clipped.gradients.values():
            gradient /= self.context.privacy.expected_batch_size
        return clipped.gradients
