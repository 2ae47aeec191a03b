"""Whole runs of a session, by the script in toy.py: folder, clock, cap, signals, full disks, losses, plans, exit codes.

What is stopped and resumed: test_resume.py. Runs of the tracks' own scripts: test_tracks.py.
"""

import gzip
import json
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from conftest import (
    INSTRUMENT,
    assert_same_outcome,
    fake_clock,
    flags,
    interrupt,
    on_call,
    read_metrics,
    read_result,
    refusal,
    run_main,
    write_data,
)

from slowrun import folder as run_folder
from slowrun import machine, rules
from slowrun import session as run_session
from slowrun.data import sha256_file
from slowrun.folder import instrument_sha256, script_sha256
from slowrun.session import Session


@pytest.fixture
def paths(data_dir, tmp_path) -> dict:
    """Flags of a run of 11 steps, two epochs of 5.5 steps."""
    return {"data_dir": str(data_dir), "runs_dir": str(tmp_path / "runs"), "run_name": "run", "device": "cpu"}


@pytest.fixture
def folder(paths) -> Path:
    return Path(paths["runs_dir"]) / "run"


def run(paths: dict, **changes) -> int:
    return run_main(toy, flags(**paths | changes))


def read_checkpoints(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((folder / "checkpoints").glob("*.json"))]


# ----------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.draws
def test_what_a_run_leaves(paths, folder, capsys):
    assert run(paths) == 0
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    code = {"code/toy.py"} | {f"code/slowrun/{name}.py" for name in INSTRUMENT}
    final = {"final/members.json", "final/epoch_01.safetensors", "final/epoch_02.safetensors"}
    assert names == {"config.json", "log.txt", "metrics.jsonl", "curve.png", "result.json"} | code | final
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")

    saved = json.loads((folder / "config.json").read_text())
    assert saved["track"] == "limited" and saved["overrides"] == paths
    assert toy.Config(**saved["config"]) == toy.Config(**paths)
    assert (saved["code_sha256"], saved["instrument_sha256"]) == (
        script_sha256(Path(toy.__file__)),
        instrument_sha256(),
    )

    log = (folder / "log.txt").read_text().splitlines()
    assert all(line.startswith(saved["run_id"] + " ") for line in log)
    printed = capsys.readouterr().out
    assert [line.removeprefix(saved["run_id"] + " ") for line in log] == printed.splitlines()


def test_the_header(paths, folder, capsys):
    assert run(paths) == 0
    saved = json.loads((folder / "config.json").read_text())
    title, *lines = capsys.readouterr().out.splitlines()[:12]
    assert title == "NanoGPT Slowrun, limited track"
    header = {line[:10].strip(): line[10:] for line in lines}
    assert header["run"] == f"{folder}, id {saved['run_id']}, wandb off"
    assert header["settings"] == ", ".join(f"{name} {value}" for name, value in saved["overrides"].items())
    assert f"torch {torch.__version__}" in header["versions"]
    assert header["device"].startswith("1 x CPU (") and ", float32, not compiled, " in header["device"]
    assert header["kernels"].startswith("attention none")
    assert f" GiB in {folder} (weights for the readout, 2 x " in header["disk"]
    assert "train 6,000, val 1,700, holdout 1,500 tokens" in header["data"]
    assert header["data"].endswith("bytes of tokens from meta.json")
    assert header["model"] == "97 parameters"
    assert header["plan"] == "11 steps of 1,024 tokens, 2 epochs, cap 60 min"
    assert header["stages"] == "from step 1: early; from step 7: late"


