"""The unlimited track: chains, distillation, selection, mixtures, and that nothing is lost or mixed in by mistake."""

import gc
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, V, flags, read_metrics, run_to_end, set_golden_parameters

import unlimited.train as unlimited
from slowrun import folder as run_folder
from slowrun.data import Split, cut, load_split, sha256_file
from slowrun.folder import write_json
from slowrun.world import World

SCRIPT = "unlimited/train.py"
TINY = {"cycles": 2, "fitness_tokens": 2500, "log_every": 100}  # 3,500 tokens to train on: 13 steps a chain


@pytest.fixture
def base(data_dir, tmp_path) -> dict:
    """Fields of Config for a small run in a folder of its own."""
    paths = {"data_dir": str(data_dir), "runs_dir": str(tmp_path), "run_name": "run", "device": "cpu"}
    return SMALL["unlimited"] | paths


@pytest.fixture
def folder(base) -> Path:
    return Path(base["runs_dir"]) / "run"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def members_of(folder: Path) -> list[dict]:
    return read(folder / "final" / "members.json")["members"]


def load(base: dict, split: str) -> Split:
    return load_split(base["data_dir"], split, V, base["sequence_len"])


def small_plan(base, **changes) -> tuple:
    config = unlimited.Config(**base | changes)
    fitness, rest = unlimited.split_fitness(load(base, "train"), config)
    return fitness, rest, unlimited.Plan(config, len(rest.sequences(config.sequence_len + 1)))


# --------------------------------------------------------------------------------------------------- plan and schedules


def test_plan_of_the_record():
    config = unlimited.Config()
    plan = unlimited.Plan(config, 48_740)
    assert plan.epoch_micro_steps == 3046
    inner = [cycle for cycle in range(96) if plan.batch_tokens(cycle) == 524288]
    assert inner == list(range(24, 72)) and plan.batch_tokens(0) == 393216
    assert plan.cycle_steps(0) == round(2 * 3046 / 12) and plan.cycle_steps(30) == round(2 * 3046 / 16)
    assert [plan.taught(plan.first_steps[cycle]) for cycle in (0, 7, 8, 95)] == [False, False, True, True]
    assert not plan.taught(plan.num_steps) and not plan.taught(plan.first_steps[8] - 1)
    assert unlimited.Plan(unlimited.Config(cycles=1), 48_740).batch_tokens(0) == 524288


def test_every_micro_step_is_taken_once(base):
    _, _, plan = small_plan(base)
    assert [plan.cycle_steps(cycle) for cycle in range(3)] == [10, 5, 10]
    sizes = np.diff([plan.first_micro_step(step) for step in range(plan.num_steps + 1)])
    assert sizes.tolist() == [1] * 10 + [2] * 5 + [1] * 10
    assert plan.tokens_done(plan.num_steps) == 30 * 512
    assert [plan.epochs_done(step) for step in (0, 9, 10, 14, 15, 24, 25)] == [0, 0, 1, 1, 2, 2, 3]
    assert [plan.cycle(step) for step in (0, 9, 10, 14, 15, 24)] == [0, 0, 1, 1, 2, 2]
    assert [plan.position(step) for step in (0, 5, 10, 12)] == [0.0, 0.5, 0.0, 0.4]


def test_the_first_cycle_may_be_of_other_length_and_replay_may_begin_late(base):
    _, _, plan = small_plan(base, first_cycle_epochs=3, replay_from=0.5)
    assert [plan.cycle_steps(cycle) for cycle in range(3)] == [30, 5, 10]
    assert [unlimited.stage(plan, step)["replay"] for step in (0, 14, 15, 29, 30, 32, 33)] == [0, 0, 1, 1, 0, 0, 1]
    _, _, plan = small_plan(base, replay_from=1.0)
    assert not any(unlimited.stage(plan, step)["replay"] for step in range(plan.num_steps))


def test_schedules_of_a_constant_rate_with_a_warmdown(base):
    config = unlimited.Config(**base | {"warmdown": 0.5, "lr_low": 0.0, "decay_low": 1.0})
    assert [unlimited.lr_multiplier(config, p) for p in (0.0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0]
    assert unlimited.weight_decay_multiplier(config, 0.7) == 1.0
    assert unlimited.perturbation_scale(unlimited.Config(cycles=2), 0) == 0.25


# ----------------------------------------------------------------------------------------------------------------- data


def test_the_fitness_set_is_whole_documents_that_are_never_trained_on(base):
    fitness, rest, _ = small_plan(base)
    whole = load(base, "train")
    assert np.array_equal(np.concatenate([fitness.tokens, rest.tokens]), whole.tokens)
    assert len(fitness.tokens) <= 500 < len(fitness.tokens) + 60
    assert fitness.tokens[0] == rest.tokens[0] == V - 1 and (rest.tokens[rest.doc_starts] == V - 1).all()
    assert len(fitness.doc_starts) + len(rest.doc_starts) == len(whole.doc_starts)
    assert (fitness.tokens[fitness.doc_starts] == V - 1).all()


def test_each_chain_has_its_own_order_as_specified(base):
    """Documents by (chain seed) * 1009 + epoch + 1000, from the first epoch on; sequences by ... + 2000."""
    _, rest, plan = small_plan(base)
    order, ends = np.arange(len(rest.doc_starts)), np.append(rest.doc_starts[1:], len(rest.tokens))
    seed = 43
    for epoch in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed * 1009 + epoch + 1000)
        order = order[torch.randperm(len(order), generator=generator).numpy()]
        tokens = np.concatenate([rest.tokens[rest.doc_starts[i] : ends[i]] for i in order])
        sequences = cut(tokens, 33)
        generator = torch.Generator().manual_seed(seed * 1009 + epoch + 2000)
        expected = sequences[torch.randperm(len(sequences), generator=generator).numpy()]
        assert np.array_equal(unlimited.epoch_sequences(plan.config.of_chain(1), rest, epoch), expected)


