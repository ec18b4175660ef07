"""Captures the factors of per-sample gradients, and forms norms and clipped sums from them.

While a batch is captured, every module that owns trainable parameters runs on leaf tensors of the
capture, which share the parameters' memory (`privacy.captured_layer`). The forward pass counts the
uses of each parameter; a backward pass delivers one term of its per-sample gradients for each use
(see `privacy.terms`). With the last term the parameter is *settled*: a backward for norms takes its
squared norms, a backward for sums forms its clipped sum and hands it on. This is why tied weights
and modules that are called several times are exact.

A layer is captured in one of five ways, chosen before the first batch (`privacy.sample_dim`):

- from its input and the gradient of its output (`WatchedLayer`)
- in the backward of a fused linear layer (`privacy.fused_linear`)
- on a view of its parameter for each sample, whose gradient autograd forms
  (`privacy.per_sample_weights`)
- the same for a module without a rule (`privacy.expanded`)
- by one backward per sample, where no dimension separates the samples
  (`privacy.backward_per_sample`)

Autograd never forms a weight's own gradient in these backwards: it is asked for the gradients of
the outermost activations and of per-sample views only. It is also asked for those of the parameters
themselves, to which no path leads as long as every use of a parameter is a call of the module that
owns it. A gradient that arrives there would be missing from the norms, so the batch is refused.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dpsgd_track.config import AUTO, GRADIENTS, GRAM, TILED, require
from dpsgd_track.distributed.agreement import Agreement
from dpsgd_track.distributed.sample_exchange import Formed, SampleExchange
from dpsgd_track.kernels.flash_norm import gram_norm_sq, tiled_norm_sq
from dpsgd_track.privacy.clipping import layer_of
from dpsgd_track.privacy.layers import linear
from dpsgd_track.privacy.layers.inventory import Layer, find_layers
from dpsgd_track.privacy.memory_budget import MemoryBudget, Split
from dpsgd_track.privacy.norm_planner import LinearShape, NormPlanner, free_bytes
from dpsgd_track.privacy.norms import NormRule
from dpsgd_track.privacy.replaced_forward import ReplacedForward
from dpsgd_track.privacy.shared_rows import Course
from dpsgd_track.privacy.terms import (
    Dense,
    Outer,
    OuterNorm,
    Positions,
    Term,
    clipped_sums_into,
    clipped_sums_of,
    join,
    norms_sq_of,
    with_sums,
)
from dpsgd_track.privacy.traced_layers import Tracing

if TYPE_CHECKING:
    from dpsgd_track.privacy.captured_layer import CapturedLayer

_logger = logging.getLogger(__name__)

Put = Callable[[dict[str, Tensor]], None]
"""Takes this rank's clipped sums by parameter."""

