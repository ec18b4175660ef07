"""Parses command lines as the program does, and makes their plans and placements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dpsgd_track.cli.options import parser_of
from dpsgd_track.cli.verbs import VERBS
from dpsgd_track.launcher.placement import Placement
from dpsgd_track.launcher.suites import Asked, InputCheck, placement_of, plan_of
from dpsgd_track.record.plan import GroupPlan, Suite


def parsed(verb: str, *argv: str) -> dict[str, Any]:
    """Arguments of the verb's function, those by default included."""
    parser = parser_of(VERBS[verb].run)
    _, bound, _ = parser.parse_args(list(argv), exit_on_error=False, print_error=False)
    bound.apply_defaults()
    return dict(bound.arguments)


def asked(verb: str, *argv: str) -> Asked:
    """The parsed options of a command line of quick, full, single or profile."""
    return replace(parsed(verb, *argv)["options"], suite=Suite(verb))


def plan(*argv: str, check_inputs: InputCheck = lambda model, data: None) -> GroupPlan:
    """The plan of a command line; model and data are taken as they are."""
    return plan_of(asked(*argv), check_inputs, f"python launch.py {' '.join(argv)}")


def place(*argv: str) -> Placement:
    """Where the group of a command line runs and is kept."""
    return placement_of(asked(*argv))
