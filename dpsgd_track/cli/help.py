"""Help pages of the program and its verbs, generated from the parser of `cli.options`.

The page of `--help` fits a screen: each common option with the first sentence of its docstring, the
others by name. `--help-all` has every option with its whole docstring.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpsgd_track.cli.variables import VARIABLES
from dpsgd_track.program import command

if TYPE_CHECKING:
    from cyclopts import App
    from cyclopts.argument import Argument

    from dpsgd_track.cli.verbs import Verb

HELP, HELP_ALL = ("--help", "-h"), "--help-all"
_SELDOM = frozenset(
    f"--{name}"
    for name in (
        *("vocab-size", "num-labels", "token", "task", "dropout", "gradient-checkpointing"),
        *(
            "padding",
            "ragged",
            "sampling",
            "dataset-size",
            "image-size",
            "micro-batches",
            "clipping",
        ),
        *("learning-rate", "optimizer", "noise-from"),
        *("delta", "reference-dtype", "replicas", "plan", "memory-budget"),
        *("layer-norms", "log-ranks", "nnodes"),
        "system-metrics",
        *("node-rank", "rdzv-endpoint", "rdzv-timeout", "rounds", "config", "spool", "warmup-iter"),
        *("max-slowdown", "max-memory"),
    )
)
"""Options that `--help` lists by name alone, for verbs with many options."""
_MANY = 30
_COLUMN, _WIDEST = 26, 100
_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "FILE"}
_OWN_METAVAR = re.compile(r"([A-Z]+(?:[=:,][A-Z.]+)?): ")
"""Start of a docstring that begins with the form of the value."""


def overview(verbs: Sequence[Verb]) -> str:
    """The page of the program: one line per verb."""
    lines = [f"usage: {command('VERB')} [OPTIONS]", ""]
    lines += ["Run DP-SGD implementations side by side, and say whether they compute the same.", ""]
    lines += [
        f"  {command(verb, arguments)}"
        for verb, arguments in (("quick", ("--dry-run",)), ("compare", ("latest",)))
    ]
    lines += ["", *(f"  {verb.name:9} {verb.summary}" for verb in verbs), ""]
    lines += ["  VERB --help lists the options of a verb; --version prints the version;"]
    lines += ["  --install-completion completes verbs and options in bash, zsh or fish"]
    return "\n".join(lines)


def page(verb: Verb, parser: App, *, is_whole: bool) -> str:
    """The page of a verb."""
    arguments = arguments_of(parser)
    operands = [each for each in arguments if each.is_positional_only()]
    named = " ".join(operand(each) for each in operands)
    usage = f"usage: {command(verb.name)} {named}".rstrip()
    sections = [[f"{usage} [OPTIONS]", f"{verb.summary}"]]
    examples = [f"  {command(verb.name)} {example}".rstrip() for example in verb.examples]
    sections[0] += examples
    if operands:
        sections[0] += _lines_of(operands)
    options = [each for each in arguments if not each.is_positional_only()]
    is_long = len(options) > _MANY
    options.sort(key=lambda each: _group_of(each)[0])
    for (_, title), group in groupby(options, _group_of):
        members = list(group)
        sections.append([f"{title}:", *_lines_of(members, is_whole=is_whole, is_long=is_long)])
    if any(len(_sentences(each)) > 1 for each in options):
        sections.append([f"  {HELP_ALL:{_COLUMN - 2}}All options, explained in full"])
    if verb.notes:
        sections[-1] += textwrap.wrap(verb.notes, _width(), subsequent_indent="  ")
    between = "\n" if is_long and not is_whole else "\n\n"
    return between.join("\n".join(lines) for lines in sections)


def arguments_of(parser: App) -> list[Argument]:
    """The options and positional arguments of a parser."""
    return [each for each in parser.assemble_argument_collection(parse_docstring=True) if each.show]


def _group_of(argument: Argument) -> tuple[Any, str]:
    groups: Any = argument.parameter.group
    (group,) = groups
    return group.sort_key, group.name


def _width() -> int:
    return min(shutil.get_terminal_size((80, 24)).columns, _WIDEST)


def _lines_of(
    arguments: Sequence[Argument], *, is_whole: bool = False, is_long: bool = False
) -> Iterator[str]:
    """One or more lines for each argument; the last lists the names of omitted ones."""
    is_short = is_long and not is_whole
    left_out = [each.name for each in arguments if is_short and each.name in _SELDOM]
    for each in arguments:
        if each.name in left_out:
            continue
        named = f"  {operand(each) if each.is_positional_only() else _option(each)}"
        lines = textwrap.wrap(
            _meaning(each, is_whole=is_whole), _width() - _COLUMN, break_on_hyphens=False
        )
        if len(named) >= _COLUMN - 1:
            yield named
            named = ""
        for line in lines:
            yield f"{named:{_COLUMN}}{line}"
            named = ""
    if left_out:
        names = f"also {', '.join(left_out)}"
        yield from textwrap.wrap(
            names,
            _width(),
            initial_indent="  ",
            subsequent_indent="       ",
            break_on_hyphens=False,
        )


def operand(argument: Argument) -> str:
    """A positional argument as in the usage line: `GROUP`, or `[GROUP]` if it may be left out."""
    name = argument.name.strip("-").upper().replace("-", "_")
    return name if argument.required else f"[{name}]"


def _option(argument: Argument) -> str:
    if argument.hint is bool:
        return ", ".join(argument.names)
    own = _OWN_METAVAR.match(_help(argument))
    hints = getattr(argument.hint, "__args__", (argument.hint,))
    return f"{argument.name} {own[1] if own else _METAVARS.get(hints[0], 'NAME')}"


def _meaning(argument: Argument, *, is_whole: bool) -> str:
    """Description of an argument, with its default."""
    first, *more = _sentences(argument)
    default = "" if argument.required else _default(argument.field_info.default)
    if default and "default:" not in first:
        first = f"{first} (default: {default})"
    if is_whole and argument.name in VARIABLES:
        more.append(f"Where it is not given, {VARIABLES[argument.name]} in the environment counts")
    return ". ".join([first, *more]) if is_whole else first


def _help(argument: Argument) -> str:
    return " ".join((argument.parameter.help or "").replace("`", "").split())


def _sentences(argument: Argument) -> list[str]:
    text = _help(argument)
    if _OWN_METAVAR.match(text):
        text = _OWN_METAVAR.sub("", text)
        text = text[0].upper() + text[1:]
    return text.removesuffix(".").split(". ")


def _default(value: object) -> str:
    """`value` as it would be typed; empty if there is no default to show."""
    if isinstance(value, bool) or value in (None, "", ()):
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)
