"""Lists the modules that own a model's trainable parameters, and the rule of each."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dpsgd_track.distributed.sharding import transformer_blocks
from dpsgd_track.privacy.layers import LayerRule, find_rule

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """A module whose parameters' per-sample gradients are captured."""

    fqn: str
    module: nn.Module
    rule: LayerRule | None
    """None if no rule is exact for the module: it runs on per-sample copies of its parameters."""
    names: dict[str, str]
    """Fully qualified name of each trainable parameter, by its name in the module. A parameter
    that several modules share has its first name in all of them."""
    is_bare: bool = False
    """True if these are the module's own parameters only, and modules inside it are layers of their
    own. Without a rule, a layer includes them otherwise."""
    strays: frozenset[str] = frozenset()
    """Names of parameters of modules inside a bare layer that it reads itself."""


@dataclass(frozen=True)
class Unfit:
    """A part of a model that clipping per-sample gradients does not make private."""

    name: str
    """Fully qualified name of a module or parameter."""
    reason: str
    """The problem, and its remedy."""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


class UnfitModelError(ValueError):
    """A model has layers whose per-sample gradients would not be exact."""

    def __init__(self, parts: Sequence[Unfit], sentence: str) -> None:
        super().__init__(sentence)
        self.parts = tuple(parts)


def find_layers(model: nn.Module) -> list[Layer]:
    """Every module that owns trainable parameters, with its rule.

    A module without a rule includes the modules inside it, unless they are layers themselves.
    Parameters in a `ParameterDict` or `ParameterList`, which nothing calls, are of the module that
    holds it.

    Raises:
        UnfitModelError: naming every layer whose per-sample gradients would not be exact.
    """
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    rules = {m: _rule_of(m) for m in model.modules() if _is_layer(m)}
    ruled = {id(p) for m, rule in rules.items() if rule for p in _trained(m).values()}
    layers: list[Layer] = []
    problems = list(unfit_parts(model))
    included: set[nn.Module] = set()
    for fqn, module in model.named_modules():
        if module in included or module not in rules:
            continue
        own, rule, is_bare = _trained(module), rules[module], False
        if rule is None:
            if own and all(id(p) in ruled for p in own.values()):
                # Another name for the parameters of layers with rules. `Capture` refuses a batch
                # in which this module uses them.
                continue
            is_bare = _may_be_bare(module, own)
            if not is_bare:
                included.update(module.modules())
                own = {name: p for name, p in module.named_parameters() if p.requires_grad}
            if not own:
                continue
        names = {name: name_of[id(p)] for name, p in own.items()}
        problems += _hooked_weights(fqn, module)
        if isinstance(module, torch.jit.ScriptModule):
            problems.append(Unfit(fqn, "compiled by torch.jit; use the module it was made of"))
        layers.append(Layer(fqn, module, rule, names, is_bare))
    if problems:
        raise UnfitModelError(
            problems,
            f"model={type(model).__name__!r}: expected layers whose per-sample gradients are known "
            f"exactly. These can't be clipped: {'; '.join(map(str, problems))}. "
            "Freeze them, or use a mode that supports them.",
        )
    for layer in layers:
        has_formulas = is_recurrent(layer.module) or is_attention(layer.module)
        if layer.rule is None and not layer.is_bare and not has_formulas:
            _warn_of_copies(layer)
    return layers


def _may_be_bare(module: nn.Module, own: dict[str, nn.Parameter]) -> bool:
    """True if a module without a rule applies parameters beside layers inside it."""
    is_whole = is_parametrized(module) or is_attention(module)
    return bool(own) and not is_whole and _holds_layers(module)


def with_modules_inside(model: nn.Module, layer: Layer) -> Layer:
    """A bare layer together with the modules inside it."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    inside = layer.module.named_parameters()
    whole = Layer(
        layer.fqn, layer.module, None, {n: name_of[id(p)] for n, p in inside if p.requires_grad}
    )
    _warn_of_copies(whole)
    return whole


def holds_units(model: nn.Module, module: nn.Module) -> bool:
    """True if a module contains a transformer block or an FSDP2 unit."""
    blocks = set(transformer_blocks(model))
    inside = (m for m in module.modules() if m is not module)
    return any(m in blocks or isinstance(m, FSDPModule) for m in inside)


def own_holders(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The module, and what it keeps parameters in that nothing calls, each with its prefix."""
    yield prefix, module
    for name, child in module.named_children():
        if not _can_be_called(child):
            yield from own_holders(child, f"{prefix}{name}.")