def test_batches_of_two_sizes_go_on_through_the_order(base):
    _, rest, plan = small_plan(base)
    loader = unlimited.make_loader(plan, rest, range(8))
    taken = [loader.batch(step).unflatten(1, (-1, 2)) for step in range(plan.num_steps)]
    assert [batch.shape for batch in taken[9:11]] == [(8, 1, 2, 33), (8, 2, 2, 33)]
    rows = np.concatenate([batch.swapaxes(0, 1).reshape(-1, 33) for batch in taken])
    expected = []
    for epoch in (1, 2, 3):
        expected.append(unlimited.epoch_sequences(plan.config, rest, epoch)[: plan.epoch_micro_steps * 16])
    assert np.array_equal(rows, np.concatenate(expected))


# --------------------------------------------------------------------------------------------------------- distillation


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_distillation_equals_autograd(dtype):
    """Loss, nats and gradient of one chunk, against the formulas in autograd; padded columns take no part."""
    torch.manual_seed(0)
    logits, taught = (3 * torch.randn(2, 40, 64)).to(dtype)
    targets = torch.randint(50, (40,))
    loss, nats, grad = unlimited.capped_distillation(logits, taught, targets, 0.45, 1.2, 50, 15.0)
    inputs = logits.double().requires_grad_()
    capped, teacher = (15.0 * torch.tanh(x[:, :50] / 15.0) for x in (inputs, taught.double()))
    expected_nats = torch.nn.functional.cross_entropy(capped, targets, reduction="sum")
    divergence = torch.nn.functional.kl_div(
        (capped / 1.2).log_softmax(-1), (teacher / 1.2).log_softmax(-1), log_target=True, reduction="sum"
    )
    expected = 0.55 * expected_nats + 0.45 * 1.2**2 * divergence
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(nats.double(), expected_nats.detach(), rtol=1e-5, atol=0)
    assert grad.dtype == dtype and not grad[:, 50:].any()
    torch.testing.assert_close(grad, inputs.grad.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-9, atol=1e-12)


