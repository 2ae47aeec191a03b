"""The GPT of the limited track: initial weights, compute weights, and a forward pass with layer replay.

There are two sets of weights. The optimizer updates the masters, which are float32 and have the benchmark's names
(transformer.h.3.attn.c_q.weight). The modules below hold the compute weights, which are bfloat16 on a GPU: head mixing
is applied to them already, and q, k, v and gate, up are stacked into one matrix each.

Notation in shapes: B sequences, T positions, V vocab_size, C = n_embd, H = n_head, D = C / H, L = n_layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slowrun.kernels import HeadLoss, attend, capped_cross_entropy, dropout, soft_cap

if TYPE_CHECKING:
    from train import Config

# ======================================================================================================================
# Masters and compute weights
# ======================================================================================================================


def init_masters(config: Config, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The initial masters by name, drawn from torch's default generator.

    Embedding tables are stored in the compute dtype, all others in float32 or wider.
    """
    L, H, C, hidden, padded_vocab = config.n_layer, config.n_head, config.n_embd, config.hidden, config.padded_vocab
    wide = torch.promote_types(dtype, torch.float32)
    bound = math.sqrt(3 / C)  # of a uniform distribution with standard deviation 1 / sqrt(C)

    def constant(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=wide, device=device)

    def uniform(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).uniform_(-bound, bound)

    def normal(std: float, *shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=std)

    def projection(*shape: int) -> Tensor:
        return normal(1 / math.sqrt(C), *shape) if config.proj_init == "normal" else constant(0.0, *shape)

    def block(name: str, layer: int) -> dict[str, Tensor]:
        masters = {}
        if config.head_mixes:
            masters[f"{name}.attn.q_mix"] = torch.eye(H, dtype=wide, device=device)
            masters[f"{name}.attn.k_mix"] = torch.eye(H, dtype=wide, device=device)
            masters[f"{name}.attn.v_mix"] = torch.eye(H, dtype=wide, device=device)
        masters[f"{name}.attn.c_q.weight"] = uniform(C, C)
        masters[f"{name}.attn.c_k.weight"] = uniform(C, C)
        masters[f"{name}.attn.c_v.weight"] = uniform(C, C)
        masters[f"{name}.attn.c_proj.weight"] = projection(C, C)
        if config.head_gates:
            masters[f"{name}.attn.attn_gate.weight"] = constant(0.0, H, 12)
        if config.has_value_embedding(layer):
            masters[f"{name}.attn.ve_gate.weight"] = constant(0.0, H, 32)
        if config.mlp == "swiglu":
            masters[f"{name}.mlp.c_gate.weight"] = uniform(hidden, C)
        masters[f"{name}.mlp.c_fc.weight"] = uniform(hidden, C)
        masters[f"{name}.mlp.c_proj.weight"] = projection(C, hidden)
        return masters

    masters = {"resid_lambdas": constant(1.0, L), "x0_lambdas": constant(0.1, L)}
    if config.u_net:
        masters["skip_weights"] = constant(1.0, L // 2)
    masters["transformer.wte.weight"] = normal(1.0, padded_vocab, C, dtype=dtype)
    for i in range(L):
        masters |= block(f"transformer.h.{i}", layer=i)
    masters["lm_head.weight"] = normal(0.001, padded_vocab, C)
    for i in range(L):
        if config.has_value_embedding(i) and config.value_embedding == "projection":
            masters[f"ve_projs.{i}.weight"] = uniform(C, C)
        elif config.has_value_embedding(i):
            masters[f"ve_tables.{i}.weight"] = uniform(padded_vocab, C, dtype=dtype)
    if config.mtp_weight:
        masters["mtp_proj.weight"] = uniform(C, 2 * C)
        masters |= block("mtp_block", layer=L)
    return masters


def mix_heads(weight: Tensor, mix: Tensor) -> Tensor:
    """Interleaved head attention (arXiv 2602.21371): head h becomes sum_m mix[h, m] * head m.

    weight (C, C), of which head m has rows m * D ... (m + 1) * D - 1; mix (H, H) -> (C, C).
    """
    heads = weight.view(mix.size(1), -1)  # (H, D * C)
    return (mix @ heads).view_as(weight)


def block_weights(masters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a block by name, made from its masters; differentiable."""
    weights = dict(masters)
    qkv = []
    for name in ("q", "k", "v"):
        weight = weights.pop(f"attn.c_{name}.weight")
        mix = weights.pop(f"attn.{name}_mix", None)
        qkv.append(weight if mix is None else mix_heads(weight, mix))
    weights["attn.qkv.weight"] = torch.cat(qkv)
    if "mlp.c_gate.weight" in weights:
        gate_up = [weights.pop(f"mlp.{name}.weight") for name in ("c_gate", "c_fc")]
        weights["mlp.gate_up.weight"] = torch.cat(gate_up)
    return weights


def block_names(config: Config) -> list[str]:
    """The prefixes of the blocks' names: what block_weights is for."""
    blocks = [f"transformer.h.{i}." for i in range(config.n_layer)]
    return [*blocks, "mtp_block."] if config.mtp_weight else blocks


# ======================================================================================================================
# Blocks
# ======================================================================================================================


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without a learned gain (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding, base 10000 (arXiv 2104.09864): each (T, 1, D / 2)."""
    D = config.n_embd // config.n_head
    exponents = torch.arange(0, D, 2, dtype=dtype) / D
    frequencies = 10000.0**-exponents
    angles = torch.arange(config.sequence_len, dtype=dtype)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D) -> the same shape, float32 or wider. A frequency pair is (x[d], x[d + D / 2])."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self-attention (arXiv 2603.09078): y without its component along the position's own value.

    y, v (B, T, H, D) -> (B, T, H, D).
    """
    v_hat = F.normalize(v, dim=-1, eps=1e-4)
    along = (y * v_hat).sum(dim=-1, keepdim=True) * v_hat
    return (y - along).to(y.dtype)


class Attention(nn.Module):
    """Multi-head attention with value embedding, rotary embedding and head gates. mix_heads is in its weights."""

    def __init__(self, config: Config, layer: int, backend: str):
        super().__init__()
        C, H = config.n_embd, config.n_head
        self.n_head = H
        self.window = config.window(layer)
        self.backend = backend
        self.exclusive = config.exclusive
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        self.attn_gate = nn.Linear(12, H, bias=False) if config.head_gates else None
        self.ve_gate = nn.Linear(32, H, bias=False) if config.has_value_embedding(layer) else None

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, C), value embedding ve (B, T, C) or None -> (B, T, C)."""
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.qkv(x).view(B, T, 3, H, D).unbind(dim=2)  # each (B, T, H, D)
        if ve is not None:  # value residual (arXiv 2410.17897)
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :32]))  # (B, T, H), starts at 1
            v = v + gate.unsqueeze(-1) * ve.view(B, T, H, D)
        q = norm(rotate(q, cos, sin)).to(v.dtype)
        k = norm(rotate(k, cos, sin)).to(v.dtype)
        y = attend(q, k, v, self.window, self.backend)  # (B, T, H, D)
        if self.exclusive:
            y = exclude_own_value(y, v)
        if self.attn_gate is not None:
            gate = torch.sigmoid(self.attn_gate(x[..., :12]))  # (B, T, H) (arXiv 2505.06708)
            y = y * gate.unsqueeze(-1)
        return self.c_proj(y.reshape(B, T, C))


class SwiGLU(nn.Module):
    """The MLP: a gated unit (arXiv 2002.05202)."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.hidden, bias=False)
        self.c_proj = nn.Linear(config.hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # each (B, T, hidden)
        return self.c_proj(F.silu(gate) * up)


class SquaredReLU(nn.Module):
    """The MLP of the first records (arXiv 2109.08668)."""

    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.hidden, bias=False)
        self.c_proj = nn.Linear(config.hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: Config, layer: int, backend: str):
        super().__init__()
        self.attn = Attention(config, layer, backend)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else SquaredReLU(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        x = x + dropout(self.attn(norm(x), ve, cos, sin), p)
        return x + dropout(self.mlp(norm(x)), p)


# ======================================================================================================================
# What is compiled: layers of a kind share a graph
# ======================================================================================================================


def run_layer(
    block: Block,
    x: Tensor,
    x0: Tensor,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    resid_lambda: Tensor,
    x0_lambda: Tensor,
    ve: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    is_dropped: bool,
) -> Tensor:
    """A layer of the trunk: streams x, x0, skip (B, T, C), weights () -> (B, T, C).

    skip is what a layer of the second half adds from the first (U-Net, arXiv 1505.04597). A dropped layer still applies
    the skip and the residual mix.
    """
    if skip is not None:
        x = x + skip_weight * skip
    x = resid_lambda * x + x0_lambda * x0
    return x if is_dropped else block(x, ve, cos, sin)


def run_mtp_layer(block: Block, z: Tensor, cos: Tensor, sin: Tensor, is_dropped: bool) -> Tensor:
    """The block of multi-token prediction: z (B, T - 1, C) -> (B, T - 1, C), normed."""
    return norm(z if is_dropped else block(z, None, cos, sin))


def cross_entropy(x: Tensor, lm_head: Tensor, targets: Tensor, vocab_size: int, cap: float) -> Tensor:
    """Next-token loss in validation: x (B, T, C), targets (B, T) int64 -> (B, T) float32 or wider, nats."""
    logits = soft_cap(F.linear(x, lm_head)[..., :vocab_size], cap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def head_chunk(x: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, vocab_size: int, cap: float):
    """The part of HeadLoss for some positions: x (n, C), lm_head (padded V, C), targets (n, 1) int64."""
    loss, first_loss, grad = capped_cross_entropy(F.linear(x, lm_head), targets, weights, vocab_size, cap)
    return loss, first_loss, grad @ lm_head, grad.T @ x


# ======================================================================================================================
# GPT
# ======================================================================================================================


class GPT(nn.Module):
    """Decoder-only transformer: a U-Net of blocks. Late in training some of its layers are replayed.

    The parameters are not initialized: they are compute weights, and come from masters.
    """

    def __init__(self, config: Config, dtype: torch.dtype, attention: str = "sdpa"):
        """attention: the backend of slowrun.kernels.attend."""
        super().__init__()
        self.config = config
        L, C, padded_vocab = config.n_layer, config.n_embd, config.padded_vocab
        with_ve = [i for i in range(L) if config.has_value_embedding(i)]
        wte = nn.Embedding(padded_vocab, C)
        blocks = nn.ModuleList(Block(config, i, attention) for i in range(L))
        self.transformer = nn.ModuleDict({"wte": wte, "h": blocks})
        if config.value_embedding == "projection":
            self.ve_projs = nn.ModuleDict({str(i): nn.Linear(C, C, bias=False) for i in with_ve})
        else:
            self.ve_tables = nn.ModuleDict({str(i): nn.Embedding(padded_vocab, C) for i in with_ve})
        if config.mtp_weight:
            self.mtp_proj = nn.Linear(2 * C, C, bias=False)
            self.mtp_block = Block(config, L, attention)  # as layer L: a full window, no value embedding
        self.lm_head = nn.Linear(C, padded_vocab, bias=False)
        self.to(dtype)

        # Scalars, rotary angles and logits stay in float32, because bfloat16 is too coarse for them.
        self.wide = torch.promote_types(dtype, torch.float32)
        self.resid_lambdas = nn.Parameter(torch.empty(L, dtype=self.wide))
        self.x0_lambdas = nn.Parameter(torch.empty(L, dtype=self.wide))
        if config.u_net:
            self.skip_weights = nn.Parameter(torch.empty(L // 2, dtype=self.wide))
        cos, sin = rotary_tables(config, self.wide)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

        self.run_layer = run_layer
        self.run_mtp_layer = run_mtp_layer
        self.head_chunk = head_chunk
        self.cross_entropy = cross_entropy

    def compile_layers(self) -> None:
        """Compile layer by layer: gradients become available during the backward pass, and the graphs are few."""
        compiled = partial(torch.compile, dynamic=False, fullgraph=True)
        self.run_layer = compiled(run_layer)
        self.run_mtp_layer = compiled(run_mtp_layer)
        self.head_chunk = compiled(head_chunk)
        self.cross_entropy = compiled(cross_entropy)

    def value_embeddings(self, tokens: Tensor, x0: Tensor) -> dict[int, Tensor]:
        """The value embeddings (B, T, C), by layer, for the layers with one. A replayed layer uses the same again."""
        if self.config.value_embedding == "projection":
            return {int(i): project(x0) for i, project in self.ve_projs.items()}
        return {int(i): table(tokens) for i, table in self.ve_tables.items()}

    def forward(self, tokens: Tensor, replay: bool, dropped: Collection[int] = ()) -> Tensor:
        """tokens (B, T) int64 -> final stream (B, T, C), normed.

        replay: whether layers replay_start ... replay_end - 1 run again, with their skips, lambdas and value
        embeddings. dropped: the calls, counted from 0, whose block is skipped; the skip and the lambdas still apply.
        """
        T = tokens.size(1)
        cos, sin = self.cos[:T], self.sin[:T]
        x0 = norm(self.transformer.wte(tokens))  # (B, T, C)
        ve = self.value_embeddings(tokens, x0)
        resid_lambdas, x0_lambdas = self.resid_lambdas.unbind(), self.x0_lambdas.unbind()
        skip_weights = self.skip_weights.unbind() if self.config.u_net else ()
        L = self.config.n_layer
        E = L // 2  # the first E layers are the encoder of the U-Net
        encoded = []
        x = x0
        for call, i in enumerate(self.config.layer_order(replay)):
            has_skip = self.config.u_net and i >= E
            skip = encoded[L - 1 - i] if has_skip else None  # a replayed layer reads it again
            skip_weight = skip_weights[i - E] if has_skip else None
            block = self.transformer.h[i]
            mix = skip, skip_weight, resid_lambdas[i], x0_lambdas[i]
            x = self.run_layer(block, x, x0, *mix, ve.get(i), cos, sin, is_dropped=call in dropped)
            if i < E:
                encoded.append(x)
        return norm(x)

    def token_losses(self, tokens: Tensor, targets: Tensor, replay: bool) -> Tensor:
        """Next-token cross-entropy: tokens, targets (B, T) int64 -> (B, T) float32 or wider, nats."""
        x = self(tokens, replay)
        return self.cross_entropy(x, self.lm_head.weight, targets, self.config.vocab_size, self.config.logit_cap)

    def log_probs(self, tokens: Tensor, replay: bool) -> Tensor:
        """tokens (B, T) int64 -> log-probabilities of the next token (B, T, V), float32 or wider."""
        logits = self.lm_head(self(tokens, replay))[..., : self.config.vocab_size]
        return soft_cap(logits, self.config.logit_cap).log_softmax(-1)

    def head_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, as a part of the training loss: x (B, T, C), targets (B, T) -> (), nats per token."""
        chunk = partial(
            self.head_chunk,
            weights=torch.ones(1, dtype=self.wide, device=x.device),
            vocab_size=self.config.vocab_size,
            cap=self.config.logit_cap,
        )
        loss, _ = HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, chunk, targets.reshape(-1, 1))
        return loss / targets.numel()

    def training_loss(
        self, tokens: Tensor, targets: Tensor, replay: bool, dropped: Collection[int]
    ) -> tuple[Tensor, Tensor]:
        """Multi-token prediction with one extra block (arXiv 2412.19437).

        tokens, targets (B, T) int64; replay, dropped: as in forward -> (the weighted loss, the next-token loss), both
        () in nats per token. At position t < T - 1 the extra block reads the final stream and the embedding of target
        t, and predicts target t + 1.
        """
        T = tokens.size(1)
        x = self(tokens, replay, dropped)  # (B, T, C)
        next_token_loss = self.head_loss(x, targets)
        if not self.config.mtp_weight:
            return next_token_loss, next_token_loss.detach()

        next_embedding = norm(self.transformer.wte(targets[:, :-1]))  # (B, T - 1, C)
        z = self.mtp_proj(torch.cat([x[:, :-1], next_embedding], dim=-1))  # (B, T - 1, C)
        is_dropped = len(self.config.layer_order(replay)) in dropped  # its call comes after those of the layers
        z = self.run_mtp_layer(self.mtp_block, z, self.cos[: T - 1], self.sin[: T - 1], is_dropped)
        mtp_loss = self.head_loss(z, targets[:, 1:])
        return next_token_loss + self.config.mtp_weight * mtp_loss, next_token_loss.detach()


def draw_dropped(config: Config, replay: bool, step: int, micro_step: int) -> set[int]:
    """Stochastic depth (arXiv 1603.09382): the calls whose block a micro-step skips, on all virtual ranks.

    The block of layer i is skipped with probability stochastic_depth * i / (L - 1), drawn for every call; the MTP
    block counts as layer L.
    """
    if not config.stochastic_depth:
        return set()
    layers = np.array([*config.layer_order(replay), config.n_layer])  # by call; the last is the MTP block
    probability = config.stochastic_depth * layers / (config.n_layer - 1)
    draws = np.random.default_rng((config.seed, step, micro_step)).random(len(layers))
    return set(np.flatnonzero(draws < probability).tolist())


def flops_per_token(config: Config, replay: bool) -> float:
    """Floating-point operations of forward and backward per token: matrix products and attention."""
    C, T, L = config.n_embd, config.sequence_len, config.n_layer
    layers = config.layer_order(replay)
    per_block = 4 * C * C + config.mlp_elements
    projections = sum(config.has_value_embedding(i) for i in range(L)) * (config.value_embedding == "projection")
    windows = [config.window(i) for i in layers]
    keys = sum(w - w * w / (2 * T) for w in windows)  # that the average position attends to, over all layers
    elements = per_block * len(layers) + projections * C * C + C * config.padded_vocab
    if config.mtp_weight:  # a block with a full window, a projection, and the head again
        elements += per_block + 2 * C * C + C * config.padded_vocab
        keys += T / 2
    return 6 * elements + 12 * C * keys
