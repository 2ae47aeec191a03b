"""The timed tracks' own scripts: small runs, what stops and resumes them, processes, members, refusals.

What all runs have in common is tested by a smaller script: test_run.py, test_resume.py.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    MICRO_STEPS,
    NOISE,
    ROOT,
    SMALL,
    TRACKS,
    UNLIMITED,
    V,
    assert_agree,
    assert_same_outcome,
    fake_clock,
    flags,
    interrupt,
    name_of,
    on_processes,
    read_metrics,
    read_result,
    refusal,
    run_main,
    write_data,
)

from slowrun import rules
from slowrun import session as run_session
from slowrun.data import load_split, unread_split

MIXING = {"limited": "probability", "tiny": "weight", "two_hour": "probability"}
STAGES = {  # what begins with the second epoch, and what the metrics say of it
    "limited": ("replay", {"replay": False}, {"replay": True}),
    "tiny": ("two_passes", {"passes": 1}, {"passes": 2}),
    "two_hour": ("windows_12_28_replay", {"windows": [4, 12]}, {"windows": [12, 28]}),
}


@pytest.fixture(scope="module")
def little_data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("little"), {"val": 500, "train": 2700, "holdout": 400})


def settings(name: str, runs_dir: Path, data_dir: Path) -> dict:
    """Flags of a run of 5 steps, two epochs of 2.5 steps, with everything on, in float64."""
    values = SMALL[name] | NOISE[name]
    values |= {"data_dir": str(data_dir), "runs_dir": str(runs_dir), "run_name": "run", "device": "cpu"}
    return values | {"dtype": "float64", "eval_initial": True}


@pytest.fixture
def small(track, little_data, tmp_path) -> dict:
    return settings(name_of(track), tmp_path / "runs", little_data)


@pytest.fixture
def folder(small) -> Path:
    return Path(small["runs_dir"]) / "run"


@pytest.fixture(scope="module")
def references(little_data, tmp_path_factory) -> dict[str, Path]:
    """The folder of a run of each track that nothing stopped."""
    runs_dir = tmp_path_factory.mktemp("references")
    folders = {}
    for name, module in TRACKS.items():
        values = settings(name, runs_dir, little_data) | {"run_name": name}
        assert run_main(importlib.import_module(module), flags(**values)) == 0
        folders[name] = runs_dir / name
    return folders


@pytest.fixture
def reference(track, references) -> Path:
    return references[name_of(track)]


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_run(track, reference):
    """Steps, stages, readouts, members, and the files of its code."""
    name = name_of(track)
    result = read_result(reference)
    steps, validations = read_metrics(reference)
    assert (result["track"], result["status"], result["stopped_by"]) == (name, "finished", "steps")
    assert (result["steps"], result["epochs"], result["tokens"]) == (5, 2, 5 * 1024)
    assert [line["readout"] for line in validations] == ["initial", "epoch_1", "epoch_2"]
    label, before, after = STAGES[name]
    assert all(line.items() >= (after if line["step"] > 3 else before).items() for line in steps)
    assert f"from step 4 on: {label}" in (reference / "log.txt").read_text()
    members = json.loads((reference / "final" / "members.json").read_text())
    assert members["mixing"] == result["mixing"] and result["val_loss"] in result["readouts"].values()
    assert sum(member["weight"] for member in members["members"]) == pytest.approx(1)
    assert {member["file"] for member in members["members"]} | {"members.json"} == result["final_sha256"].keys()
    files = {path.name for path in (reference / "code").iterdir()} - {"__pycache__"}
    assert files == {"train.py", "slowrun"} | ({"model.py"} if name == "limited" else set())


def test_the_readouts_of_the_record(track, reference):
    """What changes with a record that reads out otherwise."""
    name = name_of(track)
    result = read_result(reference)
    averages = [f"{MIXING[name]}_average_equal_weights", "weight_average", f"{MIXING[name]}_average"]
    averages = averages if name != "tiny" else ["exponential_moving_average", *averages[::2]]
    assert list(result["readouts"]) == ["epoch_1", "epoch_2", *averages]
    assert result["val_loss"] == result["readouts"][f"{MIXING[name]}_average"]
    members = json.loads((reference / "final" / "members.json").read_text())
    assert members["mixing"] == MIXING[name]
    kept = [(member["name"], pytest.approx(member["weight"])) for member in members["members"]]
    assert kept == [("epoch_01", 1 / 3), ("epoch_02", 2 / 3)]


def test_the_model_learns(track, small, folder):
    """From ln 97 nats, with every technique on (on tiny, all blocks start at 0). Without context it would be 4.57."""
    epochs = 12 if name_of(track) == "tiny" else 4
    values = {"num_epochs": epochs, "dtype": "float32", "lr_multiplier": 2.0}
    assert run_main(track, flags(**small | values | dict.fromkeys(NOISE[name_of(track)], 0.05))) == 0
    _, validations = read_metrics(folder)
    assert validations[0]["val_loss"] == pytest.approx(4.575, abs=0.01)
    assert validations[-1]["val_loss"] < 4.2


@pytest.mark.parametrize(("method", "count"), [("step", 3), ("scorer", 4)])
def test_stopped_and_resumed(track, small, folder, reference, method, count):
    """Exactly at the end of an epoch; in the validation there, after two of the warm-up and that of the beginning."""
    with interrupt(track, method, count):
        assert run_main(track, flags(**small)) == 0
    (checkpoint,) = (folder / "checkpoints").glob("*.json")
    assert json.loads(checkpoint.read_text())["step"] == 3
    assert run_main(track, ["--resume", str(folder)]) == 0
    assert_same_outcome(folder, reference)


def test_the_cap_in_the_middle_of_an_epoch(track, small, folder):
    """What is read out is what a run has then; also if a signal comes in between."""
    capped = small | {"time_cap_min": 4.5 / 60}
    with fake_clock(track):
        assert run_main(track, flags(**capped | {"run_name": "reference"})) == 0
        with interrupt(track, "scorer", 5):
            assert run_main(track, flags(**capped)) == 0
    result = read_result(folder.with_name("reference"))
    assert (result["stopped_by"], result["steps"], result["epochs"]) == ("time_cap", 4, 1)
    assert list(result["readouts"])[:2] == ["epoch_1", "epoch_2_cut_short"]
    assert not (folder / "result.json").exists()
    assert run_main(track, ["--resume", str(folder)]) == 0
    assert_same_outcome(folder, folder.with_name("reference"))


def test_two_processes_compute_the_same_run(track, small, folder, reference):
    """With every technique on: the same to 1e-9 in float64, though sums are rounded in another order."""
    assert on_processes(track, flags(**small | {"eval_batch": 3}), count=2) == [0, 0]
    assert_agree(folder, reference)
    assert read_result(folder)["world_size"] == 2


def test_a_smaller_device_batch_is_the_same_mathematics(track, small, folder):
    """Without dropout, which is drawn per forward pass."""
    quiet = small | dict.fromkeys(NOISE[name_of(track)], 0.0) | MICRO_STEPS[name_of(track)]
    quiet |= {"num_epochs": 1, "readout_epochs": 1}
    losses = []
    for device_batch in (0, 1):
        values = quiet | {"device_batch": device_batch, "run_name": f"run{device_batch}"}
        assert run_main(track, flags(**values)) == 0
        steps, _ = read_metrics(folder.with_name(f"run{device_batch}"))
        losses.append([line["train_loss_with_mtp"] for line in steps])
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


# -------------------------------------------------------------------------------------------------------------- members


def test_members_give_the_claimed_loss(track, little_data, reference, tmp_path):
    """load_members, from the run folder alone, mixed by hand: the val_loss and holdout_loss of result.json."""
    result = read_result(reference)
    for split, claimed in (("val", result["val_loss"]), ("holdout", result["holdout_loss"])):
        sequences = torch.from_numpy(load_split(little_data, split, V, 32).sequences(33).astype(np.int64))
        mixture, weights = 0, []
        for weight, log_probs in track.load_members(reference, "cpu"):
            found = log_probs(sequences[:, :-1])
            assert found.dtype == torch.float32 and found.shape == (len(sequences), 32, V)
            torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(sequences), 32))
            mixture = mixture + weight * found.exp().double()
            weights.append(weight)
        assert weights == pytest.approx({"probability": [1 / 3, 2 / 3], "weight": [1.0]}[MIXING[name_of(track)]])
        nats = -mixture.gather(-1, sequences[:, 1:, None]).log().mean().item()
        assert nats == pytest.approx(claimed, abs=1e-6)
    if MIXING[name_of(track)] == "probability":
        (_, first), _ = track.load_members(reference, "cpu")
        with pytest.raises(ValueError, match="use members one at a time"):
            first(sequences[:1, :-1])


def test_members_of_another_track_are_refused(track, references):
    other = "tiny" if name_of(track) != "tiny" else "limited"
    with pytest.raises(ValueError, match=f"is a run of the {other} track: use that track's load_members"):
        next(track.load_members(references[other], "cpu"))
    error = refusal(track, ["--resume", str(references[other])])
    assert f"is a run of the {other} track: resume it with that track's train.py" in error


# ------------------------------------------------------------------------------------------------------------- refusals

BAD_FLAGS = [
    ({"num_epochs": 0}, "--num-epochs is 0: it must be at least 1"),
    ({"batch_tokens": 1000}, "batch_tokens 1000 is not a multiple of 8 virtual ranks x micro_batch "),
    ({"n_head": 3}, "n_embd 32 is not a multiple of "),
    ({"n_layer": 3}, "n_layer 3 is odd: the U-Net pairs layers"),
    ({"n_embd": 24}, "--n-embd is 24: it must be at least 32"),
    ({"micro_batch": 3, "batch_tokens": 768}, "the meta-gradient cannot halve 1 micro-step(s) of 3 sequences"),
    ({"micro_batch": 2, "batch_tokens": 1536}, "the meta-gradient cannot halve 3 micro-step(s) of 2 sequences"),
    (
        {"micro_batch": 8, "batch_tokens": 4096, "device_batch": 3},
        "device_batch 3 does not divide the 8 sequences of a term",
    ),
    (
        {"micro_batch": 8, "batch_tokens": 2048, "device_batch": 3},
        "device_batch 3 does not divide the 4 sequences of a term",
    ),
    ({"device_batch": -1}, "--device-batch is -1: it must be at least 0"),
    ({"sequence_len": 3}, "--sequence-len is 3: it must be at least 4"),
    ({"window_pattern": "SXL"}, "window_pattern 'SXL' must consist of the letters S and L"),
    ({"dropout": 1.0}, "dropout 1.0 is not in [0, 1)"),
    ({"logit_cap": 0.0}, "logit_cap 0.0 must be positive"),
    ({"swa_epochs": 3}, "--swa-epochs 3 exceed --num-epochs 2: lower them"),
    ({"swa_epochs": 3, "readout_epochs": 4}, "--swa-epochs 3 and --readout-epochs 4 exceed --num-epochs 2"),
    ({"warmdown": 1.5}, "warmdown 1.5 is not in [0, 1]"),
    ({"vocab_size": 50257}, "is of another tokenizer"),
    ({"data_dir": "nowhere"}, "nowhere/fineweb_train.pt not found: run python prepare_data.py"),
    ({"batch_tokens": 8192}, "two optimizer steps need "),
    ({"attention": "varlen"}, "--attention varlen needs a GPU"),
]
REPLAY = [
    ({"replay_start": 0}, "replay_start 0 and replay_end 2 do not span layers of the second half, 1 ... 1"),
    ({"replay_end": 3}, "replay_start 1 and replay_end 3 do not span"),
    ({"replay_from_epoch": -1}, "--replay-from-epoch is -1: it must be at least 0"),
    ({"stochastic_depth": 1.0}, "stochastic_depth 1.0 is not in [0, 1)"),
]
BAD_FLAGS_OF = {  # of one track; two_hour's window schedules: test_two_hour.py
    "limited": REPLAY,
    "two_hour": [*REPLAY, ({"num_epochs": 13}, "the window schedule ends with epoch 12, training with epoch 13")],
    "tiny": [
        ({"n_head": 16}, "is not a multiple of 4 * n_head = 64: change --n-embd"),
        ({"late_passes": 0}, "--late-passes is 0: it must be at least 1"),
        ({"decay_hold_epochs": 2}, "--decay-hold-epochs 2 and --decay-low-epochs 1 must be in this order"),
        ({"decay_low_epochs": 3}, "from 0 to --num-epochs 2"),
        ({"weight_decay": 0.0}, "--weight-decay 0.0 must be positive: its schedule is relative to it"),
        ({"ema_every": 0}, "--ema-every is 0: it must be at least 1"),
        ({"ema_epoch_decay": 1.0}, "ema_epoch_decay 1.0 is not between 0 and 1"),
        ({"late_passes_from": 1.5}, "late_passes_from 1.5 is not in [0, 1]"),
        ({"mtp_until": 0.0}, "mtp_until 0.0 is not in (0, 1]"),
        ({"head": "fp8"}, "here are float64, 32, 32, cpu: change them, or give --head plain"),
    ],
}
ALL_BAD_FLAGS = [(name, *bad) for name in TRACKS for bad in BAD_FLAGS + BAD_FLAGS_OF[name]]


@pytest.mark.parametrize(
    ("track", "change", "message"),
    ALL_BAD_FLAGS,
    ids=[f"{name}-{change}" for name, change, _ in ALL_BAD_FLAGS],
    indirect=["track"],
)
def test_bad_settings_are_refused_before_anything_is_written(track, small, change, message):
    assert message in refusal(track, flags(**small | change))
    assert not Path(small["runs_dir"]).exists()


def test_a_number_of_processes_that_does_not_fit(track, small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 processes cannot divide 8 virtual ranks: use 1, 2, 4 or 8" in refusal(track, flags(**small))


def test_full_size_without_a_gpu(track, tmp_path, monkeypatch):
    """A clear message with the memory it would need and what to run instead."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    splits = {"train": unread_split(rules.OFFICIAL_TRAIN_TOKENS), "val": unread_split(10_000)}
    monkeypatch.setattr(run_session, "load_splits", lambda *args: splits)
    monkeypatch.setattr(run_session, "token_bytes", lambda *args: (None, "nowhere"))
    error = refusal(track, flags(runs_dir=tmp_path / "runs"))
    needs = {"limited": "1,444M parameters need 32 GiB", "tiny": "317M parameters need 8 GiB"}
    needs = (needs | {"two_hour": "1,444M parameters need 28 GiB"})[name_of(track)]
    assert f"{needs} per process for weights, gradients and optimizer, about" in error
    assert "this machine has" in error and "no GPU" in error and "--demo" in error
    assert not (tmp_path / "runs").exists()


