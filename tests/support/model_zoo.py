"""Tiny models with random weights for tests, one of each kind, with batches and losses for them.

Sizes are equal to no other, and neither 2 nor 3 ranks divide them. Samples are ragged, their
tokens repeat, and none is like another. Parameters are moved off their special starting values:
zero biases and unit norms hide errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.loss import IGNORED, LOSSES, PerSampleLoss

VOCAB, T, PIXELS, FEATURES = 97, 17, 15, 13


@dataclass(frozen=True)
class Kind:
    """How one model of the zoo is made and fed."""

    build: Callable[[], nn.Module]
    task: str
    make_batch: Callable[[int, torch.Generator], Batch]

    @property
    def loss(self) -> PerSampleLoss:
        return LOSSES[self.task]


def build(name: str) -> nn.Module:
    """The model, the same at every call."""
    torch.manual_seed(0)
    model = ZOO[name].build().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return model


def batch(name: str, size: int, seed: int) -> Batch:
    """`size` samples, a function of the seed."""
    return ZOO[name].make_batch(size, torch.Generator().manual_seed(seed))


def tokens(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ragged token ids [B, T], 0 at padding, and their mask; each row repeats a token."""
    ids = torch.randint(1, VOCAB, (size, T), generator=generator)
    lengths = torch.randint(T // 2, T + 1, (size, 1), generator=generator)
    mask = (torch.arange(T) < lengths).long()
    ids = ids * mask
    ids[:, 1] = ids[:, 0]
    return ids, mask


def _classified_text(size: int, generator: torch.Generator) -> Batch:
    ids, mask = tokens(size, generator)
    return Batch(
        {"input_ids": ids, "attention_mask": mask},
        torch.randint(0, 2, (size,), generator=generator),
    )


def _causal_text(size: int, generator: torch.Generator) -> Batch:
    ids, mask = tokens(size, generator)
    return Batch({"input_ids": ids, "attention_mask": mask}, ids.masked_fill(mask == 0, IGNORED))


def _masked_text(size: int, generator: torch.Generator) -> Batch:
    ids, mask = tokens(size, generator)
    is_hidden = (torch.rand(ids.shape, generator=generator) < 0.3) & (mask == 1)
    targets = ids.masked_fill(~is_hidden, IGNORED)
    ids = ids.masked_fill(is_hidden, VOCAB - 1)
    return Batch({"input_ids": ids, "attention_mask": mask}, targets)


def _pictures(size: int, generator: torch.Generator) -> Batch:
    pixels = torch.randn(size, 3, PIXELS, PIXELS, generator=generator)
    return Batch({"pixel_values": pixels}, torch.randint(0, 2, (size,), generator=generator))


def _features(size: int, generator: torch.Generator) -> Batch:
    x = torch.randn(size, T, FEATURES, generator=generator)
    return Batch({}, torch.randn(size, 2, generator=generator), args=(x,))


def _decoder(config: type, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "hidden_size": 40,
        "intermediate_size": 67,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "use_cache": False,
    }
    return config(**(settings | changes))


def _encoder(config: type, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "hidden_size": 44,
        "intermediate_size": 71,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 23,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 0,
    }
    return config(**(settings | changes))


def small_bert(vocab_size: int, dropout: float) -> hf.BertForSequenceClassification:
    """One block, three classes, at most eight tokens."""
    config = hf.BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return hf.BertForSequenceClassification(config)


def _gpt2() -> Any:
    return hf.GPT2Config(
        n_embd=40,
        n_inner=67,
        n_layer=2,
        n_head=4,
        n_positions=23,
        vocab_size=VOCAB,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        use_cache=False,
    )


def _distilbert() -> Any:
    return hf.DistilBertConfig(
        dim=44,
        hidden_dim=71,
        n_layers=2,
        n_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=23,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=0,
    )


class ReusedMlp(nn.Module):
    """A layer used twice, two whose outputs are added, one that is never used, few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, 19)
        self.mix = nn.Linear(19, 19)
        self.left = nn.Linear(19, 7, bias=False)
        self.right = nn.Linear(19, 7)
        self.unused = nn.Linear(19, 7)
        self.norm = nn.GroupNorm(1, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.mix(torch.tanh(self.mix(torch.tanh(self.enter(x))))))
        h = (self.left(h) + self.right(h)).mean(dim=1)
        out: Tensor = self.head(torch.tanh(self.norm(h)))
        return out


class NewerLayers(nn.Module):
    """Grouped and transposed convolutions, a bag of embeddings, an LSTM of two directions, and a
    table of relative positions that meets the samples late."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(FEATURES, 2 * FEATURES, 3, padding=1, groups=FEATURES)
        self.up = nn.ConvTranspose1d(2 * FEATURES, 6, 3, padding=1, groups=2)
        self.bag = nn.EmbeddingBag(5, 6, mode="sum")
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.near = nn.Embedding(9, 2)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        bag = self.bag((2 + 2 * torch.tanh(x[..., 0])).long())
        h = self.up(torch.tanh(self.conv(x.mT))).mT[:, ::3] + bag[:, None]
        h, _ = self.lstm(h)
        steps = torch.arange(h.shape[1], device=x.device)
        distance = (steps[:, None] - steps).clamp(-4, 4) + 4
        near = self.near(distance).permute([2, 0, 1]).unsqueeze(0)
        q = h.unflatten(-1, (2, 5)).transpose(1, 2)
        h = ((q @ q.mT + near).softmax(-1) @ q).transpose(1, 2).flatten(2)
        out: Tensor = self.head(torch.tanh(h).mean(dim=1))
        return out


ZOO: dict[str, Kind] = {
    "gpt2": Kind(
        lambda: hf.GPT2ForSequenceClassification(_gpt2()),
        "sequence-classification",
        _classified_text,
    ),
    "llama": Kind(
        lambda: hf.LlamaForSequenceClassification(_decoder(hf.LlamaConfig, attention_bias=True)),
        "sequence-classification",
        _classified_text,
    ),
    "qwen2": Kind(
        lambda: hf.Qwen2ForCausalLM(_decoder(hf.Qwen2Config, tie_word_embeddings=False)),
        "causal-lm",
        _causal_text,
    ),
    "gemma": Kind(
        lambda: hf.GemmaForSequenceClassification(_decoder(hf.GemmaConfig)),
        "sequence-classification",
        _classified_text,
    ),
    "bert": Kind(lambda: hf.BertForMaskedLM(_encoder(hf.BertConfig)), "masked-lm", _masked_text),
    "distilbert": Kind(lambda: hf.DistilBertForMaskedLM(_distilbert()), "masked-lm", _masked_text),
    "roberta": Kind(
        lambda: hf.RobertaForSequenceClassification(_encoder(hf.RobertaConfig)),
        "sequence-classification",
        _classified_text,
    ),
    "vit": Kind(
        lambda: hf.ViTForImageClassification(
            _encoder(hf.ViTConfig, image_size=PIXELS, patch_size=5)
        ),
        "sequence-classification",
        _pictures,
    ),
    "tied-gpt2": Kind(lambda: hf.GPT2LMHeadModel(_gpt2()), "causal-lm", _causal_text),
    "reused-mlp": Kind(ReusedMlp, "regression", _features),
    "newer-layers": Kind(NewerLayers, "regression", _features),
}
"""Every model by name."""
