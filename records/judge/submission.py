"""Checks of a submission: its runs are one experiment, no seed is left out, and their mean beats the record."""

from __future__ import annotations

import json
import math
import re

from records.judge.files import PER_RUN_SETTINGS
from records.judge.findings import Check, Judgement
from records.judge.runs import Folder, differing, number, require
from slowrun.folder import code_sha256, instrument_sha256

SIGNIFICANT = 0.0047  # nats, for (rho - mu) sqrt(n): one-sided p < 0.01, given a noise of 0.002 nats between seeds
FIRST_SEED = 42


def check_same(check: Check, runs: list[Folder], judgement: Judgement) -> str:
    """All runs have the same track, code, instrument, data and settings."""
    first = runs[0]
    for run in runs[1:]:
        for name, value in (
            ("track", lambda r: r.track),
            ("code", lambda r: code_sha256(r.code)),
            ("instrument", lambda r: instrument_sha256(r.code / "slowrun")),
            ("data", lambda r: {k: v for k, v in r.result["data_sha256"].items() if k != "holdout"}),
            ("settings", lambda r: {k: v for k, v in r.config.items() if k not in PER_RUN_SETTINGS}),
        ):
            a, b = value(first), value(run)
            keys = differing(a, b) if isinstance(a, dict) else ""
            check.need(a == b, f"{run.name} has other {name} than {first.name} {keys}".strip())
    return f"{len(runs)} runs of the {first.track} track with one code, instrument, data and settings"


def check_seeds(check: Check, runs: list[Folder], judgement: Judgement) -> str:
    """The seeds are 42, 43, ..., so that none can be left out."""
    seeds = sorted(run.config["seed"] for run in runs)
    needed = list(range(FIRST_SEED, FIRST_SEED + len(runs)))
    missing = [seed for seed in range(FIRST_SEED, max(seeds)) if seed not in seeds]
    gap = f": {', '.join(map(str, missing))} is missing" if missing else ""
    check.need(seeds == needed, f"the seeds are {seeds}, not {needed}{gap}")
    for run in runs if judgement.submitted else ():
        check.need(run.name == f"seed-{run.config['seed']}", f"{run.name}/ is the run with seed {run.config['seed']}")
    return f"seeds {', '.join(map(str, seeds))}"


def check_copies(check: Check, runs: list[Folder], judgement: Judgement) -> str:
    """No run is a copy of another with a different seed."""
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


def best_so_far(run: Folder, judgement: Judgement) -> dict | None:
    """The entry of the list to beat, or None. A record that is listed already need only beat those before it."""
    path = judgement.options.records_dir / run.track / "records.json"
    require(path.exists() or not run.official, f"{path} not found: --records-dir names the folder with the lists")
    entries = json.loads(path.read_text())["records"] if path.exists() else []
    if judgement.submitted and (number_of := re.match(r"(\d+)-", judgement.submitted.resolve().name)):
        entries = [entry for entry in entries if entry["number"] < int(number_of[1])]
    if not run.official:
        entries = [entry for entry in entries if entry.get("data_sha256") == run.result["data_sha256"]["val"]]
    return min(entries, key=lambda entry: entry["val_loss"], default=None)


def loss_that_counts(run: Folder, judgement: Judgement) -> float:
    """The worse of the claimed loss and the one found: a claim may be off by less than the tolerance."""
    claimed, scored = number(run.result["val_loss"]), judgement.scored.get(run.name)
    return max(claimed, scored.scores["val"].loss) if scored else claimed


def check_significance(check: Check, runs: list[Folder], judgement: Judgement) -> str:
    """n runs with mean mu beat the best record so far, rho, if (rho - mu) sqrt(n) >= 0.0047."""
    n, mu = len(runs), sum(loss_that_counts(run, judgement) for run in runs) / len(runs)
    best = best_so_far(runs[0], judgement)
    alone = n == 1 and judgement.submitted is None and not judgement.options.submission
    if best is None:
        (check.notes if alone or check.other_data else check.fails).append(
            f"mean val_loss {mu:.5f}; no record on these data to compare with"
        )
        return ""
    rho = number(best["val_loss"])
    found, needed = (rho - mu) * math.sqrt(n), SIGNIFICANT / math.sqrt(n)
    text = f"mean {mu:.5f} of {n} run{'s' * (n > 1)}, the best so far is {rho:.5f} (number {best['number']}): "
    text += f"(rho - mu) sqrt(n) is {found:.5f}, at least {SIGNIFICANT} is needed"
    if found >= SIGNIFICANT - 1e-9:  # for rounding
        return text
    if alone:
        check.note(f"one run; a submission needs a mean {needed:.4f} below {rho:.5f}, or more seeds: {text}")
        return ""
    check.need(False, text)
    return text
