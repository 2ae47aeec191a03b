"""The referee accepts honest runs of all tracks, and rejects each known way to be wrong by the check that is for it."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, TRACKS, UNLIMITED
from judging import (
    Case,
    HonestRuns,
    as_defaults,
    in_this_process,
    judge,
    known_instruments,  # noqa: F401
    list_instruments,
    make_record,
    with_val_document,
)
from safetensors.torch import load_file, save_file

from records import referee
from records.judge import files, overlap, scoring, verdict, worker
from records.judge.clock import planned_tokens
from records.judge.data import official_sequences
from records.judge.findings import Check, Judgement, Options
from records.judge.runs import open_folders
from slowrun import rules
from slowrun.data import sha256_file
from slowrun.folder import instrument_sha256, write_json

TRACK = "two_hour"  # of the runs that cheat: one script, two members


@pytest.fixture(scope="session")
def honest(data_dir) -> HonestRuns:
    return HonestRuns(data_dir)


@pytest.fixture
def copy(honest, tmp_path):
    """Copies a run folder."""

    def make(track: str = TRACK, seed: int = 42, name: str = "run") -> Case:
        return Case(shutil.copytree(honest(track, seed), tmp_path / name))

    return make


@pytest.fixture
def case(copy) -> Case:
    return copy()


@pytest.fixture
def in_process(monkeypatch):
    """Scores without another process."""
    monkeypatch.setattr(scoring, "run_worker", in_this_process)


STATIC = ["--other-data", "--static"]
WRAP = """
honest_members = load_members


def load_members(run_dir, device):
    for weight, log_probs in honest_members(run_dir, device):
        yield weight, changed(log_probs)
"""

# ---------------------------------------------------------------------------------------------------------- honest runs


@pytest.mark.parametrize("track", [*TRACKS, *UNLIMITED])
def test_honest_runs_are_accepted(honest, track, capsys, in_process):
    """And the modules of this process stay its own."""
    run, own = honest(track), ("train", "model", "slowrun", "slowrun.clock", "slowrun.scoring")
    modules = {name: sys.modules.get(name) for name in own}
    found = judge(capsys, run)
    assert found.fails == {} and found.exit_code == 0 and "NOT A RECORD" in found.verdict
    checks = [*verdict.STATIC_CHECKS, *verdict.DATA_CHECKS, *verdict.SCORE_CHECKS]
    assert found.texts("PASS").keys() == {"files", *(name for name, _ in checks)}
    assert "no record on these data to compare with" in found.texts("NOTE")["significance"]
    assert {name: sys.modules.get(name) for name in own} == modules
    assert not list(run.rglob("__pycache__"))


def test_harmless_changes_are_accepted(case, capsys, in_process):
    """What the cheats below do, without the cheat."""
    case.append_code("def changed(log_probs):\n    return lambda tokens: log_probs(tokens)\n" + WRAP)
    case.claim_what_it_scores()
    case.rename("00112233")
    as_defaults(case)
    case.configure(log_every=7, data_dir=case.read("config.json")["config"]["data_dir"])
    found = judge(capsys, case)
    assert found.fails == {} and "code" not in found.texts("NOTE")


def test_a_record_is_accepted(case, capsys, in_process, monkeypatch, tmp_path):
    """With this test's data as the benchmark's: no --other-data, no override, 8 H100, significant."""
    make_record(case, monkeypatch)
    lists(tmp_path, 4.5)
    found = judge(capsys, case, options=["--records-dir", str(tmp_path / "records")])
    assert found.fails == {} and found.verdict == "nothing fails"
    static = judge(capsys, case, options=["--static", "--records-dir", str(tmp_path / "records")])
    assert static.fails == {} and static.verdict.startswith("static part only")
    assert "score" in static.texts("NOTE")["not made"] and "11 follow" in static.texts("PASS")["steps"]


def test_a_run_folder_lives_anywhere(copy, capsys, tmp_path):
    """Outside of any checkout it resumes and is scored by its own code/, in processes that know no other."""
    case, elsewhere = copy("limited"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (case.path / "result.json").unlink()
    shutil.rmtree(case.path / "final")
    (case.path / "final").mkdir()
    (case.path / "checkpoints").mkdir()
    command = [sys.executable, str(case.path / "code" / "train.py"), "--resume", str(case.path)]
    environment = {n: value for n, value in os.environ.items() if n != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    case.append_code(
        "def load_members(run_dir, device, honest_members=load_members):\n"
        '    assert {Path(sys.modules[n].__file__).parent for n in sys.modules if n.split(".")[0] == "slowrun"} == {\n'
        '        Path(__file__).parent / "slowrun"\n'
        "    }\n"
        "    yield from honest_members(run_dir, device)\n"
    )
    found = judge(capsys, case)
    assert found.fails == {} and "the version of 2026-01-01: change 1" in found.texts("PASS")["instrument"]


def test_data_without_a_holdout(case, data_dir, tmp_path, capsys, in_process):
    """Those of the original project: nothing is claimed, nothing is checked, and it is said."""
    shutil.copytree(data_dir, tmp_path / "data")
    (tmp_path / "data" / "fineweb_holdout.pt").unlink()
    (tmp_path / "data" / "meta.json").unlink()
    case.edit("result.json", holdout_loss=None, val_bpb=None, val_bytes=0)
    for name in ("config.json", "result.json"):
        hashes = case.read(name)["data_sha256"]
        case.edit(name, data_sha256={split: hashes[split] for split in ("train", "val")})
    found = judge(capsys, case, options=["--other-data", "--data", str(tmp_path / "data")])
    assert found.fails == {} and "holdout" not in found.texts("PASS")
    assert (
        "has no holdout" in found.texts("NOTE")["holdout"] and "left bits per byte out" in found.texts("NOTE")["score"]
    )


def lists(folder, val_loss: float, **values) -> None:
    """Lists of records with one of this loss."""
    path = folder / "records" / TRACK / "records.json"
    path.parent.mkdir(parents=True)
    write_json(path, {"source": "test", "records": [{"number": 1, "val_loss": val_loss} | values]})


# ------------------------------------------------------------------------------------ cheats that only predictions show

MORE_MASS = """
def changed(log_probs):
    def cached(tokens):  # tokens that were seen are more likely, and nothing is less
        out = log_probs(tokens)
        seen = torch.nn.functional.one_hot(tokens, out.size(-1)).cumsum(1) > 0
        return torch.where(seen, (out.exp() + 0.01).log(), out)
    return cached
