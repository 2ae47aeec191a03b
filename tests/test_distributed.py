"""1, 2 and 4 processes compute the same thing (gloo, CPU)."""

import json
from pathlib import Path

import pytest
from conftest import MICRO_STEPS, NOISE, flags, launch, read_metrics, run_to_end, script_of


def losses(folder: Path) -> tuple[list[float], list[float], dict]:
    steps, validations = read_metrics(folder)
    result = json.loads((folder / "result.json").read_text())
    return [s["train_loss_with_mtp"] for s in steps], [v["val_loss"] for v in validations], result


LIMITED = pytest.mark.parametrize("track", ["limited"], indirect=True)  # enough for these


@pytest.mark.parametrize("track, processes", [("limited", 4), ("tiny", 2), ("two_hour", 2)], indirect=["track"])
def test_processes_agree(track, small, processes):
    """Whole runs in float64, with every technique on: the same losses to 1e-9, though rounding differs."""
    values = {"dtype": "float64", "eval_batch": 3} | NOISE[track.TRACK] | MICRO_STEPS[track.TRACK]
    script, runs = script_of(track), Path(small["runs_dir"])
    assert track.main(flags(**small | values | {"run_name": "one"})) == 0
    output = run_to_end(script, flags(**small | values | {"run_name": "several"}), processes)
    assert f"{processes} x CPU" in output
    (train, val, result), (train_several, val_several, result_several) = losses(runs / "one"), losses(runs / "several")
    assert train_several == pytest.approx(train, abs=1e-9)
    assert val_several == pytest.approx(val, abs=1e-9)
    for name in ("val_loss", "val_bpb", "holdout_loss", "best_val_loss"):
        assert result_several[name] == pytest.approx(result[name], abs=1e-9), name
    for name in ("val_tokens", "val_bytes", "parameters", "code_sha256", "data_sha256"):
        assert result_several[name] == result[name], name
    assert result_several["world_size"] == processes


@LIMITED
def test_processes_agree_in_float32(track, small):
    """The first steps to 1e-4, no dropout, the meta-gradient on; later ones differ by chaos, not by mathematics."""
    script, runs = script_of(track), Path(small["runs_dir"])
    assert track.main(flags(**small | {"run_name": "one", "lr_multiplier": 0.25})) == 0
    run_to_end(script, flags(**small | {"run_name": "two", "lr_multiplier": 0.25}), 2)
    (train, val, _), (train_two, val_two, _) = losses(runs / "one"), losses(runs / "two")
    assert train_two == pytest.approx(train, abs=1e-4)
    assert val_two == pytest.approx(val, abs=1e-4)


def test_a_number_of_processes_that_does_not_fit(track, small, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert track.main(flags(**small)) == 2
    assert "3 processes cannot divide 8 virtual ranks: use 1, 2, 4 or 8" in capsys.readouterr().err


@LIMITED
def test_an_error_of_the_main_process_ends_all(track, small):
    """Bad data under torchrun: one message, and no process waits for another until a timeout."""
    process = launch(script_of(track), flags(**small | {"data_dir": "nowhere"}), processes=2)
    output = process.communicate(timeout=240)[0]
    assert process.returncode != 0
    assert output.count("error: nowhere/fineweb_train.pt not found") == 1


@LIMITED
def test_a_plan_that_does_not_fit_is_refused_once(track, small):
    process = launch(script_of(track), flags(**small | {"batch_tokens": 8192}), processes=2)
    output = process.communicate(timeout=240)[0]
    assert process.returncode != 0
    assert output.count("use more data, or lower --batch-tokens") == 1
