"""Settings read from environment variables where their options are not given.

The variables are those that scripts around the accuracy test set. An empty one counts as not set.
`mlflow.yaml` comes into no conflict: it has settings of the store and the verdict, none of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cyclopts import Token

if TYPE_CHECKING:
    from cyclopts import App
    from cyclopts.argument import ArgumentCollection

VARIABLES = {
    "--model-name": "MODEL_NAME",
    "--seq-length": "SEQ_LENGTH",
    "--batch-size": "BATCH_SIZE",
    "--num-iter": "NUM_ITER",
    "--sigma": "SIGMA",
    "--max-grad-norm": "MAX_GRAD_NORM",
    "--random-seed": "RANDOM_SEED",
}
"""Variable of each option that has one, in every verb with the option."""


class Variables:
    """A source of options for the parser, which remembers what was taken from it.

    cyclopts' own `config.Env` would read a variable for every option, and `DEVICE`, `DATA`, `MODE`
    or `GROUP` may mean something else where they are set.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._taken: dict[str, str] = {}

    def __call__(self, app: App, commands: Sequence[str], arguments: ArgumentCollection) -> None:
        """Add the values of variables whose options were not given."""
        for argument in arguments:
            variable = VARIABLES.get(argument.name, "")
            is_open = argument.parse and not argument.tokens
            if is_open and (value := self._environ.get(variable)):
                argument.append(Token(keyword=variable, value=value, source=variable))
                self._taken[argument.name] = value

    @property
    def options(self) -> list[str]:
        """The settings that were taken, as options of a command line."""
        return [f"{option}={value}" for option, value in self._taken.items()]

    @property
    def sentence(self) -> str:
        """A sentence on the variables that were taken; empty if none was."""
        taken = [f"{VARIABLES[option]}={value}" for option, value in self._taken.items()]
        return f"From the environment: {', '.join(taken)}." if taken else ""
