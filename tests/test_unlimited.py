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
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, V, assert_figures, flags, golden, golden_values, read_metrics, run_to_end

import slowrun.folder
import slowrun.machine
import slowrun.session
import unlimited.train as unlimited
from slowrun.data import Split, load_split, sha256_file
from slowrun.session import exit_code
from slowrun.world import World

SCRIPT = "unlimited/train.py"
TINY = {"cycles": 2, "fitness_tokens": 2500, "log_every": 100}  # 3,500 tokens to train on: 13 steps a chain
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
DTYPES = pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)


@pytest.fixture
def base(data_dir, tmp_path) -> dict:
    """Fields of Config for a small run in a folder of its own."""
    paths = {"data_dir": str(data_dir), "runs_dir": str(tmp_path), "run_name": "run", "device": "cpu"}
    return SMALL["unlimited"] | paths


@pytest.fixture
def folder(base) -> Path:
    return Path(base["runs_dir"]) / "run"


def run(arguments: list[str]) -> int:
    """The exit code of a run in this process; a run that is refused gives back its lock, as at a process's end."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return exit_code(partial(unlimited.main, arguments), SCRIPT)
    except SystemExit as end:  # of a run that has finished
        return end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        gc.collect()


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def members_of(folder: Path) -> list[dict]:
    return read(folder / "final" / "members.json")["members"]


def small_plan(base, **changes) -> tuple:
    config = unlimited.Config(**base | changes)
    fitness, rest = unlimited.split_fitness(config, load_split(config.data_dir, "train", V, config.sequence_len))
    return config, fitness, rest, unlimited.make_plan(config, rest)


def sized_split(config, num_sequences: int) -> Split:
    """A split of so many sequences."""
    length = num_sequences * (config.sequence_len + 1)
    return Split(np.broadcast_to(np.uint16(0), length), np.arange(0, length, 1000), 43, "")


def new_training(config, dtype: torch.dtype = torch.float64, param_seed: int = 7):
    """Training of a chain, with the golden parameters of a seed."""
    train = unlimited.Training(config, ALONE, dtype, {"attention": "sdpa"}, compiled=False)
    for name, value in golden_values(train.masters, param_seed, config.n_embd).items():
        train.masters[name].copy_(value)
    train.weights.refresh(train.masters)
    return train


# ------------------------------------------------------------------------------------------------------ golden numbers


def golden_config():
    numbers = golden("unlimited")["config"]
    names = ("vocab_size", "sequence_len", "n_layer", "n_head", "n_embd", "logit_cap", "window_pattern")
    names += ("replay_loops", "mtp_weight")
    start, end = numbers["replay_layers"]
    tokens = 8 * 2 * 2 * numbers["sequence_len"]
    return unlimited.Config(
        **{name: numbers[name] for name in names},
        replay_start=start,
        replay_end=end,
        dropout=0.0,
        batch_tokens=tokens,
        outer_batch_tokens=tokens,
    )


def golden_tokens(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = golden("unlimited")["config"]
    shape = numbers["batch"], numbers["sequence_len"] + 1
    tokens = torch.from_numpy(np.random.RandomState(seed).randint(0, numbers["vocab_size"], shape))
    return tokens[:, :-1], tokens[:, 1:]


GOLDEN_CASES = [case for case in golden("unlimited")["cases"] if case != "meta_gradient"]


@DTYPES
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_losses_and_gradients(case, dtype, tolerance):
    numbers, config = golden("unlimited"), golden_config()
    expected, seed = numbers["cases"][case], numbers["config"]["param_seed"]
    train = new_training(config, dtype, seed)
    assert {name: list(p.shape) for name, p in train.masters.items()} == numbers["shapes"]
    replay = case in ("replay", "distill")
    tokens, targets = golden_tokens(numbers["config"]["token_seed"])
    if case == "distill":
        assert (config.teach_weight, config.teach_temperature) == (expected["alpha"], expected["temperature"])
        train.teach(golden_values(train.masters, seed + 50000, config.n_embd))
        train.weights.refresh(train.masters)
    teacher = train.teacher if case == "distill" else None
    loss, next_token_loss = train.model.training_loss(tokens, targets, replay, teacher=teacher)
    loss.backward()
    train.weights.pull_back(train.shards.grads)
    assert loss.item() == pytest.approx(expected["loss"], rel=tolerance)
    assert_figures(train.shards.grads, expected["grads"], tolerance)
    if case == "distill":
        own = (1 - expected["alpha"]) * (next_token_loss.item() + config.mtp_weight * expected["mtp"])
        assert next_token_loss.item() == pytest.approx(expected["ce"], rel=tolerance)
        assert (loss.item() - own) / expected["alpha"] == pytest.approx(expected["kl"], rel=10 * tolerance)
        return
    token_losses = train.model.token_losses(tokens, targets, replay)
    np.testing.assert_allclose(token_losses.detach().numpy(), expected["token_losses"], rtol=tolerance)


@DTYPES
def test_golden_optimizer_steps(dtype, tolerance):
    numbers, config = golden("unlimited"), golden_config()
    seed = numbers["config"]["param_seed"]
    train = new_training(config, dtype, seed)
    plain = unlimited.Scheduled(1.0, 1.0, 0.95, 0.0, replay=False, taught=False, updates=1, cycle=1)
    for step in range(3):
        train.weights.refresh(train.masters)
        train.model.training_loss(*golden_tokens(seed + 600 + step), replay=False)[0].backward()
        train.weights.pull_back(train.shards.grads)
        train.optimizer.step(replace(plain, updates=step + 1))
        train.shards.zero_grads()
    if dtype == torch.float32:  # an element of almost no sign takes or loses its decay
        tolerance = 5e-4
    assert_figures(train.masters, numbers["after_3_steps"]["params"], tolerance)
    train.weights.refresh(train.masters)
    loss, _ = train.model.training_loss(*golden_tokens(numbers["config"]["token_seed"]), replay=False)
    assert loss.item() == pytest.approx(numbers["after_3_steps"]["loss"], rel=tolerance)


def test_golden_schedules():
    expected = golden("schedules")["unlimited"]
    config, length = unlimited.Config(cycles=expected["cycles"]["num_cycles"]), expected["cycle_len"]
    for i, step in enumerate(expected["steps"]):
        assert unlimited.lr_multiplier(config, step / length) == pytest.approx(expected["lr"][i], abs=1e-12)
        assert unlimited.weight_decay_multiplier(config, step / length) == pytest.approx(expected["wd"][i], abs=1e-12)
    plan = unlimited.make_plan(config, sized_split(config, 48800))
    assert [unlimited.batch_tokens(config, cycle) for cycle in range(12)] == expected["cycles"]["batch_tokens"]
    assert np.bincount(plan.cycle[:-1]).tolist() == expected["cycles"]["steps"]
    scales = [unlimited.perturbation_scale(config, cycle) for cycle in range(11)]
    assert scales == pytest.approx(expected["perturbation_scale_after_cycle"], abs=1e-12)


def test_golden_selection():
    """The golden weights are of float32, by their digits: ours, in float64, agree to that precision."""
    expected, seed = golden("unlimited")["selection"], golden("unlimited")["config"]["param_seed"]
    probabilities = torch.from_numpy(np.random.RandomState(seed + 77).uniform(0.01, 0.9, (12, 400)))
    weights = unlimited.learn_weights(probabilities)
    assert weights.tolist() == pytest.approx(expected["weights"], abs=3e-6)
    assert -(weights @ probabilities).log().mean().item() == pytest.approx(expected["fit_loss"], abs=1e-6)
    mixed = unlimited.mixtures(weights, (4,))[4]
    assert mixed.nonzero().flatten().tolist() == expected["top4"] and mixed.sum().item() == pytest.approx(1.0)


def test_no_position_sees_the_future(base):
    train = new_training(unlimited.Config(**base | {"dropout": 0.0}))
    tokens = torch.randint(V, (1, 32))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % V
    first, second = (train.model.log_probs(t, replay=True) for t in (tokens, changed))
    assert torch.equal(first[:, :20], second[:, :20]) and not torch.equal(first[:, 20:], second[:, 20:])


def test_optimizer_groups(base):
    numbers = golden("unlimited")
    names = list(numbers["shapes"])
    found = {name: g for g in unlimited.optimizer_groups(unlimited.Config(), names) for name in g.names}
    assert sorted(found) == sorted(names)
    for group in numbers.get("optimizer_groups", []):
        for name in group["params"]:
            assert found[name].method == group["kind"] and found[name].lr == pytest.approx(group["lr"], rel=1e-12)
            assert found[name].weight_decay == group["weight_decay"]


# --------------------------------------------------------------------------------------------------- plan and schedules


def test_plan_of_the_record():
    config = unlimited.Config()
    plan = unlimited.make_plan(config, sized_split(config, 48_740))
    assert unlimited.micro_steps_per_epoch(config, sized_split(config, 48_740)) == 3046
    inner = [cycle for cycle in range(96) if unlimited.batch_tokens(config, cycle) == 524288]
    assert inner == list(range(24, 72)) and unlimited.batch_tokens(config, 0) == 393216
    steps = np.bincount(plan.cycle[:-1])
    assert steps[0] == round(2 * 3046 / 12) and steps[30] == round(2 * 3046 / 16)
    assert [unlimited.is_taught(config, cycle) for cycle in (0, 7, 8, 95, 96)] == [False, False, True, True, False]
    assert [stage.name for stage in plan.stages.values()] == ["student", "teacher"]
    assert unlimited.batch_tokens(unlimited.Config(cycles=1), 0) == 524288


def test_every_micro_step_is_taken_once(base):
    _, _, _, plan = small_plan(base)
    assert np.bincount(plan.cycle[:-1]).tolist() == [10, 5, 10]
    assert np.diff(plan.tokens // 512).tolist() == [1] * 10 + [2] * 5 + [1] * 10
    assert plan.tokens[-1] == 30 * 512
    assert [plan.cycle_ended(step) for step in (0, 9, 10, 14, 15, 24, 25)] == [0, 0, 1, 0, 2, 0, 3]
    assert [plan.cycle[step] for step in (0, 9, 10, 14, 15, 24)] == [0, 0, 1, 1, 2, 2]
    assert [plan.position(step) for step in (0, 5, 10, 12)] == [0.0, 0.5, 0.0, 0.4]
    assert [plan.epoch[step] for step in (9, 10, 14, 15, 25)] == [0, 1, 1, 2, 3]


def test_the_first_cycle_may_be_of_other_length_and_replay_may_begin_late(base):
    config, _, _, plan = small_plan(base, first_cycle_epochs=3, replay_from=0.5)
    assert np.bincount(plan.cycle[:-1]).tolist() == [30, 5, 10]
    replay = [unlimited.schedule(config, step, plan).replay for step in (0, 14, 15, 29, 30, 32, 33)]
    assert replay == [0, 0, 1, 1, 0, 0, 1]
    config, _, _, plan = small_plan(base, replay_from=1.0)
    assert not any(unlimited.schedule(config, step, plan).replay for step in range(plan.num_steps))


def test_schedules_of_a_constant_rate_with_a_warmdown(base):
    config = unlimited.Config(**base | {"warmdown": 0.5, "lr_low": 0.0, "decay_low": 1.0})
    assert [unlimited.lr_multiplier(config, p) for p in (0.0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0]
    assert unlimited.weight_decay_multiplier(config, 0.7) == 1.0
    assert unlimited.perturbation_scale(unlimited.Config(cycles=2), 0) == 0.25


# ----------------------------------------------------------------------------------------------------------------- data


def test_the_fitness_set_is_whole_documents_that_are_never_trained_on(base):
    config, fitness, rest, _ = small_plan(base)
    split = load_split(config.data_dir, "train", V, config.sequence_len)
    assert np.array_equal(np.concatenate([fitness.tokens, rest.tokens]), split.tokens)
    assert len(fitness.tokens) <= 500 < len(fitness.tokens) + 60
    assert fitness.tokens[0] == rest.tokens[0] == V - 1 and (rest.tokens[rest.doc_starts] == V - 1).all()
    assert len(fitness.doc_starts) + len(rest.doc_starts) == len(split.doc_starts)
    assert (fitness.tokens[fitness.doc_starts] == V - 1).all()


def test_each_chain_has_its_own_order_as_specified(base):
    """Documents by (chain seed) * 1009 + epoch + 1000, from the first epoch on; sequences by ... + 2000."""
    config, _, rest, _ = small_plan(base, seed=43)
    order, ends = np.arange(len(rest.doc_starts)), np.append(rest.doc_starts[1:], len(rest.tokens))
    for epoch in (1, 2, 3):
        generator = torch.Generator().manual_seed(43 * 1009 + epoch + 1000)
        order = order[torch.randperm(len(order), generator=generator).numpy()]
        tokens = np.concatenate([rest.tokens[rest.doc_starts[i] : ends[i]] for i in order])
        sequences = tokens[: len(tokens) // 33 * 33].reshape(-1, 33)
        generator = torch.Generator().manual_seed(43 * 1009 + epoch + 2000)
        permutation = torch.randperm(len(sequences), generator=generator).numpy()
        assert np.array_equal(unlimited.epoch_sequences(config, rest, epoch), sequences[permutation])


def test_batches_of_two_sizes_go_on_through_the_order(base):
    config, _, rest, plan = small_plan(base)
    loader = unlimited.make_loader(config, rest, plan, ALONE)
    taken = [loader.batch(step).numpy() for step in range(plan.num_steps)]
    assert [batch.shape for batch in taken[9:11]] == [(8, 2, 33), (8, 4, 33)]
    rows = np.concatenate([b.reshape(8, -1, 2, 33).swapaxes(0, 1).reshape(-1, 33) for b in taken])
    per_epoch = unlimited.micro_steps_per_epoch(config, rest) * 16
    expected = [unlimited.epoch_sequences(config, rest, epoch)[:per_epoch] for epoch in (1, 2, 3)]
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


def test_a_perfect_teacher_adds_nothing(base):
    train = new_training(unlimited.Config(**base | {"teach_weight": 0.3}))
    tokens = torch.randint(V, (2, 33), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    train.teach(train.masters)
    plain, nats = train.model.training_loss(inputs, targets, replay=True)
    taught, nats_too = train.model.training_loss(inputs, targets, replay=True, teacher=train.teacher)
    assert taught.item() == pytest.approx(0.7 * plain.item(), abs=1e-12)
    assert nats_too.item() == pytest.approx(nats.item(), abs=1e-12)


def test_the_teacher_has_no_dropout_and_no_gradient(base):
    train = new_training(unlimited.Config(**base | {"dropout": 0.5}))
    tokens = torch.randint(V, (2, 32))
    train.teach(train.masters)
    train.model.train()
    assert not train.teacher.training and not any(p.requires_grad for p in train.teacher.parameters())
    first, second = (train.teacher(tokens, replay=True) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, train.model.eval()(tokens, replay=True))


def test_a_snapshot_is_scored_as_it_is_stored(base, tmp_path):
    """What the model computes with a snapshot in training, as the teacher, and loaded from the disk: the same bits."""
    config = unlimited.Config(**base)
    train = new_training(config, torch.bfloat16)
    snapshot = unlimited.member_weights(train.masters, torch.bfloat16)
    tokens, targets = torch.randint(V, (2, 33)).unfold(1, 32, 1).unbind(1)
    losses = train.scorer(snapshot, replay=True)(tokens, targets)
    train.teach(snapshot)
    unlimited.save_file({name: p.clone() for name, p in snapshot.items()}, tmp_path / "snapshot.safetensors")
    loaded = unlimited.GPT(config, torch.bfloat16).eval()
    unlimited.load_snapshot(loaded, tmp_path / "snapshot.safetensors")
    for model in (train.teacher, loaded):
        assert torch.equal(model.token_losses(tokens, targets, replay=True), losses)


# ------------------------------------------------------------------------------------ perturbation, clipping, selection


def test_perturbation(base):
    """Of the size asked for, in each parameter of several elements; a function of the seed alone."""
    config = unlimited.Config(**base | {"n_embd": 256, "n_layer": 4, "replay_start": 2, "replay_end": 3})
    changed = []
    for seed in (1, 1, 2):
        train = new_training(config, torch.float32)
        before = {name: p.clone() for name, p in train.masters.items()}
        train.perturb(0.2, seed)
        changed.append({name: p - before[name] for name, p in train.masters.items()})
    for name, difference in changed[0].items():
        assert torch.equal(difference, changed[1][name])
        deviation = 0.2 * before[name].std().item()
        if difference.numel() > 10_000:
            assert difference.std().item() == pytest.approx(deviation, rel=0.02), name
            assert abs(difference.mean().item()) < 5 * deviation / difference.numel() ** 0.5, name
            assert abs((difference * changed[2][name]).mean().item()) < 0.05 * deviation**2, name
    assert changed[0]["resid_lambdas"].all()
    small = new_training(unlimited.Config(**base))  # with a skip weight of one element
    skip_weight = small.masters["skip_weights"].clone()
    small.perturb(0.2, 1)
    assert torch.equal(small.masters["skip_weights"], skip_weight)


def test_gradients_are_clipped_as_torch_does(base):
    """By one norm over all parameters, before the momentum."""
    plain = unlimited.Scheduled(1.0, 1.0, 0.95, 0.0, replay=False, taught=False, updates=1, cycle=1)
    states = []
    for clip in (0.5, 0.0):
        train = new_training(unlimited.Config(**base | {"clip": clip}))
        for k, grad in enumerate(train.shards.grads.values()):
            grad.copy_(torch.from_numpy(np.random.RandomState(k).standard_normal(grad.shape)))
        if not clip:
            parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in train.shards.grads.values()]
            for p, grad in zip(parameters, train.shards.grads.values(), strict=True):
                p.grad = grad
            assert torch.nn.utils.clip_grad_norm_(parameters, 0.5) > 10
        train.optimizer.step(plain)
        states.append(train.shards.state_dict())
    for name, state in states[0].items():
        for key, value in state.items():
            torch.testing.assert_close(states[1][name][key], value, rtol=1e-9, atol=1e-15)


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
    assert run(flags(**base | {"dropout": 0.1})) == 0
    printed, result = capsys.readouterr().out, read(folder / "result.json")
    assert "chain 0 | cycle_2 | step 15/25 | val " in printed and "chain 1 | step 20/25 | train" in printed
    assert "chain 0 | projected training time" in printed and "for all 2, one after the other" in printed
    assert "up to " in printed and "weights for the readout, 6 x" in printed and "operations in all" in printed
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
    config, mixture = unlimited.Config(**base), 0
    assert sum(member["weight"] for member in members) == pytest.approx(1.0) and len(members) == 6
    for split, claimed in (("val", result["val_loss"]), ("holdout", result["holdout_loss"])):
        sequences = torch.from_numpy(load_split(config.data_dir, split, V, 32).sequences(33).astype(np.int64))
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
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG") and run(["--resume", str(folder)]) == 0


def signal_at(monkeypatch, chain: int, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in a step of a chain, once."""
    take_step = unlimited.Training.step
    sent = []

    def interrupted(train, at, *arguments):
        if (train.config.seed - 42, at) == (chain, step) and not sent:
            sent.append(True)
            signal.raise_signal(number)
        return take_step(train, at, *arguments)

    monkeypatch.setattr(unlimited.Training, "step", interrupted)


