"""The verbs: their options and the functions they call. Heavy imports wait until one is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

from cyclopts import Parameter

from dpsgd_track.cli.context import Context
from dpsgd_track.cli.options import (
    FLAT,
    CheckOptions,
    CompareOptions,
    FaultOptions,
    HistoryOptions,
    ModesOptions,
    ProfileOptions,
    ResumeOptions,
    SingleOptions,
    SuiteOptions,
    SyncOptions,
    UiOptions,
)
from dpsgd_track.record.plan import Suite

Called = Annotated[Context, Parameter(parse=False)]


def _suite(suite: Suite) -> Callable[..., int]:
    def run(*, options: Annotated[SuiteOptions, FLAT] = SuiteOptions(), called: Called) -> int:
        from dpsgd_track.cli.launch import launch

        called = replace(called, is_quiet=options.loudness.quiet)
        return launch(called, replace(options, suite=suite), is_dry=options.dry.dry_run)

    return run


def _single(*, options: Annotated[SingleOptions, FLAT] = SingleOptions(), called: Called) -> int:
    return _suite(Suite.SINGLE)(options=options, called=called)


def _profile(*, options: Annotated[ProfileOptions, FLAT] = ProfileOptions(), called: Called) -> int:
    return _suite(Suite.PROFILE)(options=options, called=called)


def _faults(*, options: Annotated[FaultOptions, FLAT] = FaultOptions(), called: Called) -> int:
    from dpsgd_track.cli.faults import detect

    return detect(replace(called, is_quiet=options.loudness.quiet), options)


def _modes(*, options: Annotated[ModesOptions, FLAT] = ModesOptions(), called: Called) -> int:
    from dpsgd_track.cli.modes import list_modes, tell_layers

    return tell_layers(options.model) if options.model.why else list_modes(options.what.variant)


def _ui(
    group: Annotated[str | None, Parameter(help="Group to open (default: the newest)")] = None,
    /,
    *,
    options: Annotated[UiOptions, FLAT] = UiOptions(),
    called: Called,
) -> int:
    from dpsgd_track.cli.context import reading
    from dpsgd_track.launcher.ui import open_ui

    settings = options.kept.settings()
    with reading(settings):
        return open_ui(settings, options.port, group)


def _sync(
    group: Annotated[str | None, Parameter(help="Group to ship (default: all of them)")] = None,
    /,
    *,
    options: Annotated[SyncOptions, FLAT] = SyncOptions(),
    called: Called,
) -> int:
    from dpsgd_track.launcher.sync import sync

    return sync(options.kept.settings(), group, is_quiet=options.loudness.quiet)


def _resume(
    group: Annotated[str, Parameter(help="Group of quick, full, single or faults")],
    /,
    *,
    options: Annotated[ResumeOptions, FLAT] = ResumeOptions(),
    called: Called,
) -> int:
    from dpsgd_track.cli.launch import resume

    return resume(replace(called, is_quiet=options.loudness.quiet), group, options)


def _check(
    module: Annotated[str, Parameter(help="package.module:NAME, or package.module:NAME(7, 4)")],
    /,
    *,
    options: Annotated[CheckOptions, FLAT] = CheckOptions(),
    called: Called,
) -> int:
    from dpsgd_track.cli.check import check_module

    called = replace(called, is_quiet=options.loudness.quiet)
    called.tell_environment()
    return check_module(called, module, options.what)


def _history(*, options: Annotated[HistoryOptions, FLAT] = HistoryOptions(), called: Called) -> int:
    from dpsgd_track.cli.history import tell_history

    return tell_history(options.kept.settings(), options.last)


_GROUP = "A group's name, a run id, latest, or a golden file (.dpsgd, .dpsgd.json), without a store"
_GROUP_B = (
    "Second group, whose runs are compared with the same runs of GROUP (default: none; the modes "
    "of GROUP are compared with each other)"
)


def _compare(
    group: Annotated[str, Parameter(help=_GROUP)],
    group_b: Annotated[str | None, Parameter(help=_GROUP_B)] = None,
    /,
    *,
    options: Annotated[CompareOptions, FLAT] = CompareOptions(),
    called: Called,
) -> int:
    from dpsgd_track.cli.compare import compare

    return compare(called, group, group_b, options.judged)


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb of the command line."""

    name: str
    summary: str
    run: Callable[..., int]
    """Function of `options`, `called` and positional arguments."""
    examples: tuple[str, ...] = ()
    """Example arguments, without the verb."""
    notes: str = ""


