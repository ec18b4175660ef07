"""Options of the command line, generated from dataclasses by cyclopts.

An option is a field of a dataclass: its name, type, default and docstring. A new field of a
configuration becomes an option of every verb that has the group.

cyclopts rather than tyro, typer or jsonargparse: it reports an invalid option in one line,
with the nearest name, as an exception that the caller prints; it reads docstrings of inherited
fields; it flattens dataclasses, renames fields by one function, and imports neither rich nor numpy
until it renders a page. tyro draws boxes around its errors, five lines for one wrong value; typer
takes no dataclasses; jsonargparse takes twice as long to import (0.16 s; the others 0.08 s). Help
pages are rendered in `cli.help`, as cyclopts' own have more lines than a screen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

from cyclopts import App, CoercionError, Group, Parameter, Token, convert

from dpsgd_track.cli.compare_options import CompareChoices
from dpsgd_track.cli.variables import Variables
from dpsgd_track.config import CLASSIFICATION, DrawsConfig
from dpsgd_track.launcher.choices import (
    DataChoices,
    FaultChoices,
    GroupChoices,
    MachineChoices,
    ModeChoices,
    ModelChoices,
    NodeChoices,
    ProfileChoices,
    ProfileTrainingChoices,
    RecordChoices,
    SingleChoices,
    SpoolChoices,
    StoreChoices,
    TrainingChoices,
)
from dpsgd_track.launcher.suites import Asked
from dpsgd_track.record.plan import Suite

_RENAMED = {
    "name": "model-name",
    "source": "data",
    "seed": "random-seed",
    "noise_multiplier": "sigma",
    "num_replicas": "replicas",
}
"""Options whose names differ from their fields."""


_INTEGER = re.compile(r"[-+]?[0-9]{1,18}", re.ASCII)

FLAT = Parameter(name="*")
"""Marks a dataclass whose fields are options."""


def parser_of(verb: Callable[..., int], variables: Variables | None = None) -> App:
    """The parser of a function whose parameters are the classes below, and positional arguments.

    Args:
        variables: source of options that are not given (default: none).
    """
    each = Parameter(
        negative=(), name_transform=_option_name, converter=_value, allow_repeating=True
    )
    config = () if variables is None else (variables,)
    parser = App(default_parameter=each, help_flags=(), version_flags=(), config=config)
    parser.default(verb)
    return parser


def _option_name(field_name: str) -> str:
    return _RENAMED.get(field_name, field_name.replace("_", "-"))


def _value(hint: Any, tokens: Sequence[Token]) -> Any:
    """Value of the text typed; cyclopts alone would round 1.5, and Python alone take 1_0 for 10."""
    if hint is not int and int not in get_args(hint):
        return convert(hint, tokens)
    if not _INTEGER.fullmatch(tokens[0].value):
        raise CoercionError(token=tokens[0], target_type=int)
    return int(tokens[0].value)


def _group(title: str) -> Parameter:
    return Parameter(name="*", group=Group.create_ordered(title))


def _without(group: Parameter, *hidden: str) -> Parameter:
    """`group` of a dataclass, without the fields `hidden`."""
    pattern = re.compile(rf"^(?!({'|'.join(hidden)})$)")
    return Parameter(name="*", group=group.group, parse=pattern)


_WHAT, _DATA, _TRAINED = map(_group, ("Modes", "Model and data", "Training"))
_MACHINE = _group("Device and ranks")
_NODES = _group("Several machines (run the same command on each, with its own --node-rank)")
_KEPT = _group("Results and tracking")


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """The option --dry-run."""

    dry_run: bool = False
    """Print the plan and its duration; run nothing."""


@dataclass(frozen=True, kw_only=True)
class Loudness:
    """The option --quiet."""

    quiet: Annotated[bool, Parameter(name=("--quiet", "-q"))] = False
    """Print the outcome alone, on one line."""


@dataclass(frozen=True, kw_only=True)
class SuiteOptions(Asked):
    """Options of quick and full."""

    suite: Annotated[Suite, Parameter(parse=False)] = Suite.QUICK
    what: Annotated[ModeChoices, _WHAT] = field(default_factory=ModeChoices)
    dry: Annotated[DryRun, _WHAT] = field(default_factory=DryRun)
    model: Annotated[ModelChoices, _DATA] = field(default_factory=ModelChoices)
    data: Annotated[DataChoices, _DATA] = field(default_factory=DataChoices)
    training: Annotated[TrainingChoices, _TRAINED] = field(default_factory=TrainingChoices)
    draws: Annotated[DrawsConfig, _TRAINED] = field(default_factory=DrawsConfig)
    machine: Annotated[MachineChoices, _MACHINE] = field(default_factory=MachineChoices)
    nodes: Annotated[NodeChoices, _NODES] = field(default_factory=NodeChoices)
    kept: Annotated[GroupChoices, _KEPT] = field(default_factory=GroupChoices)
    loudness: Annotated[Loudness, _KEPT] = field(default_factory=Loudness)


@dataclass(frozen=True, kw_only=True)
class SingleOptions(SuiteOptions):
    """Options of single."""

    what: Annotated[SingleChoices, _without(_WHAT, "regime")] = field(default_factory=SingleChoices)


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(SuiteOptions):
    """Options of profile."""

    what: Annotated[ProfileChoices, _without(_WHAT, "regime")] = field(
        default_factory=ProfileChoices
    )
    data: Annotated[DataChoices, _without(_DATA, "seq_length", "batch_size")] = field(
        default_factory=DataChoices
    )
    training: Annotated[ProfileTrainingChoices, _TRAINED] = field(
        default_factory=ProfileTrainingChoices
    )


@dataclass(frozen=True, kw_only=True)
class FaultOptions:
    """Options of faults."""

    what: Annotated[FaultChoices, _WHAT] = field(default_factory=FaultChoices)
    draws: Annotated[DrawsConfig, _without(_WHAT, "noise_from", "delta")] = field(
        default_factory=DrawsConfig
    )
    dry: Annotated[DryRun, _WHAT] = field(default_factory=DryRun)
    machine: Annotated[MachineChoices, _MACHINE] = field(default_factory=MachineChoices)
    kept: Annotated[GroupChoices, _KEPT] = field(default_factory=GroupChoices)
    loudness: Annotated[Loudness, _KEPT] = field(default_factory=Loudness)


@dataclass(frozen=True, kw_only=True)
class CheckChoices:
    """Inputs, modes and seed with which a module is checked."""

    input: tuple[str, ...] = ()
    """SHAPE: numbers of an input of the module, the samples first, such as 3,5,7, repeatable
    (default: none; needed). 3,5:9 are whole numbers below 9."""
    mode: tuple[str, ...] = ()
    """Mode to check it in, repeatable or comma separated (default: those on one device)."""
    random_seed: int = 42
    """Seed of weights and inputs."""


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of check."""

    what: Annotated[CheckChoices, _WHAT] = field(default_factory=CheckChoices)
    loudness: Annotated[Loudness, _WHAT] = field(default_factory=Loudness)


