"""Faults of the per-sample norms. Most leave the clipped sum as it is where nothing is clipped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd_track.distributed.sharding import row_range
from dpsgd_track.mutants.fault import FSDP_MODES, FUSED_BK, NORMS, Site, fault
from dpsgd_track.privacy.layers.positions import flatten_positions, summed_positions
from dpsgd_track.privacy.terms import Dense, Outer, OuterNorm, Term

WITH_OUTER = tuple(mode for mode in FSDP_MODES if mode != FUSED_BK)
"""Modes that hold the factors of a linear layer's gradient when its norm is taken."""


@dataclass(frozen=True)
class _WithNorm(Dense):
    """Right gradients with a norm of another's."""

    wrong_B: Tensor

    def norm_sq(self, outer_norm: OuterNorm) -> Tensor:
        return self.wrong_B


def per_sample(terms: Sequence[Term]) -> Tensor:
    """[B, elements] the gradients that `terms` add up to."""
    return torch.stack([term.materialised().grad_B.flatten(1) for term in terms]).sum(dim=0)


def of_changed_outers(site: Site, change: Callable[[Outer], Outer]) -> None:
    """Take norms of linear layers' gradients from other factors than sums are formed of."""

    def norm_sq_of(original: Any, name: str, terms: Sequence[Term]) -> Tensor:
        changed = tuple(change(t) if isinstance(t, Outer) else t for t in terms)
        found: Tensor = original(name, changed)
        return found

    site.wrap("norm_sq_of", norm_sq_of)


def _apart(norm_sq_of: Any, name: str, terms: Sequence[Term]) -> Tensor:
    """Squared norms of `terms`, added without what they have in common."""
    return torch.stack([norm_sq_of(name, (term,)) for term in terms]).sum(dim=0)


def _square(values: Tensor) -> Tensor:
    return values.flatten(1).square().sum(dim=1)


def _bias(site: Site, norm_sq: Any) -> None:
    def terms(original: Any, module: Any, x: Tensor, dy: Tensor) -> dict[str, Term]:
        found: dict[str, Term] = original(module, x, dy)
        if "bias" in found:
            right = found["bias"].materialised()
            found["bias"] = _WithNorm(right.grad_B, norm_sq(flatten_positions(dy).float()))
        return found

    site.wrap("linear_terms", terms)


@fault(
    "bias norm from the wrong Gram matrix",
    source="Opacus #751",
    formula="n^2 = |G G^T|_F over positions, in place of |sum_t g_t|^2",
    at="linear_terms",
    needs="a biased linear layer, several positions",
    stage=NORMS,
    where="*.bias",
)
def bias_norm_by_gram(site: Site) -> None:
    """The gradient of a bias is a sum over positions, which a Gram matrix of them is not."""
    _bias(site, lambda g_BTP: (g_BTP @ g_BTP.mT).flatten(1).norm(dim=1))


@fault(
    "bias norm without the cross terms of positions",
    formula="n^2 = sum_t |g_t|^2, in place of |sum_t g_t|^2",
    at="linear_terms",
    needs="a biased linear layer, several positions",
    stage=NORMS,
    where="*.bias",
)
def bias_positions_apart(site: Site) -> None:
    """Squares before the sum over positions."""
    _bias(site, _square)


@fault(
    "norm of a linear layer from summed positions",
    formula="n = |sum_t dy_t| |sum_t x_t|, in place of |sum_t dy_t x_t^T|",
    at="norm_sq_of",
    needs="several positions",
    stage=NORMS,
    where="*.weight",
    modes=WITH_OUTER,
)
def positions_summed_first(site: Site) -> None:
    """Right for one position: the rule of a two-dimensional input used on a three-dimensional."""

    of_changed_outers(
        site, lambda t: Outer(t.x_BTD.sum(1, keepdim=True), t.dy_BTP.sum(1, keepdim=True))
    )


@fault(
    "tied weight: norms of both uses added",
    source="tensorflow/privacy 44dfac3",
    formula="n^2 = |g_1|^2 + |g_2|^2, in place of |g_1 + g_2|^2",
    at="norm_sq_of",
    needs="a tied head",
    stage=NORMS,
    where="embedding.weight",
)
def tied_norms_added(site: Site) -> None:
    """The cross term of embedding and head is left out."""

    def norm_sq_of(original: Any, name: str, terms: tuple[Term, ...]) -> Tensor:
        return _apart(original, name, terms)

    site.wrap("norm_sq_of", norm_sq_of)


