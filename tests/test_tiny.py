"""The tiny track: golden numbers, model, initial weights, averages, the head in fp8, and what is compiled."""

import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_figures, golden, set_golden_parameters
from test_kernels import E4M3, E5M2, rounded

import tiny.train as tiny
from slowrun.config import parse_flags
from slowrun.data import Split
from slowrun.kernels import check_kernels
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
    assert plan.labels == {0: "one_pass", round(0.7 * N): "two_passes"}


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


# --------------------------------------------------------------------------------------------------------------- model

# How the first records were, all at once
OLDEST = {"meta_gradient": False, "mlp": "relu2", "u_net": False, "head_gates": False, "half_rotary": False}
OLDEST |= {"key_offset": False, "xsa_layers": 0, "readout": "last", "resid_init": 1.0}


def small_training(**changes) -> tiny.Training:
    """Away from the zeros and identities of the initial weights, in float64."""
    torch.manual_seed(0)
    config = tiny.Config(**SMALL | {"n_layer": 4, "dropout": 0.0} | changes)
    train = tiny.Training(config, ALONE, torch.float64, KERNELS, compiled=False)
    for master in train.masters.values():
        master.add_(0.2 * torch.randn_like(master))
    train.weights.refresh(train.masters)
    train.model.eval()
    return train


