"""tools/bench.py: on the real scripts at toy size, and on fakes that only have the command line and the run folder."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ALL_TRACKS, NOT_MERE_COPIES, ROOT, flags, read_metrics
from torch.utils.flop_counter import FlopCounterMode

from tools import bench, original, workplace
from tools.trace import KINDS, breakdown, covered, kind_of

STAGES = {
    "limited": ["plain", "replay"],
    "tiny": ["one_pass", "two_passes"],
    "two_hour": ["windows_256_768", "windows_768_1792", "windows_1280_2048_replay"],
    "unlimited": ["student", "teacher"],
}


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder in which temporary files are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def processes_with(mark: str) -> list[str]:
    """Command lines of the processes whose environment names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{workplace.MARK}={mark}" in path.read_bytes().decode(errors="replace"):
                found.append((path.parent / "cmdline").read_text())
        except OSError:
            continue
    return found


# ------------------------------------------------------------------------------------------- what the scripts say


def write_plan(track, path: Path, **values) -> dict:
    with pytest.raises(SystemExit) as stopped:
        track.main([*flags(**values), f"--plan={path}"])
    assert stopped.value.code == 0
    return json.loads(path.read_text())


@ALL_TRACKS
def test_the_plan_counts_what_a_run_does(track, tmp_path, capsys):
    """Without the data it is for the official number of tokens, and says so; its sums are those of the schedules."""
    plan = write_plan(track, tmp_path / "plan.json", data_dir=str(tmp_path / "none"))
    printed = capsys.readouterr().out
    assert plan["assumed_data"] and "100,000,000 tokens, as" in printed and str(tmp_path / "plan.json") in printed
    config = track.Config(data_dir=str(tmp_path / "none"))
    of_run = track.Plan(config, track.official_sequences(config))
    assert plan["num_steps"] == of_run.num_steps == sum(stage["steps"] for stage in plan["stages"])
    assert list(dict.fromkeys(stage["stage"] for stage in plan["stages"])) == STAGES[track.TRACK]
    assert plan["tokens"] == sum(stage["steps"] * stage["tokens_per_step"] for stage in plan["stages"])
    steps = [0, of_run.num_steps // 2, of_run.num_steps - 1]
    for step in steps:
        stage = next(each for each in reversed(plan["stages"]) if each["from_step"] <= step + 1)
        assert stage["flops_per_token"] == track.step_flops_per_token(of_run, step)
        assert stage["flops_per_step"] == stage["flops_per_token"] * stage["tokens_per_step"]
        assert min(stage["moved_bytes"].values()) > 0
    assert plan["dtype"] == "bfloat16" and plan["memory_gib"]["1"] > plan["memory_gib"]["8"]
    total, static, needed = track.memory_gib(config, 1, torch.bfloat16)
    assert (plan["parameters"], plan["memory_gib"]["1"]) == (total, needed)
    most = max(sum(stage["held_bytes"].values()) for stage in plan["stages"])
    assert most == pytest.approx(needed * 2**30) and static < needed
    assert plan["time_cap_min"] == track.Config.time_cap_min
    assert not list(tmp_path.glob("runs*"))


@ALL_TRACKS
def test_the_plan_of_data_that_is_there(track, small, tmp_path):
    """It has the steps that a run makes, and a smaller one where there are more processes."""
    plan = write_plan(track, tmp_path / "plan.json", **small)
    assert not plan["assumed_data"] and plan["dtype"] == "float32"
    sequences = plan["sequences"]
    of_run = track.Plan(track.Config(**small), sequences)
    assert plan["num_steps"] == of_run.num_steps and 0 < sequences < 6000 / 33
    one, two = (track.plan_stages(of_run, size, torch.float32)[0]["moved_bytes"] for size in (1, 2))
    assert two["activations"] == one["activations"] / 2 and two["optimizer"] == one["optimizer"] / 2


@ALL_TRACKS
def test_a_plan_is_refused_where_it_cannot_be_made(track, small, tmp_path, capsys):
    assert track.main([*flags(**small), "--resume", "x", "--plan", str(tmp_path / "p")]) == 2
    assert "--plan is for a new run" in capsys.readouterr().err
    assert track.main([*flags(**small), "--plan", str(tmp_path / "none" / "p")]) == 2
    assert "choose another --plan FILE" in capsys.readouterr().err


@ALL_TRACKS
def test_short_runs_have_the_stages_that_they_are_named_after(track):
    config = track.Config()
    runs = track.short_runs(config)
    assert list(dict.fromkeys([*STAGES[track.TRACK], "all"])) == sorted(runs, key=[*STAGES[track.TRACK], "all"].index)
    for name, settings in runs.items():
        short = track.Config(**settings)
        plan = track.Plan(short, 5 * 256 + 1)
        found = list(dict.fromkeys(track.stage_name(plan, step) for step in range(plan.num_steps)))
        expected = STAGES[track.TRACK] if name in ("all", "teacher") else [name]
        assert found == expected
        for step in (0, plan.num_steps - 1):  # as many operations as in a step of the official run
            official = track.Plan(config, track.official_sequences(config))
            like = [s for s in range(0, official.num_steps, 7) if track.stage_name(official, s) == found[step and -1]]
            assert track.step_flops_per_token(plan, step) == track.step_flops_per_token(official, like[0])


def visible_keys(T: int, window: int) -> float:
    """Positions that the average position attends to, counted from the mask."""
    distance = np.arange(T)[:, None] - np.arange(T)
    return ((distance >= 0) & (distance <= window)).sum() / T


def windows_of_calls(track, config, switched: dict) -> list[tuple[int, int]]:
    """(Window, how often it counts: 3 with a backward pass, 1 without) of every call of attention."""
    if track.TRACK == "tiny":
        layers = [config.window(i) for i in range(config.n_layer)]
        return [(window, 3) for window in layers] + [(window, 1) for window in layers] * (switched["passes"] - 1)
    windows = [switched["windows"]] if "windows" in switched else []
    calls = [(config.window(i, *windows), 3) for i in config.layer_order(switched["replay"])]
    return calls + [(config.sequence_len, 3)] * (config.mtp_weight > 0)


@ALL_TRACKS
@pytest.mark.parametrize("late", [False, True])
def test_counted_operations_are_those_that_torch_counts(track, late, monkeypatch):
    """Matrix products by FlopCounterMode; attention, which that counts without its mask, from the mask: within 1%.

    Without gates, whose few operations are not counted, and so that nothing else differs.
    """
    config = track.Config(
        **track.DEMO | {"dropout": 0.0, "stochastic_depth": 0.0} if track.TRACK != "tiny" else track.DEMO
    )
    plan = track.Plan(config, 1000)
    step = plan.num_steps - 1 if late else 0
    switched = track.stage(plan, step)
    model = track.build(config, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    model.init_weights()
    for name, p in model.named_parameters():
        if "c_proj" in name:
            torch.nn.init.normal_(p, std=0.02)  # else nothing goes backward through what begins at 0
    weights = track.ComputeWeights(model, torch.float32)
    weights.refresh()
    module = sys.modules[track.GPT.__module__]
    monkeypatch.setattr(module, "attend", lambda q, k, v, *others, **named: q + k + v)
    B, T = 2, config.sequence_len
    rows = torch.randint(config.vocab_size, (B, T + 1))
    how = switched | track.warm_up_arguments(config, **switched)[0]
    if "taught" in how:
        how.pop("taught")
        teacher = track.snapshot_weights(model, {n: p.detach() for n, p in model.named_parameters()}, torch.float32)
        how["teacher"] = teacher if plan.taught(step) else None
    with FlopCounterMode(display=False) as counter:
        model.training_loss(rows[:, :-1], rows[:, 1:], weights.tensors, **how)[0].backward()
    calls = windows_of_calls(track, config, switched)
    if how.get("teacher") is not None:
        calls += [(window, 1) for window, _ in calls[: len(calls) - (config.mtp_weight > 0)]]
    attention = sum(4 * config.n_embd * times * visible_keys(T, window) for window, times in calls)
    counted = counter.get_total_flops() / (B * T) + attention
    assert track.step_flops_per_token(plan, step) == pytest.approx(counted, rel=0.01)


def profile_span_ms(path: Path) -> float:
    """From the start of a trace's first operator to the end of its last."""
    with gzip.open(path, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("cat") == "cpu_op"]
    return (max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)) / 1e3


@pytest.mark.parametrize("track", ["limited"], indirect=True)
def test_profiled_steps_do_not_change_the_run(track, small):
    """Two ranges of steps, a trace and a table each; losses as without. What is beyond the last step is said."""
    losses = {}
    for name, steps in (("without", ""), ("with", "2-2,6-6,40-41")):
        assert track.main(flags(**small | {"run_name": name, "profile_steps": steps, "micro_batch": 4})) == 0
        folder = Path(small["runs_dir"]) / name
        losses[name] = [line["train_loss"] for line in read_metrics(folder)[0]]
    assert losses["with"] == losses["without"]
    assert {path.name for path in folder.glob("profile*")} == {
        f"profile_{steps}.{kind}" for steps in ("2-2", "6-6") for kind in ("json.gz", "txt")
    }
    log = (folder / "log.txt").read_text()
    assert "profile_2-2: trace and table written, which took" in log
    assert "profile of steps 40-41: the run did not go through them" in log
    assert "aten::mm" in (folder / "profile_6-6.txt").read_text()
    times = breakdown(folder / "profile_2-2.json.gz")
    assert list(times) == list(KINDS) and times["communication"] == 0.0
    assert min(times[kind] for kind in KINDS if kind != "communication") > 0.0
    assert sum(times.values()) == pytest.approx(profile_span_ms(folder / "profile_2-2.json.gz"), rel=0.01)


def test_ranges_to_profile_are_the_same_in_all_processes(track):
    """Also in one that records nothing; ranges that began before a resume are passed over."""
    run = SimpleNamespace(main=False, log=lambda text: None)
    profiler, begun = track.StepProfiler(track.Config(profile_steps="2-3,5-6,9-9"), run, cuda=False), []
    for number in range(3, 10):  # resumed after step 2
        if profiler.begins_with(number):
            profiler.start(number)
            begun.append(number)
        profiler.after_step(number, last=number == 9)
    assert begun == [5, 9] and profiler.ranges == [] and profiler.profile is None


@ALL_TRACKS
@pytest.mark.parametrize("steps", ["5-4", "0-2", "3", "a-b", "1-2,2-3", "4-5;8-9", "1-2,"])
def test_malformed_steps_to_profile_are_refused(track, steps):
    with pytest.raises(ValueError, match="ranges FIRST-LAST of steps counted from 1, in order and apart"):
        track.Config(profile_steps=steps)


@NOT_MERE_COPIES
def test_a_run_without_checkpoints(track, small, monkeypatch):
    """The same result; nothing but the readout's weights is written, and the header says that it cannot go on."""
    results, written = {}, []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, path, *a: (written.append(Path(path)), save(content, path, *a)))
    for name in ("with", "without"):
        assert track.main(flags(**small | {"run_name": name, "checkpoints": name == "with"})) == 0
        folder = Path(small["runs_dir"]) / name
        results[name] = json.loads((folder / "result.json").read_text())
        assert (folder / "final" / "epoch_02.safetensors").exists()
    assert results["with"]["val_loss"] == results["without"]["val_loss"]
    assert {path.parent.parent.name for path in written} == {"with"}
    assert "no checkpoints, so --resume would begin anew" in (folder / "log.txt").read_text()
    config = track.Config(**small)
    without = track.Config(**small | {"checkpoints": False})
    member, checkpoint = track.disk_gib(config, torch.float32)
    less = track.disk_needed_gib(config, torch.float32) - track.disk_needed_gib(without, torch.float32)
    assert less == pytest.approx(3 * checkpoint) and member > 0


