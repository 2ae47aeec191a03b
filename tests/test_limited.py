"""The limited track: golden numbers, model, optimizer, schedules, earlier records, and what is compiled."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_figures, golden, golden_split, set_golden_parameters

import model as gpt
import train as limited
from slowrun.config import parse_flags
from slowrun.data import Split, unread_split
from slowrun.world import World

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
BOTH = pytest.mark.parametrize("replay", [False, True])
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
KERNELS = {"attention": "sdpa"}
GOLD = golden("limited")
SIZES = GOLD["config"]
V, T = 97, 32
SMALL = {
    "vocab_size": V,
    "sequence_len": T,
    "n_layer": 4,
    "n_head": 2,
    "n_embd": 32,
    "replay_start": 2,
    "replay_end": 3,
}
SMALL |= {"batch_tokens": 1024, "micro_batch": 2, "eval_batch": 3, "dropout": 0.0}
# How the first records were, all at once
OLDEST = {"meta_gradient": False, "mlp": "relu2", "value_embedding": "table", "u_net": False, "head_gates": False}
OLDEST |= {"head_mixes": False, "proj_init": "zero", "row_norm": False, "mtp_weight": 0.0, "readout": "last"}


def scheduled(**values) -> limited.Scheduled:
    plain = {"lr": 1.0, "weight_decay": 1.0, "momentum": 0.95, "meta_step": 0.5, "replay": False, "ema_weight": 0.0}
    return limited.Scheduled(**plain | values)


# ------------------------------------------------------------------------------------------------------ golden numbers


def golden_config() -> limited.Config:
    names = ("vocab_size", "sequence_len", "n_layer", "n_head", "n_embd", "logit_cap", "window_pattern")
    values = {name: SIZES[name] for name in (*names, "replay_loops", "mtp_weight")}
    values["replay_start"], values["replay_end"] = SIZES["replay_layers"]
    batch_tokens = 8 * 2 * 2 * SIZES["sequence_len"]
    return limited.Config(**values, dropout=0.0, micro_batch=2, batch_tokens=batch_tokens)


def golden_training(dtype: torch.dtype) -> limited.Training:
    train = limited.Training(golden_config(), ALONE, dtype, KERNELS, compiled=False)
    assert {name: list(master.shape) for name, master in train.masters.items()} == GOLD["shapes"]
    masters = SimpleNamespace(named_parameters=train.masters.items)
    set_golden_parameters(masters, SIZES["param_seed"], SIZES["n_embd"])
    return train


def golden_tokens(seed: int) -> torch.Tensor:
    shape = (SIZES["batch"], SIZES["sequence_len"] + 1)
    return torch.from_numpy(np.random.RandomState(seed).randint(0, SIZES["vocab_size"], shape))


@DTYPES
@pytest.mark.parametrize("case", [case for case in GOLD["cases"] if case != "meta_gradient"])
def test_losses_and_gradients(case, dtype):
    expected, tolerance, train = GOLD["cases"][case], TOLERANCE[dtype], golden_training(dtype)
    tokens, targets = (golden_tokens(SIZES["token_seed"])[:, part] for part in (slice(-1), slice(1, None)))
    train.weights.refresh(train.masters)
    loss, next_token_loss = train.model.training_loss(tokens, targets, case == "replay", ())
    loss.backward()
    train.weights.pull_back(train.shards.grads)
    assert loss.item() == pytest.approx(expected["loss"], rel=tolerance)
    assert next_token_loss.item() == pytest.approx(expected["lm_loss"], rel=tolerance)
    mtp_loss = (loss - next_token_loss).item() / SIZES["mtp_weight"]
    assert mtp_loss == pytest.approx(expected["mtp_loss"], rel=10 * tolerance)
    assert_figures(train.shards.grads, expected["grads"], tolerance)
    token_losses = train.scorer(train.masters, case == "replay")(tokens, targets)
    np.testing.assert_allclose(token_losses.numpy(), expected["token_losses"], rtol=tolerance)


@DTYPES
def test_meta_gradient(dtype, monkeypatch):
    expected, tolerance, train = GOLD["cases"]["meta_gradient"], TOLERANCE[dtype], golden_training(dtype)
    before = {name: master.clone() for name, master in train.masters.items()}
    seed = SIZES["param_seed"] + 700
    halves = torch.cat([golden_tokens(seed), golden_tokens(seed + 1)])
    backward, losses = train.backward, []

    def spy(*args, **options):
        found = backward(*args, **options)
        losses.append(16 * found[0].item())  # a half of a virtual rank's part, which is an eighth
        return found

    monkeypatch.setattr(train, "backward", spy)
    train.add_gradient(0, 0, halves, scheduled(meta_step=expected["step_norm"]))
    assert losses[0] == pytest.approx(expected["loss_first_half"], rel=tolerance)
    assert losses[1] == pytest.approx(expected["loss_second_half_at_adapted_point"], rel=tolerance)
    assert len(train.first_grads) == expected["num_matrices"]
    assert_figures({name: 8 * grad for name, grad in train.shards.grads.items()}, expected["grads"], tolerance)
    assert all(torch.equal(train.masters[name], before[name]) for name in before)


@DTYPES
def test_three_optimizer_steps(dtype):
    expected, tolerance, train = GOLD["after_3_steps"], TOLERANCE[dtype], golden_training(dtype)
    for step in range(3):
        tokens = golden_tokens(SIZES["param_seed"] + 600 + step)
        train.weights.refresh(train.masters)
        train.backward(0, 0, tokens, scheduled(), weight=1.0)
        train.weights.pull_back(train.shards.grads)
        train.optimizer.step(step, scheduled())
        train.shards.zero_grads()
    assert_figures(train.masters, expected["params"], tolerance)
    train.weights.refresh(train.masters)
    tokens = golden_tokens(SIZES["token_seed"])
    loss, _ = train.model.training_loss(tokens[:, :-1], tokens[:, 1:], False, ())
    assert loss.item() == pytest.approx(expected["loss"], rel=tolerance)


def test_optimizer_groups():
    groups = limited.optimizer_groups(golden_config(), list(GOLD["shapes"]))
    found = {name: group for group in groups for name in group.names}
    expected = {name: group for group in GOLD["optimizer_groups"] for name in group["params"]}
    assert found.keys() == expected.keys()
    for name, group in expected.items():
        rates = found[name].method, found[name].weight_decay, list(found[name].betas or ())
        assert rates == (group["kind"], group["weight_decay"], group["betas"]), name
        assert found[name].lr == pytest.approx(group["lr"], rel=1e-12), name


def test_schedules_of_the_record():
    expected, config = golden("schedules")["limited"], limited.Config()
    plan, N = limited.make_plan(config, unread_split(100_000_000)), expected["num_steps"]
    assert (plan.num_steps, config.num_epochs, config.swa_epochs) == (N, expected["num_epochs"], expected["swa_epochs"])
    for i, step in enumerate(expected["steps"]):
        values = limited.schedule(config, step, plan)
        found = [values.lr, values.weight_decay, values.momentum, limited.warmdown(config, step, N)]
        assert found == pytest.approx([expected[name][i] for name in ("lr", "wd", "momentum", "warmdown")], abs=1e-12)
        assert values.meta_step == pytest.approx(0.5 * expected["warmdown"][i], abs=1e-12)
        assert values.replay == (plan.epoch[step] >= 6) and values.ema_weight == 0.0
    assert list(plan.labels.values()) == ["plain", "replay"]
    start = list(plan.labels)[1]
    assert [limited.schedule(config, step, plan).replay for step in (start - 1, start)] == [False, True]


def test_order_of_the_data():
    split, expected = golden_split()
    length = expected["sequence_len"]
    config = limited.Config(sequence_len=length, micro_batch=4, batch_tokens=8 * 4 * length)
    for epoch, order in expected["train_epochs"]["order"].items():
        sequences = limited.epoch_sequences(config, split, int(epoch))
        assert limited.micro_steps_per_epoch(config, split) == len(sequences) // 32
        found = [[int(s[0]), int(s[-1]), int(s.astype(np.int64).sum())] for s in sequences[: len(order)]]
        assert found == order


# --------------------------------------------------------------------------------------------------------------- model


def small_training(dtype: torch.dtype = torch.float64, compiled: bool = False, **changes) -> limited.Training:
    """Away from the zeros and identities of the initial weights."""
    torch.manual_seed(0)
    train = limited.Training(limited.Config(**SMALL | changes), ALONE, dtype, KERNELS, compiled)
    for master in train.masters.values():
        master.add_(0.2 * torch.randn_like(master))
    train.weights.refresh(train.masters)
    train.model.eval()
    return train


def random_tokens(batch: int = 2, length: int = T) -> torch.Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


@BOTH
@pytest.mark.parametrize("switches", [{}, OLDEST | {"exclusive": True}], ids=["record", "oldest"])
@torch.no_grad()
def test_no_position_sees_the_future_or_another_sequence(replay, switches):
    model, tokens, position = small_training(**switches).model, random_tokens(), 17
    changed = tokens.clone()
    changed[0, position:] = (changed[0, position:] + 1) % V
    before, after = (model.log_probs(t, replay) for t in (tokens, changed))
    assert torch.equal(before[0, :position], after[0, :position])
    assert torch.equal(before[1], after[1])
    assert not torch.allclose(before[0, position], after[0, position])


@BOTH
@torch.no_grad()
def test_a_prefix_is_predicted_as_in_the_whole(replay):
    model, tokens = small_training().model, random_tokens()
    whole = model.log_probs(tokens, replay)
    for length in (1, 5, T // 2, T // 2 + 1):
        torch.testing.assert_close(model.log_probs(tokens[:, :length], replay), whole[:, :length])


@BOTH
def test_log_probs_token_losses_and_training_loss_agree(replay):
    model, tokens = small_training().model, random_tokens()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    log_probs = model.log_probs(inputs, replay)
    assert log_probs.shape == (2, T - 1, V)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, T - 1).double())
    losses = model.token_losses(inputs, targets, replay)
    torch.testing.assert_close(losses, -log_probs.gather(-1, targets[..., None])[..., 0])
    _, next_token_loss = model.training_loss(inputs, targets, replay, ())
    torch.testing.assert_close(next_token_loss, losses.mean().detach())


@torch.no_grad()
def test_a_short_window_reaches_as_far_as_its_layers():
    """Three layers see 4 positions back, the last sees all; without it, 3 * 4 positions are the reach."""
    train = small_training(sequence_len=64, batch_tokens=2048, window_pattern="S", u_net=False)
    model, tokens = train.model, random_tokens(length=64)
    for layer in model.transformer.h:
        layer.attn.window = 4
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    differs = (model.log_probs(tokens, False) != model.log_probs(changed, False)).flatten(2).any(-1)
    assert differs[:, : 4 * 4 + 1].all() and not differs[:, 4 * 4 + 1 :].any()


def test_windows_and_layers_of_the_record():
    config = limited.Config()
    windows = [config.window(i) for i in range(31)]
    assert windows[:8] == [1024, 1024, 1024, 2048] * 2 and windows[28:] == [1024, 2048, 2048]
    assert [i for i in range(29) if windows[i] == 2048] == list(range(3, 29, 4))
    assert (config.padded_vocab, config.hidden) == (50304, 4864)
    replayed = [15, 16, 17, 18, 19, 20]
    assert config.layer_order(False) == list(range(30))
    assert config.layer_order(True) == [*range(15), *replayed, *replayed, *replayed, *range(21, 30)]
    assert [i for i in range(30) if config.has_value_embedding(i)] == list(range(1, 30, 2))


def test_counts_of_the_record():
    """By hand: parameters, Muon's matrices, and 497 TFLOP of matrix products for 65,536 tokens, as published."""
    config = limited.Config()
    sizes = limited.count_sizes(config, torch.bfloat16)
    assert sizes.parameters == 1_443_722_775
    assert sizes.layer_parameters * 30 < sizes.parameters - 2 * 50304 * 1792
    masters = gpt.init_masters(config, torch.bfloat16, torch.device("meta"))
    moved = limited.moved_names(config, list(masters))
    assert len(moved) == 279 and sizes.moved_parameters == sum(masters[name].numel() for name in moved)
    heads = 6 * 2 * 50304 * 1792
    attention = 12 * 1792 * (22 * (1024 - 1024**2 / 4096) + 9 * 1024)
    before, after = (gpt.flops_per_token(config, replay) for replay in (False, True))
    assert (before - heads - attention) * 65536 == pytest.approx(497e12, rel=2e-3)
    block = 6 * (4 * 1792**2 + 3 * 1792 * 4864)
    replayed = 12 * block + 12 * 1792 * 2 * (4 * (1024 - 1024**2 / 4096) + 2 * 1024)  # 15 and 19 see all
    assert after - before == pytest.approx(replayed, rel=1e-12)


