"""Context of a verb besides its options, and its error messages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dpsgd_track.config import DataConfig, ModelConfig, Settings
from dpsgd_track.modes.table import split_planted
from dpsgd_track.program import NAME, command, repeatable
from dpsgd_track.record.plan import GroupPlan
from dpsgd_track.redaction import redact_uri, redacted
from dpsgd_track.visible_text import visible

if TYPE_CHECKING:
    from dpsgd_track.launcher.process_group import Launch
    from dpsgd_track.launcher.suites import InputCheck


_WORKER = "dpsgd_track.mutants.worker"
"""Module of workers that accept `mode+fault`, as the command line does."""


def check_inputs(model: ModelConfig, data: DataConfig) -> None:
    """Raise ValueError if model and data cannot be built; imports the training code."""
    from dpsgd_track.training import preflight

    preflight.check_inputs(model, data)


def check_planted(plan: GroupPlan) -> None:
    """Raise ValueError if a mode of `plan` names an unknown fault."""
    planted = [job.mode for job in plan.jobs if split_planted(job.mode)[1]]
    if planted:
        # Imports torch, which no other check needs.
        from dpsgd_track.mutants import planting

        for mode in planted:
            planting.check_planted(mode)


@dataclass(frozen=True, kw_only=True)
class Context:
    """One call of the program."""

    verb: str
    arguments: Sequence[str] = ()
    """Arguments after the verb, with those that environment variables stand for."""
    from_environment: str = ""
    """Sentence on the settings that came from environment variables; empty if none did."""
    is_quiet: bool = False
    """True if only the outcome is to be printed."""
    check_inputs: InputCheck = check_inputs
    chosen_launch: Launch | None = field(default=None)
    """Launch settings of workers; None for the default."""

    @property
    def command(self) -> str:
        """The command line, as it may be called again."""
        return command(self.verb, repeatable(self.arguments))

    @property
    def launch(self) -> Launch:
        """Launch settings of workers."""
        from dpsgd_track.launcher.process_group import Launch

        return self.chosen_launch or Launch(worker_module=_WORKER)

    def say(self, line: str) -> None:
        """Print `line` at once, unless only the outcome is to be printed."""
        if not self.is_quiet:
            say(line)

    def tell_environment(self) -> None:
        """Say which settings came from the environment, if any did."""
        if self.from_environment:
            self.say(self.from_environment)

    def complain(self, error: object, code: int) -> int:
        """Print the error on one line; returns `code`, the exit code."""
        print(
            f"{NAME} {self.verb}: {visible(' '.join(redacted(str(error)).split()))}",
            file=sys.stderr,
        )
        return code


@contextlib.contextmanager
def reading(settings: Settings) -> Iterator[None]:
    """Turn errors of reading a group, or of a store that does not answer, into ValueError."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    from dpsgd_track.store.client import one_line
    from dpsgd_track.store.deadline import NoAnswer
    from dpsgd_track.store.reader import GroupNotFound
    from dpsgd_track.store.spool import SpoolDamaged

    try:
        yield
    except (GroupNotFound, SpoolDamaged) as error:
        raise ValueError(str(error)) from error
    except (MlflowException, SQLAlchemyError, RequestException, NoAnswer) as error:
        where, reason = redact_uri(settings.tracking_uri), one_line(error)
        raise ValueError(
            f"tracking_uri={where!r}: expected a tracking server that answers. {reason}"
        ) from error


def say(line: str) -> None:
    """Print `line` at once."""
    print(visible(line), flush=True)


def say_aside(line: str) -> None:
    """Print `line` to standard error, apart from the results."""
    print(visible(line), file=sys.stderr)
