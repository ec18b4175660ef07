"""Architectures that `coverage.py` judges: how each is built, fed and trained by those who use it.

Weights are random and moved off their special starting values, as zero biases and unit norms hide
errors. Text is ragged and repeats tokens. Nobody passes position ids.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from benchmarks import coverage_models as own
from benchmarks.coverage_models import (
    NUM_CLASSES,
    NUM_HEADS,
    NUM_PATCHES,
    NUM_POSITIONS,
    PATCH,
    SIDE,
    VOCAB,
    WIDTH,
)
from dpsgd_track.privacy.loss import IGNORED, LOSSES, PerSampleLoss

hf.logging.set_verbosity_error()

T = NUM_POSITIONS
ONE_MODE = ("flash_bk",)
EVERY_MODE = ("flash_bk", "flash_fuse_bk", "flash")
DROPOUT = 0.1


@dataclass(frozen=True)
class Samples:
    """A batch; dimension 0 of every tensor is the sample."""

    inputs: dict[str, Tensor] | tuple[Tensor, ...]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: list[int]) -> Samples:
        """Some of the samples."""
        return self._each(lambda t: t[indices])

    def to(self, dtype: torch.dtype) -> Samples:
        """The same with floating tensors in `dtype`."""
        return self._each(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def run(self, model: nn.Module) -> Tensor:
        """Logits."""
        output: Any = model(**self.inputs) if isinstance(self.inputs, dict) else model(*self.inputs)
        return output if isinstance(output, Tensor) else output.logits

    def _each(self, change: Callable[[Tensor], Tensor]) -> Samples:
        inputs = self.inputs
        if isinstance(inputs, dict):
            return Samples({k: change(t) for k, t in inputs.items()}, change(self.targets))
        return Samples(tuple(map(change, inputs)), change(self.targets))


MakeSamples = Callable[[int, torch.Generator], Samples]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A tiny model with random weights, and what it is trained on."""

    kind: str
    build: Callable[[], nn.Module]
    make_samples: MakeSamples
    loss: PerSampleLoss
    sizes: Mapping[str, int] = field(default_factory=lambda: {"T": T})
    """Lengths that a batch size may happen to be equal to; T comes first."""
    modes: tuple[str, ...] = ONE_MODE
    trains: bool = True
    """True in train mode; False keeps the statistics of BatchNorm."""
    drops: bool = False
    """True if its dropout draws, so that there is no second forward to judge by."""
    needs: str = ""
    """Package beside the project's own."""

    def make(self) -> nn.Module:
        """The model, the same at every call."""
        torch.manual_seed(0)
        model = self.build().train(self.trains)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        return model


# What models are fed with.


