"""`--install-completion`: verbs and options at the press of Tab."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Literal

from dpsgd_track.cli.options import parser_of
from dpsgd_track.cli.verbs import VERBS
from dpsgd_track.launcher import EXIT_FINISHED, EXIT_USAGE
from dpsgd_track.program import NAME

INSTALL_COMPLETION = "--install-completion"
_Shell = Literal["bash", "zsh", "fish"]
_SHELLS: tuple[_Shell, ...] = ("bash", "zsh", "fish")


def install_completion(arguments: Sequence[str]) -> int:
    """Install the completion of a shell, the user's own unless one is named.

    Returns:
        The exit code.
    """
    from cyclopts import App
    from cyclopts.completion.detect import ShellDetectionError, detect_shell

    named = " ".join(arguments)
    if not arguments:
        with contextlib.suppress(ShellDetectionError):
            named = detect_shell()
    shell = next((each for each in _SHELLS if each == named), None)
    if shell is None:
        wanted = f"expected one of {', '.join(_SHELLS)} after {INSTALL_COMPLETION}"
        print(f"{NAME}: shell={named!r}: {wanted}.", file=sys.stderr)
        return EXIT_USAGE
    app = App(name=NAME, help_flags="--help", version_flags="--version")
    for verb in VERBS.values():
        app.command(parser_of(verb.run), name=verb.name)
    try:
        path = app.install_completion(shell=shell)
    except OSError as error:
        print(f"{NAME}: {INSTALL_COMPLETION} {shell}: {error}", file=sys.stderr)
        return EXIT_USAGE
    print(f"Completion of {shell}: {path}. It works in shells that are started from now on.")
    return EXIT_FINISHED
