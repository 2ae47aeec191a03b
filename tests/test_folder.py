"""The run folder: what is complete under its name, what grows by lines, code and its hashes, locks, checkpoints."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import INSTRUMENT, ROOT

from slowrun import folder as run_folder
from slowrun.folder import (
    Lines,
    RunFolder,
    code_sha256,
    create,
    draw_curve,
    instrument_sha256,
    read_config,
    script_sha256,
    try_to_write_json,
    wandb_mode,
    write_atomically,
    write_json,
)

NO_SPACE = OSError(28, "No space left on device")


@pytest.fixture
def script(tmp_path) -> Path:
    """A script of two files, with others beside it that are not its own."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("train.py", "model.py", "prepare_data.py"):
        (folder / name).write_text(f"# {name}\n")
    return folder / "train.py"


@pytest.fixture
def folder(tmp_path, script) -> Path:
    path = tmp_path / "runs" / "run"
    create(path, script, {"track": "limited"})
    return path


@pytest.fixture
def run(folder):
    """Of the main process, open."""
    opened = RunFolder(folder, "0123abcd", is_main=True)
    opened.open()
    yield opened
    opened.close()


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_complete_or_absent(tmp_path):
    path = tmp_path / "x.json"

    def write_half(temporary: Path) -> None:
        temporary.write_text("half")
        raise NO_SPACE

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, write_half)
    assert list(tmp_path.iterdir()) == []
    write_json(path, {"a": 1})
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, write_half)
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """So that a power loss leaves no empty file under the final name."""
    order = []
    flush, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: order.append("fsync") or flush(file))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("replace") or replace(a, b))
    write_json(tmp_path / "x.json", 1)
    assert order == ["fsync", "replace"]


def test_why_a_file_could_not_be_written(tmp_path):
    assert try_to_write_json(tmp_path / "x.json", [1]) == "" and (tmp_path / "x.json").exists()
    assert "No such file" in try_to_write_json(tmp_path / "nowhere" / "x.json", [1])