@fault(
    "reused layer: norms of its uses added",
    source="tensorflow/privacy 44dfac3",
    formula="n^2 = |g_1|^2 + |g_2|^2, in place of |g_1 + g_2|^2",
    at="norm_sq_of",
    needs="a module used twice",
    in_bf16="it moves a norm by 2 %, which is less than five times the error of plain autograd",
    stage=NORMS,
    where="*.reused.weight",
    modes=WITH_OUTER,
)
def reused_norms_added(site: Site) -> None:
    """The uses stand one behind the other along the positions."""

    def norm_sq_of(original: Any, name: str, terms: tuple[Term, ...]) -> Tensor:
        if not name.endswith("reused.weight") or not isinstance(terms[0], Outer):
            found: Tensor = original(name, terms)
            return found
        halves = zip(terms[0].x_BTD.chunk(2, 1), terms[0].dy_BTP.chunk(2, 1), strict=True)
        return _apart(original, name, [Outer(x, dy) for x, dy in halves])

    site.wrap("norm_sq_of", norm_sq_of)


@fault(
    "reused layer: one use overwrites the other",
    source="fastDP",
    formula="g = g_1, in place of g_1 + g_2",
    at="join",
    needs="a module used twice",
    stage=NORMS,
    where="*.reused.*",
)
def reused_use_lost(site: Site) -> None:
    """Activations of the first call are gone when the backward asks for them."""

    def join(original: Any, terms: Sequence[Term]) -> tuple[Term, ...]:
        is_reused = len({type(term) for term in terms}) == 1
        found: tuple[Term, ...] = original(terms[:1] if is_reused else terms)
        return found

    site.wrap("join", join)


@fault(
    "embedding norm without adding equal tokens",
    formula="n^2 = sum_t |dy_t|^2, in place of sum_v |sum_{t: v_t = v} dy_t|^2",
    at="rows_norm_sq",
    needs="tokens that repeat",
    stage=NORMS,
    # The positions of padding are all the same.
    where="embedding.weight, position.weight",
)
def repeated_tokens_apart(site: Site) -> None:
    """Squares before equal rows are added."""
    site.wrap("rows_norm_sq", lambda original, rows, outer_norm: _square(rows.dy_BTD.float()))


@fault(
    "padding row of the embedding counted",
    formula="g_v of the padding index v kept, in place of 0",
    at="embedding_terms",
    needs="a padding index",
    stage=NORMS,
    where="embedding.weight",
)
def padding_row_counted(site: Site) -> None:
    """torch gives the row of padding_idx no gradient."""

    def terms(original: Any, module: Any, x: Tensor, dy: Tensor) -> dict[str, Term]:
        index, module.padding_idx = module.padding_idx, None
        try:
            found: dict[str, Term] = original(module, x, dy)
            return found
        finally:
            module.padding_idx = index

    site.wrap("embedding_terms", terms)


@fault(
    "LayerNorm's weight gradient from the raw input",
    formula="sum_t dy_t x_t, in place of sum_t dy_t xhat_t",
    at="layer_norm_terms",
    needs="LayerNorm",
    stage=NORMS,
    where="blocks.*.norm.weight",
)
def layer_norm_input_not_normalised(site: Site) -> None:
    """The hook saw the input of the module, not what it multiplies the weight by."""

    def terms(original: Any, module: Any, x: Tensor, dy: Tensor) -> dict[str, Term]:
        found: dict[str, Term] = original(module, x, dy)
        return {**found, "weight": summed_positions(dy.float() * x.float())}

    site.wrap("layer_norm_terms", terms)


@fault(
    "LayerNorm's bias forgotten",
    formula="0, in place of sum_t dy_t",
    at="layer_norm_terms",
    needs="LayerNorm",
    stage=NORMS,
    where="blocks.*.norm.bias",
)
def layer_norm_bias_forgotten(site: Site) -> None:
    """Neither its norm nor its gradient is there."""

    def terms(original: Any, module: Any, x: Tensor, dy: Tensor) -> dict[str, Term]:
        found: dict[str, Term] = original(module, x, dy)
        return {**found, "bias": Dense(torch.zeros_like(found["bias"].materialised().grad_B))}

    site.wrap("layer_norm_terms", terms)