# --------------------------------------------------------------------------------------------------------------- import


def test_importing_the_scripts_does_nothing(tmp_path):
    """So that tests and the referee can import them: no output, no file, no random numbers drawn."""
    modules = ", ".join((TRACKS | UNLIMITED).values())
    program = "import torch; state = torch.get_rng_state(); import {}; assert torch.equal(state, torch.get_rng_state())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", program.format(modules)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


EXPECTED = {  # parts of official plans: steps, stages, and the step that each begins with
    "limited": (2097, {"plain": 1, "replay": 1145}),
    "tiny": (2850, {"one_pass": 1, "two_passes": 1996}),
    "two_hour": (4194, {"windows_256_768": 1, "windows_768_1792": 1145, "windows_1280_2048_replay": 2480}),
}


def test_the_plan_of_the_record(track, tmp_path):
    """--plan needs neither the data nor a GPU. Where stages begin: after 1,143.75 steps, 6 x 1,525 micro-steps."""
    plan = tmp_path / "plan.json"
    with pytest.raises(SystemExit):
        track.main(flags(plan=plan, data_dir="nowhere"))
    content = json.loads(plan.read_text())
    steps, stages = EXPECTED[name_of(track)]
    assert content["num_steps"] == steps and content["dtype"] == "bfloat16" and content["assumed_data"]
    begins: dict[str, int] = {}
    for stage in content["stages"]:
        begins.setdefault(stage["stage"], stage["from_step"])
    assert begins == stages
