"""A judgement: all checks of runs in their order, and the verdict."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from records.judge import clock, data, files, logs, probes, scoring, submission
from records.judge.findings import Judge, Options
from records.judge.runs import Folder, open_folders

STATIC_CHECKS = [
    ("completeness", files.check_completeness),
    ("code", files.check_code),
    ("instrument", files.check_instrument),
    ("log", logs.check_log),
    ("losses", logs.check_losses),
    ("clock", clock.check_clock),
    ("steps", clock.check_steps),
    ("eligibility", files.check_eligibility),
]
DATA_CHECKS = [
    ("data", data.check_data),
    ("overlap", data.check_overlap),
    ("targets", data.check_targets),
    ("weights", scoring.check_weights),
]
SCORE_CHECKS = [
    ("score", scoring.check_score),
    ("members", scoring.check_members),
    ("holdout", scoring.check_holdout),
    ("probabilities", probes.check_probabilities),
    ("causality", probes.check_causality),
    ("learning", probes.check_learning),
]
SUBMISSION_CHECKS = [
    ("submission", submission.check_same),
    ("seeds", submission.check_seeds),
    ("copies", submission.check_copies),
    ("significance", submission.check_significance),
]


def judge_run(run: Folder, judge: Judge) -> None:
    """All checks of one run; of one that has not finished there is only that to say."""
    if not (run.path / "result.json").exists():
        how = "copy it from the run folder" if judge.submitted else f"resume it with its script's --resume {run.path}"
        return judge.add("FAIL", "completeness", run.name, f"it has no result.json, as it has not finished: {how}")
    if judge.submitted is None:
        judge.run_check("files", run.name, files.check_files, run.path, files.RUN_FOLDER)
    for name, function in STATIC_CHECKS if judge.options.static else STATIC_CHECKS + DATA_CHECKS:
        judge.run_check(name, run.name, function, run, judge)
    if judge.options.static:
        return None
    try:
        judge.scored[run.name] = scoring.score_run(run, judge)
    except Exception as error:  # each check that needs the scores fails with it
        said = str(error) if isinstance(error, scoring.WorkerFailed) else f"{type(error).__name__}: {str(error)[:300]}"
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
        judge.run_check("files", name, files.check_files, submitted, files.SUBMITTED_FOLDER)
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
