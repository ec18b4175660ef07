import io

from rich.console import Console

from dpsgd_track.config import RegimeConfig
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