def results_of(folder: Path) -> tuple:
    members = [(member["file"], member["sha256"], member["weight"]) for member in members_of(folder)]
    result = read(folder / "result.json")
    return members, result["val_loss"], result["holdout_loss"], result["readouts"]


def test_the_spread_of_chains_does_not_matter(base, folder):
    """3 chains on 1 and 2 processes, of which one trains two: the same snapshots, byte for byte, the same mixture."""
    values = base | TINY | {"chains": 3, "dropout": 0.1}
    assert run(flags(**values)) == 0
    output = run_to_end(SCRIPT, flags(**values | {"run_name": "of_2"}), 2)
    assert "groups x processes: 2 x 1" in output
    assert results_of(folder.parent / "of_2") == results_of(folder)


def test_a_group_of_processes_trains_a_chain(base, folder):
    """Two processes on one chain, in float64: the same losses as one, dropout and meta-gradient included."""
    values = base | TINY | {"dtype": "float64", "dropout": 0.1, "chains": 1, "batch_tokens": 1024}
    values |= {"outer_batch_tokens": 1024, "meta_gradient": True}
    assert run(flags(**values)) == 0
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
    assert run(flags(**values | {"run_name": "reference"})) == 0
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
    assert run(flags(**values | {"run_name": "reference"})) == 0
    signal_at(monkeypatch, chain=1, step=11)  # in the cycle with a teacher
    assert run(flags(**values)) == 0
    assert f"stopped by SIGTERM; resume with: python {sys.argv[0]} --resume {folder}" in capsys.readouterr().out
    states = [read(folder / "chains" / name / "ledger.json")["state"] for name in ("chain_00", "chain_01")]
    assert states == ["finished", "stopped"] and not (folder / "result.json").exists()
    first = folder / "chains" / "chain_00" / "metrics.jsonl"
    before = first.stat().st_mtime_ns
    assert run(["--resume", str(folder)]) == 0
    assert first.stat().st_mtime_ns == before and "chain 1 | resumed at step 12/" in capsys.readouterr().out
    assert results_of(folder) == results_of(folder.parent / "reference")