@dataclass(frozen=True, kw_only=True)
class WhyChoices:
    """The model whose layers are told of."""

    why: str = ""
    """MODEL: list the layers of a model, which --model-name takes, instead (default: none). Each
    with the way to its per-sample gradients and their cost, or why it is refused."""
    task: str = CLASSIFICATION
    """Task of the model, as for a launch."""
    seq_length: int = 16
    """Tokens in a sample."""
    image_size: int | None = None
    """Pixels of a side of an image (default: the model's own, else 224)."""
    vocab_size: int | None = None
    """Tokens in the vocabulary (default: the model's own)."""
    num_labels: int = 2
    """Classes, where the task has classes."""


@dataclass(frozen=True, kw_only=True)
class ModesOptions:
    """Options of modes."""

    what: Annotated[ModeChoices, _without(_WHAT, "mode", "regime", "accuracy_test")] = field(
        default_factory=ModeChoices
    )
    model: Annotated[WhyChoices, _DATA] = field(default_factory=WhyChoices)


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """Options of resume."""

    dry: Annotated[DryRun, _group("Plan")] = field(default_factory=DryRun)
    nodes: Annotated[NodeChoices, _NODES] = field(default_factory=NodeChoices)
    kept: Annotated[RecordChoices, _KEPT] = field(default_factory=RecordChoices)
    loudness: Annotated[Loudness, _KEPT] = field(default_factory=Loudness)


@dataclass(frozen=True, kw_only=True)
class SyncOptions:
    """Options of sync."""

    kept: Annotated[SpoolChoices, _KEPT] = field(default_factory=SpoolChoices)
    loudness: Annotated[Loudness, _KEPT] = field(default_factory=Loudness)


@dataclass(frozen=True, kw_only=True)
class UiOptions:
    """Options of ui."""

    port: Annotated[int, Parameter(group=_KEPT.group)] = 5000
    """Port on 127.0.0.1."""
    kept: Annotated[SpoolChoices, _KEPT] = field(default_factory=SpoolChoices)


@dataclass(frozen=True, kw_only=True)
class HistoryOptions:
    """Options of history."""

    last: Annotated[int, Parameter(group=_KEPT.group)] = 30
    """Groups to tell, the newest ones."""
    kept: Annotated[StoreChoices, _KEPT] = field(default_factory=StoreChoices)


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Options of compare."""

    judged: Annotated[CompareChoices, _group("Verdict and report")] = field(
        default_factory=CompareChoices
    )