@NOT_MERE_COPIES
def test_a_run_without_checkpoints_begins_anew(track, small, capsys):
    """Stopped by a signal after step 8, it says that nothing is saved; --resume repeats all steps, as they were."""
    values = flags(**small | {"checkpoints": False})
    trainer, _ = track.set_up(values)
    step = trainer.train_step
    trainer.train_step = lambda n: (trainer.take_signal(signal.SIGTERM, None) if n == 7 else None, step(n))[1]
    trainer.fit()
    assert trainer.stopped_by == "signal" and trainer.say_how_to_resume() == 1
    trainer.run.close()
    folder = Path(small["runs_dir"]) / "run"
    assert not list((folder / "checkpoints").iterdir())
    printed = capsys.readouterr().out
    assert "after step 8, which --no-checkpoints did not save" in printed and "begins anew" in printed
    before = [line["train_loss"] for line in read_metrics(folder)[0]]
    assert track.main(["--resume", str(folder)]) == 0
    after = [line["train_loss"] for line in read_metrics(folder)[0]]
    assert len(before) == 8 and after[:8] == before and len(after) == 11
    assert "no checkpoint yet: starting from step 0" in (folder / "log.txt").read_text()


# ------------------------------------------------------------------------------------------- the real scripts


def test_the_demo(temporary, tmp_path, capsys):
    """Two tracks on the real scripts: every stage, its projection; nothing stays behind."""
    path = tmp_path / "bench.json"
    assert bench.main(["limited", "unlimited", "--demo", "--steps=2", f"--json={path}"]) == 0
    content = json.loads(path.read_text())
    assert list(content["tracks"]) == ["limited", "unlimited"] and not content["interrupted"]
    printed = capsys.readouterr().out
    for track, found in content["tracks"].items():
        assert list(found["stages"]) == STAGES[track] and found["failed"] == "" and found["left_out"] == {}
        assert found["warm_up_s"] > 0 and found["kernels"] == "attention sdpa (error 0)"
        for stage, each in found["stages"].items():
            tokens = {"limited": 8192, "unlimited": 4096}[track]
            assert f"{track}/{stage}" in printed and each["steps"] == 1 == len(each["all_ms"])
            assert each["tokens_per_s"] == pytest.approx(tokens / each["ms"] * 1e3)
            assert each["mfu"] is None and 0.1 < each["peak_memory_gib"] < 10
            assert each["floor_ms"]["operations"] == pytest.approx(each["flops_per_step"] / 989e9)
    limited = content["tracks"]["limited"]
    epoch = 100_000_000 // 129 * 128 / 8192  # steps; 5 epochs, replay from the fourth on
    steps, plan = {"plain": 3 * epoch, "replay": 2 * epoch}, limited["projection"]
    expected = sum(steps[stage] * each["ms"] for stage, each in limited["stages"].items()) / 60e3
    assert plan["minutes"] == pytest.approx(expected, rel=1e-3) and plan["guessed"] == [] and not plan["stopped"]
    assert "limited: " in printed and "no cap" in printed
    assert list(temporary.iterdir()) == [] and processes_with(str(temporary)) == []


