"""Name under which the program was called, for hints that can be copied."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dpsgd_track.redaction import redact_uri

NAME = "dpsgd-track"
COMPARE = "compare"
_SECRET = "--token"
_GROUP = "--group"


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

_called = INSTALLED


@contextlib.contextmanager
def called_as(program: Program) -> Iterator[None]:
    """Give all hints of this process the form that the user called."""
    global _called  # Like sys.argv, a property of the process.
    before, _called = _called, program
    try:
        yield
    finally:
        _called = before


def command(verb: str, arguments: Sequence[str] = ()) -> str:
    """The command line of `verb`, in the form that the user called."""
    return _called.command(verb, arguments)


def repeatable(arguments: Sequence[str]) -> list[str]:
    """`arguments` as they may be called again: without credentials, and for a group of its own."""
    kept = []
    remaining = iter(without_secrets(arguments))
    for argument in remaining:
        if argument == _GROUP:
            next(remaining, None)
        elif not argument.startswith(f"{_GROUP}="):
            kept.append(argument)
    return kept


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
