"""The command line of launch.py. Imports nothing heavy, so that `--help` is instant."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from dpsgd_track.config import (
    AUTO,
    CLASSIFICATION,
    DEVICES,
    NOISE_FROM,
    OPTIMIZERS,
    PADDINGS,
    PARAM_DTYPES,
    PLANS,
    SAMPLINGS,
    SEQUENTIAL,
    TASKS,
    redact_uri,
)

SUITES = {
    "quick": "no_dp and the flash modes against the reference, in a few minutes",
    "full": "the baseline, Opacus and the sharded flash modes against the reference",
    "single": "one mode on its own",
    "profile": "step time and peak memory of modes beside ordinary training",
}
PROFILE, PLANTED = "profile", "faults"
RESUMABLE = (*(name for name in SUITES if name != PROFILE), PLANTED)
"""Times of a profile mean something beside those of the same launch alone."""
PROFILE_SEQ_LENGTHS, PROFILE_BATCH_SIZES = "64,256", "2"
FAULTS = "plant known faults in modes, and see which of them the comparison finds"
RESUME = "run what is missing in a group: modes that failed, were killed or never started"
SYNC = "ship what is in the spool to the tracking store, and check that all of it arrived"
_SECRET = "--token"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `launch.py COMMAND`."""
    parser = _Parser(
        prog="launch.py",
        description="Run DP-SGD modes one after the other and track them in MLflow.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in SUITES.items():
        suite = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        _add_what(suite, is_profile=name == PROFILE)
        _add_regime(suite, is_profile=name == PROFILE)
        _add_machine(suite)
        _add_nodes(suite)
        _add_tracking(suite)
    _add_faults(commands.add_parser(PLANTED, help=FAULTS, description=FAULTS, allow_abbrev=False))
    resume = commands.add_parser("resume", help=RESUME, description=RESUME, allow_abbrev=False)
    resume.add_argument("group", metavar="GROUP", help="group of quick, full, single or faults")
    _add_nodes(resume)
    _add_store(resume)
    _add_offline(resume)
    _add_spool(resume)
    sync = commands.add_parser("sync", help=SYNC, description=SYNC, allow_abbrev=False)
    sync.add_argument(
        "group",
        nargs="?",
        metavar="GROUP",
        help="group to ship (default: every group in the spool)",
    )
    _add_store(sync)
    _add_spool(sync)
    commands.add_parser("modes", help="list the modes", allow_abbrev=False)
    ui = commands.add_parser("ui", help="open the MLflow UI on the store", allow_abbrev=False)
    _add_store(ui)
    ui.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 (default: 5000)")
    return parser


def reproducing_command(argv: Sequence[str]) -> str:
    """The command line that `argv` came from, without the token and other credentials."""
    kept = ["python", "launch.py"]
    arguments = iter(argv)
    for argument in arguments:
        if argument == _SECRET:
            next(arguments, None)
        elif not argument.startswith(f"{_SECRET}="):
            option, equals, value = argument.partition("=")
            kept.append(
                f"{option}={redact_uri(value)}"
                if equals and option.startswith("--")
                else redact_uri(argument)
            )
    return shlex.join(kept)


def planted_suite(args: argparse.Namespace, modes: Iterable[str]) -> argparse.Namespace:
    """The arguments of `faults` as those of the suite that runs `modes` on the probe."""
    suite = build_parser().parse_args(["quick", "--mode", ",".join(dict.fromkeys(modes))])
    for option, value in vars(args).items():
        if option in vars(suite) and option not in ("mode", "output"):
            setattr(suite, option, value)
    return suite


def _add_faults(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is planted")
    group.add_argument(
        "--fault",
        action="append",
        metavar="NAME",
        help="fault to plant, or a class of faults; repeatable or comma separated (default: all)",
    )
    group.add_argument(
        "--mode",
        action="append",
        metavar="NAME",
        help="mode to plant every fault in, repeatable (default: each fault in one of the sharded "
        "flash modes, in turn)",
    )
    group.add_argument(
        "--list", action="store_true", help="list the faults, and run nothing (default: run)"
    )
    group.add_argument(
        "--random-seed", type=int, default=42, help="seed of data, weights and noise (default: 42)"
    )
    _add_machine(parser)
    _add_tracking(parser)


def _add_what(parser: argparse.ArgumentParser, *, is_profile: bool) -> None:
    group = parser.add_argument_group("what is run")
    group.add_argument(
        "--mode",
        action="append",
        metavar="NAME",
        help="mode to time beside no_dp, repeatable or comma separated (default: those of full)"
        if is_profile
        else "mode to run, repeatable or comma separated; replaces the suite's modes "
        "(default: the suite's; `single` needs exactly one)",
    )
    group.add_argument(
        "--variant",
        action="append",
        metavar="NAME=PATH",
        help="run the modes once more (not reference) with the packages of PATH, a checkout, "
        "in place of the installed ones, as mode@NAME; repeatable (default: none)",
    )
    group.add_argument(
        "--model-name",
        metavar="NAME",
        help="preset, local folder or hub id (default: minilm in quick, else llama-tiny)",
    )
    group.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="tokens in a preset's vocabulary (default: the preset's own)",
    )
    group.add_argument(
        "--data",
        metavar="SOURCE",
        help="synthetic, public-domain, or a .jsonl or .csv file "
        "(default: public-domain for minilm, else synthetic)",
    )
    group.add_argument(
        "--token",
        metavar="TOKEN",
        help="hub access token, handed to workers as HF_TOKEN and written nowhere; setting "
        "HF_TOKEN keeps it out of the process list as well (default: HF_TOKEN)",
    )
    _add_shape(group, is_profile=is_profile)
    group.add_argument(
        "--micro-batches",
        type=int,
        metavar="K",
        help="micro-batches a rank accumulates in a timed step (default: 1)"
        if is_profile
        else "micro-batches a rank accumulates in a step of the clip, noise and train "
        "regimes (default: 2 in clip, 3 in noise, 1 in train)",
    )
    group.add_argument(
        "--random-seed", type=int, default=42, help="seed of data, weights and noise (default: 42)"
    )
    _add_task(group)


def _add_shape(group: argparse._ActionsContainer, *, is_profile: bool) -> None:
    if not is_profile:
        group.add_argument(
            "--seq-length", type=int, default=64, help="tokens in a sample (default: 64)"
        )
        group.add_argument(
            "--batch-size",
            type=int,
            default=2,
            help="samples in a micro-batch of a rank (default: 2)",
        )
        return
    group.add_argument(
        "--seq-length",
        action="append",
        metavar="T",
        help="tokens in a sample, repeatable or comma separated; every length is run with every "
        f"batch size (default: {PROFILE_SEQ_LENGTHS})",
    )
    group.add_argument(
        "--batch-size",
        action="append",
        metavar="B",
        help="samples in a micro-batch of a rank, repeatable or comma separated "
        f"(default: {PROFILE_BATCH_SIZES})",
    )


def _add_task(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--task",
        choices=TASKS,
        default=CLASSIFICATION,
        help=f"what is predicted (default: {CLASSIFICATION})",
    )
    group.add_argument(
        "--dropout",
        action="store_true",
        help="keep the model's dropout rates, with masks common to all modes "
        "(default: dropout is switched off)",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward (default: keep them)",
    )
    group.add_argument(
        "--padding", choices=PADDINGS, default="right", help="side of the padding (default: right)"
    )
    group.add_argument(
        "--ragged",
        action="store_true",
        help="synthetic samples of unequal lengths (default: all as long as --seq-length)",
    )
    group.add_argument(
        "--sampling",
        choices=SAMPLINGS,
        default=SEQUENTIAL,
        help="the next samples each step, or each sample independently (default: sequential)",
    )
    group.add_argument(
        "--dataset-size",
        type=int,
        metavar="N",
        help="synthetic samples that Poisson sampling draws from (default: none)",
    )
    group.add_argument(
        "--delta",
        type=float,
        default=1e-5,
        help="probability at which the recorded epsilon is stated (default: 1e-5)",
    )
    group.add_argument(
        "--noise-from",
        choices=NOISE_FROM,
        default="seed",
        help="where noise that is a mode's own, in noise, train and profile, comes from: seed, the "
        "same at every run, or os, the operating system's entropy (default: seed)",
    )


def _add_regime(parser: argparse.ArgumentParser, *, is_profile: bool) -> None:
    group = parser.add_argument_group("how it is trained")
    if is_profile:
        _add_timed(group)
    else:
        _add_judged(group)
    group.add_argument(
        "--sigma",
        type=float,
        default=0.01,
        help="noise multiplier: std of the noise in units of the clipping bound (default: 0.01)",
    )
    group.add_argument(
        "--max-grad-norm",
        type=float,
        default=10000.0,
        help="C, the bound on the L2 norm of a sample's gradient (default: 10000)",
    )
    group.add_argument(
        "--learning-rate", type=float, default=1e-5, help="optimizer's step size (default: 1e-5)"
    )
    group.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="sgd", help="update rule (default: sgd)"
    )


