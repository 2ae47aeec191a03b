"""The versions of slowrun/, the instrument that every result is measured with: records/instruments.json.

    python records/instruments.py --check               # exit code 1 if the list lacks slowrun/ as it is here
    python records/instruments.py --add "what changed"  # appends slowrun/ as it is here

A run folder has a copy of slowrun/ in code/. The referee accepts any version in this list, old ones too, and no other.
The list only grows: whoever changes slowrun/ appends to it, in the same commit.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slowrun.data import read_json  # noqa: E402
from slowrun.folder import PACKAGE, instrument_sha256, write_json  # noqa: E402

LIST = ROOT / "records" / "instruments.json"
COMMAND = 'python records/instruments.py --add "what changed"'
SCRIPT_MODULES = {"train", "model"}  # what a run's code/ has beside slowrun/
CACHE = "__pycache__"
IMPORTED_AT_START = {"sitecustomize", "usercustomize"}  # by Python itself, if it finds them

# ======================================================================================================================
# The list
# ======================================================================================================================


def read_list() -> list[dict]:
    """The known versions, oldest first: sha256, date, change. ValueError if the list is missing or damaged."""
    advice = "git checkout records/instruments.json"
    if not LIST.exists():
        raise ValueError(f"{LIST} not found: {advice}")
    entries = read_json(LIST, {"instruments"}, advice)["instruments"]
    is_sound = isinstance(entries, list) and all(
        isinstance(entry, dict)
        and entry.keys() == {"sha256", "date", "change"}
        and all(isinstance(value, str) and value for value in entry.values())
        for entry in entries
    )
    if not is_sound:
        raise ValueError(f"{LIST}: every entry needs sha256, date and change, each a text: {advice}")
    return entries


def known_versions() -> dict[str, dict]:
    """The entries of the list by their hash."""
    return {entry["sha256"]: entry for entry in read_list()}


def add(change: str) -> str:
    """Append slowrun/ as it is here -> its hash. ValueError if the list has it, or if the change is not described."""
    found = instrument_sha256()
    if found in known_versions():
        raise ValueError(f"{LIST} has slowrun/ as it is here already ({found[:12]}...): there is nothing to add")
    if not change.strip():
        raise ValueError(f"say what changed in slowrun/: {COMMAND}")
    entry = {"sha256": found, "date": time.strftime("%Y-%m-%d", time.gmtime()), "change": change.strip()}
    write_json(LIST, {"instruments": [*read_list(), entry]})
    return found


# ======================================================================================================================
# A run's copy
# ======================================================================================================================


def copy_problems(code: Path) -> list[str]:
    """What is wrong with slowrun/ in a run's code/, apart from the content of its files; empty if nothing is.

    It must hold modules only, and nothing else in code/ may be imported in its place, or in place of a module of Python
    or of an installed package.
    """
    package = code / PACKAGE.name
    if not package.is_dir():
        return ["code/ has no slowrun/: copy the whole code/ of the run"]
    stray = [path for path in package.iterdir() if path.name != CACHE and not is_module(path)]
    problems = [f"code/slowrun/{path.name} is not a module of slowrun/: remove it" for path in sorted(stray)]
    for path in sorted(code.rglob("*")):
        is_outside = path != package and package not in path.parents
        if is_outside and path.stem == PACKAGE.name:
            problems.append(f"code/{path.relative_to(code).as_posix()} is a second slowrun: remove it")
    for path in sorted(code.iterdir()):
        is_importable = path.suffix == ".py" or path.is_dir()
        if is_importable and shadows_a_module(path.stem):
            problems.append(f"code/{path.name} would be imported instead of the module {path.stem}: rename it")
    return problems


def is_module(path: Path) -> bool:
    return path.suffix == ".py" and path.is_file() and not path.is_symlink()


def shadows_a_module(name: str) -> bool:
    """Whether a file or a folder of this name in code/ hides a module of Python or of an installed package."""
    if name in {*SCRIPT_MODULES, PACKAGE.name, CACHE}:
        return False
    if name in sys.stdlib_module_names or name in IMPORTED_AT_START:
        return True
    installed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return PathFinder.find_spec(name, installed) is not None


def different_files(package: Path) -> list[str]:
    """The names of the files in which a copy of slowrun/ differs from the one here."""
    names = {path.name for folder in (package, PACKAGE) for path in folder.glob("*.py")}

    def content(path: Path) -> bytes | None:
        return path.read_bytes() if path.is_file() else None

    return sorted(name for name in names if content(package / name) != content(PACKAGE / name))


# ======================================================================================================================
# Command line
# ======================================================================================================================


def check() -> int:
    """Say whether the list has slowrun/ as it is here -> the exit code."""
    found = instrument_sha256()
    entry = known_versions().get(found)
    if entry is None:
        print(f"{LIST} lacks slowrun/ as it is here ({found[:12]}...): {COMMAND}")
        return 1
    print(f"slowrun/ is the version of {entry['date']} ({found[:12]}...)")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, or the list is complete; 1 it is not; 2 refused."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--check", action="store_true", help="write nothing, say whether slowrun/ is in the list")
    choice.add_argument("--add", metavar="WHAT_CHANGED", help="append slowrun/ as it is here")
    arguments = parser.parse_args(argv)
    try:
        if arguments.check:
            return check()
        print(f"added {add(arguments.add)[:12]}... to {LIST}")
        return 0
    except (ValueError, OSError) as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
