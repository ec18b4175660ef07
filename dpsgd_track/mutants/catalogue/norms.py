"""Faults of the per-sample norms. Most leave the clipped sum as it is where nothing is clipped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpsgd_track.distributed.sharding import row_range
from dpsgd_track.mutants.mutant import FSDP_MODES, FUSED_BK, mutant, on_site
from dpsgd_track.mutants.needs import Need
from dpsgd_track.mutants.seams import Seam
from dpsgd_track.mutants.site import Original, Site
from dpsgd_track.privacy.layers.positions import flatten_positions, summed_positions
from dpsgd_track.privacy.terms import Dense, Outer, OuterNorm, Rows, Term
from dpsgd_track.record.stages import Stage

Terms = dict[str, Term]

WITH_OUTER = tuple(mode for mode in FSDP_MODES if mode != FUSED_BK)
"""Modes that hold both factors of a linear layer's gradient when its norm is taken."""
TWO_PASS = tuple(mode for mode in WITH_OUTER if not mode.endswith("_bk"))
"""Those of them that do so for every layer; with bookkeeping, gradients may be formed instead."""


@dataclass(frozen=True)
class _WithNorm(Dense):
    """Right gradients with another tensor's norm."""

    wrong_B: Tensor

    def norm_sq(self, outer_norm: OuterNorm) -> Tensor:
        return self.wrong_B


def per_sample(terms: Sequence[Term]) -> Tensor:
    """Per-sample gradients [B, elements], the sum of `terms`."""
    return torch.stack([term.materialised().grad_B.flatten(1) for term in terms]).sum(dim=0)


def of_changed_outers(site: Site, change: Callable[[Outer], Outer]) -> None:
    """Compute norms of linear layers from changed factors; sums are formed from the real ones."""

    def norm_sq_of(original: Original, name: str, terms: Sequence[Term]) -> Any:
        return original(name, tuple(change(t) if isinstance(t, Outer) else t for t in terms))

    site.wrap(Seam.NORM_SQ_OF, norm_sq_of)


def _with_bias_norm(site: Site, norm_sq: Callable[[Tensor], Tensor]) -> None:
    """Compute squared bias norms by `norm_sq` from a linear layer's output gradients [B, T, P]."""

    def terms(original: Original, module: nn.Module, x: Tensor, dy: Tensor) -> Terms:
        right: Terms = original(module, x, dy)
        if "bias" in right:
            grad_B = right["bias"].materialised().grad_B
            right["bias"] = _WithNorm(grad_B, norm_sq(flatten_positions(dy).float()))
        return right

    site.wrap(Seam.LINEAR_TERMS, terms)


def _with_attribute(site: Site, seam: Seam, name: str, value: object) -> None:
    """Form a layer's terms as if its attribute `name` had the value `value`."""

    def terms(original: Original, module: nn.Module, x: Tensor, dy: Tensor) -> Any:
        right = getattr(module, name)
        setattr(module, name, value)
        try:
            return original(module, x, dy)
        finally:
            setattr(module, name, right)

    site.wrap(seam, terms)


def _apart(norm_sq_of: Original, name: str, terms: Sequence[Term]) -> Tensor:
    """Sum of the squared norms of each of `terms`, without their cross terms."""
    return torch.stack([norm_sq_of(name, (term,)) for term in terms]).sum(dim=0)


def _square(values: Tensor) -> Tensor:
    return values.flatten(1).square().sum(dim=1)


_mutant = partial(mutant, stage=Stage.NORMS)
_planted = partial(_mutant, by=on_site)
_norm_sq_of = partial(_mutant, at=Seam.NORM_SQ_OF)
_changed_outer = partial(_norm_sq_of, by=of_changed_outers, modes=WITH_OUTER)
_bias_norm = partial(_mutant, at=Seam.LINEAR_TERMS, by=_with_bias_norm)
_layer_norm = partial(_mutant, at=Seam.LAYER_NORM_TERMS)


@_bias_norm(
    "bias norm from the wrong Gram matrix",
    "n^2 = |G G^T|_F over positions, in place of |sum_t g_t|^2",
    Need.BIASED_LINEAR,
    Need.POSITIONS,
    source="Opacus #751",
    where=("*.bias",),
)
def bias_norm_by_gram(g_BTP: Tensor) -> Tensor:
    """A bias gradient is a sum over positions, whose norm is not that of their Gram matrix."""
    return (g_BTP @ g_BTP.mT).flatten(1).norm(dim=1)


