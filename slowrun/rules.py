"""The rules of each track, and whether a result keeps to them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slowrun.data import Split

OFFICIAL_SHA256 = {  # the identity of the benchmark
    "val": "6868ed375b289a89c72c2f9df1ecbdcff700c4b9478ca806435d2dbfad8573b1",
    "train": "36e7c95c1e7f6ed952fb002d76a03044e8617fea7e696a68d7dc1ce78465dcaf",
}
OFFICIAL_TRAIN_TOKENS = 100_000_000
SEQUENCE_LEN = 2048  # tokens per sequence in the official validation


@dataclass(frozen=True)
class Rules:
    """The rules for records of a track, besides the data."""

    cap_min: float  # minutes of training; 0 for no cap
    val_sequences: int  # sequences of the validation set that are scored
    hardware: str = ""  # what training runs on; empty for anything
    max_gpus: int = 8
    max_days: float = 0.0  # of training; 0 for no limit but the cap

    @property
    def val_tokens(self) -> int:
        """Targets of the validation set."""
        return self.val_sequences * SEQUENCE_LEN


RULES = {
    "limited": Rules(cap_min=60.0, val_sequences=4864, hardware="H100"),
    "tiny": Rules(cap_min=15.0, val_sequences=4864, hardware="H100"),
    "two_hour": Rules(cap_min=120.0, val_sequences=4864, hardware="H100"),
    "unlimited": Rules(cap_min=0.0, val_sequences=4880, max_gpus=64, max_days=7.0),
}


def is_official(sha256: dict[str, str]) -> bool:
    """Whether the training and validation files, by their hashes, are the official ones."""
    return all(sha256.get(split) == official for split, official in OFFICIAL_SHA256.items())


def describe_data(splits: dict[str, Split]) -> str:
    """The header's line on the splits: their sizes, and whether they are the official files."""
    sizes = ", ".join(f"{name} {len(split.tokens):,}" for name, split in splits.items())
    official = is_official({name: split.sha256 for name, split in splits.items()})
    return f"{sizes} tokens ({'official' if official else 'not the official files'})"


def reasons_not_eligible(track: str, result: dict) -> list[str]:
    """Why a result cannot be a record of its track; empty if it can. result: the content of a result.json."""
    rules = RULES[track]
    reasons = []
    if not is_official(result["data_sha256"]):
        reasons.append("the data are not the official files")
    if result["val_tokens"] != rules.val_tokens:
        reasons.append(f"{result['val_tokens']:,} validation targets, not {rules.val_tokens:,}")
    reasons += capped_reasons(rules, result) if rules.cap_min else ensemble_reasons(rules, result)
    if not math.isfinite(result["val_loss"]):
        reasons.append("the loss is not finite")
    return reasons


def capped_reasons(rules: Rules, result: dict) -> list[str]:
    """The reasons of a track with a time cap."""
    reasons = []
    if not 0 < result["time_cap_min"] <= rules.cap_min:
        reasons.append(f"the cap of {rules.cap_min:g} min is lifted")
    if result["train_time_s"] > 60 * rules.cap_min:
        reasons.append(f"training took longer than {rules.cap_min:g} min")
    if result["world_size"] != rules.max_gpus or rules.hardware not in result["device"]:
        reasons.append(f"it ran on other hardware than {rules.max_gpus} {rules.hardware}")
    return reasons


def ensemble_reasons(rules: Rules, result: dict) -> list[str]:
    """The reasons of the unlimited track, whose chains may run at different times on different machines."""
    reasons = []
    if (
        result["world_size"] > rules.max_gpus
        or result["train_time_s"] > 86400 * rules.max_days
        or result["process_hours"] > 24 * rules.max_days * rules.max_gpus
    ):
        reasons.append(f"training took more than {rules.max_gpus} GPUs, or longer than {rules.max_days:g} days")
    if result["status"] != "finished":
        reasons.append("chains are not finished")
    if not result["as_declared"]:
        reasons.append("the readout is not the one that the run declared")
    return reasons
