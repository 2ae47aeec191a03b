"""A run from the command line to its folder: contents, clock, cap, warnings, disk full, losses that are not finite."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ALL_TRACKS, INSTRUMENT, MICRO_STEPS, NOISE, ROOT, STAGES, TRACKS, FakeTime, V, flags, read_metrics

from slowrun import folder as run_folder
from slowrun.data import load_split, sha256_file
from slowrun.folder import instrument_sha256, script_sha256


@pytest.fixture
def folder(small) -> Path:
    return Path(small["runs_dir"]) / "run"


@pytest.mark.draws
def test_run_folder(track, small, folder, capsys):
    assert track.main(flags(**small)) == 0
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    script = Path(track.__file__)
    scripts = ["train.py", "model.py"] if track.TRACK == "limited" else ["train.py"]
    code = {f"code/{name}" for name in scripts} | {f"code/slowrun/{name}.py" for name in INSTRUMENT}
    final = {"final/members.json", "final/epoch_01.safetensors", "final/epoch_02.safetensors"}
    assert names == {"config.json", "log.txt", "metrics.jsonl", "curve.png", "result.json"} | code | final

    saved, result = (json.loads((folder / name).read_text()) for name in ("config.json", "result.json"))
    assert saved["track"] == result["track"] and saved["run_id"] == result["run_id"]
    assert saved["overrides"] == {k: v for k, v in small.items() if v != getattr(track.Config(), k)}
    assert track.Config(**saved["config"]) == track.Config(**small)
    for name in scripts:
        assert (folder / "code" / name).read_bytes() == script.with_name(name).read_bytes()
    for key, value in (("code_sha256", script_sha256(script)), ("instrument_sha256", instrument_sha256())):
        assert result[key] == saved[key] == value
    assert result["final_sha256"] == {path.name: sha256_file(path) for path in (folder / "final").iterdir()}

    log = (folder / "log.txt").read_text().splitlines()
    assert all(line.startswith(saved["run_id"] + " ") for line in log)
    printed = capsys.readouterr().out
    for line in log:
        assert line.removeprefix(saved["run_id"] + " ") in printed
    assert "step 5/11 | train " in printed and " | eta " in printed and "projected training time" in printed

    steps, validations = read_metrics(folder)
    assert [line["step"] for line in steps] == list(range(1, 12))
    assert {line["run"] for line in steps + validations} == {saved["run_id"]}
    assert [line["tokens"] for line in steps] == [1024 * i for i in range(1, 12)]
    assert [line["epoch"] for line in steps] == [1] * 6 + [2] * 5
    for line in steps:
        assert line.items() >= STAGES[track.TRACK][line["epoch"] - 1].items()
    begun = ", ".join(f"{key} {value}" for key, value in STAGES[track.TRACK][1].items())
    assert f"from step 7 on: {begun}".replace("[", "(").replace("]", ")") in printed
    assert 0 < sum(line["dt_s"] for line in steps) < result["train_time_s"] < result["wall_time_s"]
    assert [(line["step"], line["epoch"]) for line in validations] == [(6, 1), (11, 2)]

    assert result["status"] == "finished" and result["stopped_by"] == "steps"
    assert (result["steps"], result["tokens"], result["epochs"]) == (11, 11264, 2)
    assert result["val_tokens"] == 51 * 32 and result["val_loss"] == result["readouts"][f"{track.MIXING}_average"]
    assert result["best_val_loss"] == min(result["readouts"].values())
    assert [line["val_loss"] for line in validations] == [result["readouts"][f"epoch_{i}"] for i in (1, 2)]
    others = {"exponential_moving_average"} if track.TRACK == "tiny" else {"weight_average"}
    assert result["readouts"].keys() > {f"{track.MIXING}_average_equal_weights"} | others
    assert result["holdout_loss"] is not None and result["holdout_loss"] != result["val_loss"]
    assert result["eligible"] is False and "the data are not the official files" in result["not_eligible_because"]
    assert result["data_efficiency"] is None and result["torch"] == torch.__version__


def test_the_model_learns(track, small, folder):
    """From ln 97 nats towards the 1.39 of the small data, with every technique on (on tiny, all blocks start at 0)."""
    values = {
        "eval_initial": True,
        "num_epochs": 12 if track.TRACK == "tiny" else 5,
        "lr_multiplier": 2.0,
    } | dict.fromkeys(NOISE[track.TRACK], 0.05)
    assert track.main(flags(**small | values)) == 0
    _, validations = read_metrics(folder)
    assert validations[0]["step"] == 0 and validations[0]["val_loss"] == pytest.approx(4.575, abs=0.01)
    assert validations[-1]["val_loss"] < 3.0
    assert "initial" not in json.loads((folder / "result.json").read_text())["readouts"]


def test_a_smaller_device_batch_is_the_same_mathematics(track, small):
    losses = {}
    for device_batch in (0, 1):
        values = {"device_batch": device_batch, "run_name": f"run{device_batch}", "dtype": "float64"}
        values |= MICRO_STEPS[track.TRACK]
        assert track.main(flags(**small | values)) == 0
        steps, _ = read_metrics(Path(small["runs_dir"]) / f"run{device_batch}")
        losses[device_batch] = [line["train_loss_with_mtp"] for line in steps]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


def test_meta_gradient_halves_a_single_micro_step(track, small, folder):
    """With two micro-steps of 2, or one of 4, the same 32 sequences make each step, and the halves differ."""
    trainer, _ = track.set_up(flags(**small | {"micro_batch": 4}))
    assert trainer.config.micro_steps == 1 and trainer.config.meta_gradient
    pieces = trainer.pieces(torch.arange(4 * 33).view(1, 4, 33))
    assert [(k, rows[:, 0].tolist()) for k, rows in pieces] == [(0, [0, 33]), (0, [66, 99])]
    plain, _ = track.set_up(flags(**small | {"micro_batch": 4, "meta_gradient": False, "run_name": "plain"}))
    assert len(plain.pieces(torch.zeros(1, 4, 33))) == 1
    assert trainer.train_step(0)() == pytest.approx(plain.train_step(0)(), abs=0.05)
    same = [torch.equal(a, b) for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True)]
    assert not all(same)


def test_the_cap_stops_before_the_step_that_would_pass_it(track, small, folder, capsys):
    """A fake clock, 1 s a step, and a cap of 7.5 s: 7 steps, a readout, and no more steps after that."""
    trainer, _ = track.set_up(flags(**small | {"time_cap_min": 7.5 / 60}))
    FakeTime(trainer)
    trainer.fit()
    assert (trainer.step, trainer.stopped_by, trainer.clock.train_time_s) == (7, "time_cap", 7.0)
    assert trainer.run.load_checkpoint()[1]["stopped_by"] == "time_cap"
    track.finish(trainer)
    result = json.loads((folder / "result.json").read_text())
    assert result["stopped_by"] == "time_cap" and result["steps"] == 7 and result["epochs"] == 1
    assert list(result["readouts"])[:2] == ["epoch_1", "epoch_2_cut_short"]
    members = json.loads((folder / "final" / "members.json").read_text())["members"]
    assert [(m["step"], m["weight"]) for m in members] == [(6, pytest.approx(1 / 3)), (7, pytest.approx(2 / 3))]
    assert "stopped by time_cap after 7 steps" in capsys.readouterr().out


def test_a_cap_before_the_first_member_still_gives_a_readout(track, small, folder):
    trainer, _ = track.set_up(flags(**small | {"time_cap_min": 3.5 / 60, "readout_epochs": 1}))
    FakeTime(trainer)
    trainer.fit()
    track.finish(trainer)
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 3 and result["val_loss"] == pytest.approx(result["readouts"]["epoch_1_cut_short"])


def test_a_cap_at_the_end_of_an_epoch_gives_a_readout(track, small, folder):
    trainer, _ = track.set_up(flags(**small | {"time_cap_min": 6.5 / 60, "readout_epochs": 1}))
    FakeTime(trainer)
    trainer.fit()
    assert (trainer.step, trainer.stopped_by) == (6, "time_cap")
    track.finish(trainer)
    result = json.loads((folder / "result.json").read_text())
    assert result["val_loss"] == pytest.approx(result["readouts"]["epoch_1"])


def test_without_a_cap_all_steps_run(track, small, folder):
    trainer, _ = track.set_up(flags(**small | {"time_cap_min": 0}))
    FakeTime(trainer, step_s=1e6)
    trainer.fit()
    assert trainer.stopped_by == "steps" and trainer.step == 11
    track.finish(trainer)
    assert (
        f"the cap of {track.Config().time_cap_min:g} min is lifted"
        in json.loads((folder / "result.json").read_text())["not_eligible_because"]
    )


def test_what_the_clock_counts(track, small, monkeypatch):
    """Steps of 1 s, and 2 s after each that the script takes for other things; not validation and checkpoints."""
    trainer, _ = track.set_up(flags(**small | {"checkpoint_min": 0.0}))
    fake = FakeTime(trainer)

    def slowly(name: str, seconds: float) -> None:
        function = getattr(trainer, name)

        def wrapped(*args, **kwargs):
            fake.time_s += seconds
            return function(*args, **kwargs)

        monkeypatch.setattr(trainer, name, wrapped)

    for name, seconds in {"validate": 3600.0, "save_checkpoint": 3600.0, "record_step": 2.0}.items():
        slowly(name, seconds)
    trainer.fit()
    assert trainer.clock.train_time_s == 11 * (1.0 + 2.0)


def test_projection_warns_of_the_cap(track, small, capsys):
    trainer, _ = track.set_up(flags(**small | {"num_epochs": 4, "time_cap_min": 15 / 60}))
    FakeTime(trainer)
    trainer.fit()
    printed = capsys.readouterr().out
    assert "projected training time 0.4 min, cap 0.25 min" in printed
    assert "WARNING: training will stop early, at the cap; --time-cap-min 0" in printed


def test_a_full_disk_does_not_end_the_run(track, small, folder, monkeypatch, capsys):
    """From step 8 on no checkpoint can be written: it is said, the older ones stay, the result is complete."""
    trainer, _ = track.set_up(flags(**small | {"checkpoint_min": 0.0}))
    save = torch.save

    def on_a_full_disk(content, path):
        if trainer.step >= 8:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, path)

    monkeypatch.setattr(torch, "save", on_a_full_disk)
    trainer.fit()
    assert [path.name for path in trainer.run.checkpoints()] == ["step_0000006.json", "step_0000007.json"]
    assert not list((folder / "checkpoints").glob("*.tmp")) and trainer.run.load_checkpoint()[1]["step"] == 7
    printed = capsys.readouterr().out
    assert "checkpoint at step 8 NOT saved: OSError, [Errno 28] No space left on device" in printed
    assert "GiB free). The run goes on, and earlier checkpoints stay" in printed
    track.finish(trainer)
    assert json.loads((folder / "result.json").read_text())["steps"] == 11


def fill_disk(patch: pytest.MonkeyPatch, module, name: str, full) -> None:
    """Let a function of a module that writes fail, as on a full disk, when full(*its arguments)."""
    write = getattr(module, name)

    def on_a_full_disk(*args):
        if full(*args):
            raise OSError(28, "No space left on device")
        write(*args)

    patch.setattr(module, name, on_a_full_disk)


def test_members_wait_in_memory_for_space(track, small, folder, monkeypatch):
    """The disk is full at the end of the first epoch and has space again at that of the second: nothing is lost."""
    trainer, _ = track.set_up(flags(**small))
    waited = []
    fill_disk(monkeypatch, track, "save_file", lambda tensors, path: trainer.step < 11 and not waited.append(path))
    trainer.fit()
    assert waited and not trainer.unsaved
    track.finish(trainer)
    result = json.loads((folder / "result.json").read_text())
    assert set(result["final_sha256"]) == {"epoch_01.safetensors", "epoch_02.safetensors", "members.json"}


@pytest.mark.parametrize("name", ["save_file", "write_json"])
def test_a_result_that_cannot_be_saved_can_be_resumed(track, small, folder, capsys, name):
    """The disk has no space for the members, or for result.json: the loss is printed, and nothing looks finished."""
    with pytest.MonkeyPatch.context() as patch:
        module = track if name == "save_file" else run_folder
        fill_disk(patch, module, name, lambda *args: name == "save_file" or args[0].name == "result.json")
        assert track.main(flags(**small)) == 1
    printed = capsys.readouterr().out
    assert "val_loss " in printed and f"make space, then --resume {folder} goes on" in printed
    assert not (folder / "result.json").exists()
    assert track.main(["--resume", str(folder)]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 11
    assert set(result["final_sha256"]) == {"epoch_01.safetensors", "epoch_02.safetensors", "members.json"}


def test_the_older_checkpoint_makes_room_for_the_result(track, small, folder, monkeypatch):
    trainer, _ = track.set_up(flags(**small | {"checkpoint_min": 0.0}))
    fill_disk(monkeypatch, track, "save_file", lambda *_: trainer.step == 11 and len(trainer.run.checkpoints()) > 1)
    trainer.fit()
    assert trainer.unsaved and len(trainer.run.checkpoints()) == 2
    assert track.finish(trainer) == 0
    hashes = json.loads((folder / "result.json").read_text())["final_sha256"]
    assert "epoch_02.safetensors" in hashes
    for member in json.loads((folder / "final" / "members.json").read_text())["members"]:
        assert member["sha256"] == hashes[member["file"]]


def test_a_disk_that_is_too_small_is_refused(track, small, folder, monkeypatch, capsys):
    """By the sizes that the files then have: the readout's weights and three checkpoints, less what is there."""
    disk = SimpleNamespace(free=10**9)
    monkeypatch.setattr(track.shutil, "disk_usage", lambda path: disk)
    trainer, _ = track.set_up(flags(**small))
    trainer.fit()
    trainer.run.close()
    sizes = track.disk_gib(trainer.config, trainer.dtype)
    files = sorted((folder / "final").iterdir()), sorted((folder / "checkpoints").glob("*.pt"))
    for (*_, file), size in zip(files, sizes, strict=True):
        assert file.stat().st_size == pytest.approx(size * 2**30, rel=0.1, abs=20_000)
    needed = int((2 * sizes[0] + 3 * sizes[1]) * 2**30)
    capsys.readouterr()
    disk.free = needed - 1
    assert track.main(flags(**small | {"run_name": "another"})) == 2
    error = capsys.readouterr().err
    assert (
        "the run needs up to " in error
        and "weights for the readout, 2 x " in error
        and "choose another --runs-dir" in error
    )
    assert not folder.with_name("another").exists()
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for disk.free, code in ((needed - there - 1, 2), (needed - there + 1, 0)):  # what is there needs no space
        assert track.main(["--resume", str(folder)]) == code


