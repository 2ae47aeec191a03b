"""The two-hour track of NanoGPT Slowrun: the lowest validation loss from 100M tokens of FineWeb in 2 hours on 8xH100.

    python prepare_data.py                                      # once: writes fineweb_data/
    torchrun --standalone --nproc_per_node=8 two_hour/train.py  # the current record; published: 3.139 in 117.6 minutes
    python two_hour/train.py --resume runs/<name>               # continue a run that was stopped or killed
    python two_hour/train.py --list-records                     # the records before it; --record N trains one
    python two_hour/train.py --demo                             # toy sizes, on a CPU (prepare_data.py --source demo)

This file is the whole experiment, in reading order: Config, Model, Optimizer, Schedules, Data order, Training step,
Readout, main. It is the limited track's model, trained for twice as long: with attention windows that grow, and rotary
frequencies that follow them. What no record may change (the score, the clock, the run folder) is in slowrun/, and so is
the plumbing (processes, flags, checkpoints, communication).

A batch is always split over 8 virtual ranks, and a process computes 8 / world_size of them, so 1, 2, 4 and 8 processes
compute the same run.

Notation in shapes: B sequences, T positions, C = n_embd, H = n_head, D = C / H, L = n_layer, V = vocab_size.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(next(p for p in Path(__file__).resolve().parents if (p / "slowrun").is_dir())))

from slowrun.config import RunConfig, require_at_least
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
    slower_kernels,
    soft_cap,
)
from slowrun.machine import compute_dtype
from slowrun.plan import Sizes, Stage, StepPlan, stages_of
from slowrun.scoring import mix_probabilities
from slowrun.session import Session, launch
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
    n_layer: int = 30  # transformer blocks, L; even, because the U-Net pairs them
    n_head: int = 14  # attention heads, H
    n_embd: int = 1792  # width of the residual stream, C
    window_pattern: str = "SSSL"  # attention window by layer, repeated: S is short, L long; the last layer is always L
    window_schedule: str = "1-6:256,768;7-13:768,1792;14-22:1280,2048"  # stages, FIRST_EPOCH-LAST_EPOCH:SHORT,LONG
    logit_cap: float = 10.0  # logits are soft-capped to cap * tanh(logits / cap)
    dropout: float = 0.1  # dropout probability on the outputs of attention and MLP
    stochastic_depth: float = 0.05  # probability of dropping the last layer; linear in the layer, 0 for the first
    replay_start: int = 15  # first layer that is replayed; in the second half of the layers
    replay_end: int = 21  # one past the last layer that is replayed
    replay_loops: int = 2  # how many times these layers run again, in training and in the readout
    replay_from_epoch: int = 14  # first epoch with layer replay; 0 for never
    mtp_weight: float = 0.3  # weight of the loss on the token after next; 0 for no such loss, and no block for it

    # Batch and length
    num_epochs: int = 22  # passes over the training data
    batch_tokens: int = 524288  # tokens per optimizer step
    micro_batch: int = 4  # sequences per micro-step of one virtual rank
    device_batch: int = 0  # sequences per forward pass; fewer save memory, same mathematics; 0 for micro_batch
    time_cap_min: float = 120.0  # minutes of training time; 0 lifts the cap, and the run is not eligible
    seed: int = 42  # seed of initial weights, dropout and stochastic depth; the order of the data does not depend on it

    # Optimizer
    lr_multiplier: float = 0.25  # factor on all the learning rates below but mix_lr
    matrix_lr: float = 0.04  # Muon, all matrices not named below
    embedding_lr: float = 0.15  # AdamW, wte
    head_lr: float = 0.002  # AdamW, lm_head
    scalar_lr: float = 0.1  # AdamW, x0_lambdas; resid_lambdas and skip_weights get 1% of it
    mix_lr: float = 0.02  # AdamW, q_mix, k_mix and v_mix
    weight_decay: float = 1.3  # initial weight decay of matrices, wte and lm_head
    meta_gradient: bool = False  # the limited track's, for --dropout 0.05 --stochastic-depth 0; not part of the record
    meta_step: float = 0.5  # length of the meta-gradient's step, over all the matrices it moves, before the warmdown

    # Schedules
    warmdown: float = 0.2  # fraction of the steps over which the learning rate falls to 0 at the end
    swa_epochs: int = 8  # last epochs, each with one cycle of learning rate and weight decay; 0 for none

    # Readout
    readout_epochs: int = 11  # last epochs whose predictions are averaged, with weights 1:2:3...

    # Kernels
    attention: Literal["auto", "varlen", "sdpa"] = "auto"  # auto: varlen, flash attention, where the GPU has it

    # Switches of earlier records
    head_mixes: bool = True  # interleaved head attention
    row_norm: bool = True  # normalize the rows of Muon's updates before they are orthogonalized
    decay_schedule: bool = True  # let the weight decay fall and rise; else it is constant
    warmdown_shape: Literal["sqrt", "linear"] = "sqrt"  # shape of the learning rate's fall
    shuffle: Literal["documents", "micro_steps"] = "documents"  # what each epoch shuffles

    def __post_init__(self):
        super().__post_init__()
        check_config(self)

    @property
    def padded_vocab(self) -> int:
        """V rounded up to a multiple of 64, which matrix products prefer."""
        return math.ceil(self.vocab_size / 64) * 64

    @property
    def hidden(self) -> int:
        """Width of the MLP: 8/3 C, rounded up to a multiple of 256."""
        return math.ceil((8 * self.n_embd // 3) / 256) * 256

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
        """Sequences that a virtual rank takes at a time: a micro-step, or half if the meta-gradient has only one."""
        return self.micro_batch // 2 if self.meta_gradient and self.micro_steps == 1 else self.micro_batch

    @property
    def pass_sequences(self) -> int:
        """Sequences of a forward pass in training."""
        return min(self.device_batch or self.term_sequences, self.term_sequences)

    @property
    def window_stages(self) -> list[WindowStage]:
        """The stages of window_schedule."""
        return parse_window_schedule(self.window_schedule, self.sequence_len)

    def window(self, layer: int, windows: tuple[int, int]) -> int:
        """The number of earlier positions that a layer attends to, at most. windows: a stage's short and long one."""
        short, long = windows
        if layer == self.n_layer:  # the block of multi-token prediction
            return self.sequence_len
        is_last = layer == self.n_layer - 1
        letter = self.window_pattern[layer % len(self.window_pattern)]
        return long if is_last or letter == "L" else short

    def has_value_embedding(self, layer: int) -> bool:
        """Whether a layer has a value embedding: every second one, counted from the last."""
        return layer % 2 == (self.n_layer - 1) % 2

    def layer_order(self, replay: bool) -> list[int]:
        """The layers in the order in which they run; replayed ones several times."""
        loops = self.replay_loops if replay else 0
        replayed = loops * list(range(self.replay_start, self.replay_end))
        return [*range(self.replay_end), *replayed, *range(self.replay_end, self.n_layer)]


