"""Run folders and submitted records, whose files are read when first used, and checks of single numbers."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from slowrun import rules
from slowrun.data import sha256_file

MAX_UNPACKED = 500 * 10**6  # bytes read from a compressed file at most

# ======================================================================================================================
# Numbers
# ======================================================================================================================


def require(condition, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def number(value) -> float:
    """Return a finite number unchanged; ValueError for anything else, including true and false."""
    is_finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    require(is_finite, f"{value!r} is not a finite number")
    return value


def close(a, b, tolerance: float) -> bool:
    """Whether two finite numbers differ by at most the tolerance."""
    return abs(number(a) - number(b)) <= tolerance


def differing(a: dict, b: dict) -> str:
    """The keys whose values differ, or that only one of the two has."""
    return ", ".join(sorted(key for key in a.keys() | b.keys() if a.get(key, ...) != b.get(key, ...)))


def not_finite(value, name: str = "") -> list[str]:
    """The paths of the numbers in a JSON value that are not finite."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, inner in items for found in not_finite(inner, f"{name}.{key}" if name else str(key))]
    return [name] if isinstance(value, float) and not math.isfinite(value) else []


# ======================================================================================================================
# Folders
# ======================================================================================================================


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, or of its .gz; ValueError if there is neither."""
    if path.exists():
        return path.read_text().splitlines()
    packed = path.with_name(path.name + ".gz")
    require(packed.exists(), f"{path.name} is missing")
    with gzip.open(packed) as file:
        content = file.read(MAX_UNPACKED + 1)
    limit = f"{MAX_UNPACKED / 10**6:.0f} MB"
    require(len(content) <= MAX_UNPACKED, f"{packed.name} has more than {limit} when it is unpacked")
    return content.decode().splitlines()


@dataclass
class Part:
    """What one training loop wrote: a run, or a chain of an unlimited run. Its log lines begin with its run id."""

    name: str
    path: Path
    run_id: str

    @cached_property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in read_lines(self.path / "metrics.jsonl")]

    @property
    def steps(self) -> list[dict]:
        return [line for line in self.metrics if "dt_s" in line]

    @property
    def validations(self) -> list[dict]:
        """Those after the first step."""
        return [line for line in self.metrics if "val_loss" in line and line["step"] > 0]

    def validations_in(self, stage: dict) -> list[dict]:
        """Validations whose line, or the step before it, has these values (arguments of the model)."""
        at_step = {line["step"]: line for line in self.steps}
        found = []
        for line in self.validations:
            values = at_step.get(line["step"], {}) | line
            if all(values.get(name) == value for name, value in stage.items()):
                found.append(line)
        return found

    @cached_property
    def log(self) -> list[str]:
        return read_lines(self.path / "log.txt")

    @cached_property
    def ledger(self) -> dict:
        return json.loads((self.path / "ledger.json").read_text())


@dataclass
class Folder:
    """A run folder, or seed-<n>/ of a submitted record, whose code is beside it. Files are read when first used."""

    path: Path
    code: Path
    name: str

    @cached_property
    def saved(self) -> dict:
        return json.loads((self.path / "config.json").read_text())

    @cached_property
    def result(self) -> dict:
        return json.loads((self.path / "result.json").read_text())

    @property
    def config(self) -> dict:
        return self.saved["config"]

    @property
    def track(self) -> str:
        track = self.saved["track"]
        require(track in rules.RULES, f"config.json names track {track!r}, not one of {', '.join(rules.RULES)}")
        return track

    @property
    def rules(self) -> rules.Rules:
        return rules.RULES[self.track]

    @property
    def official(self) -> bool:
        """Whether it claims that its data are the benchmark's."""
        return rules.is_official(self.result["data_sha256"])

    @cached_property
    def main(self) -> Part:
        return Part("", self.path, self.saved["run_id"])

    @cached_property
    def parts(self) -> list[Part]:
        """The run itself, or its chains."""
        if self.track != "unlimited":
            return [self.main]
        names = [f"chain_{i:02d}" for i in range(self.config["chains"])]
        return [Part(n, self.path / "chains" / n, f"{self.saved['run_id']}-{n[6:]}") for n in names]

    @cached_property
    def members(self) -> list[dict]:
        return self.final["members"]

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """SHA-256 of the files of final/, computed once: they may be hundreds of GB."""
        return final_hashes(self)

    @cached_property
    def final(self) -> dict:
        return json.loads((self.path / "final" / "members.json").read_text())


def final_hashes(run: Folder) -> dict[str, str]:
    """SHA-256 of the files of final/ as they are now, by name."""
    return {path.name: sha256_file(path) for path in sorted((run.path / "final").iterdir())}


def open_folders(paths: list[Path]) -> tuple[list[Folder], Path | None]:
    """-> (runs, or the seeds of a submitted record; its folder or None). ValueError if they cannot be judged."""
    for path in paths:
        require(path.is_dir(), f"{path} is not a folder: name run folders, such as runs/<name>")
        submitted = not (path / "config.json").exists() and any(path.glob("seed-*"))
        part = path.name.startswith("seed-") and not (path / "code").exists()
        require(not part, f"{path} is a part of a submitted record: name the folder above, {path.parent}")
        require(submitted or (path / "config.json").exists(), f"{path} has neither config.json nor seed-*/: name a run")
        require(not submitted or len(paths) == 1, f"{path} is a submitted record: name it alone")
        if submitted:
            seeds = sorted(path.glob("seed-*"), key=lambda seed: (len(seed.name), seed.name))
            return [Folder(seed, path / "code", seed.name) for seed in seeds], path
    names = [path.resolve().name for path in paths]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    return [Folder(path, path / "code", name) for name, path in zip(names, paths, strict=True)], None
