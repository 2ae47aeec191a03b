"""What the tracks' scripts share is written once and copied; this compares the copies with their originals.

    python tests/copies.py            # report, exit code 1 if a copy differs
    python tests/copies.py --fix      # rewrite the copies that differ

A script is self-contained, so it repeats what it shares with the root's train.py and model.py. A line above a
definition (a function, a class, a method, or a constant) says where it is from; one that has the name of a definition
of the root's must have such a line:

    # Copied from train.py: data_efficiency                    compared text for text, with decorators
    # Copied from train.py: Trainer.settle                     a method, in a class of the script
    # Adapted from model.py: Block -- recurrent passes         differs, for the reason given, and is not compared
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("tiny/train.py", "two_hour/train.py", "unlimited/train.py")  # those that copy, once they are there
ORIGINALS = ("train.py", "model.py")
OWN = {"SCRIPT_FILES", "TRACK"}  # every script has its own
ADAPTED = {"unlimited/train.py": {"check_config", "set_up", "Plan"}}  # cycles for epochs, groups of processes
MARKER = re.compile(r"^ *# (Copied|Adapted) from (\S+): (\S+)(?: -- (.+))?$")
SECTIONS = ["Config", "Distributed", "Model", "Optimizer", "Schedules", "Data", "Validation", "Run", "Train"]

SHARED = {  # never adapted: each script must have a copy of each
    "distributed": ["World", "set_up_world"],
    "command line": [
        "check_config",
        "field_comments",
        "field_types",
        "list_records",
        "main",
        "parse_arguments",
        "read_record",
        "records_folder",
        "settings_files",
        "set_up",
    ],
    "data order": [
        "OFFICIAL_SHA256",
        "Plan",
        "SEQ_SHUFFLE_SEEDS",
        "Shard",
        "TrainLoader",
        "load_data",
        "load_shard",
        "read_meta",
        "sha256_file",
    ],
    "validation": ["EFFICIENCY", "EvalSet", "Score", "Trainer.validate", "data_efficiency", "token_byte_lengths"],
    "clock": ["Clock", "Trainer.agree", "Trainer.any_signal", "Trainer.fit", "Trainer.settle", "Trainer.take_signal"],
    "run folder": [
        "Lines",
        "Run",
        "check_same_data",
        "code_sha256",
        "create_run",
        "draw_curve",
        "open_run",
        "read_config",
        "read_json",
        "try_to_write_json",
        "write_atomically",
        "write_json",
    ],
    "checkpoint": ["Trainer.fail", "Trainer.resume", "Trainer.save_checkpoint", "Trainer.save_members"],
}


@dataclass(frozen=True)
class Copy:
    """A marked definition of a script: lines [start, end), the original's file and qualified name."""

    script: Path
    kind: str
    source: str
    name: str
    reason: str | None
    start: int
    end: int


@lru_cache
def definitions(source: str) -> dict[str, tuple[int, int]]:
    """Qualified name -> lines [start, end), from 0, of every function, class, method and constant of a source text."""
    found: dict[str, tuple[int, int]] = {}

    def visit(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            names = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            for name in names:
                found[prefix + name] = (first - 1, node.end_lineno)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(source).body, "")
    return found


def text_of(source: str, start: int, end: int) -> str:
    return textwrap.dedent("\n".join(source.split("\n")[start:end]))


def marked(script: Path) -> list[Copy]:
    """The marked definitions of a script; ValueError for a marker that stands above something else."""
    found, copies = definitions(script.read_text()), []
    by_start = {start: (name, end) for name, (start, end) in found.items()}
    for number, line in enumerate(script.read_text().split("\n")):
        if match := MARKER.match(line):
            kind, source, name, reason = match.groups()
            below, end = by_start.get(number + 1, ("", 0))
            if below.split(".")[-1] != name.split(".")[-1]:
                stands = f"the marker names {name}, but below it stands {below or 'no definition'}"
                raise ValueError(f"{script}:{number + 1}: {stands}")
            if kind == "Adapted" and not reason:
                said = f"an adapted copy says why: # Adapted from {source}: {name} -- reason"
                raise ValueError(f"{script}:{number + 1}: {said}")
            copies.append(Copy(script, kind, source, name, reason, number + 1, end))
    return copies


def problems(root: Path = ROOT, scripts: tuple[str, ...] = SCRIPTS) -> list[str]:
    """What is wrong with the copies in the scripts that exist; empty if nothing is."""
    wrong = []
    for script in (root / name for name in scripts if (root / name).exists()):
        copies = marked(script)
        for copy in copies:
            source = (root / copy.source).read_text()
            original = definitions(source).get(copy.name)
            if original is None:
                wrong.append(f"{script}:{copy.start}: {copy.source} has no {copy.name}")
            elif copy.kind == "Copied" and text_of(script.read_text(), copy.start, copy.end) != text_of(
                source, *original
            ):
                how = "python tests/copies.py --fix"
                wrong.append(f"{script}:{copy.start}: {copy.name} differs from {copy.source}: {how}")
        copied = {copy.name for copy in copies if copy.kind == "Copied"}
        for part, names in SHARED.items():  # a method may be copied with its class
            names = set(names) - ADAPTED.get(script.relative_to(root).as_posix(), set())
            missing = [name for name in sorted(names) if not {name, name.split(".")[0]} & copied]
            wrong += [f"{script}: {name} ({part}) must be a marked copy of the root's" for name in missing]
        originals = {name for source in ORIGINALS for name in definitions((root / source).read_text())} - OWN
        marked_names = {copy.name for copy in copies}
        unmarked = [n for n in definitions(script.read_text()) if "." not in n and n in originals - marked_names]
        wrong += [f"{script}: {name} is in the root's files too: say Copied or Adapted above it" for name in unmarked]
        titles = re.findall(r"^# =+\n# (\w+)", script.read_text(), re.MULTILINE)
        if titles != SECTIONS:
            wrong.append(f"{script}: its sections are {titles}, not {SECTIONS}")
    return wrong


def fix(root: Path = ROOT, scripts: tuple[str, ...] = SCRIPTS) -> list[str]:
    """Rewrite the copies that differ from their originals -> their names."""
    changed = []
    for script in (root / name for name in scripts if (root / name).exists()):
        for copy in reversed(marked(script)):  # from the end, so that line numbers before stay right
            source = (root / copy.source).read_text()
            original = definitions(source).get(copy.name)
            if copy.kind == "Adapted" or original is None:
                continue
            lines = script.read_text().split("\n")
            indent = re.match(" *", lines[copy.start]).group()
            text = textwrap.indent(text_of(source, *original), indent)
            if text != "\n".join(lines[copy.start : copy.end]):
                lines[copy.start : copy.end] = text.split("\n")
                script.write_text("\n".join(lines))
                changed.append(f"{script}: {copy.name}")
    return changed


if __name__ == "__main__":
    if sys.argv[1:] == ["--fix"]:
        print("\n".join(fix()) or "all copies are right")
    found = problems()
    print("\n".join(found) or "no problems")
    sys.exit(bool(found))
