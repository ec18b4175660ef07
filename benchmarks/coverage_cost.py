#!/usr/bin/env python
"""Measure a private step beside a plain one, for the most used architectures at a real width.

    OMP_NUM_THREADS=1 python benchmarks/coverage_cost.py benchmarks/coverage_cost.csv

Models are those of `coverage_zoo.py` with random weights, two blocks and float32 on a CPU: 512
wide, 8 heads, 4096 tokens, 8 samples of 64 positions (images of 8 x 8 patches), no dropout, SGD. A
plain and a private model take steps in turn in one process; the first two steps of each are left
out, and the times are medians of the others. One CSV row for each architecture.
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import coverage_models as own  # noqa: E402
from benchmarks import coverage_zoo as zoo  # noqa: E402
from benchmarks.coverage_judge import PrivateRun, revision, steps_of, timed  # noqa: E402
from dpsgd_track.privacy.loss import IGNORED  # noqa: E402

B, T, WIDTH, INNER, NUM_HEADS, VOCAB, SIDE, PATCH = 8, 64, 512, 2048, 8, 4096, 128, 16
NUM_WARM_UP = 2
MODE = "flash_bk"


def text(size: int, generator: torch.Generator) -> zoo.Samples:
    """Ragged token ids [B, T], their mask, and the ids as targets."""
    ids = torch.randint(4, VOCAB, (size, T), generator=generator)
    mask = (torch.arange(T) < torch.randint(T - 8, T + 1, (size, 1), generator=generator)).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    return zoo.Samples(inputs, ids.masked_fill(mask == 0, IGNORED))


def classified_text(size: int, generator: torch.Generator) -> zoo.Samples:
    """The same with a class of each sample."""
    return zoo.Samples(text(size, generator).inputs, zoo.classes(size, generator))


def classified_ids(size: int, generator: torch.Generator) -> zoo.Samples:
    """Token ids in one argument, and a class."""
    ids = torch.randint(4, VOCAB, (size, T), generator=generator)
    return zoo.Samples((ids,), zoo.classes(size, generator))


def translated_text(size: int, generator: torch.Generator) -> zoo.Samples:
    """A source, and a target that is shifted into the decoder."""
    inputs, targets = text(size, generator).inputs, text(size, generator).targets
    assert isinstance(inputs, dict)
    decoded = F.pad(targets.clamp(min=0), (1, -1), value=1)
    return zoo.Samples(inputs | {"decoder_input_ids": decoded}, targets)


def pixels(size: int, generator: torch.Generator) -> Tensor:
    """[B, 3, side, side]."""
    return torch.randn(size, 3, SIDE, SIDE, generator=generator)


def images(size: int, generator: torch.Generator) -> zoo.Samples:
    """Pixels by name, and a class."""
    return zoo.Samples({"pixel_values": pixels(size, generator)}, zoo.classes(size, generator))


def plain_images(size: int, generator: torch.Generator) -> zoo.Samples:
    """Pixels in one argument, and a class."""
    return zoo.Samples((pixels(size, generator),), zoo.classes(size, generator))


def paired_images(size: int, generator: torch.Generator) -> zoo.Samples:
    """An image and a text a sample; the target says whether they fit."""
    inputs = text(size, generator).inputs
    assert isinstance(inputs, dict)
    fits = torch.randint(2, (size,), generator=generator).float()
    return zoo.Samples(inputs | {"pixel_values": pixels(size, generator)}, fits)


def sounds(size: int, generator: torch.Generator) -> zoo.Samples:
    """Waves that three convolutions turn into T frames, and a class."""
    waves = torch.randn(size, 20 * T + 20, generator=generator)
    return zoo.Samples({"input_values": waves}, zoo.classes(size, generator))


def transcribed_sounds(size: int, generator: torch.Generator) -> zoo.Samples:
    """A spectrogram and the tokens that were spoken."""
    targets = torch.randint(4, VOCAB, (size, T), generator=generator)
    inputs = {
        "input_features": torch.randn(size, 80, 2 * T, generator=generator),
        "decoder_input_ids": F.pad(targets, (1, -1), value=1),
    }
    return zoo.Samples(inputs, targets)


WIDE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_HEADS,
    "head_dim": WIDTH // NUM_HEADS,
    "max_position_embeddings": 2 * T,
}
BART = WIDE | zoo.BART | {"d_model": WIDTH}
BART |= {f"{part}_attention_heads": NUM_HEADS for part in ("encoder", "decoder")}
BART |= {f"{part}_ffn_dim": INNER for part in ("encoder", "decoder")}
T5 = WIDE | zoo.T5 | {"d_model": WIDTH, "d_kv": 64, "d_ff": INNER, "num_heads": NUM_HEADS}
T5 |= {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
MOE = WIDE | zoo.MOE | {"num_experts": 8, "num_local_experts": 8, "moe_intermediate_size": WIDTH}
MOE |= {"shared_expert_intermediate_size": WIDTH}
DEBERTA = WIDE | zoo.DEBERTA | {"position_buckets": 32}
XLNET = {"d_model": WIDTH, "n_head": NUM_HEADS, "d_inner": INNER, "max_position_embeddings": None}
TOWER = zoo.CLIP_TOWER | {"hidden_size": WIDTH, "intermediate_size": INNER}
TOWER |= {"num_attention_heads": NUM_HEADS, "image_size": SIDE, "patch_size": PATCH}
STAGES = zoo.STAGES | {"depths": [2, 2], "hidden_sizes": [WIDTH // 2, WIDTH], "patch_size": 4}
SWIN = zoo.SWIN | {"embed_dim": WIDTH // 4, "num_heads": [4, 8], "window_size": 8, "patch_size": 4}


def causal(name: str, **changes: Any) -> zoo.Architecture:
    """A decoder of transformers."""
    return zoo.causal(name, make_samples=text, **(WIDE | changes))


def masked(name: str, **changes: Any) -> zoo.Architecture:
    """An encoder of transformers."""
    return zoo.masked(name, make_samples=text, **(WIDE | changes))


def seq2seq(name: str, **changes: Any) -> zoo.Architecture:
    """An encoder and a decoder of transformers."""
    return zoo.seq2seq(name, make_samples=translated_text, **changes)


def vision(name: str, **changes: Any) -> zoo.Architecture:
    """A classifier of images of transformers."""
    settings = WIDE | {"image_size": SIDE, "patch_size": PATCH} | changes
    return zoo.vision(name, make_samples=images, **settings)


ARCHITECTURES: dict[str, zoo.Architecture] = {
    "bert": masked("Bert"),
    "roberta": masked("Roberta"),
    "distilbert": masked("DistilBert", dim=WIDTH, hidden_dim=INNER, n_layers=2, n_heads=NUM_HEADS),
    "albert": masked("Albert", embedding_size=128),
    "electra": masked("Electra", embedding_size=128),
    "mpnet": masked("MPNet"),
    "deberta": masked("Deberta", **DEBERTA),
    "deberta-v3": masked("DebertaV2", share_att_key=True, norm_rel_ebd="layer_norm", **DEBERTA),
    "xlm-roberta": masked("XLMRoberta"),
    "camembert": masked("Camembert"),
    "xlnet": zoo.classified(
        "XLNet",
        make_samples=classified_text,
        **(WIDE | zoo.XLNET | XLNET),
    ),
    "modernbert": masked("ModernBert", global_attn_every_n_layers=2, local_attention=T // 2),
    "gpt2": causal("GPT2"),
    "gpt-neo": causal(
        "GPTNeo",
        num_layers=2,
        num_heads=NUM_HEADS,
        attention_types=[[["global", "local"], 1]],
        window_size=T // 2,
    ),
    "gpt-neox": causal("GPTNeoX"),
    "gpt-j": causal("GPTJ", rotary_dim=64),
    "opt": causal("OPT", ffn_dim=INNER, word_embed_proj_dim=WIDTH),
    "bloom": causal("Bloom"),
    "falcon": causal("Falcon", **zoo.FALCON),
    "llama": causal("Llama"),
    "mistral": causal("Mistral", sliding_window=T // 2),
    "qwen2": causal("Qwen2", tie_word_embeddings=True),
    "qwen3": causal("Qwen3"),
    "gemma": causal("Gemma"),
    "gemma2": causal("Gemma2"),
    "phi": causal("Phi"),
    "phi3": causal("Phi3"),
    "mixtral": causal("Mixtral", **(MOE | {"intermediate_size": WIDTH})),
    "qwen2-moe": causal("Qwen2Moe", **MOE),
    "mamba": causal("Mamba", state_size=16),
    "t5": seq2seq("T5", **T5),
    "bart": seq2seq("Bart", **BART),
    "mbart": seq2seq("MBart", **BART),
    "pegasus": seq2seq("Pegasus", **BART),
    "vit": vision("ViT"),
    "deit": vision("DeiT", head="DeiTForImageClassification"),
    "swin": vision("Swin", **SWIN),
    "convnext": vision("ConvNext", **STAGES),
    "resnet-groupnorm": zoo.handmade_vision(
        lambda: own.ResNet(lambda width: nn.GroupNorm(32, width), widths=(64, 128)),
        make_samples=plain_images,
    ),
    "clip": zoo.Architecture(
        kind="vision",
        build=lambda: zoo.Pairs(zoo.clip(TOWER, vocab_size=VOCAB, num_positions=T)),
        make_samples=paired_images,
        loss=zoo.pair_loss,
    ),
    "wav2vec2": zoo.speech(
        "Wav2Vec2",
        make_samples=sounds,
        **(
            WIDE
            | {
                "conv_dim": (WIDTH,) * 3,
                "conv_kernel": (10, 3, 3),
                "conv_stride": (5, 2, 2),
                "num_feat_extract_layers": 3,
                "num_conv_pos_embeddings": 128,
                "num_conv_pos_embedding_groups": 16,
                "classifier_proj_size": 256,
            }
        ),
    ),
    "whisper": zoo.from_hub(
        "speech",
        "Whisper",
        "WhisperForConditionalGeneration",
        transcribed_sounds,
        "masked-lm",
        **(BART | {"num_mel_bins": 80, "max_source_positions": T, "max_target_positions": T}),
    ),
    "lstm": zoo.recurrent(
        lambda: own.Recurrent(
            "LSTM", batch_first=True, num_layers=2, vocab=VOCAB, width=WIDTH, hidden=WIDTH
        ),
        make_samples=classified_ids,
    ),
}
"""The architectures that are measured, by name."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Times of one architecture."""

    architecture: str
    num_parameters: int
    batch_size: int = B
    seq_length: int = T
    hidden_size: int = WIDTH
    mode: str = MODE
    plain_ms: float
    plain_p20: float
    plain_p80: float
    private_ms: float
    private_p20: float
    private_p80: float
    ratio: float
    """`private_ms` over `plain_ms`."""
    num_on_copies: int
    """Layers that ran on one copy of their parameters for each sample."""
    num_by_sample: int
    """Layers that ran sample by sample."""
    num_rounds: int
    device: str = field(default_factory=lambda: f"{platform.machine()}, 1 thread")
    torch: str = field(default_factory=lambda: version("torch"))
    transformers: str = field(default_factory=lambda: version("transformers"))
    commit: str = field(default_factory=revision)


