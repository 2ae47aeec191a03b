"""The run folder: config.json, code/, log.txt, metrics.jsonl, curve.png, checkpoints/, final/ and result.json.

A file with its final name is complete, also after kill -9 or a power loss; log.txt and metrics.jsonl grow line by line,
and only their last line can be torn. Only the main process writes.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from slowrun.config import RESUME_MAY_CHANGE, RunConfig, changed_fields
from slowrun.data import read_json, sha256_file
from slowrun.machine import GIB

PACKAGE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(temporary path), flush the file to the disk, and rename it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def try_to_write_json(path: Path, content: Any) -> str:
    """Write a JSON file -> why it failed; empty if it did not."""
    try:
        write_json(path, content)
    except OSError as error:
        return str(error)
    return ""


class Lines:
    """A file that grows line by line. What a full disk refuses waits in memory for the next line."""

    def __init__(self, path: Path):
        self.file = open(path, "ab", buffering=0)
        self.waiting = b""

    def drop_torn_line(self) -> None:
        """Cut off what a power loss left after the last whole line."""
        content = Path(self.file.name).read_bytes()
        self.file.truncate(content.rfind(b"\n") + 1)

    def write(self, text: str) -> None:
        self.waiting += text.encode()
        try:
            while self.waiting:
                written = self.file.write(self.waiting)
                self.waiting = self.waiting[written:]
        except OSError:
            pass

    def close(self) -> None:
        self.file.close()


# ----------------------------------------------------------------------------------------------------------- code


def hash_files(paths: list[Path], root: Path) -> str:
    """SHA-256 over a line "relative name, zero byte, SHA-256 of the content" for each file, sorted."""
    lines = sorted(f"{path.relative_to(root).as_posix()}\0{sha256_file(path)}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def files_in(folder: Path) -> list[Path]:
    """All files in a folder of code, at any depth, except Python's caches."""
    return [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def script_files(script: Path) -> list[Path]:
    """The script, and the model.py beside it if there is one."""
    return [path for path in (script, script.with_name("model.py")) if path.exists()]


def script_sha256(script: Path) -> str:
    """The hash of a script's files."""
    return hash_files(script_files(script), script.parent)


def code_sha256(code: Path) -> str:
    """The same hash of a run's code/: of all files in it except those of slowrun/."""
    package = code / PACKAGE.name
    return hash_files([path for path in files_in(code) if package not in path.parents], code)


def instrument_files(package: Path) -> list[Path]:
    """The modules of a copy of slowrun/, which has no folders. Other files, such as an editor's, do not count."""
    return [path for path in package.glob("*.py") if path.is_file()]


def instrument_sha256(package: Path = PACKAGE) -> str:
    """The hash of a copy of slowrun/."""
    return hash_files(instrument_files(package), package)


def copy_code(script: Path, code: Path) -> None:
    """Make code/, all the code that it takes to resume and to score a run: the script's files, and slowrun/."""
    code.mkdir()
    for file in script_files(script):
        shutil.copy(file, code / file.name)
    package = code / PACKAGE.name
    package.mkdir()
    for file in instrument_files(PACKAGE):
        shutil.copy(file, package / file.name)


# ---------------------------------------------------------------------------------------------------- run folders


def create(folder: Path, script: Path, config: dict) -> None:
    """Make a run folder with config.json and code/ (ValueError if it exists, or cannot be made)."""
    try:
        folder.mkdir(parents=True)
        for name in ("checkpoints", "final"):
            (folder / name).mkdir()
        copy_code(script, folder / "code")
        write_json(folder / "config.json", config)
    except FileExistsError:
        raise ValueError(f"{folder} exists: choose another --run-name, or continue it: --resume {folder}") from None
    except OSError as error:
        raise ValueError(f"cannot make the run folder {folder} ({error.strerror}): choose another --runs-dir") from None


def read_config(folder: Path) -> dict:
    """config.json of a run folder (ValueError if it is missing or damaged)."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{path} not found: --resume needs a run folder, such as runs/<name>")
    keys = {"run_id", "track", "config", "overrides", "code_sha256", "instrument_sha256", "data_sha256"}
    if "instrument_sha256" not in read_json(path, {"track"}, "restore it"):
        raise ValueError(f"{folder} was made by an older version: resume it with {folder}/code/train.py")
    return read_json(path, keys, "a run cannot be resumed without it; its weights are in checkpoints/ and final/")


def begin(track: str, config: RunConfig, script: Path, data_sha256: dict[str, str]) -> dict:
    """Make the run folder of a new run -> the content of its config.json, and its folder."""
    name = config.run_name or f"{track}-{time.strftime('%Y%m%d-%H%M%S')}-s{config.seed}"
    folder = Path(config.runs_dir) / name
    saved = {
        "run_id": secrets.token_hex(4),
        "track": track,
        "command": sys.argv,
        "overrides": changed_fields(config),
        "config": dataclasses.asdict(config),
        "code_sha256": script_sha256(script),
        "instrument_sha256": instrument_sha256(),
        "data_sha256": data_sha256,
    }
    create(folder, script, saved)
    return saved | {"folder": str(folder)}


def reopen(track: str, folder: Path, given: dict, script: Path, may_change: set[str] = RESUME_MAY_CHANGE) -> dict:
    """The content of config.json of a run to resume, with its folder and whether it has finished.

    given: the flags of this command line. ValueError if this script and these flags cannot continue the run.
    """
    saved = read_config(folder)
    if saved["track"] != track:
        raise ValueError(
            f"{folder} is a run of the {saved['track']} track: resume it with that track's train.py, this one is "
            f"{track}'s"
        )
    fixed = {k: v for k, v in given.items() if k not in may_change and v != saved["config"].get(k)}
    if fixed:
        differences = ", ".join(f"{k} {saved['config'].get(k)!r}, now {v!r}" for k, v in fixed.items())
        raise ValueError(
            f"{folder} was started with other settings ({differences}): leave them out, or start a new run"
        )
    advice = f"resume it with {folder}/code/{script.name}"
    if script_sha256(script) != saved["code_sha256"]:
        raise ValueError(f"the script changed since {folder} was started: {advice}")
    if instrument_sha256() != saved["instrument_sha256"]:
        raise ValueError(f"slowrun/ changed since {folder} was started: {advice}")
    result = folder / "result.json"
    is_finished = result.exists() and read_json(result, {"status"}, "delete it to resume")["status"] == "finished"
    return saved | {"folder": str(folder), "finished": is_finished, "resumed": True}


def check_same_data(saved: dict, data_dir: str, data_sha256: dict[str, str]) -> None:
    """Refuse to continue a run on other files than it was started with (ValueError)."""
    for split in saved["data_sha256"] | data_sha256:
        then = saved["data_sha256"].get(split, "none")
        now = data_sha256.get(split, "none")
        if then != now:
            raise ValueError(
                f"{saved['folder']} was started on other data (fineweb_{split}.pt was {then[:12]}..., and that of "
                f"{data_dir} is {now[:12]}...): give its --data-dir"
            )


def finished_run(run_dir: Path, track: str) -> tuple[dict, dict]:
    """(config.json, final/members.json) of a finished run; ValueError if it is one of another track."""
    saved = json.loads((run_dir / "config.json").read_text())
    if saved["track"] != track:
        raise ValueError(f"{run_dir} is a run of the {saved['track']} track: use that track's load_members")
    return saved, json.loads((run_dir / "final" / "members.json").read_text())


def load_weights(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a member, on the CPU, in float32 or wider, ready for compute_weights."""
    return {name: p.to(torch.promote_types(dtype, torch.float32)) for name, p in load_file(path).items()}


class RunFolder:
    """A run folder that is open for writing. All processes may call its methods; only the main process writes.

    label: put in front of lines on the screen, for runs of several chains. bar: whether it may show a progress bar.
    """

    def __init__(self, path: Path, run_id: str, is_main: bool, label: str = "", bar: bool = True):
        self.path = path
        self.run_id = run_id
        self.is_main = is_main
        self.label = label
        self.has_bar = bar and is_main and sys.stderr.isatty()
        self.bar: tqdm | None = None
        self.wandb: Any = None

    def open(self) -> None:
        """Open the log and the metrics, and lock the folder (ValueError if another process has the lock)."""
        self.log_lines = Lines(self.path / "log.txt")
        self.metrics = Lines(self.path / "metrics.jsonl")
        try:
            fcntl.flock(self.log_lines.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {self.path}: wait for its end, or stop it") from None
        except OSError as error:
            self.log(f"no locks on this disk ({error.strerror}): let no other process write to {self.path}")
        self.log_lines.drop_torn_line()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if not self.is_main:
            return
        if self.wandb is not None:
            try:
                self.wandb.finish()
            except Exception as error:  # the run folder has all that matters
                self.log(f"wandb: {type(error).__name__}: {error}")
        self.log_lines.close()
        self.metrics.close()

    # ------------------------------------------------------------------------------------------------ log, metrics

    def log(self, text: str, screen: bool = True) -> None:
        """Print lines, and keep them in log.txt with the run id in front."""
        if not self.is_main:
            return
        lines = text.splitlines()
        if screen:
            tqdm.write("\n".join(f"{self.label}{line}" for line in lines))
            sys.stdout.flush()
        self.log_lines.write("".join(f"{self.run_id} {line}\n" for line in lines))

    def progress(self, done: int, total: int, parts: list[str], is_printed: bool) -> None:
        """Move the progress bar on a terminal. If is_printed, log a line, and print it if there is no bar."""
        line = " | ".join([f"step {done}/{total}", *parts])
        if self.has_bar:
            if self.bar is None:
                self.bar = tqdm(total=total, initial=done - 1, bar_format="{bar:20} {desc}", dynamic_ncols=True)
            self.bar.set_description_str(line, refresh=False)
            self.bar.update()
        if is_printed:
            self.log(line, screen=self.bar is None)

    def record(self, values: dict, to_wandb: bool = True) -> None:
        """Write a line of metrics.jsonl."""
        if not self.is_main:
            return
        self.metrics.write(json.dumps({"run": self.run_id} | values) + "\n")
        if self.wandb is not None and to_wandb:
            self.wandb.log({key: value for key, value in values.items() if key != "step"}, step=values["step"])

    def summarize(self, result: dict) -> None:
        """Show the result in Weights & Biases. A failure is only logged."""
        if self.wandb is None:
            return
        try:
            self.wandb.summary.update(result)
        except Exception as error:
            self.log(f"wandb: {type(error).__name__}: {error}")

    def drop_metrics_after(self, step: int, readouts: Collection[str]) -> None:
        """Keep the lines of the first `step` steps and of these readouts. The others will be written again."""
        path = self.path / "metrics.jsonl"
        kept = []
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):  # the last may be half written
                continue
            values = json.loads(line)
            if values["step"] <= step and values.get("readout", "") in {"", *readouts}:
                kept.append(line)
        self.metrics.close()
        write_atomically(path, lambda temporary: temporary.write_text("".join(kept)))
        self.metrics = Lines(path)

    def draw_curve(self, labels: dict[int, str], val_loss: float | None = None) -> None:
        """Draw curve.png. A failure, of the disk or of a library, is only logged: it is no reason to end a run."""
        if not self.is_main:
            return
        try:
            draw_curve(self.path, labels, val_loss)
        except Exception as error:
            self.log(f"curve.png is not drawn: {type(error).__name__}: {error}")

    # ------------------------------------------------------------------------------------------------- checkpoints

    def checkpoints(self) -> list[Path]:
        """The .json files of complete checkpoints, oldest first.

        A .json is written once its .pt is on the disk, and has the hash of it.
        """
        return sorted((self.path / "checkpoints").glob("step_*.json"))

    def save_checkpoint(self, tensors: dict, info: dict) -> str:
        """Write a checkpoint, and delete all but the last two -> why it failed; empty if it did not."""
        path = self.path / "checkpoints" / f"step_{info['step']:07d}.pt"
        failure = ""
        try:
            write_atomically(path, partial(torch.save, tensors))
            write_json(path.with_suffix(".json"), info | {"sha256": sha256_file(path)})
        except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
            free = shutil.disk_usage(self.path).free / GIB
            failure = f"{type(error).__name__}, {str(error).splitlines()[0]} ({free:.2f} GiB free)"
        self.drop_checkpoints(keep=2)
        return failure

    def update_checkpoint(self, info: dict) -> str:
        """Rewrite a checkpoint's .json and leave its tensors -> why it failed; empty if it did not."""
        path = self.path / "checkpoints" / f"step_{info['step']:07d}.json"
        return try_to_write_json(path, info | {"sha256": json.loads(path.read_text())["sha256"]})

    def drop_checkpoints(self, keep: int) -> None:
        """Delete all but the newest checkpoints."""
        kept = [complete.stem for complete in self.checkpoints()[-keep:]]
        for file in (self.path / "checkpoints").iterdir():
            if file.stem not in kept:
                file.unlink()

    def load_checkpoint(self) -> tuple[dict, dict] | None:
        """(Tensors, info) of the newest checkpoint, or None. ValueError if it is damaged."""
        found = self.checkpoints()
        if not found:
            return None
        before = f"step {int(found[-2].stem[5:])}" if len(found) > 1 else "the start"
        advice = f"delete {found[-1]} to resume from {before}"
        info = read_json(found[-1], {"step", "sha256", "members"}, advice)
        path = found[-1].with_suffix(".pt")
        if not path.exists() or sha256_file(path) != info["sha256"]:
            raise ValueError(f"the checkpoint {path} is missing or damaged: {advice}")
        return torch.load(path, map_location="cpu", weights_only=True), info

    # -------------------------------------------------------------------------------------------- Weights & Biases

    def start_wandb(self, wanted: str, config: dict) -> str:
        """Start Weights & Biases if it is wanted -> its mode, for the header.

        wanted: the setting. With "auto" a failure turns it off; otherwise a failure is a ValueError.
        """
        mode = wandb_mode(wanted)
        if mode == "off":
            return mode
        try:
            import wandb

            self.wandb = wandb.init(
                project="nanogpt-slowrun",
                name=self.path.name,
                id=self.run_id,
                dir=str(self.path),
                resume="allow",
                mode=mode,
                config=config,
                settings=wandb.Settings(silent=True),
            )
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            if wanted != "auto":
                raise ValueError(f"--wandb {wanted} failed ({cause}): log in, or choose offline or off") from None
            return f"off, since it failed ({cause})"
        return mode


def wandb_mode(wanted: str) -> str:
    """The mode of Weights & Biases, by the setting and its environment variables: online, offline or off."""
    mode = wanted
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "online") if os.environ.get("WANDB_API_KEY") else "off"
    return "off" if mode == "disabled" else mode