def test_log_and_metrics(paths, folder, capsys):
    assert run(paths) == 0
    printed = capsys.readouterr().out
    for line in (
        "warm-up ",
        "step 5/11 | train ",
        "step 10/11 | train ",
        "step 11/11 | train ",
        "from step 7 on: late",
    ):
        assert line in printed
    assert "step 6/11 | train" not in printed and " | eta " in printed and " s/step" in printed
    steps, validations = read_metrics(folder)
    result = read_result(folder)
    assert [line["step"] for line in steps] == list(range(1, 12))
    assert {line["run"] for line in steps + validations} == {result["run_id"]}
    assert [line["tokens"] for line in steps] == [1024 * i for i in range(1, 12)]
    assert [line["epoch"] for line in steps] == [1] * 6 + [2] * 5
    assert [line["late"] for line in steps] == [False] * 6 + [True] * 5
    assert [line["lr"] for line in steps] == [5.0 * (1 - step / 11) for step in range(11)]
    assert 0 < sum(line["dt_s"] for line in steps) < result["train_time_s"] < result["wall_time_s"]
    assert [(line["step"], line["epoch"], line["readout"]) for line in validations] == [
        (6, 1, "epoch_1"),
        (11, 2, "epoch_2"),
    ]
    assert [line["val_loss"] for line in validations] == [result["readouts"][f"epoch_{i}"] for i in (1, 2)]
    assert steps[-1]["train_loss"] < steps[0]["train_loss"]


def test_the_result(paths, folder, capsys):
    assert run(paths, eval_initial=True) == 0
    result = read_result(folder)
    of_the_benchmark = (
        "track status stopped_by eligible not_eligible_because val_loss val_bpb best_val_loss readouts holdout_loss "
        "data_efficiency steps tokens epochs train_time_s wall_time_s time_cap_min seed world_size device torch cuda "
        "peak_memory_gib tokens_per_s mfu data_sha256 code_sha256 instrument_sha256 final_sha256 parameters val_tokens "
        "val_bytes"
    )
    assert result.keys() >= set(of_the_benchmark.split())
    assert (result["status"], result["stopped_by"]) == ("finished", "steps")
    assert (result["steps"], result["tokens"], result["epochs"]) == (11, 11264, 2)
    assert (result["world_size"], result["dtype"], result["compiled"]) == (1, "float32", False)
    assert list(result["readouts"]) == ["epoch_1", "epoch_2", "probability_average", "weight_average"]  # not initial
    assert result["val_loss"] == result["readouts"]["weight_average"]
    assert result["best_val_loss"] == min(result["readouts"].values())
    assert result["val_tokens"] == 51 * 32 and 0 < result["val_bpb"] < result["val_loss"]
    assert result["holdout_loss"] not in (None, result["val_loss"])
    assert not result["eligible"] and "the data are not the official files" in result["not_eligible_because"]
    assert result["data_efficiency"] is None and result["attention"] == "none"
    assert result["final_sha256"] == {path.name: sha256_file(path) for path in (folder / "final").iterdir()}
    members = json.loads((folder / "final" / "members.json").read_text())
    assert (members["mixing"], members["stage"]) == ("weight", {"late": True})
    assert [(m["name"], m["epoch"], m["step"], m["weight"]) for m in members["members"]] == [
        ("epoch_01", 1, 6, 0.5),
        ("epoch_02", 2, 11, 0.5),
    ]
    printed = capsys.readouterr().out
    assert f"val_loss   {result['val_loss']:.4f} (weight-averaged)" in printed
    assert f"holdout    {result['holdout_loss']:.4f}" in printed and "record     not eligible: " in printed


def test_data_without_a_holdout(paths, tmp_path, folder):
    data = write_data(tmp_path / "two splits", {"val": 500, "train": 2700})
    assert run(paths, data_dir=data) == 0
    assert read_result(folder)["holdout_loss"] is None


# -------------------------------------------------------------------------------------------------------- clock and cap


def test_what_the_clock_counts(paths, folder):
    """Steps, and what the script does between two calls; neither validation, nor checkpoints, nor the readout."""
    with fake_clock(toy, scorer_s=10.0):
        assert run(paths, checkpoint_min=0.0, eval_initial=True) == 0
    assert read_result(folder)["train_time_s"] == 11 * 1.0 + 2 * 10.0  # two ends of epochs
    steps, _ = read_metrics(folder)
    assert [line["dt_s"] for line in steps] == [1.0] * 11


