"""What a fault is, and how one is planted in a mode.

A fault is a few lines that replace what happens at one or two *seams*: named places of a step.
Some seams every mode has, because the protocol names them; the others belong to our own engine.
Nothing of a mode's code is touched, and everything is as it was once the fault is taken out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.config import require
from dpsgd_track.modes.protocol import Mode
from dpsgd_track.modes.table import spec_of
from dpsgd_track.record.stages import Stage

Wrapper = Callable[..., Any]
"""Takes what it replaces, and then that one's own arguments."""

MODE_SEAMS = {
    "accumulate": "a micro-batch's forward, backward and clipping",
    "set_max_grad_norm": "another C",
    "clipped_sum": "the sum over micro-batches and ranks",
    "privatize": "noise and division",
    "step": "the optimizer's step",
    "zero_grad": "the end of a step",
}
"""Methods of the protocol, which every mode has."""

PROTOCOL_SEAMS = {
    "add_noise": ("dpsgd_track.modes.protocol", "add_noise"),
    "standard_normal": ("dpsgd_track.privacy.noise", "NoiseSource.standard_normal"),
}
"""What every mode comes by that leaves `Mode.privatize` as it is."""

ENGINE_SEAMS = {
    "loss": ("mode", "engine.loss"),
    "run_norms": ("mode", "engine.capture.run_norms"),
    "norm_sq_of": ("mode", "engine.capture.norms_of"),
    "clip": ("mode", "engine.clip"),
    "sum_of": ("mode", "engine.capture.sums_of"),
    "put": ("mode", "engine.put"),
    "linear_terms": ("dpsgd_track.privacy.layers", "linear.terms"),
    "embedding_terms": ("dpsgd_track.privacy.layers", "embedding.terms"),
    "layer_norm_terms": ("dpsgd_track.privacy.layers", "layer_norm.terms"),
    "rms_norm_terms": ("dpsgd_track.privacy.layers", "rms_norm.terms"),
    "fused_backward": ("dpsgd_track.privacy.fused_linear", "_FusedLinear.backward"),
    "join": ("dpsgd_track.privacy.capture", "join"),
    "rows_norm_sq": ("dpsgd_track.privacy.terms", "Rows.norm_sq"),
    "rows_sum": ("dpsgd_track.privacy.terms", "Rows.clipped_sum"),
    "total_norm": ("dpsgd_track.privacy.engine", "total_norm"),
    "clip_factors": ("dpsgd_track.privacy.engine", "clip_factors"),
    "reduce_scatter": ("dpsgd_track.distributed.reduction", "_reduce_scatter"),
    "padded_rows": ("dpsgd_track.distributed.reduction", "_padded_rows"),
}
"""Places inside our own engine: (`mode` or a module, what lies there)."""


def _norms_one_by_one(wrapper: Wrapper) -> Wrapper:
    def norms_of(original: Any, joined: Mapping[str, Any]) -> dict[str, Tensor]:
        def norm_sq_of(name: str, terms: Any) -> Tensor:
            found: Tensor = original({name: terms})[name]
            return found

        return {name: wrapper(norm_sq_of, name, terms) for name, terms in joined.items()}

    return norms_of


def _sums_one_by_one(wrapper: Wrapper) -> Wrapper:
    def sums_of(original: Any, joined: Mapping[str, Any], factors: Tensor) -> dict[str, Tensor]:
        def sum_of(name: str, terms: Any, factor_B: Tensor) -> Tensor:
            found: Tensor = original({name: terms}, factor_B)[name]
            return found

        return {name: wrapper(sum_of, name, terms, factors) for name, terms in joined.items()}

    return sums_of


def _put_one_by_one(wrapper: Wrapper) -> Wrapper:
    def put(original: Any, sums: Mapping[str, Tensor]) -> None:
        for name, total in sums.items():
            wrapper(lambda name, total: original({name: total}), name, total)

    return put


_ONE_BY_ONE = {"norm_sq_of": _norms_one_by_one, "sum_of": _sums_one_by_one, "put": _put_one_by_one}
"""Seams where the engine takes many parameters at once, and a fault is told of each by itself."""

_OF_WHOLE_SUMS = ("sum_of", "put", "padded_rows")
"""Seams that whole sums come by, which the engine may do without."""

LOSS, NORMS, FACTORS = Stage.LOSS, Stage.NORMS, Stage.FACTORS
SUM, NOISE, UPDATE = Stage.SUM, Stage.NOISE, Stage.UPDATE

FUSED_BK = "flash_fsdp_fuse_bk"
FSDP_MODES = ("flash_fsdp", "flash_fsdp_bk", "flash_fsdp_fuse", FUSED_BK)
"""Modes that a fault is planted in by default: each in one of them, in turn."""
_OF_FUSED_BK = "fused", "bookkeeping"