@_bias_norm(
    "bias norm without the cross terms of positions",
    "n^2 = sum_t |g_t|^2, in place of |sum_t g_t|^2",
    Need.BIASED_LINEAR,
    Need.POSITIONS,
    where=("*.bias",),
)
def bias_positions_apart(g_BTP: Tensor) -> Tensor:
    """Squares are taken before the sum over positions."""
    return _square(g_BTP)


@_changed_outer(
    "norm of a linear layer from summed positions",
    "n = |sum_t dy_t| |sum_t x_t|, in place of |sum_t dy_t x_t^T|",
    Need.POSITIONS,
    where=("*.weight",),
)
def positions_summed_first(outer: Outer) -> Outer:
    """Right for one position: the rule for two-dimensional inputs, applied to three dimensions."""
    return Outer(outer.x_BTD.sum(1, keepdim=True), outer.dy_BTP.sum(1, keepdim=True))


@_norm_sq_of(
    "tied weight: norms of both uses added",
    "n^2 = |g_1|^2 + |g_2|^2, in place of |g_1 + g_2|^2",
    Need.TIED_HEAD,
    source="tensorflow/privacy 44dfac3",
    where=("embedding.weight",),
)
def tied_norms_added(original: Original, name: str, terms: Sequence[Term]) -> Tensor:
    """The cross term of embedding and head is missing."""
    return _apart(original, name, terms)


@_norm_sq_of(
    "reused layer: norms of its uses added",
    "n^2 = |g_1|^2 + |g_2|^2, in place of |g_1 + g_2|^2",
    Need.REUSED_MODULE,
    source="tensorflow/privacy 44dfac3",
    where=("*.reused.weight",),
    modes=TWO_PASS,
)
def reused_norms_added(original: Original, name: str, terms: Sequence[Term]) -> Any:
    """The uses are concatenated along the positions."""
    if not name.endswith("reused.weight") or not isinstance(terms[0], Outer):
        return original(name, terms)
    halves = zip(terms[0].x_BTD.chunk(2, 1), terms[0].dy_BTP.chunk(2, 1), strict=True)
    return _apart(original, name, [Outer(x, dy) for x, dy in halves])


@_mutant(
    "reused layer: one use overwrites the other",
    "g = g_1, in place of g_1 + g_2",
    Need.REUSED_MODULE,
    at=Seam.JOIN,
    source="fastDP",
    where=("*.reused.*",),
)
def reused_use_lost(original: Original, terms: Sequence[Term]) -> Any:
    """Activations of the first call are gone when the backward needs them."""
    is_reused = len({type(term) for term in terms}) == 1
    return original(terms[:1] if is_reused else terms)


@_mutant(
    "embedding norm without adding equal tokens",
    "n^2 = sum_t |dy_t|^2, in place of sum_v |sum_{t: v_t = v} dy_t|^2",
    Need.REPEATED_TOKENS,
    at=Seam.ROWS_NORM_SQ,
    # All positions of padding are equal.
    where=("embedding.weight", "position.weight"),
)
def repeated_tokens_apart(original: Original, rows: Rows, outer_norm: OuterNorm) -> Tensor:
    """Squares are taken before equal rows are added."""
    return _square(rows.dy_BTD.float())


@_planted(
    "padding row of the embedding counted",
    "g_v of the padding index v kept, in place of 0",
    Need.PADDING_INDEX,
    at=Seam.EMBEDDING_TERMS,
    where=("embedding.weight",),
)
def padding_row_counted(site: Site) -> None:
    """torch gives the row of padding_idx no gradient."""
    _with_attribute(site, Seam.EMBEDDING_TERMS, "padding_idx", None)


@_layer_norm(
    "LayerNorm's weight gradient from the raw input",
    "sum_t dy_t x_t, in place of sum_t dy_t xhat_t",
    Need.LAYER_NORM,
    where=("blocks.*.norm.weight",),
)
def layer_norm_input_not_normalised(
    original: Original, module: nn.Module, x: Tensor, dy: Tensor
) -> Terms:
    """The hook sees the module's input, not the normalised input that multiplies the weight."""
    return {**original(module, x, dy), "weight": summed_positions(dy.float() * x.float())}


