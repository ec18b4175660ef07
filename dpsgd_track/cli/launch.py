"""The verbs that launch: plan, run, and suggest the next commands."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpsgd_track.cli.context import Context, check_planted, reading, say, say_aside
from dpsgd_track.cli.dry_run import show_plan
from dpsgd_track.cli.options import ResumeOptions
from dpsgd_track.config import Settings, require
from dpsgd_track.launcher import EXIT_FAILED, EXIT_FINISHED
from dpsgd_track.launcher.choices import NodeChoices, ProfileChoices, RecordChoices
from dpsgd_track.launcher.hardware import count_gpus
from dpsgd_track.launcher.placement import Placement
from dpsgd_track.launcher.suites import Asked, InputCheck, check_modes, placement_of, plan_of
from dpsgd_track.launcher.variants import OF_HERE, restore
from dpsgd_track.program import command
from dpsgd_track.record.plan import GroupPlan, Suite
from dpsgd_track.redaction import redact_uri

if TYPE_CHECKING:
    from dpsgd_track.launcher.launch import Launched


def launch(context: Context, asked: Asked, *, is_dry: bool) -> int:
    """Run quick, full, single or profile; returns the exit code.

    Raises:
        ValueError: it cannot be done; nothing was started.
    """
    if asked.model.token:
        # Workers and the hub's client inherit it; it goes nowhere else.
        os.environ["HF_TOKEN"] = asked.model.token
    return run_asked(context, asked, is_dry=is_dry)[0]


def run_asked(context: Context, asked: Asked, *, is_dry: bool = False) -> tuple[int, str]:
    """Plan and run the launch that was asked for.

    Returns:
        The exit code, and the group's name; empty where nothing was started.

    Raises:
        ValueError: it cannot be done; nothing was started.
    """
    plan = plan_of(asked, context.check_inputs, context.command)
    check_planted(plan)
    context.tell_environment()
    _tell_uncommitted(context, plan)
    for sentence in plan.not_compared:
        context.say(f"{sentence}.")
    place = placement_of(asked)
    if is_dry:
        show_plan(plan)
        return EXIT_FINISHED, ""
    from dpsgd_track.launcher.launch import run_plan

    launched = run_plan(plan, place, context.launch, context.say, is_quiet=context.is_quiet)
    code = launched.code
    is_over = code in (EXIT_FINISHED, EXIT_FAILED)
    if isinstance(asked.what, ProfileChoices) and is_over and place.nodes.leads:
        from dpsgd_track.cli.profile import summarise

        code = max(code, summarise(context, place, launched.group, asked.what))
    tell(context, plan.suite, launched, place, asked.kept, asked.nodes)
    return code, launched.group


def _tell_uncommitted(context: Context, plan: GroupPlan) -> None:
    """Say that a revision of the repository one is in lacks what is not committed there."""
    for variant in dict.fromkeys(job.variant for job in plan.jobs if job.variant):
        if plan.environment.git_dirty and variant.path.endswith(OF_HERE):
            commit = variant.git_revision[:12]
            context.say(
                f"variant {variant.name}: commit {commit}, without the uncommitted changes here"
            )


def tell(
    context: Context,
    suite: Suite | None,
    launched: Launched,
    place: Placement,
    kept: RecordChoices,
    nodes: NodeChoices,
) -> None:
    """Report the outcome of a launch, and the commands that may follow.

    Args:
        suite: None where another machine leads.
    """
    if launched.problem:
        context.complain(launched.problem, launched.code)
    group, places = launched.group, _place_options(kept)
    if launched.left_behind:
        say(f"tracking: {launched.left_behind} It is in {launched.spool}, and safe.")
        context.say(f"ship:    {command('sync', [group, *places])}")
    if suite is None or not group or not place.nodes.leads:
        return
    if launched.code != EXIT_FINISHED and suite.is_resumable:
        output = [] if kept.output is None else ["--output", str(kept.output)]
        context.say(
            f"resume:  {command('resume', [group, *_node_options(nodes), *places, *output])}"
        )
    context.say(f"compare: {command('compare', [group, *places])}")
    later = "   # once it is shipped" if place.is_offline else ""
    context.say(f"browse:  {command('ui', _store_options(kept))}{later}")


def _store_options(kept: RecordChoices) -> list[str]:
    """The options that point another command to the same store."""
    options = []
    if kept.config is not None:
        options += ["--config", str(kept.config)]
    if kept.tracking_uri is not None:
        options += ["--tracking-uri", redact_uri(kept.tracking_uri)]
    return options


def _place_options(kept: RecordChoices) -> list[str]:
    """The options that point another command to the same store and spool."""
    return _store_options(kept) + ([] if kept.spool is None else ["--spool", str(kept.spool)])


def _node_options(nodes: NodeChoices) -> Sequence[str]:
    """The options for a rendezvous of the same machines, with this machine's --node-rank."""
    if nodes.nnodes == 1:
        return ()
    ranks = ("--nnodes", str(nodes.nnodes), "--node-rank", str(nodes.node_rank))
    return *ranks, "--rdzv-endpoint", str(nodes.rdzv_endpoint)


