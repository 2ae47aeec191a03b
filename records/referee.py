"""Judges runs: whether what they claim is so, and keeps the benchmark's rules.

    python records/referee.py runs/a runs/b runs/c          # one submission; --data is the config's if not given
    python records/referee.py runs/demo --other-data        # other data than FineWeb: sound or not, but no record
    python records/referee.py records/limited/22-slug       # a submitted folder, which has no weights: the static part

Prints a line per check and run, PASS, FAIL with the reason, or NOTE, and a verdict. Exit code: 0 nothing fails, 1
something does, 2 it cannot be called like that. It believes nothing that a run says of itself where it can find out.
Data, scores and rules are those of slowrun/ beside it; that of a run, in its code/, must be a version of it that
records/instruments.json lists.

The run's code is executed by records/score.py, in a process of its own with a time limit: that keeps crashes and
hangs away, but it is NOT a sandbox against malice. Judge code that you have not read on a machine that you can lose,
or with --static, which neither needs weights and data nor executes anything.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import gzip
import hashlib
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

RECORDS = Path(__file__).resolve().parent
ROOT = RECORDS.parent
WORKER = RECORDS / "score.py"
sys.path.insert(0, str(ROOT))

from records import instruments  # noqa: E402
from records.overlap import SHORTEST, count_overlaps  # noqa: E402
from slowrun import rules  # noqa: E402
from slowrun.data import Split, load_splits, sha256_file, token_bytes  # noqa: E402
from slowrun.folder import code_sha256, instrument_sha256, write_json  # noqa: E402
from slowrun.scoring import EvalSet, Score, data_efficiency  # noqa: E402
from slowrun.session import duration  # noqa: E402
from slowrun.world import VIRTUAL_RANKS, World  # noqa: E402

# ======================================================================================================================
# What is checked, besides the rules of the tracks, which are in slowrun/rules.py
# ======================================================================================================================

GPT2, BYTES = 50257, 257  # sizes of vocabularies whose bytes per token are known
GPT2_BYTES_SHA256 = "fc85cec8499a3efe31f2f65fdeb29161153e365155fc4990626335c8873146ee"  # of them as int64
MIXINGS = ("probability", "weight", "logit")
CLAIM_TOLERANCE = 0.001  # nats, and bits per byte
HOLDOUT_GAP = 0.1  # nats by which the holdout may be worse than the validation set
SUM_TOLERANCE = 1e-3  # of the logarithm of the sum of probabilities
SAME = {"low": 1e-3, "full": 1e-5}  # log-probabilities that should be the same: in bfloat16 or on a GPU, else
CLOCK_TOLERANCE = 0.01  # relative
SIGNIFICANT = 0.0047  # nats, of (rho - mu) sqrt(n): one-sided p < 0.01, as seeds differ by 0.002 nats
FIRST_SEED = 42
CODE_MB, SUBMITTED_MB = 1, 5  # MB is 10^6 bytes
PLAIN = 500 * 10**6  # most bytes that are read of a compressed file

# Overrides that a record may have, as none is a hyperparameter: what differs between runs of a submission (the seed
# and names; how often it is said, saved and watched; how many sequences a pass takes, which is the same mathematics),
OF_A_RUN = {
    "seed", "run_name", "runs_dir", "data_dir", "eval_batch", "device_batch", "checkpoint_min", "log_every", "wandb",
    "eval_initial", "checkpoints", "profile_steps",
}  # fmt: skip
# and what computes it, which the result names and no machine has all of; it is the same in all runs of a submission.
KERNELS = {"device", "dtype", "compile", "attention", "head", "processes_per_chain"}

RESULT_NUMBERS = (
    "val_loss", "best_val_loss", "steps", "tokens", "epochs", "train_time_s", "wall_time_s", "time_cap_min", "seed",
    "world_size", "peak_memory_gib", "tokens_per_s", "parameters", "val_tokens", "val_bytes",
)  # fmt: skip
RESULT_KEYS = (
    *RESULT_NUMBERS,
    "track", "status", "stopped_by", "run_id", "val_bpb", "readouts", "holdout_loss", "data_efficiency", "device",
    "mfu", "mixing", "torch", "cuda", "data_sha256", "code_sha256", "final_sha256", "eligible", "not_eligible_because",
)  # fmt: skip
CONFIG_KEYS = ("run_id", "track", "command", "overrides", "config", "code_sha256", "data_sha256")

CODE_FILE = r"code/(slowrun/)?\w+\.py"
RUN_FILE = r"config\.json|result\.json|log\.txt|metrics\.jsonl|curve\.png"
CHAIN_FILE = r"chains/chain_\d+/(ledger\.json|log\.txt|metrics\.jsonl|curve\.png)"
WEIGHTS_FILE = r"final/members\.json|((chains/chain_\d+/)?final|scores)/\w+\.safetensors"
# result_*.json: what --select-only and --add-chains leave beside the result
RUN_FOLDER = re.compile(rf"{CODE_FILE}|{RUN_FILE}|result_\w+\.json|{CHAIN_FILE}|{WEIGHTS_FILE}")
SUBMITTED_FOLDER = re.compile(
    rf"README\.md|{CODE_FILE}|seed-\d+/({RUN_FILE}|{CHAIN_FILE}|(chains/chain_\d+/)?metrics\.jsonl\.gz)"
)
# Of Weights & Biases, of a run that was resumed by its own copy of the script, of one that failed before it was resumed
# and of one that was profiled
LEFT_ALONE = re.compile(
    r"wandb/|code/(slowrun/)?__pycache__/|"
    r"(chains/chain_\d+/)?(non_finite(_rank_\d+)?\.pt|profile_\d+-\d+\.(json\.gz|txt))$"
)
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".npy", ".npz", ".ckpt", ".joblib"}

# ======================================================================================================================
# Folders
# ======================================================================================================================


def require(fine, message: str) -> None:
    """ValueError if something is not as it must be."""
    if not fine:
        raise ValueError(message)


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


# ======================================================================================================================
# Findings
# ======================================================================================================================


@dataclass(frozen=True)
class Finding:
    """What a check says of a run."""

    status: str  # PASS, FAIL or NOTE
    check: str
    run: str
    text: str

    def __str__(self) -> str:
        """A line, whatever the run's files have in it."""
        line = f"{self.status}  {self.check:13}  {self.run}  {self.text}"
        return "".join(character if character.isprintable() else "?" for character in line)


@dataclass
class Check:
    """One check under way: what fails, and what is worth saying. Nothing that fails: it passes."""

    other_data: bool
    fails: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def need(self, fine, text: str) -> None:
        """A rule for all runs."""
        if not fine:
            self.fails.append(text)

    def record_needs(self, fine, text: str) -> None:
        """A rule for records: with --other-data it is a note."""
        if not fine:
            (self.notes if self.other_data else self.fails).append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass
class Options:
    """How to judge; see the command line's help."""

    data: str | None = None
    other_data: bool = False
    static: bool = False
    device: str = "auto"
    time_limit_min: float = 60.0
    probe_seed: int = field(default_factory=lambda: int.from_bytes(os.urandom(4), "little"))
    records_dir: Path = RECORDS
    submission: bool = False  # also a single run is to be one
    say: Callable[[Finding], None] = lambda finding: None  # is called with each finding at once


