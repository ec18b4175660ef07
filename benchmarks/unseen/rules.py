"""Modes that clip by another rule than the baseline, correctly."""

from __future__ import annotations

import torch
from core import Correct


class PerLayer(Correct):
    """Each layer is clipped by itself, at C / sqrt(number of layers), so that the whole is <= C."""

    def layers(self):
        """Names of the parameters of each layer."""
        found = {}
        for name in self.names:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def all_factors(self, factors, norms, gradients):
        """One factor for each layer; what is reported is the norm ratio of the whole."""
        layers = self.layers()
        bound = self.bound() / len(layers) ** 0.5
        self.of_layer = [
            {
                name: torch.clamp(bound / self.norm_of(gradient, names), max=1.0)
                for names in layers.values()
                for name in names
            }
            for gradient in gradients
        ]
        return factors

    def norm_of(self, gradient, names):
        return torch.stack([gradient[name].square().sum() for name in names]).sum().sqrt()

    def contribution(self, name, gradient, factor, index):
        return super().contribution(name, gradient, self.of_layer[index][name], index)