def tokens(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ragged token ids [B, T], 0 at padding, and their mask; each row repeats a token."""
    ids = torch.randint(4, VOCAB, (size, T), generator=generator)
    # A query whose loss counts needs two keys that differ, or its gradient is 0.
    lengths = torch.randint(T - 2, T + 1, (size, 1), generator=generator)
    mask = (torch.arange(T) < lengths).long()
    ids[:, 1:3] = torch.stack([ids[:, 0] % (VOCAB - 5) + 4, ids[:, 0]], dim=1)
    return ids * mask, mask


def causal_text(size: int, generator: torch.Generator) -> Samples:
    """Tokens that are their own targets."""
    ids, mask = tokens(size, generator)
    return Samples({"input_ids": ids, "attention_mask": mask}, ids.masked_fill(mask == 0, IGNORED))


def whole_text(size: int, generator: torch.Generator) -> Samples:
    """The same without padding, in one argument, as models written by hand are called."""
    ids = torch.randint(4, VOCAB, (size, T), generator=generator)
    return Samples((ids,), ids)


def masked_text(size: int, generator: torch.Generator) -> Samples:
    """Tokens of which some are hidden and predicted."""
    ids, mask = tokens(size, generator)
    is_hidden = (torch.rand(ids.shape, generator=generator) < 0.4) & (mask == 1)
    is_hidden[:, 0] = True
    targets = ids.masked_fill(~is_hidden, IGNORED)
    inputs = {"input_ids": ids.masked_fill(is_hidden, VOCAB - 1), "attention_mask": mask}
    return Samples(inputs, targets)


def classified_text(size: int, generator: torch.Generator) -> Samples:
    """Tokens, mask and a class."""
    ids, mask = tokens(size, generator)
    return Samples({"input_ids": ids, "attention_mask": mask}, classes(size, generator))


def classified_ids(size: int, generator: torch.Generator) -> Samples:
    """Padded tokens in one argument, and a class."""
    ids, _ = tokens(size, generator)
    return Samples((ids,), classes(size, generator))


def translated_text(size: int, generator: torch.Generator) -> Samples:
    """A source with padding, and a target that is shifted into the decoder."""
    ids, mask = tokens(size, generator)
    targets, target_mask = tokens(size, generator)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": F.pad(targets, (1, -1), value=1),
    }
    return Samples(inputs, targets.masked_fill(target_mask == 0, IGNORED))


def images(size: int, generator: torch.Generator) -> Samples:
    """Pixels by name, and a class."""
    pixels = torch.randn(size, 3, SIDE, SIDE, generator=generator)
    return Samples({"pixel_values": pixels}, classes(size, generator))


def plain_images(size: int, generator: torch.Generator) -> Samples:
    """Pixels in one argument, and a class."""
    pixels = torch.randn(size, 3, SIDE, SIDE, generator=generator)
    return Samples((pixels,), classes(size, generator))


def segmented_images(size: int, generator: torch.Generator) -> Samples:
    """Pixels in one argument, and a class for each."""
    pixels = torch.randn(size, 3, SIDE, SIDE, generator=generator)
    targets = torch.randint(NUM_CLASSES, (size, SIDE**2), generator=generator)
    return Samples((pixels,), targets)


def paired_images(size: int, generator: torch.Generator) -> Samples:
    """An image and a text a sample; the target says whether they fit."""
    inputs = images(size, generator).inputs
    assert isinstance(inputs, dict)
    ids, mask = tokens(size, generator)
    fits = torch.randint(2, (size,), generator=generator).float()
    return Samples(inputs | {"input_ids": ids, "attention_mask": mask}, fits)


def numbers(size: int, generator: torch.Generator) -> Samples:
    """Seven numbers and a class."""
    return Samples((torch.randn(size, 7, generator=generator),), classes(size, generator))


def numbers_again(size: int, generator: torch.Generator) -> Samples:
    """Seven numbers that are to come out again."""
    x = torch.randn(size, 7, generator=generator)
    return Samples((x,), x)


def sounds(size: int, generator: torch.Generator) -> Samples:
    """Waves that two convolutions turn into T frames, and a class."""
    waves = torch.randn(size, 6 * T + 4, generator=generator)
    return Samples({"input_values": waves}, classes(size, generator))


def transcribed_sounds(size: int, generator: torch.Generator) -> Samples:
    """A spectrogram and the tokens that were spoken."""
    targets = torch.randint(4, VOCAB, (size, T), generator=generator)
    inputs = {
        "input_features": torch.randn(size, 8, 2 * T, generator=generator),
        "decoder_input_ids": F.pad(targets, (1, -1), value=1),
    }
    return Samples(inputs, targets)


def classes(size: int, generator: torch.Generator) -> Tensor:
    """A class of each sample, [B]."""
    return torch.randint(NUM_CLASSES, (size,), generator=generator)


# Losses that are none of the library's own.


def pair_loss(logit_B: Tensor, target_B: Tensor) -> Tensor:
    """Binary cross-entropy of whether image and text belong together, [B]."""
    return F.binary_cross_entropy_with_logits(logit_B, target_B, reduction="none")


def ctc_loss(logits_BTV: Tensor, target_BS: Tensor) -> Tensor:
    """Connectionist temporal classification of two symbols, [B]."""
    log_probs = logits_BTV.log_softmax(-1).transpose(0, 1)
    size = len(target_BS)
    lengths = torch.full((size,), len(log_probs)), torch.full((size,), target_BS.shape[1])
    return F.ctc_loss(log_probs, target_BS, *lengths, reduction="none")


# Models of transformers.

SETTINGS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "num_labels": NUM_CLASSES,
}


def config_of(name: str, *, dropout: float = 0.0, **changes: Any) -> Any:
    """A tiny configuration; a setting that is changed to None keeps the class's own value."""
    settings = {k: v for k, v in (SETTINGS | changes).items() if v is not None}
    config = getattr(hf, f"{name}Config")(**settings)
    for part in (config, *(c for c in vars(config).values() if isinstance(c, hf.PreTrainedConfig))):
        _set_dropout(part, dropout)
    return config


def _set_dropout(config: Any, dropout: float) -> None:
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, int | float) and not isinstance(value, bool):
            # Some are whole numbers, and checked to be.
            setattr(config, key, type(value)(dropout))