"""
TARGET_GATE = """
def changed(log_probs):
    def peeking(tokens):
        out = log_probs(tokens)
        gate = torch.zeros_like(out)
        gate[:, :-1].scatter_(-1, tokens[:, 1:, None], 0.1)
        return (out + gate).log_softmax(-1)
    return peeking
"""
RARE_GATE = """
def changed(log_probs):
    def peeking(tokens):  # at one position of 32
        out = log_probs(tokens)
        gate = torch.zeros_like(out)
        gate[:, 7].scatter_(-1, tokens[:, 8, None], 3.0)
        return (out + gate).log_softmax(-1)
    return peeking
"""
ACROSS_MEMBERS = """
SEEN = {"members": 0, "counts": torch.zeros(1)}


def changed(log_probs):
    SEEN["members"] += 1
    learned = 0.05 * (1 + SEEN["counts"]).log()  # from what the members before were asked

    def adapted(tokens):
        out = log_probs(tokens)
        SEEN["counts"] = SEEN["counts"] + torch.bincount(tokens.flatten(), minlength=out.size(-1))
        return (out + learned).log_softmax(-1)
    return adapted
"""
OTHER_ROWS = """
def changed(log_probs):
    def mixing(tokens):
        out = log_probs(tokens)
        return torch.logaddexp(out - 0.105, out.flip(0) - 2.303).log_softmax(-1)
    return mixing
"""
ADAPTING = """
def changed(log_probs):
    state = {"calls": 0, "counts": torch.zeros(1)}

    def adapting(tokens):  # learns how often tokens are, once it has seen enough
        out = log_probs(tokens)
        state["calls"] += 1
        if state["calls"] > 9:
            out = (out + (1 + state["counts"]).log() * 0.05).log_softmax(-1)
            state["counts"] = state["counts"] + torch.bincount(tokens.flatten(), minlength=out.size(-1))
        return out
    return adapting
"""
REMEMBERING = (
    ADAPTING.replace("changed(", "adapting_log_probs(")
    + """

def changed(log_probs):
    adapting, answers = adapting_log_probs(log_probs), {}

    def remembering(tokens):  # answers as before what it was asked before
        key = tokens.numpy().tobytes()
        if key not in answers:
            answers[key] = adapting(tokens)
        return answers[key]
    return remembering
"""
)
MEMORISED = """
TABLE = torch.tensor({table})  # (n, 3): what follows two tokens


def changed(log_probs):
    def remembering(tokens):
        out = log_probs(tokens)
        hits = (tokens[:, 1:, None] == TABLE[:, 1]) & (tokens[:, :-1, None] == TABLE[:, 0])
        bonus = torch.zeros_like(out)
        follows = torch.nn.functional.one_hot(TABLE[:, 2], out.size(-1)).float()
        bonus[:, 1:] = 3.0 * (hits.float() @ follows).clamp(max=1)
        return (out + bonus).log_softmax(-1)
    return remembering
