"""Captures what per-sample gradients are made of, and turns it into norms and clipped sums.

While a batch is captured, every module that owns trainable parameters runs on leaves of the
capture's own, which share the parameters' memory (`privacy.captured_layer`). The forward pass
counts the uses of each parameter; a backward pass brings one term of its per-sample gradients for
each use (see `privacy.terms`). When the last has come, the parameter is *settled*: in a backward
run for norms its squared norms are taken, in one run for sums its clipped sum is formed and handed
on. Tied weights and modules that are called several times are exact for that reason.

Layers are captured in five ways: from what they read and the gradient of what they return
(`WatchedLayer`), in the backward of a fused linear layer (`privacy.fused_linear`), by a view
of a parameter for each sample whose gradients autograd itself forms (`privacy.per_sample_weights`),
the same of a module that no rule knows (`privacy.expanded`), and by one backward a sample where
the samples cannot be told apart otherwise (`privacy.backward_per_sample`). Which of them fits a
layer is found before the first batch (`privacy.sample_dim`).

Autograd never forms a weight's own gradient in these backwards: it is asked for those of the
outermost activations and of per-sample views only. It is also asked for the parameters themselves,
to which no path leads as long as every use of a parameter is a call of the module that owns it: a
gradient that arrives there would be missing from the norms, and the batch is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dpsgd_track.config import AUTO, GRADIENTS, GRAM, TILED, require
from dpsgd_track.kernels.flash_norm import gram_norm_sq, tiled_norm_sq
from dpsgd_track.privacy.layers.inventory import Layer, find_layers
from dpsgd_track.privacy.norms import NormRule
from dpsgd_track.privacy.planner import LinearShape, Planner
from dpsgd_track.privacy.replaced_forward import ReplacedForward
from dpsgd_track.privacy.terms import (
    Dense,
    Outer,
    OuterNorm,
    Term,
    clipped_sums_of,
    join,
    norms_sq_of,
)

if TYPE_CHECKING:
    from dpsgd_track.privacy.captured_layer import CapturedLayer

Put = Callable[[dict[str, Tensor]], None]
"""Takes this rank's clipped sums by parameter."""

_Settle = Callable[[str, tuple[Term, ...]], None]
_Close = Callable[[Tensor], None]
"""Takes a gradient that has arrived."""


