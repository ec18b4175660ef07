"""Rules of layers give the same norms and clipped sums by Triton kernels as by their references.

On a GPU the kernels run for real: `python -m pytest -n 0 tests/test_triton_layers.py`. Elsewhere
they run under Triton's interpreter, which `tests/conftest.py` switches on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

pytest.importorskip("triton", reason="needs triton")

from dpsgd_track.kernels.flash_norm import flash_norm_sq
from dpsgd_track.kernels.flash_norm.triton import BLOCK_T
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.layers import find_rule
from dpsgd_track.privacy.norms import NORM_RULES
from dpsgd_track.privacy.recurrent import RecurrentLayer
from dpsgd_track.privacy.terms import Term, clipped_sums_of, norms_sq_of

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter's products take float16, and not bfloat16.
LOW = torch.bfloat16 if ON_GPU else torch.float16
TOLERANCES = {torch.float32: 1e-5, LOW: 2e-5}
"""Both sides add up the same products in float32, in another order."""
KERNELS = {
    "clipped_product": "uses_tensor_cores",
    "flash_norm": "uses_tensor_cores",
    "flash_norm.reference": "uses_tensor_cores",
    "embedding_norm": "runs_triton",
    "normalisation": "runs_triton",
    "position_sum": "runs_triton",
    "weighted_sum": "runs_triton",
}
"""Dispatch of each kernel, by device and type."""
B, T = 3, BLOCK_T + 1

Case = tuple[Callable[[], nn.Module], Callable[[], Tensor], torch.dtype]


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokens(size: int) -> Tensor:
    return torch.randint(0, 9, (B, size), generator=torch.Generator().manual_seed(size))


# One past a block of positions, of features, and of the elements of a gradient.
LAYERS: dict[str, Case] = {
    "linear": (lambda: nn.Linear(129, 257), lambda: floats(B, T, 129), LOW),
    "conv2d": (lambda: nn.Conv2d(29, 65, 3), lambda: floats(B, 29, 7, 15), LOW),
    "conv-grouped": (
        lambda: nn.Conv2d(30, 130, 3, groups=2),
        lambda: floats(B, 30, 7, 15),
        torch.float32,
    ),
    "conv-transposed": (
        lambda: nn.ConvTranspose2d(33, 65, 2, stride=2),
        lambda: floats(B, 33, 5, 13),
        torch.float32,
    ),
    "conv3d": (lambda: nn.Conv3d(5, 65, 2), lambda: floats(B, 5, 3, 6, 14), torch.float32),
    "embedding": (lambda: nn.Embedding(9, 513), lambda: tokens(T), LOW),
    "embedding-bag": (
        lambda: nn.EmbeddingBag(9, 513, mode="mean", padding_idx=2),
        lambda: tokens(T),
        LOW,
    ),
    "layer-norm": (lambda: nn.LayerNorm(129), lambda: floats(B, T, 129), torch.float32),
    "layer-norm-channels": (
        lambda: ConvNextLayerNorm(65, data_format="channels_first"),
        lambda: floats(B, 65, 5, 13),
        torch.float32,
    ),
    "layer-norm-t5": (lambda: T5LayerNorm(129), lambda: floats(B, T, 129), torch.float32),
    "group-norm": (lambda: nn.GroupNorm(3, 129), lambda: floats(B, 129, 5, 13), torch.float32),
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Chooses Triton kernels, in place of the device, or references."""

    def choose(is_triton: bool) -> None:
        for name, choice in KERNELS.items():
            module = importlib.import_module(f"dpsgd_track.kernels.{name}")
            widest = 2 if choice == "uses_tensor_cores" else 4

            def chosen(*tensors: Tensor, widest: int = widest) -> bool:
                floating = [t for t in tensors if t.is_floating_point()]
                return is_triton and all(t.dtype.itemsize <= widest for t in floating)

            monkeypatch.setattr(module, choice, chosen)

    return choose


def values_of(terms: dict[str, Term], factor_B: Tensor) -> dict[str, Tensor]:
    """Norms and clipped sums of each parameter."""
    joined = {name: (term,) for name, term in terms.items()}
    norms = norms_sq_of(joined, lambda name: flash_norm_sq, lambda name, term: False)
    sums = clipped_sums_of(joined, dict.fromkeys(joined, factor_B))
    return {f"norm of {n}": x for n, x in norms.items()} | {
        f"sum of {n}": x for n, x in sums.items()
    }


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        expected = wanted[name].double()
        error = float((value.double() - expected).norm() / expected.norm())
        assert error < tolerance, name


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_norms_and_sums_of_the_references(
    name: str, kernels: Callable[[bool], None]
) -> None:
    make, inputs, dtype = LAYERS[name]
    torch.manual_seed(0)
    module, x = make().to(DEVICE, dtype), inputs().to(DEVICE)
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        dy = floats(*module(x).shape).to(DEVICE, dtype)
    rule = find_rule(module)
    assert rule is not None
    factor_B = torch.tensor([1.0, 3e-4, 0.7], device=DEVICE)
    found = []
    for is_triton in (True, False):
        kernels(is_triton)
        found.append(values_of(rule.terms(module, x, dy), factor_B))
    assert_alike(*found, TOLERANCES[dtype])


def test_a_recurrent_layer_has_the_norms_and_sums_of_the_references(
    kernels: Callable[[bool], None],
) -> None:
    torch.manual_seed(0)
    model = nn.LSTM(33, 65, batch_first=True).to(DEVICE)
    x = floats(B, T, 33).to(DEVICE)
    factor_B = torch.tensor([1.0, 3e-4, 0.7], device=DEVICE)
    found = []
    for is_triton in (True, False):
        kernels(is_triton)
        capture = Capture(model, NORM_RULES["flash"], keep=True)
        (layer,) = capture.layers
        capture.register(RecurrentLayer(capture, layer))
        with capture.sample_batch(B):
            loss_B = F.silu(model(x)[0]).flatten(1).sum(dim=1)
            norms = capture.run_norms(loss_B, retain_graph=False)
            sums = capture.kept_sums(list(norms), factor_B)
        found.append({f"norm of {n}": v for n, v in norms.items()} | sums)
    assert_alike(*found, TOLERANCES[torch.float32])
