"""Checks of the data: which files, how many sequences, and documents that two splits share."""

from __future__ import annotations

import numpy as np

from records.judge.findings import Check, Judgement
from records.judge.overlap import SHORTEST, count_overlaps
from records.judge.runs import Folder
from slowrun import rules


def check_data(check: Check, run: Folder, judgement: Judgement) -> str:
    """The files are those that the run names, and those of the benchmark."""
    splits, directory = judgement.data(run), judgement.data_dir(run)
    for name, claims in (("config.json", run.saved["data_sha256"]), ("result.json", run.result["data_sha256"])):
        for split, sha256 in claims.items():
            if split == "holdout" and split not in splits:
                continue  # check_holdout notes it
            found = splits[split].sha256
            check.need(sha256 == found, f"{split} in {directory} is {found[:12]}..., {name} says {sha256[:12]}...")
        check.need({"train", "val"} <= claims.keys(), f"{name} has no hashes of train and val")
    files = ", ".join(f"{name} {split.sha256[:12]}" for name, split in splits.items())
    text = f"not a record: the data are not the official files ({files})"
    check.record_needs(run.official, text if check.other_data else f"{text}; for data of your own give --other-data")
    return f"{directory}: {files}"


def official_sequences() -> int:
    """Sequences of T + 1 tokens of the official training data."""
    return rules.OFFICIAL_TRAIN_TOKENS // (rules.SEQUENCE_LEN + 1)


def training_sequences(run: Folder, judgement: Judgement) -> int:
    """Training sequences of T + 1 tokens, without the fitness set of the unlimited track."""
    train, length, first = judgement.data(run)["train"], run.config["sequence_len"] + 1, 0
    if "fitness_tokens" in run.config:  # whole documents
        ends = np.append(train.doc_starts[1:], len(train.tokens))
        first = max((int(end) for end in ends if end <= run.config["fitness_tokens"]), default=0)
    return (len(train.tokens) - first) // length


def check_targets(check: Check, run: Folder, judgement: Judgement) -> str:
    """The run scored as many validation targets as the data have."""
    val, T, found = judgement.data(run)["val"], run.config["sequence_len"], run.result["val_tokens"]
    there = len(val.tokens) // (T + 1)
    count = scored_sequences(run)
    check.need(
        found == min(there, count) * T, f"val_tokens is {found:,}, of {there} sequences {min(there, count) * T:,}"
    )
    cut = count < min(there, run.rules.val_sequences)
    check.record_needs(not cut, f"the config cuts validation to {count} of {there} sequences")
    return f"{found:,} targets, {min(there, count)} sequences of {T}"


def scored_sequences(run: Folder) -> int:
    """The most validation sequences scored: the track's number, or fewer on other data if the config says so."""
    return run.rules.val_sequences if run.official else min(run.rules.val_sequences, run.config["val_sequences"])


def check_overlap(check: Check, run: Folder, judgement: Judgement) -> str:
    """No training document is in the validation set or the holdout; on the official files it only counts them."""
    splits = judgement.data(run)
    key = splits["train"].sha256 + splits["val"].sha256
    train, others = splits["train"], [name for name in ("val", "holdout") if name in splits]
    if key not in judgement.overlaps:
        judgement.overlaps[key] = {
            name: count_overlaps(train.tokens, train.doc_starts, splits[name].tokens) for name in others
        }
    counts = judgement.overlaps[key]
    found = " and ".join(f"{count} in {split}" for split, count in counts.items())
    text = f"training documents of {SHORTEST} tokens or more that occur as a whole: {found}"
    if run.official:
        check.note(text)
    else:
        check.need(not any(counts.values()), text)
    return text
