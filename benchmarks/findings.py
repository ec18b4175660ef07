#!/usr/bin/env python
"""Reproduce the defects that dpsgd-track finds in public code, and write docs/findings.md.

    python benchmarks/findings.py docs/findings.md --library fork=../opacus-fork \
        --library fastDP=../fast-differential-privacy --library FlashDP=../FlashDP4Review \
        --library private-transformers=../private-transformers:../ml-swissknife

Each defect has a command, and words that the command has to say of it. Defects of libraries that
are not given are left out; those of the installed Opacus are always in. Exits with 1 where a
command does not say its words: then the defect is mended, or the tool no longer finds it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = ROOT / "examples" / "adapters"
OPACUS, FORK, FAST, FLASH = "Opacus", "fork", "fastDP", "FlashDP"
PRIVATE = "private-transformers"
HOMES = {
    OPACUS: "https://github.com/pytorch/opacus",
    FORK: "https://github.com/JackyXiao98/opacus",
    FAST: "https://github.com/awslabs/fast-differential-privacy",
    FLASH: "https://github.com/liangyuwang/FlashDP4Review",
    PRIVATE: "https://github.com/lxuechen/private-transformers",
}
_SMALL = "--seq-length 16 --num-iter 2"
_OF_FORK = f"full {_SMALL} --variant fork=PATH --mode " + ",".join(
    f"opacus:flash{kind}" for kind in ("", "_bk", "_fuse", "_fsdp", "_fsdp_fuse", "_fsdp_fuse_bk")
)
_USED = "opacus_as_used"
_MISUSED = f"full {_SMALL} --mode " + ",".join(
    f"{_USED}:{name}" for name in ("LossInsideTheModel", "TwoBackwards", "SummedLoss")
)
_FAST = "fastdp_mode:FastDP"
_PT, _FL = "private_transformers_mode:Ghost", "flashdp_mode:FlashDP"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One defect of one library, or an engine that is right."""

    library: str
    what: str
    """The defect, or what is right."""
    command: str
    """Arguments of dpsgd-track; PATH stands for the library's folder. A launch is compared."""
    said: str
    """Regular expression that matches the line which the command says of it."""
    is_healthy: bool = False


def _of_fork(what: str, said: str) -> Finding:
    return Finding(library=FORK, what=what, command=_OF_FORK, said=said)


def _launched(what: str, options: str, said: str) -> Finding:
    return Finding(library=OPACUS, what=what, command=f"full {_SMALL} {options}", said=said)


def _checked(library: str, what: str, module: str, shape: str, mode: str, said: str) -> Finding:
    command = f"check {shlex.quote(module)} --input {shape} --mode {mode}"
    return Finding(library=library, what=what, command=command, said=said)