def test_a_loss_that_is_not_finite_stops_the_run(track, small, folder, monkeypatch, capsys):
    step_of = track.Trainer.train_step

    def poisoned(trainer, step):
        if step == 7:
            trainer.model.lm_head.weight.data[3, 5] = torch.nan
        return step_of(trainer, step)

    monkeypatch.setattr(track.Trainer, "train_step", poisoned)
    assert track.main(flags(**small)) == 1
    printed = capsys.readouterr().out
    assert "stopped: the training loss is nan at step 8" in printed and "step_0000006" in printed
    content = torch.load(folder / "non_finite.pt", weights_only=True)
    assert content["step"] == 8 and content["tokens"].shape == (8, 4, 33)
    assert content["norms"]["lm_head.weight"] != content["norms"]["lm_head.weight"]
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["stopped_by"], result["steps"]) == ("failed", "non_finite_loss", 8)
    assert "val_loss" not in result

    monkeypatch.setattr(track.Trainer, "train_step", step_of)  # the cause is gone: the run can go on
    assert track.main(["--resume", str(folder)]) == 0
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"


def test_a_validation_loss_that_is_not_finite_stops_the_run(track, small, folder, monkeypatch, capsys):
    """The last step of an epoch ruins the weights: there is no result, least of all one by the minimum."""
    step_of = track.Trainer.train_step

    def poisoned(trainer, step):
        losses = step_of(trainer, step)
        if step == trainer.plan.num_steps - 1:
            trainer.model.lm_head.weight.data[3, 5] = torch.nan
        return losses

    monkeypatch.setattr(track.Trainer, "train_step", poisoned)
    assert track.main(flags(**small)) == 1
    assert "stopped: the validation loss is nan at step 11" in capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("track", ["limited"], indirect=True)