_LAUNCH_CODES = "exit codes: 0 finished, 1 a mode failed, 2 usage, 70 internal, 130 interrupted"

VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb(
            name="quick",
            summary="no_dp and the flash modes against the reference, in a few minutes",
            run=_suite(Suite.QUICK),
            examples=(
                "--dry-run",
                "--mode no_dp,my_module:MyMode",
                "--data mine.csv --seq-length 128",
            ),
            notes=_LAUNCH_CODES,
        ),
        Verb(
            name="full",
            summary="the baseline, Opacus and sharded flash modes against the reference",
            run=_suite(Suite.FULL),
            examples=(
                "--variant branch=../opacus-branch",
                "--model-name llama-3.2-1b --param-dtype bfloat16",
                "--regime accuracy,clip,noise",
            ),
            notes=_LAUNCH_CODES,
        ),
        Verb(
            name="single",
            summary="one mode on its own",
            run=_single,
            examples=("--mode flash_fsdp_bk --sigma 0.7 --output a.json",),
            notes=_LAUNCH_CODES,
        ),
        Verb(
            name="profile",
            summary="step time and peak memory of modes beside ordinary training",
            run=_profile,
            examples=("--mode flash_fsdp --seq-length 64,256",),
            notes="exit codes: 0 finished, 1 a mode failed or is over a limit, 2 usage, "
            "70 internal, 130 interrupted",
        ),
        Verb(
            name="faults",
            summary="plant known faults in modes, and see which the comparison finds",
            run=_faults,
            examples=("--list", "--fault clipping,no_noise", "--mode my_module:MyMode"),
            notes="exit codes: 0 every fault that can show was found and no healthy mode raised an "
            "alarm, 1 otherwise, 2 usage, 70 internal, 130 interrupted",
        ),
        Verb(
            name="check",
            summary="one module of anybody's against the oracle, in seconds",
            run=_check,
            examples=(
                "'torch.nn:Linear(7,4)' --input 3,5,7",
                "my_layers:block --input 4,16:99 --mode flash,ghost",
            ),
            notes="exit codes: 0 exact, or refused in a sentence, 1 wrong or failed, 2 usage, "
            "70 internal, 130 interrupted",
        ),
        Verb(
            name="modes",
            summary="list the modes, those of a variant, or the layers of a model",
            run=_modes,
            examples=("--variant fork=../opacus-fork", "--why my_package.models:build_model"),
            notes="exit codes: 0 told, 1 --why found a layer that is refused, 2 usage, 70 internal",
        ),
        Verb(
            name="ui",
            summary="open the MLflow UI on the trajectories of a group",
            run=_ui,
            examples=("", "GROUP --port 5001"),
        ),
        Verb(
            name="sync",
            summary="ship what is in the spool to the store, and check that it arrived",
            run=_sync,
            examples=("", "GROUP --tracking-uri http://host:5000"),
        ),
        Verb(
            name="resume",
            summary="run what is missing in a group: modes that failed or never started",
            run=_resume,
            examples=("GROUP --dry-run",),
            notes=_LAUNCH_CODES,
        ),
        Verb(
            name="compare",
            summary="compare the modes of a group, or two groups, and write a report",
            run=_compare,
            examples=("latest", "june july", "june --export golden.dpsgd"),
            notes="exit codes: 0 PASS, 1 DRIFT or BUG, 2 usage, or nothing found, 3 INCONCLUSIVE "
            "(a missing, failed or unlike run never passes), 70 internal",
        ),
        Verb(
            name="history",
            summary="drift by stage, cost and verdict of the groups that were compared",
            run=_history,
            examples=("", "--last 10 --tracking-uri http://host:5000"),
            notes="exit codes: 0 told, 2 usage, or nothing found, 70 internal",
        ),
    )
}