def test_shards_are_accepted_by_the_scripts(tmp_path):
    import train

    workplace.write_shards(tmp_path / "data", 50257, {"train": 1_000_000, "val": 20_000})
    config = train.Config(data_dir=str(tmp_path / "data"))
    shard = train.load_data(config)["train"]
    assert len(shard.tokens) == 1_000_000 and 500 < 1_000_000 / len(shard.doc_starts) < 1100
    assert train.token_byte_lengths(config)[1] == "from meta.json"


# ------------------------------------------------------------------------------------------- scripts of another make

FAKE = '''
"""Knows the command line and the run folder of a track's script, and nothing of training."""
import json, os, subprocess, sys, time
from pathlib import Path

NAME, STAGES, MS, KNOWN, BEHAVIOR = {name!r}, {stages!r}, {ms!r}, {known!r}, {behavior!r}
given = dict((flag.split("=") + [""])[:2] for flag in sys.argv[1:])
if "--help" in given:
    print(" ".join(KNOWN))
    sys.exit()
unknown = [flag for flag in given if flag not in KNOWN]
if unknown:
    print("train.py: error: unrecognized arguments: " + " ".join(unknown), file=sys.stderr)
    sys.exit(2)
if BEHAVIOR == "damaged":
    raise RuntimeError("this script is damaged")
stages = [s for s in STAGES if given.get("--only", s) == s]
per = 4 if "--short" in given else 100
if "--plan" in given:
    counted = {{"tokens_per_step": 1024, "flops_per_token": 1e6, "flops_per_step": 1.024e9}}
    parts = {{part: 1e9 for part in ("weights", "gradients", "optimizer", "activations", "logits")}}
    counted |= {{"moved_bytes": parts, "held_bytes": parts}}
    plan = {{"track": NAME, "num_steps": per * len(stages), "repeats": 1, "time_cap_min": 0.001}}
    plan |= {{"vocab_size": 257, "sequence_len": 16, "memory_gib": dict.fromkeys("1248", {memory})}}
    plan |= {{"device": {{"name": "a machine", "memory_gib": 16.0, "peak_flops": 1e12}}}}
    places = [{{"stage": s, "from_step": 1 + per * i, "steps": per}} for i, s in enumerate(stages)]
    plan |= {{"stages": [counted | place for place in places]}}
    plan |= {{"short_runs": {{s: ["--short=1", "--only=" + s] for s in STAGES}} | {{"all": ["--short=1"]}}}}
    plan |= {{"communication_bytes_of_8": 3e8}}
    Path(given["--plan"]).write_text(json.dumps(plan))
    sys.exit()
folder = Path(given["--runs-dir"]) / given["--run-name"]
folder.mkdir(parents=True)
print("warm-up   1.5 s, compilation included; attention sdpa (error 0)")
if BEHAVIOR == "crashes":
    print("Traceback (most recent call last):\\nValueError: the loss is nan")
    sys.exit(1)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)  # as torchrun does
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(1, per * len(stages) + 1 - (BEHAVIOR == "slow") * per):
        values = {{"step": step, "dt_s": (MS + step % 2) / 1e3, "peak_memory_gib": 2.0}}
        print(json.dumps(values), file=file, flush=True)
time.sleep(600)
'''
KNOWN = [
    "--help", "--plan", "--device", "--data-dir", "--runs-dir", "--run-name", "--short", "--only", "--profile-steps",
    "--demo", "--no-checkpoints",
]  # fmt: skip


