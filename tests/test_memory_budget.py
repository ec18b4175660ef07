"""A budget of memory changes what one pass keeps and what it costs, never what it computes."""

from __future__ import annotations

import copy
import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dpsgd_track.config import num_bytes
from dpsgd_track.library import PrivateTraining, make_private
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.memory_budget import MemoryBudget, storages
from dpsgd_track.privacy.terms import Dense, Outer

B, T, V, NUM_BLOCKS = 3, 12, 32, 4
SIZES = (B, B, 1, 1, 0, B + 1, 7)
"""Samples of each batch: a new number is measured, 4 is not so far from 3, and some are empty."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)

_Run = tuple[list[SampleRecord], dict[str, Tensor]]


def _model(*, is_tied: bool, is_checkpointing: bool) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=is_tied,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config)
    if is_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model.train()


def _private(model: nn.Module, budget: int | str | None, **settings: Any) -> PrivateTraining:
    settings = {"mode": "flash_bk", "loss": "causal-lm", "spot_check": False} | settings
    model = copy.deepcopy(model)
    return make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        expected_batch_size=B,
        memory_budget=budget,
        **settings,
    )


def _tokens(num_samples: int) -> Tensor:
    return torch.randint(V, (num_samples, T), generator=torch.Generator().manual_seed(num_samples))


def _capture(private: PrivateTraining) -> Any:
    return private.mode.engine.capture  # type: ignore[attr-defined]


def _add(private: PrivateTraining, num_samples: int = B) -> SampleRecord:
    tokens = _tokens(num_samples)
    private.backward({"input_ids": tokens}, tokens)
    assert private.last is not None
    return private.last


def _run(private: PrivateTraining) -> _Run:
    """Records of each batch, and the sum of all."""
    records = [_add(private, size) for size in SIZES]
    return records, dict(private.mode.clipped_sum().gradients)


def _assert_same(found: _Run, wanted: _Run, tolerance: float) -> None:
    for one, other in zip(found[0], wanted[0], strict=True):
        for name in ("loss_B", "norm_B", "clip_factor_B"):
            torch.testing.assert_close(
                getattr(one, name), getattr(other, name), rtol=tolerance, atol=0
            )
    assert set(found[1]) == set(wanted[1])
    for name, total in wanted[1].items():
        error = (found[1][name] - total).norm() / total.norm()
        assert error <= tolerance, name


def _all_kept(model: nn.Module, **settings: Any) -> int:
    """Bytes of all terms that a budget bounds."""
    private = _private(model, "1TiB", **settings)
    return _kept_bytes(private)


def _kept_bytes(private: PrivateTraining) -> int:
    """Bytes that the second batch of a shape keeps of what the budget bounds."""
    capture = _capture(private)
    run_norms, found = capture.run_norms, []

    def measured(loss_B: Tensor, *, retain_graph: bool) -> dict[str, Tensor]:
        norm_sq: dict[str, Tensor] = run_norms(loss_B, retain_graph=retain_graph)
        counted = [terms for n, terms in capture._kept.items() if n in capture.split.counted]
        found.append({s.data_ptr(): s.nbytes() for terms in counted for s in storages(terms)})
        return norm_sq

    capture.run_norms = measured
    for _ in range(2):
        _add(private)
    assert not found[0]  # measured
    return sum(found[1].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("is_checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("mode", ["flash_bk", "flash_fuse_bk"])
def test_norms_factors_and_sums_are_those_of_one_pass(
    mode: str, is_checkpointing: bool, dtype: torch.dtype
) -> None:
    model = _model(is_tied=mode == "flash_bk", is_checkpointing=is_checkpointing)
    settings: dict[str, Any] = {"mode": mode, "param_dtype": dtype}
    wanted = _run(_private(model, None, **settings))
    everything = _all_kept(model, **settings)
    # One pass and two round gradients to the type that they are kept in, or do not.
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    runs = [_run(_private(model, int(share * everything), **settings)) for share in SHARES[:3]]
    for run in runs:
        _assert_same(run, wanted, tolerance)
    _assert_same(runs[2], runs[1], 0 if dtype == torch.bfloat16 else tolerance)


def test_a_smaller_budget_drops_more_layers_from_the_loss_down() -> None:
    model = _model(is_tied=False, is_checkpointing=True)
    everything = _all_kept(model)
    dropped, recomputed = [], []
    for share in SHARES[1:]:
        budget = int(share * everything)
        private = _private(model, budget)
        assert _kept_bytes(private) <= budget
        dropped.append(_capture(private).split.dropped)
        calls: list[object] = []
        for block in private.model.model.layers:  # type: ignore[union-attr]
            block.self_attn.register_forward_pre_hook(
                lambda *args, calls=calls: calls.append(args[0])
            )
        _add(private)
        # In the forward, and in the first backward; what is left is the second's.
        recomputed.append(len(calls) - 2 * NUM_BLOCKS)
    assert all(more > less for more, less in itertools.pairwise(dropped))
    assert dropped[-1] == frozenset()
    assert recomputed == sorted(recomputed, reverse=True)
    assert recomputed[-1] == 0
    assert recomputed[0] in range(2, NUM_BLOCKS + 1)
    # The last block's, without norms, which are small.
    last = {name.split(".")[2] for name in dropped[-2] if ".layers." in name}
    assert last == {str(NUM_BLOCKS - 1)}
    assert not [name for name in dropped[0] if "norm" in name]


def test_what_is_alive_between_the_backwards_keeps_to_the_budget() -> None:
    model = _model(is_tied=False, is_checkpointing=True)
    everything = _all_kept(model)
    for share in (0.25, 0.75):
        private = _private(model, int(share * everything))
        _add(private)
        capture = _capture(private)
        run_norms, more = capture.run_norms, []

        def measured(
            loss_B: Tensor, *, retain_graph: bool, run: Any = run_norms, more: Any = more
        ) -> Any:
            before = _alive_bytes()
            norm_sq = run(loss_B, retain_graph=retain_graph)
            more.append(_alive_bytes() - before)
            return norm_sq

        capture.run_norms = measured
        _add(private)
        # Beside the norms of a few parameters.
        assert 0.5 * share * everything < more[0] <= share * everything + 5000


def _alive_bytes() -> int:
    """Bytes of all tensors."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        # What vmap has wrapped, which an earlier test may have left, has no storage.
        if type(each) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(each):
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_a_second_backward_that_misses_a_layer_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    private = _private(model, 1, loss="sequence-classification")
    capture = _capture(private)
    run_dropped = capture.run_dropped

    def missing(*args: Any) -> None:
        del capture._taps[0]
        run_dropped(*args)

    capture.run_dropped = missing
    with pytest.raises(RuntimeError, match=r"^0\.bias, 0\.weight: expected a second backward"):
        private.backward(torch.ones(3, 4), torch.tensor([0, 1, 0]))


