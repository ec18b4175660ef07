"""A mode that clips by another rule is told which; an ordinary fault is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpsgd_track.comparison.diagnose.clipping_rules import clipping_rule
from dpsgd_track.comparison.measure.alignment import align
from dpsgd_track.record.trajectory import SAMPLE_COLUMNS, Trajectory
from tests.support.synthetic_group import compared, mode_run, trajectory

Floats = np.ndarray[Any, np.dtype[np.float64]]
Factors = Callable[[Floats, Floats], Floats]
"""From norms [S, N, P] and C [S, 1, 1] to the factor of each parameter's gradient."""

NAMES = [f"layers.{i}.{which}" for i in range(6) for which in ("weight", "bias")]
S, N, P, K = 4, 6, len(NAMES), 8
RNG = np.random.default_rng(3)
SIZES = np.exp(RNG.normal(0, 1.5, P))
GRADIENTS = (
    (RNG.normal(0, 1, (S, N, P, K)) + 0.5 * RNG.normal(0, 1, (S, 1, P, K)))
    * SIZES[:, None]
    * np.exp(RNG.normal(0, 0.3, (S, N, 1, 1)))
)
NORMS = np.sqrt(np.square(GRADIENTS).mean(axis=-1))
TOTAL = np.sqrt(np.square(NORMS).sum(axis=-1))
BOUND = np.array([np.median(TOTAL)] * 2 + [TOTAL.min() / 2] * 2)[:, None, None]
UNTOLD = np.full((S, N), np.nan)


def flat(norms: Floats, bound: Floats) -> Floats:
    return np.minimum(1, bound / np.sqrt(np.square(norms).sum(axis=2, keepdims=True)))


def by_parameter(norms: Floats, bound: Floats, share: float = P**-0.5) -> Floats:
    return np.minimum(1, share * bound / norms)


def by_layer(norms: Floats, bound: Floats, share: float = 6**-0.5) -> Floats:
    squares = np.square(norms).reshape(*norms.shape[:2], 6, 2).sum(axis=3, keepdims=True)
    whole = np.broadcast_to(np.sqrt(squares), (*norms.shape[:2], 6, 2)).reshape(norms.shape)
    return np.minimum(1, share * bound / whole)


def record(rule: Factors, factor: Floats | None = None) -> Trajectory:
    """What a mode records that clips by `rule`; by default without its factors."""
    factors = np.broadcast_to(rule(NORMS, BOUND), NORMS.shape)
    sums = (factors[..., None] * GRADIENTS).sum(axis=1)
    t = trajectory(steps=S, samples=N, layers=P - 1, noise_std=0.0)
    return replace(
        t,
        max_grad_norm=BOUND[:, 0, 0],
        parameter_names=np.array(NAMES),
        sample_norm=TOTAL,
        sample_norm_by_parameter=NORMS,
        clip_factor=UNTOLD if factor is None else factor,
        gradient_sketch=sums,
        noised_sketch=sums,
    )


REFERENCE = record(flat, flat(NORMS, BOUND)[..., 0])


def said(mode: Trajectory) -> str:
    return clipping_rule(align(REFERENCE, mode))


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (by_parameter, "each parameter by itself at C/sqrt(L), where L = 12"),
        (by_layer, "each layer by itself at C/sqrt(L), where L = 6"),
        (lambda n, c: by_layer(n, c, 1.0), "each layer by itself at C"),
        (lambda n, c: by_parameter(n, c, 1 / P), "each parameter by itself at C/L, where L = 12"),
    ],
    ids=["parameters", "layers", "layers at C", "parameters at C/L"],
)
def test_clipping_of_each_part_is_named_with_its_bound(rule: Factors, wanted: str) -> None:
    assert said(record(rule)) == f"consistent with clipping {wanted}"