class Judge:
    """The state of a judgement: options, data that were read, what the worker measured, findings."""

    def __init__(self, options: Options, submitted: Path | None = None):
        self.options, self.submitted, self.findings = options, submitted, []
        self.loaded: dict[tuple, dict[str, Split]] = {}
        self.overlaps: dict[str, dict[str, int]] = {}
        self.scored: dict[str, Scored] = {}

    def run_check(self, name: str, run: str, function: Callable[..., str], *arguments) -> None:
        """Call function(check, ...) -> what was found, empty if only its notes say something.

        What it cannot find, for whatever reason, fails.
        """
        check, text = Check(self.options.other_data), ""
        try:
            text = function(check, *arguments)
        except WorkerFailed as error:
            check.fails.append(str(error))
        except Exception as error:  # what strangers wrote can be wrong in any way
            check.fails.append(f"cannot be checked: {type(error).__name__}: {str(error)[:300]}")
        if check.fails or text or not check.notes:
            self.add("FAIL" if check.fails else "PASS", name, run, "; ".join(check.fails) or text)
        for note in check.notes:
            self.add("NOTE", name, run, note)

    def add(self, *parts: str) -> None:
        """A finding: status, check, run, text."""
        self.findings.append(Finding(*parts))
        self.options.say(self.findings[-1])

    def data_dir(self, run: Folder) -> str:
        return self.options.data or run.config["data_dir"]

    def data(self, run: Folder) -> dict[str, Split]:
        """The splits that a run is judged on."""
        key = (self.data_dir(run), run.config["vocab_size"], run.config["sequence_len"])
        if key not in self.loaded:
            self.loaded[key] = load_splits(*key)
        return self.loaded[key]


# ======================================================================================================================
# Checks of what is written: they need neither weights nor data
# ======================================================================================================================


def check_files(check: Check, root: Path, allowed: re.Pattern) -> str:
    """Only files of the kinds that a folder has, none of which leads out of it or can be executed."""
    names, others, size = [], set(), {"code": 0, "all": 0}
    for path in sorted(root.rglob("*")):
        name, info = path.relative_to(root).as_posix(), path.lstat()
        if stat.S_ISDIR(info.st_mode):
            continue
        if allowed is RUN_FOLDER and (left := LEFT_ALONE.match(name)):
            others.add(left[0])
            continue
        names.append(name)
        if stat.S_ISLNK(info.st_mode):
            check.need(False, f"{name} is a symbolic link to {os.readlink(path)}: put the file itself there")
            continue
        check.need(stat.S_ISREG(info.st_mode), f"{name} is not a regular file")
        check.need(path.suffix not in PICKLES, f"{name} may hold pickled objects, which are not read: delete it")
        check.need(allowed.fullmatch(name), f"{name} is not a file of such a folder: move it elsewhere")
        script = path.suffix == ".py"
        check.need(script or not info.st_mode & 0o111, f"{name} is executable, only scripts may be: chmod -x")
        check.need(path.suffix != ".safetensors" or is_safetensors(path), f"{name} is not a safetensors file")
        size["all"] += info.st_size
        size["code"] += info.st_size if name.startswith("code/") else 0
    if others:
        check.note(f"{', '.join(sorted(others))}: not looked at, nor used, nor submitted")
    check.need("code/train.py" in names, "code/train.py is missing")
    check.need(size["code"] <= CODE_MB * 1e6, f"code/ has {size['code'] / 1e6:.1f} MB, at most {CODE_MB} are needed")
    if allowed is SUBMITTED_FOLDER:
        check.need("README.md" in names, "README.md is missing")
        limit = submitted_mb(root)
        fits = size["all"] <= limit * 1e6
        check.need(fits, f"the folder has {size['all'] / 1e6:.1f} MB, at most {limit} are allowed")
    return f"{len(names)} files, {size['all'] / 1e6:.1f} MB"


def submitted_mb(root: Path) -> int:
    """MB that a submitted folder may have: so many, and as many for each chain of the unlimited track."""
    return SUBMITTED_MB * (1 + len(list(root.glob("seed-*/chains/*"))))


def is_safetensors(path: Path) -> bool:
    """Whether it begins as the format does: the length of a JSON header, and the header."""
    with open(path, "rb") as file:
        length, brace = int.from_bytes(file.read(8), "little"), file.read(1)
    return brace == b"{" and 8 + length <= path.stat().st_size


def not_finite(value, name: str = "") -> list[str]:
    """Names of the numbers in a JSON value that are not finite."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, inner in items for found in not_finite(inner, f"{name}.{key}" if name else str(key))]
    return [name] if isinstance(value, float) and not math.isfinite(value) else []


def check_completeness(check: Check, run: Folder, judge: Judge) -> str:
    """The run is finished, says all that it must, and scored all targets."""
    saved, result = run.saved, run.result
    lacking = [k for k in CONFIG_KEYS if k not in saved] + [k for k in RESULT_KEYS if k not in result]
    check.need(not lacking, f"config.json or result.json lacks {', '.join(lacking)}")
    check.need(result["status"] == "finished", f"status is {result['status']!r}, not 'finished'")
    by = ("steps", "time_cap")
    check.need(result["stopped_by"] in by, f"stopped_by is {result['stopped_by']!r}, not one of {by}")
    wrong = not_finite(result) + [k for k in RESULT_NUMBERS if not isinstance(result[k], int | float)]
    check.need(not wrong, f"not finite numbers in result.json: {', '.join(wrong)}")
    for name, here, there in (
        ("track", result["track"], saved["track"]),
        ("run_id", result["run_id"], saved["run_id"]),
        ("seed", result["seed"], run.config["seed"]),
        ("data_sha256", result["data_sha256"], saved["data_sha256"]),
        ("time_cap_min", result["time_cap_min"], run.config.get("time_cap_min", 0)),
    ):
        check.need(here == there, f"{name} is {here!r} in result.json, {there!r} in config.json")
    whole = result["val_tokens"] > 0 and result["val_tokens"] % run.config["sequence_len"] == 0
    check.need(whole, f"val_tokens is {result['val_tokens']:,}: not whole sequences of {run.config['sequence_len']}")
    if run.official:
        needed = run.rules.val_tokens
        found = result["val_tokens"]
        check.need(found == needed, f"val_tokens is {found:,}, the {run.track} track scores {needed:,}")
    official = result["data_sha256"].get("val") == rules.OFFICIAL_SHA256["val"]
    found, needed = result["data_efficiency"], data_efficiency(number(result["val_loss"])) if official else None
    check.need(found == needed, f"data_efficiency is {found}, by val_loss and data it is {needed}")
    rate = result["tokens"] / max(number(result["train_time_s"]), 1e-9)
    found = result["tokens_per_s"]
    check.need(close(found, rate, 0.01 * rate), f"tokens_per_s is {found:.1f}, tokens / train_time_s {rate:.1f}")
    return f"finished after {result['steps']:,} steps, {result['val_tokens']:,} validation targets"


def config_defaults(code: Path) -> dict:
    """Fields and defaults of Config and its bases in code/ and code/slowrun/, from the text: nothing is executed."""
    classes: dict[str, list[ast.ClassDef]] = {}
    for path in sorted([*code.glob("*.py"), *code.glob("slowrun/*.py")]):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(node)

    def fields(name: str) -> dict:
        found, nodes = {}, classes.get(name, [])
        require(len(nodes) == 1, f"{len(nodes)} classes {name} in code/, one is needed")
        for base in reversed(nodes[0].bases):  # the first one overrides the others
            found |= fields(ast.unparse(base))
        for node in nodes[0].body:
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                text = ast.unparse(node)
                try:
                    found[node.target.id] = json.loads(json.dumps(ast.literal_eval(node.value)))
                except (ValueError, TypeError, AttributeError):
                    raise ValueError(f"the default of a field of {name} is not a literal: {text}") from None
        return found

    return fields("Config")


def check_code(check: Check, run: Folder, judge: Judge) -> str:
    """The code is the one that ran, and the config is that of its defaults but for harmless overrides."""
    saved, found = run.saved, code_sha256(run.code)
    for name, said in (("config.json", saved["code_sha256"]), ("result.json", run.result["code_sha256"])):
        check.need(said == found, f"the SHA-256 of code/ is {found[:12]}..., {name} says {said[:12]}...")
    defaults, config = config_defaults(run.code), run.config
    odd = sorted(defaults.keys() ^ config.keys())
    check.need(not odd, f"fields that only the code or only config.json has: {', '.join(odd)}")
    changed = {k: v for k, v in config.items() if k in defaults and v != defaults[k]}
    told = saved["overrides"]
    hidden = differing(told, changed)
    check.need(not hidden, f"overrides are not what differs from the code's defaults: {hidden}")
    settings = {k: v for k, v in changed.items() if k not in OF_A_RUN | KERNELS}
    if check.other_data and settings:
        check.note(f"{len(settings)} settings are not the script's defaults, as a record's are: {', '.join(settings)}")
    said = ", ".join(f"{k} {v!r} (default {defaults[k]!r})" for k, v in settings.items())
    advice = "put them into its defaults, and run it again"
    check.need(check.other_data or not settings, f"hyperparameters that are not in the script: {said}: {advice}")
    harmless = ", ".join(sorted(changed.keys() - settings.keys())) or "none"
    return f"{found[:12]}, {len(defaults)} settings as in the code, overrides: {harmless}"


def check_instrument(check: Check, run: Folder, judge: Judge) -> str:
    """What measured the run, code/slowrun/, is a version of this repository's history, and nothing takes its place."""
    claims = {"config.json": run.saved.get("instrument_sha256"), "result.json": run.result.get("instrument_sha256")}
    if not any(claims.values()):
        by = "judge it with the referee of the version that made it, which had no slowrun/ yet"
        check.need(False, f"config.json and result.json have no instrument_sha256: {by}")
        return ""
    for problem in instruments.copy_problems(run.code):
        check.need(False, problem)
    package = run.code / "slowrun"
    if not package.is_dir():
        return ""
    found = instrument_sha256(package)
    for name, claim in claims.items():
        check.need(claim == found, f"the SHA-256 of code/slowrun/ is {found[:12]}..., {name} says {str(claim)[:12]}")
    entry = instruments.known_versions().get(found)
    if entry is None:
        check.need(False, unknown_instrument(package, found))
        return ""
    return f"{found[:12]}, the version of {entry['date']}: {entry['change']}"