@_layer_norm(
    "LayerNorm's bias forgotten",
    "0, in place of sum_t dy_t",
    Need.LAYER_NORM,
    where=("blocks.*.norm.bias",),
)
def layer_norm_bias_forgotten(
    original: Original, module: nn.Module, x: Tensor, dy: Tensor
) -> Terms:
    """The bias has neither a norm nor a gradient."""
    right: Terms = original(module, x, dy)
    return {**right, "bias": Dense(torch.zeros_like(right["bias"].materialised().grad_B))}


@_mutant(
    "RMSNorm's norm without the cross terms of positions",
    "n^2 = sum_t |dy_t xhat_t|^2, in place of |sum_t dy_t xhat_t|^2",
    Need.RMS_NORM,
    Need.POSITIONS,
    at=Seam.RMS_NORM_TERMS,
    where=("norm.weight",),
)
def rms_norm_positions_apart(original: Original, module: nn.Module, x: Tensor, dy: Tensor) -> Terms:
    """Squares are taken before the sum over positions."""
    x_BTD, dy_BTD = flatten_positions(x.float()), flatten_positions(dy.float())
    xhat = x_BTD * torch.rsqrt(x_BTD.square().mean(dim=-1, keepdim=True))
    right = original(module, x, dy)["weight"].materialised()
    return {"weight": _WithNorm(right.materialised().grad_B, _square(dy_BTD * xhat))}


@_mutant(
    "embedding left out of the norm",
    "n^2 = sum over all other parameters",
    Need.TRAINED_EMBEDDING,
    at=Seam.CLIP,
    where=("embedding.weight",),
)
def embedding_left_out_of_norm(
    original: Original, loss_B: Tensor, norm_sq: dict[str, Tensor]
) -> Any:
    """The embedding's gradient is added all the same."""
    return original(loss_B, {n: s for n, s in norm_sq.items() if n != "embedding.weight"})


@_mutant(
    "norms of parameters added, not their squares",
    "n = sum_p n_p, in place of sqrt(sum_p n_p^2)",
    Need.PARAMETERS,
    at=Seam.TOTAL_NORM,
)
def norms_added(original: Original, norm_sq: dict[str, Tensor]) -> Tensor:
    """The L1 norm of the norms."""
    return torch.stack([squares.sqrt() for squares in norm_sq.values()]).sum(dim=0)


@_mutant("square root forgotten", "n = sum_p n_p^2, in place of its root", at=Seam.TOTAL_NORM)
def norm_not_rooted(original: Original, norm_sq: dict[str, Tensor]) -> Any:
    """Squared norms are passed on as norms."""
    return original(norm_sq).square()


@_mutant("norms of the mean loss", "n_i / b, in place of n_i", Need.SAMPLES, at=Seam.RUN_NORMS)
def norms_of_mean_loss(original: Original, loss_B: Tensor, **options: Any) -> dict[str, Tensor]:
    """The backward that computes norms runs on the mean loss of the batch."""
    norm_sq = original(loss_B, **options)
    return {name: squares / len(loss_B) ** 2 for name, squares in norm_sq.items()}


@_mutant(
    "a second backward adds to the reported norms",
    "sqrt(2) n_i is reported, n_i was used",
    Need.NORMS_AFTER_STEP,
    at=Seam.ACCUMULATE,
    source="a research fork",
)
def norms_reported_twice(original: Original, batch: Any) -> Any:
    """The update is right; only the reported norms are wrong."""
    record = original(batch)
    if record.norm_B is None:
        return record
    scaled = {n: v * 2**0.5 for n, v in (record.norm_by_parameter_B or {}).items()}
    return replace(record, norm_B=record.norm_B * 2**0.5, norm_by_parameter_B=scaled or None)


@_planted(
    "norms from this rank's shard alone",
    "n^2 over the rows that the rank holds, in place of all rows",
    Need.RANKS,
    at=Seam.NORM_SQ_OF,
)
def norms_of_local_shard(site: Site) -> None:
    """Each rank sees only its rows of every gradient."""
    shapes = site.mode.engine.capture.shapes

    def norm_sq_of(original: Original, name: str, terms: Sequence[Term]) -> Tensor:
        rows = per_sample(terms).unflatten(1, (shapes[name][0], -1))
        first, last = row_range(shapes[name][0], dist.get_rank(), dist.get_world_size())
        return _square(rows[:, first:last].float())

    site.wrap(Seam.NORM_SQ_OF, norm_sq_of)


