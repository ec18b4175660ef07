"""Captures what per-sample gradients are made of, and turns it into norms and clipped sums.

A `Capture` watches every module that owns trainable parameters. The forward pass counts the uses
of each parameter; a backward pass brings one term of its per-sample gradients for each use (see
`privacy.terms`). When the last has come, the parameter is *settled*: in a backward run for norms
its squared norms are taken, in one run for sums its clipped sum is formed and handed on. Tied
weights and modules that are called several times are exact for that reason.

Modules report in four ways: hooks on an unchanged module (here), the backward of a fused linear
layer (`privacy.fused_linear`), a view of a parameter for each sample whose gradients autograd
itself forms (`privacy.per_sample_weights`), and the same of a module that no rule knows
(`privacy.expanded`).

Autograd never forms a weight's own gradient in these backwards: it is asked for those of the
outermost activations and of per-sample views only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from dpsgd_track.config import AUTO, GRADIENTS, GRAM, TILED, require
from dpsgd_track.kernels.flash_norm import gram_norm_sq, tiled_norm_sq
from dpsgd_track.privacy.layers.inventory import Layer, find_layers
from dpsgd_track.privacy.norms import NormRule
from dpsgd_track.privacy.planner import LinearShape, Planner
from dpsgd_track.privacy.terms import (
    Dense,
    Outer,
    OuterNorm,
    Term,
    clipped_sums_of,
    join,
    norms_sq_of,
)

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
        """Find the rule of every layer with trainable parameters; watch nothing yet.

        Args:
            model: sharded or not; only names, shapes and settings are looked at.
            norm_rule: how norms of linear layers are found.
            keep: keep what the clipped sums of one-pass strategies are formed from.
            plan: how norms of linear layers are found, where the rule leaves that open.
        Raises:
            ValueError: naming everything whose per-sample gradients would not be exact, or a plan
                that the rule or the strategy does not have.
        """
        self.norm_rule = norm_rule
        self.keep = keep
        allowed = f"{AUTO}, as the {norm_rule.name} norm has one way only"
        require(norm_rule.is_planned or plan == AUTO, "plan", plan, allowed)
        self.planner = Planner(keeps=keep, forced=plan)
        self.layers = find_layers(model)
        owners = Counter(name for layer in self.layers for name in layer.names.values())
        self.shared = frozenset(name for name, count in owners.items() if count > 1)
        """Parameters that several modules have."""
        self.shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        """Whole shape of each trainable parameter."""
        self.num_samples: int | None = None
        """Samples of the micro-batch at hand; None outside of one."""
        self._num_batches = 0
        self._is_inspected = False
        """Whether the graph of the batch at hand is looked through: of the 1st, 2nd, 4th, ..."""
        self._plans: dict[tuple[str, torch.Size, torch.dtype], str] = {}
        self._has_foreign_leaves = False
        """Whether the graph had leaves that are no parameters when it was last inspected."""
        self._settle: _Settle | None = None
        self._is_last = False
        """Whether no other backward of the batch follows."""
        self._terms: dict[str, list[Term]] = {}
        self._num_pending: Counter[str] = Counter()
        self._forget()

    @property
    def is_capturing(self) -> bool:
        """Whether calls of layers are to be reported."""
        return self.num_samples is not None and torch.is_grad_enabled()

    @contextmanager
    def sample_batch(self, num_samples: int) -> Iterator[None]:
        """Captures the forward and the backwards inside, of `num_samples` samples."""
        self._forget()
        self.num_samples = num_samples
        self._num_batches += 1
        self._is_inspected = self._num_batches.bit_count() == 1
        try:
            yield
        finally:
            self.num_samples = None
            self._forget()

    def run_norms(self, loss_B: Tensor, *, retain_graph: bool) -> dict[str, Tensor]:
        """The backward for norms.

        Returns:
            Squared norm [B] of each sample's gradient, for each parameter a gradient reached.
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

        self._inspect(loss_B)
        self._run(loss_B, settle, retain_graph=retain_graph)
        self._refuse_unreached(loss_B)
        return squares | self.norms_of(there)

    def run_sums(self, loss_B: Tensor, clip_factor_B: Tensor, put: Put) -> None:
        """A second backward over the same graph; clipped sums are put as they are formed."""

        def settle(name: str, terms: tuple[Term, ...]) -> None:
            put(self.sums_of({name: terms}, clip_factor_B))

        self._run(loss_B, settle, retain_graph=False)

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

    def note_parameters(self, layer: Layer) -> None:
        """A call that is captured is about to begin, and parameters are where it will find them."""
        if self._is_inspected and not _is_in_backward():
            parameters = dict(layer.module.named_parameters())
            for local, name in layer.names.items():
                self._parameter_edges[get_gradient_edge(parameters[local]).node, name] += 1

    def open_call(self, layer: Layer, x: Tensor | None = None) -> bool:
        """A call of `layer` begins; False where a checkpoint only repeats one.

        Args:
            x: its input, where the samples must be seen in dimension 0.
        Raises:
            ValueError: they are not.
        """
        if _is_in_backward():
            return False
        if x is not None and x.shape[0] != self.num_samples:
            raise ValueError(
                f"{layer.fqn}: expected inputs of {self.num_samples} samples in dimension 0, got "
                f"shape {tuple(x.shape)}. Per-sample gradients of this layer cannot be told apart."
            )
        for name in layer.names.values():
            self._num_uses[name] += 1
        return True

    def close_call(self, layer: Layer, x: Tensor, dy: Tensor) -> None:
        """The output gradients of a call have arrived."""
        assert self._settle is not None, "a backward that was not run by the capture"
        assert layer.rule is not None
        for name, term in layer.rule.terms(layer.module, x.detach(), dy.detach()).items():
            self.add_term(layer.names[name], term)

    def add_term(self, name: str, term: Term) -> None:
        """One use's share of a parameter's per-sample gradients."""
        assert self._settle is not None, "a backward that was not run by the capture"
        self._terms.setdefault(name, []).append(term)
        self._num_pending[name] -= 1
        if self._num_pending[name] == 0:
            self._settle(name, join(self._terms.pop(name)))

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
        self._closings.append(lambda grad_B: self.add_term(name, Dense(grad_B)))
        self._outputs.append(((name,), view.grad_fn))

    def watch(self, layer: Layer) -> None:
        """Capture every later call of the layer through hooks on its module."""

        def before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.is_capturing:
                self.note_parameters(layer)

        def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: Any, y: Tensor) -> None:
            if not self.is_capturing:
                return
            (x,) = args or tuple(kwargs.values())
            held = _saved(x) if _is_saved_by_others() else self._hold(x)
            if not self.open_call(layer, x):
                return
            edge = get_gradient_edge(y)

            def close(dy: Tensor) -> None:
                self.close_call(layer, held(), dy)

            if x.requires_grad:
                self.note_output(layer, edge, None)
                _before_node(edge, close)
            elif _is_saved_by_others():
                self.note_output(layer, edge, edge)
                y.register_hook(close)
            else:
                self.note_output(layer, edge, edge, close)

        if isinstance(layer.module, nn.Embedding):
            layer.module.register_forward_pre_hook(self._expand_shared_index)
        layer.module.register_forward_pre_hook(before_forward)
        layer.module.register_forward_hook(after_forward, with_kwargs=True)

    def _hold(self, x: Tensor) -> Callable[[], Tensor]:
        """Keeps `x` until the last backward has asked for it.

        A change in place that would falsify it is an error, as autograd makes it.
        """
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

    def _expand_shared_index(self, module: nn.Module, args: tuple[Tensor, ...]) -> object:
        """Give every sample its own copy of an index that all share.

        Position indices often come as [1, T] and broadcast later; the gradient that returns
        would be the samples' sum. Expanded, the lookup is the same and the gradients apart.
        """
        index = args[0]
        num_samples = self.num_samples
        if self.is_capturing and num_samples is not None and num_samples != len(index) == 1:
            return (index.expand(num_samples, *index.shape[1:]), *args[1:])
        return None

    def _run(self, loss_B: Tensor, settle: _Settle, *, retain_graph: bool) -> None:
        self._terms, self._num_pending = {}, Counter(self._num_uses)
        self._settle, self._is_last = settle, not retain_graph
        try:
            if self._roots:
                total = loss_B.sum()
                roots: Any = self._roots
                gradients: list[Tensor | None] = list(
                    torch.autograd.grad(total, roots, retain_graph=retain_graph, allow_unused=True)
                )
                for number, close in enumerate(self._closings):
                    # Let go of each as soon as it was taken.
                    gradient, gradients[number] = gradients[number], None
                    if close is not None and gradient is not None:
                        close(gradient)
            # A use that no gradient reached has left its parameter waiting.
            for name in list(self._terms):
                settle(name, join(self._terms.pop(name)))
        finally:
            self._settle = None

    def _inspect(self, loss_B: Tensor) -> None:
        """Look through the graph for what the capture would not see.

        Raises:
            ValueError: a parameter is used in another way than by calling its module, so that
                a part of its gradient would be missing.
        """
        if self._is_inspected:
            _refuse_unseen_uses(loss_B, self._parameter_edges)
        if self._is_inspected or self._has_foreign_leaves:
            # Leaves that are no parameters, such as inputs that ask for gradients. What is made
            # from one looks as if a captured layer came before it.
            leaves = [n.variable for n in _nodes_below(loss_B.grad_fn) if hasattr(n, "variable")]
            foreign = [x for x in leaves if not isinstance(x, nn.Parameter) and x.numel() > 0]
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
        self._parameter_edges: Counter[tuple[Node, str]] = Counter()
        self._outputs: list[tuple[tuple[str, ...], Node]] = []
        self._num_uses: Counter[str] = Counter()
        self._kept: dict[str, tuple[Term, ...]] = {}