def is_recurrent(module: nn.Module) -> bool:
    """True if `privacy.recurrent` computes what `module` does."""
    return type(module) in (nn.LSTM, nn.GRU, nn.RNN) and not getattr(module, "proj_size", 0)


def is_attention(module: nn.Module) -> bool:
    """True if `privacy.attention` computes what `module` does."""
    if type(module) is not nn.MultiheadAttention:
        return False
    return module.bias_k is None and module.bias_v is None and not module.add_zero_attn


def _warn_of_copies(layer: Layer) -> None:
    _logger.warning(
        "%s (%s) has no rule of its own: it runs on one copy of its parameters for each "
        "sample, which is exact, but slower and larger.",
        layer.fqn or "the model",
        type(layer.module).__name__,
    )


def _can_be_called(module: nn.Module) -> bool:
    """False for a module without a forward, such as a `ParameterDict`."""
    if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
        return True
    return type(module).forward is not nn.Module.forward


def _is_layer(module: nn.Module) -> bool:
    if is_attention(module):
        # It reads the weights of the layer inside it, which nothing calls.
        return any(parameter.requires_grad for parameter in module.parameters())
    return _can_be_called(module) and bool(_trained(module) or is_parametrized(module))


def _rule_of(module: nn.Module) -> LayerRule | None:
    """The rule of a module whose parameters are all its own."""
    own = module.named_parameters(recurse=False)
    own_trained = {name for name, parameter in own if parameter.requires_grad}
    return find_rule(module) if own_trained == _trained(module).keys() else None


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own trainable parameters, by their names in it."""
    return {
        prefix + name: parameter
        for prefix, holder in own_holders(module)
        for name, parameter in holder.named_parameters(recurse=False)
        if parameter.requires_grad
    }


def _holds_layers(module: nn.Module) -> bool:
    """True if modules inside of `module` have parameters of their own, trainable or not."""
    holders = {holder for _, holder in own_holders(module)}
    return any(m._parameters for m in module.modules() if m not in holders)


def mixes_samples(module: nn.Module, *, in_training: bool) -> bool:
    """True if `module` computes with, or keeps, statistics over the samples of a batch."""
    if isinstance(module, _BatchNorm):
        return in_training or not module.track_running_stats
    return isinstance(module, _InstanceNorm) and module.track_running_stats and in_training


def refuse_unfit(model: nn.Module) -> None:
    """Refuse a model that mixes samples or keeps data of them, whichever mode clips.

    Raises:
        ValueError: naming the layers.
    """
    problems = list(unfit_parts(model))
    if problems:
        raise ValueError(
            f"model={type(model).__name__!r}: expected one that treats each sample by itself. "
            f"These do not: {'; '.join(map(str, problems))}."
        )


def unfit_parts(model: nn.Module) -> Iterator[Unfit]:
    """Parts of a model that mix samples or keep data of them, and parameters without a gradient
    whose norm is known."""
    for fqn, module in model.named_modules():
        kind = type(module).__name__
        if mixes_samples(module, in_training=module.training):
            why = "mixes the samples of a batch, or keeps their statistics"
            yield Unfit(fqn, f"{kind} {why}; use GroupNorm, or its eval mode")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            yield Unfit(fqn, f"{kind} rescales the rows it looks up, for good; use max_norm=None")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_complex():
            yield Unfit(name, "complex")


def _hooked_weights(fqn: str, module: nn.Module) -> Iterator[Unfit]:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
            advice = "use torch.nn.utils.parametrizations, or torch.nn.utils.prune.remove"
            yield Unfit(fqn, f"a hook of {type(hook).__name__} computes its weight; {advice}")
