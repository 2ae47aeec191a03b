"""Checks of several runs as one submission: the same experiment, every seed, and a mean that is low enough."""

from __future__ import annotations

import json
import math
import re

from records.judge.files import OF_A_RUN
from records.judge.findings import Check, Judge
from records.judge.runs import Folder, differing, number, require
from slowrun.folder import code_sha256, instrument_sha256

SIGNIFICANT = 0.0047  # nats, of (rho - mu) sqrt(n): one-sided p < 0.01, as seeds differ by 0.002 nats
FIRST_SEED = 42


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