def test_an_ensemble_without_checkpoints(base, folder, monkeypatch, capsys):
    """Snapshots are written, checkpoints are not: the chain that a signal stopped starts over, with the same result."""
    values = base | TINY | {"dropout": 0.1}
    assert run(flags(**values | {"run_name": "reference"})) == 0
    signal_at(monkeypatch, chain=1, step=11)
    assert run(flags(**values | {"checkpoints": False})) == 1
    printed = capsys.readouterr().out
    assert "no checkpoints, so --resume would start over" in printed
    assert f"which --no-checkpoints did not save: python {sys.argv[0]} --resume {folder} starts over" in printed
    assert not list(folder.rglob("step_*")) and list((folder / "chains/chain_00/final").glob("*.safetensors"))
    assert run(["--resume", str(folder)]) == 0
    assert "chain 1 | no checkpoint yet: starting from step 0" in capsys.readouterr().out
    assert results_of(folder) == results_of(folder.parent / "reference")


def test_what_is_damaged_is_left_out(base, folder, capsys):
    """A snapshot with a changed byte, and one that is gone: neither is mixed in, and it is said which they are."""
    assert run(flags(**base | TINY)) == 0
    (before, *_), names = results_of(folder), ["chain_00_cycle_002.safetensors", "chain_01_cycle_001.safetensors"]
    damaged, gone = (folder / "chains" / name[:8] / "final" / name for name in names)
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.unlink()
    damaged.write_bytes(content)
    gone.unlink()
    capsys.readouterr()
    assert run(["--resume", str(folder), "--select-only"]) == 0
    printed = capsys.readouterr().out
    for path in (damaged, gone):
        assert f"WARNING: {path} is missing or damaged: it is left out" in printed
    members = members_of(folder)
    assert [member["file"] for member in members] == [name for name, *_ in before if name not in names]
    assert sum(member["weight"] for member in members) == pytest.approx(1.0)
    for path in (folder / "chains").glob("*/final/*"):
        path.unlink()
    assert run(["--resume", str(folder), "--select-only"]) == 2
    assert "has no snapshot to read out" in capsys.readouterr().err


