"""Code that torch.compile leaves as it is: it breaks its graph there, and calls it.

What captures per-sample gradients changes from batch to batch, and has to run in every one. Traced,
it would be built into a graph, or end in an error far from its cause.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

_call: Callable[..., Any] | None = None
"""Calls a function outside of the graph; None until torch's compiler has been imported."""


def prepare() -> None:
    """Have `uncompiled` functions ready for a forward, which may be compiled.

    The compiler takes seconds to import. Nothing is compiled before something else has done so.
    """
    global _call
    if _call is None and "torch._dynamo" in sys.modules:
        _call = torch.compiler.disable(lambda function, args, kwargs: function(*args, **kwargs))


def without_compiler() -> AbstractContextManager[object]:
    """Context in which compiled modules run as they are, and nothing is compiled."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    context: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return context


def uncompiled(function: _Function) -> _Function:
    """`function`, which is called as it is from compiled code."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and _call is not None:
            return _call(function, args, kwargs)
        return function(*args, **kwargs)

    return called  # type: ignore[return-value]