@dataclass(frozen=True)
class WindowStage:
    """Epochs with the same attention windows."""

    first_epoch: int  # counted from 1
    last_epoch: int
    windows: tuple[int, int]  # short and long: numbers of earlier positions that layers attend to


def parse_window_schedule(text: str, sequence_len: int) -> list[WindowStage]:
    """The stages of a window schedule such as "1-6:256,768;7-22:768,1792".

    They begin with epoch 1 and leave none out, and the long window never shrinks; else a ValueError names the stage.
    """
    stages: list[WindowStage] = []
    for part in text.split(";"):
        name = f"stage {len(stages) + 1} of the window schedule, {part!r},"
        match = re.fullmatch(r" *(\d+)-(\d+): *(\d+), *(\d+) *", part)
        if not match:
            raise ValueError(f"{name} is not of the form FIRST-LAST:SHORT,LONG, such as 1-6:256,768")
        first, last, short, long = map(int, match.groups())
        expected_first = stages[-1].last_epoch + 1 if stages else 1
        longest = stages[-1].windows[1] if stages else 1
        if first != expected_first:
            raise ValueError(f"{name} begins with epoch {first}: it must begin with {expected_first}")
        if last < first:
            raise ValueError(f"{name} ends before it begins")
        if not 1 <= short <= long <= sequence_len:
            raise ValueError(f"{name} does not have 1 <= short <= long <= sequence_len {sequence_len}")
        if long < longest:
            raise ValueError(f"{name} has a shorter long window than the one before it, {longest}")
        stages.append(WindowStage(first, last, (short, long)))
    return stages


def check_config(c: Config) -> None:
    """Refuse settings that do not go together (ValueError)."""
    for name in ("vocab_size", "n_layer", "n_head", "num_epochs", "batch_tokens", "micro_batch", "readout_epochs"):
        require_at_least(c, name, 1)
    for name in ("replay_loops", "device_batch", "swa_epochs", "meta_step", "replay_from_epoch", "mtp_weight"):
        require_at_least(c, name, 0)
    require_at_least(c, "sequence_len", 4)
    require_at_least(c, "n_embd", 32)  # gates read the first 32 channels
    if c.n_embd % (2 * c.n_head):
        raise ValueError(f"n_embd {c.n_embd} is not a multiple of 2 * n_head = {2 * c.n_head}: change --n-embd")
    if c.n_layer % 2:
        raise ValueError(f"n_layer {c.n_layer} is odd: the U-Net pairs layers, change --n-layer")
    if not c.window_pattern or set(c.window_pattern) - set("SL"):
        raise ValueError(f"window_pattern {c.window_pattern!r} must consist of the letters S and L")
    if not c.n_layer // 2 <= c.replay_start < c.replay_end <= c.n_layer:
        raise ValueError(
            f"replay_start {c.replay_start} and replay_end {c.replay_end} do not span layers of the second half, "
            f"{c.n_layer // 2} ... {c.n_layer - 1}: change --replay-start and --replay-end"
        )
    for name in ("dropout", "stochastic_depth"):
        if not 0 <= getattr(c, name) < 1:
            raise ValueError(f"{name} {getattr(c, name)} is not in [0, 1)")
    if not c.logit_cap > 0:
        raise ValueError(f"logit_cap {c.logit_cap} must be positive")
    if not 0 <= c.warmdown <= 1:
        raise ValueError(f"warmdown {c.warmdown} is not in [0, 1]")
    check_batch(c)
    check_epochs(c)


def check_batch(c: Config) -> None:
    """Refuse a batch that does not divide into micro-steps, halves and passes (ValueError)."""
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


