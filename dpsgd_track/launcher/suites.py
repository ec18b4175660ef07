"""What a command line sets out to do: a suite of jobs, checked before anything starts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dpsgd_track.cli.options import PROFILE_BATCH_SIZES, PROFILE_SEQ_LENGTHS
from dpsgd_track.config import (
    ACCURACY,
    AGAIN,
    AUTO,
    CLIP,
    NOISE,
    PERMUTED,
    PLAIN,
    PROBE_ACCURACY,
    PROBE_CLIP,
    PROBE_DATA,
    PROBE_MODEL,
    PROBE_NAIVE,
    PROBE_NOISE,
    PROBES,
    PROFILE,
    SILENT,
    SYNTHETIC,
    TRAIN,
    ULP,
    DataConfig,
    JobConfig,
    ModelConfig,
    NodesConfig,
    PerformanceConfig,
    PrivacyConfig,
    RegimeConfig,
    Settings,
    VariantConfig,
    is_probe,
    kind_of,
    load_settings,
    require,
)
from dpsgd_track.launcher.hardware import count_gpus
from dpsgd_track.launcher.profile_order import profile_jobs, with_baselines
from dpsgd_track.launcher.variants import read_variants, variant_jobs
from dpsgd_track.modes import table
from dpsgd_track.store.sqlite_file import sqlite_path
from dpsgd_track.training.text_source import population_of

NUM_ITER, QUICK_NUM_ITER = 10, 5
"""Recorded steps of the other regimes, by default."""
PROFILE_WARMUP_ITER = 3
CLIP_NUM_ITER = 4
"""Steps of the clip regime: the first half clips some samples, the second half all."""
NOISE_SIGMA = 0.7
NOISE_BOUNDS = (0.37, 0.83, 1.3, 0.47)
"""C of each step of the noise regime: none is 1, and no two have a likely fault's ratio."""
NOISE_MICRO_BATCHES = 3
PROBE_MICRO_BATCHES = 3
PROBE_SIGMA, PROBE_BOUND, PROBE_LEARNING_RATE = 0.0037, 83.0, 0.053
"""In the probe's accuracy regime, where no sample reaches C and noise is about as long as what it
is added to."""
CPU_RANKS = 2
DEFAULT_CONFIG = Path("mlflow.yaml")

_SUITE_MODES = {"quick": table.QUICK, "full": table.FULL, PROFILE: table.FULL}
_SUITE_REGIMES = {
    "quick": (ACCURACY, CLIP, *PROBES),
    "full": (ACCURACY, CLIP),
    "faults": (*PROBES, PROBE_NAIVE),
}
"""Those that are run unless the user asks for others."""
_KNOWN_REGIMES = (ACCURACY, CLIP, NOISE, *PROBES, PROBE_NAIVE)
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

InputCheck = Callable[[ModelConfig, DataConfig], object]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Jobs to run one after the other, and where to keep their runs."""

    name: str
    """quick, full, single or profile."""
    jobs: tuple[JobConfig, ...]
    """One for each mode, in order, then one for each mode of each variant; in a profile, one for
    each of its runs. Run ids and work folders are filled in as they start."""
    num_ranks: int
    """Processes of each job but those on one device."""
    settings: Settings
    """Where runs are tracked."""
    group: str | None
    """The group's name where the user chose one."""
    output: Path | None
    """JSON file for the results of a single run, CSV file for those of a profile."""
    is_offline: bool = False
    """Records stay in the spool; no store is looked for."""
    nodes: NodesConfig = field(default_factory=NodesConfig)
    """Machines that it runs on."""

    @property
    def expected_runs(self) -> list[tuple[str, ...]]:
        """(mode, regime, variant, replay) of every mode run, and of a profile's its point."""
        return [
            (
                *(job.mode, regime.name, job.variant.name if job.variant else "", regime.replay),
                *([regime.point] if regime.point else []),
            )
            for job in self.jobs
            for regime in job.regimes
        ]


def read_settings(args: argparse.Namespace) -> Settings:
    """Settings of the configuration file, with the command line's on top.

    Raises:
        ValueError: the file or an option does not fit.
    """
    path = args.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    settings = load_settings(path)
    if args.tracking_uri is not None:
        settings = replace(settings, tracking_uri=args.tracking_uri)
    if getattr(args, "spool", None) is not None:
        settings = replace(settings, spool_dir=str(args.spool))
    if getattr(args, "log_ranks", None) is not None:
        settings = replace(settings, log_ranks=args.log_ranks)
    # Raises where it names no file.
    sqlite_path(settings.tracking_uri)
    return settings


