"""No input makes a parser raise anything but a sentence, hang, or take much memory."""

from __future__ import annotations

import io
import random
import resource
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpsgd_track.cli.main import main
from dpsgd_track.comparison.waivers import load_waivers
from dpsgd_track.config import load_settings
from dpsgd_track.record.trajectory import Trajectory
from dpsgd_track.store.contents import Contents
from dpsgd_track.store.golden import read_golden, write_golden
from dpsgd_track.store.reader import GroupNotFound
from dpsgd_track.store.spool import SpoolDamaged, spool_files
from dpsgd_track.store.spooled import SpooledGroup
from dpsgd_track.training.text_source import read_text
from tests.support.spooled_group import spool_a_group
from tests.support.synthetic_group import group_of, healthy_runs, trajectory

REFUSED = (ValueError, GroupNotFound, SpoolDamaged)
MOST_S = 2.0
MOST_GROWTH_KIB = 512 << 10
TOKENS = (
    *(b"[" * 3000, b"{" * 500, b"- " * 500, b"\xff\xfe", b"\0", b"\n", b"\r", b'"', b"'", b","),
    *(b"1" * 5000, b"1e999", b"-1", b"nan", b"true", b"null", b"&a", b"*a", b"<<: *a", b"!!python"),
    *(
        b"../../x",
        b"/etc/passwd",
        b"\\ud800",
        "é\u202e".encode(),
        b"::error::",
        b"%00",
        b"2026-02-30",
    ),
)


@dataclass(frozen=True)
class Target:
    """A parser and files that it reads."""

    name: str
    seeds: tuple[bytes, ...]
    parse: Callable[[Path], object]
    is_archive: bool = False


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few changes of bits, cuts, repetitions and tokens."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(content) + 1)
        end = min(len(content), place + rng.choice((1, 4, 30, 300)))
        match rng.randrange(5):
            case 0 if place < len(content):
                turned = bytes((content[place] ^ 1 << rng.randrange(8),))
                content = content[:place] + turned + content[place + 1 :]
            case 1:
                content = content[:place]
            case 2:
                content = content[:place] + content[end:]
            case 3:
                content = content[:place] + content[place:end] * rng.choice((2, 50)) + content[end:]
            case _:
                content = content[:place] + rng.choice(TOKENS) + content[end:]
    return content


def repacked(content: bytes, rng: random.Random) -> bytes:
    """An archive with one member mutated, so that its checksums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(buffer, "w") as made:
        names = archive.namelist()
        chosen = rng.choice(names)
        for name in names:
            data = archive.read(name)
            if name == chosen:
                inner = name.endswith(".zip") and rng.random() < 0.8
                data = repacked(data, rng) if inner else mutated(data, rng)
            made.writestr(name, data)
    return buffer.getvalue()


def check(target: Target, path: Path, seed: int) -> float:
    """Parse one input; returns the CPU time that it took, in seconds."""
    rng = random.Random(f"{target.name}{seed}")
    content = rng.choice(target.seeds)
    is_whole = target.is_archive and rng.random() < 0.7
    path.write_bytes(repacked(content, rng) if is_whole else mutated(content, rng))
    start = time.process_time()
    try:
        target.parse(path)
    except REFUSED:
        pass
    except Exception as error:
        raise AssertionError(f"{target.name}, seed {seed}") from error
    took_s = time.process_time() - start
    assert took_s < MOST_S, f"{target.name}, seed {seed}"
    return took_s


WAIVER = b"- {mode: flash_fsdp, observable: loss, reason: x, expires: 2026-12-31, up_to: 0.1}\n"
SETTINGS = b"tracking_uri: sqlite:///x.db\nthresholds:\n  loss: 1e-4\nlog_ranks: 2\n"
JSONL = b'{"text": "a b", "label": 1}\n{"text": "c", "label": 2}\n'
CSV = b'text,label\n"a, b",x\nc,y\n'
ARGUMENTS = (
    *("quick", "compare", "sync", "--mode", "no_dp,flash_fsdp", "--sigma", "--num-iter", "3"),
    *("--config", "--data", "--waivers", "--help", "--group", "g", "--offline", "=", "", "-", "--"),
    *("--regime", "clip", "--variant", "a=/x", "--nproc-per-node", "-1", "1e400", "\x1b[2J"),
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    folder = tmp_path_factory.mktemp("seeds")
    write_golden(group_of(healthy_runs()[:2]), folder / "g.dpsgd")
    trajectory().save(folder / "t.npz")
    spool_a_group(folder, "g", steps=3)
    spooled = [file.read_bytes() for file in spool_files(folder / "g")]

    def spool(path: Path) -> None:
        Contents(SpooledGroup(path.parent)).damage()

    return [
        Target("g.dpsgd", ((folder / "g.dpsgd").read_bytes(),), read_golden, is_archive=True),
        Target("t.npz", ((folder / "t.npz").read_bytes(),), Trajectory.load, is_archive=True),
        Target("000001-a.records", tuple(spooled), spool),
        Target("000001-a.control", tuple(spooled), spool),
        Target("s.yaml", (SETTINGS, WAIVER), load_settings),
        Target("w.yaml", (WAIVER, SETTINGS), load_waivers),
        Target("d.jsonl", (JSONL,), lambda path: read_text(str(path))),
        Target("d.csv", (CSV,), lambda path: read_text(str(path))),
    ]


def check_all(targets: list[Target], folder: Path, seeds: range) -> dict[str, list[float]]:
    """CPU times in seconds of every input, by target."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took_s = {}
    for number, target in enumerate(targets):
        own = folder / str(number)
        own.mkdir()
        took_s[target.name] = [check(target, own / target.name, seed) for seed in seeds]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH_KIB
    return took_s


def check_arguments(seeds: range, capsys: pytest.CaptureFixture[str]) -> list[float]:
    """Dry runs, which start nothing; CPU times in seconds."""
    took_s = []
    # The first error imports what all verbs need.
    main(["quick", "--no-such-option"])
    capsys.readouterr()
    for seed in seeds:
        rng = random.Random(seed)
        argv = ["quick", "--dry-run", *rng.choices(ARGUMENTS, k=rng.randrange(6))]
        start = time.process_time()
        code = main(argv, check_inputs=lambda model, data: None)
        said = capsys.readouterr()
        assert code in (0, 2), argv
        assert "Traceback" not in said.err, argv
        assert code == 0 or said.err.count("\n") == 1, argv
        took_s.append(time.process_time() - start)
        assert took_s[-1] < MOST_S, argv
    return took_s


def test_a_few_hundred_inputs(targets, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    check_all(targets, tmp_path, range(30))
    check_arguments(range(5), capsys)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_thousand_inputs(targets, tmp_path, monkeypatch, capsys, part) -> None:
    monkeypatch.chdir(tmp_path)
    first = 1000 + part * 1200
    took_s = check_all(targets, tmp_path, range(first, first + 1200))
    took_s["arguments"] = check_arguments(range(first, first + 500), capsys)
    for name, times_s in took_s.items():
        print(
            f"{name}: {len(times_s)} inputs in {sum(times_s):.1f} s, at most {max(times_s):.3f} s"
        )
