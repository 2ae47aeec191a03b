"""The optimizer: groups, orthogonalisation, a step against loops written out, state by parameter, the warm-up."""

import math

import pytest
import torch
from conftest import ALL_TRACKS, NOISE, flags

import train


def make_optimizer(track, small) -> tuple:
    trainer, _ = track.set_up(flags(**small))
    return trainer.model, trainer.optimizer


def test_each_parameter_is_in_one_group(track, small):
    model, optimizer = make_optimizer(track, small)
    names = [name for name, _ in model.named_parameters()]
    in_buckets = [name for bucket in optimizer.buckets for name in bucket.params]
    assert sorted(in_buckets) == sorted(names)
    groups = track.optimizer_groups(model.config, names)
    right = groups[-1]["params"]
    for wrong in (right[:-1], [*right, "lm_head.weight"]):
        groups[-1]["params"] = wrong
        with pytest.raises(AssertionError, match="one group"):
            track.MuonAdamW(model, groups, optimizer.world, torch.float32)


def test_parameters_are_views_of_their_buckets(track, small):
    model, optimizer = make_optimizer(track, small)
    for bucket in optimizer.buckets:
        bucket.values.add_(1.0)
        bucket.grads.fill_(2.0)
    for name, p in model.named_parameters():
        assert (p.grad == 2).all(), name
    assert model.skip_weights.tolist() == [2.0] * len(model.skip_weights)


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96), (4, 12)])
def test_polar_express_is_nearly_orthogonal(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True))
    singular = torch.linalg.svdvals(train.polar_express(x))
    assert singular.min() > 0.5 and singular.max() < 1.3
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    alignment = ((u @ vh) * train.polar_express(x)).sum(dim=(-2, -1)) / min(shape)
    assert (alignment > 0.8).all()


@ALL_TRACKS
@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
@pytest.mark.parametrize("row_norm", [False, True])
def test_muon_step_written_out(track, shape, row_norm):
    """Two steps on a stack equal two steps on each matrix by itself, in plain loops."""
    torch.manual_seed(0)
    rows, cols = shape
    p, grads = torch.randn(3, *shape).double(), torch.randn(2, 3, *shape).double()
    lr, decay, mu = 0.02, 0.3, 0.9
    expected = p.clone()
    for matrix in range(3):
        m, s = torch.zeros(shape).double(), torch.zeros(rows if rows >= cols else cols).double()
        for grad in grads[:, matrix]:
            m = mu * m + (1 - mu) * grad
            u = (1 - mu) * grad + mu * m
            if row_norm:
                u = torch.stack([row / max(row.norm().item(), 1e-7) for row in u])
            x = train.polar_express((u / (1.02 * u.norm() + 1e-6))[None])[0]
            s = 0.95 * s + 0.05 * (x**2).mean(1 if rows >= cols else 0)
            scaled = x * (s.clamp_min(1e-10) ** -0.5)[:, None] if rows >= cols else x * s.clamp_min(1e-10) ** -0.5
            x = scaled * x.norm() / scaled.norm()
            q = expected[matrix]
            expected[matrix] = q - lr * x - lr * decay * q * (x * q >= 0)
    momentum, second = torch.zeros_like(p), torch.zeros(3, rows, 1) if rows >= cols else torch.zeros(3, 1, cols)
    second, rates = second.double(), [torch.tensor(value).double() for value in (lr, decay, mu)]
    for grad in grads:
        track.muon_update(p, grad, momentum, second, *rates, torch.float64, row_norm)
    torch.testing.assert_close(p, expected)


def test_shape_factor(track, small):
    _, optimizer = make_optimizer(track, small)
    for bucket in optimizer.buckets:
        if bucket.kind == "adamw":
            continue
        rows, cols = bucket.values.shape[1:]
        assert bucket.lr == pytest.approx(0.04 * max(1, math.sqrt(rows / cols)))