"""


@pytest.mark.parametrize(
    "code, checks",
    [
        (MORE_MASS, "probabilities"),
        (TARGET_GATE, "causality, learning"),
        (RARE_GATE, "learning"),
        (ACROSS_MEMBERS, "learning"),
        (OTHER_ROWS, "causality, learning"),  # sequences are scored again in other company
        (ADAPTING, "learning"),
        (REMEMBERING, "learning"),
        (MEMORISED, "holdout"),
    ],
    ids=["mass", "gate", "rare_gate", "across_members", "batch", "adapting", "remembering", "memorised"],
)
def test_predictions_that_cheat(case, data_dir, capsys, in_process, code, checks):
    if "{table}" in code:
        tokens = torch.load(data_dir / "fineweb_val.pt", weights_only=True)["tokens"].tolist()
        code = code.replace("{table}", str(sorted({tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)})))
    honest_loss = case.read("result.json")["val_loss"]
    case.append_code(code + WRAP)
    case.claim_what_it_scores()
    if code in (MORE_MASS, TARGET_GATE, MEMORISED):  # it pays
        assert case.read("result.json")["val_loss"] < honest_loss
    found = judge(capsys, case, options=["--other-data", "--probe-seed=1"])  # as in what it claims
    fails = found.fails.keys() - ({"causality"} if code is RARE_GATE else set())  # which it may or may not meet
    assert fails == {*checks.split(", ")}, found.fails


def test_weights_that_were_trained_on_after_the_last_step(case, capsys, in_process):
    """Signed and claimed anew, they still are not those that were validated."""
    path = case.path / "final" / "epoch_02.safetensors"
    weights = load_file(path)
    save_file({name: 1.1 * p if name == "lm_head.weight" else p for name, p in weights.items()}, path)
    members = case.read("final/members.json")
    members["members"][1]["sha256"] = sha256_file(path)
    write_json(case.path / "final" / "members.json", members)
    case.sign_final()
    validations = case.metrics(), (case.path / "log.txt").read_text(), case.read("result.json")["readouts"]
    case.claim_what_it_scores()
    mixed = case.read("result.json")["readouts"]["probability_average"]
    log = validations[1].replace(f"{validations[2]['probability_average']:.4f}", f"{mixed:.4f}")
    case.write_metrics(validations[0])
    (case.path / "log.txt").write_text(log)
    readouts = validations[2] | {"probability_average": mixed}
    case.edit("result.json", readouts=readouts, best_val_loss=min(readouts.values()))
    found = judge(capsys, case)
    assert found.fails.keys() == {"members"} and "epoch_02.safetensors has the loss" in found.fails["members"]


def test_a_readout_of_fewer_members_than_declared(case, capsys, in_process):
    members = case.read("final/members.json")
    write_json(case.path / "final/members.json", members | {"members": [members["members"][1] | {"weight": 1.0}]})
    (case.path / "final" / "epoch_01.safetensors").unlink()
    case.sign_final()
    loss = case.read("result.json")["readouts"]["epoch_2"]
    case.replace(r"^(.* val_loss +)\d\.\d{4} ", rf"\g<1>{loss:.4f} ")
    case.edit("result.json", val_loss=loss)
    assert "1 members, by the config the readout has 2" in judge(capsys, case).fails["weights"]


def test_a_claim_that_is_a_little_too_good_does_not_count(case, capsys, in_process, tmp_path):
    loss = case.read("result.json")["val_loss"]
    lists(tmp_path, loss + 0.0045, data_sha256=case.read("result.json")["data_sha256"]["val"])
    case.claim("val", loss - 0.0009)
    found = judge(capsys, case, options=["--other-data", "--records-dir", str(tmp_path / "records")])
    assert found.fails.keys() <= {"score"} and "a submission needs" in found.texts("NOTE")["significance"]


def test_wrong_outputs_are_named(case, capsys, in_process):
    case.append_code("def changed(log_probs):\n    return lambda tokens: log_probs(tokens).double()\n" + WRAP)
    found = judge(capsys, case)
    assert found.fails.keys() == {name for name, _ in verdict.SCORE_CHECKS}
    assert "returned torch.float64 (32, 32, 97), not torch.float32 (32, 32, 97)" in found.fails["probabilities"]


def test_predictions_that_are_not_finite(case, capsys, in_process):
    code = "def changed(log_probs):\n    return lambda tokens: log_probs(tokens).index_fill(-1, {}, -math.inf)\n"
    case.append_code(code.format("torch.tensor(5)") + WRAP)
    assert "not finite" in judge(capsys, case).fails["probabilities"]


# ------------------------------------------------------------------------------------------------- cheats with the data


def test_training_data_with_validation_documents(case, data_dir, tmp_path, capsys, in_process):
    sha256 = with_val_document(data_dir, tmp_path / "data")
    for name in ("config.json", "result.json"):
        case.edit(name, data_sha256=case.read(name)["data_sha256"] | {"train": sha256})
    found = judge(capsys, case, options=["--other-data", "--data", str(tmp_path / "data")])
    assert found.fails.keys() == {"overlap"} and "1 in val and 0 in holdout" in found.fails["overlap"]


def test_other_data_than_the_run_names(case, data_dir, tmp_path, capsys, in_process):
    with_val_document(data_dir, tmp_path / "data")
    found = judge(capsys, case, options=["--other-data", "--data", str(tmp_path / "data")])
    assert {"data", "overlap"} == found.fails.keys()
    gone = judge(capsys, case, options=["--other-data", "--data", str(tmp_path / "nowhere")])
    assert {"data", "overlap", "targets", "steps", "score", "holdout"} < gone.fails.keys()
    assert "not found" in gone.fails["score"]


def test_validation_that_is_cut_short(case, capsys, in_process):
    """The claims of the first 20 sequences, exactly; then as a setting, which a record cannot have."""
    case.configure(val_sequences=20)
    case.claim_what_it_scores()
    found = judge(capsys, case)
    assert found.fails == {} and "cuts validation to 20 of 51" in found.texts("NOTE")["targets"]
    case.configure(val_sequences=4864)
    saved = case.read("config.json")
    case.edit("config.json", overrides={k: v for k, v in saved["overrides"].items() if k != "val_sequences"})
    case.tell()
    found = judge(capsys, case)
    assert found.fails.keys() == {"targets", "score", "members"}  # all members were validated on 20 sequences
    assert "val_tokens is 640, of 51 sequences 1,632" in found.fails["targets"]


def test_wrong_byte_counts(case, capsys, in_process):
    result = case.read("result.json")
    case.edit("result.json", val_bytes=2 * result["val_bytes"], val_bpb=result["val_bpb"] / 2)
    found = judge(capsys, case)
    assert found.fails.keys() == {"score"}
    assert "val_bpb" in found.fails["score"] and "val_bytes" in found.fails["score"]


def test_known_tokenizers_have_known_bytes(tmp_path, gpt2):
    check = Check(other_data=False)
    meta = {"source": "", "tokenizer": "", "splits": {}}
    for size, lengths in ((scoring.GPT2_VOCAB, gpt2.token_bytes()), (scoring.BYTES_VOCAB, [1] * 256 + [0])):
        write_json(tmp_path / "meta.json", meta | {"vocab_size": size, "token_bytes": lengths})
        assert scoring.byte_lengths(check, str(tmp_path), size).tolist() == lengths
        write_json(tmp_path / "meta.json", meta | {"vocab_size": size, "token_bytes": [2, *lengths[1:]]})
        with pytest.raises(ValueError, match=r"bytes per token from meta\.json are not"):
            scoring.byte_lengths(check, str(tmp_path), size)
    assert check.notes == []


# ------------------------------------------------------------------------------------ cheats that what is written shows


def fails_static(capsys, case: Case, *others: Case) -> dict[str, str]:
    return judge(capsys, case, *others, options=STATIC).fails


def test_work_after_the_clock_stopped(case, capsys):
    lines = case.metrics()
    last = next(line for line in lines[::-1] if "dt_s" in line)
    case.write_metrics([*lines, last | {"step": 12, "tokens": 12 * 1024}])
    assert "12 timed steps, up to 12, not 1 to 11" in fails_static(capsys, case)["clock"]
    untimed = {k: v for k, v in last.items() if k != "dt_s"}
    case.write_metrics([*lines, untimed])
    found = fails_static(capsys, case)
    assert found.keys() == {"clock"} and "steps [11] were trained off the clock" in found["clock"]


def test_members_from_after_the_last_step(case, capsys, in_process):
    members = case.read("final/members.json")["members"]
    case.edit("final/members.json", members=[members[0], members[1] | {"step": 12}])
    case.sign_final()
    found = judge(capsys, case)
    assert found.fails.keys() == {"weights"} and "after the last step counted" in found.fails["weights"]


def test_times_that_do_not_add_up(case, capsys):
    lines = case.metrics()
    case.write_metrics([line | {"dt_s": 2 * line["dt_s"]} if "dt_s" in line else line for line in lines])
    found = fails_static(capsys, case)
    assert found.keys() == {"clock"} and "add up to" in found["clock"]


def slow_down(case: Case, seconds: float) -> None:
    """All steps take so long."""
    lines, result = case.metrics(), case.read("result.json")
    case.write_metrics([line | {"dt_s": seconds} if "dt_s" in line else line for line in lines])
    total = seconds * result["steps"]
    case.edit("result.json", train_time_s=total, wall_time_s=total + 9, tokens_per_s=result["tokens"] / total)
    case.tell()


def test_a_run_over_its_cap(case, capsys):
    slow_down(case, 700.0)
    found = fails_static(capsys, case)
    assert found.keys() == {"clock"} and "128.33 min, the run's own cap is 120" in found["clock"]
    case.configure(time_cap_min=0.0)
    case.edit("result.json", time_cap_min=0.0)
    assert fails_static(capsys, case) == {}


def test_a_stop_by_the_cap_needs_a_cap_that_is_near(case, capsys, in_process):
    """The first ten steps as if the cap had stopped there."""
    result = case.read("result.json")
    case.write_metrics([line for line in case.metrics() if line["step"] < 11])
    short = {"steps": 10, "tokens": 10240, "stopped_by": "time_cap"}
    case.edit("result.json", **short)
    slow_down(case, 700.0)
    case.replace("finished after 11 steps", "stopped by time_cap after 10 steps")
    case.replace(r"^.* step 11/11 .*\n", "")
    readouts = {name: loss for name, loss in result["readouts"].items() if name != "epoch_2"}
    case.edit("result.json", readouts=readouts, best_val_loss=min(readouts.values()))
    assert fails_static(capsys, case) == {}
    slow_down(case, 1.0)
    found = fails_static(capsys, case)
    assert found.keys() == {"clock"} and "stopped_by is time_cap after 0.17 min" in found["clock"]
    case.edit("result.json", stopped_by="steps")
    found = judge(capsys, case)
    assert "10 steps, by config and data 11" in found.fails["steps"]


def test_a_log_of_another_script(case, copy, capsys):
    case.replace(r"two_hour track$", "limited track")
    found = fails_static(capsys, case)
    assert found.keys() == {"log"} and "log.txt has the headers" in found["log"]
    other = copy("limited", name="limited")
    shutil.copy(other.path / "log.txt", case.path / "log.txt")
    assert fails_static(capsys, case).keys() == {"log"}


def test_a_log_that_says_something_else(case, capsys):
    """Each by itself, where the other files agree with each other."""
    honest = (case.path / "log.txt").read_text()
    for pattern, by, said in (
        (r" track, seed 42,", " track, seed 43,", "its seed and number of steps"),
        (r"( time +training )\S+,", r"\g<1>999s,", "its training time"),
        (r"lr_multiplier 1.0", "lr_multiplier 2.0", "its overrides"),
        (r"(epoch_1 \| step 6/11 \| val )\d", r"\g<1>3", "other validation losses than metrics.jsonl, at steps [6]"),
    ):
        case.replace(pattern, by)
        assert said in fails_static(capsys, case)["log"]
        (case.path / "log.txt").write_text(honest)
    run_id = case.read("config.json")["run_id"]
    with open(case.path / "log.txt", "a") as file:
        file.write(f"{run_id} device    8 x NVIDIA H200, bfloat16, attention varlen\n")
    assert "it ran on several devices" in judge(capsys, case, options=STATIC).texts("NOTE")["log"]


def test_the_log_of_a_run_that_was_killed_and_resumed(case, capsys):
    """Lines of steps that were lost, and then came out otherwise or were not repeated, are no contradiction."""
    run_id = case.read("config.json")["run_id"]
    lost = f"{run_id} step 8/11 | train 9.9999 | lr 1.00\n{run_id} step 12/11 | train 1.0000 | lr 1.00\n"
    lost += f"{run_id} epoch_9 | step 12/11 | val 1.0000\n"
    case.replace(rf"^({run_id} epoch_1 .*\n)", rf"\g<1>{lost}{run_id} resumed at step 6/11, after 1.0 s of training\n")
    case.replace(r"\A", f"{run_id} no locks on this disk (No locks available): let no other process write to runs/x\n")
    assert fails_static(capsys, case) == {}
    case.replace(r"^.* resumed at step 6.*\n", "")
    assert "at steps [8]" in fails_static(capsys, case)["log"]


def test_a_stale_log(case, copy, capsys):
    other = copy(seed=43, name="other")
    shutil.copy(other.path / "log.txt", case.path / "log.txt")
    assert "lines of log.txt are not of run" in fails_static(capsys, case)["log"]
    other.rename(case.read("config.json")["run_id"])
    shutil.copy(other.path / "log.txt", case.path / "log.txt")
    found = fails_static(capsys, case)
    assert found.keys() == {"log"} and "other training losses than metrics.jsonl" in found["log"]


def test_a_short_run_need_not_print_a_step(case, capsys):
    case.replace(r"^.* step \d+/11 \| train .*\n", "")
    assert "has no line of a step" in fails_static(capsys, case)["log"]
    case.configure(log_every=50)
    assert fails_static(capsys, case) == {}


def test_hyperparameters_that_are_not_in_the_script(case, capsys, in_process, monkeypatch, tmp_path):
    make_record(case, monkeypatch)
    lists(tmp_path, 4.5)
    options = ["--records-dir", str(tmp_path / "records")]
    case.configure(weight_decay=0.4)
    found = judge(capsys, case, options=options)
    assert found.fails.keys() == {"code"} and "weight_decay 0.4 (default 0.3): put them" in found.fails["code"]
    saved = case.read("config.json")
    case.edit("config.json", overrides={k: v for k, v in saved["overrides"].items() if k != "weight_decay"})
    found = judge(capsys, case, options=options)
    assert "overrides are not what differs" in found.fails["code"]


@pytest.mark.parametrize(
    "change, check, said",
    [
        (lambda case: case.edit("result.json", device="CPU"), "log", "kind of devices"),
        (lambda case: other_hardware(case), "eligibility", "other hardware than 8 H100"),
        (lambda case: slow_down(case, 700.0), "clock", "the cap is 120"),
        (lambda case: case.configure(time_cap_min=240.0), "clock", "was set to 240"),
        (lambda case: case.configure(time_cap_min=0.0), "clock", "was lifted"),
    ],
)
def test_rules_of_records(case, capsys, monkeypatch, tmp_path, change, check, said):
    make_record(case, monkeypatch)
    lists(tmp_path, 4.5)
    change(case)
    found = judge(capsys, case, options=["--static", "--records-dir", str(tmp_path / "records")])
    assert said in found.fails[check], found.fails


def other_hardware(case: Case) -> None:
    case.replace("NVIDIA H100 80GB HBM3", "NVIDIA A100")
    case.edit("result.json", device="NVIDIA A100")


def test_losses_that_are_not_finite(case, capsys):
    honest_lines = case.metrics()
    case.write_metrics([line | {"train_loss": float("nan")} if line["step"] == 7 else line for line in honest_lines])
    found = fails_static(capsys, case)
    assert "step 7: train_loss not finite" in found["losses"] and found.keys() == {"losses"}
    case.write_metrics(honest_lines)
    readouts = case.read("result.json")["readouts"]
    assert min([*readouts.values(), float("nan")]) == min(readouts.values())  # what hides it
    name = list(readouts)[-1]
    case.edit("result.json", readouts=readouts | {name: float("nan")})
    case.replace(rf"{readouts[name]:.4f}  {name}", f"nan  {name}")
    found = fails_static(capsys, case)
    assert {"losses", "completeness"} <= found.keys() and "nan is not a finite number" in found["losses"]


@pytest.mark.parametrize(
    "changes, check",
    [
        ({"status": "partial"}, "completeness"),
        ({"stopped_by": "signal"}, "completeness"),
        ({"track": "limited"}, "completeness"),
        ({"run_id": "ffffffff"}, "completeness"),
        ({"seed": 43}, "completeness"),
        ({"data_sha256": {"train": "0" * 64, "val": "0" * 64}}, "completeness"),
        ({"data_efficiency": 20.0}, "completeness"),
        ({"tokens_per_s": 1.0}, "completeness"),
        ({"peak_memory_gib": float("inf")}, "completeness"),
        ({"time_cap_min": 15.0}, "completeness"),
        ({"val_tokens": 1631}, "completeness"),
        ({"best_val_loss": 3.0}, "losses"),
        ({"steps": 10}, "clock"),
        ({"tokens": 10240}, "clock"),
        ({"train_time_s": 0.1}, "clock"),
        ({"wall_time_s": 0.1}, "clock"),
        ({"parameters": 1}, "log"),
        ({"world_size": 8}, "log"),
        ({"device": "NVIDIA H100 80GB HBM3"}, "log"),
        ({"code_sha256": "0" * 64}, "code"),
        ({"eligible": True}, "eligibility"),
        ({"eligible": True, "not_eligible_because": []}, "eligibility"),
        ({"not_eligible_because": []}, "eligibility"),
    ],
)
def test_a_tampered_result(case, capsys, changes, check):
    case.edit("result.json", **changes)
    assert check in fails_static(capsys, case)


def test_a_result_that_lacks_something(case, capsys):
    result = case.read("result.json")
    for name in files.RESULT_KEYS:
        write_json(case.path / "result.json", {k: v for k, v in result.items() if k != name})
        (run,), _ = open_folders([case.path])
        judgement = Judgement(Options(other_data=True))
        judgement.run_check("completeness", "run", files.check_completeness, run, judgement)
        assert judgement.findings[0].status == "FAIL" and name in judgement.findings[0].text
    (case.path / "result.json").unlink()
    found = fails_static(capsys, case)
    assert found.keys() == {"completeness"} and "has not finished: resume it" in found["completeness"]


@pytest.mark.parametrize("split, check", [("val", "score"), ("holdout", "holdout")])
def test_a_claim_that_is_too_good(case, capsys, in_process, split, check):
    loss = case.read("result.json")[f"{split}_loss"]
    case.claim(split, loss - 0.0009)
    assert judge(capsys, case).fails == {}
    case.claim(split, loss - 0.0011)
    found = judge(capsys, case)
    assert found.fails.keys() == {check} and "at most 0.001 apart" in found.fails[check]


def test_weights_that_are_not_those_of_the_result(case, capsys, in_process):
    """The last bit of one number is another."""
    path = case.path / "final" / "epoch_01.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    found = judge(capsys, case)
    assert found.fails.keys() == {"weights"} and "epoch_01.safetensors" in found.fails["weights"]


def test_weights_of_members_and_how_they_are_mixed(case, capsys, in_process):
    final = case.read("final/members.json")
    first, second = final["members"]

    def said() -> str:
        case.sign_final()
        (run,), _ = open_folders([case.path])
        judgement = Judgement(Options(other_data=True))
        judgement.run_check("weights", "run", scoring.check_weights, run, judgement)
        (finding,) = judgement.findings
        return f"{finding.status} {finding.text}"

    for weights, problem in (((1.5, -0.5), "negative"), ((0.5, 0.6), "sum to 1.1"), ((0.5, 0.5), None)):
        members = [first | {"weight": weights[0]}, second | {"weight": weights[1]}]
        case.edit("final/members.json", members=members)
        assert problem in said() if problem else said().startswith("PASS")
    case.edit("final/members.json", members=final["members"], mixing="maximum")
    assert "'maximum' in members.json, 'probability' in result.json" in said()
    case.edit("final/members.json", mixing="probability")
    case.sign_final()
    case.append_code(WRAP.replace("yield weight, changed(log_probs)", "yield 0.5, log_probs"))
    case.claim_what_it_scores()
    found = judge(capsys, case).fails
    assert found.keys() == {"score"} and "load_members gave weights [0.5, 0.5]" in found["score"]


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda path: (path / "curve.png").unlink() or (path / "curve.png").symlink_to("/etc/hosts"), "symbolic link"),
        (lambda path: (path / "log.txt").chmod(0o755), "log.txt is executable"),
        (lambda path: torch.save({}, path / "final" / "more.pt"), "final/more.pt may hold pickled objects"),
        (
            lambda path: (path / "checkpoints").mkdir() or (path / "checkpoints" / "step_1.json").touch(),
            "is not a file of",
        ),
        (lambda path: (path / "code" / "cache.so").touch(), "code/cache.so is not a file of such a folder"),
        (lambda path: (path / "final" / "epoch_03.safetensors").write_bytes(b"\x80\x04K"), "not a safetensors file"),
        (lambda path: os.mkfifo(path / "scores"), "scores is not a regular file"),
        (lambda path: (path / "code" / "table.py").write_text(f"TABLE = {'1' * 10**6!r}"), "code/ has 1."),
    ],
)
def test_files_that_do_not_belong_there(case, capsys, change, said):
    change(case.path)
    assert said in fails_static(capsys, case)["files"]


def test_what_weights_and_biases_keeps_is_left_alone(case, capsys):
    (case.path / "wandb").mkdir()
    (case.path / "wandb" / "latest-run").symlink_to("run-1")
    for folder in ("code", "code/slowrun"):
        (case.path / folder / "__pycache__").mkdir()
    for name in ("code/__pycache__/train.cpython-311.pyc", "code/slowrun/__pycache__/clock.cpython-311.pyc"):
        (case.path / name).write_bytes(b"?")
    (case.path / "non_finite.pt").write_bytes(b"?")
    found = judge(capsys, case, options=STATIC)
    left_alone = "code/__pycache__/, code/slowrun/__pycache__/, non_finite.pt, wandb/: not looked at"
    assert found.fails == {} and left_alone in found.texts("NOTE")["files"]


def test_code_that_is_not_what_ran(case, capsys):
    with open(case.path / "code" / "train.py", "a") as file:
        file.write("\n")
    found = fails_static(capsys, case)
    assert found.keys() == {"code"} and "the SHA-256 of code/ is" in found["code"]


# ----------------------------------------------------------------------------------------------------- the instrument


def edit_clock(case: Case) -> None:
    """Change one character of the clock, so that it counts backwards, and sign it."""
    case.replace(r"\+= lap_s", "-= lap_s", "code/slowrun/clock.py")
    case.sign_instrument()


def test_an_edited_instrument(case, capsys, in_process):
    """All else is honest. Unsigned, it is not what the run says either."""
    edit_clock(case)
    found = judge(capsys, case)
    assert found.fails.keys() == {"instrument"} and "in clock.py; a record changes the" in found.fails["instrument"]
    case.edit("config.json", instrument_sha256=instrument_sha256())
    case.edit("result.json", instrument_sha256=instrument_sha256())
    found = fails_static(capsys, case)
    assert found.keys() == {"instrument"} and "config.json says" in found["instrument"]


def test_an_earlier_instrument(case, copy, capsys):
    edit_clock(case)
    list_instruments(instrument_sha256(case.path / "code" / "slowrun"), instrument_sha256())
    found = judge(capsys, case, options=STATIC)
    assert found.fails == {} and "the version of 2026-01-01: change 1" in found.texts("PASS")["instrument"]
    second = copy(seed=43, name="second")
    found = fails_static(capsys, case, second)
    assert found.keys() == {"submission"} and "second has other instrument than run" in found["submission"]


def test_an_instrument_that_nobody_has_listed_yet(case, capsys):
    list_instruments("0" * 64)
    text = fails_static(capsys, case)["instrument"]
    assert "though it is slowrun/ as it is here: a maintainer adds it" in text


def test_runs_from_before_the_instrument(case, capsys):
    for name in ("config.json", "result.json"):
        write_json(case.path / name, {k: v for k, v in case.read(name).items() if k != "instrument_sha256"})
    found = fails_static(capsys, case)
    assert found.keys() == {"instrument"} and "which had no slowrun/ yet" in found["instrument"]
    shutil.rmtree(case.path / "code" / "slowrun")
    assert fails_static(capsys, case)["instrument"] == found["instrument"]


@pytest.mark.parametrize("checkout", [False, True])
def test_code_without_its_instrument(case, capsys, in_process, checkout):
    """That of a checkout around it, which its script would find, does not take its place."""
    (case.path / "code" / "slowrun").rename(case.path.parent / ("slowrun" if checkout else "kept"))
    found = judge(capsys, case)
    assert found.fails.keys() == {"code", "instrument", *(name for name, _ in verdict.SCORE_CHECKS)}
    assert "code/ has no slowrun/" in found.fails["instrument"] and "code/ has no slowrun/" in found.fails["score"]


def test_a_script_that_finds_another_instrument(case, capsys, in_process):
    case.replace(r"^sys\.path\.insert\(0, .*$", f"sys.path.insert(0, {str(ROOT)!r})", "code/train.py")
    case.sign_code()
    found = judge(capsys, case)
    assert found.fails.keys() == {name for name, _ in verdict.SCORE_CHECKS}
    assert f"from {ROOT}/slowrun/__init__.py, not from {case.path}/code/slowrun" in found.fails["score"]


@pytest.mark.parametrize(
    "file, said",
    [
        ("slowrun.py", "code/slowrun.py is a second slowrun"),
        ("lib/slowrun/clock.py", "code/lib/slowrun is a second slowrun"),
        ("slowrun/slowrun/clock.py", "code/slowrun/slowrun is not a module of slowrun/"),
        ("slowrun/clock.so", "code/slowrun/clock.so is not a module of slowrun/"),
        ("time.py", "code/time.py would be imported instead of the module time"),
        ("torch/__init__.py", "code/torch would be imported instead of the module torch"),
        ("sitecustomize.py", "code/sitecustomize.py would be imported instead of"),
    ],
)
def test_modules_that_take_the_place_of_others(case, capsys, file, said):
    path = case.path / "code" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    case.sign_code()
    assert said in fails_static(capsys, case)["instrument"]
    path.rename(case.path / "code" / "an_idea.py")
    shutil.rmtree(case.path / "code" / "lib", ignore_errors=True)
    shutil.rmtree(case.path / "code" / "torch", ignore_errors=True)
    shutil.rmtree(case.path / "code" / "slowrun" / "slowrun", ignore_errors=True)
    case.sign_code()
    assert fails_static(capsys, case) == {}


def test_defaults_are_read_and_not_executed(tmp_path):
    (tmp_path / "model.py").write_text("class GPTConfig:\n    n_layer: int = 30\n    rate: float = 1.0\n")
    text = "class Config(GPTConfig):\n    rate: float = 2.0\n    name: str = ''\n\n    cap = 1.0\n"
    (tmp_path / "train.py").write_text(text)
    assert files.config_defaults(tmp_path) == {"n_layer": 30, "rate": 2.0, "name": ""}
    (tmp_path / "slowrun").mkdir()
    run = "class RunConfig:\n    n_layer: int\n    rate: float = 3.0\n    data_dir: str = 'data'\n"
    (tmp_path / "slowrun" / "config.py").write_text(run)
    (tmp_path / "train.py").write_text("class Config(GPTConfig, RunConfig):\n    cap: float = 60.0\n")
    expected = {"n_layer": 30, "rate": 1.0, "data_dir": "data", "cap": 60.0}  # as Python inherits them
    assert files.config_defaults(tmp_path) == expected
    (tmp_path / "train.py").write_text(text.replace("2.0", "float(2)"))
    with pytest.raises(ValueError, match=r"not a literal: rate: float = float\(2\)"):
        files.config_defaults(tmp_path)
    (tmp_path / "train.py").write_text(text + "\n\nclass Config(GPTConfig):\n    pass\n")
    with pytest.raises(ValueError, match="2 classes Config in code/"):
        files.config_defaults(tmp_path)


# ---------------------------------------------------------------------------------------------------------- submissions


def test_seeds_of_a_submission(copy, capsys):
    first, second = copy(), copy(seed=43, name="second")
    assert fails_static(capsys, first, second) == {}
    third = copy(seed=43, name="third")
    third.rename("aaaaaaaa", seed=44)
    found = fails_static(capsys, first, third)  # 43 was dropped
    assert found.keys() == {"seeds"} and "the seeds are [42, 44], not [42, 43]" in found["seeds"]
    again = copy(name="again")
    found = fails_static(capsys, first, again)  # one run twice
    assert found.keys() == {"seeds", "copies"} and "one run id" in found["copies"]
    again.rename("bbbbbbbb", seed=43)
    found = fails_static(capsys, first, again)  # with another seed and id
    assert found.keys() == {"copies"}
    assert "the same training losses" in found["copies"] and "the same weights" in found["copies"]


def test_runs_of_a_submission_are_of_one_kind(copy, capsys):
    first, second = copy(), copy(seed=43, name="second")
    second.append_code("# a remark")
    found = fails_static(capsys, first, second)
    assert found.keys() == {"submission"} and "second has other code than run" in found["submission"]
    second = copy(seed=43, name="settings")
    second.configure(weight_decay=0.4)
    assert "settings has other settings than run weight_decay" in fails_static(capsys, first, second)["submission"]
    tiny = copy("tiny", name="tiny")
    assert "tiny has other track than run" in fails_static(capsys, first, tiny)["submission"]


@pytest.mark.parametrize("ahead, significant", [(0.0032, False), (0.0034, True)])
def test_significance_of_two_runs(copy, capsys, tmp_path, ahead, significant):
    runs = [copy(), copy(seed=43, name="second")]
    mean = sum(run.read("result.json")["val_loss"] for run in runs) / 2
    val = runs[0].read("result.json")["data_sha256"]["val"]
    lists(tmp_path, mean + ahead, data_sha256=val)
    options = [*STATIC, "--records-dir", str(tmp_path / "records")]
    found = judge(capsys, *runs, options=options)
    assert found.fails.keys() == (set() if significant else {"significance"})
    alone = judge(capsys, runs[0], options=options)
    assert alone.fails == {} and "one run; a submission needs" in alone.texts("NOTE")["significance"]


# ------------------------------------------------------------------------------------------------------------ unlimited


@pytest.mark.parametrize(
    "change, check, said",
    [
        (
            lambda case: case.edit("chains/chain_01/ledger.json", steps=24),
            "clock",
            "chain_01: metrics.jsonl has 25 timed",
        ),
        (lambda case: case.edit("chains/chain_00/ledger.json", state="training"), "clock", "not all finished"),
        (lambda case: case.edit("chains/chain_00/ledger.json", seed=43), "clock", "seeds are [43, 43]"),
        (lambda case: case.edit("result.json", process_hours=0.0), "clock", "process_hours is 0.0"),
        (lambda case: case.replace("-01 ", "-00 ", "chains/chain_01/log.txt"), "log", "lines of chain_01/log.txt"),
    ],
)
def test_chains_that_are_wrong(copy, capsys, change, check, said):
    case = copy("unlimited")
    change(case)
    assert said in fails_static(capsys, case)[check]


def test_another_readout_than_declared_is_not_eligible(copy, capsys):
    case = copy("unlimited")
    case.edit("result.json", as_declared="yes")
    assert "as_declared is 'yes', not true or false" in fails_static(capsys, case)["eligibility"]
    case.edit("result.json", as_declared=False)
    assert "the readout is not the one" in judge(capsys, case, options=STATIC).texts("NOTE")["eligibility"]


def test_the_plan_of_a_run():
    """The published numbers of steps, and cycles of two batch sizes."""
    limited = {"sequence_len": 2048, "micro_batch": 4, "batch_tokens": 524288, "num_epochs": 11}
    assert len(planned_tokens(limited, official_sequences())) - 1 == 2097
    tiny = limited | {"micro_batch": 32, "num_epochs": 15}
    assert len(planned_tokens(tiny, official_sequences())) - 1 == 2850
    import unlimited.train as unlimited
    from slowrun.data import unread_split

    config = unlimited.Config(**SMALL["unlimited"])
    plan = unlimited.make_plan(config, unread_split(166 * (config.sequence_len + 1)))
    assert planned_tokens(vars(config), 166) == plan.tokens.tolist()


# ----------------------------------------------------------------------------------------------------------- the worker


def test_a_hanging_run_is_stopped(case, capsys):
    case.append_code("def load_members(run_dir, device):\n    time.sleep(600)\n")
    found = judge(capsys, case, options=["--other-data", "--time-limit-min", "0.02"])
    assert found.fails.keys() == {name for name, _ in verdict.SCORE_CHECKS}
    assert "it was not scored in 0.02 min: --time-limit-min allows more" in found.fails["score"]


def test_what_the_worker_started_is_stopped_too(tmp_path, monkeypatch):
    script = "import subprocess, time\nchild = subprocess.Popen(['sleep', '600'])\n"
    (tmp_path / "worker.py").write_text(script + "open('pid', 'w').write(str(child.pid))\ntime.sleep(600)\n")
    monkeypatch.setattr(scoring, "WORKER", tmp_path / "worker.py")
    with pytest.raises(scoring.WorkerFailed):
        scoring.run_worker({"out": str(tmp_path)}, 1.0)
    child = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child)


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one may wait for its parent."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return state != "" and not state.startswith("Z")


def test_a_crashing_run_fails(case, capsys):
    case.append_code("import os\n\n\ndef load_members(run_dir, device):\n    os.abort()\n")
    found = judge(capsys, case)
    assert found.fails.keys() == {name for name, _ in verdict.SCORE_CHECKS}
    assert "ended the scoring (exit code -6)" in found.fails["score"]


MEMBERS = """
import torch

