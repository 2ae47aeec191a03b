"""The limited track of NanoGPT Slowrun: the lowest validation loss from 100M tokens of FineWeb in one hour on 8xH100.

    python prepare_data.py                                  # once: writes fineweb_data/
    torchrun --standalone --nproc_per_node=8 train.py       # the current record. Published: 3.183 in 59.3 minutes
    python train.py --list-records                          # the records before it; --record N trains one
    python train.py --demo                                  # toy size, on a CPU (after prepare_data.py --source demo)

1, 2, 4 or 8 processes compute the same thing: a batch is that of 8 virtual ranks, which the processes share. Every
field of Config, and of GPTConfig in model.py, is a flag: see --help. A run writes runs/<name>/, and one that was
stopped or killed goes on with --resume runs/<name>. How a result is measured is in slowrun/.
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(next(p for p in Path(__file__).resolve().parents if (p / "slowrun").is_dir())))

from model import (
    CHUNK,
    GPT,
    ComputeWeights,
    GPTConfig,
    attention_error,
    build,
    choose_attention,
    draw_dropped,
    flops_per_token,
    require,
)
from slowrun import rules
from slowrun.clock import Clock
from slowrun.config import RESUME_MAY_CHANGE, RunConfig, demo_of_record, parse_flags, require_at_least
from slowrun.data import (
    Loader,
    Split,
    load_splits,
    sha256_file,
    shuffled_documents,
    shuffled_micro_steps,
    token_bytes,
)
from slowrun.folder import (
    RunFolder,
    code_sha256,
    instrument_sha256,
    read_config,
    try_to_write_json,
    write_atomically,
    write_json,
)
from slowrun.machine import GIB, compute_dtype, device_name, disk_space, peak_flops, peak_memory, total_memory
from slowrun.scoring import EvalSet, Score, data_efficiency, mix_probabilities
from slowrun.session import (
    NonFiniteLoss,
    begin,
    check_same_data,
    duration,
    exit_code,
    launch,
    reopen,
    resume_command,
)
from slowrun.world import VIRTUAL_RANKS, World, join, seed_of

TRACK = "limited"

# ======================================================================================================================
# Config
# ======================================================================================================================


@dataclass(frozen=True)
class Config(GPTConfig, RunConfig):
    """How the model is trained. The defaults, with those of GPTConfig in model.py, are the current record."""

    num_epochs: int = 11  # passes over the training data
    batch_tokens: int = 524288  # tokens of an optimizer step
    micro_batch: int = 4  # sequences of a micro-step of one of the 8 virtual ranks
    device_batch: int = 0  # sequences of a forward pass: fewer save memory, same mathematics (0: micro_batch)
    seed: int = 42  # seed of the initial weights, dropout and stochastic depth; the data order has none
    time_cap_min: float = 60.0  # minutes of training time (0: no cap, and the run is not eligible)
    lr_multiplier: float = 0.25  # factor on all learning rates below but mix_lr
    matrix_lr: float = 0.04  # Muon: all matrices but the tables
    embedding_lr: float = 0.15  # AdamW: wte and tables of value embeddings
    head_lr: float = 0.002  # AdamW: lm_head
    scalar_lr: float = 0.1  # AdamW: x0_lambdas; times 0.01, resid_lambdas and skip_weights
    mix_lr: float = 0.02  # AdamW: q_mix, k_mix, v_mix
    weight_decay: float = 1.3  # of matrices and tables, before its schedule
    row_norm: bool = True  # MuonEq-R: Muon gives the rows of a step the same norm before it is made orthogonal
    decay_schedule: bool = True  # weight decay falls, and rises in each cycle; else it is constant
    warmdown: float = 0.2  # part of the steps, at the end, over which the learning rate falls
    warmdown_shape: Literal["sqrt", "linear"] = "sqrt"  # how it falls, before the cycles
    swa_epochs: int = 3  # last epochs, with a cyclic learning rate (0: none)
    readout: Literal["average", "last", "ema"] = "average"  # of epochs; last weights; 0.7 of them, 0.3 of their EMA
    readout_epochs: int = 3  # last epochs, whose final weights the average mixes in probability with weights 1:2:3...
    replay_from_epoch: int = 7  # first epoch with layer replay (0: never)
    meta_gradient: bool = True  # take the second half of a gradient at a point moved down the first half's
    meta_step: float = 0.5  # length of that move, before the warmdown
    shuffle: Literal["documents", "micro_steps", "none"] = "documents"  # what is put in another order each epoch
    attention: Literal["auto", "varlen", "sdpa"] = "auto"  # auto: varlen, flash attention, where the GPU has it

    def __post_init__(self):
        GPTConfig.__post_init__(self)
        RunConfig.__post_init__(self)
        check_config(self)
        require(self.replay_from_epoch >= 0, f"--replay-from-epoch is {self.replay_from_epoch}: at least 0 (never)")

    @property
    def micro_steps(self) -> int:
        """Micro-steps of a virtual rank in an optimizer step."""
        return self.batch_tokens // (VIRTUAL_RANKS * self.micro_batch * self.sequence_len)

    @property
    def halves_batches(self) -> bool:
        """Whether the meta-gradient halves the sequences of a micro-step, as there is only one."""
        return self.meta_gradient and self.micro_steps == 1

    @property
    def kept_epochs(self) -> int:
        """Last epochs whose final weights the readout needs; a moving average needs those of the last step alone."""
        return {"average": self.readout_epochs, "last": 1, "ema": 0}[self.readout]

    @property
    def device_rows(self) -> int:
        """Sequences of a forward pass in training."""
        rows = self.micro_batch // (1 + self.halves_batches)
        return min(self.device_batch or rows, rows)


def check_config(c: Config) -> None:
    """Refuse settings that do not go together (ValueError); those that the tracks share."""
    for name in ("num_epochs", "batch_tokens", "micro_batch", "readout_epochs"):
        require_at_least(c, name, 1)
    for name in ("device_batch", "swa_epochs", "meta_step"):
        require_at_least(c, name, 0)
    group = VIRTUAL_RANKS * c.micro_batch * c.sequence_len
    require(
        c.batch_tokens % group == 0,
        f"batch_tokens {c.batch_tokens} is not a multiple of {VIRTUAL_RANKS} virtual ranks x micro_batch "
        f"{c.micro_batch} x sequence_len {c.sequence_len} = {group}: change --batch-tokens",
    )
    require(
        not c.meta_gradient or (c.micro_batch if c.micro_steps == 1 else c.micro_steps) % 2 == 0,
        f"the meta-gradient cannot halve {c.micro_steps} micro-step(s) of {c.micro_batch} sequences: make "
        "them even with --batch-tokens or --micro-batch, or give --no-meta-gradient",
    )
    rows, of = (c.micro_batch // 2, "half of micro_batch") if c.halves_batches else (c.micro_batch, "micro_batch")
    fits = rows % c.device_rows == 0  # all passes have one shape
    require(fits, f"device_batch {c.device_batch} does not divide {of}, {rows}: change --device-batch")
    parts = {"--swa-epochs": c.swa_epochs, "--readout-epochs": c.kept_epochs}
    over = [f"{flag} {value}" for flag, value in parts.items() if value > c.num_epochs]
    require(not over, f"{' and '.join(over)} exceed --num-epochs {c.num_epochs}: lower them, or train longer")
    require(0 <= c.warmdown <= 1, f"warmdown {c.warmdown} is not in [0, 1]")


DEMO = {  # --demo: every technique, at a size that two CPU cores train in about two minutes
    "data_dir": "demo_data", "vocab_size": 257, "sequence_len": 128, "n_layer": 4, "n_head": 2, "n_embd": 64,
    "replay_start": 2, "replay_end": 3, "replay_from_epoch": 4, "stochastic_depth": 0.05,
    "num_epochs": 5, "batch_tokens": 8192, "micro_batch": 4, "eval_batch": 16, "val_sequences": 496,
    "lr_multiplier": 1.0, "weight_decay": 0.3, "time_cap_min": 0.0, "compile": "off", "eval_initial": True,
}  # fmt: skip


def record_sizes(settings: dict) -> dict:
    """DEMO's values beside a record's settings. Lengths in epochs are DEMO's."""
    return demo_of_record(Config, DEMO, settings, unscaled=("num_epochs", "replay_from_epoch"))


# ======================================================================================================================
# Model: in model.py
# ======================================================================================================================


# What computes everywhere, what is faster, how far that may be off, and the function that says how far it is
KERNELS = {"attention": ("sdpa", "varlen", 0.05, attention_error)}


