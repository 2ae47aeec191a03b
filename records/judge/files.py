"""Checks of what a folder holds: kinds of files, config.json and result.json, the script and its instrument."""

from __future__ import annotations

import ast
import json
import os
import re
import stat
from pathlib import Path

from records import instruments
from records.judge.findings import Check, Judgement
from records.judge.runs import Folder, close, differing, not_finite, number, require
from slowrun import rules
from slowrun.folder import code_sha256, instrument_sha256
from slowrun.scoring import data_efficiency

CODE_MB, SUBMITTED_MB = 1, 5  # MB is 10^6 bytes

# Overrides that a record may have, as none is a hyperparameter. These may differ between the runs of a submission:
# the seed, names, how often a run prints and saves, and sequences per pass, which do not change the mathematics.
PER_RUN_SETTINGS = {
    "seed", "run_name", "runs_dir", "data_dir", "eval_batch", "device_batch", "checkpoint_min", "log_every", "wandb",
    "eval_initial", "checkpoints", "profile_steps",
}  # fmt: skip
# These depend on the machine. The result names them, and they are the same in all runs of a submission.
MACHINE_SETTINGS = {"device", "dtype", "compile", "attention", "head", "processes_per_chain"}

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
# result_*.json: left beside the result by --select-only and --add-chains
RUN_FOLDER = re.compile(rf"{CODE_FILE}|{RUN_FILE}|result_\w+\.json|{CHAIN_FILE}|{WEIGHTS_FILE}")
SUBMITTED_FOLDER = re.compile(
    rf"README\.md|{CODE_FILE}|seed-\d+/({RUN_FILE}|{CHAIN_FILE}|(chains/chain_\d+/)?metrics\.jsonl\.gz)"
)
# Written by Weights & Biases, by a run resumed by its own copy of the script, by one that met non-finite losses before
# it was resumed, and by the profiler
IGNORED_FILES = re.compile(
    r"wandb/|code/(slowrun/)?__pycache__/|"
    r"(chains/chain_\d+/)?(non_finite(_rank_\d+)?\.pt|profile_\d+-\d+\.(json\.gz|txt))$"
)
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".npy", ".npz", ".ckpt", ".joblib"}

# ======================================================================================================================
# Files
# ======================================================================================================================


def check_files(check: Check, root: Path, allowed: re.Pattern) -> str:
    """The folder has only files of the allowed kinds; none leads out of it, and only scripts may be executable."""
    names, others, size = [], set(), {"code": 0, "all": 0}
    for path in sorted(root.rglob("*")):
        name, info = path.relative_to(root).as_posix(), path.lstat()
        if stat.S_ISDIR(info.st_mode):
            continue
        if allowed is RUN_FOLDER and (left := IGNORED_FILES.match(name)):
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
    """MB allowed in a submitted folder: SUBMITTED_MB, and as much again for each chain of the unlimited track."""
    return SUBMITTED_MB * (1 + len(list(root.glob("seed-*/chains/*"))))


def is_safetensors(path: Path) -> bool:
    """Whether the file begins like safetensors: the length of a JSON header, then the header."""
    with open(path, "rb") as file:
        length, brace = int.from_bytes(file.read(8), "little"), file.read(1)
    return brace == b"{" and 8 + length <= path.stat().st_size


# ======================================================================================================================
# config.json and result.json
# ======================================================================================================================


def check_completeness(check: Check, run: Folder, judgement: Judgement) -> str:
    """The run finished, its two JSON files are complete and agree, and it scored every target."""
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


def check_eligibility(check: Check, run: Folder, judgement: Judgement) -> str:
    """The eligibility that the run claims follows from its result, and a record is eligible."""
    claimed, because = run.result["eligible"], run.result["not_eligible_because"]
    reasons = rules.reasons_not_eligible(run.track, run.result)
    declared = run.result.get("as_declared", True)  # of the unlimited track
    check.need(isinstance(declared, bool), f"as_declared is {declared!r}, not true or false")
    text = "; ".join(reasons) or "nothing is against it"
    check.need(claimed is (not reasons), f"eligible is {claimed}, but: {text}")
    check.need(bool(because) is not claimed, f"eligible is {claimed}, not_eligible_because is {because}")
    check.record_needs(not reasons, f"not eligible as a record: {text}")
    return "it is eligible" if not reasons else "it says itself that it is not"


# ======================================================================================================================
# The script and its instrument
# ======================================================================================================================


def config_defaults(code: Path) -> dict:
    """Fields and defaults of Config and its bases, parsed from code/ and code/slowrun/: nothing is executed."""
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


def check_code(check: Check, run: Folder, judgement: Judgement) -> str:
    """code/ is what ran, and the config is its defaults but for overrides that a record may have."""
    saved, found = run.saved, code_sha256(run.code)
    for name, claim in (("config.json", saved["code_sha256"]), ("result.json", run.result["code_sha256"])):
        check.need(claim == found, f"the SHA-256 of code/ is {found[:12]}..., {name} says {claim[:12]}...")
    defaults, config = config_defaults(run.code), run.config
    odd = sorted(defaults.keys() ^ config.keys())
    check.need(not odd, f"fields that only the code or only config.json has: {', '.join(odd)}")
    changed = {k: v for k, v in config.items() if k in defaults and v != defaults[k]}
    hidden = differing(saved["overrides"], changed)
    check.need(not hidden, f"overrides are not what differs from the code's defaults: {hidden}")
    settings = {k: v for k, v in changed.items() if k not in PER_RUN_SETTINGS | MACHINE_SETTINGS}
    if check.other_data and settings:
        check.note(f"{len(settings)} settings are not the script's defaults, as a record's are: {', '.join(settings)}")
    listed = ", ".join(f"{k} {v!r} (default {defaults[k]!r})" for k, v in settings.items())
    advice = "put them into its defaults, and run it again"
    check.need(check.other_data or not settings, f"hyperparameters that are not in the script: {listed}: {advice}")
    harmless = ", ".join(sorted(changed.keys() - settings.keys())) or "none"
    return f"{found[:12]}, {len(defaults)} settings as in the code, overrides: {harmless}"


def check_instrument(check: Check, run: Folder, judgement: Judgement) -> str:
    """code/slowrun/, which measured the run, is a known version of slowrun/, and nothing else takes its place."""
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
    """How an unlisted slowrun/ differs from the one here, and what to do about it."""
    text = f"code/slowrun/ ({found[:12]}...) is no version in records/instruments.json"
    changed = ", ".join(instruments.different_files(package))
    if not changed:
        return f"{text}, though it is slowrun/ as it is here: a maintainer adds it with {instruments.COMMAND}"
    advice = "a record changes the script alone, so put the idea there and run it again with slowrun/ as it is here"
    return f"{text}: it differs from slowrun/ as it is here in {changed}; {advice}, or update this repository"
