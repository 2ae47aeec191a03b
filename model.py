"""The GPT of the limited track: parameters, their initialisation, and the forward pass.

    model = GPT(GPTConfig(n_layer=6, n_head=2, n_embd=128, sequence_len=256, replay_start=3, replay_end=5))
    model.init_weights()
    losses = model.token_losses(tokens, targets)      # (B, T) int64 -> (B, T) float32, nats

Modules only own parameters, the float32 "masters". The forward pass is a chain of plain functions that read *compute
weights*: the masters after all that depends on weights alone, which is mixing the heads, stacking q, k and v (gate and
up) into one matrix, and rounding to bfloat16. Training makes these once per optimizer step (ComputeWeights) rather than
once per micro-step; without them the model makes them on the fly, differentiably.

Notation: B sequences, T positions, C = n_embd, H = n_head, D = C / H, V = vocab_size, L = n_layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slowrun.machine import has_bfloat16

Weights = dict[str, dict[str, Tensor]]  # compute weights by unit ("io", "h.0", ..., "mtp_block") and name


def require(ok: bool, message: str) -> None:
    """For what a user can get wrong."""
    if not ok:
        raise ValueError(message)


# ======================================================================================================================
# Config
# ======================================================================================================================


@dataclass(frozen=True)
class GPTConfig:
    """What the model is. The defaults are the current record of the limited track, 1.4B parameters."""

    vocab_size: int = 50257  # token ids of the data; the tables have this rounded up to a multiple of 64
    sequence_len: int = 2048  # tokens in a training or validation sequence
    n_layer: int = 30  # transformer blocks; even if there is a U-Net, which pairs them
    n_head: int = 14  # attention heads
    n_embd: int = 1792  # width of the residual stream
    window_pattern: str = "SSSL"  # attention windows by layer, repeated: S = T/2, L = T; the last layer is always L
    logit_cap: float = 10.0  # soft cap of the logits, cap * tanh(logits / cap)
    mtp_weight: float = 0.3  # weight of the loss on the token after next (0: no such block)
    dropout: float = 0.05  # on the outputs of attention and MLP
    stochastic_depth: float = 0.0  # probability that the last layer is dropped; linear in the layer, 0 at the first
    replay_start: int = 15  # first layer that layer replay repeats; in the decoder, the second half of the layers
    replay_end: int = 21  # one past the last layer that layer replay repeats
    replay_loops: int = 2  # how often layer replay repeats them
    mlp: Literal["swiglu", "relu2"] = "swiglu"  # relu2: squared ReLU, of width 4C, as before record 4
    value_embedding: Literal["projection", "table"] = "projection"  # table: looked up by token, as before record 3
    u_net: bool = True  # skips from the first half of the layers to the second
    head_gates: bool = True  # a gate on the output of each attention head
    head_mixes: bool = True  # interleaved head attention
    exclusive: bool = False  # exclusive self-attention, as in records 9 and 10
    proj_init: Literal["normal", "zero"] = "normal"  # how every c_proj starts

    def __post_init__(self):
        check_model(self)

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // 64) * 64

    @property
    def hidden(self) -> int:
        """Width of the MLP: 4C, or for SwiGLU, which has a matrix more, 8/3 C rounded up to a multiple of 256."""
        return 4 * self.n_embd if self.mlp == "relu2" else -(-(8 * self.n_embd // 3) // 256) * 256

    @property
    def mlp_elements(self) -> int:
        """Elements of the MLP's matrices."""
        return (2 if self.mlp == "relu2" else 3) * self.n_embd * self.hidden

    def window(self, i: int) -> int:
        """How many positions back layer i attends, besides its own."""
        short = self.window_pattern[i % len(self.window_pattern)] == "S" and i < self.n_layer - 1
        return self.sequence_len // 2 if short else self.sequence_len

    def has_value_embedding(self, i: int) -> bool:
        return i % 2 == (self.n_layer - 1) % 2

    def layer_order(self, replay: bool) -> list[int]:
        """Layers in the order in which they run, replayed ones repeated."""
        replayed = list(range(self.replay_start, self.replay_end)) * (self.replay_loops if replay else 0)
        return [*range(self.replay_end), *replayed, *range(self.replay_end, self.n_layer)]