def test_a_damaged_snapshot_is_left_out_when_its_chain_resumes(base, folder, monkeypatch, capsys):
    """The teacher is in the checkpoint, so the chain goes on as it would have."""
    values = base | {"chains": 1, "checkpoint_min": 0.0}
    assert run(flags(**values | {"run_name": "reference"})) == 0
    signal_at(monkeypatch, chain=0, step=12)
    assert run(flags(**values)) == 0
    (folder / "chains" / "chain_00" / "final" / "chain_00_cycle_001.safetensors").unlink()
    assert run(["--resume", str(folder)]) == 0
    assert "chain_00_cycle_001.safetensors is missing or damaged: it is left out" in capsys.readouterr().out
    members, expected = members_of(folder), members_of(folder.parent / "reference")
    assert [member["sha256"] for member in members] == [member["sha256"] for member in expected[1:]]


def test_selection_is_repeated_with_other_settings(base, folder):
    assert run(flags(**base | TINY)) == 0
    before = results_of(folder)
    select = ["--resume", str(folder), "--select-only"]
    assert run(select) == 0
    assert results_of(folder) == before
    declared = [folder / name for name in ("result.json", "curve.png", "metrics.jsonl", "final/members.json")]
    (folder / "curve.png").write_bytes(b"as declared")
    claimed = [path.read_bytes() for path in declared]
    assert run([*select, "--selection=uniform"]) == 0
    result = read(folder / "result_uniform_probability.json")
    assert [member["weight"] for member in result["members"]] == [0.25] * 4
    assert result["val_loss"] == pytest.approx(before[3]["equal_weights"], abs=1e-12)
    assert result["holdout_loss"] is None and not result["as_declared"]  # it chooses nothing, also not afterwards
    assert run([*select, "--leave-out-first"]) == 0
    members = read(folder / "result_learned_probability_without_first.json")["members"]
    assert len(members) == 2 and all("cycle_002" in member["file"] for member in members)
    assert run([*select, "--selection=uniform", "--average=logit"]) == 0
    result, config, logs = read(folder / "result_uniform_logit.json"), unlimited.Config(**base), 0
    sequences = torch.from_numpy(load_split(config.data_dir, "val", V, 32).sequences(33).astype(np.int64))
    for _, log_probs in unlimited.load_members(folder, "cpu"):
        logs = logs + log_probs(sequences[:, :-1]).double() / 4
    nats = -logs.log_softmax(-1).gather(-1, sequences[:, 1:, None]).mean().item()
    assert result["val_loss"] == pytest.approx(nats, abs=1e-6) and result["mixing"] == "logit"
    assert [path.read_bytes() for path in declared] == claimed and results_of(folder) == before


