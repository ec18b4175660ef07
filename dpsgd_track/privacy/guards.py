"""What a private model must not change once it was made private, looked at in every batch.

Everything here is a comparison of identities, flags and version counters: some microseconds a
hundred modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dpsgd_track.privacy.layers.inventory import mixes_samples


class ModelGuard:
    """A model as it was when it was made private."""

    def __init__(self, model: nn.Module) -> None:
        is_sharded = any(isinstance(module, FSDPModule) for module in model.modules())
        named = list(model.named_modules())
        self._children = [(fqn, m._modules, _ids(m._modules)) for fqn, m in named]
        # FSDP2 puts other tensors into their place as it goes.
        ids = (lambda own: tuple(own)) if is_sharded else _ids
        self._own = [(fqn, m._parameters, ids(m._parameters)) for fqn, m in named]
        self._ids_of_own = ids
        self._requires_grad = [(n, p, p.requires_grad) for n, p in model.named_parameters()]
        self._buffers = [(fqn, m._buffers) for fqn, m in named if m._buffers]
        self._mixing = [(fqn, m) for fqn, m in named if mixes_samples(m, in_training=True)]

    def check(self) -> None:
        """Compare the model with what it was.

        Raises:
            ValueError: naming the module or parameter that has changed.
        """
        for fqn, children, ids in self._children:
            if _ids(children) != ids:
                _refuse(fqn or "model", "modules as they were", "one replaced, added or taken out")
        for fqn, own, ids in self._own:
            if self._ids_of_own(own) != ids:
                _refuse(fqn or "model", "parameters as they were", "others")
        for name, parameter, requires_grad in self._requires_grad:
            if parameter.requires_grad != requires_grad:
                _refuse(name, f"requires_grad={requires_grad}", str(not requires_grad))
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise ValueError(
                    f"{name}: expected no hook on the gradient of a parameter, got one. It would "
                    "not see the clipped sum. Remove it."
                )
        for fqn, module in self._mixing:
            if mixes_samples(module, in_training=module.training):
                raise ValueError(
                    f"{fqn}: expected {type(module).__name__} in its eval mode, got it in training "
                    "mode, where it mixes the samples of a batch or keeps their statistics. Call "
                    "its eval() after model.train(), or use GroupNorm."
                )

    @contextmanager
    def watching_forward(self) -> Iterator[None]:
        """Within it, a batch runs.

        Raises:
            ValueError: it has written into a buffer or a parameter of the model, past clipping and
                noise.
        """
        before = list(self._versions())
        yield
        for (name, tensor, version), (_, now, version_now) in zip(
            before, self._versions(), strict=True
        ):
            if tensor is not now or version != version_now:
                raise ValueError(
                    f"{name}: expected a forward that leaves the model as it is, got one that "
                    "writes into it. What it keeps of the samples is neither clipped nor covered "
                    "by noise. Freeze the statistics (track_running_stats=False, max_norm=None, "
                    "eval mode), or keep them outside of the model."
                )

    def _versions(self) -> Iterator[tuple[str, Tensor, int]]:
        for name, parameter, _ in self._requires_grad:
            yield name, parameter, parameter._version
        for fqn, buffers in self._buffers:
            for name, buffer in buffers.items():
                if buffer is not None:
                    yield f"{fqn}.{name}" if fqn else name, buffer, buffer._version


def _ids(values: dict[str, Any]) -> tuple[int, ...]:
    return tuple(map(id, values.values()))


def _refuse(where: str, expected: str, got: str) -> None:
    raise ValueError(
        f"{where}: expected {expected} when the model was made private, got {got}. Call "
        "make_private again after such a change: it goes on from what was spent."
    )