def from_hub(
    kind: str, name: str, head: str, make_samples: MakeSamples, task: str, **changes: Any
) -> Architecture:
    """A model of transformers; `head` is a class, or what follows AutoModelFor."""
    about = {key: changes.pop(key) for key in ("sizes", "modes", "trains") if key in changes}
    wrap = changes.pop("wrap", lambda model: model)
    attention = changes.pop("attention", None)
    drops = changes.pop("drops", bool(changes.get("dropout")))

    def build() -> nn.Module:
        config = config_of(name, **changes)
        if hasattr(hf, head):
            return wrap(getattr(hf, head)(config))
        auto = getattr(hf, f"AutoModelFor{head}")
        how = {"attn_implementation": attention} if attention else {}
        return wrap(auto.from_config(config, **how))

    return Architecture(
        kind=kind,
        build=build,
        make_samples=make_samples,
        loss=LOSSES[task],
        drops=drops,
        **about,
    )


causal = functools.partial(
    from_hub, "causal LM", head="CausalLM", make_samples=causal_text, task="causal-lm"
)
masked = functools.partial(
    from_hub, "masked LM, encoder", head="MaskedLM", make_samples=masked_text, task="masked-lm"
)
classified = functools.partial(
    from_hub,
    "masked LM, encoder",
    head="SequenceClassification",
    make_samples=classified_text,
    task="sequence-classification",
)
seq2seq = functools.partial(
    from_hub, "seq2seq", head="Seq2SeqLM", make_samples=translated_text, task="masked-lm"
)
vision = functools.partial(
    from_hub,
    "vision",
    head="ImageClassification",
    make_samples=images,
    task="sequence-classification",
    image_size=SIDE,
    patch_size=PATCH,
    sizes={"T": NUM_PATCHES, "T + 1": NUM_PATCHES + 1},
)
speech = functools.partial(
    from_hub,
    "speech",
    head="AudioClassification",
    make_samples=sounds,
    task="sequence-classification",
    conv_dim=(8, 8),
    conv_kernel=(4, 3),
    conv_stride=(3, 2),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    classifier_proj_size=8,
    apply_spec_augment=False,
)
WITH_HEADS = {"T": T, "heads": NUM_HEADS}
PADDED = {"T": T, "T of whole windows": 8}
WITH_CLASSES = {"T": T, "classes": NUM_CLASSES}
STAGES: dict[str, Any] = {
    "depths": [1, 1],
    "hidden_sizes": [8, 12],
    "num_stages": 2,
    "patch_size": 2,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "hidden_size": None,
    "intermediate_size": None,
}
SWIN: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 3,
    "patch_size": 2,
    "num_hidden_layers": None,
    "hidden_size": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    # Attention is within windows.
    "sizes": {"T": 9, "heads": NUM_HEADS},
}
BART: dict[str, Any] = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": NUM_HEADS,
    "decoder_attention_heads": NUM_HEADS,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_hidden_layers": None,
    "hidden_size": None,
    "num_attention_heads": None,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5: dict[str, Any] = {
    "d_model": WIDTH,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": NUM_HEADS,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 8,
    "decoder_start_token_id": 0,
    "num_hidden_layers": None,
    "hidden_size": None,
    "num_attention_heads": None,
    "head_dim": None,
    "sizes": WITH_HEADS,
}
MOE: dict[str, Any] = {
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}