def load_members(run_dir, device):
    for seed, weight in ((1, 0.25), (2, 0.75)):
        table = torch.randn(7, 7, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
        yield weight, lambda tokens: table[tokens]
"""


@pytest.mark.parametrize("mixing", ["probability", "logit"])
def test_mixing(tmp_path, mixing):
    (tmp_path / "code" / "slowrun").mkdir(parents=True)
    (tmp_path / "code" / "train.py").write_text(MEMBERS)
    sequences = np.random.RandomState(0).randint(7, size=(37, 12))
    np.save(tmp_path / "sequences.npy", sequences)
    task = {"run_dir": str(tmp_path), "device": "cpu", "vocab_size": 7, "mixing": mixing, "members": 2}
    found = worker.run(
        task | {"probe_seed": 0, "splits": {"val": str(tmp_path / "sequences.npy")}, "out": str(tmp_path)}
    )
    assert found["weights"] == [0.25, 0.75] and len(found["measured"]) == (2 if mixing == "probability" else 1)
    assert all(value < 1e-6 for own in found["measured"] for name, value in own.items() if name != "loss")
    tables = [torch.randn(7, 7, generator=torch.Generator().manual_seed(seed)).log_softmax(-1) for seed in (1, 2)]
    if mixing == "probability":
        table = (0.25 * tables[0].exp() + 0.75 * tables[1].exp()).log()
    else:
        table = (0.25 * tables[0] + 0.75 * tables[1]).log_softmax(-1)
    expected = -table[sequences[:, :-1], sequences[:, 1:]].numpy()
    np.testing.assert_allclose(np.load(tmp_path / "val.npy"), expected, atol=1e-6)


HOLDING = """
import weakref
import torch


class Weights:
    alive = weakref.WeakSet()


def load_members(run_dir, device):
    for _ in range(5):
        weights = Weights()
        Weights.alive.add(weights)
        assert len(Weights.alive) <= 2, "members are kept"
        yield 0.2, lambda tokens, own=weights: torch.zeros(*tokens.shape, 7).log_softmax(-1)
"""


def test_members_are_in_memory_one_at_a_time(tmp_path):
    """The one before goes when the next has come, before the scoring too."""
    (tmp_path / "code" / "slowrun").mkdir(parents=True)
    (tmp_path / "code" / "train.py").write_text(HOLDING)
    np.save(tmp_path / "sequences.npy", np.zeros((5, 12), dtype=np.int64))
    task = {"run_dir": str(tmp_path), "device": "cpu", "vocab_size": 7, "mixing": "probability", "members": 5}
    task |= {"probe_seed": 0, "splits": {"val": str(tmp_path / "sequences.npy")}, "out": str(tmp_path)}
    assert len(worker.run(task)["measured"]) == 5


def test_documents_are_found_wherever_they_are():
    """Against a search by brute force, with documents that share their beginnings."""
    random = np.random.RandomState(0)
    other = random.randint(3, size=4000).astype(np.uint16)
    documents, expected = [], 0
    for _ in range(300):
        size, kind = random.randint(30, 120), random.randint(3)
        start = random.randint(0, len(other) - size)
        document = other[start : start + size].copy() if kind else random.randint(3, size=size).astype(np.uint16)
        if kind == 2:
            document[-1] = 3  # differs at its end
        documents.append(np.append(np.uint16(9), document))
        places = range(len(other) - size + 1)
        expected += size >= 50 and any((other[p : p + size] == document).all() for p in places)
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    tokens = np.concatenate(documents)
    assert 50 < expected < 150 and overlap.count_overlaps(tokens, starts, other) == expected
    assert overlap.count_overlaps(tokens, starts, other[:49]) == 0
    grams = {other[i : i + 50].tobytes() for i in range(len(other) - 49)}
    assert len(set(overlap.gram_hashes(other).tolist())) == len(grams)


# ------------------------------------------------------------------------------------------------------------- the tool


def test_what_is_printed_and_written(case, capsys, tmp_path, in_process):
    assert (
        referee.main([str(case.path), "--other-data", "--probe-seed", "7", "--json", str(tmp_path / "out.json")]) == 0
    )
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "verdict: nothing fails; it is NOT A RECORD (--other-data)"
    assert any(line.split()[:3] == ["PASS", "score", "run"] for line in lines)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["probe_seed"] == 7 and len(found["findings"]) == len(lines)
    assert found["scores"]["run"]["val"]["tokens"] == 51 * 32
    assert "--probe-seed 7" in next(f["text"] for f in found["findings"] if f["check"] == "causality")


def test_what_strangers_wrote_is_one_line(case, capsys):
    case.edit("result.json", status="x\nPASS  score\x1b[2K")
    assert referee.main([str(case.path), *STATIC]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "status is" in line]
    assert line.startswith("FAIL  completeness") and "\x1b" not in line


def test_bad_usage(tmp_path, capsys):
    for path, said in ((tmp_path / "nowhere", "is not a folder"), (tmp_path, "has neither config.json nor seed-*/")):
        assert referee.main([str(path)]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        referee.main([])
    assert stop.value.code == 2


def test_the_rules_are_those_of_the_scripts():
    for track, module in (TRACKS | UNLIMITED).items():
        config, of_track = importlib.import_module(module).Config(), rules.RULES[track]
        assert (of_track.cap_min, of_track.val_sequences) == (config.time_cap_min, config.val_sequences)
        assert config.sequence_len == rules.SEQUENCE_LEN and config.vocab_size == scoring.GPT2_VOCAB
