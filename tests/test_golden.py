"""The golden numbers: model, gradients, meta-gradient, optimizer, schedules, order of the data, files."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALL_TRACKS, TRACKS, UNLIMITED, assert_figures, golden, golden_split, set_golden_parameters, sized

import prepare_data
from slowrun.scoring import EvalSet
from slowrun.world import World

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


# Two-hour's model with windows of T / 2 and T is limited's, and so is its optimizer
FILES = {"limited": ["limited"], "tiny": ["tiny"], "two_hour": ["limited", "two_hour"], "unlimited": ["unlimited"]}


class Golden:
    """A track's golden numbers, and the model and optimizer that they are of."""

    def __init__(self, track, file: str = ""):
        self.track, self.numbers = track, golden(file or FILES[track.TRACK][0])
        self.sizes, self.cases = self.numbers["config"], self.numbers["cases"]

    def config(self):
        c = self.sizes
        names = ("vocab_size", "n_layer", "n_head", "n_embd", "logit_cap", "window_pattern")
        values = {name: c[name] for name in names} | {"dropout": 0.0, "micro_batch": 2}
        values |= sized(self.track, c["sequence_len"])
        values["batch_tokens"] = 8 * 2 * 2 * c["sequence_len"]
        values |= {"outer_batch_tokens": values["batch_tokens"]} if self.track.TRACK == "unlimited" else {}
        if "replay_layers" in c:
            values |= dict(zip(("replay_start", "replay_end"), c["replay_layers"], strict=True))
            values |= {"replay_loops": c["replay_loops"], "mtp_weight": c["mtp_weight"], "stochastic_depth": 0.0}
        if "window_stage_1" in self.cases:
            windows = [",".join(map(str, self.cases[f"window_stage_{i}"]["windows"])) for i in (1, 2, 3)]
            values["window_schedule"] = "1-6:{};7-13:{};14-22:{}".format(*windows)
        config = self.track.Config(**values)
        assert config.padded_vocab == c["padded_vocab"]
        return config

    def model(self, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
        model = self.track.GPT(self.config()).to(dtype)
        assert {name: list(p.shape) for name, p in model.named_parameters()} == self.numbers["shapes"]
        set_golden_parameters(model, self.sizes["param_seed"] + seed, model.config.n_embd)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return model

    def weights(self, model, dtype: torch.dtype):
        weights = self.track.ComputeWeights(model, dtype)
        weights.refresh()
        return weights

    def optimizer(self, model, dtype: torch.dtype):
        world = World(0, 1, torch.device("cpu"))
        return self.track.build_optimizer(model.config, model, world, dtype, compile=False)

    def tokens(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.sizes["batch"], self.sizes["sequence_len"] + 1)
        tokens = torch.from_numpy(np.random.RandomState(seed).randint(0, self.sizes["vocab_size"], shape))
        return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture
def gold(track) -> Golden:
    return Golden(track)


def cases() -> list:
    """Every case of every track but the meta-gradient, and how the model is called for it."""
    found = []
    for name in TRACKS | UNLIMITED:
        for file in FILES[name]:
            for case, numbers in golden(file)["cases"].items():
                if case != "meta_gradient":
                    how = {key: numbers[key] for key in ("passes", "windows") if key in numbers}
                    how |= {"replay": True} if case in ("replay", "distill") else {}
                    found.append(pytest.param(name, file, case, how, id=f"{name}-{file}-{case}"))
    return found


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


@DTYPES
@pytest.mark.parametrize("track, file, case, how", cases(), indirect=["track"])
@pytest.mark.parametrize("on_the_fly", [True, False])
def test_losses_and_gradients(track, dtype, file, case, how, on_the_fly):
    gold = Golden(track, file)
    model, expected, tolerance = gold.model(dtype), gold.cases[case], TOLERANCE[dtype]
    tokens, targets = gold.tokens(gold.sizes["token_seed"])
    weights = gold.weights(model, dtype)
    w, extra = (None if on_the_fly else weights.tensors), {}
    if expected.get("mtp_weights"):
        extra["mtp_weights"] = expected["mtp_weights"]
    if case == "distill":
        assert (model.config.teach_weight, model.config.teach_temperature) == (
            expected["alpha"],
            expected["temperature"],
        )
        teacher = gold.model(dtype, seed=50000)
        extra["teacher"] = track.snapshot_weights(teacher, dict(teacher.named_parameters()), dtype)
    loss, lm_loss = model.training_loss(tokens, targets, w, **how, **extra)
    loss.backward()
    weights.pull_back()  # adds nothing if the weights were made on the fly
    assert loss.item() == pytest.approx(expected["loss"], rel=tolerance)
    assert_figures(gradients(model), expected["grads"], tolerance)
    if case == "distill":
        share = 1 - expected["alpha"]
        kl = loss.item() - share * (lm_loss.item() + gold.sizes["mtp_weight"] * expected["mtp"])
        assert lm_loss.item() == pytest.approx(expected["ce"], rel=tolerance)
        assert kl / expected["alpha"] == pytest.approx(expected["kl"], rel=10 * tolerance)
        return
    token_losses = model.token_losses(tokens, targets, w, **how)
    np.testing.assert_allclose(token_losses.detach().numpy(), expected["token_losses"], rtol=tolerance)
    assert lm_loss.item() == pytest.approx(np.mean(expected["token_losses"]), rel=tolerance)
    if "mtp_loss" in expected:
        mtp_loss = (loss - lm_loss).item() / gold.sizes["mtp_weight"]
        assert mtp_loss == pytest.approx(expected["mtp_loss"], rel=10 * tolerance)
    if "windows" in how:
        frequencies, scale = model.config.yarn(how["windows"][1])
        assert frequencies.tolist() == pytest.approx(expected["inv_freq"], rel=1e-14)
        assert scale == pytest.approx(expected["softmax_scale"], rel=1e-14)


@DTYPES
def test_meta_gradient(gold, dtype):
    expected, tolerance, model = gold.cases["meta_gradient"], TOLERANCE[dtype], gold.model(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, weights, losses = gold.optimizer(model, dtype), gold.weights(model, dtype), []

    def half(seed: int) -> None:
        loss, _ = model.training_loss(*gold.tokens(seed), weights.tensors)
        (loss / 2).backward()
        losses.append(loss.item())

    seed = gold.sizes["param_seed"] + 700
    halves = [partial(half, seed), partial(half, seed + 1)]
    gold.track.add_gradient(weights, optimizer, halves, expected["step_norm"])
    assert losses[0] == pytest.approx(expected["loss_first_half"], rel=tolerance)
    assert losses[1] == pytest.approx(expected["loss_second_half_at_adapted_point"], rel=tolerance)
    assert sum(len(bucket.params) for bucket in optimizer.moved) == expected["num_matrices"]
    assert_figures(gradients(model), expected["grads"], tolerance)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), f"{name} was not put back"


@DTYPES
@ALL_TRACKS
def test_three_optimizer_steps(track, gold, dtype):
    model, expected, tolerance = gold.model(dtype), gold.numbers["after_3_steps"], TOLERANCE[dtype]
    if track.TRACK == "unlimited" and dtype == torch.float32:  # an element of almost no sign takes or loses its decay
        tolerance = 5e-4
    optimizer, weights = gold.optimizer(model, dtype), gold.weights(model, dtype)
    seed = gold.sizes["param_seed"]
    for step in range(3):
        weights.refresh()
        model.training_loss(*gold.tokens(seed + 600 + step), weights.tensors)[0].backward()
        weights.pull_back()
        optimizer.step(lr=1.0, weight_decay=1.0, mu=0.95)
    assert_figures(dict(model.named_parameters()), expected["params"], tolerance)
    loss, _ = model.training_loss(*gold.tokens(gold.sizes["token_seed"]))
    assert loss.item() == pytest.approx(expected["loss"], rel=tolerance)


def test_optimizer_groups(gold):
    names = list(gold.numbers["shapes"])
    found = {name: group for group in gold.track.optimizer_groups(gold.config(), names) for name in group["params"]}
    expected = {name: group for group in gold.numbers["optimizer_groups"] for name in group["params"]}
    assert found.keys() == expected.keys()
    for name, group in expected.items():
        assert found[name]["kind"] == group["kind"], name
        assert found[name]["lr"] == pytest.approx(group["lr"], rel=1e-12), name
        assert found[name]["weight_decay"] == group["weight_decay"], name
        assert list(found[name]["betas"]) == group["betas"], name


def test_schedules(track):
    expected = golden("schedules")[track.TRACK]
    config = track.Config()
    assert (config.num_epochs, config.swa_epochs) == (expected["num_epochs"], expected["swa_epochs"])
    plan = track.Plan(config, 48804)
    N = expected["num_steps"]
    assert plan.num_steps == N
    functions = {
        "lr": lambda step: track.lr_multiplier(config, step, N),
        "warmdown": lambda step: track.warmdown(config, step, N),
        "wd": lambda step: track.weight_decay_multiplier(config, step, N),
        "momentum": track.muon_momentum,
        "mtp_weights": lambda step: list(track.mtp_weights(config, step, N)),
        "passes": lambda step: track.stage(plan, step)["passes"],
    }
    checked = [name for name in functions if name in expected]
    assert set(checked) == expected.keys() - {"num_steps", "steps", "num_epochs", "swa_epochs"}
    for i, step in enumerate(expected["steps"]):
        for name in checked:
            assert functions[name](step) == pytest.approx(expected[name][i], abs=1e-12), (name, step)


def test_schedules_of_the_unlimited_track():
    import unlimited.train as track

    expected = golden("schedules")["unlimited"]
    config, length = track.Config(cycles=expected["cycles"]["num_cycles"]), expected["cycle_len"]
    for i, step in enumerate(expected["steps"]):
        assert track.lr_multiplier(config, step / length) == pytest.approx(expected["lr"][i], abs=1e-12)
        assert track.weight_decay_multiplier(config, step / length) == pytest.approx(expected["wd"][i], abs=1e-12)
    plan = track.Plan(config, 48800)
    assert [plan.batch_tokens(cycle) for cycle in range(12)] == expected["cycles"]["batch_tokens"]
    assert [plan.cycle_steps(cycle) for cycle in range(12)] == expected["cycles"]["steps"]
    scales = [track.perturbation_scale(config, cycle) for cycle in range(11)]
    assert scales == pytest.approx(expected["perturbation_scale_after_cycle"], abs=1e-12)


def test_selection():
    """The golden weights are of float32, by their digits: ours, in float64, agree to that precision."""
    import unlimited.train as track

    expected, seed = golden("unlimited")["selection"], golden("unlimited")["config"]["param_seed"]
    probabilities = torch.from_numpy(np.random.RandomState(seed + 77).uniform(0.01, 0.9, (12, 400)))
    weights = track.learn_weights(probabilities)
    assert weights.tolist() == pytest.approx(expected["weights"], abs=3e-6)
    assert -(weights @ probabilities).log().mean().item() == pytest.approx(expected["fit_loss"], abs=1e-6)
    mixed = track.mixtures(weights, (4,))[4]
    assert mixed.nonzero().flatten().tolist() == expected["top4"] and mixed.sum().item() == pytest.approx(1.0)


def as_figures(sequences) -> list[list[int]]:
    return [[int(s[0]), int(s[-1]), int(s.astype(np.int64).sum())] for s in sequences]


def test_training_order(track):
    split, expected = golden_split()
    T, group = expected["sequence_len"], expected["group"]
    config = track.Config(**sized(track, T), micro_batch=4, batch_tokens=8 * 4 * T)
    for epoch, order in expected["train_epochs"]["order"].items():
        sequences = track.epoch_sequences(config, split, int(epoch))
        assert len(sequences) // group * group == expected["train_epochs"]["sequences_per_epoch"][epoch]
        assert as_figures(sequences[: len(order)]) == order


def test_validation_order():
    split, expected = golden_split()
    world = World(0, 1, torch.device("cpu"))
    eval_set = EvalSet(split, expected["sequence_len"], max_sequences=10**6, batch=4, world=world, lengths=None)
    found = eval_set.sequences.numpy()
    assert len(found) == expected["validation"]["num_sequences"]
    assert as_figures(found[:40]) == expected["validation"]["order"]


class GoldenTokenizer:
    """Looks up the golden tokens of each golden document, so that this test needs no vocabulary file."""

    name, vocab_size, bos_id = "gpt2", 50257, 50256

    def __init__(self, expected: dict):
        self.tokens, documents = {}, iter(expected["documents"])
        for split in ("val", "train"):
            starts, tokens = expected[split]["doc_starts"], expected[split]["tokens"]
            for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
                self.tokens[next(documents)] = np.array(tokens[start + 1 : end], dtype=np.uint32)

    def encode(self, text: str) -> np.ndarray:
        return self.tokens.get(text, np.zeros(0, dtype=np.uint32))

    def token_bytes(self) -> list[int]:
        return [1] * 50257


def check_shards(tokenizer, folder: Path) -> None:
    expected = golden("shards")
    budgets = {split: expected[f"{split}_tokens"] for split in ("val", "train")}
    origin = {"source": "golden", "revision": "0"}
    meta = prepare_data.prepare(expected["documents"], tokenizer, budgets, folder, origin, 2)
    for split in budgets:
        content = torch.load(folder / f"fineweb_{split}.pt", weights_only=True)
        assert content["tokens"].tolist() == expected[split]["tokens"]
        assert content["doc_starts"].tolist() == expected[split]["doc_starts"]
        assert meta["splits"][split]["sha256"] == expected[split]["sha256"], "the file's bytes differ"


def test_shards_from_golden_tokens(tmp_path):
    check_shards(GoldenTokenizer(golden("shards")), tmp_path)


def test_shards_from_golden_documents(tmp_path, gpt2):
    """With the real tokenizer."""
    check_shards(gpt2, tmp_path)