def test_tables_in_bfloat16_keep_float32_gradients_and_state(track, small):
    model, optimizer = make_optimizer(track, small | {"dtype": "bfloat16"})
    wte = model.transformer.wte.weight
    assert wte.dtype == torch.bfloat16 and wte.grad.dtype == torch.float32
    assert model.lm_head.weight.dtype == (torch.bfloat16 if track.TRACK == "tiny" else torch.float32)
    assert model.transformer.h[0].mlp.c_fc.weight.dtype == torch.float32
    wte.grad.fill_(1.0)
    before = wte.detach().clone()
    optimizer.step(1.0, 1.0, 0.95)
    assert optimizer.state_dict()["state"]["transformer.wte.weight"]["exp_avg"].dtype == torch.float32
    lr, decay = 0.15, model.config.weight_decay
    expected = before.float() * (1 - lr * decay) - lr * 1.0
    torch.testing.assert_close(wte.float(), expected.bfloat16().float(), atol=0.01, rtol=0.01)


@pytest.mark.parametrize("track", ["tiny"], indirect=True)
def test_exponential_moving_average(track, small):
    """Of the weights after steps 0, 2, 4, ..., from zero, corrected for that; its decay is by epoch."""
    trainer, _ = track.set_up(flags(**small))
    beta = track.ema_beta(trainer.plan)
    assert beta ** (trainer.plan.num_steps / 2 / 2) == pytest.approx(0.15)  # 2 epochs, an update in 2 steps
    expected = {name: torch.zeros_like(p) for name, p in trainer.model.named_parameters()}
    for step in range(6):
        trainer.train_step(step)()
        for name, p in trainer.model.named_parameters():
            if step % 2 == 0:
                expected[name] = beta * expected[name] + (1 - beta) * p.detach()
    for name, state in trainer.optimizer.state_dict()["state"].items():
        torch.testing.assert_close(state["average"], expected[name], msg=name)
    record = track.Plan(track.Config(), 48804)
    assert track.ema_beta(record) == pytest.approx(0.15 ** (10 / 190))


@pytest.mark.parametrize("track", ["tiny"], indirect=True)
def test_the_average_is_read_out(track, small, monkeypatch):
    """Weights that do not move have themselves as average: the readout of it is that of the members."""
    update = track.update_weights

    def standing_still(optimizer, plan, step):
        before = [bucket.values.clone() for bucket in optimizer.buckets]
        monkeypatch.setattr(optimizer, "step", lambda *values: optimizer.zero_grad())
        update(optimizer, plan, step)
        assert all(torch.equal(a, bucket.values) for a, bucket in zip(before, optimizer.buckets, strict=True))

    monkeypatch.setattr(track, "update_weights", standing_still)
    trainer, _ = track.set_up(flags(**small | {"dtype": "float64"}))
    trainer.fit()
    trainer.optimizer.buckets[0].values.add_(1.0)  # the readout depends on what was kept, not on the model as it is
    assert track.finish(trainer) == 0
    assert len(set(trainer.readouts)) == 5
    for name, loss in trainer.readouts.items():
        if name != "epoch_1":  # with one pass
            assert loss == pytest.approx(trainer.readouts["epoch_2"], abs=1e-9), name


def test_state_is_complete_and_by_parameter(track, small):
    trainer, _ = track.set_up(flags(**small))
    for step in range(2):
        trainer.train_step(step)()
    saved = trainer.optimizer.state_dict()
    parameters = dict(trainer.model.named_parameters())
    assert saved["steps"] == 2 and saved["state"].keys() == parameters.keys()
    for name, state in saved["state"].items():
        if "momentum" in state:
            rows, cols = parameters[name].shape
            assert state["momentum"].shape == (rows, cols)
            assert state["second"].shape == ((rows, 1) if rows >= cols else (1, cols))
        else:
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameters[name].shape
    other, _ = track.set_up(flags(**small | {"run_name": "other"}))
    other.optimizer.load_state_dict(saved)
    again = other.optimizer.state_dict()
    for name, state in saved["state"].items():
        for key, value in state.items():
            assert torch.equal(again["state"][name][key], value), (name, key)


def test_warm_up_leaves_no_trace(track, small):
    trainer, _ = track.set_up(flags(**small | NOISE[track.TRACK]))
    parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    random_state = torch.get_rng_state()
    trainer.warm_up()
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, parameters[name]), name
        assert not p.grad.any(), name
    assert trainer.optimizer.steps == 0
    assert not any(gradient.any() for gradient in trainer.weights.sums.values())
    for state in trainer.optimizer.state_dict()["state"].values():
        assert not any(value.any() for value in state.values())
    cold, _ = track.set_up(flags(**small | NOISE[track.TRACK] | {"run_name": "cold"}))
    assert trainer.train_step(0)() == cold.train_step(0)()