@torch.no_grad()
def test_a_layer_of_the_second_half_adds_what_its_partner_made():
    """Skips of weight 0 are none; and a skip reads its partner, at each replay too."""
    train = small_training()
    tokens = random_tokens()
    train.masters["skip_weights"].zero_()
    train.weights.refresh(train.masters)
    without = small_training(u_net=False)
    for name, master in without.masters.items():
        master.copy_(train.masters[name])
    without.weights.refresh(without.masters)
    assert torch.equal(train.model.log_probs(tokens, True), without.model.log_probs(tokens, True))

    called, run_layer = [], train.model.run_layer

    def spy(block, x, x0, skip, skip_weight, *others, is_dropped):
        made = run_layer(block, x, x0, skip, skip_weight, *others, is_dropped=is_dropped)
        called.append((list(train.model.transformer.h).index(block), skip, made))
        return made

    train.model.run_layer = spy
    train.model(tokens, True)
    assert [layer for layer, *_ in called] == [0, 1, 2, 2, 2, 3]
    assert called[0][1] is None and called[1][1] is None
    assert all(called[call][1] is called[1][2] for call in (2, 3, 4)) and called[5][1] is called[0][2]


@torch.no_grad()
def test_the_extra_block_predicts_the_token_after_next():
    """Over all values of the last target, the probabilities of that target alone sum to 1: it is no input."""
    model, tokens = small_training().model, random_tokens(batch=1, length=7)

    def nats(sequence: torch.Tensor) -> float:
        """Of all targets of the extra block in sum."""
        loss, next_token_loss = model.training_loss(sequence[:, :-1], sequence[:, 1:], False, ())
        return (sequence.size(1) - 2) * (loss - next_token_loss).item() / model.config.mtp_weight

    last = nats(tokens[:, :-1])
    sequences = [torch.cat([tokens[:, :-1], torch.tensor([[value]])], dim=1) for value in range(V)]
    probabilities = [math.exp(last - nats(sequence)) for sequence in sequences]
    assert sum(probabilities) == pytest.approx(1.0, abs=1e-9)
    assert max(probabilities) > 1.5 / V
    changed = tokens[:, :-1].clone()
    changed[0, -2] = (changed[0, -2] + 1) % V  # the next token, which the block does read
    other = nats(torch.cat([changed, tokens[:, -1:]], dim=1)) - nats(changed)
    assert other != pytest.approx(nats(tokens) - last, abs=1e-6)


