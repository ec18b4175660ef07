"""The request for a launch, checked before anything starts and turned into a plan."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from dpsgd_track import program
from dpsgd_track.config import (
    ACCURACY,
    AUTO,
    CLIP,
    FLAT,
    NOISE,
    PROBE_DATA,
    PROBE_MODEL,
    PROFILE,
    TRAIN,
    DataConfig,
    DrawsConfig,
    JobConfig,
    ModelConfig,
    PerformanceConfig,
    PrivacyConfig,
    VariantConfig,
    is_probe,
    kind_of,
    require,
    require_one_of,
)
from dpsgd_track.launcher.choices import (
    DataChoices,
    GroupChoices,
    MachineChoices,
    ModeChoices,
    ModelChoices,
    NodeChoices,
    ProfileChoices,
    TrainingChoices,
)
from dpsgd_track.launcher.entrants import (
    Entrant,
    check_entrants,
    entrants_of,
    regimes_of_others,
)
from dpsgd_track.launcher.placement import Placement
from dpsgd_track.launcher.profile_order import profile_jobs, with_baselines
from dpsgd_track.launcher.recipe import Recipe, recipe_of
from dpsgd_track.launcher.regimes import (
    CHOOSABLE,
    ORDERED,
    SUITE_REGIMES,
    is_run,
    regimes_of,
)
from dpsgd_track.launcher.variants import (
    check_of_opacus,
    judged_alone,
    lacking_modes,
    modes_in,
    read_variants,
    with_settings,
)
from dpsgd_track.modes import table
from dpsgd_track.record.environment import environment
from dpsgd_track.record.names import GOLDEN_SUFFIXES
from dpsgd_track.record.plan import GroupPlan, Suite
from dpsgd_track.training.model_source import resolve_model
from dpsgd_track.training.task_source import population_of

_SUITE_MODES = {Suite.QUICK: table.QUICK, Suite.FULL: table.FULL, Suite.PROFILE: table.FULL}
_WITH_OUTPUT = (Suite.SINGLE, Suite.PROFILE, Suite.FAULTS)
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

InputCheck = Callable[[ModelConfig, DataConfig], object]
"""Raises ValueError if model and data do not fit each other."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The request for a launch."""

    suite: Suite
    what: ModeChoices = field(default_factory=ModeChoices)
    model: ModelChoices = field(default_factory=ModelChoices)
    data: DataChoices = field(default_factory=DataChoices)
    training: TrainingChoices = field(default_factory=TrainingChoices)
    draws: DrawsConfig = field(default_factory=DrawsConfig)
    machine: MachineChoices = field(default_factory=MachineChoices)
    nodes: NodeChoices = field(default_factory=NodeChoices)
    kept: GroupChoices = field(default_factory=GroupChoices)


def plan_of(asked: Asked, check_inputs: InputCheck, command: str = "") -> GroupPlan:
    """The plan of the launch that was asked for.

    Args:
        command: the command line of the request, without credentials.

    Raises:
        ValueError: something asked for cannot be done. Nothing has been started or written.
    """
    modes, regimes = _modes_and_regimes(asked)
    _check_own_noise(asked.draws.noise_from, regimes)
    _check_numbers(asked)
    variants = read_variants(asked.what.variant)
    installed = check_of_opacus(modes, variants)
    of_variants = _modes_of_variants(asked, variants, modes)
    num_local_ranks, performance = asked.machine.config(recipe_of(asked.suite, "cuda").param_dtype)
    num_nodes = asked.nodes.config().num_nodes
    num_ranks = num_local_ranks * num_nodes
    _check_plan(performance.plan, modes)
    keeps_any = any(map(table.takes_memory_budget, modes))
    allowed = "none for modes that keep nothing"
    budget, advice = performance.memory_budget, "Add a mode of one backward, such as flash_fsdp_bk."
    require(budget is None or keeps_any, "memory_budget", budget, allowed, advice)
    model, data = _model_and_data(asked, recipe_of(asked.suite, performance.device))
    shapes = _shapes(asked.what, data)

    if asked.suite is Suite.PROFILE:
        baselines = [table.baseline_of(mode) for own in of_variants.values() for mode in own]
        installed = tuple(dict.fromkeys((*baselines, *installed)))
    entrants = [*entrants_of(installed)]
    for variant, own in of_variants.items():
        entrants += entrants_of(own, variant)
    check_entrants(asked.suite, entrants, regimes, num_ranks)
    taken = regimes_of_others(entrants, regimes)
    jobs = tuple(
        _job(asked, each, own_regimes, model, shapes[0], performance, num_ranks)
        for each in entrants
        if (own_regimes := each.regimes(taken))
    )
    if isinstance(asked.what, ProfileChoices):
        jobs = profile_jobs(jobs, shapes, asked.what.rounds)
    for each in dict.fromkeys(job.data for job in jobs):
        if not all(map(is_probe, regimes)):
            check_inputs(model, each)
        _check_sampling(model.task, each, [job for job in jobs if job.data == each])
    return GroupPlan(
        suite=asked.suite,
        jobs=jobs,
        num_ranks=num_ranks,
        num_nodes=num_nodes,
        environment=environment(),
        left_out=(
            *(each for entrant in entrants for each in entrant.left_out(regimes)),
            *(each for variant in variants for each in lacking_modes(variant, modes)),
        ),
        command=command,
    )