@_planted(
    "norm buffer not reset between micro-batches",
    "n_i^2 + n_j^2 of the sample at the same place before",
    Need.MICRO_BATCHES,
    at=(Seam.RUN_NORMS, Seam.ZERO_GRAD),
)
def norm_buffer_not_reset(site: Site) -> None:
    """Squares accumulate until the end of the step."""
    kept: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(0))

    def add_kept(norm_sq: dict[str, Tensor]) -> None:
        for name, squares in norm_sq.items():
            before = kept[name][: len(squares)]
            squares[: len(before)] += before.to(squares)
            kept[name] = squares

    site.after(Seam.RUN_NORMS, add_kept)
    site.before(Seam.ZERO_GRAD, kept.clear)


@_norm_sq_of(
    "tiles off the diagonal of the Gram matrix counted once",
    "sum over s-tile <= t-tile, in place of twice those off the diagonal",
    Need.POSITIONS_PAST_TILE,
    where=("*.weight",),
    modes=WITH_OUTER,
)
def tile_pairs_counted_once(original: Original, name: str, terms: Sequence[Term]) -> Any:
    """A kernel with tiles of 16 uses the symmetry and forgets the factor of two."""
    if not isinstance(terms[0], Outer) or len(terms) > 1:
        return original(name, terms)
    x, dy = terms[0].x_BTD, terms[0].dy_BTP
    tile = torch.arange(x.shape[1], device=x.device) // 16
    is_counted = (tile[:, None] <= tile[None, :]).float()
    grams = (x @ x.mT) * (dy @ dy.mT)
    return (grams.float() * is_counted).sum(dim=(1, 2)).clamp_min(0.0)


@_changed_outer(
    "what is left over behind the last whole tile dropped",
    "sum over the first 64 outputs, in place of 65",
    Need.SIZES_PAST_TILE,
    where=("blocks.*",),
)
def last_tile_dropped(outer: Outer) -> Outer:
    """A kernel rounds its number of tiles down."""
    return Outer(outer.x_BTD, outer.dy_BTP[..., :64])


@_planted(
    "LayerNorm's input normalised with another epsilon",
    "xhat with epsilon 1e-2, in place of 1e-5",
    Need.LAYER_NORM,
    at=Seam.LAYER_NORM_TERMS,
    where=("blocks.*.norm.weight",),
)
def layer_norm_epsilon(site: Site) -> None:
    """The input is normalised again for the gradient, with a hard-coded epsilon."""
    _with_attribute(site, Seam.LAYER_NORM_TERMS, "eps", 1e-2)


@_norm_sq_of(
    "tied weight: cross term counted once",
    "n^2 = |g_1|^2 + |g_2|^2 + <g_1, g_2>, in place of twice the last",
    Need.TIED_HEAD,
    where=("embedding.weight",),
)
def tied_cross_term_once(original: Original, name: str, terms: Sequence[Term]) -> Any:
    """The factor of two in the square of a sum is missing."""
    whole = original(name, terms)
    return whole if len(terms) == 1 else (whole + _apart(original, name, terms)) / 2


def _overread(values: Tensor) -> Tensor:
    """`values`, padded to a multiple of 16 positions with what follows in memory: [B, T, D]."""
    missing = -values.shape[1] % 16
    following = torch.cat([values[1:], torch.zeros_like(values[:1])])
    return torch.cat([values, following[:, :missing]], dim=1)


@_norm_sq_of(
    "last tile reads the next sample",
    "n^2 over positions up to the next multiple of 16, which are the next sample's",
    Need.SAMPLES,
    Need.POSITIONS_UNDIVIDED,
    source="a kernel whose loads have no mask",
    where=("blocks.*.weight", "gate.weight"),
    modes=WITH_OUTER,
)
def tile_reads_next_sample(original: Original, name: str, terms: Sequence[Term]) -> Any:
    """The memory behind a sample's last position holds the next sample's first."""
    only = terms[0]
    if len(terms) == 1 and isinstance(only, Outer):
        terms = (Outer(_overread(only.x_BTD), _overread(only.dy_BTP)),)
    return original(name, terms)


