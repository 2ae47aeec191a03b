"""Runs of toy.py that are killed or stopped and resumed equal one that was not; what does not fit is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy
from conftest import (
    assert_agree,
    assert_same_outcome,
    flags,
    interrupt,
    launch,
    on_processes,
    read_metrics,
    read_result,
    refusal,
    run_main,
    write_data,
)

from slowrun.folder import instrument_sha256

SCRIPT = "tests/toy.py"


@pytest.fixture
def paths(data_dir, tmp_path) -> dict:
    """Flags of a run of 11 steps, two epochs of 5.5 steps."""
    return {"data_dir": str(data_dir), "runs_dir": str(tmp_path / "runs"), "run_name": "run", "device": "cpu"}


@pytest.fixture
def folder(paths) -> Path:
    return Path(paths["runs_dir"]) / "run"


@pytest.fixture
def reference(paths) -> Path:
    """A run that nothing stopped."""
    assert run_main(toy, flags(**paths | {"run_name": "reference"})) == 0
    return Path(paths["runs_dir"]) / "reference"


@pytest.fixture
def stopped(paths, folder) -> Path:
    """A run folder with checkpoints at steps 6 and 8."""
    with interrupt(toy, "step", 8):
        assert run_main(toy, flags(**paths)) == 0
    assert [path.stem for path in checkpoints(folder)] == ["step_0000006", "step_0000008"]
    return folder


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("*.json"))


def resume(folder: Path, **changes) -> int:
    return run_main(toy, ["--resume", str(folder), *flags(**changes)])


# ---------------------------------------------------------------------------------------------------- stopped or killed


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("warm_up", 1),
        ("step", 3),
        ("step", 6),
        ("scorer", 1),
        ("step", 11),
        ("scorer", 2),
        ("scorer", 3),
        ("scorer", 4),
    ],
)
def test_stopped_and_resumed(paths, folder, reference, method, count):
    """In the warm-up, a step, the last one of an epoch, the validations, and the readout."""
    with interrupt(toy, method, count):
        assert run_main(toy, flags(**paths)) == 0
    assert resume(folder) == 0
    assert_same_outcome(folder, reference)


def test_stopped_twice_at_one_step(paths, folder, reference):
    """And in the validation there, and where the run goes on."""
    with interrupt(toy, "step", 6):
        assert run_main(toy, flags(**paths)) == 0
    for method, count in (("warm_up", 1), ("warm_up", 1), ("step", 1), ("scorer", 1)):
        with interrupt(toy, method, count):
            assert resume(folder) == 0
    assert resume(folder) == 0
    assert_same_outcome(folder, reference)


def test_killed_and_resumed(paths, folder, reference):
    """kill -9 before the first checkpoint, within an epoch, and right after its end."""
    arguments = flags(**paths)
    for kill_at in (4, 9):
        assert on_processes(toy, arguments, kill_at=kill_at) == [-signal.SIGKILL]
        assert not (folder / "result.json").exists()
        arguments = ["--resume", str(folder)]
    assert [path.stem for path in checkpoints(folder)] == ["step_0000006"]
    assert resume(folder) == 0
    assert_same_outcome(folder, reference)
    log = (folder / "log.txt").read_text()
    assert "no checkpoint yet: starting from step 0" in log and "resumed at step 6/11" in log


def test_what_a_power_loss_tore_is_dropped(stopped, reference):
    for name in ("log.txt", "metrics.jsonl"):
        with open(stopped / name, "a") as file:
            file.write('{"half a line')
    assert resume(stopped) == 0
    assert_same_outcome(stopped, reference)
    assert "half a line" not in (stopped / "log.txt").read_text()


def test_times_are_those_of_the_whole_run(stopped):
    """The clock and the wall go on from where they were, and what was lost is not counted twice."""
    info = json.loads(checkpoints(stopped)[-1].read_text())
    info |= {"train_time_s": 1000.0, "wall_time_s": 5000.0}
    checkpoints(stopped)[-1].write_text(json.dumps(info))
    assert resume(stopped) == 0
    result = read_result(stopped)
    assert 1000.0 < result["train_time_s"] < 5000.0 < result["wall_time_s"]


def test_the_number_of_processes_may_change(paths, folder, reference):
    """Stopped alone, killed on two, finished on four."""
    with interrupt(toy, "step", 3):
        assert run_main(toy, flags(**paths)) == 0
    assert on_processes(toy, ["--resume", str(folder)], 2, kill_at=5) == [-signal.SIGKILL] * 2
    assert [path.stem for path in checkpoints(folder)] == ["step_0000003", "step_0000006"]
    assert on_processes(toy, ["--resume", str(folder)], 4) == [0] * 4
    assert_agree(folder, reference)
    assert read_result(folder)["world_size"] == 4


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen) -> None:
    """Until metrics.jsonl has so many lines of steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        if (folder / "metrics.jsonl").exists() and len(read_metrics(folder)[0]) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("no progress")