def placement_of(asked: Asked) -> Placement:
    """The placement of the launch that was asked for.

    Raises:
        ValueError: a name, a file or a machine does not fit.
    """
    kept = asked.kept
    if kept.group is not None:
        allowed = "up to 100 letters, digits, '.', '_' and '-', a letter or digit first"
        require(bool(_GROUP.fullmatch(kept.group)), "group", kept.group, allowed)
        advice = "`compare` reads it as the newest group."
        require(kept.group != "latest", "group", kept.group, "another name", advice)
        is_file = kept.group.endswith(GOLDEN_SUFFIXES)
        advice = "`compare` takes it for a golden file."
        require(not is_file, "group", kept.group, "another name", advice)
    if kept.output is not None:
        output, allowed = str(kept.output), f"no --output but in {', '.join(_WITH_OUTPUT)}"
        require(asked.suite in _WITH_OUTPUT, "output", output, allowed)
        require(not kept.output.is_dir(), "output", output, "a file, not a folder")
        folder = kept.output.absolute().parent
        require(folder.is_dir(), "output", output, "a file in an existing folder")
    return Placement(
        settings=kept.settings(),
        group=kept.group,
        output=None if asked.suite is Suite.FAULTS else kept.output,
        is_offline=kept.offline,
        nodes=asked.nodes.config(),
        rendezvous_timeout_s=asked.nodes.rdzv_timeout,
    )


def _job(
    asked: Asked,
    entrant: Entrant,
    regimes: Sequence[str],
    model: ModelConfig,
    data: DataConfig,
    performance: PerformanceConfig,
    num_ranks: int,
) -> JobConfig:
    mode, variant = entrant.mode, entrant.variant
    if mode == table.REFERENCE and mode not in split_names(asked.what.mode):
        # It takes part in a profile for its accuracy test alone.
        regimes = [name for name in regimes if name != PROFILE]
    model, performance = with_settings(variant, model, performance)
    runs = regimes_of(mode, regimes, asked.suite, asked.training, performance.device)
    job = JobConfig(
        mode=mode,
        model=model,
        data=data,
        performance=performance,
        regimes=judged_alone(runs) if variant else runs,
        num_ranks=num_ranks,
        seed=asked.draws.seed,
        noise_from=asked.draws.noise_from,
        delta=asked.draws.delta,
        layer_norms=asked.kept.layer_norms,
        log_ranks=asked.kept.settings().log_ranks,
        system_metrics=asked.kept.system_metrics,
        variant=variant,
    )
    return _as_one_rank(job) if entrant.runs_on_one_rank else job


def _as_one_rank(job: JobConfig) -> JobConfig:
    """`job` as one rank with all ranks' micro-batches, so that its global batches are the same."""
    regimes = tuple(replace(r, micro_batches=r.micro_batches * job.num_ranks) for r in job.regimes)
    performance = replace(job.performance, num_replicas=1)
    return replace(job, num_ranks=1, performance=performance, regimes=regimes)


