"""The unlimited track of NanoGPT Slowrun: the lowest validation loss from 100M tokens of FineWeb, with any compute.

    python prepare_data.py                                       # once: writes fineweb_data/
    torchrun --standalone --nproc_per_node=8 unlimited/train.py  # the record. Published: 2.987, 80 h on 5 nodes
    python unlimited/train.py --demo                             # toy size; before it, prepare_data.py --source demo

An ensemble. Chains of snapshots are trained independently, each by a group of processes (of a machine, unless
--processes-per-chain says): a cycle of the learning rate gives a snapshot, noise on the weights begins the next, and
after some cycles the last snapshot teaches. Weights of all snapshots are learned on documents kept from training, and
their probabilities averaged. How many groups there are does not change the result. Every field of Config is a flag: see
--help. A run writes runs/<name>/, and one that was stopped or killed goes on with --resume runs/<name>. What the
root's train.py and model.py have too is marked as copied.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import gc
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
from bisect import bisect_right
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

TRACK = "unlimited"
SCRIPT_FILES = ("train.py",)  # what a run folder keeps as code/
# Copied from train.py: VIRTUAL_RANKS
VIRTUAL_RANKS = 8
# Copied from model.py: Weights
Weights = dict[str, dict[str, Tensor]]  # compute weights by unit ("io", "h.0", ..., "mtp_block") and name


# Copied from model.py: require
def require(ok: bool, message: str) -> None:
    """For what a user can get wrong."""
    if not ok:
        raise ValueError(message)


# ======================================================================================================================
# Config
# ======================================================================================================================


# Adapted from model.py: GPTConfig -- the track's own numbers
@dataclass(frozen=True)
class GPTConfig:
    """What a model of the ensemble is. The defaults are those of the current record, 1.9B parameters."""

    vocab_size: int = 50257  # token ids of the data; the tables have this rounded up to a multiple of 64
    sequence_len: int = 2048  # tokens in a training or validation sequence
    n_layer: int = 30  # transformer blocks; even if there is a U-Net, which pairs them
    n_head: int = 16  # attention heads
    n_embd: int = 2048  # width of the residual stream
    window_pattern: str = "SSSL"  # attention windows by layer, repeated: S = T/2, L = T; the last layer is always L
    logit_cap: float = 15.0  # soft cap of the logits, cap * tanh(logits / cap)
    mtp_weight: float = 0.3  # weight of the loss on the token after next (0: no such block)
    dropout: float = 0.1  # on the outputs of attention and MLP
    stochastic_depth: float = 0.0  # probability that the last layer is dropped; linear in the layer, 0 at the first
    replay_start: int = 15  # first layer that layer replay repeats; in the decoder, the second half of the layers
    replay_end: int = 25  # one past the last layer that layer replay repeats
    replay_loops: int = 4  # how often layer replay repeats them
    mlp: Literal["swiglu", "relu2"] = "swiglu"  # relu2: squared ReLU, of width 4C
    value_embedding: Literal["projection", "table"] = "projection"  # table: looked up by token
    u_net: bool = True  # skips from the first half of the layers to the second
    head_gates: bool = True  # a gate on the output of each attention head
    head_mixes: bool = True  # interleaved head attention
    exclusive: bool = False  # exclusive self-attention
    proj_init: Literal["normal", "zero"] = "normal"  # how every c_proj starts

    # Copied from model.py: GPTConfig.__post_init__
    def __post_init__(self):
        check_model(self)

    # Copied from model.py: GPTConfig.padded_vocab
    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // 64) * 64

    # Copied from model.py: GPTConfig.hidden
    @property
    def hidden(self) -> int:
        """Width of the MLP: 4C, or for SwiGLU, which has a matrix more, 8/3 C rounded up to a multiple of 256."""
        return 4 * self.n_embd if self.mlp == "relu2" else -(-(8 * self.n_embd // 3) // 256) * 256

    # Copied from model.py: GPTConfig.mlp_elements
    @property
    def mlp_elements(self) -> int:
        """Elements of the MLP's matrices."""
        return (2 if self.mlp == "relu2" else 3) * self.n_embd * self.hidden

    # Copied from model.py: GPTConfig.window
    def window(self, i: int) -> int:
        """How many positions back layer i attends, besides its own."""
        short = self.window_pattern[i % len(self.window_pattern)] == "S" and i < self.n_layer - 1
        return self.sequence_len // 2 if short else self.sequence_len

    # Copied from model.py: GPTConfig.has_value_embedding
    def has_value_embedding(self, i: int) -> bool:
        return i % 2 == (self.n_layer - 1) % 2

    # Copied from model.py: GPTConfig.layer_order
    def layer_order(self, replay: bool) -> list[int]:
        """Layers in the order in which they run, replayed ones repeated."""
        replayed = list(range(self.replay_start, self.replay_end)) * (self.replay_loops if replay else 0)
        return [*range(self.replay_end), *replayed, *range(self.replay_end, self.n_layer)]


# Copied from model.py: check_model
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


# Adapted from train.py: Config -- chains of snapshots instead of epochs and a time cap
@dataclass(frozen=True)
class Config(GPTConfig):
    """How the ensemble is trained. The defaults, with those of GPTConfig, are the current record."""

    data_dir: str = "fineweb_data"  # folder with fineweb_train.pt, fineweb_val.pt and fineweb_holdout.pt
    val_sequences: int = 4880  # sequences of the validation set, and of the holdout, that are scored at most
    fitness_tokens: int = 132000  # whole documents, up to so many tokens, are kept from training to weigh members by
    chains: int = 5  # models that are trained independently of each other; chain c has seed + c
    cycles: int = 96  # cycles of the learning rate in a chain; the end of each gives a snapshot, a member
    cycle_epochs: int = 2  # passes over the training data in a cycle
    first_cycle_epochs: int = 0  # those of the first cycle (0: cycle_epochs)
    members: Literal["snapshots", "independent"] = "snapshots"  # a cycle goes on from the last, perturbed; or afresh
    teach_after: int = 8  # cycles after which the last snapshot becomes the teacher of the next (0: never)
    teach_weight: float = 0.45  # of the divergence from the teacher; the other losses have the rest
    teach_temperature: float = 1.2  # of teacher and student in that divergence
    perturb_first: float = 0.25  # noise after the first cycle, in standard deviations of each parameter
    perturb_last: float = 0.05  # noise after the last cycle but one; between them it is half a cosine
    selection: Literal["learned", "uniform"] = "learned"  # weights of the members, from the fitness set; or equal ones
    average: Literal["probability", "logit"] = "probability"  # what of the members is averaged
    leave_out_first: bool = False  # the first member of each chain takes no part in the average
    keep: int = 0  # snapshots of a chain that stay on the disk, by their weight in the chain (0: all); not the record
    processes_per_chain: int = 0  # processes that train a chain together: 1, 2, 4 or 8 (0: those of a machine)
    add_chains: int = 0  # with --resume, of a finished run: train so many chains more
    select_only: bool = False  # with --resume: train nothing, weigh and score what is on the disk
    batch_tokens: int = 524288  # tokens of an optimizer step in the middle half of the cycles
    outer_batch_tokens: int = 393216  # tokens of an optimizer step in the other cycles
    micro_batch: int = 2  # sequences of a micro-step of one of the 8 virtual ranks
    device_batch: int = 0  # sequences of a forward pass: fewer save memory, same mathematics (0: micro_batch)
    eval_batch: int = 2  # sequences of a forward pass in validation, per process
    eval_initial: bool = False  # validate before the first step too
    seed: int = 42  # seed of chain 0: initial weights, dropout, data order, perturbation
    lr_multiplier: float = 0.25  # factor on all learning rates below but mix_lr
    matrix_lr: float = 0.04  # Muon: all matrices but the tables
    embedding_lr: float = 0.15  # AdamW: wte and tables of value embeddings
    head_lr: float = 0.002  # AdamW: lm_head
    scalar_lr: float = 0.1  # AdamW: x0_lambdas; times 0.01, resid_lambdas and skip_weights
    mix_lr: float = 0.02  # AdamW: q_mix, k_mix, v_mix
    weight_decay: float = 1.3  # of matrices and tables, before its schedule
    row_norm: bool = True  # MuonEq-R: Muon gives the rows of a step the same norm before it is made orthogonal
    clip: float = 1.0  # largest norm of the gradient of all parameters (0: not clipped)
    warmdown: float = 1.0  # part of a cycle, at its end, over which the learning rate falls linearly
    lr_low: float = 0.08  # learning rate at the end of a cycle
    decay_low: float = 0.7  # weight decay at the start of a cycle; it rises to 1 as the learning rate falls
    replay_from: float = 0.0  # part of a cycle before layer replay begins (1: never)
    meta_gradient: bool = False  # take the second half of a gradient at a point moved down the first half's
    meta_step: float = 0.5  # length of that move, times the learning rate's schedule
    shuffle: Literal["documents", "micro_steps", "none"] = "documents"  # what each epoch puts in another order
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: CUDA where there is a GPU
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # auto: bfloat16 where the GPU has it
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of layers and optimizer; auto: on CUDA
    attention: Literal["auto", "varlen", "sdpa"] = "auto"  # auto: varlen, flash attention, where the GPU has it
    checkpoint_min: float = 10.0  # minutes between checkpoints, besides those at the ends of cycles
    checkpoints: bool = True  # write checkpoints; without them a run that is stopped begins anew
    profile_steps: str = ""  # steps, counted from 1, that torch.profiler records, such as 4-5 or 4-5,9-9 (empty: none)
    log_every: int = 10  # steps between printed lines
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: where WANDB_API_KEY is set
    runs_dir: str = "runs"  # where run folders are made
    run_name: str = ""  # name of the run folder (empty: track, time and seed)

    time_cap_min = 0.0  # no cap; no setting

    def __post_init__(self):
        super().__post_init__()
        check_config(self)

    # Copied from train.py: Config.micro_steps
    @property
    def micro_steps(self) -> int:
        """Micro-steps of a virtual rank in an optimizer step."""
        return self.batch_tokens // (VIRTUAL_RANKS * self.micro_batch * self.sequence_len)

    # Copied from train.py: Config.halves_batches
    @property
    def halves_batches(self) -> bool:
        """Whether the meta-gradient halves the sequences of a micro-step, as there is only one."""
        return self.meta_gradient and self.micro_steps == 1

    # Copied from train.py: Config.device_rows
    @property
    def device_rows(self) -> int:
        """Sequences of a forward pass in training."""
        rows = self.micro_batch // (1 + self.halves_batches)
        return min(self.device_batch or rows, rows)

    def of_chain(self, chain: int) -> Config:
        """The same, with the seed of a chain, counted from 0."""
        return dataclasses.replace(self, seed=self.seed + chain)


# Copied from train.py: profile_ranges
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


# Adapted from train.py: check_config -- chains of cycles, batches of two sizes
def check_config(c: Config) -> None:
    """Refuse settings that do not go together (ValueError)."""
    profile_ranges(c.profile_steps)
    positive = ["chains", "cycles", "cycle_epochs", "batch_tokens", "outer_batch_tokens", "micro_batch", "eval_batch"]
    positive += ["val_sequences", "fitness_tokens", "log_every", "teach_temperature"]
    least_0 = ["first_cycle_epochs", "teach_after", "keep", "processes_per_chain", "add_chains", "device_batch", "seed"]
    for name in [*positive, *least_0, "perturb_first", "perturb_last", "clip", "meta_step"]:
        value = getattr(c, name)
        fits = value > 0 if name in positive else value >= 0
        require(
            fits, f"--{name.replace('_', '-')} is {value}: it must be {'positive' if name in positive else '0 or more'}"
        )
    group = VIRTUAL_RANKS * c.micro_batch * c.sequence_len
    for name in ("batch_tokens", "outer_batch_tokens"):
        value = getattr(c, name)
        require(
            value % group == 0,
            f"{name} {value} is not a multiple of {VIRTUAL_RANKS} virtual ranks x micro_batch {c.micro_batch} x "
            f"sequence_len {c.sequence_len} = {group}: change --{name.replace('_', '-')}",
        )
        require(
            not c.meta_gradient or value // group % 2 == 0,
            f"the meta-gradient cannot halve {value // group} micro-step(s): make them even with "
            f"--{name.replace('_', '-')} or --micro-batch, or give --no-meta-gradient",
        )
    fits = c.micro_batch % c.device_rows == 0  # all passes have one shape
    require(fits, f"device_batch {c.device_batch} does not divide micro_batch, {c.micro_batch}: change --device-batch")
    for name in ("teach_weight", "warmdown", "replay_from", "decay_low"):
        require(0 <= getattr(c, name) <= 1, f"--{name.replace('_', '-')} {getattr(c, name)} is not in [0, 1]")
    require(0 <= c.lr_low < 1, f"--lr-low {c.lr_low} is not in [0, 1)")
    per = c.processes_per_chain
    require(not per or VIRTUAL_RANKS % per == 0, f"--processes-per-chain is {per}: it must be 1, 2, 4 or 8")
    learned = c.selection == "learned"
    require(
        not learned or c.average == "probability",
        "--average logit needs --selection uniform: weights are learned for the average of probabilities",
    )
    require(not c.keep or learned, "--keep needs --selection learned: what goes is chosen by its weight")
    require(not c.leave_out_first or c.cycles > 1, "--leave-out-first leaves nothing of a single cycle: raise --cycles")
    plain = Path(c.run_name).name == c.run_name != ".."
    require(plain, f"--run-name {c.run_name} is not the name of a folder: --runs-dir says where it is made")


