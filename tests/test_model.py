"""The model: causality, windows, compute weights, dropout, stochastic depth, recurrence, compilation, counts."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import ALL_TRACKS, FOUR_LAYERS, MICRO_STEPS, NOISE, SMALL, STAGES, V, flags, sized

import model as root
import tiny.train as tiny
import two_hour.train as two_hour
import unlimited.train as unlimited

BOTH = pytest.mark.parametrize("late", [False, True])  # before and after the switch of STAGES
T = 32


def small_config(track, **changes):
    return track.Config(**SMALL[track.TRACK] | FOUR_LAYERS[track.TRACK] | changes)


def far_from_start(model) -> None:
    """Away from the zeros and identities of the initial weights."""
    torch.manual_seed(0)
    model.init_weights()
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
        p.grad = torch.zeros_like(p)


@pytest.fixture
def small_model(track):
    model = track.GPT(small_config(track)).double()
    far_from_start(model)
    return model.eval()


def random_tokens(batch: int = 2) -> torch.Tensor:
    return torch.randint(V, (batch, T), generator=torch.Generator().manual_seed(1))


@BOTH
@ALL_TRACKS
def test_no_position_sees_the_future_or_another_sequence(track, small_model, late):
    tokens, position, how = random_tokens(), 17, STAGES[track.TRACK][late]
    changed = tokens.clone()
    changed[0, position:] = (changed[0, position:] + 1) % V
    before, after = (small_model.log_probs(t, **how) for t in (tokens, changed))
    assert torch.equal(before[0, :position], after[0, :position])
    assert torch.equal(before[1], after[1])
    assert not torch.allclose(before[0, position], after[0, position])


@BOTH
@ALL_TRACKS
def test_a_prefix_is_predicted_as_in_the_whole(track, small_model, late):
    """Shorter inputs than the sequences of training mean the same model, whichever layers see all of them."""
    tokens, how = random_tokens(), STAGES[track.TRACK][late]
    whole = small_model.log_probs(tokens, **how)
    for length in (1, 5, T // 2, T // 2 + 1):
        torch.testing.assert_close(small_model.log_probs(tokens[:, :length], **how), whole[:, :length])


@BOTH
@ALL_TRACKS
def test_log_probs_token_losses_and_training_loss_agree(track, small_model, late):
    tokens, how = random_tokens(), STAGES[track.TRACK][late]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    log_probs = small_model.log_probs(inputs, **how)
    assert log_probs.shape == (2, T - 1, V)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, T - 1).double())
    losses = small_model.token_losses(inputs, targets, **how)
    torch.testing.assert_close(losses, -log_probs.gather(-1, targets[..., None])[..., 0])
    _, first = small_model.training_loss(inputs, targets, **how)
    torch.testing.assert_close(first.detach(), losses.mean())


@pytest.mark.parametrize("window", [1, 4, 11, 16])
def test_attention_window(model, window):
    """Position t sees t - window ... t, against attention written out; the scale is 1 / sqrt(D) or as given."""
    q, k, v = torch.randn(3, 2, 12, 2, 8, dtype=torch.float64)
    scale = (0.5,) if model is two_hour else ()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale or (8**-0.5,))[0]
    position = torch.arange(12)
    distance = position[:, None] - position[None]
    scores = scores.masked_fill((distance < 0) | (distance > window), -torch.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    torch.testing.assert_close(model.attend(q, k, v, window, *scale, "sdpa"), expected)


@ALL_TRACKS
def test_attention_error_finds_a_wrong_backend(track, model, monkeypatch):
    """By this the warm-up checks a GPU's attention: small for the right one, large for a window that is off by one."""
    batches = {"outer_batch_tokens": 1024} if track is unlimited else {}
    config = small_config(track, **sized(track, 64), batch_tokens=1024, **batches)
    assert model.attention_error(config, torch.device("cpu"), "sdpa") < 0.02
    attend_right = model.attend

    def attend_wrong(q, k, v, window, *settings):
        return attend_right(q, k, v, window - (settings[-1] == "wrong"), *settings[:-1], "sdpa")

    monkeypatch.setattr(model, "attend", attend_wrong)
    assert model.attention_error(config, torch.device("cpu"), "wrong") > 0.1