@pytest.mark.parametrize(
    ("cap_s", "steps", "readouts", "members"),
    [
        (3.5, 3, ["epoch_1_cut_short"], ["epoch_01"]),
        (6.5, 6, ["epoch_1"], ["epoch_01"]),
        (7.0, 7, ["epoch_1", "epoch_2_cut_short"], ["epoch_01", "epoch_02"]),  # a step that ends on the cap is taken
        (7.5, 7, ["epoch_1", "epoch_2_cut_short"], ["epoch_01", "epoch_02"]),
    ],
)
def test_the_cap(paths, folder, cap_s, steps, readouts, members):
    """Before the first member, at an epoch's end, in the middle of the last epoch."""
    with fake_clock(toy):
        assert run(paths, time_cap_min=cap_s / 60) == 0
    result = read_result(folder)
    assert (result["status"], result["stopped_by"], result["steps"]) == ("finished", "time_cap", steps)
    assert result["train_time_s"] == steps
    assert list(result["readouts"]) == [*readouts, "probability_average", "weight_average"]
    kept = json.loads((folder / "final" / "members.json").read_text())["members"]
    assert [member["name"] for member in kept] == members and kept[-1]["step"] == steps


def test_the_cap_survives_a_signal_in_the_validation_after_it(paths, folder):
    with fake_clock(toy):
        assert run(paths, time_cap_min=7.5 / 60, run_name="reference") == 0
        with interrupt(toy, "scorer", 2):
            assert run(paths, time_cap_min=7.5 / 60) == 0
    assert [info["stopped_by"] for info in read_checkpoints(folder)] == ["", "time_cap"]
    assert run_main(toy, ["--resume", str(folder)]) == 0  # by a real clock, which would allow all steps
    assert_same_outcome(folder, folder.with_name("reference"))


def test_without_a_cap(paths, folder, capsys):
    with fake_clock(toy):
        assert run(paths, time_cap_min=0) == 0
    printed = capsys.readouterr().out
    assert "epochs, no cap (not eligible)" in printed and "cap lifted" in printed and "WARNING" not in printed
    assert "the cap of 60 min is lifted" in read_result(folder)["not_eligible_because"]


def test_the_projection_warns_of_the_cap(paths, capsys):
    """After ten steps of a second: twelve are left."""
    with fake_clock(toy):
        assert run(paths, num_epochs=4, time_cap_min=15 / 60) == 0
    printed = capsys.readouterr().out
    assert "projected training time 22s, cap 0.25 min" in printed
    assert "WARNING: training will stop early, at the cap; --time-cap-min 0 lifts it" in printed


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("method", "count", "step"),
    [("warm_up", 1, 0), ("step", 3, 3), ("step", 6, 6), ("scorer", 1, 6), ("scorer", 2, 11), ("scorer", 4, 11)],
)
def test_a_signal_stops_the_run(paths, folder, capsys, method, count, step):
    """In the warm-up, in a step, in the last one of an epoch, in a validation, in the last one, and in the readout."""
    with interrupt(toy, method, count):
        assert run(paths) == 0
    command = f"python {sys.argv[0]} --resume {folder}"
    assert f"stopped by SIGTERM after step {step}; resume with: {command}" in capsys.readouterr().out
    assert not (folder / "result.json").exists()
    steps, validations = read_metrics(folder)
    assert len(steps) == step == read_checkpoints(folder)[-1]["step"]
    done = {("scorer", 2): 1, ("scorer", 4): 2}.get((method, count), 0)
    assert len(validations) == done == len(read_checkpoints(folder)[-1]["scores"])


@contextmanager
def signal_while_the_holdout_is_scored() -> Iterator[None]:
    score = Session._score

    def interrupted(run, split, losses):
        if split == "holdout":
            signal.raise_signal(signal.SIGINT)
        return score(run, split, losses)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "_score", interrupted)
        yield


def test_a_signal_while_the_holdout_is_scored(paths, folder):
    """What was read out before is kept."""
    with signal_while_the_holdout_is_scored():
        assert run(paths) == 0
    assert not (folder / "result.json").exists() and len(read_checkpoints(folder)[-1]["scores"]) == 4
    with interrupt(toy, "step", 1):  # no step is left
        assert run_main(toy, ["--resume", str(folder)]) == 0
    assert read_result(folder)["steps"] == 11


def test_a_second_signal(paths):
    """Soon after the first it is the same stop, from a scheduler and from torchrun; later it ends the process."""
    ended = []
    send = signal.raise_signal

    def send_three():
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        later = time.monotonic() + 6
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: later)
            patch.setattr(signal, "raise_signal", ended.append)
            send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    with on_call(toy.Training, "step", 3, send_three):
        assert run(paths) == 0
    assert ended == [signal.SIGTERM]


