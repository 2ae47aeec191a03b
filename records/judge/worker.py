"""The referee's worker: predicts with a run's own code and writes down what it measured. No verdict.

    python records/judge/worker.py TASK.json      # writes found.json, val.npy and holdout.npy beside it

It runs in a process of its own, with a time limit, without gradients, and without bytecode from the run's folder. That
isolates the referee from crashes and hangs, NOT from malice: the run's code can do what its user can. It imports
nothing of this repository, not even slowrun/: the run's script finds the one in its code/. The run's code/train.py must
offer load_members(run_dir, device), an iterator of (weight, callable) in which a callable maps tokens (B, T) int64
to log-probabilities (B, T, V) float32.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

BATCH_BYTES = 2**31  # of log-probabilities at a time
LOGIT_BATCH_BYTES = 2**33  # the same on a GPU when mixing logits: each batch loads all members, so fewer batches
PROBE_SEQUENCES, PROBE_POSITIONS = 4, 16
AGAIN_BATCHES = 64  # batches of sequences that are scored a second time


class Wrong(Exception):
    """The run's code returned something other than log-probabilities, or it used another slowrun/ than its own."""


def instrument_modules() -> list[str]:
    """The names of the modules of slowrun/ that are imported."""
    return [name for name in sys.modules if name.split(".")[0] == "slowrun"]


def check_instrument(code: Path) -> None:
    """Raise Wrong if a module of slowrun/ was imported from anywhere but the run's code/."""
    package = (code / "slowrun").resolve()
    for name in instrument_modules():
        file = getattr(sys.modules[name], "__file__", None)
        if file is None or Path(file).resolve().parent != package:
            raise Wrong(f"code/train.py imports {name} from {file}, not from {package}: its path line must find that")


