"""Finds parameters that a module reads of modules inside it, without calling those.

DeBERTa's encoder takes the table of its embedding as it is, MobileBERT's head joins the weights of
two layers, and a loss of pairs scales by a parameter of CLIP. To `privacy.bare_parameters` such a
parameter is one of the reader's own: the reader runs on a row of it for each sample. Calls of the
module that owns it are captured as ever.

Likewise a layer without a rule that calls layers outside of it, as DoRA's magnitudes call the
adapters, cannot run on copies, as these calls are captured. It is to have a row of its parameters
for each sample as well.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dpsgd_track.privacy.bare_parameters import SpreadParameters
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.captured_layer import CapturedLayer
from dpsgd_track.privacy.layers.inventory import Layer, own_holders
from dpsgd_track.privacy.replaced_forward import ReplacedForward
from dpsgd_track.privacy.shared_rows import SIZES

_logger = logging.getLogger(__name__)


@torch.no_grad()
def find_strays(capture: Capture, run: Callable[[Any], Tensor], batch: Any) -> list[Layer]:
    """Modules that read parameters of modules inside them, as bare layers with their own, and
    layers without a rule that call others."""
    reads = _Reads(capture)
    modules = (m for m in capture.model.modules() if not isinstance(m, torch.jit.ScriptModule))
    try:
        with capture.attached([_Call(module, reads) for module in modules]), reads:
            run(batch)
    except Exception as error:
        # As of compiled code, which may take no mode.
        _logger.debug("Functions of parameters could not be observed: %s", error)
        return []
    return reads.readers()


def add_strays(capture: Capture, readers: list[Layer]) -> dict[str, CapturedLayer]:
    """Capture `readers`; returns the layers without a rule that had these parameters, or some."""
    before: dict[str, CapturedLayer] = {}
    for reader in readers:
        strays = {reader.names[name] for name in reader.strays}
        for fqn, captured in list(capture.captured.items()):
            layer = captured.layer
            is_own = layer.is_bare or fqn == reader.fqn
            if not is_own or strays.isdisjoint(layer.names.values()):
                continue
            before[fqn] = captured
            del capture.captured[fqn]
            left = {local: name for local, name in layer.names.items() if name not in strays}
            if left and layer.is_bare:
                capture.register(SpreadParameters(capture, replace(layer, names=left)))
        capture.register(SpreadParameters(capture, reader))
        _logger.debug("%s reads %s itself", reader.fqn or "the model", ", ".join(sorted(strays)))
    return before


class _Call(ReplacedForward):
    """Runs a module as it is, and notes that it is running."""

    def __init__(self, module: nn.Module, reads: _Reads) -> None:
        super().__init__(module)
        self.reads = reads

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output."""
        self.reads.enter(self.module)
        try:
            return self.original(*args, **kwargs)
        finally:
            self.reads.running.pop()


class _Reads(TorchFunctionMode):
    """Notes functions of trainable parameters that run outside of the layers that capture them."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self.capture = capture
        self.running: list[nn.Module] = []
        self._name_of = self._current_names()
        self._owners: dict[str, list[nn.Module]] = defaultdict(list)
        for captured in capture.captured.values():
            for name in captured.layer.names.values():
                self._owners[name].append(captured.module)
        self._scope: dict[str, list[nn.Module]] = {}
        """Modules, from the outermost on, that contain a parameter and run at all of its uses."""
        self._callers: dict[nn.Module, Layer] = {}
        """Layers without a rule that have called layers outside of them."""
        self._layers = {c.module: c.layer for c in capture.captured.values() if not c.layer.is_bare}

    def enter(self, module: nn.Module) -> None:
        """Note that a module begins to run."""
        if module in self._layers:
            for caller in self.running:
                layer = self._layers.get(caller)
                if layer is not None and not any(m is module for m in caller.modules()):
                    self._callers[caller] = layer
        self.running.append(module)
        if self.capture.is_sharded:
            # A parameter is another tensor once its unit is gathered.
            self._name_of = self._current_names()

    def _current_names(self) -> dict[int, str]:
        parameters = dict(self.capture.model.named_parameters())
        return {id(parameters[name]): name for name in self.capture.shapes}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function as it is."""
        kwargs = {} if kwargs is None else kwargs
        if func not in SIZES:
            for leaf in pytree.tree_leaves((args, kwargs)):
                name = self._name_of.get(id(leaf))
                if name is not None and self.running:
                    self._note(name, leaf)
        return func(*args, **kwargs)

    def _note(self, name: str, parameter: Tensor) -> None:
        if any(owner in self.running for owner in self._owners[name]):
            return
        containing = [m for m in self.running if any(p is parameter for p in m.parameters())]
        known = self._scope.setdefault(name, containing)
        self._scope[name] = [a for a, b in zip(known, containing, strict=False) if a is b]

    def readers(self) -> list[Layer]:
        """A bare layer for each module that reads parameters of others."""
        self._name_of = self._current_names()
        names_of: dict[nn.Module, set[str]] = defaultdict(set)
        for name, scope in self._scope.items():
            if scope:
                names_of[scope[-1]].add(name)
        callers = [
            replace(layer, is_bare=True, strays=frozenset(layer.names))
            for layer in self._callers.values()
            if layer.rule is None and _owns_all(layer)
        ]
        fqn_of = {module: fqn for fqn, module in self.capture.model.named_modules()}
        readers = [
            reader
            for module, names in names_of.items()
            if (reader := self._reader(fqn_of[module], module, names)) is not None
        ]
        return readers + callers

    def _reader(self, fqn: str, module: nn.Module, names: set[str]) -> Layer | None:
        captured = self.capture.captured.get(fqn)
        if captured is not None and not captured.layer.is_bare:
            return None
        local = {
            local: self._name_of[id(p)]
            for local, p in module.named_parameters()
            if self._name_of.get(id(p)) in names
        }
        own = {} if captured is None else captured.layer.names
        return Layer(fqn, module, None, own | local, is_bare=True, strays=frozenset(local))


def _owns_all(layer: Layer) -> bool:
    """True if the parameters of a layer are all its module's own, and no other module's."""
    own = {
        prefix + name
        for prefix, holder in own_holders(layer.module)
        for name, _ in holder.named_parameters(recurse=False)
    }
    return layer.names.keys() <= own