@ALL_TRACKS
def test_windows_of_the_record(track):
    config = track.Config()
    last, windows = config.n_layer - 1, ((1024, 2048),) if track is two_hour else ()
    found = [config.window(i, *windows) for i in range(config.n_layer)]
    assert found[:4] == [1024, 1024, 1024, 2048] and found[last - 1 :] == [1024, 2048]
    assert [i for i in range(last) if found[i] == 2048] == list(range(3, last, 4))
    assert config.padded_vocab == 50304 and config.hidden == {"tiny": 2816, "unlimited": 5632}.get(track.TRACK, 4864)


def test_layer_order_of_the_record():
    config = root.GPTConfig()
    assert config.layer_order(False) == list(range(30))
    replayed = [15, 16, 17, 18, 19, 20]
    assert config.layer_order(True) == [*range(15), *replayed, *replayed, *replayed, *range(21, 30)]


@ALL_TRACKS
def test_compute_weights_equal_autograd(track, small_model):
    """Sums of several backward passes, pulled back once, are the gradients of the differentiable path."""
    tokens, late = random_tokens(4), STAGES[track.TRACK][1]
    weights = track.ComputeWeights(small_model, torch.float64)
    weights.refresh()
    expected = {name: torch.zeros_like(p) for name, p in small_model.named_parameters()}
    for rows in tokens.split(2):
        small_model.zero_grad()
        small_model.training_loss(rows[:, :-1], rows[:, 1:], **late)[0].backward()
        for name, p in small_model.named_parameters():
            expected[name] += p.grad
    for p in small_model.parameters():
        p.grad = torch.zeros_like(p)
    for rows in tokens.split(2):
        small_model.training_loss(rows[:, :-1], rows[:, 1:], weights.tensors, **late)[0].backward()
    weights.pull_back()
    for name, p in small_model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)
    weights.pull_back()  # the sums were cleared
    for name, p in small_model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


@ALL_TRACKS
def test_bfloat16_gradients_are_summed_in_float32(track):
    model = track.GPT(small_config(track))
    far_from_start(model)
    tokens = random_tokens()

    def summed(passes: int) -> torch.Tensor:
        weights = track.ComputeWeights(model, torch.bfloat16)
        weights.refresh()
        for _ in range(passes):
            model.training_loss(tokens[:, :-1], tokens[:, 1:], weights.tensors)[0].backward()
        for unit, name in (("h.0", "qkv"), ("io", "lm_head")):
            assert weights.tensors[unit][name].dtype == torch.bfloat16
        for name in ("resid_lambdas", "x0_lambdas", "skip_weights", "xsa_alphas"):
            assert weights.tensors["io"].get(name, model.x0_lambdas).dtype == torch.float32
        return weights.sums[weights.tensors["h.0"]["qkv"]]

    single = summed(1)
    assert single.dtype == torch.float32 and single.any()
    assert torch.equal(summed(3), single + single + single)


def test_dropout(model):
    x = torch.ones(400, 500, requires_grad=True)
    torch.manual_seed(0)
    y = model.dropout(x, 0.2)
    y.sum().backward()
    kept = y != 0
    assert abs(kept.float().mean().item() - 0.8) < 0.005
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.8))
    assert torch.equal(x.grad, y.detach())
    assert model.dropout(x, 0.0) is x
    torch.manual_seed(0)
    assert torch.equal(torch.compile(model.dropout, backend="eager", fullgraph=True)(x, 0.2), y)


def test_each_script_has_a_dropout_operator_of_its_own():
    """Registered under one name, the second script's would pull the first's from under it."""
    names = [module._DROPOUT for module in (root, tiny, two_hour, unlimited)]
    assert names == [
        f"slowrun_{script}::dropout" for script in ("model", "tiny_train", "two_hour_train", "unlimited_train")
    ]


@ALL_TRACKS
def test_dropout_is_off_in_validation(track, small_model):
    noisy = track.GPT(small_config(track, dropout=0.5)).double()
    noisy.load_state_dict(small_model.state_dict())
    tokens = random_tokens()
    losses = noisy.eval().token_losses(tokens[:, :-1], tokens[:, 1:])
    assert torch.equal(losses, small_model.token_losses(tokens[:, :-1], tokens[:, 1:]))
    assert not torch.equal(losses, noisy.train().token_losses(tokens[:, :-1], tokens[:, 1:]))


