import io
import re
from itertools import count
from types import SimpleNamespace

from rich.console import Console

from dpsgd_track.config import RegimeConfig
from dpsgd_track.launcher import progress
from dpsgd_track.launcher.progress import LiveDisplay, PlainDisplay, open_display

REGIMES = (RegimeConfig(name="accuracy", num_iter=2), RegimeConfig(name="clip", num_iter=3))


def follow(display) -> None:
    display.start_mode("flash_fsdp", REGIMES)
    for index, regime in enumerate(REGIMES):
        event = {"regime": index, "num_iter": regime.num_iter}
        display.event({**event, "event": "start", "step": 0, "loss": None})
        for step in range(regime.num_iter):
            display.event({**event, "event": "step", "step": step, "loss": 0.5 - step / 8})
        epsilon = 5449.455 if regime.name == "accuracy" else None
        display.event({**event, "event": "end", "step": step, "loss": None, "epsilon": epsilon})
    display.end_mode("FAILED", "out of memory [at] step 1")
    display.close()


def test_a_terminal_gets_a_live_table():
    stream = io.StringIO()
    follow(LiveDisplay(Console(file=stream, force_terminal=True, width=120)))
    shown = stream.getvalue()
    assert "\x1b[" in shown
    assert "5/5" in shown
    assert "loss 0.2500" in shown
    assert "flash_fsdp: FAILED: out of memory [at] step 1" in shown


def test_eighty_columns_have_room_for_the_count_and_the_time_left():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    display = LiveDisplay(console)
    display.start_group(15)
    follow(display)
    last = stream.getvalue().rpartition("all modes")[2].splitlines()
    assert re.search(r"5/15 +(-:--:--|\d:\d\d:\d\d)", last[0])
    assert re.search(r"^flash_fsdp +FAILED .* 5/5 +\d:\d\d:\d\d", last[1])


def test_a_log_says_how_long_it_may_take(monkeypatch):
    now = count(0, 100)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    stream = io.StringIO()
    display = PlainDisplay(stream)
    display.start_group(20)
    for mode in ("a", "b", "c", "d"):
        display.start_mode(mode, REGIMES)
        display.end_mode("FINISHED")
    ends = [line for line in stream.getvalue().splitlines() if "FINISHED" in line]
    # 5 of 20 steps in 300 s leave 15, 10 of them in 600 s leave 10; the last mode leaves none.
    assert ends[0] == "a: FINISHED after 100.0 s, about 15 min left"
    assert ends[1] == "b: FINISHED after 100.0 s, about 10 min left"
    assert ends[3] == "d: FINISHED after 100.0 s"


def test_who_wants_quiet_gets_the_outcome_alone():
    stream = io.StringIO()
    display = open_display(stream, is_quiet=True)
    display.start_group(5)
    follow(display)
    display.conclude("group g: 0 of 1 modes finished")
    assert stream.getvalue() == "group g: 0 of 1 modes finished\n"


def test_a_file_gets_one_line_for_each_thing_that_matters():
    stream = io.StringIO()
    display = open_display(stream)
    assert isinstance(display, PlainDisplay)
    follow(display)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == "flash_fsdp: started (accuracy, clip)"
    assert lines[1].startswith("flash_fsdp: accuracy, 2 steps in ")
    assert lines[1].endswith("loss 0.3750, epsilon 5.45e+03")
    assert lines[2].endswith("loss 0.2500")
    assert lines[3].endswith("out of memory [at] step 1")
