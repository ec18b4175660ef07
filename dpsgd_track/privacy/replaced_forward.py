"""Temporary replacement of a module's forward."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dpsgd_track.privacy.uncompiled import prepare, uncompiled

Forward = Callable[..., Any]


class ReplacedForward(ABC):
    """Replaces a module's forward between `attach` and `detach`.

    Outside of that the module is unchanged, and a copy of it is an ordinary module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._own = vars(module)
        self._before: Forward | None = None
        self._first: Forward = module.forward
        self.original = self._first
        """The module's own forward."""
        self.traced: Forward | None = None
        """Runs in place of `call` while torch.compile traces the forward; None interrupts its
        graph."""

        @uncompiled
        def interrupt(*args: Any, **kwargs: Any) -> Any:
            return self.call(args, kwargs)

        @functools.wraps(self._first)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.traced is not None and torch.compiler.is_compiling():
                return self.traced(*args, **kwargs)
            return interrupt(*args, **kwargs)

        self._forward = forward
        self.interrupt: Forward = interrupt
        """Runs `call` outside of the compiler's graph."""

    @abstractmethod
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run in place of the module's own forward."""

    def attach(self) -> None:
        """Replace the module's forward."""
        prepare()
        self._before = self._own.get("forward")
        self.original = self._before or self._first
        self._own["forward"] = self._forward

    def detach(self) -> None:
        """Give the module its own forward back."""
        if self._before is None:
            del self._own["forward"]
        else:
            self._own["forward"] = self._before