class FullDisk:
    """A file that refuses every third write, as a full disk does, and takes only a part of others."""

    def __init__(self, file):
        self.file, self.calls = file, 0

    def write(self, data: bytes) -> int:
        self.calls += 1
        if self.calls % 3 == 0:
            raise NO_SPACE
        return self.file.write(data[: len(data) // 2 + 1] if self.calls % 3 == 1 else data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_lines_wait_for_space(tmp_path):
    """Nothing is lost, and nothing is written twice."""
    lines = Lines(tmp_path / "log.txt")
    lines.file = FullDisk(lines.file)
    for i in range(50):
        lines.write(f"line {i}\n")
    lines.file = lines.file.file
    lines.write("end\n")
    lines.close()
    assert (tmp_path / "log.txt").read_text() == "".join(f"line {i}\n" for i in range(50)) + "end\n"


@pytest.mark.parametrize("torn", [b"", b"0123abcd step 5/", b"half a line" + bytes(7), bytes(5)])
def test_a_torn_line_of_the_log_is_cut_off(folder, torn):
    """What a power loss leaves: a part of a line, or zeros."""
    (folder / "log.txt").write_bytes(b"0123abcd one\n0123abcd two\n" + torn)
    run = RunFolder(folder, "0123abcd", is_main=True)
    run.open()
    run.log("three")
    run.close()
    assert (folder / "log.txt").read_text() == "0123abcd one\n0123abcd two\n0123abcd three\n"


# ----------------------------------------------------------------------------------------------------------------- code


def test_code_has_all_that_a_run_needs(folder, script):
    """The script's files and the instrument, without Python's caches and without anything else."""
    code = folder / "code"
    names = {path.relative_to(code).as_posix() for path in code.rglob("*") if path.is_file()}
    assert names == {"train.py", "model.py"} | {f"slowrun/{name}.py" for name in INSTRUMENT}
    assert (code / "train.py").read_bytes() == script.read_bytes()
    for name in INSTRUMENT:
        assert (code / "slowrun" / f"{name}.py").read_bytes() == (ROOT / "slowrun" / f"{name}.py").read_bytes()


def test_a_script_of_one_file(tmp_path, script):
    script.with_name("model.py").unlink()
    create(tmp_path / "runs" / "one", script, {})
    assert {path.name for path in (tmp_path / "runs/one/code").iterdir()} == {"train.py", "slowrun"}


def test_hashes_of_code(folder, script, tmp_path):
    """Of the names and contents of all files: the same for a copy elsewhere, another after any change."""

    def sha256(*files: tuple[str, bytes]) -> str:
        lines = [f"{name}\0{hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(files)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    expected = sha256(("train.py", b"# train.py\n"), ("model.py", b"# model.py\n"))
    code = folder / "code"
    assert code_sha256(code) == script_sha256(script) == script_sha256(code / "train.py") == expected
    of_instrument = instrument_sha256()
    assert instrument_sha256(code / "slowrun") == of_instrument != expected
    assert sha256(*((p.name, p.read_bytes()) for p in (ROOT / "slowrun").glob("*.py"))) == of_instrument

    copy = shutil.copytree(code, tmp_path / "elsewhere")
    assert (code_sha256(copy), instrument_sha256(copy / "slowrun")) == (expected, of_instrument)
    for cache in (copy / "__pycache__", copy / "slowrun" / "__pycache__"):
        cache.mkdir()
        (cache / "train.pyc").write_text("made by resuming")
    assert (code_sha256(copy), instrument_sha256(copy / "slowrun")) == (expected, of_instrument)

    with open(copy / "slowrun" / "clock.py", "a") as file:
        file.write("# slower\n")
    assert code_sha256(copy) == expected and instrument_sha256(copy / "slowrun") != of_instrument
    (copy / "slowrun" / "clock.py").unlink()
    assert instrument_sha256(copy / "slowrun") != of_instrument
    for name in ("more.py", "data/more.txt"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("")
        assert code_sha256(copy) != expected
        (copy / name).unlink()
    assert code_sha256(copy) == expected
    (copy / "model.py").rename(copy / "models.py")
    assert code_sha256(copy) != expected


# ---------------------------------------------------------------------------------------------------------- run folders


def test_a_new_folder(folder):
    assert {path.name for path in folder.iterdir()} == {"config.json", "code", "checkpoints", "final"}
    assert json.loads((folder / "config.json").read_text()) == {"track": "limited"}


def test_folders_that_cannot_be_made(folder, script, tmp_path):
    with pytest.raises(ValueError) as caught:
        create(folder, script, {})
    assert str(caught.value) == f"{folder} exists: choose another --run-name, or continue it: --resume {folder}"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot make the run folder .*/file/run .*: choose another --runs-dir"):
        create(tmp_path / "file" / "run", script, {})
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ValueError, match="Permission denied"):
            create(tmp_path / "locked" / "run", script, {})


def test_configs_that_cannot_be_read(folder, tmp_path):
    def refusal() -> str:
        with pytest.raises(ValueError) as caught:
            read_config(folder)
        return str(caught.value)

    path = folder / "config.json"
    keys = ("run_id", "track", "config", "overrides", "code_sha256", "instrument_sha256", "data_sha256")
    whole = dict.fromkeys(keys, "x")
    write_json(path, whole)
    assert read_config(folder) == whole
    older = {key: value for key, value in whole.items() if key != "instrument_sha256"}
    write_json(path, older)
    assert refusal() == f"{folder} was made by an older version: resume it with {folder}/code/train.py"
    write_json(path, {"track": "limited", "instrument_sha256": "x"})
    assert "config.json is damaged (it lacks code_sha256, config," in refusal()
    for content in ("{}", '{"track": ', "[]"):
        path.write_text(content)
        assert f"{path} is damaged" in refusal()
    path.unlink()
    assert refusal() == f"{path} not found: --resume needs a run folder, such as runs/<name>"


def test_two_processes_cannot_write_to_one_folder(run):
    second = RunFolder(run.path, run.run_id, is_main=True)
    with pytest.raises(ValueError, match=f"another process is writing to {run.path}: wait for its end, or stop it"):
        second.open()
    run.log("still mine")
    assert (run.path / "log.txt").read_text() == "0123abcd still mine\n"


def test_a_disk_without_locks_is_said(folder, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    run = RunFolder(folder, "0123abcd", is_main=True)
    run.open()
    run.close()
    assert "no locks on this disk (Operation not supported): let no other process write" in capsys.readouterr().out


def test_only_the_main_process_writes(folder, capsys):
    other = RunFolder(folder, "0123abcd", is_main=False)
    other.log("x")
    other.record({"step": 1})
    other.progress(1, 2, ["train 1.0"], is_printed=True)
    other.draw_curve({})
    other.close()
    assert capsys.readouterr().out == "" and not (folder / "log.txt").exists() and not (folder / "curve.png").exists()


def test_log_and_metrics(run, folder, capsys):
    """The run's id is in front of every line of the log, and in every line of metrics; a label only on the screen."""
    run.log("one\ntwo")
    run.log("not on the screen", screen=False)
    run.progress(5, 11, ["train 3.9", "lr 1.00"], is_printed=True)
    run.progress(6, 11, ["train 3.8"], is_printed=False)
    run.label = "chain 1 | "
    run.log("labelled")
    shown = ["one", "two", "step 5/11 | train 3.9 | lr 1.00", "chain 1 | labelled"]
    assert capsys.readouterr().out.splitlines() == shown
    logged = ["one", "two", "not on the screen", "step 5/11 | train 3.9 | lr 1.00", "labelled"]
    assert (folder / "log.txt").read_text().splitlines() == [f"0123abcd {line}" for line in logged]
    run.record({"step": 3, "train_loss": 1.5})
    assert json.loads((folder / "metrics.jsonl").read_text()) == {"run": "0123abcd", "step": 3, "train_loss": 1.5}


def test_metrics_of_lost_steps_are_dropped(run, folder):
    """Those after the step that a run resumes from, readouts that will be repeated, and a line that is half written."""
    for step in (1, 2, 3):
        run.record({"step": step})
        run.record({"step": step, "readout": f"epoch_{step}"})
    run.metrics.write('{"step": 2, "tra')
    run.drop_metrics_after(2, ["epoch_1"])
    run.record({"step": 3, "again": True})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("readout")) for line in lines] == [(1, None), (1, "epoch_1"), (2, None), (3, None)]
    assert "again" in lines[-1]
    run.drop_metrics_after(-1, [])
    assert (folder / "metrics.jsonl").read_text() == ""


# ---------------------------------------------------------------------------------------------------------- checkpoints


def save(run: RunFolder, step: int) -> str:
    return run.save_checkpoint({"x": torch.full((3,), float(step))}, {"step": step, "members": []})


def test_the_last_two_checkpoints_stay(run, folder):
    assert run.load_checkpoint() is None
    for step in (3, 20, 100):
        assert save(run, step) == ""
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"step_{step:07d}.{kind}" for step in (20, 100) for kind in ("json", "pt")]
    tensors, info = run.load_checkpoint()
    assert tensors["x"].tolist() == [100.0] * 3 and info["step"] == 100
    run.drop_checkpoints(keep=1)
    assert [path.stem for path in run.checkpoints()] == ["step_0000100"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(run, folder, monkeypatch):
    """Half of it is on the disk when it is full: the half goes, and the last two complete ones stay."""
    save(run, 1), save(run, 2)

    def on_a_full_disk(content, path):
        Path(path).write_bytes(b"half")
        raise NO_SPACE

    def fail():
        raise NO_SPACE

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", on_a_full_disk)
        failure = save(run, 3)
    assert failure.startswith("OSError, [Errno 28] No space left on device (") and failure.endswith(" GiB free)")
    assert [path.stem for path in run.checkpoints()] == ["step_0000001", "step_0000002"]
    assert len(list((folder / "checkpoints").iterdir())) == 4
    with monkeypatch.context() as patch:  # the tensors find space, what says that they are complete does not
        patch.setattr(os, "replace", lambda a, b: replace(a, b) if str(b).endswith(".pt") else fail())
        assert "No space" in save(run, 3)
    assert run.load_checkpoint()[1]["step"] == 2
    assert save(run, 3) == "" and run.load_checkpoint()[1]["step"] == 3


def test_a_damaged_checkpoint_is_refused(run, folder):
    """The message names the file whose deletion lets the run go on, and from where."""

    def refusal() -> str:
        with pytest.raises(ValueError) as caught:
            run.load_checkpoint()
        return str(caught.value)

    save(run, 7)
    only = folder / "checkpoints" / "step_0000007.json"
    only.with_suffix(".pt").unlink()
    assert refusal().endswith(f"is missing or damaged: delete {only} to resume from the start")
    save(run, 7), save(run, 12)
    newest = folder / "checkpoints" / "step_0000012.json"
    content = bytearray(newest.with_suffix(".pt").read_bytes())
    content[len(content) // 2] ^= 1
    newest.with_suffix(".pt").write_bytes(content)
    path = newest.with_suffix(".pt")
    assert refusal() == f"the checkpoint {path} is missing or damaged: delete {newest} to resume from step 7"
    newest.write_bytes(newest.read_bytes()[:-9])
    assert f"{newest} is damaged" in refusal() and f"delete {newest} to resume from step 7" in refusal()
    newest.unlink()
    assert run.load_checkpoint()[1]["step"] == 7


# ---------------------------------------------------------------------------------------------------------------- curve


def record_losses(run: RunFolder, steps: int) -> None:
    for step in range(1, steps + 1):
        run.record({"step": step, "train_loss": 5.0 - step / 100})
    run.record({"step": steps, "val_loss": 4.5})


@pytest.mark.draws
def test_the_curve(run, folder):
    record_losses(run, 120)
    run.draw_curve({0: "begins", 60: "replay True"}, val_loss=4.25)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_marks_what_has_begun(run, folder, monkeypatch):
    from matplotlib.axes import Axes

    marks = []
    monkeypatch.setattr(Axes, "axvline", lambda axes, step, **style: marks.append(step))
    record_losses(run, 20)
    draw_curve(folder, {0: "from the start", 5: "begun", 19: "just begun", 20: "at the end", 30: "later"})
    assert marks == [5, 19]


def test_losses_that_are_not_finite_can_be_drawn(run, folder):
    run.record({"step": 1, "train_loss": float("nan")})
    run.draw_curve({})
    assert (folder / "curve.png").exists()


def test_a_curve_that_cannot_be_drawn_is_a_line_of_the_log(run, folder, monkeypatch):
    def fail(*args):
        raise NO_SPACE

    monkeypatch.setattr(run_folder, "draw_curve", fail)
    run.draw_curve({})
    assert "curve.png is not drawn: OSError: [Errno 28] No space left on device" in (folder / "log.txt").read_text()


# ----------------------------------------------------------------------------------------------------- Weights & Biases


@pytest.mark.parametrize(
    ("wanted", "variables", "mode"),
    [
        ("auto", {}, "off"),
        ("auto", {"WANDB_MODE": "offline"}, "off"),
        ("auto", {"WANDB_API_KEY": "x"}, "online"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}, "off"),
        ("off", {"WANDB_API_KEY": "x"}, "off"),
        ("offline", {}, "offline"),
        ("online", {}, "online"),
    ],
)
def test_the_mode_of_wandb(monkeypatch, wanted, variables, mode):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(wanted) == mode


def test_a_failure_of_wandb_matters_only_if_it_was_asked_for(run, monkeypatch):
    import wandb

    def fail(**options):
        raise RuntimeError("no network")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(ValueError, match=r"--wandb online failed \(RuntimeError: no network\): log in, or choose"):
        run.start_wandb("online", {})
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert run.start_wandb("auto", {}) == "off, since it failed (RuntimeError: no network)" and run.wandb is None


def test_what_wandb_gets(run, monkeypatch):
    """The values of a step; not those of steps that are only in metrics.jsonl."""
    logged = []

    class Wandb:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            raise RuntimeError("no network")

    run.wandb = Wandb()
    run.record({"step": 10, "train_loss": 1.5})
    run.record({"step": 11, "train_loss": 1.4}, to_wandb=False)
    assert logged == [(10, {"train_loss": 1.5})]
    run.close()  # its failure does not end the run
    assert "wandb: RuntimeError: no network" in (run.path / "log.txt").read_text()
    run.wandb = None
    run.open()