def test_handlers_are_put_back(paths):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert run(paths) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# ---------------------------------------------------------------------------------------------------------- full disks


def fill_disk(patch: pytest.MonkeyPatch, owner, name: str, is_full) -> None:
    """Let a function that writes fail, as on a full disk, when is_full(*its arguments)."""
    write = getattr(owner, name)

    def on_a_full_disk(*args):
        if is_full(*args):
            raise OSError(28, "No space left on device")
        return write(*args)

    patch.setattr(owner, name, on_a_full_disk)


def test_a_full_disk_at_a_checkpoint_does_not_end_the_run(paths, folder, capsys):
    """From step 8 on no checkpoint can be written: a line says so, the older ones stay, the result is complete."""
    with pytest.MonkeyPatch.context() as patch, interrupt(toy, "scorer", 2):
        fill_disk(patch, torch, "save", lambda content, path: int(path.name[5:12]) >= 8)
        assert run(paths, checkpoint_min=0.0) == 1  # stopped, and not saved
    assert [info["step"] for info in read_checkpoints(folder)] == [6, 7]
    assert not list((folder / "checkpoints").glob("*.tmp"))
    printed = capsys.readouterr().out
    assert "checkpoint at step 8 NOT saved: OSError, [Errno 28] No space left on device" in printed
    assert "GiB free). The run continues, and earlier checkpoints stay" in printed
    assert run_main(toy, ["--resume", str(folder)]) == 0
    assert "resumed at step 7/11" in capsys.readouterr().out and read_result(folder)["steps"] == 11


def test_a_signal_after_a_checkpoint_that_failed(paths, folder):
    """The newest checkpoint is of an earlier step when the holdout is scored, and the exit code says so."""
    with signal_while_the_holdout_is_scored(), pytest.MonkeyPatch.context() as patch:
        fill_disk(patch, torch, "save", lambda content, path: int(path.name[5:12]) == 11)
        assert run(paths) == 1
    assert not (folder / "result.json").exists() and read_checkpoints(folder)[-1]["step"] == 6
    assert run_main(toy, ["--resume", str(folder)]) == 0
    assert read_result(folder)["steps"] == 11


def test_members_wait_in_memory_for_space(paths, folder, capsys):
    """The disk is full at the end of the first epoch and has space again at that of the second: nothing is lost."""
    assert run(paths, run_name="reference") == 0
    waited = []
    with pytest.MonkeyPatch.context() as patch:
        is_full = lambda weights, path: "epoch_01" in path.name and len(waited) < 3 and not waited.append(path)  # noqa: E731
        fill_disk(patch, run_session, "save_file", is_full)
        assert run(paths, checkpoint_min=0.0) == 0
    assert len(waited) == 3
    printed = capsys.readouterr().out
    assert "epoch_01.safetensors: [Errno 28] No space left on device. It waits in memory" in printed
    assert "checkpoint at step 7 NOT saved: final/epoch_01" in printed  # it would be one without the member
    assert_same_outcome(folder, folder.with_name("reference"))


def test_a_readout_from_members_in_memory(paths, folder):
    """The disk is full until the older checkpoint makes room."""
    assert run(paths, run_name="reference") == 0
    with pytest.MonkeyPatch.context() as patch:
        is_full = lambda weights, path: "epoch_02" in path.name and len(read_checkpoints(folder)) > 1  # noqa: E731
        fill_disk(patch, run_session, "save_file", is_full)
        assert run(paths) == 0
    assert_same_outcome(folder, folder.with_name("reference"))


