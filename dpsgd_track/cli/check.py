"""`check`: one module of anybody's against the oracle."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd_track.cli.context import Context, say
from dpsgd_track.cli.options import CheckChoices
from dpsgd_track.config import require
from dpsgd_track.launcher import EXIT_FAILED, EXIT_FINISHED
from dpsgd_track.launcher.suites import check_modes, split_names
from dpsgd_track.modes.table import is_of_opacus
from dpsgd_track.report.columns import in_columns
from dpsgd_track.testing import BY_DEFAULT, Checked, Outcome, check

_INPUT = re.compile(r"([0-9]+(?:,[0-9]+)*)(?::([0-9]+))?")
_FORM = "package.module:NAME, or package.module:NAME(ARGUMENTS) with literal arguments"
_FAILURES = (Outcome.WRONG, Outcome.FAILED)


def check_module(context: Context, module: str, choices: CheckChoices) -> int:
    """Check the module that `module` names, and print a line for each mode and one for all.

    Returns:
        1 where a mode computes something wrong or raises, else 0: a refusal is an answer.

    Raises:
        ValueError: the module cannot be had, or not be run on such inputs.
    """
    require(
        bool(choices.input), "input", "", "a shape for each input", "For example --input 3,5,7."
    )
    modes = split_names(choices.mode) or BY_DEFAULT
    check_modes(modes)
    torch.manual_seed(choices.random_seed)
    inputs = [_input(text) for text in choices.input]
    made = _module(module)
    try:
        results = list(check(made, inputs, modes=modes))
    except (RuntimeError, TypeError, IndexError) as error:
        # The module itself, run without any mode.
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"input={' '.join(choices.input)!r}: expected inputs that {module} takes. {why}"
        ) from None
    rows = [("mode", "loss", "outcome", ""), *map(_row, results)]
    context.say("\n".join(in_columns(rows)))
    failed = [each for each in results if each.outcome in _FAILURES]
    say(f"{module}: {_counted(results)}")
    return EXIT_FAILED if failed else EXIT_FINISHED


def _row(checked: Checked) -> tuple[str, str, str, str]:
    reduction = checked.reduction if is_of_opacus(checked.mode) else ""
    reason = checked.reason
    if checked.outcome is Outcome.EXACT and not checked.takes_empty_batches:
        reason = "takes no empty batch"
    return checked.mode, reduction, str(checked.outcome), reason


def _counted(results: Sequence[Checked]) -> str:
    counts = [(str(o), sum(each.outcome is o for each in results)) for o in Outcome]
    told = [f"{count} {outcome}" for outcome, count in counts if count]
    wrong = dict.fromkeys(name for each in results for name in each.parameters)
    return ", ".join(told) + (f"; wrong in {', '.join(wrong)}" if wrong else "") + "."


def _input(text: str) -> Tensor:
    """Random numbers of the shape that `text` tells; whole ones below N after a colon."""
    match = _INPUT.fullmatch(text)
    advice = "The first is the number of samples."
    require(match is not None, "input", text, "SHAPE, or SHAPE:N for whole numbers below N", advice)
    assert match is not None
    shape = [int(number) for number in match[1].split(",")]
    if match[2] is None:
        return torch.randn(shape)
    require(int(match[2]) >= 1, "input", text, "N >= 1")
    return torch.randint(int(match[2]), shape)


def _module(text: str) -> nn.Module:
    """The module that `package.module:NAME` or `package.module:NAME(1, bias=False)` stands for."""
    package, _, call = text.partition(":")
    name, arguments, keywords = _call(text, call)
    try:
        made: Any = importlib.import_module(package)
        for part in name.split("."):
            made = getattr(made, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"module={text!r}: expected {_FORM}. {error}.") from None
    if not isinstance(made, nn.Module):
        require(callable(made), "module", text, "a module, or what returns one when called")
        try:
            made = made(*arguments, **keywords)
        except TypeError as error:
            advice = f"{error}. Give arguments, such as '{package}:{name}(7, 4)'."
            raise ValueError(f"module={text!r}: expected a call that works. {advice}") from None
    require(isinstance(made, nn.Module), "module", text, "a torch.nn.Module")
    checked: nn.Module = made
    return checked


def _call(text: str, call: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Name and literal arguments of a call; none for a name alone."""
    try:
        tree = ast.parse(call, mode="eval").body
        if not isinstance(tree, ast.Call):
            is_name = isinstance(tree, ast.Name | ast.Attribute)
            require(is_name, "module", text, _FORM)
            return ast.unparse(tree), [], {}
        arguments = [ast.literal_eval(value) for value in tree.args]
        keywords = {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
    except (SyntaxError, ValueError):
        require(False, "module", text, _FORM)
        raise
    return ast.unparse(tree.func), arguments, keywords
