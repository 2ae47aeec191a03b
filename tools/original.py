"""Runs the scripts of the original project, https://github.com/qlabs-eng/slowrun: their flags and printed lines.

They need that project's requirements and a Hopper GPU, and read the same data files.
"""

from __future__ import annotations

import re
from pathlib import Path

# By stage: the flags with which a run begins in it
STAGES = {
    "limited/plain": ["--dupe-start-epoch=1000"],
    "limited/replay": ["--dupe-start-epoch=1"],
    "tiny/one_pass": [],
}
OPTIONAL = ("--eval-tokens=0", "--logit-avg=0")  # newer versions have them: no validation, no weights on the disk
STEP = re.compile(r"^step (\d+)\b.*?\bdt: ([\d.]+)ms", re.MULTILINE)
ENVIRONMENT = {"WANDB_MODE": "disabled"}


def is_original(help_text: str) -> bool:
    """Whether this --help is of a script of the original project."""
    return "--input_bin" in help_text


def original_flags(stage: str, data: Path, known: set[str]) -> list[str]:
    """The flags of a run that begins in a stage; ValueError if that cannot be done."""
    if stage not in STAGES:
        raise ValueError(f"only {', '.join(STAGES)} of the original project can be run: choose one with --stage")
    wanted = [f"--input_bin={data / 'fineweb_train.pt'}", f"--input_val_bin={data / 'fineweb_val.pt'}"]
    optional = [flag for flag in OPTIONAL if flag.split("=")[0] in known]
    missing = [flag for flag in STAGES[stage] if flag.split("=")[0] not in known]
    if missing:
        raise ValueError(f"that version of the original project has no {missing[0]}: use one that has layer replay")
    return wanted + STAGES[stage] + optional


def step_ms(output: str) -> dict[int, float]:
    """Milliseconds by step, counted from 1, from the output of an original script."""
    return {int(step): float(ms) for step, ms in STEP.findall(output)}
