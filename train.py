"""The limited track of NanoGPT Slowrun: the lowest validation loss from 100M tokens of FineWeb in one hour on 8xH100.

    python prepare_data.py                                  # once: writes fineweb_data/
    torchrun --standalone --nproc_per_node=8 train.py       # the current record. Published: 3.183 in 59.3 minutes
    python train.py --list-records                          # the records before it; --record N trains one
    python train.py --demo                                  # toy size, on a CPU (after prepare_data.py --source demo)

1, 2, 4 or 8 processes compute the same thing: a batch is that of 8 virtual ranks, which the processes share. Every
field of Config, and of GPTConfig in model.py, is a flag: see --help. A run writes runs/<name>/, and one that was
stopped or killed goes on with --resume runs/<name>.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import gzip
import hashlib
import inspect
import json
import math
import os
import platform
import re
import resource
import secrets
import shlex
import shutil
import signal
import statistics
import sys
import time
import typing
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from model import (
    CHUNK,
    GPT,
    ComputeWeights,
    GPTConfig,
    attention_error,
    build,
    choose_attention,
    device_name,
    draw_dropped,
    flops_per_token,
    has_bfloat16,
    peak_flops,
    require,
)

TRACK = "limited"
SCRIPT_FILES = ("train.py", "model.py")  # what a run folder keeps as code/
VIRTUAL_RANKS = 8

# ======================================================================================================================
# Config
# ======================================================================================================================


@dataclass(frozen=True)
class Config(GPTConfig):
    """How the model is trained. The defaults, with those of GPTConfig in model.py, are the current record."""

    data_dir: str = "fineweb_data"  # folder with fineweb_train.pt, fineweb_val.pt and fineweb_holdout.pt
    val_sequences: int = 4864  # sequences of the validation set, and of the holdout, that are scored at most
    num_epochs: int = 11  # passes over the training data
    batch_tokens: int = 524288  # tokens of an optimizer step
    micro_batch: int = 4  # sequences of a micro-step of one of the 8 virtual ranks
    device_batch: int = 0  # sequences of a forward pass: fewer save memory, same mathematics (0: micro_batch)
    eval_batch: int = 4  # sequences of a forward pass in validation, per process
    eval_initial: bool = False  # validate before the first step too
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
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: CUDA where there is a GPU
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # auto: bfloat16 where the GPU has it
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of layers and optimizer; auto: on CUDA
    attention: Literal["auto", "varlen", "sdpa"] = "auto"  # auto: varlen, flash attention, where the GPU has it
    checkpoint_min: float = 10.0  # minutes between checkpoints, besides those at the ends of epochs
    checkpoints: bool = True  # write checkpoints; without them a run that is stopped begins anew
    profile_steps: str = ""  # steps, counted from 1, that torch.profiler records, such as 4-5 or 4-5,9-9 (empty: none)
    log_every: int = 10  # steps between printed lines
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: where WANDB_API_KEY is set
    runs_dir: str = "runs"  # where run folders are made
    run_name: str = ""  # name of the run folder (empty: track, time and seed)

    def __post_init__(self):
        super().__post_init__()
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


def profile_ranges(text: str) -> list[tuple[int, int]]:
    """Ranges of optimizer steps such as "4-5,9-9", counted from 1, the last step included; ValueError if malformed."""
    ranges: list[tuple[int, int]] = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r" *(\d+) *- *(\d+) *", part)
        first, last = map(int, match.groups()) if match else (0, 0)
        after = ranges[-1][1] if ranges else 0
        form = "ranges FIRST-LAST of steps counted from 1, in order and apart, such as 4-5 or 4-5,9-9"
        require(after < first <= last, f"--profile-steps {text}: {part!r} does not fit, give {form}")
        ranges.append((first, last))
    return ranges


def check_config(c: Config) -> None:
    """Refuse settings that do not go together (ValueError); those that the tracks share."""
    profile_ranges(c.profile_steps)
    positive = ["num_epochs", "batch_tokens", "micro_batch", "eval_batch", "val_sequences", "readout_epochs"]
    positive.append("log_every")
    for name in [*positive, "device_batch", "swa_epochs", "time_cap_min", "meta_step", "seed"]:
        value, least = getattr(c, name), 1 if name in positive else 0
        require(value >= least, f"--{name.replace('_', '-')} is {value}: it must be at least {least}")
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
    plain = Path(c.run_name).name == c.run_name != ".."
    require(plain, f"--run-name {c.run_name} is not the name of a folder: --runs-dir says where it is made")
    require(0 <= c.warmdown <= 1, f"warmdown {c.warmdown} is not in [0, 1]")


DEMO = {  # --demo: every technique, at a size that two CPU cores train in about two minutes
    "data_dir": "demo_data", "vocab_size": 257, "sequence_len": 128, "n_layer": 4, "n_head": 2, "n_embd": 64,
    "replay_start": 2, "replay_end": 3, "replay_from_epoch": 4, "stochastic_depth": 0.05,
    "num_epochs": 5, "batch_tokens": 8192, "micro_batch": 4, "eval_batch": 16, "val_sequences": 496,
    "lr_multiplier": 1.0, "weight_decay": 0.3, "time_cap_min": 0.0, "compile": "off", "eval_initial": True,
}  # fmt: skip
RESUME_MAY_CHANGE = {  # these do not change the result
    "data_dir", "eval_batch", "checkpoint_min", "checkpoints", "log_every", "profile_steps", "wandb",
}  # fmt: skip


@cache
def field_types() -> dict[str, type]:
    """The type of each field of Config, by name."""
    return typing.get_type_hints(Config)


@cache
def field_comments() -> dict[str, str]:
    """The comment behind each field of Config, by name."""
    comments = {}
    for cls in reversed(Config.__mro__[:-1]):
        comments |= dict(re.findall(r"^    (\w+): .+?  # (.+)$", inspect.getsource(cls), re.MULTILINE))
    return comments


def records_folder() -> Path:
    """records/<track> of the repository that this script is in; ValueError if it is elsewhere, as in a run folder."""
    found = [folder / "records" / TRACK for folder in Path(__file__).resolve().parents[:2]]
    there = [folder for folder in found if (folder / "records.json").exists()]
    require(bool(there), f"{found[0]} not found: --record and --list-records need the repository's own script")
    return there[0]


def settings_files(folder: Path) -> list[tuple[int, Path]]:
    """(Number, file) of the records in records/<track> that --record can train."""
    return [(int(path.name[:2]), path) for path in sorted(folder.glob("[0-9][0-9]-*.json"))]


def list_records() -> str:
    """The track's records, a line each."""
    folder, lines = records_folder(), ["number, validation loss, time, change; --record trains those with a star"]
    known = dict(settings_files(folder))
    for entry in read_json(folder / "records.json", {"records"}, "restore it")["records"]:
        star = "*" if entry["number"] in known else " "
        minutes = f"{'~' * entry['time_is_approximate']}{entry['minutes']:g} min"
        lines.append(f"{star}{entry['number']:3}  {entry['val_loss']:.3f}  {minutes:>10}  {entry['change']}")
    return "\n".join(lines)


def toy_settings(settings: dict) -> dict:
    """DEMO's values beside a record's settings: its sizes, in the record's proportion. What is off there stays off."""
    toy = {}
    for name, value in DEMO.items():
        default, own = getattr(Config, name), settings.get(name, getattr(Config, name))
        if type(value) in (int, float) and value and not own:
            continue
        if name in settings and name not in ("num_epochs", "replay_from_epoch"):
            value = type(value)(value * own / default) if default else own
        toy[name] = value
    return toy


def read_record(number: int) -> dict:
    """What a published record sets otherwise than the defaults, from its file in records/; ValueError if none is."""
    files = dict(settings_files(records_folder()))
    known = ", ".join(map(str, files)) or "none"
    require(number in files, f"--record {number}: the {TRACK} track has settings of {known}; see --list-records")
    settings = read_json(files[number], {"settings"}, "restore it")["settings"]
    require(isinstance(settings, dict), f"{files[number]}: its settings are no JSON object: restore it")
    unknown = ", ".join(sorted(settings.keys() - field_types().keys()))
    require(not unknown, f"{files[number]} sets {unknown}, which this script does not have: correct it")
    for name, value in settings.items():
        hint = field_types()[name]
        choices = typing.get_args(hint) or (f"of type {hint.__name__}",)
        fits = value in choices or type(value) is hint or (hint is float and type(value) is int)
        require(fits, f"{files[number]} sets {name} to {value!r}: it must be {' or '.join(choices)}")
    return settings