def make_checkout(folder: Path, ms: float = 100.0, known=KNOWN, memory: float = 1.0, **behavior: str) -> Path:
    """A checkout with tools/ and fake scripts; behavior: of tracks that do something else than to work."""
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    for track, script in bench.SCRIPTS.items():
        (folder / script).parent.mkdir(exist_ok=True)
        values = {"name": track, "stages": STAGES[track], "ms": ms, "known": [*known], "memory": memory}
        (folder / script).write_text(FAKE.format(**values, behavior=behavior.get(track, "works")))
    return folder


@pytest.fixture
def checkout(tmp_path, temporary, monkeypatch) -> Path:
    """The checkout that bench takes for its own."""
    folder = make_checkout(tmp_path / "own")
    monkeypatch.setattr(bench, "ROOT", folder)
    return folder


def test_a_track_that_fails_is_one_line_and_the_others_go_on(tmp_path, temporary, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROOT", make_checkout(tmp_path / "own", limited="damaged", two_hour="crashes"))
    assert bench.main(["--json", str(tmp_path / "f.json")]) == 1
    lines, content = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "f.json").read_text())
    failed = [line for line in lines if "FAILED" in line]
    assert failed == [
        "limited: FAILED, exit code 1: RuntimeError: this script is damaged",
        "two_hour: FAILED, exit code 1: ValueError: the loss is nan",
    ]
    assert list(content["tracks"]["tiny"]["stages"]) == STAGES["tiny"]
    assert f"two_hour/{', '.join(STAGES['two_hour'])}: left out, its script failed before it" in lines
    assert list(content["tracks"]["unlimited"]["stages"]) == STAGES["unlimited"]
    assert list(temporary.iterdir()) == [] and processes_with(str(temporary)) == []