def test_stochastic_depth_draws():
    config = limited.Config(**SMALL | {"stochastic_depth": 0.3})
    draws = [gpt.draw_dropped(config, True, step, 0) for step in range(4000)]
    assert draws[7] == gpt.draw_dropped(config, True, 7, 0)
    assert len({frozenset(gpt.draw_dropped(config, True, 7, micro_step)) for micro_step in range(20)}) > 1
    for call, layer in enumerate([*config.layer_order(True), config.n_layer]):
        share = sum(call in draw for draw in draws) / len(draws)
        assert abs(share - 0.3 * layer / (config.n_layer - 1)) < 0.03, (call, layer)
    assert gpt.draw_dropped(replace(config, stochastic_depth=0.0), True, 0, 0) == set()


@torch.no_grad()
def test_a_dropped_layer_passes_on_its_mixture():
    """With all layers dropped, what is left is the lambdas' and skips' mixtures of the normed embedding."""
    train = small_training()
    masters, tokens = train.masters, random_tokens()
    x = x0 = gpt.norm(masters["transformer.wte.weight"][tokens])
    encoded = []
    for i in range(4):
        if i >= 2:
            x = x + masters["skip_weights"][i - 2] * encoded[3 - i]
        x = masters["resid_lambdas"][i] * x + masters["x0_lambdas"][i] * x0
        encoded.append(x)
    torch.testing.assert_close(train.model(tokens, False, range(5)), gpt.norm(x))
    loss, next_token_loss = train.model.training_loss(tokens[:, :-1], tokens[:, 1:], False, {4})
    assert loss != train.model.training_loss(tokens[:, :-1], tokens[:, 1:], False, ())[0]
    assert next_token_loss == train.model.training_loss(tokens[:, :-1], tokens[:, 1:], False, ())[1]


