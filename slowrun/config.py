"""Flags from a frozen dataclass: every field is a flag, and the comment behind the field is its help text.

A command line can also stand for the settings of a published record (--record), and for toy sizes (--demo).
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from slowrun.data import read_json
from slowrun.machine import profile_ranges

RESUME_MAY_CHANGE = {  # fields that do not change the result
    "data_dir", "eval_batch", "checkpoint_min", "checkpoints", "log_every", "profile_steps", "wandb",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The fields of a run that are not science. Every script defines those without a default."""

    vocab_size: int
    sequence_len: int
    time_cap_min: float
    seed: int
    data_dir: str = "fineweb_data"  # folder with fineweb_train.pt, fineweb_val.pt and fineweb_holdout.pt
    val_sequences: int = 4864  # sequences of the validation set and of the holdout that are scored, at most
    eval_batch: int = 4  # sequences per forward pass in validation, per process
    eval_initial: bool = False  # validate before the first step too
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto takes a CUDA GPU where there is one
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # auto: bfloat16 where the GPU has it
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of layers and optimizer; auto: on CUDA
    checkpoint_min: float = 10.0  # minutes between checkpoints, besides those at the ends of epochs
    checkpoints: bool = True  # write checkpoints; without them a run that is stopped starts over
    log_every: int = 10  # steps between printed lines
    profile_steps: str = ""  # steps, counted from 1, that torch.profiler records, such as 4-5,9-9; empty for none
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: where WANDB_API_KEY is set
    runs_dir: str = "runs"  # where run folders are made
    run_name: str = ""  # name of the run folder; empty for track, time and seed

    def __post_init__(self):
        for name in ("val_sequences", "eval_batch", "log_every"):
            require_at_least(self, name, 1)
        for name in ("seed", "time_cap_min", "checkpoint_min"):
            require_at_least(self, name, 0)
        profile_ranges(self.profile_steps)
        if self.run_name == ".." or Path(self.run_name).name != self.run_name:
            raise ValueError(
                f"--run-name {self.run_name} is not the name of a folder: --runs-dir says where it is made"
            )


def flag_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def as_flags(settings: dict) -> list[str]:
    """{"num_epochs": 2, "decay_schedule": False} -> ["--num-epochs=2", "--no-decay-schedule"]"""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(flag_of(name) if value else flag_of(f"no_{name}"))
        else:
            flags.append(f"{flag_of(name)}={value}")
    return flags


def require_at_least(config: RunConfig, field: str, least: float) -> None:
    """Check that a field is not smaller than `least` (ValueError)."""
    value = getattr(config, field)
    if not value >= least:
        raise ValueError(f"{flag_of(field)} is {value}: it must be at least {least}")


@cache
def field_types(config_class: type) -> dict[str, type]:
    """The type of each field, by name."""
    return typing.get_type_hints(config_class)


@cache
def field_comments(config_class: type) -> dict[str, str]:
    """The comment behind each field, from the source."""
    comments = {}
    for cls in reversed(config_class.__mro__[:-1]):
        comments.update(re.findall(r"^    (\w+): .+?  # (.+)$", inspect.getsource(cls), re.MULTILINE))
    return comments


def changed_fields(config: RunConfig) -> dict[str, object]:
    """The fields that differ from the defaults."""
    default = dataclasses.asdict(type(config)())
    return {name: value for name, value in dataclasses.asdict(config).items() if value != default[name]}


# ------------------------------------------------------------------------------------------------------- records


def records_folder(track: str, script: Path) -> Path:
    """records/<track> of the repository that a script is in; ValueError if it is elsewhere, as in a run folder."""
    folders = [folder / "records" / track for folder in script.resolve().parents[:2]]
    for folder in folders:
        if (folder / "records.json").exists():
            return folder
    raise ValueError(f"{folders[0]} not found: --record and --list-records need the repository's own script")


def settings_files(folder: Path) -> dict[int, Path]:
    """The settings of the records in records/<track> that --record can train, by number."""
    return {int(path.name[:2]): path for path in sorted(folder.glob("[0-9][0-9]-*.json"))}


def list_records(folder: Path) -> str:
    """The track's records, a line each."""
    known = settings_files(folder)
    lines = ["number, validation loss, time, change; --record trains those with a star"]
    for entry in read_json(folder / "records.json", {"records"}, "restore it")["records"]:
        star = "*" if entry["number"] in known else " "
        minutes = f"{'~' * entry['time_is_approximate']}{entry['minutes']:g} min"
        lines.append(f"{star}{entry['number']:3}  {entry['val_loss']:.3f}  {minutes:>10}  {entry['change']}")
    return "\n".join(lines)