def build_suite(args: argparse.Namespace, check_inputs: InputCheck) -> Suite:
    """The suite that the arguments ask for.

    Args:
        check_inputs: raises ValueError where model and data do not fit each other.

    Raises:
        ValueError: something asked for cannot be done. Nothing has been started or written.
    """
    modes, regimes = _modes_and_regimes(args)
    _check_places(args)
    advice = (
        "Only noise regimes, profiles and `single` without --accuracy-test have noise of their own."
    )
    kinds = {kind_of(regime) for regime in regimes}
    own_noise = bool(kinds & {TRAIN, NOISE, PROFILE}) or args.noise_from == "seed"
    require(own_noise, "noise_from", args.noise_from, "seed", advice)
    variants = read_variants(args.variant or ())
    settings = read_settings(args)
    nodes = read_nodes(args)
    num_local_ranks, performance = _machine(args)
    num_ranks = num_local_ranks * nodes.num_nodes
    seq_lengths, batch_sizes = _shapes(args)
    model, data = _model_and_data(args, seq_lengths[0], batch_sizes[0])
    _check_numbers(args)
    _check_plan(args.plan, modes)
    jobs = tuple(
        _placed(
            JobConfig(
                mode=mode,
                model=model,
                data=data,
                performance=performance,
                regimes=_regimes_of(mode, regimes, args, performance.device),
                num_ranks=num_ranks,
                seed=args.random_seed,
                noise_from=args.noise_from,
                delta=args.delta,
                layer_norms=args.layer_norms,
                log_ranks=settings.log_ranks,
            )
        )
        for mode in modes
        if _takes_part(mode, regimes)
    )
    jobs = (*jobs, *_again(jobs, variants))
    if args.command == PROFILE:
        jobs = profile_jobs(jobs, seq_lengths, batch_sizes, args.rounds)
    for each in dict.fromkeys(job.data for job in jobs):
        if not all(map(is_probe, regimes)):
            check_inputs(model, each)
        _check_sampling(each, [job for job in jobs if job.data == each])
    check_shared_store(settings, nodes, is_offline=args.offline)
    return Suite(
        name=args.command,
        jobs=jobs,
        num_ranks=num_ranks,
        settings=settings,
        group=args.group,
        output=args.output,
        is_offline=args.offline,
        nodes=nodes,
    )


def read_nodes(args: argparse.Namespace) -> NodesConfig:
    """The machines that the arguments name.

    Raises:
        ValueError: what they say does not fit.
    """
    num_nodes, rank, endpoint = args.nnodes, args.node_rank, args.rdzv_endpoint
    require(num_nodes >= 1, "nnodes", num_nodes, "an integer >= 1")
    if num_nodes == 1:
        advice = "Give --nnodes as well."
        require(rank in (None, 0), "node_rank", rank, "0, where --nnodes is 1", advice)
        require(endpoint is None, "rdzv_endpoint", endpoint, "none, where --nnodes is 1", advice)
        return NodesConfig()
    advice = f"--nnodes is {num_nodes}."
    require(rank is not None, "node_rank", rank, f"0 to {num_nodes - 1}", advice)
    require(args.rdzv_timeout > 0, "rdzv_timeout", args.rdzv_timeout, "seconds, above 0")
    found = re.fullmatch(r"(?:\[(.+)\]|([^:\s]+)):([0-9]{1,5})", endpoint or "")
    is_known = found is not None and 1 <= int(found[3]) <= 65535
    require(is_known, "rdzv_endpoint", endpoint, "HOST:PORT of node 0", advice)
    assert found is not None
    return NodesConfig(
        num_nodes=num_nodes, node_rank=rank, host=found[1] or found[2], port=int(found[3])
    )


def check_shared_store(settings: Settings, nodes: NodesConfig, *, is_offline: bool) -> None:
    """Raise ValueError where machines would each track into a file of their own."""
    is_shared = not settings.tracking_uri.startswith("sqlite:")
    require(
        nodes.num_nodes == 1 or is_offline or is_shared,
        "tracking_uri",
        settings.tracking_uri,
        "a server, as --nnodes is not 1",
        "Give --tracking-uri http://..., or --offline and ship with `launch.py sync` later.",
    )


