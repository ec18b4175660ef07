"""Models as people write them by hand, tiny: what `coverage.py` judges beside those of libraries.

Each is written the way tutorials and torchvision write it, not the way that suits an engine: with
positions from `torch.arange(T)`, time first, bare parameters beside the blocks, tables that are
looked up whole.

Shapes: B samples, T positions, D features, K classes, V tokens; images are [B, 3, side, side].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCAB, WIDTH, NUM_HEADS, NUM_CLASSES, NUM_POSITIONS = 31, 16, 4, 5, 6
SIDE, PATCH = 12, 4
NUM_PATCHES = (SIDE // PATCH) ** 2


class NanoGpt(nn.Module):
    """Karpathy's nanoGPT, without its dropout: positions are `torch.arange(T)`, tied head."""

    def __init__(self, *, checkpoints: bool = False, position_parameter: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.wpe = None if position_parameter else nn.Embedding(32, WIDTH)
        if position_parameter:
            self.pos_emb = nn.Parameter(torch.zeros(1, 32, WIDTH))
        self.h = nn.ModuleList(NanoGptBlock() for _ in range(2))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.wte.weight = self.lm_head.weight
        self.checkpoints = checkpoints

    def forward(self, idx: Tensor) -> Tensor:
        """[B, T] -> [B, T, V]."""
        T = idx.shape[1]
        positions = self.pos_emb[:, :T] if self.wpe is None else self.wpe(torch.arange(T))
        x = self.wte(idx) + positions
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return self.lm_head(self.ln_f(x))


class NanoGptBlock(nn.Module):
    """Attention and MLP, each after its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        heads = self.c_attn(self.ln_1(x)).unflatten(2, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class RelativeBias(nn.Module):
    """Attention with a table of relative positions, looked up whole: `Embedding(arange)`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.bias = nn.Embedding(2 * NUM_POSITIONS, NUM_HEADS)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, K]."""
        positions = torch.arange(ids.shape[1])
        distances = positions[None] - positions[:, None] + NUM_POSITIONS
        bias = self.bias(distances).permute(2, 0, 1)
        heads = self.qkv(self.embed(ids)).unflatten(2, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=bias)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(dim=1))


class TorchEncoder(nn.Module):
    """torch's own TransformerEncoder, with the batch or with the time first."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, NUM_HEADS, 24, dropout=0.0, batch_first=batch_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, K]."""
        x = self.embed(ids)
        if self.batch_first:
            return self.head(self.encoder(x).mean(dim=1))
        return self.head(self.encoder(x.transpose(0, 1)).mean(dim=0))


class CrossAttention(nn.Module):
    """nn.MultiheadAttention from learned queries, which no sample owns, to the tokens."""

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.queries = nn.Embedding(NUM_CLASSES, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, NUM_HEADS, batch_first=batch_first)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, K]."""
        x = self.embed(ids)
        queries = self.queries.weight.expand(len(ids), -1, -1)
        if self.batch_first:
            mixed, _ = self.attention(queries, x, x, need_weights=False)
        else:
            q, kv = queries.transpose(0, 1), x.transpose(0, 1)
            mixed = self.attention(q, kv, kv, need_weights=False)[0].transpose(0, 1)
        return self.head(mixed).squeeze(2)


class Recurrent(nn.Module):
    """An LSTM, GRU or RNN over embedded tokens, batch or time first; a head on the last state."""

    def __init__(
        self,
        cell: str,
        *,
        batch_first: bool,
        vocab: int = VOCAB,
        width: int = WIDTH,
        hidden: int = 7,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(vocab, width)
        self.cell = getattr(nn, cell)(width, hidden, batch_first=batch_first, **settings)
        directions = 2 if settings.get("bidirectional") else 1
        self.head = nn.Linear(hidden * directions, NUM_CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, K]."""
        x = self.embed(ids)
        if self.batch_first:
            return self.head(self.cell(x)[0][:, -1])
        return self.head(self.cell(x.transpose(0, 1))[0][-1])


class TimeFirstText(nn.Module):
    """Everything time first: the embedding is looked up for [T, B], the linear layers see it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, K]."""
        x = self.norm(torch.tanh(self.mix(self.embed(ids.t()))))
        return self.head(x.mean(dim=0))


class LearnedState(nn.Module):
    """A GRU cell stepped by hand from a learned first state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.start = nn.Parameter(torch.zeros(7))
        self.cell = nn.GRUCell(WIDTH, 7)
        self.head = nn.Linear(7, NUM_CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, K]."""
        state = self.start.expand(len(ids), -1)
        for x in self.embed(ids).unbind(1):
            state = self.cell(x, state)
        return self.head(state)