def test_dropout_is_of_training_alone():
    quiet, noisy = small_training(), small_training(dropout=0.5)
    tokens = random_tokens()
    batch = tokens[:, :-1], tokens[:, 1:]
    noisy.model.train()
    losses = noisy.scorer(noisy.masters, False)(*batch)
    assert torch.equal(losses, quiet.scorer(quiet.masters, False)(*batch))
    assert noisy.model.training
    assert not torch.equal(losses, noisy.model.token_losses(*batch, False))


# --------------------------------------------------------------------------------------------- masters, optimizer, EMA


def test_initial_weights_are_drawn_in_the_order_of_the_names():
    """Checkpoints and seeds of earlier runs depend on it."""
    config = limited.Config(**SMALL)
    attention = [
        *(f"attn.{name}_mix" for name in "qkv"),
        *(f"attn.c_{name}.weight" for name in ("q", "k", "v", "proj")),
    ]
    mlp = [f"mlp.{name}.weight" for name in ("c_gate", "c_fc", "c_proj")]
    gate, ve_gate = "attn.attn_gate.weight", "attn.ve_gate.weight"
    names = ["resid_lambdas", "x0_lambdas", "skip_weights", "transformer.wte.weight"]
    for i in range(4):
        names += [f"transformer.h.{i}.{name}" for name in (*attention, gate, *([ve_gate] * (i % 2)), *mlp)]
    names += ["lm_head.weight", "ve_projs.1.weight", "ve_projs.3.weight", "mtp_proj.weight"]
    names += [f"mtp_block.{name}" for name in (*attention, gate, *mlp)]
    torch.manual_seed(7)
    masters = gpt.init_masters(config, torch.float64, CPU)
    assert list(masters) == names
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