def measure(name: str, num_rounds: int) -> Row:
    """Step a plain and a private model in turn."""
    architecture = ARCHITECTURES[name]
    samples = architecture.make_samples(B, torch.Generator().manual_seed(0))
    plain = architecture.make()
    run = PrivateRun(architecture.make(), MODE, architecture, 1.0, noise_multiplier=1.0)
    steps = steps_of(run, plain, samples, architecture)
    times: dict[Callable[[], None], list[float]] = {step: [] for step in steps}
    for _ in range(NUM_WARM_UP + num_rounds):
        for step, of_steps in times.items():
            of_steps.append(1000 * timed(step))
    plain_times, private_times = (of_steps[NUM_WARM_UP:] for of_steps in times.values())
    on_copies, by_sample = run.slow_layers()
    return Row(
        architecture=name,
        num_parameters=sum(p.numel() for p in plain.parameters()),
        **_quantiles("plain", plain_times),
        **_quantiles("private", private_times),
        ratio=statistics.median(private_times) / statistics.median(plain_times),
        num_on_copies=on_copies,
        num_by_sample=by_sample,
        num_rounds=num_rounds,
    )


def _quantiles(name: str, times_ms: list[float]) -> dict[str, Any]:
    p20, *_, p80 = statistics.quantiles(times_ms, n=5)
    return {f"{name}_ms": statistics.median(times_ms), f"{name}_p20": p20, f"{name}_p80": p80}


def main() -> None:
    """Measure, and write a row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--only", action="append", choices=ARCHITECTURES, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for name in args.only or ARCHITECTURES:
            row = measure(name, args.rounds)
            cells = asdict(row).items()
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in cells})
            file.flush()
            print(f"{name}: {row.ratio:.2f}", flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