def parse_arguments(argv: list[str] | None) -> tuple[dict, str | None]:
    """Command line -> (fields of Config that were given, run folder to resume or None).

    Every field is a flag with its comment as help text. --record stands for the settings of a published record, --demo
    for the values in DEMO (beside --record, see toy_settings); flags override both.
    """
    usage = "%(prog)s [--demo] [--record N | --resume RUN_DIR] [--FLAG VALUE ...]"
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument(
        "--demo", action="store_true", help="toy size, for a CPU; before it: python prepare_data.py --source demo"
    )
    parser.add_argument("--resume", metavar="RUN_DIR", help="continue the run in this folder")
    parser.add_argument("--record", metavar="N", type=int, help="train published record N of this track")
    parser.add_argument("--list-records", action="store_true", help="show the records of this track, and exit")
    text = "write the stages, steps, operations and bytes of the run to this file as JSON, and exit"
    parser.add_argument("--plan", metavar="FILE", help=text)
    for name, hint in field_types().items():
        default, text = getattr(Config, name), field_comments()[name].replace("%", "%%")
        kind = {"type": hint, "metavar": getattr(hint, "__name__", "")}
        if hint is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(hint) is Literal:
            kind = {"choices": typing.get_args(hint)}
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, help=f"{text} [{default}]", default=argparse.SUPPRESS, **kind)
    given = vars(parser.parse_args(argv))
    demo, resume, record, plan = (given.pop(name) for name in ("demo", "resume", "record", "plan"))
    if given.pop("list_records"):
        if os.environ.get("RANK", "0") == "0":
            print(list_records())
        parser.exit()
    require(record is None or resume is None, "--record is for a new run: --resume goes on with the run's own settings")
    settings = {} if record is None else read_record(record)
    toy = {} if not demo else DEMO if record is None else toy_settings(settings)
    if plan is not None:
        require(resume is None, "--plan is for a new run: the folder of one that began has its config.json")
        if os.environ.get("RANK", "0") == "0":
            print(write_plan(Config(**settings | toy | given), Path(plan)))
        parser.exit()
    return settings | toy | given, resume


# ======================================================================================================================
# Distributed
# ======================================================================================================================


@dataclass(frozen=True)
class World:
    """The processes that train a model. Their small agreements go through the CPU, so that no GPU waits for them."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # None: all processes

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def virtual_ranks(self) -> range:
        """The virtual ranks that this process plays."""
        share = VIRTUAL_RANKS // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def seed(self, value: int) -> None:
        """Set the random state of the device alone, from which dropout draws."""
        seed = torch.cuda.manual_seed if self.cuda else torch.default_generator.manual_seed
        seed(value)

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the processes in float64, the same in all of them. Serves as a barrier too."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total, group=self.group)
        return total.tolist()

    def share(self, function, *args):
        """Call the function in the main process; all return its result, or it raises its error and the others exit."""
        outcome = [None, None]
        if self.main:
            try:
                outcome[0] = function(*args)
            except (ValueError, OSError) as error:
                outcome[1] = str(error)
        if self.size > 1:
            dist.broadcast_object_list(outcome, group_src=0, group=self.group, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise ValueError(outcome[1]) if self.main else SystemExit(2)
        return outcome[0]


def check_world_size(size: int) -> None:
    """Refuse a number of processes that cannot share a batch evenly (ValueError)."""
    require(VIRTUAL_RANKS % size == 0, f"{size} processes cannot share {VIRTUAL_RANKS} virtual ranks: run 1, 2, 4 or 8")


def set_up_world(device: str) -> World:
    """Join the process group that torchrun describes (nccl and gloo on CUDA, gloo on a CPU); alone without torchrun."""
    rank, size, local_rank = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    check_world_size(size)
    cuda, gpus = torch.cuda.is_available(), torch.cuda.device_count()
    require(cuda or device != "cuda", "--device cuda: torch finds no CUDA GPU here")
    cuda = cuda and device != "cpu"
    here = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local_rank + 1)
    require(not cuda or here <= gpus, f"{here} processes share {gpus} GPU(s): use --nproc_per_node={gpus} or fewer")
    if cuda:
        torch.cuda.set_device(local_rank)
    if size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return World(rank, size, torch.device("cuda", local_rank) if cuda else torch.device("cpu"))


# ======================================================================================================================
# Model: in model.py
# ======================================================================================================================


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Of the forward and backward pass: bfloat16 where the GPU has it, else float32, unless --dtype says."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


# What computes everywhere, what is faster, how far that may be off, and the function that says how far it is
KERNELS = {"attention": ("sdpa", "varlen", 0.05, attention_error)}


def choose_kernels(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What computes where there is a choice, as keyword arguments of GPT; ValueError if what is wanted does not run."""
    return {"attention": choose_attention(config.attention, config, device, dtype)}


def check_kernels(config: Config, device: torch.device, **kernels: str) -> dict[str, float]:
    """Compare kernels with plain operations on random numbers -> the error of each, 0 for the plain ones themselves.

    ValueError if one fails or is wrong on this machine.
    """
    errors = {}
    for name, kernel in kernels.items():
        fallback, _, limit, error_of = KERNELS[name]
        try:
            error = error_of(config, device, kernel) if kernel != fallback else 0.0
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as failure:
            raise ValueError(f"{name} {kernel} fails here ({failure}): use --{name} {fallback}") from failure
        require(error < limit, f"{name} {kernel} is wrong here, by {error:g}: use --{name} {fallback}, and report it")
        errors[name] = error
    return errors


@cache
def parameter_counts(config: Config) -> tuple[int, float, int]:
    """-> (All parameters, those of the average block of the trunk, those of tables)."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in GPT(config).named_parameters()}
    blocks = sum(size for name, size in sizes.items() if name.startswith("transformer.h."))
    tables = 2 * config.padded_vocab * config.n_embd
    tables += sum(size for name, size in sizes.items() if name.startswith("ve_tables."))
    return sum(sizes.values()), blocks / config.n_layer, tables


def layer_bytes(config: Config, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of a layer, per position."""
    return (13 * config.n_embd + 3 * config.hidden) * dtype.itemsize + 2 * config.n_embd


def held_bytes(config: Config, world_size: int, dtype: torch.dtype, layers: int | None = None) -> dict[str, float]:
    """Bytes that a process holds, by what they are; activations and logits are an estimate.

    layers: calls of a layer that backward goes through (None: the most of any stage).
    """
    C, V, (total, _, tables) = config.n_embd, config.padded_vocab, parameter_counts(config)
    positions = config.device_rows * config.sequence_len
    layers = len(config.layer_order(replay=config.replay_from_epoch > 0)) if layers is None else layers
    moments = total + tables + total * (config.readout == "ema")  # AdamW keeps two, of the tables, Muon one
    return {
        "weights": (4 + dtype.itemsize) * total,  # masters and compute weights
        "gradients": 4 * (2 * total + (total - tables) * config.meta_gradient),  # two, and a moved copy
        "optimizer": 4 * moments / world_size,
        "activations": positions * layer_bytes(config, dtype) * layers,
        "logits": min(CHUNK, positions) * V * (2 * dtype.itemsize + 16) + V * C * 8,  # of a chunk; the head's gradient
    }


def memory_gib(config: Config, world_size: int, dtype: torch.dtype) -> tuple[int, float, float]:
    """-> (parameters, GiB of a process for weights, gradients and optimizer, GiB in all, which is an estimate)."""
    held = held_bytes(config, world_size, dtype)
    static = held["weights"] + held["gradients"] + held["optimizer"]
    return parameter_counts(config)[0], static / 2**30, sum(held.values()) / 2**30


def check_memory(config: Config, world: World) -> float:
    """Refuse a model that cannot fit, before anything is allocated -> estimated GiB per process."""
    dtype = compute_dtype(config, world.device)
    total, static, needed = memory_gib(config, world.size, dtype)
    said = f"{total / 1e6:,.0f}M parameters need {static:.0f} GiB per process for weights, gradients and optimizer"
    if world.cuda:
        there = torch.cuda.get_device_properties(world.device).total_memory / 2**30
        require(static < there, f"{said}, and the GPU has {there:.0f} GiB: use more or larger GPUs, or a smaller model")
        return needed
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
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


def disk_space(folder: Path) -> tuple[float, float]:
    """GiB that a run has in its folder already, 0 before it begins; GiB that are free on its disk."""
    resumed = folder.rglob("*") if (folder / "config.json").exists() else ()
    sizes = {path.stat().st_ino: path.stat().st_size for path in resumed if path.is_file()}  # links count once
    disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return sum(sizes.values()) / 2**30, shutil.disk_usage(disk).free / 2**30


def disk_needed_gib(config: Config, dtype: torch.dtype) -> float:
    """GiB that a run needs at most: the readout's weights, and three checkpoints."""
    member, checkpoint = disk_gib(config, dtype)
    return max(1, config.kept_epochs) * member + 3 * checkpoint * config.checkpoints


def check_disk(config: Config, dtype: torch.dtype, folder: Path) -> str:
    """Refuse a run that its disk cannot hold; what is in its folder already counts -> what the header says."""
    member, checkpoint = disk_gib(config, dtype)
    members, needed = max(1, config.kept_epochs), disk_needed_gib(config, dtype)
    there, free = disk_space(folder)
    parts = f"weights for the readout, {members} x {member:.3g} GiB in {str(dtype)[6:]}, and "
    parts += f"three checkpoints (two stay while the next is written), {checkpoint:.3g} GiB each"
    if not config.checkpoints:
        parts = f"weights for the readout, {members} x {member:.3g} GiB; no checkpoints, so --resume would begin anew"
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
        for bucket in self.buckets if self.world.size > 1 else ():
            dist.broadcast(bucket.values, group_src=0, group=self.world.group)

    def state_dict(self) -> dict:
        """The whole state by parameter, on the CPU, whatever the number of processes; collective, empty but in main."""
        state: dict[str, dict[str, Tensor]] = {}
        for bucket in self.buckets:
            for key, part in bucket.state.items():
                whole = bucket.whole(part)
                for name in bucket.params if self.world.main else ():
                    state.setdefault(name, {})[key] = bucket.view(whole, name).to("cpu", copy=True)
        return {"steps": self.steps, "state": state} if self.world.main else {}

    def load_state_dict(self, saved: dict) -> None:
        """Take up a state_dict of the main process, written by any number of processes; collective."""
        self.steps = self.world.share(lambda: saved["steps"])
        for bucket in self.buckets:
            for key, part in bucket.state.items():
                whole = part.new_zeros(part.size(0) * self.world.size, *part.shape[1:])
                for name in bucket.params if self.world.main else ():
                    bucket.view(whole, name).copy_(saved["state"][name][key])
                if self.world.size > 1:
                    dist.broadcast(whole, group_src=0, group=self.world.group)
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