def test_uniform_weights_can_be_declared(base, folder):
    assert run(flags(**base | TINY | {"selection": "uniform", "average": "logit", "chains": 1})) == 0
    result, final = read(folder / "result.json"), read(folder / "final" / "members.json")
    assert result["as_declared"] and result["holdout_loss"] is not None and final["mixing"] == "logit"
    assert [member["weight"] for member in final["members"]] == [0.5] * 2


def test_what_is_there_of_a_run_that_was_not_finished_can_be_selected(base, folder, monkeypatch):
    signal_at(monkeypatch, chain=1, step=0, number=signal.SIGINT)
    assert run(flags(**base | TINY)) == 0
    assert run(["--resume", str(folder), "--select-only"]) == 0
    result = read(folder / "result.json")
    assert (result["status"], result["stopped_by"], result["candidates"]) == ("partial", "select_only", 2)
    assert result["holdout_loss"] is None and "chains are not finished" in result["not_eligible_because"]
    assert run(["--resume", str(folder)]) == 0
    assert read(folder / "result.json")["status"] == "finished" and len(members_of(folder)) == 4


def test_chains_can_be_added(base, folder, capsys):
    values = base | TINY
    assert run(flags(**values | {"chains": 3, "run_name": "reference"})) == 0
    assert run(flags(**values | {"chains": 2})) == 0
    assert run(["--resume", str(folder), "--add-chains=1"]) == 0
    assert results_of(folder) == results_of(folder.parent / "reference")
    assert read(folder / "result_of_2_chains.json")["chains"] == 2 and read(folder / "result.json")["chains"] == 3
    (folder / "result.json").unlink()
    assert run(["--resume", str(folder), "--add-chains=1"]) == 2
    assert "--add-chains extends a finished run, and" in capsys.readouterr().err
    slowrun.folder.write_json(folder / "result.json", {"status": "finished"})
    before = (folder / "config.json").read_bytes()
    for wrong in (
        ["--add-chains=-1"],
        ["--add-chains=1", "--processes-per-chain=4"],
        ["--add-chains=1", "--data-dir=no"],
    ):
        assert run(["--resume", str(folder), *wrong]) == 2
        assert (folder / "config.json").read_bytes() == before and (folder / "result.json").exists()
    assert run(flags(**values | {"run_name": "x", "add_chains": 1})) == 2
    assert run(flags(**values | {"run_name": "x", "select_only": True})) == 2
    assert "--select-only needs --resume RUN_DIR" in capsys.readouterr().err