def _shapes(args: argparse.Namespace) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Every sequence length, and every batch size; one each but in a profile."""
    if args.command != PROFILE:
        return (args.seq_length,), (args.batch_size,)
    return (
        _integers("seq_length", args.seq_length or [PROFILE_SEQ_LENGTHS]),
        _integers("batch_size", args.batch_size or [PROFILE_BATCH_SIZES]),
    )


def _integers(setting: str, given: Sequence[str]) -> tuple[int, ...]:
    found = split_names(given)
    are_integers = all(re.fullmatch(r"[0-9]{1,9}", text) and int(text) >= 1 for text in found)
    require(are_integers, setting, ",".join(given), "integers >= 1, comma separated")
    return tuple(dict.fromkeys(map(int, found)))


def _model_and_data(
    args: argparse.Namespace, seq_length: int, batch_size: int
) -> tuple[ModelConfig, DataConfig]:
    if args.command == "faults":
        return PROBE_MODEL, PROBE_DATA
    model_name = args.model_name or ("minilm" if args.command == "quick" else "llama-tiny")
    model = ModelConfig(
        name=model_name,
        vocab_size=args.vocab_size,
        task=args.task,
        dropout=args.dropout,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    source = args.data or ("public-domain" if model_name == "minilm" else SYNTHETIC)
    data = DataConfig(
        source=source,
        seq_length=seq_length,
        batch_size=batch_size,
        padding=args.padding,
        ragged=args.ragged,
        sampling=args.sampling,
        dataset_size=args.dataset_size,
    )
    return model, data


def _again(
    jobs: tuple[JobConfig, ...], variants: tuple[VariantConfig, ...]
) -> tuple[JobConfig, ...]:
    again = variant_jobs(jobs, variants)
    if variants:
        known = "a mode besides reference to run a variant in"
        require(bool(again), "mode", ",".join(job.mode for job in jobs), known)
    return again


def _placed(job: JobConfig) -> JobConfig:
    """`job` as one rank with all ranks' micro-batches, where its mode runs on one device.

    Its global batches are then the same as everybody's.
    """
    if not table.runs_on_one_device(job.mode):
        return job
    regimes = tuple(replace(r, micro_batches=r.micro_batches * job.num_ranks) for r in job.regimes)
    performance = replace(job.performance, num_replicas=1)
    return replace(job, num_ranks=1, performance=performance, regimes=regimes)


def _modes_and_regimes(args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    asked = split_names(args.mode)
    for mode in asked:
        table.check_mode(mode)
    if args.command == "single":
        require(len(asked) == 1, "mode", ",".join(asked), "exactly one mode", "Give one --mode.")
        advice = "Use --accuracy-test, or the quick and full suites."
        require(not args.regime, "regime", _joined(args.regime), "no --regime in single", advice)
        return asked, (ACCURACY if args.accuracy_test else TRAIN,)
    if args.command == PROFILE:
        return _timed_modes(asked, is_tested=args.accuracy_test)
    regimes = split_names(args.regime)
    for regime in regimes:
        require(regime in _KNOWN_REGIMES, "regime", regime, f"one of {', '.join(_KNOWN_REGIMES)}")
    if args.accuracy_test:
        advice = "Leave out --accuracy-test or --regime."
        require(regimes in ((), (ACCURACY,)), "regime", ",".join(regimes), ACCURACY, advice)
        regimes = (ACCURACY,)
    regimes = tuple(
        name for name in _KNOWN_REGIMES if name in (regimes or _SUITE_REGIMES[args.command])
    )
    if CLIP in map(kind_of, regimes) or not asked:
        # The reference comes first: the other modes' clipping bounds are measured by it.
        modes = (table.REFERENCE, *(asked or _SUITE_MODES[args.command]))
    else:
        modes = asked
    if not any(_takes_part(mode, regimes) for mode in asked or modes):
        but = ", the reference apart" if NOISE in map(kind_of, regimes) else ""
        advice = f"It has no run in {' and '.join(regimes)}."
        require(False, "mode", ",".join(asked), f"a private mode{but}", advice)
    return tuple(dict.fromkeys(modes)), regimes


def _timed_modes(
    asked: tuple[str, ...], *, is_tested: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Modes and regimes of a profile; the suite's own accuracy test has the reference besides."""
    modes = with_baselines(asked or _SUITE_MODES[PROFILE])
    if not is_tested:
        return modes, (PROFILE,)
    judges = () if asked else (table.REFERENCE,)
    return (*judges, *modes), (PROFILE, ACCURACY)


