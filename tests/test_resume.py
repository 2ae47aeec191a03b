"""Runs that are killed or stopped and resumed equal one that was not, on the same or another number of processes."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import MICRO_STEPS, NOISE, FakeTime, flags, launch, read_metrics, run_to_end, script_of, write_data


@pytest.fixture
def folder(small) -> Path:
    return Path(small["runs_dir"]) / "run"


def wait_for_steps(folder: Path, count: int, process) -> None:
    """Until metrics.jsonl has so many lines of steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_text().count('"dt_s"') >= count:
            return
        time.sleep(0.01)
    raise AssertionError("no progress")


def assert_same_losses(folder: Path, reference: Path, tolerance: float) -> None:
    (steps, validations), (expected_steps, expected_validations) = read_metrics(folder), read_metrics(reference)
    assert [line["step"] for line in steps] == [line["step"] for line in expected_steps]
    for line, expected in zip(steps, expected_steps, strict=True):
        assert line["train_loss"] == pytest.approx(expected["train_loss"], abs=tolerance), line["step"]
        for name in expected.keys() - {"run", "dt_s", "peak_memory_gib", "train_loss", "train_loss_with_mtp"}:
            assert line[name] == expected[name], name
    assert [line["step"] for line in validations] == [line["step"] for line in expected_validations]
    results = [json.loads((path / "result.json").read_text()) for path in (folder, reference)]
    for name in ("val_loss", "best_val_loss", "holdout_loss"):
        assert results[0][name] == pytest.approx(results[1][name], abs=tolerance)
    assert results[0]["readouts"] == pytest.approx(results[1]["readouts"], abs=tolerance)


def test_killed_and_resumed(track, small, folder):
    """kill -9, on limited at three moments, with all that is random on; stages begin before it and after it."""
    values = {"num_epochs": 4, "swa_epochs": 2} | NOISE[track.TRACK] | MICRO_STEPS[track.TRACK]
    assert track.main(flags(**small | values | {"run_name": "reference"})) == 0
    arguments = flags(**small | values | {"checkpoint_min": 0.0})
    for kill_after in (2, 6, 11) if track.TRACK == "limited" else (8,):  # within epochs, at the end of one
        process = launch(script_of(track), arguments)
        wait_for_steps(folder, kill_after, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (folder / "result.json").exists()
        arguments = ["--resume", str(folder)]
    output = run_to_end(script_of(track), arguments)
    assert "resumed at step" in output
    assert_same_losses(folder, folder.parent / "reference", 1e-6)
    steps, _ = read_metrics(folder)
    result = json.loads((folder / "result.json").read_text())
    assert 0 < sum(line["dt_s"] for line in steps) < result["train_time_s"] < result["wall_time_s"]


@pytest.mark.parametrize("track", ["limited"], indirect=True)  # the others' signals: test_run.py
def test_stopped_by_a_signal_and_resumed_on_two_processes(track, small, folder):
    """SIGTERM: the step is finished, all is saved, exit code 0, and the line that says how to resume is right."""
    values = {"dtype": "float64", "dropout": 0.1, "num_epochs": 3}
    assert track.main(flags(**small | values | {"run_name": "reference"})) == 0
    process = launch(script_of(track), flags(**small | values))
    wait_for_steps(folder, 4, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert f"resume with: python {process.args[1]} --resume {folder}" in output and "stopped by SIGTERM" in output
    assert not (folder / "result.json").exists()
    assert json.loads(sorted((folder / "checkpoints").glob("*.json"))[-1].read_text())["stopped_by"] == ""
    output = run_to_end(script_of(track), ["--resume", str(folder)], processes=2)
    assert "2 x CPU" in output
    assert_same_losses(folder, folder.parent / "reference", 1e-8)
    assert track.main(["--resume", str(folder)]) == 0  # finished: says so, changes nothing


def test_a_run_that_the_cap_stopped_is_not_trained_on(track, small, folder):
    """Killed between the last step and the readout: resuming reads out the same steps."""
    trainer, _ = track.set_up(flags(**small))
    FakeTime(trainer)
    object.__setattr__(trainer.config, "time_cap_min", 7.5 / 60)
    trainer.fit()
    assert trainer.stopped_by == "time_cap"
    trainer.run.close()
    assert track.main(["--resume", str(folder)]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], result["stopped_by"]) == (trainer.step, "time_cap")


@pytest.fixture
def stopped(track, small, folder) -> Path:
    """A run folder as it is after a kill: two checkpoints, no result."""
    trainer, _ = track.set_up(flags(**small))
    trainer.fit()
    trainer.run.close()
    assert len(trainer.run.checkpoints()) == 2
    return folder


def refused(track, arguments, capsys) -> str:
    capsys.readouterr()
    assert track.main(arguments) == 2
    return capsys.readouterr().err


def test_resuming_what_does_not_fit_is_refused(track, stopped, capsys, tmp_path):
    """Before anything is changed; then the run goes on. What does not change the result may change."""
    resume = ["--resume", str(stopped)]
    assert "config.json not found: --resume needs a run folder" in refused(track, ["--resume", str(tmp_path)], capsys)
    assert "other settings (n_layer 2, now 6)" in refused(track, [*resume, "--n-layer=6"], capsys)

    other = write_data(tmp_path / "other", {"val": 1700, "train": 6000, "holdout": 1500}, seed=1)
    error = refused(track, [*resume, f"--data-dir={other}"], capsys)
    assert f"{stopped} was started on other data (fineweb_train.pt was " in error

    config = (stopped / "config.json").read_text()
    saved = json.loads(config)
    del saved["instrument_sha256"]  # as folders were before there was slowrun/
    (stopped / "config.json").write_text(json.dumps(saved))
    expected = f"{stopped} was made by an older version: resume it with {stopped}/code/train.py"
    assert expected in refused(track, resume, capsys)
    (stopped / "config.json").write_text(config)

    member = stopped / "final" / "epoch_01.safetensors"
    content = member.read_bytes()
    for wrong in (content[:-1], None):
        member.unlink() if wrong is None else member.write_bytes(wrong)
        expected = "epoch_01.safetensors, of the readout, is missing or damaged"
        assert expected in refused(track, resume, capsys)
    member.write_bytes(content)
    assert track.main([*resume, "--log-every=1"]) == 0


def test_a_damaged_checkpoint_is_refused(track, stopped, capsys):
    """Without it, the run goes on from the checkpoint before."""
    older, newest = sorted((stopped / "checkpoints").glob("step_*.json"))
    step = int(older.stem[5:])
    newest.with_suffix(".pt").write_bytes(b"damaged")
    assert f"delete {newest} to resume from step {step}" in refused(track, ["--resume", str(stopped)], capsys)
    newest.unlink()
    assert track.main(["--resume", str(stopped)]) == 0
    assert f"resumed at step {step}/11" in (stopped / "log.txt").read_text()


def test_killed_before_the_first_checkpoint(track, small, folder):
    trainer, _ = track.set_up(flags(**small))
    trainer.run.record({"step": 1, "train_loss": 1.0, "dt_s": 1.0})
    trainer.run.metrics.write('{"half a line')
    trainer.run.close()
    assert track.main(["--resume", str(folder)]) == 0
    assert "no checkpoint yet: starting from step 0" in (folder / "log.txt").read_text()
    steps, _ = read_metrics(folder)
    assert [line["step"] for line in steps] == list(range(1, 12))
