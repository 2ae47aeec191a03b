"""A judgement: all checks of runs in their order, and the verdict."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from records.judge import clock, data, files, logs, probes, scoring, submission
from records.judge.findings import Judgement, Options
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


def judge_run(run: Folder, judgement: Judgement) -> None:
    """Make all checks of one run. One that has not finished gets that finding alone."""
    if not (run.path / "result.json").exists():
        resume = f"resume it with its script's --resume {run.path}"
        advice = "copy it from the run folder" if judgement.submitted else resume
        text = f"it has no result.json, as it has not finished: {advice}"
        judgement.add("FAIL", "completeness", run.name, text)
        return
    if judgement.submitted is None:
        judgement.run_check("files", run.name, files.check_files, run.path, files.RUN_FOLDER)
    for name, function in STATIC_CHECKS if judgement.options.static else STATIC_CHECKS + DATA_CHECKS:
        judgement.run_check(name, run.name, function, run, judgement)
    if judgement.options.static:
        return
    failure = try_to_score(run, judgement)
    for name, function in SCORE_CHECKS:
        if failure is None:
            judgement.run_check(name, run.name, function, run, judgement)
        else:
            judgement.add("FAIL", name, run.name, f"cannot be checked, as the run is not scored: {failure}")


def try_to_score(run: Folder, judgement: Judgement) -> str | None:
    """Score a run's members -> why that failed, None if it did not."""
    try:
        judgement.scored[run.name] = scoring.score_run(run, judgement)
    except scoring.WorkerFailed as error:
        return str(error)
    except Exception as error:  # a stranger's code and files can be wrong in any way
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def judge_folders(paths: list[Path], options: Options) -> Judgement:
    """Judge runs or a submitted record; several runs are one submission. ValueError if the folders cannot be judged."""
    runs, submitted = open_folders(paths)
    several = len(runs) > 1 or submitted is not None or options.submission
    judgement = Judgement(dataclasses.replace(options, static=options.static or submitted is not None), submitted)
    name = submitted.name if submitted else "all runs" if several else runs[0].name
    if submitted:
        judgement.run_check("files", name, files.check_files, submitted, files.SUBMITTED_FOLDER)
    for run in runs:
        judge_run(run, judgement)
    if not all((run.path / "result.json").exists() for run in runs):
        return judgement
    for check, function in SUBMISSION_CHECKS if several else SUBMISSION_CHECKS[-1:]:
        judgement.run_check(check, name, function, runs, judgement)
    if judgement.options.static:
        reason = "a submitted folder has no weights" if submitted else "--static"
        skipped = ", ".join(check for check, _ in (*DATA_CHECKS, *SCORE_CHECKS))
        judgement.add("NOTE", "not made", name, f"{skipped} ({reason})")
    return judgement


def verdict(judgement: Judgement) -> str:
    """The last line of the output."""
    failed = sum(finding.status == "FAIL" for finding in judgement.findings)
    part = "static part only: " if judgement.options.static else ""
    if failed:
        return f"{part}REFUSED, {failed} of the checks fail"
    if judgement.options.other_data:
        return f"{part}nothing fails; it is NOT A RECORD (--other-data)"
    return f"{part}nothing fails"


def report(judgement: Judgement) -> dict:
    """All findings and scores, as --json writes them."""
    return {
        "verdict": verdict(judgement),
        "ok": all(finding.status != "FAIL" for finding in judgement.findings),
        "static": judgement.options.static,
        "other_data": judgement.options.other_data,
        "probe_seed": judgement.options.probe_seed,
        "findings": [vars(finding) for finding in judgement.findings],
        "scores": {
            run: {s: vars(score) for s, score in scored.scores.items()} for run, scored in judgement.scored.items()
        },
    }