def test_one_sample_alone_tells_parameters_from_layers_exactly() -> None:
    def alone(t: Trajectory) -> Trajectory:
        first = GRADIENTS[:, :1]
        rule = flat if t is REFERENCE else by_layer
        sums = (np.broadcast_to(rule(NORMS, BOUND), NORMS.shape)[:, :1, :, None] * first).sum(1)
        kept = {name: getattr(t, name)[:, :1] for name in SAMPLE_COLUMNS}
        changed: dict[str, Any] = {**kept, "gradient_sketch": sums}
        return replace(t, **changed)

    found = clipping_rule(align(alone(REFERENCE), alone(record(by_layer))))
    assert found == "consistent with clipping each layer by itself at C/sqrt(L), where L = 6"
    off = alone(record(by_layer))
    off = replace(off, gradient_sketch=off.gradient_sketch * 1.05)
    assert clipping_rule(align(alone(REFERENCE), off)) == ""


@pytest.mark.parametrize(
    ("factor", "wanted"),
    [
        (lambda n, c: c / (n + 0.01), "automatic clipping, C / (norm + 0.01)"),
        (lambda n, c: 1 / (n + 0.01), "automatic clipping, 1 / (norm + 0.01)"),
        (lambda n, c: c / n, "normalisation, C / norm"),
    ],
)
@pytest.mark.parametrize("rounding", [0.0, 1e-7])
def test_automatic_clipping_is_named_with_its_constant(
    factor: Callable[[Floats, Floats], Floats], wanted: str, rounding: float
) -> None:
    factors = factor(TOTAL, BOUND[..., 0]) * (1 + rounding * RNG.normal(size=(S, N)))
    mode = record(lambda n, c: factors[..., None], factors)
    assert said(mode) == f"consistent with {wanted} in place of min(1, C / norm)"


ORDINARY: dict[str, Factors] = {
    "right": flat,
    "not clipped": lambda n, c: np.ones_like(n),
    "scaled": lambda n, c: 1.5 * flat(n, c),
    "mean factor": lambda n, c: flat(n, c).mean(axis=1, keepdims=True),
    "twice the bound": lambda n, c: flat(n, 2 * c),
    "bound ignored": lambda n, c: flat(n, np.ones_like(c)),
    "one layer twice": lambda n, c: flat(n, c) * np.where(np.arange(P) == 4, 2.0, 1.0),
    "one layer left out": lambda n, c: flat(n, c) * (np.arange(P) != 4),
    "norm of weights alone": lambda n, c: flat(n * (np.arange(P) % 2 == 0), c),
    "half of the parameters": lambda n, c: flat(n, c) * np.where(np.arange(P) < 6, 0.5, 1.0),
    "one sample lost": lambda n, c: flat(n, c) * (np.arange(N)[:, None] != 2),
}


@pytest.mark.parametrize("rule", ORDINARY.values(), ids=list(ORDINARY))
@pytest.mark.parametrize("is_told", [True, False], ids=["factors told", "untold"])
def test_an_ordinary_fault_is_no_rule(rule: Factors, is_told: bool) -> None:
    factors = np.broadcast_to(rule(NORMS, BOUND), NORMS.shape)
    assert said(record(rule, factors[..., 0] if is_told else None)) == ""


def test_the_sentence_of_the_verdict_names_the_rule_and_the_verdict_stays_bug() -> None:
    runs = [
        mode_run("reference", "clip", REFERENCE),
        mode_run("my_mode:MyMode", "clip", record(by_layer)),
    ]
    (_, mode) = compared(runs).modes
    assert mode.verdict == "BUG"
    assert "consistent with clipping each layer by itself at C/sqrt(L), where L = 6" in (
        mode.sentence
    )


def test_without_the_oracles_norms_nothing_is_suggested() -> None:
    blank = np.full(NORMS.shape, np.nan)
    blind = replace(REFERENCE, sample_norm_by_parameter=blank)
    assert clipping_rule(align(blind, record(by_layer))) == ""