def resume(context: Context, group: str, options: ResumeOptions) -> int:
    """Run the missing runs of `group`; returns the exit code.

    Raises:
        ValueError: it cannot be resumed here; nothing was started.
    """
    from dpsgd_track.launcher import launch as launcher

    kept, nodes = options.kept, options.nodes
    place = Placement(
        settings=kept.settings(),
        output=kept.output,
        is_offline=kept.offline,
        nodes=nodes.config(),
        rendezvous_timeout_s=nodes.rdzv_timeout,
    )

    plans: list[GroupPlan] = []

    def check(plan: GroupPlan) -> None:
        check_at_hand(plan, context.check_inputs)
        plans.append(plan)

    if options.dry.dry_run:
        return _show_missing(group, place, check)
    with reading(place.settings):
        launched = launcher.resume(
            group, place, check, context.launch, context.say, is_quiet=context.is_quiet
        )
    if not place.nodes.leads or not launched.group:
        tell(context, None, launched, place, kept, nodes)
        return launched.code
    # A complete group has no plan of missing runs, and is compared all the same.
    plan = plans[0] if plans else _plan_as_recorded(place.settings, launched.group)
    if launched.sentence and not (context.is_quiet and plan.suite.is_judged):
        say(launched.sentence)
    tell(context, plan.suite, launched, place, kept, nodes)
    if plan.suite is Suite.FAULTS and launched.code in (EXIT_FINISHED, EXIT_FAILED):
        from dpsgd_track.cli.faults import tell_matrix

        where = place.settings, plan.command, launched.group
        return tell_matrix(context, *where, kept.output)
    return launched.code


def _plan_as_recorded(settings: Settings, group: str) -> GroupPlan:
    from dpsgd_track.store.find_group import read_group_anywhere

    return read_group_anywhere(settings, group, say_aside).group.plan


def _show_missing(group: str, place: Placement, check: Callable[[GroupPlan], object]) -> int:
    from dpsgd_track.launcher.resume import find_missing

    with reading(place.settings):
        missing = find_missing(place.settings, group, place.nodes)
    if missing.jobs:
        check(missing.plan)
        show_plan(missing.plan)
    else:
        say(f"group {missing.group.name}: nothing is missing")
    return EXIT_FINISHED


def check_at_hand(plan: GroupPlan, check_inputs: InputCheck) -> None:
    """Raise ValueError for a setting of `plan` that this machine does not support."""
    if on_gpu := [job.num_ranks for job in plan.jobs if job.performance.device == "cuda"]:
        num_gpus, num_local_ranks = count_gpus(), max(1, max(on_gpu) // plan.num_nodes)
        require(num_gpus > 0, "device", "cuda", "a visible GPU, as the group was launched with one")
        allowed = f"at most {num_gpus}, the number of visible GPUs"
        require(num_local_ranks <= num_gpus, "nproc_per_node", num_local_ranks, allowed)
    check_modes(tuple(dict.fromkeys(job.mode for job in plan.jobs)))
    check_planted(plan)
    for variant in dict.fromkeys(job.variant for job in plan.jobs if job.variant):
        restore(variant)
        allowed = f"the folder {variant.root} that it was launched with"
        is_there = not variant.root or Path(variant.root).is_dir()
        require(is_there, "variant", variant.option, allowed)
    of_user = {
        (run.model, run.data)
        for _, job, regime in plan.runs()
        if (run := job.run_in(regime)) is job
    }
    for model, data in of_user:
        check_inputs(model, data)