def check_epochs(c: Config) -> None:
    """Refuse schedules that do not fit the number of epochs (ValueError)."""
    too_many = {"--swa-epochs": c.swa_epochs, "--readout-epochs": c.readout_epochs}
    too_many = [f"{flag} {epochs}" for flag, epochs in too_many.items() if epochs > c.num_epochs]
    if too_many:
        raise ValueError(f"{' and '.join(too_many)} exceed --num-epochs {c.num_epochs}: lower them, or train longer")
    last = c.window_stages[-1].last_epoch
    if last < c.num_epochs:
        raise ValueError(
            f"the window schedule ends with epoch {last}, training with epoch {c.num_epochs}: extend "
            "--window-schedule, or lower --num-epochs"
        )


DEMO = {  # --demo: every technique, at a size that two CPU cores train in about two minutes
    "data_dir": "demo_data", "vocab_size": 257, "sequence_len": 128, "n_layer": 4, "n_head": 2, "n_embd": 64,
    "window_schedule": "1-2:16,48;3-3:48,112;4-6:80,128", "replay_start": 2, "replay_end": 3, "replay_from_epoch": 4,
    "num_epochs": 6, "swa_epochs": 2, "readout_epochs": 3, "batch_tokens": 8192, "micro_batch": 4, "eval_batch": 16,
    "val_sequences": 496, "lr_multiplier": 1.0, "weight_decay": 0.3, "dropout": 0.05, "time_cap_min": 0.0,
    "compile": "off", "eval_initial": True,
}  # fmt: skip


def record_sizes(settings: dict) -> dict:
    """Toy sizes for a record: the demo's, with a single stage if the record's windows never change."""
    has_stages = "window_schedule" not in settings or ";" in settings["window_schedule"]
    return DEMO if has_stages else DEMO | {"window_schedule": "1-6:64,128"}


# ======================================================================================================================
# Model
# ======================================================================================================================

# There are two sets of weights. The optimizer updates the masters, which are float32 and have the benchmark's names
# (transformer.h.3.attn.c_q.weight). The modules below hold the compute weights, which are bfloat16 on a GPU: head
# mixing is applied to them already, and q, k, v and gate, up are stacked into one matrix each.


def init_masters(config: Config, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The initial masters by name, drawn from torch's default generator.

    The embedding table is stored in the compute dtype, all others in float32 or wider.
    """
    L, H, C, hidden, padded_vocab = config.n_layer, config.n_head, config.n_embd, config.hidden, config.padded_vocab
    wide = torch.promote_types(dtype, torch.float32)
    bound = math.sqrt(3 / C)  # of a uniform distribution with standard deviation 1 / sqrt(C)

    def constant(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=wide, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=wide, device=device).uniform_(-bound, bound)

    def normal(std: float, *shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=std)

    def block(name: str, layer: int) -> dict[str, Tensor]:
        masters = {}
        if config.head_mixes:
            masters[f"{name}.attn.q_mix"] = torch.eye(H, dtype=wide, device=device)
            masters[f"{name}.attn.k_mix"] = torch.eye(H, dtype=wide, device=device)
            masters[f"{name}.attn.v_mix"] = torch.eye(H, dtype=wide, device=device)
        masters[f"{name}.attn.c_q.weight"] = uniform(C, C)
        masters[f"{name}.attn.c_k.weight"] = uniform(C, C)
        masters[f"{name}.attn.c_v.weight"] = uniform(C, C)
        masters[f"{name}.attn.c_proj.weight"] = normal(1 / math.sqrt(C), C, C)
        masters[f"{name}.attn.attn_gate.weight"] = constant(0.0, H, 12)
        if config.has_value_embedding(layer):
            masters[f"{name}.attn.ve_gate.weight"] = constant(0.0, H, 32)
        masters[f"{name}.mlp.c_gate.weight"] = uniform(hidden, C)
        masters[f"{name}.mlp.c_fc.weight"] = uniform(hidden, C)
        masters[f"{name}.mlp.c_proj.weight"] = normal(1 / math.sqrt(C), C, hidden)
        return masters

    masters = {"resid_lambdas": constant(1.0, L), "x0_lambdas": constant(0.1, L), "skip_weights": constant(1.0, L // 2)}
    masters["transformer.wte.weight"] = normal(1.0, padded_vocab, C, dtype=dtype)
    for i in range(L):
        masters |= block(f"transformer.h.{i}", layer=i)
    masters["lm_head.weight"] = normal(0.001, padded_vocab, C)
    for i in range(L):
        if config.has_value_embedding(i):
            masters[f"ve_projs.{i}.weight"] = uniform(C, C)
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


def yarn(head_dim: int, long_windows: Sequence[int]) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): rotary frequencies (D / 2,) in radians per position, and the scale of the logits.

    long_windows: those of all stages up to the one in question. Whenever the long window grows, pairs of channels that
    turn less than once within the old window are slowed down, so that they turn no further within the new one. Those
    that turn more than 32 times keep their frequency; in between the change is linear in the number of turns. The scale
    is 1 / sqrt(D) at first, and is raised.
    """
    frequencies = 10000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    scale = 1 / math.sqrt(head_dim)
    for before, after in pairwise(long_windows):
        rotations = before * frequencies / (2 * math.pi)
        kept = np.clip((rotations - 1) / (32 - 1), 0, 1)
        frequencies = frequencies * (before / after + kept * (1 - before / after))
        scale *= 0.2 * math.log(after / before) + 1
    return frequencies, scale


def yarn_at(config: Config, long_window: int) -> tuple[np.ndarray, float]:
    """The result of yarn for the stages with this long window, which never shrinks."""
    long_windows = [stage.windows[1] for stage in config.window_stages if stage.windows[1] <= long_window]
    return yarn(config.n_embd // config.n_head, long_windows)


class Rotary(nn.Module):
    """The rotary embedding (arXiv 2104.09864) in the stages with one long window; no parameters.

    cos, sin (T, 1, D / 2), and the scale of attention's logits, which YaRN changes along with them.
    """

    def __init__(self, config: Config, long_window: int, dtype: torch.dtype):
        super().__init__()
        frequencies, self.scale = yarn_at(config, long_window)
        positions = torch.arange(config.sequence_len, dtype=dtype)[:, None, None]
        angles = positions * torch.from_numpy(frequencies).to(dtype)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D) -> the same shape, float32 or wider. A frequency pair is (x[d], x[d + D / 2])."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


class Attention(nn.Module):
    """Multi-head attention with value embedding, rotary embedding and head gates. mix_heads is in its weights."""

    def __init__(self, config: Config, layer: int, backend: str):
        super().__init__()
        C, H = config.n_embd, config.n_head
        self.n_head = H
        self.backend = backend
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        self.attn_gate = nn.Linear(12, H, bias=False)
        self.ve_gate = nn.Linear(32, H, bias=False) if config.has_value_embedding(layer) else None

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor, window: int, scale: float) -> Tensor:
        """x (B, T, C), value embedding ve (B, T, C) or None -> (B, T, C)."""
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.qkv(x).view(B, T, 3, H, D).unbind(dim=2)  # each (B, T, H, D)
        if ve is not None:  # value residual (arXiv 2410.17897)
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :32]))  # (B, T, H), starts at 1
            v = v + gate.unsqueeze(-1) * ve.view(B, T, H, D)
        q = norm(rotate(q, cos, sin)).to(v.dtype)
        k = norm(rotate(k, cos, sin)).to(v.dtype)
        y = attend(q, k, v, window, self.backend, scale)  # (B, T, H, D)
        gate = torch.sigmoid(self.attn_gate(x[..., :12]))  # (B, T, H) (arXiv 2505.06708)
        y = y * gate.unsqueeze(-1)
        return self.c_proj(y.reshape(B, T, C))