FINDINGS = (
    _checked(
        OPACUS,
        "norms count the row of `padding_idx`, which has no gradient",
        "torch.nn:Embedding(9, 4, padding_idx=2)",
        "4,6:9",
        "ghost",
        r"ghost .*wrong .*norms of weight off",
    ),
    _checked(
        OPACUS,
        "and in sums: the padding row is trained",
        "torch.nn:Embedding(9, 4, padding_idx=2)",
        "4,6:9",
        "grad_materialize",
        r"grad_materialize .*wrong .*clipped sum of weight off",
    ),
    _checked(
        OPACUS,
        "ghost norms of convolutions pad with zeros, whatever `padding_mode` says",
        "torch.nn:Conv1d(6, 4, 3, padding=1, padding_mode='circular')",
        "4,6,7",
        "ghost",
        r"ghost .*wrong .*norms of weight off",
    ),
    _checked(
        OPACUS,
        "a LayerNorm without a bias crashes",
        "torch.nn:LayerNorm(6, bias=False)",
        "4,5,6",
        "ghost,grad_materialize",
        r"grad_materialize .*failed .*requires_grad",
    ),
    _checked(
        OPACUS,
        "ghost clipping crashes on linear layers of four-dimensional inputs",
        "torch.nn:Linear(6, 4)",
        "4,2,5,6",
        "ghost",
        r"ghost .*failed .*_norm_sample",
    ),
    _checked(
        OPACUS,
        "an EmbeddingBag on rows of indices crashes",
        "torch.nn:EmbeddingBag(9, 4)",
        "4,6:9",
        "grad_materialize",
        r"failed .*not enough values",
    ),
    _checked(
        OPACUS,
        "a layer of two inputs crashes",
        "torch.nn:Bilinear(6, 6, 4)",
        "4,5,6 --input 4,5,6",
        "grad_materialize",
        r"failed .*input2",
    ),
    _checked(
        OPACUS,
        "a recurrent cell is taken, and crashes",
        "torch.nn:LSTMCell(6, 4)",
        "4,6",
        "grad_materialize",
        r"failed .*broadcast shape",
    ),
    Finding(
        library=OPACUS,
        what="under FSDP `model(labels=...).loss.backward()` clips nothing, silently",
        command=_MISUSED,
        said=rf"{_USED}:LossInsideTheModel breaks the privacy bound",
    ),
    Finding(
        library=OPACUS,
        what="of two backwards before a step the first is lost, silently",
        command=_MISUSED,
        said=rf"{_USED}:TwoBackwards .*the last micro-batch stands for all",
    ),
    Finding(
        library=OPACUS,
        what='with `loss_reduction="sum"` under FSDP the noise is W times what was asked for',
        command=_MISUSED,
        said=rf"{_USED}:SummedLoss adds wrong noise: .*multiplied by 2 or W",
    ),
    _launched(
        "a causal model's loss without `shape=`, at one sample a rank, takes tokens for samples",
        f"--task causal-lm --batch-size 1 --mode {_USED}:TokensAsSamples",
        rf"{_USED}:TokensAsSamples breaks the privacy bound.*multiplied by T-1",
    ),
    _launched(
        "with one FSDP2 unit for the whole model, tied weights are counted in one use alone",
        "--model-name gpt2-tiny --task causal-lm --regime clip --mode " + f"{_USED}:RootOnly",
        rf"{_USED}:RootOnly .*of its last use alone",
    ),
    _launched(
        "gradient checkpointing is taken for tied parameters",
        "--regime clip --gradient-checkpointing --mode ghost_fsdp",
        r"ghost_fsdp.*Parameter tying is not supported",
    ),
    _launched(
        "a parameter with fewer rows than ranks crashes",
        "--regime clip --task regression --mode ghost_fsdp",
        r"ghost_fsdp.*placement changes are not supported",
    ),
    _launched(
        "in bfloat16 norms and clip factors are rounded to bfloat16",
        "--regime clip --param-dtype bfloat16 --mode ghost_fsdp",
        r"ghost_fsdp computes wrong per-sample norms.*wrong clip factors",
    ),
    _of_fork(
        "sample norms are added up over ranks",
        r"opacus:flash_fsdp@fork .*squares of different samples are added up over ranks",
    ),
    _of_fork(
        "fused linear norms lack B^2, beside that sum",
        r"opacus:flash_fsdp_fuse@fork .*norms of linear layers alone are divided by.*; and squares",
    ),
    _of_fork(
        "bookkeeping gradients are never reduced over ranks",
        r"opacus:flash_fsdp_fuse_bk@fork .*not reduced over the W ranks is taken for their mean",
    ),
    _of_fork(
        "RMSNorm's gradients are zero in bookkeeping",
        r"opacus:flash_bk@fork .*zero, left out altogether.*layernorm",
    ),
    _of_fork(
        "`flash_fuse` replaces layers under the optimizer, whose gradients grow without bound",
        r"opacus:flash_fuse@fork breaks the privacy bound",
    ),
    _of_fork(
        "on one device noise is drawn inline, deaf to `noise_generator` and `secure_mode`",
        r"opacus:flash@fork.*draws its noise with torch.randn_like",
    ),
    Finding(
        library=FAST,
        what="RMSNorm is left out of norms and sums, silently",
        command=f"full {_SMALL} --mode {_FAST}",
        said=rf"BUG: {_FAST} computes wrong per-sample norms: they are zero, left out.*norm.weight",
    ),
    _checked(
        FAST,
        "its sampler of T5's norm crashes",
        "transformers.models.t5.modeling_t5:T5LayerNorm(6)",
        "4,5,6",
        _FAST,
        r"failed .*summed clipped",
    ),
    _checked(
        FAST,
        "convolutions are padded with zeros, whatever `padding_mode` says",
        "torch.nn:Conv1d(6, 4, 3, padding=1, padding_mode='circular')",
        "4,6,7",
        _FAST,
        r"wrong .*clipped sum of weight off",
    ),
    _checked(
        FAST,
        "a convolution with `padding='same'` crashes",
        "torch.nn:Conv1d(6, 4, 3, padding='same')",
        "4,6,7",
        _FAST,
        r"failed .*im2col",
    ),
    _checked(
        PRIVATE,
        "norms of a convolution in groups are wrong",
        "torch.nn:Conv2d(4, 4, 3, groups=2)",
        "4,4,6,7",
        _PT,
        r"wrong .*norms of weight off",
    ),
    _checked(
        PRIVATE,
        "convolutions are padded with zeros, whatever `padding_mode` says",
        "torch.nn:Conv2d(2, 4, 3, padding=1, padding_mode='reflect')",
        "4,2,6,7",
        _PT,
        r"wrong .*norms of weight off",
    ),
    _checked(
        PRIVATE,
        "a LayerNorm without a bias crashes",
        "torch.nn:LayerNorm(6, bias=False)",
        "4,5,6",
        _PT,
        r"failed .*NoneType",
    ),
    Finding(
        library=FLASH,
        what="each layer is clipped at the full C, and others not at all",
        command=f"full {_SMALL} --mode {_FL}",
        said=rf"BUG: {_FL} breaks the privacy bound",
    ),
    _checked(
        FLASH,
        "a bias has a mean over positions, where a weight has a sum",
        "torch.nn:Linear(6, 4)",
        "4,5,6",
        _FL,
        r"wrong .*clipped sum of bias off by 0.8",
    ),
    _checked(
        FLASH,
        "embeddings are trained, and not clipped: the wrapper leaves them as they are",
        "torch.nn:Embedding(9, 4)",
        "4,6:9",
        _FL,
        r"wrong .*clipped sum of weight off .*all clipped",
    ),
    Finding(
        library=PRIVATE,
        what="GPT-2, by ghost norms and by explicit gradients",
        command=f"full {_SMALL} --model-name gpt2-tiny --mode {_PT},"
        "private_transformers_mode:Default",
        said=r"PASS: all 3 modes agree",
        is_healthy=True,
    ),
    Finding(
        library=FAST,
        what="GPT-2",
        is_healthy=True,
        said=r"PASS: all 2 modes agree",
        command=f"full {_SMALL} --model-name gpt2-tiny --mode {_FAST}",
    ),
    Finding(
        library=OPACUS,
        what="a tiny Llama, by ghost norms, explicit gradients and under FSDP",
        command=f"full {_SMALL} --mode ghost,grad_materialize,ghost_fsdp",
        is_healthy=True,
        said=r"PASS: all 4 modes agree",
    ),
    Finding(
        library=FORK,
        what="flash norms on one device, but for the noise",
        command=_OF_FORK,
        is_healthy=True,
        said=r"PASS .*opacus:flash@fork: agrees",
    ),
)