def _shapes(what: ModeChoices, data: DataConfig) -> list[DataConfig]:
    """`data` in each timed shape; unchanged if nothing is timed."""
    if not isinstance(what, ProfileChoices):
        return [data]
    lengths = _integers("seq_length", what.seq_length)
    sizes = _integers("batch_size", what.batch_size)
    return [replace(data, seq_length=t, batch_size=b) for t, b in product(lengths, sizes)]


def _integers(setting: str, given: Sequence[str]) -> tuple[int, ...]:
    texts = split_names(given)
    are_integers = all(re.fullmatch(r"[0-9]{1,9}", text) and int(text) >= 1 for text in texts)
    require(are_integers, setting, ",".join(given), "integers >= 1, comma separated")
    return tuple(dict.fromkeys(map(int, texts)))


def _model_and_data(asked: Asked, recipe: Recipe) -> tuple[ModelConfig, DataConfig]:
    if asked.suite is Suite.FAULTS:
        return PROBE_MODEL, PROBE_DATA
    model = asked.model.config(recipe.model_name)
    length = recipe.seq_length
    if asked.data.seq_length is None and length > DataConfig.seq_length:
        length = min(length, resolve_model(model).max_seq_length() or length)
    return model, asked.data.config(model.name, length)


def _modes_of_variants(
    asked: Asked, variants: Sequence[VariantConfig], modes: Sequence[str]
) -> dict[VariantConfig, tuple[str, ...]]:
    """The modes of the launch that each variant runs."""
    is_chosen = bool(split_names(asked.what.mode))
    runs = {}
    for variant in variants:
        own = modes_in(variant, modes, is_chosen=is_chosen)
        lacking = [f"{each.reason}." for each in lacking_modes(variant, modes)]
        allowed = f"a mode besides reference that runs code of variant {variant.name}"
        listing = program.command("modes", ["--variant", variant.option])
        advice = " ".join([f"`{listing}` lists them.", *lacking])
        shown = [mode for mode in modes if mode != table.REFERENCE] or modes
        require(bool(own), "mode", ",".join(shown), allowed, advice)
        runs[variant] = own
    return runs


def _modes_and_regimes(asked: Asked) -> tuple[tuple[str, ...], tuple[str, ...]]:
    modes = split_names(asked.what.mode)
    check_modes(modes)
    if asked.suite is Suite.SINGLE:
        return modes, (_regime_of_single(modes, asked.what),)
    clipping = asked.training.clipping
    may_clip = clipping != FLAT or asked.training.max_grad_norm < TrainingChoices().max_grad_norm
    if asked.suite is Suite.PROFILE:
        return _timed_modes(modes, is_tested=asked.what.accuracy_test, may_clip=may_clip)
    regimes = _chosen_regimes(asked.suite, asked.what)
    takes_part = modes or _SUITE_MODES[asked.suite]
    _check_clipping(clipping, takes_part)
    if not any(_takes_part(mode, regimes) for mode in takes_part):
        but = ", the reference apart" if NOISE in map(kind_of, regimes) else ""
        advice = f"It has no run in {' and '.join(regimes)}."
        require(False, "mode", ",".join(modes), f"a private mode{but}", advice)
    if CLIP in map(kind_of, regimes) or not modes or (may_clip and ACCURACY in regimes):
        # The reference comes first: it measures the other modes' clipping bounds. Where the user's
        # own bound clips, it takes no_dp's place as the baseline.
        takes_part = (table.REFERENCE, *takes_part)
    return tuple(dict.fromkeys(takes_part)), regimes


def _check_clipping(clipping: str, modes: Sequence[str]) -> None:
    """Refuse modes of libraries that clip by another rule than asked for."""
    others = [mode for mode in modes if table.is_of_opacus(mode)]
    rest = ",".join(mode for mode in modes if mode not in others)
    advice = f"Leave {', '.join(others)} out: --mode {rest}."
    require(clipping == FLAT or not others, "clipping", clipping, f"{FLAT} for Opacus", advice)


def _regime_of_single(modes: Sequence[str], what: ModeChoices) -> str:
    require(len(modes) == 1, "mode", ",".join(modes), "exactly one mode", "Give one --mode.")
    return ACCURACY if what.accuracy_test else TRAIN


