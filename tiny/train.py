"""The tiny track of NanoGPT Slowrun: the lowest validation loss from 100M tokens of FineWeb in 15 minutes on 8xH100.

    python prepare_data.py                                    # once: writes fineweb_data/
    torchrun --standalone --nproc_per_node=8 tiny/train.py    # the current record; published: 3.295 in 14.2 minutes
    python tiny/train.py --resume runs/<name>                 # continue a run that was stopped or killed
    python tiny/train.py --list-records                       # the records before it; --record N trains one
    python tiny/train.py --demo                               # toy sizes (after prepare_data.py --source demo)

This file is the whole experiment, in reading order: Config, Model, Optimizer, Schedules, Data order, Training step,
Readout, main. What no record may change (the score, the clock, the run folder) is in slowrun/, and so is the plumbing
(processes, flags, checkpoints, communication).

A batch is always split over 8 virtual ranks, and a process computes 8 / world_size of them, so 1, 2, 4 and 8 processes
compute the same run.

Notation in shapes: B sequences, T positions, C = n_embd, H = n_head, D = C / H, L = n_layer, V = vocab_size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(next(p for p in Path(__file__).resolve().parents if (p / "slowrun").is_dir())))

from slowrun.config import RunConfig, demo_of_record, require_at_least
from slowrun.data import Loader, Split, shuffled_documents, shuffled_micro_steps
from slowrun.folder import finished_run, load_weights
from slowrun.kernels import (
    CHUNK,
    HeadLoss,
    Kernel,
    attend,
    attention_error,
    capped_cross_entropy,
    check_kernels,
    choose_attention,
    dropout,
    fp8_product,
    slower_kernels,
    soft_cap,
    to_fp8,
)
from slowrun.machine import compute_dtype
from slowrun.plan import Sizes, Stage, StepPlan, stages_of
from slowrun.session import Session, launch, name_of
from slowrun.sharded import Bucket, Shards
from slowrun.weights import ComputeWeights, compute_weights
from slowrun.world import VIRTUAL_RANKS, World, seed_of

# ======================================================================================================================
# Config
# ======================================================================================================================


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The experiment. The defaults are the current record, and every field is a flag: n_layer is --n-layer."""

    # Model
    vocab_size: int = 50257  # token ids in the data, V
    sequence_len: int = 2048  # tokens per sequence, T
    n_layer: int = 16  # transformer blocks, L; even, because the U-Net pairs them
    n_head: int = 8  # attention heads, H
    n_embd: int = 1024  # width of the residual stream, C
    window_pattern: str = "SSSL"  # attention window by layer, repeated: S is T/2, L is T; the last layer is always L
    logit_cap: float = 15.0  # logits are soft-capped to cap * tanh(logits / cap)
    dropout: float = 0.1  # dropout probability on the output of attention
    resid_init: float = 1.1  # initial value of resid_lambdas
    late_passes: int = 2  # passes through all layers late in training, and in the readout; 1 for no recurrence
    late_passes_from: float = 0.7  # fraction of the steps after which training runs late_passes

    # Batch and length
    num_epochs: int = 15  # passes over the training data
    batch_tokens: int = 524288  # tokens per optimizer step
    micro_batch: int = 32  # sequences per micro-step of one virtual rank
    device_batch: int = 0  # sequences per forward pass; fewer save memory, same mathematics; 0 for as many as possible
    eval_batch: int = 8  # sequences per forward pass in validation, per process
    time_cap_min: float = 15.0  # minutes of training time; 0 lifts the cap, and the run is not eligible
    seed: int = 42  # seed of initial weights and dropout; the order of the data does not depend on it

    # Optimizer
    lr_multiplier: float = 0.8  # factor on all the learning rates below
    matrix_lr: float = 0.04  # Muon, all matrices not named below
    embedding_lr: float = 0.15  # AdamW, wte
    head_lr: float = 0.001  # AdamW, lm_head
    scalar_lr: float = 0.25  # AdamW, x0_lambdas, attn_gate and xsa_alphas; resid_lambdas and skip_weights get 1% of it
    weight_decay: float = 0.8  # initial weight decay of matrices, wte and lm_head
    meta_step: float = 0.5  # length of the meta-gradient's step, over all the matrices it moves

    # Schedules
    warmdown: float = 0.4  # fraction of the steps over which the learning rate falls to 0 at the end
    swa_epochs: int = 4  # last epochs, each with one cycle of the learning rate; 0 for none
    decay_hold_epochs: int = 2  # epochs with the initial weight decay
    decay_low_epochs: int = 8  # epochs until the weight decay is at its lowest
    decay_low: float = 0.1  # weight decay after decay_low_epochs
    decay_end: float = 0.93  # weight decay at the end of training
    mtp_weight_1: float = 0.5  # initial weight of the loss on the token after next
    mtp_weight_2: float = 0.25  # initial weight of the loss on the token after that
    mtp_until: float = 0.66  # fraction of the steps after which only the next token counts

    # Readout
    readout_epochs: int = 4  # last epochs whose final weights are averaged, with weights 1:2:3:4
    ema_every: int = 10  # steps between updates of the exponential moving average of the weights
    ema_epoch_decay: float = 0.15  # what an epoch leaves of the moving average before it

    # Kernels
    attention: Literal["auto", "varlen", "sdpa"] = "auto"  # auto: varlen, flash attention, where the GPU has it
    head: Literal["auto", "fp8", "plain"] = "auto"  # products of lm_head in training; auto: fp8 where the GPU has it

    # Switches of earlier records
    meta_gradient: bool = True  # take the second half of each gradient at a point moved down the first half's
    mlp: Literal["swiglu", "relu2"] = "swiglu"  # relu2: squared ReLU, of width 4C
    u_net: bool = True  # skips from the first half of the layers to the second
    head_gates: bool = True  # a gate on the output of each attention head
    half_rotary: bool = True  # half of the frequency pairs of queries and keys do not rotate
    key_offset: bool = True  # shift half of each key by one position in layers with a full window
    xsa_layers: int = -1  # first layers that have exclusive self-attention; -1 for all
    decay_schedule: bool = True  # let the weight decay fall and rise; else it is constant
    shuffle: Literal["documents", "micro_steps"] = "documents"  # what each epoch shuffles
    readout: Literal["average", "last", "ema"] = "average"  # of epochs' weights; the last weights; the moving average

    def __post_init__(self):
        super().__post_init__()
        check_model(self)
        check_batch(self)
        check_schedules(self)

    @property
    def padded_vocab(self) -> int:
        """V rounded up to a multiple of 64, which matrix products prefer."""
        return math.ceil(self.vocab_size / 64) * 64

    @property
    def hidden(self) -> int:
        """Width of the MLP: 8/3 C, rounded up to a multiple of 256; 4C for squared ReLU, which has a matrix less."""
        return 4 * self.n_embd if self.mlp == "relu2" else math.ceil((8 * self.n_embd // 3) / 256) * 256

    @property
    def mlp_elements(self) -> int:
        """Elements of the MLP's matrices."""
        return (2 if self.mlp == "relu2" else 3) * self.n_embd * self.hidden

    @property
    def exclusive_layers(self) -> int:
        """The number of first layers that have exclusive self-attention."""
        return self.n_layer if self.xsa_layers < 0 else min(self.xsa_layers, self.n_layer)

    @property
    def micro_step_tokens(self) -> int:
        """Tokens of one micro-step on all virtual ranks."""
        return VIRTUAL_RANKS * self.micro_batch * self.sequence_len

    @property
    def micro_steps(self) -> int:
        """Micro-steps per optimizer step."""
        return self.batch_tokens // self.micro_step_tokens

    @property
    def term_sequences(self) -> int:
        """Sequences that a virtual rank takes at a time: half a micro-step if the meta-gradient has only one."""
        return self.micro_batch // 2 if self.meta_gradient and self.micro_steps == 1 else self.micro_batch

    @property
    def pass_sequences(self) -> int:
        """Sequences of a forward pass in training."""
        return min(self.device_batch or self.term_sequences, self.term_sequences)

    @property
    def kept_epochs(self) -> int:
        """Last epochs whose final weights the readout needs."""
        return {"average": self.readout_epochs, "last": 1, "ema": 0}[self.readout]

    def window(self, layer: int) -> int:
        """The number of earlier positions that a layer attends to, at most."""
        is_last = layer == self.n_layer - 1
        letter = self.window_pattern[layer % len(self.window_pattern)]
        return self.sequence_len if is_last or letter == "L" else self.sequence_len // 2

    def has_value_embedding(self, layer: int) -> bool:
        """Whether a layer has a value embedding: every second one, counted from the last."""
        return layer % 2 == (self.n_layer - 1) % 2


def check_model(c: Config) -> None:
    """Refuse sizes of the model that do not go together (ValueError)."""
    for name in ("vocab_size", "n_layer", "n_head", "late_passes"):
        require_at_least(c, name, 1)
    require_at_least(c, "sequence_len", 4)
    require_at_least(c, "n_embd", 32)  # gates read the first 32 channels
    require_at_least(c, "xsa_layers", -1)
    if c.n_embd % (4 * c.n_head):
        raise ValueError(f"n_embd {c.n_embd} is not a multiple of 4 * n_head = {4 * c.n_head}: change --n-embd")
    if c.n_layer % 2 and c.u_net:
        raise ValueError(f"n_layer {c.n_layer} is odd: the U-Net pairs layers, change --n-layer, or give --no-u-net")
    if not c.window_pattern or set(c.window_pattern) - set("SL"):
        raise ValueError(f"window_pattern {c.window_pattern!r} must consist of the letters S and L")
    if not 0 <= c.dropout < 1:
        raise ValueError(f"dropout {c.dropout} is not in [0, 1)")
    if not c.logit_cap > 0:
        raise ValueError(f"logit_cap {c.logit_cap} must be positive")


def check_batch(c: Config) -> None:
    """Refuse a batch that does not divide into micro-steps, halves and passes (ValueError)."""
    for name in ("batch_tokens", "micro_batch"):
        require_at_least(c, name, 1)
    require_at_least(c, "device_batch", 0)
    if c.batch_tokens % c.micro_step_tokens:
        raise ValueError(
            f"batch_tokens {c.batch_tokens} is not a multiple of {VIRTUAL_RANKS} virtual ranks x micro_batch "
            f"{c.micro_batch} x sequence_len {c.sequence_len} = {c.micro_step_tokens}: change --batch-tokens"
        )
    if c.meta_gradient and (c.micro_batch if c.micro_steps == 1 else c.micro_steps) % 2:
        raise ValueError(
            f"the meta-gradient cannot halve {c.micro_steps} micro-step(s) of {c.micro_batch} sequences: "
            "change --batch-tokens or --micro-batch, or give --no-meta-gradient"
        )
    if c.term_sequences % c.pass_sequences:  # all passes have one shape
        raise ValueError(
            f"device_batch {c.device_batch} does not divide the {c.term_sequences} sequences of a term of the "
            "gradient: change --device-batch"
        )


def check_schedules(c: Config) -> None:
    """Refuse schedules that do not fit into the run (ValueError)."""
    for name in ("num_epochs", "readout_epochs", "ema_every"):
        require_at_least(c, name, 1)
    for name in ("swa_epochs", "meta_step"):
        require_at_least(c, name, 0)
    for name in ("warmdown", "late_passes_from"):
        if not 0 <= getattr(c, name) <= 1:
            raise ValueError(f"{name} {getattr(c, name)} is not in [0, 1]")
    if not 0 < c.mtp_until <= 1:
        raise ValueError(f"mtp_until {c.mtp_until} is not in (0, 1]")
    if not 0 < c.ema_epoch_decay < 1:
        raise ValueError(f"ema_epoch_decay {c.ema_epoch_decay} is not between 0 and 1")
    if c.decay_schedule and not 0 <= c.decay_hold_epochs <= c.decay_low_epochs <= c.num_epochs:
        raise ValueError(
            f"--decay-hold-epochs {c.decay_hold_epochs} and --decay-low-epochs {c.decay_low_epochs} must be in this "
            f"order, from 0 to --num-epochs {c.num_epochs}: lower them, or train longer"
        )
    if c.decay_schedule and not c.weight_decay > 0:
        raise ValueError(f"--weight-decay {c.weight_decay} must be positive: its schedule is relative to it")
    too_many = {"--swa-epochs": c.swa_epochs, "--readout-epochs": c.kept_epochs}
    too_many = [f"{flag} {epochs}" for flag, epochs in too_many.items() if epochs > c.num_epochs]
    if too_many:
        raise ValueError(f"{' and '.join(too_many)} exceed --num-epochs {c.num_epochs}: lower them, or train longer")


DEMO = {  # --demo: every technique but fp8, at a size that two CPU cores train in less than two minutes
    "data_dir": "demo_data", "vocab_size": 257, "sequence_len": 128, "n_layer": 4, "n_head": 2, "n_embd": 64,
    "num_epochs": 5, "batch_tokens": 8192, "micro_batch": 8, "eval_batch": 16, "val_sequences": 496,
    "lr_multiplier": 4.0, "weight_decay": 0.3, "decay_hold_epochs": 1, "decay_low_epochs": 3, "decay_end": 0.35,
    "swa_epochs": 2, "readout_epochs": 2, "time_cap_min": 0.0, "compile": "off", "eval_initial": True,
}  # fmt: skip


def record_sizes(settings: dict) -> dict:
    """Toy sizes for a record with these settings; num_epochs is DEMO's."""
    return demo_of_record(Config, DEMO, settings, unscaled=("num_epochs",))


# ======================================================================================================================
# Model
# ======================================================================================================================

# There are two sets of weights. The optimizer updates the masters, which are float32 and have the benchmark's names
# (transformer.h.3.attn.c_q.weight). The modules below hold the compute weights, which are bfloat16 on a GPU and have
# q, k, v and gate, up stacked into one matrix each. block_weights makes the second from the first.


def init_masters(config: Config, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The initial masters by name, drawn from torch's default generator.

    wte and lm_head are stored in the compute dtype, all others in float32 or wider.
    """
    L, H, C, hidden = config.n_layer, config.n_head, config.n_embd, config.hidden
    wide = torch.promote_types(dtype, torch.float32)
    bound = math.sqrt(3 / C)  # of a uniform distribution with standard deviation 1 / sqrt(C)

    def constant(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=wide, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=wide, device=device).uniform_(-bound, bound)

    def normal(std: float, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=std)

    def block(name: str, layer: int) -> dict[str, Tensor]:
        masters = {}
        masters[f"{name}.attn.c_q.weight"] = uniform(C, C)
        masters[f"{name}.attn.c_k.weight"] = uniform(C, C)
        masters[f"{name}.attn.c_v.weight"] = uniform(C, C)
        masters[f"{name}.attn.c_proj.weight"] = constant(0.0, C, C)
        if config.head_gates:
            masters[f"{name}.attn.attn_gate.weight"] = constant(0.0, H, 12)
        if config.has_value_embedding(layer):
            masters[f"{name}.attn.ve_gate.weight"] = constant(0.0, H, 32)
        if config.mlp == "swiglu":
            masters[f"{name}.mlp.c_gate.weight"] = uniform(hidden, C)
        masters[f"{name}.mlp.c_fc.weight"] = uniform(hidden, C)
        masters[f"{name}.mlp.c_proj.weight"] = constant(0.0, C, hidden)
        return masters

    masters = {"resid_lambdas": constant(config.resid_init, L), "x0_lambdas": constant(0.1, L)}
    if config.u_net:
        masters["skip_weights"] = constant(1.0, L // 2)
    if config.exclusive_layers:
        masters["xsa_alphas"] = constant(0.0, config.exclusive_layers, H)
    masters["transformer.wte.weight"] = normal(1.0, config.padded_vocab, C)
    for i in range(L):
        masters |= block(f"transformer.h.{i}", layer=i)
    masters["lm_head.weight"] = normal(0.001, C, config.padded_vocab)
    for i in range(L):
        if config.has_value_embedding(i):
            masters[f"ve_projs.{i}.weight"] = uniform(C, C)
    return masters


def block_weights(masters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a block by name, made from its masters; differentiable."""
    weights = dict(masters)
    qkv = [weights.pop(f"attn.{name}.weight") for name in ("c_q", "c_k", "c_v")]
    weights["attn.qkv.weight"] = torch.cat(qkv)
    if "mlp.c_gate.weight" in weights:
        gate_up = [weights.pop(f"mlp.{name}.weight") for name in ("c_gate", "c_fc")]
        weights["mlp.gate_up.weight"] = torch.cat(gate_up)
    return weights


def block_names(config: Config) -> list[str]:
    """The prefixes of the blocks' names: what block_weights is for."""
    return [f"transformer.h.{i}." for i in range(config.n_layer)]


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without a learned gain (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the half-truncated rotary embedding, base 10000 (arXiv 2104.09864): each (T, 1, D / 2).

    The first half of the D / 2 frequency pairs rotate as in a rotary embedding of width D / 2; the rest stand still.
    """
    D = config.n_embd // config.n_head
    width = D // 2 if config.half_rotary else D
    exponents = torch.arange(0, width, 2, dtype=dtype) / width
    frequencies = torch.zeros(D // 2, dtype=dtype)
    frequencies[: width // 2] = 10000.0**-exponents
    angles = torch.arange(config.sequence_len, dtype=dtype)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D) -> the same shape, float32 or wider. A frequency pair is (x[d], x[d + D / 2])."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def offset_keys(k: Tensor) -> Tensor:
    """Partial key offset: at t >= 1, dimensions D/2 ... D-1 of the key come from position t - 1. k (B, T, H, D).

    A query that matches the shifted half finds what followed an earlier occurrence, in one layer instead of two.
    """
    here, shifted = k.chunk(2, dim=-1)
    shifted = torch.cat([shifted[:, :1], shifted[:, :-1]], dim=1)
    return torch.cat([here, shifted], dim=-1)


def exclude_own_value(y: Tensor, v: Tensor, strength: Tensor) -> Tensor:
    """Exclusive self-attention (arXiv 2603.09078): y without a part of its component along the position's own value.

    y, v (B, T, H, D); strength (H,): 0 leaves y as it is, 1 makes it orthogonal to v.
    """
    v_hat = F.normalize(v, dim=-1, eps=1e-4)
    along = (y * v_hat).sum(dim=-1, keepdim=True) * v_hat
    return (y - strength[:, None] * along).to(y.dtype)


class Attention(nn.Module):
    """Multi-head attention with value embedding, half rotary, key offset, exclusive attention and head gates."""

    def __init__(self, config: Config, layer: int, backend: str):
        super().__init__()
        C, H = config.n_embd, config.n_head
        self.n_head = H
        self.window = config.window(layer)
        self.backend = backend
        self.offset_keys = config.key_offset and self.window == config.sequence_len
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        self.attn_gate = nn.Linear(12, H, bias=False) if config.head_gates else None
        self.ve_gate = nn.Linear(32, H, bias=False) if config.has_value_embedding(layer) else None

    def forward(self, x: Tensor, ve: Tensor | None, xsa_alpha: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, C), value embedding ve (B, T, C) or None, xsa_alpha (H,) or None -> (B, T, C)."""
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.qkv(x).view(B, T, 3, H, D).unbind(dim=2)  # each (B, T, H, D)
        if ve is not None:  # value residual (arXiv 2410.17897)
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :32]))  # (B, T, H), starts at 1
            v = v + gate.unsqueeze(-1) * ve.view(B, T, H, D)
        q = norm(rotate(q, cos, sin)).to(v.dtype)
        k = norm(rotate(k, cos, sin)).to(v.dtype)
        if self.offset_keys:
            k = offset_keys(k)
        y = attend(q, k, v, self.window, self.backend)  # (B, T, H, D)
        if xsa_alpha is not None:
            y = exclude_own_value(y, v, strength=torch.tanh(xsa_alpha))
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

    def forward(self, x: Tensor, ve: Tensor | None, xsa_alpha: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        x = x + dropout(self.attn(norm(x), ve, xsa_alpha, cos, sin), p)
        return x + self.mlp(norm(x))


# The next three functions are what is compiled of the model. Layers of a kind share a graph.


def run_layer(
    block: Block,
    x: Tensor,
    x0: Tensor,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    resid_lambda: Tensor,
    x0_lambda: Tensor,
    ve: Tensor | None,
    xsa_alpha: Tensor | None,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """A layer of the trunk: streams x, x0, skip (B, T, C), weights () -> (B, T, C).

    skip is what a layer of the second half adds from the first (U-Net, arXiv 1505.04597).
    """
    if skip is not None:
        x = x + skip_weight * skip
    x = resid_lambda * x + x0_lambda * x0
    return block(x, ve, xsa_alpha, cos, sin)


def cross_entropy(x: Tensor, lm_head: Tensor, targets: Tensor, vocab_size: int, cap: float) -> Tensor:
    """Next-token loss in validation: x (B, T, C), targets (B, T) int64 -> (B, T) float32 or wider, nats."""
    logits = soft_cap((x @ lm_head)[..., :vocab_size], cap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


X_SCALE = 100 / 448  # an fp8 number times its scale is the value, and 448 the largest number of e4m3
LM_HEAD_SCALE = 1.6 / 448
GRAD_SCALE = 0.75 / 448  # of the logits' gradient, which is in e5m2


def head_chunk(x: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, vocab_size: int, cap: float, head: str):
    """The part of HeadLoss for some positions: x (n, C), lm_head (C, padded V), targets (n, K) int64, weights (K,).

    head "fp8": the operands of all three products are rounded to 8 bits with fixed scales. The gradient of the logits
    is that of the sum over positions, because that of their mean would be too small for e5m2.
    """
    if head == "plain":
        loss, first_loss, grad = capped_cross_entropy(x @ lm_head, targets, weights, vocab_size, cap)
        return loss, first_loss, grad @ lm_head.T, x.T @ grad
    x8 = to_fp8(x, X_SCALE)
    head8 = to_fp8(lm_head, LM_HEAD_SCALE)
    logits = fp8_product(x8, head8.T.contiguous().T, X_SCALE * LM_HEAD_SCALE, fast=True)
    loss, first_loss, grad = capped_cross_entropy(logits, targets, weights, vocab_size, cap)
    grad8 = to_fp8(grad, GRAD_SCALE, torch.float8_e5m2)
    x_grad = fp8_product(grad8, head8.T, GRAD_SCALE * LM_HEAD_SCALE)
    lm_head_grad = fp8_product(x8.T.contiguous(), grad8.T.contiguous().T, X_SCALE * GRAD_SCALE)
    return loss, first_loss, x_grad, lm_head_grad


class Head(nn.Module):
    """A linear map whose weight is stored (in, out), unlike nn.Linear's."""

    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_embd, config.padded_vocab))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class GPT(nn.Module):
    """Decoder-only transformer: a U-Net of blocks that late in training runs twice.

    The parameters are not initialized: they are compute weights, and come from masters.
    """

    def __init__(self, config: Config, dtype: torch.dtype, attention: str = "sdpa", head: str = "plain"):
        """attention: the backend of slowrun.kernels.attend. head: the products of lm_head in training (head_chunk)."""
        super().__init__()
        self.config = config
        self.head = head
        L, C = config.n_layer, config.n_embd
        with_ve = [i for i in range(L) if config.has_value_embedding(i)]
        wte = nn.Embedding(config.padded_vocab, C)
        blocks = nn.ModuleList(Block(config, i, attention) for i in range(L))
        self.transformer = nn.ModuleDict({"wte": wte, "h": blocks})
        self.ve_projs = nn.ModuleDict({str(i): nn.Linear(C, C, bias=False) for i in with_ve})
        self.lm_head = Head(config)
        self.to(dtype)

        # Scalars, rotary angles and logits stay in float32, because bfloat16 is too coarse for them.
        self.wide = torch.promote_types(dtype, torch.float32)
        self.resid_lambdas = nn.Parameter(torch.empty(L, dtype=self.wide))
        self.x0_lambdas = nn.Parameter(torch.empty(L, dtype=self.wide))
        if config.u_net:
            self.skip_weights = nn.Parameter(torch.empty(L // 2, dtype=self.wide))
        if config.exclusive_layers:
            self.xsa_alphas = nn.Parameter(torch.empty(config.exclusive_layers, config.n_head, dtype=self.wide))
        cos, sin = rotary_tables(config, self.wide)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

        self.run_layer = run_layer
        self.head_chunk = head_chunk
        self.cross_entropy = cross_entropy

    def compile_layers(self) -> None:
        """Compile layer by layer: gradients become available during the backward pass, and the graphs are few."""
        compiled = partial(torch.compile, dynamic=False, fullgraph=True)
        self.run_layer = compiled(run_layer)
        self.head_chunk = compiled(head_chunk)
        self.cross_entropy = compiled(cross_entropy)

    def forward(self, tokens: Tensor, passes: int) -> Tensor:
        """tokens (B, T) int64 -> final stream (B, T, C), normed.

        Each pass starts from the result of the one before; x0 and the value embeddings stay those of the tokens. Only
        the last pass is differentiated.
        """
        T = tokens.size(1)
        cos, sin = self.cos[:T], self.sin[:T]
        x0 = norm(self.transformer.wte(tokens))  # (B, T, C)
        ve = {int(i): project(x0) for i, project in self.ve_projs.items()}  # each (B, T, C)
        x = x0
        with torch.no_grad():
            for _ in range(passes - 1):
                x = self.stack(x, x0, ve, cos, sin)
        return self.stack(x, x0, ve, cos, sin)

    def stack(self, x: Tensor, x0: Tensor, ve: dict[int, Tensor], cos: Tensor, sin: Tensor) -> Tensor:
        """One pass through all layers: x, x0 (B, T, C), value embeddings ve by layer -> (B, T, C), normed."""
        c = self.config
        resid_lambdas, x0_lambdas = self.resid_lambdas.unbind(), self.x0_lambdas.unbind()
        skip_weights = self.skip_weights.unbind() if c.u_net else ()
        xsa_alphas = self.xsa_alphas.unbind() if c.exclusive_layers else ()
        E = c.n_layer // 2  # the first E layers are the encoder of the U-Net
        encoded = []
        for i, block in enumerate(self.transformer.h):
            has_skip = c.u_net and i >= E
            skip = encoded.pop() if has_skip else None  # of layer L - 1 - i
            skip_weight = skip_weights[i - E] if has_skip else None
            mix = skip, skip_weight, resid_lambdas[i], x0_lambdas[i]
            xsa_alpha = xsa_alphas[i] if i < c.exclusive_layers else None
            x = self.run_layer(block, x, x0, *mix, ve.get(i), xsa_alpha, cos, sin)
            if i < E:
                encoded.append(x)
        return norm(x)

    def token_losses(self, tokens: Tensor, targets: Tensor, passes: int) -> Tensor:
        """Next-token cross-entropy: tokens, targets (B, T) int64 -> (B, T) float32 or wider, nats."""
        x = self(tokens, passes)
        return self.cross_entropy(x, self.lm_head.weight, targets, self.config.vocab_size, self.config.logit_cap)

    def log_probs(self, tokens: Tensor, passes: int) -> Tensor:
        """tokens (B, T) int64 -> log-probabilities of the next token (B, T, V), float32 or wider."""
        logits = self.lm_head(self(tokens, passes))[..., : self.config.vocab_size]
        return soft_cap(logits, self.config.logit_cap).log_softmax(-1)

    def training_loss(self, tokens: Tensor, targets: Tensor, passes: int, mtp_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Multi-token prediction with a single head (arXiv 2404.19737 has one head per token).

        tokens, targets (B, T) int64; mtp_weights (K,) float32 or wider -> (the weighted loss, the next-token loss),
        both () in nats per token. Position t is scored against targets t, t + 1, ... t + K - 1, as far as the sequence
        goes.
        """
        x = self(tokens, passes)  # (B, T, C)
        future = [F.pad(targets[:, k:], (0, k), value=-1) for k in range(len(mtp_weights))]  # each (B, T); -1 for none
        chunk = partial(
            self.head_chunk,
            weights=mtp_weights,
            vocab_size=self.config.vocab_size,
            cap=self.config.logit_cap,
            head=self.head,
        )
        target_rows = torch.stack(future, dim=-1).flatten(0, 1)  # (B * T, K)
        loss, next_token_loss = HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, chunk, target_rows)
        return loss / targets.numel(), next_token_loss / targets.numel()


def flops_per_token(config: Config, passes: int) -> float:
    """Floating-point operations of forward and backward per token: matrix products and attention of all passes."""
    C, T, L = config.n_embd, config.sequence_len, config.n_layer
    windows = [config.window(i) for i in range(L)]
    keys = sum(w - w * w / (2 * T) for w in windows)  # that the average position attends to, over all layers
    stack = L * (4 * C * C + config.mlp_elements) + 2 * C * keys
    projections = sum(config.has_value_embedding(i) for i in range(L)) * C * C
    return 6 * (stack + projections + C * config.padded_vocab) + 2 * (passes - 1) * stack


# ======================================================================================================================
# Optimizer
# ======================================================================================================================


@dataclass(frozen=True)
class Group:
    """Parameters that are updated alike."""

    method: Literal["muon", "adamw"]
    names: list[str]  # of the masters
    lr: float  # before the schedule, and before Muon's factor for the shape
    weight_decay: float  # before the schedule
    betas: tuple[float, float] | None = None  # AdamW's

    @property
    def layout(self) -> Literal["stacked", "flat"]:
        """The layout of the shards: Muon needs whole matrices; AdamW works on elements."""
        return "stacked" if self.method == "muon" else "flat"


def optimizer_groups(config: Config, names: list[str]) -> list[Group]:
    """The optimizer table: every master is in exactly one group."""
    decay = config.weight_decay
    lr = config.lr_multiplier
    scalars = [name for name in ("resid_lambdas", "skip_weights") if name in names]
    attn_gates = [name for name in names if name.endswith(".attn_gate.weight")]
    xsa_alphas = [name for name in names if name == "xsa_alphas"]
    groups = [
        Group("adamw", ["lm_head.weight"], lr * config.head_lr, decay, betas=(0.8, 0.95)),
        Group("adamw", ["transformer.wte.weight"], lr * config.embedding_lr, decay, betas=(0.8, 0.95)),
        Group("adamw", scalars, lr * config.scalar_lr * 0.01, 0.0, betas=(0.8, 0.95)),
        Group("adamw", ["x0_lambdas"], lr * config.scalar_lr, 0.0, betas=(0.96, 0.95)),
        Group("adamw", attn_gates, lr * config.scalar_lr, 0.0, betas=(0.9, 0.99)),
        Group("adamw", xsa_alphas, lr * config.scalar_lr, 0.0, betas=(0.9, 0.95)),
    ]
    adamw_names = {name for group in groups for name in group.names}
    matrices = [name for name in names if name not in adamw_names]
    groups.append(Group("muon", matrices, lr * config.matrix_lr, decay))
    assigned = [name for group in groups for name in group.names]
    assert sorted(assigned) == sorted(names), "every master must be in exactly one group"
    return groups


POLAR_EXPRESS = (  # coefficients (a, b, c) of the five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(x: Tensor) -> Tensor:
    """The orthogonal polar factor, approximately, of each matrix (arXiv 2505.16932): (n, rows, cols) -> the same shape.

    The singular values of x must not exceed 1. The smaller of the two Gram matrices is used.
    """
    is_tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if is_tall else x @ x.mT
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + (x @ polynomial if is_tall else polynomial @ x)
    return x


def reduced_dim(x: Tensor) -> int:
    """The dimension over which NorMuon averages: one value per row if there are at least as many rows as columns."""
    return -1 if x.size(-2) >= x.size(-1) else -2


def muon_update(p, grad, momentum, second_moment, lr, weight_decay, mu, dtype: torch.dtype) -> None:
    """One Muon step on n matrices of one shape, in place.

    Nesterov momentum, orthogonalization by Polar Express in `dtype`, variance reduction by NorMuon (arXiv 2510.05491),
    cautious weight decay (arXiv 2510.12402). p, grad, momentum (n, rows, cols); second_moment (n, rows, 1) or
    (n, 1, cols); lr, weight_decay, mu () float32 or wider.
    """
    # Nesterov momentum
    momentum.copy_(mu * momentum + (1 - mu) * grad)
    update = (1 - mu) * grad + mu * momentum

    # Orthogonalization. The Frobenius norm bounds the largest singular value; 1.02 allows for rounding.
    update = update / (1.02 * update.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    update = polar_express(update.to(dtype)).to(p.dtype)

    # Variance reduction: even out the rows (or columns), and keep the Frobenius norm of the update
    mean_square = update.square().mean(dim=reduced_dim(update), keepdim=True)
    second_moment.copy_(0.95 * second_moment + 0.05 * mean_square)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    norm_before = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    norm_after = (mean_square * scale * scale).sum(dim=(-2, -1), keepdim=True).sqrt()
    update = update * (scale * norm_before / norm_after.clamp_min(1e-10))

    # Cautious decay: only where it does not work against the update
    rows, cols = p.shape[-2:]
    lr = lr * math.sqrt(max(1, rows / cols))
    decays = update * p >= 0
    p.sub_(lr * update + lr * weight_decay * p * decays)


def adamw_update(p, grad, exp_avg, exp_avg_sq, lr, weight_decay, betas: tuple[float, float], t) -> None:
    """One AdamW step on a flat tensor (n,), in place (arXiv 1711.05101). t () counts steps from 1."""
    beta1, beta2 = betas
    exp_avg.copy_(beta1 * exp_avg + (1 - beta1) * grad)
    exp_avg_sq.copy_(beta2 * exp_avg_sq + (1 - beta2) * grad.square())
    corrected_avg = exp_avg / (1 - beta1**t)
    corrected_avg_sq = exp_avg_sq / (1 - beta2**t)
    decayed = p.to(grad.dtype) * (1 - lr * weight_decay)
    p.copy_(decayed - lr * corrected_avg / (corrected_avg_sq.sqrt() + 1e-10))


def make_shards(config: Config, masters: dict[str, Tensor], world: World) -> Shards:
    """The masters and their optimizer state: Muon's and AdamW's moments, and the EMA of the weights."""
    shards = Shards(masters, optimizer_groups(config, list(masters)), world)
    for bucket in shards.buckets:
        shard = bucket.grad_shard  # has the dtype of the state
        if bucket.group.method == "muon":
            shards.add_state(bucket, "momentum", torch.zeros_like(shard))
            mean_square = shard.mean(dim=reduced_dim(shard), keepdim=True)
            shards.add_state(bucket, "second_moment", torch.zeros_like(mean_square))
        else:
            shards.add_state(bucket, "exp_avg", torch.zeros_like(shard))
            shards.add_state(bucket, "exp_avg_sq", torch.zeros_like(shard))
        shards.add_state(bucket, "ema", torch.zeros_like(shard))
    return shards


class Optimizer:
    """Muon and AdamW on sharded masters."""

    def __init__(self, shards: Shards, muon_dtype: torch.dtype, compiled: bool):
        """muon_dtype: of the orthogonalization."""
        self.shards = shards
        self.muon_dtype = muon_dtype
        self.muon_update = torch.compile(muon_update, dynamic=False) if compiled else muon_update

    def step(self, step: int, values: Scheduled) -> None:
        """Update the masters from shards.grads.

        ZeRO-2 (arXiv 1910.02054): a process receives the summed gradients of its shard, updates that shard, and gathers
        the others' masters.
        """
        for bucket, grad in self.shards.reduce():
            self.update(bucket, grad, step, values)
            self.shards.gather(bucket)
        self.shards.wait()

    @torch.no_grad()
    def update(self, bucket: Bucket, grad: Tensor, step: int, values: Scheduled) -> None:
        """Update this process's shard of a bucket.

        lr, decay, mu and t are 0-d CPU tensors, because a compiled update compiles again for every new Python number.
        """
        group = bucket.group
        state = bucket.state
        scalar = partial(torch.tensor, dtype=grad.dtype)
        lr = scalar(group.lr * values.lr)
        decay = scalar(group.weight_decay * values.weight_decay)
        if group.method == "muon":
            mu = scalar(values.momentum)
            moments = state["momentum"], state["second_moment"]
            self.muon_update(bucket.shard, grad, *moments, lr, decay, mu, self.muon_dtype)
        else:
            t = scalar(step + 1)
            adamw_update(bucket.shard, grad, state["exp_avg"], state["exp_avg_sq"], lr, decay, group.betas, t)
        if values.ema_weight:
            state["ema"].lerp_(bucket.shard.to(grad.dtype), values.ema_weight)


# ======================================================================================================================
# Schedules: pure functions of the config, the step (from 0) and the number of steps
# ======================================================================================================================


def warmdown(config: Config, step: int, num_steps: int) -> float:
    """1, then linearly down to 0 over the last `warmdown` of the steps."""
    length = round(config.warmdown * num_steps)
    return min(1.0, (num_steps - step) / length) if length else 1.0


def lr_multiplier(config: Config, step: int, num_steps: int) -> float:
    """The warmdown; in the last swa_epochs half a cosine per epoch, from the warmdown down to 0.05.

    The ends of these cycles are the weights that are averaged (SWA, arXiv 1803.05407).
    """
    level = warmdown(config, step, num_steps)
    epoch_steps = num_steps / config.num_epochs
    first_cycle = num_steps - config.swa_epochs * epoch_steps
    if step < first_cycle:
        return level
    position = (step - first_cycle) / epoch_steps % 1.0
    return 0.05 + (max(level, 0.05) - 0.05) * (1 + math.cos(math.pi * position)) / 2


def weight_decay_multiplier(config: Config, step: int, num_steps: int) -> float:
    """Constant, linearly down to decay_low, then linearly up to decay_end; relative to config.weight_decay."""
    if not config.decay_schedule:
        return 1.0
    hold_until = round(config.decay_hold_epochs * num_steps / config.num_epochs)
    low_at = round(config.decay_low_epochs * num_steps / config.num_epochs)
    steps = [0, hold_until, low_at, num_steps]
    values = [config.weight_decay, config.weight_decay, config.decay_low, config.decay_end]
    return float(np.interp(step, steps, values)) / config.weight_decay


def muon_momentum(step: int) -> float:
    """Linear from 0.85 to 0.95 over the first 300 steps."""
    return 0.85 + 0.1 * min(step / 300, 1.0)


def mtp_weights(config: Config, step: int, num_steps: int) -> tuple[float, float, float]:
    """Weights of the losses on the next three tokens. The third falls to 0 first, then the second."""
    half = config.mtp_until / 2 * num_steps
    second = config.mtp_weight_1 * min(1.0, max(0.0, 2 - step / half))
    third = config.mtp_weight_2 * max(0.0, 1 - step / half)
    return 1.0, second, third


def num_passes(config: Config, step: int, num_steps: int) -> int:
    """Passes through the stack: one, late in training more."""
    return 1 if step < config.late_passes_from * num_steps else config.late_passes


def ema_decay(config: Config, num_steps: int) -> float:
    """The factor on the EMA of the weights in an update of it."""
    return config.ema_epoch_decay ** (config.ema_every * config.num_epochs / num_steps)


def ema_weight(config: Config, step: int, num_steps: int) -> float:
    """EMA coefficient of the weights after a step; 0 when the EMA is not updated. The EMA starts from zero."""
    return 1 - ema_decay(config, num_steps) if step % config.ema_every == 0 else 0.0


@dataclass(frozen=True)
class Scheduled:
    """The values of all schedules at a step: what the step uses is what the metrics record."""

    lr: float  # factor on the learning rates of the groups
    weight_decay: float  # factor on the weight decay of the groups
    momentum: float  # Muon's
    mtp_weights: tuple[float, ...]  # of the losses on the next token, the one after it, ...
    passes: int  # through all layers
    ema_weight: float  # of the weights after the step in their EMA


def schedule(config: Config, step: int, num_steps: int) -> Scheduled:
    """Evaluate all schedules at a step."""
    return Scheduled(
        lr=lr_multiplier(config, step, num_steps),
        weight_decay=weight_decay_multiplier(config, step, num_steps),
        momentum=muon_momentum(step),
        mtp_weights=mtp_weights(config, step, num_steps),
        passes=num_passes(config, step, num_steps),
        ema_weight=ema_weight(config, step, num_steps),
    )


# ======================================================================================================================
# Data order
# ======================================================================================================================


def epoch_sequences(config: Config, split: Split, epoch: int) -> np.ndarray:
    """The training sequences of an epoch, counted from 1, in the order of training: (n, T + 1) uint16.

    From epoch 2 on the documents are permuted, starting from their order in the epoch before. They are concatenated and
    cut into sequences, which are permuted too. Earlier records cut the file once, and permute micro-steps.
    """
    length = config.sequence_len + 1
    seeds = range(2, epoch + 1)
    if config.shuffle == "documents":
        return shuffled_documents(split, length, document_seeds=seeds, sequence_seed=epoch + 1000)
    return shuffled_micro_steps(split, length, config.micro_batch, seeds)


def micro_steps_per_epoch(config: Config, split: Split) -> int:
    """Micro-steps of all virtual ranks in an epoch; the sequences that do not fill one are dropped."""
    num_sequences = len(split.tokens) // (config.sequence_len + 1)
    return num_sequences // (VIRTUAL_RANKS * config.micro_batch)


def make_plan(config: Config, split: Split) -> StepPlan:
    """The plan of the run: its steps, and the tokens and epochs that they complete."""
    epoch_micro_steps = micro_steps_per_epoch(config, split)
    if epoch_micro_steps < 2 * config.micro_steps:
        raise ValueError(
            f"the training data makes {epoch_micro_steps} micro-steps per epoch, and two optimizer steps need "
            f"{2 * config.micro_steps}: use more data, or lower --batch-tokens or --sequence-len"
        )
    num_steps = round(epoch_micro_steps * config.num_epochs / config.micro_steps)
    micro_steps_done = np.arange(num_steps + 1) * config.micro_steps
    epochs_done = micro_steps_done // epoch_micro_steps
    epochs_done[-1] = config.num_epochs
    stages = {passes: make_stage(config, passes) for passes in (1, config.late_passes)}
    return StepPlan(
        tokens=micro_steps_done * config.micro_step_tokens,
        epoch=epochs_done,
        stages=stages_of([stages[num_passes(config, step, num_steps)] for step in range(num_steps)]),
    )


def stage_name(passes: int) -> str:
    return {1: "one_pass", 2: "two_passes"}.get(passes, f"{passes}_passes")


def make_stage(config: Config, passes: int) -> Stage:
    """The steps with so many passes through all layers."""
    L = config.n_layer
    return Stage(stage_name(passes), flops_per_token(config, passes), forward_layers=passes * L, backward_layers=L)


def make_loader(config: Config, split: Split, plan: StepPlan, world: World) -> Loader:
    """The batches of this process."""
    return Loader(
        make_epoch=partial(epoch_sequences, config, split),
        micro_batch=config.micro_batch,
        micro_steps_before=plan.tokens // config.micro_step_tokens,
        micro_steps_per_epoch=micro_steps_per_epoch(config, split),
        virtual_ranks=world.virtual_ranks,
    )


# ======================================================================================================================
# Training step
# ======================================================================================================================


def moved_names(config: Config, names: list[str]) -> list[str]:
    """The masters that the meta-gradient moves: the matrices of the MLPs."""
    return [name for name in names if ".mlp." in name] if config.meta_gradient else []


class Training:
    """The state of training: the masters with their optimizer state, and the model that computes with them.

    Besides its number, a step depends on nothing but `shards`, which is what checkpoints hold.
    """

    def __init__(self, config: Config, world: World, dtype: torch.dtype, kernels: dict[str, str], compiled: bool):
        self.config = config
        self.world = world
        self.shards = make_shards(config, init_masters(config, dtype, world.device), world)
        self.masters = self.shards.masters
        self.model = GPT(config, dtype, **kernels).to(world.device)
        if compiled:
            torch._dynamo.config.recompile_limit = 256  # graphs of a function: training, validation, windows, passes
            self.model.compile_layers()
        self.weights = ComputeWeights(self.model, block_names(config), block_weights)
        in_bfloat16 = world.cuda and dtype == torch.bfloat16
        self.optimizer = Optimizer(self.shards, dtype if in_bfloat16 else self.model.wide, compiled)
        moved = moved_names(config, list(self.masters))
        self.first_grads = {name: torch.zeros_like(self.shards.grads[name]) for name in moved}

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a tensor from the CPU, which does not wait for it."""
        return tensor.pin_memory().to(self.world.device, non_blocking=True) if self.world.cuda else tensor

    def step(self, step: int, batch: Tensor, values: Scheduled) -> dict[str, Tensor]:
        """One optimizer step -> this process's part of the losses, () each, which the session sums and reads later.

        batch (virtual ranks, sequences, T + 1) int64, on the CPU.
        """
        batch = self.to_device(batch)
        losses = torch.zeros(2, dtype=self.model.wide, device=self.world.device)
        for virtual_rank, sequences in zip(self.world.virtual_ranks, batch, strict=True):
            losses += self.add_gradient(step, virtual_rank, sequences, values)
        with torch.profiler.record_function("optimizer"):  # as profiles name it
            self.optimizer.step(step, values)
        self.shards.zero_grads()
        return {"train_loss": losses[1], "train_loss_with_mtp": losses[0]}

    def add_gradient(self, step: int, virtual_rank: int, sequences: Tensor, values: Scheduled) -> Tensor:
        """Add a virtual rank's part of the mean gradient to shards.grads -> its part of the mean losses (2,).

        The meta-gradient takes the second half's gradient at weights moved down the first half's. To first order that
        also raises the inner product of the two: what is learned from some sequences then helps on others. A virtual
        rank does this alone, so the number of processes makes no difference. sequences (n, T + 1) int64.
        """
        grads = self.shards.grads
        weight = 1 / (VIRTUAL_RANKS * len(sequences))  # of a sequence
        self.weights.refresh(self.masters)
        if not self.config.meta_gradient:
            losses = self.backward(step, virtual_rank, sequences, values, weight)
            self.weights.pull_back(grads)
            return losses
        first, second = sequences.chunk(2)

        # First half, at the weights themselves. The gradient of the matrices that will move is kept apart:
        # under their names, first_grads takes the place of grads.
        losses = self.backward(step, virtual_rank, first, values, weight)
        torch._foreach_zero_(list(self.first_grads.values()))
        self.weights.pull_back(grads | self.first_grads)

        # Second half, with those matrices moved. The move is about 1e-5 per element, so it is made from the float32
        # masters and rounded once; bfloat16 weights would lose it.
        self.weights.refresh(self.masters | self.move(self.config.meta_step))
        losses += self.backward(
            step, virtual_rank, second, values, weight, first_term=len(first) // self.config.term_sequences
        )
        self.weights.pull_back(grads)
        return losses

    @torch.no_grad()
    def move(self, length: float) -> dict[str, Tensor]:
        """Add first_grads to shards.grads -> the masters moved down them, in their memory.

        length: the norm of the move, over all matrices together.
        """
        names, first_grads = list(self.first_grads), list(self.first_grads.values())
        torch._foreach_add_([self.shards.grads[name] for name in names], first_grads)
        norm = torch.stack(torch._foreach_norm(first_grads)).norm().clamp_min(1e-30)
        torch._foreach_mul_(first_grads, -length / norm)
        torch._foreach_add_(first_grads, [self.masters[name] for name in names])
        return self.first_grads

    def backward(
        self, step: int, virtual_rank: int, sequences: Tensor, values: Scheduled, weight: float, first_term: int = 0
    ) -> Tensor:
        """Accumulate the gradient in the model -> the losses (2,), each the sum of weight * loss over the sequences.

        sequences (n, T + 1) int64. The seed of dropout depends on the sequences' place in the batch, not on processes.
        """
        c = self.config
        mtp_weights = self.to_device(torch.tensor(values.mtp_weights, dtype=self.model.wide))
        totals = torch.zeros(2, dtype=self.model.wide, device=sequences.device)
        for term, rows in enumerate(sequences.split(c.term_sequences), start=first_term):
            for i, micro_batch in enumerate(rows.split(c.pass_sequences)):
                self.world.seed(seed_of(c.seed, step, virtual_rank, term, i))
                tokens, targets = micro_batch[:, :-1], micro_batch[:, 1:]
                loss, next_token_loss = self.model.training_loss(tokens, targets, values.passes, mtp_weights)
                part = weight * len(micro_batch)
                (part * loss).backward()
                totals += part * torch.stack([loss.detach(), next_token_loss])
        return totals

    def scorer(self, masters: dict[str, Tensor], passes: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Load masters into the model -> the function that validation calls: 2 x (B, T) int64 -> (B, T) nats."""
        self.weights.refresh(masters)

        @torch.no_grad()
        def token_losses(tokens: Tensor, targets: Tensor) -> Tensor:
            self.model.eval()
            losses = self.model.token_losses(tokens, targets, passes)
            self.model.train()
            return losses

        return token_losses

    def warm_up(self, stages: list[Scheduled]) -> None:
        """Compile and warm up: compute everything once per stage, on random tokens. Masters and state do not change."""
        with torch.random.fork_rng([self.world.device] if self.world.cuda else []):
            for main_first in (True, False):  # the main process fills the compiler's cache for the others
                if self.world.is_main == main_first:
                    for values in stages:
                        self.warm_up_stage(values)
                    for bucket in self.shards.buckets:  # without a gradient and at a learning rate of 0: no change
                        self.optimizer.update(bucket, bucket.grad_shard, 0, replace(stages[0], lr=0.0, ema_weight=0.0))
                self.world.barrier()
        self.optimizer.step(0, replace(stages[0], lr=0.0, ema_weight=0.0))  # connects the processes

    def warm_up_stage(self, values: Scheduled) -> None:
        """One virtual rank's gradient and one batch of validation."""
        c = self.config
        device = self.world.device
        sequences = torch.randint(c.vocab_size, (c.micro_steps * c.micro_batch, c.sequence_len + 1), device=device)
        self.add_gradient(0, 0, sequences, values)
        self.shards.zero_grads()
        batch = torch.randint(c.vocab_size, (c.eval_batch, c.sequence_len + 1), device=device)
        self.scorer(self.masters, values.passes)(batch[:, :-1], batch[:, 1:])


# ======================================================================================================================
# Readout
# ======================================================================================================================


def average_weights(members: Iterable[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The weighted sum of members' masters, float32 or wider. members: (weight, masters) pairs."""
    average: dict[str, Tensor] = {}
    for weight, masters in members:
        for name, p in masters.items():
            term = weight * p.to(torch.promote_types(p.dtype, torch.float32))
            average[name] = average[name] + term if name in average else term
    return average


def unbiased_ema(run: Session, train: Training) -> dict[str, Tensor]:
    """The EMA of the masters, in their dtypes. It started from zero; the division corrects for that."""
    updates = math.ceil(run.step / run.config.ema_every)
    total_weight = 1 - ema_decay(run.config, run.plan.num_steps) ** updates
    ema = train.shards.gather_state("ema")
    return {name: (ema[name] / total_weight).to(master.dtype) for name, master in train.masters.items()}


def averages(run: Session, train: Training, recency: dict[str, float]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The averages that are read out, as (name, weights), made one after the other; the declared one comes last.

    recency: the weights of the members, by name.
    """

    def weighted(weights: dict[str, float]) -> dict[str, Tensor]:
        return average_weights((weight, run.load_member(member)) for member, weight in weights.items())

    if run.config.readout == "ema":
        yield "last", train.masters
        yield "exponential_moving_average", weighted(recency)  # the only member
        return
    yield "exponential_moving_average", unbiased_ema(run, train)
    if len(recency) == 1:
        yield "last", weighted(recency)
        return
    yield "weight_average_equal_weights", weighted(dict.fromkeys(recency, 1 / len(recency)))
    yield "weight_average", weighted(recency)


def read_out(run: Session, train: Training) -> int:
    """Score the averages of the weights, the declared one last -> exit code.

    They go into the model only: the masters stay those of the last step, so an interrupted readout can start again from
    the checkpoint.
    """
    c = run.config
    if c.readout == "ema":
        run.keep_member("moving_average", unbiased_ema(run, train))
    members = run.members[-max(1, c.kept_epochs) :]
    total = sum(range(1, len(members) + 1))
    recency = {member: (i + 1) / total for i, member in enumerate(members)}  # 1:2:3:4, the newest heaviest
    passes = num_passes(c, run.step - 1, run.plan.num_steps)

    for readout, average in averages(run, train, recency):
        token_losses = train.scorer(average, passes)
        if not run.read_out(readout, token_losses):
            return run.stopped(train.shards)
    return run.finish(readout, token_losses, mixing="weight", members=recency, stage={"passes": passes})


def load_members(run_dir: str | Path, device: str | torch.device) -> Iterator[tuple[float, Callable]]:
    """The readout of a finished run: yields (1.0, log_probs) once, for the average of its members' weights.

    log_probs maps tokens (B, T) int64 to log-probabilities of the next token (B, T, V) float32.
    """
    device = torch.device(device)
    saved, final = finished_run(Path(run_dir), "tiny")
    config = Config(**saved["config"])
    dtype = compute_dtype(config.dtype, device)
    attention = choose_attention("auto", config.n_embd // config.n_head, device, dtype)
    model = GPT(config, dtype, attention).to(device).eval().requires_grad_(False)
    folder = Path(run_dir) / "final"
    masters = average_weights((m["weight"], load_weights(folder / m["file"], dtype)) for m in final["members"])
    model.load_state_dict(compute_weights(masters, block_names(config), block_weights))

    @torch.no_grad()
    def log_probs(tokens: Tensor) -> Tensor:
        return model.log_probs(tokens.to(device), **final["stage"]).float()

    yield 1.0, log_probs


# ======================================================================================================================
# main
# ======================================================================================================================


def short_runs(config: Config) -> dict[str, dict]:
    """Settings of short runs to measure: of each stage, by its name, and of "all", with an epoch for each stage."""
    runs = {
        "one_pass": {"num_epochs": 1, "late_passes_from": 1.0},
        stage_name(config.late_passes): {"num_epochs": 1, "late_passes_from": 0.0},
    }
    runs["all"] = {"num_epochs": 2, "late_passes_from": 0.5} if config.late_passes > 1 else runs["one_pass"]
    others = {"swa_epochs": 0, "readout": "last", "decay_schedule": False}
    return {name: settings | others for name, settings in runs.items()}


def count_sizes(config: Config, dtype: torch.dtype) -> Sizes:
    """The memory and disk that the run needs, from the shapes alone."""
    masters = init_masters(config, dtype, torch.device("meta"))
    shards = make_shards(config, masters, World(0, 1, torch.device("meta")))
    elements = {name: p.numel() for name, p in masters.items()}
    layers = sum(count for name, count in elements.items() if name.startswith("transformer.h."))
    C = config.n_embd
    positions = config.pass_sequences * config.sequence_len
    master_bytes = sum(p.numel() * p.itemsize for p in masters.values())
    return Sizes(
        dtype=dtype,
        parameters=sum(elements.values()),
        layers=config.n_layer,
        layer_parameters=layers / config.n_layer,
        state_elements=sum(state.numel() for bucket in shards.buckets for state in bucket.state.values()),
        moved_parameters=sum(elements[name] for name in moved_names(config, list(masters))),
        master_bytes=master_bytes,
        layer_bytes=(14 * C + 3 * config.hidden) * dtype.itemsize + C,  # C for the dropout mask
        pass_positions=positions,
        logit_positions=min(CHUNK, positions),
        padded_vocab=config.padded_vocab,
        n_embd=C,
        member_bytes=master_bytes,  # members are masters as they are, so that their average is rounded once
        members=max(1, config.kept_epochs),
    )


def choose_head(wanted: str, config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """The products of lm_head in training: fp8 where the GPU has it. ValueError if fp8 is wanted and does not run.

    A CPU computes them too, slowly, and only where fp8 is asked for.
    """
    fits = dtype == torch.bfloat16 and config.n_embd % 16 == 0 and config.sequence_len % 16 == 0
    runs = fits and (device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9))
    if wanted == "fp8" and not runs:
        raise ValueError(
            "--head fp8 needs --dtype bfloat16, --n-embd and --sequence-len in multiples of 16, a GPU of compute "
            f"capability 8.9 or a CPU; here are {name_of(dtype)}, {config.n_embd}, {config.sequence_len}, "
            f"{device.type}: change them, or give --head plain"
        )
    if wanted == "auto":
        return "fp8" if runs and device.type == "cuda" else "plain"
    return wanted


def head_error(config: Config, device: torch.device, head: str) -> float:
    """The largest error of head_chunk in bfloat16, of its loss and gradients, on random numbers.

    The reference is the plain head in float32. The error of the loss is relative to it, those of the gradients are to
    their norms.
    """
    generator = torch.Generator(device).manual_seed(0)
    x = norm(torch.randn(512, config.n_embd, generator=generator, device=device))
    lm_head = 0.02 * torch.randn(config.n_embd, config.padded_vocab, generator=generator, device=device)
    targets = torch.randint(config.vocab_size, (512, 3), generator=generator, device=device)
    weights = torch.tensor([1.0, 0.5, 0.25], device=device)
    settings = weights, config.vocab_size, config.logit_cap
    found_loss, _, *found_grads = head_chunk(x.bfloat16(), lm_head.bfloat16(), targets, *settings, head)
    loss, _, *grads = head_chunk(x, lm_head, targets, *settings, "plain")
    pairs = zip([found_loss, *found_grads], [loss, *grads], strict=True)
    return max(((found.float() - expected).norm() / expected.norm()).item() for found, expected in pairs)


def choose_kernels(config: Config, device: torch.device, dtype: torch.dtype) -> list[Kernel]:
    """The kernels to use where there is a choice; ValueError if a wanted one does not run."""
    head_dim = config.n_embd // config.n_head
    attention = choose_attention(config.attention, head_dim, device, dtype)
    head = choose_head(config.head, config, device, dtype)
    windows = sorted({config.window(i) for i in range(config.n_layer)})
    shape = config.sequence_len, config.n_head, head_dim
    error = partial(attention_error, attention, shape, [(window, None) for window in windows], device)
    return [
        Kernel("attention", attention, plain="sdpa", fast="varlen", limit=0.05, error=error),
        Kernel("head", head, plain="plain", fast="fp8", limit=0.2, error=partial(head_error, config, device, head)),
    ]


def end_epoch(run: Session, train: Training) -> None:
    """Checkpoint, validate, and keep the weights if the readout needs them; also where the cap cuts an epoch short.

    The session skips what was done before a resume.
    """
    c = run.config
    epoch = run.plan.epoch_ended(run.step)
    name = f"epoch_{epoch}" if epoch else f"epoch_{run.plan.epoch[run.step] + 1}_cut_short"
    passes = num_passes(c, run.step - 1, run.plan.num_steps)  # as in the epoch just finished
    number = epoch or run.plan.epoch[run.step] + 1
    is_kept = number > c.num_epochs - c.kept_epochs or (run.stopped_by == "time_cap" and c.kept_epochs)
    run.save(train.shards)
    if run.validate(name, train.scorer(train.masters, passes)) and is_kept:
        run.keep_member(f"epoch_{number:02d}", train.masters)


def main(argv: list[str] | None = None) -> int:
    """Train, and return the exit code: 0 finished, or stopped by a signal and saved."""
    run = Session("tiny", Config, DEMO, argv, __file__, record_sizes)
    c = run.config
    plan = run.world.main_first(make_plan, c, run.splits["train"])
    run.require(plan, count_sizes(c, run.dtype), short_runs(c))
    kernels = run.world.main_first(choose_kernels, c, run.world.device, run.dtype)
    run.open({kernel.name: kernel.chosen for kernel in kernels}, slower_kernels(kernels))

    torch.manual_seed(c.seed)
    train = Training(c, run.world, run.dtype, run.kernels, run.compiled)
    loader = make_loader(c, run.splits["train"], plan, run.world)
    errors = check_kernels(kernels)
    train.warm_up([schedule(c, step, plan.num_steps) for step in plan.stages])
    run.warmed_up(errors)
    run.resume(train.shards)

    if c.eval_initial and run.step == 0:
        run.validate("initial", train.scorer(train.masters, num_passes(c, 0, plan.num_steps)))
    while True:
        if plan.epoch_ended(run.step):
            end_epoch(run, train)
        if not run.may_step():  # the last step is done, the next one would exceed the cap, or a signal came
            break
        if run.save_is_due:
            run.save(train.shards)
        batch = loader.batch(run.step)
        values = schedule(c, run.step, plan.num_steps)
        run.did_step(train.step(run.step, batch, values), asdict(values), batch)

    if run.stopped_by == "time_cap":
        end_epoch(run, train)
    if run.interrupted:
        return run.stopped(train.shards)
    return read_out(run, train)


if __name__ == "__main__":
    launch(main)