def test_wandb(track, small, folder, monkeypatch, capsys):
    """Offline when asked for; off without a key; a failure is fatal only if it was asked for."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert track.main(flags(**small | {"wandb": "offline", "log_every": 2})) == 0
    assert list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert "wandb offline" in capsys.readouterr().out

    import wandb

    def fail(**options):
        raise RuntimeError("no network")

    monkeypatch.setattr(wandb, "init", fail)
    assert track.main(flags(**small | {"wandb": "online", "run_name": "asked"})) == 2
    assert "--wandb online failed (RuntimeError: no network)" in capsys.readouterr().err
    assert not folder.with_name("asked").exists()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert track.main(flags(**small | {"run_name": "found"})) == 0
    assert "wandb off, since it failed (RuntimeError: no network)" in capsys.readouterr().out


BAD_FLAGS = [
    ({"num_epochs": 0}, "--num-epochs is 0: it must be at least 1"),
    ({"batch_tokens": 1000}, "batch_tokens 1000 is not a multiple of 8 virtual ranks x micro_batch "),
    ({"n_head": 3}, "n_embd 32 / n_head 3"),
    ({"n_layer": 3}, "n_layer 3 is odd"),
    ({"n_embd": 24, "n_head": 2}, "n_embd 24 is too small"),
    ({"micro_batch": 3, "batch_tokens": 768}, "the meta-gradient cannot halve 1 micro-step(s) of 3 sequences"),
    ({"micro_batch": 2, "batch_tokens": 1536}, "the meta-gradient cannot halve 3 micro-step(s)"),
    ({"micro_batch": 8, "batch_tokens": 4096, "device_batch": 3}, "device_batch 3 does not divide micro_batch, 8"),
    (
        {"micro_batch": 8, "batch_tokens": 2048, "device_batch": 3},
        "device_batch 3 does not divide half of micro_batch, 4",
    ),
    ({"sequence_len": 3}, "sequence_len 3 is too short"),
    ({"sequence_len": 2048, "batch_tokens": 65536}, "lower --sequence-len"),
    ({"window_pattern": "SXL"}, "must be of letters S and L"),
    ({"dropout": 1.0}, "dropout 1.0 is not in [0, 1)"),
    ({"swa_epochs": 3}, "--swa-epochs 3 exceed --num-epochs 2: lower them"),
    ({"swa_epochs": 3, "readout_epochs": 4}, "--swa-epochs 3 and --readout-epochs 4 exceed --num-epochs 2"),
    ({"warmdown": 1.5}, "warmdown 1.5 is not in [0, 1]"),
    ({"vocab_size": 50257}, "is of another tokenizer"),
    ({"data_dir": "nowhere"}, "nowhere/fineweb_train.pt not found: run python prepare_data.py"),
    ({"attention": "varlen"}, "--attention varlen needs a GPU"),
]


BAD_FLAGS_OF = {  # of one track
    "limited": [
        ({"replay_start": 0}, "replay range [0, 2) is not inside the decoder, layers 1 to 1"),
        ({"replay_end": 3}, "replay range [1, 3)"),
        ({"replay_from_epoch": -1}, "--replay-from-epoch is -1: at least 0 (never)"),
    ],
    "two_hour": [
        (
            {"num_epochs": 13},
            "the window schedule ends with epoch 12, training with epoch 13: extend --window-schedule",
        ),
        ({"window_schedule": "1-2:4"}, "stage 1 of the window schedule, '1-2:4', is not of the form FIRST-LAST:SHORT"),
        ({"window_schedule": "1-1:4,12;"}, "stage 2 of the window schedule, '', is not of the form"),
        ({"window_schedule": "2-3:4,12"}, "stage 1 of the window schedule, '2-3:4,12', begins with epoch 2: it must"),
        ({"window_schedule": "1-1:4,12;3-4:12,28"}, "stage 2 of the window schedule, '3-4:12,28', begins with epoch 3"),
        ({"window_schedule": "1-0:4,12"}, "stage 1 of the window schedule, '1-0:4,12', ends before it begins"),
        ({"window_schedule": "1-2:12,4"}, "'1-2:12,4', has other windows than 1 <= short <= long <= sequence_len 32"),
        ({"window_schedule": "1-2:0,4"}, "has other windows than 1 <= short"),
        ({"window_schedule": "1-2:4,33"}, "has other windows than 1 <= short <= long <= sequence_len 32"),
        (
            {"window_schedule": "1-1:4,28;2-2:4,12"},
            "stage 2 of the window schedule, '2-2:4,12', has a shorter long win",
        ),
    ],
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
        ({"head": "fp8"}, "here are float32, 32, 32, cpu: change them, or give --head plain"),
    ],
}
ALL_BAD_FLAGS = [(name, *bad) for name in TRACKS for bad in BAD_FLAGS + BAD_FLAGS_OF[name]]


@pytest.mark.parametrize(
    "track, change, message",
    ALL_BAD_FLAGS,
    ids=[f"{name}-{change}" for name, change, _ in ALL_BAD_FLAGS],
    indirect=["track"],
)
def test_bad_settings_are_refused_before_anything_is_written(track, small, folder, capsys, change, message):
    assert track.main(flags(**small | change)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not folder.exists()


def test_two_processes_cannot_write_to_one_run(track, small, folder, capsys):
    first, _ = track.set_up(flags(**small))
    assert track.main(["--resume", str(folder)]) == 2
    assert "another process is writing" in capsys.readouterr().err
    first.run.close()


def test_full_size_without_a_gpu(track, data_dir, tmp_path, capsys):
    """A clear message with the memory it would need and what to run instead."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert track.main(flags(runs_dir=str(tmp_path / "runs"), data_dir=str(data_dir))) == 2
    error = capsys.readouterr().err
    needs = {"limited": "1,444M parameters need 32 GiB", "tiny": "317M parameters need 8 GiB"}
    needs = (needs | {"two_hour": "1,444M parameters need 28 GiB"})[track.TRACK]
    assert f"{needs} per process for weights, gradients and optimizer, about" in error
    assert "this machine has" in error and "no GPU" in error and "--demo" in error
    assert not (tmp_path / "runs").exists()


