"""The limited track of NanoGPT Slowrun: the lowest validation loss from 100M tokens of FineWeb in 1 hour on 8xH100.

    python prepare_data.py                               # once: writes fineweb_data/
    torchrun --standalone --nproc_per_node=8 train.py    # the current record; published: 3.183 in 59.3 minutes
    python train.py --resume runs/<name>                 # continue a run that was stopped or killed
    python train.py --list-records                       # the records before it; --record N trains one
    python train.py --demo                               # toy sizes, on a CPU (after prepare_data.py --source demo)

This file and model.py are the whole experiment, in reading order: Config, Model (model.py), Optimizer, Schedules, Data
order, Training step, Readout, main. What no record may change (the score, the clock, the run folder) is in slowrun/,
and so is the plumbing (processes, flags, checkpoints, communication).

A batch is always split over 8 virtual ranks, and a process computes 8 / world_size of them, so 1, 2, 4 and 8 processes
compute the same run.

Notation in shapes: B sequences, T positions, C = n_embd, H = n_head, D = C / H, L = n_layer, V = vocab_size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(next(p for p in Path(__file__).resolve().parents if (p / "slowrun").is_dir())))

from model import GPT, block_names, block_weights, draw_dropped, flops_per_token, init_masters
from slowrun.config import RunConfig, demo_of_record, require_at_least
from slowrun.data import Loader, Split, shuffled_documents, shuffled_micro_steps
from slowrun.folder import finished_run, load_weights
from slowrun.kernels import CHUNK, Kernel, attention_error, check_kernels, choose_attention, slower_kernels
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
    window_pattern: str = "SSSL"  # attention window by layer, repeated: S is T/2, L is T; the last layer is always L
    logit_cap: float = 10.0  # logits are soft-capped to cap * tanh(logits / cap)
    dropout: float = 0.05  # dropout probability on the outputs of attention and MLP
    stochastic_depth: float = 0.0  # probability of dropping the last layer; linear in the layer, 0 for the first
    replay_start: int = 15  # first layer that is replayed; in the second half of the layers
    replay_end: int = 21  # one past the last layer that is replayed
    replay_loops: int = 2  # how many times these layers run again, in training and in the readout
    replay_from_epoch: int = 7  # first epoch with layer replay; 0 for never
    mtp_weight: float = 0.3  # weight of the loss on the token after next; 0 for no such loss, and no block for it

    # Batch and length
    num_epochs: int = 11  # passes over the training data
    batch_tokens: int = 524288  # tokens per optimizer step
    micro_batch: int = 4  # sequences per micro-step of one virtual rank
    device_batch: int = 0  # sequences per forward pass; fewer save memory, same mathematics; 0 for micro_batch
    time_cap_min: float = 60.0  # minutes of training time; 0 lifts the cap, and the run is not eligible
    seed: int = 42  # seed of initial weights, dropout and stochastic depth; the order of the data does not depend on it

    # Optimizer
    lr_multiplier: float = 0.25  # factor on all the learning rates below but mix_lr
    matrix_lr: float = 0.04  # Muon, all matrices not named below
    embedding_lr: float = 0.15  # AdamW, wte and value embedding tables
    head_lr: float = 0.002  # AdamW, lm_head
    scalar_lr: float = 0.1  # AdamW, x0_lambdas; resid_lambdas and skip_weights get 1% of it
    mix_lr: float = 0.02  # AdamW, q_mix, k_mix and v_mix
    weight_decay: float = 1.3  # initial weight decay of matrices, embedding tables and lm_head
    meta_step: float = 0.5  # length of the meta-gradient's step, over all the matrices it moves, before the warmdown

    # Schedules
    warmdown: float = 0.2  # fraction of the steps over which the learning rate falls to 0 at the end
    swa_epochs: int = 3  # last epochs, each with one cycle of learning rate and weight decay; 0 for none

    # Readout
    readout_epochs: int = 3  # last epochs whose predictions are averaged, with weights 1:2:3

    # Kernels
    attention: Literal["auto", "varlen", "sdpa"] = "auto"  # auto: varlen, flash attention, where the GPU has it

    # Switches of earlier records
    meta_gradient: bool = True  # take the second half of each gradient at a point moved down the first half's
    mlp: Literal["swiglu", "relu2"] = "swiglu"  # relu2: squared ReLU, of width 4C
    value_embedding: Literal["projection", "table"] = "projection"  # of x0, or a table that is looked up by token
    u_net: bool = True  # skips from the first half of the layers to the second
    head_gates: bool = True  # a gate on the output of each attention head
    head_mixes: bool = True  # interleaved head attention
    exclusive: bool = False  # exclusive self-attention
    proj_init: Literal["normal", "zero"] = "normal"  # initial values of every c_proj
    row_norm: bool = True  # normalize the rows of Muon's updates before they are orthogonalized
    decay_schedule: bool = True  # let the weight decay fall and rise; else it is constant
    warmdown_shape: Literal["sqrt", "linear"] = "sqrt"  # shape of the learning rate's fall
    shuffle: Literal["documents", "micro_steps", "none"] = "documents"  # what each epoch shuffles
    readout: Literal["average", "last", "ema"] = "average"  # of epochs; the last weights; 0.7 of them, 0.3 of their EMA

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
    def micro_steps(self) -> int:
        """Micro-steps per optimizer step."""
        return self.batch_tokens // self.micro_step_tokens

    @property
    def term_sequences(self) -> int:
        """Sequences of a term of the gradient: a micro-step, or half of it where the meta-gradient has only one."""
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
    for name in ("vocab_size", "n_layer", "n_head", "num_epochs", "batch_tokens", "micro_batch", "readout_epochs"):
        require_at_least(c, name, 1)
    for name in ("replay_loops", "device_batch", "swa_epochs", "meta_step", "replay_from_epoch", "mtp_weight"):
        require_at_least(c, name, 0)
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
    for name in ("dropout", "stochastic_depth"):
        if not 0 <= getattr(c, name) < 1:
            raise ValueError(f"{name} {getattr(c, name)} is not in [0, 1)")
    if not c.logit_cap > 0:
        raise ValueError(f"logit_cap {c.logit_cap} must be positive")
    if not 0 <= c.warmdown <= 1:
        raise ValueError(f"warmdown {c.warmdown} is not in [0, 1]")
    check_batch(c)
    too_many = {"--swa-epochs": c.swa_epochs, "--readout-epochs": c.kept_epochs}
    too_many = [f"{flag} {epochs}" for flag, epochs in too_many.items() if epochs > c.num_epochs]
    if too_many:
        raise ValueError(f"{' and '.join(too_many)} exceed --num-epochs {c.num_epochs}: lower them, or train longer")


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


DEMO = {  # --demo: every technique, at a size that two CPU cores train in about two minutes
    "data_dir": "demo_data", "vocab_size": 257, "sequence_len": 128, "n_layer": 4, "n_head": 2, "n_embd": 64,
    "replay_start": 2, "replay_end": 3, "replay_from_epoch": 4, "stochastic_depth": 0.05,
    "num_epochs": 5, "batch_tokens": 8192, "micro_batch": 4, "eval_batch": 16, "val_sequences": 496,
    "lr_multiplier": 1.0, "weight_decay": 0.3, "time_cap_min": 0.0, "compile": "off", "eval_initial": True,
}  # fmt: skip


def record_sizes(settings: dict) -> dict:
    """Toy sizes for a record with these settings; num_epochs and replay_from_epoch are DEMO's."""
    return demo_of_record(Config, DEMO, settings, unscaled=("num_epochs", "replay_from_epoch"))


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
    """The masters and their optimizer state: Muon's and AdamW's moments, and the EMA of a readout that needs it."""
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
        if config.readout == "ema":
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
            self.muon_update(bucket.shard, grad, *moments, lr, decay, mu, self.muon_dtype, group.row_norm)
        else:
            t = scalar(step + 1)
            adamw_update(bucket.shard, grad, state["exp_avg"], state["exp_avg_sq"], lr, decay, group.betas, t)
        if values.ema_weight:
            state["ema"].lerp_(bucket.shard.to(grad.dtype), values.ema_weight)


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
    """Length of the meta-gradient's step. It follows the warmdown, but not the cycles."""
    return config.meta_step * warmdown(config, step, num_steps)