LIMITED = root.GPTConfig(**{k: v for k, v in SMALL["limited"].items() if k in root.GPTConfig.__dataclass_fields__})
LIMITED = dataclasses.replace(LIMITED, **FOUR_LAYERS["limited"])


def test_stochastic_depth_draws():
    config = dataclasses.replace(LIMITED, stochastic_depth=0.3)
    draws = [root.draw_dropped(config, True, 42, step, 0) for step in range(4000)]
    assert draws[7] == root.draw_dropped(config, True, 42, 7, 0) != root.draw_dropped(config, True, 42, 8, 0)
    layers = [*config.layer_order(True), config.n_layer]
    for call, layer in enumerate(layers):
        share = sum(draw[call] for draw in draws) / len(draws)
        assert abs(share - 0.3 * layer / (config.n_layer - 1)) < 0.03, (call, layer)
    assert root.draw_dropped(LIMITED, True, 42, 0, 0) is None


def test_a_dropped_layer_passes_on_its_mixture():
    """Dropping all layers leaves the lambdas' and skips' mixtures of the normed embedding, and the head."""
    model = root.GPT(LIMITED).double()
    far_from_start(model)
    tokens, w = random_tokens(), model.weights()
    x = x0 = root.norm(w["io"]["wte"][tokens])
    encoded = []
    for i in range(4):
        if i >= 2:
            x = x + model.skip_weights[i - 2] * encoded[3 - i]
        x = model.resid_lambdas[i] * x + model.x0_lambdas[i] * x0
        encoded.append(x)
    found = model.trunk(w, tokens, False, [True] * 5)
    torch.testing.assert_close(found, root.norm(x))


def test_half_truncated_rotary():
    """The first quarter of a head's dimensions rotates with the third, by angles of a rotary of half the width."""
    cos, sin = tiny.rotary_tables(50, 16, True, torch.device("cpu"), torch.float64)
    x = torch.randn(1, 50, 1, 16, dtype=torch.float64)
    y = tiny.rotate(x, (cos, sin))
    assert torch.equal(y[..., 4:8], x[..., 4:8]) and torch.equal(y[..., 12:], x[..., 12:])
    for t in (0, 1, 49):
        for i in range(4):
            angle = t * 10000 ** (-2 * i / 8)
            a, b = x[0, t, 0, i].item(), x[0, t, 0, 8 + i].item()
            a_found, b_found = y[0, t, 0, i].item(), y[0, t, 0, 8 + i].item()
            assert a_found == pytest.approx(a * math.cos(angle) + b * math.sin(angle), abs=1e-12)
            assert b_found == pytest.approx(b * math.cos(angle) - a * math.sin(angle), abs=1e-12)


def test_tables_and_scale_of_the_record():
    """YaRN by hand: what turns 32 times or more in the window before stays, what turns once or less is slowed down."""
    config, D = two_hour.Config(), 128
    base = 10000.0 ** (-np.arange(0, D, 2) / D)
    (first, scale_1), (second, scale_2), (third, scale_3) = (config.yarn(long) for long in (768, 1792, 2048))
    assert np.array_equal(first, base) and scale_1 == pytest.approx(D**-0.5)
    turns = 768 * base / (2 * np.pi)
    assert np.array_equal(second[turns >= 32], base[turns >= 32]) and (turns >= 32).sum() > 5
    np.testing.assert_allclose(second[turns <= 1], base[turns <= 1] * 768 / 1792, rtol=1e-14)
    between = (turns > 1) & (turns < 32)
    assert between.sum() > 10 and ((second < base) & (second > base * 768 / 1792))[between].all()
    assert (third <= second).all() and third[-1] == pytest.approx(base[-1] * 768 / 2048)
    assert scale_2 == pytest.approx(scale_1 * (1 + 0.2 * math.log(1792 / 768)))
    assert scale_3 == pytest.approx(scale_2 * (1 + 0.2 * math.log(2048 / 1792)))
    assert two_hour.yarn(D, (768, 768, 1792))[1] == scale_2  # a stage with the same long window changes nothing