def _chosen_regimes(suite: Suite, what: ModeChoices) -> tuple[str, ...]:
    regimes = split_names(what.regime)
    for regime in regimes:
        require_one_of("regime", regime, CHOOSABLE)
    if what.accuracy_test:
        advice = "Leave out --accuracy-test or --regime."
        require(regimes in ((), (ACCURACY,)), "regime", ",".join(regimes), ACCURACY, advice)
        return (ACCURACY,)
    return tuple(name for name in ORDERED if name in (regimes or SUITE_REGIMES[suite]))


def _timed_modes(
    modes: tuple[str, ...], *, is_tested: bool, may_clip: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Modes and regimes of a profile; its accuracy test adds the reference."""
    timed = with_baselines(modes or _SUITE_MODES[Suite.PROFILE])
    if not is_tested:
        return timed, (PROFILE,)
    judges = () if modes and not may_clip else (table.REFERENCE,)
    return tuple(dict.fromkeys((*judges, *timed))), (PROFILE, ACCURACY)


def check_modes(modes: Sequence[str]) -> None:
    """Raise ValueError for an unknown mode."""
    for mode in modes:
        table.check_mode(mode)


def _takes_part(mode: str, regimes: Sequence[str]) -> bool:
    return any(is_run(mode, regime) for regime in regimes)


def split_names(values: Sequence[str]) -> tuple[str, ...]:
    """The names in `values`, such as `a,b` and `c`, each once and in order."""
    return tuple(dict.fromkeys(part.strip() for value in values for part in value.split(",")))


def _check_own_noise(noise_from: str, regimes: Sequence[str]) -> None:
    advice = (
        "Only noise regimes, profiles and `single` without --accuracy-test have noise of their own."
    )
    has_own_noise = bool({kind_of(regime) for regime in regimes} & {TRAIN, NOISE, PROFILE})
    require(has_own_noise or noise_from == "seed", "noise_from", noise_from, "seed", advice)


def _check_plan(plan: str, modes: Sequence[str]) -> None:
    if plan == AUTO:
        return
    known = "auto, where no mode can do otherwise"
    require(any(table.takes_norm_plan(mode, plan) for mode in modes), "plan", plan, known)
    two_pass = [
        m for m in modes if table.takes_norm_plan(m, AUTO) and not table.takes_norm_plan(m, plan)
    ]
    allowed = f"another plan for {', '.join(two_pass)}, which keep nothing between two backwards"
    require(not two_pass, "plan", plan, allowed, "Leave the modes out, or choose gram or tiled.")


def _check_numbers(asked: Asked) -> None:
    """Check numbers, even those that no regime of the suite may use."""
    chosen = asked.training
    PrivacyConfig(
        noise_multiplier=chosen.noise_multiplier,
        max_grad_norm=chosen.max_grad_norm,
        expected_batch_size=1,
        clipping=chosen.clipping,
    )
    least, advice = 1, ""
    if isinstance(asked.what, ProfileChoices):
        least, advice = 2, "Every second step is tracked, the others are not."
        require(asked.what.rounds >= 1, "rounds", asked.what.rounds, "an integer >= 1")
        asked.what.limits()
    is_enough = chosen.num_iter is None or chosen.num_iter >= least
    require(is_enough, "num_iter", chosen.num_iter, f"an integer >= {least}", advice)
    count = chosen.micro_batches
    require(count is None or count >= 1, "micro_batches", count, "an integer >= 1")


def _check_sampling(task: str, data: DataConfig, jobs: Sequence[JobConfig]) -> None:
    """Check that no sampling probability exceeds 1; the noise regime does not sample."""
    population = population_of(data, task)
    expected = data.batch_size * max(
        (
            job.num_ranks * regime.micro_batches
            for job in jobs
            for regime in job.regimes
            if regime.name != NOISE and not is_probe(regime.name)
        ),
        default=0,
    )
    require(
        population is None or expected <= population,
        "sampling",
        data.sampling,
        f"at most {population} samples in a step, as many as there are, where ranks x "
        f"micro-batches x batch size is {expected}",
        "Lower --batch-size, or give more data.",
    )