@ALL_TRACKS
def test_importing_the_script_does_nothing(track, tmp_path):
    """So that tests and the referee can import it: no output, no file, no random numbers drawn."""
    program = "import torch; state = torch.get_rng_state(); import {}; assert torch.equal(state, torch.get_rng_state())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", program.format(track.__name__)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_a_signal_in_the_warm_up(track, small, folder, monkeypatch, capsys):
    """The run stops before its first step, exit code 0, and can be resumed."""
    warm_up = track.Trainer.warm_up

    def interrupted(trainer):
        signal.raise_signal(signal.SIGINT)
        warm_up(trainer)
        signal.raise_signal(signal.SIGTERM)  # a second one, right after: from torchrun

    monkeypatch.setattr(track.Trainer, "warm_up", interrupted)
    assert track.main(flags(**small | {"eval_initial": True})) == 0
    assert "stopped by SIGINT after step 0; resume with" in capsys.readouterr().out
    assert read_metrics(folder) == ([], [])
    monkeypatch.setattr(track.Trainer, "warm_up", warm_up)
    assert track.main(["--resume", str(folder)]) == 0


def test_a_signal_in_the_readout(track, small, folder, monkeypatch, capsys):
    load_member = track.load_member

    def interrupted(trainer, member):
        signal.raise_signal(signal.SIGTERM)
        load_member(trainer, member)

    monkeypatch.setattr(track, "load_member", interrupted)
    assert track.main(flags(**small)) == 0
    assert "stopped by SIGTERM after step 11; resume with" in capsys.readouterr().out
    assert not (folder / "result.json").exists()
    monkeypatch.setattr(track, "load_member", load_member)
    assert track.main(["--resume", str(folder)]) == 0
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"