@contextlib.contextmanager
def script(run_dir: Path):
    """A run's code/train.py as a module, with its neighbours and its slowrun/; the caller's modules are restored.

    Wrong if it imports a slowrun/ other than its own.
    """
    code, path, bytecode = run_dir / "code", list(sys.path), sys.dont_write_bytecode
    if not (code / "slowrun").is_dir():
        raise Wrong("code/ has no slowrun/: copy the whole code/ of the run")
    neighbours = {file.stem for file in code.glob("*.py")} | {"judged_train"}

    def take_away() -> dict:
        names = [*(neighbours & sys.modules.keys()), *instrument_modules()]
        return {name: sys.modules.pop(name) for name in names}

    callers_modules = take_away()
    sys.path.insert(0, str(code))
    sys.dont_write_bytecode = True
    try:
        spec = importlib.util.spec_from_file_location("judged_train", code / "train.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        check_instrument(code)
        yield module
        check_instrument(code)  # what was imported later
    finally:
        sys.path[:], sys.dont_write_bytecode = path, bytecode
        take_away()
        sys.modules.update(callers_modules)


class Predictor:
    """A callable of load_members, checked at every position: shape, dtype, finite, probabilities that sum to 1."""

    def __init__(self, log_probs: Callable, vocab_size: int, device: torch.device):
        self.log_probs, self.vocab_size, self.device = log_probs, vocab_size, device
        self.sum_error, self.not_finite = 0.0, 0  # largest |log of the sum|; positions

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, V) float32 on the device."""
        out, shape = self.log_probs(tokens.clone().to(self.device)), (*tokens.shape, self.vocab_size)
        if not isinstance(out, Tensor) or out.dtype != torch.float32 or out.shape != shape:
            kind = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise Wrong(f"a callable of load_members returned {kind}, not torch.float32 {shape}")
        out = out.to(self.device)
        self.not_finite += int((~out.isfinite()).any(-1).sum())
        self.sum_error = max(self.sum_error, largest(out.logsumexp(-1)))
        return out


def largest(difference: Tensor) -> float:
    """The largest magnitude; infinite if there is a NaN, 0 if it is empty."""
    return float(difference.abs().nan_to_num(nan=math.inf).max()) if difference.numel() else 0.0


def mixture_of_logits(load_members: Callable, device: torch.device, vocab_size: int, inner: list[Predictor]):
    """One callable for members whose logits are averaged. Every batch loads all members anew, which is slow."""

    def log_probs(tokens: Tensor) -> Tensor:
        total = torch.zeros((*tokens.shape, vocab_size), device=device)
        for i, (weight, member) in enumerate(load_members()):
            inner[i].log_probs = member
            total.add_(inner[i](tokens), alpha=weight)
        return total.log_softmax(-1)

    return log_probs


class Measurement:
    """Measures one predictor. All its batches have the same shape, so that only their content can matter."""

    def __init__(self, predict: Predictor, batch: int, seed: int):
        self.predict, self.batch, self.random = predict, batch, np.random.RandomState(seed)
        self.found = {"causality": 0.0, "company": 0.0, "repeat": 0.0, "again": 0.0}

    def worst(self, name: str, difference: Tensor) -> None:
        self.found[name] = max(self.found[name], largest(difference))

    def noise(self, *shape: int) -> Tensor:
        """Random tokens."""
        return torch.from_numpy(self.random.randint(self.predict.vocab_size, size=shape))

    def fill(self, rows: Tensor) -> Tensor:
        """Pad rows (k, T) to a batch with random rows."""
        return torch.cat([rows, self.noise(self.batch - len(rows), rows.size(1))])

    def nats(self, sequences: Tensor) -> Tensor:
        """(n, T + 1) -> (n, T) float64, nats of each target."""
        result = []
        for rows in sequences.split(self.batch):
            out = self.predict(self.fill(rows[:, :-1]))[: len(rows)]
            targets = rows[:, 1:, None].to(out.device)
            result.append(-out.gather(-1, targets)[..., 0].double().cpu())
        return torch.cat(result)

    def fingerprint(self, rows: Tensor, outcomes: Tensor) -> Tensor:
        """Log-probabilities of outcomes (k, T, n) at each position of rows (k, T) -> (k, T, n) on the CPU."""
        out = self.predict(self.fill(rows))[: len(rows)]
        return out.gather(-1, outcomes.to(out.device)).cpu()

    def probe(self, rows: Tensor) -> None:
        """Measure causality and company on rows (k, T), at random positions of each."""
        T, batch = rows.size(1), self.fill(rows)
        base = self.predict(batch)[: len(rows)]
        for i, row in enumerate(rows):
            positions = self.random.choice(T - 1, min(PROBE_POSITIONS, T - 1), replace=False)
            others = self.noise(*batch.shape)
            others[i] = row
            self.worst("company", self.predict(others)[i] - base[i])
            for chunk in np.array_split(positions, math.ceil(len(positions) / self.batch)):
                variants = row.repeat(len(chunk), 1)
                for variant, t in zip(variants, chunk, strict=True):
                    variant[t + 1 :] = self.noise(T - t - 1)
                for out, t in zip(self.predict(self.fill(variants)), chunk, strict=False):
                    self.worst("causality", out[: t + 1] - base[i, : t + 1])

    def score_again(self, sequences: Tensor, nats: Tensor) -> None:
        """Score many sequences a second time, in another order and company, with random tokens from some position on.

        Predictions up to that position must be as they were, that of the first replaced token included. The number of
        sequences exposes a model that reads its targets at a few positions only.
        """
        T = sequences.size(1) - 1
        chosen = torch.from_numpy(self.random.permutation(len(sequences))[: AGAIN_BATCHES * self.batch])
        for indices in chosen.split(self.batch):
            altered, last = sequences[indices, :-1].clone(), self.random.randint(T - 1, size=len(indices))
            for row, t in zip(altered, last, strict=True):
                row[t + 1 :] = self.noise(T - t - 1)
            out = self.predict(self.fill(altered))[: len(indices)]
            again = -out.gather(-1, sequences[indices, 1:, None].to(out.device))[..., 0].double().cpu()
            for found, known, t in zip(again, nats[indices], last, strict=True):
                self.worst("again", found[: t + 1] - known[: t + 1])

    def score(self, splits: dict[str, Tensor], rows: Tensor, outcomes: Tensor, before: Tensor) -> dict[str, Tensor]:
        """Make all measurements -> nats by split. before: the fingerprint, taken before anything was scored."""
        self.worst("repeat", self.fingerprint(rows, outcomes) - before)
        self.probe(rows)
        nats = {"val": self.nats(splits["val"])}
        self.score_again(splits["val"], nats["val"])
        nats |= {name: self.nats(sequences) for name, sequences in splits.items() if name != "val"}
        self.worst("repeat", self.fingerprint(rows, outcomes) - before)
        return nats


def run(task: dict) -> dict:
    """Score a run. task: run_dir, device, vocab_size, mixing, members (how many), probe_seed, splits, out.

    splits: name -> file of sequences (n, T + 1). Writes out/<split>.npy, nats (n, T) float64 of the mixture. Returns
    device, weights (as load_members gave them) and measured (one dict per callable); or wrong, the reason for failure.
    """
    splits = {name: torch.from_numpy(np.load(path)) for name, path in task["splits"].items()}
    run_dir = Path(task["run_dir"])
    try:
        with script(run_dir) as module, torch.no_grad():
            found, probabilities = measure(module, task, splits)
    except Wrong as wrong:
        return {"wrong": str(wrong)}
    for name, mixed in probabilities.items():
        np.save(Path(task["out"]) / f"{name}.npy", (-mixed.log()).numpy())
    return found


def measure(module: ModuleType, task: dict, splits: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """-> (what run returns; by split, the mixture's probability of each target (n, T) float64)."""
    device, V, val = torch.device(task["device"]), task["vocab_size"], splits["val"]
    logits = task["mixing"] == "logit"
    budget = LOGIT_BATCH_BYTES if logits and device.type == "cuda" else BATCH_BYTES
    batch = max(PROBE_SEQUENCES, min(32, budget // (4 * V * (val.size(1) - 1))))
    load = partial(module.load_members, Path(task["run_dir"]), device)
    inner = [Predictor(None, V, device) for _ in range(task["members"])]
    weights = [float(weight) for weight, _ in load()] if logits else []
    members = (lambda: [(1.0, mixture_of_logits(load, device, V, inner))]) if logits else load
    random = np.random.RandomState(task["probe_seed"])
    rows = val[random.permutation(len(val))[:PROBE_SEQUENCES]]
    outcomes = torch.cat([rows[:, 1:, None], torch.from_numpy(random.randint(V, size=(*rows[:, 1:].shape, 8)))], dim=-1)
    rows, before, measured = rows[:, :-1], [], []
    probabilities = {name: torch.zeros(rows[:, 1:].shape, dtype=torch.float64) for name, rows in splits.items()}
    for i, (_, log_probs) in enumerate(members()):  # of all members, before any is scored
        measurement = Measurement(Predictor(log_probs, V, device), batch, task["probe_seed"] + i)
        before.append((measurement, measurement.fingerprint(rows, outcomes)))
        measurement.predict.log_probs = log_probs = None  # one member is in memory at a time
    for (weight, log_probs), (measurement, prints) in zip(members(), before, strict=True):
        measurement.predict.log_probs = log_probs
        nats = measurement.score(splits, rows, outcomes, prints)
        for name, of_targets in nats.items():
            probabilities[name].add_((-of_targets).exp(), alpha=float(weight))
        measured.append(all_found(measurement, inner if logits else []) | {"loss": float(nats["val"].mean())})
        weights += [] if logits else [float(weight)]
        measurement.predict.log_probs = log_probs = None
    return {"device": device.type, "weights": weights, "measured": measured}, probabilities


def all_found(measurement: Measurement, inner: list[Predictor]) -> dict:
    """The measurements of a callable, those of the callables inside it included."""
    all_of_them = [measurement.predict, *inner]
    sums = {"sum_error": max(p.sum_error for p in all_of_them), "not_finite": sum(p.not_finite for p in all_of_them)}
    return measurement.found | sums


def main(argv: list[str] | None = None) -> int:
    (path,) = sys.argv[1:] if argv is None else argv
    task = json.loads(Path(path).read_text())
    sys.path.pop(0)  # the folder of this file
    (Path(task["out"]) / "found.json").write_text(json.dumps(run(task)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
