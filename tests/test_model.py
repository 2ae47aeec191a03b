"""The model: causality, windows, compute weights, dropout, stochastic depth, compilation, counts."""

import dataclasses

import pytest
import torch
from conftest import SMALL, flags

import model as model_module
from model import GPT, ComputeWeights, GPTConfig, attend, draw_dropped, dropout, flops_per_token

FIELDS = {field.name for field in dataclasses.fields(GPTConfig)}
SIZES = {name: value for name, value in SMALL.items() if name in FIELDS}
CONFIG = GPTConfig(**SIZES | {"n_layer": 4, "replay_start": 2, "replay_end": 3})


@pytest.fixture
def small_model() -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG).double()
    model.init_weights()
    for p in model.parameters():  # away from the zeros and identities of the start
        p.data.add_(0.2 * torch.randn_like(p))
    return model.eval()


def random_tokens(batch: int = 2) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, CONFIG.sequence_len), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("replay", [False, True])
def test_no_position_sees_the_future_or_another_sequence(small_model, replay):
    tokens, position = random_tokens(), 17
    changed = tokens.clone()
    changed[0, position:] = (changed[0, position:] + 1) % CONFIG.vocab_size
    before, after = (small_model.log_probs(t, replay=replay) for t in (tokens, changed))
    assert torch.equal(before[0, :position], after[0, :position])
    assert torch.equal(before[1], after[1])
    assert not torch.allclose(before[0, position], after[0, position])


def test_log_probs_and_token_losses_agree(small_model):
    tokens = random_tokens()
    log_probs = small_model.log_probs(tokens[:, :-1], replay=True)
    assert log_probs.shape == (2, CONFIG.sequence_len - 1, CONFIG.vocab_size)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, CONFIG.sequence_len - 1).double())
    losses = small_model.token_losses(tokens[:, :-1], tokens[:, 1:], replay=True)
    torch.testing.assert_close(losses, -log_probs.gather(-1, tokens[:, 1:, None])[..., 0])


@pytest.mark.parametrize("window", [1, 4, 11, 16])
def test_attention_window(window):
    """Position t sees t - window ... t, against attention written out."""
    q, k, v = torch.randn(3, 2, 12, 2, 8, dtype=torch.float64)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    position = torch.arange(12)
    distance = position[:, None] - position[None]
    scores = scores.masked_fill((distance < 0) | (distance > window), -torch.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    torch.testing.assert_close(attend(q, k, v, window, "sdpa"), expected)


def test_attention_error_finds_a_wrong_backend(monkeypatch):
    """By this the warm-up checks a GPU's attention: small for the right one, large for a window that is off by one."""
    config = dataclasses.replace(CONFIG, sequence_len=64)
    assert model_module.attention_error(config, torch.device("cpu"), "sdpa") < 0.02
    attend_right = model_module.attend

    def attend_wrong(q, k, v, window, backend):
        return attend_right(q, k, v, window - (backend == "wrong"), "sdpa")

    monkeypatch.setattr(model_module, "attend", attend_wrong)
    assert model_module.attention_error(config, torch.device("cpu"), "wrong") > 0.1


def test_windows_and_layer_order_of_the_record():
    config = GPTConfig()
    assert [config.window(i) for i in (0, 1, 2, 3, 28, 29)] == [1024, 1024, 1024, 2048, 1024, 2048]
    assert config.layer_order(False) == list(range(30))
    replayed = [15, 16, 17, 18, 19, 20]
    assert config.layer_order(True) == [*range(15), *replayed, *replayed, *replayed, *range(21, 30)]
    assert config.padded_vocab == 50304 and config.hidden == 4864


def test_compute_weights_equal_autograd(small_model):
    """Sums of several backward passes, pulled back once, are the gradients of the differentiable path."""
    tokens = random_tokens(4)
    weights = ComputeWeights(small_model, torch.float64)
    weights.refresh()
    expected = {name: torch.zeros_like(p) for name, p in small_model.named_parameters()}
    for rows in tokens.split(2):
        small_model.zero_grad()
        small_model.training_loss(rows[:, :-1], rows[:, 1:], replay=True)[0].backward()
        for name, p in small_model.named_parameters():
            expected[name] += p.grad
    for p in small_model.parameters():
        p.grad = torch.zeros_like(p)
    for rows in tokens.split(2):
        small_model.training_loss(rows[:, :-1], rows[:, 1:], weights.tensors, replay=True)[0].backward()
    weights.pull_back()
    for name, p in small_model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)
    weights.pull_back()  # the sums were cleared
    for name, p in small_model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


def test_bfloat16_gradients_are_summed_in_float32():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    model.init_weights()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    weights = ComputeWeights(model, torch.bfloat16)
    weights.refresh()
    tokens, leaf = random_tokens(), weights.tensors["h.0"]["qkv"]
    assert leaf.dtype == torch.bfloat16 and weights.tensors["io"]["x0_lambdas"].dtype == torch.float32
    for _ in range(3):
        model.training_loss(tokens[:, :-1], tokens[:, 1:], weights.tensors)[0].backward()
    once = ComputeWeights(model, torch.bfloat16)
    once.refresh()
    model.training_loss(tokens[:, :-1], tokens[:, 1:], once.tensors)[0].backward()
    single = once.sums[once.tensors["h.0"]["qkv"]]
    assert single.dtype == torch.float32
    assert torch.equal(weights.sums[leaf], single + single + single)


def test_dropout():
    x = torch.ones(400, 500, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x, 0.2)
    y.sum().backward()
    kept = y != 0
    assert abs(kept.float().mean().item() - 0.8) < 0.005
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.8))
    assert torch.equal(x.grad, y.detach())
    assert dropout(x, 0.0) is x
    torch.manual_seed(0)
    assert torch.equal(torch.compile(dropout, backend="eager", fullgraph=True)(x, 0.2), y)