# Adapted from train.py: DEMO -- an ensemble
DEMO = {  # --demo: every technique, at a size that two CPU cores train in less than three minutes
    "data_dir": "demo_data", "vocab_size": 257, "sequence_len": 128, "n_layer": 4, "n_head": 2, "n_embd": 64,
    "replay_start": 2, "replay_end": 3, "replay_loops": 1, "chains": 2, "cycles": 3, "cycle_epochs": 1,
    "teach_after": 2, "fitness_tokens": 16000, "batch_tokens": 8192, "outer_batch_tokens": 4096, "micro_batch": 4,
    "eval_batch": 16, "val_sequences": 248, "lr_multiplier": 1.0, "weight_decay": 0.3, "dropout": 0.05,
    "compile": "off", "processes_per_chain": 1,
}  # fmt: skip


# Adapted from train.py: RESUME_MAY_CHANGE -- how chains are spread, and how members are weighed
RESUME_MAY_CHANGE = {  # these do not change the training
    "data_dir", "eval_batch", "checkpoint_min", "checkpoints", "log_every", "profile_steps", "wandb",
    "processes_per_chain", "add_chains", "select_only", "selection", "average", "leave_out_first",
}  # fmt: skip


# Copied from train.py: field_types
@cache
def field_types() -> dict[str, type]:
    """The type of each field of Config, by name."""
    return typing.get_type_hints(Config)


# Copied from train.py: field_comments
@cache
def field_comments() -> dict[str, str]:
    """The comment behind each field of Config, by name."""
    comments = {}
    for cls in reversed(Config.__mro__[:-1]):
        comments |= dict(re.findall(r"^    (\w+): .+?  # (.+)$", inspect.getsource(cls), re.MULTILINE))
    return comments


# Copied from train.py: records_folder
def records_folder() -> Path:
    """records/<track> of the repository that this script is in; ValueError if it is elsewhere, as in a run folder."""
    found = [folder / "records" / TRACK for folder in Path(__file__).resolve().parents[:2]]
    there = [folder for folder in found if (folder / "records.json").exists()]
    require(bool(there), f"{found[0]} not found: --record and --list-records need the repository's own script")
    return there[0]


# Copied from train.py: settings_files
def settings_files(folder: Path) -> list[tuple[int, Path]]:
    """(Number, file) of the records in records/<track> that --record can train."""
    return [(int(path.name[:2]), path) for path in sorted(folder.glob("[0-9][0-9]-*.json"))]


# Copied from train.py: list_records
def list_records() -> str:
    """The track's records, a line each."""
    folder, lines = records_folder(), ["number, validation loss, time, change; --record trains those with a star"]
    known = dict(settings_files(folder))
    for entry in read_json(folder / "records.json", {"records"}, "restore it")["records"]:
        star = "*" if entry["number"] in known else " "
        minutes = f"{'~' * entry['time_is_approximate']}{entry['minutes']:g} min"
        lines.append(f"{star}{entry['number']:3}  {entry['val_loss']:.3f}  {minutes:>10}  {entry['change']}")
    return "\n".join(lines)


# Adapted from train.py: toy_settings -- chains and cycles
def toy_settings(settings: dict) -> dict:
    """DEMO's values beside a record's settings: its sizes. There are no more chains and cycles than the record has."""
    toy = DEMO | {"first_cycle_epochs": 0}
    toy |= {name: min(DEMO[name], settings[name]) for name in ("chains", "cycles", "teach_after") if name in settings}
    if settings.get("outer_batch_tokens") == Config.batch_tokens:
        toy["outer_batch_tokens"] = toy["batch_tokens"]
    return toy


# Copied from train.py: read_record
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


# Copied from train.py: parse_arguments
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


# Copied from train.py: World
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


# Adapted from train.py: check_world_size -- processes form groups, one for a chain
def check_world_size(size: int) -> None:
    """Any number of processes can share chains; see chain_world."""


def group_size(world: World, processes_per_chain: int) -> int:
    """Processes that train a chain together; ValueError if they cannot form such groups."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    size = processes_per_chain or here
    fits = VIRTUAL_RANKS % size == 0 and world.size % size == 0
    said = (
        f"{world.size} processes, {here} on a machine, cannot form groups of {size} with {VIRTUAL_RANKS} virtual ranks"
    )
    require(fits, f"{said} each: give --processes-per-chain 1, 2, 4 or 8, a divisor of their number")
    return size


def chain_world(world: World, size: int) -> World:
    """The group of processes, of consecutive ranks, this one among them, that trains a chain; collective."""
    if world.size == 1:
        return world
    firsts, backend = range(0, world.size, size), dist.get_backend_config()
    groups = [dist.new_group([*range(first, first + size)], backend=backend) for first in firsts]
    return World(world.rank % size, size, world.device, groups[world.rank // size])


# Copied from train.py: set_up_world
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
# Model: the forward pass, as functions of compute weights
# ======================================================================================================================


# Modules only own parameters, the float32 "masters". The forward pass is a chain of plain functions that read compute
# weights: the masters after all that depends on weights alone, which is mixing the heads, stacking q, k and v (gate and
# up) into one matrix, and rounding to bfloat16. Training makes them once per gradient (ComputeWeights), not per pass.
#
# Notation: B sequences, T positions, C = n_embd, H = n_head, D = C / H, V = vocab_size, L = n_layer.


# Copied from model.py: norm
def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without learned gain (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


# Copied from model.py: _DROPOUT
_DROPOUT = f"slowrun_{__name__.replace('.', '_')}::dropout"  # each module needs its own name


# Copied from model.py: _dropout
@torch.library.custom_op(_DROPOUT, mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return torch.native_dropout(x, p, True)


# Copied from model.py: _dropout_fake
@_dropout.register_fake
def _dropout_fake(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


# Copied from model.py: _dropout_setup
def _dropout_setup(ctx, inputs, output) -> None:
    ctx.p = inputs[1]
    ctx.save_for_backward(output[1])


# Copied from model.py: _dropout_backward
@partial(_dropout.register_autograd, setup_context=_dropout_setup)
def _dropout_backward(ctx, grad, _):
    return grad * ctx.saved_tensors[0] * (1 / (1 - ctx.p)), None


# Copied from model.py: dropout
def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout (arXiv 1207.0580); the identity for p = 0.

    An operator of its own: compiled graphs then call ATen's kernel and draw the same numbers as the uncompiled model.
    Inductor's replacement can corrupt masks in torch 2.13 (pytorch issue 198333).
    """
    return _dropout(x, p)[0] if p else x