class Pairs(nn.Module):
    """Similarity of each image and its own text, by a CLIP model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        """[B]."""
        output = self.model(**inputs)
        cosine = (output.image_embeds * output.text_embeds).sum(1)
        return cosine * self.model.logit_scale.exp()


class Prompted(nn.Module):
    """CLIP fine-tuned as a classifier: every image against the same K prompts."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        generator = torch.Generator().manual_seed(1)
        prompts = torch.randint(4, VOCAB, (NUM_CLASSES, T), generator=generator)
        self.register_buffer("prompts", prompts)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, side, side] -> [B, K]."""
        output = self.model(input_ids=self.prompts, pixel_values=pixel_values)
        return output.logits_per_image


CLIP_TOWER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": NUM_HEADS,
    "projection_dim": 8,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def clip(
    tower: dict[str, Any] = CLIP_TOWER, *, vocab_size: int = VOCAB, num_positions: int = 8
) -> Any:
    """A CLIP model, both of whose towers have the settings of `tower`."""
    text = tower | {"vocab_size": vocab_size, "max_position_embeddings": num_positions}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=tower, projection_dim=8))


def by_hand(
    kind: str, build: Callable[[], nn.Module], make_samples: MakeSamples, task: str, **about: Any
) -> Architecture:
    """A model that is written out."""
    return Architecture(
        kind=kind, build=build, make_samples=make_samples, loss=LOSSES[task], **about
    )


classic = functools.partial(by_hand, "classic", task="sequence-classification")
recurrent = functools.partial(
    by_hand, "recurrent", make_samples=classified_ids, task="sequence-classification"
)
handmade_vision = functools.partial(
    by_hand,
    "vision",
    make_samples=plain_images,
    task="sequence-classification",
    sizes={"T": NUM_PATCHES, "T + 1": NUM_PATCHES + 1},
)


# Fine-tuning of few parameters.


def _frozen_llama() -> Any:
    return hf.LlamaForCausalLM(config_of("Llama"))


def with_peft(config: str, *, drops: bool = False, **settings: Any) -> Architecture:
    """A llama under one of peft's methods."""
    sizes = {"T": T, "width": WIDTH} if settings.get("use_dora") else {"T": T}

    def build() -> nn.Module:
        import peft

        made = getattr(peft, config)(task_type="CAUSAL_LM", **settings)
        model: nn.Module = peft.get_peft_model(_frozen_llama(), made)
        return model

    return Architecture(
        kind="PEFT",
        build=build,
        make_samples=causal_text,
        loss=peft_prompt_loss if config in _ADD_TOKENS else LOSSES["causal-lm"],
        sizes=sizes,
        drops=drops,
        needs="peft",
    )


_ADD_TOKENS = ("PromptTuningConfig", "PromptEncoderConfig")


def peft_prompt_loss(logits: Tensor, target_BT: Tensor) -> Tensor:
    """The causal loss over the last T positions, as a prompt's come first; [B]."""
    return LOSSES["causal-lm"](logits[:, -target_BT.shape[1] :], target_BT)


def tuned(change: Callable[[Any], nn.Module]) -> Architecture:
    """A llama under a method that is written out."""
    return by_hand("PEFT", lambda: change(_frozen_llama()), causal_text, "causal-lm")


def _replace_linears(model: Any, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    model.requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "o_proj"):
            setattr(layer.self_attn, name, make(getattr(layer.self_attn, name)))
    return model


