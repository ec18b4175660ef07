"""private-transformers on one rank. Its sigma is 0; the common noise is added instead."""

import torch
from private_transformers import PrivacyEngine
from private_transformers.settings import ClippingMode

from dpsgd_track.modes.protocol import Mode
from dpsgd_track.privacy.clipping import SampleRecord


class Ghost(Mode):
    replicated = True
    takes_empty_batches = False
    takes_several_ranks = False
    clipping_mode = ClippingMode.ghost

    def __init__(self, model, context):
        super().__init__(context)
        self.model, size = model, context.privacy.expected_batch_size
        self.optimizer = context.make_optimizer(model.parameters())
        self.plain_step = self.optimizer.step
        self.engine = PrivacyEngine(
            model, batch_size=size, sample_size=100 * size, epochs=1, noise_multiplier=0.0,
            max_grad_norm=self.max_grad_norm, clipping_mode=self.clipping_mode,
            target_delta=1e-5, skip_checks=True, record_snr=False,
        )  # fmt: skip
        self.engine.attach(self.optimizer)

    def set_max_grad_norm(self, max_grad_norm):
        super().set_max_grad_norm(max_grad_norm)
        self.engine.max_grad_norm = max_grad_norm

    def accumulate(self, batch):
        loss_B = self.context.loss(batch.run(self.model), batch.targets)
        norms, coefficients = {}, self.engine.get_coef_sample

        def keep_norms():
            norms.update({n: p.norm_sample.clone() for n, p in self.engine.named_params})
            norms["factor"] = coefficients()
            return norms["factor"]

        self.engine.get_coef_sample = keep_norms
        self.optimizer.virtual_step(loss=loss_B)
        self.engine.get_coef_sample = coefficients
        factor_B = norms.pop("factor")
        norm_B = torch.stack(list(norms.values())).norm(2, dim=0)
        return SampleRecord(loss_B.detach(), norm_B, factor_B, norms)

    def clipped_sum(self):
        for _, parameter in self.engine.named_params:
            parameter.grad = parameter.summed_grad.clone()
        return super().clipped_sum()

    def step(self):
        self.plain_step()

    def zero_grad(self):
        self.engine.zero_grad()


class Default(Ghost):
    """With explicit gradients of each sample."""

    clipping_mode = ClippingMode.default

    def accumulate(self, batch):
        loss_B = self.context.loss(batch.run(self.model), batch.targets)
        seen, accumulate = [], self.engine._accumulate_summed_grad

        def keep_norms(**settings):
            seen.append(accumulate(**settings))
            return seen[0]

        self.engine._accumulate_summed_grad = keep_norms
        self.optimizer.virtual_step(loss=loss_B)
        self.engine._accumulate_summed_grad = accumulate
        return SampleRecord(loss_B.detach(), *seen[0])