class PackedLstm(nn.Module):
    """An LSTM over packed sequences, with lengths from the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        self.cell = nn.LSTM(WIDTH, 7, batch_first=True)
        self.head = nn.Linear(7, NUM_CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, K]."""
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(ids), ids.ne(0).sum(1), batch_first=True, enforce_sorted=False
        )
        _, (last, _) = self.cell(packed)
        return self.head(last[-1])


class TextCnn(nn.Module):
    """Kim's TextCNN: convolutions of several widths over embeddings, maxima over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(WIDTH, 7, size) for size in (2, 3, 4))
        self.head = nn.Linear(21, NUM_CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, K]."""
        x = self.embed(ids).mT
        return self.head(torch.cat([conv(x).relu().amax(2) for conv in self.convs], dim=1))


class Tcn(nn.Module):
    """Bai et al.'s temporal network: causal dilated convolutions under the old `weight_norm`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.convs = nn.ModuleList(
            nn.utils.weight_norm(nn.Conv1d(WIDTH, WIDTH, 2, dilation=2**i)) for i in range(2)
        )
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, V]."""
        x = self.embed(ids).mT
        for i, conv in enumerate(self.convs):
            x = x + conv(F.pad(x, (2**i, 0))).relu_()
        return self.head(x.mT)


class LabelTable(nn.Module):
    """Scores against a table of labels, embedded and projected as a whole: [K, D] inside."""

    def __init__(self, *, by_weight: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.labels = nn.Embedding(NUM_CLASSES, WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.by_weight = by_weight

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, K]."""
        text = self.embed(ids).mean(dim=1)
        if self.by_weight:
            return self.project(text) @ self.labels.weight.T
        table = self.project(self.labels(torch.arange(NUM_CLASSES)))
        return text @ table.T


class CoordinateGrid(nn.Module):
    """A CNN whose positions come from an MLP over a grid of coordinates, [side^2, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.positions = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, WIDTH))
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, side, side] -> [B, K]."""
        h = self.patches(x).flatten(2).mT
        steps = torch.linspace(-1, 1, SIDE // PATCH, dtype=x.dtype)
        h = h + self.positions(torch.cartesian_prod(steps, steps))
        return self.head(torch.tanh(h).mean(dim=1))


class Siamese(nn.Module):
    """Two views of each sample, put through one encoder as a batch of 2 B."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(7, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 7] -> [B, K]."""
        left, right = self.encode(torch.cat([x, x.flip(1)])).chunk(2)
        return self.head(left * right)


class FlattenedTokens(nn.Module):
    """Linear layers over [B T, D]: samples and positions in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.mix = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, V]."""
        flat = torch.tanh(self.embed(ids).view(-1, WIDTH))
        return self.mix(flat).view(*ids.shape, VOCAB)


