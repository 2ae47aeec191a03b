"""Run folders and submitted ones: their files, read when they are used, and their numbers, checked."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from slowrun import rules
from slowrun.data import sha256_file

PLAIN = 500 * 10**6  # most bytes that are read of a compressed file

# ======================================================================================================================
# Numbers
# ======================================================================================================================


def require(fine, message: str) -> None:
    """ValueError if something is not as it must be."""
    if not fine:
        raise ValueError(message)


def number(value) -> float:
    """A finite number; ValueError for anything else, also true and false."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    require(fine, f"{value!r} is not a finite number")
    return value


def close(a, b, tolerance: float) -> bool:
    """Whether two finite numbers differ by the tolerance at most."""
    return abs(number(a) - number(b)) <= tolerance


def differing(a: dict, b: dict) -> str:
    """The keys whose values are not the same."""
    return ", ".join(sorted(key for key in a.keys() | b.keys() if a.get(key, ...) != b.get(key, ...)))


def not_finite(value, name: str = "") -> list[str]:
    """Names of the numbers in a JSON value that are not finite."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, inner in items for found in not_finite(inner, f"{name}.{key}" if name else str(key))]
    return [name] if isinstance(value, float) and not math.isfinite(value) else []


# ======================================================================================================================
# Folders
# ======================================================================================================================


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, or of the same with .gz; ValueError if there is neither."""
    if path.exists():
        return path.read_text().splitlines()
    packed = path.with_name(path.name + ".gz")
    require(packed.exists(), f"{path.name} is missing")
    with gzip.open(packed) as file:
        content = file.read(PLAIN + 1)
    require(len(content) <= PLAIN, f"{packed.name} has more than {PLAIN / 10**6:.0f} MB when it is unpacked")
    return content.decode().splitlines()


@dataclass
class Part:
    """What was trained by one loop: a run, or a chain of an unlimited one. Its log lines begin with its id."""

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
        """After the first step."""
        return [line for line in self.metrics if "val_loss" in line and line["step"] > 0]

    def validations_in(self, stage: dict) -> list[dict]:
        """Those of a model with these arguments, by the values of the step before them or by their own line."""
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
    """A run folder, or seed-<n>/ of a submitted one, whose code is beside it. Its files are read when they are used."""

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
        """Whether it says that its data are the benchmark's."""
        return rules.is_official(self.result["data_sha256"])

    @cached_property
    def main(self) -> Part:
        return Part("", self.path, self.saved["run_id"])

    @cached_property
    def parts(self) -> list[Part]:
        """What was trained: the run itself, or its chains."""
        if self.track != "unlimited":
            return [self.main]
        names = [f"chain_{i:02d}" for i in range(self.config["chains"])]
        return [Part(n, self.path / "chains" / n, f"{self.saved['run_id']}-{n[6:]}") for n in names]

    @cached_property
    def members(self) -> list[dict]:
        return self.final["members"]

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """Of the files of final/ when they were first looked at: they may be hundreds of GB."""
        return final_hashes(self)

    @cached_property
    def final(self) -> dict:
        return json.loads((self.path / "final" / "members.json").read_text())


def final_hashes(run: Folder) -> dict[str, str]:
    """SHA-256 of the files of final/."""
    return {path.name: sha256_file(path) for path in sorted((run.path / "final").iterdir())}


def open_folders(paths: list[Path]) -> tuple[list[Folder], Path | None]:
    """-> (Run folders, or the seeds of the submitted folder; that folder). ValueError if they cannot be judged."""
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
