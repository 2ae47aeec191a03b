#!/usr/bin/env python
"""Show that a change moved no number: record small runs of one commit, and compare another commit with them.

    python tests/trace.py record FOLDER                      # before the change: runs every case, keeps what came out
    python tests/trace.py compare FOLDER                     # after it: runs them again, compares bit for bit
    python tests/trace.py compare FOLDER --tolerance 1e-12   # float64 only, for what is computed in another order
    python tests/trace.py record FOLDER --checkout ../old    # another checkout, such as a worktree of an old commit

--fast takes a subset of about two minutes on two cores, --only cases by name. A recording that was interrupted goes on
where it was. Compared are all training losses,
validation losses, readouts, weights of members, counts of steps and tokens, and every tensor of final/. The exit code
is 1 if anything differs or a run fails, 2 if the recording cannot be used like that.

Scripts are driven by their command line alone, so that one trace.py serves old and new commits. Floating-point numbers
are not portable: bits are only compared on the CPU model, and with the torch version, of the recording. In float32, two
right implementations soon drift apart; compare bits, or float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "limited": "train.py",
    "tiny": "tiny/train.py",
    "two_hour": "two_hour/train.py",
    "unlimited": "unlimited/train.py",
}
RENAMED = {  # setting -> names of its flag, of which the first that --help offers is meant
    "tiny": {
        "passes": ("late_passes", "passes"),
        "passes_from": ("late_passes_from", "passes_from"),
        "decay_hold": ("decay_hold_epochs", "decay_hold"),
        "decay_low": ("decay_low_epochs", "decay_low"),
        "decay_low_value": ("decay_low_value", "decay_low"),  # today's decay_low is what was decay_low_value
        "decay_end_value": ("decay_end", "decay_end_value"),
        "ema_decay": ("ema_epoch_decay", "ema_decay"),
    }
}
TIMEOUT_S = 900  # of one start of a script; a compiled run takes one to two minutes

# ======================================================================================================================
# Cases
# ======================================================================================================================


@dataclass(frozen=True)
class Case:
    """A run of a script. Settings have the names of commit b81ce11; RENAMED knows what became of them."""

    name: str  # track/dtype/what
    track: str
    settings: dict
    processes: int = 1
    data: str = "data"  # folder of the recording with the tokens
    stops: list = field(default_factory=list)  # (signal, after so many steps): the run is stopped, and resumed
    then: list = field(default_factory=list)  # settings with which the finished run is resumed, one after the other
    same_as: str = ""  # case that must end the same
    fast: bool = False

    @property
    def dtype(self) -> str:
        return self.name.split("/")[1]


V = 97  # vocabulary of the data; the BOS is 96
COMMON = {
    "vocab_size": V, "sequence_len": 32, "n_layer": 4, "n_head": 2, "n_embd": 32, "batch_tokens": 1024,
    "micro_batch": 2, "eval_batch": 8, "lr_multiplier": 1.0, "weight_decay": 0.3, "dropout": 0.1,
}  # fmt: skip
EPOCHS = {"num_epochs": 3, "swa_epochs": 1, "readout_epochs": 2}
REPLAY = {"replay_start": 2, "replay_end": 3, "stochastic_depth": 0.1}
TOY = {  # every technique of the track's record, and all that is random
    "limited": COMMON | EPOCHS | REPLAY | {"replay_from_epoch": 2},
    "tiny": COMMON | EPOCHS | {"micro_batch": 4, "passes_from": 0.5, "decay_hold": 0, "decay_low": 1, "ema_every": 2},
    "two_hour": COMMON | EPOCHS | REPLAY | {
        "replay_from_epoch": 2, "meta_gradient": True, "window_schedule": "1-1:4,12;2-2:12,28;3-9:20,32"
    },
    "unlimited": COMMON | REPLAY | {
        "chains": 2, "cycles": 3, "cycle_epochs": 1, "teach_after": 1, "fitness_tokens": 500,
        "outer_batch_tokens": 512, "replay_loops": 1, "processes_per_chain": 1,
    },
}  # fmt: skip
QUIET = {track: {k: 0.0 for k in ("dropout", "stochastic_depth") if k in toy} for track, toy in TOY.items()}
BATCHES = {  # one micro-step is halved by the meta-gradient, several are shared out
    "one-micro-step": {"micro_batch": 4},
    "one-micro-step-small-passes": {"micro_batch": 4, "device_batch": 1},
    "two-micro-steps": {"micro_batch": 2},
    "two-micro-steps-small-passes": {"micro_batch": 2, "device_batch": 1},
    "four-micro-steps": {"micro_batch": 1},
    "no-meta-gradient": {"meta_gradient": False},
    "no-meta-gradient-small-passes": {"meta_gradient": False, "micro_batch": 4, "device_batch": 2},
}
VARIANTS = {  # in float64, on one process
    "limited": BATCHES,
    "tiny": BATCHES | {"single-pass": {"passes": 1}},
    "two_hour": BATCHES,
    "unlimited": {
        "small-passes": {"device_batch": 1},
        "four-micro-steps": {"micro_batch": 1},
        "meta-gradient": {"meta_gradient": True, "micro_batch": 1},
        "meta-gradient-small-passes": {"meta_gradient": True, "batch_tokens": 2048, "outer_batch_tokens": 1024}
        | {"device_batch": 1},
        "no-teacher": {"teach_after": 0},
        "independent": {"members": "independent"},
        "independent-without-teacher": {"members": "independent", "teach_after": 0},
        "uniform-weights": {"selection": "uniform"},
        "logits": {"selection": "uniform", "average": "logit"},
        "first-left-out": {"leave_out_first": True},
        "few-kept": {"keep": 2},
        "longer-first-cycle": {"first_cycle_epochs": 2, "replay_from": 0.5, "warmdown": 0.5, "clip": 0.0},
    },
}
FAST_RECORDS = {"limited": (1, 11), "tiny": (8, 13), "two_hour": (1,), "unlimited": (8,)}


def case_list(checkout: Path) -> list[Case]:
    """All cases; the settings files of records are the checkout's."""
    cases = []
    for track, toy in TOY.items():
        together = {"processes_per_chain": 2} if track == "unlimited" else {}
        layers = {"n_layer": 2} | {k: v for k, v in {"replay_start": 1, "replay_end": 2}.items() if k in toy}
        cases.append(Case(f"{track}/float32/compiled", track, toy | layers | {"compile": "on"}, data="few"))
        for dtype in ("float32", "float64", "bfloat16"):
            fast = dtype != "bfloat16"
            cases.append(Case(f"{track}/{dtype}/1-process", track, toy, fast=fast))
            cases.append(Case(f"{track}/{dtype}/2-processes", track, toy | together, 2, fast=fast))
        cases.append(Case(f"{track}/float64/not-random", track, toy | QUIET[track]))
        cases.append(Case(f"{track}/float64/not-random-2-processes", track, toy | QUIET[track] | together, 2))
        validation = {"eval_initial": True, "eval_batch": 3, "val_sequences": 31}
        for name, changes in (VARIANTS[track] | {"validation": validation}).items():
            if toy | changes != toy:
                cases.append(Case(f"{track}/float64/{name}", track, toy | changes))
        stops = [("SIGTERM", 3), ("SIGKILL", 24 if track == "unlimited" else 8)]
        whole = f"{track}/float64/1-process"
        settings = toy | {"checkpoint_min": 0.0}
        cases.append(Case(f"{track}/float64/resumed", track, settings, stops=stops, same_as=whole))
        cases += record_cases(checkout, track)
    for dtype in ("float32", "float64"):
        cases.append(Case(f"unlimited/{dtype}/2-processes-a-chain-each", "unlimited", TOY["unlimited"], 2))
    then = [{"add_chains": 1}, {"select_only": True, "selection": "uniform"}]
    cases.append(Case("unlimited/float64/chain-added", "unlimited", TOY["unlimited"], then=then))
    assert len({case.name for case in cases}) == len(cases)
    return cases