def test_figures_of_a_track(checkout, tmp_path, capsys):
    """Steps 2, 3 and 4 of each stage are counted: 100, 101 and 100 ms. The cap of 0.06 s is passed."""
    assert bench.main(["tiny", "--json", str(tmp_path / "f.json")]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "f.json").read_text())["tracks"]["tiny"]
    stage = found["stages"]["two_passes"]
    assert (stage["ms"], stage["spread_ms"], stage["steps"]) == (100.0, 0.5, 3) and stage["peak_memory_gib"] == 2.0
    assert stage["mfu"] == pytest.approx(1.024e9 / 0.1 / 1e12) and stage["tokens_per_s"] == pytest.approx(10240)
    assert found["warm_up_s"] == 1.5 and found["projection"]["minutes"] == pytest.approx(200 * 0.1 / 60)
    assert found["projection"]["minutes_on_8"] == pytest.approx(200 * (0.1 / 8 + 0.001) / 60)
    assert found["projection"]["stopped"] and "it would be stopped" in printed and "cap 0.001 min" in printed


def test_what_does_not_fit_is_left_out_and_said(tmp_path, temporary, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROOT", make_checkout(tmp_path / "large", memory=30.0))
    assert bench.main(["--json", str(tmp_path / "f.json")]) == 0
    printed = capsys.readouterr().out
    reason = "left out, it takes 30 GiB by its own estimate, and a machine has 16 GiB: name the track to try it"
    for track, stages in STAGES.items():
        assert f"{track}/{', '.join(stages)}: {reason}" in printed.splitlines()
    assert bench.main(["tiny"]) == 0  # named
    assert "tiny: 2 stages in" in capsys.readouterr().out


def test_the_order_of_what_fits_into_the_time(checkout, capsys):
    """A stage takes 12 s by the guess for a CPU: half a minute is enough for the first two of the order."""
    assert bench.main(["--minutes=0.45"]) == 0
    printed = capsys.readouterr().out
    measured = [line.split(":")[0] for line in printed.splitlines() if " stages in " in line]
    assert measured == ["limited", "tiny"]
    for track in ("two_hour", "unlimited"):
        assert f"{track}/{', '.join(STAGES[track])}: left out, 0.45 minutes are too few for it" in printed


def test_a_slow_stage_is_left_out_when_the_time_is_over(tmp_path, temporary, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROOT", make_checkout(tmp_path / "own", limited="slow"))
    monkeypatch.setattr(bench, "ON_CPU", bench.ON_CPU | {"start_s": 0.0})
    monkeypatch.setattr(bench, "ENOUGH_S", 0.1)
    assert bench.main(["limited", "--minutes=0.15"]) == 0
    printed = capsys.readouterr().out
    assert "limited/replay: left out, no time was left for it" in printed and "limited/plain  " in printed
    assert "not measured, at the same operations per second: replay" in printed


def test_interrupted(tmp_path):
    """Ctrl-C in the second track: what there is is printed, no process and no file stays."""
    folder, temporary = make_checkout(tmp_path / "own", tiny="slow"), tmp_path / "temporary"
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(folder / "tools/bench.py"), "limited", "tiny", "--json", str(tmp_path / "f.json")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("tiny: one_pass"):
            break
    until = time.monotonic() + 60
    while not any(path.read_text().count("\n") >= 4 for path in temporary.rglob("runs-tiny/bench/metrics.jsonl")):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(processes_with(str(temporary))) >= 2  # the script, and what it started
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "limited/plain  " in rest and "limited/replay  " in rest, rest
    assert "tiny/one_pass  " in rest and "tiny/two_passes: left out, interrupted before it" in rest
    content = json.loads((tmp_path / "f.json").read_text())
    assert content["interrupted"] and list(content["tracks"]["limited"]["stages"]) == STAGES["limited"]
    assert list(temporary.iterdir()) == [] and processes_with(str(temporary)) == []


def test_counted(checkout, capsys):
    assert bench.main(["limited", "--counted", "--peak-tflops=98.9", "--gpus=2"]) == 0
    header, plain, _ = capsys.readouterr().out.splitlines()[1:]
    assert header.split()[:2] == ["stage", "tokens"] and "given ops ms" in header
    cells = plain.split()
    assert cells[0] == "limited/plain" and [float(cell) for cell in cells[-4:]] == pytest.approx(
        [1.024e9 / 2 / 989e9, 5e9 / 3.35e9, 1.024e9 / 2 / 98.9e9, 5e9 / 3.35e9], rel=1e-3
    )


# ------------------------------------------------------------------------------------------- another checkout


def test_against_another_checkout(checkout, tmp_path, capsys):
    """It is slower by half and older: what it does not know it is not given, which is said."""
    known = [flag for flag in KNOWN if flag not in ("--plan", "--short")]
    other = make_checkout(tmp_path / "other", ms=150.0, known=known)
    arguments = ["--against", str(other), "--stage=limited/replay", "--json", str(tmp_path / "f.json")]
    assert bench.main(arguments) == 0
    found = json.loads((tmp_path / "f.json").read_text())["against"]
    assert [run["which"] for run in found["runs"]] == ["A", "B", "A", "B"]
    assert [len(run["all_ms"]) for run in found["runs"]] == [3, 3, 3, 3]
    assert found["ratios"] == pytest.approx([1.5] * 3) and found["ratio"] == pytest.approx(1.5)
    assert found["dropped_flags"] == ["--short=1"] and found["stage"] == "limited/replay"
    printed = capsys.readouterr().out
    assert (
        "B does not know and was not given: --short=1" in printed and "time of B / time of A: 1.500 +- 0.000" in printed
    )


ORIGINAL = """
import os, sys, time
known = "--input_bin --input_val_bin --dupe-start-epoch --logit-avg"
if "--help" in sys.argv:
    print("usage: train.py [--input_bin INPUT_BIN]", known)
    sys.exit()
assert os.environ["WANDB_MODE"] == "disabled"
assert all(flag.split("=")[0] in known.split() for flag in sys.argv[1:]), sys.argv
assert "--logit-avg=0" in sys.argv and "--dupe-start-epoch=1" in sys.argv
assert all(os.path.exists(flag.split("=")[1]) for flag in sys.argv[1:] if flag.startswith("--input"))
print("--- Hyperparameters ---\\nStep 00000 | Val BPB: 3.300000 | Val Loss: 10.82")
for step in range(1, 100):
    line = f"step {step:05d} ({step / 21:.2f}%) | loss: 10.1 | dt: {130.0 + step % 2:.2f}ms | tok/sec: 4,000,000"
    print(f"{line} | bf16_mfu: 41.23% [DUPE] | eta: 51.2m", flush=True)
    time.sleep(0.05)
"""


def test_against_the_original_project(checkout, tmp_path, capsys):
    other = tmp_path / "original"
    other.mkdir()
    (other / "train.py").write_text(ORIGINAL)
    arguments = ["--against", str(other), "--stage=limited/replay", "--json", str(tmp_path / "f.json")]
    assert bench.main(arguments) == 0
    found = json.loads((tmp_path / "f.json").read_text())["against"]
    assert found["original_project"] and found["dropped_flags"] == []
    assert found["ratio"] == pytest.approx(1.3, abs=0.02) and "the original project" in capsys.readouterr().out
    assert bench.main(["--against", str(other), "--stage=two_hour/windows_256_768"]) == 1
    assert "two_hour/train.py is not there" in capsys.readouterr().err
    with pytest.raises(ValueError, match="only limited/plain, limited/replay, tiny/one_pass can be run"):
        original.original_flags("tiny/two_passes", tmp_path, set())
    with pytest.raises(ValueError, match="has no --dupe-start-epoch"):
        original.original_flags("limited/replay", tmp_path, {"--input_bin"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["limitd"], "there is no track limitd: choose of limited, tiny, two_hour, unlimited"),
        (["--minutes=0"], "--minutes 0 must be positive"),
        (["--steps=1"], "--steps 1 must be 2 or more"),
        (["--peak-tflops=-1"], "--peak-tflops -1 must be positive"),
        (["--stage=limited"], "--stage limited must be a track and its stage, such as limited/plain"),
        (["--stage=limited/plain", "tiny"], "--stage limited/plain is not of tiny: name no track beside it"),
        (["--gpus=3"], "--gpus 3: this machine has"),
        (["--against=/nowhere"], "--against /nowhere is not a folder"),
        (["--json=/nowhere/f.json"], "--json /nowhere/f.json: there is no folder /nowhere"),
    ],
)
def test_refused_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_stage_that_a_track_does_not_have_is_refused(checkout, capsys):
    assert bench.main(["--stage=limited/two_passes"]) == 2
    assert "--stage limited/two_passes: limited has the stages plain, replay" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- traces


def test_the_kinds_of_kernels_of_a_gpu(tmp_path):
    """Kernels belong to the range that launched them, whenever they ran; overlaps count once for what is idle."""
    events, names = [], []

    def add(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args) -> None:
        events.append({"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args})

    add("cpu_op", "HeadLoss", 10, 10)
    add("user_annotation", "optimizer", 30, 10)
    for i, (name, launched, start, duration) in enumerate(
        [
            ("nvjet_hsh_128x256", 1, 5, 20),
            ("flash_fwd_kernel", 5, 25, 10),
            ("nvjet_hsh_128x256", 12, 35, 30),
            ("triton_poi_fused_add", 25, 65, 5),
            ("nvjet_hsh_128x256", 35, 70, 20),
            ("ncclDevKernel_ReduceScatter", 38, 85, 25),
            ("Memcpy DtoH", 50, 150, 10),
        ]
    ):
        add("cuda_runtime", "cudaLaunchKernel", launched, 1, correlation=i)
        add("gpu_memcpy" if "Memcpy" in name else "kernel", name, start, duration, tid=7, correlation=i)
        names.append(name)
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}, file)
    found = {kind: 1e3 * ms for kind, ms in breakdown(path).items()}
    assert found == pytest.approx(
        {"matrix products": 20, "attention": 10, "head and loss": 30, "elementwise": 15, "optimizer": 20}
        | {"communication": 25, "idle": 40}
    )
    assert [kind_of(name) for name in names][:2] == ["matrix products", "attention"]
    assert covered([(0, 4), (2, 3), (6, 8)]) == 6
