"""Checks of weights and losses: a run's members predict in a process of their own; the losses are computed here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from records.judge.data import scored_sequences
from records.judge.findings import Check, Judgement, Scored
from records.judge.runs import Folder, close, differing, final_hashes, number, require
from slowrun.data import token_bytes
from slowrun.scoring import EvalSet
from slowrun.world import World

WORKER = Path(__file__).resolve().with_name("worker.py")
GPT2_VOCAB, BYTES_VOCAB = 50257, 257  # sizes of vocabularies whose bytes per token are known
GPT2_BYTES_SHA256 = "fc85cec8499a3efe31f2f65fdeb29161153e365155fc4990626335c8873146ee"  # of them as int64
MIXINGS = ("probability", "weight", "logit")
CLAIM_TOLERANCE = 0.001  # nats, and bits per byte
HOLDOUT_GAP = 0.1  # nats by which the holdout may be worse than the validation set
# Of log-probabilities that should be the same; low: in bfloat16 or on a GPU
PREDICTION_TOLERANCE = {"low": 1e-3, "full": 1e-5}

# ======================================================================================================================
# The worker predicts
# ======================================================================================================================


class WorkerFailed(Exception):
    """The run could not be scored."""


def run_worker(task: dict, time_limit_s: float) -> dict:
    """Run worker.py in a process group of its own -> what it found; the group is killed at the limit."""
    folder = Path(task["out"])
    (folder / "task.json").write_text(json.dumps(task))
    options = ["-B", "-X", f"pycache_prefix={folder / 'pycache'}"]  # never read bytecode from the run's folder
    command = [sys.executable, *options, str(WORKER), str(folder / "task.json")]
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, start_new_session=True, **streams)
        try:
            code = process.wait(time_limit_s)
        except subprocess.TimeoutExpired:
            text = f"it was not scored in {time_limit_s / 60:g} min: --time-limit-min allows more"
            raise WorkerFailed(text) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    last = (folder / "output.txt").read_text(errors="replace").strip().splitlines()[-1:]
    if code:
        raise WorkerFailed(f"the run's code ended the scoring (exit code {code}): {' '.join(last)[:300]}")
    return json.loads((folder / "found.json").read_text())


def byte_lengths(check: Check, directory: str, vocab_size: int) -> torch.Tensor | None:
    """Bytes of every token (V,), 0 for the BOS; None if unknown. ValueError if meta.json has wrong ones."""
    lengths, source = token_bytes(directory, vocab_size)
    if lengths is None:
        check.note(f"bytes per token {source}")
    elif vocab_size == GPT2_VOCAB:
        found = hashlib.sha256(lengths.numpy().astype("<i8").tobytes()).hexdigest()
        require(found == GPT2_BYTES_SHA256, f"the bytes per token {source} are not GPT-2's")
    elif vocab_size == BYTES_VOCAB:
        expected = [1] * (BYTES_VOCAB - 1) + [0]
        require(lengths.tolist() == expected, f"the bytes per token {source} are not those of the byte tokenizer")
    else:
        check.note(f"bytes per token {source}: this tokenizer is not known here")
    return lengths


def score_run(run: Folder, judgement: Judgement) -> Scored:
    """Have a run's members predict the validation set and the holdout. WorkerFailed if they do not."""
    options, splits, check = judgement.options, judgement.data(run), Check(judgement.options.other_data)
    lengths = byte_lengths(check, judgement.data_dir(run), run.config["vocab_size"])
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
    for name, of_targets in nats.items():
        found_shape, shape = of_targets.shape, sets[name].sequences[:, 1:].shape
        require(found_shape == shape, f"the worker scored {tuple(found_shape)} targets of {name}, not {tuple(shape)}")
    scores = {name: sets[name].score(of_targets) for name, of_targets in nats.items()}
    low = found["device"] == "cuda" or run.config["dtype"] == "bfloat16"
    tolerance, changed = PREDICTION_TOLERANCE["low" if low else "full"], differing(before, final_hashes(run))
    return Scored(scores, found["weights"], found["measured"], tolerance, check.notes, changed)


# ======================================================================================================================
# Weights and losses
# ======================================================================================================================


def check_weights(check: Check, run: Folder, judgement: Judgement) -> str:
    """final/ is as result.json says, and its members have proper weights and a known mixing rule."""
    changed = differing(run.weights_sha256, run.result["final_sha256"])
    check.need(not changed, f"files of final/ that are not as result.json says: {changed}")
    mixing, claim = run.final["mixing"], run.result["mixing"]
    check.need(mixing == claim, f"mixing is {mixing!r} in members.json, {claim!r} in result.json")
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


def check_score(check: Check, run: Folder, judgement: Judgement) -> str:
    """The claimed loss and bits per byte follow from what the members predict."""
    scored, result = judgement.scored[run.name], run.result
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
        hint = " (it needs a meta.json beside the data, or pip install tiktoken)" if found.bpb is None else ""
        check.need(fits, f"val_bpb {bpb} is claimed, {found.bpb} found{hint} ({limit})")
    for name, count in counts.items():
        check.need(result[name] == count, f"{name} {result[name]} is claimed, {count} found")
    check.need(not scored.changed, f"the scoring changed files of final/: {scored.changed}")
    bits = f", {found.bpb:.5f} bits per byte" if found.bpb is not None else ""
    return f"val_loss {found.loss:.5f} found, {claimed:.5f} claimed, over {found.tokens:,} targets{bits}"


def check_members(check: Check, run: Folder, judgement: Judgement) -> str:
    """Each member has the loss of its validation in training, if that was in the stage that is read out.

    So the weights kept then are the ones read out: nothing was trained in between.
    """
    scored, stage, compared = judgement.scored[run.name], run.final["stage"], 0
    if len(scored.measured) != len(run.members):
        return f"not compared one by one: the average of {run.final['mixing']}s is what was scored"
    for member, measured in zip(run.members, scored.measured, strict=True):
        known = [member["val_loss"]] if "val_loss" in member else []  # on the unlimited track, from its ledgers
        for line in run.main.validations_in(stage):
            if line["step"] == member["step"] and member["file"].startswith("epoch_"):
                known.append(line["val_loss"])
        compared += bool(known)
        fits = all(close(loss, measured["loss"], CLAIM_TOLERANCE) for loss in known)
        text = f"{member['file']} has the loss {measured['loss']:.5f}, at its validation it had {known[-1:]}"
        check.need(fits, f"{text} (at most {CLAIM_TOLERANCE} apart)")
    return f"{compared} of {len(run.members)} were validated in the stage that is read out, with the same losses"


def check_holdout(check: Check, run: Folder, judgement: Judgement) -> str:
    """The holdout, by which nothing was chosen, is predicted about as well as the validation set."""
    scores, claimed = judgement.scored[run.name].scores, run.result["holdout_loss"]
    if "holdout" not in scores:
        unchecked = "" if claimed is None else f"; the claim of {claimed} was not checked"
        check.note(f"{judgement.data_dir(run)} has no holdout{unchecked}")
        return ""
    found, gap = scores["holdout"].loss, scores["holdout"].loss - scores["val"].loss
    check.need(gap <= HOLDOUT_GAP, f"{found:.4f}, {gap:.4f} nats above val: at most {HOLDOUT_GAP} is needed")
    if claimed is None:
        check.note("the run reported no holdout_loss")
    else:
        fits = close(claimed, found, CLAIM_TOLERANCE)
        check.need(fits, f"holdout_loss {claimed:.5f} is claimed, {found:.5f} found (at most {CLAIM_TOLERANCE} apart)")
    return f"{found:.5f}, {gap:+.5f} from val"
