"""Drives the scripts of the original project, https://github.com/qlabs-eng/slowrun, by their flags and printed lines.

They need that project's own packages (its requirements), a GPU of the Hopper kind, and read the same shards.
"""

from __future__ import annotations

import re
from pathlib import Path

# By stage: the flags with which the first steps of a run are in it
STAGES = {
    "limited/plain": ["--dupe-start-epoch=1000"],
    "limited/replay": ["--dupe-start-epoch=1"],
    "tiny/one_pass": [],
}
OPTIONAL = ("--eval-tokens=0", "--logit-avg=0")  # newer versions have them: no validation, no weights on the disk
STEP = re.compile(r"^step (\d+)\b.*?\bdt: ([\d.]+)ms", re.MULTILINE)
ENVIRONMENT = {"WANDB_MODE": "disabled"}


def is_original(help_text: str) -> bool:
    """Whether a script whose --help this is comes from the original project."""
    return "--input_bin" in help_text


def original_flags(stage: str, data: Path, known: set[str]) -> list[str]:
    """Flags of a run whose first steps are of a stage; ValueError for one that this does not know."""
    if stage not in STAGES:
        raise ValueError(f"of the original project only {', '.join(STAGES)} can be run: choose one by --stage")
    wanted = [f"--input_bin={data / 'fineweb_train.pt'}", f"--input_val_bin={data / 'fineweb_val.pt'}"]
    optional = [flag for flag in OPTIONAL if flag.split("=")[0] in known]
    missing = [flag for flag in STAGES[stage] if flag.split("=")[0] not in known]
    if missing:
        raise ValueError(f"that version of the original project has no {missing[0]}: use one that has layer replay")
    return wanted + STAGES[stage] + optional


def step_ms(output: str) -> dict[int, float]:
    """Milliseconds by step, counted from 1, of what an original script printed."""
    return {int(step): float(ms) for step, ms in STEP.findall(output)}
