"""Checks of the data: which files, how many sequences, and whether any of them was trained on."""

from __future__ import annotations

import numpy as np

from records.judge.findings import Check, Judge
from records.judge.overlap import SHORTEST, count_overlaps
from records.judge.runs import Folder
from slowrun import rules


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


def official_sequences() -> int:
    """Sequences of T + 1 tokens of the official training data."""
    return rules.OFFICIAL_TRAIN_TOKENS // (rules.SEQUENCE_LEN + 1)


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
