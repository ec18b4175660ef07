"""`profile`, after its runs: prints the table and writes the figures."""

from __future__ import annotations

from dpsgd_track.cli.context import Context, reading, say
from dpsgd_track.launcher import EXIT_FAILED, EXIT_FINISHED, EXIT_USAGE
from dpsgd_track.launcher.choices import ProfileChoices
from dpsgd_track.launcher.placement import Placement


def summarise(context: Context, place: Placement, group: str, what: ProfileChoices) -> int:
    """Print the table of the profile `group`, and write its figures as CSV if asked to.

    Returns:
        1 where a mode costs more than the limits of `what`, or cannot be held against them; else 0.
    """
    from rich.console import Console

    from dpsgd_track.comparison.profile import over_limits, profile_of
    from dpsgd_track.report.profile_table import profile_csv
    from dpsgd_track.report.text import console_width, print_profile, print_sentence
    from dpsgd_track.store.find_group import read_group_anywhere

    try:
        with reading(place.settings):
            recorded = read_group_anywhere(place.settings, group, say).group
    except ValueError as error:
        # The runs are over; `compare` can read them once the store answers again.
        context.complain(f"group {group} could not be read back. {error}", EXIT_USAGE)
        return EXIT_FAILED if what.limits() else EXIT_FINISHED
    profile = profile_of(recorded)
    assert profile is not None, "a profile has timed runs"
    console = Console(highlight=False, width=console_width())
    if context.is_quiet:
        print_sentence(profile.sentence, console)
    else:
        print_profile(profile, group, console)
    if place.output is not None:
        try:
            place.output.write_text(profile_csv(profile, recorded), encoding="utf-8")
        except OSError as error:
            message = f"output={str(place.output)!r}: cannot be written. {error}"
            context.complain(message, EXIT_USAGE)
        else:
            context.say(f"figures: {place.output}")
    exceeded = over_limits(profile, what.max_slowdown, what.max_memory)
    for sentence in exceeded:
        say(f"over the limit: {sentence}.")
    return EXIT_FAILED if exceeded else EXIT_FINISHED
