"""Every mode equals the oracle on every model of the zoo, however ranks share the samples."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dpsgd_track.modes.table import MODES
from tests.support.forked_ranks import ForkedRanks
from tests.support.model_zoo import ZOO
from tests.support.torchrun_modes import Spec

# float32 rounding is 6e-8; sums over 17 positions and a few layers stay well below 1e-5.
TOLERANCE = 1e-5
STRATEGIES = ("two_pass", "bookkeeping")
OURS = [name for name, spec in MODES.items() if spec.strategy in STRATEGIES]
FSDP = [name for name in OURS if MODES[name].sharding == "fsdp2"]
TWO = ["flash_fsdp", "flash_fsdp_fuse_bk"]
"""One of each strategy, one of each way to watch."""

SPECS = {
    # One device, and one rank of FSDP2.
    "W1": Spec(
        models=list(ZOO),
        modes=[*OURS, "no_dp", "no_dp_single"],
        cut=[[7, 4]],
        regimes=["mixed"],
    ),
    # Uneven shares; one micro-batch is empty.
    "W2": Spec(
        models=list(ZOO),
        modes=[*FSDP, "no_dp"],
        cut=[[3, 0], [6, 2]],
        regimes=["mixed"],
    ),
    "W2, other bounds": Spec(
        models=["reused-mlp", "tied-gpt2"],
        modes=[*FSDP, "no_dp"],
        cut=[[3, 0], [6, 2]],
        regimes=["none", "all"],
    ),
    "W2, other bounds, whole zoo": Spec(
        models=list(ZOO),
        modes=[*FSDP, "no_dp"],
        cut=[[3, 0], [6, 2]],
        regimes=["none", "all"],
    ),
    # More ranks than some parameters have rows; a rank without samples.
    "W3": Spec(
        models=["reused-mlp", "tied-gpt2"],
        modes=[*TWO, "no_dp"],
        cut=[[4, 1], [0, 0], [3, 3]],
        regimes=["mixed"],
        budget=3500,
    ),
    "W4": Spec(
        models=["reused-mlp", "bert"],
        modes=TWO,
        cut=[[3, 1], [0, 0], [2, 0], [4, 1]],
        regimes=["mixed"],
    ),
    # Two copies of the model, each sharded over two ranks.
    "HSDP": Spec(
        models=["reused-mlp", "tied-gpt2", "llama"],
        modes=[*TWO, "no_dp"],
        cut=[[3], [4], [2], [2]],
        regimes=["none", "mixed"],
        replicas=2,
    ),
    "checkpointing": Spec(
        models=["llama", "tied-gpt2", "bert", "vit"],
        modes=[*FSDP, "no_dp"],
        cut=[[3, 2], [4, 2]],
        regimes=["mixed"],
        is_checkpointing=True,
        budget=4000,
    ),
    "compiled": Spec(
        models=["llama"],
        modes=["flash_fsdp_bk"],
        cut=[[3, 2], [4, 0]],
        regimes=["mixed"],
        is_compiled=True,
    ),
    # Shards of different sizes, and a rank without samples.
    "sent early": Spec(
        models=["llama", "tied-gpt2", "vit"],
        modes=["flash_fsdp_fuse_bk"],
        cut=[[4, 1], [0, 0], [3, 3]],
        regimes=["mixed"],
        is_sent_early=True,
    ),
    "sent early, HSDP": Spec(
        models=["llama", "tied-gpt2"],
        modes=["flash_fsdp_fuse_bk"],
        cut=[[3, 2], [4, 0], [2, 1], [2, 0]],
        regimes=["mixed", "all"],
        replicas=2,
        is_sent_early=True,
    ),
    "sent early, compiled": Spec(
        models=["llama"],
        modes=["flash_fsdp_fuse_bk"],
        cut=[[3, 2], [4, 0]],
        regimes=["mixed"],
        is_compiled=True,
        is_sent_early=True,
    ),
}


def run(
    rank_host: ForkedRanks, spec: Spec, folder: Path, *, on_gpus: bool = False
) -> list[dict[str, Any]]:
    output = folder / "rows.json"
    done = rank_host.run(
        "tests.support.torchrun_modes",
        str(output),
        json.dumps(asdict(spec)),
        num_ranks=len(spec.cut),
        on_gpus=on_gpus,
    )
    assert done.code == 0, done.log[-3000:]
    rows: list[dict[str, Any]] = json.loads(output.read_text())
    return rows


SOAK = {"W2, other bounds, whole zoo", "sent early, HSDP", "sent early, compiled"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.soak] * (name in SOAK)) for name in SPECS],
)
def ran(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, rank_host: ForkedRanks
) -> Any:
    spec = SPECS[request.param]
    return spec, run(rank_host, spec, tmp_path_factory.mktemp("modes"))


def test_losses_norms_sums_noise_and_weights_equal_the_oracle(ran: Any) -> None:
    check(*ran)


@pytest.mark.multigpu
@pytest.mark.parametrize("name", SPECS)
def test_the_same_on_gpus(name: str, tmp_path: Path, rank_host: ForkedRanks) -> None:
    spec = SPECS[name]
    if torch.cuda.device_count() < len(spec.cut):
        pytest.skip(f"needs {len(spec.cut)} GPUs, found {torch.cuda.device_count()}")
    check(spec, run(rank_host, spec, tmp_path, on_gpus=True))


def check(spec: Spec, rows: list[dict[str, Any]]) -> None:
    private = [row for row in rows if MODES[row["mode"]].is_private]
    seen = {(row["model"], row["mode"], row["regime"]) for row in private}
    modes = [mode for mode in spec.modes if MODES[mode].is_private]
    assert seen == {(m, mode, r) for m in spec.models for mode in modes for r in spec.regimes}
    assert not [row for row in private if not is_exact(row)]
    for row in rows:
        # The first micro-batch's sizes are known from the discarded step: it has a part dropped.
        assert row["budget"] is None or 0 < row["dropped"][0] < row["dropped"][1], row
        assert (row["num_sent"] > 0) == spec.is_sent_early, row
        if spec.is_compiled:
            # One graph for all blocks, and for batches of another size one or two more.
            assert 0 < row["num_graphs"] <= 3, row
            assert row["num_breaks"] == 0, row


ERRORS = ("loss", "norm", "sum", "noised", "weights")


def is_exact(row: dict[str, Any]) -> bool:
    return (
        "error" not in row
        and row["norm_dtype"] == "torch.float32"
        and all(row[f"{what}_error"] < TOLERANCE for what in ERRORS)
    )


EXACT_IN_OPACUS = {
    "ghost_fsdp": {"llama", "qwen2", "roberta"},
    "ghost": {"llama", "qwen2", "roberta", "vit"},
    "grad_materialize": {"llama", "qwen2", "roberta", "vit"},
}
"""Models of the zoo that Opacus 1.6.0 can do; on the others it raises an error. It meets tied or
reused weights, scaled embeddings, bare parameters, and position indices that samples share."""


@pytest.mark.parametrize("world_size", [1, 2])
def test_opacus_is_exact_or_raises(world_size: int, tmp_path: Path, rank_host: ForkedRanks) -> None:
    modes = list(EXACT_IN_OPACUS) if world_size == 1 else ["ghost_fsdp"]
    cut = [[3, 3]] * world_size
    spec = Spec(models=list(ZOO), modes=modes, cut=cut, regimes=["mixed"])
    rows = run(rank_host, spec, tmp_path)
    assert not [row for row in rows if "error" not in row and not is_exact(row)]
    for mode in modes:
        exact = {row["model"] for row in rows if row["mode"] == mode and "error" not in row}
        assert exact == EXACT_IN_OPACUS[mode]


def test_the_bounds_clip_none_some_and_all(ran: Any) -> None:
    for row in ran[1]:
        assert {
            "none": row["clipped"] == 0,
            "mixed": 0.2 <= row["clipped"] <= 0.8,
            "all": row["clipped"] == 1,
        }[row["regime"]], row


def test_the_baseline_equals_the_oracle_only_where_nothing_is_clipped(ran: Any) -> None:
    for row in ran[1]:
        if not MODES[row["mode"]].is_private:
            assert (row["sum_error"] < TOLERANCE) == (row["regime"] == "none"), row
            assert row["loss_error"] < TOLERANCE, row
