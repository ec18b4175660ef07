"""The probe: a small model with every feature that a known fault needs to show.

The user's model may hide a fault that another model would show. The probe has a biased linear layer
over several positions, repeated tokens, a padding index, a mask that it uses, ignored targets,
LayerNorm and RMSNorm, a head tied to the embedding, a module used twice, two linear layers whose
outputs are added, an unused parameter, and one with fewer rows than ranks. No two sizes are equal,
few have small divisors, and most are one above a power of two.

Shapes: B samples, T positions, D values of a position, H values inside a block, V tokens.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

NUM_TOKENS, MAX_LENGTH = 31, 23
D, H = 33, 65
_UNUSED = 7
_SPREAD = 0.1
"""Std of the noise on every initial parameter: zero biases and unit weights would hide errors."""
_OF_EMBEDDING = 0.3
"""Scale of the embedding's weights, which are standard normal by default."""


class _Block(nn.Module):
    """Mixes positions, then two layers added, then one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.left = nn.Linear(D, H, bias=False)
        self.right = nn.Linear(D, H)
        self.reused = nn.Linear(H, H)
        self.down = nn.Linear(H, D)

    def forward(self, x_BTD: Tensor, mask_BT1: Tensor) -> Tensor:
        h = self.norm(x_BTD)
        mean = (h * mask_BT1).sum(dim=1, keepdim=True) / mask_BT1.sum(dim=1, keepdim=True)
        # Padding takes part as a neighbour, so that the gradient of its row is zero only if it is
        # masked.
        around = mean + h.roll(1, dims=1)
        h = torch.tanh(self.left(h) + self.right(around))
        h = torch.tanh(self.reused(torch.tanh(self.reused(h))))
        out: Tensor = x_BTD + self.down(h)
        return out


class Probe(nn.Module):
    """Predicts tokens from those around them."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            vocab_size=NUM_TOKENS, pad_token_id=0, max_position_embeddings=MAX_LENGTH
        )
        self.embedding = nn.Embedding(NUM_TOKENS, D, padding_idx=0)
        self.position = nn.Embedding(MAX_LENGTH, D)
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.gate = nn.Linear(D, 1)
        self.unused = nn.Linear(D, _UNUSED)
        self.norm = nn.RMSNorm(D)
        self.head = nn.Linear(D, NUM_TOKENS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]; the mean over positions leaves out what is masked."""
        h = self.embedding(input_ids) + self.position(position_ids)
        mask_BT1 = attention_mask.to(h.dtype).unsqueeze(-1)
        for block in self.blocks:
            h = block(h, mask_BT1)
        logits: Tensor = self.head(self.norm(h) * torch.sigmoid(self.gate(h)))
        return logits

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, as transformers' models return it."""
        return self.embedding


def build_probe(*, seed: int, device: torch.device) -> nn.Module:
    """The probe, its weights a function of the seed alone, on `device`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Probe()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(_SPREAD * torch.randn_like(parameter))
            # As the tied head's weight, it would make overconfident predictions.
            model.embedding.weight.mul_(_OF_EMBEDDING)
    return model.to(device).train()