def read_record(config_class: type, folder: Path, number: int) -> dict:
    """The settings of a published record that differ from the defaults; ValueError if there are none."""
    files = settings_files(folder)
    if number not in files:
        known = ", ".join(map(str, files)) or "none"
        raise ValueError(f"--record {number}: the {folder.name} track has settings of {known}; see --list-records")
    settings = read_json(files[number], {"settings"}, "restore it")["settings"]
    if not isinstance(settings, dict):
        raise ValueError(f"{files[number]}: its settings are not a JSON object: restore it")
    types = field_types(config_class)
    unknown = ", ".join(sorted(settings.keys() - types.keys()))
    if unknown:
        raise ValueError(f"{files[number]} sets {unknown}, which this script does not have: correct it")
    for name, value in settings.items():
        choices = typing.get_args(types[name]) or (f"of type {types[name].__name__}",)
        fits = value in choices or type(value) is types[name] or (types[name] is float and type(value) is int)
        if not fits:
            raise ValueError(f"{files[number]} sets {name} to {value!r}: it must be {' or '.join(choices)}")
    return settings


def demo_of_record(config_class: type, demo: dict, settings: dict, unscaled: Sequence[str] = ()) -> dict:
    """Toy sizes for a record: those of the demo, scaled as the record's are to the defaults.

    What the record turns off stays off, and what is not a number is the record's. unscaled: fields that stay as in the
    demo.
    """
    sizes = {}
    for name, value in demo.items():
        default = getattr(config_class, name)
        of_record = settings.get(name, default)
        is_number = type(value) in (int, float)
        if is_number and value and not of_record:
            continue
        if name in settings and name not in unscaled:
            value = type(value)(value * of_record / default) if is_number and default else of_record
        sizes[name] = value
    return sizes


# --------------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class CommandLine:
    """The content of a command line."""

    values: dict  # the fields that are set, by flags, --record or --demo
    resume: str | None  # the run folder to resume
    plan: str | None  # the file to write a plan to


def parse_flags(
    track: str,
    config_class: type[RunConfig],
    demo: dict,
    argv: list[str] | None,
    script: Path,
    description: str,
    record_sizes: Callable[[dict], dict] | None = None,
) -> CommandLine:
    """Read the command line (sys.argv for None).

    --record stands for the settings of a published record, --demo for the values in `demo`; flags override both.
    Together they give record_sizes(settings), by default demo_of_record. --list-records prints and exits.
    """
    given = vars(make_parser(config_class, description).parse_args(argv))
    is_demo = given.pop("demo")
    resume = given.pop("resume")
    record = given.pop("record")
    plan = given.pop("plan")
    if given.pop("list_records"):
        if os.environ.get("RANK", "0") == "0":
            print(list_records(records_folder(track, script)))
        raise SystemExit(0)
    if resume is not None and (record is not None or plan is not None):
        raise ValueError("--record and --plan are for a new run: --resume continues with the run's settings")
    settings = {}
    if record is not None:
        settings = read_record(config_class, records_folder(track, script), record)
        if is_demo:
            settings |= record_sizes(settings) if record_sizes else demo_of_record(config_class, demo, settings)
    elif is_demo:
        settings = demo
    return CommandLine(settings | given, resume, plan)


def make_parser(config_class: type[RunConfig], description: str) -> argparse.ArgumentParser:
    """A parser that returns only the fields that were given, and demo, resume, record, list_records and plan."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--demo] [--record N | --resume RUN_DIR] [--FLAG VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--demo", action="store_true", help="toy sizes, for a CPU; before it: python prepare_data.py --source demo"
    )
    parser.add_argument("--resume", metavar="RUN_DIR", help="continue the run in this folder")
    parser.add_argument("--record", metavar="N", type=int, help="train published record N of this track")
    parser.add_argument("--list-records", action="store_true", help="show the records of this track, and exit")
    parser.add_argument(
        "--plan", metavar="FILE", help="write the stages, steps, operations and bytes of the run as JSON, and exit"
    )
    comments = field_comments(config_class)
    for name, hint in field_types(config_class).items():
        text = f"{comments[name]} [{getattr(config_class, name)}]".replace("%", "%%")
        options: dict = {"help": text, "default": argparse.SUPPRESS}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is Literal:
            options["choices"] = typing.get_args(hint)
        else:
            options |= {"type": hint, "metavar": hint.__name__}
        parser.add_argument(flag_of(name), **options)
    return parser