def unknown_instrument(package: Path, found: str) -> str:
    """What to do about a slowrun/ that is in no entry of the list."""
    text = f"code/slowrun/ ({found[:12]}...) is no version in records/instruments.json"
    changed = ", ".join(instruments.different_files(package))
    if not changed:
        return f"{text}, though it is slowrun/ as it is here: a maintainer adds it with {instruments.COMMAND}"
    advice = "a record changes the script alone, so put the idea there and run it again with slowrun/ as it is here"
    return f"{text}: it differs from slowrun/ as it is here in {changed}; {advice}, or update this repository"


STEP_LINE = re.compile(r"step (\d+)/\d+ \| train (\S+) ")
VALIDATION_LINE = re.compile(r" \| step (\d+)/\d+ \| val (\S+)")
RESUMED = re.compile(r" resumed at step (\d+)/| no checkpoint yet: starting from step (0)$")


def printed_losses(log: list[str]) -> tuple[dict[int, float], dict[int, float]]:
    """Training and validation losses by step, as a log says them. What a resumed run repeats counts as it was then."""
    steps: dict[int, float] = {}
    validations: dict[int, float] = {}
    for line in log:
        if match := RESUMED.search(line):
            last = int(match[1] or match[2])
            for found in (steps, validations):
                for step in [step for step in found if step > last]:
                    del found[step]
        elif match := STEP_LINE.search(line):
            steps[int(match[1])] = float(match[2])
        elif match := VALIDATION_LINE.search(line):
            validations[int(match[1])] = float(match[2])
    return steps, validations


def check_log(check: Check, run: Folder, judge: Judge) -> str:
    """The logs are those of this run: its id in every line, its track, its losses."""
    track, result, lines = run.track, run.result, 0
    first = f"{run.main.run_id} NanoGPT Slowrun, {track} track"
    begins = [line for line in run.main.log if " NanoGPT Slowrun, " in line]
    check.need(set(begins) == {first}, f"log.txt has the headers {sorted(set(begins))}, not {first!r} alone")
    for part in [run.main, *(part for part in run.parts if part is not run.main)]:
        where = f"{part.name}/log.txt".lstrip("/")
        lines += len(part.log)
        others = [line for line in part.log if not line.startswith(part.run_id + " ")]
        check.need(not others, f"{len(others)} lines of {where} are not of run {part.run_id}: {others[:1]}")
        ids = {line.get("run") for line in part.metrics}
        check.need(ids <= {part.run_id}, f"metrics.jsonl has lines of runs {ids}, not only of {part.run_id}")
    for part in run.parts:
        where = f"{part.name}/log.txt".lstrip("/")
        printed, validated = printed_losses(part.log)
        few = len(part.steps) < run.config["log_every"]
        check.need(printed or few, f"{where} has no line of a step")
        losses = {line["step"]: line["train_loss"] for line in part.steps}
        validations = {line["step"]: line["val_loss"] for line in part.metrics if "val_loss" in line}
        for kind, said, known in (("training", printed, losses), ("validation", validated, validations)):
            beyond = [step for step in said if step not in known]
            check.need(not beyond, f"{where} has steps that metrics.jsonl has not ({kind}): {beyond[:5]}")
            other = [step for step in said if step in known and not close(said[step], known[step], 1e-4)]
            check.need(not other, f"{where} has other {kind} losses than metrics.jsonl, at steps {other[:5]}")
    text, by = "\n".join(run.main.log), re.escape(f"{run.main.run_id} ")
    settings = ", ".join(f"{k} {v}" for k, v in run.saved["overrides"].items()) or "the defaults, the current record"
    ended = rf"(finished|stopped by \w+) after {result['steps']:,} steps"
    took = duration(number(result["train_time_s"]))
    claims = {
        rf"^{by}settings +{re.escape(settings)}$": "its overrides, of config.json",
        rf"^{by}val_loss +{result['val_loss']:.4f} ": "its val_loss",
        rf"^{by}{track} track, seed {result['seed']}, {ended}$": "its seed and number of steps",
        rf"^{by}time +training {re.escape(took)}, ": "its training time",
        rf"^{by}device +{result['world_size']} x {re.escape(result['device'])},": "its number and kind of devices",
        rf"^{by}model +{result['parameters']:,} parameters$": "its number of parameters",
    }
    devices = {m[1] for m in re.finditer(rf"^{by}device +(\d+ x [^,]+),", text, re.MULTILINE)}
    check.record_needs(len(devices) <= 1, f"it ran on several devices: {', '.join(sorted(devices))}")
    for name, loss in result["readouts"].items():
        claims[rf"^{by} +{loss:.4f}  {re.escape(name)}$"] = f"its readout {name}"
    for pattern, what in claims.items():
        check.need(re.search(pattern, text, re.MULTILINE), f"log.txt does not say {what}, as result.json does")
    return f"{lines} lines with the run's id {run.main.run_id}, losses as in metrics.jsonl"


