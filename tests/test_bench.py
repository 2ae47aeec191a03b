"""tools/bench.py: on the real scripts at toy size, and on fakes that only have the command line and the run folder."""

import contextlib
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

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, flags
from torch.utils.flop_counter import FlopCounterMode

import tiny.train as tiny
import train
import two_hour.train as two_hour
import unlimited.train as unlimited
from slowrun import rules
from slowrun.data import load_splits, token_bytes
from slowrun.weights import compute_weights
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


SCRIPTS = {"limited": train, "tiny": tiny, "two_hour": two_hour, "unlimited": unlimited}
EACH = pytest.mark.parametrize("track", SCRIPTS)


def write_plan(track: str, path: Path, **values) -> dict:
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[track].main([*flags(**values), f"--plan={path}"])
    assert stopped.value.code == 0
    return json.loads(path.read_text())


@EACH
def test_the_plan_counts_what_a_run_does(track, tmp_path, capsys):
    """Without the data it is for the official number of tokens, and says so; its sums agree with its parts."""
    plan = write_plan(track, tmp_path / "plan.json", data_dir=str(tmp_path / "none"))
    printed = capsys.readouterr().out
    assert plan["assumed_data"] and "100,000,000 tokens, as" in printed and str(tmp_path / "plan.json") in printed
    assert plan["num_steps"] == sum(stage["steps"] for stage in plan["stages"])
    assert list(dict.fromkeys(stage["stage"] for stage in plan["stages"])) == STAGES[track]
    assert plan["tokens"] == sum(stage["steps"] * stage["tokens_per_step"] for stage in plan["stages"])
    for stage in plan["stages"]:
        assert stage["flops_per_step"] == stage["flops_per_token"] * stage["tokens_per_step"]
        assert min(stage["moved_bytes"].values()) > 0
    assert plan["dtype"] == "bfloat16" and plan["memory_gib"]["1"] > plan["memory_gib"]["8"]
    most = max(sum(stage["held_bytes"].values()) for stage in plan["stages"])
    assert most == pytest.approx(plan["memory_gib"]["1"] * 2**30)
    assert plan["time_cap_min"] == SCRIPTS[track].Config.time_cap_min == rules.RULES[track].cap_min
    assert not list(tmp_path.glob("runs*"))


STEPS = {"limited": 2097, "tiny": 2850, "two_hour": 4194}  # of the published records


@pytest.mark.parametrize("track", STEPS)
def test_the_official_run_has_the_published_number_of_steps(track, tmp_path):
    assert write_plan(track, tmp_path / "plan.json", data_dir=str(tmp_path))["num_steps"] == STEPS[track]


@EACH
def test_short_runs_have_the_stages_that_they_are_named_after(track, tmp_path):
    """Each makes steps of the official run's operations."""
    official = write_plan(track, tmp_path / "plan.json", data_dir=str(tmp_path / "none"))
    flops = {stage["stage"]: stage["flops_per_token"] for stage in official["stages"]}
    assert {*STAGES[track], "all"} == official["short_runs"].keys()
    workplace.write_splits(tmp_path / "data", 50257, {"train": 3_200_000, "val": 20_000})
    for name, short in official["short_runs"].items():
        with pytest.raises(SystemExit):
            SCRIPTS[track].main([*short, f"--data-dir={tmp_path / 'data'}", f"--plan={tmp_path / 'short.json'}"])
        plan = json.loads((tmp_path / "short.json").read_text())
        found = list(dict.fromkeys(stage["stage"] for stage in plan["stages"]))
        assert found == (STAGES[track] if name in ("all", "teacher") else [name])
        assert all(stage["flops_per_token"] == flops[stage["stage"]] for stage in plan["stages"])


def visible_keys(T: int, window: int) -> float:
    """Positions that the average position attends to, counted from the mask."""
    distance = np.arange(T)[:, None] - np.arange(T)
    return ((distance >= 0) & (distance <= window)).sum() / T


def toy_model(track: str, config) -> torch.nn.Module:
    """The GPT of a toy size, on random masters, none of which are 0."""
    script = SCRIPTS[track]
    torch.manual_seed(0)
    masters = script.init_masters(config, torch.float32, torch.device("cpu"))
    masters |= {name: torch.randn_like(p) / 50 for name, p in masters.items() if "c_proj" in name}
    model = script.GPT(config, torch.float32)
    model.load_state_dict(compute_weights(masters, script.block_names(config), script.block_weights))
    return model