def test_a_stage_sees_its_windows():
    """In the first stage a token reaches L layers of window 4 far and one of 12; the last stage's reaches further."""
    model = two_hour.GPT(small_config(two_hour, window_pattern="S")).double()
    far_from_start(model)
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    for windows, reach in (((4, 12), 3 * 4 + 12), ((12, 28), T)):
        before, after = (model.eval().log_probs(t, windows=windows) for t in (tokens, changed))
        assert torch.equal(before[:, reach + 1 :], after[:, reach + 1 :])
        differs = (before != after).flatten(2).any(-1)
        assert differs[:, : reach + 1].all()
    torch.testing.assert_close(model.log_probs(tokens), model.log_probs(tokens, windows=(20, 32)))  # the last's


def test_keys_are_offset_in_half_of_their_dimensions():
    k = torch.randn(2, 5, 3, 8)
    found = tiny.offset_keys(k)
    assert torch.equal(found[..., :4], k[..., :4]) and torch.equal(found[:, 0], k[:, 0])
    for t in range(1, 5):
        assert torch.equal(found[:, t, :, 4:], k[:, t - 1, :, 4:])


def test_exclusive_attention():
    """Strength 0 changes nothing, 1 leaves nothing along the own value; values of zero are no trouble."""
    y, v = torch.randn(2, 2, 5, 3, 8, dtype=torch.float64)
    assert torch.equal(tiny.exclude_own_value(y, v, torch.zeros(3, 1)), y)
    left = tiny.exclude_own_value(y, v, torch.tensor([1.0, 0.0, 1.0])[:, None])
    assert torch.equal(root.exclude_own_value(y, v, 1.0)[..., [0, 2], :], left[..., [0, 2], :])
    assert (left * v).sum(-1)[..., [0, 2]].abs().max() < 1e-12
    assert torch.equal(left[..., 1, :], y[..., 1, :])
    assert torch.equal(tiny.exclude_own_value(y, torch.zeros_like(v), torch.ones(3, 1)), y)
    assert tiny.exclude_own_value(y.bfloat16(), v.bfloat16(), torch.ones(3, 1)).dtype == torch.bfloat16


def test_only_the_last_pass_is_differentiated():
    """Two passes equal one that starts from the first's result as if it were given, with dropout in both."""
    model = tiny.GPT(small_config(tiny, dropout=0.3)).double()
    far_from_start(model)
    w, tokens = model.weights(), random_tokens()
    x0 = tiny.norm(torch.nn.functional.embedding(tokens, w["io"]["wte"]))
    ve = {i: torch.nn.functional.linear(x0, w["io"][f"ve_proj.{i}"]) for i in (1, 3)}
    torch.manual_seed(3)
    first = model.stack(w, x0, x0, ve, model.rotary(T)).detach()
    expected = model.stack(w, first, x0, ve, model.rotary(T))
    torch.manual_seed(3)
    found = model.trunk(w, tokens, 2)
    assert torch.equal(found, expected)
    direction = torch.randn_like(found)
    for name, p in model.named_parameters():
        if not name.startswith("lm_head"):
            ours, theirs = (
                torch.autograd.grad((x * direction).sum(), p, retain_graph=True)[0] for x in (found, expected)
            )
            assert torch.equal(ours, theirs), name
    torch.manual_seed(4)  # the first pass draws numbers too
    assert not torch.allclose(model.stack(w, x0, x0, ve, model.rotary(T)), first)