@pytest.mark.parametrize("switches", [{}, OLDEST], ids=["record", "oldest"])
def test_every_master_is_in_one_group(switches):
    config = limited.Config(**SMALL | switches)
    names = list(gpt.init_masters(config, torch.float32, CPU))
    groups = limited.optimizer_groups(config, names)
    assert sorted(name for group in groups for name in group.names) == sorted(names)
    by_name = {name: group for group in groups for name in group.names}
    assert by_name["transformer.h.1.mlp.c_proj.weight"].row_norm == config.row_norm
    if switches:  # a table is updated as wte is
        table, wte = by_name["ve_tables.3.weight"], by_name["transformer.wte.weight"]
        assert replace(table, names=[]) == replace(wte, names=[]) and table.method == "adamw"
    with pytest.raises(AssertionError, match="exactly one group"):
        limited.optimizer_groups(config, [name for name in names if name != "x0_lambdas"])


def test_masters_have_their_dtypes():
    """Tables are stored in the compute dtype; gradients and moments are float32, and so are lambdas in the model."""
    train = limited.Training(limited.Config(**SMALL), ALONE, torch.bfloat16, KERNELS, compiled=False)
    narrow = [name for name, master in train.masters.items() if master.dtype == torch.bfloat16]
    assert narrow == ["transformer.wte.weight"]
    assert {grad.dtype for grad in train.shards.grads.values()} == {torch.float32}
    assert {s.dtype for bucket in train.shards.buckets for s in bucket.state.values()} == {torch.float32}
    wide = [name for name, p in train.model.named_parameters() if p.dtype == torch.float32]
    assert wide == ["resid_lambdas", "x0_lambdas", "skip_weights"]
    tables = gpt.init_masters(limited.Config(**SMALL, value_embedding="table"), torch.bfloat16, CPU)
    assert tables["ve_tables.1.weight"].dtype == torch.bfloat16 != tables["lm_head.weight"].dtype


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96), (4, 12)])
def test_polar_express_is_nearly_orthogonal(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True))
    singular = torch.linalg.svdvals(limited.polar_express(x))
    assert singular.min() > 0.5 and singular.max() < 1.3
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    alignment = ((u @ vh) * limited.polar_express(x)).sum(dim=(-2, -1)) / min(shape)
    assert (alignment > 0.8).all()


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
@pytest.mark.parametrize("row_norm", [False, True])
def test_muon_step_written_out(shape, row_norm):
    """Two steps on a stack equal two steps on each matrix by itself, in plain loops."""
    torch.manual_seed(0)
    rows, cols = shape
    p, grads = torch.randn(3, *shape).double(), torch.randn(2, 3, *shape).double()
    lr, decay, mu = 0.02, 0.3, 0.9
    rate = lr * math.sqrt(max(1, rows / cols))
    expected = p.clone()
    for matrix in range(3):
        m, s = torch.zeros(shape).double(), torch.zeros(rows if rows >= cols else cols).double()
        for grad in grads[:, matrix]:
            m = mu * m + (1 - mu) * grad
            u = (1 - mu) * grad + mu * m
            if row_norm:
                u = torch.stack([row / max(row.norm().item(), 1e-7) for row in u])
            x = limited.polar_express((u / (1.02 * u.norm() + 1e-6))[None])[0]
            s = 0.95 * s + 0.05 * (x**2).mean(1 if rows >= cols else 0)
            scaled = x * (s.clamp_min(1e-10) ** -0.5)[:, None] if rows >= cols else x * s.clamp_min(1e-10) ** -0.5
            x = scaled * x.norm() / scaled.norm()
            q = expected[matrix]
            expected[matrix] = q - rate * x - rate * decay * q * (x * q >= 0)
    momentum = torch.zeros_like(p)
    second = torch.zeros(3, rows, 1).double() if rows >= cols else torch.zeros(3, 1, cols).double()
    rates = [torch.tensor(value).double() for value in (lr, decay, mu)]
    for grad in grads:
        limited.muon_update(p, grad, momentum, second, *rates, torch.float64, row_norm)
    torch.testing.assert_close(p, expected)