def check_losses(check: Check, run: Folder, judge: Judge) -> str:
    """Every loss is finite, and the best is the best of those that were read out."""
    result, readouts, count = run.result, run.result["readouts"], 0
    for part in run.parts:
        for line in part.steps:
            wrong = not_finite({k: v for k, v in line.items() if "loss" in k})
            check.need(not wrong, f"{part.name} step {line['step']}: {', '.join(wrong)} not finite".strip())
            number(line["train_loss"])
        wrong = [line["step"] for line in part.validations if not_finite(line)]
        check.need(not wrong, f"{part.name} validations that are not finite, at steps {wrong[:5]}".strip())
        count += len(part.steps)
    losses = {name: number(loss) for name, loss in readouts.items()}
    best, val_loss = number(result["best_val_loss"]), number(result["val_loss"])
    check.need(best == min(losses.values()), f"best_val_loss is {best}, the smallest readout {min(losses.values())}")
    check.need(val_loss in losses.values(), f"val_loss {val_loss} is not among the readouts")
    if run.track == "unlimited":
        ledgers, recorded = [part.ledger for part in run.parts], [part.validations for part in run.parts]
        told = [[member["val_loss"] for member in ledger["members"]] for ledger in ledgers]
        found = [[line["val_loss"] for line in lines] for lines in recorded]
        check.need(run.config["keep"] or told == found, "other losses of members in the ledgers than in metrics.jsonl")
        recorded = {line["val_loss"] for line in run.main.metrics}
        other = [name for name, loss in losses.items() if name.startswith("mixture_of_") and loss not in recorded]
        check.need(not other, f"readouts that are not in metrics.jsonl: {', '.join(other)}")
        best_member = losses["best_member"]
        known = [loss for losses_of_chain in told for loss in losses_of_chain]
        check.need(best_member in known, f"no ledger has the loss of the best member, {best_member}")
    else:
        told = [loss for name, loss in losses.items() if name.startswith("epoch_")]
        found = [line["val_loss"] for line in run.main.validations]
        check.need(told == found, f"readouts of epochs are {told}, the validations in metrics.jsonl {found}")
    return f"{count} training losses and {len(losses)} readouts are finite; best {best:.4f}, declared {val_loss:.4f}"


def planned_tokens(config: dict, sequences: int) -> list[int]:
    """Tokens that are done after 0, 1, ... all steps of a run, or of a chain, by its config."""
    group = VIRTUAL_RANKS * config["micro_batch"]
    epoch_tokens = sequences // group * group * config["sequence_len"]
    if "cycles" not in config:
        batch = config["batch_tokens"]
        return [batch * step for step in range(round(epoch_tokens * config["num_epochs"] / batch) + 1)]
    tokens, last = [0], config["cycles"] - 1
    for cycle in range(config["cycles"]):
        in_the_middle = 2 * (last - abs(2 * cycle - last)) >= last
        batch = config["batch_tokens" if in_the_middle else "outer_batch_tokens"]
        epochs = config["cycle_epochs"]
        if cycle == 0:
            epochs = config.get("first_cycle_epochs") or epochs
        tokens += [tokens[-1] + batch * i for i in range(1, max(1, round(epochs * epoch_tokens / batch)) + 1)]
    return tokens


def check_clock(check: Check, run: Folder, judge: Judge) -> str:
    """The steps' times add up to the training time, which is within the cap; nothing is trained off the clock."""
    result, seconds = run.result, number(run.result["train_time_s"])
    for part in run.parts:
        told = part.ledger if run.track == "unlimited" else result
        check_part(check, part, told)
    if run.track == "unlimited":
        check_chains(check, run)
    else:
        check_cap(check, run)
    wall_s = number(result["wall_time_s"])
    check.need(seconds <= wall_s, f"train_time_s {seconds:.1f} is more than wall_time_s {wall_s:.1f}")
    check.note(f"{wall_s - seconds:.0f} s were not timed (set-up, compilation, validation, checkpoints)")
    return f"{result['steps']:,} steps add up to {duration(seconds)} of training"


def check_part(check: Check, part: Part, told: dict) -> None:
    """Steps of a run or a chain: each once, in order, with a time and tokens; told: what it says of them."""
    steps, name = part.steps, f"{part.name}: " if part.name else ""
    numbers, count = [line["step"] for line in steps], told["steps"]
    said = f"{name}metrics.jsonl has {len(numbers)} timed steps, up to {max(numbers, default=0)}"
    check.need(numbers == list(range(1, count + 1)), f"{said}, not 1 to {count} in order")
    untimed = [line["step"] for line in part.metrics if "train_loss" in line and "dt_s" not in line]
    check.need(not untimed, f"{name}steps {untimed[:5]} were trained off the clock")
    late = [line["step"] for line in part.metrics if line["step"] > count]
    check.need(not late, f"{name}steps {late[:5]} come after the last one counted, {count}")
    wrong = [line["step"] for line in steps if not number(line["dt_s"]) > 0]
    check.need(not wrong, f"{name}steps {wrong[:5]} took no time")
    total, seconds = sum(line["dt_s"] for line in steps), number(told["train_time_s"])
    fits = close(total, seconds, CLOCK_TOLERANCE * seconds)
    check.need(fits, f"{name}the times of the steps add up to {total:.2f} s, train_time_s is {seconds:.2f} (within 1%)")
    last = steps[-1]["tokens"] if steps else 0
    check.need(told["tokens"] == last, f"{name}tokens is {told['tokens']}, after the last step they were {last}")


def check_cap(check: Check, run: Folder) -> None:
    """Training ended within the track's cap, and within the run's own."""
    seconds, cap, own = run.result["train_time_s"], run.rules.cap_min, number(run.config["time_cap_min"])
    check.record_needs(seconds <= 60 * cap, f"training took {seconds / 60:.2f} min, the cap is {cap:g}")
    check.record_needs(0 < own <= cap, f"the cap of {cap:g} min was {'lifted' if own <= 0 else f'set to {own:g}'}")
    check.need(own <= 0 or seconds <= 60 * own, f"training took {seconds / 60:.2f} min, the run's own cap is {own:g}")
    if run.result["stopped_by"] == "time_cap":
        slack = 3 * max(line["dt_s"] for line in run.main.steps[-6:])  # it stops before the step that may pass the cap
        near = own > 0 and seconds + slack >= 60 * own
        check.need(near, f"stopped_by is time_cap after {seconds / 60:.2f} min, but the cap is {own:g}")