def _takes_part(mode: str, regimes: Sequence[str]) -> bool:
    return any(_is_run(mode, regime) for regime in regimes)


def _is_run(mode: str, regime: str) -> bool:
    """Whether `mode` has a run in `regime`: what neither clips nor adds noise has none in those."""
    kind = kind_of(regime)
    if mode == table.REFERENCE and (kind == NOISE or regime == PROBE_NAIVE):
        return False
    # Opacus refuses tied and reused weights, without which the probe would show little.
    if is_probe(regime) and table.is_of_opacus(mode):
        return False
    return kind not in (CLIP, NOISE) or table.is_private(mode)


def split_names(values: Sequence[str] | None) -> tuple[str, ...]:
    """Each of `a,b` and `c` once, in order."""
    return tuple(dict.fromkeys(part.strip() for value in values or () for part in value.split(",")))


def _joined(values: Sequence[str] | None) -> str:
    return ",".join(values or ())


def _check_places(args: argparse.Namespace) -> None:
    if args.group is not None:
        known = "up to 100 letters, digits, '.', '_' and '-', a letter or digit first"
        require(bool(_GROUP.fullmatch(args.group)), "group", args.group, known)
        advice = "compare.py reads it as the newest group."
        require(args.group != "latest", "group", args.group, "another name", advice)
    if args.output is not None:
        output = str(args.output)
        known = f"no --output but in single and {PROFILE}"
        require(args.command in ("single", PROFILE), "output", output, known)
        require(not args.output.is_dir(), "output", output, "a file, not a folder")
        folder = args.output.absolute().parent
        require(folder.is_dir(), "output", output, "a file in an existing folder")
    if args.token is not None:
        require(bool(args.token.strip()), "token", "", "a token", "Leave it out to use HF_TOKEN.")


def _machine(args: argparse.Namespace) -> tuple[int, PerformanceConfig]:
    num_gpus = count_gpus() if args.device != "cpu" else 0
    device = args.device or ("cuda" if num_gpus else "cpu")
    if device == "cuda":
        advice = "Use --device cpu."
        require(num_gpus > 0, "device", device, "cpu, as no GPU is visible", advice)
    default = num_gpus if device == "cuda" else CPU_RANKS
    num_ranks: int = default if args.nproc_per_node is None else args.nproc_per_node
    require(num_ranks >= 1, "nproc_per_node", num_ranks, "an integer >= 1")
    if device == "cuda":
        allowed = f"at most {num_gpus}, the number of visible GPUs"
        require(num_ranks <= num_gpus, "nproc_per_node", num_ranks, allowed)
    performance = PerformanceConfig(
        device=device,
        param_dtype=args.param_dtype,
        reference_dtype=args.reference_dtype,
        num_replicas=args.replicas,
        plan=args.plan,
    )
    return num_ranks, performance


def _check_plan(plan: str, modes: Sequence[str]) -> None:
    if plan == AUTO:
        return
    known = "auto, where no mode can do otherwise"
    require(any(table.takes_plan(mode, plan) for mode in modes), "plan", plan, known)
    two_pass = [m for m in modes if table.takes_plan(m, AUTO) and not table.takes_plan(m, plan)]
    allowed = f"another plan for {', '.join(two_pass)}, which keep nothing between two backwards"
    require(not two_pass, "plan", plan, allowed, "Leave the modes out, or choose gram or tiled.")


def _check_numbers(args: argparse.Namespace) -> None:
    """Numbers a suite may not use in every regime are checked all the same."""
    PrivacyConfig(
        noise_multiplier=args.sigma, max_grad_norm=args.max_grad_norm, expected_batch_size=1
    )
    least = 2 if args.command == PROFILE else 1
    advice = "Every second step is tracked, the others are not." * (least == 2)
    if args.command == PROFILE:
        require(args.rounds >= 1, "rounds", args.rounds, "an integer >= 1")
    require(_num_iter(args) >= least, "num_iter", args.num_iter, f"an integer >= {least}", advice)
    if args.micro_batches is not None:
        require(args.micro_batches >= 1, "micro_batches", args.micro_batches, "an integer >= 1")


def _check_sampling(data: DataConfig, jobs: Sequence[JobConfig]) -> None:
    """A sample can't be drawn with a probability above 1; the noise regime draws none."""
    population = population_of(data)
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