def _add_judged(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--accuracy-test",
        action="store_true",
        help="same data and noise in every mode: makes `single` run the accuracy regime, "
        "and quick and full that regime alone (default: off)",
    )
    group.add_argument(
        "--regime",
        action="append",
        metavar="NAME",
        help="regime of quick and full, repeatable: accuracy, clip, noise, probe-accuracy, "
        "probe-clip, probe-noise (default: accuracy and clip, and in quick those of the probe)",
    )
    group.add_argument(
        "--num-iter",
        type=int,
        help="recorded steps of the accuracy and train regimes (default: 5 in quick, else 10)",
    )
    group.add_argument(
        "--warmup-iter",
        type=int,
        help="steps thrown away before the recorded ones (default: 1 on cuda, 0 on cpu)",
    )


def _add_timed(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--accuracy-test",
        action="store_true",
        help="after its timed steps, each mode also runs the accuracy regime, at the first "
        "sequence length and batch size alone (default: off)",
    )
    group.add_argument(
        "--num-iter",
        type=int,
        help="recorded steps; loss and layer norms are observed in every second one (default: 10)",
    )
    group.add_argument(
        "--warmup-iter", type=int, help="steps taken before the recorded ones (default: 3)"
    )
    group.add_argument(
        "--rounds",
        type=int,
        default=1,
        metavar="N",
        help="times that every mode is timed at every shape, each in fresh processes: where a step "
        "is short, times differ from process to process (default: 1)",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where it runs")
    group.add_argument(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="ranks, one process each (default: one for each GPU, or 2 on cpu)",
    )
    group.add_argument(
        "--replicas",
        type=int,
        default=1,
        metavar="R",
        help="groups of ranks that each hold the whole model; the ranks of a group share it "
        "(default: 1)",
    )
    group.add_argument(
        "--device", choices=DEVICES, help="where the model runs (default: cuda if there is one)"
    )
    group.add_argument(
        "--param-dtype",
        choices=PARAM_DTYPES,
        default="float32",
        help="type the forward and backward compute in (default: float32)",
    )
    group.add_argument(
        "--plan",
        choices=PLANS,
        default=AUTO,
        help="how flash and fused modes find the norms of linear layers: per-sample gradients "
        "themselves (one backward only), the Gram form or the tiled form; auto chooses layer by "
        "layer (default: auto)",
    )
    group.add_argument(
        "--reference-dtype",
        choices=("float64", "float32"),
        default="float64",
        help="type the reference mode computes in (default: float64)",
    )


def _add_nodes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "on several machines", "Start the same command on each, with another --node-rank."
    )
    group.add_argument(
        "--nnodes",
        type=int,
        default=1,
        metavar="N",
        help="machines, one launcher each (default: 1)",
    )
    group.add_argument(
        "--node-rank",
        type=int,
        metavar="R",
        help="this machine among them; 0 leads, and keeps the group's runs (default: none, as one "
        "machine does without)",
    )
    group.add_argument(
        "--rdzv-endpoint",
        metavar="HOST:PORT",
        help="a free port of node 0, as the others reach it (default: none)",
    )
    group.add_argument(
        "--rdzv-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds to wait for the other machines before anything starts (default: 600)",
    )


