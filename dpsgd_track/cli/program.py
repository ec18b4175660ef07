"""The program's own command line, for hints that can be copied."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from dpsgd_track.config import redact_uri

NAME = "dpsgd-track"
COMPARE = "compare"
_SECRET = "--token"


@dataclass(frozen=True, kw_only=True)
class Program:
    """The words of a command line before the verb."""

    words: tuple[str, ...]
    """Words before every verb except compare."""
    compare: tuple[str, ...]
    """Words of compare, the verb included."""

    def command(self, verb: str, arguments: Sequence[str] = ()) -> str:
        """The command line of `verb`, as the user would type it."""
        words = self.compare if verb == COMPARE else (*self.words, verb)
        return shlex.join([*words, *arguments])


INSTALLED = Program(words=(NAME,), compare=(NAME, COMPARE))
MODULE = Program(
    words=("python", "-m", "dpsgd_track"), compare=("python", "-m", "dpsgd_track", COMPARE)
)
CHECKOUT = Program(words=("python", "launch.py"), compare=("python", "compare.py"))


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """`arguments` without the token and other credentials."""
    kept = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == _SECRET:
            next(remaining, None)
        elif not argument.startswith(f"{_SECRET}="):
            option, equals, value = argument.partition("=")
            kept.append(
                f"{option}={redact_uri(value)}"
                if equals and option.startswith("--")
                else redact_uri(argument)
            )
    return kept