@fault(
    "RMSNorm's norm without the cross terms of positions",
    formula="n^2 = sum_t |dy_t xhat_t|^2, in place of |sum_t dy_t xhat_t|^2",
    at="rms_norm_terms",
    needs="RMSNorm, several positions",
    stage=NORMS,
    where="norm.weight",
)
def rms_norm_positions_apart(site: Site) -> None:
    """Squares before the sum over positions."""

    def terms(original: Any, module: Any, x: Tensor, dy: Tensor) -> dict[str, Term]:
        x_BTD, dy_BTD = flatten_positions(x.float()), flatten_positions(dy.float())
        xhat = x_BTD * torch.rsqrt(x_BTD.square().mean(dim=-1, keepdim=True))
        right = original(module, x, dy)["weight"].materialised()
        return {"weight": _WithNorm(right.grad_B, _square(dy_BTD * xhat))}

    site.wrap("rms_norm_terms", terms)


@fault(
    "embedding left out of the norm",
    formula="n^2 = sum over all other parameters",
    at="clip",
    needs="an embedding that is trained",
    stage=NORMS,
    where="embedding.weight",
)
def embedding_left_out_of_norm(site: Site) -> None:
    """Its gradient is added all the same."""

    def clip(original: Any, loss_B: Tensor, norm_sq: dict[str, Tensor]) -> Any:
        return original(loss_B, {n: s for n, s in norm_sq.items() if n != "embedding.weight"})

    site.wrap("clip", clip)


@fault(
    "norms of parameters added, not their squares",
    formula="n = sum_p n_p, in place of sqrt(sum_p n_p^2)",
    at="total_norm",
    needs="several parameters",
    stage=NORMS,
)
def norms_added(site: Site) -> None:
    """The L1 norm of the norms."""

    def total_norm(original: Any, norm_sq: dict[str, Tensor]) -> Tensor:
        return torch.stack([squares.sqrt() for squares in norm_sq.values()]).sum(dim=0)

    site.wrap("total_norm", total_norm)


@fault(
    "square root forgotten",
    formula="n = sum_p n_p^2, in place of its root",
    at="total_norm",
    stage=NORMS,
)
def norm_not_rooted(site: Site) -> None:
    """Squared norms are handed on as norms."""
    site.wrap("total_norm", lambda original, norm_sq: original(norm_sq).square())