def check_chains(check: Check, run: Folder) -> None:
    """What result.json sums up of the chains of an unlimited run, and the most that it may use."""
    result, ledgers = run.result, [part.ledger for part in run.parts]
    states = {ledger["state"] for ledger in ledgers}
    check.need(states == {"finished"}, f"chains are {', '.join(states)}, not all finished")
    seeds = [ledger["seed"] for ledger in ledgers]
    check.need(seeds == [run.config["seed"] + i for i in range(len(ledgers))], f"the chains' seeds are {seeds}")
    by_layout: dict[int, dict[int, float]] = {}  # seconds, by number of groups, by group
    for ledger in ledgers:
        groups, index, _ = ledger["layout"]
        of_group = by_layout.setdefault(groups, {})
        of_group[index] = of_group.get(index, 0.0) + number(ledger["train_time_s"])
        enough = number(ledger["process_s"]) >= 0.99 * ledger["train_time_s"]
        check.need(enough, f"chain {ledger['chain']} says fewer process seconds than seconds")
    sums = {
        "steps": sum(ledger["steps"] for ledger in ledgers),
        "tokens": sum(ledger["tokens"] for ledger in ledgers),
        "train_time_s": sum(max(of_group.values()) for of_group in by_layout.values()),
        "process_hours": sum(ledger["process_s"] for ledger in ledgers) / 3600,
        "world_size": max(ledger["layout"][0] * ledger["layout"][2] for ledger in ledgers),
    }
    for name, total in sums.items():
        found = number(result[name])
        check.need(close(found, total, 1e-6 * total), f"{name} is {found}, by the ledgers of the chains {total}")
    days, hours = sums["train_time_s"] / 86400, sums["process_hours"]
    max_gpus, max_days = run.rules.max_gpus, run.rules.max_days
    fits = days <= max_days and hours <= max_days * 24 * max_gpus and sums["world_size"] <= max_gpus
    most = f"{max_gpus} GPUs for {max_days:g} days"
    check.record_needs(fits, f"{sums['world_size']} GPUs, {days:.2f} days, {hours:.0f} GPU hours: at most {most}")


def check_steps(check: Check, run: Folder, judge: Judge) -> str:
    """Steps and tokens are those that follow from the config and the number of training sequences."""
    if not judge.options.static:
        sequences = training_sequences(run, judge)
    elif run.official and run.track != "unlimited":
        sequences = official_sequences()
    else:
        check.note("how many steps follow from the data was not checked, as these were not read")
        return check_batches(check, run)
    plan = planned_tokens(run.config, sequences)
    for part in run.parts:
        name, done = f"{part.name}: " if part.name else "", len(part.steps)
        by_cap = run.result["stopped_by"] == "time_cap" and run.track != "unlimited"
        fits = 0 < done < len(plan) if by_cap else done == len(plan) - 1
        check.need(fits, f"{name}{done} steps, by config and data {len(plan) - 1} (fewer only if the cap stops a run)")
        tokens = [line["tokens"] for line in part.steps]
        other = [i + 1 for i, pair in enumerate(zip(tokens, plan[1:], strict=False)) if pair[0] != pair[1]]
        check.need(not other, f"{name}other tokens than the batches of the config make, at steps {other[:5]}")
    return f"{len(plan) - 1:,} follow from the config and {sequences:,} training sequences"


def official_sequences() -> int:
    """Sequences of T + 1 tokens of the official training data."""
    return rules.OFFICIAL_TRAIN_TOKENS // (rules.SEQUENCE_LEN + 1)


def check_batches(check: Check, run: Folder) -> str:
    """Every step has the tokens of a batch."""
    sizes = {run.config["batch_tokens"], run.config.get("outer_batch_tokens", run.config["batch_tokens"])}
    for part in run.parts:
        tokens = [0, *(line["tokens"] for line in part.steps)]
        other = [i + 1 for i, (a, b) in enumerate(pairwise(tokens)) if b - a not in sizes]
        check.need(not other, f"{part.name} steps {other[:5]} have other tokens than a batch, {sizes}".strip())
    return f"each has {' or '.join(f'{size:,}' for size in sorted(sizes))} tokens"


def check_eligibility(check: Check, run: Folder, judge: Judge) -> str:
    """What the run says of its eligibility follows from the facts, and a record is eligible."""
    claimed, because = run.result["eligible"], run.result["not_eligible_because"]
    reasons = rules.reasons_not_eligible(run.track, run.result)
    declared = run.result.get("as_declared", True)  # of the unlimited track
    check.need(isinstance(declared, bool), f"as_declared is {declared!r}, not true or false")
    said = "; ".join(reasons) or "nothing is against it"
    check.need(claimed is (not reasons), f"eligible is {claimed}, but: {said}")
    check.need(bool(because) is not claimed, f"eligible is {claimed}, not_eligible_because is {because}")
    check.record_needs(not reasons, f"not eligible as a record: {said}")
    return "it is eligible" if not reasons else "it says itself that it is not"


STATIC_CHECKS = [
    ("completeness", check_completeness),
    ("code", check_code),
    ("instrument", check_instrument),
    ("log", check_log),
    ("losses", check_losses),
    ("clock", check_clock),
    ("steps", check_steps),
    ("eligibility", check_eligibility),
]

# ======================================================================================================================
# Checks with the data
# ======================================================================================================================


def check_data(check: Check, run: Folder, judge: Judge) -> str:
    """The files are those that the run names, and the benchmark's."""
    splits, directory = judge.data(run), judge.data_dir(run)
    for name, said in (("config.json", run.saved["data_sha256"]), ("result.json", run.result["data_sha256"])):
        for split, sha256 in said.items():
            if split == "holdout" and split not in splits:
                continue  # the holdout's check says so
            found = splits[split].sha256
            check.need(sha256 == found, f"{split} in {directory} is {found[:12]}..., {name} says {sha256[:12]}...")
        check.need({"train", "val"} <= said.keys(), f"{name} has no hashes of train and val")
    files = ", ".join(f"{name} {split.sha256[:12]}" for name, split in splits.items())
    said = f"not a record: the data are not the official files ({files})"
    check.record_needs(run.official, said if check.other_data else f"{said}; for data of your own give --other-data")
    return f"{directory}: {files}"


def training_sequences(run: Folder, judge: Judge) -> int:
    """Training sequences of T + 1 tokens, without the fitness set of the unlimited track."""
    train, length, first = judge.data(run)["train"], run.config["sequence_len"] + 1, 0
    if "fitness_tokens" in run.config:  # whole documents
        ends = np.append(train.doc_starts[1:], len(train.tokens))
        first = max((int(end) for end in ends if end <= run.config["fitness_tokens"]), default=0)
    return (len(train.tokens) - first) // length


def check_targets(check: Check, run: Folder, judge: Judge) -> str:
    """As many validation targets as there are."""
    val, T, found = judge.data(run)["val"], run.config["sequence_len"], run.result["val_tokens"]
    there = len(val.tokens) // (T + 1)
    count = scored_sequences(run)
    check.need(
        found == min(there, count) * T, f"val_tokens is {found:,}, of {there} sequences {min(there, count) * T:,}"
    )
    cut = count < min(there, run.rules.val_sequences)
    check.record_needs(not cut, f"the config cuts validation to {count} of {there} sequences")
    return f"{found:,} targets, {min(there, count)} sequences of {T}"


def scored_sequences(run: Folder) -> int:
    """Validation sequences that are scored at most: the track's, or fewer on other data if the config says so."""
    return run.rules.val_sequences if run.official else min(run.rules.val_sequences, run.config["val_sequences"])


