"""What a verb is run with besides its options, and how it says what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dpsgd_track.cli.program import NAME, Program, without_secrets
from dpsgd_track.config import DataConfig, ModelConfig

if TYPE_CHECKING:
    from dpsgd_track.launcher.process_group import Launch
    from dpsgd_track.launcher.suites import InputCheck


def check_inputs(model: ModelConfig, data: DataConfig) -> None:
    """Raise ValueError where model and data cannot be built; imports the training half."""
    from dpsgd_track.training import preflight

    preflight.check_inputs(model, data)


@dataclass(frozen=True, kw_only=True)
class Context:
    """One call of the program."""

    program: Program
    verb: str
    arguments: Sequence[str] = ()
    """What came after the verb."""
    check_inputs: InputCheck = check_inputs
    chosen_launch: Launch | None = field(default=None)
    """How workers are started; None as users do."""

    @property
    def command(self) -> str:
        """The command line, without credentials."""
        return self.program.command(self.verb, without_secrets(self.arguments))

    @property
    def launch(self) -> Launch:
        """How workers are started."""
        from dpsgd_track.launcher.process_group import Launch

        return self.chosen_launch or Launch()

    def complain(self, error: object, code: int) -> int:
        """Say in one line what is wrong; returns `code`, to exit with."""
        print(f"{NAME} {self.verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return code


def say(line: str) -> None:
    """Print `line` at once."""
    print(line, flush=True)


def say_aside(line: str) -> None:
    """Print `line` beside the results."""
    print(line, file=sys.stderr)