def _train_only(model: Any, part: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    return model


def _checkpointed(model: Any) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


LORA: dict[str, Any] = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
FALCON: dict[str, Any] = {"head_dim": None, "num_key_value_heads": None}
DEBERTA: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 4,
    "modes": EVERY_MODE,
}
FUNNEL: dict[str, Any] = {
    "block_sizes": [1, 1],
    "d_model": WIDTH,
    "n_head": NUM_HEADS,
    "d_head": 4,
    "d_inner": 24,
    "num_hidden_layers": None,
}
XLNET: dict[str, Any] = {"d_model": WIDTH, "n_head": 4, "n_layer": 2, "d_inner": 24}
WHISPER: dict[str, Any] = {
    **BART,
    "num_mel_bins": 8,
    "max_source_positions": T,
    "max_target_positions": 12,
}

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": causal("GPT2", modes=EVERY_MODE, sizes=WITH_HEADS),
    "gpt2-eager": causal("GPT2", attention="eager"),
    "gpt2-checkpointed": causal("GPT2", wrap=_checkpointed, modes=EVERY_MODE),
    "gpt-neo": causal(
        "GPTNeo",
        num_layers=2,
        num_heads=NUM_HEADS,
        attention_types=[[["global", "local"], 1]],
        window_size=3,
    ),
    "gpt-j": causal("GPTJ", rotary_dim=4),
    "gpt-neox": causal("GPTNeoX"),
    "gpt-bigcode": causal("GPTBigCode"),
    "codegen": causal("CodeGen", rotary_dim=4),
    "openai-gpt": causal("OpenAIGPT"),
    "ctrl": causal("CTRL", n_embd=WIDTH, dff=24, n_layer=2, n_head=NUM_HEADS),
    "opt": causal("OPT", ffn_dim=24, word_embed_proj_dim=WIDTH),
    "bloom": causal("Bloom", sizes=WITH_HEADS),
    "falcon": causal("Falcon", **FALCON),
    "falcon-alibi": causal("Falcon", alibi=True, new_decoder_architecture=True, **FALCON),
    "llama": causal("Llama", modes=EVERY_MODE, sizes=WITH_HEADS),
    "llama-eager": causal("Llama", attention="eager"),
    "llama-checkpointed": causal("Llama", wrap=_checkpointed, modes=EVERY_MODE),
    "llama-classifier": classified("Llama"),
    "mistral": causal("Mistral", sliding_window=3),
    "qwen2": causal("Qwen2", tie_word_embeddings=True),
    "qwen3": causal("Qwen3"),
    "gemma": causal("Gemma"),
    "gemma2": causal("Gemma2"),
    "gemma3": causal("Gemma3Text"),
    "phi": causal("Phi"),
    "phi3": causal("Phi3"),
    "stablelm": causal("StableLm"),
    "olmo2": causal("Olmo2"),
    "cohere": causal("Cohere"),
    "granite": causal("Granite"),
    "starcoder2": causal("Starcoder2"),
    "persimmon": causal("Persimmon"),
    "glm": causal("Glm"),
    "biogpt": causal("BioGpt"),
    "mpt": causal("Mpt", d_model=WIDTH, n_heads=NUM_HEADS, n_layers=2),
    "xglm": causal("XGLM", d_model=WIDTH, ffn_dim=24, num_layers=2, attention_heads=NUM_HEADS),
    "mamba": causal("Mamba", state_size=4),
    "mamba2": causal("Mamba2", state_size=4, num_heads=8, n_groups=2, chunk_size=4),
    "rwkv": causal("Rwkv", attention_hidden_size=WIDTH),
    "recurrent-gemma": causal("RecurrentGemma", lru_width=WIDTH, attention_window_size=4),
    "mixtral": causal("Mixtral", **MOE),
    "qwen2-moe": causal("Qwen2Moe", **MOE),
    "olmoe": causal("Olmoe", **MOE),
    "nanogpt": by_hand(
        "causal LM", own.NanoGpt, whole_text, "causal-lm", modes=EVERY_MODE, sizes=WITH_HEADS
    ),
    "nanogpt-checkpointed": by_hand(
        "causal LM", lambda: own.NanoGpt(checkpoints=True), whole_text, "causal-lm"
    ),
    "mingpt": by_hand(
        "causal LM", lambda: own.NanoGpt(position_parameter=True), whole_text, "causal-lm"
    ),
    "bert": masked("Bert", modes=EVERY_MODE, sizes=WITH_HEADS),
    "bert-classifier": classified("Bert", sizes=WITH_CLASSES),
    "roberta": masked("Roberta", modes=EVERY_MODE),
    "camembert-classifier": classified("Camembert"),
    "distilbert": masked("DistilBert", dim=WIDTH, hidden_dim=24, n_layers=2, n_heads=NUM_HEADS),
    "albert": masked("Albert", embedding_size=8, modes=EVERY_MODE),
    "electra": masked("Electra", embedding_size=8),
    "mpnet": masked("MPNet", sizes=WITH_HEADS),
    "deberta": masked("Deberta", **DEBERTA),
    "deberta-v2": masked("DebertaV2", share_att_key=True, **DEBERTA),
    "deberta-v3": masked("DebertaV2", share_att_key=True, norm_rel_ebd="layer_norm", **DEBERTA),
    "deberta-v2-own-projections": masked("DebertaV2", **DEBERTA),
    "xlnet": classified("XLNet", max_position_embeddings=None, sizes=WITH_HEADS, **XLNET),
    "bigbird": masked("BigBird", attention_type="original_full"),
    "funnel": masked("Funnel", **FUNNEL),
    "squeezebert": masked("SqueezeBert", embedding_size=WIDTH),
    "modernbert": masked("ModernBert", global_attn_every_n_layers=2, local_attention=4),
    "convbert": masked("ConvBert", embedding_size=WIDTH),
    "fnet": masked("FNet", make_samples=lambda size, g: _without_mask(masked_text(size, g))),
    "nystromformer": masked("Nystromformer", num_landmarks=T, segment_means_seq_len=T),
    "roformer": masked("RoFormer", embedding_size=WIDTH),
    "esm": masked("Esm", position_embedding_type="rotary", mask_token_id=VOCAB - 1),
    "longformer": masked("Longformer", attention_window=4, sizes=PADDED),
    "mobilebert": masked(
        "MobileBert", embedding_size=8, intra_bottleneck_size=WIDTH, true_hidden_size=WIDTH
    ),
    "xlm": masked("XLM", emb_dim=WIDTH, n_layers=2, n_heads=NUM_HEADS),
    "rembert": masked("RemBert", input_embedding_size=8, output_embedding_size=8),
    "relative-bias": by_hand(
        "masked LM, encoder",
        own.RelativeBias,
        classified_ids,
        "sequence-classification",
        sizes=WITH_HEADS,
    ),
    "torch-encoder": by_hand(
        "masked LM, encoder",
        lambda: own.TorchEncoder(batch_first=True),
        classified_ids,
        "sequence-classification",
    ),
    "torch-encoder-time-first": by_hand(
        "masked LM, encoder",
        lambda: own.TorchEncoder(batch_first=False),
        classified_ids,
        "sequence-classification",
        modes=EVERY_MODE,
    ),
    "t5": seq2seq("T5", modes=EVERY_MODE, **T5),
    "flan-t5": seq2seq("T5", feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5),
    "mt5": seq2seq("MT5", **T5),
    "bart": seq2seq("Bart", **BART),
    "mbart": seq2seq("MBart", **BART),
    "pegasus": seq2seq("Pegasus", **BART),
    "marian": seq2seq("Marian", decoder_vocab_size=VOCAB, **BART),
    "blenderbot": seq2seq("Blenderbot", **BART),
    "m2m100": seq2seq("M2M100", **BART),
    "led": seq2seq(
        "LED", attention_window=4, max_encoder_position_embeddings=32, sizes=PADDED, **BART
    ),
    "prophetnet": seq2seq(
        "ProphetNet",
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_encoder_attention_heads=NUM_HEADS,
        num_decoder_attention_heads=NUM_HEADS,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_hidden_layers=None,
        num_attention_heads=None,
    ),
    "vit": vision("ViT", modes=EVERY_MODE),
    "deit": vision("DeiT", head="DeiTForImageClassification"),
    "beit": vision("Beit", use_relative_position_bias=True, use_shared_relative_position_bias=True),
    "beit-own-bias": vision("Beit", use_relative_position_bias=True, layer_scale_init_value=0.1),
    "swin": vision("Swin", **SWIN),
    "swinv2": vision("Swinv2", **SWIN),
    "convnext": vision("ConvNext", **STAGES),
    "convnextv2": vision("ConvNextV2", **STAGES),
    "dinov2": vision("Dinov2"),
    "data2vec-vision": vision("Data2VecVision"),
    "segformer": vision(
        "Segformer",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 12],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        hidden_size=None,
        num_hidden_layers=None,
        intermediate_size=None,
        decoder_hidden_size=8,
        sizes={"T": 9},
    ),
    "poolformer": vision(
        "PoolFormer",
        depths=[1, 1],
        hidden_sizes=[8, 12],
        patch_sizes=[3, 3],
        strides=[2, 2],
        padding=[1, 1],
        num_encoder_blocks=2,
        hidden_size=None,
        num_hidden_layers=None,
        intermediate_size=None,
        sizes={"T": 9},
    ),
    "yolos": vision(
        "Yolos",
        head="YolosForObjectDetection",
        num_detection_tokens=T,
        image_size=[SIDE, SIDE],
        make_samples=lambda size, g: _targets_of(images(size, g), (T,), g),
        task="masked-lm",
        sizes={"T": NUM_PATCHES, "queries": T},
    ),
    "clip-vision": vision("CLIP", head="CLIPForImageClassification", vision_config=CLIP_TOWER),
    "clip-pairs": Architecture(
        kind="vision",
        build=lambda: Pairs(clip()),
        make_samples=paired_images,
        loss=pair_loss,
        sizes={"T": NUM_PATCHES, "T of text": T},
    ),
    "clip-prompts": by_hand(
        "vision",
        lambda: Prompted(clip()),
        images,
        "sequence-classification",
        sizes={"T": NUM_PATCHES, "classes": NUM_CLASSES},
        modes=EVERY_MODE,
    ),
    "resnet-eval": vision("ResNet", embedding_size=8, layer_type="basic", trains=False, **STAGES),
    "resnet-train": vision("ResNet", embedding_size=8, layer_type="basic", **STAGES),
    "torchvision-vit": handmade_vision(own.VisionTransformer),
    "torchvision-vit-no-token": handmade_vision(lambda: own.VisionTransformer(token_in_root=False)),
    "torchvision-convnext": handmade_vision(own.ConvNext),
    "resnet-groupnorm": handmade_vision(own.ResNet, modes=EVERY_MODE),
    "resnet-instancenorm": handmade_vision(
        lambda: own.ResNet(lambda width: nn.InstanceNorm2d(width, affine=True))
    ),
    "unet": handmade_vision(own.Unet, make_samples=segmented_images, task="masked-lm"),
    "odd-convolutions": handmade_vision(own.OddConvolutions),
    "coordinate-grid": handmade_vision(own.CoordinateGrid, modes=EVERY_MODE),
    "wav2vec2": speech("Wav2Vec2", modes=EVERY_MODE),
    "wav2vec2-layer-norm": speech("Wav2Vec2", feat_extract_norm="layer", do_stable_layer_norm=True),
    "wav2vec2-weighted": speech("Wav2Vec2", use_weighted_layer_sum=True),
    "hubert": speech("Hubert"),
    "wavlm": speech("WavLM", num_buckets=8, max_bucket_distance=8),
    "whisper": from_hub(
        "speech",
        "Whisper",
        "WhisperForConditionalGeneration",
        transcribed_sounds,
        "masked-lm",
        **WHISPER,
    ),
    "whisper-encoder": from_hub(
        "speech",
        "Whisper",
        "AudioClassification",
        lambda size, g: _only(transcribed_sounds(size, g), "input_features", classes(size, g)),
        "sequence-classification",
        classifier_proj_size=8,
        **WHISPER,
    ),
    "speech2text": from_hub(
        "speech",
        "Speech2Text",
        "Speech2TextForConditionalGeneration",
        lambda size, g: _channels_last(transcribed_sounds(size, g)),
        "masked-lm",
        input_feat_per_channel=8,
        conv_channels=WIDTH,
        max_source_positions=2 * T,
        max_target_positions=12,
        **BART,
    ),
    "spectrogram-transformer": from_hub(
        "speech",
        "AST",
        "AudioClassification",
        lambda size, g: Samples(
            {"input_values": torch.randn(size, 12, 8, generator=g)}, classes(size, g)
        ),
        "sequence-classification",
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=12,
        num_mel_bins=8,
        sizes={"T": 6, "T + 2": 8},
    ),
    "wav2vec2-ctc": Architecture(
        kind="speech",
        build=speech("Wav2Vec2", head="CTC").build,
        make_samples=lambda size, g: _targets_of(sounds(size, g), (2,), g),
        loss=ctc_loss,
    ),
    "lstm": recurrent(lambda: own.Recurrent("LSTM", batch_first=True), modes=EVERY_MODE),
    "lstm-time-first": recurrent(
        lambda: own.Recurrent("LSTM", batch_first=False), modes=EVERY_MODE
    ),
    "lstm-deep-bidirectional": recurrent(
        lambda: own.Recurrent("LSTM", batch_first=True, num_layers=2, bidirectional=True)
    ),
    "lstm-packed": recurrent(own.PackedLstm),
    "gru": recurrent(lambda: own.Recurrent("GRU", batch_first=True)),
    "gru-time-first": recurrent(lambda: own.Recurrent("GRU", batch_first=False)),
    "gru-cell": recurrent(own.LearnedState),
    "rnn": recurrent(lambda: own.Recurrent("RNN", batch_first=True)),
    "time-first": recurrent(own.TimeFirstText, modes=EVERY_MODE),
    "peft-lora": with_peft(
        "LoraConfig", target_modules="all-linear", init_lora_weights=False, **LORA
    ),
    "peft-lora-embedding": with_peft(
        "LoraConfig", target_modules=["embed_tokens", "q_proj"], init_lora_weights=False, **LORA
    ),
    "peft-dora": with_peft(
        "LoraConfig", target_modules=["q_proj", "down_proj"], use_dora=True, **LORA
    ),
    "peft-lora-head": with_peft(
        "LoraConfig", target_modules=["v_proj"], modules_to_save=["lm_head"], **LORA
    ),
    "peft-ia3": with_peft(
        "IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "peft-prompt": with_peft("PromptTuningConfig", num_virtual_tokens=T),
    "peft-p-tuning": with_peft("PromptEncoderConfig", num_virtual_tokens=T, encoder_hidden_size=8),
    "peft-prefix": with_peft("PrefixTuningConfig", num_virtual_tokens=T),
    "peft-prefix-projected": with_peft(
        "PrefixTuningConfig",
        num_virtual_tokens=T,
        prefix_projection=True,
        encoder_hidden_size=8,
    ),
    "peft-loha": with_peft("LoHaConfig", target_modules=["q_proj"], r=2, init_weights=False),
    "peft-vera": with_peft("VeraConfig", target_modules=["q_proj", "o_proj"], r=2),
    "peft-boft": with_peft("BOFTConfig", target_modules=["q_proj"], boft_block_size=4),
    "peft-layer-norms": with_peft("LNTuningConfig", target_modules=["input_layernorm"]),
    "lora": tuned(lambda model: _replace_linears(model, own.LoraLinear)),
    "adapter": tuned(lambda model: _replace_linears(model, own.Adapter)),
    "soft-prompt": tuned(own.SoftPrompt),
    "norms-only": tuned(lambda model: _train_only(model, "norm")),
    "last-block-only": tuned(lambda model: _train_only(model, "layers.1")),
    "embeddings-only": tuned(lambda model: _train_only(model, "embed_tokens")),
    "batchnorm-eval": classic(
        own.BatchNormMlp, numbers, trains=False, sizes={"T": 7, "classes": NUM_CLASSES}
    ),
    "batchnorm-train": classic(own.BatchNormMlp, numbers, sizes={"T": 7}),
    "textcnn": classic(own.TextCnn, classified_ids),
    "tcn-weight-norm": classic(own.Tcn, whole_text, task="causal-lm"),
    "cross-attention": classic(own.CrossAttention, classified_ids, sizes=WITH_CLASSES),
    "cross-attention-time-first": classic(
        lambda: own.CrossAttention(batch_first=False), classified_ids, sizes=WITH_CLASSES
    ),
    "label-table": classic(own.LabelTable, classified_ids, sizes=WITH_CLASSES, modes=EVERY_MODE),
    "label-weight": classic(
        lambda: own.LabelTable(by_weight=True), classified_ids, sizes=WITH_CLASSES
    ),
    "shared-context": classic(own.SharedContext, classified_ids),
    "siamese": classic(own.Siamese, numbers, sizes={"T": 7}),
    "flattened-tokens": classic(own.FlattenedTokens, whole_text, task="causal-lm"),
    "scaled-mlp": classic(own.ScaledMlp, numbers, sizes={"T": 7}),
    "functional-linear": classic(own.FunctionalLinear, numbers, sizes={"T": 7}),
    "tied-autoencoder": classic(
        own.TiedAutoencoder, numbers_again, task="regression", sizes={"T": 7}
    ),
    "wide-and-deep": classic(own.WideAndDeep, classified_ids),
    "mlp-dropout": classic(
        lambda: nn.Sequential(nn.Linear(7, WIDTH), nn.Dropout(DROPOUT), nn.Linear(WIDTH, 5)),
        numbers,
        sizes={"T": 7},
        drops=True,
    ),
    "gpt2-dropout": causal("GPT2", dropout=DROPOUT, modes=EVERY_MODE),
    "bert-dropout": masked("Bert", dropout=DROPOUT),
    "t5-dropout": seq2seq("T5", dropout=DROPOUT, **T5),
    "vit-dropout": vision("ViT", dropout=DROPOUT),
    "wav2vec2-spec-augment": speech(
        "Wav2Vec2",
        apply_spec_augment=True,
        mask_time_prob=0.5,
        mask_time_length=2,
        mask_time_min_masks=1,
        drops=True,
    ),
    "wav2vec2-dropout": speech("Wav2Vec2", dropout=DROPOUT),
    "peft-lora-dropout": with_peft(
        "LoraConfig",
        target_modules=["q_proj"],
        init_lora_weights=False,
        drops=True,
        **(LORA | {"lora_dropout": DROPOUT}),
    ),
}
"""Every architecture by name."""


def _without_mask(samples: Samples) -> Samples:
    assert isinstance(samples.inputs, dict)
    return _only(samples, "input_ids", samples.targets)


def _only(samples: Samples, name: str, targets: Tensor) -> Samples:
    assert isinstance(samples.inputs, dict)
    return Samples({name: samples.inputs[name]}, targets)


def _channels_last(samples: Samples) -> Samples:
    assert isinstance(samples.inputs, dict)
    features = samples.inputs["input_features"].mT
    return Samples(samples.inputs | {"input_features": features}, samples.targets)


def _targets_of(samples: Samples, shape: tuple[int, ...], generator: torch.Generator) -> Samples:
    size = (len(samples), *shape)
    return Samples(samples.inputs, torch.randint(1, NUM_CLASSES, size, generator=generator))