def draw_curve(folder: Path, labels: dict[int, str], val_loss: float | None = None) -> None:
    """curve.png from metrics.jsonl: the training loss of every step, the validation losses, and the readout's loss.

    labels: names of the stages by the step they begin with; a dotted line marks each that has begun.
    """
    from matplotlib.figure import Figure  # takes a second to import

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for key, style, name in (("train_loss", "-", "training, each step"), ("val_loss", "o-", "validation")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            label = f"{name}: {points[-1][1]:.4f}"
            axes.plot(*zip(*points, strict=True), style, linewidth=1, markersize=4, label=label)
    if val_loss is not None:
        axes.axhline(val_loss, linestyle="--", linewidth=1, color="gray", label=f"readout: {val_loss:.4f}")
    last_step = max((line["step"] for line in lines), default=0)
    for step, text in labels.items():
        if 0 < step < last_step:
            axes.axvline(step, linestyle=":", linewidth=1, color="gray")
            axes.annotate(text, (step, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=7, ha="right")
    if lines:
        axes.legend()
    losses = [line.get("train_loss", line.get("val_loss")) for line in lines]
    losses = [loss for loss in losses if math.isfinite(loss)]
    if len(losses) > 100:  # the fall of the first steps would leave no room for what follows
        axes.set_ylim(min(losses) - 0.1, float(np.quantile(losses, 0.97)) + 0.2)
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title=folder.name)
    axes.grid(alpha=0.3)
    write_atomically(folder / "curve.png", partial(figure.savefig, format="png", dpi=120))