@dataclass(frozen=True)
class Reproduced:
    """A finding, and the line that its command said of it; empty if it said none."""

    finding: Finding
    line: str


def main() -> int:
    """Reproduce; 1 where a command does not say its words."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--library", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--only", choices=("check", "full"), help="verb of the commands to run")
    args = parser.parse_args()
    given = dict(text.split("=", 1) for text in args.library)
    if unknown := given.keys() - HOMES.keys():
        parser.error(f"--library: expected one of {', '.join(HOMES)}, got {', '.join(unknown)}")
    paths = {
        name: os.pathsep.join(map(_absolute, p.split(os.pathsep))) for name, p in given.items()
    }
    wanted = [
        each
        for each in FINDINGS
        if each.library in {OPACUS, *paths} and args.only in (None, each.command.split()[0])
    ]
    said: dict[tuple[str, str], str] = {}
    results = []
    for each in wanted:
        key = each.library, each.command
        if key not in said:
            print(f"{each.library}: dpsgd-track {each.command}", flush=True)
            said[key] = _run(each, paths.get(each.library, ""))
        lines = [line for line in said[key].splitlines() if re.search(each.said, line)]
        results.append(Reproduced(each, lines[0].strip() if lines else ""))
        if not lines:
            print(f"NOT FOUND {each.library}: {each.what}\n{said[key][-3000:]}", flush=True)
        # A run that is cut short leaves what it has.
        args.page.write_text(page(results, paths), encoding="utf-8")
    return int(not all(each.line for each in results))


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _run(finding: Finding, path: str) -> str:
    """Output of the command, and of the comparison after a launch."""
    words = shlex.split(finding.command.replace("PATH", path))
    is_variant = "--variant" in words
    search = [str(ROOT), str(ADAPTERS), *([] if is_variant or not path else [path])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search), "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:

        def call(*argv: str) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "dpsgd_track", *argv],
                cwd=folder, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            return done.stdout + done.stderr

        told = call(*words)
        if words[0] == "check":
            return told
        return told + call("compare", "latest", "--no-png", "--no-log")


def _version(library: str, path: str) -> str:
    if library == OPACUS:
        return version("opacus")
    git = ["git", "-C", path.split(os.pathsep)[0], "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "a checkout"


def page(results: Iterable[Reproduced], paths: Mapping[str, str]) -> str:
    """The page of the findings that were reproduced."""
    told = [each for each in results if each.line]
    defects = [each for each in told if not each.finding.is_healthy]
    libraries = list(dict.fromkeys(each.finding.library for each in told))
    parts = [
        "# Findings in public code\n",
        "This page lists defects that dpsgd-track shows in public code, each with the command that "
        "shows it. `benchmarks/findings.py` makes it: it runs every command, and fails where the "
        "message is another. Modes of other libraries are in "
        "[examples/adapters](../examples/adapters/README.md).\n",
        f"{len(defects)} defects of {len({d.finding.library for d in defects})} libraries.\n",
    ]
    for library in libraries:
        own = [each for each in told if each.finding.library == library]
        tag = _version(library, paths.get(library, ""))
        parts.append(f"## [{library}]({HOMES[library]}) {tag}\n")
        parts.append("| | finding | message | command |\n|---|---|---|---|")
        parts += [_row(each) for each in own]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _row(each: Reproduced) -> str:
    line = " ".join(each.line.replace("|", " ").split())
    short = line if len(line) <= 200 else f"{line[:197]}..."
    mark = "healthy" if each.finding.is_healthy else "defect"
    cells = mark, each.finding.what, short, f"`dpsgd-track {each.finding.command}`"
    return f"| {' | '.join(cell.replace('|', ' ') for cell in cells)} |"


if __name__ == "__main__":
    sys.exit(main())