def check_overlap(check: Check, run: Folder, judge: Judge) -> str:
    """No training document is in the validation set or the holdout; on the official files they are counted."""
    splits = judge.data(run)
    key = splits["train"].sha256 + splits["val"].sha256
    train, others = splits["train"], [name for name in ("val", "holdout") if name in splits]
    if key not in judge.overlaps:
        judge.overlaps[key] = {
            name: count_overlaps(train.tokens, train.doc_starts, splits[name].tokens) for name in others
        }
    counts = judge.overlaps[key]
    found = " and ".join(f"{count} in {split}" for split, count in counts.items())
    text = f"training documents of {SHORTEST} tokens or more that occur as a whole: {found}"
    if run.official:
        check.note(text)
    else:
        check.need(not any(counts.values()), text)
    return text


# ======================================================================================================================
# Checks with the weights: the worker predicts, this judges
# ======================================================================================================================


class WorkerFailed(Exception):
    """The run could not be scored."""


def run_worker(task: dict, time_limit_s: float) -> dict:
    """Call records/score.py in its own process group -> what it found; the group is killed at the limit."""
    folder = Path(task["out"])
    (folder / "task.json").write_text(json.dumps(task))
    options = ["-B", "-X", f"pycache_prefix={folder / 'pycache'}"]  # bytecode in the run's folder is not believed
    command = [sys.executable, *options, str(WORKER), str(folder / "task.json")]
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, start_new_session=True, **streams)
        try:
            code = process.wait(time_limit_s)
        except subprocess.TimeoutExpired:
            said = f"it was not scored in {time_limit_s / 60:g} min: --time-limit-min allows more"
            raise WorkerFailed(said) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    last = (folder / "output.txt").read_text(errors="replace").strip().splitlines()[-1:]
    if code:
        raise WorkerFailed(f"the run's code ended the scoring (exit code {code}): {' '.join(last)[:300]}")
    return json.loads((folder / "found.json").read_text())


def byte_lengths(check: Check, directory: str, vocab_size: int) -> torch.Tensor | None:
    """Bytes of every token (V,), 0 for the BOS; None if they are not known. ValueError if meta.json has wrong ones."""
    lengths, source = token_bytes(directory, vocab_size)
    if lengths is None:
        check.note(f"bytes per token {source}")
    elif vocab_size == GPT2:
        found = hashlib.sha256(lengths.numpy().astype("<i8").tobytes()).hexdigest()
        require(found == GPT2_BYTES_SHA256, f"the bytes per token {source} are not GPT-2's")
    elif vocab_size == BYTES:
        expected = [1] * (BYTES - 1) + [0]
        require(lengths.tolist() == expected, f"the bytes per token {source} are not those of the byte tokenizer")
    else:
        check.note(f"bytes per token {source}: this tokenizer is not known here")
    return lengths


@dataclass
class Scored:
    """What was found of a run's predictions."""

    scores: dict[str, Score]
    weights: list[float]
    measured: list[dict]
    tolerance: float
    notes: list[str]
    changed: str  # files of final/

    def worst(self, name: str) -> float:
        return max(callable_[name] for callable_ in self.measured)


def score_run(run: Folder, judge: Judge) -> Scored:
    """Have a run's members predict the validation set and the holdout. WorkerFailed says why they did not."""
    options, splits, check = judge.options, judge.data(run), Check(judge.options.other_data)
    lengths = byte_lengths(check, judge.data_dir(run), run.config["vocab_size"])
    alone = World(0, 1, torch.device("cpu"))
    sequence_len, count = run.config["sequence_len"], scored_sequences(run)
    sets = {
        name: EvalSet(splits[name], sequence_len, count, batch=1, world=alone, lengths=lengths)
        for name in ("val", "holdout")
        if name in splits
    }
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="referee-") as out:
        files = {name: f"{out}/{name}_sequences.npy" for name in sets}
        for name, path in files.items():
            np.save(path, sets[name].sequences.numpy())
        task = {"run_dir": str(run.path.resolve()), "device": device, "vocab_size": run.config["vocab_size"]}
        task |= {"mixing": run.final["mixing"], "members": len(run.members), "probe_seed": options.probe_seed}
        before = run.weights_sha256
        found = run_worker(task | {"splits": files, "out": out}, 60 * options.time_limit_min)
        if "wrong" in found:
            raise WorkerFailed(found["wrong"])
        nats = {name: torch.from_numpy(np.load(f"{out}/{name}.npy", allow_pickle=False)) for name in sets}
    for name, own in nats.items():
        shape = sets[name].sequences[:, 1:].shape
        require(own.shape == shape, f"the worker scored {tuple(own.shape)} targets of {name}, not {tuple(shape)}")
    scores = {name: sets[name].score(own) for name, own in nats.items()}
    low = found["device"] == "cuda" or run.config["dtype"] == "bfloat16"
    tolerance, changed = SAME["low" if low else "full"], differing(before, final_hashes(run))
    return Scored(scores, found["weights"], found["measured"], tolerance, check.notes, changed)


def final_hashes(run: Folder) -> dict[str, str]:
    """SHA-256 of the files of final/."""
    return {path.name: sha256_file(path) for path in sorted((run.path / "final").iterdir())}


def check_weights(check: Check, run: Folder, judge: Judge) -> str:
    """The weights are those of the result, and how they are mixed is a way to mix."""
    changed = differing(run.weights_sha256, run.result["final_sha256"])
    check.need(not changed, f"files of final/ that are not as result.json says: {changed}")
    mixing, said = run.final["mixing"], run.result["mixing"]
    check.need(mixing == said, f"mixing is {mixing!r} in members.json, {said!r} in result.json")
    check.need(mixing in MIXINGS, f"mixing is {mixing!r}, not one of {', '.join(MIXINGS)}")
    weights = [number(member["weight"]) for member in run.members]
    check.need(min(weights) >= 0, f"weights of members are negative: {min(weights)}")
    check.need(close(sum(weights), 1, 1e-6), f"weights of members sum to {sum(weights)}, not to 1")
    averages = "readout_epochs" in run.config and run.config.get("readout", "average") == "average"
    if averages and run.result["stopped_by"] == "steps":
        needed = run.config["readout_epochs"]
        check.need(len(weights) == needed, f"{len(weights)} members, by the config the readout has {needed}")
    last = max(len(part.steps) for part in run.parts)
    late = [member["file"] for member in run.members if member["step"] > last]
    check.need(not late, f"members from after the last step counted: {', '.join(late)}")
    return f"{len(weights)} members, {mixing} averaged, files as in result.json"


def check_members(check: Check, run: Folder, judge: Judge) -> str:
    """Members score as at their validation in training, if that was in the stage that is read out.

    What was kept then and what is read out are the same weights: nothing was trained in between.
    """
    scored, stage, compared = judge.scored[run.name], run.final["stage"], 0
    if len(scored.measured) != len(run.members):
        return f"not compared one by one: the average of {run.final['mixing']}s is what was scored"
    for member, measured in zip(run.members, scored.measured, strict=True):
        known = [member["val_loss"]] if "val_loss" in member else []  # of the unlimited track, as in its ledgers
        for line in run.main.validations_in(stage):
            if line["step"] == member["step"] and member["file"].startswith("epoch_"):
                known.append(line["val_loss"])
        compared += bool(known)
        fits = all(close(loss, measured["loss"], CLAIM_TOLERANCE) for loss in known)
        said = f"{member['file']} has the loss {measured['loss']:.5f}, at its validation it had {known[-1:]}"
        check.need(fits, f"{said} (at most {CLAIM_TOLERANCE} apart)")
    return f"{compared} of {len(run.members)} were validated in the stage that is read out, with the same losses"


