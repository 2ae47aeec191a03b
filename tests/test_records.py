"""The history can be run: each published record's settings are its recipe, and all of them train at toy size."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    COMMON,
    ROOT,
    SMALL,
    V,
    fake_clock,
    flags,
    interrupt,
    name_of,
    on_processes,
    parse,
    read_metrics,
    read_result,
    run_main,
    write_data,
)

import tiny.train as tiny
import train
import two_hour.train as two_hour
import unlimited.train as unlimited
from slowrun import config as run_config
from slowrun import folder as run_folder
from slowrun.data import load_split

MODULES = {"limited": train, "tiny": tiny, "two_hour": two_hour}

# The recipes, forward: what the first record has, in all that later ones change, and what each then changes. The files
# in records/ say it backward, by what differs from the current record.
START = {
    "limited": {
        "num_epochs": 12, "micro_batch": 4, "lr_multiplier": 0.25, "matrix_lr": 0.08, "scalar_lr": 0.5,
        "embedding_lr": 0.3, "head_lr": 0.004, "weight_decay": 1.6, "decay_schedule": False, "dropout": 0.1,
        "stochastic_depth": 0.0, "warmdown": 0.5, "warmdown_shape": "linear", "logit_cap": 15.0, "mlp": "relu2",
        "value_embedding": "table", "proj_init": "zero", "u_net": False, "head_gates": False, "head_mixes": False,
        "exclusive": False, "shuffle": "none", "readout": "last", "swa_epochs": 0, "replay_from_epoch": 0,
        "replay_start": 15, "replay_end": 21, "mtp_weight": 0.0, "row_norm": False, "meta_gradient": False,
        "n_layer": 30, "n_embd": 1792, "n_head": 14, "window_pattern": "SSSL", "seed": 42, "batch_tokens": 524288,
    },
    "tiny": {
        "num_epochs": 16, "micro_batch": 16, "lr_multiplier": 1.0, "matrix_lr": 0.04, "scalar_lr": 0.25,
        "embedding_lr": 0.15, "head_lr": 0.001, "weight_decay": 0.8, "decay_schedule": False, "dropout": 0.1,
        "warmdown": 0.5, "logit_cap": 15.0, "mlp": "relu2", "u_net": False,
        "head_gates": False, "half_rotary": False, "key_offset": False, "resid_init": 1.0, "xsa_layers": 0,
        "shuffle": "micro_steps", "readout": "last", "swa_epochs": 0, "late_passes": 1, "mtp_weight_1": 0.0,
        "mtp_weight_2": 0.0, "head": "plain", "meta_gradient": False, "n_layer": 16, "n_embd": 1024, "n_head": 8,
        "window_pattern": "SSSL", "seed": 42, "batch_tokens": 524288,
    },
}  # fmt: skip
CHANGES = {
    "limited": {
        2: {"shuffle": "micro_steps"},
        3: {"value_embedding": "projection"},
        4: {"mlp": "swiglu"},
        5: {"u_net": True},
        6: {"head_gates": True},
        7: {"replay_from_epoch": 10, "replay_loops": 1, "warmdown": 0.4},
        8: {"replay_loops": 2},
        9: {"exclusive": True},
        10: {"matrix_lr": 0.04, "scalar_lr": 0.1, "embedding_lr": 0.15, "head_lr": 0.002, "warmdown": 0.2},
        11: {"exclusive": False, "readout": "ema", "replay_from_epoch": 7, "logit_cap": 10.0, "weight_decay": 1.3},
        12: {"readout": "average", "readout_epochs": 3},
        13: {"swa_epochs": 3},
        14: {"proj_init": "normal"},
        15: {"stochastic_depth": 0.05},
        16: {"mtp_weight": 0.3, "num_epochs": 11},
        17: {"head_mixes": True, "mix_lr": 0.02},
        18: {"row_norm": True},
        19: {"shuffle": "documents"},
        20: {"decay_schedule": True, "warmdown_shape": "sqrt"},
        21: {"meta_gradient": True, "meta_step": 0.5, "dropout": 0.05, "stochastic_depth": 0.0},
    },
    "tiny": {
        2: {"mlp": "swiglu"},
        3: {"u_net": True},
        4: {"head_gates": True},
        5: {"warmdown": 0.6},
        6: {"half_rotary": True, "key_offset": True, "resid_init": 1.1},
        7: {
            "decay_schedule": True, "decay_hold_epochs": 2, "decay_low_epochs": 8, "decay_low": 0.1, "decay_end": 1.25
        },
        8: {"readout": "ema", "ema_epoch_decay": 0.15, "ema_every": 10},
        9: {"micro_batch": 32, "lr_multiplier": 0.8, "swa_epochs": 4, "readout": "average", "readout_epochs": 4},
        10: {"shuffle": "documents"},
        11: {"xsa_layers": 6},
        12: {
            "late_passes": 2, "late_passes_from": 0.7, "num_epochs": 15, "warmdown": 0.4, "decay_end": 0.93,
            "xsa_layers": 0,
        },
        13: {
            "xsa_layers": -1, "mtp_weight_1": 0.5, "mtp_weight_2": 0.25, "mtp_until": 0.66, "head": "auto",
            "num_epochs": 16, "warmdown": 0.6, "decay_end": 1.25, "late_passes": 1,
        },
        14: {"num_epochs": 15, "warmdown": 0.4, "decay_end": 0.93, "late_passes": 2},
        15: {"meta_gradient": True, "meta_step": 0.5},
    },
    "two_hour": {
        2: {"head_mixes": True, "mix_lr": 0.02},
        3: {"row_norm": True},
        4: {"decay_schedule": True, "warmdown_shape": "sqrt"},
        5: {"window_schedule": "1-6:256,768;7-13:768,1792;14-22:1280,2048"},
        6: {"shuffle": "documents"},
    },
}  # fmt: skip
# What the two-hour track has had from its first record on, and has no switch for
FIXED = {
    "mlp": "swiglu", "value_embedding": "projection", "u_net": True, "head_gates": True, "proj_init": "normal",
    "exclusive": False, "readout": "average",
}  # fmt: skip
TRAINED_LONGER = {"num_epochs": 22, "replay_from_epoch": 14, "swa_epochs": 8, "readout_epochs": 11}
RECORDS = [
    (track, number) for track, last in (("limited", 21), ("tiny", 15), ("two_hour", 6)) for number in range(1, last + 1)
]
EACH = pytest.mark.parametrize(("name", "number"), RECORDS)


def recipe(name: str, number: int) -> dict:
    """All that the records of a track differ in, of one of them."""
    values = dict(START.get(name, {}))
    if name == "two_hour":  # limited 16, trained longer, with the limited track's windows
        values = recipe("limited", 16) | TRAINED_LONGER | {"window_schedule": "1-22:1024,2048"}
    for later in range(2, number + 1):
        values |= CHANGES[name][later]
    return values


def read_record(track, number: int) -> dict:
    return run_config.read_record(track.Config, ROOT / "records" / name_of(track), number)


def settings(name: str, number: int) -> dict:
    return read_record(MODULES[name], number)


@EACH
def test_settings_are_the_recipe(name, number):
    config = MODULES[name].Config(**settings(name, number))
    expected = recipe(name, number)
    found = {key: getattr(config, key) for key in expected if hasattr(config, key)}
    assert found | (FIXED if name == "two_hour" else {}) == expected
    assert all(value != getattr(MODULES[name].Config, key) for key, value in settings(name, number).items())


def test_every_setting_that_a_file_names_is_in_a_recipe():
    for name, number in RECORDS:
        assert settings(name, number).keys() <= recipe(name, number).keys(), (name, number)


def test_two_neighbours_differ_in_what_the_later_one_changed():
    """So that a reader learns the change from the difference of two short files."""
    for name, number in RECORDS:
        if number > 1:
            before, after = (
                dataclasses.asdict(MODULES[name].Config(**settings(name, n))) for n in (number - 1, number)
            )
            changed = {key for key in after if after[key] != before[key]}
            assert changed and changed <= CHANGES[name][number].keys(), (name, number, changed)


def expected_parameters(name: str, number: int) -> int:
    """Counted by the recipe, not by the model."""
    c = recipe(name, number)
    V, L, C, H, hidden = 50304, c["n_layer"], c["n_embd"], c["n_head"], {1792: 4864, 1024: 2816}[c["n_embd"]]
    mlp = 8 * C * C if c["mlp"] == "relu2" else 3 * C * hidden
    with_ve, blocks = L // 2, L
    total = 2 * V * C + 2 * L + with_ve * 32 * H
    total += with_ve * (V * C if c.get("value_embedding") == "table" else C * C) + (L // 2) * c["u_net"]
    if c.get("mtp_weight"):
        total, blocks = total + 2 * C * C, L + 1
    total += blocks * (4 * C * C + mlp + 12 * H * c["head_gates"] + 3 * H * H * c.get("head_mixes", False))
    if name == "tiny":
        total += H * (L if c["xsa_layers"] < 0 else c["xsa_layers"])
    return total


@EACH
def test_parameters_at_full_size(name, number):
    config = MODULES[name].Config(**settings(name, number))
    assert MODULES[name].count_sizes(config, torch.bfloat16).parameters == expected_parameters(name, number)


def test_the_published_sizes():
    assert [round(expected_parameters("limited", n) / 1e9, 1) for n in (1, 2, 3, 21)] == [2.7, 2.7, 1.4, 1.4]
    assert 0.3e9 < expected_parameters("tiny", 1) < 0.32e9


@pytest.fixture(scope="session")
def few_tokens(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("few"), {"val": 400, "train": 2400, "holdout": 400})


def toy_flags(name: str, number: int, data: Path, runs: Path) -> list[str]:
    """Flags that make a record a run of 4 steps. Only sizes: techniques are the record's, what it is without is off."""
    full, sizes = (
        recipe(name, number),
        {key: SMALL[name][key] for key in SMALL[name].keys() - {"weight_decay", "dropout"}},
    )
    sizes = {key: value for key, value in sizes.items() if full.get(key, True)}
    sizes |= {"data_dir": str(data), "runs_dir": str(runs), "run_name": "run", "device": "cpu", "weight_decay": 0.3}
    if name == "two_hour" and ";" not in full["window_schedule"]:
        sizes["window_schedule"] = "1-9:16,32"
    if full.get("xsa_layers", 0) > 0:
        sizes["xsa_layers"] = 1
    unused = []
    if not full["decay_schedule"]:  # their defaults do not fit, and need not
        unused = ["decay_hold_epochs", "decay_low_epochs"]
    for key in [
        "meta_gradient",
        "stochastic_depth",
        *unused,
        *(["readout_epochs"] if full["readout"] != "average" else []),
    ]:
        sizes.pop(key, None)
    return ["--record", str(number), *flags(**sizes)]