def test_dropout_is_off_in_validation(small_model):
    noisy = GPT(dataclasses.replace(CONFIG, dropout=0.5)).double()
    noisy.load_state_dict(small_model.state_dict())
    tokens = random_tokens()
    losses = noisy.eval().token_losses(tokens[:, :-1], tokens[:, 1:])
    assert torch.equal(losses, small_model.token_losses(tokens[:, :-1], tokens[:, 1:]))
    assert not torch.equal(losses, noisy.train().token_losses(tokens[:, :-1], tokens[:, 1:]))


def test_stochastic_depth_draws():
    config = dataclasses.replace(CONFIG, stochastic_depth=0.3)
    draws = [draw_dropped(config, True, 42, step, 0) for step in range(4000)]
    assert draws[7] == draw_dropped(config, True, 42, 7, 0) != draw_dropped(config, True, 42, 8, 0)
    layers = [*config.layer_order(True), config.n_layer]
    for call, layer in enumerate(layers):
        share = sum(draw[call] for draw in draws) / len(draws)
        assert abs(share - 0.3 * layer / (config.n_layer - 1)) < 0.03, (call, layer)
    assert draw_dropped(CONFIG, True, 42, 0, 0) is None


def test_a_dropped_layer_passes_on_its_mixture(small_model):
    """Dropping all layers leaves the lambdas' and skips' mixtures of the normed embedding, and the head."""
    tokens, w = random_tokens(), small_model.weights()
    x = x0 = model_module.norm(w["io"]["wte"][tokens])
    encoded = []
    for i in range(CONFIG.n_layer):
        if i >= CONFIG.n_layer // 2:
            x = x + small_model.skip_weights[i - CONFIG.n_layer // 2] * encoded[CONFIG.n_layer - 1 - i]
        x = small_model.resid_lambdas[i] * x + small_model.x0_lambdas[i] * x0
        encoded.append(x)
    found = small_model.trunk(w, tokens, False, [True] * (CONFIG.n_layer + 1))
    torch.testing.assert_close(found, model_module.norm(x))


def test_counts_of_the_record():
    config = GPTConfig()
    with torch.device("meta"):
        parameters = dict(GPT(config).named_parameters())
    matrices = [name for name in parameters if "_mix" not in name and "lambdas" not in name and "skip" not in name]
    assert len(matrices) - 2 == 279  # those of Muon: all but the two tables
    assert sum(p.numel() for p in parameters.values()) == 1_443_722_775
    # the specification's count: 497 TFLOP of matrix products and two heads of 50,304 x 1,792 for 65,536 tokens
    heads = 6 * 2 * 50304 * 1792
    attention = 12 * 1792 * (22 * (1024 - 1024**2 / 4096) + 9 * 1024)
    assert (flops_per_token(config, False) - heads - attention) * 65536 == pytest.approx(497e12, rel=2e-3)
    assert flops_per_token(config, True) > 1.3 * flops_per_token(config, False)
    total, static, needed = memory_gib(config, 8, 4, torch.bfloat16, True, True)
    assert total == sum(p.numel() for p in parameters.values()) and static < needed < 80


def test_initialisation():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(CONFIG, n_embd=256, n_head=4))
    for p in model.parameters():
        p.data.fill_(torch.nan)
    model.init_weights()
    parameters, C = dict(model.named_parameters()), 256
    assert all(p.isfinite().all() for p in parameters.values())
    deviations = {"transformer.wte.weight": 1.0, "lm_head.weight": 0.001, "transformer.h.0.attn.c_proj.weight": C**-0.5}
    deviations |= {"transformer.h.1.mlp.c_proj.weight": C**-0.5, "transformer.h.0.attn.c_q.weight": C**-0.5}
    deviations |= {"mtp_proj.weight": C**-0.5, "ve_projs.1.weight": C**-0.5, "mtp_block.mlp.c_gate.weight": C**-0.5}
    for name, deviation in deviations.items():
        assert parameters[name].std().item() == pytest.approx(deviation, rel=0.03), name
    assert parameters["transformer.h.0.attn.c_q.weight"].abs().max() <= (3 / C) ** 0.5
    assert torch.equal(parameters["transformer.h.2.attn.v_mix"], torch.eye(4))
    for name in ("transformer.h.1.attn.ve_gate.weight", "mtp_block.attn.attn_gate.weight"):
        assert not parameters[name].any()
    assert set(parameters["resid_lambdas"].tolist()) == set(parameters["skip_weights"].tolist()) == {1.0}
    assert parameters["x0_lambdas"].unique().item() == pytest.approx(0.1)


@pytest.mark.parametrize("meta_gradient", [True, False])
def test_nothing_compiles_after_the_warm_up(track, small, monkeypatch, meta_gradient):
    """Every graph of training and validation, in every stage, with every layer dropped or not, is made in warm_up."""
    from torch._dynamo.utils import counters

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    torch._dynamo.reset()
    values = {"compile": "on", "dropout": 0.1, "stochastic_depth": 0.3, "meta_gradient": meta_gradient}
    values |= {"n_layer": 4, "replay_start": 2, "replay_end": 3}
    trainer, _ = track.set_up(flags(**small | values))
    trainer.warm_up()
    made = counters["stats"]["unique_graphs"]
    assert made > 10
    for step in (0, trainer.plan.num_steps - 1):
        trainer.train_step(step)()
    trainer.validate("test")
    assert counters["stats"]["unique_graphs"] == made