def test_adamw_is_that_of_torch():
    """But for the order of the decay; on a bfloat16 table the update is made in float32 and rounded once."""
    torch.manual_seed(0)
    p, grads = torch.randn(50).double(), torch.randn(4, 50).double()
    theirs = p.clone().requires_grad_()
    adamw = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.3)
    narrow, moments = p.bfloat16(), torch.zeros(4, 50).double()
    for step, grad in enumerate(grads):
        theirs.grad = grad
        adamw.step()
        rates = [torch.tensor(value).double() for value in (0.1, 0.3)]
        limited.adamw_update(p, grad, *moments[:2], *rates, (0.8, 0.95), torch.tensor(step + 1.0).double())
    torch.testing.assert_close(p, theirs.detach())
    before = narrow.clone()
    rates = [torch.tensor(value) for value in (0.1, 0.0)]
    limited.adamw_update(narrow, torch.ones(50), *torch.zeros(2, 50), *rates, (0.8, 0.95), torch.tensor(1.0))
    assert torch.equal(narrow, (before.float() - 0.1).bfloat16())


def test_moving_average_of_the_weights():
    """Against the weights of each step: a copy after round(0.9 N) steps, 5% of every tenth after it; 0.3 of it."""
    N = 528
    config = limited.Config(**SMALL | {"readout": "ema", "num_epochs": 48, "swa_epochs": 0})
    taken = {step + 1: w for step in range(N) if (w := limited.ema_weight(config, step, N))}
    assert taken == {475: 1.0} | dict.fromkeys((485, 495, 505, 515, 525), 0.05)
    assert not any(limited.ema_weight(replace(config, readout="average"), step, N) for step in range(N))
    train = limited.Training(config, ALONE, torch.float32, KERNELS, compiled=False)
    master, after = train.masters["lm_head.weight"], {}
    for step in range(470, N):  # the updates do not matter here, only when the weights enter
        master.fill_(step)
        train.optimizer.step(step, scheduled(lr=0.0, ema_weight=limited.ema_weight(config, step, N)))
        after[step + 1] = master.clone()
    expected = after[475]
    for done in (485, 495, 505, 515, 525):
        expected = 0.95 * expected + 0.05 * after[done]
    lines: list[str] = []
    run = SimpleNamespace(config=config, step=N, plan=SimpleNamespace(num_steps=N), log=lines.append)
    blend = limited.blend_with_ema(run, train)
    torch.testing.assert_close(blend["lm_head.weight"], 0.7 * after[528] + 0.3 * expected)
    assert not lines
    run.step = 470  # stopped by the cap
    assert limited.blend_with_ema(run, train) is train.masters
    assert "the last weights are read out" in lines[0]


# -------------------------------------------------------------------------------------------------- earlier records


def test_parts_that_are_off_leave_no_parameters():
    names = " ".join(small_training(**OLDEST).masters)
    assert not any(part in names for part in ("skip_weights", "attn_gate", "_mix", "c_gate", "ve_projs", "mtp_"))
    assert "ve_tables.1.weight" in names and "ve_tables.3.weight" in names
    zero = gpt.init_masters(limited.Config(**SMALL | OLDEST), torch.float32, CPU)
    assert not any(p.any() for name, p in zero.items() if "c_proj" in name)


