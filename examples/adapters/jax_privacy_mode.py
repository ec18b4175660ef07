"""jax-privacy on one rank: Llama's classifier in JAX, with the weights of the torch model.

Gradients and clipping are JAX's and jax-privacy's; the noise and the step are torch's.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax_privacy.clipping import clipped_grad

from dpsgd_track.modes.protocol import Mode
from dpsgd_track.privacy.clipping import SampleRecord


def normed(x, weight, config):
    return weight * x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.rms_norm_eps)


def rotated(x_THd):
    rates = 10000.0 ** -jnp.linspace(0, 1, x_THd.shape[-1] // 2, endpoint=False)
    angles = jnp.tile(jnp.arange(len(x_THd))[:, None] * rates, 2)[:, None]
    first, second = jnp.split(x_THd, 2, axis=-1)
    return x_THd * jnp.cos(angles) + jnp.concatenate([-second, first], -1) * jnp.sin(angles)


def loss(config, w, tokens, mask, target):
    """Cross-entropy of one sample."""
    x, heads, length = w["model.embed_tokens.weight"][tokens], config.num_attention_heads, len(mask)
    is_seen = jnp.tril(mask[None, :] * jnp.ones((length, 1), mask.dtype)) > 0
    for layer in range(config.num_hidden_layers):
        own = {n.split(".")[-2]: p.T for n, p in w.items() if f".layers.{layer}." in n}
        h = normed(x, own["input_layernorm"], config)
        q, k, v = ((h @ own[f"{n}_proj"]).reshape(length, -1, config.head_dim) for n in "qkv")
        k, v = (jnp.repeat(t, heads // t.shape[1], axis=1) for t in (rotated(k), v))
        scores = jnp.einsum("qhd,khd->hqk", rotated(q), k) / config.head_dim**0.5
        weights = jax.nn.softmax(jnp.where(is_seen, scores, jnp.finfo(scores.dtype).min))
        x += jnp.einsum("hqk,khd->qhd", weights, v).reshape(length, -1) @ own["o_proj"]
        h = normed(x, own["post_attention_layernorm"], config)
        x += (jax.nn.silu(h @ own["gate_proj"]) * (h @ own["up_proj"])) @ own["down_proj"]
    last = (jnp.arange(length) * (tokens != config.pad_token_id)).argmax()
    logits = normed(x, w["model.norm.weight"], config)[last] @ w["score.weight"].T
    return -jax.nn.log_softmax(logits)[target]


class JaxPrivacy(Mode):
    replicated = True
    takes_other_models = takes_empty_batches = takes_several_ranks = False

    def __init__(self, model, context):
        super().__init__(context)
        self.model, self.optimizer = model, context.make_optimizer(model.parameters())
        of_sample = partial(loss, model.config)
        settings = {"return_values": True, "return_grad_norms": True, "keep_batch_dim": False}
        settings["batch_argnums"] = (1, 2, 3)
        self.clipped = jax.jit(
            lambda bound, *given: clipped_grad(of_sample, l2_clip_norm=bound, **settings)(*given)
        )

    def accumulate(self, batch):
        tokens = batch.inputs["input_ids"]
        mask = batch.inputs.get("attention_mask", torch.ones_like(tokens))
        weights = {name: p.detach().numpy() for name, p in self.model.named_parameters()}
        given = (t.numpy() for t in (tokens, mask, batch.targets))
        sums, told = self.clipped(self.max_grad_norm, weights, *given)
        for name, p in self.model.named_parameters():
            total = torch.from_numpy(np.array(sums[name]))
            p.grad = total if p.grad is None else p.grad + total
        loss_B, norm_B = (torch.tensor(np.array(t)) for t in (told.values, told.grad_norms))
        # jax-privacy tells no factors; these are by its formula.
        return SampleRecord(loss_B, norm_B, (self.max_grad_norm / norm_B).clamp(max=1.0))