def check_model(c: GPTConfig) -> None:
    """Refuse sizes that do not go together (ValueError)."""
    sizes = {name: getattr(c, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    require(min(sizes.values()) > 0 and c.replay_loops >= 0, f"sizes must be positive: {sizes}")
    require(c.sequence_len >= 4, f"sequence_len {c.sequence_len} is too short: at least 4 are needed")
    require(
        c.n_embd % (2 * c.n_head) == 0,
        f"n_embd {c.n_embd} / n_head {c.n_head} = {c.n_embd / c.n_head:g}: a head needs an even number "
        "of dimensions, change --n-embd or --n-head",
    )
    require(c.n_embd >= 32, f"n_embd {c.n_embd} is too small: gates read the first 32 dimensions")
    paired = c.n_layer % 2 == 0 or not c.u_net
    require(paired, f"n_layer {c.n_layer} is odd: the U-Net pairs layers, change --n-layer, or give --no-u-net")
    letters = set(c.window_pattern)
    require(letters and letters <= set("SL"), f"window_pattern {c.window_pattern!r} must be of letters S and L")
    require(
        c.n_layer // 2 <= c.replay_start < c.replay_end <= c.n_layer,
        f"replay range [{c.replay_start}, {c.replay_end}) is not inside the decoder, layers "
        f"{c.n_layer // 2} to {c.n_layer - 1}: change --replay-start and --replay-end",
    )
    for name in ("dropout", "stochastic_depth"):
        require(0 <= getattr(c, name) < 1, f"{name} {getattr(c, name)} is not in [0, 1)")
    require(c.logit_cap > 0 and c.mtp_weight >= 0, "logit_cap must be positive, mtp_weight not negative")


# ======================================================================================================================
# Functions of the forward pass
# ======================================================================================================================


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without learned gain (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


_DROPOUT = f"slowrun_{__name__.replace('.', '_')}::dropout"  # each module needs its own name


@torch.library.custom_op(_DROPOUT, mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return torch.native_dropout(x, p, True)


@_dropout.register_fake
def _dropout_fake(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


def _dropout_setup(ctx, inputs, output) -> None:
    ctx.p = inputs[1]
    ctx.save_for_backward(output[1])


@partial(_dropout.register_autograd, setup_context=_dropout_setup)
def _dropout_backward(ctx, grad, _):
    return grad * ctx.saved_tensors[0] * (1 / (1 - ctx.p)), None


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout (arXiv 1207.0580); the identity for p = 0.

    An operator of its own: compiled graphs then call ATen's kernel and draw the same numbers as the uncompiled model.
    Inductor's replacement can corrupt masks in torch 2.13 (pytorch issue 198333).
    """
    return _dropout(x, p)[0] if p else x


def rotary_tables(length: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin of the rotary embedding, base 10000 (arXiv 2104.09864) -> 2 x (length, 1, D / 2), float32 or wider."""
    dtype = torch.promote_types(dtype, torch.float32)
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim)
    angles = torch.arange(length, device=device, dtype=dtype)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, T, H, D), its halves the two coordinates of the rotated planes -> (B, T, H, D), float32 or wider."""
    cos, sin = rotary
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, backend: str) -> Tensor:
    """Causal attention, scale 1 / sqrt(D), position t sees t - window ... t: 3 x (B, T, H, D) -> (B, T, H, D).

    backend: "varlen" is the flash attention that torch carries (CUDA, compute capability 8.0 or newer, bfloat16),
    "sdpa" is F.scaled_dot_product_attention, with a mask where the window is shorter than the sequence.
    """
    B, T, H, D = q.shape
    everything = window >= T - 1
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn  # takes a second to import

        borders = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
        # contiguous, because the operator promises the compiler outputs and gradients laid out like its inputs
        q, k, v = (t.reshape(B * T, H, D).contiguous() for t in (q, k, v))
        left = -1 if everything else window
        return varlen_attn(q, k, v, borders, borders, T, T, window_size=(left, 0)).view(B, T, H, D)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if everything:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    position = torch.arange(T, device=q.device)
    distance = position[:, None] - position
    mask = (distance >= 0) & (distance <= window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def exclude_own_value(y: Tensor, v: Tensor, strength: Tensor | float) -> Tensor:
    """Exclusive self-attention (arXiv 2603.09078): y loses a share of its part along the position's own value.

    y, v (B, T, H, D), strength: that share, one number or (H, 1) float32 or wider -> (B, T, H, D).
    """
    unit = F.normalize(v, dim=-1, eps=1e-4)
    along = (y * unit).sum(-1, keepdim=True) * unit
    return (y - strength * along).to(y.dtype)


def attention(w, x: Tensor, ve: Tensor | None, rotary, *, n_head: int, exclusive: bool, **settings) -> Tensor:
    """x (B, T, C), value embedding ve (B, T, C) or None -> (B, T, C)."""
    B, T, C = x.shape
    q, k, v = (t.view(B, T, n_head, C // n_head) for t in F.linear(x, w["qkv"]).chunk(3, dim=-1))
    if ve is not None:  # value residual (arXiv 2410.17897) with a gate per head, at first 2 * sigmoid(0) = 1
        v = v + 2 * torch.sigmoid(F.linear(x[..., :32], w["ve_gate"])).unsqueeze(-1) * ve.view_as(v)
    q, k = norm(rotate(q, rotary)).to(v.dtype), norm(rotate(k, rotary)).to(v.dtype)
    y = attend(q, k, v, **settings)
    if exclusive:
        y = exclude_own_value(y, v, 1.0)
    if "attn_gate" in w:  # head gates (arXiv 2505.06708)
        y = y * torch.sigmoid(F.linear(x[..., :12], w["attn_gate"])).unsqueeze(-1)
    return F.linear(y.reshape(B, T, C), w["attn_proj"])


def mlp(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """SwiGLU (arXiv 2002.05202), or without a gate squared ReLU (arXiv 2109.08668): (B, T, C) -> (B, T, C)."""
    if "gate_up" in w:
        gate, up = F.linear(x, w["gate_up"]).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    else:
        hidden = F.relu(F.linear(x, w["up"])).square()
    return F.linear(hidden, w["mlp_proj"])


def block(w: dict[str, Tensor], x: Tensor, ve: Tensor | None, rotary, *, dropout_p: float, **settings) -> Tensor:
    """Attention and MLP, each on the normed stream and added to it: (B, T, C) -> (B, T, C)."""
    x = x + dropout(attention(w, norm(x), ve, rotary, **settings), dropout_p)
    return x + dropout(mlp(w, norm(x)), dropout_p)


def layer(w: dict[str, Tensor], x: Tensor, x0: Tensor, skip, lambdas, ve, rotary, *, dropped: bool, **settings):
    """A block of the trunk and the mixture before it; all streams are (B, T, C).

    skip: the encoder output that a decoder layer adds (U-Net, arXiv 1505.04597), or None. lambdas: the scalar weights
    of skip, x and x0. Of a layer dropped by stochastic depth the mixture remains.
    """
    skip_weight, resid_lambda, x0_lambda = lambdas
    if skip is not None:
        x = x + skip_weight * skip
    x = resid_lambda * x + x0_lambda * x0
    return x if dropped else block(w, x, ve, rotary, **settings)


def value_embedding(w: dict[str, Tensor], i: int, tokens: Tensor, x0: Tensor) -> Tensor:
    """What is added to the values of layer i, by tokens (B, T) or their embedding x0 (B, T, C) -> (B, T, C)."""
    return F.linear(x0, w[f"ve_proj.{i}"]) if f"ve_proj.{i}" in w else F.embedding(tokens, w[f"ve_table.{i}"])


def mtp_layer(w: dict[str, Tensor], z: Tensor, rotary, *, dropped: bool, **settings) -> Tensor:
    """The block behind the prediction of the token after next: (B, T - 1, C) -> (B, T - 1, C), normed."""
    return norm(z if dropped else block(w, z, None, rotary, **settings))


def capped_logits(x: Tensor, lm_head: Tensor, vocab_size: int, cap: float) -> Tensor:
    """x (..., C) -> soft-capped logits (..., V), float32 or wider (arXiv 2408.00118)."""
    logits = F.linear(x, lm_head)[..., :vocab_size]
    return cap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap)


def cross_entropy(x: Tensor, lm_head: Tensor, targets: Tensor, vocab_size: int, cap: float) -> Tensor:
    """x (B, T, C), targets (B, T) int64 -> (B, T) float32 or wider, nats."""
    logits = capped_logits(x, lm_head, vocab_size, cap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


CHUNK = 4096  # positions whose logits exist at a time in training on a GPU: enough to keep it busy
CHUNK_ON_CPU = 128  # the same on a CPU: few enough to stay in its caches


def capped_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, vocab_size: int, cap: float):
    """Loss of n positions with K targets each, and its gradient by the logits before their soft cap.

    logits (n, padded V), targets (n, K) int64 (negative: none), weights (K,) float32 or wider -> the sum of weight *
    nats over positions and targets, that of the first targets' nats, both () float32 or wider, and the gradient of the
    former (n, padded V) in the logits' dtype, rounded once. Columns from vocab_size on take no part.
    """
    bent = torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap)
    capped = cap * bent
    capped[:, vocab_size:] = -torch.inf
    log_probs, slope = capped.log_softmax(-1), 1 - bent.square()
    index, shares = targets.clamp_min(0), weights * (targets >= 0)
    nats, total = -log_probs.gather(1, index), shares.sum(1, keepdim=True)
    grad = (total * log_probs.exp() * slope).to(logits.dtype)
    # Where the targets are, the difference is made before it is rounded; a token may be a target more than once.
    wanted = (shares[:, None] * (index[:, :, None] == index[:, None])).sum(-1)
    at_targets = (total * (-nats).exp() - wanted) * slope.gather(1, index)
    grad = grad.scatter(1, index, at_targets.to(grad.dtype))
    return (shares * nats).sum(), (nats * (targets >= 0))[:, 0].sum(), grad


def head_chunk(x: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, vocab_size: int, cap: float):
    """x (n, C), lm_head (padded V, C) -> the losses of capped_cross_entropy, their gradients by x and by lm_head."""
    loss, first_loss, grad = capped_cross_entropy(F.linear(x, lm_head), targets, weights, vocab_size, cap)
    return loss, first_loss, grad @ lm_head, grad.T @ x


class HeadLoss(torch.autograd.Function):
    """The head and the loss behind it, in chunks of positions whose gradients are made in the forward pass.

    Autograd would keep the logits, and float32 copies of them, of all positions until the backward pass. So only a
    chunk's exist at a time, and what is kept is the gradients, of x and, summed in float32, of the head.
    """

    @staticmethod
    def forward(ctx, x: Tensor, lm_head: Tensor, chunk, *others: Tensor):
        """x (n, C), others (n, ...) what else a position needs, such as its targets.

        chunk: (x, lm_head, *others) of some positions -> as head_chunk.
        -> (Weighted sum of the losses, sum of the first targets' losses), both (); only the former has a gradient.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        losses, x_grad = torch.zeros(2, dtype=wide, device=x.device), torch.empty_like(x)
        lm_head_grad = torch.zeros_like(lm_head, dtype=wide)
        size = CHUNK_ON_CPU if x.device.type == "cpu" else CHUNK
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            *parts, x_grad[rows], lm_head_part = chunk(x[rows], lm_head, *(other[rows] for other in others))
            losses += torch.stack(parts)
            lm_head_grad += lm_head_part
        ctx.save_for_backward(x_grad, lm_head_grad.to(lm_head.dtype))
        loss, first_loss = losses.unbind()
        ctx.mark_non_differentiable(first_loss)
        return loss, first_loss

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        x_grad, lm_head_grad = ctx.saved_tensors
        return x_grad * grad, lm_head_grad * grad, *(None for _ in ctx.needs_input_grad[2:])


def draw_dropped(config: GPTConfig, replay: bool, *seed: int) -> list[bool] | None:
    """Stochastic depth (arXiv 1603.09382): a flag per call of a block, the MTP block's last; None if it is off.

    Layer i is dropped with probability stochastic_depth * i / (L - 1), the MTP block as if it were layer L. The draw
    depends on `seed` (the run's seed, step, micro-step) alone, so it is the same in all processes.
    """
    if not config.stochastic_depth:
        return None
    layers = np.array([*config.layer_order(replay), config.n_layer])
    chance = config.stochastic_depth * layers / (config.n_layer - 1)
    return (np.random.default_rng(seed).random(len(layers)) < chance).tolist()


# ======================================================================================================================
# Parameters
# ======================================================================================================================


class Attention(nn.Module):
    """Parameters of an attention layer."""

    def __init__(self, config: GPTConfig, value_embedding: bool):
        super().__init__()
        C, H = config.n_embd, config.n_head
        self.c_q, self.c_k, self.c_v, self.c_proj = (nn.Linear(C, C, bias=False) for _ in range(4))
        mixes = (nn.Parameter(torch.empty(H, H)) if config.head_mixes else None for _ in range(3))
        self.q_mix, self.k_mix, self.v_mix = mixes
        self.attn_gate = nn.Linear(12, H, bias=False) if config.head_gates else None
        self.ve_gate = nn.Linear(32, H, bias=False) if value_embedding else None


class MLP(nn.Module):
    """Parameters of an MLP."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.hidden, bias=False) if config.mlp == "swiglu" else None
        self.c_fc = nn.Linear(config.n_embd, config.hidden, bias=False)
        self.c_proj = nn.Linear(config.hidden, config.n_embd, bias=False)


class Block(nn.Module):
    """Parameters of a transformer block."""

    def __init__(self, config: GPTConfig, value_embedding: bool):
        super().__init__()
        self.attn = Attention(config, value_embedding)
        self.mlp = MLP(config)

    def sources(self) -> dict[str, list[tuple[nn.Parameter, nn.Parameter | None]]]:
        """What each compute weight is made of: matrices, stacked by rows, each with the mix of its heads or None."""
        attn, mlp = self.attn, self.mlp
        sources = {
            "qkv": [(attn.c_q.weight, attn.q_mix), (attn.c_k.weight, attn.k_mix), (attn.c_v.weight, attn.v_mix)],
            "attn_proj": [(attn.c_proj.weight, None)],
            "mlp_proj": [(mlp.c_proj.weight, None)],
        }
        if mlp.c_gate is None:
            sources["up"] = [(mlp.c_fc.weight, None)]
        else:
            sources["gate_up"] = [(mlp.c_gate.weight, None), (mlp.c_fc.weight, None)]
        gates = {"attn_gate": attn.attn_gate, "ve_gate": attn.ve_gate}
        return sources | {name: [(gate.weight, None)] for name, gate in gates.items() if gate is not None}


def mix_heads(weight: Tensor, mix: Tensor | None) -> Tensor:
    """Interleaved Head Attention (arXiv 2602.21371): W_mixed[h] = sum_m mix[h, m] W[m], W[m] the D rows of head m."""
    return weight if mix is None else (mix @ weight.view(mix.size(1), -1)).view_as(weight)


def take_gradient(total: Tensor, leaf: Tensor) -> None:
    """Add a leaf's gradient to a sum and drop it, as soon as it is there (a hook).

    The sum may be of a wider dtype; a .grad of another dtype than its tensor's, grad_dtype, cannot be compiled.
    """
    total.add_(leaf.grad)
    leaf.grad = None


class ComputeWeights:
    """The weights that the forward pass reads, made from the masters once per optimizer step.

    `tensors` are leaves of the compute dtype. Their gradients are summed, float32 or wider, over any number of backward
    passes. `refresh` makes them from the masters. `pull_back` adds the sums to the masters' `.grad`, by the transposed
    map, and clears them. The map is linear in the matrices and in the mixes, so one `pull_back` serves all backward
    passes since the last `refresh`.
    """

    def __init__(self, model: GPT, dtype: torch.dtype, requires_grad: bool = True):
        self.sources, self.tensors, self.sums = model.sources(), {}, {}
        for unit, weights in self.sources.items():
            self.tensors[unit] = {}
            for name, parts in weights.items():
                master = parts[0][0]
                shape = (sum(part.size(0) for part, _ in parts), *master.shape[1:])
                leaf_dtype = dtype if master.ndim == 2 else master.dtype  # the lambdas are kept as they are
                leaf = torch.zeros(shape, dtype=leaf_dtype, device=master.device, requires_grad=requires_grad)
                self.tensors[unit][name] = leaf
                if requires_grad:
                    self.sums[leaf] = torch.zeros_like(leaf, dtype=torch.promote_types(leaf_dtype, torch.float32))
                    # not a method: the garbage collector does not see a cycle through a hook, and would free nothing
                    leaf.register_post_accumulate_grad_hook(partial(take_gradient, self.sums[leaf]))

    def _rows(self):
        """Every master, its mix, and the rows of the compute weight that it fills."""
        for unit, weights in self.sources.items():
            for name, parts in weights.items():
                row = 0
                for master, mix in parts:
                    yield master, mix, self.tensors[unit][name], slice(row, row := row + master.size(0))

    @torch.no_grad()
    def refresh(self) -> None:
        for master, mix, leaf, rows in self._rows():
            leaf[rows].copy_(mix_heads(master, mix))

    @torch.no_grad()
    def pull_back(self) -> None:
        for master, mix, leaf, rows in self._rows():
            grad = self.sums[leaf][rows]
            if mix is None:
                master.grad.add_(grad)
            else:
                heads = mix.size(0)
                master.grad.add_((mix.T @ grad.view(heads, -1)).view_as(master))
                mix.grad.add_(grad.view(heads, -1) @ master.view(heads, -1).T)
        self.clear_gradients()

    def clear_gradients(self) -> None:
        for gradient in self.sums.values():
            gradient.zero_()


# ======================================================================================================================
# GPT
# ======================================================================================================================


class GPT(nn.Module):
    """Decoder-only transformer with U-Net skips, value embeddings, mixed and gated heads, layer replay and MTP.

    What the config leaves out has no parameters, and so no compute weights: the forward pass uses what is there.
    """

    def __init__(self, config: GPTConfig, attention: str = "sdpa"):
        super().__init__()
        self.config, self.backend, L, C = config, attention, config.n_layer, config.n_embd
        with_ve = [i for i in range(L) if config.has_value_embedding(i)]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab, C),
                "h": nn.ModuleList(Block(config, i in with_ve) for i in range(L)),
            }
        )
        self.lm_head = nn.Linear(C, config.padded_vocab, bias=False)
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.empty(L)), nn.Parameter(torch.empty(L))
        self.skip_weights = nn.Parameter(torch.empty(L // 2)) if config.u_net else None
        self.ve_projs, self.ve_tables = nn.ModuleDict(), nn.ModuleDict()
        for i in map(str, with_ve):
            if config.value_embedding == "projection":
                self.ve_projs[i] = nn.Linear(C, C, bias=False)
            else:
                self.ve_tables[i] = nn.Embedding(config.padded_vocab, C)
        if config.mtp_weight:
            self.mtp_proj = nn.Linear(2 * C, C, bias=False)
            self.mtp_block = Block(config, value_embedding=False)
        self._layer, self._mtp_layer = layer, mtp_layer
        self._cross_entropy, self._head_chunk = cross_entropy, head_chunk
        self._rotary: dict[tuple, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter, drawing from torch's default generator for the parameters' device."""
        C = self.config.n_embd
        for name, p in self.named_parameters():
            kind = "ve" if name.startswith(("ve_projs.", "ve_tables.")) else name.removesuffix(".weight").split(".")[-1]
            if kind == "wte":
                p.normal_()
            elif kind == "lm_head":
                p.normal_(std=0.001)
            elif kind in ("c_q", "c_k", "c_v", "c_gate", "c_fc", "ve", "mtp_proj"):
                p.uniform_(-math.sqrt(3 / C), math.sqrt(3 / C))
            elif kind == "c_proj" and self.config.proj_init == "normal":
                p.normal_(std=1 / math.sqrt(C))
            elif kind in ("ve_gate", "attn_gate", "c_proj"):
                p.zero_()
            elif kind in ("q_mix", "k_mix", "v_mix"):
                p.copy_(torch.eye(p.size(0)))
            else:
                p.fill_({"resid_lambdas": 1.0, "x0_lambdas": 0.1, "skip_weights": 1.0}[kind])

    def compile_layers(self) -> None:
        """Compile per layer: layers of a kind share one graph, and gradients become available during backward."""
        functions = (layer, mtp_layer, cross_entropy, head_chunk)
        self._layer, self._mtp_layer, self._cross_entropy, self._head_chunk = (
            torch.compile(function, dynamic=False, fullgraph=True) for function in functions
        )

    def sources(self) -> dict[str, dict[str, list[tuple[nn.Parameter, nn.Parameter | None]]]]:
        """What every compute weight is made of, by unit; see Block.sources."""
        io = {name: [(p, None)] for name, p in self.named_parameters(recurse=False)}
        io |= {"wte": [(self.transformer.wte.weight, None)], "lm_head": [(self.lm_head.weight, None)]}
        io |= {f"ve_proj.{i}": [(projection.weight, None)] for i, projection in self.ve_projs.items()}
        io |= {f"ve_table.{i}": [(table.weight, None)] for i, table in self.ve_tables.items()}
        units = {"io": io} | {f"h.{i}": h.sources() for i, h in enumerate(self.transformer.h)}
        if self.config.mtp_weight:
            io["mtp_proj"] = [(self.mtp_proj.weight, None)]
            units["mtp_block"] = self.mtp_block.sources()
        return units

    def weights(self) -> Weights:
        """Compute weights made on the fly: in the masters' dtype, differentiable with respect to them."""
        return {
            unit: {name: torch.cat([mix_heads(*part) for part in parts]) for name, parts in weights.items()}
            for unit, weights in self.sources().items()
        }

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """The tables for `length` positions, made once per device and dtype."""
        where, config = (self.x0_lambdas.device, self.x0_lambdas.dtype), self.config
        if where not in self._rotary:
            self._rotary[where] = rotary_tables(config.sequence_len, config.n_embd // config.n_head, *where)
        cos, sin = self._rotary[where]
        return cos[:length], sin[:length]

    def _settings(self, window: int) -> dict:
        settings = {"window": window, "exclusive": self.config.exclusive, "backend": self.backend}
        return settings | {"n_head": self.config.n_head, "dropout_p": self.config.dropout if self.training else 0.0}

    def trunk(self, w: Weights, tokens: Tensor, replay: bool = False, dropped: list[bool] | None = None) -> Tensor:
        """tokens (B, T) int64 -> final normed stream (B, T, C). dropped: a flag per layer call, see draw_dropped."""
        config, io, E = self.config, w["io"], self.config.n_layer // 2
        x = x0 = norm(F.embedding(tokens, io["wte"]))
        rotary = self.rotary(tokens.size(1))
        resid, from_x0 = io["resid_lambdas"].unbind(), io["x0_lambdas"].unbind()
        skips = io["skip_weights"].unbind() if config.u_net else ()
        encoded: list[Tensor] = []
        ve: dict[int, Tensor] = {}  # value embeddings, which a replayed layer shares with its first run
        for call, i in enumerate(config.layer_order(replay)):
            if config.has_value_embedding(i) and i not in ve:
                ve[i] = value_embedding(io, i, tokens, x0)
            skip, skip_weight = (encoded[config.n_layer - 1 - i], skips[i - E]) if skips and i >= E else (None, None)
            lambdas, is_dropped = (skip_weight, resid[i], from_x0[i]), dropped is not None and dropped[call]
            settings = self._settings(config.window(i))
            x = self._layer(w[f"h.{i}"], x, x0, skip, lambdas, ve.get(i), rotary, dropped=is_dropped, **settings)
            if i < E:
                encoded.append(x)
        return norm(x)

    def training_loss(self, tokens: Tensor, targets: Tensor, w: Weights | None = None, *, replay=False, dropped=None):
        """Mean next-token loss plus mtp_weight times that of the token after next (one extra block, arXiv 2412.19437).

        tokens, targets (B, T) int64 -> (this sum, the next-token loss), both () float32 or wider, nats per token.
        """
        config, w = self.config, w or self.weights()
        x = self.trunk(w, tokens, replay, dropped)
        lm_loss = self.head_loss(w, x, targets)
        if not config.mtp_weight:
            return lm_loss, lm_loss
        return lm_loss + config.mtp_weight * self.mtp_loss(w, x, targets, dropped), lm_loss

    def mtp_loss(self, w: Weights, x: Tensor, targets: Tensor, dropped: list[bool] | None) -> Tensor:
        """Mean loss on the token after next: final stream x (B, T, C), targets (B, T) -> (), nats per token."""
        next_embedding = norm(F.embedding(targets[:, :-1], w["io"]["wte"]))
        z = F.linear(torch.cat([x[:, :-1], next_embedding], dim=-1), w["io"]["mtp_proj"])  # of (B, T - 1, 2 C)
        is_dropped, settings = dropped is not None and dropped[-1], self._settings(self.config.sequence_len)
        z = self._mtp_layer(w["mtp_block"], z, self.rotary(z.size(1)), dropped=is_dropped, **settings)
        return self.head_loss(w, z, targets[:, 1:])

    def head_loss(self, w: Weights, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, as a part of the training loss: x (B, T, C), targets (B, T) -> (), nats per token."""
        settings = {"vocab_size": self.config.vocab_size, "cap": self.config.logit_cap}
        weights = torch.ones(1, dtype=self.x0_lambdas.dtype, device=x.device)
        chunk = partial(self._head_chunk, weights=weights, **settings)
        return HeadLoss.apply(x.flatten(0, 1), w["io"]["lm_head"], chunk, targets.reshape(-1, 1))[0] / targets.numel()

    def token_losses(self, tokens: Tensor, targets: Tensor, w: Weights | None = None, **how) -> Tensor:
        """Next-token cross-entropy, not reduced: tokens, targets (B, T) int64 -> (B, T) float32 or wider, nats."""
        w = w or self.weights()
        x = self.trunk(w, tokens, **how)
        return self._cross_entropy(x, w["io"]["lm_head"], targets, self.config.vocab_size, self.config.logit_cap)

    def log_probs(self, tokens: Tensor, w: Weights | None = None, **how) -> Tensor:
        """tokens (B, T) int64 -> log-probabilities of the next token (B, T, V), float32 or wider."""
        w = w or self.weights()
        x = self.trunk(w, tokens, **how)
        return capped_logits(x, w["io"]["lm_head"], self.config.vocab_size, self.config.logit_cap).log_softmax(-1)


def build(config: GPTConfig, device: torch.device, dtype: torch.dtype, **kernels: str) -> GPT:
    """A model for a device, its parameters not filled yet: float32 or wider, embeddings of the compute dtype."""
    with torch.device("meta"):
        model = GPT(config, **kernels).to(torch.promote_types(dtype, torch.float32))
        for table in (model.transformer.wte, model.ve_tables):
            table.to(dtype)
    return model.to_empty(device=device)


# ======================================================================================================================
# The model on a machine: operations, memory, attention
# ======================================================================================================================


def choose_attention(wanted: str, config: GPTConfig, device: torch.device, dtype: torch.dtype) -> str:
    """A backend of `attend`: varlen where it runs, else sdpa; ValueError if varlen is wanted and does not run."""
    D = config.n_embd // config.n_head
    able = has_bfloat16(device) and dtype == torch.bfloat16 and D <= 256 and D % 8 == 0
    needs = "a GPU of compute capability 8.0, bfloat16, and heads of 8, 16, ... 256 channels"
    require(able or wanted != "varlen", f"--attention varlen needs {needs}")
    return wanted if wanted != "auto" else "varlen" if able else "sdpa"


def attention_error(config: GPTConfig, device: torch.device, backend: str) -> float:
    """Largest error of a backend in bfloat16, of its output and gradients on random q, k, v in the model's windows.

    The reference is sdpa in float32; an error is relative to the largest value.
    """
    generator, worst = torch.Generator(device).manual_seed(0), 0.0
    shape = (4, 2, config.sequence_len, config.n_head, config.n_embd // config.n_head)
    *qkv, weight = torch.randn(shape, generator=generator, device=device).bfloat16()
    for window in {config.window(i) for i in range(config.n_layer)}:
        results = []
        for name, dtype in ((backend, torch.bfloat16), ("sdpa", torch.float32)):
            inputs = [t.to(dtype).requires_grad_() for t in qkv]
            output = attend(*inputs, window, name)
            results.append([output, *torch.autograd.grad(output, inputs, weight.to(dtype))])
        for found, expected in zip(*results, strict=True):
            worst = max(worst, ((found.float() - expected).abs().max() / expected.abs().max()).item())
    return worst


def flops_per_token(config: GPTConfig, replay: bool) -> float:
    """Floating-point operations of forward and backward per token: matrix products and attention, replays counted."""
    C, T, order = config.n_embd, config.sequence_len, config.layer_order(replay)
    per_block = 4 * C * C + config.mlp_elements  # elements of its matrices
    projections = sum(map(config.has_value_embedding, range(config.n_layer))) * (config.value_embedding == "projection")
    weights = per_block * len(order) + C * C * projections
    keys = sum(w - w * w / (2 * T) for w in map(config.window, order))  # that the average position attends to
    heads = 1
    if config.mtp_weight:
        weights, keys, heads = weights + per_block + 2 * C * C, keys + T / 2, 2
    return 6 * (weights + heads * C * config.padded_vocab) + 12 * C * keys
