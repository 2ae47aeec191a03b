"""The unlimited track of NanoGPT Slowrun: the lowest validation loss from 100M tokens of FineWeb, with any compute.

    python prepare_data.py                                       # once: writes fineweb_data/
    torchrun --standalone --nproc_per_node=8 unlimited/train.py  # the current record; published: 2.987, 80 h on 5 nodes
    python unlimited/train.py --resume runs/<name>               # continue a run that was stopped or killed
    python unlimited/train.py --list-records                     # the records before it; --record N trains one
    python unlimited/train.py --demo                             # toy sizes, on a CPU (prepare_data.py --source demo)

The result is an ensemble. Several chains are trained, independently of each other. A chain is one model, trained in
cycles of the learning rate: the end of a cycle gives a snapshot, and noise on the weights begins the next cycle. After
some cycles the last snapshot teaches the next one. In the end every snapshot gets a weight, learned on documents that
were kept from training, and the probabilities of the snapshots with the largest weights are averaged.

A group of processes, by default those of a machine, trains a chain together, and takes its chains one after the other.
Groups do not talk to each other before all chains are done, and their number does not change the result.

This file is the whole experiment, in reading order: Config, Model, Optimizer, Schedules, Data order, Training step,
Chain, Selection, Readout, main. What no record may change (the score, the clock, the run folder) is in slowrun/, and so
is the plumbing (processes, flags, checkpoints, communication).

Notation in shapes: B sequences, T positions, C = n_embd, H = n_head, D = C / H, L = n_layer, V = vocab_size, M members.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(next(p for p in Path(__file__).resolve().parents if (p / "slowrun").is_dir())))

from slowrun.config import RunConfig, flag_of, require_at_least
from slowrun.data import Loader, Split, read_json, sha256_file, shuffled_documents, shuffled_micro_steps
from slowrun.folder import finished_run, try_to_write_json, write_atomically
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
    slower_kernels,
    soft_cap,
)
from slowrun.machine import compute_dtype, peak_flops
from slowrun.plan import Sizes, Stage, StepPlan, stages_of
from slowrun.scoring import Score
from slowrun.session import Session, launch
from slowrun.sharded import Bucket, Shards
from slowrun.weights import ComputeWeights, compute_weights
from slowrun.world import VIRTUAL_RANKS, World, processes_here, seed_of

# ======================================================================================================================
# Config
# ======================================================================================================================


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The experiment. The defaults are the current record, and every field is a flag: n_layer is --n-layer."""

    # Model
    vocab_size: int = 50257  # token ids in the data, V
    sequence_len: int = 2048  # tokens per sequence, T
    n_layer: int = 30  # transformer blocks, L; even, because the U-Net pairs them
    n_head: int = 16  # attention heads, H
    n_embd: int = 2048  # width of the residual stream, C
    window_pattern: str = "SSSL"  # attention window by layer, repeated: S is T/2, L is T; the last layer is always L
    logit_cap: float = 15.0  # logits are soft-capped to cap * tanh(logits / cap)
    dropout: float = 0.1  # dropout probability on the outputs of attention and MLP
    replay_start: int = 15  # first layer that is replayed; in the second half of the layers
    replay_end: int = 25  # one past the last layer that is replayed
    replay_loops: int = 4  # how many times these layers run again, in training and in the readout
    replay_from: float = 0.0  # fraction of a cycle before layer replay begins; 1 for never
    mtp_weight: float = 0.3  # weight of the loss on the token after next; 0 for no such loss, and no block for it

    # Chains and cycles
    chains: int = 5  # models that are trained independently of each other; chain c has seed + c
    cycles: int = 96  # cycles of the learning rate in a chain; the end of each gives a snapshot
    cycle_epochs: int = 2  # passes over the training data in a cycle
    batch_tokens: int = 524288  # tokens per optimizer step in the middle half of the cycles
    outer_batch_tokens: int = 393216  # tokens per optimizer step in the other cycles
    micro_batch: int = 2  # sequences per micro-step of one virtual rank
    device_batch: int = 0  # sequences per forward pass; fewer save memory, same mathematics; 0 for micro_batch
    eval_batch: int = 2  # sequences per forward pass in validation, per process
    processes_per_chain: int = 0  # processes that train a chain together: 1, 2, 4 or 8; 0 for those of a machine
    perturb_first: float = 0.25  # noise after the first cycle, in standard deviations of each parameter
    perturb_last: float = 0.05  # noise after the last cycle but one; in between it follows half a cosine
    time_cap_min: float = 0.0  # this track has no cap
    seed: int = 42  # seed of chain 0: its initial weights, dropout, data order and noise

    # Distillation
    teach_after: int = 8  # cycles after which the last snapshot becomes the teacher of the next cycle; 0 for never
    teach_weight: float = 0.45  # weight of the divergence from the teacher; the other losses have the rest
    teach_temperature: float = 1.2  # of teacher and student in that divergence

    # Optimizer
    lr_multiplier: float = 0.25  # factor on all the learning rates below but mix_lr
    matrix_lr: float = 0.04  # Muon, all matrices not named below
    embedding_lr: float = 0.15  # AdamW, wte and value embedding tables
    head_lr: float = 0.002  # AdamW, lm_head
    scalar_lr: float = 0.1  # AdamW, x0_lambdas; resid_lambdas and skip_weights get 1% of it
    mix_lr: float = 0.02  # AdamW, q_mix, k_mix and v_mix
    weight_decay: float = 1.3  # of matrices, embedding tables and lm_head, at the end of a cycle
    clip: float = 1.0  # largest norm of the gradient of all parameters; 0 for no clipping

    # Schedules of a cycle
    warmdown: float = 1.0  # fraction of a cycle, at its end, over which the learning rate falls linearly
    lr_low: float = 0.08  # factor on the learning rate at the end of a cycle
    decay_low: float = 0.7  # factor on the weight decay at the start of a cycle; it rises to 1 as the rate falls

    # Readout
    val_sequences: int = 4880  # sequences of the validation set and of the holdout that are scored, at most
    fitness_tokens: int = 132000  # the first documents, up to this many tokens, are kept from training to weigh members
    keep: int = 0  # snapshots of a chain that stay: those of most weight within it, and the newest; 0 for all
    add_chains: int = 0  # with --resume of a finished run: how many chains to train in addition
    select_only: bool = False  # with --resume: train nothing, weigh and score the snapshots on the disk

    # Kernels
    attention: Literal["auto", "varlen", "sdpa"] = "auto"  # auto: varlen, flash attention, where the GPU has it

    # Switches of earlier records
    members: Literal["snapshots", "independent"] = "snapshots"  # a cycle continues from the one before, or starts over
    first_cycle_epochs: int = 0  # passes over the training data in the first cycle; 0 for cycle_epochs
    selection: Literal["learned", "uniform"] = "learned"  # weights of the members: learned, or equal
    average: Literal["probability", "logit"] = "probability"  # what of the members is averaged
    leave_out_first: bool = False  # the first member of each chain takes no part in the readout
    meta_gradient: bool = False  # take the second half of each gradient at a point moved down the first half's
    meta_step: float = 0.5  # length of the meta-gradient's step, over all the matrices it moves, at the full rate
    stochastic_depth: float = 0.0  # probability of dropping the last layer; linear in the layer, 0 for the first
    mlp: Literal["swiglu", "relu2"] = "swiglu"  # relu2: squared ReLU, of width 4C
    value_embedding: Literal["projection", "table"] = "projection"  # of x0, or a table that is looked up by token
    u_net: bool = True  # skips from the first half of the layers to the second
    head_gates: bool = True  # a gate on the output of each attention head
    head_mixes: bool = True  # interleaved head attention
    exclusive: bool = False  # exclusive self-attention
    proj_init: Literal["normal", "zero"] = "normal"  # initial values of every c_proj
    row_norm: bool = True  # normalize the rows of Muon's updates before they are orthogonalized
    shuffle: Literal["documents", "micro_steps", "none"] = "documents"  # what each epoch shuffles

    def __post_init__(self):
        super().__post_init__()
        check_config(self)

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
    def micro_step_tokens(self) -> int:
        """Tokens of one micro-step on all virtual ranks."""
        return VIRTUAL_RANKS * self.micro_batch * self.sequence_len

    @property
    def pass_sequences(self) -> int:
        """Sequences of a forward pass in training."""
        return min(self.device_batch or self.micro_batch, self.micro_batch)

    @property
    def has_teacher(self) -> bool:
        """Whether some cycle has a teacher."""
        return 0 < self.teach_after < self.cycles

    def window(self, layer: int) -> int:
        """The number of earlier positions that a layer attends to, at most. Layer L is the extra block (MTP)."""
        is_last = layer >= self.n_layer - 1
        letter = self.window_pattern[layer % len(self.window_pattern)]
        return self.sequence_len if is_last or letter == "L" else self.sequence_len // 2

    def has_value_embedding(self, layer: int) -> bool:
        """Whether a layer has a value embedding: every second one, counted from the last."""
        return layer % 2 == (self.n_layer - 1) % 2

    def layer_order(self, replay: bool) -> list[int]:
        """The layers in the order in which they run; replayed ones several times."""
        loops = self.replay_loops if replay else 0
        replayed = loops * list(range(self.replay_start, self.replay_end))
        return [*range(self.replay_end), *replayed, *range(self.replay_end, self.n_layer)]


