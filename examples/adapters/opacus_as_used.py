"""Opacus under FSDP as it must not be used: nothing refuses these loops, or says they are wrong.

Each differs from Opacus's own examples in one thing that ordinary training allows.
"""

import opacus
from torch import nn
from torch.distributed.fsdp import fully_shard

from dpsgd_track.modes.opacus import OpacusMode


class Ghost(OpacusMode):
    """ghost_fsdp as Opacus's own examples run it."""

    def __init__(self, model, context):
        super().__init__("ghost_fsdp", model, context)


class LossInsideTheModel(Ghost):
    """`model(labels=...).loss.backward()`: Opacus's criterion, which clips, is never called."""

    def backward(self, batch):
        output = self.wrapped(**batch.inputs, labels=batch.targets)
        output.loss.backward()
        return self.context.loss(output.logits, batch.targets).detach()


class TokensAsSamples(Ghost):
    """The criterion of a language model, called on flattened tokens without `shape=`."""

    def backward(self, batch):
        logits = self.logits(batch)
        self.criterion.criterion = nn.CrossEntropyLoss()
        tokens = logits[:, :-1].flatten(0, 1), batch.targets[:, 1:].flatten()
        self.criterion(*tokens).backward()
        return self.context.loss(logits, batch.targets).detach()


class RootOnly(Ghost):
    """One FSDP2 unit for the whole model, whose tied weights Opacus then does not notice."""

    takes_tied_weights = True

    def shard(self, model):
        return fully_shard(model)


class TwoBackwards(Ghost):
    """Micro-batches by two backwards before a step, as without privacy."""

    def accumulate(self, batch):
        self.collect.is_due = False
        return super().accumulate(batch)


class SummedLoss(Ghost):
    """`loss_reduction="sum"`; the learning rate makes up for the sum."""

    def __init__(self, model, context):
        original = opacus.PrivacyEngine.make_private

        def make_private(engine, *, criterion, **settings):
            criterion.reduction = "sum"
            settings["loss_reduction"] = "sum"
            return original(engine, criterion=criterion, **settings)

        opacus.PrivacyEngine.make_private = make_private
        try:
            super().__init__(model, context)
        finally:
            opacus.PrivacyEngine.make_private = original

    def privatize(self, clipped, source):
        gradients = super().privatize(clipped, source)
        for gradient in gradients.values():
            gradient.mul_(self.world_size / self.context.privacy.expected_batch_size)
        return gradients