def stage_name(plan: Plan, step: int) -> str:
    """The stage of a step in a word, as plans and tools name it."""
    return "replay" if stage(plan, step)["replay"] else "plain"


MEASURED = {  # other settings of the runs that short_runs names
    "time_cap_min": 0.0, "val_sequences": 8, "eval_initial": False, "checkpoints": False, "wandb": "off",
}  # fmt: skip


def short_runs(config: Config) -> dict[str, dict]:
    """Settings of runs for a measurement: "all" has each stage in an epoch of its own, the others are of one stage."""
    runs = {"plain": {"num_epochs": 1, "replay_from_epoch": 0}}
    if config.replay_from_epoch:
        runs["replay"] = {"num_epochs": 1, "replay_from_epoch": 1}
        runs["all"] = {"num_epochs": 2, "replay_from_epoch": 2}
    runs.setdefault("all", runs["plain"])
    return {name: settings | {"swa_epochs": 0, "readout": "last"} | MEASURED for name, settings in runs.items()}


def layer_calls(plan: Plan, step: int) -> tuple[int, int, float]:
    """-> (Calls of a layer in a forward pass, those that a backward pass follows, calls of the head)."""
    calls = len(plan.config.layer_order(stage(plan, step)["replay"]))
    return calls, calls, 1 + (plan.config.mtp_weight > 0)


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
# Data
# ======================================================================================================================

SEQ_SHUFFLE_SEEDS = {"val": 42, "train": 43, "holdout": 44}
OFFICIAL_SHA256 = {  # the identity of the benchmark
    "val": "6868ed375b289a89c72c2f9df1ecbdcff700c4b9478ca806435d2dbfad8573b1",
    "train": "36e7c95c1e7f6ed952fb002d76a03044e8617fea7e696a68d7dc1ce78465dcaf",
}