def check_score(check: Check, run: Folder, judge: Judge) -> str:
    """The claimed loss and bits per byte are those that the members predict."""
    scored, result = judge.scored[run.name], run.result
    found = scored.scores["val"]
    check.notes += scored.notes
    expected = [1.0] if run.final["mixing"] == "weight" else [member["weight"] for member in run.members]
    agree = np.array_equal(np.shape(expected), np.shape(scored.weights)) and np.allclose(expected, scored.weights)
    check.need(agree, f"load_members gave weights {scored.weights}, by members.json they are {expected}")
    claimed, limit = number(result["val_loss"]), f"at most {CLAIM_TOLERANCE} apart"
    fits = close(claimed, found.loss, CLAIM_TOLERANCE)
    check.need(fits, f"val_loss {claimed:.5f} is claimed, {found.loss:.5f} found ({limit})")
    bpb, counts = result["val_bpb"], {"val_tokens": found.tokens, "val_bytes": found.bytes}
    if bpb is None:
        check.note(f"the run left bits per byte out; found {found.bpb}")
        counts["val_bytes"] = 0
    else:
        fits = found.bpb is not None and close(bpb, found.bpb, CLAIM_TOLERANCE)
        how = " (it needs a meta.json beside the data, or pip install tiktoken)" if found.bpb is None else ""
        check.need(fits, f"val_bpb {bpb} is claimed, {found.bpb} found{how} ({limit})")
    for name, count in counts.items():
        check.need(result[name] == count, f"{name} {result[name]} is claimed, {count} found")
    check.need(not scored.changed, f"the scoring changed files of final/: {scored.changed}")
    bits = f", {found.bpb:.5f} bits per byte" if found.bpb is not None else ""
    return f"val_loss {found.loss:.5f} found, {claimed:.5f} claimed, over {found.tokens:,} targets{bits}"


def check_holdout(check: Check, run: Folder, judge: Judge) -> str:
    """The holdout, which nothing was chosen by, is predicted about as well as the validation set."""
    scores, claimed = judge.scored[run.name].scores, run.result["holdout_loss"]
    if "holdout" not in scores:
        said = "" if claimed is None else f"; the claim of {claimed} was not checked"
        check.note(f"{judge.data_dir(run)} has no holdout{said}")
        return ""
    found, gap = scores["holdout"].loss, scores["holdout"].loss - scores["val"].loss
    check.need(gap <= HOLDOUT_GAP, f"{found:.4f}, {gap:.4f} nats above val: at most {HOLDOUT_GAP} is needed")
    if claimed is None:
        check.note("the run reported no holdout_loss")
    else:
        fits = close(claimed, found, CLAIM_TOLERANCE)
        check.need(fits, f"holdout_loss {claimed:.5f} is claimed, {found:.5f} found (at most {CLAIM_TOLERANCE} apart)")
    return f"{found:.5f}, {gap:+.5f} from val"


def check_probabilities(check: Check, run: Folder, judge: Judge) -> str:
    """At every position probabilities over V outcomes, which sum to 1."""
    scored, V = judge.scored[run.name], run.config["vocab_size"]
    error, wrong = scored.worst("sum_error"), scored.worst("not_finite")
    check.need(not wrong, f"{wrong} positions have log-probabilities that are not finite")
    need = f"at most {SUM_TOLERANCE:g} is needed"
    check.need(error <= SUM_TOLERANCE, f"they do not sum to 1: the logarithm of their sum is up to {error:.2g}, {need}")
    return f"over {V} outcomes, sums within {error:.1g} of 1 in the logarithm, at every position"


def check_causality(check: Check, run: Folder, judge: Judge) -> str:
    """A prediction does not depend on later tokens, nor on the other sequences of the batch."""
    scored = judge.scored[run.name]
    later, others, most = scored.worst("causality"), scored.worst("company"), scored.tolerance
    seed = f"--probe-seed {judge.options.probe_seed}"
    check.need(later <= most, f"later tokens change log-probabilities by up to {later:.2g}, not {most:g} ({seed})")
    check.need(others <= most, f"other sequences of the batch change them by up to {others:.2g}, not {most:g} ({seed})")
    return f"later tokens change predictions by {later:.1g}, other sequences by {others:.1g}, at most {most:g} ({seed})"


def check_learning(check: Check, run: Folder, judge: Judge) -> str:
    """The members are after scoring what they were before."""
    scored = judge.scored[run.name]
    repeat, again, most = scored.worst("repeat"), scored.worst("again"), scored.tolerance
    check.need(repeat <= most, f"after scoring, the same input is predicted up to {repeat:.2g} otherwise, not {most:g}")
    check.need(again <= most, f"sequences that are scored again have other losses, by up to {again:.2g}, not {most:g}")
    return f"after scoring, predictions differ by {repeat:.1g}, losses by {again:.1g}, at most {most:g}"


DATA_CHECKS = [
    ("data", check_data),
    ("overlap", check_overlap),
    ("targets", check_targets),
    ("weights", check_weights),
]
SCORE_CHECKS = [
    ("score", check_score),
    ("members", check_members),
    ("holdout", check_holdout),
    ("probabilities", check_probabilities),
    ("causality", check_causality),
    ("learning", check_learning),
]

# ======================================================================================================================
# Checks of a submission
# ======================================================================================================================


def check_same(check: Check, runs: list[Folder], judge: Judge) -> str:
    """All runs are of one track, code, instrument, data and settings."""
    first = runs[0]
    for run in runs[1:]:
        for name, value in (
            ("track", lambda r: r.track),
            ("code", lambda r: code_sha256(r.code)),
            ("instrument", lambda r: instrument_sha256(r.code / "slowrun")),
            ("data", lambda r: {k: v for k, v in r.result["data_sha256"].items() if k != "holdout"}),
            ("settings", lambda r: {k: v for k, v in r.config.items() if k not in OF_A_RUN}),
        ):
            a, b = value(first), value(run)
            keys = differing(a, b) if isinstance(a, dict) else ""
            check.need(a == b, f"{run.name} has other {name} than {first.name} {keys}".strip())
    return f"{len(runs)} runs of the {first.track} track with one code, instrument, data and settings"


def check_seeds(check: Check, runs: list[Folder], judge: Judge) -> str:
    """Seeds are 42, 43, ..., so that none can be left out."""
    seeds = sorted(run.config["seed"] for run in runs)
    needed = list(range(FIRST_SEED, FIRST_SEED + len(runs)))
    missing = [seed for seed in range(FIRST_SEED, max(seeds)) if seed not in seeds]
    said = f": {', '.join(map(str, missing))} is missing" if missing else ""
    check.need(seeds == needed, f"the seeds are {seeds}, not {needed}{said}")
    for run in runs if judge.submitted else ():
        check.need(run.name == f"seed-{run.config['seed']}", f"{run.name}/ is the run with seed {run.config['seed']}")
    return f"seeds {', '.join(map(str, seeds))}"


def check_copies(check: Check, runs: list[Folder], judge: Judge) -> str:
    """No run is a copy of another under another seed."""
    for i, a in enumerate(runs):
        losses = [[line["train_loss"] for line in part.steps] for part in a.parts]
        weights = {sha256 for name, sha256 in a.result["final_sha256"].items() if name != "members.json"}
        for b in runs[:i]:
            both = f"{b.name} and {a.name}"
            check.need(a.saved["run_id"] != b.saved["run_id"], f"{both} have one run id, {a.saved['run_id']}")
            same = losses == [[line["train_loss"] for line in part.steps] for part in b.parts]
            check.need(not same, f"{both} have the same training losses")
            check.need(not weights & set(b.result["final_sha256"].values()), f"{both} have the same weights")
    return "run ids, training losses and weights differ"