def test_counts_of_the_record(track):
    """Parameters, matrices by optimizer, and operations: on limited 497 TFLOP of matrix products for 65,536 tokens."""
    config = track.Config()
    with torch.device("meta"):
        parameters = dict(track.GPT(config).named_parameters())
    groups = track.optimizer_groups(config, list(parameters))
    matrices = [name for group in groups if group["kind"] == "muon" for name in group["params"]]
    moved = [name for group in groups if group["moved"] for name in group["params"]]
    full = {"windows": (1024, 2048)} if track is two_hour else {}
    before, after = (track.flops_per_token(config, **how | full) for how in STAGES[track.TRACK])
    if track is not tiny:
        assert (len(matrices), len(moved)) == (279, 279)
        assert sum(p.numel() for p in parameters.values()) == 1_443_722_775
        heads, attention = 6 * 2 * 50304 * 1792, 12 * 1792 * (22 * (1024 - 1024**2 / 4096) + 9 * 1024)
        assert (before - heads - attention) * 65536 == pytest.approx(497e12, rel=2e-3)
        assert after > 1.3 * before
    else:
        assert (len(matrices), len(moved)) == (48 + 4 * 16 + 8 + 8, 48)
        assert sum(p.numel() for p in parameters.values()) == pytest.approx(300e6, rel=0.1)
        stack = 16 * (4 * 1024**2 + 3 * 1024 * 2816)
        attention = 4 * 1024 * (12 * (1024 - 1024**2 / 4096) + 4 * 1024)
        assert before == 3 * (2 * stack + attention) + 6 * (8 * 1024**2 + 50304 * 1024)
        assert after - before == 2 * stack + attention  # a pass more, forward only
    total, static, needed = track.memory_gib(config, 8, torch.bfloat16)
    assert total == sum(p.numel() for p in parameters.values()) and static < needed < 80


@ALL_TRACKS
def test_initialisation(track):
    torch.manual_seed(0)
    model, C = track.GPT(small_config(track, n_embd=256, n_head=4)), 256
    for p in model.parameters():
        p.data.fill_(torch.nan)
    model.init_weights()
    parameters = dict(model.named_parameters())
    assert all(p.isfinite().all() for p in parameters.values())
    deviations = {"transformer.wte.weight": 1.0, "lm_head.weight": 0.001, "transformer.h.0.attn.c_q.weight": C**-0.5}
    deviations |= {"ve_projs.1.weight": C**-0.5, "transformer.h.3.mlp.c_gate.weight": C**-0.5}
    constants = {
        "resid_lambdas": 1.0,
        "skip_weights": 1.0,
        "x0_lambdas": 0.1,
        "transformer.h.1.attn.ve_gate.weight": 0.0,
    }
    constants |= {"transformer.h.2.attn.attn_gate.weight": 0.0}
    projections = ("transformer.h.0.attn.c_proj.weight", "transformer.h.1.mlp.c_proj.weight")
    if track is not tiny:
        deviations |= dict.fromkeys([*projections, "mtp_proj.weight", "mtp_block.mlp.c_gate.weight"], C**-0.5)
        constants["mtp_block.attn.attn_gate.weight"] = 0.0
        assert torch.equal(parameters["transformer.h.2.attn.v_mix"], torch.eye(4))
    else:
        constants |= {"resid_lambdas": 1.1, "xsa_alphas": 0.0} | dict.fromkeys(projections, 0.0)
    for name, deviation in deviations.items():
        assert parameters[name].std().item() == pytest.approx(deviation, rel=0.03), name
    for name, value in constants.items():
        assert parameters[name].unique().tolist() == [pytest.approx(value)], name
    assert parameters["transformer.h.0.attn.c_q.weight"].abs().max() <= (3 / C) ** 0.5


@pytest.mark.parametrize(
    "track, meta_gradient",
    [("limited", True), ("limited", False), ("tiny", True), ("two_hour", False)],
    indirect=["track"],
)
def test_nothing_compiles_after_the_warm_up(track, small, monkeypatch, meta_gradient):
    """Every graph of training and validation, in every stage, with every layer dropped or not, is made in warm_up."""
    from torch._dynamo.utils import counters

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    torch._dynamo.reset()
    values = {"compile": "on", "meta_gradient": meta_gradient} | NOISE[track.TRACK] | FOUR_LAYERS[track.TRACK]
    values |= MICRO_STEPS[track.TRACK] | {"num_epochs": 4}
    trainer, _ = track.set_up(flags(**small | values))
    trainer.warm_up()
    made = counters["stats"]["unique_graphs"]
    assert made > 10
    for step in trainer.stages:
        trainer.train_step(step)()
        trainer.step = step + 1
        trainer.validate("test")
    assert len(trainer.stages) == 2 + (track is two_hour)
    assert counters["stats"]["unique_graphs"] == made