def test_independent_members(base, folder):
    """Each cycle begins with fresh weights and an empty optimizer, with a teacher or without."""
    values = base | TINY | {"chains": 1, "cycles": 3, "members": "independent", "eval_initial": True}
    assert run(flags(**values)) == 0
    steps, validations = read_metrics(folder / "chains" / "chain_00")
    assert validations[0]["val_loss"] == pytest.approx(math.log(V), abs=0.01)
    starts = [line["train_loss"] for line in steps if line["lr"] == 1.0]
    assert len(starts) == 3 and starts == pytest.approx([math.log(V)] * 3, abs=0.01)
    hashes = {member["sha256"] for member in members_of(folder)}
    assert len(hashes) == 3
    assert run(flags(**values | {"teach_after": 0, "run_name": "untaught"})) == 0
    untaught = members_of(folder.parent / "untaught")
    assert [member["sha256"] in hashes for member in untaught] == [True, False, False]


def test_only_so_many_snapshots_are_kept(base, folder):
    """The one of least weight in its chain goes, never the newest; what is kept is what the ledger lists."""
    assert run(flags(**base | {"chains": 1, "cycles": 4, "keep": 2, "checkpoint_min": 0.0})) == 0
    own = folder / "chains" / "chain_00"
    members = read(own / "ledger.json")["members"]
    assert len(members) == 2 and members[-1]["cycle"] == 4
    assert sorted(path.name for path in (own / "final").iterdir()) == [member["file"] for member in members]
    assert read(folder / "result.json")["candidates"] == 2