ClipLayers = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Clip factors [B] of each layer's part of the samples' gradients, from squared norms [B] by
parameter."""

_Settle = Callable[[str, tuple[Term, ...]], None]
Offer = Callable[[Mapping[str, Formed], int], SampleExchange | None]
"""Takes the per-sample gradients that a backward will form, by parameter, and the number of
samples; see `distributed.reduction.GradientSharder.offer`."""

_Receive = Callable[[Tensor], None]
"""Takes a gradient that a backward has delivered."""
_Target = tuple[GradientEdge | Tensor, _Receive | None]
"""A tensor or edge that a backward has to reach, and what takes its gradient."""


class Capture:
    """Captures one micro-batch at a time; forms its per-sample squared norms and clipped sums."""

    def __init__(
        self,
        model: nn.Module,
        norm_rule: NormRule,
        *,
        keep: bool,
        norm_plan: str = AUTO,
        budget: MemoryBudget | None = None,
    ) -> None:
        """Find the rule of each layer with trainable parameters; nothing is captured yet.

        Args:
            model: sharded or not; only names, shapes and settings are read.
            norm_rule: takes the norms of linear layers.
            keep: keep the terms that the clipped sums of one-pass strategies are formed from.
            norm_plan: plan for the norms of linear layers, where the rule leaves a choice.
            budget: bounds the memory of terms that are kept; None keeps all.
        Raises:
            ValueError: naming every layer whose per-sample gradients would not be exact, or a plan
                that the rule or the strategy does not have.
        """
        self.model = model
        self.norm_rule = norm_rule
        self.keep = keep
        allowed = f"{AUTO}, as the {norm_rule.name} norm has one way only"
        require(norm_rule.is_planned or norm_plan == AUTO, "plan", norm_plan, allowed)
        # Within a budget, whatever takes the least memory, so that little has to be dropped.
        free = free_bytes if budget is None else lambda device: 0
        self.norm_planner = NormPlanner(keeps=keep, forced=norm_plan, free_bytes=free)
        self.budget = budget
        self.layers = find_layers(model)
        self.captured: dict[str, CapturedLayer] = {}
        """The way in which each layer is captured, by the layer's fully qualified name."""
        owners = Counter(name for layer in self.layers for name in layer.names.values())
        self.shared = frozenset(name for name, count in owners.items() if count > 1)
        """Parameters that several modules share."""
        self.shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        """Unsharded shape of each trainable parameter."""
        self.num_layers = len(set(map(layer_of, self.shapes)))
        """Modules that own trainable parameters."""
        self.num_samples: int | None = None
        """Samples of the current micro-batch; None outside of one."""
        self.path = 0
        """Hash of the sequence of layers that the last micro-batch's forward called, and of what
        `courses` had learned."""
        self.courses: list[Course] = []
        """Of what all samples share and meets them late."""
        self.has_copies = False
        """True if the model runs on copies of its parameters that are made for each batch."""
        self.dtypes: set[torch.dtype] = set()
        """Types of the gradients so far."""
        self._num_batches = 0
        self._norm_plans: dict[tuple[str, torch.Size, torch.dtype], str] = {}
        self.used_otherwise: frozenset[str] | None = None
        """Parameters that the first batch used otherwise than by calling their modules; None before
        it. The gradients of these uses take one backward per sample."""
        self.by_sample: set[str] = set()
        """Parameters with gradients that have taken one backward per sample."""
        self._has_foreign_leaves = False
        """True if the graph of an earlier batch had leaves that are no parameters."""
        self._inspected_modes: set[bool] = set()
        """Values of `model.training` in the batches whose graphs were inspected."""
        self._settle: _Settle | None = None
        self._holds_units = False
        """True in a backward whose terms are held until their unit is clipped."""
        self._wanted: frozenset[str] | None = None
        """Parameters whose terms the current backward is run for; None for all."""
        self.split = Split()
        """Parameters whose terms the last batch has kept within the budget, and has dropped."""
        self._is_last = False
        """True in the last backward of a batch."""
        self._backward_id = -1
        """Autograd's number of the current backward; -1 outside of one."""
        self._terms: dict[str, list[Term]] = {}
        self._num_pending: Counter[str] = Counter()
        self._slots = _trainable_slots(model)
        self._gradients_by_leaf: list[tuple[str, Tensor]] = []
        """[B, *parameter] of leaves that all samples share, once they were computed."""
        self.tracing = Tracing(self)
        """Layers inside modules that torch.compile has compiled."""
        self._unsharded: dict[str, Tensor] = {}
        """Under FSDP2, the unsharded parameters that a forward runs on, by name."""
        self._clear()

    @property
    def is_capturing(self) -> bool:
        """True within a micro-batch while gradients are enabled: layers report their calls."""
        return self.num_samples is not None and torch.is_grad_enabled()

    @property
    def keeps_all(self) -> bool:
        """True if one backward delivers all that the clipped sums are formed from."""
        return self.keep and self.budget is None

    @property
    def retains_graphs(self) -> bool:
        """True if a batch takes several backwards over its graph."""
        return not self.keeps_all or bool(self.used_otherwise or self.by_sample)

    @cached_property
    def units(self) -> list[ObservedUnit]:
        """Modules that FSDP2 shards."""
        # Lazily, as the model is sharded between the capture's construction and its first batch.
        return [
            ObservedUnit(self, module, f"{fqn}." if fqn else "")
            for fqn, module in self.model.named_modules()
            if issubclass(type(module), FSDPModule) and not self._runs_on_leaves(fqn)
        ]

    def _unit_of(self, name: str) -> str:
        """Prefix of the innermost unit that holds a parameter; empty for the root."""
        return max((p for p in self._unit_prefixes if name.startswith(p)), key=len, default="")

    @cached_property
    def _unit_prefixes(self) -> list[str]:
        units = [n for n, m in self.model.named_modules() if issubclass(type(m), FSDPModule)]
        return [f"{fqn}." for fqn in units if fqn]

    def _runs_on_leaves(self, fqn: str) -> bool:
        """True for a layer that is captured with all modules inside it."""
        return fqn in self.captured and not self.captured[fqn].layer.is_bare

    @property
    def is_sharded(self) -> bool:
        """True once the model has been sharded by FSDP2."""
        return issubclass(type(self.model), FSDPModule)

    @cached_property
    def _agreement(self) -> Agreement:
        return Agreement()

    def on_all_ranks(self, is_true: bool) -> bool:
        """True if `is_true` is on every rank of a sharded model, whose ranks run forwards together.

        Collective: all ranks call it.
        """
        return not self._agreement.any(not is_true) if self.is_sharded else is_true

    def named_on_ranks(self, names: Container[str], others: Container[str] = ()) -> list[str]:
        """Layers that a rank names, and no rank names among `others`, in the same order on all.

        Collective, as `on_all_ranks`.
        """
        layers = list(self.captured)
        if not self.is_sharded:
            return [fqn for fqn in layers if fqn in names and fqn not in others]
        found = self._agreement.of_each([fqn in of for of in (names, others) for fqn in layers])
        pairs = zip(layers, found, found[len(layers) :], strict=False)
        return [fqn for fqn, is_named, is_other in pairs if is_named and not is_other]

    def register(self, captured: CapturedLayer) -> None:
        """Capture a layer this way from the next batch on."""
        self.captured[captured.layer.fqn] = captured

    def merge(self, captured: CapturedLayer) -> None:
        """Capture a layer together with all modules inside it."""
        prefix = f"{captured.layer.fqn}." if captured.layer.fqn else ""
        for fqn in [fqn for fqn in self.captured if fqn.startswith(prefix)]:
            del self.captured[fqn]
        self.register(captured)

    @contextmanager
    def sample_batch(self, num_samples: int, kind: Hashable = None) -> Iterator[None]:
        """Capture the forward and the backwards inside, of `num_samples` samples.

        Args:
            kind: see `privacy.traced_layers.Tracing`.
        """
        self._clear()
        self.num_samples = num_samples
        self._num_batches += 1
        captured = self.captured.values()
        slots = [slot for layer in captured for slot in layer.slots]
        if not self.is_sharded:
            for slot in slots:
                slot.refresh()
        try:
            with self.attached(captured), self.tracing.batch(kind, num_samples):
                yield
        finally:
            if self.has_copies:
                for slot in slots:
                    slot.release()
            self.path = hash((*self._calls, *(course.num_learned for course in self.courses)))
            self.num_samples = None
            self._clear()

    @contextmanager
    def attached(self, modules: Iterable[ReplacedForward]) -> Iterator[None]:
        """Replace the forwards of `modules`, and under FSDP2 observe its units."""
        attached: list[ReplacedForward] = []
        try:
            # Units last: they have to see the parameters before layers replace them.
            for module in [*modules, *self.units]:
                module.attach()
                attached.append(module)
            yield
        finally:
            for module in reversed(attached):
                module.detach()

    def run_norms(
        self, loss_B: Tensor, *, retain_graph: bool, offer: Offer | None = None
    ) -> dict[str, Tensor]:
        """Run the backward for norms.

        Args:
            offer: has per-sample gradients sent as they arrive, rather than kept.
        Returns:
            Squared norm [B] of each sample's gradient, for each parameter that a gradient reached.
        Raises:
            ValueError: a parameter is used otherwise than by calling its module, so that part of
                its gradient would be missing.
        """
        squares: dict[str, Tensor] = {}
        deferred: dict[str, tuple[Term, ...]] = {}
        self._prepare_first_backward(loss_B)
        exchange = self._offered(offer)

        def settle(name: str, terms: tuple[Term, ...]) -> None:
            if exchange is not None and exchange.takes(name):
                if whole := exchange.give(name, terms[0].materialised().grad_B):
                    squares.update(self.norms_of(_dense(whole)))
                    exchange.send()
            elif name in self.split.dropped:
                assert self.budget is not None
                terms = self._kept_form(name, terms)
                self.split.delivered.add(name)
                self.budget.note(name, terms)
                squares.update(self.norms_of({name: terms}))
            elif self.keep:
                deferred[name] = self._kept_form(name, terms)
            elif all(isinstance(term, Dense) for term in terms):
                deferred[name] = terms
            else:
                # At once, so that the factors can be freed.
                squares.update(self.norms_of({name: terms}))

        with self._delivered_at_once(exchange):
            self._run_checked(loss_B, settle, retain_graph=retain_graph)
        if exchange is not None and (unsent := exchange.unsent()):
            squares |= self.norms_of(_dense(unsent))
        if self.keep:
            deferred = with_sums(deferred)
            self._kept.update(deferred)
        if self.budget is not None:
            kept = [terms for name, terms in self._kept.items() if name in self.split.counted]
            self.budget.end(self._shapes_key, kept)
        return self.tracing.checked(squares | self.norms_of(deferred))

    def _offered(self, offer: Offer | None) -> SampleExchange | None:
        """The exchange that takes gradients which the backward is about to form, if one does."""
        if offer is None:
            return None
        assert self.num_samples is not None
        single = {n: form for n, (_, form) in self._formed.items() if self._num_uses[n] == 1}
        return offer(single, self.num_samples)

    @contextmanager
    def _delivered_at_once(self, exchange: SampleExchange | None) -> Iterator[None]:
        """Context in which the gradients that an exchange takes are delivered as they are formed,
        rather than after the backward, and autograd keeps none of them."""
        if exchange is None:
            yield
            return
        early = {id(t) for name, (t, _) in self._formed.items() if exchange.may_take(name)}
        handles = []
        for number, (target, receive) in enumerate(self._targets):
            if id(target) in early:
                assert isinstance(target, Tensor)
                assert receive is not None
                self._targets[number] = target, None
                deliver = partial(self._deliver, receive, target.detach())
                handles.append(target.register_hook(deliver))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _deliver(self, receive: _Receive, stand_in: Tensor, gradient: Tensor) -> Tensor | None:
        """Have a gradient received; returns what autograd keeps in its place, which is free."""
        if not self.ends_calls():
            return None
        receive(gradient)
        return stand_in

    def run_units(
        self, loss_B: Tensor, units: Sequence[Sequence[str]], clip: ClipLayers, put: Put
    ) -> dict[str, Tensor]:
        """Run one backward that clips each layer by itself, and keeps nothing of it.

        Args:
            units: parameters that are clipped at once, each when all of its gradients are there.
                A layer's are in one unit.
            clip: takes the squared norms [B] by parameter of a unit, and returns the clip factors
                [B] of its layers.
            put: takes the clipped sums of a unit.
        Returns:
            Squared norm [B] of each sample's gradient, for each parameter that a gradient reached.
        Raises:
            ValueError: as `run_norms`.
        """
        squares: dict[str, Tensor] = {}
        unit_of = {name: number for number, names in enumerate(units) for name in names}
        waiting: dict[int, dict[str, tuple[Term, ...]]] = {}

        def end(number: int) -> None:
            unit = with_sums(waiting.pop(number))
            norm_sq = self.norms_of(unit)
            squares.update(norm_sq)
            factors = clip(norm_sq)
            put(self.sums_of(unit, {name: factors[layer_of(name)] for name in unit}))

        def settle(name: str, terms: tuple[Term, ...]) -> None:
            number = unit_of[name]
            unit = waiting.setdefault(number, {})
            unit[name] = self._kept_form(name, terms) if self.keep else terms
            if len(unit) == len(units[number]):
                end(number)

        self._prepare_first_backward(loss_B)
        self._holds_units = True
        try:
            self._run_checked(loss_B, settle, retain_graph=False)
        finally:
            self._holds_units = False
        # Units of which a parameter got no gradient.
        for number in list(waiting):
            end(number)
        return squares

    def run_sums(self, loss_B: Tensor, clip_factor_B: Tensor, put: Put) -> None:
        """Run a second backward over the same graph; each clipped sum goes to `put` at once."""

        def settle(name: str, terms: tuple[Term, ...]) -> None:
            put(self.sums_of({name: terms}, {name: clip_factor_B}))

        self._run(loss_B, settle, (), self._targets, retain_graph=False)

    def plan_to_drop(self) -> frozenset[str]:
        """Parameters whose terms the backward for norms will drop, to keep to the budget.

        Those that any rank has to drop, which all ranks reach in a second backward. Collective: all
        ranks of a sharded model call it.
        """
        assert self.budget is not None
        assert self.num_samples is not None
        # In the order of the backward: a parameter that is used once, by its only call.
        tapped = [name for names, _ in reversed(self._taps) for name in names]
        droppable = [name for name in tapped if self._num_uses[name] == 1]
        to_drop = self.budget.to_drop(self._shapes_key, self.num_samples, droppable)
        if self.is_sharded:
            held = self._agreed(self._num_uses.keys() - set(droppable))
            droppable = [name for name in droppable if name not in held]
            to_drop = self._agreed(to_drop) - held
        self.split = Split(frozenset(to_drop), frozenset(droppable) - to_drop)
        return self.split.dropped

    def _agreed(self, names: Container[str]) -> set[str]:
        """Parameters that are among `names` on any rank. Collective: all ranks call it."""
        on_any = self._agreement.of_each([name in names for name in self.shapes])
        return {name for name, is_on_any in zip(self.shapes, on_any, strict=True) if is_on_any}

    def run_dropped(self, loss_B: Tensor, clip_factor_B: Tensor, put: Put) -> None:
        """Run a second backward down to the lowest layer with a parameter that was dropped.

        It repeats the first, bit for bit; each clipped sum goes to `put` at once.

        Raises:
            RuntimeError: it does not reach what the first has reached.
        """
        dropped, left = self.split.dropped, set(self.split.delivered)

        def settle(name: str, terms: tuple[Term, ...]) -> None:
            left.remove(name)
            form = self._kept_form(name, terms)
            put(self.sums_of({name: form}, {name: clip_factor_B}))

        self._wanted = dropped
        units = {self._unit_of(name) for name in dropped} - {""}
        targets: list[_Target] = [
            (edge, None)
            for names, edge in self._taps
            # Of sharded units, any, so that all ranks gather the parameters of the same ones.
            if not dropped.isdisjoint(names) or not units.isdisjoint(map(self._unit_of, names))
        ]
        try:
            self._run(loss_B, settle, (), targets, retain_graph=False)
        finally:
            self._wanted = None
        if left:
            raise RuntimeError(
                f"{', '.join(sorted(left))}: expected a second backward to reach what the first "
                "has reached, got no gradient. Leave memory_budget out."
            )

    def kept_sums(self, names: Iterable[str], clip_factor_B: Tensor) -> dict[str, Tensor]:
        """Clipped sums of the parameters `names`, from the terms that the backward for norms kept.

        The sum of a parameter that no gradient reached is zero.
        """
        kept = {name: self._kept.pop(name) for name in names if name in self._kept}
        sums = self.sums_of(kept, dict.fromkeys(kept, clip_factor_B))
        for name in names:
            if name not in sums:
                sums[name] = clip_factor_B.new_zeros(self.shapes[name])
        return sums

    def write_kept_sums(self, outs: Mapping[str, Tensor], clip_factor_B: Tensor) -> None:
        """Write `kept_sums` of the parameters `outs` into the rows of their tensors.

        Args:
            outs: [W, elements of one rank's shard] float32, by parameter.
        """
        kept = {name: self._kept.pop(name) for name in outs if name in self._kept}
        clipped_sums_into(outs, kept, dict.fromkeys(kept, clip_factor_B))

    def norms_of(self, joined: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
        """Squared norms [B] of parameters' per-sample gradients."""
        return norms_sq_of(joined, self._outer_norm_of, self._takes_gram)

    def sums_of(
        self, joined: Mapping[str, tuple[Term, ...]], factors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Clipped sums over this rank's samples, in the parameters' unsharded shapes.

        Args:
            factors: clip factors [B] by parameter.
        """
        sums = clipped_sums_of(joined, factors)
        for name, total in sums.items():
            shape = self.shapes[name]
            if total.shape != shape:
                sums[name] = total.view(shape)
        return sums

    def norm_plan_of(self, name: str, x: Tensor, num_outputs: int) -> str:
        """Plan for the norm of weight `name` and inputs [B, ..., D]."""
        key = name, x.shape, x.dtype
        if key not in self._norm_plans:
            B, D = x.shape[0], x.shape[-1]
            T = x.numel() // max(B * D, 1)
            shape = LinearShape(B, T, D, num_outputs, x.dtype, x.device)
            is_shared = name in self.shared
            self._norm_plans[key] = self.norm_planner.choose(name, shape, is_shared=is_shared)
        return self._norm_plans[key]

    def open_call(self, layer: Layer, x: Tensor | None = None, sample_dim: int = 0) -> bool:
        """Begin a call of `layer`, which counts as one use of each of its parameters.

        Args:
            x: the call's input, if its samples must be in one dimension.
            sample_dim: that dimension.
        Returns:
            False if a checkpoint only recomputes an earlier call.
        Raises:
            ValueError: dimension `sample_dim` of `x` has another size than the number of samples.
        """
        if _is_in_backward():
            return False
        if x is not None and x.shape[sample_dim : sample_dim + 1] != (self.num_samples,):
            raise ValueError(
                f"{layer.fqn}: expected inputs of {self.num_samples} samples in dimension "
                f"{sample_dim}, got shape {tuple(x.shape)}. Per-sample gradients of this layer "
                "cannot be told apart. Call it with one row for each sample, or freeze it."
            )
        if x is not None:
            self.tracing.note_input(layer, x)
        self._note_call(layer)
        return True

    def _note_call(self, layer: Layer) -> None:
        self._calls.append(layer.fqn)
        for name in layer.names.values():
            self._num_uses[name] += 1

    def _note_traced_calls(self) -> None:
        for layer in self.tracing.layers():
            self._note_call(layer)
        self._targets += self.tracing.targets()
        self._formed |= self.tracing.formed()

    def open_call_by_sample(self, layer: Layer, leaves: Mapping[str, Tensor]) -> None:
        """Begin a call of `layer` on `leaves`, by local name, which all samples share.

        Their per-sample gradients take one backward per sample, over all calls together.
        """
        if _is_in_backward():
            return
        self._calls.append(layer.fqn)
        for local_name, leaf in leaves.items():
            if not any(leaf is earlier for _, earlier in self._shared_leaves):
                self._shared_leaves.append((layer.names[local_name], leaf))
                self._num_uses[layer.names[local_name]] += 1
                # So that a backward passes the layers after this one.
                self._targets.append((leaf, None))

    def ends_calls(self) -> bool:
        """True if the current backward is that of the batch's losses, which ends calls.

        False in a backward of one sample's loss, and in one that the model itself runs.

        Raises:
            ValueError: the model differentiates the gradients of its own backward.
        """
        if self.is_one_sample_backward:
            return False
        # Some gradients are received after the backward.
        if torch._C._current_graph_task_id() in (self._backward_id, -1):
            return True
        if torch.is_grad_enabled():
            raise ValueError(
                "model: expected a forward whose gradients are formed once, got a backward inside "
                "of it that is differentiated again (create_graph=True), as for a gradient "
                "penalty. The part that the weights have in it is not captured. Detach it, freeze "
                "the layers, or use mode='reference'."
            )
        return False

    def close_call(self, layer: Layer, x: Tensor, dy: Tensor, *, is_grouped: bool = False) -> None:
        """End a call of `layer`, given its input and the gradient of its output.

        Args:
            is_grouped: they have several rows of each sample, one sample after the other.
        """
        if not self.ends_calls():
            return
        assert self._settle is not None, "a backward that the capture did not run"
        assert layer.rule is not None
        if self._wanted is not None and self._wanted.isdisjoint(layer.names.values()):
            return
        self.dtypes.add(dy.dtype)
        terms = layer.rule.terms(layer.module, x.detach(), dy.detach())
        if is_grouped:
            assert self.num_samples is not None
            terms = {name: term.grouped(self.num_samples) for name, term in terms.items()}
        # Within a budget, what is summed at once takes next to nothing.
        holds_terms = self.keeps_all or self._holds_units
        holds_factors = holds_terms and not self._forms_gradients(layer, terms)
        for name, term in terms.items():
            if type(term) is Positions and not holds_factors:
                # At once, so that what it is the sum of can be freed.
                term = term.materialised()
            self.add_term(layer.names[name], term)

    @property
    def _shapes_key(self) -> int:
        """Equal for batches whose recorded calls have the same sizes and types."""
        return hash(tuple(self._shapes))

    def _forms_gradients(self, layer: Layer, terms: Mapping[str, Term]) -> bool:
        """True if the gradients of the layer's weight are kept, rather than their factors."""
        term = terms.get("weight")
        return term is not None and self._plan_of(layer.names["weight"], term) == GRADIENTS

    def add_term(self, name: str, term: Term) -> None:
        """Add the term of one use to a parameter's per-sample gradients."""
        assert self._settle is not None, "a backward that the capture did not run"
        if self._wanted is not None and name not in self._wanted:
            return
        self._terms.setdefault(name, []).append(term)
        self._num_pending[name] -= 1
        if self._num_pending[name] == 0:
            self._settle(name, join(self._terms.pop(name)))

    def add_gradients(self, name: str, grad_B: Tensor) -> None:
        """Add per-sample gradients [B, *parameter] of one use of a parameter, or of several."""
        self.dtypes.add(grad_B.dtype)
        self.add_term(name, Dense(grad_B))

    def note_output(
        self,
        layer: Layer,
        edge: GradientEdge,
        target: GradientEdge | None,
        receive: _Receive | None = None,
    ) -> None:
        """Note the output of a call that was opened.

        Args:
            edge: the output's edge in the graph, before any further operation.
            target: edge that a backward has to reach for the call's gradient to arrive; None if
                the gradient flows on to an earlier call anyway.
            receive: takes the gradient of `target`.
        """
        if target is not None:
            self._targets.append((target, receive))
        self._outputs.append((tuple(layer.names.values()), edge.node))

    def tap(self, layer: Layer, x: Tensor, y: Tensor, close: Callable[[Tensor], None]) -> Tensor:
        """The output of a call that was opened, through a node that a backward can end at.

        Args:
            close: takes the gradient of the output when the node runs. By then all hooks on the
                output have run, FSDP2's too.
        """
        anchor = torch.empty(0, requires_grad=True)
        output: Tensor = _Tap.apply(y, anchor, close)
        self.note_tap(layer, x, output, anchor)
        return output

    def note_tap(self, layer: Layer, x: Tensor, y: Tensor, anchor: Tensor) -> None:
        """Note the output of an opened call, whose gradient arrives in a backward to `anchor`."""
        assert self.num_samples is not None
        edge = get_gradient_edge(anchor)
        self.note_output(layer, get_gradient_edge(y), None if x.requires_grad else edge)
        self._taps.append((tuple(layer.names.values()), edge))
        sizes = (x.numel() // self.num_samples, y.numel() // self.num_samples)
        self._shapes.append((layer.fqn, *sizes, y.dtype))

    def note_view(
        self, layer: Layer, local_name: str, view: Tensor, num_positions: int = 0
    ) -> None:
        """Note that an opened call runs on `view`, its parameter expanded to [B, ...].

        The gradient that autograd forms of the view is the per-sample gradient.

        Args:
            num_positions: T of each sample, of a linear layer's weight.
        """
        name = layer.names[local_name]
        self.note_received([name], view, lambda grad_B: self.add_gradients(name, grad_B))
        if num_positions:
            # The backward of the product forms those of its second factor.
            is_transposed = layer.rule is linear
            form = Formed.by_product(view, num_positions, is_transposed=is_transposed)
            self._formed[name] = view, form

    def note_received(
        self, names: Iterable[str | None], view: Tensor, receive: Callable[[Tensor], None]
    ) -> None:
        """Have `receive` take the gradient of `view`, and add the terms of parameters `names`.

        Args:
            names: None for those that are frozen.
        """
        assert view.grad_fn is not None
        self._targets.append((view, receive))
        self._outputs.append((tuple(name for name in names if name), view.grad_fn))

    def note_unsharded(self, name: str, parameter: Tensor) -> None:
        """Note that under FSDP2 the forward is about to run on this unsharded parameter."""
        self._unsharded[name] = parameter

    def hold(self, x: Tensor) -> Callable[[], Tensor]:
        """Keep `x` until the last backward has asked for it; returns the function that it calls.

        As for autograd's own saved tensors, a change of `x` in place is an error.
        """
        if has_saved_tensor_hooks():
            return _saved(x)
        version = x._version
        held: list[Tensor] = [x]

        def take() -> Tensor:
            (kept,) = held
            if kept._version != version:
                raise RuntimeError(
                    f"expected what a layer read as it was, got a tensor of shape "
                    f"{tuple(kept.shape)} that has been modified by an inplace operation. "
                    "Change a copy of it."
                )
            if self._is_last:
                held.clear()
            return kept

        return take

    def _run(
        self,
        loss_B: Tensor,
        settle: _Settle,
        parameters: Iterable[Tensor],
        targets: Sequence[_Target],
        *,
        retain_graph: bool,
    ) -> list[Tensor | None]:
        """Run a backward that reaches `targets`.

        Returns:
            The gradient of each of `parameters`, None if not reached.
        """
        self._terms, self._num_pending = {}, Counter(self._num_uses)
        self._settle, self._is_last = settle, not retain_graph
        if not loss_B.requires_grad:
            # The loss depends on no trainable parameter.
            return [None for _ in parameters]
        total = loss_B.sum()
        total.register_hook(self._note_backward)
        try:
            for name, gradient_B in self._gradients_by_sample(loss_B):
                self.add_term(name, Dense(gradient_B))
            inputs: Any = [*(target for target, _ in targets), *parameters]
            gradients: list[Tensor | None] = []
            if inputs:
                gradients += torch.autograd.grad(
                    total, inputs, retain_graph=retain_graph, allow_unused=True
                )
                for number, (_, receive) in enumerate(targets):
                    # Each is freed as soon as it was taken.
                    gradient, gradients[number] = gradients[number], None
                    if receive is not None and gradient is not None:
                        receive(gradient)
            # Parameters with a use that no gradient reached.
            for name in list(self._terms):
                settle(name, join(self._terms.pop(name)))
            return gradients[len(targets) :]
        finally:
            self._settle, self._backward_id = None, -1

    def _prepare_first_backward(self, loss_B: Tensor) -> None:
        self._note_traced_calls()
        self._inspect_leaves(loss_B)

    def _run_checked(self, loss_B: Tensor, settle: _Settle, *, retain_graph: bool) -> None:
        """Run the first backward of a batch; refuse gradients that it has not captured."""
        parameters = self._current_parameters()
        gradients = self._run(
            loss_B, settle, parameters.values(), self._targets, retain_graph=retain_graph
        )
        reached = [n for n, g in zip(parameters, gradients, strict=True) if g is not None]
        refuse_unseen_uses(set(reached) - (self.used_otherwise or set()))
        self._refuse_unreached(loss_B)
        self._refuse_backwards_of_layers()

    def _note_backward(self, gradient: Tensor) -> None:
        self._backward_id = torch._C._current_graph_task_id()

    def _gradients_by_sample(self, loss_B: Tensor) -> list[tuple[str, Tensor]]:
        """[B, *parameter] of each leaf that all samples share, by one backward per sample."""
        if self._shared_leaves:
            used = {id(getattr(node, "variable", None)) for node in _nodes_below(loss_B.grad_fn)}
            for name, leaf in self._shared_leaves:
                if id(leaf) not in used:
                    self._num_uses[name] -= 1
                    self._num_pending[name] -= 1
            self._shared_leaves[:] = [s for s in self._shared_leaves if id(s[1]) in used]
            self._refuse_shared_leaves_of_ranks()
            self.by_sample.update(name for name, _ in self._shared_leaves)
        if self._shared_leaves and not self._gradients_by_leaf:
            if not bool(loss_B.isfinite().all()):
                shared = ", ".join(sorted({name for name, _ in self._shared_leaves}))
                raise ValueError(
                    f"loss: expected finite losses where samples share {shared}, got one that is "
                    "not. It would be in every sample's gradient. Leave the sample out."
                )
            names, leaves = zip(*self._shared_leaves, strict=True)
            self.is_one_sample_backward = True
            try:
                rows = [
                    torch.autograd.grad(
                        loss_B, leaves, one_hot, retain_graph=True, materialize_grads=True
                    )
                    for one_hot in torch.eye(len(loss_B), dtype=loss_B.dtype, device=loss_B.device)
                ]
            finally:
                self.is_one_sample_backward = False
            stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
            self._gradients_by_leaf = list(zip(names, stacked, strict=True))
        return self._gradients_by_leaf

    def _refuse_shared_leaves_of_ranks(self) -> None:
        """Raise on all ranks if one of a sharded model has leaves that all samples share: all ranks
        would have to take part in each sample's backward."""
        if self.on_all_ranks(not self._shared_leaves) or not self.is_sharded:
            return
        names = sorted({name for name, _ in self._shared_leaves})
        raise ValueError(
            f"{', '.join(names) or 'model'}: expected parameters that take one row for each sample "
            "under FSDP2, got some that are used in a way that takes no copy for each sample, or "
            "without a dimension for the samples. Give their modules inputs of [B, ...], such as "
            "position ids of each sample, freeze them, or use a mode on one device."
        )

    def _current_parameters(self) -> dict[str, Tensor]:
        """The tensors that a use of a parameter outside of its module's calls would reach."""
        if self.is_sharded:
            # Layers that are units themselves have noted their own.
            of_layers = {
                name: parameter
                for captured in self.captured.values()
                if issubclass(type(captured.module), FSDPModule)
                for name, parameter in captured.seen_parameters().items()
            }
            return of_layers | self._unsharded
        current = {name: own.get(local) for own, local, name in self._slots}
        return {name: parameter for name, parameter in current.items() if parameter is not None}

    def _inspect_leaves(self, loss_B: Tensor) -> None:
        """Search the graph for leaves that no call of a layer runs on.

        In the 1st, 2nd, 4th, ... batch, in the first of training and of eval mode, and in all
        batches after one that had some: parameters that are used otherwise than by calling their
        modules, and leaves that are no parameters. What is computed from one, as from an input that
        requires gradients, looks like the output of an earlier captured layer.
        """
        parameters = self._current_parameters()
        is_of_new_mode = self.model.training not in self._inspected_modes
        self._inspected_modes.add(self.model.training)
        if self._num_batches.bit_count() == 1 or self._has_foreign_leaves or is_of_new_mode:
            leaves = [n.variable for n in _nodes_below(loss_B.grad_fn) if hasattr(n, "variable")]
            self._find_foreign(leaves, parameters)
            if self.used_otherwise is None and not self.is_sharded:
                used = {id(leaf) for leaf in leaves}
                self._note_other_uses(n for n, p in parameters.items() if id(p) in used)
        for name in self.used_otherwise or ():
            self._shared_leaves.append((name, parameters[name]))
            self._num_uses[name] += 1
            # So that every backward passes the layers after it.
            self._targets.append((parameters[name], None))

    def _note_other_uses(self, names: Iterable[str]) -> None:
        self.used_otherwise = frozenset(names)
        if self.used_otherwise:
            _logger.warning(
                "%s: used otherwise than by calling the module that owns it, which takes one "
                "backward for each sample. That is exact, but slow.",
                ", ".join(sorted(self.used_otherwise)),
            )

    def _find_foreign(self, leaves: list[Tensor], parameters: Mapping[str, Tensor]) -> None:
        own = {id(parameter) for parameter in parameters.values()}
        own |= {id(leaf) for captured in self.captured.values() for leaf in captured.own_leaves()}
        own |= {id(leaf) for leaf in self.tracing.leaves()}
        foreign = [
            leaf
            for leaf in leaves
            if id(leaf) not in own and leaf.numel() > 0 and not isinstance(leaf, nn.Parameter)
        ]
        # For good: speech models have their inputs require gradients in training mode only.
        self._has_foreign_leaves |= bool(foreign)
        self._targets += [(get_gradient_edge(leaf), None) for leaf in foreign]

    def _refuse_unreached(self, loss_B: Tensor) -> None:
        """Raise if the loss depends on a call that the backward did not reach."""
        waiting = {name for name, pending in self._num_pending.items() if pending > 0}
        if not waiting:
            return
        below = set(_nodes_below(loss_B.grad_fn))
        reachable = Counter(
            name for names, node in self._outputs if node in below for name in names
        )
        for name in sorted(waiting):
            if reachable[name] > self._num_uses[name] - self._num_pending[name]:
                raise ValueError(
                    f"{name}: expected a use that the backward reaches, got one whose gradient "
                    "could not be captured. Detach inputs that require gradients before the model."
                )

    def take_plain_gradients(self) -> list[str]:
        """Layers that a backward outside of the capture has given gradients, which are dropped."""
        found = []
        for fqn, captured in self.captured.items():
            for leaf in captured.own_leaves():
                if leaf.grad is not None:
                    leaf.grad = None
                    found.append(fqn)
        return found

    def _refuse_backwards_of_layers(self) -> None:
        """Raise if a layer's own backward has run another, which left gradients on its leaves."""
        for fqn in self.take_plain_gradients():
            raise ValueError(
                f"{fqn}: expected gradients that autograd forms, got some that a backward inside "
                "of the backward has added, as in reversible layers. They are not captured. Use "
                "layers that keep their activations, or freeze this one."
            )

    def _kept_form(self, name: str, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """`terms`, or the gradients that they are the factors of, as planned."""
        if len(terms) > 1 or self._plan_of(name, terms[0]) != GRADIENTS:
            return terms
        return (terms[0].materialised(),)

    def _takes_gram(self, name: str, term: Outer) -> bool:
        """True if the norm of a parameter with this one term is planned in the Gram form."""
        return self._plan_of(name, term) == GRAM

    def _plan_of(self, name: str, term: Term) -> str | None:
        """Plan for the norm of a parameter with this one term; None if it has no choice."""
        if not isinstance(term, Outer) or not self.norm_rule.is_planned:
            return None
        return self.norm_plan_of(name, term.x_BTD, term.dy_BTP.shape[2])

    def _outer_norm_of(self, name: str) -> OuterNorm:
        rule = self.norm_rule
        if not rule.is_planned:
            return rule.outer_norm

        def planned_norm(x_BTD: Tensor, dy_BTP: Tensor) -> Tensor:
            norm_plan = self.norm_plan_of(name, x_BTD, dy_BTP.shape[2])
            by_plan = {GRAM: gram_norm_sq, TILED: tiled_norm_sq}
            return by_plan.get(norm_plan, rule.outer_norm)(x_BTD, dy_BTP)

        return planned_norm

    def _clear(self) -> None:
        self._targets: list[_Target] = []
        self._formed: dict[str, tuple[Tensor, Formed]] = {}
        """Tensors whose gradients are the per-sample gradients of a matrix, by its name."""
        self._outputs: list[tuple[tuple[str, ...], Node]] = []
        self._num_uses: Counter[str] = Counter()
        self._kept: dict[str, tuple[Term, ...]] = {}
        self._shared_leaves: list[tuple[str, Tensor]] = []
        """Leaves whose gradients take one backward per sample, with their parameters' names."""
        self._gradients_by_leaf = []
        self.is_one_sample_backward = False
        """True in a backward of one sample's loss, which ends no call."""
        self._calls: list[str] = []
        self._taps: list[tuple[tuple[str, ...], GradientEdge]] = []
        """Parameters of each call whose gradient arrives in a backward to the edge."""
        self._shapes: list[tuple[str, int, int, torch.dtype]] = []
        """Layer, sizes of one sample's input and output, and type of each of these calls."""


def _dense(grads: Mapping[str, Tensor]) -> dict[str, tuple[Term, ...]]:
    return {name: (Dense(grad_B),) for name, grad_B in grads.items()}


class ObservedUnit(ReplacedForward):
    """A module that FSDP2 shards: reports its unsharded parameters to the capture as it runs."""

    def __init__(self, capture: Capture, module: nn.Module, prefix: str) -> None:
        super().__init__(module)
        self.capture = capture
        self._slots = [(own, local, prefix + name) for own, local, name in _trainable_slots(module)]
        self.has_reported = False
        """True once there is nothing more to report."""

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Report the parameters at the first call; FSDP2 keeps the same tensors from then on."""
        if not self.has_reported:
            for own, local, name in self._slots:
                parameter = own[local]
                # Parameters of inner units are still sharded here.
                if parameter is not None and not isinstance(parameter, DTensor):
                    self.capture.note_unsharded(name, parameter)
            self.has_reported = True
        return self.original(*args, **kwargs)


def _trainable_slots(model: nn.Module) -> list[tuple[dict[str, Any], str, str]]:
    """(dict that holds it, key, fully qualified name) of each trainable parameter, once each."""
    first_name = {id(p): name for name, p in model.named_parameters()}
    return [
        (module._parameters, local, name)
        for fqn, module in model.named_modules()
        for local, parameter in module._parameters.items()
        if parameter is not None
        and parameter.requires_grad
        and first_name[id(parameter)] == (name := f"{fqn}.{local}" if fqn else local)
    ]


def refuse_unseen_uses(names: Iterable[str]) -> None:
    """Raise if the loss depends on parameters `names` without a call of their modules."""
    problems = sorted(names)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            "model: expected every trainable parameter to be used by calling the module that owns "
            f"it. Used in other ways too: {', '.join(problems[:5])}{more}. Call the module, or "
            "freeze the parameter. What a hook computes from a parameter counts as another way "
            "(torch.nn.utils.weight_norm, prune): use torch.nn.utils.parametrize."
        )


def _is_in_backward() -> bool:
    """True while a checkpoint recomputes a forward inside a backward."""
    return torch._C._current_graph_task_id() != -1


def _nodes_below(node: Node | None) -> Iterator[Node]:
    """`node` and every node of the graph that it depends on, once each."""
    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [function for function, _ in node.next_functions]


class _Tap(torch.autograd.Function):
    """Returns a layer's output, and in a backward reports its gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, close: Callable[[Tensor], None]) -> Tensor:
        ctx.close = close
        # Not a view, so that later operations may change it in place.
        output: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.close(dy)
        return (dy if ctx.needs_input_grad[0] else None), None, None


def has_saved_tensor_hooks() -> bool:
    """True if hooks, such as a checkpoint's, decide what becomes of tensors that autograd saves."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class _Held(torch.autograd.Function):
    """Saves a tensor for the backward as any function does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.view_as(anchor)


def _saved(x: Tensor) -> Callable[[], Tensor]:
    """Keep `x` for the backward the way the layer itself does.

    Under a checkpoint it is not kept, but recomputed when the backward asks for it.
    """
    anchor = torch.empty(0, requires_grad=True)
    token: Any = _Held.apply(anchor, x)

    def held() -> Tensor:
        # The token rather than its node: without it torch 2.11 frees what is saved.
        (saved,) = token.grad_fn.saved_tensors
        return saved

    return held
