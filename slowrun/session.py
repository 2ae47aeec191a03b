"""A run from its command line to its result: what begins it, what continues it, and how it ends."""

from __future__ import annotations

import dataclasses
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from slowrun import folder as run_folder
from slowrun.config import RESUME_MAY_CHANGE, RunConfig, changed_fields
from slowrun.data import read_json


class NonFiniteLoss(RuntimeError):
    """A loss is NaN or infinite."""


def duration(seconds: float) -> str:
    """Seconds in the unit a reader would choose, such as "48.0m"."""
    if seconds > 7200:
        return f"{seconds / 3600:.1f}h"
    return f"{seconds / 60:.1f}m" if seconds > 90 else f"{seconds:.0f}s"


def resume_command(processes: int, folder: Path) -> str:
    """What resumes a run on this machine."""
    start = "python" if processes == 1 else f"torchrun --standalone --nproc_per_node={processes}"
    return f"{start} {sys.argv[0]} --resume {folder}"


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
        "code_sha256": run_folder.script_sha256(script),
        "instrument_sha256": run_folder.instrument_sha256(),
        "data_sha256": data_sha256,
    }
    run_folder.create(folder, script, saved)
    return saved | {"folder": str(folder)}


def reopen(track: str, folder: Path, given: dict, script: Path, may_change: set[str] = RESUME_MAY_CHANGE) -> dict:
    """The content of config.json of a run to resume, its folder, and whether it has finished.

    given: the flags of this command line. ValueError says why this script and these flags cannot continue the run.
    """
    saved = run_folder.read_config(folder)
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
    if run_folder.script_sha256(script) != saved["code_sha256"]:
        raise ValueError(f"the script changed since {folder} was started: {advice}")
    if run_folder.instrument_sha256() != saved["instrument_sha256"]:
        raise ValueError(f"slowrun/ changed since {folder} was started: {advice}")
    result = folder / "result.json"
    is_finished = result.exists() and read_json(result, {"status"}, "delete it to resume")["status"] == "finished"
    return saved | {"folder": str(folder), "finished": is_finished}


def check_same_data(saved: dict, data_dir: str, data_sha256: dict[str, str]) -> None:
    """ValueError if a run would continue on other files than it was started with."""
    for split in saved["data_sha256"] | data_sha256:
        then = saved["data_sha256"].get(split, "none")
        now = data_sha256.get(split, "none")
        if then != now:
            raise ValueError(
                f"{saved['folder']} was started on other data (fineweb_{split}.pt was {then[:12]}..., and that of "
                f"{data_dir} is {now[:12]}...): give its --data-dir"
            )


def exit_code(main: Callable[[], int], script: str) -> int:
    """Call a script's main -> its exit code; 2, with the reason on stderr, for what it refuses."""
    try:
        return main()
    except (ValueError, torch.OutOfMemoryError) as error:
        if os.environ.get("RANK", "0") == "0" or dist.is_initialized():  # until they have met, all find the same
            advice = "" if isinstance(error, ValueError) else "\nLess memory: --device-batch, --eval-batch"
            print(f"{Path(script).name}: error: {error}{advice}", file=sys.stderr)
        return 2


def launch(main: Callable[[], int]) -> NoReturn:
    """Call a script's main, and exit with what it returns: 0 finished, or stopped and saved; 1 failed; 2 refused."""
    code = main()
    if dist.is_initialized():
        if code == 0:  # after an error the other processes may never come
            dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)  # a thread of gloo that wants the interpreter can abort a regular exit
    sys.exit(code)
