"""The tiny track's experiment: golden numbers, initial weights, and what is compiled."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_figures, golden, set_golden_parameters

import tiny.train as tiny
from slowrun.config import parse_flags
from slowrun.data import Split
from slowrun.world import World

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
KERNELS = {"attention": "sdpa", "head": "plain"}
GOLD = golden("tiny")
SIZES = GOLD["config"]
PLAIN = tiny.Scheduled(lr=1.0, weight_decay=1.0, momentum=0.95, mtp_weights=(1.0,), passes=1, ema_weight=0.0)
SMALL = {"vocab_size": 97, "sequence_len": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
SMALL |= {"batch_tokens": 1024, "micro_batch": 4, "eval_batch": 3}


def golden_config() -> tiny.Config:
    names = ("vocab_size", "sequence_len", "n_layer", "n_head", "n_embd", "logit_cap", "window_pattern")
    batch_tokens = 8 * 2 * SIZES["sequence_len"]
    return tiny.Config(**{name: SIZES[name] for name in names}, dropout=0.0, micro_batch=2, batch_tokens=batch_tokens)


def golden_training(dtype: torch.dtype) -> tiny.Training:
    train = tiny.Training(golden_config(), ALONE, dtype, KERNELS, compiled=False)
    assert {name: list(master.shape) for name, master in train.masters.items()} == GOLD["shapes"]
    masters = SimpleNamespace(named_parameters=train.masters.items)
    set_golden_parameters(masters, SIZES["param_seed"], SIZES["n_embd"])
    return train


def golden_tokens(seed: int) -> torch.Tensor:
    shape = (SIZES["batch"], SIZES["sequence_len"] + 1)
    return torch.from_numpy(np.random.RandomState(seed).randint(0, SIZES["vocab_size"], shape))


@DTYPES
@pytest.mark.parametrize("case", ["one_pass_plain", "two_pass_plain", "one_pass_mtp", "two_pass_mtp"])
def test_losses_and_gradients(case, dtype):
    expected, tolerance, train = GOLD["cases"][case], TOLERANCE[dtype], golden_training(dtype)
    tokens, targets = (golden_tokens(SIZES["token_seed"])[:, part] for part in (slice(-1), slice(1, None)))
    weights = torch.tensor(expected["mtp_weights"] or [1.0], dtype=dtype)
    train.weights.refresh(train.masters)
    loss, next_token_loss = train.model.training_loss(tokens, targets, expected["passes"], weights)
    loss.backward()
    train.weights.pull_back(train.shards.grads)
    token_losses = train.scorer(train.masters, expected["passes"])(tokens, targets)
    assert loss.item() == pytest.approx(expected["loss"], rel=tolerance)
    assert next_token_loss.item() == pytest.approx(np.mean(expected["token_losses"]), rel=tolerance)
    np.testing.assert_allclose(token_losses.numpy(), expected["token_losses"], rtol=tolerance)
    assert_figures(train.shards.grads, expected["grads"], tolerance)


@DTYPES
def test_meta_gradient(dtype, monkeypatch):
    expected, tolerance, train = GOLD["cases"]["meta_gradient"], TOLERANCE[dtype], golden_training(dtype)
    assert train.config.meta_step == expected["step_norm"]
    before = {name: master.clone() for name, master in train.masters.items()}
    seed = SIZES["param_seed"] + 700
    halves = torch.cat([golden_tokens(seed), golden_tokens(seed + 1)])
    backward, losses = train.backward, []

    def spy(*args, **options):
        found = backward(*args, **options)
        losses.append(16 * found[0].item())  # a half of a virtual rank's part, which is an eighth
        return found

    monkeypatch.setattr(train, "backward", spy)
    train.add_gradient(0, 0, halves, PLAIN)
    assert losses[0] == pytest.approx(expected["loss_first_half"], rel=tolerance)
    assert losses[1] == pytest.approx(expected["loss_second_half_at_adapted_point"], rel=tolerance)
    assert len(train.first_grads) == expected["num_matrices"]
    assert_figures({name: 8 * grad for name, grad in train.shards.grads.items()}, expected["grads"], tolerance)
    assert all(torch.equal(train.masters[name], before[name]) for name in before)


def test_three_optimizer_steps():
    """In float64: in float32 an element of almost no sign takes or loses its cautious decay."""
    expected, tolerance, train = GOLD["after_3_steps"], 1e-9, golden_training(torch.float64)
    for step in range(3):
        tokens = golden_tokens(SIZES["param_seed"] + 600 + step)
        train.weights.refresh(train.masters)
        train.backward(0, 0, tokens, PLAIN, weight=1 / len(tokens))
        train.weights.pull_back(train.shards.grads)
        train.optimizer.step(step, PLAIN)
        train.shards.zero_grads()
    assert_figures(train.masters, expected["params"], tolerance)
    tokens = golden_tokens(SIZES["token_seed"])
    loss = train.scorer(train.masters, 1)(tokens[:, :-1], tokens[:, 1:]).mean().item()
    assert loss == pytest.approx(expected["loss"], rel=tolerance)


def test_optimizer_groups():
    groups = tiny.optimizer_groups(golden_config(), list(GOLD["shapes"]))
    found = {name: group for group in groups for name in group.names}
    expected = {name: group for group in GOLD["optimizer_groups"] for name in group["params"]}
    assert found.keys() == expected.keys()
    for name, group in expected.items():
        assert found[name].method == group["kind"], name
        assert found[name].lr == pytest.approx(group["lr"], rel=1e-12), name
        assert found[name].weight_decay == group["weight_decay"], name
        assert list(found[name].betas or ()) == group["betas"], name


def test_schedules():
    expected = golden("schedules")["tiny"]
    c, N = tiny.Config(), expected["num_steps"]
    assert (c.num_epochs, c.swa_epochs) == (expected["num_epochs"], expected["swa_epochs"])
    for i, step in enumerate(expected["steps"]):
        values = tiny.schedule(c, step, N)
        assert values.lr == pytest.approx(expected["lr"][i], abs=1e-12)
        assert values.weight_decay == pytest.approx(expected["wd"][i], abs=1e-12)
        assert values.momentum == pytest.approx(expected["momentum"][i], abs=1e-12)
        assert values.mtp_weights == pytest.approx(expected["mtp_weights"][i], abs=1e-12)
        assert values.passes == expected["passes"][i]
    split = Split(np.empty(100_000_000, np.uint16), np.zeros(1, np.int64), 43, "")
    plan = tiny.make_plan(c, split)
    assert plan.num_steps == N
    assert plan.labels == {0: "one pass", round(0.7 * N): "two passes"}


def test_order_of_the_data():
    expected = golden("data")
    random = np.random.RandomState(expected["seed"])
    lengths = random.randint(3, 60, size=expected["num_docs"])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    tokens = random.randint(0, 50256, size=lengths.sum()).astype(np.uint16)
    tokens[starts] = 50256
    T = expected["sequence_len"]
    config = tiny.Config(sequence_len=T, micro_batch=4, batch_tokens=8 * 4 * T)
    for epoch, order in expected["train_epochs"]["order"].items():
        sequences = tiny.epoch_sequences(config, Split(tokens, starts, 43, ""), int(epoch))[: len(order)]
        assert [[int(s[0]), int(s[-1]), int(s.astype(np.int64).sum())] for s in sequences] == order


def test_initial_weights_are_drawn_in_the_order_of_the_names():
    """Checkpoints and seeds of earlier runs depend on it."""
    config = golden_config()
    C = config.n_embd
    torch.manual_seed(7)
    masters = tiny.init_masters(config, torch.float64, CPU)
    torch.manual_seed(7)
    for name, master in masters.items():
        drawn = torch.empty_like(master)
        kind = name.removesuffix(".weight").split(".")[-1]
        if name.startswith("ve_projs.") or kind in ("c_q", "c_k", "c_v", "c_gate", "c_fc"):
            assert torch.equal(master, drawn.uniform_(-((3 / C) ** 0.5), (3 / C) ** 0.5)), name
        elif kind in ("wte", "lm_head"):
            assert torch.equal(master, drawn.normal_(std=1.0 if kind == "wte" else 0.001)), name
        else:
            start = {"resid_lambdas": 1.1, "x0_lambdas": 0.1, "skip_weights": 1.0}.get(kind, 0.0)
            assert torch.equal(master, drawn.fill_(start)), name


def test_nothing_is_compiled_after_the_warm_up(monkeypatch):
    """In any stage, whatever the weights of multi-token prediction, in training or in validation."""
    graphs = []
    compile_as_usual = torch.compile

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_as_usual(f, backend=backend, **options))
    torch._dynamo.reset()
    config = tiny.Config(**SMALL)
    train = tiny.Training(config, ALONE, torch.float32, KERNELS, compiled=True)
    stages = [tiny.schedule(config, step, 100) for step in (0, 70)]
    train.warm_up(stages)
    assert [values.passes for values in stages] == [1, 2]
    count = len(graphs)
    assert count > 10
    batch = torch.randint(config.vocab_size, (8, config.micro_steps * config.micro_batch, config.sequence_len + 1))
    for step in (0, 1, 30, 69, 70, 99):
        values = tiny.schedule(config, step, 100)
        train.step(step, batch, values)
        train.scorer(train.masters, values.passes)(batch[0, :3, :-1], batch[0, :3, 1:])
    assert len(graphs) == count


def test_the_warm_up_leaves_no_trace():
    train = tiny.Training(tiny.Config(**SMALL), ALONE, torch.float32, KERNELS, compiled=False)
    before = train.shards.state_dict()
    before = {name: {key: part.clone() for key, part in parts.items()} for name, parts in before.items()}
    state = torch.get_rng_state()
    train.warm_up([tiny.schedule(train.config, step, 100) for step in (0, 70)])
    assert torch.equal(torch.get_rng_state(), state)
    for name, parts in train.shards.state_dict().items():
        for key, part in parts.items():
            assert torch.equal(part, before[name][key]), (name, key)
    assert not any(grad.any() for grad in train.shards.grads.values())


@pytest.mark.parametrize("number", range(1, 16))
def test_records_have_toy_sizes(number):
    """--record N --demo is a config, and what the record goes without stays off."""
    script = ROOT / "tiny/train.py"
    arguments = ["--record", str(number), "--demo"]
    line = parse_flags("tiny", tiny.Config, tiny.DEMO, arguments, script, "", tiny.record_sizes)
    config = tiny.Config(**line.values)
    (path,) = (ROOT / "records/tiny").glob(f"{number:02}-*.json")
    settings = json.loads(path.read_text())["settings"]
    assert config.n_layer == 4
    for name in settings.keys() - tiny.DEMO.keys():
        assert getattr(config, name) == settings[name], name
    assert config.swa_epochs == (2 if settings.get("swa_epochs", 4) else 0)