# Copied from model.py: rotary_tables
def rotary_tables(length: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin of the rotary embedding, base 10000 (arXiv 2104.09864) -> 2 x (length, 1, D / 2), float32 or wider."""
    dtype = torch.promote_types(dtype, torch.float32)
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim)
    angles = torch.arange(length, device=device, dtype=dtype)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


# Copied from model.py: rotate
def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, T, H, D), its halves the two coordinates of the rotated planes -> (B, T, H, D), float32 or wider."""
    cos, sin = rotary
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


# Copied from model.py: attend
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


# Copied from model.py: exclude_own_value
def exclude_own_value(y: Tensor, v: Tensor, strength: Tensor | float) -> Tensor:
    """Exclusive self-attention (arXiv 2603.09078): y loses a share of its part along the position's own value.

    y, v (B, T, H, D), strength: that share, one number or (H, 1) float32 or wider -> (B, T, H, D).
    """
    unit = F.normalize(v, dim=-1, eps=1e-4)
    along = (y * unit).sum(-1, keepdim=True) * unit
    return (y - strength * along).to(y.dtype)


# Copied from model.py: attention
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


# Copied from model.py: mlp
def mlp(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """SwiGLU (arXiv 2002.05202), or without a gate squared ReLU (arXiv 2109.08668): (B, T, C) -> (B, T, C)."""
    if "gate_up" in w:
        gate, up = F.linear(x, w["gate_up"]).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    else:
        hidden = F.relu(F.linear(x, w["up"])).square()
    return F.linear(hidden, w["mlp_proj"])


# Copied from model.py: block
def block(w: dict[str, Tensor], x: Tensor, ve: Tensor | None, rotary, *, dropout_p: float, **settings) -> Tensor:
    """Attention and MLP, each on the normed stream and added to it: (B, T, C) -> (B, T, C)."""
    x = x + dropout(attention(w, norm(x), ve, rotary, **settings), dropout_p)
    return x + dropout(mlp(w, norm(x)), dropout_p)


# Copied from model.py: layer
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


# Copied from model.py: value_embedding
def value_embedding(w: dict[str, Tensor], i: int, tokens: Tensor, x0: Tensor) -> Tensor:
    """What is added to the values of layer i, by tokens (B, T) or their embedding x0 (B, T, C) -> (B, T, C)."""
    return F.linear(x0, w[f"ve_proj.{i}"]) if f"ve_proj.{i}" in w else F.embedding(tokens, w[f"ve_table.{i}"])


# Copied from model.py: mtp_layer
def mtp_layer(w: dict[str, Tensor], z: Tensor, rotary, *, dropped: bool, **settings) -> Tensor:
    """The block behind the prediction of the token after next: (B, T - 1, C) -> (B, T - 1, C), normed."""
    return norm(z if dropped else block(w, z, None, rotary, **settings))


# Copied from model.py: capped_logits
def capped_logits(x: Tensor, lm_head: Tensor, vocab_size: int, cap: float) -> Tensor:
    """x (..., C) -> soft-capped logits (..., V), float32 or wider (arXiv 2408.00118)."""
    logits = F.linear(x, lm_head)[..., :vocab_size]
    return cap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap)


# Copied from model.py: cross_entropy
def cross_entropy(x: Tensor, lm_head: Tensor, targets: Tensor, vocab_size: int, cap: float) -> Tensor:
    """x (B, T, C), targets (B, T) int64 -> (B, T) float32 or wider, nats."""
    logits = capped_logits(x, lm_head, vocab_size, cap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


# Copied from model.py: CHUNK
CHUNK = 4096  # positions whose logits exist at a time in training on a GPU: enough to keep it busy
# Copied from model.py: CHUNK_ON_CPU
CHUNK_ON_CPU = 128  # the same on a CPU: few enough to stay in its caches


# Copied from model.py: capped_cross_entropy
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


# Copied from model.py: head_chunk
def head_chunk(x: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, vocab_size: int, cap: float):
    """x (n, C), lm_head (padded V, C) -> the losses of capped_cross_entropy, their gradients by x and by lm_head."""
    loss, first_loss, grad = capped_cross_entropy(F.linear(x, lm_head), targets, weights, vocab_size, cap)
    return loss, first_loss, grad @ lm_head, grad.T @ x


def capped_distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    teach_weight: float,
    temperature: float,
    vocab_size: int,
    cap: float,
):
    """Cross-entropy and divergence from a teacher of n positions, and their gradient by the logits before their cap.

    logits, teacher_logits (n, padded V), targets (n,) int64 -> sums over the positions: (1 - teach_weight) * nats +
    teach_weight * temperature^2 * KL(teacher || student), both capped and divided by the temperature in KL, and that of
    nats alone, both () float32 or wider; the gradient of the former (n, padded V) in the logits' dtype, rounded once.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    bent, taught = (torch.tanh(values[:, :vocab_size].to(wide) / cap) for values in (logits, teacher_logits))
    log_probs, soft, taught = (
        (cap / t * b).log_softmax(-1) for b, t in ((bent, 1), (bent, temperature), (taught, temperature))
    )
    nats = -log_probs.gather(1, targets[:, None]).sum()
    divergence = (taught.exp() * (taught - soft)).sum()
    is_target = torch.arange(vocab_size, device=targets.device) == targets[:, None]
    grad = (1 - teach_weight) * (log_probs.exp() - is_target.to(wide))
    grad = (grad + teach_weight * temperature * (soft.exp() - taught.exp())) * (1 - bent.square())
    grad = F.pad(grad.to(logits.dtype), (0, logits.size(1) - vocab_size))
    return (1 - teach_weight) * nats + teach_weight * temperature**2 * divergence, nats, grad


def taught_head_chunk(
    x: Tensor, lm_head: Tensor, targets: Tensor, teacher_x: Tensor, *, teacher_head: Tensor, **settings
):
    """As head_chunk, with a teacher: x, teacher_x (n, C), lm_head, teacher_head (padded V, C), targets (n,)."""
    logits = F.linear(x, lm_head), F.linear(teacher_x, teacher_head)
    loss, nats, grad = capped_distillation(*logits, targets, **settings)
    return loss, nats, grad @ lm_head, grad.T @ x


# Copied from model.py: HeadLoss
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


# Copied from model.py: draw_dropped
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


# ----------------------------------------------------------------------------------------------------------- parameters


# Copied from model.py: Attention
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


# Copied from model.py: MLP
class MLP(nn.Module):
    """Parameters of an MLP."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.hidden, bias=False) if config.mlp == "swiglu" else None
        self.c_fc = nn.Linear(config.n_embd, config.hidden, bias=False)
        self.c_proj = nn.Linear(config.hidden, config.n_embd, bias=False)


# Copied from model.py: Block
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


# Copied from model.py: mix_heads
def mix_heads(weight: Tensor, mix: Tensor | None) -> Tensor:
    """Interleaved Head Attention (arXiv 2602.21371): W_mixed[h] = sum_m mix[h, m] W[m], W[m] the D rows of head m."""
    return weight if mix is None else (mix @ weight.view(mix.size(1), -1)).view_as(weight)


# Copied from model.py: take_gradient
def take_gradient(total: Tensor, leaf: Tensor) -> None:
    """Add a leaf's gradient to a sum and drop it, as soon as it is there (a hook).

    The sum may be of a wider dtype; a .grad of another dtype than its tensor's, grad_dtype, cannot be compiled.
    """
    total.add_(leaf.grad)
    leaf.grad = None


# Copied from model.py: ComputeWeights
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


@torch.no_grad()
def snapshot_weights(model: GPT, snapshot: dict[str, Tensor], dtype: torch.dtype) -> Weights:
    """The compute weights of a snapshot, parameters by name; model: whose parameters have these names."""
    names, wide = {p: name for name, p in model.named_parameters()}, torch.promote_types(dtype, torch.float32)

    def part(master: nn.Parameter, mix: nn.Parameter | None) -> Tensor:
        return mix_heads(snapshot[names[master]].to(wide), None if mix is None else snapshot[names[mix]].to(wide))

    def weight(parts: list) -> Tensor:
        whole = torch.cat([part(*of) for of in parts])
        return whole.to(dtype) if whole.ndim == 2 else whole

    return {unit: {name: weight(parts) for name, parts in ws.items()} for unit, ws in model.sources().items()}


# ------------------------------------------------------------------------------------------------------------------ GPT


# Adapted from model.py: GPT -- a teacher
class GPT(nn.Module):
    """Decoder-only transformer with U-Net skips, value embeddings, mixed and gated heads, layer replay and MTP."""

    # Copied from model.py: GPT.__init__
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

    # Copied from model.py: GPT.init_weights
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

    _taught_head_chunk = staticmethod(taught_head_chunk)

    # Adapted from model.py: GPT.compile_layers -- the head with a teacher too
    def compile_layers(self) -> None:
        """Compile per layer: layers of a kind share one graph, and gradients become available during backward."""
        functions = (layer, mtp_layer, cross_entropy, head_chunk, taught_head_chunk)
        self._layer, self._mtp_layer, self._cross_entropy, self._head_chunk, self._taught_head_chunk = (
            torch.compile(function, dynamic=False, fullgraph=True) for function in functions
        )

    # Copied from model.py: GPT.sources
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

    # Copied from model.py: GPT.weights
    def weights(self) -> Weights:
        """Compute weights made on the fly: in the masters' dtype, differentiable with respect to them."""
        return {
            unit: {name: torch.cat([mix_heads(*part) for part in parts]) for name, parts in weights.items()}
            for unit, weights in self.sources().items()
        }

    # Copied from model.py: GPT.rotary
    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """The tables for `length` positions, made once per device and dtype."""
        where, config = (self.x0_lambdas.device, self.x0_lambdas.dtype), self.config
        if where not in self._rotary:
            self._rotary[where] = rotary_tables(config.sequence_len, config.n_embd // config.n_head, *where)
        cos, sin = self._rotary[where]
        return cos[:length], sin[:length]

    # Copied from model.py: GPT._settings
    def _settings(self, window: int) -> dict:
        settings = {"window": window, "exclusive": self.config.exclusive, "backend": self.backend}
        return settings | {"n_head": self.config.n_head, "dropout_p": self.config.dropout if self.training else 0.0}

    # Copied from model.py: GPT.trunk
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

    # Adapted from model.py: GPT.training_loss -- a teacher
    def training_loss(
        self, tokens: Tensor, targets: Tensor, w: Weights | None = None, *, replay=False, dropped=None, teacher=None
    ) -> tuple[Tensor, Tensor]:
        """Mean next-token loss plus mtp_weight times that of the token after next (one extra block, arXiv 2412.19437).

        With a teacher, its compute weights, this has the weight 1 - teach_weight, and the divergence from the teacher's
        predictions of the next token has the rest (distillation, arXiv 1503.02531).
        tokens, targets (B, T) int64 -> (this sum, the next-token loss), both () float32 or wider, nats per token.
        """
        config, w = self.config, w or self.weights()
        x, own_share = self.trunk(w, tokens, replay, dropped), 1.0
        if teacher is None:
            lm_loss = loss = self.head_loss(w, x, targets)
        else:
            own_share = 1.0 - config.teach_weight
            loss, lm_loss = self.taught_loss(w, x, targets, teacher, self.stream_of(teacher, tokens))
        if not config.mtp_weight:
            return loss, lm_loss
        return loss + own_share * config.mtp_weight * self.mtp_loss(w, x, targets, dropped), lm_loss

    # Copied from model.py: GPT.mtp_loss
    def mtp_loss(self, w: Weights, x: Tensor, targets: Tensor, dropped: list[bool] | None) -> Tensor:
        """Mean loss on the token after next: final stream x (B, T, C), targets (B, T) -> (), nats per token."""
        next_embedding = norm(F.embedding(targets[:, :-1], w["io"]["wte"]))
        z = F.linear(torch.cat([x[:, :-1], next_embedding], dim=-1), w["io"]["mtp_proj"])  # of (B, T - 1, 2 C)
        is_dropped, settings = dropped is not None and dropped[-1], self._settings(self.config.sequence_len)
        z = self._mtp_layer(w["mtp_block"], z, self.rotary(z.size(1)), dropped=is_dropped, **settings)
        return self.head_loss(w, z, targets[:, 1:])

    @torch.no_grad()
    def stream_of(self, teacher: Weights, tokens: Tensor) -> Tensor:
        """The final stream (B, T, C) of a teacher: without dropout, with replay as at the end of its cycle."""
        training = self.training
        self.eval()
        x = self.trunk(teacher, tokens, replay=self.config.replay_from < 1)
        self.train(training)
        return x

    def taught_loss(self, w: Weights, x: Tensor, targets: Tensor, teacher: Weights, teacher_x: Tensor):
        """x, teacher_x (B, T, C), targets (B, T) -> (weighted sum of cross-entropy and divergence, cross-entropy)."""
        c = self.config
        settings = {"teach_weight": c.teach_weight, "temperature": c.teach_temperature}
        settings |= {"vocab_size": c.vocab_size, "cap": c.logit_cap}
        chunk = partial(self._taught_head_chunk, teacher_head=teacher["io"]["lm_head"], **settings)
        positions = (targets.flatten(), teacher_x.flatten(0, 1))
        losses = HeadLoss.apply(x.flatten(0, 1), w["io"]["lm_head"], chunk, *positions)
        return tuple(loss / targets.numel() for loss in losses)

    # Copied from model.py: GPT.head_loss
    def head_loss(self, w: Weights, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, as a part of the training loss: x (B, T, C), targets (B, T) -> (), nats per token."""
        settings = {"vocab_size": self.config.vocab_size, "cap": self.config.logit_cap}
        weights = torch.ones(1, dtype=self.x0_lambdas.dtype, device=x.device)
        chunk = partial(self._head_chunk, weights=weights, **settings)
        return HeadLoss.apply(x.flatten(0, 1), w["io"]["lm_head"], chunk, targets.reshape(-1, 1))[0] / targets.numel()

    # Copied from model.py: GPT.token_losses
    def token_losses(self, tokens: Tensor, targets: Tensor, w: Weights | None = None, **how) -> Tensor:
        """Next-token cross-entropy, not reduced: tokens, targets (B, T) int64 -> (B, T) float32 or wider, nats."""
        w = w or self.weights()
        x = self.trunk(w, tokens, **how)
        return self._cross_entropy(x, w["io"]["lm_head"], targets, self.config.vocab_size, self.config.logit_cap)

    # Copied from model.py: GPT.log_probs
    def log_probs(self, tokens: Tensor, w: Weights | None = None, **how) -> Tensor:
        """tokens (B, T) int64 -> log-probabilities of the next token (B, T, V), float32 or wider."""
        w = w or self.weights()
        x = self.trunk(w, tokens, **how)
        return capped_logits(x, w["io"]["lm_head"], self.config.vocab_size, self.config.logit_cap).log_softmax(-1)


# Copied from model.py: build
def build(config: GPTConfig, device: torch.device, dtype: torch.dtype, **kernels: str) -> GPT:
    """A model for a device, its parameters not filled yet: float32 or wider, embeddings of the compute dtype."""
    with torch.device("meta"):
        model = GPT(config, **kernels).to(torch.promote_types(dtype, torch.float32))
        for table in (model.transformer.wte, model.ve_tables):
            table.to(dtype)
    return model.to_empty(device=device)


# --------------------------------------------------------------- on a machine: precision, attention, operations, memory


# Copied from model.py: PEAK_FLOPS
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, by device name


# Copied from model.py: device_name
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


# Copied from model.py: peak_flops
def peak_flops(device: torch.device) -> float | None:
    """Peak operations per second, to measure the utilization (MFU) by; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name(device)), None)


# Copied from model.py: has_bfloat16
def has_bfloat16(device: torch.device) -> bool:
    """Whether the device is a GPU with bfloat16 in hardware, and so runs flash attention: compute capability 8.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


# Copied from model.py: choose_attention
def choose_attention(wanted: str, config: GPTConfig, device: torch.device, dtype: torch.dtype) -> str:
    """A backend of `attend`: varlen where it runs, else sdpa; ValueError if varlen is wanted and does not run."""
    D = config.n_embd // config.n_head
    able = has_bfloat16(device) and dtype == torch.bfloat16 and D <= 256 and D % 8 == 0
    needs = "a GPU of compute capability 8.0, bfloat16, and heads of 8, 16, ... 256 channels"
    require(able or wanted != "varlen", f"--attention varlen needs {needs}")
    return wanted if wanted != "auto" else "varlen" if able else "sdpa"


# Copied from model.py: attention_error
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


# Copied from train.py: compute_dtype
def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Of the forward and backward pass: bfloat16 where the GPU has it, else float32, unless --dtype says."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


# Copied from train.py: KERNELS
KERNELS = {"attention": ("sdpa", "varlen", 0.05, attention_error)}


# Copied from train.py: choose_kernels
def choose_kernels(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What computes where there is a choice, as keyword arguments of GPT; ValueError if what is wanted does not run."""
    return {"attention": choose_attention(config.attention, config, device, dtype)}


# Copied from train.py: check_kernels
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


# Copied from model.py: flops_per_token
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


# Copied from train.py: parameter_counts
@cache
def parameter_counts(config: Config) -> tuple[int, float, int]:
    """-> (All parameters, those of the average block of the trunk, those of tables)."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in GPT(config).named_parameters()}
    blocks = sum(size for name, size in sizes.items() if name.startswith("transformer.h."))
    tables = 2 * config.padded_vocab * config.n_embd
    tables += sum(size for name, size in sizes.items() if name.startswith("ve_tables."))
    return sum(sizes.values()), blocks / config.n_layer, tables


# Copied from train.py: layer_bytes
def layer_bytes(config: Config, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of a layer, per position."""
    return (13 * config.n_embd + 3 * config.hidden) * dtype.itemsize + 2 * config.n_embd


# Adapted from train.py: held_bytes -- a teacher
def held_bytes(config: Config, world_size: int, dtype: torch.dtype, layers: int | None = None) -> dict[str, float]:
    """Bytes that a process holds, by what they are; activations and logits are an estimate.

    layers: calls of a layer that backward goes through (None: the most of any stage).
    """
    C, V, (total, _, tables) = config.n_embd, config.padded_vocab, parameter_counts(config)
    positions, taught = config.device_rows * config.sequence_len, 0 < config.teach_after < config.cycles
    layers = len(config.layer_order(replay=config.replay_from < 1)) if layers is None else layers
    return {
        "weights": (4 + dtype.itemsize * (1 + taught)) * total,  # masters, compute weights, the teacher's
        "gradients": 4 * (2 * total + (total - tables) * config.meta_gradient),  # two, and a moved copy
        "optimizer": 4 * (total + tables) / world_size,  # AdamW keeps two moments, of the tables, Muon one
        "activations": positions * layer_bytes(config, dtype) * layers,
        "logits": min(CHUNK, positions) * V * (2 * dtype.itemsize + 16) * (1 + taught) + V * C * 8,  # of a chunk
    }


# Copied from train.py: memory_gib
def memory_gib(config: Config, world_size: int, dtype: torch.dtype) -> tuple[int, float, float]:
    """-> (parameters, GiB of a process for weights, gradients and optimizer, GiB in all, which is an estimate)."""
    held = held_bytes(config, world_size, dtype)
    static = held["weights"] + held["gradients"] + held["optimizer"]
    return parameter_counts(config)[0], static / 2**30, sum(held.values()) / 2**30


# Copied from train.py: check_memory
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


# Copied from train.py: disk_gib
def disk_gib(config: Config, dtype: torch.dtype) -> tuple[float, float]:
    """GiB of (the weights that the readout keeps of an epoch, a checkpoint: weights and optimizer)."""
    model = build(config, torch.device("meta"), dtype)
    buckets = build_optimizer(config, model, World(0, 1, torch.device("meta")), dtype, compile=False).buckets
    member = sum(p.numel() * member_dtype(name, p, dtype).itemsize for name, p in model.named_parameters())
    tensors = [*model.parameters(), *(part for bucket in buckets for part in bucket.state.values())]
    return member / 2**30, sum(t.numel() * t.itemsize for t in tensors) / 2**30


# Copied from train.py: disk_space
def disk_space(folder: Path) -> tuple[float, float]:
    """GiB that a run has in its folder already, 0 before it begins; GiB that are free on its disk."""
    resumed = folder.rglob("*") if (folder / "config.json").exists() else ()
    sizes = {path.stat().st_ino: path.stat().st_size for path in resumed if path.is_file()}  # links count once
    disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return sum(sizes.values()) / 2**30, shutil.disk_usage(disk).free / 2**30


# Adapted from train.py: disk_needed_gib -- snapshots of all chains, of which one trains
def disk_needed_gib(config: Config, dtype: torch.dtype, running: int = 1, targets: int | None = None) -> float:
    """GiB that a run needs at most: snapshots with their losses, and three checkpoints of each chain that trains.

    running: chains that are trained at a time. targets: whose losses are kept (None: of the official data).
    """
    member, checkpoint = disk_gib(config, dtype)
    snapshots = config.chains * (min(config.keep, config.cycles) or config.cycles)
    if targets is None:
        targets = 2 * config.val_sequences * config.sequence_len + config.fitness_tokens
    checkpoints = 3 * min(running, config.chains) * (checkpoint + member) * config.checkpoints  # the teacher's too
    return snapshots * (member + targets * 4 / 2**30) + checkpoints


# Adapted from train.py: check_disk -- snapshots of all chains
def check_disk(config: Config, dtype: torch.dtype, folder: Path, running: int, targets: int) -> str:
    """Refuse a run that its disk cannot hold; what is in its folder already counts -> what the header says.

    running: chains that are trained at a time. targets: of the fitness set, the validation set and the holdout.
    """
    member, checkpoint = disk_gib(config, dtype)
    snapshots = config.chains * (min(config.keep, config.cycles) or config.cycles)
    checkpoint += member  # of the teacher
    running = min(running, config.chains)
    scores = snapshots * targets * 4 / 2**30
    needed = disk_needed_gib(config, dtype, running, targets)
    there, free = disk_space(folder)
    needed_gib, there_gib, free_gib, scores_gib, *each = (
        f"{gib:,.0f} GiB" if gib >= 100 else f"{gib:.3g} GiB"
        for gib in (needed, there, free, scores, member, checkpoint)
    )
    parts = f"{snapshots:,} snapshots, {each[0]} each in {str(dtype)[6:]}, {scores_gib} of their losses, and three "
    parts += f"checkpoints of {each[1]} for each of the chains that train at a time, {running}"
    if not config.checkpoints:
        parts = f"{snapshots:,} snapshots, {each[0]} each, {scores_gib} of their losses; no checkpoints, so --resume "
        parts += "would begin chains anew"
    said = f"up to {needed_gib} in {folder} ({parts}); {free_gib} are free"
    had = f", and {there_gib} of it are there" if there else ""
    others = "" if there else ", --keep fewer snapshots of a chain, or choose another --runs-dir"
    require(needed - there < free, f"the run needs {said}{had}: make space{others}")
    return said


# ======================================================================================================================
# Optimizer
# ======================================================================================================================


# Copied from train.py: reduce_scatter
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# Copied from train.py: all_gather
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Copied from train.py: POLAR_EXPRESS
POLAR_EXPRESS = (  # coefficients of the five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


# Copied from train.py: optimizer_groups
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


# Copied from train.py: polar_express
def polar_express(x: Tensor) -> Tensor:
    """Approximately the orthogonal factor of each matrix (arXiv 2505.16932): (n, rows, cols) -> the same."""
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + (x @ polynomial if tall else polynomial @ x)
    return x


# Copied from train.py: nesterov
def nesterov(grad: Tensor, momentum: Tensor, mu: Tensor) -> Tensor:
    """Updates the momentum in place -> the direction that looks ahead of it."""
    momentum.copy_(mu * momentum + (1 - mu) * grad)
    return (1 - mu) * grad + mu * momentum


# Copied from train.py: orthogonal_step
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


# Copied from train.py: muon_update
def muon_update(p, grad, momentum, second, lr, weight_decay, mu, dtype: torch.dtype, row_norm: bool) -> None:
    """A Muon step, in place: see orthogonal_step. row_norm: rows of norm 1 before it, MuonEq-R (arXiv 2603.28254)."""
    u = nesterov(grad, momentum, mu)
    if row_norm:
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    orthogonal_step(p, u, second, lr, weight_decay, dtype)


# Copied from train.py: adamw_update
def adamw_update(p, grad, exp_avg, exp_avg_sq, lr, weight_decay, beta1, beta2, step) -> None:
    """An AdamW step, in place (arXiv 1711.05101): arguments (n,) or (), `step` counted from 1. It decays first."""
    exp_avg.copy_(beta1 * exp_avg + (1 - beta1) * grad)
    exp_avg_sq.copy_(beta2 * exp_avg_sq + (1 - beta2) * grad.square())
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + 1e-10
    p.copy_(p.to(grad.dtype) * (1 - lr * weight_decay) - lr * (exp_avg / (1 - beta1**step)) / denominator)


# Copied from train.py: Bucket
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


# Adapted from train.py: MuonAdamW -- gradients are clipped
class MuonAdamW:
    """Muon for matrices, AdamW for tables and scalars, with the state sharded over the processes.

    As in ZeRO-2 (arXiv 1910.02054), every process holds all weights and gradients but the optimizer state of its part
    alone. A step sums the gradients of all buckets onto their owners, clips them by their common norm, then updates the
    own part of each bucket in turn and starts to gather the result, which overlaps with the other updates.
    """

    max_norm = 0.0  # of the gradient of all parameters (0: it is not clipped)

    # Copied from train.py: MuonAdamW.__init__
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

    # Adapted from train.py: MuonAdamW.step -- gradients are clipped
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
        for work in sums:
            work.wait()
        if self.max_norm:  # as torch.nn.utils.clip_grad_norm_ does
            squares = torch.stack([part.square().sum() for part in parts]).sum()
            if sums:
                dist.all_reduce(squares, group=self.world.group)
            scale = (self.max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
            for part in parts:
                part.mul_(scale)
        for i, bucket in enumerate(self.buckets):
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

    # Copied from train.py: MuonAdamW.zero_grad
    def zero_grad(self) -> None:
        for bucket in self.buckets:
            bucket.grads.zero_()

    # Copied from train.py: MuonAdamW.broadcast_values
    def broadcast_values(self) -> None:
        """Give all processes the parameters of the main one; collective."""
        for bucket in self.buckets if self.world.size > 1 else ():
            dist.broadcast(bucket.values, group_src=0, group=self.world.group)

    # Copied from train.py: MuonAdamW.state_dict
    def state_dict(self) -> dict:
        """The whole state by parameter, on the CPU, whatever the number of processes; collective, empty but in main."""
        state: dict[str, dict[str, Tensor]] = {}
        for bucket in self.buckets:
            for key, part in bucket.state.items():
                whole = bucket.whole(part)
                for name in bucket.params if self.world.main else ():
                    state.setdefault(name, {})[key] = bucket.view(whole, name).to("cpu", copy=True)
        return {"steps": self.steps, "state": state} if self.world.main else {}

    # Copied from train.py: MuonAdamW.load_state_dict
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


# Adapted from train.py: build_optimizer -- gradients are clipped
def build_optimizer(config: Config, model: GPT, world: World, dtype: torch.dtype, compile: bool) -> MuonAdamW:
    """The optimizer of a model whose compute dtype is dtype. Muon orthogonalises in bfloat16 on a GPU that has it."""
    groups = optimizer_groups(config, [name for name, _ in model.named_parameters()])
    in_bfloat16 = world.cuda and dtype == torch.bfloat16
    wide = torch.promote_types(dtype, torch.float32)
    optimizer = MuonAdamW(model, groups, world, dtype if in_bfloat16 else wide, compile)
    optimizer.max_norm = config.clip
    return optimizer


# Adapted from train.py: update_weights -- no average of the weights
@torch.no_grad()
def update_weights(optimizer: MuonAdamW, plan: Plan, step: int) -> None:
    """The end of an optimizer step."""
    values = schedule(plan, step)
    optimizer.step(values["lr"], values["weight_decay"], values["momentum"])


# Copied from train.py: add_gradient
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
# Schedules: pure functions of the config and of the step, or the position in a cycle
# ======================================================================================================================


# Adapted from train.py: lr_multiplier -- linear in a cycle
def lr_multiplier(config: Config, position: float) -> float:
    """1, then falling linearly to lr_low over the last part of a cycle; position in the cycle, from 0 to 1."""
    fallen = max(0.0, position - (1 - config.warmdown)) / config.warmdown if config.warmdown else 0.0
    return 1.0 - (1.0 - config.lr_low) * fallen


# Adapted from train.py: weight_decay_multiplier -- against the learning rate
def weight_decay_multiplier(config: Config, position: float) -> float:
    """From decay_low to 1 as the learning rate falls from 1 to lr_low."""
    fallen = (1.0 - lr_multiplier(config, position)) / (1.0 - config.lr_low)
    return config.decay_low + (1.0 - config.decay_low) * fallen


def perturbation_scale(config: Config, cycle: int) -> float:
    """Of the noise after a cycle, counted from 0: half a cosine from perturb_first to perturb_last."""
    last = config.cycles - 2  # the last cycle that another follows
    part = cycle / last if last else 0.0
    return config.perturb_last + (config.perturb_first - config.perturb_last) * (1 + math.cos(math.pi * part)) / 2


# Adapted from train.py: Plan -- cycles of steps, of two batch sizes
@dataclass(frozen=True)
class Plan:
    """What follows for a chain from the config and the number of training sequences of T + 1 tokens."""

    config: Config
    num_sequences: int

    def __post_init__(self):
        c = self.config
        needed = max(c.batch_tokens, c.outer_batch_tokens) // c.sequence_len
        require(
            self.epoch_micro_steps * VIRTUAL_RANKS * c.micro_batch >= needed,
            f"the training data makes {self.num_sequences} sequences of {c.sequence_len} + 1 tokens, an optimizer step "
            f"needs {needed}: use more data, or lower --batch-tokens and --outer-batch-tokens or --sequence-len",
        )

    # Copied from train.py: Plan.epoch_micro_steps
    @property
    def epoch_micro_steps(self) -> int:
        """Micro-steps in an epoch; what does not fill one, of all virtual ranks, is left out."""
        return self.num_sequences // (VIRTUAL_RANKS * self.config.micro_batch)

    def batch_tokens(self, cycle: int) -> int:
        """Tokens of a step of a cycle: batch_tokens in the middle half of the cycles, where a single one is."""
        last = self.config.cycles - 1
        in_the_middle = 2 * (last - abs(2 * cycle - last)) >= last
        return self.config.batch_tokens if in_the_middle else self.config.outer_batch_tokens

    def cycle_steps(self, cycle: int) -> int:
        """Optimizer steps of a cycle."""
        c = self.config
        epochs = c.first_cycle_epochs if cycle == 0 and c.first_cycle_epochs else c.cycle_epochs
        epoch_tokens = self.epoch_micro_steps * VIRTUAL_RANKS * c.micro_batch * c.sequence_len
        return max(1, round(epochs * epoch_tokens / self.batch_tokens(cycle)))

    @cached_property
    def first_steps(self) -> list[int]:
        """The step with which each cycle begins, and the number of steps of the chain."""
        return [0, *accumulate(map(self.cycle_steps, range(self.config.cycles)))]

    @cached_property
    def first_micro_steps(self) -> list[int]:
        """As first_steps, in micro-steps."""
        c = self.config
        group = VIRTUAL_RANKS * c.micro_batch * c.sequence_len
        return [0, *accumulate(self.cycle_steps(i) * self.batch_tokens(i) // group for i in range(c.cycles))]

    @property
    def num_steps(self) -> int:
        return self.first_steps[-1]

    def cycle(self, step: int) -> int:
        """The cycle, from 0, that an optimizer step is in."""
        return bisect_right(self.first_steps, step, hi=self.config.cycles) - 1

    def position(self, step: int) -> float:
        """Where in its cycle a step is, from 0 to 1."""
        first, end = self.first_steps[self.cycle(step) :][:2]
        return (step - first) / (end - first)

    def taught(self, step: int) -> bool:
        """Whether the last snapshot teaches in this step."""
        return 0 < self.config.teach_after <= self.cycle(step) and step < self.num_steps

    # Adapted from train.py: Plan.first_micro_step -- batches of two sizes
    def first_micro_step(self, step: int) -> int:
        """Micro-steps, counted over all epochs, that are done after `step` optimizer steps."""
        cycle, c = self.cycle(step), self.config
        per_step = self.batch_tokens(cycle) // (VIRTUAL_RANKS * c.micro_batch * c.sequence_len)
        return self.first_micro_steps[cycle] + (step - self.first_steps[cycle]) * per_step

    # Copied from train.py: Plan.tokens_done
    def tokens_done(self, step: int) -> int:
        """Tokens that are trained on after `step` optimizer steps."""
        return self.first_micro_step(step) * VIRTUAL_RANKS * self.config.micro_batch * self.config.sequence_len

    # Adapted from train.py: Plan.epochs_done -- cycles
    def epochs_done(self, step: int) -> int:
        """Cycles that are done after `step` optimizer steps: they end where on the other tracks epochs do."""
        return bisect_right(self.first_steps, step) - 1


# Adapted from train.py: stage -- by the position in the cycle
def stage(plan: Plan, step: int) -> dict:
    """What switches, as keyword arguments of the model: layer replay."""
    return {"replay": plan.config.replay_from <= plan.position(step) and plan.config.replay_from < 1}


# Adapted from train.py: stage_name -- a teacher
def stage_name(plan: Plan, step: int) -> str:
    """The stage of a step in a word, as plans and tools name it."""
    without_replay = 0 < plan.config.replay_from < 1 and not stage(plan, step)["replay"]
    return ("teacher" if plan.taught(step) else "student") + "_without_replay" * without_replay


# Adapted from train.py: MEASURED -- no cap, a fitness set
MEASURED = {  # other settings of the runs that short_runs names
    "fitness_tokens": 20000, "val_sequences": 8, "eval_initial": False, "checkpoints": False, "wandb": "off",
}  # fmt: skip


# Adapted from train.py: short_runs -- cycles; a teacher needs one before
def short_runs(config: Config) -> dict[str, dict]:
    """Settings of runs for a measurement: "all" has each stage, the others are of one stage, or have it last."""
    both = {"chains": 1, "cycles": 2, "teach_after": 1, "cycle_epochs": 1, "first_cycle_epochs": 1} | MEASURED
    student = both | {"cycles": 1, "teach_after": 0}
    taught = 0 < config.teach_after < config.cycles
    return {"student": student, "all": both, "teacher": both} if taught else {"student": student, "all": student}


# Adapted from train.py: layer_calls -- a teacher, which only predicts, without the block for the token after next
def layer_calls(plan: Plan, step: int) -> tuple[int, int, float]:
    """-> (Calls of a layer in a forward pass, those that a backward pass follows, calls of the head)."""
    calls, taught = len(plan.config.layer_order(stage(plan, step)["replay"])), plan.taught(step)
    of_the_teacher = taught * len(plan.config.layer_order(replay=plan.config.replay_from < 1))
    return calls + of_the_teacher, calls, 1 + (plan.config.mtp_weight > 0) + 0.5 * taught


# Copied from train.py: stage_changes
def stage_changes(plan: Plan) -> dict[int, str]:
    """The steps from which on other things are switched, the first included, and what the stage then is."""
    said = [", ".join(f"{k} {v}" for k, v in stage(plan, step).items()) for step in range(plan.num_steps)]
    return {step: text for step, text in enumerate(said) if step == 0 or text != said[step - 1]}


# Adapted from train.py: step_flops_per_token -- a teacher, which only predicts
def step_flops_per_token(plan: Plan, step: int) -> float:
    """Floating-point operations of an optimizer step, per token."""
    return flops_with_teacher(plan.config, stage(plan, step)["replay"], plan.taught(step))


@cache  # there are tens of thousands of steps, and four cases
def flops_with_teacher(config: Config, replay: bool, taught: bool) -> float:
    """Of a token in training; a teacher makes a forward pass, without the block for the token after next."""
    teacher = flops_per_token(dataclasses.replace(config, mtp_weight=0.0), replay=config.replay_from < 1) / 3
    return flops_per_token(config, replay) + teacher * taught


# Adapted from train.py: pass_arguments -- a teacher
def pass_arguments(plan: Plan, step: int, micro_step: int) -> dict:
    """What else the training loss needs: the layers that stochastic depth drops, whether there is a teacher."""
    seed = plan.config.seed, step, micro_step
    return {"dropped": draw_dropped(plan.config, stage(plan, step)["replay"], *seed), "taught": plan.taught(step)}


# Adapted from train.py: warm_up_arguments -- a teacher
def warm_up_arguments(config: Config, replay: bool) -> list[dict]:
    """pass_arguments that lead to other graphs: no layer is dropped or all are, without and with a teacher."""
    dropped = [None, [True] * (len(config.layer_order(replay)) + 1)][: 1 + (config.stochastic_depth > 0)]
    taught = [False, True][: 1 + (0 < config.teach_after < config.cycles)]
    return [{"dropped": flags, "taught": flag} for flags in dropped for flag in taught]


# Adapted from train.py: schedule -- by the position in the cycle
def schedule(plan: Plan, step: int) -> dict[str, float]:
    """The values of all schedules at a step."""
    c, position = plan.config, plan.position(step)
    lr = lr_multiplier(c, position)
    return {
        "lr": lr,
        "weight_decay": weight_decay_multiplier(c, position),
        "momentum": 0.95,
        "meta_step": c.meta_step * lr if c.meta_gradient else 0.0,
        "epoch": plan.first_micro_step(step) // plan.epoch_micro_steps + 1,
        "cycle": plan.cycle(step) + 1,
    }


# ======================================================================================================================
# Data
# ======================================================================================================================


# Copied from train.py: SEQ_SHUFFLE_SEEDS
SEQ_SHUFFLE_SEEDS = {"val": 42, "train": 43, "holdout": 44}
# Copied from train.py: OFFICIAL_SHA256
OFFICIAL_SHA256 = {  # the identity of the benchmark
    "val": "6868ed375b289a89c72c2f9df1ecbdcff700c4b9478ca806435d2dbfad8573b1",
    "train": "36e7c95c1e7f6ed952fb002d76a03044e8617fea7e696a68d7dc1ce78465dcaf",
}


# Copied from train.py: Shard
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


# Copied from train.py: sha256_file
def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Copied from train.py: read_meta
def read_meta(data_dir: str) -> dict | None:
    """meta.json, which prepare_data.py writes beside the shards; None where the original project's files have none."""
    path, keys = Path(data_dir) / "meta.json", {"source", "tokenizer", "vocab_size", "splits", "token_bytes"}
    return read_json(path, keys, "prepare the data again, with --force") if path.exists() else None


# Copied from train.py: load_shard
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


# Copied from train.py: load_data
def load_data(config: Config) -> dict[str, Shard]:
    """All splits; the holdout may be missing, as the original project's files have none."""
    splits = ["train", "val"] + ["holdout"] * (Path(config.data_dir) / "fineweb_holdout.pt").exists()
    return {split: load_shard(split, config) for split in splits}


def split_fitness(shard: Shard, config: Config) -> tuple[Shard, Shard]:
    """The training split -> (its first documents, up to fitness_tokens, never trained on; the others)."""
    ends = np.append(shard.doc_starts[1:], len(shard.tokens))
    count = int(np.searchsorted(ends, config.fitness_tokens, side="right"))
    cut, length = int(ends[count - 1]) if count else 0, config.sequence_len + 1
    said = f"the first documents of the training data that have up to {config.fitness_tokens} tokens have {cut}"
    require(cut >= length, f"{said}, a sequence of the fitness set needs {length}: raise --fitness-tokens")
    require(count < len(ends), f"{said}, and nothing is left to train on: lower --fitness-tokens")
    fitness = dataclasses.replace(shard, tokens=shard.tokens[:cut], doc_starts=shard.doc_starts[:count])
    return fitness, dataclasses.replace(shard, tokens=shard.tokens[cut:], doc_starts=shard.doc_starts[count:] - cut)


# Copied from train.py: token_byte_lengths
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


# Adapted from train.py: shuffle_seeds -- each chain has its own order, shuffled from the first epoch on
def shuffle_seeds(config: Config, epoch: int) -> tuple[int | None, int]:
    """Seeds of the permutations of an epoch's documents (None: they stay in order) and of its sequences."""
    return config.seed * 1009 + epoch + 1000, config.seed * 1009 + epoch + 2000


# Copied from train.py: TrainLoader
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


# Copied from train.py: MIXING
MIXING = "probability"  # how the readout mixes its members: it averages their probabilities


# Copied from train.py: EFFICIENCY
EFFICIENCY = ((200, 3.703), (400, 3.370), (600, 3.200), (800, 3.123), (1000, 3.046), (2000, 2.892))  # M tokens, loss


# Copied from train.py: Score
@dataclass(frozen=True)
class Score:
    """Mean nats per target; bits per byte of text, None where the bytes are not known; how many of both."""

    loss: float
    bpb: float | None
    tokens: int
    bytes: int


# Copied from train.py: EvalSet
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


# Copied from train.py: data_efficiency
def data_efficiency(loss: float) -> float | str:
    """How many times 100M tokens a standard pretraining run needs for this loss; a bound outside of the known range."""
    if not loss <= EFFICIENCY[0][1]:
        return "< 2x"
    for (tokens_a, loss_a), (tokens_b, loss_b) in pairwise(EFFICIENCY):
        if loss >= loss_b:
            return round((tokens_a + (loss_a - loss) / (loss_a - loss_b) * (tokens_b - tokens_a)) / 100, 4)
    return "> 20x"


# Copied from train.py: member_dtype
def member_dtype(name: str, p: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which a member of the readout keeps a parameter: matrices as they compute, lambdas and mixes as they are."""
    return p.dtype if p.ndim < 2 or name.endswith("_mix") else dtype


def gather(world: World, part: Tensor, count: int) -> Tensor:
    """Rows r, r + size, ... of a table from each process r -> all its rows (count, T), on the CPU; collective."""
    if world.size == 1:
        return part
    padded = torch.zeros(math.ceil(count / world.size), part.size(1), dtype=part.dtype)
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(parts, padded, group=world.group)
    return torch.stack(parts, dim=1).flatten(0, 1)[:count]


READOUT_SIZES = (8, 16, 32, 64, 128, 256)  # members of the mixtures that are read out; the largest is the declared one


def learn_weights(probabilities: Tensor) -> Tensor:
    """Weights of members by gradient: probabilities (M, N) float64 of the target at N fitness positions -> (M,).

    They are the softmax of what minimises the mixture's mean nats, in 300 steps of AdamW.
    """
    alpha = torch.zeros(len(probabilities), dtype=probabilities.dtype, requires_grad=True)
    optimizer = torch.optim.AdamW([alpha], lr=0.5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for _ in range(300):
        loss = -(alpha.softmax(0) @ probabilities).log().mean()
        (alpha.grad,) = torch.autograd.grad(loss, alpha)
        torch.nn.utils.clip_grad_norm_([alpha], 1.0)
        optimizer.step()
    return alpha.detach().softmax(0)


def weights_by_nats(nats: list[Tensor]) -> Tensor:
    """learn_weights from each member's losses (n, T) on the fitness set -> (M,)."""
    return learn_weights(torch.stack([(-n.double().flatten()).exp() for n in nats]))


def mixtures(weights: Tensor, sizes: tuple[int, ...] = READOUT_SIZES) -> dict[int, Tensor]:
    """Weights (M,) of all members -> by K, the weights with the K largest alone, which sum to 1.

    K are the sizes below M, or M if none is.
    """
    order, found = weights.argsort(descending=True, stable=True), {}
    for size in [size for size in sizes if size < len(weights)] or [len(weights)]:
        kept = torch.zeros_like(weights)
        kept[order[:size]] = weights[order[:size]]
        found[size] = kept / kept.sum()
    return found


# Copied from train.py: load_finished
def load_finished(run_dir: Path, device: torch.device) -> tuple[GPT, ComputeWeights, dict]:
    """-> (The model of a finished run, not filled; its compute weights, to refresh then; members.json)."""
    saved = json.loads((run_dir / "config.json").read_text())
    require(saved["track"] == TRACK, f"{run_dir} is a run of the {saved['track']} track: use that track's load_members")
    config, final = Config(**saved["config"]), json.loads((run_dir / "final" / "members.json").read_text())
    dtype = compute_dtype(config, device)
    model = build(config, device, dtype, attention=choose_attention("auto", config, device, dtype)).eval()
    return model, ComputeWeights(model, dtype, requires_grad=False), final


# Adapted from train.py: load_members -- a snapshot has its losses beside it
def load_members(run_dir: str | Path, device: str | torch.device):
    """The members of a finished run's readout, loaded one at a time: yields (weight, log_probs).

    log_probs maps tokens (B, T) int64 to log-probabilities of the next token (B, T, V) float32, until the next member
    is loaded (ValueError after that). The weights sum to 1, and members.json says how the members are mixed.
    """
    run_dir, device = Path(run_dir), torch.device(device)
    model, weights, final = load_finished(run_dir, device)

    @torch.no_grad()
    def log_probs(member: dict, tokens: Tensor) -> Tensor:
        require(loaded[-1] is member, "the next member has taken this one's place: use them one at a time")
        return model.log_probs(tokens.to(device), weights.tensors, **final["stage"]).float()

    loaded: list[dict] = []
    for member in final["members"]:
        model.load_state_dict(read_snapshot(run_dir / "final" / member["file"]))
        weights.refresh()
        loaded.append(member)
        yield member["weight"], partial(log_probs, member)


def read_snapshot(path: Path) -> dict[str, Tensor]:
    """The parameters of a snapshot, without its losses."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names if not name.startswith("nats.")}


def read_nats(path: Path, split: str) -> Tensor:
    """A snapshot's losses (n, T) float32 on a split, in nats per target, in the order of EvalSet."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(f"nats.{split}")


# ======================================================================================================================
# Run: clock, log, checkpoint
# ======================================================================================================================


# Copied from train.py: Clock
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


# Copied from train.py: write_atomically
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


# Copied from train.py: write_json
def write_json(path: Path, content) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


# Copied from train.py: try_to_write_json
def try_to_write_json(path: Path, content) -> str:
    """As write_json -> why it failed, empty if it did not."""
    try:
        write_json(path, content)
        return ""
    except OSError as error:
        return str(error)


# Copied from train.py: code_sha256
def code_sha256(folder: Path, names: tuple[str, ...] = ()) -> str:
    """Of a script's files, or of all in code/: SHA-256 over a line "name, zero byte, SHA-256" for each, sorted."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    names = names or tuple(path.relative_to(folder).as_posix() for path in found)
    lines = (f"{name}\0{sha256_file(folder / name)}\n" for name in sorted(names))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# Copied from train.py: create_run
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


# Copied from train.py: read_json
def read_json(path: Path, keys: set[str], advice: str) -> dict:
    """A JSON object with these keys; ValueError with the advice if it is damaged."""
    try:
        content = json.loads(path.read_text())
        require(keys <= content.keys(), f"it lacks {', '.join(keys - content.keys())}")
        return content
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {advice}") from None


# Copied from train.py: read_config
def read_config(folder: str) -> dict:
    """config.json of a run folder."""
    path, keys = Path(folder) / "config.json", {"run_id", "track", "config", "overrides", "code_sha256", "data_sha256"}
    require(path.exists(), f"{path} not found: --resume needs a run folder, such as runs/<name>")
    return read_json(path, keys, "a run cannot be resumed without it; its weights are in checkpoints/ and final/")


# Copied from train.py: open_run
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


# Copied from train.py: check_same_data
def check_same_data(saved: dict, data_dir: str, data_sha256: dict[str, str]) -> None:
    """A run goes on with the files that it was started with; ValueError if they are others."""
    for split, now in (saved["data_sha256"] | data_sha256).items():
        then, now = saved["data_sha256"].get(split, "none"), data_sha256.get(split, "none")
        said = f"fineweb_{split}.pt was {then[:12]}..., and that of {data_dir} is {now[:12]}..."
        require(then == now, f"{saved['folder']} was started on other data ({said}): give its --data-dir")


# Copied from train.py: draw_curve
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


def draw_ensemble(folder: Path, members: list[dict], weights: Tensor, losses: dict[int, float]) -> None:
    """curve.png: the members' validation losses and weights by cycle, the mixture's loss by the number of members."""
    from matplotlib.figure import Figure  # takes a second to import
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(folder.name)
    left, middle, right = figure.subplots(1, 3)
    chains = sorted({member["chain"] for member in members})
    for k, chain in enumerate(chains):
        own = [i for i, member in enumerate(members) if member["chain"] == chain]
        cycles = [members[i]["cycle"] for i in own]
        left.plot(
            cycles, [members[i]["val_loss"] for i in own], "o-", markersize=3, linewidth=1, label=f"chain {chain}"
        )
        beside = [cycle + 0.4 * (k - (len(chains) - 1) / 2) / len(chains) for cycle in cycles]  # not upon each other
        middle.plot(beside, weights[own].tolist(), "o", markersize=3)
    left.axhline([*losses.values()][-1], linestyle="--", linewidth=1, color="gray", label="the mixture")
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
    write_atomically(folder / "curve.png", partial(figure.savefig, format="png", dpi=120))


# Copied from train.py: Lines
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


# Copied from train.py: wandb_mode
def wandb_mode(config: Config) -> str:
    """How Weights & Biases is wanted: online, offline or off."""
    mode = config.wandb
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "online") if os.environ.get("WANDB_API_KEY") else "off"
    return "off" if mode == "disabled" else mode


# Copied from train.py: Run
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


class ChainRun(Run):
    """A chain's part of the run folder, chains/chain_<number>/: a log, metrics, a curve, checkpoints of its own."""

    def __init__(self, folder: Path, run_id: str, chain: int, main: bool, on_screen: bool):
        super().__init__(str(folder), f"{run_id}-{chain:02d}", main)
        self.chain, self.on_screen = chain, on_screen

    def log(self, text: str, screen: bool = True) -> None:
        """As Run.log; on the screen every line says which chain it is of."""
        if self.main and screen:
            tqdm.write("\n".join(f"chain {self.chain} | {line}" for line in text.splitlines()))
            sys.stdout.flush()
        super().log(text, screen=False)

    def progress(self, done: int, total: int, parts: list[str], printed: bool) -> None:
        """As Run.progress; chains that are trained beside the first have no bar, which would write over its own."""
        if self.on_screen:
            super().progress(done, total, parts, printed)
        elif printed:
            self.log(" | ".join([f"step {done}/{total}", *parts]))


# ======================================================================================================================
# Train
# ======================================================================================================================


# Copied from train.py: profile_table
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


# Copied from train.py: StepProfiler
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


# Copied from train.py: peak_memory_gib
def peak_memory_gib(world: World) -> float:
    """Most memory that this process had: of the GPU what tensors took, without one that of the process."""
    if world.cuda:
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


# Copied from train.py: NonFiniteLoss
class NonFiniteLoss(RuntimeError):
    """A loss is NaN or infinite."""


# Copied from train.py: duration
def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f}h" if seconds > 7200 else f"{seconds / 60:.1f}m" if seconds > 90 else f"{seconds:.0f}s"


# Copied from train.py: seed_of
def seed_of(*numbers: int) -> int:
    """A seed that depends on all of these numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# Copied from train.py: resume_command
def resume_command(processes: int, folder: Path) -> str:
    """What resumes a run on this machine."""
    start = "python" if processes == 1 else f"torchrun --standalone --nproc_per_node={processes}"
    return f"{start} {sys.argv[0]} --resume {folder}"


# Copied from train.py: Trainer
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


# Adapted from train.py: training_state -- the teacher too
def training_state(trainer: Chain) -> dict:
    """The tensors of a checkpoint; collective, of use in the main process alone."""
    state = trainer.optimizer.state_dict()
    model = {name: p.detach() for name, p in trainer.model.named_parameters()}
    return {"model": model, "optimizer": state, "teacher": trainer.snapshot}


# Adapted from train.py: restore -- the teacher too
def restore(trainer: Chain, tensors: dict) -> None:
    """Take up a training_state, which the main process has; collective."""
    world, teacher = trainer.world, tensors.get("teacher", {})
    for name, p in trainer.model.named_parameters() if world.main else ():
        p.data.copy_(tensors["model"][name])
    trainer.optimizer.broadcast_values()
    trainer.optimizer.load_state_dict(tensors.get("optimizer", {}))
    if world.share(lambda: bool(teacher)):
        snapshot = {}
        for name, p in trainer.model.named_parameters():
            value = torch.empty_like(p, dtype=member_dtype(name, p, trainer.dtype), requires_grad=False)
            if world.main:
                value.copy_(teacher[name])
            if world.size > 1:
                dist.broadcast(value, group_src=0, group=world.group)
            snapshot[name] = value
        trainer.teacher, trainer.snapshot = snapshot_weights(trainer.model, snapshot, trainer.dtype), teacher


# Adapted from train.py: check_members -- what is damaged is left out
def check_members(run: Run, members: list[dict]) -> None:
    """Take snapshots that are gone off the list; it is said. Their contents are checked before they are mixed."""
    for member in list(members):
        path = run.folder / "final" / member["file"]
        if not path.exists():
            run.log(f"WARNING: {path} is missing or damaged: it is left out")
            members.remove(member)


@torch.no_grad()
def perturb(model: GPT, scale: float, *seed: int) -> None:
    """Add Gaussian noise to each parameter of several elements, `scale` times its own standard deviation (unbiased).

    It is drawn on the CPU from `seed` alone, so it is the same on all processes and devices.
    """
    generator = torch.Generator().manual_seed(seed_of(*seed))
    for p in model.parameters():
        if p.numel() > 1:
            wide = p.to(torch.promote_types(p.dtype, torch.float32))
            noise = torch.randn(p.shape, generator=generator).to(wide)
            p.copy_(wide + scale * wide.std() * noise)


@torch.no_grad()
def losses_of(model: GPT, weights: Weights, tokens: Tensor, targets: Tensor, **how) -> Tensor:
    """Losses by the compute weights of a snapshot: 2 x (B, T) -> (B, T)."""
    model.eval()
    losses = model.token_losses(tokens, targets, weights, **how)
    model.train()
    return losses


def read_ledger(folder: Path) -> dict:
    """What a chain's folder says of it: whether it is finished, its snapshots, their hashes and losses."""
    path, counted = folder / "ledger.json", ("steps", "tokens", "flops", "train_time_s", "process_s", "wall_time_s")
    empty = {"chain": int(folder.name.removeprefix("chain_")), "state": "waiting", "members": [], "layout": [1, 0, 1]}
    empty |= dict.fromkeys(counted, 0)
    return read_json(path, set(empty), f"delete {folder} to train this chain again") if path.exists() else empty


class Chain(Trainer):
    """The training of a chain. The end of each cycle gives a snapshot, and begins the next."""

    def __init__(
        self, number: int, rounds: int, layout: list[int], world: World, run: Run, plan: Plan, shards, lengths
    ):
        """rounds: chains that a group of processes trains one after the other, for the projection.

        layout: the number of groups, this one's, and its number of processes.
        """
        super().__init__(plan.config, world, run, plan, shards, lengths)
        self.number, self.rounds, self.layout = number, rounds, layout
        self.earlier = world.share(read_ledger, run.folder)
        all_of_it = dataclasses.replace(plan.config, val_sequences=len(shards["fitness"].tokens))
        self.eval_sets["fitness"] = EvalSet(shards["fitness"], all_of_it, world, lengths)
        self.teacher: Weights | None = None
        self.snapshot: dict[str, Tensor] = {}  # the teacher's, in the main process, for checkpoints

    def backward(self, rows: Tensor, share: float, taught: bool = False, **how) -> Tensor:
        return super().backward(rows, share, teacher=self.teacher if taught else None, **how)

    def warm_up(self) -> None:
        """As Trainer.warm_up, with a teacher and the scoring of snapshots."""
        self.teacher = snapshot_weights(self.model, self.make_snapshot(), self.dtype)
        super().warm_up()
        batch = torch.zeros(self.config.eval_batch, self.config.sequence_len + 1, dtype=torch.int64)
        tokens, targets = (part.to(self.world.device) for part in (batch[:, :-1], batch[:, 1:]))
        losses_of(self.model, self.teacher, tokens, targets, **stage(self.plan, self.plan.num_steps - 1))
        self.teacher = None

    def make_snapshot(self) -> dict[str, Tensor]:
        """The parameters by name, as a snapshot keeps them, on the device."""
        named = self.model.named_parameters()
        return {name: p.detach().to(member_dtype(name, p, self.dtype), copy=True) for name, p in named}

    def train_step(self, step: int):
        if step in self.plan.first_steps[1:]:
            self.begin_cycle(self.plan.cycle(step))
        return super().train_step(step)

    def begin_cycle(self, cycle: int) -> None:
        """What a cycle but the first begins with: noise, or other weights and an empty optimizer."""
        if self.config.members == "snapshots":
            return perturb(self.model, perturbation_scale(self.config, cycle - 1), self.config.seed, cycle)
        torch.manual_seed(seed_of(self.config.seed, cycle))
        self.model.init_weights()
        self.optimizer.broadcast_values()
        self.optimizer.steps = 0
        for bucket in self.optimizer.buckets:
            for part in bucket.moments:
                part.zero_()
        return None

    def end_epoch(self, complete: bool) -> None:
        """The end of a cycle: make a snapshot, score it as it will be stored; it may be the teacher of the next."""
        cycle, how = self.plan.epochs_done(self.step), stage(self.plan, self.step - 1)
        copied, scores, nats = self.make_snapshot(), {}, {}
        weights = snapshot_weights(self.model, copied, self.dtype)
        for name in ("fitness", "val"):
            own = self.eval_sets[name].nats(partial(losses_of, self.model, weights, **how))
            scores[name] = self.eval_sets[name].score(own)
            nats[f"nats.{name}"] = gather(self.world, own.float(), int(self.world.sum([len(own)])[0]))
            if not math.isfinite(scores[name].loss):
                self.fail("validation", scores[name].loss, self.step - 1)
        val, fitness_loss = scores["val"], scores["fitness"].loss
        losses = {"val_loss": val.loss, "val_bpb": val.bpb, "fitness_loss": fitness_loss}
        file = f"chain_{self.number:02d}_cycle_{cycle:03d}.safetensors"
        self.members.append({"file": file, "chain": self.number, "cycle": cycle, "step": self.step} | losses)
        self.readouts[f"cycle_{cycle}"] = val.loss
        self.teacher, self.snapshot = (weights if self.plan.taught(self.step) else None), {}
        if self.world.main:
            on_cpu = {name: value.cpu() for name, value in copied.items()}
            self.unsaved[file] = on_cpu | nats
            self.snapshot = on_cpu if self.teacher is not None else {}
        if self.config.keep:
            self.drop_member()
        self.run.record({"step": self.step, "cycle": cycle} | how | losses)
        said = f"cycle {cycle}/{self.config.cycles} | step {self.step}/{self.plan.num_steps} | val {val.loss:.4f}"
        self.run.log(f"{said} | fitness {fitness_loss:.4f}" + (f" | {val.bpb:.4f} bits per byte" if val.bpb else ""))
        self.draw_curve()

    def drop_member(self) -> None:
        """If the chain has more snapshots than are kept, the one of least weight goes, but not the newest."""

        def least() -> int:
            folder = self.run.folder / "final"
            waiting = {file: tensors["nats.fitness"] for file, tensors in self.unsaved.items()}
            files = [member["file"] for member in self.members]
            nats = [waiting[file] if file in waiting else read_nats(folder / file, "fitness") for file in files]
            return int(weights_by_nats(nats)[:-1].argmin())

        if len(self.members) > self.config.keep:
            gone = self.members.pop(self.world.share(least))
            self.unsaved.pop(gone["file"], None)

    def save_checkpoint(self) -> None:
        """As Trainer.save_checkpoint; then the ledger, and what is not in it goes from the disk."""
        super().save_checkpoint()
        self.write_ledger("training")
        if self.world.main and not self.checkpoint_failure:
            for path in (self.run.folder / "final").iterdir():
                if path.name not in [member["file"] for member in self.members]:
                    path.unlink()

    def write_ledger(self, state: str) -> str:
        """ledger.json: what exists of the chain; state: training, stopped or finished -> as try_to_write_json."""
        failure = ""
        if self.world.main:
            members = [member for member in self.members if "sha256" in member]
            ledger = {"chain": self.number, "seed": self.config.seed, "state": state, "steps": self.step}
            ledger |= {"train_time_s": self.clock.train_time_s, "tokens": self.plan.tokens_done(self.step)}
            ledger |= {"flops": float(self.flops[self.step]), "wall_time_s": self.wall_time_s(), "members": members}
            own_s = self.clock.train_time_s - self.earlier["train_time_s"]
            ledger |= {"process_s": self.earlier["process_s"] + own_s * self.world.size, "layout": self.layout}
            failure = try_to_write_json(self.run.folder / "ledger.json", ledger)
            if failure:
                self.run.log(f"ledger.json is NOT saved: {failure}")
        return self.world.share(lambda: failure)

    def print_projection(self) -> None:
        chain_s = self.clock.train_time_s + self.remaining_s(self.step, statistics.median(self.recent_s))
        rest = f", {duration(self.rounds * chain_s)} for all chains ({self.rounds} one after the other)"
        self.run.log(f"projected training time {duration(chain_s)}{rest if self.rounds > 1 else ''}")


class Ensemble:
    """A run: chains, which groups of processes train one after the other. Its phases are warm_up, resume and fit.

    The groups do not wait for each other until all chains are done; each finds that in the ledgers on the disk.
    """

    def __init__(self, config: Config, world: World, group: World, run: Run, plan: Plan, shards, byte_lengths):
        self.config, self.world, self.group, self.run, self.plan = config, world, group, run, plan
        self.shards, self.byte_lengths = shards, byte_lengths
        self.dtype = compute_dtype(config, world.device)
        self.kernels = choose_kernels(config, world.device, self.dtype)
        self.compiled = config.compile == "on" or (config.compile == "auto" and world.cuda)
        self.num_parameters, *_ = memory_gib(config, group.size, self.dtype)
        self.stopped_by, self.signal, self.signal_at, self.failed = "", "", 0.0, False
        self.folders = [run.folder / "chains" / f"chain_{number:02d}" for number in range(config.chains)]
        self.stopped_mark = run.folder / "stopped"  # a file that a group leaves for the others when it stops
        self.groups, todo = world.size // group.size, world.share(self.unfinished)
        self.rounds = math.ceil(len(todo) / self.groups)  # chains that a group trains one after the other
        self.todo = deque(todo[world.rank // group.size :: self.groups])
        self.chain: Chain | None = None  # the one that is trained
        self.opened = False  # whether a chain was

    def unfinished(self) -> list[int]:
        """Chains that are not finished; in the main process, before any is trained."""
        self.stopped_mark.unlink(missing_ok=True)  # of an earlier session
        todo = []
        for number, folder in enumerate(self.folders):
            newest = max((folder / "checkpoints").glob("step_*.json"), default=None)
            if read_ledger(folder)["state"] == "finished":
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            elif not self.config.select_only:
                todo.append(number)
                advice = f"delete it to resume chain {number} from before it"
                info, path = newest and read_json(newest, {"sha256"}, advice), newest and newest.with_suffix(".pt")
                sound = not newest or (path.exists() and sha256_file(path) == info["sha256"])
                require(sound, f"{newest} is damaged, or what it tells of: {advice}")
        return todo

    def warm_up(self) -> None:
        """Begin with the first chain, or go on with it."""
        self.open_next_chain()

    def resume(self) -> None:
        """Chains resume where they are opened."""

    def open_next_chain(self) -> None:
        if not self.todo:
            return
        number, c = self.todo.popleft(), self.config
        folder, group = self.folders[number], self.group
        if group.main:
            for part in ("checkpoints", "final"):
                (folder / part).mkdir(parents=True, exist_ok=True)
        run = ChainRun(folder, self.run.run_id, number, group.main, on_screen=self.world.rank < group.size)
        group.share(run.open)
        group.share(self.start_wandb, run)
        shards = {name: shard for name, shard in self.shards.items() if name != "holdout"}
        plan = dataclasses.replace(self.plan, config=c.of_chain(number))
        layout = [self.groups, self.world.rank // group.size, group.size]
        self.chain = Chain(number, self.rounds, layout, group, run, plan, shards, self.byte_lengths)
        self.chain.signal, self.chain.signal_at = self.signal, self.signal_at
        self.chain.warm_up()
        if group.share(lambda: bool(run.checkpoints()) or (folder / "metrics.jsonl").stat().st_size > 0):
            self.chain.resume()
        self.chain.write_ledger("training")
        self.opened = True

    def start_wandb(self, run: Run) -> None:
        """As Run.start_wandb; once a chain is trained, that it fails is no reason to stop."""
        try:
            run.start_wandb(self.config)
        except ValueError as error:
            if not self.opened:
                raise
            run.log(f"WARNING: {error}")

    def fit(self) -> None:
        """Train this group's chains, then wait for those of the others; `stopped_by` says whether a signal came."""
        while self.chain is not None:
            self.chain.fit()
            by_signal, chain = self.chain.stopped_by == "signal", self.chain
            full = self.group.sum([len(chain.unsaved)])[0] > 0
            full = bool(chain.write_ledger("stopped" if by_signal or full else "finished")) or full
            chain.run.close()
            if by_signal or full:
                self.stopped_by, self.failed = "signal" if by_signal else "full disk", full
                self.stopped_mark.touch()
                return
            if self.group.main:
                shutil.rmtree(chain.run.folder / "checkpoints", ignore_errors=True)
            self.chain = chain = None
            gc.collect()  # its memory is needed by the next
            if self.world.cuda:
                torch.cuda.empty_cache()
            try:
                self.open_next_chain()
            except ValueError as error:  # of another process or a person on the disk; what is done stays
                print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
                self.stopped_by, self.failed = "an error", True
                self.stopped_mark.touch()
                return
        said = False
        while not self.config.select_only:
            waiting, stop = self.group.share(self.look_around)
            if stop or self.group.sum([bool(self.signal)])[0]:
                self.stopped_by = "signal"
                self.stopped_mark.touch()
                return
            if not waiting:
                break
            if not said and self.group.main:
                self.run.log(f"waiting for chains {waiting}")
            said = True
            time.sleep(0.5)
        waiting, _ = self.world.share(self.look_around)
        self.stopped_by, self.fitted = "select_only" if waiting else "steps", time.monotonic()

    def look_around(self) -> tuple[list[int], bool]:
        """The chains that are not finished yet, and whether a group has stopped, by what the disk says."""
        waiting = []
        for number, folder in enumerate(self.folders):
            try:
                finished = read_ledger(folder)["state"] == "finished"
            except (OSError, ValueError):  # a network disk in between; the next look will tell
                finished = False
            waiting += [number] * (not finished)
        return waiting, self.stopped_mark.exists()

    def take_signal(self, number: int, frame) -> None:
        """Stop after the step under way; a second signal ends the process, unless it comes soon after."""
        Trainer.take_signal(self, number, frame)
        if self.chain is not None:
            self.chain.signal, self.chain.signal_at = self.signal, self.signal_at

    def say_how_to_resume(self) -> int:
        """-> the exit code: 0 if all is saved."""
        size, here = self.world.size, int(os.environ.get("LOCAL_WORLD_SIZE", self.world.size))
        on_several = f"torchrun, as before, {sys.argv[0]} --resume {self.run.folder}"
        how = resume_command(size, self.run.folder) if size == here else on_several
        stopped = f"stopped by {self.signal or self.stopped_by}"
        if not self.config.checkpoints:
            self.run.log(f"{stopped}; with --no-checkpoints, {how} begins the unfinished chains anew")
            return 1
        self.run.log(f"{stopped}; resume with: {how}")
        return 1 if self.failed else 0


def candidates(ensemble: Ensemble) -> list[dict]:
    """The members that are on the disk and sound, by chain and cycle; of others it is said; collective."""
    world, run, c = ensemble.world, ensemble.run, ensemble.config
    members = [member for folder in ensemble.folders for member in read_ledger(folder)["members"]]
    members = [member for member in members if not (c.leave_out_first and member["cycle"] == 1)]
    sound = [0.0] * len(members)
    for i in range(world.rank, len(members), world.size):
        path = snapshot_path(ensemble, members[i])
        sound[i] = float(path.exists() and sha256_file(path) == members[i]["sha256"])
    found = []
    for member, is_sound in zip(members, world.sum(sound), strict=True):
        if is_sound:
            found.append(member)
        else:
            run.log(f"WARNING: {snapshot_path(ensemble, member)} is missing or damaged: it is left out")
    require(bool(found), f"{run.folder} has no snapshot to read out: train it on, with --resume")
    return found


def snapshot_path(ensemble: Ensemble, member: dict) -> Path:
    return ensemble.folders[member["chain"]] / "final" / member["file"]


def weigh(ensemble: Ensemble, members: list[dict]) -> tuple[list[float], dict[int, list[float]]]:
    """In the main process -> (weights of all members; by number of members, those of the mixtures)."""
    if ensemble.config.selection == "uniform":
        weights = torch.full((len(members),), 1 / len(members), dtype=torch.float64)
        return weights.tolist(), {len(members): weights.tolist()}
    weights = weights_by_nats([read_nats(snapshot_path(ensemble, member), "fitness") for member in members])
    return weights.tolist(), {size: w.tolist() for size, w in mixtures(weights).items()}


def mix_probabilities(paths: list[Path], split: str, weights: list[list[float]]) -> list[Tensor]:
    """Nats (n, T) float64 of mixtures of the snapshots at these paths, each of which is read once."""
    sums: list[Tensor] = []
    for path, own in zip(paths, zip(*weights, strict=True), strict=True):
        probabilities = (-read_nats(path, split).double()).exp()
        sums = sums or [torch.zeros_like(probabilities) for _ in weights]
        for total, weight in zip(sums, own, strict=True):
            total.add_(probabilities, alpha=weight)
    return [-total.log() for total in sums]


def build_scorer(ensemble: Ensemble) -> GPT:
    """A model whose own weights are not used."""
    model = build(ensemble.config, ensemble.world.device, ensemble.dtype, **ensemble.kernels)
    if ensemble.compiled:
        model.compile_layers()
    return model


def load_weights(ensemble: Ensemble, model: GPT, member: dict) -> Weights:
    """The compute weights of a member, from the disk."""
    snapshot = read_snapshot(snapshot_path(ensemble, member))
    on_device = {name: value.to(ensemble.world.device) for name, value in snapshot.items()}
    return snapshot_weights(model, on_device, ensemble.dtype)


def score_members(ensemble: Ensemble, members: list[dict], split: str) -> list[Path]:
    """Losses of members on a split, in scores/, made where they are not there yet -> their paths; collective.

    Members are spread over all processes, and each is loaded once.
    """
    world, folder, alone = ensemble.world, ensemble.run.folder / "scores", World(0, 1, ensemble.world.device)
    how = stage(ensemble.plan, ensemble.plan.num_steps - 1)
    paths = [folder / f"{split}_{member['sha256'][:16]}_{member['file']}" for member in members]
    own = [*zip(paths, members, strict=True)][world.rank :: world.size]
    missing = [(path, member) for path, member in own if not path.exists()]
    if missing:
        folder.mkdir(exist_ok=True)
        model = build_scorer(ensemble)
        eval_set = EvalSet(ensemble.shards[split], ensemble.config, alone, ensemble.byte_lengths)
    for path, member in missing:
        if ensemble.signal or ensemble.stopped_mark.exists():
            ensemble.stopped_mark.touch()
            break
        weights = load_weights(ensemble, model, member)
        nats = eval_set.nats(partial(losses_of, model, weights, **how)).float()
        write_atomically(path, partial(save_file, {f"nats.{split}": nats}))
        ensemble.run.log(f"{split}: {sum(path.exists() for path in paths)} of {len(paths)} members scored")
    while not all(path.exists() for path in paths) and not (ensemble.signal or ensemble.stopped_mark.exists()):
        time.sleep(0.2)
    return paths


def mix_logits(ensemble: Ensemble, members: list[dict], weights: list[float], split: str) -> Score:
    """Score of the average of the members' capped logits on a split; collective.

    The average needs the whole distribution, so sequences are spread over the processes, and for each batch of them the
    members are loaded one by one: slower than averaging probabilities.
    """
    world, c, model = ensemble.world, ensemble.config, build_scorer(ensemble).eval()
    how = stage(ensemble.plan, ensemble.plan.num_steps - 1)
    eval_set = EvalSet(ensemble.shards[split], c, world, ensemble.byte_lengths)

    @torch.no_grad()
    def losses(tokens: Tensor, targets: Tensor) -> Tensor:
        total = 0.0
        for weight, member in zip(weights, members, strict=True):
            log_probs = model.log_probs(tokens, load_weights(ensemble, model, member), **how)
            total = total + weight * log_probs  # logits but for a constant, which the softmax takes away
        return -total.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    return eval_set.score(eval_set.nats(losses))


# Adapted from train.py: read_out -- a mixture of snapshots, learned on the fitness set
def read_out(ensemble: Ensemble) -> dict | None:
    """The declared readout on the validation set and, once, on the holdout; None if a signal comes; collective.

    It averages the probabilities of the members of the largest mixture. Recorded beside it: the smaller mixtures, equal
    weights for all, and the best member.
    """
    world, members = ensemble.world, candidates(ensemble)
    weights, found = world.share(weigh, ensemble, members)
    declared, scores, readouts, losses = max(found), {}, {}, {}
    waiting, _ = world.share(ensemble.look_around)
    at_the_end = ensemble.as_declared and not waiting  # else the holdout is not looked at
    splits = ["val"] + ["holdout"] * ("holdout" in ensemble.shards and at_the_end)
    chosen = [(weight, member) for weight, member in zip(found[declared], members, strict=True) if weight > 0]
    if ensemble.config.average == "logit":
        for split in splits:
            scores[split] = mix_logits(ensemble, [m for _, m in chosen], [w for w, _ in chosen], split)
        readouts["logit_average"] = scores["val"].loss
    else:
        paths = score_members(ensemble, [m for _, m in chosen], "holdout") if "holdout" in splits else []
        if ensemble.world.sum([bool(ensemble.signal) or ensemble.stopped_mark.exists()])[0]:
            return None
        alone = World(0, 1, world.device)
        sets = {
            split: EvalSet(ensemble.shards[split], ensemble.config, alone, ensemble.byte_lengths) for split in splits
        }
        if world.main:
            every = [*found.values(), [1 / len(members)] * len(members)]
            nats = mix_probabilities([snapshot_path(ensemble, m) for m in members], "val", every)
            *of_sizes, equal = (sets["val"].score(n) for n in nats)
            losses = {size: score.loss for size, score in zip(found, of_sizes, strict=True)}
            readouts = {f"mixture_of_{size}": loss for size, loss in losses.items()} | {"equal_weights": equal.loss}
            scores["val"] = of_sizes[list(found).index(declared)]
            for split in splits[1:]:
                scores[split] = sets[split].score(*mix_probabilities(paths, split, [[w for w, _ in chosen]]))
    readouts["best_member"] = min(member["val_loss"] for member in members)
    found = {"members": members, "weights": weights, "chosen": chosen}
    return found | {"scores": scores, "losses": losses, "readouts": readouts}


# Adapted from train.py: make_result -- of all chains
def make_result(ensemble: Ensemble, found: dict) -> dict:
    """What result.json says, but for eligibility; found: of read_out."""
    c, world, val, holdout = ensemble.config, ensemble.world, found["scores"]["val"], found["scores"].get("holdout")
    ledgers = [read_ledger(folder) for folder in ensemble.folders]
    by_layout: dict[int, dict[int, list]] = {}  # by number of groups, by group
    for ledger in ledgers:
        groups, index, _ = ledger["layout"]
        by_layout.setdefault(groups, {}).setdefault(index, []).append(ledger)
    seconds, wall_s = (  # of the group that took longest
        sum(max(sum(led[key] for led in leds) for leds in groups.values()) for groups in by_layout.values())
        for key in ("train_time_s", "wall_time_s")
    )
    steps, tokens, flops, process_s = (
        sum(led[key] for led in ledgers) for key in ("steps", "tokens", "flops", "process_s")
    )
    world_size, groups = (max(f(led["layout"]) for led in ledgers) for f in (lambda x: x[0] * x[2], lambda x: x[0]))
    finished, folder = all(ledger["state"] == "finished" for ledger in ledgers), ensemble.run.folder
    hashes = {split: shard.sha256 for split, shard in ensemble.shards.items() if split != "fitness"}
    peak, known = peak_flops(world.device), {member["file"]: member["sha256"] for _, member in found["chosen"]}
    return {
        "track": TRACK, "status": "finished" if finished else "partial", "stopped_by": ensemble.stopped_by,
        "run_id": ensemble.run.run_id,
        "val_loss": val.loss, "val_bpb": val.bpb, "best_val_loss": min(found["readouts"].values()),
        "readouts": found["readouts"], "holdout_loss": holdout and holdout.loss, "holdout_bpb": holdout and holdout.bpb,
        "data_efficiency": data_efficiency(val.loss) if hashes["val"] == OFFICIAL_SHA256["val"] else None,
        "chains": c.chains, "cycles": c.cycles, "candidates": len(found["members"]), "chosen": len(found["chosen"]),
        "selection": c.selection, "mixing": c.average, "leave_out_first": c.leave_out_first,
        "steps": steps, "tokens": tokens,
        "epochs": tokens / (ensemble.plan.epoch_micro_steps * VIRTUAL_RANKS * c.micro_batch * c.sequence_len),
        "train_time_s": seconds, "process_hours": process_s / 3600,
        "members": [{"file": member["file"], "weight": weight} for weight, member in found["chosen"]],
        "wall_time_s": wall_s + time.monotonic() - ensemble.fitted, "time_cap_min": 0.0,
        "seed": c.seed, "world_size": world_size, "groups": groups, "device": device_name(world.device),
        "as_declared": ensemble.as_declared,
        **ensemble.kernels, "dtype": str(ensemble.dtype).removeprefix("torch."), "compiled": ensemble.compiled,
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "peak_memory_gib": peak_memory_gib(world), "tokens_per_s": tokens / max(seconds, 1e-9),
        "mfu": flops / process_s / peak if peak and process_s else None,
        "parameters": ensemble.num_parameters, "val_tokens": val.tokens, "val_bytes": val.bytes,
        "data_sha256": hashes, "code_sha256": code_sha256(folder / "code"),
        "final_sha256": {p.name: known.get(p.name) or sha256_file(p) for p in sorted((folder / "final").iterdir())},
    }  # fmt: skip


# Adapted from train.py: save_final -- links to the snapshots
def save_final(ensemble: Ensemble, found: dict) -> str:
    """Link the chosen members into final/, with members.json -> why it failed, empty if it did not."""
    final, members = ensemble.run.folder / "final", []
    try:
        for path in final.iterdir():
            path.unlink()
        for weight, member in found["chosen"]:
            source = snapshot_path(ensemble, member)
            try:
                os.link(source, final / member["file"])  # takes no space
            except OSError:  # a disk without such links
                (final / member["file"]).symlink_to(os.path.relpath(source, final))
            members.append(member | {"weight": weight})
    except OSError as error:
        return str(error)
    how = stage(ensemble.plan, ensemble.plan.num_steps - 1)
    content = {"mixing": ensemble.config.average, "stage": how, "members": members}
    return try_to_write_json(final / "members.json", content)


# Adapted from train.py: ineligible -- any hardware, up to 64 H100 for 7 days
def ineligible(config: Config, result: dict) -> list[str]:
    """Why a result cannot be a record of this track; empty if it can."""
    targets = Config.val_sequences * Config.sequence_len
    most_hours = 64 * 7 * 24
    checks = {
        "the data are not the official files": all(result["data_sha256"][s] == h for s, h in OFFICIAL_SHA256.items()),
        f"{result['val_tokens']:,} validation targets, not {targets:,}": result["val_tokens"] == targets,
        "training took more than 64 GPUs, or longer than 7 days": result["train_time_s"] <= 7 * 86400
        and result["process_hours"] <= most_hours
        and result["world_size"] <= 64,
        "chains are not finished": result["status"] == "finished",
        "the readout is not the one that the run declared": result["as_declared"],
        "the loss is not finite": math.isfinite(result["val_loss"]),
    }
    return [reason for reason, fine in checks.items() if not fine]


# Adapted from train.py: plan_lines -- chains, groups, operations
def plan_lines(ensemble: Ensemble) -> dict[str, str]:
    """What the header says of chains and groups, by the words in front."""
    c, plan = ensemble.config, ensemble.plan
    batches = [plan.batch_tokens(cycle) for cycle in range(c.cycles)]
    chain_flops = sum(step_flops_per_token(plan, step) * batches[plan.cycle(step)] for step in range(plan.num_steps))
    operations = f"{c.chains * chain_flops:.3g} operations in all"
    if peak := peak_flops(ensemble.world.device):
        hours = ensemble.rounds * chain_flops / (0.4 * peak * ensemble.group.size) / 3600
        operations += f"; at 40% of the peak {hours:,.1f} h"
    steps = f"a chain has {plan.num_steps:,} steps of {min(batches):,} or {max(batches):,} tokens"
    groups = f"groups x processes: {ensemble.groups} x {ensemble.group.size}"
    return {"plan": f"{c.chains} chains of {c.cycles} cycles; {steps}; {groups}; {operations}"}


# Copied from train.py: header
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


# Copied from train.py: final_block
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


def report_mixtures(ensemble: Ensemble, found: dict, result: dict) -> None:
    """curve.png, and a line of metrics.jsonl for each mixture."""
    losses = found["losses"] or {len(found["chosen"]): result["val_loss"]}
    for size, loss in losses.items():
        ensemble.run.record({"step": result["steps"], "mixture_of": size, "val_loss": loss})
    try:
        draw_ensemble(ensemble.run.folder, found["members"], torch.tensor(found["weights"]), losses)
    except Exception as error:  # a full disk, or a library's fault: no reason to end a run
        ensemble.run.log(f"curve.png is not drawn: {type(error).__name__}: {error}")


# Adapted from train.py: finish -- a mixture of snapshots
def finish(ensemble: Ensemble) -> int:
    """Read out, print the final block, write result.json -> the exit code."""
    if ensemble.stopped_by in ("full disk", "an error"):
        return ensemble.say_how_to_resume()
    try:
        found = read_out(ensemble)
    except ValueError as error:
        ensemble.run.log(f"error: {error}")
        return 2
    if found is None:
        ensemble.stopped_by = "signal"
        return ensemble.say_how_to_resume()
    if not ensemble.world.main:
        return 0
    folder, c, name, failure = ensemble.run.folder, ensemble.config, "result.json", ""
    if ensemble.as_declared:
        (folder / name).unlink(missing_ok=True)  # what it says is in final/ changes now
        failure = save_final(ensemble, found)
    else:  # beside the result, which stays
        name = f"result_{c.selection}_{c.average}{'_without_first' * c.leave_out_first}.json"
    if not failure:
        result = make_result(ensemble, found)
        reasons = ineligible(c, result)
        result |= {"eligible": not reasons, "not_eligible_because": reasons}
        if ensemble.as_declared:
            report_mixtures(ensemble, found, result)
        heaviest = sorted(found["chosen"], key=lambda pair: -pair[0])[:8]
        said = ", ".join(f"{w:.3f} chain {m['chain']} cycle {m['cycle']}" for w, m in heaviest)
        ensemble.run.log(f"largest weights of {len(found['chosen'])}: {said}")
        ensemble.run.log(final_block(result, folder))
        failure = try_to_write_json(folder / name, result)
    if failure:
        ensemble.run.log(f"the result is NOT saved ({failure}): make space, then --resume {folder} goes on")
        return 1
    return 0


def extended(resume: str, saved: dict, added: int) -> dict:
    """What config.json will say after --add-chains, which is for finished runs alone (ValueError)."""
    chains = saved["config"]["chains"]
    require(added >= 0, f"--add-chains is {added}: it must be 0 or more")
    how = f"{resume} has {chains} chains to finish: --resume alone goes on with them"
    require(saved["finished"] or not added, f"--add-chains extends a finished run, and {how}")
    more = {"chains": chains + added}
    longer = {"config": saved["config"] | more, "overrides": saved["overrides"] | more, "finished": False}
    return saved | (longer if added else {})


def extend(saved: dict) -> None:
    """Write what extended said; the result so far has another name from then on."""
    folder = Path(saved["folder"])
    chains = json.loads((folder / "config.json").read_text())["config"]["chains"]
    if chains != saved["config"]["chains"]:
        (folder / "result.json").rename(folder / f"result_of_{chains}_chains.json")
        write_json(folder / "config.json", {k: v for k, v in saved.items() if k not in ("folder", "finished")})


# Adapted from train.py: training_sequences -- without the fitness set
def training_sequences(config: Config) -> int:
    """Sequences of T + 1 tokens in the training data."""
    return len(split_fitness(load_shard("train", config), config)[1].sequences(config.sequence_len + 1))


# Adapted from train.py: official_sequences -- without the fitness set
def official_sequences(config: Config) -> int:
    """As training_sequences, of the official 100,000,000 tokens."""
    return (100_000_000 - config.fitness_tokens) // (config.sequence_len + 1)


# Adapted from train.py: plan_repeats -- a plan is that of a chain
def plan_repeats(config: Config) -> int:
    """How often a run goes through its plan."""
    return config.chains


# Copied from train.py: moved_bytes
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


# Copied from train.py: plan_stages
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


# Copied from train.py: make_plan
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


# Copied from train.py: as_flags
def as_flags(settings: dict) -> list[str]:
    """{"num_epochs": 2, "decay_schedule": False} -> ["--num-epochs=2", "--no-decay-schedule"]"""
    flags = {name.replace("_", "-"): value for name, value in settings.items()}
    return [
        f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in flags.items()
    ]


# Copied from train.py: write_plan
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


# Adapted from train.py: set_up -- an ensemble, and groups of processes
def set_up(argv: list[str] | None) -> tuple[Ensemble | None, bool]:
    """From the command line to an ensemble, and whether it resumes; what can be refused is refused here (ValueError).

    No ensemble: the run that --resume names has finished.
    """
    given, resume = parse_arguments(argv)
    config, device = Config(**given) if resume is None else None, given.get("device", "auto")
    for name in ("add_chains", "select_only"):
        require(resume is not None or not given.get(name), f"--{name.replace('_', '-')} needs --resume RUN_DIR")
    if resume is not None:
        device = read_config(resume)["config"].get("device", "auto")
    world = set_up_world(device)
    if resume is not None:
        saved = world.share(open_run, resume, given)
        saved = world.share(extended, resume, saved, given.get("add_chains", 0))
        changed = {name: given[name] for name in RESUME_MAY_CHANGE - {"add_chains"} & given.keys()}
        config = Config(**saved["config"] | changed)
        if saved["finished"] and not config.select_only:
            if world.main:
                print(f"{resume} has finished, see {resume}/result.json")
            return None, True
    # What is the same in all processes is checked by one: one message if it is refused.
    dtype = compute_dtype(config, world.device)
    group = chain_world(world, world.share(group_size, world, config.processes_per_chain))
    world.share(choose_kernels, config, world.device, dtype)
    needed_gib = 0.0 if config.select_only else world.share(check_memory, config, group)
    loaded: dict[str, Shard] = {}
    world.share(lambda: loaded.update(load_data(config)))
    shards = loaded or load_data(config)
    hashes = {split: shard.sha256 for split, shard in shards.items()}
    world.share(lambda: split_fitness(shards["train"], config) and None)
    shards["fitness"], shards["train"] = split_fitness(shards["train"], config)
    plan = world.share(Plan, config, len(shards["train"].sequences(config.sequence_len + 1)))
    byte_lengths, bytes_from = world.share(token_byte_lengths, config)
    T, scored = config.sequence_len, ("fitness", "val", "holdout")
    targets = sum(len(shards[split].tokens) // (T + 1) * T for split in scored if split in shards)
    folder = Path(resume or Path(config.runs_dir) / config.run_name)
    disk = "nothing is trained"
    if not config.select_only:
        disk = world.share(check_disk, config, dtype, folder, world.size // group.size, targets)
    if resume is None:
        saved = world.share(create_run, config, hashes)
        world.share(os.rename, f"{saved['folder']}/checkpoints", f"{saved['folder']}/chains")  # which have their own
    world.share(check_same_data, saved, config.data_dir, hashes)
    check_same_data(saved, config.data_dir, hashes)  # the other processes may be on other disks
    seen = (Path(saved["folder"]) / "config.json").exists()
    require(
        seen, f"{saved['folder']} is not seen by all processes: --runs-dir must be on a disk that the machines share"
    )
    run = Run(saved["folder"], saved["run_id"], world.main)
    world.share(run.open)
    if resume is not None:
        world.share(extend, saved)
    ensemble = Ensemble(config, world, group, run, plan, shards, byte_lengths)
    settings = ("selection", "average", "leave_out_first")
    ensemble.as_declared = all(getattr(config, name) == saved["config"][name] for name in settings)
    now = {name: given[name] for name in RESUME_MAY_CHANGE & given.keys()}
    run.log(
        header(
            ensemble, saved | {"overrides": saved["overrides"] | now}, bytes_from, needed_gib, disk, wandb_mode(config)
        )
    )
    if ensemble.groups > config.chains:
        idle = (ensemble.groups - config.chains) * group.size
        run.log(f"WARNING: {idle} processes have nothing to train: fewer machines, or more --processes-per-chain")
    return ensemble, resume is not None


# Copied from train.py: main
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
