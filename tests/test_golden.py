"""The golden numbers: model, gradients, meta-gradient, optimizer, schedules, order of the data, files."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_figures, golden, set_golden_parameters

import prepare_data
import train
from model import GPT, ComputeWeights

LIMITED = golden("limited")
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def golden_config() -> train.Config:
    c = LIMITED["config"]
    start, end = c["replay_layers"]
    sizes = {name: c[name] for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_embd", "logit_cap")}
    config = train.Config(
        **sizes, mtp_weight=c["mtp_weight"], window_pattern=c["window_pattern"], dropout=0.0, replay_start=start,
        replay_end=end, replay_loops=c["replay_loops"], batch_tokens=8 * 2 * 2 * c["sequence_len"], micro_batch=2,
    )  # fmt: skip
    assert config.padded_vocab == c["padded_vocab"]
    return config


def golden_model(dtype: torch.dtype) -> GPT:
    model = GPT(golden_config()).to(dtype)
    assert {name: list(p.shape) for name, p in model.named_parameters()} == LIMITED["shapes"]
    set_golden_parameters(model, LIMITED["config"]["param_seed"], model.config.n_embd)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return model


def golden_tokens(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    c = LIMITED["config"]
    shape = (c["batch"], c["sequence_len"] + 1)
    tokens = torch.from_numpy(np.random.RandomState(seed).randint(0, c["vocab_size"], shape))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


@DTYPES
@pytest.mark.parametrize("case", ["no_replay", "replay"])
@pytest.mark.parametrize("on_the_fly", [True, False])
def test_losses_and_gradients(dtype, case, on_the_fly):
    model, expected, tolerance = golden_model(dtype), LIMITED["cases"][case], TOLERANCE[dtype]
    tokens, targets = golden_tokens(LIMITED["config"]["token_seed"])
    weights = ComputeWeights(model, dtype)
    weights.refresh()
    w, replay = (None if on_the_fly else weights.tensors), case == "replay"
    loss, lm_loss = model.training_loss(tokens, targets, w, replay=replay)
    loss.backward()
    weights.pull_back()  # adds nothing if the weights were made on the fly
    assert loss.item() == pytest.approx(expected["loss"], rel=tolerance)
    assert lm_loss.item() == pytest.approx(expected["lm_loss"], rel=tolerance)
    mtp_loss = (loss - lm_loss).item() / LIMITED["config"]["mtp_weight"]
    assert mtp_loss == pytest.approx(expected["mtp_loss"], rel=10 * tolerance)
    token_losses = model.token_losses(tokens, targets, w, replay=replay)
    np.testing.assert_allclose(token_losses.detach().numpy(), expected["token_losses"], rtol=tolerance)
    assert_figures(gradients(model), expected["grads"], tolerance)


def golden_optimizer(model: GPT, dtype: torch.dtype) -> train.MuonAdamW:
    groups = train.optimizer_groups(model.config, [name for name, _ in model.named_parameters()])
    return train.MuonAdamW(model, groups, train.World(0, 1, torch.device("cpu")), dtype)


@DTYPES
def test_meta_gradient(dtype):
    expected, tolerance = LIMITED["cases"]["meta_gradient"], TOLERANCE[dtype]
    model = golden_model(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, weights, losses = golden_optimizer(model, dtype), ComputeWeights(model, dtype), []

    def half(seed: int) -> None:
        loss, _ = model.training_loss(*golden_tokens(seed), weights.tensors)
        (loss / 2).backward()
        losses.append(loss.item())

    seed = LIMITED["config"]["param_seed"] + 700
    halves = [partial(half, seed), partial(half, seed + 1)]
    train.add_gradient(weights, optimizer, halves, expected["step_norm"])
    assert losses[0] == pytest.approx(expected["loss_first_half"], rel=tolerance)
    assert losses[1] == pytest.approx(expected["loss_second_half_at_adapted_point"], rel=tolerance)
    assert sum(len(bucket.params) for bucket in optimizer.matrices) == expected["num_matrices"]
    assert_figures(gradients(model), expected["grads"], tolerance)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), f"{name} was not put back"


@DTYPES
def test_three_optimizer_steps(dtype):
    model, expected, tolerance = golden_model(dtype), LIMITED["after_3_steps"], TOLERANCE[dtype]
    optimizer, weights = golden_optimizer(model, dtype), ComputeWeights(model, dtype)
    seed = LIMITED["config"]["param_seed"]
    for step in range(3):
        weights.refresh()
        model.training_loss(*golden_tokens(seed + 600 + step), weights.tensors)[0].backward()
        weights.pull_back()
        optimizer.step(lr=1.0, weight_decay=1.0, mu=0.95)
    assert_figures(dict(model.named_parameters()), expected["params"], tolerance)
    loss, _ = model.training_loss(*golden_tokens(LIMITED["config"]["token_seed"]))
    assert loss.item() == pytest.approx(expected["loss"], rel=tolerance)


def test_optimizer_groups():
    names = list(LIMITED["shapes"])
    found = {name: group for group in train.optimizer_groups(golden_config(), names) for name in group["params"]}
    expected = {name: group for group in LIMITED["optimizer_groups"] for name in group["params"]}
    assert found.keys() == expected.keys()
    for name, group in expected.items():
        assert found[name]["kind"] == group["kind"], name
        assert found[name]["lr"] == pytest.approx(group["lr"], rel=1e-12), name
        assert found[name]["weight_decay"] == group["weight_decay"], name
        assert list(found[name]["betas"]) == group["betas"], name


def test_schedules():
    expected = golden("schedules")["limited"]
    config = train.Config(num_epochs=expected["num_epochs"], swa_epochs=expected["swa_epochs"])
    N = expected["num_steps"]
    for i, step in enumerate(expected["steps"]):
        found = {
            "lr": train.lr_multiplier(config, step, N),
            "warmdown": train.warmdown(config, step, N),
            "wd": train.weight_decay_multiplier(config, step, N),
            "momentum": train.muon_momentum(step),
        }
        for name, value in found.items():
            assert value == pytest.approx(expected[name][i], abs=1e-12), (name, step)


def golden_shard() -> tuple[train.Shard, dict]:
    expected = golden("data")
    random = np.random.RandomState(expected["seed"])
    lengths = random.randint(3, 60, size=expected["num_docs"])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    tokens = random.randint(0, 50256, size=lengths.sum()).astype(np.uint16)
    tokens[starts] = 50256
    assert len(tokens) == expected["num_tokens"]
    return train.Shard(tokens, starts, 43, ""), expected


def as_figures(sequences) -> list[list[int]]:
    return [[int(s[0]), int(s[-1]), int(s.astype(np.int64).sum())] for s in sequences]


def test_training_order():
    shard, expected = golden_shard()
    T, group = expected["sequence_len"], expected["group"]
    config = train.Config(sequence_len=T, micro_batch=4, batch_tokens=8 * 4 * T, num_epochs=4, swa_epochs=1)
    plan = train.Plan(config, len(shard.sequences(T + 1)))
    for epoch, order in expected["train_epochs"]["order"].items():
        sequences, permutation = train.TrainLoader(shard, plan, range(8)).make_epoch(int(epoch))
        assert len(sequences) // group * group == expected["train_epochs"]["sequences_per_epoch"][epoch]
        assert as_figures(sequences[permutation[: len(order)]]) == order


def test_validation_order():
    shard, expected = golden_shard()
    T = expected["sequence_len"]
    config = train.Config(sequence_len=T, micro_batch=4, batch_tokens=8 * 4 * T)
    found = train.EvalSet(shard, config, train.World(0, 1, torch.device("cpu")), None).sequences.numpy()
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