def test_torchrun_is_stopped_from_outside_and_its_line_resumes_the_run(paths, folder):
    """SIGTERM to torchrun, which passes it on: exit code 0 of the processes, and a line that is right."""
    arguments = flags(**paths | {"num_epochs": 4000, "time_cap_min": 0.0})
    process = launch(SCRIPT, arguments, processes=2)
    wait_for_steps(folder, 4, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=240)[0]
    assert "stopped by SIGTERM after step " in output and output.count("resume with: ") == 1
    script = process.args[-len(arguments) - 1]
    command = f"torchrun --standalone --nproc_per_node=2 {script} --resume {folder}"
    assert f"resume with: {command}" in output and not (folder / "result.json").exists()
    assert checkpoints(folder)


def test_a_copy_of_a_run_folder_resumes_anywhere(paths, stopped, reference, tmp_path):
    """Outside of any checkout, by its own code/."""
    copy = shutil.copytree(stopped, tmp_path / "elsewhere" / "copy")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, str(copy / "code" / "toy.py"), "--resume", str(copy)]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed at step 8/" in done.stdout
    assert_same_outcome(copy, reference)
    assert instrument_sha256(copy / "code" / "slowrun") == instrument_sha256()  # the code is as it was


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(folder: Path, *arguments: str, script=toy) -> str:
    """Why a resume is refused; nothing may have changed by it."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    error = refusal(script, ["--resume", str(folder), *arguments])
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    before.pop(folder / "log.txt", None), after.pop(folder / "log.txt", None)  # has the header of the attempt
    assert after == before
    return error


def test_resuming_with_other_settings_is_refused(stopped, tmp_path, reference):
    """Those that do not change the result may change."""
    assert "config.json not found: --resume needs a run folder" in refusal(toy, ["--resume", str(tmp_path)])
    assert "other settings (num_epochs 2, now 3)" in refused(stopped, "--num-epochs=3")
    assert "--log-every is 0: it must be at least 1" in refused(stopped, "--log-every=0")
    assert resume(stopped, log_every=1, checkpoint_min=0.0, eval_batch=3, profile_steps="10-10") == 0
    assert_agree(stopped, reference)
    assert (stopped / "profile_10-10.txt").exists()


def test_resuming_on_other_data_is_refused(stopped, tmp_path, data_dir, reference):
    other = write_data(tmp_path / "other", {"val": 1700, "train": 6000, "holdout": 1500}, seed=1)
    error = refused(stopped, f"--data-dir={other}")
    assert f"{stopped} was started on other data (fineweb_train.pt was " in error
    moved = shutil.copytree(data_dir, tmp_path / "moved")
    assert resume(stopped, data_dir=moved) == 0
    assert_same_outcome(stopped, reference)


def change_config(folder: Path, **changes) -> None:
    saved = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in saved.items() if value is not None}))


def test_resuming_by_other_code_is_refused(stopped):
    """The script's, the instrument's, another track's, or an older one with other settings; each says what resumes."""
    config = (stopped / "config.json").read_text()
    settings = json.loads(config)["config"]
    advice = f"resume it with {stopped}/code/toy.py"
    another = f"{stopped} is a run of the tiny track: resume it with that track's train.py"
    older = f"{stopped} was made by an older version: resume it with {stopped}/code/train.py"
    for changes, expected in (
        ({"code_sha256": "0" * 64}, f"the script changed since {stopped} was started: {advice}"),
        ({"code_sha256": "0" * 64, "config": settings | {"of_yesterday": 1}}, f"the script changed since {stopped}"),
        ({"instrument_sha256": "0" * 64}, f"slowrun/ changed since {stopped} was started: {advice}"),
        ({"track": "tiny", "config": settings | {"late_passes": 1}}, another),
        ({"instrument_sha256": None}, older),
    ):
        change_config(stopped, **changes)
        assert expected in refused(stopped)
        (stopped / "config.json").write_text(config)
    assert resume(stopped) == 0


def test_damaged_members_are_refused(stopped, reference):
    member = stopped / "final" / "epoch_01.safetensors"
    content = member.read_bytes()
    for wrong in (content[:-1], None):
        member.unlink() if wrong is None else member.write_bytes(wrong)
        assert "epoch_01.safetensors, of the readout, is missing or damaged" in refused(stopped)
    member.write_bytes(content)
    assert resume(stopped) == 0
    assert_same_outcome(stopped, reference)


def test_a_damaged_checkpoint_is_refused(stopped, reference):
    """Without it, the run goes on from the checkpoint before; without any, from the start."""
    newest = checkpoints(stopped)[-1]
    newest.with_suffix(".pt").write_bytes(b"damaged")
    assert f"delete {newest} to resume from step 6" in refused(stopped)
    newest.unlink()
    assert resume(stopped) == 0
    assert "resumed at step 6/11" in (stopped / "log.txt").read_text()
    assert_same_outcome(stopped, reference)


def test_with_no_checkpoint_left_a_run_begins_anew(stopped, reference):
    shutil.rmtree(stopped / "checkpoints")
    (stopped / "checkpoints").mkdir()
    assert resume(stopped) == 0
    assert "no checkpoint yet: starting from step 0" in (stopped / "log.txt").read_text()
    assert_same_outcome(stopped, reference)