class Site:
    """A mode with its seams open."""

    def __init__(self, mode: Mode) -> None:
        self.mode: Any = mode
        self.unreached: set[str] = set()
        """Seams at which something was planted and that no step has come by so far."""
        self._undo = ExitStack()

    def wrap(self, seam: str, wrapper: Wrapper) -> None:
        """Have `wrapper` called in place of what is at `seam`, with that as its first argument.

        Raises:
            ValueError: the mode has no such seam.
        """
        owner, attribute = self._find(seam)
        if seam in _ONE_BY_ONE:
            wrapper = _ONE_BY_ONE[seam](wrapper)
        if seam in _OF_WHOLE_SUMS:
            self._undo.callback(setattr, self.mode.engine, "packs", self.mode.engine.packs)
            self.mode.engine.packs = False
        if seam == "standard_normal":
            # Or a GPU would draw all parts' noise in one go.
            self._undo.callback(setattr, owner, "add_to", owner.add_to)
            owner.add_to = owner.add_one_by_one
        original = getattr(owner, attribute)
        is_own = attribute in vars(owner)
        self.unreached.add(seam)

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            self.unreached.discard(seam)
            return wrapper(original, *args, **kwargs)

        setattr(owner, attribute, replaced)
        if is_own:
            self._undo.callback(setattr, owner, attribute, original)
        else:
            self._undo.callback(delattr, owner, attribute)

    def before(self, seam: str, call: Callable[[], object]) -> None:
        """Have `call` called first whenever a step comes by `seam`."""

        def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call()
            return original(*args, **kwargs)

        self.wrap(seam, wrapper)

    def over_ranks(self, number: float) -> float:
        """The sum of a number of each rank."""
        total = torch.tensor(float(number), device=self.mode.context.device)
        dist.all_reduce(total)
        return float(total)

    def sums(self) -> dict[str, Tensor]:
        """This rank's shards of the step's clipped sum so far, which may be changed in place."""
        engine = getattr(self.mode, "engine", None)
        if engine is not None and engine.capture is not None:
            sums: dict[str, Tensor] = engine.sharder.sums
            return sums
        return {part.name: part.local for part in self.mode.gradient_parts()}

    def close(self) -> None:
        """Take out everything that was planted."""
        self._undo.close()

    def _find(self, seam: str) -> tuple[Any, str]:
        if seam in MODE_SEAMS:
            return self.mode, seam
        place, path = (PROTOCOL_SEAMS | ENGINE_SEAMS)[seam]
        if seam in ENGINE_SEAMS:
            has_engine = getattr(getattr(self.mode, "engine", None), "capture", None) is not None
            allowed = f"a mode with the seam {seam}"
            require(has_engine, "mode", type(self.mode).__name__, allowed, "Only our own have it.")
        root = self.mode if place == "mode" else import_module(place)
        above, _, attribute = path.rpartition(".")
        return (attrgetter(above)(root) if above else root), attribute


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One known defect."""

    name: str
    kind: str
    """Class of faults: the module that it stands in."""
    title: str
    """What goes wrong, in a few words."""
    source: str
    """Where it was found, or `plausible`."""
    formula: str
    """What is computed, and in place of what."""
    needs: tuple[str, ...]
    """What a test has to have for the fault to show."""
    stage: Stage
    """Stage of a step that is to be blamed."""
    where: tuple[str, ...]
    """Patterns of the parameters that are to be blamed; empty where the fault has no place."""
    in_bf16: str
    """Why it is not found where modes compute in bfloat16; empty where it is."""
    seams: tuple[str, ...]
    """Where it is planted."""
    modes: tuple[str, ...]
    """Of the sharded flash modes, those that it can be planted in."""
    plant: Callable[[Site], None]

    @property
    def fits_any_mode(self) -> bool:
        """Whether every mode has its seams."""
        return not any(seam in ENGINE_SEAMS for seam in self.seams)

    def fits(self, mode: str) -> bool:
        """Whether it can be planted in one of our own modes, sharded or not."""
        spec = spec_of(mode)
        keeps_gradients = spec is not None and (spec.norm_rule, spec.strategy) == _OF_FUSED_BK
        return FUSED_BK in self.modes or not keeps_gradients

    @property
    def needs_ranks(self) -> bool:
        """Whether it shows on several ranks alone."""
        return any("ranks" in need for need in self.needs)


FAULTS: dict[str, Fault] = {}
"""Every fault by name."""


def fault(
    title: str,
    *,
    at: str,
    formula: str,
    stage: Stage,
    source: str = "plausible",
    needs: str = "",
    where: str = "",
    in_bf16: str = "",
    modes: tuple[str, ...] = FSDP_MODES,
) -> Callable[[Callable[[Site], None]], Callable[[Site], None]]:
    """Register the function below as a fault of the same name.

    Args:
        at: seams.
        needs: conditions.
        where: patterns. Of each of the three there may be several, comma separated.
    """

    def register(plant: Callable[[Site], None]) -> Callable[[Site], None]:
        name = plant.__name__
        assert name not in FAULTS
        FAULTS[name] = Fault(
            name=name,
            kind=plant.__module__.rpartition(".")[2],
            title=title,
            source=source,
            formula=formula,
            needs=_split(needs),
            stage=stage,
            where=_split(where),
            in_bf16=in_bf16,
            seams=_split(at),
            modes=modes,
            plant=plant,
        )
        return plant

    return register


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