@EACH
def test_every_record_trains(name, number, few_tokens, tmp_path):
    """A few steps; the loss falls, the readout is the declared one, and the members give it again."""
    track = MODULES[name]
    assert run_main(track, toy_flags(name, number, few_tokens, tmp_path)) == 0
    steps, _ = read_metrics(tmp_path / "run")
    result = read_result(tmp_path / "run")
    losses, c = [line["train_loss"] for line in steps], recipe(name, number)
    assert len(steps) == 4 and all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.02
    saved = json.loads((tmp_path / "run/config.json").read_text())["config"]
    techniques = [key for key, value in c.items() if isinstance(value, str | bool) and key != "window_schedule"]
    numbers = ("mtp_weight", "stochastic_depth", "late_passes", "mtp_weight_1", "dropout")
    techniques = [key for key in (*techniques, *(key for key in numbers if key in c)) if key in saved]
    assert {key: saved[key] for key in techniques} == {key: c[key] for key in techniques}
    for key in {"replay_from_epoch", "swa_epochs", "xsa_layers"} & c.keys():
        assert bool(saved[key]) == bool(c[key]), key
    declared = {"average": ("probability_average", "weight_average"), "last": ("last", "last")}
    declared["ema"] = ("last_blended", "exponential_moving_average")
    assert result["val_loss"] == result["readouts"][declared[c["readout"]][name == "tiny"]]
    sequences = torch.from_numpy(load_split(str(few_tokens), "val", V, 32).sequences(33).astype(np.int64))
    probabilities = 0
    for weight, log_probs in track.load_members(tmp_path / "run", "cpu"):
        found = log_probs(sequences[:, :-1]).gather(-1, sequences[:, 1:, None])
        probabilities = probabilities + weight * found.double().exp()
    assert -probabilities.log().mean().item() == pytest.approx(result["val_loss"], abs=1e-6)