def best_so_far(run: Folder, judge: Judge) -> dict | None:
    """The entry of the list that is to be beaten; None if there is none. A listed folder need not beat itself."""
    path = judge.options.records_dir / run.track / "records.json"
    require(path.exists() or not run.official, f"{path} not found: --records-dir names the folder with the lists")
    entries = json.loads(path.read_text())["records"] if path.exists() else []
    if judge.submitted and (number_of := re.match(r"(\d+)-", judge.submitted.resolve().name)):
        entries = [entry for entry in entries if entry["number"] < int(number_of[1])]
    if not run.official:
        entries = [entry for entry in entries if entry.get("data_sha256") == run.result["data_sha256"]["val"]]
    return min(entries, key=lambda entry: entry["val_loss"], default=None)


def loss_that_counts(run: Folder, judge: Judge) -> float:
    """The claimed loss, or the one that was found if it is worse: a claim may be off by less than the tolerance."""
    claimed, scored = number(run.result["val_loss"]), judge.scored.get(run.name)
    return max(claimed, scored.scores["val"].loss) if scored else claimed


def check_significance(check: Check, runs: list[Folder], judge: Judge) -> str:
    """n runs with mean mu beat the best so far, rho, if (rho - mu) sqrt(n) >= 0.0047."""
    n, mu = len(runs), sum(loss_that_counts(run, judge) for run in runs) / len(runs)
    best, alone = best_so_far(runs[0], judge), n == 1 and judge.submitted is None and not judge.options.submission
    if best is None:
        (check.notes if alone or check.other_data else check.fails).append(
            f"mean val_loss {mu:.5f}; no record on these data to compare with"
        )
        return ""
    rho = number(best["val_loss"])
    found, needed = (rho - mu) * math.sqrt(n), SIGNIFICANT / math.sqrt(n)
    text = f"mean {mu:.5f} of {n} run{'s' * (n > 1)}, the best so far is {rho:.5f} (number {best['number']}): "
    text += f"(rho - mu) sqrt(n) is {found:.5f}, at least {SIGNIFICANT} is needed"
    if found >= SIGNIFICANT - 1e-9:  # which rounding takes away
        return text
    if alone:
        check.note(f"one run; a submission needs a mean {needed:.4f} below {rho:.5f}, or more seeds: {text}")
        return ""
    check.need(False, text)
    return text


SUBMISSION_CHECKS = [
    ("submission", check_same),
    ("seeds", check_seeds),
    ("copies", check_copies),
    ("significance", check_significance),
]

# ======================================================================================================================
# Judgement
# ======================================================================================================================


def judge_run(run: Folder, judge: Judge) -> None:
    """All checks of one run; of one that has not finished there is only that to say."""
    if not (run.path / "result.json").exists():
        how = "copy it from the run folder" if judge.submitted else f"resume it with its script's --resume {run.path}"
        return judge.add("FAIL", "completeness", run.name, f"it has no result.json, as it has not finished: {how}")
    if judge.submitted is None:
        judge.run_check("files", run.name, check_files, run.path, RUN_FOLDER)
    for name, function in STATIC_CHECKS if judge.options.static else STATIC_CHECKS + DATA_CHECKS:
        judge.run_check(name, run.name, function, run, judge)
    if judge.options.static:
        return None
    try:
        judge.scored[run.name] = score_run(run, judge)
    except Exception as error:  # each check that needs the scores fails with it
        said = str(error) if isinstance(error, WorkerFailed) else f"{type(error).__name__}: {str(error)[:300]}"
        text = f"cannot be checked, as the run is not scored: {said}"
        for name, _ in SCORE_CHECKS:
            judge.add("FAIL", name, run.name, text)
        return None
    for name, function in SCORE_CHECKS:
        judge.run_check(name, run.name, function, run, judge)
    return None


def judge_folders(paths: list[Path], options: Options) -> Judge:
    """All checks of a submission. ValueError if the folders cannot be judged at all."""
    runs, submitted = open_folders(paths)
    several = len(runs) > 1 or submitted is not None or options.submission
    judge = Judge(dataclasses.replace(options, static=options.static or submitted is not None), submitted)
    name = submitted.name if submitted else "all runs" if several else runs[0].name
    if submitted:
        judge.run_check("files", name, check_files, submitted, SUBMITTED_FOLDER)
    for run in runs:
        judge_run(run, judge)
    if not all((run.path / "result.json").exists() for run in runs):
        return judge
    for check, function in SUBMISSION_CHECKS if several else SUBMISSION_CHECKS[-1:]:
        judge.run_check(check, name, function, runs, judge)
    if judge.options.static:
        why = "a submitted folder has no weights" if submitted else "--static"
        left = ", ".join(check for check, _ in (*DATA_CHECKS, *SCORE_CHECKS))
        judge.add("NOTE", "not made", name, f"{left} ({why})")
    return judge


def verdict(judge: Judge) -> str:
    """The last line."""
    failed = sum(finding.status == "FAIL" for finding in judge.findings)
    part = "static part only: " if judge.options.static else ""
    if failed:
        return f"{part}REFUSED, {failed} of the checks fail"
    if judge.options.other_data:
        return f"{part}nothing fails; it is NOT A RECORD (--other-data)"
    return f"{part}nothing fails"


def report(judge: Judge) -> dict:
    """All findings, as JSON."""
    return {
        "verdict": verdict(judge),
        "ok": all(finding.status != "FAIL" for finding in judge.findings),
        "static": judge.options.static,
        "other_data": judge.options.other_data,
        "probe_seed": judge.options.probe_seed,
        "findings": [vars(finding) for finding in judge.findings],
        "scores": {run: {s: vars(score) for s, score in own.scores.items()} for run, own in judge.scored.items()},
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What records/submit.py has too."""
    data = "folder with the data [the one that the run's config names]"
    parser.add_argument("--data", metavar="DIR", help=data)
    parser.add_argument("--other-data", action="store_true", help="accept data that are not the official files")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where members predict")
    parser.add_argument("--time-limit-min", type=float, default=60.0, help="minutes for scoring a run [60]")
    lists = "folder with <track>/records.json [records/]"
    parser.add_argument("--records-dir", type=Path, default=RECORDS, metavar="DIR", help=lists)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR", help="run folders, or a submitted record")
    add_options(parser)
    parser.add_argument("--static", action="store_true", help="only what needs no weights, no data and no execution")
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="-", help="write the findings as JSON [instead of the lines]"
    )
    parser.add_argument(
        "--probe-seed", type=int, default=argparse.SUPPRESS, help="repeats the probes of an earlier judgement"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 nothing fails, 1 something does, 2 refused."""
    arguments = vars(parse_arguments(argv))
    folders, json_to = arguments.pop("folders"), arguments.pop("json")
    if json_to != "-":
        arguments["say"] = partial(print, flush=True)
    try:
        found = report(judge_folders(folders, Options(**arguments)))
        if json_to == "-":
            print(json.dumps(found, indent=1))
        else:
            print(f"verdict: {found['verdict']}")
            if json_to:
                write_json(Path(json_to), found)
    except (ValueError, OSError) as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        return 2
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