def ema_weight(config: Config, step: int, num_steps: int) -> float:
    """EMA coefficient of the weights after a step; 0 when the EMA is not updated, or no readout needs it.

    The EMA starts as a copy of the weights after 90% of the steps, and then takes 5% of them every 10 steps.
    """
    since = step + 1 - round(0.9 * num_steps)
    if config.readout != "ema" or since < 0 or since % 10:
        return 0.0
    return 0.05 if since else 1.0


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
    replay: bool  # whether layers are replayed
    ema_weight: float  # of the weights after the step in their EMA


def schedule(config: Config, step: int, plan: StepPlan) -> Scheduled:
    """Evaluate all schedules at a step."""
    return Scheduled(
        lr=lr_multiplier(config, step, plan.num_steps),
        weight_decay=weight_decay_multiplier(config, step, plan.num_steps),
        momentum=muon_momentum(step),
        meta_step=meta_step(config, step, plan.num_steps),
        replay=replays(config, plan.epoch[step] + 1),
        ema_weight=ema_weight(config, step, plan.num_steps),
    )


# ======================================================================================================================
# Data order
# ======================================================================================================================


def epoch_sequences(config: Config, split: Split, epoch: int) -> np.ndarray:
    """The training sequences of an epoch, counted from 1, in the order of training: (n, T + 1) uint16.

    From epoch 2 on the documents are permuted, starting from their order in the epoch before. They are concatenated and
    cut into sequences, which are permuted too. Earlier records cut the file once, and permute micro-steps or nothing.
    """
    length = config.sequence_len + 1
    seeds = range(2, epoch + 1)
    if config.shuffle == "documents":
        return shuffled_documents(split, length, document_seeds=seeds, sequence_seed=epoch + 1000)
    return shuffled_micro_steps(split, length, config.micro_batch, seeds if config.shuffle == "micro_steps" else ())


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
    stages = {replay: make_stage(config, replay) for replay in (False, True)}
    return StepPlan(
        tokens=micro_steps_done * config.micro_step_tokens,
        epoch=epochs_done,
        stages=stages_of([stages[replays(config, done + 1)] for done in epochs_done[:-1]]),
    )