@torch.no_grad()
def test_squared_relu_and_value_tables():
    train = small_training(mlp="relu2", value_embedding="table")
    mlp, x, tokens = train.model.transformer.h[0].mlp, torch.randn(2, 5, 32).double(), random_tokens()
    assert mlp.c_fc.weight.shape == (128, 32)
    torch.testing.assert_close(mlp(x), F.linear(F.linear(x, mlp.c_fc.weight).clamp_min(0) ** 2, mlp.c_proj.weight))
    found = train.model.value_embeddings(tokens, torch.zeros(2, T, 32).double())
    assert torch.equal(found[3], train.masters["ve_tables.3.weight"][tokens]) and found.keys() == {1, 3}
    assert gpt.flops_per_token(train.config, False) < gpt.flops_per_token(replace(train.config, mlp="swiglu"), False)


@pytest.mark.parametrize("i", [0, 1])
@torch.no_grad()
def test_exclusive_attention_in_a_layer(i):
    """Written out, in a layer without a value embedding and in one with: what stays is at right angles to the value."""
    model = small_training(exclusive=True, head_mixes=False).model
    attn, x = model.transformer.h[i].attn, torch.randn(2, 8, 32).double()
    ve = torch.randn(2, 8, 32).double() if i else None
    rotary = model.cos[:8], model.sin[:8]
    q, k, v = (part.reshape(2, 8, 2, 16) for part in F.linear(x, attn.qkv.weight).chunk(3, dim=-1))
    if ve is not None:
        v = v + 2 * torch.sigmoid(F.linear(x, attn.ve_gate.weight))[..., None] * ve.view(2, 8, 2, 16)
    y = gpt.attend(*(gpt.norm(gpt.rotate(part, *rotary)) for part in (q, k)), v, 32)
    y = y - (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True) * v
    y = y * torch.sigmoid(F.linear(x[..., :12], attn.attn_gate.weight))[..., None]
    torch.testing.assert_close(attn(x, ve, *rotary), F.linear(y.flatten(2), attn.c_proj.weight))
    assert torch.equal(gpt.exclude_own_value(y, torch.zeros_like(v)), y)


def test_schedules_without_the_later_techniques():
    old, N = limited.Config(swa_epochs=0, warmdown_shape="linear", decay_schedule=False), 1000
    assert [limited.warmdown(old, step, N) for step in (0, 800, 900, 999)] == pytest.approx([1, 1, 0.5, 0.005])
    assert all(limited.lr_multiplier(old, step, N) == limited.warmdown(old, step, N) for step in range(N))
    assert {limited.weight_decay_multiplier(old, step, N) for step in range(N)} == {1.0}
    assert limited.warmdown(limited.Config(), 950, N) == pytest.approx(0.25**0.5)


@pytest.mark.parametrize("shuffle", ["none", "micro_steps"])
def test_fixed_orders(shuffle):
    """Sequences permuted once by the file's seed; micro-steps, from epoch 2 on, permuted cumulatively by the epoch."""
    config = limited.Config(**SMALL | {"shuffle": shuffle, "micro_batch": 1})
    tokens = np.random.RandomState(0).randint(0, V, 181 * 33 + 5).astype(np.uint16)
    split, sequences = Split(tokens, np.zeros(1, np.int64), 43, ""), tokens[: 181 * 33].reshape(181, 33)
    order = np.random.RandomState(43).permutation(181)[:176].reshape(22, 8)
    for epoch in range(1, 5):
        if shuffle == "micro_steps" and epoch > 1:
            order = order[torch.randperm(22, generator=torch.Generator().manual_seed(epoch)).numpy()]
        assert np.array_equal(limited.epoch_sequences(config, split, epoch), sequences[order.ravel()])
    batch = limited.make_loader(config, split, limited.make_plan(config, split), ALONE).batch(0)
    assert np.array_equal(batch[:, 0], sequences[np.random.RandomState(43).permutation(181)[:8]])