def _is_in_backward() -> bool:
    """Whether a forward is repeated by a checkpoint, from inside a backward."""
    return torch._C._current_graph_task_id() != -1


def _nodes_below(node: Node | None, *, stop: Container[Node] = ()) -> Iterator[Node]:
    """Every node of the graph that `node` leads to, once; nothing below those in `stop`."""
    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            if node not in stop:
                waiting += [function for function, _ in node.next_functions]


def _refuse_unseen_uses(loss_B: Tensor, seen: Counter[tuple[Node, str]]) -> None:
    """Raise unless every edge of the graph into a trained parameter is a use that was captured."""
    expected = {node: (name, count) for (node, name), count in seen.items()}
    edges: Counter[Node] = Counter()
    problems = set()
    for node in _nodes_below(loss_B.grad_fn, stop=set(expected)):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and node not in expected:
            problems.add(f"one of shape {tuple(leaf.shape)} that no captured module owns")
        edges.update(child for child, _ in node.next_functions if child in expected)
    problems |= {expected[n][0] for n, count in edges.items() if count > expected[n][1]}
    if problems:
        raise ValueError(
            "model: expected every trainable parameter to be used by calling the module that owns "
            f"it. Used in other ways too: {', '.join(sorted(problems))}. Call the module, or "
            "freeze the parameter."
        )


def _is_saved_by_others() -> bool:
    """Whether what autograd saves now is left to somebody else, such as a checkpoint."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _before_node(edge: GradientEdge, call: _Close) -> None:
    """Call with the gradient of an output when it has arrived, right before its node runs.

    By then every hook on the output itself has run, FSDP2's too, which gathers the parameters of
    a unit whose output it is. A checkpoint may need them.
    """
    # The hook must not hold the node that holds it: nothing would ever free the two.
    output_nr = edge.output_nr

    def before_node(gradients: tuple[Tensor | None, ...]) -> None:
        dy = gradients[output_nr]
        if dy is not None:
            call(dy)

    edge.node.register_prehook(before_node)


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