@pytest.mark.parametrize("name", ["save_file", "result.json", "members.json"])
def test_a_result_that_cannot_be_saved_can_be_resumed(paths, folder, capsys, name):
    """The disk has no space for the members, or for what says that the run has finished: the loss is printed."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "save_file":
            fill_disk(patch, run_session, "save_file", lambda *args: True)
        else:
            fill_disk(patch, run_folder, "write_json", lambda path, content: path.name == name)
        assert run(paths) == 1
    printed = capsys.readouterr().out
    assert "val_loss " in printed and f"make space, then continue with --resume {folder}" in printed
    assert not (folder / "result.json").exists()
    assert run_main(toy, ["--resume", str(folder)]) == 0
    result = read_result(folder)
    assert result["steps"] == 11
    assert set(result["final_sha256"]) == {"epoch_01.safetensors", "epoch_02.safetensors", "members.json"}


# -------------------------------------------------------------------------------------------- what a run needs, refused


def test_a_disk_that_is_too_small_is_refused(paths, folder, monkeypatch):
    """What the run folder has already needs no more space."""
    disk = SimpleNamespace(free=10**9)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: disk)
    sizes = {"layers": 100_000}
    member, checkpoint = 8 * 97 * 100_000, 12 * 97 * 100_000
    disk.free = 2 * member + 3 * checkpoint - 1
    error = refusal(toy, flags(**paths | sizes))
    assert f"GiB in {folder} (weights for the readout, 2 x {member / 2**30:.3g} GiB, and three checkpoints" in error
    assert error.endswith("make space, or choose another --runs-dir") and not Path(paths["runs_dir"]).exists()
    assert "no checkpoints, so --resume would start over" in refusal(
        toy, flags(**paths, layers=10**6, checkpoints=False)
    )
    disk.free += 1
    with interrupt(toy, "step", 7):
        assert run(paths, **sizes) == 0
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    disk.free -= there + 1
    assert "GiB of it are there already: make space" in refusal(toy, ["--resume", str(folder)])
    disk.free += 1
    assert run_main(toy, ["--resume", str(folder)]) == 0


def test_a_memory_that_is_too_small_is_refused(paths, monkeypatch):
    error = refusal(toy, flags(**paths | {"layers": 10**9}))
    assert "97,000M parameters need " in error and " GiB per process for weights, gradients and optimizer" in error
    assert "no GPU in use: train it on GPUs of at least " in error and error.endswith("with --demo")
    monkeypatch.setattr(run_session, "total_memory", lambda device: 10**15)
    large = flags(**paths | {"layers": 2 * 10**6, "device": "auto"})
    if not torch.cuda.is_available():
        assert refusal(toy, large).endswith("It fits, so --device cpu trains it, slowly")
    assert not Path(paths["runs_dir"]).exists()


def test_a_folder_is_for_one_process(paths, folder):
    """A second one, and a new run of the same name, are refused."""
    refusals = []

    def start_others():
        refusals.append(refusal(toy, ["--resume", str(folder)]))
        refusals.append(refusal(toy, flags(**paths)))

    with on_call(toy.Training, "step", 3, start_others):
        assert run(paths) == 0
    assert refusals[0] == f"another process is writing to {folder}: wait for its end, or stop it"
    assert refusals[1] == f"{folder} exists: choose another --run-name, or continue it: --resume {folder}"
    assert read_result(folder)["steps"] == 11


# ------------------------------------------------------------------------------------------------ losses, exit codes


def test_a_training_loss_that_is_not_finite_stops_the_run(paths, folder, capsys):
    ruined = []

    def ruin(train, *args):
        ruined.append(train)
        if len(ruined) == 8:
            train.masters["logits"][5] = torch.nan
        return step(train, *args)

    step = toy.Training.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy.Training, "step", ruin)
        assert run(paths) == 1
    printed = capsys.readouterr()
    assert "stopped: the train_loss is nan at step 8" in printed.out and printed.err == ""
    assert "from which --resume repeats the steps: step_0000006" in printed.out
    content = torch.load(folder / "non_finite_rank_0.pt", weights_only=True)
    assert content["step"] == 8 and content["batch"].shape == (8, 4, 33)
    result = read_result(folder)
    assert (result["status"], result["stopped_by"], result["steps"]) == ("failed", "non_finite_loss", 8)
    assert "val_loss" not in result
    assert run_main(toy, ["--resume", str(folder)]) == 0  # the cause is gone
    assert read_result(folder)["status"] == "finished"


@pytest.mark.parametrize(("count", "readout"), [(2, "epoch_2"), (4, "probability_average"), (5, "weight_average")])
def test_a_validation_loss_that_is_not_finite_stops_the_run(paths, folder, capsys, count, readout):
    """There is no result, least of all one by the minimum."""
    scorer = toy.Training.scorer
    calls = []

    def ruined(train, masters, late):
        calls.append(late)
        bad = {"logits": masters["logits"] + torch.nan}
        return scorer(train, bad if len(calls) == count else masters, late)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy.Training, "scorer", ruined)
        assert run(paths) == 1
    assert f"stopped: the validation loss of {readout} is nan after step 11" in capsys.readouterr().out
    assert read_result(folder)["status"] == "failed"
    assert run_main(toy, ["--resume", str(folder)]) == 0
    assert read_result(folder)["status"] == "finished"


def test_exit_codes_of_runs(paths, folder, capsys):
    assert run(paths, data_dir="nowhere") == 2
    assert "toy.py: error: nowhere/fineweb_train.pt not found: run python prepare_data.py" in capsys.readouterr().err
    assert run(paths, log_every=0) == 2 and not folder.exists()
    assert run(paths) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(toy, ["--resume", str(folder)])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{folder} has finished, see {folder}/result.json\n"


# ----------------------------------------------------------------------------------------------------- Weights & Biases

Settings = namedtuple("Settings", "silent")


class FakeWandb:
    """The parts of wandb that a run uses; init fails, or the end does, where a test says so."""

    Settings = Settings

    def __init__(self, fails: str = ""):
        self.fails = fails
        self.started: dict = {}
        self.logged: list[int] = []
        self.summary = self
        self.result: dict = {}
        self.finished = False

    def init(self, **options):
        if self.fails == "init":
            raise RuntimeError("no network")
        self.started = options
        return self

    def log(self, values, step):
        self.logged.append(step)

    def update(self, result):
        if self.fails == "summary":
            raise RuntimeError("no network")
        self.result = result

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_what_wandb_is_given(paths, folder, wandb, capsys):
    assert run(paths, wandb="offline") == 0
    assert "wandb offline" in capsys.readouterr().out
    saved = json.loads((folder / "config.json").read_text())
    assert (wandb.started["mode"], wandb.started["name"], wandb.started["id"]) == ("offline", "run", saved["run_id"])
    assert wandb.started["config"] == saved["config"] | {"track": "limited"}
    assert wandb.logged == [5, 6, 10, 11]  # every log_every steps, and the validations
    assert wandb.result == read_result(folder) and wandb.finished


@pytest.mark.parametrize(("wanted", "key", "said"), [("off", "x", "off"), ("auto", "", "off"), ("auto", "x", "online")])
def test_when_wandb_is_used(paths, wandb, capsys, monkeypatch, wanted, key, said):
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    assert run(paths, wandb=wanted) == 0
    assert f", wandb {said}\n" in capsys.readouterr().out and bool(wandb.started) == (said == "online")


def test_a_failure_of_wandb_is_fatal_only_if_it_was_asked_for(paths, folder, wandb, capsys, monkeypatch):
    wandb.fails = "init"
    assert "--wandb online failed (RuntimeError: no network)" in refusal(toy, flags(**paths, wandb="online"))
    assert not folder.exists()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert run(paths) == 0
    assert "wandb off, since it failed (RuntimeError: no network)" in capsys.readouterr().out


def test_a_failure_of_wandb_at_the_end_is_a_line_of_the_log(paths, folder, wandb, capsys):
    wandb.fails = "summary"
    assert run(paths, wandb="online") == 0
    assert "wandb: RuntimeError: no network" in capsys.readouterr().out
    assert read_result(folder)["status"] == "finished" and wandb.finished


# -------------------------------------------------------------------------------- plans, profiles, runs without a trace


@pytest.mark.parametrize("processes", [1, 8])
def test_a_plan(paths, tmp_path, monkeypatch, capsys, processes):
    """Without data it is for the official ones. One process writes it; none joins another or makes a run folder."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    plan = tmp_path / "plan.json"
    for rank in sorted({0, processes - 1}):
        monkeypatch.setenv("RANK", str(rank))
        large = {"batch_tokens": 524288, "micro_batch": 64}
        with pytest.raises(SystemExit) as ended:
            toy.main(flags(**paths | large | {"plan": plan, "data_dir": "nowhere"}))
        assert ended.value.code == 0
    content = json.loads(plan.read_text())
    assert content["assumed_data"] and content["track"] == "limited" and content["world_size"] == processes
    assert content["data"] == "100,000,000 tokens, as nowhere/fineweb_train.pt is not there"
    assert content["num_steps"] == sum(stage["steps"] for stage in content["stages"])
    assert rules.OFFICIAL_TRAIN_TOKENS * 1.9 < content["tokens"] < rules.OFFICIAL_TRAIN_TOKENS * 2
    assert [stage["stage"] for stage in content["stages"]] == ["early", "late"]
    assert list(content["short_runs"]) == ["all"] and "--num-epochs=1" in content["short_runs"]["all"]
    assert capsys.readouterr().out.count("written to") == 1
    assert not Path(paths["runs_dir"]).exists()