def test_members_give_the_claimed_loss(track, small, folder):
    """load_members, from the run folder alone, mixed by hand: the val_loss and holdout_loss of result.json."""
    assert track.main(flags(**small | {"dropout": 0.1})) == 0
    result = json.loads((folder / "result.json").read_text())
    assert json.loads((folder / "final" / "members.json").read_text())["mixing"] == track.MIXING
    assert ("weight" if track.TRACK == "tiny" else "probability") == track.MIXING
    for split, claimed in (("val", result["val_loss"]), ("holdout", result["holdout_loss"])):
        sequences = torch.from_numpy(load_split(small["data_dir"], split, V, 32).sequences(33).astype(np.int64))
        mixture, weights = 0, []
        for weight, log_probs in track.load_members(folder, "cpu"):
            found = log_probs(sequences[:, :-1])
            assert found.dtype == torch.float32 and found.shape == (len(sequences), 32, 97)
            torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(sequences), 32))
            mixture = mixture + weight * found.exp().double()
            weights.append(weight)
        assert weights == pytest.approx({"probability": [1 / 3, 2 / 3], "weight": [1.0]}[track.MIXING])
        nats = -mixture.gather(-1, sequences[:, 1:, None]).log().mean().item()
        assert nats == pytest.approx(claimed, abs=1e-6)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"track": "other"}))
    with pytest.raises(ValueError, match="is a run of the other track: use that track's load_members"):
        next(track.load_members(folder, "cpu"))
    (folder / "config.json").write_text(json.dumps(saved))
    if track.MIXING == "probability":
        (_, first), _ = track.load_members(folder, "cpu")
        with pytest.raises(ValueError, match="use them one at a time"):
            first(sequences[:1, :-1])