def choose_kernels(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What computes where there is a choice, as keyword arguments of GPT; ValueError if what is wanted does not run."""
    return {"attention": choose_attention(config.attention, config, device, dtype)}


def check_kernels(config: Config, device: torch.device, **kernels: str) -> None:
    """Compare them with plain operations on random numbers; ValueError if one fails or is wrong on this machine."""
    for name, kernel in kernels.items():
        fallback, _, limit, error_of = KERNELS[name]
        try:
            error = error_of(config, device, kernel) if kernel != fallback else 0.0
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as failure:
            raise ValueError(f"{name} {kernel} fails here ({failure}): use --{name} {fallback}") from failure
        require(error < limit, f"{name} {kernel} is wrong here, by {error:g}: use --{name} {fallback}, and report it")


def memory_gib(config: Config, world_size: int, dtype: torch.dtype) -> tuple[int, float, float]:
    """-> (parameters, GiB of a process for weights, gradients and optimizer, GiB in all).

    The last is an estimate, from what autograd keeps of each layer, and from the logits of a chunk.
    """
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in GPT(config).named_parameters()}
    C, V, total = config.n_embd, config.padded_vocab, sum(sizes.values())
    positions = config.device_rows * config.sequence_len
    tables = 2 * V * C + sum(size for name, size in sizes.items() if name.startswith("ve_tables."))
    # float32: masters and two gradients; AdamW keeps two moments of the tables, Muon one of the rest and a moved copy
    static = 3 * total + (total + tables) / world_size + (total - tables) * config.meta_gradient
    static += total / world_size * (config.readout == "ema")
    static = 4 * static + dtype.itemsize * total
    per_layer = (13 * C + 3 * config.hidden) * dtype.itemsize + 2 * C
    layers = len(config.layer_order(replay=config.replay_from_epoch > 0))
    head = min(CHUNK, positions) * V * (2 * dtype.itemsize + 16) + V * C * 8  # a chunk's logits; the gradient
    return total, static / 2**30, (static + positions * per_layer * layers + head) / 2**30


def check_memory(config: Config, world: World) -> float:
    """Refuse a model that cannot fit, before anything is allocated -> estimated GiB per process."""
    dtype = compute_dtype(config.dtype, world.device)
    total, static, needed = memory_gib(config, world.size, dtype)
    said = f"{total / 1e6:,.0f}M parameters need {static:.0f} GiB per process for weights, gradients and optimizer"
    if world.cuda:
        there = total_memory(world.device) / GIB
        require(static < there, f"{said}, and the GPU has {there:.0f} GiB: use more or larger GPUs, or a smaller model")
        return needed
    there = total_memory(world.device) / GIB
    said += f", about {needed:.0f} GiB with activations, in {str(dtype).removeprefix('torch.')}"
    said += f"; this machine has {there:.0f} GiB and no GPU in use"
    on_gpu = memory_gib(config, world.size, torch.bfloat16)[2]
    instead = f"train it on GPUs of at least {on_gpu:.0f} GiB, or see every technique at toy size with --demo"
    require(needed * world.size < there, f"{said}: {instead}")
    require(total < 1e8 or config.device == "cpu", f"{said}: {instead}. It fits, so --device cpu trains it, slowly")
    return needed


def disk_gib(config: Config, dtype: torch.dtype) -> tuple[float, float]:
    """GiB of (the weights that the readout keeps of an epoch, a checkpoint: weights and optimizer)."""
    model = build(config, torch.device("meta"), dtype)
    buckets = build_optimizer(config, model, World(0, 1, torch.device("meta")), dtype, compile=False).buckets
    member = sum(p.numel() * member_dtype(name, p, dtype).itemsize for name, p in model.named_parameters())
    tensors = [*model.parameters(), *(part for bucket in buckets for part in bucket.state.values())]
    return member / 2**30, sum(t.numel() * t.itemsize for t in tensors) / 2**30


def check_disk(config: Config, dtype: torch.dtype, folder: Path) -> str:
    """Refuse a run that its disk cannot hold; what is in its folder already counts -> what the header says."""
    member, checkpoint = disk_gib(config, dtype)
    members = max(1, config.kept_epochs)
    needed = members * member + 3 * checkpoint
    there, free = (size / GIB for size in disk_space(folder))
    parts = f"weights for the readout, {members} x {member:.3g} GiB in {str(dtype)[6:]}, "
    parts += f"and three checkpoints (two stay while the next is written), {checkpoint:.3g} GiB each"
    said = f"up to {needed:.3g} GiB in {folder} ({parts}); {free:.3g} GiB are free"
    had = f", and {there:.3g} GiB of it are there" if there else ""
    require(needed - there < free, f"the run needs {said}{had}: make space, or choose another --runs-dir")
    return said


# ======================================================================================================================
# Optimizer
# ======================================================================================================================

# torch 2.13 renamed these
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

POLAR_EXPRESS = (  # coefficients of the five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def optimizer_groups(config: Config, names: list[str]) -> list[dict]:
    """The optimizer table: which method updates which parameters, at which rate (before Muon's shape factor).

    `moved`: the meta-gradient step moves them; `row_norm`: see muon_update.
    """
    lr, decay, betas = config.lr_multiplier, config.weight_decay, (0.8, 0.95)
    mixes = [name for name in names if name.endswith("_mix")]
    embeddings = ["transformer.wte.weight", *(name for name in names if name.startswith("ve_tables."))]
    # a group each: what AdamW computes with is as large as its largest group
    scalars = [name for name in ("resid_lambdas", "skip_weights") if name in names]
    table = [  # method, parameters, learning rate, weight decay, betas
        ("adamw", ["lm_head.weight"], config.head_lr * lr, decay, betas),
        *(("adamw", [name], config.embedding_lr * lr, decay, betas) for name in embeddings),
        ("adamw", scalars, config.scalar_lr * lr * 0.01, 0.0, betas),
        ("adamw", ["x0_lambdas"], config.scalar_lr * lr, 0.0, (0.96, 0.95)),
        ("adamw", mixes, config.mix_lr, 0.0, betas),
    ]
    taken = {name for row in table for name in row[1]}
    table.append(("muon", [name for name in names if name not in taken], config.matrix_lr * lr, decay, ()))
    groups = [dict(zip(("kind", "params", "lr", "weight_decay", "betas"), row, strict=True)) for row in table]
    return [group | {"moved": group["kind"] == "muon", "row_norm": config.row_norm} for group in groups]


def polar_express(x: Tensor) -> Tensor:
    """Approximately the orthogonal factor of each matrix (arXiv 2505.16932): (n, rows, cols) -> the same."""
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + (x @ polynomial if tall else polynomial @ x)
    return x


def nesterov(grad: Tensor, momentum: Tensor, mu: Tensor) -> Tensor:
    """Updates the momentum in place -> the direction that looks ahead of it."""
    momentum.copy_(mu * momentum + (1 - mu) * grad)
    return (1 - mu) * grad + mu * momentum


def orthogonal_step(p, u, second, lr, weight_decay, dtype: torch.dtype) -> None:
    """Moves p along u, made orthogonal and evened out over rows (or columns); cautious weight decay. In place.

    p, u (n, rows, cols); second (n, rows, 1), (n, 1, cols) if wide; lr, weight_decay (); dtype is that of the
    orthogonalisation. Variance: NorMuon (arXiv 2510.05491).
    """
    u = u / (1.02 * u.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    x = polar_express(u.to(dtype)).to(p.dtype)
    variance = x.square().mean(dim=-1 if x.size(-2) >= x.size(-1) else -2, keepdim=True)
    second.copy_(0.95 * second + 0.05 * variance)
    scale = second.clamp_min(1e-10).rsqrt()
    norms = [v.sum(dim=(-2, -1), keepdim=True).sqrt() for v in (variance, variance * scale * scale)]
    x = x * (scale * norms[0] / norms[1].clamp_min(1e-10))  # keeps the Frobenius norm
    p.sub_(lr * x + lr * weight_decay * p * (x * p >= 0))


def muon_update(p, grad, momentum, second, lr, weight_decay, mu, dtype: torch.dtype, row_norm: bool) -> None:
    """A Muon step, in place: see orthogonal_step. row_norm: rows of norm 1 before it, MuonEq-R (arXiv 2603.28254)."""
    u = nesterov(grad, momentum, mu)
    if row_norm:
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    orthogonal_step(p, u, second, lr, weight_decay, dtype)


def adamw_update(p, grad, exp_avg, exp_avg_sq, lr, weight_decay, beta1, beta2, step) -> None:
    """An AdamW step, in place (arXiv 1711.05101): arguments (n,) or (), `step` counted from 1. It decays first."""
    exp_avg.copy_(beta1 * exp_avg + (1 - beta1) * grad)
    exp_avg_sq.copy_(beta2 * exp_avg_sq + (1 - beta2) * grad.square())
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + 1e-10
    p.copy_(p.to(grad.dtype) * (1 - lr * weight_decay) - lr * (exp_avg / (1 - beta1**step)) / denominator)


class Bucket:
    """Parameters with a common buffer of values and one of gradients, of which each process owns an equal part.

    "muon": matrices of one shape, (n, rows, cols), matrix i owned by process i mod world size. "adamw": tensors of one
    dtype, flattened, (n,). The parameters' data and .grad are views of the buffers, so nothing is stacked or copied for
    communication. Gradients and state are float32 or wider, whatever the values are.
    """

    def __init__(self, params: dict[str, torch.nn.Parameter], group: dict, world: World):
        self.params, self.group, self.kind, self.world, self.probe = params, group, group["kind"], world, None
        first, sizes = next(iter(params.values())), [p.numel() for p in params.values()]
        if self.kind == "muon":
            share, item = math.ceil(len(params) / world.size), first.shape
            starts, sizes = [i % world.size * share + i // world.size for i in range(len(params))], [1] * len(params)
        else:
            share, item = math.ceil(sum(sizes) / world.size), ()
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.spans = {name: slice(a, a + n) for name, a, n in zip(params, starts, sizes, strict=True)}
        self.own = slice(world.rank * share, (world.rank + 1) * share)
        self.values = torch.zeros(share * world.size, *item, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros_like(self.values, dtype=torch.promote_types(first.dtype, torch.float32))
        for name, p in params.items():
            self.view(self.values, name).copy_(p.detach())
            p.grad_dtype = self.grads.dtype
        self.use(self.values, self.grads)
        own = self.grads[self.own]
        if self.kind == "muon":
            second = own.mean(-1 if item[0] >= item[1] else -2, keepdim=True)
            self.state = {"momentum": torch.zeros_like(own), "second": torch.zeros_like(second)}
            self.lr = group["lr"] * math.sqrt(max(1, item[0] / item[1]))
        else:
            self.state = {"exp_avg": torch.zeros_like(own), "exp_avg_sq": torch.zeros_like(own)}
            self.lr = group["lr"]
        self.moments = tuple(self.state.values())

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """A parameter's part of a buffer, in its shape or that of its state."""
        part = buffer[self.spans[name]]
        return part[0] if self.kind == "muon" else part.view(self.params[name].shape)

    def use(self, values: Tensor, grads: Tensor) -> None:
        """Let the parameters' data and gradients be views of these buffers."""
        for name, p in self.params.items():
            p.data, p.grad = self.view(values, name), self.view(grads, name)

    def whole(self, part: Tensor) -> Tensor:
        """The parts of all processes together; collective."""
        buffer = part.new_empty(part.size(0) * self.world.size, *part.shape[1:])
        if self.world.size > 1:
            all_gather(buffer, part, group=self.world.group)
        return buffer if self.world.size > 1 else part


class MuonAdamW:
    """Muon for matrices, AdamW for tables and scalars, with the state sharded over the processes.

    As in ZeRO-2 (arXiv 1910.02054), every process holds all weights and gradients but the optimizer state of its part
    alone. A step starts to sum the gradients of all buckets onto their owners, then for each bucket in turn waits,
    updates the own part and starts to gather the result: communication overlaps with the updates.
    """

    def __init__(self, model: GPT, groups: list[dict], world: World, dtype: torch.dtype, compile: bool = False):
        params = dict(model.named_parameters())
        assert sorted(n for g in groups for n in g["params"]) == sorted(params), "each parameter must be in one group"
        self.buckets: list[Bucket] = []
        for group in groups:  # a bucket for each group of AdamW, for each shape of Muon
            shapes = sorted({params[name].shape if group["kind"] == "muon" else () for name in group["params"]})
            for shape in shapes:
                names = [name for name in group["params"] if shape in (params[name].shape, ())]
                self.buckets.append(Bucket({name: params[name] for name in names}, group, world))
        self.buckets.sort(key=lambda bucket: -bucket.values.numel())
        self.moved = [bucket for bucket in self.buckets if bucket.group["moved"]]
        self.world, self.dtype, self.steps = world, dtype, 0
        self.muon_update = torch.compile(muon_update, dynamic=False) if compile else muon_update

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, mu: float, alone: bool = False) -> None:
        """Update the parameters from their gradients, and clear these. lr and weight_decay multiply the table's.

        `alone`: without communication, to compile it.
        """
        self.steps += 1
        dtype = self.buckets[0].grads.dtype
        lr, decay, mu, step = (torch.tensor(value, dtype=dtype) for value in (lr, weight_decay, mu, self.steps))
        parts, sums, gathers = [bucket.grads[bucket.own] for bucket in self.buckets], [], []
        if self.world.size > 1 and not alone:
            parts = [torch.empty_like(part) for part in parts]
            for part, bucket in zip(parts, self.buckets, strict=True):
                sums.append(reduce_scatter(part, bucket.grads, group=self.world.group, async_op=True))
        for i, bucket in enumerate(self.buckets):
            if sums:
                sums[i].wait()
            own, rates = bucket.values[bucket.own], (bucket.lr * lr, bucket.group["weight_decay"] * decay)
            if bucket.kind == "muon":
                self.muon_update(own, parts[i], *bucket.moments, *rates, mu, self.dtype, bucket.group["row_norm"])
            else:
                adamw_update(own, parts[i], *bucket.moments, *rates, *bucket.group["betas"], step)
            if sums:
                gathers.append(all_gather(bucket.values, own, group=self.world.group, async_op=True))
        for gather in gathers:
            gather.wait()
        self.zero_grad()

    def zero_grad(self) -> None:
        for bucket in self.buckets:
            bucket.grads.zero_()

    def broadcast_values(self) -> None:
        """Give all processes the parameters of the main one; collective."""
        for bucket in self.buckets:
            self.world.broadcast(bucket.values)

    def state_dict(self) -> dict:
        """The whole state by parameter, on the CPU, whatever the number of processes; collective, empty but in main."""
        state: dict[str, dict[str, Tensor]] = {}
        for bucket in self.buckets:
            for key, part in bucket.state.items():
                whole = bucket.whole(part)
                for name in bucket.params if self.world.is_main else ():
                    state.setdefault(name, {})[key] = bucket.view(whole, name).to("cpu", copy=True)
        return {"steps": self.steps, "state": state} if self.world.is_main else {}

    def load_state_dict(self, saved: dict) -> None:
        """Take up a state_dict of the main process, written by any number of processes; collective."""
        self.steps = self.world.on_main(lambda: saved["steps"])
        for bucket in self.buckets:
            for key, part in bucket.state.items():
                whole = part.new_zeros(part.size(0) * self.world.size, *part.shape[1:])
                for name in bucket.params if self.world.is_main else ():
                    bucket.view(whole, name).copy_(saved["state"][name][key])
                self.world.broadcast(whole)
                part.copy_(whole[bucket.own])


def build_optimizer(config: Config, model: GPT, world: World, dtype: torch.dtype, compile: bool) -> MuonAdamW:
    """The optimizer of a model whose compute dtype is dtype. Muon orthogonalises in bfloat16 on a GPU that has it.

    Where a readout needs it, each process keeps its part of a moving average of the weights beside the state.
    """
    groups = optimizer_groups(config, [name for name, _ in model.named_parameters()])
    in_bfloat16 = world.cuda and dtype == torch.bfloat16
    wide = torch.promote_types(dtype, torch.float32)
    optimizer = MuonAdamW(model, groups, world, dtype if in_bfloat16 else wide, compile)
    for bucket in optimizer.buckets if config.readout == "ema" else ():
        bucket.state["average"] = torch.zeros_like(bucket.grads[bucket.own])
    return optimizer


@torch.no_grad()
def update_weights(optimizer: MuonAdamW, plan: Plan, step: int) -> None:
    """The end of an optimizer step: the weights change and, if it is their turn, enter their moving average."""
    values, share = schedule(plan, step), average_share(plan, step)
    optimizer.step(values["lr"], values["weight_decay"], values["momentum"])
    for bucket in optimizer.buckets if share else ():
        average = bucket.state["average"]
        average.lerp_(bucket.values[bucket.own].to(average.dtype), share)


@torch.no_grad()
def add_gradient(weights: ComputeWeights, optimizer: MuonAdamW, halves: list, eta: float) -> None:
    """Add the gradient of a virtual rank to the parameters' .grad, with or without the meta-gradient step.

    halves: two functions that run forward and backward over half of its micro-steps each, into the gradients of
    `weights`; or one that does all of it. For the second half the matrices of the groups marked `moved` are moved by
    eta down the first half's gradient (one norm over all of them). The moved point is made from the float32 masters and
    rounded once; the masters are never written to.
    """

    def run(half) -> None:
        weights.refresh()
        with torch.enable_grad():
            half()
        weights.pull_back()

    if len(halves) == 1:
        return run(halves[0])
    for bucket in optimizer.moved:
        bucket.probe = torch.zeros_like(bucket.grads) if bucket.probe is None else bucket.probe.zero_()
        bucket.use(bucket.values, bucket.probe)
    run(halves[0])
    length = torch.stack([bucket.probe.norm() for bucket in optimizer.moved]).norm().clamp_min(1e-30)
    for bucket in optimizer.moved:
        bucket.grads.add_(bucket.probe)
        bucket.use(bucket.probe.mul_(-eta / length).add_(bucket.values), bucket.grads)
    run(halves[1])
    for bucket in optimizer.moved:
        bucket.use(bucket.values, bucket.grads)


# ======================================================================================================================
# Schedules: pure functions of the config, the step (from 0) and the number of steps
# ======================================================================================================================


def warmdown(config: Config, step: int, num_steps: int) -> float:
    """1, then falling to 0 over the last part of the run, linearly or as a square root."""
    length = round(config.warmdown * num_steps)
    left = 1.0 if step < num_steps - length else (num_steps - step) / length
    return left if config.warmdown_shape == "linear" else math.sqrt(left)


def swa_cycle(config: Config, step: int, num_steps: int) -> float | None:
    """Position, 0 to 1, in the epoch-long cycles of stochastic weight averaging (arXiv 1803.05407); None before."""
    epoch_steps = num_steps / config.num_epochs
    start = num_steps - config.swa_epochs * epoch_steps
    return (step - start) / epoch_steps % 1.0 if step >= start else None


def lr_multiplier(config: Config, step: int, num_steps: int) -> float:
    """The warmdown; in the cycles, half a cosine from there to 0.05."""
    level, cycle = warmdown(config, step, num_steps), swa_cycle(config, step, num_steps)
    return level if cycle is None else 0.05 + (max(level, 0.05) - 0.05) * (1 + math.cos(math.pi * cycle)) / 2


def weight_decay_multiplier(config: Config, step: int, num_steps: int) -> float:
    """1 for 40% of the steps, then linear to 0.65 where the cycles begin; in each cycle linear from 0.65 to 1.5."""
    cycle = swa_cycle(config, step, num_steps)
    if not config.decay_schedule:
        return 1.0
    if cycle is not None:
        return 0.65 + (1.5 - 0.65) * cycle
    hold, end = 0.4 * num_steps, num_steps * (1 - config.swa_epochs / config.num_epochs)
    return 1.0 - (1.0 - 0.65) * (step - hold) / (end - hold) if step > hold else 1.0


def average_share(plan: Plan, step: int) -> float:
    """Share that the weights after a step take in their moving average, 0 if it is not their turn.

    It begins as a copy of them after 90% of the steps, and then takes 5% every 10 steps.
    """
    since = step + 1 - round(0.9 * plan.num_steps)
    its_turn = plan.config.readout == "ema" and since >= 0 and since % 10 == 0
    return (0.05 if since else 1.0) if its_turn else 0.0


def muon_momentum(step: int) -> float:
    """Linear from 0.85 to 0.95 over the first 300 steps."""
    return 0.85 + 0.1 * min(step / 300, 1.0)


@dataclass(frozen=True)
class Plan:
    """What follows from the config and the number of training sequences of T + 1 tokens."""

    config: Config
    num_sequences: int

    def __post_init__(self):
        c, needed = self.config, 2 * self.config.batch_tokens // self.config.sequence_len
        require(
            self.epoch_micro_steps >= 2 * c.micro_steps,
            f"the training data makes {self.num_sequences} sequences of {c.sequence_len} + 1 tokens, an epoch needs "
            f"{needed}, two optimizer steps: use more data, or lower --batch-tokens or --sequence-len",
        )

    @property
    def epoch_micro_steps(self) -> int:
        """Micro-steps in an epoch; what does not fill one, of all virtual ranks, is left out."""
        return self.num_sequences // (VIRTUAL_RANKS * self.config.micro_batch)

    @property
    def num_steps(self) -> int:
        c = self.config
        epoch_tokens = self.epoch_micro_steps * VIRTUAL_RANKS * c.micro_batch * c.sequence_len
        return round(epoch_tokens * c.num_epochs / c.batch_tokens)

    def first_micro_step(self, step: int) -> int:
        """Micro-steps, counted over all epochs, that are done after `step` optimizer steps."""
        return step * self.config.micro_steps

    def tokens_done(self, step: int) -> int:
        """Tokens that are trained on after `step` optimizer steps."""
        return self.first_micro_step(step) * VIRTUAL_RANKS * self.config.micro_batch * self.config.sequence_len

    def epochs_done(self, step: int) -> int:
        """Epochs of which all micro-steps are done after `step` optimizer steps; the last step ends the last epoch."""
        done = self.first_micro_step(step) // self.epoch_micro_steps
        return done if step < self.num_steps else self.config.num_epochs


def stage(plan: Plan, step: int) -> dict:
    """What switches at the ends of epochs, as keyword arguments of the model: here, layer replay."""
    return {"replay": 0 < plan.config.replay_from_epoch <= plan.epochs_done(step) + 1}


def stage_changes(plan: Plan) -> dict[int, str]:
    """The steps from which on other things are switched, the first included, and what the stage then is."""
    said = [", ".join(f"{k} {v}" for k, v in stage(plan, step).items()) for step in range(plan.num_steps)]
    return {step: text for step, text in enumerate(said) if step == 0 or text != said[step - 1]}


def step_flops_per_token(plan: Plan, step: int) -> float:
    """Floating-point operations of an optimizer step, per token."""
    return flops_per_token(plan.config, **stage(plan, step))


def pass_arguments(plan: Plan, step: int, micro_step: int) -> dict:
    """What else the model needs for the training loss: the layers that stochastic depth drops."""
    seed = plan.config.seed, step, micro_step
    return {"dropped": draw_dropped(plan.config, stage(plan, step)["replay"], *seed)}


def warm_up_arguments(config: Config, replay: bool) -> list[dict]:
    """pass_arguments that lead to other graphs: no layer is dropped, all are."""
    dropped = [None, [True] * (len(config.layer_order(replay)) + 1)]
    return [{"dropped": flags} for flags in dropped[: 1 + (config.stochastic_depth > 0)]]


def schedule(plan: Plan, step: int) -> dict[str, float]:
    """The values of all schedules at a step."""
    c, N = plan.config, plan.num_steps
    return {
        "lr": lr_multiplier(c, step, N),
        "weight_decay": weight_decay_multiplier(c, step, N),
        "momentum": muon_momentum(step),
        "meta_step": c.meta_step * warmdown(c, step, N) if c.meta_gradient else 0.0,
    }


# ======================================================================================================================
# Data order
# ======================================================================================================================


def epoch_sequences(config: Config, split: Split, epoch: int) -> np.ndarray:
    """The sequences of an epoch, counted from 1, in the order of training: (n, T + 1) uint16.

    From epoch 2 on the documents are permuted, from their order in the epoch before. They are cut into sequences, which
    are permuted in turn. Earlier records have a fixed order, or permute its micro-steps.
    """
    length = config.sequence_len + 1
    seeds = range(2, epoch + 1)
    if config.shuffle == "documents":
        return shuffled_documents(split, length, document_seeds=seeds, sequence_seed=epoch + 1000)
    return shuffled_micro_steps(split, length, config.micro_batch, seeds if config.shuffle == "micro_steps" else ())


def make_loader(plan: Plan, split: Split, virtual_ranks: range) -> Loader:
    """The batches of these virtual ranks."""
    return Loader(
        partial(epoch_sequences, plan.config, split),
        plan.config.micro_batch,
        micro_steps_before=np.array([plan.first_micro_step(step) for step in range(plan.num_steps + 1)]),
        micro_steps_per_epoch=plan.epoch_micro_steps,
        virtual_ranks=virtual_ranks,
    )


# ======================================================================================================================
# Validation
# ======================================================================================================================

MIXING = "probability"  # how the readout mixes its members: it averages their probabilities


def member_dtype(name: str, p: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which a member of the readout keeps a parameter: matrices as they compute, lambdas and mixes as they are."""
    return p.dtype if p.ndim < 2 or name.endswith("_mix") else dtype


def load_finished(run_dir: Path, device: torch.device) -> tuple[GPT, ComputeWeights, dict]:
    """-> (The model of a finished run, not filled; its compute weights, to refresh then; members.json)."""
    saved = json.loads((run_dir / "config.json").read_text())
    require(saved["track"] == TRACK, f"{run_dir} is a run of the {saved['track']} track: use that track's load_members")
    config, final = Config(**saved["config"]), json.loads((run_dir / "final" / "members.json").read_text())
    dtype = compute_dtype(config.dtype, device)
    model = build(config, device, dtype, attention=choose_attention("auto", config, device, dtype)).eval()
    return model, ComputeWeights(model, dtype, requires_grad=False), final


def load_members(run_dir: str | Path, device: str | torch.device):
    """The members of a finished run's readout, loaded one at a time: yields (weight, log_probs).

    log_probs maps tokens (B, T) int64 to log-probabilities of the next token (B, T, V) float32, until the next member
    is loaded (ValueError after that). The weights sum to 1, and MIXING says how the members are mixed.
    """
    run_dir, device = Path(run_dir), torch.device(device)
    model, weights, final = load_finished(run_dir, device)

    @torch.no_grad()
    def log_probs(member: dict, tokens: Tensor) -> Tensor:
        require(loaded[-1] is member, "the next member has taken this one's place: use them one at a time")
        return model.log_probs(tokens.to(device), weights.tensors, **final["stage"]).float()

    loaded: list[dict] = []
    for member in final["members"]:
        model.load_state_dict(load_file(run_dir / "final" / member["file"]))
        weights.refresh()
        loaded.append(member)
        yield member["weight"], partial(log_probs, member)


# ======================================================================================================================
# Train
# ======================================================================================================================


class Trainer:
    """A training run: its state, and its phases warm_up, resume and fit. What follows is finish."""

    def __init__(self, config: Config, world: World, run: RunFolder, plan: Plan, splits: dict[str, Split], lengths):
        self.config, self.world, self.run, self.plan, self.splits = config, world, run, plan, splits
        self.dtype = compute_dtype(config.dtype, world.device)
        self.compiled = config.compile == "on" or (config.compile == "auto" and world.cuda)
        self.kernels = choose_kernels(config, world.device, self.dtype)
        self.model = build(config, world.device, self.dtype, **self.kernels)
        torch.manual_seed(config.seed)
        self.model.init_weights()
        if self.compiled:
            torch._dynamo.config.recompile_limit = 256  # graphs of a function: training, validation, windows, replay
            self.model.compile_layers()
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizer = build_optimizer(config, self.model, world, self.dtype, self.compiled)
        self.optimizer.broadcast_values()
        self.weights = ComputeWeights(self.model, self.dtype)
        self.loader = make_loader(plan, splits["train"], world.virtual_ranks)
        self.eval_sets = {
            name: EvalSet(split, config.sequence_len, config.val_sequences, config.eval_batch, world, lengths)
            for name, split in splits.items()
            if name in ("val", "holdout")
        }
        costs = [step_flops_per_token(plan, step) for step in range(plan.num_steps)]
        self.tokens = np.array([plan.tokens_done(step) for step in range(plan.num_steps + 1)])  # before a step
        self.flops = np.cumsum([0.0, *(costs * np.diff(self.tokens))])  # of all steps before a step
        self.stages = stage_changes(plan)
        self.clock, self.started, self.earlier_wall_s = Clock(), time.monotonic(), 0.0  # started: of this process
        self.step, self.stopped_by, self.signal, self.signal_at = 0, "", "", 0.0
        self.readouts: dict[str, float] = {}  # validation losses by name
        self.members: list[dict] = []  # weights kept for the readout: file, epoch, step
        self.unsaved: dict[str, dict[str, Tensor]] = {}  # those not on the disk yet, by file
        self.pending: deque = deque()  # steps under way: (step, function that waits for its losses)
        self.unprinted_s: list[float] = []  # durations of the steps since the last printed line
        self.last_checkpoint, self.checkpoint_due, self.checkpoint_failure = time.monotonic(), False, ""

    # ------------------------------------------------------------------------------------------------ an optimizer step

    def pieces(self, micro_steps: Tensor) -> list[tuple[int, Tensor]]:
        """(k, b, T + 1) of a virtual rank -> (micro-step, sequences); the meta-gradient halves a single micro-step."""
        if self.config.halves_batches:
            return [(0, half) for half in micro_steps[0].chunk(2)]
        return list(enumerate(micro_steps))

    def backward(self, rows: Tensor, share: float, **how) -> Tensor:
        """Forward and backward of sequences (B, T + 1), weighted -> weighted (loss, next-token loss), (2,)."""
        tokens, targets = rows[:, :-1], rows[:, 1:]
        losses = self.model.training_loss(tokens, targets, self.weights.tensors, **how)
        (losses[0] * share).backward()
        return torch.stack(losses).detach() * share

    def run_pieces(self, step: int, v: int, pieces: list, share: float, totals: Tensor) -> None:
        """Accumulate gradients and losses of pieces of virtual rank v. Dropout is seeded by what they are."""
        c = self.config
        for index, (micro_step, rows) in pieces:
            how = stage(self.plan, step) | pass_arguments(self.plan, step, micro_step)
            for i, chunk in enumerate(rows.split(c.device_rows)):
                self.world.seed(seed_of(c.seed, step, v, index, i))
                totals += self.backward(chunk, share * len(chunk) / len(rows), **how)

    def train_step(self, step: int):
        """Enqueue an optimizer step -> a function that waits for it and returns this process' share of the losses."""
        eta, batch = schedule(self.plan, step)["meta_step"], self.loader.batch(step)
        if self.world.cuda:
            batch = batch.pin_memory().to(self.world.device, non_blocking=True)
        batch = batch.unflatten(1, (-1, self.config.micro_batch))  # (virtual ranks, micro-steps, micro-batch, T + 1)
        totals = torch.zeros(2, dtype=self.model.x0_lambdas.dtype, device=self.world.device)
        for v, micro_steps in zip(self.world.virtual_ranks, batch, strict=True):
            pieces = list(enumerate(self.pieces(micro_steps)))
            middle = len(pieces) // 2
            halves = [pieces[:middle], pieces[middle:]] if self.config.meta_gradient else [pieces]
            run = partial(self.run_pieces, step, v, share=1 / (VIRTUAL_RANKS * len(pieces)), totals=totals)
            add_gradient(self.weights, self.optimizer, [partial(run, half) for half in halves], eta)
        update_weights(self.optimizer, self.plan, step)
        if not self.world.cuda:
            return totals.tolist
        host, event = torch.empty_like(totals, device="cpu", pin_memory=True), torch.cuda.Event()
        host.copy_(totals, non_blocking=True)
        event.record()
        return lambda: (event.synchronize(), host.tolist())[1]

    def token_losses(self, tokens: Tensor, targets: Tensor, **how) -> Tensor:
        """What validation scores: 2 x (B, T) -> (B, T)."""
        self.model.eval()
        with torch.no_grad():
            losses = self.model.token_losses(tokens, targets, self.weights.tensors, **how)
        self.model.train()
        return losses

    def warm_up(self) -> None:
        """Check the kernels; run every graph that the run will need, on random tokens; leave no trace of it."""
        c, device = self.config, self.world.device
        check_kernels(c, device, **self.kernels)
        stages = {str(how): how for how in (stage(self.plan, step) for step in range(self.plan.num_steps))}
        with torch.random.fork_rng([device] if self.world.cuda else []):
            for main_turn in (True, False):  # the main process goes first and fills the compiler's cache
                for how in stages.values() if self.world.is_main == main_turn else ():
                    shape = (c.micro_steps, c.micro_batch, c.sequence_len + 1)  # graphs depend on shapes and strides
                    rows = self.pieces(torch.randint(c.vocab_size, shape, device=device))[0][1]
                    for arguments in warm_up_arguments(c, **how):
                        run = partial(self.backward, rows[: c.device_rows], 1.0, **how, **arguments)
                        add_gradient(self.weights, self.optimizer, [run] * (1 + c.meta_gradient), 0.0)
                    batch = torch.randint(c.vocab_size, (c.eval_batch, c.sequence_len + 1), device=device)
                    self.token_losses(batch[:, :-1], batch[:, 1:], **how)
                self.optimizer.zero_grad()
                if self.world.is_main == main_turn:
                    self.optimizer.step(0.0, 0.0, 0.95, alone=True)  # no gradient and no rate: it changes nothing
                self.world.sum([0])
        self.optimizer.step(0.0, 0.0, 0.95)  # connects the processes
        self.optimizer.steps = 0

    # --------------------------------------------------------------------------------------------------- training loop

    def fit(self) -> None:
        """Train until the last step, the time cap or a signal; `stopped_by` says which."""
        keep = 1 if self.world.cuda else 0  # losses are read one step late, so that the GPU never waits
        projection_at = self.step + 10
        if self.any_signal():
            self.stopped_by = self.stopped_by or "signal"
        if self.step == 0 and self.config.eval_initial and not self.stopped_by:
            self.validate("initial")
        self.clock.start()
        while self.step < self.plan.num_steps and not self.stopped_by:
            self.pending.append((self.step, self.train_step(self.step)))
            self.step += 1
            self.settle(keep)
            if self.step == projection_at:
                self.print_projection()
            epoch_ends = self.plan.epochs_done(self.step) > self.plan.epochs_done(self.step - 1)
            self.agree()
            if epoch_ends or self.checkpoint_due or self.stopped_by:
                self.settle(0)
                self.clock.stop()
                if epoch_ends or self.stopped_by == "time_cap":
                    self.end_epoch(complete=epoch_ends)
                self.save_checkpoint()
                if self.stopped_by == "signal":
                    self.run.draw_curve(self.stages)
                self.clock.start()
        self.clock.stop()
        self.stopped_by = self.stopped_by or "steps"

    def take_signal(self, number: int, frame) -> None:
        """Stop after the step under way.

        A second signal soon after is the same stop, from a scheduler and from torchrun; a later one ends the process.
        """
        now = time.monotonic()
        if self.signal and now - self.signal_at > 5:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.signal:
            self.signal, self.signal_at = signal.Signals(number).name, now

    def any_signal(self) -> bool:
        """Whether a process got one; collective."""
        return self.world.sum([bool(self.signal)])[0] > 0

    def settle(self, keep: int) -> None:
        """Wait for all steps but the newest `keep`, and record them."""
        while len(self.pending) > keep:
            step, losses = self.pending.popleft()
            local = losses()
            dt_s = self.clock.lap()
            loss, lm_loss = self.world.sum(local)
            self.record_step(step, dt_s, loss, lm_loss)
            if not math.isfinite(loss):
                self.fail("training", loss, step)

    def agree(self) -> None:
        """Before each step, all processes decide together whether to stop, or to write a checkpoint after it."""
        c, over_cap = self.config, False
        if self.step < self.plan.num_steps:
            over_cap = self.clock.next_step_exceeds(60 * c.time_cap_min, steps_in_flight=len(self.pending))
        due = time.monotonic() - self.last_checkpoint >= 60 * c.checkpoint_min
        over_cap, stop, due = self.world.sum([over_cap, bool(self.signal), due])
        self.checkpoint_due = bool(due)
        if not self.stopped_by:
            self.stopped_by = "time_cap" if over_cap else "signal" if stop else ""

    def record_step(self, step: int, dt_s: float, loss: float, lm_loss: float) -> None:
        """A line of metrics.jsonl, the progress bar, and every log_every steps a printed line."""
        c, N, done = self.config, self.plan.num_steps, step + 1
        values = {
            "step": done,
            "epoch": self.plan.epochs_done(step) + 1,
            "dt_s": dt_s,
            "tokens": int(self.tokens[done]),
        }
        values |= {"train_loss": lm_loss, "train_loss_with_mtp": loss}
        values |= schedule(self.plan, step) | stage(self.plan, step)
        self.run.record(values, to_wandb=done % c.log_every == 0)
        if step in self.stages and step > 0:
            self.run.log(f"from step {done} on: {self.stages[step]}")
        self.unprinted_s.append(dt_s)
        step_s = statistics.mean(self.unprinted_s)
        tokens_per_s = (self.tokens[done] - self.tokens[step]) / step_s
        parts = [f"train {lm_loss:.4f}", f"lr {values['lr']:.2f}", f"{tokens_per_s / 1e3:.1f}k tok/s"]
        if peak := peak_flops(self.world.device):
            used = (self.flops[done] - self.flops[step]) / step_s / self.world.size
            parts.append(f"{100 * used / peak:.1f}% mfu")
        parts += [f"{step_s:.2f} s/step", f"eta {duration(self.remaining_s(done, step_s))}"]
        printed = done % c.log_every == 0 or done == N
        self.run.progress(done, N, parts, printed)
        if printed:
            self.unprinted_s = []

    def remaining_s(self, step: int, step_s: float) -> float:
        """Projected time of the steps from `step` on, at the rate of operations of steps that take `step_s`."""
        last, ahead = self.flops[step] - self.flops[step - 1], self.flops[-1] - self.flops[step]
        return step_s * ahead / last

    def print_projection(self) -> None:
        left_s = self.remaining_s(self.step, self.clock.step_s)
        cap, total_min = self.config.time_cap_min, (self.clock.train_time_s + left_s) / 60
        self.run.log(f"projected training time {total_min:.1f} min, cap {f'{cap:g} min' if cap else 'lifted'}")
        if 0 < cap < total_min:
            self.run.log("WARNING: training will stop early, at the cap; --time-cap-min 0 lifts it (not eligible then)")

    def end_epoch(self, complete: bool) -> None:
        """Validate, and keep the weights that the readout needs. A run that the cap stops ends its epoch early."""
        epoch = self.plan.epochs_done(self.step) + (not complete)
        self.validate(f"epoch_{epoch}" if complete else f"epoch_{epoch}_cut_short")
        last = epoch > self.config.num_epochs - self.config.kept_epochs
        if last or (self.stopped_by == "time_cap" and self.config.kept_epochs):
            self.keep_member(f"epoch_{epoch:02d}.safetensors", epoch)

    def keep_member(self, file: str, epoch: int) -> None:
        """Keep the weights as they are for the readout; save_members writes them to the disk."""
        self.members.append({"file": file, "epoch": epoch, "step": self.step})
        if self.world.is_main:
            tensors = self.unsaved[file] = {}
            for name, p in self.model.named_parameters():
                tensors[name] = p.detach().to("cpu", member_dtype(name, p, self.dtype), copy=True)

    def validate(self, name: str) -> None:
        """Score the model as it was trained in the epoch just finished."""
        self.weights.refresh()
        how, val = stage(self.plan, max(0, self.step - 1)), self.eval_sets["val"]
        score = val.score(val.nats(partial(self.token_losses, **how)))
        if not math.isfinite(score.loss):
            self.fail("validation", score.loss, max(0, self.step - 1))
        if self.step:
            self.readouts[name] = score.loss
        values = {"step": self.step, "epoch": self.plan.epochs_done(self.step)} | how
        self.run.record(values | {"val_loss": score.loss, "val_bpb": score.bpb})
        bpb = f" | {score.bpb:.4f} bits per byte" if score.bpb else ""
        self.run.log(f"{name} | step {self.step}/{self.plan.num_steps} | val {score.loss:.4f}{bpb}")
        self.run.draw_curve(self.stages)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self) -> None:
        """Write all that the run needs to go on from here. A failure is said, and does not end the run."""
        started, tensors = time.monotonic(), training_state(self)
        if self.world.is_main:
            info = {"step": self.step, "train_time_s": self.clock.train_time_s, "wall_time_s": self.wall_time_s()}
            info |= {"readouts": self.readouts, "members": self.members, "recent_s": [*self.clock.recent_s]}
            info["stopped_by"] = self.stopped_by if self.stopped_by == "time_cap" else ""
            failure = self.save_members() or self.run.save_checkpoint(tensors, info)
            said = f"NOT saved: {failure}. The run goes on, and earlier checkpoints stay" if failure else "saved"
            self.run.log(f"checkpoint at step {self.step} {said}, in {time.monotonic() - started:.1f} s")
        self.checkpoint_failure = self.world.on_main(lambda: failure)
        self.last_checkpoint, self.checkpoint_due = time.monotonic(), False

    def save_members(self) -> str:
        """Write the readout's weights that are only in memory -> why they could not be written, empty if they were."""
        for file in list(self.unsaved):
            try:
                write_atomically(self.run.path / "final" / file, partial(save_file, self.unsaved[file]))
            except Exception as error:  # an OSError, or safetensors' own
                return f"final/{file}: {error}"
            member = next(member for member in self.members if member["file"] == file)
            member["sha256"] = sha256_file(self.run.path / "final" / file)
            del self.unsaved[file]
        return ""

    def resume(self) -> None:
        """Take up the newest checkpoint of the run folder, or begin anew where there is none yet."""
        tensors = {}

        def read() -> dict | None:
            content, info = self.run.load_checkpoint() or ({}, None)
            tensors.update(content)
            check_members(self.run, info["members"] if info else [])
            self.run.drop_metrics_after(info["step"] if info else -1)
            (self.run.path / "result.json").unlink(missing_ok=True)  # of an attempt that failed
            return info

        info = self.world.on_main(read)
        if info is None:
            return self.run.log("no checkpoint yet: starting from step 0")
        restore(self, tensors)
        self.step, self.stopped_by = info["step"], info["stopped_by"]
        self.readouts, self.members = info["readouts"], info["members"]
        self.clock.train_time_s, self.earlier_wall_s = info["train_time_s"], info["wall_time_s"]
        self.clock.recent_s.extend(info["recent_s"])
        done = f"step {self.step}/{self.plan.num_steps}, after {self.clock.train_time_s:.1f} s of training"
        self.run.log(f"resumed at {done}")

    def wall_time_s(self) -> float:
        return self.earlier_wall_s + time.monotonic() - self.started

    def fail(self, kind: str, loss: float, step: int) -> None:
        """End the run (NonFiniteLoss), and keep what is needed to look at it: the step's tokens, all norms."""
        if self.world.is_main:
            path = self.run.path / "non_finite.pt"
            tokens = make_loader(self.plan, self.splits["train"], range(VIRTUAL_RANKS)).batch(step)
            norms = {name: p.detach().float().norm().item() for name, p in self.model.named_parameters()}
            bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
            content = {"step": step + 1, "loss": loss, "tokens": tokens, "norms": norms}
            write_atomically(path, partial(torch.save, content))
            result = {"track": TRACK, "status": "failed", "stopped_by": "non_finite_loss", "steps": step + 1}
            write_json(self.run.path / "result.json", result | {"run_id": self.run.run_id})
            kept = ", ".join(path.stem for path in self.run.checkpoints()) or "none, it begins anew"
            self.run.log(f"{path} has the tokens and the norms of all parameters; not finite: {len(bad)}, {bad[:3]}")
            self.run.log(f"checkpoints before it, from which --resume repeats the steps: {kept}")
        raise NonFiniteLoss(f"the {kind} loss is {loss} at step {step + 1}")

    def say_how_to_resume(self) -> int:
        """-> the exit code: 0 if the checkpoint is saved."""
        how = resume_command(self.world.size, self.run.path)
        self.run.log(f"stopped by {self.signal or 'a signal'} after step {self.step}; resume with: {how}")
        return 1 if self.checkpoint_failure else 0


def training_state(trainer: Trainer) -> dict:
    """The tensors of a checkpoint; collective, of use in the main process alone."""
    state = trainer.optimizer.state_dict()
    return {"model": {name: p.detach() for name, p in trainer.model.named_parameters()}, "optimizer": state}


def restore(trainer: Trainer, tensors: dict) -> None:
    """Take up a training_state, which the main process has; collective."""
    for name, p in trainer.model.named_parameters() if trainer.world.is_main else ():
        p.data.copy_(tensors["model"][name])
    trainer.optimizer.broadcast_values()
    trainer.optimizer.load_state_dict(tensors.get("optimizer", {}))


def check_members(run: RunFolder, members: list[dict]) -> None:
    """Refuse to resume where weights of the readout are not as they were saved (ValueError)."""
    for path, sha256 in ((run.path / "final" / member["file"], member["sha256"]) for member in members):
        sound = path.exists() and sha256_file(path) == sha256
        require(sound, f"{path}, of the readout, is missing or damaged: empty checkpoints/ to begin anew")


def load_member(trainer: Trainer, member: dict) -> None:
    """Put a member's weights into the model, from the disk or from memory."""
    if trainer.world.is_main:
        saved = trainer.unsaved.get(member["file"]) or load_file(trainer.run.path / "final" / member["file"])
        for name, p in trainer.model.named_parameters():
            p.data.copy_(saved[name])
    trainer.optimizer.broadcast_values()
    trainer.weights.refresh()


def recency_weights(members: list[dict]) -> list[float]:
    """1:2:3..., the newest heaviest; they sum to 1."""
    return [(i + 1) / sum(range(len(members) + 1)) for i in range(len(members))]


def add_to_average(trainer: Trainer, weight: float) -> None:
    """Add the model's weights to an average, in the memory of the gradients, which have no other use any more."""
    for bucket in trainer.optimizer.buckets:
        bucket.grads.add_(bucket.values, alpha=weight)


def use_average(trainer: Trainer) -> None:
    """Put the average into the model, and clear it."""
    for bucket in trainer.optimizer.buckets:
        bucket.values.copy_(bucket.grads)
    trainer.optimizer.zero_grad()
    trainer.weights.refresh()


def blend_with_average(trainer: Trainer) -> None:
    """Make 0.7 of the last weights, which the model has, and 0.3 of their moving average the readout's only member."""
    if any(average_share(trainer.plan, step) for step in range(trainer.step)):
        for bucket in trainer.optimizer.buckets:
            average = bucket.whole(bucket.state["average"])
            bucket.values.copy_(bucket.values.to(average.dtype).lerp(average, 0.3))
    else:
        trainer.run.log("stopped before the moving average of the weights began: the last weights are read out")
    trainer.keep_member("blend.safetensors", trainer.plan.epochs_done(trainer.step))


def read_out(trainer: Trainer) -> tuple[Score, Score | None, dict] | None:
    """The declared readout on the validation set and, once, on the holdout -> (val, holdout, members.json).

    None if a signal comes. It averages the probabilities that the members give to each target. Recorded beside it,
    if there are several: the same with equal weights, and the loss of the members' average weights.
    """
    if trainer.config.readout == "ema":
        blend_with_average(trainer)
    members, eval_sets = trainer.members[-max(1, trainer.config.kept_epochs) :], trainer.eval_sets
    weights = recency_weights(members)
    how, nats = stage(trainer.plan, trainer.step - 1), {name: [] for name in eval_sets}
    losses = partial(trainer.token_losses, **how)
    for weight, member in zip(weights, members, strict=True):
        if trainer.any_signal():
            return None
        load_member(trainer, member)
        for name, eval_set in eval_sets.items():
            nats[name].append(eval_set.nats(losses))
        add_to_average(trainer, weight)
        member["weight"] = weight
    scores = {name: eval_set.score(mix_probabilities(nats[name], weights)) for name, eval_set in eval_sets.items()}
    final = {"mixing": MIXING, "stage": how, "members": members}
    if len(members) == 1:
        trainer.readouts["last_blended" if members[0]["file"] == "blend.safetensors" else "last"] = scores["val"].loss
        return scores["val"], scores.get("holdout"), final
    trainer.readouts["probability_average"] = scores["val"].loss
    equal = mix_probabilities(nats["val"], [1.0] * len(members))
    trainer.readouts["probability_average_equal_weights"] = eval_sets["val"].score(equal).loss
    use_average(trainer)
    trainer.readouts["weight_average"] = eval_sets["val"].score(eval_sets["val"].nats(losses)).loss
    return scores["val"], scores.get("holdout"), final


def save_final(trainer: Trainer, final: dict) -> str:
    """Complete final/, with members.json, and drop what else is there -> why it failed, empty if it did not."""
    for path in (trainer.run.path / "final").iterdir():
        if path.name not in [member["file"] for member in final["members"]]:
            path.unlink()
    if trainer.save_members():  # the disk is full: the older checkpoint makes room
        trainer.run.drop_checkpoints(keep=1)
    return trainer.save_members() or try_to_write_json(trainer.run.path / "final" / "members.json", final)


def make_result(trainer: Trainer, val: Score, holdout: Score | None) -> dict:
    """What result.json says, but for eligibility."""
    c, world, seconds = trainer.config, trainer.world, trainer.clock.train_time_s
    tokens = trainer.plan.tokens_done(trainer.step)
    hashes, folder = {split: shard.sha256 for split, shard in trainer.splits.items()}, trainer.run.path
    peak = peak_flops(world.device)
    return {
        "track": TRACK, "status": "finished", "stopped_by": trainer.stopped_by, "run_id": trainer.run.run_id,
        "val_loss": val.loss, "val_bpb": val.bpb, "best_val_loss": min(trainer.readouts.values()),
        "readouts": trainer.readouts, "holdout_loss": holdout and holdout.loss, "holdout_bpb": holdout and holdout.bpb,
        "data_efficiency": data_efficiency(val.loss) if hashes["val"] == rules.OFFICIAL_SHA256["val"] else None,
        "steps": trainer.step, "tokens": tokens, "epochs": trainer.plan.epochs_done(trainer.step),
        "train_time_s": seconds, "wall_time_s": trainer.wall_time_s(), "time_cap_min": c.time_cap_min,
        "seed": c.seed, "world_size": world.size, "device": device_name(world.device),
        "dtype": str(trainer.dtype).removeprefix("torch."), "compiled": trainer.compiled, **trainer.kernels,
        "mixing": MIXING,
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "peak_memory_gib": peak_memory(world.device) / GIB, "tokens_per_s": tokens / seconds,
        "mfu": trainer.flops[trainer.step] / seconds / peak / world.size if peak else None,
        "parameters": trainer.num_parameters, "val_tokens": val.tokens, "val_bytes": val.bytes,
        "data_sha256": hashes, "code_sha256": code_sha256(folder / "code"),
        "instrument_sha256": instrument_sha256(folder / "code" / "slowrun"),
        "final_sha256": {path.name: sha256_file(path) for path in sorted((folder / "final").iterdir())},
    }  # fmt: skip


def plan_lines(trainer: Trainer) -> dict[str, str]:
    """What the header says of steps and stages, by the words in front."""
    c = trainer.config
    cap = f"cap {c.time_cap_min:g} min" if c.time_cap_min else "no cap (not eligible)"
    return {
        "plan": f"{trainer.plan.num_steps:,} steps of {c.batch_tokens:,} tokens, {c.num_epochs} epochs, {cap}",
        "stages": "; ".join(f"from step {step + 1}: {text}" for step, text in trainer.stages.items()),
    }


def header(trainer: Trainer, saved: dict, bytes_from: str, needed_gib: float, disk: str, wandb_said: str) -> str:
    """The first thing that a run prints."""
    c, world, splits = trainer.config, trainer.world, trainer.splits
    settings = ", ".join(f"{k} {v}" for k, v in saved["overrides"].items()) or "the defaults, the current record"
    data = f"{rules.describe_data(splits)}; bytes of tokens {bytes_from}"
    device = f"{world.size} x {device_name(world.device)}, {str(trainer.dtype).removeprefix('torch.')}"
    compiled = "compiled" if trainer.compiled else "not compiled"
    kernels = ", ".join(f"{name} {kernel}" for name, kernel in trainer.kernels.items())
    for name, (fallback, fast, *_) in KERNELS.items():
        if world.cuda and (trainer.kernels[name], getattr(c, name)) == (fallback, "auto"):
            kernels += f" (slower: --{name} {fast} says why not {fast})"
    lines = {
        "run": f"{saved['folder']}, id {saved['run_id']}, wandb {wandb_said}",
        "command": shlex.join(saved["command"]),
        "settings": settings,
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, cuda {torch.version.cuda}",
        "device": f"{device}, {kernels}, {compiled}, about {needed_gib:.2g} GiB per process",
        "disk": disk,
        "data": f"{c.data_dir}: {data}",
        "model": f"{trainer.num_parameters:,} parameters",
    } | plan_lines(trainer)
    return "\n".join([f"NanoGPT Slowrun, {TRACK} track", *(f"{name:10}{text}" for name, text in lines.items())])


def final_block(result: dict, folder: Path) -> str:
    """The last thing that a run prints."""
    bpb = f", {result['val_bpb']:.4f} bits per byte" if result["val_bpb"] else ""
    holdout = f"{result['holdout_loss']:.4f}" if result["holdout_loss"] is not None else "none"
    because = "; ".join(result["not_eligible_because"])
    several = len(result["final_sha256"]) > 2  # the members, and members.json
    averaged = f"{result['mixing']}-averaged" if several else "one member"
    ended = "finished" if result["stopped_by"] == "steps" else f"stopped by {result['stopped_by']}"
    lines = [
        f"{TRACK} track, seed {result['seed']}, {ended} after {result['steps']:,} steps",
        *(f"  {loss:9.4f}  {name}" for name, loss in result["readouts"].items()),
        f"val_loss   {result['val_loss']:.4f} ({averaged}){bpb}; best {result['best_val_loss']:.4f}",
        f"holdout    {holdout}",
        f"efficiency {result['data_efficiency'] or 'defined for FineWeb only'}",
        f"time       training {duration(result['train_time_s'])}, {result['tokens_per_s'] / 1e3:.1f}k tok/s; "
        f"in all {duration(result['wall_time_s'])}",
        f"record     {'eligible' if result['eligible'] else f'not eligible: {because}'}",
        f"run folder {folder}, curve {folder / 'curve.png'}",
    ]
    return "\n".join(["=" * 100, *lines, "=" * 100])


def finish(trainer: Trainer) -> int:
    """Read out, print the final block, write result.json, clean up -> the exit code."""
    found = read_out(trainer)
    if found is None:
        return trainer.say_how_to_resume()
    val, holdout, final = found
    if not all(map(math.isfinite, trainer.readouts.values())):
        trainer.fail("validation", val.loss, trainer.step - 1)
    if not trainer.world.is_main:
        return 0
    folder, failure = trainer.run.path, save_final(trainer, final)
    result = make_result(trainer, val, holdout)
    reasons = rules.reasons_not_eligible(TRACK, result)
    result |= {"eligible": not reasons, "not_eligible_because": reasons}
    trainer.run.draw_curve(trainer.stages, val.loss)
    trainer.run.log(final_block(result, folder))
    failure = failure or try_to_write_json(folder / "result.json", result)
    if failure:
        trainer.run.log(f"the result is NOT saved ({failure}): make space, then --resume {folder} goes on")
        return 1
    shutil.rmtree(folder / "checkpoints")
    if trainer.run.wandb is not None:
        trainer.run.wandb.summary.update(result)
    return 0


def set_up(argv: list[str] | None) -> tuple[Trainer | None, bool]:
    """From the command line to a trainer, and whether it resumes; what can be refused is refused here (ValueError).

    No trainer: the run that --resume names has finished.
    """
    started = time.monotonic()
    given, resume = parse_flags(TRACK, Config, DEMO, argv, Path(__file__), __doc__, record_sizes)
    config, device = Config(**given) if resume is None else None, given.get("device", "auto")
    if resume is not None:
        device = read_config(Path(resume))["config"].get("device", "auto")
    world = join(device)
    if resume is not None:
        saved = world.on_main(reopen, TRACK, Path(resume), given, Path(__file__).resolve())
        config = Config(**saved["config"] | {name: given[name] for name in RESUME_MAY_CHANGE & given.keys()})
        if saved["finished"]:
            if world.is_main:
                print(f"{resume} has finished, see {resume}/result.json")
            return None, True
    # What is the same in all processes is checked by one: one message if it is refused.
    dtype = compute_dtype(config.dtype, world.device)
    world.on_main(choose_kernels, config, world.device, dtype)
    needed_gib = world.on_main(check_memory, config, world)
    folder = Path(resume or Path(config.runs_dir) / config.run_name)
    disk = world.on_main(check_disk, config, dtype, folder)
    where = config.data_dir, config.vocab_size, config.sequence_len
    loaded: dict[str, Split] = {}
    world.on_main(lambda: loaded.update(load_splits(*where)))
    splits = loaded or load_splits(*where)
    hashes = {name: split.sha256 for name, split in splits.items()}
    plan = world.on_main(Plan, config, len(splits["train"].sequences(config.sequence_len + 1)))
    byte_lengths, bytes_from = world.on_main(token_bytes, config.data_dir, config.vocab_size)
    if resume is None:
        saved = world.on_main(begin, TRACK, config, Path(__file__).resolve(), hashes)
    world.on_main(check_same_data, saved, config.data_dir, hashes)
    check_same_data(saved, config.data_dir, hashes)  # the other processes may be on other disks
    run = RunFolder(Path(saved["folder"]), saved["run_id"], world.is_main)
    world.on_main(run.open)
    try:
        wandb_said = world.on_main(run.start_wandb, config.wandb, saved["config"] | {"track": TRACK})
    except ValueError:
        if resume is None:  # refused: nothing is left of it
            shutil.rmtree(run.path)
        raise
    trainer = Trainer(config, world, run, plan, splits, byte_lengths)
    trainer.started = started
    run.log(header(trainer, saved, bytes_from, needed_gib, disk, wandb_said))
    return trainer, resume is not None


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 finished, or stopped by a signal and saved; 1 failed; 2 refused."""
    trainer, handlers = None, {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def prepare() -> int:
        nonlocal trainer
        trainer, resumes = set_up(argv)
        if trainer is None:
            return 0
        for number in handlers:
            signal.signal(number, trainer.take_signal)
        trainer.warm_up()
        if resumes:
            trainer.resume()
        return 0

    try:
        code = exit_code(prepare, __file__)
        if code or trainer is None:
            return code
        trainer.fit()
        return trainer.say_how_to_resume() if trainer.stopped_by == "signal" else finish(trainer)
    except NonFiniteLoss as error:
        trainer.run.log(f"stopped: {error}")
        return 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if trainer is not None:
            trainer.run.close()


if __name__ == "__main__":
    launch(main)
