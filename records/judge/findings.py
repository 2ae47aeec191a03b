"""PASS, FAIL and NOTE, the options, and the state of a judgement."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from records.judge.runs import Folder
from slowrun.data import Split, load_splits
from slowrun.scoring import Score

RECORDS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Finding:
    """One line of the output: what a check found in a run."""

    status: str  # PASS, FAIL or NOTE
    check: str
    run: str
    text: str

    def __str__(self) -> str:
        """A single line: control characters from a run's files become question marks."""
        line = f"{self.status}  {self.check:13}  {self.run}  {self.text}"
        return "".join(character if character.isprintable() else "?" for character in line)


@dataclass
class Check:
    """A check in progress: its failures and notes. It passes if nothing failed."""

    other_data: bool
    fails: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def need(self, fine, text: str) -> None:
        """Fail unless this holds; for every run."""
        if not fine:
            self.fails.append(text)

    def record_needs(self, fine, text: str) -> None:
        """Fail unless this holds; with --other-data, only note it, as it is a rule for records."""
        if not fine:
            (self.notes if self.other_data else self.fails).append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass
class Options:
    """Options of a judgement; see the command line's help."""

    data: str | None = None
    other_data: bool = False
    static: bool = False
    device: str = "auto"
    time_limit_min: float = 60.0
    probe_seed: int = field(default_factory=lambda: int.from_bytes(os.urandom(4), "little"))
    records_dir: Path = RECORDS
    submission: bool = False  # judge even a single run as one
    say: Callable[[Finding], None] = lambda finding: None  # called with each finding as it is made


@dataclass
class Scored:
    """The scores and measurements of a run's predictions."""

    scores: dict[str, Score]  # by split
    weights: list[float]  # of members, as load_members gave them
    measured: list[dict]  # one per callable, from the worker
    tolerance: float  # of log-probabilities that should be the same
    notes: list[str]
    changed: str  # names of the files of final/ that changed during scoring

    def worst(self, name: str) -> float:
        return max(callable_[name] for callable_ in self.measured)


class Judgement:
    """The state of a judgement: options, the data read so far, what the worker measured, findings."""

    def __init__(self, options: Options, submitted: Path | None = None):
        self.options, self.submitted, self.findings = options, submitted, []
        self.loaded: dict[tuple, dict[str, Split]] = {}
        self.overlaps: dict[str, dict[str, int]] = {}
        self.scored: dict[str, Scored] = {}

    def run_check(self, name: str, run: str, function: Callable[..., str], *arguments) -> None:
        """Call function(check, ...), which returns the text of a PASS, or "" if its notes say it all.

        A check that raises, for whatever reason, fails.
        """
        check, text = Check(self.options.other_data), ""
        try:
            text = function(check, *arguments)
        except Exception as error:  # files from strangers can be wrong in any way
            check.fails.append(f"cannot be checked: {type(error).__name__}: {str(error)[:300]}")
        if check.fails or text or not check.notes:
            self.add("FAIL" if check.fails else "PASS", name, run, "; ".join(check.fails) or text)
        for note in check.notes:
            self.add("NOTE", name, run, note)

    def add(self, *parts: str) -> None:
        """Add a finding (status, check, run, text) and report it."""
        self.findings.append(Finding(*parts))
        self.options.say(self.findings[-1])

    def data_dir(self, run: Folder) -> str:
        return self.options.data or run.config["data_dir"]

    def data(self, run: Folder) -> dict[str, Split]:
        """The splits that a run is judged on; read once."""
        key = (self.data_dir(run), run.config["vocab_size"], run.config["sequence_len"])
        if key not in self.loaded:
            self.loaded[key] = load_splits(*key)
        return self.loaded[key]
