"""Errors in options and arguments, as one sentence with the right name and the next command.

cyclopts reports them for its own users: `Unused Tokens: ['g3']`, `invalid literal for int()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from cyclopts import App, CoercionError, CycloptsError, MissingArgumentError, UnknownOptionError
from cyclopts.argument import Argument
from cyclopts.exceptions import UnusedCliTokensError

from dpsgd_track.cli.help import HELP_ALL, arguments_of, operand
from dpsgd_track.config import nearest
from dpsgd_track.program import command

_KINDS = {int: "an integer", float: "a number", Path: "a path"}


def sentence(error: CycloptsError, verb: str, parsers: Mapping[str, App]) -> str:
    """One sentence on wrong arguments of `verb`: the mistake, what it takes instead, and its help.

    Args:
        parsers: the parser of every verb.
    """
    help_line = f"See `{command(verb, [HELP_ALL])}`."
    if isinstance(error, UnknownOptionError):
        return f"{_unknown(error, verb, parsers)} {help_line}"
    if isinstance(error, UnusedCliTokensError):
        assert error.unused_tokens
        return f"{error.unused_tokens[0]!r}: {_surplus(verb, parsers[verb])} {help_line}"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        return f"{_missing(error.argument)} {help_line}"
    if isinstance(error, CoercionError) and error.argument is not None:
        return f"{_unlike(error.argument, error)} {help_line}"
    return f"{error} {help_line}"


def _unknown(error: UnknownOptionError, verb: str, parsers: Mapping[str, App]) -> str:
    option = (error.token.keyword or error.token.value).partition("=")[0]
    names = {
        name: [each.name for each in arguments_of(parser) if not each.is_positional_only()]
        for name, parser in parsers.items()
    }
    if option in names[verb]:
        return f"{option}: expected before `--`, after which there are no options."
    if having := [name for name, options in names.items() if option in options]:
        return f"{option}: an option of {' and '.join(having)}, not of {verb}."
    return f"{option}: {verb} has no such option. {nearest(option, names[verb])}".rstrip()


def _surplus(verb: str, parser: App) -> str:
    operands = [operand(each) for each in arguments_of(parser) if each.is_positional_only()]
    if operands:
        return f"expected nothing after {' '.join(operands)} but options, which begin with --."
    return f"expected an option, which begins with --. {verb} takes nothing else."


def _missing(argument: Argument) -> str:
    if argument.is_positional_only():
        return f"expected {operand(argument)}: {argument.parameter.help}."
    return f"{argument.name}: expected {_kind(argument)} after it."


def _unlike(argument: Argument, error: CoercionError) -> str:
    if argument.hint is bool:
        return f"{argument.name}: expected no value, as giving it turns it on."
    token = error.token or argument.tokens[-1]
    # The name of the option, or of the variable that stood for it.
    return f"{token.keyword or argument.name}={token.value!r}: expected {_kind(argument)}."


def _kind(argument: Argument) -> str:
    hints = (argument.hint, *get_args(argument.hint))
    return next((_KINDS[hint] for hint in hints if hint in _KINDS), "a value")