def test_memory_and_disk_of_earlier_settings():
    """At full size in bfloat16, on 8 processes: what tables and an average add, counted by hand."""
    sizes, tables, ema = (
        limited.count_sizes(limited.Config(**changes), torch.bfloat16)
        for changes in ({}, {"value_embedding": "table"}, {"readout": "ema"})
    )
    stage = limited.make_stage(limited.Config(), True)
    C, table, projections = 1792, 15 * 50304 * 1792, 15 * 1792**2
    more = table - projections
    assert tables.parameters - sizes.parameters == more and ema.parameters == sizes.parameters
    assert tables.moved_parameters == sizes.moved_parameters - projections
    moments = 2 * table - projections - 15 * C  # a table has two; a matrix one, and a number per row
    masters = 2 * table - 4 * projections
    expected = masters + 2 * more + 4 * (2 * more - projections) + 4 * moments / 8
    assert tables.static_bytes(8, stage) - sizes.static_bytes(8, stage) == pytest.approx(expected)
    assert ema.static_bytes(8, stage) - sizes.static_bytes(8, stage) == pytest.approx(4 * sizes.parameters / 8)
    assert ema.checkpoint_bytes - sizes.checkpoint_bytes == 4 * sizes.parameters
    assert (sizes.members, ema.members) == (3, 1)


@pytest.mark.parametrize("number", range(1, 22))
def test_records_have_toy_sizes(number):
    """--record N --demo is a config, and what the record goes without stays off."""
    script = ROOT / "train.py"
    arguments = ["--record", str(number), "--demo"]
    line = parse_flags("limited", limited.Config, limited.DEMO, arguments, script, "", limited.record_sizes)
    config = limited.Config(**line.values)
    (path,) = (ROOT / "records/limited").glob(f"{number:02}-*.json")
    settings = json.loads(path.read_text())["settings"]
    assert (config.n_layer, config.n_embd, config.num_epochs) == (4, 64, limited.DEMO["num_epochs"])
    for name in settings.keys() - limited.DEMO.keys():
        assert getattr(config, name) == settings[name], name
    for name in ("swa_epochs", "replay_from_epoch", "stochastic_depth"):
        of_record = settings.get(name, getattr(limited.Config, name))
        assert bool(getattr(config, name)) == bool(of_record), name


# --------------------------------------------------------------------------------------------- warm-up, compilation


@pytest.mark.parametrize("switches", [{}, {"meta_gradient": False, "mtp_weight": 0.0, "micro_batch": 4}])
def test_nothing_compiles_after_the_warm_up(switches, monkeypatch):
    """Every graph of training and validation, in both stages, with every layer dropped or not, is made in warm_up."""
    from torch._dynamo.utils import counters

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    torch._dynamo.reset()
    changes = {"dropout": 0.1, "stochastic_depth": 0.3, "replay_from_epoch": 3, "num_epochs": 4}
    train = small_training(torch.float32, compiled=True, **changes | switches)
    plan = limited.make_plan(train.config, unread_split(33 * 16 * 6))
    train.model.train()
    train.warm_up([limited.schedule(train.config, step, plan) for step in plan.stages])
    made = counters["stats"]["unique_graphs"]
    assert made > 10 and len(plan.stages) == 2
    for start in plan.stages:
        for step in range(start, start + 3):
            values = limited.schedule(train.config, step, plan)
            train.step(step, torch.randint(V, (8, train.config.micro_steps * train.config.micro_batch, 33)), values)
        batch = torch.randint(V, (3, 33))
        train.scorer(train.masters, values.replay)(batch[:, :-1], batch[:, 1:])
    assert counters["stats"]["unique_graphs"] == made


def test_the_warm_up_leaves_no_trace():
    changes = {"dropout": 0.1, "stochastic_depth": 0.3, "readout": "ema"}
    warm, cold = (small_training(torch.float32, **changes) for _ in range(2))
    state = torch.get_rng_state()
    warm.warm_up([scheduled(), scheduled(replay=True)])
    assert torch.equal(torch.get_rng_state(), state)
    before = cold.shards.state_dict()
    for name, parts in warm.shards.state_dict().items():
        for key, part in parts.items():
            assert torch.equal(part, before[name][key]), (name, key)
    assert not any(grad.any() for grad in warm.shards.grads.values())
    assert not any(total.any() for total in warm.weights.sums.values())
    batch = torch.randint(V, (8, 4, 33))
    for train in (warm, cold):
        train.model.train()
    losses = [train.step(0, batch, scheduled(replay=True)) for train in (warm, cold)]
    assert losses[0] == losses[1]
    assert all(torch.equal(warm.masters[name], cold.masters[name]) for name in cold.masters)