class MLP(nn.Module):
    """A gated unit, SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.hidden, bias=False)
        self.c_proj = nn.Linear(config.hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # each (B, T, hidden)
        return self.c_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: Config, layer: int, backend: str):
        super().__init__()
        self.attn = Attention(config, layer, backend)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor, window: int, scale: float) -> Tensor:
        p = self.dropout if self.training else 0.0
        x = x + dropout(self.attn(norm(x), ve, cos, sin, window, scale), p)
        return x + dropout(self.mlp(norm(x)), p)


# ------------------------------------------------ what is compiled: layers of a kind share a graph, one for each stage


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
    window: int,
    scale: float,
    is_dropped: bool,
) -> Tensor:
    """A layer of the trunk: streams x, x0, skip (B, T, C), weights () -> (B, T, C).

    skip is what a layer of the second half adds from the first (U-Net, arXiv 1505.04597). A dropped layer still applies
    the skip and the residual mix.
    """
    if skip is not None:
        x = x + skip_weight * skip
    x = resid_lambda * x + x0_lambda * x0
    return x if is_dropped else block(x, ve, cos, sin, window, scale)


def run_mtp_layer(
    block: Block, z: Tensor, cos: Tensor, sin: Tensor, window: int, scale: float, is_dropped: bool
) -> Tensor:
    """The block of multi-token prediction: z (B, T - 1, C) -> (B, T - 1, C), normed."""
    return norm(z if is_dropped else block(z, None, cos, sin, window, scale))


def cross_entropy(x: Tensor, lm_head: Tensor, targets: Tensor, vocab_size: int, cap: float) -> Tensor:
    """Next-token loss in validation: x (B, T, C), targets (B, T) int64 -> (B, T) float32 or wider, nats."""
    logits = soft_cap(F.linear(x, lm_head)[..., :vocab_size], cap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def head_chunk(x: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, vocab_size: int, cap: float):
    """The part of HeadLoss for some positions: x (n, C), lm_head (padded V, C), targets (n, 1) int64."""
    loss, first_loss, grad = capped_cross_entropy(F.linear(x, lm_head), targets, weights, vocab_size, cap)
    return loss, first_loss, grad @ lm_head, grad.T @ x


# ------------------------------------------------------------------------------------------------------------------ GPT


class GPT(nn.Module):
    """Decoder-only transformer: a U-Net of blocks. Its windows grow, and late in training some layers are replayed.

    What changes during training is in the arguments `windows`, the short and the long one of a stage, and `replay`,
    whether layers replay_start ... replay_end - 1 run again, with their skips, lambdas and value embeddings.

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
        self.ve_projs = nn.ModuleDict({str(i): nn.Linear(C, C, bias=False) for i in with_ve})
        if config.mtp_weight:
            self.mtp_proj = nn.Linear(2 * C, C, bias=False)
            self.mtp_block = Block(config, L, attention)  # as layer L: a full window, no value embedding
        self.lm_head = nn.Linear(C, padded_vocab, bias=False)
        self.to(dtype)

        # Scalars, rotary angles and logits stay in float32, because bfloat16 is too coarse for them.
        self.wide = torch.promote_types(dtype, torch.float32)
        self.resid_lambdas = nn.Parameter(torch.empty(L, dtype=self.wide))
        self.x0_lambdas = nn.Parameter(torch.empty(L, dtype=self.wide))
        self.skip_weights = nn.Parameter(torch.empty(L // 2, dtype=self.wide))
        long_windows = {stage.windows[1] for stage in config.window_stages}
        self.rotary = nn.ModuleDict({str(long): Rotary(config, long, self.wide) for long in sorted(long_windows)})

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

    def rotary_of(self, windows: tuple[int, int], length: int) -> tuple[Tensor, Tensor, float]:
        """cos and sin of the first positions (length, 1, D / 2) and the scale of attention's logits in a stage."""
        rotary = self.rotary[str(windows[1])]
        return rotary.cos[:length], rotary.sin[:length], rotary.scale

    def forward(self, tokens: Tensor, windows: tuple[int, int], replay: bool, dropped: Collection[int] = ()) -> Tensor:
        """tokens (B, T) int64 -> final stream (B, T, C), normed.

        dropped: the calls of layers, counted from 0, whose block is skipped; the skip and the lambdas still apply.
        """
        cos, sin, scale = self.rotary_of(windows, tokens.size(1))
        x0 = norm(self.transformer.wte(tokens))  # (B, T, C)
        ve = {int(i): project(x0) for i, project in self.ve_projs.items()}  # by layer, each (B, T, C)
        resid_lambdas, x0_lambdas = self.resid_lambdas.unbind(), self.x0_lambdas.unbind()
        skip_weights = self.skip_weights.unbind()
        L = self.config.n_layer
        E = L // 2  # the first E layers are the encoder of the U-Net
        encoded = []
        x = x0
        for call, i in enumerate(self.config.layer_order(replay)):
            skip = encoded[L - 1 - i] if i >= E else None  # a replayed layer reads it again
            skip_weight = skip_weights[i - E] if i >= E else None
            block = self.transformer.h[i]
            mix = skip, skip_weight, resid_lambdas[i], x0_lambdas[i]
            attention = ve.get(i), cos, sin, self.config.window(i, windows), scale
            x = self.run_layer(block, x, x0, *mix, *attention, is_dropped=call in dropped)
            if i < E:
                encoded.append(x)
        return norm(x)

    def token_losses(self, tokens: Tensor, targets: Tensor, windows: tuple[int, int], replay: bool) -> Tensor:
        """Next-token cross-entropy: tokens, targets (B, T) int64 -> (B, T) float32 or wider, nats."""
        x = self(tokens, windows, replay)
        return self.cross_entropy(x, self.lm_head.weight, targets, self.config.vocab_size, self.config.logit_cap)

    def log_probs(self, tokens: Tensor, windows: tuple[int, int], replay: bool) -> Tensor:
        """tokens (B, T) int64 -> log-probabilities of the next token (B, T, V), float32 or wider."""
        logits = self.lm_head(self(tokens, windows, replay))[..., : self.config.vocab_size]
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
        self, tokens: Tensor, targets: Tensor, windows: tuple[int, int], replay: bool, dropped: Collection[int]
    ) -> tuple[Tensor, Tensor]:
        """Multi-token prediction with one extra block (arXiv 2412.19437).

        tokens, targets (B, T) int64; dropped: as in forward -> (the weighted loss, the next-token loss), both () in
        nats per token. At position t < T - 1 the extra block reads the final stream and the embedding of target t, and
        predicts target t + 1.
        """
        x = self(tokens, windows, replay, dropped)  # (B, T, C)
        next_token_loss = self.head_loss(x, targets)
        if not self.config.mtp_weight:
            return next_token_loss, next_token_loss.detach()

        next_embedding = norm(self.transformer.wte(targets[:, :-1]))  # (B, T - 1, C)
        z = self.mtp_proj(torch.cat([x[:, :-1], next_embedding], dim=-1))  # (B, T - 1, C)
        cos, sin, scale = self.rotary_of(windows, z.size(1))
        window = self.config.window(self.config.n_layer, windows)
        is_dropped = len(self.config.layer_order(replay)) in dropped  # its call comes after those of the layers
        z = self.run_mtp_layer(self.mtp_block, z, cos, sin, window, scale, is_dropped)
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


def flops_per_token(config: Config, windows: tuple[int, int], replay: bool) -> float:
    """Floating-point operations of forward and backward per token: matrix products and attention."""
    C, T, L = config.n_embd, config.sequence_len, config.n_layer
    layers = config.layer_order(replay)
    projections = sum(config.has_value_embedding(i) for i in range(L))
    elements = projections * C * C + C * config.padded_vocab
    if config.mtp_weight:  # another block, a projection, and the head again
        layers = [*layers, L]
        elements += 2 * C * C + C * config.padded_vocab
    elements += len(layers) * (4 * C * C + 3 * C * config.hidden)
    seen = [config.window(i, windows) for i in layers]
    keys = sum(w - w * w / (2 * T) for w in seen)  # that the average position attends to, over all layers
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
    mixes = [name for name in names if name.endswith("_mix")]
    groups = [
        Group("adamw", ["lm_head.weight"], lr * config.head_lr, decay, betas=(0.8, 0.95)),
        Group("adamw", ["transformer.wte.weight"], lr * config.embedding_lr, decay, betas=(0.8, 0.95)),
        Group("adamw", ["resid_lambdas", "skip_weights"], lr * config.scalar_lr * 0.01, 0.0, betas=(0.8, 0.95)),
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
            self.muon_update(bucket.shard, grad, *moments, lr, decay, mu, self.muon_dtype, group.row_norm)
        else:
            t = scalar(step + 1)
            adamw_update(bucket.shard, grad, state["exp_avg"], state["exp_avg_sq"], lr, decay, group.betas, t)


# ======================================================================================================================
# Schedules: pure functions of the config, the step (from 0) and the number of steps
# ======================================================================================================================


def warmdown(config: Config, step: int, num_steps: int) -> float:
    """1, then down to 0 over the last `warmdown` of the steps, as a square root or linearly."""
    length = round(config.warmdown * num_steps)
    linear = min(1.0, (num_steps - step) / length) if length else 1.0
    return math.sqrt(linear) if config.warmdown_shape == "sqrt" else linear


def first_cycle(config: Config, num_steps: int) -> float:
    """The step at which the cycles of the last swa_epochs begin, not rounded."""
    return num_steps - config.swa_epochs * (num_steps / config.num_epochs)


def swa_cycle(config: Config, step: int, num_steps: int) -> float | None:
    """Position, 0 to 1, within a cycle, which is as long as an epoch; None before the first.

    The ends of these cycles are the weights that are kept for the readout (SWA, arXiv 1803.05407).
    """
    start = first_cycle(config, num_steps)
    if step < start:
        return None
    return (step - start) / (num_steps / config.num_epochs) % 1.0


def lr_multiplier(config: Config, step: int, num_steps: int) -> float:
    """The warmdown; in each cycle half a cosine, from the warmdown down to 0.05."""
    level = warmdown(config, step, num_steps)
    position = swa_cycle(config, step, num_steps)
    if position is None:
        return level
    return 0.05 + (max(level, 0.05) - 0.05) * (1 + math.cos(math.pi * position)) / 2


def weight_decay_multiplier(config: Config, step: int, num_steps: int) -> float:
    """1 for 40% of the steps, then linearly down to 0.65 where the cycles begin; in each cycle linearly up to 1.5."""
    if not config.decay_schedule:
        return 1.0
    position = swa_cycle(config, step, num_steps)
    if position is not None:
        return 0.65 + (1.5 - 0.65) * position
    hold_until = 0.4 * num_steps
    low_at = max(hold_until, first_cycle(config, num_steps))
    return float(np.interp(step, [hold_until, low_at], [1.0, 0.65]))


def muon_momentum(step: int) -> float:
    """Linear from 0.85 to 0.95 over the first 300 steps."""
    return 0.85 + 0.1 * min(step / 300, 1.0)


def meta_step(config: Config, step: int, num_steps: int) -> float:
    """Length of the meta-gradient's step; 0 without it. It follows the warmdown, but not the cycles."""
    return config.meta_step * warmdown(config, step, num_steps) if config.meta_gradient else 0.0


def windows_of(config: Config, epoch: int) -> tuple[int, int]:
    """The short and the long attention window of an epoch, counted from 1."""
    return next(stage.windows for stage in config.window_stages if epoch <= stage.last_epoch)


def replays(config: Config, epoch: int) -> bool:
    """Whether an epoch, counted from 1, replays layers."""
    return bool(0 < config.replay_from_epoch <= epoch)


@dataclass(frozen=True)
class Scheduled:
    """The values of all schedules at a step: what the step uses is what the metrics record."""

    lr: float  # factor on the learning rates of the groups
    weight_decay: float  # factor on the weight decay of the groups
    momentum: float  # Muon's
    meta_step: float  # length of the meta-gradient's step
    windows: tuple[int, int]  # short and long attention window
    softmax_scale: float  # of attention's logits; the model has it from the long window, as here
    replay: bool  # whether layers are replayed


def schedule(config: Config, step: int, plan: StepPlan) -> Scheduled:
    """Evaluate all schedules at a step."""
    epoch = plan.epoch[step] + 1
    windows = windows_of(config, epoch)
    return Scheduled(
        lr=lr_multiplier(config, step, plan.num_steps),
        weight_decay=weight_decay_multiplier(config, step, plan.num_steps),
        momentum=muon_momentum(step),
        meta_step=meta_step(config, step, plan.num_steps),
        windows=windows,
        softmax_scale=yarn_at(config, windows[1])[1],
        replay=replays(config, epoch),
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
    stages = [make_stage(config, epoch) for epoch in range(1, config.num_epochs + 1)]
    return StepPlan(
        tokens=micro_steps_done * config.micro_step_tokens,
        epoch=epochs_done,
        stages=stages_of([stages[done] for done in epochs_done[:-1]]),
    )


def make_stage(config: Config, epoch: int) -> Stage:
    """The stage that an epoch, counted from 1, belongs to: its windows, and whether it replays layers."""
    windows = windows_of(config, epoch)
    replay = replays(config, epoch)
    name = f"windows_{windows[0]}_{windows[1]}" + "_replay" * replay
    layers = len(config.layer_order(replay))
    heads = 2 if config.mtp_weight else 1
    return Stage(name, flops_per_token(config, windows, replay), layers, layers, heads)


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
    """The masters that the meta-gradient moves: all of Muon's matrices."""
    if not config.meta_gradient:
        return []
    return [name for group in optimizer_groups(config, names) if group.method == "muon" for name in group.names]


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
            torch._dynamo.config.recompile_limit = 256  # graphs of a function: training, validation, windows, replay
            self.model.compile_layers()
        self.weights = ComputeWeights(self.model, block_names(config), block_weights)
        in_bfloat16 = world.cuda and dtype == torch.bfloat16
        self.optimizer = Optimizer(self.shards, dtype if in_bfloat16 else self.model.wide, compiled)
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
        self.weights.refresh(self.masters | self.move(values.meta_step))
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

        sequences (n, T + 1) int64. The seed of dropout depends on the sequences' place in the batch, not on processes;
        stochastic depth is drawn once per micro-step, the same for all virtual ranks.
        """
        c = self.config
        totals = torch.zeros(2, dtype=self.model.wide, device=sequences.device)
        for term, rows in enumerate(sequences.split(c.term_sequences), start=first_term):
            micro_step = term * c.term_sequences // c.micro_batch
            dropped = draw_dropped(c, values.replay, step, micro_step)
            for i, micro_batch in enumerate(rows.split(c.pass_sequences)):
                self.world.seed(seed_of(c.seed, step, virtual_rank, term, i))
                tokens, targets = micro_batch[:, :-1], micro_batch[:, 1:]
                loss, next_token_loss = self.model.training_loss(
                    tokens, targets, values.windows, values.replay, dropped
                )
                part = weight * len(micro_batch)
                (part * loss).backward()
                totals += part * torch.stack([loss.detach(), next_token_loss])
        return totals

    def scorer(self, masters: dict[str, Tensor], values: Scheduled) -> Callable[[Tensor, Tensor], Tensor]:
        """Load masters into the model -> the function that validation calls: 2 x (B, T) int64 -> (B, T) nats.

        values: of a step whose windows and replay the validation takes.
        """
        self.weights.refresh(masters)

        @torch.no_grad()
        def token_losses(tokens: Tensor, targets: Tensor) -> Tensor:
            self.model.eval()
            losses = self.model.token_losses(tokens, targets, values.windows, values.replay)
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
                        self.optimizer.update(bucket, bucket.grad_shard, 0, replace(stages[0], lr=0.0))
                self.world.barrier()
        self.optimizer.step(0, replace(stages[0], lr=0.0))  # connects the processes

    def warm_up_stage(self, values: Scheduled) -> None:
        """One virtual rank's gradient and one batch of validation. Stochastic depth may drop any block or keep it."""
        c = self.config
        device = self.world.device
        sequences = torch.randint(c.vocab_size, (c.micro_steps * c.micro_batch, c.sequence_len + 1), device=device)
        self.add_gradient(0, 0, sequences, values)
        rows = sequences[: c.pass_sequences]
        calls = range(len(c.layer_order(values.replay)) + 1)
        for dropped in [(), calls] if c.stochastic_depth else []:
            loss, _ = self.model.training_loss(rows[:, :-1], rows[:, 1:], values.windows, values.replay, dropped)
            loss.backward()
        self.weights.zero_sums()
        self.shards.zero_grads()
        batch = torch.randint(c.vocab_size, (c.eval_batch, c.sequence_len + 1), device=device)
        self.scorer(self.masters, values)(batch[:, :-1], batch[:, 1:])


# ======================================================================================================================
# Readout
# ======================================================================================================================


def member_weights(masters: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The masters as they are kept for the readout: matrices in the compute dtype, lambdas and mixes unchanged.

    The heads are not mixed yet.
    """
    return {name: p if p.ndim < 2 or name.endswith("_mix") else p.to(dtype) for name, p in masters.items()}


def average_weights(run: Session, weights: dict[str, float]) -> dict[str, Tensor]:
    """The weighted sum of members, float32 or wider. weights: by the name of the member."""
    average: dict[str, Tensor] = {}
    for member, weight in weights.items():
        for name, p in run.load_member(member).items():
            term = weight * p.to(torch.promote_types(p.dtype, torch.float32))
            average[name] = average[name] + term if name in average else term
    return average


def average_probabilities(nats: dict[str, dict[str, Tensor]], weights: dict[str, float]) -> dict[str, Tensor]:
    """Nats of the weighted average of members' probabilities, by split. nats, weights: by the name of the member."""
    splits = next(iter(nats.values()))
    return {s: mix_probabilities([nats[member][s] for member in weights], list(weights.values())) for s in splits}


def read_out(run: Session, train: Training) -> int:
    """Score the averages of weights and of probabilities, the declared one last -> exit code.

    Every member is evaluated as in the last step: with its windows, rotary tables, scale and replay. The members go
    into the model only: the masters stay those of the last step, so an interrupted readout can start again from the
    checkpoint.
    """
    members = run.members[-run.config.readout_epochs :]
    total = sum(range(1, len(members) + 1))
    recency = {member: (i + 1) / total for i, member in enumerate(members)}  # 1:2:3, the newest heaviest
    values = schedule(run.config, run.step - 1, run.plan)

    nats = {}
    for member in members:  # each is loaded once
        nats[member] = run.token_nats(train.scorer(run.load_member(member), values))
        if nats[member] is None:
            return run.stopped(train.shards)
    average = average_probabilities(nats, recency)
    readout = "probability_average" if len(members) > 1 else "last"
    if len(members) > 1:
        equal = dict.fromkeys(members, 1 / len(members))
        run.read_out("probability_average_equal_weights", average_probabilities(nats, equal))
        if not run.read_out("weight_average", train.scorer(average_weights(run, recency), values)):
            return run.stopped(train.shards)
    run.read_out(readout, average)
    stage = {"windows": values.windows, "replay": values.replay}
    return run.finish(readout, average, mixing="probability", members=recency, stage=stage)


def load_members(run_dir: str | Path, device: str | torch.device) -> Iterator[tuple[float, Callable]]:
    """The members of a finished run's readout, loaded one at a time: yields (weight, log_probs).

    log_probs maps tokens (B, T) int64 to log-probabilities of the next token (B, T, V) float32, until the next member
    is loaded (ValueError after that). The weights sum to 1; members.json says how the members are mixed.
    """
    device = torch.device(device)
    saved, final = finished_run(Path(run_dir), "two_hour")
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
        masters = load_weights(Path(run_dir) / "final" / member["file"], dtype)
        model.load_state_dict(compute_weights(masters, block_names(config), block_weights))
        loaded.append(member)
        yield member["weight"], partial(log_probs, member)


# ======================================================================================================================
# main
# ======================================================================================================================


def short_runs(config: Config) -> dict[str, dict]:
    """Settings of short runs to measure: of each stage, by its name, and of "all", with an epoch for each stage."""
    stages = {}  # (windows, replay) by name
    for epoch in range(1, config.num_epochs + 1):
        stages[make_stage(config, epoch).name] = windows_of(config, epoch), replays(config, epoch)
    runs = {
        name: {"num_epochs": 1, "window_schedule": f"1-1:{short},{long}", "replay_from_epoch": int(replay)}
        for name, ((short, long), replay) in stages.items()
    }
    epochs = [f"{i}-{i}:{short},{long}" for i, ((short, long), _) in enumerate(stages.values(), start=1)]
    first_replay = next((i for i, (_, replay) in enumerate(stages.values(), start=1) if replay), 0)
    runs["all"] = {"num_epochs": len(stages), "window_schedule": ";".join(epochs), "replay_from_epoch": first_replay}
    return {name: settings | {"swa_epochs": 0, "readout_epochs": 1} for name, settings in runs.items()}


def count_sizes(config: Config, dtype: torch.dtype) -> Sizes:
    """The memory and disk that the run needs, from the shapes alone."""
    masters = init_masters(config, dtype, torch.device("meta"))
    shards = make_shards(config, masters, World(0, 1, torch.device("meta")))
    elements = {name: p.numel() for name, p in masters.items()}
    layers = sum(count for name, count in elements.items() if name.startswith("transformer.h."))
    C = config.n_embd
    positions = config.pass_sequences * config.sequence_len
    return Sizes(
        dtype=dtype,
        parameters=sum(elements.values()),
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
        members=config.readout_epochs,
    )


def choose_kernels(config: Config, device: torch.device, dtype: torch.dtype) -> list[Kernel]:
    """The kernels to use where there is a choice; ValueError if a wanted one does not run."""
    head_dim = config.n_embd // config.n_head
    chosen = choose_attention(config.attention, head_dim, device, dtype)
    pairs = {  # of window and scale, in all stages
        (config.window(i, stage.windows), yarn_at(config, stage.windows[1])[1])
        for stage in config.window_stages
        for i in range(config.n_layer + 1)
    }
    shape = config.sequence_len, config.n_head, head_dim
    error = partial(attention_error, chosen, shape, sorted(pairs), device)
    return [Kernel("attention", chosen, plain="sdpa", fast="varlen", limit=0.05, error=error)]


def end_epoch(run: Session, train: Training) -> None:
    """Checkpoint, validate, and keep the weights if the readout needs them; also where the cap cuts an epoch short.

    The session skips what was done before a resume.
    """
    c = run.config
    epoch = run.plan.epoch_ended(run.step)
    name = f"epoch_{epoch}" if epoch else f"epoch_{run.plan.epoch[run.step] + 1}_cut_short"
    values = schedule(c, run.step - 1, run.plan)  # as in the epoch just finished
    number = epoch or run.plan.epoch[run.step] + 1
    is_kept = number > c.num_epochs - c.readout_epochs or run.stopped_by == "time_cap"
    run.save(train.shards)
    if run.validate(name, train.scorer(train.masters, values)) and is_kept:
        run.keep_member(f"epoch_{number:02d}", member_weights(train.masters, run.dtype))


def main(argv: list[str] | None = None) -> int:
    """Train, and return the exit code: 0 finished, or stopped by a signal and saved."""
    run = Session("two_hour", Config, DEMO, argv, __file__, record_sizes)
    c = run.config
    plan = run.world.main_first(make_plan, c, run.splits["train"])
    run.require(plan, count_sizes(c, run.dtype), short_runs(c))
    kernels = run.world.main_first(choose_kernels, c, run.world.device, run.dtype)
    run.open({kernel.name: kernel.chosen for kernel in kernels}, slower_kernels(kernels))

    torch.manual_seed(c.seed)
    train = Training(c, run.world, run.dtype, run.kernels, run.compiled)
    loader = make_loader(c, run.splits["train"], plan, run.world)
    errors = check_kernels(kernels)
    train.warm_up([schedule(c, step, plan) for step in plan.stages])
    run.warmed_up(errors)
    run.resume(train.shards)

    if c.eval_initial and run.step == 0:
        run.validate("initial", train.scorer(train.masters, schedule(c, 0, plan)))
    while True:
        if plan.epoch_ended(run.step):
            end_epoch(run, train)
        if not run.may_step():  # the last step is done, the next one would exceed the cap, or a signal came
            break
        if run.save_is_due:
            run.save(train.shards)
        batch = loader.batch(run.step)
        values = schedule(c, run.step, plan)
        run.did_step(train.step(run.step, batch, values), asdict(values), batch)

    if run.stopped_by == "time_cap":
        end_epoch(run, train)
    if run.interrupted:
        return run.stopped(train.shards)
    return read_out(run, train)


if __name__ == "__main__":
    launch(main)