def check_config(c: Config) -> None:
    """Refuse settings that do not go together (ValueError)."""
    for name in ("vocab_size", "n_layer", "n_head", "chains", "cycles", "cycle_epochs", "micro_batch"):
        require_at_least(c, name, 1)
    for name in ("replay_loops", "mtp_weight", "perturb_first", "perturb_last", "clip", "meta_step"):
        require_at_least(c, name, 0)
    for name in ("first_cycle_epochs", "teach_after", "keep", "processes_per_chain", "add_chains", "device_batch"):
        require_at_least(c, name, 0)
    require_at_least(c, "fitness_tokens", 1)
    require_at_least(c, "sequence_len", 4)
    require_at_least(c, "n_embd", 32)  # gates read the first 32 channels
    if c.n_embd % (2 * c.n_head):
        raise ValueError(f"n_embd {c.n_embd} is not a multiple of 2 * n_head = {2 * c.n_head}: change --n-embd")
    if c.n_layer % 2 and c.u_net:
        raise ValueError(f"n_layer {c.n_layer} is odd: the U-Net pairs layers, change --n-layer, or give --no-u-net")
    if not c.window_pattern or set(c.window_pattern) - set("SL"):
        raise ValueError(f"window_pattern {c.window_pattern!r} must consist of the letters S and L")
    if not c.n_layer // 2 <= c.replay_start < c.replay_end <= c.n_layer:
        raise ValueError(
            f"replay_start {c.replay_start} and replay_end {c.replay_end} do not span layers of the second half, "
            f"{c.n_layer // 2} ... {c.n_layer - 1}: change --replay-start and --replay-end"
        )
    for name in ("dropout", "stochastic_depth", "lr_low"):
        if not 0 <= getattr(c, name) < 1:
            raise ValueError(f"{flag_of(name)} {getattr(c, name)} is not in [0, 1)")
    for name in ("teach_weight", "warmdown", "replay_from", "decay_low"):
        if not 0 <= getattr(c, name) <= 1:
            raise ValueError(f"{flag_of(name)} {getattr(c, name)} is not in [0, 1]")
    for name in ("logit_cap", "teach_temperature"):
        if not getattr(c, name) > 0:
            raise ValueError(f"{flag_of(name)} {getattr(c, name)} must be positive")
    if c.time_cap_min:
        raise ValueError(f"--time-cap-min is {c.time_cap_min}: the unlimited track has no cap")
    if c.processes_per_chain and VIRTUAL_RANKS % c.processes_per_chain:
        raise ValueError(f"--processes-per-chain is {c.processes_per_chain}: it must be 1, 2, 4 or 8")
    check_batch(c)
    check_readout(c)


def check_batch(c: Config) -> None:
    """Refuse batches that do not divide into micro-steps, halves and passes (ValueError)."""
    for name in ("batch_tokens", "outer_batch_tokens"):
        require_at_least(c, name, 1)
        tokens = getattr(c, name)
        if tokens % c.micro_step_tokens:
            raise ValueError(
                f"{name} {tokens} is not a multiple of {VIRTUAL_RANKS} virtual ranks x micro_batch {c.micro_batch} x "
                f"sequence_len {c.sequence_len} = {c.micro_step_tokens}: change {flag_of(name)}"
            )
        if c.meta_gradient and tokens // c.micro_step_tokens % 2:
            raise ValueError(
                f"the meta-gradient cannot halve {tokens // c.micro_step_tokens} micro-step(s): make them even with "
                f"{flag_of(name)} or --micro-batch, or give --no-meta-gradient"
            )
    if c.micro_batch % c.pass_sequences:  # all passes have one shape
        raise ValueError(
            f"device_batch {c.device_batch} does not divide micro_batch, {c.micro_batch}: change --device-batch"
        )


def check_readout(c: Config) -> None:
    """Refuse readouts that make no sense (ValueError)."""
    if c.selection == "learned" and c.average == "logit":
        raise ValueError("--average logit needs --selection uniform: weights are learned for averaged probabilities")
    if c.selection == "uniform" and c.keep:
        raise ValueError("--keep needs --selection learned: snapshots are dropped by their weight")
    if c.leave_out_first and c.cycles == 1:
        raise ValueError("--leave-out-first leaves nothing of a single cycle: raise --cycles")


DEMO = {  # --demo: every technique, at a size that two CPU cores train in less than three minutes
    "data_dir": "demo_data", "vocab_size": 257, "sequence_len": 128, "n_layer": 4, "n_head": 2, "n_embd": 64,
    "replay_start": 2, "replay_end": 3, "replay_loops": 1, "chains": 2, "cycles": 3, "cycle_epochs": 1,
    "teach_after": 2, "fitness_tokens": 16000, "batch_tokens": 8192, "outer_batch_tokens": 4096, "micro_batch": 4,
    "eval_batch": 16, "val_sequences": 248, "lr_multiplier": 1.0, "weight_decay": 0.3, "dropout": 0.05,
    "compile": "off", "processes_per_chain": 1,
}  # fmt: skip

# A resume may change how chains are distributed over processes and how members are weighed, but not the training
READOUT_FIELDS = ("selection", "average", "leave_out_first")
RESUME_MAY_CHANGE = frozenset({"processes_per_chain", "add_chains", "select_only", *READOUT_FIELDS})


def record_sizes(settings: dict) -> dict:
    """Toy sizes for a published record: those of the demo, with no more chains and cycles than the record has."""
    sizes = DEMO | {"first_cycle_epochs": 0}
    for name in ("chains", "cycles", "teach_after"):
        if name in settings:
            sizes[name] = min(DEMO[name], settings[name])
    if settings.get("outer_batch_tokens") == Config.batch_tokens:  # one batch size in all cycles
        sizes["outer_batch_tokens"] = DEMO["batch_tokens"]
    return sizes


# ======================================================================================================================
# Model
# ======================================================================================================================

# There are two sets of weights. The optimizer updates the masters, which are float32 and have the benchmark's names
# (transformer.h.3.attn.c_q.weight). The modules below hold the compute weights, which are bfloat16 on a GPU: head
# mixing is applied to them already, and q, k, v and gate, up are stacked into one matrix each.


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


# --------------------------------------------------------------------------------------------------------------- blocks


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


# --------------------------------------------------------------------- what is compiled: layers of a kind share a graph


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


# --------------------------------------------------------------------------------------------------------- distillation


def capped_distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    teach_weight: float,
    temperature: float,
    vocab_size: int,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Distillation (arXiv 1503.02531): loss of n positions, and its gradient with respect to the logits before the cap.

    logits, teacher_logits (n, padded V), targets (n,) int64. Returns the sum over the positions of

        (1 - teach_weight) * nats + teach_weight * temperature^2 * KL(teacher || student),

    where KL is between the capped logits divided by the temperature; the sum of nats alone, both () float32 or wider;
    and the gradient of the former (n, padded V) in the logits' dtype, rounded once. Columns from vocab_size on are
    ignored.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    bent = torch.tanh(logits[:, :vocab_size].to(wide) / cap)
    teacher_bent = torch.tanh(teacher_logits[:, :vocab_size].to(wide) / cap)
    log_probs = (cap * bent).log_softmax(-1)
    soft_log_probs = (cap / temperature * bent).log_softmax(-1)
    teacher_log_probs = (cap / temperature * teacher_bent).log_softmax(-1)

    nats = -log_probs.gather(1, targets[:, None]).sum()
    divergence = (teacher_log_probs.exp() * (teacher_log_probs - soft_log_probs)).sum()
    loss = (1 - teach_weight) * nats + teach_weight * temperature**2 * divergence

    is_target = torch.arange(vocab_size, device=targets.device) == targets[:, None]
    grad = (1 - teach_weight) * (log_probs.exp() - is_target.to(wide))
    grad = grad + teach_weight * temperature * (soft_log_probs.exp() - teacher_log_probs.exp())
    grad = grad * (1 - bent.square())  # through the soft cap
    return loss, nats, F.pad(grad.to(logits.dtype), (0, logits.size(1) - vocab_size))


def taught_head_chunk(
    x: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    teacher_x: Tensor,
    teacher_head: Tensor,
    teach_weight: float,
    temperature: float,
    vocab_size: int,
    cap: float,
):
    """The part of HeadLoss for some positions with a teacher: x, teacher_x (n, C), both heads (padded V, C)."""
    logits = F.linear(x, lm_head)
    teacher_logits = F.linear(teacher_x, teacher_head)
    settings = teach_weight, temperature, vocab_size, cap
    loss, nats, grad = capped_distillation(logits, teacher_logits, targets, *settings)
    return loss, nats, grad @ lm_head, grad.T @ x


# ------------------------------------------------------------------------------------------------------------------ GPT