@pytest.mark.parametrize(
    ("settings", "budget", "message"),
    [
        ({"mode": "flash"}, "1GiB", "^memory_budget=1073741824: expected none for flash"),
        ({"clipping": "per_layer"}, 5, "expected none beside clipping='per_layer'"),
        ({"capture": True}, 5, "expected none beside capture=True"),
        ({}, "2 gigs", "^memory_budget='2 gigs': expected a number of bytes >= 0, or"),
        ({}, -1, "^memory_budget=-1: expected a number of bytes >= 0"),
        ({}, 1.5, "^memory_budget=1.5: expected a number of bytes >= 0"),
    ],
)
def test_a_budget_that_cannot_be_kept_to_is_refused(
    settings: dict[str, Any], budget: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _private(nn.Linear(2, 2), budget, **settings)


def test_bytes_are_read_with_their_units() -> None:
    given = ("0", "3B", "1.5KiB", "2GiB", "2 MB", 7, None)
    read = [0, 3, 1536, 2 * 2**30, 2 * 10**6, 7, None]
    assert [num_bytes(each) for each in given] == read


def _outer(x: Tensor, num_outputs: int) -> tuple[Outer]:
    return (Outer(x, torch.zeros(B, T, num_outputs)),)


def test_inputs_that_layers_share_count_once() -> None:
    x = torch.zeros(B, T, 10)
    first, second = _outer(x, 1), _outer(x[..., :5], 1)
    apart = (B * T * 10 + B * T) * 4
    both = (B * T * 10 + 2 * B * T) * 4
    for num, dropped in ((both, set()), (both - 1, {"b"}), (apart - 1, {"a", "b"})):
        budget = MemoryBudget(num)
        assert budget.to_drop(0, B, ["b", "a"]) == {"a", "b"}
        budget.note("b", second)
        budget.note("a", first)
        budget.end(0, [])
        assert budget.to_drop(0, B, ["b", "a"]) == dropped


def test_sizes_hold_for_a_few_samples_more_or_less() -> None:
    budget = MemoryBudget(1000)
    budget.to_drop(0, 10, ["a"])
    budget.note("a", (Dense(torch.zeros(10, 20)),))
    budget.end(0, [])
    plans = {size: budget.to_drop(0, size, ["a"]) for size in (8, 10, 12)}
    assert plans == {8: set(), 10: set(), 12: set()}
    budget.num_bytes = 900
    # Of fewer samples, at most as much; of more, in proportion.
    assert [budget.to_drop(0, size, ["a"]) for size in (9, 11, 12)] == [set(), set(), {"a"}]
    assert budget.to_drop(0, 13, ["a"]) == {"a"}  # to be measured
    budget.end(0, [])
    assert budget.to_drop(1, 10, ["a"]) == {"a"}  # another shape


def test_terms_that_grow_are_measured_anew() -> None:
    budget = MemoryBudget(100)
    for size in (5, 50):
        assert budget.to_drop(0, 1, ["a"]) == {"a"}
        budget.note("a", (Dense(torch.zeros(1, size)),))
        budget.end(0, [])
        if size == 5:
            assert budget.to_drop(0, 1, ["a"]) == set()
            budget.end(0, [(Dense(torch.zeros(1, 50)),)])
    assert budget.to_drop(0, 1, ["a"]) == {"a"}
