"""A run from its command line to its result.

The session has the clock, the cap, the score and the run folder. It knows nothing of models, optimizers or schedules:
the script gives it plans, names, numbers, losses per token, and state through state_dict and load_state_dict.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from slowrun import folder as run_folder
from slowrun import rules
from slowrun.clock import Clock, duration
from slowrun.config import RESUME_MAY_CHANGE, RunConfig, as_flags, parse_flags
from slowrun.data import Split, load_split, load_splits, sha256_file, token_bytes, unread_split
from slowrun.folder import RunFolder, begin, check_same_data, reopen, try_to_write_json, write_atomically, write_json
from slowrun.machine import (
    GIB,
    StepProfiler,
    compute_dtype,
    device_name,
    disk_space,
    peak_flops,
    peak_memory,
    profile_ranges,
    total_memory,
)
from slowrun.plan import Sizes, StepPlan, describe, summary
from slowrun.scoring import EvalSet, Score, TokenLosses, data_efficiency
from slowrun.world import World, join

SHORT_RUN = {  # settings of the short runs that tools measure, the same for all scripts
    "val_sequences": 8, "eval_initial": False, "checkpoints": False, "time_cap_min": 0.0, "wandb": "off",
}  # fmt: skip
INITIAL = "initial"  # the validation before the first step, which is not a readout
Nats = dict[str, Tensor]  # by split, "val" and "holdout": what EvalSet.nats returns


class Stateful(Protocol):
    """The content of a checkpoint. Both methods are collective; the state is on the main process, {} on the others."""

    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class NonFiniteLoss(RuntimeError):
    """A loss is NaN or infinite."""


class LossesInFlight:
    """The losses of a step, on their way from the device: a copy that the next step does not wait for."""

    def __init__(self, losses: dict[str, Tensor]):
        self.names = list(losses)
        stacked = torch.stack(list(losses.values()))
        self.event = None
        if stacked.is_cuda:
            self.host = torch.empty_like(stacked, device="cpu", pin_memory=True)
            self.host.copy_(stacked, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = stacked.clone()

    def wait(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


@dataclasses.dataclass(frozen=True)
class StepInFlight:
    """A step that was enqueued and is not recorded yet."""

    step: int
    losses: LossesInFlight
    values: dict[str, Any]
    batch: Tensor


@dataclasses.dataclass
class StopRequest:
    """The first signal that asked this process to stop. A session and its children share one."""

    signal: str = ""  # its name
    time: float = 0.0  # when it came


class Session:
    """A run, as a script's main uses it, in this order: config, splits, require, open, resume, loop, stopped or finish.

    Within the loop: may_step, which starts the clock; did_step; save, validate and keep_member, which are off the clock
    and do nothing if they were done before a resume. In the readout: load_member, token_nats and read_out. All methods
    are collective. State: step (steps done), stopped_by ("" while there are steps to take, then "steps" or "time_cap"),
    interrupted (a signal came), save_is_due, members (names of the weights kept for the readout, oldest first).
    """

    # ------------------------------------------------------------------------------------------------------- beginning

    def __init__(
        self,
        track: str,
        config_class: type[RunConfig],
        demo: dict,
        argv: list[str] | None,
        script: str,
        record_sizes: Callable[[dict], dict] | None = None,
        one_model: bool = True,
        may_change: frozenset[str] = frozenset(),
        reopened_by: frozenset[str] = frozenset(),
    ):
        """Parse the flags, join the processes and read the data. ValueError for everything that cannot work.

        demo, record_sizes: see parse_flags. one_model: whether all processes train one model. may_change: fields that a
        resume may change, beside those of every track. If the run to resume has finished, the process ends, unless a
        field that reopened_by names is set.
        """
        self.started = time.monotonic()
        self.earlier_wall_s = 0.0
        self.track = track
        self.script = Path(script).resolve()
        description = sys.modules[config_class.__module__].__doc__
        line = parse_flags(track, config_class, demo, argv, self.script, description, record_sizes)
        given, resumed = line.values, line.resume
        self.plan_file = line.plan
        self.saved = None
        self.changed: dict[str, Any] = {}  # fields that this resume changes
        may_change |= RESUME_MAY_CHANGE
        if resumed is None:
            self.config = config_class(**given)
            device = self.config.device
        else:  # read by every process, because the device decides how they join
            device = run_folder.read_config(Path(resumed))["config"]["device"]
            self.changed = {name: given[name] for name in sorted(may_change & given.keys())}
        if self.plan_file is not None:
            self._prepare_plan()
            return
        self.world = join(device, one_model)
        if resumed is not None:
            self.saved = self.world.on_main(reopen, track, Path(resumed), given, self.script, may_change)
            self.config = self.world.main_first(partial(config_class, **self.saved["config"] | self.changed))
            if self.saved["finished"] and not any(getattr(self.config, name) for name in reopened_by):
                if self.world.is_main:
                    print(f"{resumed} has finished, see {resumed}/result.json")
                raise SystemExit(0)
        c = self.config
        self.dtype = compute_dtype(c.dtype, self.world.device)
        self.splits = self.world.main_first(load_splits, c.data_dir, c.vocab_size, c.sequence_len)
        self.token_bytes, self.bytes_from = self.world.on_main(token_bytes, c.data_dir, c.vocab_size)
        self.eval_sets = {
            name: self.eval_set(split, self.world) for name, split in self.splits.items() if name != "train"
        }
        self.stop_request = StopRequest()
        self.repeats = 1
        self.parent: Session | None = None
        self.num_children = 0
        self.extended: dict[str, Any] = {}
        self._begin()

    def _begin(self) -> None:
        """The state before the first step."""
        self.clock = Clock()
        self.step = 0
        self.stopped_by = ""
        self.interrupted = False
        self.save_is_due = False
        self.members: list[str] = []
        self.member_files: dict[str, dict] = {}  # what final/members.json says of each member
        self.unsaved: dict[str, dict[str, Tensor]] = {}  # members that a full disk refused, by name
        self.scores: dict[str, Score] = {}  # of the validation set, by readout
        self.in_flight: deque[StepInFlight] = deque()
        self.unprinted_s: list[float] = []  # durations of the steps since the last printed line
        self.last_save = time.monotonic()
        self.saved_step: int | None = None  # of the newest checkpoint
        self.save_failure = ""
        self.projection_at = 10  # the step after which the training time is projected
        self.profiler = StepProfiler(profile_ranges(self.config.profile_steps), self.world.is_main, self.world.cuda)

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has asked this process to stop; other processes may not have had one."""
        return bool(self.stop_request.signal)

    def eval_set(self, split: Split, world: World, max_sequences: int | None = None) -> EvalSet:
        """A split to score by the processes of `world`; by default as many sequences as of the validation set."""
        c = self.config
        count = c.val_sequences if max_sequences is None else max_sequences
        return EvalSet(split, c.sequence_len, count, c.eval_batch, world, self.token_bytes)

    def extend(self, earlier_result: str, **fields) -> None:
        """Lengthen a finished run: open will write these fields to config.json, and rename the earlier result."""
        self.extended = fields
        self.earlier_result = earlier_result
        self.config = dataclasses.replace(self.config, **fields)

    def _write_extension(self) -> dict:
        """Write what extend announced -> the new content of config.json."""
        folder = self.folder.path
        content = run_folder.read_config(folder)
        content |= {key: content[key] | self.extended for key in ("config", "overrides")}
        (folder / "result.json").rename(folder / self.earlier_result)
        write_json(folder / "config.json", content)
        return content

    def _prepare_plan(self) -> None:
        """Set up what --plan needs: no other process, and the training split or a stand-in for it.

        The dtype is bfloat16, as on the GPUs that a run is planned for, unless --dtype or --device cpu says otherwise.
        """
        c = self.config
        cuda = torch.cuda.is_available() and c.device != "cpu"
        self.world = World(0, 1, torch.device("cuda" if cuda else "cpu"))
        self.dtype = compute_dtype(c.dtype, self.world.device)
        if c.dtype == "auto" and c.device != "cpu":
            self.dtype = torch.bfloat16
        self.has_data = (Path(c.data_dir) / "fineweb_train.pt").exists()
        if self.has_data:
            train = load_split(c.data_dir, "train", c.vocab_size, c.sequence_len)
        else:
            train = unread_split(rules.OFFICIAL_TRAIN_TOKENS)
        self.splits = {"train": train}

    def _write_plan(self, plan: StepPlan, sizes: Sizes, short_runs: dict[str, dict], repeats: int) -> NoReturn:
        """Write the plan, for as many processes as torchrun started, and exit; ValueError if that fails."""
        c, device = self.config, self.world.device
        path = Path(c.data_dir) / "fineweb_train.pt"
        data = str(path) if self.has_data else f"{rules.OFFICIAL_TRAIN_TOKENS:,} tokens, as {path} is not there"
        content = {
            "track": self.track,
            "data": data,
            "assumed_data": not self.has_data,
            "repeats": repeats,
            "short_runs": {name: as_flags(SHORT_RUN | settings) for name, settings in short_runs.items()},
            "time_cap_min": c.time_cap_min,
            "vocab_size": c.vocab_size,
            "sequence_len": c.sequence_len,
            "device": {
                "name": device_name(device),
                "memory_gib": total_memory(device) / GIB,
                "peak_flops": peak_flops(device),
            },
        } | describe(plan, sizes, int(os.environ.get("WORLD_SIZE", 1)), c.checkpoints)
        if os.environ.get("RANK", "0") == "0":
            failure = try_to_write_json(Path(self.plan_file), content)
            if failure:
                raise ValueError(f"the plan is not written ({failure}): choose another --plan FILE")
            print(f"NanoGPT Slowrun, {self.track} track, {data}: {summary(content)}\nwritten to {self.plan_file}")
        raise SystemExit(0)

    def require(
        self,
        plan: StepPlan,
        sizes: Sizes,
        short_runs: dict[str, dict],
        repeats: int = 1,
        processes: int | None = None,
        trains: bool = True,
    ) -> None:
        """Refuse a run that cannot fit into memory or on the disk, before anything is allocated (ValueError).

        With --plan the plan is written, and the process ends. short_runs: settings of short runs of each stage, by its
        name, and of "all", for tools that measure them. repeats: how many times the run goes through the plan.
        processes: the number that train one model, by default all. trains: False for a run that only reads out.
        """
        self.model_processes = self.world.size if processes is None else processes
        if self.plan_file is not None:
            self._write_plan(plan, sizes, short_runs, repeats)
        self.plan = plan
        self.sizes = sizes
        self.needed_bytes = self.world.on_main(self._check_memory) if trains else 0.0
        self.disk_line = self.world.on_main(self._check_disk) if trains else "nothing is trained"

    def _check_memory(self) -> float:
        """The estimated bytes per process. On a GPU only the warm-up shows whether the activations fit too."""
        sizes, world, processes = self.sizes, self.world, self.model_processes
        stages = list(self.plan.stages.values())
        static = max(sizes.static_bytes(processes, stage) for stage in stages)
        needed = max(sum(sizes.held_bytes(processes, stage).values()) for stage in stages)
        has = total_memory(world.device)
        text = (
            f"{sizes.parameters / 1e6:,.0f}M parameters need {static / GIB:.0f} GiB per process for weights, gradients "
            "and optimizer"
        )
        if world.cuda:
            if static > has:
                raise ValueError(
                    f"{text}, and the GPU has {has / GIB:.0f} GiB: use more or larger GPUs, or a smaller model"
                )
            return needed
        on_gpu = dataclasses.replace(sizes, dtype=torch.bfloat16)
        gpu_bytes = max(sum(on_gpu.held_bytes(processes, stage).values()) for stage in stages)
        text += (
            f", about {needed / GIB:.0f} GiB with activations, in {name_of(self.dtype)}; this machine has "
            f"{has / GIB:.0f} GiB and no GPU in use"
        )
        advice = (
            f"train it on GPUs of at least {gpu_bytes / GIB:.0f} GiB, or see every technique at toy size with --demo"
        )
        if needed * processes > has:
            raise ValueError(f"{text}: {advice}")
        if sizes.parameters >= 1e8 and self.config.device != "cpu":
            raise ValueError(f"{text}: {advice}. It fits, so --device cpu trains it, slowly")
        return needed

    def _check_disk(self) -> str:
        """The header's line on the disk; ValueError if it has too little space for what the run folder lacks yet."""
        c, sizes = self.config, self.sizes
        folder = Path(self.saved["folder"]) if self.saved else Path(c.runs_dir) / c.run_name
        present, free = disk_space(folder)
        needed = sizes.disk_bytes(c.checkpoints)
        parts = f"weights for the readout, {sizes.members} x {sizes.member_bytes / GIB:.3g} GiB"
        if sizes.score_bytes:
            parts += f", their losses, {sizes.score_bytes / GIB:.3g} GiB"
        if c.checkpoints:
            parts += ", and three checkpoints (two stay while the next is written)"
            parts += f" of each of {sizes.models} models" if sizes.models > 1 else ""
            parts += f", {sizes.checkpoint_bytes / GIB:.3g} GiB each"
        else:
            parts += "; no checkpoints, so --resume would start over"
        text = f"up to {needed / GIB:.3g} GiB in {folder} ({parts}); {free / GIB:.3g} GiB are free"
        if needed - present > free:
            text += f", and {present / GIB:.3g} GiB of it are there already" if present else ""
            raise ValueError(f"the run needs {text}: make space, or choose another --runs-dir")
        return text

    def open(
        self,
        kernels: dict[str, str],
        slower: str = "",
        header: dict[str, str] | None = None,
        has_children: bool = False,
    ) -> None:
        """Make or reopen the run folder, catch signals, and print the header.

        kernels: the choices, by setting. slower: a note on them for a GPU, if they are not the fastest. header: lines
        that replace those about the plan, by title. has_children: whether the training is done by child sessions; then
        each of them is a run of Weights & Biases.
        """
        c, world = self.config, self.world
        self.kernels = kernels
        self.kernels_line = ", ".join(f"{name} {kernel}" for name, kernel in kernels.items())
        if world.cuda and slower:
            self.kernels_line += f" ({slower})"
        self.has_children = has_children
        self.compiled = c.compile == "on" or (c.compile == "auto" and world.cuda)
        hashes = {name: split.sha256 for name, split in self.splits.items()}
        is_new = self.saved is None
        if is_new:
            self.saved = world.on_main(begin, self.track, c, self.script, hashes)
        world.on_main(check_same_data, self.saved, c.data_dir, hashes)
        check_same_data(self.saved, c.data_dir, hashes)  # the other processes may be on other disks
        self.folder = RunFolder(Path(self.saved["folder"]), self.saved["run_id"], world.is_main)
        world.on_main(self.folder.open)
        if self.extended:
            self.saved |= world.on_main(self._write_extension)
        wandb = run_folder.wandb_mode(c.wandb)
        try:
            if not has_children:
                wandb = world.on_main(self.folder.start_wandb, c.wandb, self.saved["config"] | {"track": self.track})
        except ValueError:
            if is_new:  # refused: nothing is left of it
                shutil.rmtree(self.folder.path)
            raise
        self.handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self.log(self._header(wandb, header))
        self.opened = time.monotonic()

    def child(
        self,
        folder: str,
        number: int,
        label: str,
        config: RunConfig,
        world: World,
        plan: StepPlan,
        eval_sets: dict[str, EvalSet],
        repeats: int = 1,
    ) -> Session:
        """A session for a model that a group of processes trains in a folder within this run's.

        It has its own steps, clock, lock, log, metrics, checkpoints and members. It has the command line, the code and
        the machine in common with this session, and a signal that asks to stop reaches both. number: appended to the
        run id. label: put in front of lines on the screen. repeats: how many such models these processes train one
        after the other. ValueError if another process trains it. Collective for `world`, the group.
        """
        child = copy.copy(self)
        child.config = config
        child.world = world
        child.plan = plan
        child.eval_sets = eval_sets
        child.repeats = repeats
        child.parent = self
        child.has_children = False
        child.started = time.monotonic()
        child.earlier_wall_s = 0.0
        child.handlers = {}
        child._begin()
        is_first_group = self.world.rank < world.size  # the bars of several groups would overwrite each other
        path = self.folder.path / folder
        run_id = f"{self.saved['run_id']}-{number:02d}"
        child.folder = RunFolder(path, run_id, world.is_main, label=f"{label} | ", bar=is_first_group)
        begun = world.on_main(child._open_child)
        child.saved = self.saved | {"run_id": run_id, "folder": str(path), "resumed": begun}
        child.opened = time.monotonic()
        self.num_children += 1
        return child

    def _open_child(self) -> bool:
        """Open the folder of a child -> whether it was begun before."""
        path = self.folder.path
        for name in ("checkpoints", "final"):
            (path / name).mkdir(parents=True, exist_ok=True)
        self.folder.open()
        try:
            self.folder.start_wandb(self.config.wandb, dataclasses.asdict(self.config) | {"track": self.track})
        except ValueError as error:
            if not self.parent.num_children:
                raise
            self.log(f"WARNING: {error}")  # other models are trained already: no reason to stop
        return bool(self.folder.checkpoints()) or (path / "metrics.jsonl").stat().st_size > 0

    def warmed_up(self, errors: dict[str, float]) -> None:
        """Log the duration of the warm-up, and the errors of the kernels against their plain twins."""
        parts = [f"{name} {self.kernels[name]} (error {error:.2g})" for name, error in errors.items()]
        seconds = time.monotonic() - self.opened
        self.log(f"warm-up   {seconds:.1f} s, compilation included; {', '.join(parts)}")

    def resume(self, training: Stateful) -> None:
        """Load the newest checkpoint, if the run has one. ValueError if it is damaged."""
        if not self.saved.get("resumed"):
            return
        tensors: dict = {}

        def read() -> dict | None:
            found, info = self.folder.load_checkpoint() or ({}, None)
            tensors.update(found)
            self._check_members(info["members"] if info else [])
            self.folder.drop_metrics_after(info["step"] if info else -1, info["scores"] if info else ())
            (self.folder.path / "result.json").unlink(missing_ok=True)  # of an attempt that failed
            return info

        try:
            info = self.world.on_main(read)
        except ValueError:
            self.close()
            raise
        if info is None:
            self.log("no checkpoint yet: starting from step 0")
            return
        training.load_state_dict(tensors)
        self.step = info["step"]
        self.saved_step = info["step"]
        self.projection_at = self.step + 10
        self.stopped_by = info["stopped_by"]
        self.scores = {name: Score(**score) for name, score in info["scores"].items()}
        self.member_files = {member["name"]: member for member in info["members"]}
        self.members = list(self.member_files)
        self.clock.train_time_s = info["train_time_s"]
        self.clock.recent_s.extend(info["recent_s"])
        self.earlier_wall_s = info["wall_time_s"]
        seconds = self.clock.train_time_s
        self.log(f"resumed at step {self.step}/{self.plan.num_steps}, after {seconds:.1f} s of training")

    def _check_members(self, members: list[dict]) -> None:
        """Check that the weights of the readout are as they were saved (ValueError).

        Those of a child are hashed when they are read out; until then, what is missing is left out.
        """
        for member in list(members):
            path = self.folder.path / "final" / member["file"]
            if self.parent is not None and not path.exists():
                self.log(f"WARNING: {path} is missing or damaged: it is left out")
                members.remove(member)
            elif self.parent is None and (not path.exists() or sha256_file(path) != member["sha256"]):
                raise ValueError(f"{path}, of the readout, is missing or damaged: empty checkpoints/ to start over")

    # -------------------------------------------------------------------------------------------------------- the loop

    def may_step(self) -> bool:
        """Whether to take another step: there is one, it fits into the cap, and no signal came. Then the clock starts.

        All processes agree. Sets stopped_by, interrupted and save_is_due.
        """
        c = self.config
        if self.step == self.plan.num_steps:
            self.stopped_by = self.stopped_by or "steps"
        over_cap = not self.stopped_by and self.clock.next_step_exceeds(60 * c.time_cap_min, len(self.in_flight))
        due = c.checkpoints and time.monotonic() - self.last_save >= 60 * c.checkpoint_min
        over_cap, self.interrupted, self.save_is_due = self.world.any([over_cap, self.stop_requested, due])
        if over_cap:
            self.stopped_by = "time_cap"
        if self.stopped_by or self.interrupted:
            self._read_losses(keep=0)
            self.log(self.profiler.after_step(self.step, self.folder.path, is_last=True))
            self.clock.stop()
            return False
        self.clock.start()
        if self.profiler.begins_with(self.step + 1):
            self._read_losses(keep=0)
            self.profiler.start(self.step + 1)
        return True

    def did_step(self, losses: dict[str, Tensor], values: dict[str, Any], batch: Tensor) -> None:
        """Count a step that was enqueued. On a GPU its losses are read one step late, so that the device never waits.

        losses: this process's part of each, (), which the session sums; the first is printed. values: for the metrics.
        batch: the step's sequences, which are saved if a loss is not finite.
        """
        self.in_flight.append(StepInFlight(self.step, LossesInFlight(losses), values, batch))
        self.step += 1
        self._read_losses(keep=1 if self.world.cuda else 0)
        self.log(self.profiler.after_step(self.step, self.folder.path))
        if self.step == self.projection_at:
            self._print_projection()

    def save(self, training: Stateful) -> None:
        """Write a checkpoint. If this step is saved already, add only what was read out since.

        A full disk does not end the run: the failure is logged, and earlier checkpoints stay.
        """
        if not self.config.checkpoints:
            return
        with self._off_the_clock():
            if self.saved_step == self.step and not self.save_failure:
                self._update_checkpoint()
            else:
                self._write_checkpoint(training.state_dict())
        self.last_save = time.monotonic()
        self.save_is_due = False

    def token_nats(self, token_losses: TokenLosses) -> Nats | None:
        """The losses of all targets that are scored, for readouts that mix predictions; None if a signal came."""
        nats = {}
        with self._off_the_clock():
            for split, eval_set in self.eval_sets.items():
                nats[split] = eval_set.nats(token_losses, self._agree_on_interruption)
                if nats[split] is None:
                    return None
        return nats

    def validate(self, readout: str, losses: TokenLosses | Nats, **others: float) -> bool:
        """Score the validation set under this name, log it and draw it; False if a signal came before the end.

        others: further losses to log and to record.
        """
        if readout in self.scores:
            return True
        if not self.read_out(readout, losses):
            return False
        score = self.scores[readout]
        bpb = f" | {score.bpb:.4f} bits per byte" if score.bpb else ""
        beside = "".join(f" | {name} {loss:.4f}" for name, loss in others.items())
        self.log(f"{readout} | step {self.step}/{self.plan.num_steps} | val {score.loss:.4f}{bpb}{beside}")
        epoch = int(self.plan.epoch[self.step])
        values = {"step": self.step, "epoch": epoch, "readout": readout}
        self.folder.record(values | {"val_loss": score.loss, "val_bpb": score.bpb} | others)
        with self._off_the_clock():
            self.folder.draw_curve(self.plan.labels)
        return True

    def read_out(self, readout: str, losses: TokenLosses | Nats) -> bool:
        """Score the validation set under this name, for the result; False if a signal came before the end."""
        if readout in self.scores:
            return True
        with self._off_the_clock():
            score = self._score("val", losses)
        if score is None:
            return False
        if not math.isfinite(score.loss):
            self._fail(f"the validation loss of {readout} is {score.loss} after step {self.step}", self.step, None)
        self.scores[readout] = score
        return True

    def keep_member(self, name: str, weights: dict[str, Tensor], **notes: Any) -> None:
        """Keep weights for the readout, in final/. Those that a full disk refuses wait in memory.

        notes: further entries for the member in final/members.json.
        """
        if name in self.members:
            return
        with self._off_the_clock():
            self.members.append(name)
            self.member_files[name] = {
                "name": name,
                "file": f"{name}.safetensors",
                "epoch": int(self.plan.epoch[self.step]),
                "step": self.step,
            } | notes
            if self.world.is_main:
                self.unsaved[name] = {key: value.detach().to("cpu", copy=True) for key, value in weights.items()}
                failure = self._save_members()
                if failure:
                    self.log(f"NOT saved: {failure}. It waits in memory for space on the disk")

    def drop_member(self, name: str) -> None:
        """Drop a member. Its file is deleted once a checkpoint is written that does not name it."""
        self.members.remove(name)
        del self.member_files[name]
        self.unsaved.pop(name, None)

    def load_member(self, name: str) -> dict[str, Tensor]:
        """The weights of a member, on the device of every process."""
        loaded = {}
        if self.world.is_main:
            loaded = self.unsaved.get(name) or load_file(self.folder.path / "final" / self.member_files[name]["file"])
        layout = self.world.on_main(lambda: [(key, p.shape, p.dtype) for key, p in loaded.items()])
        tensors = {}
        for key, shape, dtype in layout:
            tensor = loaded[key] if self.world.is_main else torch.empty(shape, dtype=dtype)
            tensors[key] = tensor.to(self.world.device)
            self.world.broadcast(tensors[key])
        return tensors

    # -------------------------------------------------------------------------------------------------------------- end

    def stopped(self, training: Stateful | None) -> int:
        """Save what a signal interrupted, and print how to resume -> exit code: 0 if it is saved.

        training: None for a session whose children train.
        """
        if training is not None:
            self.save(training)
            self.folder.draw_curve(self.plan.labels)
        return self._say_how_to_resume()

    def finish(
        self, readout: str, losses: TokenLosses | Nats, mixing: str, members: dict[str, float], stage: dict
    ) -> int:
        """Score the holdout, and write final/members.json and result.json -> exit code: 0 if they are written.

        readout: the declared one. losses: of its prediction. mixing ("weight" or "probability"), members (weights by
        name) and stage (arguments of the model): what final/members.json needs to make the prediction again.
        """
        holdout = None
        if "holdout" in self.eval_sets:
            holdout = self._score("holdout", losses)
            if holdout is None:
                if self.config.checkpoints and not self.save_failure:  # else there is none of this step
                    self._update_checkpoint()
                return self._say_how_to_resume()
        failure = self.world.on_main(self._save_final, mixing, members, stage)
        if self.world.is_main:
            result = self._result(readout, holdout, mixing)
            self.folder.draw_curve(self.plan.labels, result["val_loss"])
            if failure:  # printed, but not written: it would look finished
                self.log(final_block(result, self.folder.path))
            else:
                failure = self.publish(result)
            if not failure:
                shutil.rmtree(self.folder.path / "checkpoints")
                self.folder.summarize(result)
        failure = self.world.on_main(lambda: failure)
        return self.finished(failure)

    def publish(self, result: dict, name: str = "result.json") -> str:
        """Print a result and write it, on the main process -> why it is not written; empty if it is."""
        self.log(final_block(result, self.folder.path))
        return try_to_write_json(self.folder.path / name, result)

    def finished(self, failure: str) -> int:
        """Close the run -> exit code. failure: why the result is not saved, if it is not."""
        if failure:
            folder = self.folder.path
            self.log(f"the result is NOT saved ({failure}): make space, then continue with --resume {folder}")
        self.close()
        return 1 if failure else 0

    def _save_final(self, mixing: str, members: dict[str, float], stage: dict) -> str:
        """Complete final/, with members.json, and delete other files -> why it failed; empty if it did not."""
        chosen = [self.member_files[name] | {"weight": weight} for name, weight in members.items()]
        final = self.folder.path / "final"
        for path in final.iterdir():
            if path.name not in [member["file"] for member in chosen]:
                path.unlink()
        for name in self.unsaved.keys() - members.keys():
            del self.unsaved[name]
        if self._save_members():  # the disk is full: the older checkpoint makes room
            self.folder.drop_checkpoints(keep=1)
            failure = self._save_members()
            if failure:
                return failure
        chosen = [self.member_files[name] | {"weight": weight} for name, weight in members.items()]  # now with hashes
        content = {"mixing": mixing, "stage": stage, "members": chosen}
        return try_to_write_json(final / "members.json", content)

    def _result(self, readout: str, holdout: Score | None, mixing: str) -> dict:
        """The content of result.json of a run that trains one model."""
        c, world, clock = self.config, self.world, self.clock
        score = self.scores[readout]
        readouts = {name: score.loss for name, score in self.scores.items() if name != INITIAL}
        peak = peak_flops(world.device)
        seconds = max(clock.train_time_s, 1e-9)
        result = {
            "status": "finished",
            "stopped_by": self.stopped_by,
            "readouts": readouts,
            "steps": self.step,
            "tokens": int(self.plan.tokens[self.step]),
            "epochs": int(self.plan.epoch[self.step]),
            "train_time_s": clock.train_time_s,
            "wall_time_s": self.wall_time_s(),
            "time_cap_min": c.time_cap_min,
            "world_size": world.size,
            "mixing": mixing,
            "tokens_per_s": int(self.plan.tokens[self.step]) / seconds,
            "mfu": self.plan.flops[self.step] / seconds / peak / world.size if peak else None,
        }
        return self.complete_result(result, score, holdout)

    def complete_result(
        self, result: dict, score: Score, holdout: Score | None, final_sha256: dict[str, str] | None = None
    ) -> dict:
        """The result with its scores, hardware, versions, hashes and eligibility added.

        final_sha256: hashes of files of final/ that are known already, by name.
        """
        world, folder = self.world, self.folder.path
        hashes = self.saved["data_sha256"]
        known = final_sha256 or {}
        complete = {
            "track": self.track,
            "run_id": self.saved["run_id"],
            "val_loss": score.loss,
            "val_bpb": score.bpb,
            "best_val_loss": min(result["readouts"].values()),
            "holdout_loss": holdout and holdout.loss,
            "holdout_bpb": holdout and holdout.bpb,
            "data_efficiency": data_efficiency(score.loss) if hashes["val"] == rules.OFFICIAL_SHA256["val"] else None,
            **result,
            "seed": self.config.seed,
            "device": device_name(world.device),
            "dtype": name_of(self.dtype),
            "compiled": self.compiled,
            **self.kernels,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "peak_memory_gib": peak_memory(world.device) / GIB,
            "parameters": self.sizes.parameters,
            "val_tokens": score.tokens,
            "val_bytes": score.bytes,
            "data_sha256": hashes,
            "code_sha256": run_folder.code_sha256(folder / "code"),
            "instrument_sha256": run_folder.instrument_sha256(folder / "code" / "slowrun"),
            "final_sha256": {
                path.name: known.get(path.name) or sha256_file(path) for path in sorted((folder / "final").iterdir())
            },
        }
        reasons = rules.reasons_not_eligible(self.track, complete)
        return complete | {"eligible": not reasons, "not_eligible_because": reasons}

    # ---------------------------------------------------------------------------------------------------------- signals

    def _on_signal(self, number: int, frame) -> None:
        """Ask to stop after the current step or batch.

        A second signal soon after is the same stop, from a scheduler and from torchrun; a later one ends the process.
        """
        now = time.monotonic()
        request = self.stop_request
        if request.signal and now - request.time > 5:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not request.signal:
            request.signal = signal.Signals(number).name
            request.time = now

    def _agree_on_interruption(self) -> bool:
        self.interrupted = self.world.any([self.stop_requested])[0]
        return self.interrupted

    # ---------------------------------------------------------------------------------------------------------- private

    def _score(self, split: str, losses: TokenLosses | Nats) -> Score | None:
        """Score a split by a function of a batch, or by losses that are there already; None if a signal came."""
        eval_set = self.eval_sets[split]
        nats = losses[split] if isinstance(losses, dict) else eval_set.nats(losses, self._agree_on_interruption)
        return None if nats is None else eval_set.score(nats)

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Wait for the steps in flight, count them, and stop the clock until the end of the block."""
        self._read_losses(keep=0)
        was_running = self.clock.running
        self.clock.stop()
        yield
        if was_running:
            self.clock.start()

    def _read_losses(self, keep: int) -> None:
        """Wait for the losses of all steps but the newest `keep`, and record them."""
        while len(self.in_flight) > keep:
            done = self.in_flight.popleft()
            local = done.losses.wait()
            dt_s = self.clock.lap()
            losses = dict(zip(done.losses.names, self.world.sum(local), strict=True))
            self._record_step(done.step, dt_s, losses, done.values)
            for name, loss in losses.items():
                if not math.isfinite(loss):
                    self._fail(f"the {name} is {loss} at step {done.step + 1}", done.step + 1, done.batch)

    def _record_step(self, step: int, dt_s: float, losses: dict[str, float], values: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, move the progress bar, and every log_every steps print a line."""
        c, plan = self.config, self.plan
        done = step + 1
        progress = {"step": done, "epoch": int(plan.epoch[step]) + 1, "dt_s": dt_s, "tokens": int(plan.tokens[done])}
        memory = {"peak_memory_gib": round(peak_memory(self.world.device) / GIB, 3)}
        self.folder.record(progress | losses | values | memory, to_wandb=done % c.log_every == 0)
        if step in plan.stages and step > 0:
            self.log(f"from step {done} on: {plan.stages[step].name}")
        self.unprinted_s.append(dt_s)
        step_s = statistics.mean(self.unprinted_s)
        tokens_per_s = (plan.tokens[done] - plan.tokens[step]) / step_s
        loss = next(iter(losses.values()))
        parts = [f"train {loss:.4f}", f"lr {values.get('lr', math.nan):.2f}", f"{tokens_per_s / 1e3:.1f}k tok/s"]
        if peak := peak_flops(self.world.device):
            used = (plan.flops[done] - plan.flops[step]) / step_s / self.world.size
            parts.append(f"{100 * used / peak:.1f}% mfu")
        parts += [f"{step_s:.2f} s/step", f"eta {duration(self._remaining_s(done, step_s))}"]
        is_printed = done % c.log_every == 0 or done == plan.num_steps
        self.folder.progress(done, plan.num_steps, parts, is_printed)
        if is_printed:
            self.unprinted_s.clear()

    def _remaining_s(self, step: int, step_s: float) -> float:
        """Projected time of the steps from `step` on, at the rate of operations of steps that take step_s."""
        flops = self.plan.flops
        return step_s * (flops[-1] - flops[step]) / (flops[step] - flops[step - 1])

    def _print_projection(self) -> None:
        self._read_losses(keep=0)
        cap = self.config.time_cap_min
        total_s = self.clock.train_time_s + self._remaining_s(self.step, self.clock.step_s)
        text = f"projected training time {duration(total_s)}"
        if cap:
            text += f", cap {cap:g} min"
        elif rules.RULES[self.track].cap_min:
            text += ", cap lifted"
        if self.repeats > 1:
            text += f", {duration(self.repeats * total_s)} for all {self.repeats}, one after the other"
        self.log(text)
        if 0 < 60 * cap < total_s:
            self.log("WARNING: training will stop early, at the cap; --time-cap-min 0 lifts it (not eligible then)")

    def _checkpoint_info(self) -> dict:
        return {
            "step": self.step,
            "stopped_by": self.stopped_by if self.stopped_by == "time_cap" else "",
            "scores": {name: dataclasses.asdict(score) for name, score in self.scores.items()},
            "members": [member for member in self.member_files.values() if "sha256" in member],
            "train_time_s": self.clock.train_time_s,
            "recent_s": list(self.clock.recent_s),
            "wall_time_s": self.wall_time_s(),
        }

    def _write_checkpoint(self, tensors: dict) -> None:
        started = time.monotonic()
        failure = ""
        if self.world.is_main:
            failure = self._save_members() or self.folder.save_checkpoint(tensors, self._checkpoint_info())
            outcome = f"NOT saved: {failure}. The run continues, and earlier checkpoints stay" if failure else "saved"
            self.log(f"checkpoint at step {self.step} {outcome}, in {time.monotonic() - started:.1f} s")
            if not failure:
                self._delete_dropped_members()
        self.save_failure = self.world.on_main(lambda: failure)
        if not self.save_failure:
            self.saved_step = self.step

    def _update_checkpoint(self) -> None:
        """Add what was read out since to the checkpoint of this step, which has the tensors already."""
        failure = ""
        if self.world.is_main:
            failure = self._save_members() or self.folder.update_checkpoint(self._checkpoint_info())
            if failure:
                self.log(f"checkpoint at step {self.step} NOT updated: {failure}")
            else:
                self._delete_dropped_members()
        self.world.barrier()

    def _delete_dropped_members(self) -> None:
        files = [member["file"] for member in self.member_files.values()]
        for path in (self.folder.path / "final").iterdir():
            if path.name not in files:
                path.unlink()

    def _save_members(self) -> str:
        """Write the members that are only in memory -> why they could not be written; empty if they were."""
        for name in list(self.unsaved):
            path = self.folder.path / "final" / self.member_files[name]["file"]
            try:
                write_atomically(path, partial(save_file, self.unsaved[name]))
            except Exception as error:  # an OSError, or safetensors' own
                return f"final/{path.name}: {error}"
            self.member_files[name]["sha256"] = sha256_file(path)
            del self.unsaved[name]
        return ""

    def _fail(self, message: str, step: int, batch: Tensor | None) -> NoReturn:
        """End the run, and keep the evidence: every process's part of the step's sequences."""
        if batch is not None:
            path = self.folder.path / f"non_finite_rank_{self.world.rank}.pt"
            write_atomically(path, partial(torch.save, {"step": step, "batch": batch.cpu()}))
        if self.world.is_main:
            result = {"track": self.track, "status": "failed", "stopped_by": "non_finite_loss", "steps": step}
            write_json(self.folder.path / "result.json", result | {"run_id": self.saved["run_id"]})
            kept = ", ".join(path.stem for path in self.folder.checkpoints()) or "none, it starts over"
            self.log(f"stopped: {message}")
            self.log(f"checkpoints before it, from which --resume repeats the steps: {kept}")
        self.close()
        raise NonFiniteLoss(message)

    def _say_how_to_resume(self) -> int:
        stopped = f"stopped by {self.stop_request.signal or 'a signal'}"
        stopped += f" after step {self.step}" if not self.has_children else ""
        command = resume_command(self.world.size, self.folder.path)
        if self.parent is not None:
            self.log(stopped)  # the parent says how to resume
            return 1 if self.save_failure else 0
        if self.config.checkpoints:
            self.log(f"{stopped}; resume with: {command}")
        else:
            kept = self.folder.checkpoints()
            begins = f"continues from step {int(kept[-1].stem[5:])}" if kept else "starts over"
            self.log(f"{stopped}, which --no-checkpoints did not save: {command} {begins}")
        self.close()
        return 0 if self.config.checkpoints and not self.save_failure else 1

    def close(self) -> None:
        """Restore the signal handlers and release the lock."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.folder.close()

    def log(self, text: str) -> None:
        """Print lines, and keep them in log.txt; nothing for an empty text."""
        if text:
            self.folder.log(text)

    def _header(self, wandb: str, instead: dict[str, str] | None) -> str:
        c, world, plan, saved = self.config, self.world, self.plan, self.saved
        overrides = saved["overrides"] | self.changed | self.extended
        settings = ", ".join(f"{k} {v}" for k, v in overrides.items()) or "the defaults, the current record"
        compiled = "compiled" if self.compiled else "not compiled"
        batch = plan.tokens[-1] / plan.num_steps
        about_plan = instead or {
            "plan": f"{plan.num_steps:,} steps of {batch:,.0f} tokens, {plan.epoch[-1]} epochs, "
            + (f"cap {c.time_cap_min:g} min" if c.time_cap_min else "no cap (not eligible)"),
            "stages": "; ".join(f"from step {step + 1}: {stage.name}" for step, stage in plan.stages.items()),
        }
        lines = {
            "run": f"{saved['folder']}, id {saved['run_id']}, wandb {wandb}",
            "command": shlex.join(saved["command"]),
            "settings": settings,
            "versions": f"python {platform.python_version()}, torch {torch.__version__}, cuda {torch.version.cuda}",
            "device": f"{world.size} x {device_name(world.device)}, {name_of(self.dtype)}, {compiled}, about "
            f"{self.needed_bytes / GIB:.2g} GiB per process",
            "kernels": self.kernels_line,
            "disk": self.disk_line,
            "data": f"{c.data_dir}: {rules.describe_data(self.splits)}; bytes of tokens {self.bytes_from}",
            "model": f"{self.sizes.parameters:,} parameters",
        } | about_plan
        return "\n".join(
            [f"NanoGPT Slowrun, {self.track} track", *(f"{name:10}{text}" for name, text in lines.items())]
        )

    def wall_time_s(self) -> float:
        return self.earlier_wall_s + time.monotonic() - self.started


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def final_block(result: dict, folder: Path) -> str:
    """The block that a run prints at its end."""
    bpb = f", {result['val_bpb']:.4f} bits per byte" if result["val_bpb"] else ""
    holdout = f"{result['holdout_loss']:.4f}" if result["holdout_loss"] is not None else "none"
    several = len(result["final_sha256"]) > 2  # the members, and members.json
    averaged = f"{result['mixing']}-averaged" if several else "one member"
    ended = "finished" if result["stopped_by"] == "steps" else f"stopped by {result['stopped_by']}"
    because = "; ".join(result["not_eligible_because"])
    lines = [
        f"{result['track']} track, seed {result['seed']}, {ended} after {result['steps']:,} steps",
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


def resume_command(processes: int, folder: Path) -> str:
    """The command that resumes a run on this machine."""
    start = "python" if processes == 1 else f"torchrun --standalone --nproc_per_node={processes}"
    if processes != int(os.environ.get("LOCAL_WORLD_SIZE", processes)):  # torchrun says how many are on this machine
        start = "torchrun, on all machines as before,"
    return f"{start} {sys.argv[0]} --resume {folder}"


def exit_code(main: Callable[[], int], script: str) -> int:
    """Call a script's main -> its exit code: 0 finished, or stopped and saved; 1 failed; 2 refused."""
    try:
        return main()
    except NonFiniteLoss:  # the log has the reason
        return 1
    except (ValueError, torch.OutOfMemoryError) as error:
        if os.environ.get("RANK", "0") == "0" or dist.is_initialized():  # before they join, all have the same error
            advice = "" if isinstance(error, ValueError) else "\nLess memory: --device-batch, --eval-batch"
            print(f"{Path(script).name}: error: {error}{advice}", file=sys.stderr)
        return 2


def launch(main: Callable[[], int]) -> NoReturn:
    """Run a script's main and exit with its exit code."""
    code = exit_code(main, sys.argv[0])
    if dist.is_initialized():
        if code == 0:  # after an error the other processes may never come
            dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)  # a thread of gloo that wants the interpreter can abort a regular exit
    sys.exit(code)
