"""Programs that were moved to this package: they do the same, and few of their lines are new."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from dpsgd_track import PrivateTraining
from tests.support import ROOT
from tests.support.migrations import (
    bert_opacus,
    bert_private,
    cifar_opacus,
    cifar_private,
    mnist_opacus,
    mnist_private,
)
from tests.support.model_zoo import small_bert

MOST_NEW = 6
FOLDER = ROOT / "tests" / "support" / "migrations"
MOVED = {
    "Opacus's MNIST": (FOLDER / "mnist_opacus.py", FOLDER / "mnist_private.py"),
    "Opacus's CIFAR-10": (FOLDER / "cifar_opacus.py", FOLDER / "cifar_private.py"),
    "Opacus's BERT": (FOLDER / "bert_opacus.py", FOLDER / "bert_private.py"),
    "a plain Trainer": (FOLDER / "trainer_plain.py", ROOT / "examples" / "private_trainer.py"),
}
"""Programs before and after."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha"),
]


def statements(tree: ast.AST) -> Iterator[str]:
    """Each statement, or heading of a block, on one line, without docstrings and indentation."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.stmt):
            yield from statements(node) if isinstance(node, ast.excepthandler) else ()
            continue
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if hasattr(node, "body"):
            heading = copy.copy(node)
            heading.body = [ast.Pass()]
            if hasattr(heading, "orelse"):
                heading.orelse = []
            yield ast.unparse(heading).removesuffix("pass").strip()
            yield from statements(node)
        elif not is_text:
            yield ast.unparse(node)


def changed(before: str, after: str) -> tuple[int, int]:
    """Lines of `after` that are new, and lines of `before` that are gone.

    A statement is one line, however a formatter breaks it, and its indentation does not count.
    """
    old, new = (list(statements(ast.parse(text))) for text in (before, after))
    steps = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    moved = [(j2 - j1, i2 - i1) for kind, i1, i2, j1, j2 in steps if kind != "equal"]
    return sum(added for added, _ in moved), sum(gone for _, gone in moved)


def counts() -> dict[str, tuple[int, int]]:
    return {
        name: changed(*(path.read_text(encoding="utf-8") for path in paths))
        for name, paths in MOVED.items()
    }


def test_few_lines_are_new() -> None:
    assert {name: new for name, (new, _) in counts().items() if new > MOST_NEW} == {}


def test_the_page_says_how_many_lines_are_new_and_gone() -> None:
    page = (ROOT / "docs" / "from_opacus.md").read_text(encoding="utf-8")
    told = {
        name: (int(new), int(gone))
        for name, new, gone in re.findall(r"(?m)^\| (.+?) \| (\d+) \| (\d+) \|$", page)
    }
    assert told == counts()


@pytest.mark.parametrize(
    ("after", "count"),
    [
        ("for x in y:\n    f(\n        x,\n    )\n", (0, 0)),
        ("with z:\n    for x in y:\n        f(x)\n", (1, 0)),
        ("for x in z:\n    g(x)\n", (2, 2)),
        ("for x in y:\n    pass\n", (1, 1)),
    ],
)
def test_a_statement_counts_as_one_line(after: str, count: tuple[int, int]) -> None:
    assert changed('for x in y:\n    """Text."""\n    f(x)\n', after) == count


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def images(size: int) -> tuple[nn.Module, Dataset]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    return model, TensorDataset(torch.randn(size, 1, 6, 6), torch.randint(0, 3, (size,)))


@pytest.mark.parametrize(
    "trains",
    [(mnist_opacus.train, mnist_private.train), (cifar_opacus.train, cifar_private.train)],
    ids=["mnist", "cifar"],
)
def test_without_noise_both_take_the_same_step(
    trains: tuple[Callable[..., float], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where a step draws every sample, both draw the same; without noise there is no epsilon.
    for kind, name in ((PrivacyEngine, "get_epsilon"), (PrivateTraining, "epsilon")):
        monkeypatch.setattr(kind, name, lambda *_, **__: 0.0)
    moved = []
    for train in trains:
        model, dataset = images(10)
        before = weights(model)
        train(model, dataset, batch_size=10, sigma=0.0, c=0.3, delta=1e-3)
        moved.append(weights(model) - before)
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-6)
    assert moved[0].norm() > 0.01


@pytest.mark.parametrize(
    "trains",
    [(mnist_opacus.train, mnist_private.train), (cifar_opacus.train, cifar_private.train)],
    ids=["mnist", "cifar"],
)
def test_both_spend_the_same(trains: tuple[Callable[..., float], ...]) -> None:
    spent = []
    for train in trains:
        model, dataset = images(40)
        spent.append(train(model, dataset, batch_size=8, sigma=0.9, c=0.5, delta=1e-4))
    assert spent[1] == pytest.approx(spent[0], abs=1e-6)


class Tokens(Dataset[dict[str, Tensor]]):
    """Sentences of random words."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(3, 20, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": index % 3}


def test_both_keep_to_a_target_epsilon_for_bert() -> None:
    spent = []
    for train in (bert_opacus.train, bert_private.train):
        torch.manual_seed(0)
        model = small_bert(20, 0.0).train()
        model.base_model.embeddings.requires_grad_(False)
        before = weights(model)
        spent.append(train(model, Tokens(), batch_size=8, epsilon=3.0, c=0.5, delta=1e-3))
        assert not torch.equal(weights(model), before)
    # Opacus stops looking for sigma within 0.01 of the target.
    assert all(2.99 <= epsilon <= 3.0 for epsilon in spent)


def test_programs_are_files_of_their_own() -> None:
    assert {path for pair in MOVED.values() for path in pair if path.parent == FOLDER} == {
        path for path in FOLDER.glob("*.py") if path.stem != "__init__"
    }
    assert all(isinstance(path, Path) for pair in MOVED.values() for path in pair)