def _num_iter(args: argparse.Namespace) -> int:
    default = QUICK_NUM_ITER if args.command == "quick" else NUM_ITER
    return int(args.num_iter if args.num_iter is not None else default)


def _regimes_of(
    mode: str, names: Sequence[str], args: argparse.Namespace, device: str
) -> tuple[RegimeConfig, ...]:
    known = {regime.name: regime for regime in _known_regimes(args, device)}
    is_suite = args.command != "single"
    return tuple(
        run
        for name in names
        if _is_run(mode, name) and not (name == PROFILE and mode in _untimed(args))
        for run in _with_replays(mode, known[name], is_suite=is_suite)
    )


def _untimed(args: argparse.Namespace) -> tuple[str, ...]:
    """Modes that take part in a profile for its accuracy test alone."""
    return () if table.REFERENCE in split_names(args.mode) else (table.REFERENCE,)


def _known_regimes(args: argparse.Namespace, device: str) -> Iterator[RegimeConfig]:
    warmup = args.warmup_iter if args.warmup_iter is not None else int(device == "cuda")
    trained = RegimeConfig(
        name=TRAIN,
        num_iter=_num_iter(args),
        warmup_iter=warmup,
        micro_batches=args.micro_batches or 1,
        noise_multiplier=args.sigma,
        max_grad_norms=(args.max_grad_norm,) * _num_iter(args),
        learning_rate=args.learning_rate,
        optimizer=args.optimizer,
    )
    clipped = RegimeConfig(
        name=CLIP,
        num_iter=CLIP_NUM_ITER,
        warmup_iter=warmup,
        micro_batches=args.micro_batches or 2,
        optimizer=args.optimizer,
    )
    noisy = replace(
        clipped,
        name=NOISE,
        num_iter=len(NOISE_BOUNDS),
        micro_batches=args.micro_batches or NOISE_MICRO_BATCHES,
        max_grad_norms=NOISE_BOUNDS,
        noise_multiplier=NOISE_SIGMA,
    )
    yield trained
    timed = PROFILE_WARMUP_ITER if args.warmup_iter is None else args.warmup_iter
    yield replace(trained, name=PROFILE, warmup_iter=timed)
    # What --warmup-iter says of a profile is of its timed steps.
    warmup = int(device == "cuda") if args.command == PROFILE else warmup
    trained = replace(trained, warmup_iter=warmup)
    yield replace(trained, name=ACCURACY, micro_batches=1, noise_matched=True)
    yield clipped
    yield noisy
    # The probe's are the same whatever the user chose, so that what they can show is known. A
    # warm-up would hide what goes wrong the first time only.
    on_probe = replace(clipped, warmup_iter=0, micro_batches=PROBE_MICRO_BATCHES, optimizer="sgd")
    accurate = replace(
        on_probe,
        name=PROBE_ACCURACY,
        noise_multiplier=PROBE_SIGMA,
        max_grad_norms=(PROBE_BOUND,) * on_probe.num_iter,
        learning_rate=PROBE_LEARNING_RATE,
        noise_matched=True,
    )
    yield accurate
    yield replace(accurate, name=PROBE_NAIVE, noise_multiplier=1e-9, micro_batches=1)
    yield replace(on_probe, name=PROBE_CLIP)
    yield replace(
        on_probe,
        name=PROBE_NOISE,
        num_iter=noisy.num_iter,
        max_grad_norms=noisy.max_grad_norms,
        noise_multiplier=noisy.noise_multiplier,
    )


def _with_replays(mode: str, regime: RegimeConfig, *, is_suite: bool) -> tuple[RegimeConfig, ...]:
    """`regime` with the runs beside it that a comparison needs."""
    if regime.kind == NOISE:
        # The twin without noise comes first: what it computed is taken off.
        return replace(regime, noise_multiplier=0.0, replay=SILENT), regime
    replays: tuple[str, ...] = ()
    if regime.kind == PROFILE:
        return (regime,)
    if is_suite and mode == table.BASELINE and regime.kind == ACCURACY:
        # What rounding alone makes of a trajectory.
        replays = (AGAIN, PERMUTED, ULP)
    elif is_suite and mode == table.REFERENCE:
        # How far plain autograd in the modes' own type is from the reference.
        replays = (PLAIN,)
    return (regime, *(replace(regime, replay=kind) for kind in replays))