class VisionTransformer(nn.Module):
    """Laid out as torchvision's: class token and positions are parameters beside the blocks."""

    def __init__(self, *, token_in_root: bool = True) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH)) if token_in_root else None
        self.encoder = VisionEncoder(NUM_PATCHES + int(token_in_root))
        self.heads = nn.Sequential(nn.Linear(WIDTH, NUM_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, side, side] -> [B, K]."""
        h = self.conv_proj(x).flatten(2).mT
        if self.class_token is not None:
            h = torch.cat([self.class_token.expand(len(x), -1, -1), h], dim=1)
        return self.heads(self.encoder(h)[:, 0])


class VisionEncoder(nn.Module):
    """Positions as a bare parameter, then blocks in a Sequential."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.zeros(1, num_tokens, WIDTH))
        self.layers = nn.Sequential(VisionBlock(), VisionBlock())
        self.ln = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.ln(self.layers(x + self.pos_embedding))


class VisionBlock(nn.Module):
    """nn.MultiheadAttention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attention = nn.MultiheadAttention(WIDTH, NUM_HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h = self.ln_1(x)
        x = x + self.self_attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class ResNet(nn.Module):
    """Basic blocks with GroupNorm (or what `norm` makes), in-place ReLUs, a strided shortcut."""

    def __init__(
        self,
        norm: Any = lambda width: nn.GroupNorm(2, width),
        widths: tuple[int, int] = (8, 12),
    ) -> None:
        super().__init__()
        first, last = widths
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 3, padding=1, bias=False),
            norm(first),
            nn.ReLU(True),
            nn.MaxPool2d(2),
        )
        self.layers = nn.Sequential(
            BasicBlock(first, first, 1, norm), BasicBlock(first, last, 2, norm)
        )
        self.fc = nn.Linear(last, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, side, side] -> [B, K]."""
        return self.fc(self.layers(self.stem(x)).mean(dim=(2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int, norm: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.relu = norm(width), norm(width), nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), norm(width))
            if stride > 1
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h / stride, w / stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


class ConvNext(nn.Module):
    """torchvision's ConvNeXt: depthwise convolutions, and a `layer_scale` parameter a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(ConvNextBlock(), ConvNextBlock())
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, side, side] -> [B, K]."""
        return self.head(self.norm(self.blocks(self.stem(x)).mean(dim=(2, 3))))


class ConvNextBlock(nn.Module):
    """Depthwise convolution, LayerNorm over channels, MLP, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.layer_scale = nn.Parameter(torch.full((8, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 8, h, w] -> [B, 8, h, w]."""
        h = self.mlp(self.norm(self.dwconv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x + self.layer_scale * h


class Unet(nn.Module):
    """Down, up by a transposed convolution, skip; logits of every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.InstanceNorm2d(8, affine=True)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.out = nn.Conv2d(11, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, side, side] -> [B, side^2, K]."""
        h = self.up(torch.relu(self.norm(self.down(x))))
        return self.out(torch.cat([h, x], dim=1)).flatten(2).mT


class OddConvolutions(nn.Module):
    """Grouped, dilated, `same` and reflecting convolutions, one and three dimensions too."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(3, 6, 3, groups=3, padding="same")
        self.reflecting = nn.Conv2d(6, 4, 3, dilation=2, padding=2, padding_mode="reflect")
        self.volume = nn.Conv3d(1, 2, (4, 3, 3))
        self.act = nn.PReLU(2)
        self.line = nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1)
        self.head = nn.Bilinear(3, 3, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, side, side] -> [B, K]."""
        h = self.reflecting(self.grouped(x)).unsqueeze(1)
        h = self.line(self.act(self.volume(h)).flatten(2)).mean(dim=2)
        return self.head(h, h)


class BatchNormMlp(nn.Module):
    """An MLP with BatchNorm, whose statistics are frozen where it is built in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(7, WIDTH),
            nn.BatchNorm1d(WIDTH),
            nn.ReLU(inplace=True),
            nn.Linear(WIDTH, NUM_CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, 7] -> [B, K]."""
        return self.layers(x)


class ScaledMlp(nn.Module):
    """An MLP with a temperature of its own, a spectral norm, and layers used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.utils.parametrizations.weight_norm(nn.Linear(7, WIDTH))
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 7] -> [B, K]."""
        h = torch.tanh(self.mix(torch.tanh(self.mix(torch.tanh(self.enter(x))))))
        return self.head(h) * self.temperature.exp()


class FunctionalLinear(nn.Module):
    """A weight that is read beside its module: `F.linear(x, self.layer.weight)`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 7] -> [B, K]."""
        h = F.linear(x, self.layer.weight, self.layer.bias)
        return self.head(torch.tanh(h) + self.layer(x))


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed and read as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(7, WIDTH)
        self.bias = nn.Parameter(torch.zeros(7))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 7] -> [B, 7]."""
        code = torch.tanh(self.encoder(x))
        return code @ self.encoder.weight + self.bias


class WideAndDeep(nn.Module):
    """Categories through an EmbeddingBag and one table a column, numbers beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.EmbeddingBag(VOCAB, NUM_CLASSES, mode="sum")
        self.columns = nn.ModuleList(nn.Embedding(VOCAB, 3) for _ in range(NUM_POSITIONS))
        self.deep = nn.Sequential(nn.Linear(3 * NUM_POSITIONS, 8), nn.ReLU(True), nn.Linear(8, 5))

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, K]."""
        parts = [column(ids[:, i]) for i, column in enumerate(self.columns)]
        return self.wide(ids) + self.deep(torch.cat(parts, dim=1))


class SharedContext(nn.Module):
    """A context of learned tokens goes through the encoder once, for all samples of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.prompt = nn.Embedding(NUM_POSITIONS, WIDTH)
        self.encode = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, K]."""
        context = self.encode(self.prompt(torch.arange(NUM_POSITIONS))).mean(dim=0)
        return self.head(torch.tanh(self.encode(self.embed(ids)).mean(dim=1) + context))


class LoraLinear(nn.Module):
    """A frozen linear layer and a trained product of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.zeros(2, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., P]."""
        return self.base(x) + x @ self.a.T @ self.b.T


class Adapter(nn.Module):
    """Houlsby's bottleneck after a frozen layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        h = self.base(x)
        return h + self.up(torch.relu(self.down(h)))


class SoftPrompt(nn.Module):
    """Learned vectors before the embedded tokens of a frozen language model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.prompt = nn.Parameter(torch.zeros(3, WIDTH))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T] -> [B, T, V]."""
        size, length = len(input_ids), len(self.prompt)
        embedded = self.model.get_input_embeddings()(input_ids)
        embedded = torch.cat([self.prompt.expand(size, -1, -1), embedded], dim=1)
        mask = torch.cat([attention_mask.new_ones(size, length), attention_mask], dim=1)
        logits = self.model(inputs_embeds=embedded, attention_mask=mask).logits
        return logits[:, length:]