def random_tokens(batch: int = 2) -> torch.Tensor:
    return torch.randint(97, (batch, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("switches", [{}, OLDEST], ids=["record", "oldest"])
@torch.no_grad()
def test_predictions_do_not_depend_on_what_comes_later(passes, switches):
    """Nor on other sequences, nor on the length of the input."""
    model, tokens, position = small_training(**switches).model, random_tokens(), 17
    changed = tokens.clone()
    changed[0, position:] = (changed[0, position:] + 1) % 97
    before, after = (model.log_probs(t, passes) for t in (tokens, changed))
    assert torch.equal(before[0, :position], after[0, :position])
    assert torch.equal(before[1], after[1])
    assert not torch.allclose(before[0, position], after[0, position])
    for length in (1, 5, 16, 17):
        torch.testing.assert_close(model.log_probs(tokens[:, :length], passes), before[:, :length])
    torch.testing.assert_close(before.exp().sum(-1), torch.ones(2, 32).double())
    losses = model.token_losses(tokens[:, :-1], tokens[:, 1:], passes)
    torch.testing.assert_close(losses, -before[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0])


def test_only_the_last_pass_is_differentiated():
    """Two passes equal one that starts from the first's result as if it were given, with dropout in both."""
    model, tokens = small_training(dropout=0.3).model.train(), random_tokens()
    x0 = tiny.norm(model.transformer.wte(tokens))
    ve = {int(i): project(x0) for i, project in model.ve_projs.items()}
    torch.manual_seed(3)
    first = model.stack(x0, x0, ve, model.cos, model.sin).detach()
    expected = model.stack(first, x0, ve, model.cos, model.sin)
    torch.manual_seed(3)
    found = model(tokens, 2)
    assert torch.equal(found, expected)
    direction = torch.randn_like(found)
    for name, p in model.named_parameters():
        if not name.startswith("lm_head"):
            ours, theirs = (
                torch.autograd.grad((x * direction).sum(), p, retain_graph=True)[0] for x in (found, expected)
            )
            assert torch.equal(ours, theirs), name
    torch.manual_seed(4)  # the first pass draws numbers too
    assert not torch.allclose(model.stack(x0, x0, ve, model.cos, model.sin), first)


def test_half_truncated_rotary():
    """The first quarter of a head's dimensions rotates with the third, by angles of a rotary of half the width."""
    config = tiny.Config(**SMALL)
    cos, sin = tiny.rotary_tables(config, torch.float64)
    x = torch.randn(1, 32, 1, 16, dtype=torch.float64)
    y = tiny.rotate(x, cos, sin)
    assert torch.equal(y[..., 4:8], x[..., 4:8]) and torch.equal(y[..., 12:], x[..., 12:])
    for t in (0, 1, 31):
        for i in range(4):
            angle = t * 10000 ** (-2 * i / 8)
            a, b = x[0, t, 0, i].item(), x[0, t, 0, 8 + i].item()
            found = y[0, t, 0, i].item(), y[0, t, 0, 8 + i].item()
            expected = a * math.cos(angle) + b * math.sin(angle), b * math.cos(angle) - a * math.sin(angle)
            assert found == pytest.approx(expected, abs=1e-12)
    cos, _ = tiny.rotary_tables(replace(config, half_rotary=False), torch.float64)
    assert cos[31, 0].tolist() == pytest.approx([math.cos(31 * 10000 ** (-i / 8)) for i in range(8)], abs=1e-12)


def test_keys_are_offset_in_half_of_their_dimensions():
    k = torch.randn(2, 5, 3, 8)
    found = tiny.offset_keys(k)
    assert torch.equal(found[..., :4], k[..., :4]) and torch.equal(found[:, 0], k[:, 0])
    assert torch.equal(found[:, 1:, :, 4:], k[:, :-1, :, 4:])
    layers = small_training().model.transformer.h
    assert [layer.attn.offset_keys for layer in layers] == [False, False, False, True]  # where the window is full
    assert not any(layer.attn.offset_keys for layer in small_training(key_offset=False).model.transformer.h)


def test_exclusive_attention():
    """Strength 0 changes nothing, 1 leaves nothing along the own value; values of zero are no trouble."""
    y, v = torch.randn(2, 2, 5, 3, 8, dtype=torch.float64)
    assert torch.equal(tiny.exclude_own_value(y, v, torch.zeros(3)), y)
    left = tiny.exclude_own_value(y, v, torch.tensor([1.0, 0.0, 1.0]))
    assert (left * v).sum(-1)[..., [0, 2]].abs().max() < 1e-12
    assert torch.equal(left[..., 1, :], y[..., 1, :])
    assert torch.equal(tiny.exclude_own_value(y, torch.zeros_like(v), torch.ones(3)), y)
    assert tiny.exclude_own_value(y.bfloat16(), v.bfloat16(), torch.ones(3)).dtype == torch.bfloat16


@torch.no_grad()
def test_layers_beyond_the_first_have_no_exclusive_attention():
    """Their strengths, which another model has, would be 0."""
    some, every, tokens = small_training(xsa_layers=2), small_training(), random_tokens()
    for name, master in some.masters.items():
        master.copy_(every.masters[name][:2] if name == "xsa_alphas" else every.masters[name])
    some.weights.refresh(some.masters)
    assert not torch.allclose(some.model.log_probs(tokens, 1), every.model.log_probs(tokens, 1))
    every.masters["xsa_alphas"][2:] = 0
    every.weights.refresh(every.masters)
    torch.testing.assert_close(some.model.log_probs(tokens, 1), every.model.log_probs(tokens, 1))


def test_parts_that_are_off_leave_no_parameters():
    names = " ".join(small_training(**OLDEST).masters)
    assert not any(part in names for part in ("skip_weights", "attn_gate", "xsa_alphas", "c_gate"))
    assert small_training(xsa_layers=3).masters["xsa_alphas"].shape == (3, 2)
    mlp, x = small_training(mlp="relu2").model.transformer.h[0].mlp, torch.randn(2, 5, 32).double()
    torch.testing.assert_close(mlp(x), F.linear(F.linear(x, mlp.c_fc.weight).clamp_min(0) ** 2, mlp.c_proj.weight))
    constant = tiny.Config(decay_schedule=False)
    assert {tiny.weight_decay_multiplier(constant, step, 1000) for step in range(1000)} == {1.0}


def test_counts_of_the_record():
    """Parameters, matrices by optimizer, and operations, by hand."""
    config = tiny.Config()
    masters = tiny.init_masters(config, torch.bfloat16, torch.device("meta"))
    sizes = tiny.count_sizes(config, torch.bfloat16)
    assert sizes.parameters == sum(p.numel() for p in masters.values()) == pytest.approx(300e6, rel=0.1)
    muon = [
        name for group in tiny.optimizer_groups(config, list(masters)) if group.method == "muon" for name in group.names
    ]
    assert len(muon) == 48 + 4 * 16 + 8 + 8 and len(tiny.moved_names(config, list(masters))) == 48
    stack = 16 * (4 * 1024**2 + 3 * 1024 * 2816)
    attention = 4 * 1024 * (12 * (1024 - 1024**2 / 4096) + 4 * 1024)
    before, after = (tiny.flops_per_token(config, passes) for passes in (1, 2))
    assert before == 3 * (2 * stack + attention) + 6 * (8 * 1024**2 + 50304 * 1024)
    assert after - before == 2 * stack + attention  # a pass more, forward only
    narrow = [name for name, p in masters.items() if p.dtype == torch.bfloat16]
    assert narrow == ["transformer.wte.weight", "lm_head.weight"]


def test_exponential_moving_average():
    """Of the weights after steps 0, 2, 4, ..., from zero, corrected for that; its decay is by epoch."""
    train, N = small_training(ema_every=2, num_epochs=16), 80
    beta = tiny.ema_decay(train.config, N)
    assert beta ** (N / 16 / 2) == pytest.approx(0.15)  # what an epoch of 5 steps leaves, with an update in 2 steps
    assert tiny.ema_decay(tiny.Config(), 15 * 190) == pytest.approx(0.15 ** (10 / 190))
    average = {name: torch.zeros_like(p) for name, p in train.masters.items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        values = replace(PLAIN, ema_weight=tiny.ema_weight(train.config, step, N))
        for grad in train.shards.grads.values():
            grad.copy_(torch.randn(grad.shape, generator=generator, dtype=grad.dtype))
        train.optimizer.step(step, values)
        for name, p in train.masters.items():
            if step % 2 == 0:
                average[name] = beta * average[name] + (1 - beta) * p
    for name, found in train.shards.gather_state("ema").items():
        torch.testing.assert_close(found, average[name], msg=name)
    run = SimpleNamespace(config=train.config, step=6, plan=SimpleNamespace(num_steps=N))
    unbiased = tiny.unbiased_ema(run, train)
    for name, p in unbiased.items():
        torch.testing.assert_close(p, average[name] / (1 - beta**3), msg=name)


def test_members_are_averaged_by_their_weights():
    members = [(weight, {"a": torch.full((2,), value).bfloat16()}) for weight, value in ((0.25, 1.0), (0.75, 3.0))]
    found = tiny.average_weights(members)["a"]
    assert found.dtype == torch.float32 and found.tolist() == [2.5, 2.5]


# ---------------------------------------------------------------------------------------------------------------- fp8

VOCAB, PADDED, CAP = 100, 128, 15.0
WEIGHTS = torch.tensor([1.0, 0.5, 0.25])


def head_inputs(positions: int) -> tuple[torch.Tensor, ...]:
    """x (n, C), lm_head (C, padded V), targets (n, 3) of which some are missing or the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(positions, 32, generator=generator).bfloat16()
    lm_head = 0.05 * torch.randn(PADDED, 32, generator=generator).bfloat16().T.contiguous()
    targets = torch.randint(VOCAB, (positions, 3), generator=generator)
    targets[3], targets[7, 1:], targets[11:13, 1], targets[20, 2] = 5, -1, -1, targets[20, 0]
    return x, lm_head, targets


def emulated_chunk(x, lm_head, targets, weights):
    """The fp8 head in float64, every rounding written out: 8-bit operands with the track's scales, bfloat16 results."""
    assert [s * 448 for s in (tiny.X_SCALE, tiny.LM_HEAD_SCALE, tiny.GRAD_SCALE)] == pytest.approx([100, 1.6, 0.75])

    def quantized(value, scale, numbers):
        return rounded(value.float() / scale, *numbers) * scale

    def bfloat16(value):
        return value.bfloat16().double()

    x8, head8 = quantized(x, tiny.X_SCALE, E4M3), quantized(lm_head, tiny.LM_HEAD_SCALE, E4M3)
    logits = bfloat16(x8 @ head8).requires_grad_()
    capped = CAP * torch.tanh(logits[:, :VOCAB] / CAP)
    cross_entropy = partial(F.cross_entropy, ignore_index=-1, reduction="sum")
    loss = sum(weight * cross_entropy(capped, targets[:, k]) for k, weight in enumerate(weights.tolist()))
    grad8 = quantized(bfloat16(torch.autograd.grad(loss, logits)[0]), tiny.GRAD_SCALE, E5M2)
    return loss.detach(), bfloat16(grad8 @ head8.T), bfloat16(x8.T @ grad8)


def relative(found, expected) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_the_fp8_head_is_what_its_formats_say():
    """It agrees with the emulation far better than with the head in float32, from which the formats keep it apart."""
    x, lm_head, targets = head_inputs(256)
    loss, _, *grads = tiny.head_chunk(x, lm_head, targets, WEIGHTS, VOCAB, CAP, "fp8")
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2
    emulated_loss, *emulated = emulated_chunk(x, lm_head, targets, WEIGHTS)
    plain_loss, _, *plain = tiny.head_chunk(x.float(), lm_head.float(), targets, WEIGHTS, VOCAB, CAP, "plain")
    assert loss.item() == pytest.approx(emulated_loss.item(), rel=1e-5)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-2)
    for ours, theirs, exact in zip(grads, emulated, plain, strict=True):
        assert relative(ours, theirs) < 0.005
        assert 0.02 < relative(ours, exact) < 0.1


def test_the_fp8_products_are_laid_out_as_tensor_cores_want(monkeypatch):
    """By rows times by columns, in multiples of 16; a CPU takes other layouts too, a GPU does not."""
    shapes, product = [], tiny.fp8_product

    def spy(a, b, scale, fast=False):
        assert a.stride(1) == b.stride(0) == 1 and a.size(1) % 16 == b.size(1) % 16 == 0
        assert a.stride(0) % 16 == b.stride(1) % 16 == 0
        assert not a.dtype == b.dtype == torch.float8_e5m2
        shapes.append((*a.shape, b.size(1)))
        return product(a, b, scale, fast)

    monkeypatch.setattr(tiny, "fp8_product", spy)
    x, lm_head, targets = head_inputs(48)
    tiny.head_chunk(x, lm_head, targets, WEIGHTS, VOCAB, CAP, "fp8")
    assert shapes == [(48, 32, PADDED), (48, PADDED, 32), (32, 48, PADDED)]


@pytest.mark.parametrize("head", ["fp8", "plain"])
def test_the_compiled_head_is_the_same(head):
    x, lm_head, targets = head_inputs(48)
    compiled = torch.compile(tiny.head_chunk, backend="aot_eager", fullgraph=True, dynamic=False)
    results = [f(x, lm_head, targets, WEIGHTS, VOCAB, CAP, head) for f in (tiny.head_chunk, compiled)]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


def test_scales_leave_room():
    """Normed x, the initial head and one of large weights, gradients from 1 down to a millionth: none is lost."""
    x = tiny.norm(torch.randn(64, 1024))
    assert x.abs().max() < 100 and relative(tiny.to_fp8(x, tiny.X_SCALE).float() * tiny.X_SCALE, x) < 0.04
    for deviation in (0.001, 0.3):
        weights = deviation * torch.randn(64, 1024)
        assert relative(tiny.to_fp8(weights, tiny.LM_HEAD_SCALE).float() * tiny.LM_HEAD_SCALE, weights) < 0.04
    grad = torch.tensor([1.75, -1.0, 1e-2, 1e-4, 1e-6])
    kept = tiny.to_fp8(grad, tiny.GRAD_SCALE, torch.float8_e5m2).float() * tiny.GRAD_SCALE
    torch.testing.assert_close(kept, grad, rtol=0.13, atol=0.0)


def test_the_start_finds_a_wrong_fp8_head(monkeypatch):
    """The error is small for the right one; with one wrong product the head is refused."""
    config = tiny.Config(vocab_size=VOCAB, n_embd=64, n_head=2, head="fp8")
    chosen = tiny.choose_kernels(config, CPU, torch.bfloat16)
    errors = check_kernels(chosen)
    assert errors == {"attention": 0.0, "head": tiny.head_error(config, CPU, "fp8")} and 0.0 < errors["head"] < 0.1
    product = tiny.fp8_product

    def one_wrong(a, b, scale, fast=False):
        return (1.5 if a.dtype == torch.float8_e5m2 else 1.0) * product(a, b, scale, fast)

    monkeypatch.setattr(tiny, "fp8_product", one_wrong)
    with pytest.raises(ValueError, match="head fp8 is wrong here, by "):
        check_kernels(chosen)
    plain = tiny.choose_kernels(replace(config, head="plain"), CPU, torch.bfloat16)
    assert check_kernels(plain) == {"attention": 0.0, "head": 0.0}


def test_choosing_the_head(monkeypatch):
    config, cuda = tiny.Config(), torch.device("cuda")
    for capability, auto in (((9, 0), "fp8"), ((8, 9), "fp8"), ((8, 0), "plain")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert tiny.choose_head("auto", config, cuda, torch.bfloat16) == auto
        assert tiny.choose_head("plain", config, cuda, torch.bfloat16) == "plain"
        assert tiny.choose_head("auto", config, cuda, torch.float32) == "plain"
    with pytest.raises(ValueError, match="--head fp8 needs"):
        tiny.choose_head("fp8", config, cuda, torch.bfloat16)
    assert tiny.choose_head("auto", config, CPU, torch.bfloat16) == "plain"


def test_the_fp8_head_is_of_training_alone():
    """Validation is the same to the last bit; the losses of training are close, and not the same."""
    config = tiny.Config(**SMALL)
    batch = torch.randint(97, (8, 4, 33), generator=torch.Generator().manual_seed(0))
    losses, validations = {}, {}
    for head in ("fp8", "plain"):
        torch.manual_seed(0)
        train = tiny.Training(config, ALONE, torch.bfloat16, KERNELS | {"head": head}, compiled=False)
        validations[head] = train.scorer(train.masters, 1)(batch[0, :, :-1], batch[0, :, 1:])
        losses[head] = [train.step(step, batch, PLAIN)["train_loss"].item() for step in range(3)]
    assert torch.equal(validations["fp8"], validations["plain"])
    assert losses["fp8"] != losses["plain"] and losses["fp8"] == pytest.approx(losses["plain"], abs=0.05)


# --------------------------------------------------------------------------------------------- warm-up, compilation


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
