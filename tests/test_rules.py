"""The rules of each track: a right result is eligible, and each thing that is wrong is a reason by itself."""

import importlib
import math

import numpy as np
import pytest
from conftest import TRACKS, UNLIMITED

from slowrun.data import Split
from slowrun.rules import OFFICIAL_SHA256, RULES, SEQUENCE_LEN, describe_data, is_official, reasons_not_eligible

CAPS_MIN = {"limited": 60, "tiny": 15, "two_hour": 120}


def good_result(track: str) -> dict:
    """What a record's result.json has of what the rules look at."""
    result = {"data_sha256": OFFICIAL_SHA256 | {"holdout": "x"}, "val_loss": 3.183}
    if track == "unlimited":
        times = {"train_time_s": 7 * 86400, "process_hours": 64 * 7 * 24}
        return result | times | {"val_tokens": 9_994_240, "world_size": 64, "status": "finished", "as_declared": True}
    minutes = CAPS_MIN[track]
    result |= {"val_tokens": 9_961_472, "train_time_s": 60.0 * minutes, "time_cap_min": float(minutes)}
    return result | {"world_size": 8, "device": "NVIDIA H100 80GB HBM3"}


WRONG = [
    ({"data_sha256": {"val": OFFICIAL_SHA256["val"], "train": "y"}}, "the data are not the official files"),
    ({"data_sha256": {"train": OFFICIAL_SHA256["train"]}}, "the data are not the official files"),
    ({"val_loss": math.nan}, "the loss is not finite"),
    ({"val_loss": math.inf}, "the loss is not finite"),
]
WRONG_OF = {
    name: [
        ({"val_tokens": 9_994_240}, "9,994,240 validation targets, not 9,961,472"),
        ({"train_time_s": 60 * minutes + 0.001}, f"training took longer than {minutes} min"),
        ({"time_cap_min": 0.0}, f"the cap of {minutes} min is lifted"),
        ({"time_cap_min": minutes + 1.0}, f"the cap of {minutes} min is lifted"),
        ({"world_size": 4}, "it ran on other hardware than 8 H100"),
        ({"world_size": 16}, "it ran on other hardware than 8 H100"),
        ({"device": "NVIDIA A100-SXM4-80GB"}, "it ran on other hardware than 8 H100"),
    ]
    for name, minutes in CAPS_MIN.items()
} | {
    "unlimited": [
        ({"val_tokens": 9_961_472}, "9,961,472 validation targets, not 9,994,240"),
        ({"train_time_s": 7 * 86400 + 1}, "training took more than 64 GPUs, or longer than 7 days"),
        ({"world_size": 72}, "training took more than 64 GPUs, or longer than 7 days"),
        ({"process_hours": 64 * 7 * 24 + 1}, "training took more than 64 GPUs, or longer than 7 days"),
        ({"status": "partial"}, "chains are not finished"),
        ({"as_declared": False}, "the readout is not the one that the run declared"),
    ]
}


@pytest.mark.parametrize("track", RULES)
def test_eligibility(track):
    good = good_result(track)
    assert reasons_not_eligible(track, good) == []
    for change, reason in WRONG + WRONG_OF[track]:
        assert reasons_not_eligible(track, good | change) == [reason]
    several = {"val_tokens": 1, "val_loss": math.nan, "data_sha256": {}}
    assert len(reasons_not_eligible(track, good | several)) == 3


def test_a_stricter_cap_is_the_runs_business():
    assert reasons_not_eligible("limited", good_result("limited") | {"time_cap_min": 30.0}) == []


@pytest.mark.parametrize("track", RULES)
def test_the_defaults_of_a_script_keep_the_rules(track):
    """An official run takes no flags."""
    config, rules = importlib.import_module((TRACKS | UNLIMITED)[track]).Config(), RULES[track]
    assert (config.time_cap_min, config.val_sequences) == (rules.cap_min, rules.val_sequences)
    assert config.sequence_len == SEQUENCE_LEN and config.vocab_size == 50257


def test_the_published_hashes():
    assert OFFICIAL_SHA256 == {
        "val": "6868ed375b289a89c72c2f9df1ecbdcff700c4b9478ca806435d2dbfad8573b1",
        "train": "36e7c95c1e7f6ed952fb002d76a03044e8617fea7e696a68d7dc1ce78465dcaf",
    }
    assert is_official(OFFICIAL_SHA256) and not is_official({"val": OFFICIAL_SHA256["val"]})


def test_what_a_header_says_of_the_data():
    def split(count: int, sha256: str) -> Split:
        return Split(np.zeros(count, dtype=np.uint16), np.zeros(1, dtype=np.int64), 42, sha256)

    official = {"train": split(12345, OFFICIAL_SHA256["train"]), "val": split(67, OFFICIAL_SHA256["val"])}
    assert describe_data(official) == "train 12,345, val 67 tokens (official)"
    other = official | {"val": split(67, "x")}
    assert describe_data(other) == "train 12,345, val 67 tokens (not the official files)"