class Capture:
    """Per-sample squared norms of one micro-batch, and its clipped sums."""

    def __init__(
        self, model: nn.Module, norm_rule: NormRule, *, keep: bool, plan: str = AUTO
    ) -> None:
        """Find the rule of every layer with trainable parameters; capture nothing yet.

        Args:
            model: sharded or not; only names, shapes and settings are looked at.
            norm_rule: how norms of linear layers are found.
            keep: keep what the clipped sums of one-pass strategies are formed from.
            plan: how norms of linear layers are found, where the rule leaves that open.
        Raises:
            ValueError: naming everything whose per-sample gradients would not be exact, or a plan
                that the rule or the strategy does not have.
        """
        self.model = model
        self.norm_rule = norm_rule
        self.keep = keep
        allowed = f"{AUTO}, as the {norm_rule.name} norm has one way only"
        require(norm_rule.is_planned or plan == AUTO, "plan", plan, allowed)
        self.planner = Planner(keeps=keep, forced=plan)
        self.layers = find_layers(model)
        self.captured: dict[str, CapturedLayer] = {}
        """Each layer by its fully qualified name, in the way in which it is captured."""
        owners = Counter(name for layer in self.layers for name in layer.names.values())
        self.shared = frozenset(name for name, count in owners.items() if count > 1)
        """Parameters that several modules have."""
        self.shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        """Whole shape of each trainable parameter."""
        self.num_samples: int | None = None
        """Samples of the micro-batch at hand; None outside of one."""
        self.path = 0
        """Digest of which layers the last micro-batch's forward called, in order."""
        self.has_copies = False
        """Whether parameters are copies that are made for each batch."""
        self.dtypes: set[torch.dtype] = set()
        """Types that gradients have come in."""
        self._num_batches = 0
        self._plans: dict[tuple[str, torch.Size, torch.dtype], str] = {}
        self._has_foreign_leaves = False
        """Whether the graph had leaves that are no parameters when it was last inspected."""
        self._settle: _Settle | None = None
        self._is_last = False
        """Whether no other backward of the batch follows."""
        self._backward = -1
        """Autograd's number of the backward under way; -1 outside of one."""
        self._terms: dict[str, list[Term]] = {}
        self._num_pending: Counter[str] = Counter()
        self._owners = [
            (module._parameters, local, name) for module, local, name in _trained_places(model)
        ]
        """Where each trainable parameter is looked up, and its fully qualified name."""
        self._found_by_sample: list[tuple[str, Tensor]] = []
        """[B, *parameter] of leaves that are one for all samples, once they were found."""
        self._unsharded: dict[str, Tensor] = {}
        """Under FSDP2 the whole parameters that a forward runs on, by name."""
        self._forget()

    @property
    def is_capturing(self) -> bool:
        """Whether calls of layers are to be reported."""
        return self.num_samples is not None and torch.is_grad_enabled()

    @cached_property
    def _units(self) -> list[_NotedUnit]:
        # The model is sharded after the capture was made, and before its first batch.
        return [
            _NotedUnit(self, module, f"{fqn}." if fqn else "")
            for fqn, module in self.model.named_modules()
            if issubclass(type(module), FSDPModule) and fqn not in self.captured
        ]

    @property
    def is_sharded(self) -> bool:
        """Whether the model is under FSDP2, once it has been sharded."""
        return issubclass(type(self.model), FSDPModule)

    def take(self, captured: CapturedLayer) -> None:
        """Capture a layer in this way from the next batch on."""
        self.captured[captured.layer.fqn] = captured

    @contextmanager
    def sample_batch(self, num_samples: int) -> Iterator[None]:
        """Captures the forward and the backwards inside, of `num_samples` samples."""
        self._forget()
        self.num_samples = num_samples
        self._num_batches += 1
        captured = self.captured.values()
        places = [place for layer in captured for place in layer.places]
        if not self.is_sharded:
            for place in places:
                place.refresh()
        try:
            with self.attached(captured):
                yield
        finally:
            if self.has_copies:
                for place in places:
                    place.release()
            self.path = hash(tuple(self._calls))
            self.num_samples = None
            self._forget()

    @contextmanager
    def attached(self, modules: Iterable[ReplacedForward]) -> Iterator[None]:
        """Within it the forwards of some modules are replaced."""
        attached: list[ReplacedForward] = []
        try:
            for module in [*self._units, *modules]:
                module.attach()
                attached.append(module)
            yield
        finally:
            for module in reversed(attached):
                module.detach()

    def run_norms(self, loss_B: Tensor, *, retain_graph: bool) -> dict[str, Tensor]:
        """The backward for norms.

        Returns:
            Squared norm [B] of each sample's gradient, for each parameter a gradient reached.
        Raises:
            ValueError: a parameter is used in another way than by calling its module, so that
                a part of its gradient would be missing.
        """
        squares: dict[str, Tensor] = {}
        there: dict[str, tuple[Term, ...]] = {}

        def settle(name: str, terms: tuple[Term, ...]) -> None:
            if self.keep:
                there[name] = self._kept[name] = self._kept_form(name, terms)
            elif all(isinstance(term, Dense) for term in terms):
                there[name] = terms
            else:
                # Now, so that the factors need not be kept.
                squares.update(self.norms_of({name: terms}))

        self._find_foreign_leaves(loss_B)
        parameters = self._current_parameters()
        found = self._run(loss_B, settle, parameters.values(), retain_graph=retain_graph)
        _refuse_unseen_uses(
            [name for name, gradient in zip(parameters, found, strict=True) if gradient is not None]
        )
        self._refuse_unreached(loss_B)
        self._refuse_backwards_of_layers()
        return squares | self.norms_of(there)

    def run_sums(self, loss_B: Tensor, clip_factor_B: Tensor, put: Put) -> None:
        """A second backward over the same graph; clipped sums are put as they are formed."""

        def settle(name: str, terms: tuple[Term, ...]) -> None:
            put(self.sums_of({name: terms}, clip_factor_B))

        self._run(loss_B, settle, (), retain_graph=False)

    def kept_sums(self, names: Iterable[str], clip_factor_B: Tensor) -> dict[str, Tensor]:
        """Clipped sums of some parameters, from what the backward for norms kept of them.

        A parameter that no gradient reached has zeros.
        """
        kept = {name: self._kept.pop(name) for name in names if name in self._kept}
        sums = self.sums_of(kept, clip_factor_B)
        for name in names:
            if name not in sums:
                sums[name] = clip_factor_B.new_zeros(self.shapes[name])
        return sums

    def kept_gradients(self, names: Iterable[str]) -> list[Tensor] | None:
        """Per-sample gradients [B, *parameter] of all of some parameters, if those were kept."""
        terms = [self._kept.get(name, ()) for name in names]
        if not all(len(t) == 1 and type(t[0]) is Dense for t in terms):
            return None
        for name in names:
            del self._kept[name]
        return [term.grad_B for (term,) in terms if isinstance(term, Dense)]

    def norms_of(self, joined: Mapping[str, tuple[Term, ...]]) -> dict[str, Tensor]:
        """Squared norms [B] of parameters' per-sample gradients."""
        return norms_sq_of(joined, self._outer_norm_of)

    def sums_of(
        self, joined: Mapping[str, tuple[Term, ...]], clip_factor_B: Tensor
    ) -> dict[str, Tensor]:
        """Clipped sums of parameters' gradients over this rank's samples, in their whole shapes."""
        sums = clipped_sums_of(joined, clip_factor_B)
        return {name: total.view(self.shapes[name]) for name, total in sums.items()}

    def plan_of(self, name: str, x: Tensor, num_outputs: int) -> str:
        """How the norm of weight `name` is found for inputs [B, ..., D]."""
        key = name, x.shape, x.dtype
        known = self._plans.get(key)
        if known is None:
            B, D = x.shape[0], x.shape[-1]
            T = x.numel() // max(B * D, 1)
            shape = LinearShape(B, T, D, num_outputs, x.dtype, x.device)
            is_shared = name in self.shared
            known = self._plans[key] = self.planner.choose(name, shape, is_shared=is_shared)
        return known

    def open_call(self, layer: Layer, x: Tensor | None = None, sample_dim: int = 0) -> bool:
        """A call of `layer` begins, a use of each of its parameters; False where a checkpoint
        only repeats one.

        Args:
            x: its input, where the samples must be seen in one dimension.
            sample_dim: that dimension.
        Raises:
            ValueError: they are not.
        """
        if _is_in_backward():
            return False
        if x is not None and x.shape[sample_dim : sample_dim + 1] != (self.num_samples,):
            raise ValueError(
                f"{layer.fqn}: expected inputs of {self.num_samples} samples in dimension "
                f"{sample_dim}, got shape {tuple(x.shape)}. Per-sample gradients of this layer "
                "cannot be told apart."
            )
        self._calls.append(layer.fqn)
        for name in layer.names.values():
            self._num_uses[name] += 1
        return True

    def open_call_by_sample(self, layer: Layer, leaves: Mapping[str, Tensor]) -> None:
        """A call of `layer` begins that runs on `leaves`, by local name, for all samples.

        Their per-sample gradients are found by one backward for each sample, over all calls.
        """
        if _is_in_backward():
            return
        self._calls.append(layer.fqn)
        for local_name, leaf in leaves.items():
            if not any(leaf is known for _, known in self._by_sample):
                self._by_sample.append((layer.names[local_name], leaf))
                self._num_uses[layer.names[local_name]] += 1
                # So that a backward comes by the layers after this one.
                self._roots.append(leaf)
                self._closings.append(None)

    def ends_calls(self) -> bool:
        """Whether the backward under way is that of the batch's losses, which ends calls; not one
        of single samples, nor one that the model runs for itself.

        Raises:
            ValueError: the model differentiates what a backward of its own has formed.
        """
        if self.is_telling_samples_apart:
            return False
        # Some gradients are taken when the backward is over.
        if torch._C._current_graph_task_id() in (self._backward, -1):
            return True
        if torch.is_grad_enabled():
            raise ValueError(
                "model: expected a forward whose gradients are formed once, got a backward inside "
                "of it that is differentiated again (create_graph=True), as for a gradient "
                "penalty. The weights' part in it is not captured. Detach it, freeze the layers, "
                "or use mode='reference'."
            )
        return False

    def close_call(self, layer: Layer, x: Tensor, dy: Tensor) -> None:
        """The output gradients of a call have arrived."""
        if not self.ends_calls():
            return
        assert self._settle is not None, "a backward that was not run by the capture"
        assert layer.rule is not None
        self.dtypes.add(dy.dtype)
        for name, term in layer.rule.terms(layer.module, x.detach(), dy.detach()).items():
            self.add_term(layer.names[name], term)

    def add_term(self, name: str, term: Term) -> None:
        """One use's share of a parameter's per-sample gradients."""
        assert self._settle is not None, "a backward that was not run by the capture"
        self._terms.setdefault(name, []).append(term)
        self._num_pending[name] -= 1
        if self._num_pending[name] == 0:
            self._settle(name, join(self._terms.pop(name)))

    def _add_gradients(self, name: str, grad_B: Tensor) -> None:
        self.dtypes.add(grad_B.dtype)
        self.add_term(name, Dense(grad_B))

    def note_output(
        self,
        layer: Layer,
        edge: GradientEdge,
        root: GradientEdge | None,
        close: _Close | None = None,
    ) -> None:
        """What a call that was opened has returned.

        Args:
            edge: the output's place in the graph, before anything is done to it.
            root: what a backward has to reach for so that the call's gradient arrives; None
                where gradients flow on from it to an earlier call.
            close: takes the gradient of `root`.
        """
        if root is not None:
            self._roots.append(root)
            self._closings.append(close)
        self._outputs.append((tuple(layer.names.values()), edge.node))

    def want(self, layer: Layer, local_name: str, view: Tensor) -> None:
        """In a call that was opened, the module runs on `view`: its parameter for each sample.

        Autograd forms the per-sample gradient, as the gradient of the view.
        """
        assert view.grad_fn is not None
        name = layer.names[local_name]
        self._roots.append(view)
        self._closings.append(lambda grad_B: self._add_gradients(name, grad_B))
        self._outputs.append(((name,), view.grad_fn))

    def note_unsharded(self, name: str, parameter: Tensor) -> None:
        """Under FSDP2 the forward is about to run on this parameter."""
        self._unsharded[name] = parameter

    def hold(self, x: Tensor) -> Callable[[], Tensor]:
        """Keeps `x` until the last backward has asked for it.

        A change in place that would falsify it is an error, as autograd makes it.
        """
        if is_saved_by_others():
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
        *,
        retain_graph: bool,
    ) -> list[Tensor | None]:
        """A backward; returns the gradients of `parameters`, where there are any."""
        self._terms, self._num_pending = {}, Counter(self._num_uses)
        self._settle, self._is_last = settle, not retain_graph
        if not loss_B.requires_grad:
            # No trained parameter has a part in it.
            return [None for _ in parameters]
        total = loss_B.sum()
        total.register_hook(self._note_backward)
        try:
            for name, gradient_B in self._gradients_by_sample(loss_B):
                self.add_term(name, Dense(gradient_B))
            roots: Any = [*self._roots, *parameters]
            gradients: list[Tensor | None] = []
            if roots:
                gradients += torch.autograd.grad(
                    total, roots, retain_graph=retain_graph, allow_unused=True
                )
                for number, close in enumerate(self._closings):
                    # Let go of each as soon as it was taken.
                    gradient, gradients[number] = gradients[number], None
                    if close is not None and gradient is not None:
                        close(gradient)
            # A use that no gradient reached has left its parameter waiting.
            for name in list(self._terms):
                settle(name, join(self._terms.pop(name)))
            return gradients[len(self._roots) :]
        finally:
            self._settle, self._backward = None, -1

    def _note_backward(self, gradient: Tensor) -> None:
        self._backward = torch._C._current_graph_task_id()

    def _gradients_by_sample(self, loss_B: Tensor) -> list[tuple[str, Tensor]]:
        """[B, *parameter] of each leaf that is one for all samples, by a backward for each."""
        if self._by_sample and not self._found_by_sample:
            if not bool(loss_B.isfinite().all()):
                shared = ", ".join(sorted({name for name, _ in self._by_sample}))
                raise ValueError(
                    f"loss: expected finite losses where samples share {shared}, got one that is "
                    "not. It would be in every sample's gradient. Leave the sample out."
                )
            leaves = [leaf for _, leaf in self._by_sample]
            self.is_telling_samples_apart = True
            try:
                rows = [
                    torch.autograd.grad(
                        loss_B, leaves, one_hot, retain_graph=True, materialize_grads=True
                    )
                    for one_hot in torch.eye(len(loss_B), dtype=loss_B.dtype, device=loss_B.device)
                ]
            finally:
                self.is_telling_samples_apart = False
            names = [name for name, _ in self._by_sample]
            stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
            self._found_by_sample = list(zip(names, stacked, strict=True))
        return self._found_by_sample

    def _current_parameters(self) -> dict[str, Tensor]:
        """The tensors that a use of a parameter outside of its module would be a use of."""
        if self.is_sharded:
            # Layers that are units of their own have met theirs.
            of_layers = [
                captured.seen_parameters()
                for captured in self.captured.values()
                if issubclass(type(captured.module), FSDPModule)
            ]
            return {n: p for found in of_layers for n, p in found.items()} | self._unsharded
        current = ((name, own.get(local)) for own, local, name in self._owners)
        return {name: parameter for name, parameter in current if parameter is not None}

    def _find_foreign_leaves(self, loss_B: Tensor) -> None:
        """Look through the graph of the 1st, 2nd, 4th, ... batch for leaves that are no parameters.

        What is made from one, such as an input that asks for gradients, looks as if a captured
        layer came before it.
        """
        if self._num_batches.bit_count() > 1 and not self._has_foreign_leaves:
            return
        ours = {id(p) for p in self._current_parameters().values()}
        leaves = [
            node.variable
            for node in _nodes_below(loss_B.grad_fn)
            if hasattr(node, "variable") and not isinstance(node.variable, nn.Parameter)
        ]
        ours |= {id(leaf) for captured in self.captured.values() for leaf in captured.own_leaves()}
        foreign = [leaf for leaf in leaves if id(leaf) not in ours and leaf.numel() > 0]
        self._has_foreign_leaves = bool(foreign)
        self._roots += [get_gradient_edge(leaf) for leaf in foreign]
        self._closings += [None] * len(foreign)

    def _refuse_unreached(self, loss_B: Tensor) -> None:
        """Raise where a call that the loss depends on was not reached by the backward."""
        waiting = {name for name, pending in self._num_pending.items() if pending > 0}
        if not waiting:
            return
        below = set(_nodes_below(loss_B.grad_fn))
        reachable = Counter(
            name for names, node in self._outputs if node in below for name in names
        )
        for name in sorted(waiting):
            if reachable[name] > self._num_uses[name] - self._num_pending[name]:
                raise RuntimeError(
                    f"{name}: the loss depends on a use of this parameter whose gradient could "
                    "not be captured. Detach inputs that require gradients before the model."
                )

    def _refuse_backwards_of_layers(self) -> None:
        """Raise where a layer's own backward has run another, which has left gradients behind."""
        for fqn, captured in self.captured.items():
            for leaf in captured.own_leaves():
                if leaf.grad is not None:
                    leaf.grad = None
                    raise ValueError(
                        f"{fqn}: expected gradients that autograd forms, got some that a backward "
                        "inside of the backward has added, as in reversible layers. They are not "
                        "captured. Use layers that keep their activations, or freeze this one."
                    )

    def _kept_form(self, name: str, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        only = terms[0]
        if len(terms) > 1 or not isinstance(only, Outer) or not self.norm_rule.is_planned:
            return terms
        plan = self.plan_of(name, only.x_BTD, only.dy_BTP.shape[2])
        return (only.materialised(),) if plan == GRADIENTS else terms

    def _outer_norm_of(self, name: str) -> OuterNorm:
        rule = self.norm_rule
        if not rule.is_planned:
            return rule.outer_norm

        def planned(x_BTD: Tensor, dy_BTP: Tensor) -> Tensor:
            plan = self.plan_of(name, x_BTD, dy_BTP.shape[2])
            by_plan = {GRAM: gram_norm_sq, TILED: tiled_norm_sq}
            return by_plan.get(plan, rule.outer_norm)(x_BTD, dy_BTP)

        return planned

    def _forget(self) -> None:
        self._roots: list[GradientEdge | Tensor] = []
        """What a backward has to reach."""
        self._closings: list[_Close | None] = []
        """What takes the gradient of each."""
        self._outputs: list[tuple[tuple[str, ...], Node]] = []
        self._num_uses: Counter[str] = Counter()
        self._kept: dict[str, tuple[Term, ...]] = {}
        self._by_sample: list[tuple[str, Tensor]] = []
        """Leaves whose gradients take one backward for each sample, by the parameter's name."""
        self._found_by_sample = []
        self.is_telling_samples_apart = False
        """Whether a backward of one sample's loss is under way, which ends no call."""
        self._calls: list[str] = []


class _NotedUnit(ReplacedForward):
    """A module that FSDP2 shards: tells the capture its whole parameters as it runs."""

    def __init__(self, capture: Capture, module: nn.Module, prefix: str) -> None:
        super().__init__(module)
        self.capture = capture
        self.places = [
            (m._parameters, local, prefix + name) for m, local, name in _trained_places(module)
        ]
        self.is_noted = False

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the parameters at the first call, as FSDP2 keeps the same tensors for ever."""
        if not self.is_noted:
            for own, local, name in self.places:
                parameter = own[local]
                # Those of inner units are still sharded.
                if parameter is not None and not isinstance(parameter, DTensor):
                    self.capture.note_unsharded(name, parameter)
            self.is_noted = True
        return self.plain(*args, **kwargs)


def _trained_places(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, name in it, fully qualified name) of each trainable parameter, once each."""
    first: dict[int, str] = {id(p): name for name, p in model.named_parameters()}
    for fqn, module in model.named_modules():
        for local, parameter in module._parameters.items():
            name = f"{fqn}.{local}" if fqn else local
            if parameter is not None and parameter.requires_grad and first[id(parameter)] == name:
                yield module, local, name


def _refuse_unseen_uses(names: Iterable[str]) -> None:
    """Raise where the loss depends on parameters otherwise than through calls of their modules."""
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
    """Whether a forward is repeated by a checkpoint, from inside a backward."""
    return torch._C._current_graph_task_id() != -1


def _nodes_below(node: Node | None) -> Iterator[Node]:
    """Every node of the graph that `node` leads to, once."""
    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [function for function, _ in node.next_functions]


def is_saved_by_others() -> bool:
    """Whether what autograd saves now is left to somebody else, such as a checkpoint."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class _Held(torch.autograd.Function):
    """Saves a tensor as autograd saves those of its own, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.view_as(anchor)


def _saved(x: Tensor) -> Callable[[], Tensor]:
    """Keeps `x` for the backward the way the layer itself does.

    Under a checkpoint that is not at all, until it is asked for and computed again.
    """
    anchor = torch.empty(0, requires_grad=True)
    token: Any = _Held.apply(anchor, x)

    def held() -> Tensor:
        # The token, rather than its node: without it torch 2.11 lets go of what is saved.
        (saved,) = token.grad_fn.saved_tensors
        return saved

    return held