@dataclass(frozen=True)
class Shard:
    """A split: tokens uint16 (n,), offsets of documents' BOS int64 (documents,), seed of the fixed order, file hash."""

    tokens: np.ndarray
    doc_starts: np.ndarray
    seq_shuffle_seed: int
    sha256: str

    def sequences(self, length: int, tokens: np.ndarray | None = None) -> np.ndarray:
        """The tokens (or those given, in another order) cut into sequences (n, length); the tail is dropped."""
        tokens = self.tokens if tokens is None else tokens
        return tokens[: len(tokens) // length * length].reshape(-1, length)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_meta(data_dir: str) -> dict | None:
    """meta.json, which prepare_data.py writes beside the shards; None where the original project's files have none."""
    path, keys = Path(data_dir) / "meta.json", {"source", "tokenizer", "vocab_size", "splits", "token_bytes"}
    return read_json(path, keys, "prepare the data again, with --force") if path.exists() else None


def load_shard(split: str, config: Config) -> Shard:
    """Read a split and check all that can be wrong with it."""
    path, again = Path(config.data_dir) / f"fineweb_{split}.pt", "prepare the data again, with --force"
    prepare = "python prepare_data.py" + " --source demo" * (config.data_dir == DEMO["data_dir"])
    require(path.exists(), f"{path} not found: run {prepare}, or name the data's folder by --data-dir")
    sha256, meta = sha256_file(path), read_meta(config.data_dir)
    require(not meta or split in meta["splits"], f"{path} is not in meta.json: delete it, or {again}")
    noted = meta["splits"][split]["sha256"] if meta else sha256
    differ = f"its SHA-256 is {sha256[:12]}..., in meta.json {noted[:12]}..."
    require(sha256 == noted, f"{path} is damaged: {differ}: {again}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tokens, starts = content["tokens"].numpy(), content["doc_starts"].numpy()
        bos, seed = content["bos_id"], content["seq_shuffle_seed"]
        sound = tokens.dtype == np.uint16 and starts.dtype == np.int64 and len(tokens) > starts.max() and starts[0] == 0
        sound = sound and (np.diff(starts) > 0).all() and (tokens[starts] == bos).all()
    except Exception as error:  # a damaged archive fails in many ways
        raise ValueError(f"{path} is truncated or damaged ({type(error).__name__}): {again}") from None
    require(sound, f"{path} is damaged: its documents do not each start with the BOS {bos}: {again}")
    kind = {s: name for name, s in SEQ_SHUFFLE_SEEDS.items()}.get(seed, "unknown")
    require(kind == split, f"{path} holds the {kind} split (seq_shuffle_seed {seed}), not {split}: {again}")
    require(
        bos == config.vocab_size - 1 and tokens.max() <= bos,
        f"{path} is of another tokenizer: its BOS is {bos} and its largest token {tokens.max()}, but vocab_size "
        f"{config.vocab_size} means {config.vocab_size - 1}: change --data-dir or --vocab-size",
    )
    length = config.sequence_len + 1
    require(len(tokens) >= length, f"{path} has {len(tokens)} tokens, a sequence needs {length}: lower --sequence-len")
    return Shard(tokens, starts, seed, sha256)


def load_data(config: Config) -> dict[str, Shard]:
    """All splits; the holdout may be missing, as the original project's files have none."""
    splits = ["train", "val"] + ["holdout"] * (Path(config.data_dir) / "fineweb_holdout.pt").exists()
    return {split: load_shard(split, config) for split in splits}


def token_byte_lengths(config: Config) -> tuple[Tensor | None, str]:
    """(Bytes of every token (V,) int64, 0 for the BOS; where they are from). None without meta.json and tiktoken."""
    V, meta = config.vocab_size, read_meta(config.data_dir)
    if meta is not None:
        found = len(meta["token_bytes"])
        require(found == V, f"meta.json has the bytes of {found} tokens, vocab_size is {V}: change --vocab-size")
        return torch.tensor(meta["token_bytes"]), "from meta.json"
    if V != 50257:
        return None, "left out, without a meta.json"
    try:
        import tiktoken

        encoding = tiktoken.get_encoding("gpt2")
        lengths = [len(encoding.decode_single_token_bytes(i)) for i in range(50256)] + [0]
        return torch.tensor(lengths), "from tiktoken"
    except Exception as error:  # not installed, or its vocabulary cannot be downloaded
        return None, f"left out: no meta.json beside the shards, and tiktoken fails ({type(error).__name__})"


def shuffle_seeds(config: Config, epoch: int) -> tuple[int | None, int]:
    """Seeds of the permutations of an epoch's documents (None: they stay in order) and of its sequences."""
    return epoch if epoch > 1 else None, epoch + 1000


class TrainLoader:
    """The training sequences in the benchmark's global order, which does not depend on the number of processes.

    Each epoch permutes the documents, from their order in the epoch before (at first, in the file). They are cut into
    sequences of T + 1 tokens, which are permuted in turn; see shuffle_seeds. A thread makes an epoch (2 bytes a token)
    while the one before is trained on. Other values of `shuffle` are those of earlier records; see fixed_sequences.
    """

    def __init__(self, shard: Shard, plan: Plan, virtual_ranks: range):
        self.shard, self.plan, self.virtual_ranks = shard, plan, virtual_ranks
        self.order, self.order_epoch = np.arange(len(shard.doc_starts)), 0  # of the documents; belongs to the thread
        self.epochs: dict[int, Future] = {}
        self.submitted, self.thread = 0, ThreadPoolExecutor(1)

    def make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Runs in the thread -> sequences (n, T + 1) uint16 and the order (n,) in which the epoch takes them."""
        tokens, starts, config = self.shard.tokens, self.shard.doc_starts, self.plan.config
        if config.shuffle != "documents":
            return self.fixed_sequences(epoch)
        while self.order_epoch < epoch:
            self.order_epoch += 1
            seed, _ = shuffle_seeds(config, self.order_epoch)
            if seed is not None:
                generator = torch.Generator().manual_seed(seed)
                self.order = self.order[torch.randperm(len(starts), generator=generator).numpy()]
        if shuffle_seeds(config, epoch)[0] is not None:
            ends, shuffled, used = np.append(starts[1:], len(tokens)), np.empty_like(tokens), 0
            for part in np.array_split(self.order, math.ceil(len(starts) / 1024)):
                documents = [tokens[a:b] for a, b in zip(starts[part].tolist(), ends[part].tolist(), strict=True)]
                size = sum(map(len, documents))
                np.concatenate(documents, out=shuffled[used : used + size])
                used += size
            tokens = shuffled
        sequences = self.shard.sequences(config.sequence_len + 1, tokens)
        generator = torch.Generator().manual_seed(shuffle_seeds(config, epoch)[1])
        return sequences, torch.randperm(len(sequences), generator=generator).numpy()

    def fixed_sequences(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """As make_epoch: sequences as in the file, permuted once, as in validation.

        shuffle "micro_steps": each epoch permutes its micro-steps, of all virtual ranks, from their order before.
        """
        config = self.plan.config
        size, sequences = VIRTUAL_RANKS * config.micro_batch, self.shard.sequences(config.sequence_len + 1)
        order = np.random.RandomState(self.shard.seq_shuffle_seed).permutation(len(sequences))
        order = order[: len(order) // size * size].reshape(-1, size)
        seeds = (shuffle_seeds(config, number)[0] for number in range(1, epoch + 1))
        for seed in seeds if config.shuffle == "micro_steps" else ():
            if seed is not None:
                order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)).numpy()]
        return sequences, order.ravel()

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch, from 1; starts making the next."""
        for number in range(max(self.submitted + 1, epoch), epoch + 2):
            self.epochs[number], self.submitted = self.thread.submit(self.make_epoch, number), number
        return self.epochs[epoch].result()

    def batch(self, step: int) -> np.ndarray:
        """An optimizer step's sequences for this process: (virtual ranks, micro-steps, micro-batch, T + 1) uint16."""
        size, per_epoch = self.plan.config.micro_batch, self.plan.epoch_micro_steps
        first, last = (self.plan.first_micro_step(s) for s in (step, step + 1))
        rows: list[list[np.ndarray]] = [[] for _ in self.virtual_ranks]
        for micro_step in range(first, last):
            sequences, order = self.epoch(micro_step // per_epoch + 1)
            for v, out in zip(self.virtual_ranks, rows, strict=True):
                start = (VIRTUAL_RANKS * (micro_step % per_epoch) + v) * size
                out.append(sequences[order[start : start + size]])
        for done in [epoch for epoch in self.epochs if epoch <= last // per_epoch]:
            del self.epochs[done]
        return np.array(rows)


# ======================================================================================================================
# Validation
# ======================================================================================================================

MIXING = "probability"  # how the readout mixes its members: it averages their probabilities
EFFICIENCY = ((200, 3.703), (400, 3.370), (600, 3.200), (800, 3.123), (1000, 3.046), (2000, 2.892))  # M tokens, loss


@dataclass(frozen=True)
class Score:
    """Mean nats per target; bits per byte of text, None where the bytes are not known; how many of both."""

    loss: float
    bpb: float | None
    tokens: int
    bytes: int


class EvalSet:
    """A split to score: this process' sequences (n, T + 1) int64, and the bytes (n, T) of their targets."""

    def __init__(self, shard: Shard, config: Config, world: World, byte_lengths: Tensor | None):
        sequences = shard.sequences(config.sequence_len + 1)
        order = np.random.RandomState(shard.seq_shuffle_seed).permutation(len(sequences))[: config.val_sequences]
        own = sequences[order[world.rank :: world.size]]
        self.world, self.batch, self.sequences = world, config.eval_batch, torch.from_numpy(own.astype(np.int64))
        self.bytes = byte_lengths[self.sequences[:, 1:]] if byte_lengths is not None else None

    @torch.no_grad()
    def nats(self, token_losses) -> Tensor:
        """token_losses: 2 x (B, T) -> (B, T); run over all sequences -> (n, T) float64 on the CPU, nats per target.

        All batches have one shape: the last is filled up with copies of a sequence, which are not scored.
        """
        results = [torch.empty(0, self.sequences.size(1) - 1, dtype=torch.float64)]
        for rows in self.sequences.split(self.batch) if len(self.sequences) else ():
            batch = torch.cat([rows, rows[:1].expand(self.batch - len(rows), -1)]).to(self.world.device)
            results.append(token_losses(batch[:, :-1], batch[:, 1:])[: len(rows)].double().cpu())
        return torch.cat(results)

    def score(self, nats: Tensor) -> Score:
        """Mean over the targets of all processes, accumulated in float64."""
        sums = [nats.sum().item(), nats.numel(), 0, 0]
        if self.bytes is not None:
            sums[2:] = [(nats * (self.bytes > 0)).sum().item(), self.bytes.sum().item()]
        total, tokens, text_nats, text_bytes = self.world.sum(sums)
        bpb = text_nats / math.log(2) / text_bytes if text_bytes else None
        return Score(total / tokens, bpb, int(tokens), int(text_bytes))


def data_efficiency(loss: float) -> float | str:
    """How many times 100M tokens a standard pretraining run needs for this loss; a bound outside of the known range."""
    if not loss <= EFFICIENCY[0][1]:
        return "< 2x"
    for (tokens_a, loss_a), (tokens_b, loss_b) in pairwise(EFFICIENCY):
        if loss >= loss_b:
            return round((tokens_a + (loss_a - loss) / (loss_a - loss_b) * (tokens_b - tokens_a)) / 100, 4)
    return "> 20x"


def member_dtype(name: str, p: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which a member of the readout keeps a parameter: matrices as they compute, lambdas and mixes as they are."""
    return p.dtype if p.ndim < 2 or name.endswith("_mix") else dtype


def mix(nats: list[Tensor], weights: list[float]) -> Tensor:
    """Nats of the members' averaged probabilities: -log(sum_i w_i exp(-nats_i) / sum_i w_i)."""
    logs = [math.log(weight / sum(weights)) - member for weight, member in zip(weights, nats, strict=True)]
    return -torch.logsumexp(torch.stack(logs), dim=0)


def load_finished(run_dir: Path, device: torch.device) -> tuple[GPT, ComputeWeights, dict]:
    """-> (The model of a finished run, not filled; its compute weights, to refresh then; members.json)."""
    saved = json.loads((run_dir / "config.json").read_text())
    require(saved["track"] == TRACK, f"{run_dir} is a run of the {saved['track']} track: use that track's load_members")
    config, final = Config(**saved["config"]), json.loads((run_dir / "final" / "members.json").read_text())
    dtype = compute_dtype(config, device)
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
# Run: clock, log, checkpoint
# ======================================================================================================================


class Clock:
    """train_time_s, the time of the optimizer steps from the first to the last: data, forward, backward, optimizer.

    Not counted are set-up, compilation and warm-up, validation and checkpoints: for those it stands still, once the
    device has finished the steps before.
    """

    def __init__(self, now=time.perf_counter):
        self.now, self.train_time_s, self.since = now, 0.0, now()

    def start(self) -> None:
        self.since = self.now()

    def lap(self) -> float:
        """Count the time since the start or the last lap, and return it."""
        now = self.now()
        lap_s, self.since = now - self.since, now
        self.train_time_s += lap_s
        return lap_s


def write_atomically(path: Path, write) -> None:
    """write(temporary path), then rename: under its name a file is whole or not there, also after kill -9."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors' are the owner's alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def try_to_write_json(path: Path, content) -> str:
    """As write_json -> why it failed, empty if it did not."""
    try:
        write_json(path, content)
        return ""
    except OSError as error:
        return str(error)


def code_sha256(folder: Path, names: tuple[str, ...] = ()) -> str:
    """Of a script's files, or of all in code/: SHA-256 over a line "name, zero byte, SHA-256" for each, sorted."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    names = names or tuple(path.relative_to(folder).as_posix() for path in found)
    lines = (f"{name}\0{sha256_file(folder / name)}\n" for name in sorted(names))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def create_run(config: Config, data_sha256: dict[str, str]) -> dict:
    """Make the run folder with config.json and code/ -> config.json's content, and the folder."""
    name = config.run_name or f"{TRACK}-{time.strftime('%Y%m%d-%H%M%S')}-s{config.seed}"
    folder, script = Path(config.runs_dir) / name, Path(__file__).resolve().parent
    try:
        folder.mkdir(parents=True)
        for part in ("code", "checkpoints", "final"):
            (folder / part).mkdir()
        for file in SCRIPT_FILES:
            shutil.copy(script / file, folder / "code" / file)
    except FileExistsError:
        raise ValueError(f"{folder} exists: choose another --run-name, or continue it: --resume {folder}") from None
    except OSError as error:
        raise ValueError(f"cannot make the run folder {folder} ({error.strerror}): choose another --runs-dir") from None
    values, defaults = dataclasses.asdict(config), dataclasses.asdict(Config())
    overrides = {key: value for key, value in values.items() if value != defaults[key]}
    content = {"run_id": secrets.token_hex(4), "track": TRACK, "command": sys.argv, "overrides": overrides}
    content |= {"config": values, "code_sha256": code_sha256(folder / "code"), "data_sha256": data_sha256}
    write_json(folder / "config.json", content)
    return content | {"folder": str(folder)}


def read_json(path: Path, keys: set[str], advice: str) -> dict:
    """A JSON object with these keys; ValueError with the advice if it is damaged."""
    try:
        content = json.loads(path.read_text())
        require(keys <= content.keys(), f"it lacks {', '.join(keys - content.keys())}")
        return content
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {advice}") from None


def read_config(folder: str) -> dict:
    """config.json of a run folder."""
    path, keys = Path(folder) / "config.json", {"run_id", "track", "config", "overrides", "code_sha256", "data_sha256"}
    require(path.exists(), f"{path} not found: --resume needs a run folder, such as runs/<name>")
    return read_json(path, keys, "a run cannot be resumed without it; its weights are in checkpoints/ and final/")


def open_run(folder: str, given: dict) -> dict:
    """As create_run, of a run that this script and these flags can continue; ValueError says why they cannot."""
    saved, result = read_config(folder), Path(folder) / "result.json"
    other = (
        f"{folder} is a run of the {saved['track']} track: resume it with that track's train.py, this one is {TRACK}'s"
    )
    require(saved["track"] == TRACK, other)
    fixed = {k: v for k, v in given.items() if k not in RESUME_MAY_CHANGE and v != saved["config"].get(k)}
    other = ", ".join(f"{k} {saved['config'].get(k)!r}, now {v!r}" for k, v in fixed.items())
    require(not fixed, f"{folder} was started with other settings ({other}): leave them out, or start a new run")
    same = code_sha256(Path(__file__).resolve().parent, SCRIPT_FILES) == saved["code_sha256"]
    require(same, f"the script changed since {folder} was started: resume it with {folder}/code/{SCRIPT_FILES[0]}")
    finished = result.exists() and read_json(result, {"status"}, "delete it to resume")["status"] == "finished"
    return saved | {"folder": folder, "finished": finished}


def check_same_data(saved: dict, data_dir: str, data_sha256: dict[str, str]) -> None:
    """A run goes on with the files that it was started with; ValueError if they are others."""
    for split, now in (saved["data_sha256"] | data_sha256).items():
        then, now = saved["data_sha256"].get(split, "none"), data_sha256.get(split, "none")
        said = f"fineweb_{split}.pt was {then[:12]}..., and that of {data_dir} is {now[:12]}..."
        require(then == now, f"{saved['folder']} was started on other data ({said}): give its --data-dir")


def draw_curve(folder: Path, stages: dict[int, str], val_loss: float | None = None) -> None:
    """curve.png: the training loss of every step and the validation losses, from metrics.jsonl; the readout's loss.

    stages: see stage_changes; those that have begun are marked.
    """
    from matplotlib.figure import Figure  # takes a second to import

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for key, style, label in (("train_loss", "-", "training, each step"), ("val_loss", "o-", "validation")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            label = f"{label}: {points[-1][1]:.4f}"
            axes.plot(*zip(*points, strict=True), style, linewidth=1, markersize=4, label=label)
    if val_loss is not None:
        axes.axhline(val_loss, linestyle="--", linewidth=1, color="gray", label=f"readout: {val_loss:.4f}")
    for step, text in stages.items():
        if 0 < step < max((line["step"] for line in lines), default=0):
            axes.axvline(step, linestyle=":", linewidth=1, color="gray")
            axes.annotate(text, (step, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=7, ha="right")
    axes.legend()
    losses = [line.get("train_loss", line.get("val_loss")) for line in lines]
    losses = [loss for loss in losses if math.isfinite(loss)]
    if len(losses) > 100:  # the fall of the first steps would leave no room for what follows
        axes.set_ylim(min(losses) - 0.1, float(np.quantile(losses, 0.97)) + 0.2)
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title=folder.name)
    axes.grid(alpha=0.3)
    write_atomically(folder / "curve.png", partial(figure.savefig, format="png", dpi=120))


class Lines:
    """A file that grows by lines. What a full disk refuses waits in memory and is tried again with the next line."""

    def __init__(self, path: Path):
        self.file, self.waiting = open(path, "ab", buffering=0), b""

    def drop_torn_line(self) -> None:
        """Cut off what a power loss left behind the last whole line."""
        content = Path(self.file.name).read_bytes()
        self.file.truncate(content.rfind(b"\n") + 1)

    def write(self, text: str) -> None:
        self.waiting += text.encode()
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError:
            pass


def wandb_mode(config: Config) -> str:
    """How Weights & Biases is wanted: online, offline or off."""
    mode = config.wandb
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "online") if os.environ.get("WANDB_API_KEY") else "off"
    return "off" if mode == "disabled" else mode


class Run:
    """The run folder and what is written to it as the run goes on. Only the main process writes."""

    def __init__(self, folder: str, run_id: str, main: bool):
        self.folder, self.run_id, self.main, self.wandb, self.bar = Path(folder), run_id, main, None, None

    def open(self) -> None:
        self.log_lines, self.metrics = Lines(self.folder / "log.txt"), Lines(self.folder / "metrics.jsonl")
        try:
            fcntl.flock(self.log_lines.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {self.folder}: wait for its end, or stop it") from None
        except OSError as error:
            self.log(f"no locks on this disk ({error.strerror}): let no other process write to {self.folder}")
        self.log_lines.drop_torn_line()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.main:
            if self.wandb is not None:
                try:
                    self.wandb.finish()
                except Exception as error:  # the run folder has all that matters
                    self.log(f"wandb: {type(error).__name__}: {error}")
            self.log_lines.file.close()
            self.metrics.file.close()

    def start_wandb(self, config: Config) -> str:
        """Weights & Biases, where wanted -> what the header says of it. Where no --wandb asks for it, it may fail."""
        mode = wandb_mode(config)
        if mode == "off":
            return mode
        try:
            import wandb

            names = {"project": "nanogpt-slowrun", "name": self.folder.name, "id": self.run_id, "dir": str(self.folder)}
            values, settings = dataclasses.asdict(config) | {"track": TRACK}, wandb.Settings(silent=True)
            self.wandb = wandb.init(**names, resume="allow", mode=mode, config=values, settings=settings)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            require(config.wandb == "auto", f"--wandb {config.wandb} failed ({said}): log in, or choose offline or off")
            return f"off, since it failed ({said})"
        return mode

    def log(self, text: str, screen: bool = True) -> None:
        """Print lines, and keep them in log.txt behind the run id."""
        if self.main:
            if screen:
                tqdm.write(text)
                sys.stdout.flush()
            self.log_lines.write("".join(f"{self.run_id} {line}\n" for line in text.splitlines()))

    def progress(self, done: int, total: int, parts: list[str], printed: bool) -> None:
        """A step is done: move the bar on a terminal; elsewhere, and in log.txt, print a line if it is its turn."""
        line = " | ".join([f"step {done}/{total}", *parts])
        if self.main and sys.stderr.isatty():
            self.bar = self.bar or tqdm(total=total, initial=done - 1, bar_format="{bar:20} {desc}", dynamic_ncols=True)
            self.bar.set_description_str(line, refresh=False)
            self.bar.update()
        if printed:
            self.log(line, screen=self.bar is None)

    def record(self, values: dict, to_wandb: bool = True) -> None:
        """A line of metrics.jsonl."""
        if self.main:
            self.metrics.write(json.dumps({"run": self.run_id} | values) + "\n")
            if self.wandb is not None and to_wandb:
                self.wandb.log({key: value for key, value in values.items() if key != "step"}, step=values["step"])

    def drop_metrics_after(self, step: int) -> None:
        """Forget the steps that were lost with a killed run, and are about to be repeated."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # the last may be half written
        kept = "".join(line for line in whole if json.loads(line)["step"] <= step)
        self.metrics.file.close()
        write_atomically(path, lambda temporary: temporary.write_text(kept))
        self.metrics = Lines(path)

    def checkpoints(self) -> list[Path]:
        """The complete ones, oldest first: a .json is written once its .pt is on the disk, and has the hash of it."""
        return sorted((self.folder / "checkpoints").glob("step_*.json"))

    def save_checkpoint(self, tensors: dict, info: dict) -> str:
        """Write a checkpoint and drop all but the last two -> why it could not be written, empty if it was."""
        path, failure = self.folder / "checkpoints" / f"step_{info['step']:07d}.pt", ""
        try:
            write_atomically(path, partial(torch.save, tensors))
            write_json(path.with_suffix(".json"), info | {"sha256": sha256_file(path)})
        except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
            free = shutil.disk_usage(self.folder).free / 2**30
            failure = f"{type(error).__name__}, {str(error).splitlines()[0]} ({free:.2f} GiB free)"
        self.drop_checkpoints(keep=2)
        return failure

    def drop_checkpoints(self, keep: int) -> None:
        kept = [complete.stem for complete in self.checkpoints()[-keep:]]
        for file in (self.folder / "checkpoints").iterdir():
            if file.stem not in kept:
                file.unlink()

    def load_checkpoint(self) -> tuple[dict, dict] | None:
        """(Tensors, info) of the newest checkpoint, None if there is none. A damaged one is an error."""
        found = self.checkpoints()
        if not found:
            return None
        before = f"step {int(found[-2].stem[5:])}" if len(found) > 1 else "the start"
        path, advice = found[-1].with_suffix(".pt"), f"delete {found[-1]} to resume from {before}"
        info = read_json(found[-1], {"step", "sha256", "members"}, advice)
        sound = path.exists() and sha256_file(path) == info["sha256"]
        require(sound, f"the checkpoint {path} is missing or damaged: {advice}")
        return torch.load(path, map_location="cpu", weights_only=True), info


# ======================================================================================================================
# Train
# ======================================================================================================================


def profile_table(trace: Path) -> str:
    """Total time and number of the GPU's kernels in a trace, or of operators without what they call; longest first.

    torch's own table takes a minute for the trace of a step.
    """
    with gzip.open(trace, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    found = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    on_gpu, times, counts = bool(found), defaultdict(float), defaultdict(int)
    found = found or [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    stack: list[tuple[int, float, str]] = []  # thread, end and name of the operators that are under way
    for event in sorted(found, key=lambda event: (event["tid"], event["ts"], -event["dur"])):
        tid, start, name = event["tid"], event["ts"], event["name"]
        while stack and (stack[-1][0] != tid or stack[-1][1] <= start):
            stack.pop()
        if stack and not on_gpu:
            times[stack[-1][2]] -= event["dur"]
        times[name] += event["dur"]
        counts[name] += 1
        stack.append((tid, start + event["dur"], name))
    total = sum(times.values())
    lines = [f"{'ms':>10} {'part':>6} {'number':>8}  {'kernel' if on_gpu else 'operator, without what it calls'}"]
    for name in sorted(times, key=times.get, reverse=True):
        lines.append(f"{times[name] / 1e3:10.3f} {times[name] / total:6.1%} {counts[name]:8}  {name[:160]}")
    return "\n".join(lines) + "\n"


class StepProfiler:
    """Records ranges of optimizer steps with torch.profiler, in the main process alone, into the run folder.

    profile_4-5.json.gz is a trace (ui.perfetto.dev shows it), profile_4-5.txt a table: see profile_table. No number of
    the run changes, but recording and writing take time, which is on the clock.
    """

    def __init__(self, config: Config, run: Run, cuda: bool):
        self.ranges = profile_ranges(config.profile_steps)  # those that have not ended, in all processes
        self.run, self.cuda, self.profile, self.first = run, cuda, None, 0

    def begins_with(self, number: int) -> bool:
        """Whether a range begins with this step, counted from 1; the same in all processes."""
        while self.ranges and self.first != self.ranges[0][0] < number:  # it began before the run was resumed
            self.ranges.pop(0)
        return bool(self.ranges) and number == self.ranges[0][0]

    def start(self, number: int) -> None:
        """Record from this step on, which comes next."""
        self.first = number
        if not self.run.main:
            return
        if self.cuda:
            torch.cuda.synchronize()
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * self.cuda
        self.profile = torch.profiler.profile(activities=kinds)
        self.profile.start()

    def after_step(self, number: int, last: bool = False) -> None:
        """Write what was recorded if a range ends with this step, or if no step follows, last."""
        ends = bool(self.ranges) and (last or number == self.ranges[0][1])
        if ends and self.profile is not None:
            self.write(f"profile_{self.first}-{number}")
        elif ends and last:
            self.run.log(f"profile of steps {self.ranges[0][0]}-{self.ranges[0][1]}: the run did not go through them")
        if ends:
            self.ranges.pop(0)

    def write(self, name: str) -> None:
        started, folder, outcome = time.monotonic(), self.run.folder, "written"
        if self.cuda:
            torch.cuda.synchronize()
        profile, self.profile = self.profile, None
        profile.stop()
        try:
            profile.export_chrome_trace(str(folder / "unfinished.json.gz"))
            os.replace(folder / "unfinished.json.gz", folder / f"{name}.json.gz")
            (folder / f"{name}.txt").write_text(profile_table(folder / f"{name}.json.gz"))
        except (OSError, RuntimeError) as error:  # a full disk, or the profiler's fault: no reason to end a run
            outcome = f"NOT written ({error})"
        self.run.log(f"{name}: trace and table {outcome}, which took {time.monotonic() - started:.1f} s")


def peak_memory_gib(world: World) -> float:
    """Most memory that this process had: of the GPU what tensors took, without one that of the process."""
    if world.cuda:
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


class NonFiniteLoss(RuntimeError):
    """A loss is NaN or infinite."""


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f}h" if seconds > 7200 else f"{seconds / 60:.1f}m" if seconds > 90 else f"{seconds:.0f}s"


def seed_of(*numbers: int) -> int:
    """A seed that depends on all of these numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def resume_command(processes: int, folder: Path) -> str:
    """What resumes a run on this machine."""
    start = "python" if processes == 1 else f"torchrun --standalone --nproc_per_node={processes}"
    return f"{start} {sys.argv[0]} --resume {folder}"


class Trainer:
    """A training run: its state, and its phases warm_up, resume and fit. What follows is finish."""

    def __init__(self, config: Config, world: World, run: Run, plan: Plan, shards: dict[str, Shard], byte_lengths):
        self.config, self.world, self.run, self.plan, self.shards = config, world, run, plan, shards
        self.dtype = compute_dtype(config, world.device)
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
        self.loader = TrainLoader(shards["train"], plan, world.virtual_ranks)
        self.eval_sets = {s: EvalSet(shards[s], config, world, byte_lengths) for s in ("val", "holdout") if s in shards}
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
        self.recent_s: deque[float] = deque(maxlen=5)  # durations of the last steps
        self.unprinted_s: list[float] = []  # durations of the steps since the last printed line
        self.last_checkpoint, self.checkpoint_due, self.checkpoint_failure = time.monotonic(), False, ""
        self.profiler = StepProfiler(config, run, world.cuda)

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
        eta, batch = schedule(self.plan, step)["meta_step"], torch.from_numpy(self.loader.batch(step).astype(np.int64))
        if self.world.cuda:
            batch = batch.pin_memory().to(self.world.device, non_blocking=True)
        totals = torch.zeros(2, dtype=self.model.x0_lambdas.dtype, device=self.world.device)
        for v, micro_steps in zip(self.world.virtual_ranks, batch, strict=True):
            pieces = list(enumerate(self.pieces(micro_steps)))
            middle = len(pieces) // 2
            halves = [pieces[:middle], pieces[middle:]] if self.config.meta_gradient else [pieces]
            run = partial(self.run_pieces, step, v, share=1 / (VIRTUAL_RANKS * len(pieces)), totals=totals)
            add_gradient(self.weights, self.optimizer, [partial(run, half) for half in halves], eta)
        with torch.profiler.record_function("optimizer"):
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
        c, device, started = self.config, self.world.device, time.monotonic()
        errors = check_kernels(c, device, **self.kernels)
        stages = {str(how): how for how in (stage(self.plan, step) for step in range(self.plan.num_steps))}
        with torch.random.fork_rng([device] if self.world.cuda else []):
            for main_turn in (True, False):  # the main process goes first and fills the compiler's cache
                for how in stages.values() if self.world.main == main_turn else ():
                    shape = (c.micro_steps, c.micro_batch, c.sequence_len + 1)  # graphs depend on shapes and strides
                    rows = self.pieces(torch.randint(c.vocab_size, shape, device=device))[0][1]
                    for arguments in warm_up_arguments(c, **how):
                        run = partial(self.backward, rows[: c.device_rows], 1.0, **how, **arguments)
                        add_gradient(self.weights, self.optimizer, [run] * (1 + c.meta_gradient), 0.0)
                    batch = torch.randint(c.vocab_size, (c.eval_batch, c.sequence_len + 1), device=device)
                    self.token_losses(batch[:, :-1], batch[:, 1:], **how)
                self.optimizer.zero_grad()
                if self.world.main == main_turn:
                    self.optimizer.step(0.0, 0.0, 0.95, alone=True)  # no gradient and no rate: it changes nothing
                self.world.sum([0])
        self.optimizer.step(0.0, 0.0, 0.95)  # connects the processes
        self.optimizer.steps = 0
        kernels = ", ".join(f"{name} {self.kernels[name]} (error {error:.2g})" for name, error in errors.items())
        self.run.log(f"warm-up   {time.monotonic() - started:.1f} s, compilation included; {kernels}")

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
            if self.profiler.begins_with(self.step + 1):
                self.settle(0)  # so that recording is no part of the step before
                self.profiler.start(self.step + 1)
            self.pending.append((self.step, self.train_step(self.step)))
            self.step += 1
            self.settle(keep)
            self.profiler.after_step(self.step)
            if self.step == projection_at:
                self.print_projection()
            epoch_ends = self.plan.epochs_done(self.step) > self.plan.epochs_done(self.step - 1)
            self.agree()
            if epoch_ends or self.checkpoint_due or self.stopped_by:
                self.settle(0)
                if epoch_ends or self.stopped_by == "time_cap":
                    self.end_epoch(complete=epoch_ends)
                self.save_checkpoint()
                if self.stopped_by == "signal":
                    self.draw_curve()
                self.clock.start()
        self.profiler.after_step(self.step, last=True)
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
            self.recent_s.append(dt_s)
            loss, lm_loss = self.world.sum(local)
            self.record_step(step, dt_s, loss, lm_loss)
            if not math.isfinite(loss):
                self.fail("training", loss, step)

    def agree(self) -> None:
        """Before each step, all processes decide together whether to stop, or to write a checkpoint after it."""
        c, over_cap = self.config, False
        if self.recent_s and self.step < self.plan.num_steps:
            next_end_s = self.clock.train_time_s + (len(self.pending) + 1) * statistics.median(self.recent_s)
            over_cap = 0 < 60 * c.time_cap_min < next_end_s
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
        values["peak_memory_gib"] = round(peak_memory_gib(self.world), 3)
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
        left_s = self.remaining_s(self.step, statistics.median(self.recent_s))
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
        if self.world.main:
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
        self.draw_curve()

    def draw_curve(self, val_loss: float | None = None) -> None:
        if self.world.main:
            try:
                draw_curve(self.run.folder, self.stages, val_loss)
            except Exception as error:  # a full disk, or a library's fault: no reason to end a run
                self.run.log(f"curve.png is not drawn: {type(error).__name__}: {error}")

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self) -> None:
        """Write all that the run needs to go on from here. A failure is said, and does not end the run.

        Without --checkpoints only the readout's weights are written.
        """
        started, wanted = time.monotonic(), self.config.checkpoints
        tensors = training_state(self) if wanted else {}
        if self.world.main:
            info = {"step": self.step, "train_time_s": self.clock.train_time_s, "wall_time_s": self.wall_time_s()}
            info |= {"readouts": self.readouts, "members": self.members, "recent_s": [*self.recent_s]}
            info["stopped_by"] = self.stopped_by if self.stopped_by == "time_cap" else ""
            failure = self.save_members() or (self.run.save_checkpoint(tensors, info) if wanted else "")
            said = f"NOT saved: {failure}. The run goes on, and earlier checkpoints stay" if failure else "saved"
            if wanted or failure:
                self.run.log(f"checkpoint at step {self.step} {said}, in {time.monotonic() - started:.1f} s")
        self.checkpoint_failure = self.world.share(lambda: failure)
        self.last_checkpoint, self.checkpoint_due = time.monotonic(), False

    def save_members(self) -> str:
        """Write the readout's weights that are only in memory -> why they could not be written, empty if they were."""
        for file in list(self.unsaved):
            try:
                write_atomically(self.run.folder / "final" / file, partial(save_file, self.unsaved[file]))
            except Exception as error:  # an OSError, or safetensors' own
                return f"final/{file}: {error}"
            member = next(member for member in self.members if member["file"] == file)
            member["sha256"] = sha256_file(self.run.folder / "final" / file)
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
            (self.run.folder / "result.json").unlink(missing_ok=True)  # of an attempt that failed
            return info

        info = self.world.share(read)
        if info is None:
            return self.run.log("no checkpoint yet: starting from step 0")
        restore(self, tensors)
        self.step, self.stopped_by = info["step"], info["stopped_by"]
        self.readouts, self.members = info["readouts"], info["members"]
        self.clock.train_time_s, self.earlier_wall_s = info["train_time_s"], info["wall_time_s"]
        self.recent_s.extend(info["recent_s"])
        done = f"step {self.step}/{self.plan.num_steps}, after {self.clock.train_time_s:.1f} s of training"
        self.run.log(f"resumed at {done}")

    def wall_time_s(self) -> float:
        return self.earlier_wall_s + time.monotonic() - self.started

    def fail(self, kind: str, loss: float, step: int) -> None:
        """End the run (NonFiniteLoss), and keep what is needed to look at it: the step's tokens, all norms."""
        if self.world.main:
            path = self.run.folder / "non_finite.pt"
            tokens = TrainLoader(self.shards["train"], self.plan, range(VIRTUAL_RANKS)).batch(step)
            norms = {name: p.detach().float().norm().item() for name, p in self.model.named_parameters()}
            bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
            content = {"step": step + 1, "loss": loss, "tokens": torch.from_numpy(tokens), "norms": norms}
            write_atomically(path, partial(torch.save, content))
            result = {"track": TRACK, "status": "failed", "stopped_by": "non_finite_loss", "steps": step + 1}
            write_json(self.run.folder / "result.json", result | {"run_id": self.run.run_id})
            kept = ", ".join(path.stem for path in self.run.checkpoints()) or "none, it begins anew"
            self.run.log(f"{path} has the tokens and the norms of all parameters; not finite: {len(bad)}, {bad[:3]}")
            self.run.log(f"checkpoints before it, from which --resume repeats the steps: {kept}")
        raise NonFiniteLoss(f"the {kind} loss is {loss} at step {step + 1}")

    def say_how_to_resume(self) -> int:
        """-> the exit code: 0 if the checkpoint is saved."""
        how = resume_command(self.world.size, self.run.folder)
        stopped = f"stopped by {self.signal or 'a signal'} after step {self.step}"
        if not self.config.checkpoints:
            kept = self.run.checkpoints()
            begins = f"goes on from step {int(kept[-1].stem[5:])}" if kept else "begins anew"
            self.run.log(f"{stopped}, which --no-checkpoints did not save: {how} {begins}")
            return 1
        self.run.log(f"{stopped}; resume with: {how}")
        return 1 if self.checkpoint_failure else 0


def training_state(trainer: Trainer) -> dict:
    """The tensors of a checkpoint; collective, of use in the main process alone."""
    state = trainer.optimizer.state_dict()
    return {"model": {name: p.detach() for name, p in trainer.model.named_parameters()}, "optimizer": state}


def restore(trainer: Trainer, tensors: dict) -> None:
    """Take up a training_state, which the main process has; collective."""
    for name, p in trainer.model.named_parameters() if trainer.world.main else ():
        p.data.copy_(tensors["model"][name])
    trainer.optimizer.broadcast_values()
    trainer.optimizer.load_state_dict(tensors.get("optimizer", {}))


def check_members(run: Run, members: list[dict]) -> None:
    """Refuse to resume where weights of the readout are not as they were saved (ValueError)."""
    for path, sha256 in ((run.folder / "final" / member["file"], member["sha256"]) for member in members):
        sound = path.exists() and sha256_file(path) == sha256
        require(sound, f"{path}, of the readout, is missing or damaged: empty checkpoints/ to begin anew")


def load_member(trainer: Trainer, member: dict) -> None:
    """Put a member's weights into the model, from the disk or from memory."""
    if trainer.world.main:
        saved = trainer.unsaved.get(member["file"]) or load_file(trainer.run.folder / "final" / member["file"])
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
    scores = {name: eval_set.score(mix(nats[name], weights)) for name, eval_set in eval_sets.items()}
    final = {"mixing": MIXING, "stage": how, "members": members}
    if len(members) == 1:
        trainer.readouts["last_blended" if members[0]["file"] == "blend.safetensors" else "last"] = scores["val"].loss
        return scores["val"], scores.get("holdout"), final
    trainer.readouts["probability_average"] = scores["val"].loss
    equal = mix(nats["val"], [1.0] * len(members))
    trainer.readouts["probability_average_equal_weights"] = eval_sets["val"].score(equal).loss
    use_average(trainer)
    trainer.readouts["weight_average"] = eval_sets["val"].score(eval_sets["val"].nats(losses)).loss
    return scores["val"], scores.get("holdout"), final


def save_final(trainer: Trainer, final: dict) -> str:
    """Complete final/, with members.json, and drop what else is there -> why it failed, empty if it did not."""
    for path in (trainer.run.folder / "final").iterdir():
        if path.name not in [member["file"] for member in final["members"]]:
            path.unlink()
    if trainer.save_members():  # the disk is full: the older checkpoint makes room
        trainer.run.drop_checkpoints(keep=1)
    return trainer.save_members() or try_to_write_json(trainer.run.folder / "final" / "members.json", final)


def make_result(trainer: Trainer, val: Score, holdout: Score | None) -> dict:
    """What result.json says, but for eligibility."""
    c, world, seconds = trainer.config, trainer.world, trainer.clock.train_time_s
    tokens = trainer.plan.tokens_done(trainer.step)
    hashes, folder = {split: shard.sha256 for split, shard in trainer.shards.items()}, trainer.run.folder
    peak = peak_flops(world.device)
    return {
        "track": TRACK, "status": "finished", "stopped_by": trainer.stopped_by, "run_id": trainer.run.run_id,
        "val_loss": val.loss, "val_bpb": val.bpb, "best_val_loss": min(trainer.readouts.values()),
        "readouts": trainer.readouts, "holdout_loss": holdout and holdout.loss, "holdout_bpb": holdout and holdout.bpb,
        "data_efficiency": data_efficiency(val.loss) if hashes["val"] == OFFICIAL_SHA256["val"] else None,
        "steps": trainer.step, "tokens": tokens, "epochs": trainer.plan.epochs_done(trainer.step),
        "train_time_s": seconds, "wall_time_s": trainer.wall_time_s(), "time_cap_min": c.time_cap_min,
        "seed": c.seed, "world_size": world.size, "device": device_name(world.device),
        "dtype": str(trainer.dtype).removeprefix("torch."), "compiled": trainer.compiled, **trainer.kernels,
        "mixing": MIXING,
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "peak_memory_gib": peak_memory_gib(world), "tokens_per_s": tokens / seconds,
        "mfu": trainer.flops[trainer.step] / seconds / peak / world.size if peak else None,
        "parameters": trainer.num_parameters, "val_tokens": val.tokens, "val_bytes": val.bytes,
        "data_sha256": hashes, "code_sha256": code_sha256(folder / "code"),
        "final_sha256": {path.name: sha256_file(path) for path in sorted((folder / "final").iterdir())},
    }  # fmt: skip


def ineligible(config: Config, result: dict) -> list[str]:
    """Why a result cannot be a record of this track; empty if it can."""
    cap, targets = Config.time_cap_min, Config.val_sequences * Config.sequence_len
    checks = {
        "the data are not the official files": all(result["data_sha256"][s] == h for s, h in OFFICIAL_SHA256.items()),
        f"{result['val_tokens']:,} validation targets, not {targets:,}": result["val_tokens"] == targets,
        f"the cap of {cap:g} min is lifted": 0 < config.time_cap_min <= cap,
        f"training took longer than {cap:g} min": result["train_time_s"] <= 60 * cap,
        "it ran on other hardware than 8 H100": result["world_size"] == 8 and "H100" in result["device"],
        "the loss is not finite": math.isfinite(result["val_loss"]),
    }
    return [reason for reason, fine in checks.items() if not fine]


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
    c, world, shards = trainer.config, trainer.world, trainer.shards
    settings = ", ".join(f"{k} {v}" for k, v in saved["overrides"].items()) or "the defaults, the current record"
    official = all(shards[split].sha256 == sha256 for split, sha256 in OFFICIAL_SHA256.items())
    sizes = ", ".join(f"{split} {len(shard.tokens):,}" for split, shard in shards.items())
    data = f"{sizes} tokens ({'official' if official else 'not the official files'}); bytes of tokens {bytes_from}"
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
    if not trainer.world.main:
        return 0
    folder, failure = trainer.run.folder, save_final(trainer, final)
    result = make_result(trainer, val, holdout)
    reasons = ineligible(trainer.config, result)
    result |= {"eligible": not reasons, "not_eligible_because": reasons}
    trainer.draw_curve(val.loss)
    trainer.run.log(final_block(result, folder))
    failure = failure or try_to_write_json(folder / "result.json", result)
    if failure:
        trainer.run.log(f"the result is NOT saved ({failure}): make space, then --resume {folder} goes on")
        return 1
    shutil.rmtree(folder / "checkpoints")
    if trainer.run.wandb is not None:
        trainer.run.wandb.summary.update(result)
    return 0


def training_sequences(config: Config) -> int:
    """Sequences of T + 1 tokens in the training data."""
    return len(load_shard("train", config).sequences(config.sequence_len + 1))


def official_sequences(config: Config) -> int:
    """As training_sequences, of the official 100,000,000 tokens."""
    return 100_000_000 // (config.sequence_len + 1)


def plan_repeats(config: Config) -> int:
    """How often a run goes through its plan."""
    return 1


def moved_bytes(config: Config, world_size: int, dtype: torch.dtype, tokens: int, calls: tuple) -> dict[str, float]:
    """Bytes that a process reads and writes at least in an optimizer step of so many tokens, by what they are.

    calls: see layer_calls. Each pass reads the weights of every call, once forward and once backward, adds to float32
    gradients, and writes and reads what backward needs, the logits and their gradient. A step makes the compute weights
    of the masters and takes their gradients back, once, and with the meta-gradient once more for each virtual rank.
    """
    forward, backward, heads = calls
    total, block, tables = parameter_counts(config)
    once = total - block * config.n_layer - config.padded_vocab * config.n_embd  # all but the trunk and wte
    positions = config.device_rows * config.sequence_len
    passes = tokens / (world_size * positions)
    points = 1 + VIRTUAL_RANKS / world_size * config.meta_gradient
    return {
        "weights": passes * dtype.itemsize * (block * (forward + backward) + 2 * once)
        + points * (4 + dtype.itemsize) * total,
        "gradients": passes * 8 * (block * config.n_layer + once) + points * 12 * total,
        "optimizer": (12 * total + 8 * (total + tables)) / world_size,
        "activations": 2 * passes * positions * layer_bytes(config, dtype) * backward,
        "logits": 4 * passes * positions * config.padded_vocab * dtype.itemsize * heads,
    }


def plan_stages(plan: Plan, world_size: int, dtype: torch.dtype) -> list[dict]:
    """The stages of a plan in order: consecutive steps of the same name, tokens and operations."""
    stages: list[dict] = []
    for step in range(plan.num_steps):
        tokens = plan.tokens_done(step + 1) - plan.tokens_done(step)
        same = {"stage": stage_name(plan, step), "tokens_per_step": tokens}
        same["flops_per_token"] = step_flops_per_token(plan, step)
        if stages and same.items() <= stages[-1].items():
            stages[-1]["steps"] += 1
            continue
        calls = layer_calls(plan, step)
        moved = moved_bytes(plan.config, world_size, dtype, tokens, calls)
        held = held_bytes(plan.config, world_size, dtype, calls[1])
        counted = {"flops_per_step": same["flops_per_token"] * tokens, "moved_bytes": moved, "held_bytes": held}
        stages.append(same | {"from_step": step + 1, "steps": 1} | counted)
    return stages


def make_plan(config: Config) -> dict:
    """What --plan writes. Bytes are those of a process; how many there are, torchrun says (else there is one)."""
    path = Path(config.data_dir) / "fineweb_train.pt"
    data = f"{path}" if path.exists() else f"100,000,000 tokens, as {path} is not there"
    plan = Plan(config, training_sequences(config) if path.exists() else official_sequences(config))
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    dtype = compute_dtype(config, device)
    if config.dtype == "auto" and config.device != "cpu":
        dtype = torch.bfloat16  # that of the GPUs which a run is planned for
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    check_world_size(world_size)
    member, checkpoint = disk_gib(config, dtype)
    total, *_ = parameter_counts(config)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    # summed gradients are float32, gathered values too; of 8 processes each sends and receives 7 parts of 8
    communication = 2 * 4 * total * (VIRTUAL_RANKS - 1) / VIRTUAL_RANKS
    return {
        "track": TRACK, "data": data, "assumed_data": not path.exists(), "sequences": plan.num_sequences,
        "parameters": total, "num_steps": plan.num_steps, "tokens": plan.tokens_done(plan.num_steps),
        "repeats": plan_repeats(config), "time_cap_min": config.time_cap_min, "dtype": str(dtype)[6:],
        "vocab_size": config.vocab_size, "sequence_len": config.sequence_len,
        "virtual_ranks": VIRTUAL_RANKS, "world_size": world_size,
        "stages": plan_stages(plan, world_size, dtype),
        "memory_gib": {str(size): memory_gib(config, size, dtype)[2] for size in (1, 2, 4, 8)},
        "disk_gib": {"member": member, "checkpoint": checkpoint, "most": disk_needed_gib(config, dtype)},
        "communication_bytes_of_8": communication,
        "device": {"name": device_name(device), "memory_gib": memory / 2**30, "peak_flops": peak_flops(device)},
        "short_runs": {name: as_flags(settings) for name, settings in short_runs(config).items()},
    }  # fmt: skip


def as_flags(settings: dict) -> list[str]:
    """{"num_epochs": 2, "decay_schedule": False} -> ["--num-epochs=2", "--no-decay-schedule"]"""
    flags = {name.replace("_", "-"): value for name, value in settings.items()}
    return [
        f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in flags.items()
    ]


def write_plan(config: Config, path: Path) -> str:
    """Write make_plan's JSON -> a summary of it. ValueError if the file cannot be written."""
    plan = make_plan(config)
    failure = try_to_write_json(path, plan)
    require(not failure, f"the plan is not written ({failure}): choose another --plan FILE")
    lines = [f"NanoGPT Slowrun, {TRACK} track: {plan['num_steps']:,} steps, {plan['tokens']:,} tokens ({plan['data']})"]
    for each in plan["stages"]:
        steps = f"from step {each['from_step']:,}: {each['steps']:,} steps of {each['tokens_per_step']:,} tokens"
        lines.append(f"{each['stage']:24} {steps}, {each['flops_per_step'] / 1e15:,.3g} PFLOP each")
    gib = ", ".join(f"{gib:.3g} on {size}" for size, gib in plan["memory_gib"].items())
    lines.append(
        f"GiB of memory per process, estimated in {plan['dtype']}: {gib}; of disk: {plan['disk_gib']['most']:.3g}"
    )
    return "\n".join([*lines, f"written to {path}"])


def set_up(argv: list[str] | None) -> tuple[Trainer | None, bool]:
    """From the command line to a trainer, and whether it resumes; what can be refused is refused here (ValueError).

    No trainer: the run that --resume names has finished.
    """
    started, (given, resume) = time.monotonic(), parse_arguments(argv)
    config, device = Config(**given) if resume is None else None, given.get("device", "auto")
    if resume is not None:
        device = read_config(resume)["config"].get("device", "auto")
    world = set_up_world(device)
    if resume is not None:
        saved = world.share(open_run, resume, given)
        config = Config(**saved["config"] | {name: given[name] for name in RESUME_MAY_CHANGE & given.keys()})
        if saved["finished"]:
            if world.main:
                print(f"{resume} has finished, see {resume}/result.json")
            return None, True
    # What is the same in all processes is checked by one: one message if it is refused.
    dtype = compute_dtype(config, world.device)
    world.share(choose_kernels, config, world.device, dtype)
    needed_gib = world.share(check_memory, config, world)
    folder = Path(resume or Path(config.runs_dir) / config.run_name)
    disk = world.share(check_disk, config, dtype, folder)
    loaded: dict[str, Shard] = {}
    world.share(lambda: loaded.update(load_data(config)))
    shards = loaded or load_data(config)
    hashes = {split: shard.sha256 for split, shard in shards.items()}
    plan = world.share(Plan, config, len(shards["train"].sequences(config.sequence_len + 1)))
    byte_lengths, bytes_from = world.share(token_byte_lengths, config)
    if resume is None:
        saved = world.share(create_run, config, hashes)
    world.share(check_same_data, saved, config.data_dir, hashes)
    check_same_data(saved, config.data_dir, hashes)  # the other processes may be on other disks
    run = Run(saved["folder"], saved["run_id"], world.main)
    world.share(run.open)
    try:
        wandb_said = world.share(run.start_wandb, config)
    except ValueError:
        if resume is None:  # refused: nothing is left of it
            shutil.rmtree(run.folder)
        raise
    trainer = Trainer(config, world, run, plan, shards, byte_lengths)
    trainer.started = started
    run.log(header(trainer, saved, bytes_from, needed_gib, disk, wandb_said))
    return trainer, resume is not None


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 finished, or stopped by a signal and saved; 1 failed; 2 refused."""
    trainer, handlers = None, {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        try:
            trainer, resumes = set_up(argv)
            if trainer is None:
                return 0
            for number in handlers:
                signal.signal(number, trainer.take_signal)
            trainer.warm_up()
            if resumes:
                trainer.resume()
        except (ValueError, torch.OutOfMemoryError) as error:
            if os.environ.get("RANK", "0") == "0" or dist.is_initialized():  # until they have met, all find the same
                advice = "" if isinstance(error, ValueError) else "\nLess memory: --device-batch, --eval-batch"
                print(f"{Path(__file__).name}: error: {error}{advice}", file=sys.stderr)
            return 2
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
    exit_code = main()
    if dist.is_initialized():
        if exit_code == 0:  # else the others may never come
            dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(exit_code)  # a thread of gloo that still wants the interpreter can abort a regular exit
    sys.exit(exit_code)