@_mutant(
    "runs of equal tokens cut where a tile ends",
    "|a|^2 + |b|^2 in place of |a + b|^2 of rows on both sides of a tile's end",
    Need.REPEATED_TOKENS,
    Need.POSITIONS_PAST_TILE,
    at=Seam.ROWS_NORM_SQ,
    source="a kernel that adds over sorted tokens",
    where=("embedding.weight", "position.weight"),
)
def token_runs_cut(original: Original, rows: Rows, outer_norm: OuterNorm) -> Tensor:
    """The sum over a run is not carried from one tile of 16 to the next."""
    tokens_BT, order_BT = rows.tokens_BT.sort(dim=1, stable=True)
    sorted_BTD = rows.dy_BTD.float().take_along_dim(order_BT.unsqueeze(-1), dim=1)
    begins = torch.ones_like(tokens_BT)
    begins[:, 1:] = tokens_BT[:, 1:].ne(tokens_BT[:, :-1])
    begins[:, ::16] = 1
    run_BT = begins.cumsum(dim=1) - 1
    sums = torch.zeros_like(sorted_BTD)
    sums.scatter_add_(1, run_BT.unsqueeze(-1).expand_as(sorted_BTD), sorted_BTD)
    return _square(sums)


@_planted(
    "norms of different samples added over ranks",
    "n_i^2 = sum over ranks of the squares at place i",
    Need.RANKS,
    Need.OTHER_DATA,
    at=Seam.RUN_NORMS,
    source="per-sample norms all-reduced as those of shards",
)
def norms_added_over_ranks(site: Site) -> None:
    """Right under tensor parallelism, where all ranks have the same samples."""
    engine = site.mode.engine

    def add_over_ranks(norm_sq: dict[str, Tensor]) -> None:
        for squares in norm_sq.values():
            everyone = squares.new_zeros(64)
            everyone[: len(squares)] = squares * (not engine.is_standing_in)
            dist.all_reduce(everyone)
            squares.copy_(everyone[: len(squares)])

    site.after(Seam.RUN_NORMS, add_over_ranks)


@_planted(
    "LayerNorm's hooks registered twice",
    "2 g from the second step on, in place of g",
    Need.LAYER_NORM,
    Need.STEPS,
    at=(Seam.LAYER_NORM_TERMS, Seam.ZERO_GRAD),
    where=("blocks.*.norm.*",),
)
def layer_norm_hooked_twice(site: Site) -> None:
    """Hooks are registered again whenever the model is set to train."""
    num_hooks = [1]

    def terms(original: Original, module: nn.Module, x: Tensor, dy: Tensor) -> Terms:
        right: Terms = original(module, x, dy)
        return {n: Dense(num_hooks[-1] * t.materialised().grad_B) for n, t in right.items()}

    site.wrap(Seam.LAYER_NORM_TERMS, terms)
    site.before(Seam.ZERO_GRAD, lambda: num_hooks.append(2))


@_bias_norm(
    "a single sample's dimension squeezed away",
    "n^2 = sum_t |g_t|^2 of a sample that is alone, in place of |sum_t g_t|^2",
    Need.LONE_SAMPLE,
    Need.BIASED_LINEAR,
    Need.POSITIONS,
    # If a layer is used twice, its gradients are added before a norm is taken.
    where=("blocks.*.right.bias", "blocks.*.down.bias", "gate.bias"),
)
def lone_sample_squeezed(g_BTP: Tensor) -> Tensor:
    """`squeeze()` without a dimension makes a lone sample's positions look like samples."""
    return _square(g_BTP if len(g_BTP) == 1 else g_BTP.sum(dim=1))


@_mutant(
    "last output left out of what a layer hands back",
    "dx = dy[:64] W[:64], in place of dy W, of layers of 65 outputs",
    Need.SIZES_PAST_TILE,
    Need.LAYER_BELOW,
    at=Seam.FUSED_BACKWARD,
    source="a kernel that rounds the number of its tiles down",
    # Its first use is the first to get the wrong gradient, which all layers before it inherit.
    where=("blocks.1.reused.*",),
    modes=tuple(mode for mode in FSDP_MODES if "fuse" in mode),
)
def input_gradient_cut(original: Original, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The layer's own gradient is right; earlier layers' norms and sums are wrong, but agree."""
    dx, *rest = original(ctx, dy)
    weight_PD = ctx.saved_tensors[1]
    if dx is not None and len(weight_PD) == 65:
        dx = dx - dy[..., 64:] @ weight_PD[64:].to(dy.dtype)
    return dx, *rest
