"""The two-hour track's script: golden numbers, the window schedule, YaRN, and what is compiled."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_figures, golden, golden_split, set_golden_parameters

import two_hour.train as track
from slowrun.data import Split
from slowrun.plan import stages_of
from slowrun.world import World

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
CPU = torch.device("cpu")


def scheduled(**values) -> track.Scheduled:
    plain = {"lr": 1.0, "weight_decay": 1.0, "momentum": 0.95, "meta_step": 0.0, "softmax_scale": 0.0, "replay": False}
    return track.Scheduled(**plain | {"windows": (16, 32)} | values)


class Golden:
    """Golden numbers of a file, and the training that they are of. With windows of T / 2 and T they are limited's."""

    def __init__(self, file: str, dtype: torch.dtype, **changes):
        self.numbers = golden(file)
        self.sizes = self.numbers["config"]
        self.cases = self.numbers["cases"]
        names = ("vocab_size", "sequence_len", "n_layer", "n_head", "n_embd", "logit_cap", "window_pattern")
        values = {name: self.sizes[name] for name in (*names, "replay_loops", "mtp_weight")}
        values |= dict(zip(("replay_start", "replay_end"), self.sizes["replay_layers"], strict=True))
        values |= {"dropout": 0.0, "stochastic_depth": 0.0, "micro_batch": 2, "batch_tokens": 8 * 2 * 2 * 32}
        values["window_schedule"] = "1-22:16,32" if file == "limited" else "1-6:4,12;7-13:12,28;14-22:20,32"
        self.config = track.Config(**values | changes)
        self.train = track.Training(self.config, World(0, 1, CPU), dtype, {}, compiled=False)
        masters = self.train.masters
        assert {name: list(p.shape) for name, p in masters.items()} == self.numbers["shapes"]
        model = SimpleNamespace(named_parameters=masters.items)
        set_golden_parameters(model, self.sizes["param_seed"], self.config.n_embd)
        self.train.weights.refresh(masters)

    def sequences(self, seed: int) -> torch.Tensor:
        shape = (self.sizes["batch"], self.sizes["sequence_len"] + 1)
        return torch.from_numpy(np.random.RandomState(seed).randint(0, self.sizes["vocab_size"], shape))

    def batch(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        sequences = self.sequences(seed)
        return sequences[:, :-1], sequences[:, 1:]

    def gradient(self, seed: int, values: track.Scheduled) -> tuple[torch.Tensor, torch.Tensor]:
        """The two losses of a batch; the gradient is in train.shards.grads."""
        losses = self.train.model.training_loss(*self.batch(seed), values.windows, values.replay, ())
        losses[0].backward()
        self.train.weights.pull_back(self.train.shards.grads)
        return losses


# ----------------------------------------------------------------------------------------------------------- golden


@DTYPES
@pytest.mark.parametrize(
    "file, case",
    [("limited", "no_replay"), ("limited", "replay"), *(("two_hour", f"window_stage_{i}") for i in (1, 2, 3))],
)
def test_losses_and_gradients(file, case, dtype):
    gold = Golden(file, dtype)
    expected, tolerance = gold.cases[case], TOLERANCE[dtype]
    values = scheduled(replay=case == "replay", windows=tuple(expected.get("windows", (16, 32))))
    loss, next_token_loss = gold.gradient(gold.sizes["token_seed"], values)
    assert loss.item() == pytest.approx(expected["loss"], rel=tolerance)
    assert next_token_loss.item() == pytest.approx(expected["lm_loss"], rel=tolerance)
    mtp_loss = (loss - next_token_loss).item() / gold.config.mtp_weight
    assert mtp_loss == pytest.approx(expected["mtp_loss"], rel=10 * tolerance)
    assert_figures(gold.train.shards.grads, expected["grads"], tolerance)
    found = gold.train.scorer(gold.train.masters, values)(*gold.batch(gold.sizes["token_seed"]))
    np.testing.assert_allclose(found.numpy(), expected["token_losses"], rtol=tolerance)
    if "inv_freq" in expected:
        frequencies, scale = track.yarn_at(gold.config, values.windows[1])
        assert frequencies.tolist() == pytest.approx(expected["inv_freq"], rel=1e-14)
        assert scale == pytest.approx(expected["softmax_scale"], rel=1e-14)


@DTYPES
def test_meta_gradient(dtype):
    gold = Golden("limited", dtype, meta_gradient=True)
    expected, tolerance, train = gold.cases["meta_gradient"], TOLERANCE[dtype], gold.train
    before = {name: p.clone() for name, p in train.masters.items()}
    seed = gold.sizes["param_seed"] + 700
    sequences = torch.cat([gold.sequences(seed), gold.sequences(seed + 1)])
    losses = train.add_gradient(0, 0, sequences, scheduled(meta_step=expected["step_norm"]))
    mean = (expected["loss_first_half"] + expected["loss_second_half_at_adapted_point"]) / 2
    assert 8 * losses[0].item() == pytest.approx(mean, rel=tolerance)  # a virtual rank's part is an eighth
    assert len(train.first_grads) == expected["num_matrices"]
    assert_figures({name: 8 * grad for name, grad in train.shards.grads.items()}, expected["grads"], tolerance)
    assert all(torch.equal(p, before[name]) for name, p in train.masters.items())


@DTYPES
def test_three_optimizer_steps(dtype):
    gold = Golden("limited", dtype)
    expected, tolerance, train = gold.numbers["after_3_steps"], TOLERANCE[dtype], gold.train
    for step in range(3):
        train.weights.refresh(train.masters)
        gold.gradient(gold.sizes["param_seed"] + 600 + step, scheduled())
        train.optimizer.step(step, scheduled())
        train.shards.zero_grads()
    assert_figures(train.masters, expected["params"], tolerance)
    train.weights.refresh(train.masters)
    loss, _ = gold.gradient(gold.sizes["token_seed"], scheduled())
    assert loss.item() == pytest.approx(expected["loss"], rel=tolerance)


def test_optimizer_groups():
    gold = Golden("limited", torch.float64)
    groups = track.optimizer_groups(gold.config, list(gold.train.masters))
    found = {name: group for group in groups for name in group.names}
    expected = {name: group for group in gold.numbers["optimizer_groups"] for name in group["params"]}
    assert found.keys() == expected.keys()
    for name, group in expected.items():
        rates = found[name].method, found[name].weight_decay, list(found[name].betas or ())
        assert rates == (group["kind"], group["weight_decay"], group["betas"]), name
        assert found[name].lr == pytest.approx(group["lr"], rel=1e-12), name


def official_plan(config: track.Config):
    tokens = np.broadcast_to(np.uint16(0), (48804 * (config.sequence_len + 1),))
    return track.make_plan(config, Split(tokens, np.zeros(1, dtype=np.int64), 43, ""))


def test_schedules_of_the_record():
    expected, config = golden("schedules")["two_hour"], track.Config()
    plan = official_plan(config)
    assert (plan.num_steps, config.num_epochs, config.swa_epochs) == (4194, 22, 8)
    for i, step in enumerate(expected["steps"]):
        values = track.schedule(config, step, plan)
        found = [values.lr, values.weight_decay, values.momentum, track.warmdown(config, step, 4194), values.meta_step]
        names = ("lr", "wd", "momentum", "warmdown")
        assert found == pytest.approx([*(expected[name][i] for name in names), 0.0], abs=1e-12), step
    assert list(plan.labels.values()) == ["windows_256_768", "windows_768_1792", "windows_1280_2048_replay"]
    for step, label in plan.labels.items():
        values = track.schedule(config, step, plan)
        assert label == f"windows_{values.windows[0]}_{values.windows[1]}" + "_replay" * values.replay
        assert step == 0 or track.schedule(config, step - 1, plan).windows != values.windows
        assert plan.epoch[step] + 1 in (1, 7, 14)


# ------------------------------------------------------------------------------------------------- windows and YaRN


@pytest.mark.parametrize(
    "schedule, message",
    [
        ("1-2:4", "stage 1 of the window schedule, '1-2:4', is not of the form FIRST-LAST:SHORT,LONG"),
        ("1-1:4,12;", "stage 2 of the window schedule, '', is not of the form"),
        ("2-22:4,12", "stage 1 of the window schedule, '2-22:4,12', begins with epoch 2: it must begin with 1"),
        ("1-1:4,12;3-22:12,28", "stage 2 of the window schedule, '3-22:12,28', begins with epoch 3: it must"),
        ("1-0:4,12", "stage 1 of the window schedule, '1-0:4,12', ends before it begins"),
        ("1-22:12,4", "'1-22:12,4', does not have 1 <= short <= long <= sequence_len 2048"),
        ("1-22:0,4", "does not have 1 <= short"),
        ("1-22:4,2049", "does not have 1 <= short <= long <= sequence_len 2048"),
        ("1-1:4,28;2-22:4,12", "stage 2 of the window schedule, '2-22:4,12', has a shorter long window than the one"),
        ("1-21:4,12", "the window schedule ends with epoch 21, training with epoch 22: extend --window-schedule"),
    ],
)
def test_window_schedules_that_are_refused(schedule, message):
    with pytest.raises(ValueError) as refusal:
        track.Config(window_schedule=schedule)
    assert message in str(refusal.value)


def test_windows_of_the_record():
    config = track.Config()
    windows = [config.window(i, (768, 1792)) for i in range(31)]
    assert windows[:8] == [768, 768, 768, 1792] * 2
    assert windows[29:] == [1792, 2048]  # the last layer, and the block of multi-token prediction


def test_yarn_of_the_record():
    """By hand: what turns 32 times or more in the window before stays, what turns once or less is lowered."""
    base = 10000.0 ** (-np.arange(0, 128, 2) / 128)
    (first, scale_1), (second, scale_2), (third, scale_3) = (
        track.yarn_at(track.Config(), long) for long in (768, 1792, 2048)
    )
    assert np.array_equal(first, base)
    assert scale_1 == pytest.approx(128**-0.5)
    turns = 768 * base / (2 * np.pi)
    assert np.array_equal(second[turns >= 32], base[turns >= 32])
    np.testing.assert_allclose(second[turns <= 1], base[turns <= 1] * 768 / 1792, rtol=1e-14)
    between = (turns > 1) & (turns < 32)
    assert between.sum() > 10
    assert ((second < base) & (second > base * 768 / 1792))[between].all()
    assert third[-1] == pytest.approx(base[-1] * 768 / 2048)
    assert scale_2 == pytest.approx(scale_1 * (1 + 0.2 * math.log(1792 / 768)))
    assert scale_3 == pytest.approx(scale_2 * (1 + 0.2 * math.log(2048 / 1792)))
    assert track.yarn(128, (768, 768, 1792))[1] == scale_2  # a stage with the same long window changes nothing


def test_a_stage_sees_its_windows():
    """In the first stage a token reaches L layers of window 4 and one of 12 far; in the second one further."""
    gold = Golden("two_hour", torch.float64, window_pattern="S")
    model = gold.train.model.eval()
    tokens, _ = gold.batch(1)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 97
    for windows, reach in (((4, 12), 5 * 4 + 12), ((2, 12), 5 * 2 + 12), ((12, 28), 32)):
        before, after = (model.log_probs(t, windows, False) for t in (tokens, changed))
        differs = (before != after).flatten(2).any(-1)
        assert differs[:, : reach + 1].all()
        assert not differs[:, reach + 1 :].any()


@pytest.mark.parametrize("replay", [False, True])
@torch.no_grad()
def test_predictions_do_not_depend_on_what_comes_later(replay):
    """Nor on other sequences, nor on the length of the input, whatever the windows."""
    gold, position = Golden("two_hour", torch.float64), 17
    model = gold.train.model.eval()
    tokens, targets = gold.batch(1)
    changed = tokens.clone()
    changed[0, position:] = (changed[0, position:] + 1) % 97
    for windows in ((4, 12), (12, 28), (20, 32)):
        before, after = (model.log_probs(t, windows, replay) for t in (tokens, changed))
        assert torch.equal(before[0, :position], after[0, :position])
        assert torch.equal(before[1], after[1])
        assert not torch.allclose(before[0, position], after[0, position])
        for length in (1, 5, 16, 17):
            torch.testing.assert_close(model.log_probs(tokens[:, :length], windows, replay), before[:, :length])
        torch.testing.assert_close(before.exp().sum(-1), torch.ones(2, 32).double())
        losses = model.token_losses(tokens, targets, windows, replay)
        torch.testing.assert_close(losses, -before.gather(-1, targets[..., None])[..., 0])


def test_counts_of_the_record():
    """The model is that of the limited track; so are its operations where windows are of T / 2 and T."""
    config = track.Config()
    assert track.count_sizes(config, torch.bfloat16).parameters == 1_443_722_775
    names = list(track.init_masters(config, torch.bfloat16, torch.device("meta")))
    assert track.moved_names(config, names) == []
    assert len(track.moved_names(track.Config(meta_gradient=True), names)) == 279
    heads, attention = 6 * 2 * 50304 * 1792, 12 * 1792 * (22 * (1024 - 1024**2 / 4096) + 9 * 1024)
    flops = track.flops_per_token(config, (1024, 2048), False)
    assert (flops - heads - attention) * 65536 == pytest.approx(497e12, rel=2e-3)


def test_initial_weights_and_their_order_are_those_of_the_limited_track():
    """Checkpoints and seeds of earlier runs depend on it."""
    gold = Golden("limited", torch.float64)
    torch.manual_seed(7)
    masters = track.init_masters(gold.config, torch.float64, CPU)
    torch.manual_seed(7)
    for name, master in masters.items():
        drawn = torch.empty_like(master)
        kind = name.removesuffix(".weight").split(".")[-1]
        if name.startswith("ve_projs.") or kind in ("c_q", "c_k", "c_v", "c_gate", "c_fc", "mtp_proj"):
            assert torch.equal(master, drawn.uniform_(-((3 / 32) ** 0.5), (3 / 32) ** 0.5)), name
        elif kind in ("wte", "lm_head", "c_proj"):
            std = {"wte": 1.0, "lm_head": 0.001, "c_proj": 1 / 32**0.5}[kind]
            assert torch.equal(master, drawn.normal_(std=std)), name
        elif kind.endswith("_mix"):
            assert torch.equal(master, torch.eye(2).double()), name
        else:
            start = {"resid_lambdas": 1.0, "x0_lambdas": 0.1, "skip_weights": 1.0}.get(kind, 0.0)
            assert torch.equal(master, drawn.fill_(start)), name


def test_order_of_the_data():
    split, expected = golden_split()
    T = expected["sequence_len"]
    windows = f"1-22:{T // 2},{T}"
    config = track.Config(sequence_len=T, window_schedule=windows, micro_batch=4, batch_tokens=8 * 4 * T)
    for epoch, order in expected["train_epochs"]["order"].items():
        sequences = track.epoch_sequences(config, split, int(epoch))[: len(order)]
        assert [[int(s[0]), int(s[-1]), int(s.astype(np.int64).sum())] for s in sequences] == order


# -------------------------------------------------------------------------------------------------------- compilation


def test_nothing_compiles_after_the_warm_up(monkeypatch):
    """Every graph of training and validation, in every stage, with every layer dropped or not, is made in warm_up."""
    from torch._dynamo.utils import counters

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    torch._dynamo.reset()
    config = track.Config(
        vocab_size=97, sequence_len=32, n_layer=4, n_head=2, n_embd=32, replay_start=2, replay_end=3,
        replay_from_epoch=3, window_schedule="1-1:4,12;2-3:12,28;4-4:20,32", num_epochs=4, swa_epochs=1,
        readout_epochs=2, batch_tokens=1024, micro_batch=2, dropout=0.1, stochastic_depth=0.3,
    )  # fmt: skip
    train = track.Training(config, World(0, 1, CPU), torch.float32, {}, compiled=True)
    tokens = np.random.RandomState(0).randint(0, 96, 33 * 16 * 6).astype(np.uint16)
    plan = track.make_plan(config, Split(tokens, np.zeros(1, dtype=np.int64), 43, ""))
    names = ["windows_4_12", "windows_12_28", "windows_12_28_replay", "windows_20_32_replay"]
    assert list(plan.labels.values()) == names
    before = {name: p.clone() for name, p in train.masters.items()}
    train.warm_up([track.schedule(config, step, plan) for step in plan.stages])
    assert all(torch.equal(p, before[name]) for name, p in train.masters.items())
    made = counters["stats"]["unique_graphs"]  # step 0 drops the block of multi-token prediction in both micro-steps
    assert made > 20
    for start in plan.stages:
        for step in range(start, start + 3):
            values = track.schedule(config, step, plan)
            sequences = torch.randint(97, (8, config.micro_steps * 2, 33))
            train.step(step, sequences, values)
        batch = torch.randint(97, (config.eval_batch, 33))
        train.scorer(train.masters, values)(batch[:, :-1], batch[:, 1:])
    assert counters["stats"]["unique_graphs"] == made


def test_stages_follow_each_other():
    """A stage begins where something changes, and only there."""
    config = track.Config()
    stages = [track.make_stage(config, epoch) for epoch in (1, 6, 7, 13, 14, 22)]
    assert [*stages_of(stages)] == [0, 2, 4]