class GPT(nn.Module):
    """Decoder-only transformer: a U-Net of blocks, of which some layers are replayed.

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
        self.taught_head_chunk = taught_head_chunk
        self.cross_entropy = cross_entropy

    def compile_layers(self) -> None:
        """Compile layer by layer: gradients become available during the backward pass, and the graphs are few."""
        compiled = partial(torch.compile, dynamic=False, fullgraph=True)
        self.run_layer = compiled(run_layer)
        self.run_mtp_layer = compiled(run_mtp_layer)
        self.head_chunk = compiled(head_chunk)
        self.taught_head_chunk = compiled(taught_head_chunk)
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

    def taught_loss(self, x: Tensor, targets: Tensor, teacher: GPT, teacher_x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean losses of capped_distillation, () each: final streams x, teacher_x (B, T, C), targets (B, T)."""
        c = self.config
        chunk = partial(
            self.taught_head_chunk,
            teacher_head=teacher.lm_head.weight,
            teach_weight=c.teach_weight,
            temperature=c.teach_temperature,
            vocab_size=c.vocab_size,
            cap=c.logit_cap,
        )
        positions = targets.flatten(), teacher_x.flatten(0, 1)
        loss, next_token_loss = HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, chunk, *positions)
        return loss / targets.numel(), next_token_loss / targets.numel()

    def training_loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        replay: bool,
        dropped: Collection[int] = (),
        teacher: GPT | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Next-token loss, with or without a teacher, and multi-token prediction by one extra block (arXiv 2412.19437).

        tokens, targets (B, T) int64; replay, dropped: as in forward -> (the weighted loss, the next-token loss), both
        () in nats per token. At position t < T - 1 the extra block reads the final stream and the embedding of target
        t, and predicts target t + 1. A teacher, which is in evaluation mode, predicts the next token only.
        """
        c = self.config
        T = tokens.size(1)
        x = self(tokens, replay, dropped)  # (B, T, C)
        if teacher is None:
            untaught_weight = 1.0
            loss = next_token_loss = self.head_loss(x, targets)
        else:
            untaught_weight = 1.0 - c.teach_weight  # of the losses that do not depend on the teacher
            with torch.no_grad():
                teacher_x = teacher(tokens, replay=c.replay_from < 1)  # as it was at the end of its cycle
            loss, next_token_loss = self.taught_loss(x, targets, teacher, teacher_x)
        if not c.mtp_weight:
            return loss, next_token_loss.detach()

        next_embedding = norm(self.transformer.wte(targets[:, :-1]))  # (B, T - 1, C)
        z = self.mtp_proj(torch.cat([x[:, :-1], next_embedding], dim=-1))  # (B, T - 1, C)
        is_dropped = len(c.layer_order(replay)) in dropped  # its call comes after those of the layers
        z = self.run_mtp_layer(self.mtp_block, z, self.cos[: T - 1], self.sin[: T - 1], is_dropped)
        mtp_loss = self.head_loss(z, targets[:, 1:])
        return loss + untaught_weight * c.mtp_weight * mtp_loss, next_token_loss.detach()


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
    row_norm: bool = False  # Muon's

    @property
    def layout(self) -> Literal["stacked", "flat"]:
        """The layout of the shards: Muon needs whole matrices; AdamW works on elements."""
        return "stacked" if self.method == "muon" else "flat"


def optimizer_groups(config: Config, names: list[str]) -> list[Group]:
    """The optimizer table: every master is in exactly one group."""
    decay = config.weight_decay
    lr = config.lr_multiplier
    tables = ["transformer.wte.weight", *(name for name in names if name.startswith("ve_tables."))]
    scalars = [name for name in ("resid_lambdas", "skip_weights") if name in names]
    mixes = [name for name in names if name.endswith("_mix")]
    groups = [
        Group("adamw", ["lm_head.weight"], lr * config.head_lr, decay, betas=(0.8, 0.95)),
        # a group each, because AdamW's temporaries are as large as its largest group
        *(Group("adamw", [name], lr * config.embedding_lr, decay, betas=(0.8, 0.95)) for name in tables),
        Group("adamw", scalars, lr * config.scalar_lr * 0.01, 0.0, betas=(0.8, 0.95)),
        Group("adamw", ["x0_lambdas"], lr * config.scalar_lr, 0.0, betas=(0.96, 0.95)),
        Group("adamw", mixes, config.mix_lr, 0.0, betas=(0.8, 0.95)),
    ]
    adamw_names = {name for group in groups for name in group.names}
    matrices = [name for name in names if name not in adamw_names]
    groups.append(Group("muon", matrices, lr * config.matrix_lr, decay, row_norm=config.row_norm))
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


def muon_update(p, grad, momentum, second_moment, lr, weight_decay, mu, dtype: torch.dtype, row_norm: bool) -> None:
    """One Muon step on n matrices of one shape, in place.

    Nesterov momentum, row normalization (MuonEq-R, arXiv 2603.28254), orthogonalization by Polar Express in `dtype`,
    variance reduction by NorMuon (arXiv 2510.05491), cautious weight decay (arXiv 2510.12402). p, grad, momentum
    (n, rows, cols); second_moment (n, rows, 1) or (n, 1, cols); lr, weight_decay, mu () float32 or wider.
    """
    # Nesterov momentum
    momentum.copy_(mu * momentum + (1 - mu) * grad)
    update = (1 - mu) * grad + mu * momentum

    # Row normalization: every row gets norm 1
    if row_norm:
        update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)

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
    """The masters and their optimizer state: Muon's and AdamW's moments."""
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
    return shards


class Optimizer:
    """Muon and AdamW on sharded masters."""

    def __init__(self, shards: Shards, clip: float, muon_dtype: torch.dtype, compiled: bool):
        """clip: largest norm of the gradient; 0 for no clipping. muon_dtype: of the orthogonalization."""
        self.shards = shards
        self.clip = clip
        self.muon_dtype = muon_dtype
        self.muon_update = torch.compile(muon_update, dynamic=False) if compiled else muon_update

    @torch.no_grad()
    def step(self, values: Scheduled) -> None:
        """Update the masters from shards.grads.

        ZeRO-2 (arXiv 1910.02054): a process receives the summed gradients of its shard, updates that shard, and gathers
        the others' masters. Clipping needs all gradients before the first update.
        """
        reduced = list(self.shards.reduce())
        if self.clip:
            self.clip_gradients([grad for _, grad in reduced])
        for bucket, grad in reduced:
            self.update(bucket, grad, values)
            self.shards.gather(bucket)
        self.shards.wait()

    def clip_gradients(self, grads: list[Tensor]) -> None:
        """Scale the gradients, in place, to a norm over all parameters of at most `clip`. Collective.

        grads: this process's shards. The same as torch.nn.utils.clip_grad_norm_ on all parameters.
        """
        squares = torch.stack([grad.square().sum() for grad in grads]).sum()
        self.shards.world.all_reduce(squares)
        scale = (self.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale)

    @torch.no_grad()
    def update(self, bucket: Bucket, grad: Tensor, values: Scheduled) -> None:
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
            self.muon_update(bucket.shard, grad, *moments, lr, decay, mu, self.muon_dtype, group.row_norm)
        else:
            t = scalar(values.updates)
            adamw_update(bucket.shard, grad, state["exp_avg"], state["exp_avg_sq"], lr, decay, group.betas, t)


# ======================================================================================================================
# Schedules: pure functions of the config and of the position in a cycle, from 0 to 1, or of the cycle, from 0
# ======================================================================================================================


def lr_multiplier(config: Config, position: float) -> float:
    """1, then linearly down to lr_low over the last `warmdown` of a cycle."""
    fallen = max(0.0, position - (1 - config.warmdown)) / config.warmdown if config.warmdown else 0.0
    return 1.0 - (1.0 - config.lr_low) * fallen


def weight_decay_multiplier(config: Config, position: float) -> float:
    """From decay_low to 1 as the learning rate falls from 1 to lr_low."""
    fallen = (1.0 - lr_multiplier(config, position)) / (1.0 - config.lr_low)
    return config.decay_low + (1.0 - config.decay_low) * fallen


def batch_tokens(config: Config, cycle: int) -> int:
    """Tokens per optimizer step: larger in the middle half of the cycles, which a single cycle belongs to."""
    last = config.cycles - 1
    is_in_the_middle = 2 * (last - abs(2 * cycle - last)) >= last
    return config.batch_tokens if is_in_the_middle else config.outer_batch_tokens


def perturbation_scale(config: Config, cycle: int) -> float:
    """Scale of the noise after a cycle: half a cosine from perturb_first to perturb_last."""
    last = config.cycles - 2  # the last cycle that another follows
    position = cycle / last if last else 0.0
    return config.perturb_last + (config.perturb_first - config.perturb_last) * (1 + math.cos(math.pi * position)) / 2


def is_taught(config: Config, cycle: int) -> bool:
    """Whether the snapshot before a cycle teaches it."""
    return 0 < config.teach_after <= cycle < config.cycles


def replays(config: Config, position: float) -> bool:
    """Whether layers are replayed."""
    return config.replay_from <= position and config.replay_from < 1


@dataclass(frozen=True)
class ChainPlan(StepPlan):
    """The plan of a chain. A cycle ends at the end of an optimizer step; an epoch may end within a step."""

    cycle: np.ndarray  # (N + 1,) int64, cycles completed before step s

    def cycle_ended(self, step: int) -> int:
        """The cycle that the step before this one completed, counted from 1; 0 if it completed none."""
        ended = step > 0 and self.cycle[step] > self.cycle[step - 1]
        return int(self.cycle[step]) if ended else 0

    def first_step(self, step: int) -> int:
        """The first step of the cycle that a step is in."""
        return int(np.searchsorted(self.cycle, self.cycle[step]))

    def position(self, step: int) -> float:
        """The position of a step in its cycle, from 0 to 1."""
        first = self.first_step(step)
        end = int(np.searchsorted(self.cycle, self.cycle[step] + 1))
        return (step - first) / (end - first)


@dataclass(frozen=True)
class Scheduled:
    """The values of all schedules at a step: what the step uses is what the metrics record."""

    lr: float  # factor on the learning rates of the groups
    weight_decay: float  # factor on the weight decay of the groups
    momentum: float  # Muon's
    meta_step: float  # length of the meta-gradient's step; 0 without it
    replay: bool  # whether layers are replayed
    taught: bool  # whether there is a teacher
    updates: int  # of the optimizer's state with this step, for AdamW's bias correction
    cycle: int  # counted from 1


def schedule(config: Config, step: int, plan: ChainPlan) -> Scheduled:
    """Evaluate all schedules at a step."""
    cycle = int(plan.cycle[step])
    position = plan.position(step)
    lr = lr_multiplier(config, position)
    state_began = plan.first_step(step) if config.members == "independent" else 0
    return Scheduled(
        lr=lr,
        weight_decay=weight_decay_multiplier(config, position),
        momentum=0.95,
        meta_step=config.meta_step * lr if config.meta_gradient else 0.0,
        replay=replays(config, position),
        taught=is_taught(config, cycle),
        updates=step - state_began + 1,
        cycle=cycle + 1,
    )


# ======================================================================================================================
# Data order
# ======================================================================================================================


def split_fitness(config: Config, split: Split) -> tuple[Split, Split]:
    """Split the training data -> (the fitness set, which is never trained on; the rest).

    The fitness set is the first whole documents that have up to fitness_tokens tokens together.
    """
    ends = np.append(split.doc_starts[1:], len(split.tokens))
    count = int(np.searchsorted(ends, config.fitness_tokens, side="right"))
    size = int(ends[count - 1]) if count else 0
    found = f"the first documents of the training data that have up to {config.fitness_tokens} tokens have {size}"
    if size <= config.sequence_len:
        needed = config.sequence_len + 1
        raise ValueError(f"{found}, a sequence of the fitness set needs {needed}: raise --fitness-tokens")
    if count == len(ends):
        raise ValueError(f"{found}, and nothing is left to train on: lower --fitness-tokens")
    fitness = replace(split, tokens=split.tokens[:size], doc_starts=split.doc_starts[:count])
    rest = replace(split, tokens=split.tokens[size:], doc_starts=split.doc_starts[count:] - size)
    return fitness, rest


def epoch_sequences(config: Config, split: Split, epoch: int) -> np.ndarray:
    """The training sequences of an epoch of a chain, counted from 1, in the order of training: (n, T + 1) uint16.

    Every epoch, the first included, permutes the documents, starting from their order in the epoch before. They are
    concatenated and cut into sequences, which are permuted too. Earlier records cut the file once, and permute
    micro-steps or nothing.
    """
    length = config.sequence_len + 1
    first_seed = config.seed * 1009 + 1000  # of epoch 0; it differs between chains
    seeds = range(first_seed + 1, first_seed + epoch + 1)
    if config.shuffle == "documents":
        return shuffled_documents(split, length, document_seeds=seeds, sequence_seed=first_seed + epoch + 1000)
    return shuffled_micro_steps(split, length, config.micro_batch, seeds if config.shuffle == "micro_steps" else ())


def micro_steps_per_epoch(config: Config, split: Split) -> int:
    """Micro-steps of all virtual ranks in an epoch; the sequences that do not fill one are dropped."""
    num_sequences = len(split.tokens) // (config.sequence_len + 1)
    return num_sequences // (VIRTUAL_RANKS * config.micro_batch)


def make_plan(config: Config, split: Split) -> ChainPlan:
    """The plan of every chain: the steps of its cycles, and the tokens and epochs that they complete."""
    c = config
    epoch_tokens = micro_steps_per_epoch(c, split) * c.micro_step_tokens
    largest = max(c.batch_tokens, c.outer_batch_tokens)
    if epoch_tokens < largest:
        raise ValueError(
            f"the training data makes {len(split.tokens) // (c.sequence_len + 1)} sequences of {c.sequence_len} + 1 "
            f"tokens, an optimizer step needs {largest // c.sequence_len}: use more data, or lower --batch-tokens and "
            "--outer-batch-tokens or --sequence-len"
        )
    batches, steps = [], []
    for cycle in range(c.cycles):
        epochs = c.first_cycle_epochs if cycle == 0 and c.first_cycle_epochs else c.cycle_epochs
        batches.append(batch_tokens(c, cycle))
        steps.append(max(1, round(epochs * epoch_tokens / batches[-1])))
    tokens = np.cumsum([0, *np.repeat(batches, steps)])
    cycle_of = np.repeat(np.arange(c.cycles + 1), [*steps, 1])
    plan = ChainPlan(tokens=tokens, epoch=tokens // epoch_tokens, stages={}, cycle=cycle_of)

    kinds = {(replay, taught): make_stage(c, replay, taught) for replay in (False, True) for taught in (False, True)}
    by_step = [kinds[replays(c, plan.position(s)), is_taught(c, int(cycle_of[s]))] for s in range(plan.num_steps)]
    return replace(plan, stages=stages_of(by_step))


def make_stage(config: Config, replay: bool, taught: bool) -> Stage:
    """The steps with or without layer replay, with or without a teacher."""
    layers = len(config.layer_order(replay))
    heads = 2 if config.mtp_weight else 1
    without_replay = "_without_replay" if 0 < config.replay_from < 1 and not replay else ""
    flops = flops_per_token(config, replay)
    if not taught:
        return Stage(f"student{without_replay}", flops, layers, layers, heads)
    teacher_replays = config.replay_from < 1
    forward_and_backward = flops_per_token(replace(config, mtp_weight=0.0), teacher_replays)
    teacher_layers = len(config.layer_order(teacher_replays))
    flops += forward_and_backward / 3  # the teacher only predicts
    return Stage(f"teacher{without_replay}", flops, layers + teacher_layers, layers, heads + 1)


def make_loader(config: Config, split: Split, plan: ChainPlan, world: World) -> Loader:
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
    """The masters that the meta-gradient moves: all of Muon's matrices."""
    if not config.meta_gradient:
        return []
    return [name for group in optimizer_groups(config, names) if group.method == "muon" for name in group.names]