def _add_tracking(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is kept")
    group.add_argument(
        "--group",
        metavar="NAME",
        help="name of the run group, not used before (default: SUITE-DATE-TIME)",
    )
    group.add_argument(
        "--layer-norms",
        default="all",
        metavar="WHICH",
        help="steps whose per-layer norms are recorded: all, ends (first and last), or an integer "
        "N: every Nth, the first and the last (default: all)",
    )
    group.add_argument(
        "--log-ranks",
        metavar="WHICH",
        help="ranks with an MLflow run of their own: all, 0 (rank 0 alone), or an integer N: so "
        "many, evenly spaced (default: log_ranks of the configuration)",
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON file for the results of `single`; in `profile`, CSV file with a row for each "
        "figure; in `faults`, Markdown file for the matrix (default: none)",
    )
    _add_offline(group)
    _add_spool(group)
    _add_store(group)


def _add_offline(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--offline",
        action="store_true",
        help="keep everything in the spool and look for no store; `launch.py sync` ships it later "
        "(default: ship as it comes)",
    )


def _add_spool(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--spool",
        type=Path,
        metavar="DIR",
        help="folder that records are kept in until the store has them "
        "(default: spool_dir of the configuration)",
    )


def _add_store(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="MLflow store or server (default: tracking_uri of the configuration)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="configuration file (default: mlflow.yaml where it exists)",
    )
