"""fastDP on one rank.

It adds its noise in the backward. Here its sigma is 0, and the common noise is added afterwards.
"""

import torch
from fastDP import PrivacyEngine
from fastDP import autograd_grad_sample as hooks
from fastDP import supported_layers_grad_samplers as samplers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dpsgd_track.modes.protocol import Mode
from dpsgd_track.privacy.clipping import SampleRecord

_SETTINGS = (
    *("loss_reduction", "clipping_mode", "clipping_style", "clipping_fn", "bias_only"),
    *("block_heads", "named_params", "named_layers", "numerical_stability_constant"),
)
_norms = {}
_clip = hooks._per_block_clip_grad


def _keep_norms(layer, named_params, *rest):
    # fastDP drops a sample's norms as soon as it has clipped.
    _norms.update({n: p.norm_sample.clone() for n, p in named_params if hasattr(p, "norm_sample")})
    return _clip(layer, named_params, *rest)


hooks._per_block_clip_grad = _keep_norms


class FastDP(Mode):
    replicated = True
    takes_empty_batches = False
    takes_several_ranks = False
    clipping_mode = "MixOpt"

    def __init__(self, model, context):
        super().__init__(context)
        self.model, size = model, context.privacy.expected_batch_size
        self.engine = PrivacyEngine(
            model, batch_size=size, sample_size=100 * size, epochs=1, noise_multiplier=0.0,
            max_grad_norm=self.max_grad_norm, clipping_fn="Abadi", loss_reduction="sum",
            clipping_mode=self.clipping_mode, target_delta=1e-5,
        )  # fmt: skip
        self.optimizer = context.make_optimizer(model.parameters())

    def set_max_grad_norm(self, max_grad_norm):
        super().set_max_grad_norm(max_grad_norm)
        # The engine has bound its C into hooks: they are made anew.
        hooks.remove_hooks(self.model)
        settings = {name: getattr(self.engine, name) for name in _SETTINGS}
        hooks.add_hooks(self.model, max_grad_norm_layerwise=max_grad_norm, **settings)

    def accumulate(self, batch):
        _norms.clear()
        loss_B = self.context.loss(batch.run(self.model), batch.targets)
        loss_B.sum().backward()
        norm_B = torch.stack(list(_norms.values())).norm(2, dim=0)
        factor_B = (self.max_grad_norm / (norm_B + 1e-6)).clamp(max=1.0)
        for parameter in self.model.parameters():
            total = getattr(parameter, "private_grad", None)
            parameter.grad = torch.zeros_like(parameter) if total is None else total.clone()
        return SampleRecord(loss_B.detach(), norm_B, factor_B, dict(_norms))

    def zero_grad(self):
        super().zero_grad()
        for parameter in self.model.parameters():
            if hasattr(parameter, "private_grad"):
                del parameter.private_grad


class FastDPGhost(FastDP):
    clipping_mode = "ghost"


class FastDPRms(FastDP):
    """With fastDP's own sampler of T5's norm for Llama's, which computes the same."""

    def __init__(self, model, context):
        samplers._supported_layers_norm_sample_AND_clipping[LlamaRMSNorm] = (
            samplers._compute_t5_layer_norm_grad_sample,
            samplers._clip_t5_layer_norm_grad,
        )
        super().__init__(model, context)