def test_a_plan_of_data_that_are_there(paths, tmp_path):
    plan = tmp_path / "plan.json"
    with pytest.raises(SystemExit):
        toy.main(flags(**paths | {"plan": plan}))
    content = json.loads(plan.read_text())
    assert (content["num_steps"], content["tokens"], content["assumed_data"]) == (11, 11264, False)
    nowhere = tmp_path / "nowhere" / "plan.json"
    assert "choose another --plan FILE" in refusal(toy, flags(**paths | {"plan": nowhere}))
    assert "--resume continues with the run's settings" in refusal(toy, ["--plan=p.json", "--resume=runs/run"])


def test_profiling_changes_no_number(paths, folder, capsys):
    assert run(paths, run_name="reference") == 0
    assert run(paths, profile_steps="2-3,9-30") == 0
    assert_same_outcome(folder, folder.with_name("reference"))
    printed = capsys.readouterr().out
    for name in ("profile_2-3", "profile_9-11"):
        assert f"{name}: trace and table written" in printed
        with gzip.open(folder / f"{name}.json.gz", "rt") as file:
            assert json.load(file)["traceEvents"]
        assert "aten::bincount" in (folder / f"{name}.txt").read_text()
    assert not (folder / "unfinished.json.gz").exists()
    assert "--profile-steps 3: '3' does not fit" in refusal(toy, flags(**paths | {"profile_steps": "3"}))