class Training:
    """The state of training a chain: the masters with their optimizer state, the model, and the teacher.

    Besides its number, a step depends on nothing but `shards` and `teacher`, which are what checkpoints hold.
    """

    def __init__(self, config: Config, world: World, dtype: torch.dtype, kernels: dict[str, str], compiled: bool):
        self.config = config
        self.world = world
        self.dtype = dtype
        self.shards = make_shards(config, init_masters(config, dtype, world.device), world)
        self.masters = self.shards.masters
        self.model = GPT(config, dtype, **kernels).to(world.device)
        self.teacher: GPT | None = None  # only predicts; the compute weights of the snapshot before this cycle
        if config.has_teacher:
            self.teacher = GPT(config, dtype, **kernels).to(world.device).eval().requires_grad_(False)
        self.teacher_is_loaded = False
        if compiled:
            torch._dynamo.config.recompile_limit = 256  # graphs of a function: training, validation, windows, replay
            self.model.compile_layers()
            if self.teacher is not None:
                self.teacher.compile_layers()
        self.weights = ComputeWeights(self.model, block_names(config), block_weights)
        in_bfloat16 = world.cuda and dtype == torch.bfloat16
        self.optimizer = Optimizer(self.shards, config.clip, dtype if in_bfloat16 else self.model.wide, compiled)
        moved = moved_names(config, list(self.masters))
        self.first_grads = {name: torch.zeros_like(self.shards.grads[name]) for name in moved}

    def step(self, step: int, batch: Tensor, values: Scheduled) -> dict[str, Tensor]:
        """One optimizer step -> this process's part of the losses, () each, which the session sums and reads later.

        batch (virtual ranks, sequences, T + 1) int64, on the CPU.
        """
        if self.world.cuda:
            batch = batch.pin_memory().to(self.world.device, non_blocking=True)
        losses = torch.zeros(2, dtype=self.model.wide, device=self.world.device)
        for virtual_rank, sequences in zip(self.world.virtual_ranks, batch, strict=True):
            losses += self.add_gradient(step, virtual_rank, sequences, values)
        with torch.profiler.record_function("optimizer"):  # as profiles name it
            self.optimizer.step(values)
        self.shards.zero_grads()
        return {"train_loss": losses[1], "train_loss_with_mtp": losses[0]}

    def add_gradient(self, step: int, virtual_rank: int, sequences: Tensor, values: Scheduled) -> Tensor:
        """Add a virtual rank's part of the mean gradient to shards.grads -> its part of the mean losses (2,).

        The meta-gradient, which is off in the record, takes the second half's gradient at weights moved down the first
        half's. A virtual rank does this alone, so the number of processes makes no difference. sequences (n, T + 1)
        int64.
        """
        grads = self.shards.grads
        weight = 1 / (VIRTUAL_RANKS * (len(sequences) // self.config.micro_batch))  # of the mean loss of a micro-step
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
        self.weights.refresh(self.masters | self.move(values.meta_step))
        first_micro_step = len(first) // self.config.micro_batch
        losses += self.backward(step, virtual_rank, second, values, weight, first_micro_step)
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
        self,
        step: int,
        virtual_rank: int,
        sequences: Tensor,
        values: Scheduled,
        weight: float,
        first_micro_step: int = 0,
    ) -> Tensor:
        """Accumulate the gradient of weight * loss over micro-steps in the model -> the sums of weight * losses (2,).

        sequences (n, T + 1) int64. The seed of dropout depends on the sequences' place in the batch, not on processes;
        stochastic depth is drawn once per micro-step, the same for all virtual ranks.
        """
        c = self.config
        teacher = self.teacher if values.taught else None
        totals = torch.zeros(2, dtype=self.model.wide, device=sequences.device)
        for micro_step, rows in enumerate(sequences.split(c.micro_batch), start=first_micro_step):
            dropped = draw_dropped(c, values.replay, step, micro_step)
            for i, micro_batch in enumerate(rows.split(c.pass_sequences)):
                self.world.seed(seed_of(c.seed, step, virtual_rank, micro_step, i))
                tokens, targets = micro_batch[:, :-1], micro_batch[:, 1:]
                loss, next_token_loss = self.model.training_loss(tokens, targets, values.replay, dropped, teacher)
                part = weight * len(micro_batch) / len(rows)
                (part * loss).backward()
                totals += part * torch.stack([loss.detach(), next_token_loss])
        return totals

    def scorer(self, masters: dict[str, Tensor], replay: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """Load masters into the model -> the function that validation calls: 2 x (B, T) int64 -> (B, T) nats."""
        self.weights.refresh(masters)

        @torch.no_grad()
        def token_losses(tokens: Tensor, targets: Tensor) -> Tensor:
            self.model.eval()
            losses = self.model.token_losses(tokens, targets, replay)
            self.model.train()
            return losses

        return token_losses

    def teach(self, snapshot: dict[str, Tensor]) -> None:
        """Make a snapshot the teacher."""
        self.weights.refresh(snapshot)
        self.teacher.load_state_dict(self.model.state_dict())
        self.teacher_is_loaded = True

    @torch.no_grad()
    def perturb(self, scale: float, seed: int) -> None:
        """Add Gaussian noise to each master of several elements, `scale` times its own standard deviation (unbiased).

        It is drawn on the CPU, so it is the same on all processes and devices.
        """
        generator = torch.Generator().manual_seed(seed)
        for master in self.masters.values():
            if master.numel() > 1:
                wide = master.to(torch.promote_types(master.dtype, torch.float32))
                noise = torch.randn(master.shape, generator=generator).to(wide)
                master.copy_(wide + scale * wide.std() * noise)

    @torch.no_grad()
    def start_again(self, seed: int) -> None:
        """Draw new initial weights, and reset the optimizer state."""
        torch.manual_seed(seed)
        for name, initial in init_masters(self.config, self.dtype, self.world.device).items():
            self.masters[name].copy_(initial)
        for bucket in self.shards.buckets:
            self.world.broadcast(bucket.values)
            for state in bucket.state.values():
                state.zero_()

    def state_dict(self) -> dict:
        """The shards, and the teacher if there is one, on the CPU. Collective; {} but on the main process."""
        shards = self.shards.state_dict()
        if not self.world.is_main:
            return {}
        teacher = self.teacher.state_dict() if self.teacher_is_loaded else {}
        return {"shards": shards, "teacher": {name: p.cpu() for name, p in teacher.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Load a state_dict that the main process has. Collective."""
        self.shards.load_state_dict(state.get("shards", {}))
        saved = state.get("teacher", {})
        self.teacher_is_loaded = self.world.on_main(lambda: bool(saved))
        for name, p in self.teacher.named_parameters() if self.teacher_is_loaded else ():
            if self.world.is_main:
                p.copy_(saved[name])
            self.world.broadcast(p)

    def warm_up(self, stages: list[Scheduled]) -> None:
        """Compile and warm up: compute everything once per stage, on random tokens. Masters and state do not change."""
        if self.teacher is not None:
            self.teach(self.masters)
            self.teacher_is_loaded = False
        with torch.random.fork_rng([self.world.device] if self.world.cuda else []):
            for main_first in (True, False):  # the main process fills the compiler's cache for the others
                if self.world.is_main == main_first:
                    for values in stages:
                        self.warm_up_stage(values)
                    for bucket in self.shards.buckets:  # without a gradient and at a learning rate of 0: no change
                        self.optimizer.update(bucket, bucket.grad_shard, replace(stages[0], lr=0.0))
                self.world.barrier()
        self.optimizer.step(replace(stages[0], lr=0.0))  # connects the processes

    def warm_up_stage(self, values: Scheduled) -> None:
        """One virtual rank's gradient and one batch of validation, with no block dropped and with all."""
        c = self.config
        device = self.world.device
        micro_steps = 2 if c.meta_gradient else 1
        sequences = torch.randint(c.vocab_size, (micro_steps * c.micro_batch, c.sequence_len + 1), device=device)
        self.add_gradient(0, 0, sequences, values)
        if c.stochastic_depth:
            calls = range(len(c.layer_order(values.replay)) + 1)
            teacher = self.teacher if values.taught else None
            rows = sequences[: c.pass_sequences]
            loss, _ = self.model.training_loss(rows[:, :-1], rows[:, 1:], values.replay, calls, teacher)
            loss.backward()
        self.weights.zero_sums()
        self.shards.zero_grads()
        batch = torch.randint(c.vocab_size, (c.eval_batch, c.sequence_len + 1), device=device)
        self.scorer(self.masters, values.replay)(batch[:, :-1], batch[:, 1:])


# ======================================================================================================================
# Chain
# ======================================================================================================================


def member_weights(masters: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A snapshot of the masters: matrices in the compute dtype, lambdas and mixes unchanged.

    The heads are not mixed yet.
    """
    return {name: p if p.ndim < 2 or name.endswith("_mix") else p.to(dtype) for name, p in masters.items()}


def replay_at_the_end(config: Config, plan: ChainPlan) -> bool:
    """Whether layers are replayed in the last step of a chain, and so in the readout."""
    return schedule(config, plan.num_steps - 1, plan).replay


def chain_name(number: int) -> str:
    return f"chain_{number:02d}"


def chain_folder(run_folder: Path, number: int) -> Path:
    return run_folder / "chains" / chain_name(number)


def snapshot_path(run_folder: Path, member: dict) -> Path:
    return chain_folder(run_folder, member["chain"]) / "final" / member["file"]


def read_snapshot(path: Path) -> dict[str, Tensor]:
    """The parameters of a snapshot, without its losses."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names if not name.startswith("nats.")}


def read_nats(path: Path, split: str) -> Tensor:
    """A snapshot's losses (n, T) float32 on a split, in nats per target, in the order of EvalSet."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(f"nats.{split}")


def read_ledger(folder: Path) -> dict:
    """The ledger of a chain, from ledger.json in its folder: its state, steps, times, and its snapshots with losses.

    state: waiting, training, stopped or finished. layout: the number of groups of processes, the index of the group
    that trained it, and the processes in that group. ValueError if the file is damaged.
    """
    path = folder / "ledger.json"
    empty = {"chain": int(folder.name.removeprefix("chain_")), "state": "waiting", "members": [], "layout": [1, 0, 1]}
    empty |= dict.fromkeys(("steps", "tokens", "flops", "train_time_s", "process_s", "wall_time_s"), 0)
    return read_json(path, set(empty), f"delete {folder} to train this chain again") if path.exists() else empty


def write_ledger(chain: Session, state: str, earlier: dict) -> str:
    """Write ledger.json -> why it is not written; empty if it is. Collective.

    earlier: the ledger as it was when this process began or resumed the chain, with the present layout.
    """
    failure = ""
    if chain.world.is_main:
        seconds = chain.clock.train_time_s
        ledger = {
            "chain": earlier["chain"],
            "seed": chain.config.seed,
            "state": state,
            "steps": chain.step,
            "train_time_s": seconds,
            "tokens": int(chain.plan.tokens[chain.step]),
            "flops": float(chain.plan.flops[chain.step]),
            "wall_time_s": chain.wall_time_s(),
            "members": [member for member in chain.member_files.values() if "sha256" in member],
            "process_s": earlier["process_s"] + (seconds - earlier["train_time_s"]) * chain.world.size,
            "layout": earlier["layout"],
        }
        failure = try_to_write_json(chain.folder.path / "ledger.json", ledger)
        if failure:
            chain.log(f"ledger.json is NOT saved: {failure}")
    return chain.world.on_main(lambda: failure)


def train_chain(
    run: Session, group: World, number: int, splits: dict[str, Split], kernels: list[Kernel], repeats: int
) -> str:
    """Train a chain, or continue it -> finished, stopped (by a signal) or full disk. Collective for the group.

    splits: train, fitness and val. repeats: chains that this group trains one after the other.
    """
    c = replace(run.config, seed=run.config.seed + number)
    plan = run.plan
    eval_sets = {
        "fitness": run.eval_set(splits["fitness"], group, max_sequences=len(splits["fitness"].tokens)),
        "val": run.eval_set(splits["val"], group),
    }
    label = f"chain {number}"
    chain = run.child(f"chains/{chain_name(number)}", number, label, c, group, plan, eval_sets, repeats)
    earlier = group.on_main(read_ledger, chain.folder.path)
    earlier["layout"] = [run.world.size // group.size, run.world.rank // group.size, group.size]

    torch.manual_seed(c.seed)
    train = Training(c, group, run.dtype, run.kernels, run.compiled)
    loader = make_loader(c, splits["train"], plan, group)
    errors = check_kernels(kernels)
    first_steps = {stage: step for step, stage in reversed(plan.stages.items())}
    train.warm_up([schedule(c, step, plan) for step in first_steps.values()])
    chain.warmed_up(errors)
    chain.resume(train)
    write_ledger(chain, "training", earlier)

    if c.eval_initial and chain.step == 0:
        chain.validate("initial", train.scorer(train.masters, replays(c, 0.0)))
    while True:
        cycle = plan.cycle_ended(chain.step)
        if cycle:
            end_cycle(chain, train, number, cycle)
            write_ledger(chain, "training", earlier)
        if not chain.may_step():  # the last step is done, or a signal came
            break
        if chain.save_is_due:
            chain.save(train)
            write_ledger(chain, "training", earlier)
        if cycle:  # only now, because a checkpoint of this step must not have it
            begin_cycle(c, train, cycle)
        batch = loader.batch(chain.step)
        values = schedule(c, chain.step, plan)
        chain.did_step(train.step(chain.step, batch, values), asdict(values), batch)

    if chain.interrupted:
        chain.stopped(train)
    full_disk = group.sum([len(chain.unsaved)])[0] > 0
    outcome = "stopped" if chain.interrupted or full_disk else "finished"
    if write_ledger(chain, outcome, earlier) or full_disk:
        outcome = "full disk"
    chain.close()
    if outcome == "finished" and group.is_main:
        shutil.rmtree(chain.folder.path / "checkpoints", ignore_errors=True)
    return outcome


def end_cycle(chain: Session, train: Training, number: int, cycle: int) -> None:
    """Make a snapshot, score it as it will be stored, and keep it; it may become the teacher of the next cycle.

    number: of the chain. cycle: counted from 1. What was done before a resume is skipped. After a signal the rest is
    left to the next resume, which begins at this step.
    """
    c = chain.config
    chain.save(train)
    snapshot = member_weights(train.masters, train.dtype)
    name = f"{chain_name(number)}_cycle_{cycle:03d}"
    if name not in chain.members:
        nats = chain.token_nats(train.scorer(snapshot, schedule(c, chain.step - 1, chain.plan).replay))
        if nats is None:
            return
        fitness_loss = chain.eval_sets["fitness"].score(nats["fitness"]).loss
        chain.validate(f"cycle_{cycle}", nats, fitness_loss=fitness_loss)
        score = chain.scores[f"cycle_{cycle}"]
        losses = {"val_loss": score.loss, "val_bpb": score.bpb, "fitness_loss": fitness_loss}
        by_target = {}  # losses per target, of all processes, for the selection and the readout
        for split, eval_set in chain.eval_sets.items():
            by_target[f"nats.{split}"] = chain.world.gather_rows(nats[split].float(), eval_set.count)
        chain.keep_member(name, snapshot | by_target, chain=number, cycle=cycle, **losses)
    if c.keep:
        drop_lightest_member(chain)
    if is_taught(c, cycle):
        train.teach(snapshot)
    chain.save(train)  # adds the score and the snapshot to the checkpoint


def drop_lightest_member(chain: Session) -> None:
    """Drop the snapshot of least weight, except the newest, if the chain has more than are kept."""

    def lightest() -> str:
        nats = []
        for name, member in chain.member_files.items():
            waiting = chain.unsaved.get(name)
            path = chain.folder.path / "final" / member["file"]
            nats.append(waiting["nats.fitness"] if waiting else read_nats(path, "fitness"))
        return chain.members[int(weights_of_nats(nats)[:-1].argmin())]

    if len(chain.members) > chain.config.keep:
        chain.drop_member(chain.world.on_main(lightest))


def begin_cycle(config: Config, train: Training, cycle: int) -> None:
    """Start the cycle that follows this one, counted from 1: add noise, or draw new weights for independent members."""
    seed = seed_of(config.seed, cycle)
    if config.members == "snapshots":
        train.perturb(perturbation_scale(config, cycle - 1), seed)
    else:
        train.start_again(seed)


def unfinished_chains(run: Session) -> list[int]:
    """The numbers of the chains to train, by what is in the run folder. ValueError if a checkpoint is damaged.

    So it is found at once, and not after the days that the chains before it take.
    """
    run_folder, c = run.folder.path, run.config
    stop_mark(run_folder).unlink(missing_ok=True)  # of an earlier attempt
    shutil.rmtree(run_folder / "checkpoints", ignore_errors=True)  # chains have their own
    numbers = []
    for number in range(c.chains):
        folder = chain_folder(run_folder, number)
        if read_ledger(folder)["state"] == "finished":
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            continue
        numbers.append(number)
        newest = max((folder / "checkpoints").glob("step_*.json"), default=None)
        if newest is None:
            continue
        advice = f"delete it to resume chain {number} from before it"
        sha256 = read_json(newest, {"sha256"}, advice)["sha256"]
        tensors = newest.with_suffix(".pt")
        if not tensors.exists() or sha256_file(tensors) != sha256:
            raise ValueError(f"{newest} or its tensors are damaged: {advice}")
    return [] if c.select_only else numbers


def stop_mark(run_folder: Path) -> Path:
    """The path of the file by which a group of processes tells the others that it stops."""
    return run_folder / "stopped"


def look_around(run_folder: Path, num_chains: int) -> tuple[list[int], bool]:
    """(The chains that are not finished, whether a group of processes has stopped), by what is on the disk."""
    waiting = []
    for number in range(num_chains):
        try:
            is_finished = read_ledger(chain_folder(run_folder, number))["state"] == "finished"
        except (OSError, ValueError):  # a network disk may fail for a moment: the caller looks again
            is_finished = False
        if not is_finished:
            waiting.append(number)
    return waiting, stop_mark(run_folder).exists()


def wait_for_other_groups(run: Session, group: World) -> bool:
    """Wait until all chains are finished; False if this group or another one is asked to stop.

    Groups meet on the disk, because a collective operation would time out within days of waiting.
    """
    is_announced = False
    while True:
        waiting, has_stopped = group.on_main(look_around, run.folder.path, run.config.chains)
        if has_stopped or group.any([run.stop_requested])[0]:
            return False
        if not waiting:
            return True
        if not is_announced:
            run.log(f"waiting for chains {waiting}")
        is_announced = True
        time.sleep(0.5)


# ======================================================================================================================
# Selection: weights of members by their losses on the fitness set
# ======================================================================================================================

MIXTURE_SIZES = (8, 16, 32, 64, 128, 256)  # members of the mixtures that are read out; the largest is the declared one


def learn_weights(probabilities: Tensor) -> Tensor:
    """Weights of members by gradient descent: probabilities (M, N) float64 of N fitness targets -> (M,).

    They are a softmax, found by 300 steps of AdamW, from equal weights, on the mixture's mean nats.
    """
    alpha = torch.zeros(len(probabilities), dtype=probabilities.dtype, requires_grad=True)
    optimizer = torch.optim.AdamW([alpha], lr=0.5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for _ in range(300):
        loss = -(alpha.softmax(0) @ probabilities).log().mean()
        (alpha.grad,) = torch.autograd.grad(loss, alpha)
        torch.nn.utils.clip_grad_norm_([alpha], 1.0)
        optimizer.step()
    return alpha.detach().softmax(0)


def weights_of_nats(nats: list[Tensor]) -> Tensor:
    """The weights (M,) that learn_weights finds, from the losses (n, T) of each member on the fitness set."""
    return learn_weights(torch.stack([(-member.double().flatten()).exp() for member in nats]))


def mixtures(weights: Tensor, sizes: tuple[int, ...] = MIXTURE_SIZES) -> dict[int, Tensor]:
    """The mixtures of the K largest of the weights (M,), by K: weights (M,) that are 0 for the others and sum to 1.

    K takes the sizes below M, or M alone if there are none.
    """
    order = weights.argsort(descending=True, stable=True)
    found = {}
    for size in [size for size in sizes if size < len(weights)] or [len(weights)]:
        kept = torch.zeros_like(weights)
        kept[order[:size]] = weights[order[:size]]
        found[size] = kept / kept.sum()
    return found


def find_candidates(run: Session) -> list[dict]:
    """The members whose files are undamaged, in the order of chains and cycles; others are left out. Collective."""
    c, world, run_folder = run.config, run.world, run.folder.path
    members = []
    for number in range(c.chains):
        of_chain = read_ledger(chain_folder(run_folder, number))["members"]
        members += [member for member in of_chain if not (c.leave_out_first and member["cycle"] == 1)]
    sound = [0.0] * len(members)
    for i in range(world.rank, len(members), world.size):  # a terabyte to hash: the processes divide the work
        path = snapshot_path(run_folder, members[i])
        sound[i] = float(path.exists() and sha256_file(path) == members[i]["sha256"])
    candidates = []
    for member, is_sound in zip(members, world.sum(sound), strict=True):
        if is_sound:
            candidates.append(member)
        else:
            run.log(f"WARNING: {snapshot_path(run_folder, member)} is missing or damaged: it is left out")
    return candidates


def weigh(run: Session, candidates: list[dict]) -> tuple[list[float], dict[int, list[float]]]:
    """Find (weights of all candidates; weights of the mixtures, by the number of their members), on the main process.

    ValueError if there is no candidate.
    """
    M = len(candidates)
    if not M:
        raise ValueError(f"{run.folder.path} has no snapshot to read out: continue its training with --resume")
    if run.config.selection == "uniform":
        equal = [1 / M] * M
        return equal, {M: equal}
    nats = [read_nats(snapshot_path(run.folder.path, member), "fitness") for member in candidates]
    weights = weights_of_nats(nats)
    return weights.tolist(), {size: kept.tolist() for size, kept in mixtures(weights).items()}


# ======================================================================================================================
# Readout
# ======================================================================================================================


@dataclass
class Ensemble:
    """The result of the readout. Scores and losses are on the main process."""

    candidates: list[dict]
    weights: list[float]  # of all candidates
    members: list[dict]  # of the declared mixture, each with its weight
    scores: dict[str, Score]  # of the declared mixture, by split
    readouts: dict[str, float]  # validation losses by name
    mixture_losses: dict[int, float]  # validation losses of the mixtures, by the number of members


def is_stopping(run: Session) -> bool:
    """Whether a signal came to this process, or another process has stopped."""
    return run.stop_requested or stop_mark(run.folder.path).exists()


def make_scorer(run: Session) -> GPT:
    """A model to load members into."""
    model = GPT(run.config, run.dtype, **run.kernels).to(run.world.device).eval().requires_grad_(False)
    if run.compiled:
        model.compile_layers()
    return model


def load_snapshot(model: GPT, path: Path) -> None:
    """Load a member into a model."""
    device = model.lm_head.weight.device
    masters = {name: p.to(device) for name, p in read_snapshot(path).items()}
    model.load_state_dict(compute_weights(masters, block_names(model.config), block_weights))


@torch.no_grad()
def score_members(run: Session, members: list[dict], split: str) -> list[Path] | None:
    """Compute the losses of members on a split, in scores/, unless they exist -> their paths; None if stopped.

    Each member is loaded once, by one process, which scores all sequences.
    """
    world, folder = run.world, run.folder.path / "scores"
    folder.mkdir(exist_ok=True)
    replay = replay_at_the_end(run.config, run.plan)
    paths = [folder / f"{split}_{member['sha256'][:16]}_{member['file']}" for member in members]
    mine = list(zip(paths, members, strict=True))[world.rank :: world.size]
    missing = [(path, member) for path, member in mine if not path.exists()]
    if missing:
        model = make_scorer(run)
        eval_set = run.eval_set(run.splits[split], World(0, 1, world.device))
    for path, member in missing:
        if is_stopping(run):
            break
        load_snapshot(model, snapshot_path(run.folder.path, member))
        nats = eval_set.nats(partial(model.token_losses, replay=replay)).float()
        write_atomically(path, partial(save_file, {f"nats.{split}": nats}))
        run.log(f"{split}: {sum(path.exists() for path in paths)} of {len(paths)} members scored")
    while not all(path.exists() for path in paths) and not is_stopping(run):
        time.sleep(0.2)
    return None if world.any([is_stopping(run)])[0] else paths


def mix_from_disk(paths: list[Path], split: str, mixtures: list[list[float]]) -> list[Tensor]:
    """Nats (n, T) float64 of mixtures of the probabilities in these files, each of which is read once."""
    sums: list[Tensor] = []
    for path, weights in zip(paths, zip(*mixtures, strict=True), strict=True):
        probabilities = (-read_nats(path, split).double()).exp()
        sums = sums or [torch.zeros_like(probabilities) for _ in mixtures]
        for total, weight in zip(sums, weights, strict=True):
            total.add_(probabilities, alpha=weight)
    return [-total.log() for total in sums]


def mix_logits(run: Session, members: list[dict], split: str) -> Score | None:
    """Score of the average of the members' capped logits on a split; None if a signal came. Collective.

    The average needs the whole distribution, so the sequences are distributed over the processes, and the members are
    loaded one by one for each batch, which is slower than averaging probabilities.
    """
    model = make_scorer(run)
    replay = replay_at_the_end(run.config, run.plan)
    eval_set = run.eval_set(run.splits[split], run.world)

    @torch.no_grad()
    def token_losses(tokens: Tensor, targets: Tensor) -> Tensor:
        total = 0.0
        for member in members:
            load_snapshot(model, snapshot_path(run.folder.path, member))
            log_probs = model.log_probs(tokens, replay)  # logits up to a constant, which the softmax removes
            total = total + member["weight"] * log_probs
        return -total.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    nats = eval_set.nats(token_losses, interrupted=lambda: run.world.any([is_stopping(run)])[0])
    return None if nats is None else eval_set.score(nats)


def read_out(run: Session, is_declared: bool) -> Ensemble | None:
    """Weigh the members, and score their mixture on the validation set and the holdout; None if stopped. Collective.

    The declared readout averages the probabilities of the members of the largest mixture. Recorded beside it: the
    smaller mixtures, equal weights for all, and the best member. Only a declared readout of all chains looks at the
    holdout.
    """
    world, run_folder = run.world, run.folder.path
    candidates = find_candidates(run)
    weights, by_size = world.on_main(weigh, run, candidates)
    largest = by_size[max(by_size)]
    members = [member | {"weight": w} for member, w in zip(candidates, largest, strict=True) if w > 0]
    waiting, _ = world.on_main(look_around, run_folder, run.config.chains)
    has_holdout = "holdout" in run.splits and is_declared and not waiting
    splits = ["val", "holdout"] if has_holdout else ["val"]
    ensemble = Ensemble(candidates, weights, members, scores={}, readouts={}, mixture_losses={})
    best_member = min(member["val_loss"] for member in candidates)

    if run.config.average == "logit":
        for split in splits:
            ensemble.scores[split] = mix_logits(run, members, split)
            if ensemble.scores[split] is None:
                return None
        ensemble.readouts = {"logit_average": ensemble.scores["val"].loss, "best_member": best_member}
        return ensemble

    holdout_paths = score_members(run, members, "holdout") if has_holdout else []
    if holdout_paths is None or world.any([is_stopping(run)])[0]:
        return None
    if world.is_main:  # snapshots have their losses on the validation set
        alone = World(0, 1, world.device)
        equal = [1 / len(candidates)] * len(candidates)
        paths = [snapshot_path(run_folder, member) for member in candidates]
        eval_set = run.eval_set(run.splits["val"], alone)
        scores = [eval_set.score(nats) for nats in mix_from_disk(paths, "val", [*by_size.values(), equal])]
        *of_mixtures, equal_score = scores
        ensemble.scores["val"] = of_mixtures[list(by_size).index(max(by_size))]
        ensemble.mixture_losses = {size: score.loss for size, score in zip(by_size, of_mixtures, strict=True)}
        for size, loss in ensemble.mixture_losses.items():
            ensemble.readouts[f"mixture_of_{size}"] = loss
        ensemble.readouts |= {"equal_weights": equal_score.loss, "best_member": best_member}
        if has_holdout:
            (nats,) = mix_from_disk(holdout_paths, "holdout", [[member["weight"] for member in members]])
            ensemble.scores["holdout"] = run.eval_set(run.splits["holdout"], alone).score(nats)
    return ensemble


def sum_up_chains(run: Session) -> dict:
    """The entries of result.json about the training of all chains, from their ledgers."""
    ledgers = [read_ledger(chain_folder(run.folder.path, number)) for number in range(run.config.chains)]
    groups: dict[tuple[int, int], list[dict]] = {}  # by number of groups, and index of the group
    for ledger in ledgers:
        count, index, _ = ledger["layout"]
        groups.setdefault((count, index), []).append(ledger)
    longest = {}
    for key in ("train_time_s", "wall_time_s"):  # groups train in parallel: the longest time, for each number of groups
        sums = {where: sum(ledger[key] for ledger in of_group) for where, of_group in groups.items()}
        counts = {count for count, _ in sums}
        longest[key] = sum(max(s for (count, _), s in sums.items() if count == n) for n in counts)
    total = {k: sum(ledger[k] for ledger in ledgers) for k in ("steps", "tokens", "flops", "process_s")}
    peak = peak_flops(run.world.device)
    is_finished = all(ledger["state"] == "finished" for ledger in ledgers)
    return longest | {
        "status": "finished" if is_finished else "partial",
        "stopped_by": "steps" if is_finished else "select_only",
        "steps": total["steps"],
        "tokens": total["tokens"],
        "process_hours": total["process_s"] / 3600,
        "tokens_per_s": total["tokens"] / max(longest["train_time_s"], 1e-9),
        "mfu": total["flops"] / total["process_s"] / peak if peak and total["process_s"] else None,
        "world_size": max(ledger["layout"][0] * ledger["layout"][2] for ledger in ledgers),
        "groups": max(ledger["layout"][0] for ledger in ledgers),
    }


def make_result(run: Session, ensemble: Ensemble, is_declared: bool, epoch_tokens: int, readout_s: float) -> dict:
    """The content of result.json."""
    c = run.config
    chains = sum_up_chains(run)
    result = chains | {
        "readouts": ensemble.readouts,
        "chains": c.chains,
        "cycles": c.cycles,
        "candidates": len(ensemble.candidates),
        "chosen": len(ensemble.members),
        "selection": c.selection,
        "mixing": c.average,
        "leave_out_first": c.leave_out_first,
        "epochs": chains["tokens"] / epoch_tokens,
        "members": [{"file": member["file"], "weight": member["weight"]} for member in ensemble.members],
        "wall_time_s": chains["wall_time_s"] + readout_s,
        "time_cap_min": 0.0,
        "as_declared": is_declared,
    }
    hashes = {member["file"]: member["sha256"] for member in ensemble.members}
    return run.complete_result(result, ensemble.scores["val"], ensemble.scores.get("holdout"), hashes)


def save_final(run: Session, ensemble: Ensemble) -> str:
    """Link the members into final/, with members.json -> why it failed; empty if it did not."""
    run_folder = run.folder.path
    final = run_folder / "final"
    try:
        for path in final.iterdir():
            path.unlink()
        for member in ensemble.members:
            source = snapshot_path(run_folder, member)
            try:
                os.link(source, final / member["file"])  # takes no space
            except OSError:  # a disk without such links
                (final / member["file"]).symlink_to(os.path.relpath(source, final))
    except OSError as error:
        return str(error)
    stage = {"replay": replay_at_the_end(run.config, run.plan)}
    content = {"mixing": run.config.average, "stage": stage, "members": ensemble.members}
    return try_to_write_json(final / "members.json", content)


def draw_ensemble(run: Session, ensemble: Ensemble, losses: dict[int, float]) -> None:
    """curve.png: the members' validation losses and weights by cycle, the mixture's loss by the number of members."""
    from matplotlib.figure import Figure  # takes a second to import
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(run.folder.path.name)
    left, middle, right = figure.subplots(1, 3)
    chains = sorted({member["chain"] for member in ensemble.candidates})
    for k, chain in enumerate(chains):
        indices = [i for i, member in enumerate(ensemble.candidates) if member["chain"] == chain]
        cycles = [ensemble.candidates[i]["cycle"] for i in indices]
        val_losses = [ensemble.candidates[i]["val_loss"] for i in indices]
        left.plot(cycles, val_losses, "o-", markersize=3, linewidth=1, label=f"chain {chain}")
        shift = 0.4 * (k - (len(chains) - 1) / 2) / len(chains)  # so that points do not hide each other
        middle.plot([cycle + shift for cycle in cycles], [ensemble.weights[i] for i in indices], "o", markersize=3)
    left.axhline(list(losses.values())[-1], linestyle="--", linewidth=1, color="gray", label="the mixture")
    left.set(xlabel="cycle", ylabel="validation loss, nats per token", title="members")
    left.legend(fontsize=8)
    middle.set(xlabel="cycle", ylabel="weight", title="weights of the members", ylim=(0, None))
    right.plot([str(size) for size in losses], list(losses.values()), "o-")
    for size, loss in losses.items():
        offset = {"textcoords": "offset points", "xytext": (0, 6)}
        right.annotate(f"{loss:.4f}", (str(size), loss), ha="center", fontsize=8, **offset)
    right.set(xlabel="members in the mixture", ylabel="validation loss", title="mixtures")
    for axes in (left, middle):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    write_atomically(run.folder.path / "curve.png", partial(figure.savefig, format="png", dpi=120))


def publish(run: Session, ensemble: Ensemble, is_declared: bool, epoch_tokens: int, readout_s: float) -> str:
    """Write final/, curve.png, the mixtures' losses and the result, on the main process -> why it failed, or empty.

    A readout with other settings than the run's writes only a separate result, beside the declared one.
    """
    c, run_folder = run.config, run.folder.path
    if is_declared:
        (run_folder / "result.json").unlink(missing_ok=True)  # its description of final/ would be wrong
        failure = save_final(run, ensemble)
        if failure:
            return failure
    result = make_result(run, ensemble, is_declared, epoch_tokens, readout_s)
    heaviest = sorted(ensemble.members, key=lambda member: -member["weight"])[:8]
    shown = ", ".join(f"{m['weight']:.3f} chain {m['chain']} cycle {m['cycle']}" for m in heaviest)
    run.log(f"largest weights of {len(ensemble.members)}: {shown}")
    if not is_declared:
        without_first = "_without_first" if c.leave_out_first else ""
        return run.publish(result, f"result_{c.selection}_{c.average}{without_first}.json")
    losses = ensemble.mixture_losses or {len(ensemble.members): result["val_loss"]}
    for size, loss in losses.items():
        run.folder.record({"step": result["steps"], "mixture_of": size, "val_loss": loss})
    try:
        draw_ensemble(run, ensemble, losses)
    except Exception as error:  # a full disk, or a library's fault: no reason to end a run
        run.log(f"curve.png is not drawn: {type(error).__name__}: {error}")
    return run.publish(result)


def load_members(run_dir: str | Path, device: str | torch.device) -> Iterator[tuple[float, Callable]]:
    """The members of a finished run's readout, loaded one at a time: yields (weight, log_probs).

    log_probs maps tokens (B, T) int64 to log-probabilities of the next token (B, T, V) float32, until the next member
    is loaded (ValueError after that). The weights sum to 1; members.json says how the members are mixed.
    """
    device = torch.device(device)
    saved, final = finished_run(Path(run_dir), "unlimited")
    config = Config(**saved["config"])
    dtype = compute_dtype(config.dtype, device)
    attention = choose_attention("auto", config.n_embd // config.n_head, device, dtype)
    model = GPT(config, dtype, attention).to(device).eval().requires_grad_(False)
    loaded: list[dict] = []

    @torch.no_grad()
    def log_probs(member: dict, tokens: Tensor) -> Tensor:
        if loaded[-1] is not member:
            raise ValueError("the next member is loaded in its place: use members one at a time")
        return model.log_probs(tokens.to(device), **final["stage"]).float()

    for member in final["members"]:
        load_snapshot(model, Path(run_dir) / "final" / member["file"])
        loaded.append(member)
        yield member["weight"], partial(log_probs, member)


# ======================================================================================================================
# main
# ======================================================================================================================


def short_runs(config: Config) -> dict[str, dict]:
    """Settings of short runs to measure: of each stage, by its name, or that end with it, and of "all" stages."""
    both = {"chains": 1, "cycles": 2, "teach_after": 1, "cycle_epochs": 1, "first_cycle_epochs": 1}
    both["fitness_tokens"] = 20000  # of a small data set
    student = both | {"cycles": 1, "teach_after": 0}
    if config.has_teacher:
        return {"student": student, "teacher": both, "all": both}
    return {"student": student, "all": student}


def count_sizes(config: Config, dtype: torch.dtype, splits: dict[str, Split], num_groups: int) -> Sizes:
    """The memory and disk that the run needs, from the shapes alone. splits: those whose losses are kept."""
    masters = init_masters(config, dtype, torch.device("meta"))
    shards = make_shards(config, masters, World(0, 1, torch.device("meta")))
    elements = {name: p.numel() for name, p in masters.items()}
    parameters = sum(elements.values())
    layers = sum(count for name, count in elements.items() if name.startswith("transformer.h."))
    C, T = config.n_embd, config.sequence_len
    positions = config.pass_sequences * T
    members = config.chains * (min(config.keep, config.cycles) or config.cycles)
    targets = sum(len(split.tokens) // (T + 1) * T for split in splits.values())
    return Sizes(
        dtype=dtype,
        parameters=parameters,
        layers=config.n_layer,
        layer_parameters=layers / config.n_layer,
        state_elements=sum(state.numel() for bucket in shards.buckets for state in bucket.state.values()),
        moved_parameters=sum(elements[name] for name in moved_names(config, list(masters))),
        master_bytes=sum(p.numel() * p.itemsize for p in masters.values()),
        layer_bytes=(13 * C + 3 * config.hidden) * dtype.itemsize + 2 * C,
        pass_positions=positions,
        logit_positions=min(CHUNK, positions),
        padded_vocab=config.padded_vocab,
        n_embd=C,
        member_bytes=sum(p.numel() * p.itemsize for p in member_weights(masters, dtype).values()),
        members=members,
        frozen_parameters=parameters if config.has_teacher else 0,
        score_bytes=4 * members * targets,
        models=min(num_groups, config.chains),
    )


def choose_kernels(config: Config, device: torch.device, dtype: torch.dtype) -> list[Kernel]:
    """The kernels to use where there is a choice; ValueError if a wanted one does not run."""
    head_dim = config.n_embd // config.n_head
    chosen = choose_attention(config.attention, head_dim, device, dtype)
    windows = sorted({config.window(i) for i in range(config.n_layer)})
    shape = config.sequence_len, config.n_head, head_dim
    error = partial(attention_error, chosen, shape, [(window, None) for window in windows], device)
    return [Kernel("attention", chosen, plain="sdpa", fast="varlen", limit=0.05, error=error)]


def add_chains(run: Session) -> None:
    """Apply --add-chains, which is for finished runs (ValueError)."""
    c = run.config
    for name in ("add_chains", "select_only"):
        if getattr(c, name) and run.saved is None:
            raise ValueError(f"{flag_of(name)} needs --resume RUN_DIR")
    if not c.add_chains:
        return
    if not run.saved["finished"]:
        raise ValueError(
            f"--add-chains extends a finished run, and {run.saved['folder']} has {c.chains} chains to finish: --resume "
            "alone goes on with them"
        )
    run.extend(f"result_of_{c.chains}_chains.json", chains=c.chains + c.add_chains)


def describe_plan(run: Session, num_groups: int, group_size: int) -> dict[str, str]:
    """The header's lines on chains and groups, by title."""
    c, plan = run.config, run.plan
    batches = np.diff(plan.tokens)
    flops = float(plan.flops[-1])
    operations = f"{c.chains * flops:.3g} operations in all"
    if peak := peak_flops(run.world.device):
        rounds = math.ceil(c.chains / num_groups)
        hours = rounds * flops / (0.4 * peak * group_size) / 3600
        operations += f"; at 40% of the peak {hours:,.1f} h"
    steps = f"a chain has {plan.num_steps:,} steps of {batches.min():,} or {batches.max():,} tokens"
    groups = f"groups x processes: {num_groups} x {group_size}"
    return {"plan": f"{c.chains} chains of {c.cycles} cycles; {steps}; {groups}; {operations}"}


def stop(run: Session, failure: str = "") -> int:
    """Ask the other groups of processes to stop, and say how to resume -> exit code."""
    stop_mark(run.folder.path).touch()
    if failure:
        print(f"{Path(__file__).name}: error: {failure}", file=sys.stderr)
    code = run.stopped(None)
    return 1 if failure else code


def main(argv: list[str] | None = None) -> int:
    """Train the chains and read out their mixture -> exit code: 0 finished, or stopped by a signal and saved."""
    run = Session(
        "unlimited", Config, DEMO, argv, __file__, record_sizes,
        one_model=False, may_change=RESUME_MAY_CHANGE, reopened_by=frozenset({"add_chains", "select_only"}),
    )  # fmt: skip
    run.world.main_first(add_chains, run)
    c = run.config
    fitness, rest = run.world.main_first(split_fitness, c, run.splits["train"])
    splits = run.splits | {"train": rest, "fitness": fitness}
    plan = run.world.main_first(make_plan, c, rest)
    group_size = c.processes_per_chain or processes_here()
    num_groups = max(1, run.world.size // group_size)
    scored = {name: split for name, split in splits.items() if name != "train"}
    sizes = count_sizes(c, run.dtype, scored, num_groups)
    run.require(plan, sizes, short_runs(c), repeats=c.chains, processes=group_size, trains=not c.select_only)
    run.world.main_first(run.world.check_groups, group_size, "--processes-per-chain")
    group = run.world.split(group_size)
    kernels = run.world.main_first(choose_kernels, c, run.world.device, run.dtype)
    header = describe_plan(run, num_groups, group_size)
    run.open({kernel.name: kernel.chosen for kernel in kernels}, slower_kernels(kernels), header, has_children=True)
    if not (run.folder.path / "config.json").exists():
        raise ValueError(f"{run.folder.path} is not seen by all processes: --runs-dir must be on a shared disk")
    if num_groups > c.chains:
        idle = (num_groups - c.chains) * group_size
        run.log(f"WARNING: {idle} processes have nothing to train: use fewer machines, or raise --processes-per-chain")

    # The chains of this group, one after the other
    unfinished = run.world.on_main(unfinished_chains, run)
    numbers = unfinished[run.world.rank // group_size :: num_groups]
    for number in numbers:
        try:
            outcome = train_chain(run, group, number, splits, kernels, repeats=math.ceil(len(unfinished) / num_groups))
        except ValueError as error:  # another process has the chain's lock, or its files are damaged
            if number == numbers[0]:
                raise
            return stop(run, str(error))  # chains before it are finished, and stay
        if outcome != "finished":
            return stop(run, "the disk is full" if outcome == "full disk" else "")
        gc.collect()  # the next chain needs the memory
        if run.world.cuda:
            torch.cuda.empty_cache()

    # Wait for the chains of the other groups
    if not c.select_only and not wait_for_other_groups(run, group):
        return stop(run)

    # The readout
    began = time.monotonic()
    is_declared = all(getattr(c, name) == run.saved["config"][name] for name in READOUT_FIELDS)
    ensemble = read_out(run, is_declared)
    if ensemble is None:
        return stop(run)
    epoch_tokens = micro_steps_per_epoch(c, rest) * c.micro_step_tokens
    readout_s = time.monotonic() - began
    failure = run.world.on_main(publish, run, ensemble, is_declared, epoch_tokens, readout_s)
    return run.finished(failure)


if __name__ == "__main__":
    launch(main)