def test_a_disk_that_is_too_small_is_refused(base, folder, monkeypatch, capsys):
    monkeypatch.setattr(slowrun.machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    assert run(flags(**base)) == 2
    assert "the run needs up to" in capsys.readouterr().err and not folder.exists()


def test_sizes_of_the_record():
    config = unlimited.Config()
    splits = {"val": sized_split(config, 4880), "holdout": sized_split(config, 4880)}
    sizes = unlimited.count_sizes(config, torch.bfloat16, splits, num_groups=5)
    assert (sizes.members, sizes.models) == (480, 5) and sizes.member_bytes / 2**30 == pytest.approx(3.48, abs=0.01)
    assert 480 * sizes.member_bytes == pytest.approx(1.8e12, rel=0.05)  # the specification says 1.7 TB for 1.8B
    assert sizes.score_bytes == 480 * 2 * 4880 * 2048 * 4
    assert sizes.checkpoint_bytes / 2**30 == pytest.approx(18, abs=1.0)


def test_a_full_disk_keeps_the_snapshot_for_the_next_attempt(base, folder, capsys):
    """The last snapshot cannot be written: exit code 1, no result, and after a resume all is there."""
    values = base | TINY | {"chains": 1}
    assert run(flags(**values | {"run_name": "reference"})) == 0
    save = slowrun.session.save_file

    def on_a_full_disk(tensors, path):
        if "cycle_002" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slowrun.session, "save_file", on_a_full_disk)
        assert run(flags(**values)) == 1
    assert "NOT saved" in capsys.readouterr().out and not (folder / "result.json").exists()
    assert run(["--resume", str(folder)]) == 0
    assert results_of(folder) == results_of(folder.parent / "reference")