@fault(
    "norms of the mean loss",
    formula="n_i / b, in place of n_i",
    at="run_norms",
    needs="several samples",
    stage=NORMS,
)
def norms_of_mean_loss(site: Site) -> None:
    """The backward that finds norms runs on the batch's mean loss."""

    def run_norms(original: Any, loss_B: Tensor, **options: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = original(loss_B, **options)
        return {name: squares / len(loss_B) ** 2 for name, squares in found.items()}

    site.wrap("run_norms", run_norms)


@fault(
    "a second backward adds to the reported norms",
    source="a research fork",
    formula="sqrt(2) n_i is reported, n_i was used",
    at="accumulate",
    needs="norms that are read after the step",
    stage=NORMS,
)
def norms_reported_twice(site: Site) -> None:
    """The update is right."""

    def accumulate(original: Any, batch: Any) -> Any:
        record = original(batch)
        if record.norm_B is None:
            return record
        scaled = {n: v * 2**0.5 for n, v in (record.norm_by_parameter_B or {}).items()}
        return replace(record, norm_B=record.norm_B * 2**0.5, norm_by_parameter_B=scaled or None)

    site.wrap("accumulate", accumulate)


@fault(
    "norms from this rank's shard alone",
    formula="n^2 over the rows that the rank holds, in place of all rows",
    at="norm_sq_of",
    needs="several ranks",
    stage=NORMS,
)
def norms_of_local_shard(site: Site) -> None:
    """Each rank sees a part of every gradient."""
    shapes = site.mode.engine.capture.shapes

    def norm_sq_of(original: Any, name: str, terms: tuple[Term, ...]) -> Tensor:
        rows = per_sample(terms).unflatten(1, (shapes[name][0], -1))
        first, last = row_range(shapes[name][0], dist.get_rank(), dist.get_world_size())
        return _square(rows[:, first:last].float())

    site.wrap("norm_sq_of", norm_sq_of)


@fault(
    "norm buffer not reset between micro-batches",
    formula="n_i^2 + n_j^2 of the sample at the same place before",
    at="run_norms, zero_grad",
    needs="several micro-batches",
    stage=NORMS,
)
def norm_buffer_not_reset(site: Site) -> None:
    """Squares add up until the step is over."""
    kept: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(0))

    def run_norms(original: Any, loss_B: Tensor, **options: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = original(loss_B, **options)
        for name, squares in found.items():
            before = kept[name][: len(squares)]
            squares[: len(before)] += before.to(squares)
            kept[name] = squares
        return found

    site.wrap("run_norms", run_norms)
    site.before("zero_grad", kept.clear)


def _gram(x_BTD: Tensor, dy_BTP: Tensor, weight: Tensor) -> Tensor:
    grams = (x_BTD @ x_BTD.mT) * (dy_BTP @ dy_BTP.mT)
    return (grams.float() * weight).sum(dim=(1, 2)).clamp_min(0.0)


@fault(
    "tiles off the diagonal of the Gram matrix counted once",
    formula="sum over s-tile <= t-tile, in place of twice those off the diagonal",
    at="norm_sq_of",
    needs="more positions than a tile has",
    stage=NORMS,
    where="*.weight",
    modes=WITH_OUTER,
)
def tile_pairs_counted_once(site: Site) -> None:
    """A kernel with tiles of 16 that uses the symmetry and forgets the factor of two."""

    def norm_sq_of(original: Any, name: str, terms: tuple[Term, ...]) -> Tensor:
        if not isinstance(terms[0], Outer) or len(terms) > 1:
            found: Tensor = original(name, terms)
            return found
        x, dy = terms[0].x_BTD, terms[0].dy_BTP
        tile = torch.arange(x.shape[1], device=x.device) // 16
        return _gram(x, dy, (tile[:, None] <= tile[None, :]).float())

    site.wrap("norm_sq_of", norm_sq_of)


@fault(
    "what is left over behind the last whole tile dropped",
    formula="sum over the first 64 outputs, in place of 65",
    at="norm_sq_of",
    needs="sizes one past a tile",
    stage=NORMS,
    where="blocks.*",
    modes=WITH_OUTER,
)
def last_tile_dropped(site: Site) -> None:
    """A kernel that rounds the number of its tiles down."""

    of_changed_outers(site, lambda t: Outer(t.x_BTD, t.dy_BTP[..., :64]))


@fault(
    "LayerNorm's input normalised with another epsilon",
    formula="xhat with epsilon 1e-2, in place of 1e-5",
    at="layer_norm_terms",
    needs="LayerNorm",
    in_bf16="it moves a norm by less than 1 %, as rounding does",
    stage=NORMS,
    where="blocks.*.norm.weight",
)
def layer_norm_epsilon(site: Site) -> None:
    """Normalised once more for the gradient, with a constant of the author's choosing."""

    def terms(original: Any, module: Any, x: Tensor, dy: Tensor) -> dict[str, Term]:
        epsilon, module.eps = module.eps, 1e-2
        try:
            found: dict[str, Term] = original(module, x, dy)
            return found
        finally:
            module.eps = epsilon

    site.wrap("layer_norm_terms", terms)


@fault(
    "tied weight: cross term counted once",
    formula="n^2 = |g_1|^2 + |g_2|^2 + <g_1, g_2>, in place of twice the last",
    at="norm_sq_of",
    needs="a tied head",
    stage=NORMS,
    where="embedding.weight",
)
def tied_cross_term_once(site: Site) -> None:
    """The factor of two in the square of a sum."""

    def norm_sq_of(original: Any, name: str, terms: tuple[Term, ...]) -> Tensor:
        whole: Tensor = original(name, terms)
        if len(terms) == 1:
            return whole
        return (whole + _apart(original, name, terms)) / 2

    site.wrap("norm_sq_of", norm_sq_of)


@fault(
    "last tile reads the next sample",
    source="a kernel whose loads have no mask",
    formula="n^2 over positions up to the next multiple of 16, which are the next sample's",
    at="norm_sq_of",
    needs="several samples, positions that a tile does not divide",
    stage=NORMS,
    where="blocks.*.weight, gate.weight",
    modes=WITH_OUTER,
)
def tile_reads_next_sample(site: Site) -> None:
    """What lies behind a sample's last position in memory is the next one's first."""

    def overread(values: Tensor) -> Tensor:
        missing = -values.shape[1] % 16
        following = torch.cat([values[1:], torch.zeros_like(values[:1])])
        return torch.cat([values, following[:, :missing]], dim=1)

    def norm_sq_of(original: Any, name: str, terms: tuple[Term, ...]) -> Tensor:
        only = terms[0]
        if len(terms) == 1 and isinstance(only, Outer):
            terms = (Outer(overread(only.x_BTD), overread(only.dy_BTP)),)
        found: Tensor = original(name, terms)
        return found

    site.wrap("norm_sq_of", norm_sq_of)


@fault(
    "runs of equal tokens cut where a tile ends",
    source="a kernel that adds over sorted tokens",
    formula="|a|^2 + |b|^2 in place of |a + b|^2 of rows on both sides of a tile's end",
    at="rows_norm_sq",
    needs="tokens that repeat, more positions than a tile has",
    stage=NORMS,
    where="embedding.weight, position.weight",
)
def token_runs_cut(site: Site) -> None:
    """The sum over a run is not carried from one tile of 16 to the next."""

    def norm_sq(original: Any, rows: Any, outer_norm: OuterNorm) -> Tensor:
        tokens_BT, order_BT = rows.tokens_BT.sort(dim=1, stable=True)
        sorted_BTD = rows.dy_BTD.float().take_along_dim(order_BT.unsqueeze(-1), dim=1)
        begins = torch.ones_like(tokens_BT)
        begins[:, 1:] = tokens_BT[:, 1:].ne(tokens_BT[:, :-1])
        begins[:, ::16] = 1
        run_BT = begins.cumsum(dim=1) - 1
        sums = torch.zeros_like(sorted_BTD)
        sums.scatter_add_(1, run_BT.unsqueeze(-1).expand_as(sorted_BTD), sorted_BTD)
        return _square(sums)

    site.wrap("rows_norm_sq", norm_sq)


@fault(
    "norms of different samples added over ranks",
    source="per-sample norms all-reduced as those of shards",
    formula="n_i^2 = sum over ranks of the squares at place i",
    at="run_norms",
    needs="several ranks, other data on each",
    stage=NORMS,
)
def norms_added_over_ranks(site: Site) -> None:
    """Right under tensor parallelism, where every rank has the same samples."""
    engine = site.mode.engine

    def run_norms(original: Any, loss_B: Tensor, **options: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = original(loss_B, **options)
        for squares in found.values():
            everyone = squares.new_zeros(64)
            everyone[: len(squares)] = squares * (not engine.is_standing_in)
            dist.all_reduce(everyone)
            squares.copy_(everyone[: len(squares)])
        return found

    site.wrap("run_norms", run_norms)


@fault(
    "LayerNorm's hooks registered twice",
    formula="2 g from the second step on, in place of g",
    at="layer_norm_terms, zero_grad",
    needs="LayerNorm, several steps",
    stage=NORMS,
    where="blocks.*.norm.*",
)
def layer_norm_hooked_twice(site: Site) -> None:
    """Whenever the model is set to train."""
    num_hooks = [1]

    def terms(original: Any, module: Any, x: Tensor, dy: Tensor) -> dict[str, Term]:
        found: dict[str, Term] = original(module, x, dy)
        return {n: Dense(num_hooks[0] * t.materialised().grad_B) for n, t in found.items()}

    def zero_grad(original: Any) -> None:
        num_hooks[0] = 2
        original()

    site.wrap("layer_norm_terms", terms)
    site.wrap("zero_grad", zero_grad)


@fault(
    "a single sample's dimension squeezed away",
    formula="n^2 = sum_t |g_t|^2 of a sample that is alone, in place of |sum_t g_t|^2",
    at="linear_terms",
    needs="a micro-batch of one sample, a biased linear layer, several positions",
    stage=NORMS,
    # Where a layer is used twice, its gradients are added before a norm is taken.
    where="blocks.*.right.bias, blocks.*.down.bias, gate.bias",
)
def lone_sample_squeezed(site: Site) -> None:
    """`squeeze()` without a dimension: its positions are then taken for samples."""
    _bias(site, lambda g_BTP: _square(g_BTP if len(g_BTP) == 1 else g_BTP.sum(dim=1)))


@fault(
    "last output left out of what a layer hands back",
    source="a kernel that rounds the number of its tiles down",
    formula="dx = dy[:64] W[:64], in place of dy W, of layers of 65 outputs",
    at="fused_backward",
    needs="sizes one past a tile, a layer below",
    stage=NORMS,
    # Its first use is the first that gets the wrong gradient. All before it get it from there.
    where="blocks.1.reused.*",
    modes=tuple(mode for mode in FSDP_MODES if "fuse" in mode),
)
def input_gradient_cut(site: Site) -> None:
    """The layer's own gradient is right; norm and sum of those before agree, and are wrong."""

    def backward(original: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, *rest = original(ctx, dy)
        weight_PD = ctx.saved_tensors[1]
        if dx is not None and len(weight_PD) == 65:
            dx = dx - dy[..., 64:] @ weight_PD[64:].to(dy.dtype)
        return dx, *rest

    site.wrap("fused_backward", backward)
