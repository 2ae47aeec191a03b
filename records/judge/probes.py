"""Checks of what the worker measured besides the losses: are these honest predictions, from the past alone?"""

from __future__ import annotations

from records.judge.findings import Check, Judgement
from records.judge.runs import Folder

SUM_TOLERANCE = 1e-3  # of the logarithm of the sum of probabilities


def check_probabilities(check: Check, run: Folder, judgement: Judgement) -> str:
    """Every prediction is a finite distribution over V outcomes that sums to 1."""
    scored, V = judgement.scored[run.name], run.config["vocab_size"]
    error, wrong = scored.worst("sum_error"), scored.worst("not_finite")
    check.need(not wrong, f"{wrong} positions have log-probabilities that are not finite")
    need = f"at most {SUM_TOLERANCE:g} is needed"
    check.need(error <= SUM_TOLERANCE, f"they do not sum to 1: the logarithm of their sum is up to {error:.2g}, {need}")
    return f"over {V} outcomes, sums within {error:.1g} of 1 in the logarithm, at every position"


def check_causality(check: Check, run: Folder, judgement: Judgement) -> str:
    """A prediction depends neither on later tokens nor on the other sequences of the batch."""
    scored = judgement.scored[run.name]
    later, others, most = scored.worst("causality"), scored.worst("company"), scored.tolerance
    seed = f"--probe-seed {judgement.options.probe_seed}"
    check.need(later <= most, f"later tokens change log-probabilities by up to {later:.2g}, not {most:g} ({seed})")
    check.need(others <= most, f"other sequences of the batch change them by up to {others:.2g}, not {most:g} ({seed})")
    return f"later tokens change predictions by {later:.1g}, other sequences by {others:.1g}, at most {most:g} ({seed})"


def check_learning(check: Check, run: Folder, judgement: Judgement) -> str:
    """Scoring does not change the members: they predict afterwards what they predicted before."""
    scored = judgement.scored[run.name]
    repeat, again, most = scored.worst("repeat"), scored.worst("again"), scored.tolerance
    check.need(repeat <= most, f"after scoring, the same input is predicted up to {repeat:.2g} otherwise, not {most:g}")
    check.need(again <= most, f"sequences that are scored again have other losses, by up to {again:.2g}, not {most:g}")
    return f"after scoring, predictions differ by {repeat:.1g}, losses by {again:.1g}, at most {most:g}"