def test_nothing_compiles_after_the_warm_up(base, monkeypatch):
    """With a teacher and without, and for the scoring of snapshots."""
    from torch._dynamo.utils import counters

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    torch._dynamo.reset()
    config, _, rest, plan = small_plan(base, dropout=0.1, replay_from=0.5)
    train = unlimited.Training(config, ALONE, torch.float32, {"attention": "sdpa"}, compiled=True)
    loader = unlimited.make_loader(config, rest, plan, ALONE)
    train.warm_up([unlimited.schedule(config, step, plan) for step in plan.stages])
    made = counters["stats"]["unique_graphs"]
    assert made > 10
    batch = torch.randint(V, (config.eval_batch, 33))
    for step in (0, 9, 14, 24):
        if step == 14:
            snapshot = unlimited.member_weights(train.masters, torch.float32)
            train.scorer(snapshot, replay=True)(batch[:, :-1], batch[:, 1:])
            train.teach(snapshot)
            train.perturb(0.1, 1)
        train.step(step, loader.batch(step), unlimited.schedule(config, step, plan))
    assert counters["stats"]["unique_graphs"] == made


BAD_FLAGS = [
    ({"chains": 0}, "--chains is 0: it must be at least 1"),
    ({"cycles": 0}, "--cycles is 0: it must be at least 1"),
    ({"keep": -1}, "--keep is -1: it must be at least 0"),
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
    ({"processes_per_chain": 2}, "groups of 2 that divide 8 virtual ranks: use --processes-per-chain 1, 2, 4 or 8"),
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
    assert run(flags(**base | change)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not folder.exists() or "wandb" in change


def test_resuming_with_other_settings_is_refused(base, folder, capsys):
    assert run(flags(**base | TINY)) == 0
    assert run(["--resume", str(folder), "--chains=3"]) == 2
    assert "was started with other settings (chains 2, now 3)" in capsys.readouterr().err
    ledger = folder / "chains" / "chain_00" / "ledger.json"
    ledger.write_text("{")
    assert run(["--resume", str(folder), "--select-only"]) == 2
    assert f"{ledger} is damaged" in capsys.readouterr().err
    shutil.rmtree(folder / "chains" / "chain_00")
    (folder / "result.json").unlink()
    assert run(["--resume", str(folder)]) == 0  # the chain is trained again
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
    assert run(flags(**base | TINY | {"cycles": 1, "teach_after": 0})) == 0
    gc.collect()
    assert len(alive) > 10 and not any(reference() is not None for reference in alive)


def test_a_ledger_that_cannot_be_written_keeps_the_checkpoints(base, folder, monkeypatch, capsys):
    """The disk is full when the chain is done: it stops, and a resume finishes it without training again."""
    write = slowrun.folder.write_json

    def on_a_full_disk(path, content):
        if path.name == "ledger.json" and content["steps"] == 12:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(slowrun.folder, "write_json", on_a_full_disk)
    assert run(flags(**base | TINY | {"chains": 1})) == 1
    assert "ledger.json is NOT saved" in capsys.readouterr().out
    monkeypatch.setattr(slowrun.folder, "write_json", write)
    assert run(["--resume", str(folder)]) == 0
    assert "resumed at step 12/12" in capsys.readouterr().out and len(members_of(folder)) == 2


def test_a_damaged_checkpoint_of_any_chain_is_found_at_the_start(base, folder, monkeypatch, capsys):
    signal_at(monkeypatch, chain=0, step=3)
    assert run(flags(**base | TINY)) == 0
    own, other = (folder / "chains" / name / "checkpoints" for name in ("chain_00", "chain_01"))
    (newest,) = own.glob("*.pt")
    newest.write_bytes(newest.read_bytes()[:-1])
    other.mkdir(parents=True)
    capsys.readouterr()
    assert run(["--resume", str(folder)]) == 2
    said = f"{newest.with_suffix('.json')} or its tensors are damaged: delete it to resume chain 0"
    assert said in capsys.readouterr().err
    newest.with_suffix(".json").unlink()
    assert run(["--resume", str(folder)]) == 0 and len(members_of(folder)) == 4