ENSEMBLES = {  # what the ensembles' records changed, from eight models of limited 2 on
    2: {"chains": 8, "cycles": 1, "cycle_epochs": 12, "selection": "uniform", "average": "logit", "teach_after": 0},
    3: {"value_embedding": "projection", "mlp": "swiglu"},
    4: {"u_net": True, "head_gates": True},
    5: {"cycle_epochs": 18},
    6: {
        "chains": 1, "cycles": 8, "members": "independent", "teach_after": 1, "teach_weight": 0.5,
        "teach_temperature": 1.0,
    },
    7: {
        "cycles": 10, "first_cycle_epochs": 18, "cycle_epochs": 24, "teach_weight": 0.7, "replay_from": 0.75,
        "replay_start": 15, "replay_end": 21, "replay_loops": 3, "leave_out_first": True,
    },
    8: {"cycles": 12, "teach_weight": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("number", ENSEMBLES)
def test_settings_of_the_ensembles_are_the_recipe(number):
    config, schedules = unlimited.Config(**read_record(unlimited, number)), ("warmdown", "warmdown_shape", "readout")
    expected = {key: value for key, value in recipe("limited", 2).items() if hasattr(config, key)}
    expected = {key: value for key, value in expected.items() if key not in (*schedules, "replay_start", "replay_end")}
    expected |= {"outer_batch_tokens": 524288, "clip": 0.0, "warmdown": 0.5, "lr_low": 0.0, "decay_low": 1.0}
    expected["replay_from"] = 1.0
    for later in range(2, number + 1):
        expected |= ENSEMBLES[later]
    assert {key: getattr(config, key) for key in expected} == expected
    assert read_record(unlimited, 12) == {}


def test_a_record_of_ensembles_trains(few_tokens, tmp_path):
    """The last whose settings this script has: a chain of taught models, the first left out, logits averaged."""
    sizes = {key: SMALL["unlimited"][key] for key in COMMON.keys() & SMALL["unlimited"].keys() - {"dropout"}}
    sizes |= {"replay_start": 1, "replay_end": 2, "cycles": 3, "cycle_epochs": 1, "first_cycle_epochs": 1}
    sizes |= {"outer_batch_tokens": 1024, "fitness_tokens": 300, "data_dir": str(few_tokens), "runs_dir": str(tmp_path)}
    assert run_main(unlimited, ["--record=8", "--run-name=run", "--device=cpu", *flags(**sizes)]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["candidates"], result["mixing"], result["leave_out_first"]) == (2, "logit", True)
    assert result["val_loss"] == result["readouts"]["logit_average"] < math.log(V)


def small_flags(data_dir: Path, runs: Path, name: str, **changes) -> list[str]:
    """Flags of a small run of the limited track that reads out the moving average of its weights."""
    values = {"data_dir": str(data_dir), "runs_dir": str(runs), "run_name": name, "readout": "ema", "device": "cpu"}
    return flags(**SMALL["limited"] | values | changes)


def test_a_run_that_ends_before_its_average_begins(data_dir, tmp_path):
    with fake_clock(train):
        assert run_main(train, small_flags(data_dir, tmp_path, "run", time_cap_min=7.5 / 60)) == 0
    result = read_result(tmp_path / "run")
    assert (result["stopped_by"], result["steps"]) == ("time_cap", 7)
    assert "the last weights are read out" in (tmp_path / "run/log.txt").read_text()
    cut_short = next(loss for name, loss in result["readouts"].items() if name.endswith("_cut_short"))
    assert result["readouts"]["last_blended"] == pytest.approx(cut_short, abs=1e-6)


def test_an_average_survives_a_resume(data_dir, tmp_path):
    """Of 11 steps, the average begins after 10."""
    assert run_main(train, small_flags(data_dir, tmp_path, "whole")) == 0
    with interrupt(train, "step", 10):
        assert run_main(train, small_flags(data_dir, tmp_path, "run")) == 0
    assert not (tmp_path / "run/result.json").exists()
    assert run_main(train, ["--resume", str(tmp_path / "run")]) == 0
    whole, resumed = (read_result(tmp_path / run) for run in ("whole", "run"))
    assert resumed["readouts"] == whole["readouts"] and "last_blended" in whole["readouts"]


@pytest.mark.parametrize("name", [*MODULES, "unlimited"])
def test_toy_sizes_leave_a_records_techniques(name):
    """Every record's demo can be built, has what the record has, and differs from the one before, but for a length."""
    track, before = (MODULES | {"unlimited": unlimited})[name], None
    numbers = [n for of, n in RECORDS if of == name] or [*ENSEMBLES, 12]
    for number in numbers:
        config = track.Config(**parse(track, [f"--record={number}", "--demo"]))
        assert (config.n_embd, config.sequence_len, config.eval_initial) == (
            64,
            128,
            track.DEMO.get("eval_initial", False),
        )
        full = track.Config(**read_record(track, number))
        for key, value in dataclasses.asdict(full).items():
            if isinstance(value, str | bool) and key not in {*track.DEMO, "window_schedule"}:
                assert getattr(config, key) == value, key
        for key in ("replay_from_epoch", "swa_epochs", "teach_after", "replay_loops", "xsa_layers", "stochastic_depth"):
            assert bool(getattr(config, key, 0)) == bool(getattr(full, key, 0)), key
        assert config != before or (name, number) == ("unlimited", 5), number
        before = config


def test_flags_and_toy_sizes_come_before_a_records_settings():
    config = train.Config(**parse(train, ["--record=7", "--demo", "--warmdown=0.3"]))
    assert (config.n_embd, config.num_epochs) == (train.DEMO["n_embd"], train.DEMO["num_epochs"])
    assert (config.warmdown, config.logit_cap, config.head_gates, config.head_mixes) == (0.3, 15.0, True, False)
    assert (config.replay_from_epoch, config.stochastic_depth, config.swa_epochs) == (4, 0.0, 0)
    early = train.Config(**parse(train, ["--record=3", "--demo"]))
    assert (early.replay_from_epoch, early.mlp, early.readout) == (0, "relu2", "last")


def test_a_record_trains_on_two_processes_as_on_one(few_tokens, tmp_path):
    """The oldest, whose tables are sharded and whose order is fixed, with a sharded average."""
    arguments = [*toy_flags("limited", 1, few_tokens, tmp_path), "--dtype=float64", "--readout=ema", "--num-epochs=4"]
    assert run_main(train, [*arguments, "--run-name=one"]) == 0
    assert on_processes(train, [*arguments, "--run-name=two"], 2) == [0, 0]
    one, two = ([line["train_loss"] for line in read_metrics(tmp_path / run)[0]] for run in ("one", "two"))
    assert len(one) == 8 and one == pytest.approx(two, abs=1e-9)
    one, two = (read_result(tmp_path / run)["readouts"] for run in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-9) and one["last_blended"] != one["epoch_4"]


@pytest.mark.parametrize("name", ["limited", "tiny"])
def test_a_result_of_an_average_that_could_not_be_saved(name, few_tokens, tmp_path, monkeypatch):
    """The disk is full when all is done: resuming reads out the same weights."""
    track, honest = MODULES[name], run_folder.write_json

    def fail_once(path, content) -> None:
        if path.name == "result.json":
            monkeypatch.setattr(run_folder, "write_json", honest)
            raise OSError("No space left on device")
        honest(path, content)

    number = {"limited": 11, "tiny": 8}[name]
    arguments = toy_flags(name, number, few_tokens, tmp_path)
    assert run_main(track, [*arguments, "--run-name=whole"]) == 0
    monkeypatch.setattr(run_folder, "write_json", fail_once)
    assert run_main(track, arguments) == 1 and not (tmp_path / "run/result.json").exists()
    assert run_main(track, ["--resume", str(tmp_path / "run")]) == 0
    whole, resumed = (read_result(tmp_path / run) for run in ("whole", "run"))
    assert resumed["readouts"] == pytest.approx(whole["readouts"], abs=1e-6)
    assert len(list((tmp_path / "run/final").glob("*.safetensors"))) == 1


def test_settings_files_have_no_gaps():
    for name in (*MODULES, "unlimited"):
        entries = json.loads((ROOT / "records" / name / "records.json").read_text())["records"]
        published = [entry["number"] for entry in entries if entry["kind"] == "published"]
        files = sorted(Path(ROOT / "records" / name).glob("[0-9][0-9]-*.json"))
        numbers = [int(path.name[:2]) for path in files]
        assert numbers == (published if name != "unlimited" else [*ENSEMBLES, 12]), name
        for path, number in zip(files, numbers, strict=True):
            content = json.loads(path.read_text())
            assert content.keys() == {"record", "change", "settings", "assumed"}
            assert (content["record"], content["change"]) == (number, entries[number - 1]["change"])