def make_stage(config: Config, replay: bool) -> Stage:
    """The steps with or without layer replay."""
    layers = len(config.layer_order(replay))
    heads = 2 if config.mtp_weight else 1
    return Stage("replay" if replay else "plain", flops_per_token(config, replay), layers, layers, heads)


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
        weight = 1 / (VIRTUAL_RANKS * (len(sequences) // self.config.term_sequences))  # of the mean loss of a term
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
        """Accumulate the gradient of weight * loss over terms in the model -> the sums of weight * losses (2,).

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
                loss, next_token_loss = self.model.training_loss(tokens, targets, values.replay, dropped)
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
        """One virtual rank's gradient and one batch of validation. Stochastic depth may drop any block or keep it."""
        c = self.config
        device = self.world.device
        sequences = torch.randint(c.vocab_size, (c.micro_steps * c.micro_batch, c.sequence_len + 1), device=device)
        self.add_gradient(0, 0, sequences, values)
        rows = sequences[: c.pass_sequences]
        calls = range(len(c.layer_order(values.replay)) + 1)
        for dropped in [(), calls] if c.stochastic_depth else []:
            loss, _ = self.model.training_loss(rows[:, :-1], rows[:, 1:], values.replay, dropped)
            loss.backward()
        self.weights.zero_sums()
        self.shards.zero_grads()
        batch = torch.randint(c.vocab_size, (c.eval_batch, c.sequence_len + 1), device=device)
        self.scorer(self.masters, values.replay)(batch[:, :-1], batch[:, 1:])


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


def blend_with_ema(run: Session, train: Training) -> dict[str, Tensor]:
    """0.7 of the last weights and 0.3 of their EMA; the last weights if the cap came before it began."""
    if not any(ema_weight(run.config, step, run.plan.num_steps) for step in range(run.step)):
        run.log("stopped before the moving average of the weights began: the last weights are read out")
        return train.masters
    blend = {}
    for name, ema in train.shards.gather_state("ema").items():
        blend[name] = train.masters[name].to(ema.dtype).lerp(ema, 0.3).to(train.masters[name].dtype)
    return blend


def read_out(run: Session, train: Training) -> int:
    """Score the averages of weights and of probabilities, the declared one last -> exit code.

    The members go into the model only: the masters stay those of the last step, so an interrupted readout can start
    again from the checkpoint.
    """
    c = run.config
    if c.readout == "ema":
        run.keep_member("blend", member_weights(blend_with_ema(run, train), run.dtype))
    members = run.members[-max(1, c.kept_epochs) :]
    total = sum(range(1, len(members) + 1))
    recency = {member: (i + 1) / total for i, member in enumerate(members)}  # 1:2:3, the newest heaviest
    replay = replays(c, run.plan.epoch[run.step - 1] + 1)

    nats = {}
    for member in members:  # each is loaded once
        nats[member] = run.token_nats(train.scorer(run.load_member(member), replay))
        if nats[member] is None:
            return run.stopped(train.shards)
    average = average_probabilities(nats, recency)
    readout = "probability_average"
    if len(members) == 1:
        readout = "last_blended" if c.readout == "ema" else "last"
    else:
        equal = dict.fromkeys(members, 1 / len(members))
        run.read_out("probability_average_equal_weights", average_probabilities(nats, equal))
        if not run.read_out("weight_average", train.scorer(average_weights(run, recency), replay)):
            return run.stopped(train.shards)
    run.read_out(readout, average)
    return run.finish(readout, average, mixing="probability", members=recency, stage={"replay": replay})


def load_members(run_dir: str | Path, device: str | torch.device) -> Iterator[tuple[float, Callable]]:
    """The members of a finished run's readout, loaded one at a time: yields (weight, log_probs).

    log_probs maps tokens (B, T) int64 to log-probabilities of the next token (B, T, V) float32, until the next member
    is loaded (ValueError after that). The weights sum to 1; members.json says how the members are mixed.
    """
    device = torch.device(device)
    saved, final = finished_run(Path(run_dir), "limited")
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
    runs = {"plain": {"num_epochs": 1, "replay_from_epoch": 0}}
    runs["all"] = runs["plain"]
    if config.replay_from_epoch:
        runs["replay"] = {"num_epochs": 1, "replay_from_epoch": 1}
        runs["all"] = {"num_epochs": 2, "replay_from_epoch": 2}
    return {name: settings | {"swa_epochs": 0, "readout": "last"} for name, settings in runs.items()}


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
        members=max(1, config.kept_epochs),
    )


def choose_kernels(config: Config, device: torch.device, dtype: torch.dtype) -> list[Kernel]:
    """The kernels to use where there is a choice; ValueError if a wanted one does not run."""
    head_dim = config.n_embd // config.n_head
    chosen = choose_attention(config.attention, head_dim, device, dtype)
    windows = sorted({config.window(i) for i in range(config.n_layer)})
    shape = config.sequence_len, config.n_head, head_dim
    error = partial(attention_error, chosen, shape, [(window, None) for window in windows], device)
    return [Kernel("attention", chosen, plain="sdpa", fast="varlen", limit=0.05, error=error)]


def end_epoch(run: Session, train: Training) -> None:
    """Checkpoint, validate, and keep the weights if the readout needs them; also where the cap cuts an epoch short.

    The session skips what was done before a resume.
    """
    c = run.config
    epoch = run.plan.epoch_ended(run.step)
    name = f"epoch_{epoch}" if epoch else f"epoch_{run.plan.epoch[run.step] + 1}_cut_short"
    replay = replays(c, run.plan.epoch[run.step - 1] + 1)  # as in the epoch just finished
    number = epoch or run.plan.epoch[run.step] + 1
    is_kept = number > c.num_epochs - c.kept_epochs or (run.stopped_by == "time_cap" and c.kept_epochs)
    run.save(train.shards)
    if run.validate(name, train.scorer(train.masters, replay)) and is_kept:
        run.keep_member(f"epoch_{number:02d}", member_weights(train.masters, run.dtype))


def main(argv: list[str] | None = None) -> int:
    """Train, and return the exit code: 0 finished, or stopped by a signal and saved."""
    run = Session("limited", Config, DEMO, argv, __file__, record_sizes)
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
        run.validate("initial", train.scorer(train.masters, replays(c, 1)))
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