def record_cases(checkout: Path, track: str) -> list[Case]:
    """A case in float32 and one in float64 for each settings file of a track."""
    cases = []
    for path in sorted((checkout / "records" / track).glob("[0-9][0-9]-*.json")):
        number = int(path.name[:2])
        sizes = toy_sizes(track, json.loads(path.read_text())["settings"]) | {"record": number}
        for dtype in ("float32", "float64"):
            fast = dtype == "float64" and number in FAST_RECORDS[track]
            cases.append(Case(f"{track}/{dtype}/record-{number:02}", track, sizes, data="few", fast=fast))
    return cases


def toy_sizes(track: str, record: dict) -> dict:
    """Settings that make a record a run of a few steps: sizes only, and what the record goes without stays off."""
    random = ("dropout", "stochastic_depth")
    sizes = {k: v for k, v in TOY[track].items() if k not in random and record.get(k, True)}
    sizes |= {"n_layer": 2} | {k: v for k, v in {"replay_start": 1, "replay_end": 2}.items() if k in sizes}
    sizes.pop("meta_gradient", None)
    if track == "unlimited":
        sizes |= {k: min(TOY[track][k], record[k]) for k in ("chains", "cycles", "teach_after") if k in record}
        sizes |= {"fitness_tokens": 300} | {k: 1 for k in ("first_cycle_epochs",) if k in record}
        if record.get("outer_batch_tokens") == 524288:
            sizes["outer_batch_tokens"] = sizes["batch_tokens"]
        return sizes
    sizes["num_epochs"] = 2
    if record.get("readout", "average") != "average":
        del sizes["readout_epochs"]
    if track == "tiny" and not record.get("decay_schedule", True):  # their defaults do not fit, and need not
        del sizes["decay_hold"], sizes["decay_low"]
    if track == "two_hour" and ";" not in record.get("window_schedule", ";"):
        sizes["window_schedule"] = "1-9:16,32"
    if record.get("xsa_layers", 0) > 0:
        sizes["xsa_layers"] = 1
    return sizes