def test_a_perfect_teacher_adds_nothing_and_none_is_needed_for_weight_0(base):
    config = unlimited.Config(**base | {"teach_weight": 0.3})
    model = unlimited.GPT(config).double()
    set_golden_parameters(model, 7, config.n_embd)
    tokens = torch.randint(V, (2, 33), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    own = unlimited.snapshot_weights(model, dict(model.named_parameters()), torch.float64)
    plain, nats = model.training_loss(inputs, targets, replay=True)
    taught, nats_too = model.training_loss(inputs, targets, replay=True, teacher=own)
    assert taught.item() == pytest.approx(0.7 * plain.item(), abs=1e-12) and nats_too.item() == pytest.approx(
        nats.item()
    )


def test_the_teacher_has_no_dropout_and_no_gradient(base):
    config = unlimited.Config(**base | {"dropout": 0.5})
    model = unlimited.GPT(config)
    set_golden_parameters(model, 7, config.n_embd)
    tokens = torch.randint(V, (2, 32))
    weights = unlimited.snapshot_weights(model, dict(model.named_parameters()), torch.float32)
    model.train()
    first, second = (model.stream_of(weights, tokens) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad and model.training
    assert torch.equal(first, model.eval().trunk(weights, tokens, replay=True))


def test_a_snapshot_computes_as_a_model_that_loads_it(base):
    config = unlimited.Config(**base)
    model = unlimited.GPT(config)
    set_golden_parameters(model, 7, config.n_embd)
    snapshot = {n: p.detach().to(unlimited.member_dtype(n, p, torch.bfloat16)) for n, p in model.named_parameters()}
    model.load_state_dict(snapshot)
    loaded = unlimited.ComputeWeights(model, torch.bfloat16, requires_grad=False)
    loaded.refresh()
    weights = unlimited.snapshot_weights(model, snapshot, torch.bfloat16)
    for unit, tensors in loaded.tensors.items():
        for name, tensor in tensors.items():
            assert tensor.dtype == weights[unit][name].dtype and torch.equal(tensor, weights[unit][name]), (unit, name)


# ------------------------------------------------------------------------------------ perturbation, clipping, selection


def test_perturbation(base):
    """Of the size asked for, in each parameter of several elements; a function of the seed alone."""
    config = unlimited.Config(**base | {"n_embd": 256, "n_layer": 4, "replay_start": 2, "replay_end": 3})
    changed = []
    for seed in ((42, 1), (42, 1), (42, 2), (43, 1)):
        model = unlimited.GPT(config)
        set_golden_parameters(model, 7, 256)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        unlimited.perturb(model, 0.2, *seed)
        changed.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, difference in changed[0].items():
        assert torch.equal(difference, changed[1][name])
        deviation = 0.2 * before[name].std().item()
        if difference.numel() > 10_000:
            assert difference.std().item() == pytest.approx(deviation, rel=0.02), name
            assert abs(difference.mean().item()) < 5 * deviation / difference.numel() ** 0.5, name
            for other in changed[2:]:
                assert abs((difference * other[name]).mean().item()) < 0.05 * deviation**2, name
    assert changed[0]["resid_lambdas"].all()
    small = unlimited.GPT(unlimited.Config(**base))  # with a skip weight of one element
    set_golden_parameters(small, 7, 32)
    before = small.skip_weights.detach().clone()
    unlimited.perturb(small, 0.2, 42, 1)
    assert torch.equal(small.skip_weights, before)


def test_gradients_are_clipped_as_torch_does(base):
    """By one norm over all parameters, before the momentum."""
    config = unlimited.Config(**base | {"clip": 0.5})
    momenta = []
    for clip_by_torch in (True, False):
        model = unlimited.GPT(config).double()
        set_golden_parameters(model, 7, 32)
        world = World(0, 1, torch.device("cpu"))
        optimizer = unlimited.build_optimizer(config, model, world, torch.float64, compile=False)
        for k, p in enumerate(model.parameters()):
            p.grad.copy_(torch.from_numpy(np.random.RandomState(k).standard_normal(p.shape)))
        if clip_by_torch:
            optimizer.max_norm = 0.0
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 10
        optimizer.step(1.0, 1.0, 0.95)
        momenta.append(optimizer.state_dict()["state"])
    for name, state in momenta[0].items():
        for key, value in state.items():
            torch.testing.assert_close(momenta[1][name][key], value, rtol=1e-9, atol=1e-15)


def test_selection_where_one_model_is_best_everywhere():
    random_ = np.random.RandomState(0)
    probabilities = random_.uniform(0.05, 0.2, (5, 1000))
    probabilities[3] = random_.uniform(0.3, 0.6, 1000)
    weights = unlimited.learn_weights(torch.from_numpy(probabilities))
    assert weights[3] > 0.999 and weights.sum().item() == pytest.approx(1.0)


def test_selection_of_two_complementary_models():
    """Each is good on its half and bad on the other; a third is worse on both. By symmetry the two weigh the same."""
    good, bad = torch.full((500,), 0.8), torch.full((500,), 0.1)
    probabilities = torch.stack([torch.cat([good, bad]), torch.cat([bad, good]), torch.full((1000,), 0.05)]).double()
    weights = unlimited.learn_weights(probabilities)
    assert weights[0].item() == pytest.approx(0.5, abs=1e-3) and weights[1].item() == pytest.approx(0.5, abs=1e-3)
    mixture, best = (-(w @ probabilities).log().mean().item() for w in (weights, torch.tensor([1.0, 0, 0]).double()))
    assert mixture == pytest.approx(-math.log(0.45), abs=1e-3) and mixture < best


def test_sizes_of_mixtures():
    weights = torch.arange(1, 41).double() / 820
    found = unlimited.mixtures(weights)
    assert list(found) == [8, 16, 32]
    for size, kept in found.items():
        assert kept.count_nonzero() == size and kept[-size:].all() and kept.sum().item() == pytest.approx(1.0)
        torch.testing.assert_close(kept[-size:] / kept[-1], weights[-size:] / weights[-1])
    assert list(unlimited.mixtures(torch.ones(6).double() / 6)) == [6]  # none below: all
    assert list(unlimited.mixtures(torch.ones(8).double() / 8)) == [8]
    assert list(unlimited.mixtures(torch.ones(9).double() / 9)) == [8]


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.draws
def test_run_folder_and_claims(base, folder, capsys):
    """What the files say agrees with each other, and with the mixture made by hand from the members."""
    assert unlimited.main(flags(**base | {"dropout": 0.1})) == 0
    printed, result = capsys.readouterr().out, read(folder / "result.json")
    assert "chain 0 | cycle 2/3 | step 15/25 | val " in printed and "chain 1 | step 20/25 | train" in printed
    assert "chain 0 | projected training time" in printed and "for all chains (2 one after the other)" in printed
    assert "up to " in printed and "6 snapshots" in printed and "operations in all" in printed
    ledgers = [read(folder / "chains" / f"chain_{chain:02d}" / "ledger.json") for chain in (0, 1)]
    assert [ledger["state"] for ledger in ledgers] == ["finished"] * 2
    assert [ledger["seed"] for ledger in ledgers] == [42, 43]
    for chain, ledger in enumerate(ledgers):
        own = folder / "chains" / f"chain_{chain:02d}"
        assert [member["cycle"] for member in ledger["members"]] == [1, 2, 3]
        for member in ledger["members"]:
            assert sha256_file(own / "final" / member["file"]) == member["sha256"]
            nats = unlimited.read_nats(own / "final" / member["file"], "val")
            assert nats.shape == (51, 32) and nats.double().mean().item() == pytest.approx(member["val_loss"], abs=1e-6)
        steps, validations = read_metrics(own)
        assert [line["cycle"] for line in steps] == [1] * 10 + [2] * 5 + [3] * 10
        assert [line["epoch"] for line in steps] == [1] * 10 + [2] * 5 + [3] * 10
        assert [line["lr"] for line in steps[10:12]] == pytest.approx([1.0, 1 - 0.92 / 5])
        assert [line["tokens"] for line in steps[8:12]] == [4608, 5120, 6144, 7168]
        assert [line["val_loss"] for line in validations] == [member["val_loss"] for member in ledger["members"]]
        assert steps[0]["train_loss_with_mtp"] > 1.2 * steps[0]["train_loss"]
        assert not (own / "checkpoints").exists() and (own / "curve.png").exists()

    members = members_of(folder)
    mixture = 0
    assert sum(member["weight"] for member in members) == pytest.approx(1.0) and len(members) == 6
    for split, claimed in (("val", result["val_loss"]), ("holdout", result["holdout_loss"])):
        sequences = torch.from_numpy(load(base, split).sequences(33).astype(np.int64))
        mixture = 0
        for weight, log_probs in unlimited.load_members(folder, "cpu"):
            mixture = mixture + weight * log_probs(sequences[:, :-1]).exp().double()
        nats = -mixture.gather(-1, sequences[:, 1:, None]).log().mean().item()
        assert nats == pytest.approx(claimed, abs=1e-6)
    best = min(member["val_loss"] for ledger in ledgers for member in ledger["members"])
    assert result["readouts"]["best_member"] == best and result["readouts"]["mixture_of_6"] == result["val_loss"]
    assert result["val_loss"] < result["readouts"]["equal_weights"]
    assert (result["status"], result["stopped_by"], result["steps"]) == ("finished", "steps", 50)
    assert result["tokens"] == 2 * 30 * 512 and result["epochs"] == 6 and result["candidates"] == 6
    assert result["train_time_s"] == pytest.approx(sum(ledger["train_time_s"] for ledger in ledgers))
    assert 3600 * result["process_hours"] == pytest.approx(result["train_time_s"]) and result["as_declared"]
    assert not result["eligible"] and result["val_tokens"] == 51 * 32
    for name, sha256 in result["final_sha256"].items():
        assert sha256_file(folder / "final" / name) == sha256
    assert result["final_sha256"].keys() == {path.name for path in (folder / "final").iterdir()}
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG") and unlimited.main(["--resume", str(folder)]) == 0


def results_of(folder: Path) -> tuple:
    members = [(member["file"], member["sha256"], member["weight"]) for member in members_of(folder)]
    result = read(folder / "result.json")
    return members, result["val_loss"], result["holdout_loss"], result["readouts"]


def test_the_spread_of_chains_does_not_matter(base, folder):
    """3 chains on 1 and 2 processes, of which one trains two: the same snapshots, byte for byte, the same mixture."""
    values = base | TINY | {"chains": 3, "dropout": 0.1}
    assert unlimited.main(flags(**values)) == 0
    output = run_to_end(SCRIPT, flags(**values | {"run_name": "of_2"}), 2)
    assert "groups x processes: 2 x 1" in output
    assert results_of(folder.parent / "of_2") == results_of(folder)


def test_a_group_of_processes_trains_a_chain(base, folder):
    """Two processes on one chain, in float64: the same losses as one, dropout and meta-gradient included."""
    values = base | TINY | {"dtype": "float64", "dropout": 0.1, "chains": 1, "batch_tokens": 1024}
    values |= {"outer_batch_tokens": 1024, "meta_gradient": True}
    assert unlimited.main(flags(**values)) == 0
    run_to_end(SCRIPT, flags(**values | {"run_name": "two", "processes_per_chain": 2}), 2)
    one, two = (read_metrics(path / "chains" / "chain_00") for path in (folder, folder.parent / "two"))
    for lines, expected in zip(two, one, strict=True):
        for key in ("train_loss_with_mtp", "val_loss", "fitness_loss"):
            found = [line[key] for line in lines if key in line]
            assert found == pytest.approx([line[key] for line in expected if key in line], abs=1e-9)
    (_, val, holdout, _), (_, val_two, holdout_two, _) = results_of(folder), results_of(folder.parent / "two")
    assert (val_two, holdout_two) == pytest.approx((val, holdout), abs=1e-6)  # losses of snapshots are kept in float32


def start_processes(arguments: list[str], count: int) -> list[subprocess.Popen]:
    """The processes of a run, without a launcher between, so that each can be killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    command, processes = [sys.executable, str(ROOT / SCRIPT), *arguments], []
    for rank in range(count):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        own = environment | {name: str(value) for name, value in numbers.items()}
        processes.append(subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return processes


def test_killed_at_random_and_resumed(base, folder):
    """kill -9 of one process, then of the others, at random moments, of 1 or 2 processes: the same as without.

    KILLS and KILL_SEED in the environment make it more of them, and others.
    """
    attempts = int(os.environ.get("KILLS", "2"))
    values = base | TINY | {"dropout": 0.1, "checkpoint_min": 0.0, "cycles": max(2, attempts)}
    assert unlimited.main(flags(**values | {"run_name": "reference"})) == 0
    draw, arguments, kills = random.Random(int(os.environ.get("KILL_SEED", "0"))), flags(**values), []
    for _ in range(attempts):
        processes = start_processes(arguments, draw.choice([1, 2]))
        log = folder / "log.txt"
        before, deadline = log.stat().st_size if log.exists() else 0, time.monotonic() + 60
        while time.monotonic() < deadline and not (log.exists() and log.stat().st_size > before):
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 1.0))
        draw.shuffle(processes)
        for process in processes:
            if process.poll() is None:
                process.kill()
                kills.append(len(processes))
            process.wait()
            time.sleep(draw.uniform(0.0, 0.2))
        arguments = ["--resume", str(folder)]
    print(f"killed in {len(kills)} processes")
    assert kills
    run_to_end(SCRIPT, arguments, 2)
    assert results_of(folder) == results_of(folder.parent / "reference")


def test_stopped_by_a_signal_and_resumed(base, folder, monkeypatch, capsys):
    """In the second chain: the first is not trained again, and the result is that of an uninterrupted run."""
    values = base | TINY | {"dropout": 0.1}
    assert unlimited.main(flags(**values | {"run_name": "reference"})) == 0
    step_of = unlimited.Chain.train_step

    def interrupted(chain, step):
        if (chain.number, step) == (1, 11):  # in the cycle with a teacher
            signal.raise_signal(signal.SIGTERM)
        return step_of(chain, step)

    monkeypatch.setattr(unlimited.Chain, "train_step", interrupted)
    assert unlimited.main(flags(**values)) == 0
    assert f"stopped by SIGTERM; resume with: python {sys.argv[0]} --resume {folder}" in capsys.readouterr().out
    states = [read(folder / "chains" / name / "ledger.json")["state"] for name in ("chain_00", "chain_01")]
    assert states == ["finished", "stopped"] and not (folder / "result.json").exists()
    monkeypatch.setattr(unlimited.Chain, "train_step", step_of)
    first = folder / "chains" / "chain_00" / "metrics.jsonl"
    before = first.stat().st_mtime_ns
    assert unlimited.main(["--resume", str(folder)]) == 0
    assert first.stat().st_mtime_ns == before and "chain 1 | resumed at step 12/" in capsys.readouterr().out
    assert results_of(folder) == results_of(folder.parent / "reference")


def test_an_ensemble_without_checkpoints(base, folder, monkeypatch, capsys):
    """Snapshots are written, checkpoints are not: the chain that a signal stopped begins anew, with the same result."""
    values = base | TINY | {"dropout": 0.1}
    assert unlimited.main(flags(**values | {"run_name": "reference"})) == 0
    step_of = unlimited.Chain.train_step

    def interrupted(chain, step):
        if (chain.number, step) == (1, 11):
            signal.raise_signal(signal.SIGTERM)
        return step_of(chain, step)

    monkeypatch.setattr(unlimited.Chain, "train_step", interrupted)
    assert unlimited.main(flags(**values | {"checkpoints": False})) == 1
    printed = capsys.readouterr().out
    assert "no checkpoints, so --resume would begin chains anew" in printed
    assert f"with --no-checkpoints, python {sys.argv[0]} --resume {folder} begins the unfinished chains anew" in printed
    assert not list(folder.rglob("step_*")) and list((folder / "chains/chain_00/final").glob("*.safetensors"))
    monkeypatch.setattr(unlimited.Chain, "train_step", step_of)
    assert unlimited.main(["--resume", str(folder)]) == 0
    assert "chain 1 | no checkpoint yet: starting from step 0" in capsys.readouterr().out
    assert results_of(folder) == results_of(folder.parent / "reference")


def test_what_is_damaged_is_left_out(base, folder, capsys):
    """A snapshot with a changed byte, and one that is gone: neither is mixed in, and it is said which they are."""
    assert unlimited.main(flags(**base | TINY)) == 0
    (before, *_), names = results_of(folder), ["chain_00_cycle_002.safetensors", "chain_01_cycle_001.safetensors"]
    damaged, gone = (folder / "chains" / name[:8] / "final" / name for name in names)
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.unlink()
    damaged.write_bytes(content)
    gone.unlink()
    capsys.readouterr()
    assert unlimited.main(["--resume", str(folder), "--select-only"]) == 0
    printed = capsys.readouterr().out
    for path in (damaged, gone):
        assert f"WARNING: {path} is missing or damaged: it is left out" in printed
    members = members_of(folder)
    assert [member["file"] for member in members] == [name for name, *_ in before if name not in names]
    assert sum(member["weight"] for member in members) == pytest.approx(1.0)
    for path in (folder / "chains").glob("*/final/*"):
        path.unlink()
    assert unlimited.main(["--resume", str(folder), "--select-only"]) == 2
    assert "has no snapshot to read out" in capsys.readouterr().out


def test_a_damaged_snapshot_is_left_out_when_its_chain_resumes(base, folder, capsys):
    """The teacher is in the checkpoint, so the chain goes on as it would have."""
    values = base | {"chains": 1, "checkpoint_min": 0.0}
    assert unlimited.main(flags(**values | {"run_name": "reference"})) == 0
    ensemble, _ = unlimited.set_up(flags(**values))
    ensemble.warm_up()
    step_of = ensemble.chain.train_step

    def stop_at_12(step):
        if step == 12:
            ensemble.chain.signal = "SIGTERM"
        return step_of(step)

    ensemble.chain.train_step = stop_at_12
    ensemble.fit()
    ensemble.run.close()
    (folder / "chains" / "chain_00" / "final" / "chain_00_cycle_001.safetensors").unlink()
    assert unlimited.main(["--resume", str(folder)]) == 0
    assert "chain_00_cycle_001.safetensors is missing or damaged: it is left out" in capsys.readouterr().out
    members, expected = members_of(folder), members_of(folder.parent / "reference")
    assert [member["sha256"] for member in members] == [member["sha256"] for member in expected[1:]]


def test_selection_is_repeated_with_other_settings(base, folder):
    assert unlimited.main(flags(**base | TINY)) == 0
    before = results_of(folder)
    select = ["--resume", str(folder), "--select-only"]
    assert unlimited.main(select) == 0
    assert results_of(folder) == before
    declared = [folder / name for name in ("result.json", "curve.png", "metrics.jsonl", "final/members.json")]
    (folder / "curve.png").write_bytes(b"as declared")
    claimed = [path.read_bytes() for path in declared]
    assert unlimited.main([*select, "--selection=uniform"]) == 0
    result = read(folder / "result_uniform_probability.json")
    assert [member["weight"] for member in result["members"]] == [0.25] * 4
    assert result["val_loss"] == pytest.approx(before[3]["equal_weights"], abs=1e-12)
    assert result["holdout_loss"] is None and not result["as_declared"]  # it chooses nothing, also not afterwards
    assert unlimited.main([*select, "--leave-out-first"]) == 0
    members = read(folder / "result_learned_probability_without_first.json")["members"]
    assert len(members) == 2 and all("cycle_002" in member["file"] for member in members)
    assert unlimited.main([*select, "--selection=uniform", "--average=logit"]) == 0
    result, logs = read(folder / "result_uniform_logit.json"), 0
    sequences = torch.from_numpy(load(base, "val").sequences(33).astype(np.int64))
    for _, log_probs in unlimited.load_members(folder, "cpu"):
        logs = logs + log_probs(sequences[:, :-1]).double() / 4
    nats = -logs.log_softmax(-1).gather(-1, sequences[:, 1:, None]).mean().item()
    assert result["val_loss"] == pytest.approx(nats, abs=1e-6) and result["mixing"] == "logit"
    assert [path.read_bytes() for path in declared] == claimed and results_of(folder) == before


def test_uniform_weights_can_be_declared(base, folder):
    assert unlimited.main(flags(**base | TINY | {"selection": "uniform", "average": "logit", "chains": 1})) == 0
    result, final = read(folder / "result.json"), read(folder / "final" / "members.json")
    assert result["as_declared"] and result["holdout_loss"] is not None and final["mixing"] == "logit"
    assert [member["weight"] for member in final["members"]] == [0.5] * 2


def test_what_is_there_of_a_run_that_was_not_finished_can_be_selected(base, folder, monkeypatch):
    step_of = unlimited.Chain.train_step

    def interrupted(chain, step):
        if chain.number == 1:
            signal.raise_signal(signal.SIGINT)
        return step_of(chain, step)

    monkeypatch.setattr(unlimited.Chain, "train_step", interrupted)
    assert unlimited.main(flags(**base | TINY)) == 0
    monkeypatch.setattr(unlimited.Chain, "train_step", step_of)
    assert unlimited.main(["--resume", str(folder), "--select-only"]) == 0
    result = read(folder / "result.json")
    assert (result["status"], result["stopped_by"], result["candidates"]) == ("partial", "select_only", 2)
    assert result["holdout_loss"] is None and "chains are not finished" in result["not_eligible_because"]
    assert unlimited.main(["--resume", str(folder)]) == 0
    assert read(folder / "result.json")["status"] == "finished" and len(members_of(folder)) == 4


def test_chains_can_be_added(base, folder, capsys):
    values = base | TINY
    assert unlimited.main(flags(**values | {"chains": 3, "run_name": "reference"})) == 0
    assert unlimited.main(flags(**values | {"chains": 2})) == 0
    assert unlimited.main(["--resume", str(folder), "--add-chains=1"]) == 0
    assert results_of(folder) == results_of(folder.parent / "reference")
    assert read(folder / "result_of_2_chains.json")["chains"] == 2 and read(folder / "result.json")["chains"] == 3
    (folder / "result.json").unlink()
    assert unlimited.main(["--resume", str(folder), "--add-chains=1"]) == 2
    assert "--add-chains extends a finished run, and" in capsys.readouterr().err
    write_json(folder / "result.json", {"status": "finished"})
    before = (folder / "config.json").read_bytes()
    for wrong in (
        ["--add-chains=-1"],
        ["--add-chains=1", "--processes-per-chain=4"],
        ["--add-chains=1", "--data-dir=no"],
    ):
        assert unlimited.main(["--resume", str(folder), *wrong]) == 2
        assert (folder / "config.json").read_bytes() == before and (folder / "result.json").exists()
    assert unlimited.main(flags(**values | {"run_name": "x", "add_chains": 1})) == 2
    assert unlimited.main(flags(**values | {"run_name": "x", "select_only": True})) == 2
    assert "--select-only needs --resume RUN_DIR" in capsys.readouterr().err


def test_independent_members(base, folder):
    """Each cycle begins with fresh weights and an empty optimizer, with a teacher or without."""
    values = base | TINY | {"chains": 1, "cycles": 3, "members": "independent", "eval_initial": True}
    assert unlimited.main(flags(**values)) == 0
    steps, validations = read_metrics(folder / "chains" / "chain_00")
    assert validations[0]["val_loss"] == pytest.approx(math.log(V), abs=0.01)
    starts = [line["train_loss"] for line in steps if line["lr"] == 1.0]
    assert len(starts) == 3 and starts == pytest.approx([math.log(V)] * 3, abs=0.01)
    hashes = {member["sha256"] for member in members_of(folder)}
    assert len(hashes) == 3
    assert unlimited.main(flags(**values | {"teach_after": 0, "run_name": "untaught"})) == 0
    untaught = members_of(folder.parent / "untaught")
    assert [member["sha256"] in hashes for member in untaught] == [True, False, False]


def test_only_so_many_snapshots_are_kept(base, folder):
    """The one of least weight in its chain goes, never the newest; what is kept is what the ledger lists."""
    assert unlimited.main(flags(**base | {"chains": 1, "cycles": 4, "keep": 2, "checkpoint_min": 0.0})) == 0
    own = folder / "chains" / "chain_00"
    members = read(own / "ledger.json")["members"]
    assert len(members) == 2 and members[-1]["cycle"] == 4
    assert sorted(path.name for path in (own / "final").iterdir()) == [member["file"] for member in members]
    assert read(folder / "result.json")["candidates"] == 2


def test_a_disk_that_is_too_small_is_refused(base, folder, monkeypatch, capsys):
    disk = SimpleNamespace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    assert unlimited.main(flags(**base)) == 2
    error = capsys.readouterr().err
    assert "the run needs up to" in error and "--keep fewer snapshots of a chain" in error and not folder.exists()
    config = unlimited.Config()
    disk.free = 10**15
    said = unlimited.check_disk(config, torch.bfloat16, folder, running=5, targets=2 * 4880 * 2048 + 132000)
    assert "480 snapshots, 3.48 GiB each in bfloat16" in said and "up to 1,9" in said
    needed = 480 * unlimited.disk_gib(config, torch.bfloat16)[0]
    assert needed * 2**30 == pytest.approx(1.8e12, rel=0.05)  # the specification says 1.7 TB for 1.8B parameters


def test_a_full_disk_keeps_the_snapshot_for_the_next_attempt(base, folder, capsys):
    """The last snapshot cannot be written: exit code 1, no result, and after a resume all is there."""
    values = base | TINY | {"chains": 1}
    assert unlimited.main(flags(**values | {"run_name": "reference"})) == 0
    save = unlimited.save_file

    def on_a_full_disk(tensors, path):
        if "cycle_002" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlimited, "save_file", on_a_full_disk)
        assert unlimited.main(flags(**values)) == 1
    assert "NOT saved" in capsys.readouterr().out and not (folder / "result.json").exists()
    assert unlimited.main(["--resume", str(folder)]) == 0
    assert results_of(folder) == results_of(folder.parent / "reference")


def test_nothing_compiles_after_the_warm_up(base, monkeypatch):
    """With a teacher and without, and for the scoring of snapshots."""
    from torch._dynamo.utils import counters

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    torch._dynamo.reset()
    ensemble, _ = unlimited.set_up(flags(**base | {"compile": "on", "dropout": 0.1, "replay_from": 0.5}))
    ensemble.warm_up()
    chain, made = ensemble.chain, counters["stats"]["unique_graphs"]
    assert made > 10
    for step in (0, 9, 14, 24):
        if step == 14:
            snapshot = {n: p.detach().clone() for n, p in chain.model.named_parameters()}
            chain.teacher = unlimited.snapshot_weights(chain.model, snapshot, chain.dtype)
        chain.train_step(step)()
    chain.step = 10
    chain.end_epoch(complete=True)
    assert counters["stats"]["unique_graphs"] == made


BAD_FLAGS = [
    ({"chains": 0}, "--chains is 0: it must be positive"),
    ({"cycles": 0}, "--cycles is 0: it must be positive"),
    ({"keep": -1}, "--keep is -1: it must be 0 or more"),
    ({"outer_batch_tokens": 500}, "outer_batch_tokens 500 is not a multiple of 8 virtual ranks x micro_batch 2"),
    (
        {"meta_gradient": True},
        "the meta-gradient cannot halve 1 micro-step(s): make them even with --outer-batch-tokens",
    ),
    (
        {"micro_batch": 4, "outer_batch_tokens": 1024, "device_batch": 3},
        "device_batch 3 does not divide micro_batch",
    ),
    ({"teach_weight": 1.5}, "--teach-weight 1.5 is not in [0, 1]"),
    ({"lr_low": 1.0}, "--lr-low 1.0 is not in [0, 1)"),
    ({"processes_per_chain": 3}, "--processes-per-chain is 3: it must be 1, 2, 4 or 8"),
    (
        {"processes_per_chain": 2},
        "groups of 2 that divide 8 virtual ranks: use --processes-per-chain 1, 2, 4 or 8",
    ),
    ({"average": "logit"}, "--average logit needs --selection uniform"),
    ({"selection": "uniform", "keep": 2}, "--keep needs --selection learned"),
    ({"cycles": 1, "leave_out_first": True}, "--leave-out-first leaves nothing of a single cycle"),
    ({"run_name": ".."}, "--run-name .. is not the name of a folder"),
    ({"fitness_tokens": 20}, "a sequence of the fitness set needs 33: raise --fitness-tokens"),
    ({"fitness_tokens": 6000}, "and nothing is left to train on: lower --fitness-tokens"),
    ({"batch_tokens": 51200}, "an optimizer step needs 1600: use more data, or lower --batch-tokens"),
    ({"data_dir": "nowhere"}, "nowhere/fineweb_train.pt not found: run python prepare_data.py"),
    ({"n_layer": 3}, "n_layer 3 is odd"),
    ({"wandb": "online"}, "--wandb online failed"),
]


@pytest.mark.parametrize("change, message", BAD_FLAGS, ids=[str(change) for change, _ in BAD_FLAGS])
def test_bad_settings_are_refused(base, folder, capsys, monkeypatch, change, message):
    import wandb

    def fail(**options):
        raise RuntimeError("no network")

    monkeypatch.setattr(wandb, "init", fail)
    assert unlimited.main(flags(**base | change)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not folder.exists() or "wandb" in change


def test_resuming_with_other_settings_is_refused(base, folder, capsys):
    assert unlimited.main(flags(**base | TINY)) == 0
    assert unlimited.main(["--resume", str(folder), "--chains=3"]) == 2
    assert "was started with other settings (chains 2, now 3)" in capsys.readouterr().err
    ledger = folder / "chains" / "chain_00" / "ledger.json"
    ledger.write_text("{")
    assert unlimited.main(["--resume", str(folder), "--select-only"]) == 2
    assert f"{ledger} is damaged" in capsys.readouterr().err
    shutil.rmtree(folder / "chains" / "chain_00")
    (folder / "result.json").unlink()
    assert unlimited.main(["--resume", str(folder)]) == 0  # the chain is trained again
    assert len(members_of(folder)) == 4


def test_the_memory_of_a_chain_is_free_for_the_next(base, monkeypatch):
    """Compute weights and the sums of their gradients are the largest part that a hook could hold."""
    alive = []
    init = unlimited.ComputeWeights.__init__

    def remembered(weights, *args, **options):
        init(weights, *args, **options)
        alive.append(weakref.ref(weights))
        alive.extend(weakref.ref(total) for total in weights.sums.values())

    monkeypatch.setattr(unlimited.ComputeWeights, "__init__", remembered)
    assert unlimited.main(flags(**base | TINY | {"cycles": 1, "teach_after": 0})) == 0
    gc.collect()
    assert len(alive) > 10 and not any(reference() is not None for reference in alive)


def test_a_ledger_that_cannot_be_written_keeps_the_checkpoints(base, folder, monkeypatch, capsys):
    """The disk is full when the chain is done: it stops, and a resume finishes it without training again."""
    write = run_folder.write_json

    def on_a_full_disk(path, content):
        if path.name == "ledger.json" and content["steps"] == 12:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(run_folder, "write_json", on_a_full_disk)
    assert unlimited.main(flags(**base | TINY | {"chains": 1})) == 1
    assert "ledger.json is NOT saved" in capsys.readouterr().out
    monkeypatch.setattr(run_folder, "write_json", write)
    assert unlimited.main(["--resume", str(folder)]) == 0
    assert "resumed at step 12/12" in capsys.readouterr().out and len(members_of(folder)) == 2


def test_a_damaged_checkpoint_of_any_chain_is_found_at_the_start(base, folder, monkeypatch, capsys):
    step_of = unlimited.Chain.train_step

    def interrupted(chain, step):
        if (chain.number, step) == (0, 3):
            signal.raise_signal(signal.SIGTERM)
        return step_of(chain, step)

    monkeypatch.setattr(unlimited.Chain, "train_step", interrupted)
    assert unlimited.main(flags(**base | TINY)) == 0
    own, other = (folder / "chains" / name / "checkpoints" for name in ("chain_00", "chain_01"))
    (newest,) = own.glob("*.pt")
    newest.write_bytes(newest.read_bytes()[:-1])
    other.mkdir(parents=True)
    capsys.readouterr()
    assert unlimited.main(["--resume", str(folder)]) == 2
    said = f"{newest.with_suffix('.json')} is damaged, or what it tells of: delete it to resume chain 0"
    assert said in capsys.readouterr().err
    newest.with_suffix(".json").unlink()
    monkeypatch.setattr(unlimited.Chain, "train_step", step_of)
    assert unlimited.main(["--resume", str(folder)]) == 0 and len(members_of(folder)) == 4
