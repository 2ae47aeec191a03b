"""Processes of torchrun: one message where something is wrong, and the first steps in float32.

What processes compute together: test_tracks.py and, by a smaller script, test_resume.py.
"""

from pathlib import Path

import pytest
import toy
from conftest import flags, launch, on_processes, read_metrics, run_main, script_of

import train


@pytest.fixture
def track():
    """Enough for these."""
    return train


def test_processes_agree_in_float32(track, small):
    """The first steps to 1e-4, no dropout, the meta-gradient on; later ones differ by chaos, not by mathematics."""
    runs = Path(small["runs_dir"])
    values = small | {"lr_multiplier": 0.25, "num_epochs": 1, "readout_epochs": 1}
    assert run_main(track, flags(**values | {"run_name": "one"})) == 0
    assert on_processes(track, flags(**values | {"run_name": "four"}), 4) == [0] * 4
    for lines, expected_lines in zip(read_metrics(runs / "four"), read_metrics(runs / "one"), strict=True):
        for line, expected in zip(lines, expected_lines, strict=True):
            for name in {"train_loss", "train_loss_with_mtp", "val_loss"} & line.keys():
                assert line[name] == pytest.approx(expected[name], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_dir": "nowhere"}, "error: nowhere/fineweb_train.pt not found"),  # found by the main process
        ({"num_epochs": 0}, "--num-epochs is 0"),  # by all, before they join
        ({"batch_tokens": 8192}, "use more data, or lower --batch-tokens"),  # by all, after it
    ],
)
def test_what_is_wrong_is_said_once(track, small, change, message):
    """Under torchrun all processes end, and none waits for another until a timeout."""
    process = launch(script_of(track), flags(**small | change), processes=2)
    output = process.communicate(timeout=240)[0]
    assert process.returncode != 0
    assert output.count(message) == 1


def test_a_finished_run_ends_all_processes(small, data_dir):
    values = {"data_dir": data_dir, "runs_dir": small["runs_dir"], "run_name": "run", "device": "cpu"}
    assert run_main(toy, flags(**values)) == 0
    assert on_processes(toy, ["--resume", str(Path(small["runs_dir"]) / "run")], 2) == [0, 0]