def late_and_early(track: str, config) -> dict[str, tuple[tuple, list[tuple[int, int]], float]]:
    """By stage: arguments of training_loss; (window, times) of all calls of attention; counted operations per token.

    times: 3 with a backward pass, 1 without.
    """
    script, T, stages = SCRIPTS[track], config.sequence_len, {}
    if track == "tiny":
        windows = [config.window(i) for i in range(config.n_layer)]
        for passes in (1, 2):
            calls = [(w, 3) for w in windows] + [(w, 1) for w in windows] * (passes - 1)
            stages[f"{passes} passes"] = (
                (passes, torch.tensor([1.0, 0.5, 0.25])),
                calls,
                script.flops_per_token(config, passes),
            )
        return stages
    windows = [config.window_stages[0].windows] if track == "two_hour" else []
    for replay in (False, True):
        layers = [(config.window(i, *windows), 3) for i in config.layer_order(replay)]
        counted = script.flops_per_token(config, *windows, replay)
        stages[f"replay {replay}"] = (*windows, replay, ()), [*layers, (T, 3)], counted
    if track == "unlimited":
        calls = [*layers, (T, 3), *((window, 1) for window, _ in layers)]
        counted = script.make_stage(config, replay=True, taught=True).flops_per_token
        stages["teacher"] = (True, (), toy_model(track, config).requires_grad_(False)), calls, counted
    return stages


class NoModules(contextlib.nullcontext):
    """In place of FlopCounterMode's tracker of modules, which fails on a module that runs without gradients."""

    parents = frozenset({"Global"})


@EACH
def test_counted_operations_are_those_that_torch_counts(track, monkeypatch):
    """Matrix products by FlopCounterMode; attention, which that counts without its mask, from the mask: within 1%."""
    script = SCRIPTS[track]
    values = script.DEMO | {"dropout": 0.0}
    config = script.Config(**values)
    model = toy_model(track, config)
    module = sys.modules[script.GPT.__module__]
    monkeypatch.setattr(module, "attend", lambda q, k, v, *others, **named: q + k + v)
    B, T = 2, config.sequence_len
    rows = torch.randint(config.vocab_size, (B, T + 1))
    for stage, (arguments, calls, expected) in late_and_early(track, config).items():
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = NoModules()
        with counter:
            model.training_loss(rows[:, :-1], rows[:, 1:], *arguments)[0].backward()
        attention = sum(4 * config.n_embd * times * visible_keys(T, window) for window, times in calls)
        counted = counter.get_total_flops() / (B * T) + attention
        assert expected == pytest.approx(counted, rel=0.01), stage


def profile_span_ms(path: Path) -> float:
    """From the start of a trace's first operator to the end of its last."""
    with gzip.open(path, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("cat") == "cpu_op"]
    return (max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)) / 1e3


def test_the_breakdown_of_a_profiled_step(data_dir, tmp_path):
    """All of its time is of some kind, and every kind but communication has some."""
    small = SMALL["limited"] | {"data_dir": data_dir, "runs_dir": tmp_path, "run_name": "run", "device": "cpu"}
    assert train.main(flags(**small | {"num_epochs": 1, "readout_epochs": 1, "profile_steps": "2-2"})) == 0
    trace = tmp_path / "run" / "profile_2-2.json.gz"
    times = breakdown(trace)
    assert list(times) == list(KINDS) and times["communication"] == 0.0
    assert min(times[kind] for kind in KINDS if kind != "communication") > 0.0
    assert sum(times.values()) == pytest.approx(profile_span_ms(trace), rel=0.01)


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


def test_random_splits_are_accepted_by_the_scripts(tmp_path):
    workplace.write_splits(tmp_path / "data", 50257, {"train": 1_000_000, "val": 20_000})
    split = load_splits(str(tmp_path / "data"), 50257, 2048)["train"]
    assert len(split.tokens) == 1_000_000 and 500 < 1_000_000 / split.num_documents < 1100
    assert token_bytes(str(tmp_path / "data"), 50257)[1] == "from meta.json"


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
    with pytest.raises(
        ValueError, match="only limited/plain, limited/replay, tiny/one_pass of the original project can be run"
    ):
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