def test_a_profile_that_a_signal_cuts_short(paths, folder, capsys):
    """It has the steps that were taken; a resume begins no profile in the middle of a range."""
    with interrupt(toy, "step", 3):
        assert run(paths, profile_steps="2-5,7-7,20-21") == 0
    assert (folder / "profile_2-3.txt").exists()
    assert run_main(toy, ["--resume", str(folder)]) == 0
    assert {path.name for path in folder.glob("profile_*.txt")} == {"profile_2-3.txt", "profile_7-7.txt"}
    assert "profile of steps 20-21: the run did not take them" in capsys.readouterr().out


def test_a_run_without_checkpoints(paths, folder, capsys):
    """The result is the same; what is stopped is lost, which the exit code says."""
    assert run(paths, run_name="reference") == 0
    with interrupt(toy, "step", 8):
        assert run(paths, checkpoints=False) == 1
    assert not list((folder / "checkpoints").iterdir())
    printed = capsys.readouterr().out
    assert "stopped by SIGTERM after step 8, which --no-checkpoints did not save" in printed
    assert f"--resume {folder} starts over" in printed
    assert run_main(toy, ["--resume", str(folder)]) == 0
    assert "no checkpoint yet: starting from step 0" in capsys.readouterr().out
    assert_same_outcome(folder, folder.with_name("reference"))


# -------------------------------------------------------------------------------------------------------------- members


def test_members(paths, monkeypatch):
    """A member has the weights of its step, whatever becomes of them; the second of one name is not kept."""
    found = {}

    def read_out(run: Session, train) -> int:
        expected = train.masters["logits"].clone()
        run.keep_member("last", train.masters)
        train.masters["logits"].zero_()
        run.keep_member("last", train.masters)
        found.update(run.load_member("last"))
        assert torch.equal(found["logits"], expected) and run.members == ["epoch_01", "epoch_02", "last"]
        return run.stopped(train)

    monkeypatch.setattr(toy, "read_out", read_out)
    run(paths)
    assert found["logits"].any()