# ======================================================================================================================
# Data
# ======================================================================================================================

TOKENS = {  # by folder
    "data": {"val": 1700, "train": 4800, "holdout": 1500},
    "few": {"val": 400, "train": 2400, "holdout": 400},
}


def write_data(folder: Path, tokens: dict[str, int]) -> None:
    """Splits of a Markov chain over 96 tokens, in documents of 5 to 60 tokens, in the format of prepare_data.py."""
    folder.mkdir(parents=True)
    random, splits, seeds = np.random.RandomState(0), {}, {"val": 42, "train": 43, "holdout": 44}
    for split, count in tokens.items():
        starts = np.concatenate([[0], np.cumsum(random.randint(5, 60, size=count))])
        starts = starts[starts < count - 1].astype(np.int64)
        noise, values = random.randint(0, 4, size=count), np.zeros(count, dtype=np.uint16)
        for i in range(1, count):
            values[i] = (int(values[i - 1]) * 5 + noise[i]) % (V - 1)
        values[starts] = V - 1
        path, content = folder / f"fineweb_{split}.pt", {"tokens": torch.from_numpy(values)}
        content |= {"doc_starts": torch.from_numpy(starts), "bos_id": V - 1}
        torch.save(content | {"seq_shuffle_seed": seeds[split], "seq_size": 2049}, path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        splits[split] = {"tokens": count, "documents": len(starts), "sha256": sha256}
    meta = {"source": "trace", "revision": "0", "tokenizer": "trace", "vocab_size": V, "bos_id": V - 1}
    meta |= {"splits": splits, "token_bytes": [1 + i % 4 for i in range(V - 1)] + [0]}
    (folder / "meta.json").write_text(json.dumps(meta))


# ======================================================================================================================
# Running
# ======================================================================================================================


class RunFailed(Exception):
    """A script failed; the message has the end of what it printed."""


@cache
def offered_flags(script: Path) -> frozenset[str]:
    """The flags in a script's --help."""
    command, wide = [sys.executable, str(script), "--help"], script_environment() | {"COLUMNS": "10000"}
    done = subprocess.run(command, env=wide, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RunFailed(f"{script} --help failed: {done.stderr[-2000:]}")
    return frozenset(re.findall(r"^ +--([a-z][a-z0-9-]*)", done.stdout, re.MULTILINE))


def flag_of(script: Path, track: str, setting: str) -> str:
    """The name of a setting's flag in this script, without the dashes in front."""
    names = [name.replace("_", "-") for name in RENAMED.get(track, {}).get(setting, (setting,))]
    if len(names) == 1:
        return names[0]
    offered = [name for name in names if name in offered_flags(script)]
    if not offered:
        raise RunFailed(f"{script} has no flag for {setting}: name the new one in RENAMED of {__file__}")
    return offered[0]


def flags(script: Path, track: str, settings: dict) -> list[str]:
    """{"n_layer": 4, "meta_gradient": False} -> ["--n-layer=4", "--no-meta-gradient"]"""
    named = {flag_of(script, track, setting): value for setting, value in settings.items()}
    return [
        f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in named.items()
    ]


def script_environment() -> dict[str, str]:
    """One thread per process, no GPU, no wandb, nothing of a launcher around this."""
    others = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "WANDB_API_KEY")
    kept = {name: value for name, value in os.environ.items() if name not in others}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return kept | threads | {"PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}


def run_script(script: Path, processes: int, arguments: list[str], run: Path, stop: tuple | None = None) -> None:
    """Run a script to its end, or until `stop`, a signal's name and after how many steps of the run it is sent."""
    command = [sys.executable, str(script), *arguments]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command[1:1] = launcher
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=run.parent, env=script_environment(), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = stop_after(process, run, *stop) if stop else process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = f"none after {TIMEOUT_S} s"
        finally:
            if process.poll() is None:
                end(process)
        if code != (-signal.SIGKILL if stop and stop[0] == "SIGKILL" else 0):
            output.seek(0)
            tail = "\n".join(output.read().splitlines()[-12:])
            raise RunFailed(f"exit code {code} of {' '.join(command)}\n{tail}")


def end(process: subprocess.Popen) -> None:
    """End a process, with those that it has started if it is torchrun."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def stop_after(process: subprocess.Popen, run: Path, name: str, steps: int) -> int | str:
    """Send a signal as soon as the run has recorded so many steps -> the exit code, in words if it came too early."""
    deadline = time.monotonic() + TIMEOUT_S
    while sum(path.read_text().count('"train_loss"') for path in run.glob("**/metrics.jsonl")) < steps:
        if process.poll() is not None:
            return f"{process.returncode} before it could be stopped after {steps} steps"
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(process.args, TIMEOUT_S)
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    return process.wait(TIMEOUT_S)


def run_case(checkout: Path, case: Case, recording: Path, folder: Path) -> tuple[dict, dict[str, Path]]:
    """Run a case in a folder -> what read_run makes of it."""
    script, run = checkout / SCRIPTS[case.track], folder / "run"
    where = {"data_dir": recording / case.data, "runs_dir": folder, "run_name": "run", "device": "cpu"}
    arguments = flags(script, case.track, case.settings | where | {"dtype": case.dtype})
    for stop in case.stops:
        run_script(script, case.processes, arguments, run, tuple(stop))
        arguments = [f"--resume={run}"]
    run_script(script, case.processes, arguments, run)
    for settings in case.then:
        run_script(script, case.processes, [f"--resume={run}", *flags(script, case.track, settings)], run)
    return read_run(run)


# ======================================================================================================================
# What a run leaves
# ======================================================================================================================

DONE = "run.json"  # in the folder of a recorded case: what read_run makes of its run
RESULTS = ("stopped_by", "steps", "tokens", "val_loss", "val_bpb", "best_val_loss", "holdout_loss", "holdout_bpb")


def read_run(run: Path) -> tuple[dict, dict[str, Path]]:
    """A run folder -> ({"numbers": value by what it is, "tensors": hash by file}, the files of final/ by name).

    The numbers are in the order in which they came, the steps first; names of chains stand in front of theirs.
    """
    numbers = {}
    for path in sorted(run.glob("**/metrics.jsonl"), key=lambda path: (path.parent == run, path)):
        where = "" if path.parent == run else f"{path.parent.name} "
        for line in map(json.loads, path.read_text().splitlines()):
            mixture = f"mixture of {line['mixture_of']} " if "mixture_of" in line else ""
            for key in ("train_loss", "train_loss_with_mtp", "val_loss", "val_bpb", "fitness_loss"):
                label = f"{where}step {line['step']} {mixture}{key}"
                if key in line:
                    numbers[f"{label}, again" if label in numbers else label] = line[key]
    result = json.loads((run / "result.json").read_text())
    numbers |= {f"readout {name}": loss for name, loss in result["readouts"].items()}
    numbers |= {f"result {name}": result[name] for name in RESULTS if name in result}
    members = json.loads((run / "final" / "members.json").read_text())["members"]
    if isinstance(members, dict):  # weights by name
        members = [{"file": f"{name}.safetensors", "weight": weight} for name, weight in members.items()]
    numbers |= {f"weight of {member['file']}": member["weight"] for member in members}
    files = {path.name: path for path in sorted(run.glob("**/final/*.safetensors"))}
    return {"numbers": numbers, "tensors": {name: content_hash(path) for name, path in files.items()}}, files


def content_hash(path: Path) -> str:
    """SHA-256 of the names, types, shapes and bytes of a file's tensors: metadata do not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def case_folder(recording: Path, name: str) -> Path:
    return recording / "cases" / name


def is_recorded(recording: Path, name: str) -> bool:
    """Whether a case has been recorded: its run did not fail."""
    return (case_folder(recording, name) / DONE).exists()


def read_recorded(recording: Path, name: str) -> tuple[dict, dict[str, Path]]:
    """The same as read_run, of a recorded case."""
    folder = case_folder(recording, name)
    return json.loads((folder / DONE).read_text()), {path.name: path for path in folder.glob("*.safetensors")}


# ======================================================================================================================
# Comparing
# ======================================================================================================================


def number_difference(name: str, a, b) -> float:
    """0 if they are the same in every bit; else relative, of weights absolute; infinite if that makes no sense."""
    if repr(a) == repr(b):
        return 0.0
    if not (isinstance(a, float) and isinstance(b, float) and math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / (1.0 if name.startswith("weight of") else max(abs(a), abs(b), 1e-300))


def tensor_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest element, 0 if it is a rounding of the type they are stored in."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return math.inf
    eps, x, y = torch.finfo(a.dtype).eps, a.double(), b.double()
    if not (x.isfinite().all() and y.isfinite().all()):
        return math.inf
    scale = max(x.abs().max().item(), y.abs().max().item(), 1e-300) if x.numel() else 1.0
    size = (x - y).abs().max().item() / scale if x.numel() else 0.0
    return size if size > eps else 0.0


def file_differences(a: Path, b: Path) -> dict[str, float]:
    """Differences of a file's tensors by name, those that are more than a rounding of the stored type."""
    x, y = load_file(a), load_file(b)
    sizes = {name: tensor_difference(x[name], y[name]) if name in x and name in y else math.inf for name in x | y}
    return {name: size for name, size in sizes.items() if size}


@dataclass
class Comparison:
    """How a run differs from what was expected: largest differences, and what to say of them."""

    bits: bool = True  # everything is identical
    largest: float = 0.0
    notes: list[str] = field(default_factory=list)


def compare_runs(expected: tuple[dict, dict[str, Path]], found: tuple[dict, dict[str, Path]]) -> Comparison:
    """Compare two runs as read_run gives them. Notes: the first step that differs, the largest number, the files."""
    (a, a_files), (b, b_files) = expected, found
    result = Comparison()
    x, y = a["numbers"], b["numbers"]
    sizes = {name: number_difference(name, x.get(name, "nothing"), y.get(name, "nothing")) for name in x | y}
    differ = {name: size for name, size in sizes.items() if size}
    if differ:
        first, worst = next(iter(differ)), max(differ, key=differ.get)
        shown = {"first": first} | ({"largest": worst} if worst != first else {})
        for word, name in shown.items():
            was, now = x.get(name, "nothing"), y.get(name, "nothing")
            result.notes.append(f"{word:8} {name}: {was!r}, now {now!r} ({differ[name]:.1e})")
        result.notes.append(f"numbers  {len(differ)} of {len(sizes)} differ")
    result.largest = max(differ.values(), default=0.0)
    for name in sorted(a_files.keys() | b_files.keys()):
        if a["tensors"].get(name) == b["tensors"].get(name):
            continue
        if name not in a_files or name not in b_files:
            differ[name] = result.largest = math.inf
            result.notes.append(f"final/   {name} is {'new' if name in b_files else 'missing'}")
            continue
        tensors = file_differences(a_files[name], b_files[name])
        worst = max(tensors, key=tensors.get) if tensors else "roundings only"
        size = max(tensors.values(), default=0.0)
        differ[name], result.largest = size, max(result.largest, size)
        result.notes.append(f"final/   {name}: {len(tensors)} tensors differ, the most {worst} ({size:.1e})")
    result.bits = not differ
    return result


# ======================================================================================================================
# Commands
# ======================================================================================================================


def this_environment() -> dict[str, str]:
    """What the bits of a run depend on besides its code, and the version of Python."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = names[0] if names else cpu
    capability = torch.backends.cpu.get_cpu_capability()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return versions | {"cpu": f"{cpu} ({capability})", "threads": "1"}


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, and whether files were changed since."""
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    said = [subprocess.run(["git", "-C", checkout, *c], capture_output=True, text=True) for c in commands]
    if said[0].returncode:
        return "of no known commit"
    return f"commit {said[0].stdout[:12]}{', with changes' if said[1].stdout else ''}"


def select(cases: list[Case], fast: bool, pattern: str, float64: bool) -> list[Case]:
    """Cases of --fast; of --only, which matches from any slash of a name on; in float64. ValueError if none is left."""
    kept = [case for case in cases if case.fast or not fast]
    kept = [case for case in kept if fnmatch.fnmatch(f"/{case.name}", f"*/{pattern}*")]
    kept = [case for case in kept if case.dtype == "float64" or not float64 or pattern]
    if not kept:
        raise ValueError("no case is left: a name is like tiny/float64/record-07, and --only takes * as in file names")
    return kept


def run_all(checkout: Path, cases: list[Case], recording: Path, jobs: int, report) -> None:
    """Run cases side by side, `jobs` processes at a time, and call report(case, outcome, seconds) for each in turn.

    The outcome is what read_run gives, or the message of what failed. Long ones begin, several processes come last.
    """

    def run_one(case: Case, folder: Path) -> tuple:
        started = time.monotonic()
        folder.mkdir(parents=True)
        try:
            outcome = run_case(checkout, case, recording, folder)
        except RunFailed as error:
            outcome = str(error)
        except Exception as error:  # what a run leaves can be damaged in many ways
            outcome = f"what the run left cannot be read: {type(error).__name__}: {error}"
        return case, outcome, time.monotonic() - started

    with tempfile.TemporaryDirectory() as scratch:
        for processes in sorted({case.processes for case in cases}):
            group = [case for case in cases if case.processes == processes]
            group.sort(key=lambda case: "compile" not in case.settings)
            with ThreadPoolExecutor(max(1, jobs // processes)) as pool:
                futures = [pool.submit(run_one, case, Path(scratch) / case.name) for case in group]
                try:
                    for case, future in zip(group, futures, strict=True):
                        report(*future.result())
                        shutil.rmtree(Path(scratch) / case.name)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise


def line(name: str, verdict: str, seconds: float, notes: str | list[str] = ()) -> None:
    """A line of the table, and indented ones below it."""
    print(f"{name:48}{verdict:>28}{seconds:7.0f} s", flush=True)
    for note in notes.splitlines() if isinstance(notes, str) else notes:
        print(f"    {note}", flush=True)


def open_recording(recording: Path, checkout: Path, cases: list[Case]) -> list[Case]:
    """Make a recording's folder, or go on with one of the same commit -> the cases that it lacks.

    ValueError if it has another commit or is of another machine, or if the folder is something else.
    """
    content = {"commit": commit_of(checkout), "environment": this_environment()}
    known: list[Case] = []
    if (recording / "trace.json").exists():
        known, saved = read_cases(recording), json.loads((recording / "trace.json").read_text())
        if {key: saved[key] for key in content} != content or "with changes" in content["commit"]:
            raise ValueError(
                f"{recording} has {saved['commit']} ({saved['environment']}), this is {content['commit']} "
                f"({content['environment']}): delete it, or name another folder"
            )
    elif recording.exists() and any(recording.iterdir()):
        raise ValueError(f"{recording} is not empty, and no recording: name another folder")
    else:
        for folder, tokens in TOKENS.items():
            write_data(recording / folder, tokens)
    missing = [case for case in cases if case not in known or not is_recorded(recording, case.name)]
    for case in missing:
        shutil.rmtree(case_folder(recording, case.name), ignore_errors=True)
    names = {case.name: case for case in known + cases}
    content["cases"] = [dataclasses.asdict(case) for case in names.values()]
    (recording / "trace.json").write_text(json.dumps(content, indent=1))
    return missing


def record(recording: Path, checkout: Path, cases: list[Case], jobs: int) -> int:
    """Run the cases that the recording lacks, and keep what comes out -> the exit code."""
    missing, started = open_recording(recording, checkout, cases), time.monotonic()
    print(f"recording {len(missing)} cases of {checkout}, {commit_of(checkout)}", end="")
    print(f"; {len(cases) - len(missing)} are there already" if len(missing) < len(cases) else "")
    failed = []

    def report(case: Case, outcome, seconds: float) -> None:
        if isinstance(outcome, str):
            failed.append(case.name)
            return line(case.name, "FAILED", seconds, outcome)
        folder = case_folder(recording, case.name)
        folder.mkdir(parents=True)
        for path in outcome[1].values():
            shutil.copy(path, folder)
        (folder / DONE).write_text(json.dumps(outcome[0], indent=1))
        return line(case.name, "recorded", seconds)

    run_all(checkout, missing, recording, jobs, report)
    for case in cases:
        if case.same_as and all(is_recorded(recording, name) for name in (case.name, case.same_as)):
            found = compare_runs(*(read_recorded(recording, name) for name in (case.same_as, case.name)))
            if not found.bits:
                failed.append(case.name)
                line(case.name, f"not as {case.same_as.split('/')[-1]}", 0, found.notes)
    print(f"{len(cases)} cases: {len(cases) - len(failed)} recorded, {len(failed)} failed, ", end="")
    print(f"in {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


def compare(recording: Path, checkout: Path, cases: list[Case], jobs: int, tolerance: float | None) -> int:
    """Run the cases again and compare them with the recording -> the exit code."""
    counts, started = {"identical": 0, "within the tolerance": 0, "different": 0, "failed": 0}, time.monotonic()
    recorded = [case for case in cases if is_recorded(recording, case.name)]
    for case in cases:
        if case not in recorded:
            counts["failed"] += 1
            line(case.name, "NOT RECORDED", 0, "its run failed, or was never made: run record again")

    def report(case: Case, outcome, seconds: float) -> None:
        if isinstance(outcome, str):
            counts["failed"] += 1
            return line(case.name, "FAILED", seconds, outcome)
        references = [case.name] + [case.same_as] * (case.same_as != "" and is_recorded(recording, case.same_as))
        found = [compare_runs(read_recorded(recording, name), outcome) for name in references]
        worst = max(found, key=lambda comparison: (not comparison.bits, comparison.largest))
        if worst.bits:
            counts["identical"] += 1
            return line(case.name, "identical", seconds)
        if tolerance is not None and worst.largest <= tolerance:
            counts["within the tolerance"] += 1
            return line(case.name, f"within {worst.largest:.1e}", seconds)
        counts["different"] += 1
        return line(case.name, f"DIFFERENT by {worst.largest:.1e}", seconds, worst.notes)

    run_all(checkout, recorded, recording, jobs, report)
    said = ", ".join(f"{count} {word}" for word, count in counts.items())
    print(f"{len(cases)} cases: {said}, in {time.monotonic() - started:.0f} s")
    return 1 if counts["different"] + counts["failed"] else 0


def read_cases(recording: Path) -> list[Case]:
    """The cases of a recording; ValueError if there is none."""
    path = recording / "trace.json"
    if not path.exists():
        raise ValueError(f"{path} not found: make a recording with python tests/trace.py record {recording}")
    return [Case(**case) for case in json.loads(path.read_text())["cases"]]


def check_environment(recording: Path, tolerance: float | None, other_machine: bool) -> None:
    """Print what differs from the machine of the recording; ValueError if bits are to be compared nevertheless."""
    was, now = json.loads((recording / "trace.json").read_text())["environment"], this_environment()
    differ = [f"{name} {was[name]}, now {now[name]}" for name in now if was[name] != now[name]]
    if differ:
        print(f"the recording was made elsewhere: {'; '.join(differ)}")
    moved = [name for name in now if was[name] != now[name] and name != "python"]
    if moved and tolerance is None and not other_machine:
        raise ValueError(
            "floating-point numbers are not portable: record on this machine, compare with --tolerance 1e-12, or give "
            "--other-machine to compare bits nevertheless"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("folder", type=Path, help="the recording: data, cases, numbers, weights (340 MB)")
    parser.add_argument("--fast", action="store_true", help="a subset: all tracks, float32, float64, 1 and 2 processes")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="cases by name, or a part of it: tiny, float32/record-1*"
    )
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose scripts run [the one this file is in]")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at a time [2]")
    parser.add_argument("--tolerance", type=float, metavar="X", help="largest difference; runs the float64 cases only")
    parser.add_argument("--other-machine", action="store_true", help="compare bits with those of another machine")
    args = parser.parse_args(argv)
    recording, checkout = args.folder.resolve(), args.checkout.resolve()
    float64 = args.tolerance is not None
    try:
        if not (checkout / SCRIPTS["limited"]).exists():
            raise ValueError(f"{checkout} is no checkout: it has no {SCRIPTS['limited']}")
        if args.command == "record":
            if float64 or args.other_machine:
                raise ValueError("--tolerance and --other-machine are for compare")
            return record(recording, checkout, select(case_list(checkout), args.fast, args.only, False), args.jobs)
        cases = select(read_cases(recording), args.fast, args.only, float64)
        check_environment(recording, args.tolerance, args.other_machine)
        was = json.loads((recording / "trace.json").read_text())["commit"]
        print(f"comparing {len(cases)} cases of {checkout}, {commit_of(checkout)}, with {was}")
        later = {case.name for case in case_list(checkout)} - {case.name for case in read_cases(recording)}
        if later:
            print(f"the recording lacks {len(later)} cases of today's list, such as {min(later)}")
        return compare(recording, checkout, cases, args.jobs, args.tolerance)
    except KeyboardInterrupt:
        print("interrupted; record goes on where it was", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"trace.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
