"""Builds a mode from its name."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import nn

from dpsgd_track.config import require
from dpsgd_track.demands import Demand, declined_by
from dpsgd_track.modes.protocol import Mode, ModeContext, ModeFactory, ProtocolError
from dpsgd_track.modes.table import check_mode, factory_of, spec_of, split_planted

ModeBuilder = Callable[[str, nn.Module, ModeContext], Mode]
"""Takes a mode's name, the model and what the mode is built with."""


def build_mode(name: str, model: nn.Module, context: ModeContext) -> Mode:
    """The mode `name` over `model`.

    Args:
        name: a built-in mode, `opacus:GRAD_SAMPLE_MODE`, an entry point's name, or
            `package.module:factory`.
        model: unsharded, float32, on the context's device.
        context: settings of the mode.
    Raises:
        ValueError: the name is unknown, or the mode cannot clip one of the parameters.
        ProtocolError: a user's factory returned something else than a mode.
    """
    check_mode(name)
    # The table knows such a name, and what would be built is the healthy mode.
    require(not split_planted(name)[1], "mode", name, "a mode with nothing planted in it")
    spec = spec_of(name)
    if spec is None:
        factory = _user_factory(factory_of(name))
        _check_ties(name, factory, model)
        mode = factory(model, context)
        if not isinstance(mode, Mode):
            returned = type(mode).__name__
            raise ProtocolError(f"{name}: expected a Mode, and its factory returned {returned}.")
        return mode
    if spec.strategy == "one_by_one":
        from dpsgd_track.modes.reference import ReferenceMode

        return ReferenceMode(model, context)
    if spec.strategy == "opacus":
        # Opacus takes seconds to import, and other modes do not need it.
        from dpsgd_track.modes.opacus import OpacusMode

        return OpacusMode(spec.grad_sample_mode, model, context)
    from dpsgd_track.modes.composed import ComposedMode

    return ComposedMode(spec, model, context)


def _check_ties(name: str, factory: ModeFactory, model: nn.Module) -> None:
    if Demand.TIED_WEIGHTS not in declined_by(factory):
        return
    own = {id(parameter): first for first, parameter in model.named_parameters()}
    tied = [
        f"{again} is {own[id(parameter)]}"
        for again, parameter in model.named_parameters(remove_duplicate=False)
        if own[id(parameter)] != again
    ]
    advice = f"{'; '.join(tied)}. Choose another --model-name."
    kind = type(model).__name__
    require(
        not tied, "model", kind, f"one without tied weights, which {name} does not take", advice
    )


def _user_factory(name: str) -> ModeFactory:
    module_name, _, attribute = name.partition(":")
    factory = getattr(importlib.import_module(module_name), attribute, None)
    require(
        callable(factory),
        "mode",
        name,
        "package.module:factory",
        f"{module_name} has no callable {attribute!r}.",
    )
    checked: ModeFactory = factory  # type: ignore[assignment]
    return checked
