"""The program: finds the verb, parses its options, runs it, and reports errors."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cyclopts import CycloptsError

from dpsgd_track import __version__
from dpsgd_track.cli.completion import INSTALL_COMPLETION, install_completion
from dpsgd_track.cli.context import Context, check_inputs
from dpsgd_track.cli.help import HELP, HELP_ALL, overview, page
from dpsgd_track.cli.lasting_output import lasting_output
from dpsgd_track.cli.options import parser_of
from dpsgd_track.cli.parse_errors import sentence
from dpsgd_track.cli.variables import Variables
from dpsgd_track.cli.verbs import VERBS, Verb
from dpsgd_track.config import nearest
from dpsgd_track.launcher import EXIT_FINISHED, EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_USAGE
from dpsgd_track.program import INSTALLED, NAME, Program, called_as, command
from dpsgd_track.redaction import redacted
from dpsgd_track.store.scratch import sweep

if TYPE_CHECKING:
    from dpsgd_track.launcher.process_group import Launch
    from dpsgd_track.launcher.suites import InputCheck


def main(
    argv: Sequence[str] | None = None,
    *,
    program: Program = INSTALLED,
    check_inputs: InputCheck = check_inputs,
    launch: Launch | None = None,
) -> int:
    """Run a verb.

    Args:
        argv: the verb and its options (default: the process's own).
        program: how it was called.
        check_inputs: says whether model and data fit.
        launch: how workers are started.

    Returns:
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    with called_as(program), lasting_output(), _importing_from_here():
        try:
            return _main(argv, check_inputs, launch)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED


@contextlib.contextmanager
def _importing_from_here() -> Iterator[None]:
    """Make modules of the working directory importable, behind all installed ones.

    `python -m` has that directory in front, and so do workers; an installed command has it nowhere.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:
        here = ""
    if not here or here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _main(argv: Sequence[str], check_inputs: InputCheck, launch: Launch | None) -> int:
    if not argv or argv[0] in HELP:
        print(overview(tuple(VERBS.values())), file=sys.stdout if argv else sys.stderr)
        return EXIT_FINISHED if argv else EXIT_USAGE
    if argv[0] == "--version":
        print(f"{NAME} {__version__}")
        return EXIT_FINISHED
    name, *arguments = argv
    if name == INSTALL_COMPLETION:
        return install_completion(arguments)
    if name not in VERBS:
        expected = f"expected one of {', '.join(VERBS)}. {nearest(name, VERBS)}".rstrip()
        advice = f"`{command('VERB', ['--help'])}` explains each."
        print(f"{NAME}: verb={name!r}: {expected} {advice}", file=sys.stderr)
        return EXIT_USAGE
    sweep()
    context = Context(
        verb=name, arguments=arguments, check_inputs=check_inputs, chosen_launch=launch
    )
    return _run(VERBS[name], context)


def _run(verb: Verb, context: Context) -> int:
    variables = Variables(os.environ)
    try:
        parser = parser_of(verb.run, variables)
        for flag in (*HELP, HELP_ALL):
            if flag in context.arguments:
                print(page(verb, parser, is_whole=flag == HELP_ALL))
                return EXIT_FINISHED
        _, bound, _ = parser.parse_args(
            context.arguments, exit_on_error=False, print_error=False, verbose=False
        )
        context = replace(
            context,
            arguments=[*variables.options, *context.arguments],
            from_environment=variables.sentence,
        )
        return verb.run(*bound.args, **bound.kwargs, called=context)
    except CycloptsError as error:
        parsers = {each.name: parser_of(each.run) for each in VERBS.values()}
        return context.complain(sentence(error, verb.name, parsers), EXIT_USAGE)
    except ValueError as error:
        return context.complain(f"{error} {variables.sentence}", EXIT_USAGE)
    # No verb exits by itself: what a library or a user's module exits with is no verdict.
    except (Exception, SystemExit) as error:
        return _keep_traceback(error, context)


def _keep_traceback(error: BaseException, context: Context) -> int:
    """Say in one line that the program itself failed, and where the whole story is."""
    summary = f"an error of {NAME} itself, {type(error).__name__}: {error}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix=f"{NAME}-{context.verb}-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(redacted("".join(traceback.format_exception(error))))
    except OSError as full:
        print(redacted("".join(traceback.format_exception(error))), file=sys.stderr)
        return context.complain(f"{summary}. The traceback is above, as {full}", EXIT_INTERNAL)
    return context.complain(f"{summary}. The traceback is in {file.name}", EXIT_INTERNAL)
