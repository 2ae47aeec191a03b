"""Compute weights: made from masters, and their gradients taken back; dtypes, moved points, and what stays alive."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from slowrun.weights import ComputeWeights, compute_weights, unit_weights

UNITS = ["blocks.0.", "blocks.1."]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Linear(4, 8, bias=False)  # made from three masters
        self.out = nn.Linear(8, 4, bias=False)  # a master as it is

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.both(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.scale = nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return (self.scale * x).square().mean()


def make(masters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Not linear, so the gradient depends on where it is taken."""
    mixed = masters["mix"] @ masters["a.weight"]
    return {"both.weight": torch.cat([mixed, masters["b.weight"]]), "out.weight": masters["out.weight"]}


def make_masters(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"mix": (4, 4), "a.weight": (4, 4), "b.weight": (4, 4), "out.weight": (4, 8)}
    masters = {unit + name: torch.randn(shape, generator=generator) for unit in UNITS for name, shape in shapes.items()}
    masters["scale"] = torch.randn(4, generator=generator)
    return {name: master.to(dtype) for name, master in masters.items()}


def zeros(masters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in masters.items()}


def autograd_gradient(masters: dict[str, Tensor], batches: list[Tensor]) -> dict[str, Tensor]:
    leaves = {name: master.clone().requires_grad_() for name, master in masters.items()}
    weights = compute_weights(leaves, UNITS, make)
    loss = sum(torch.func.functional_call(Model().double(), weights, (x,)) for x in batches)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def batches(count: int) -> list[Tensor]:
    return list(torch.randn(count, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def test_compute_weights_by_unit():
    masters = make_masters()
    weights = compute_weights(masters, UNITS, make)
    assert weights.keys() == {name for name, _ in Model().named_parameters()}
    assert weights["scale"] is masters["scale"]
    found = unit_weights(masters, "blocks.1.", make)
    assert found.keys() == {"blocks.1.both.weight", "blocks.1.out.weight"}
    assert torch.equal(found["blocks.1.both.weight"], weights["blocks.1.both.weight"])
    assert torch.equal(weights["blocks.1.both.weight"][4:], masters["blocks.1.b.weight"])


def test_gradients_are_those_of_autograd():
    """Sums of several backward passes, pulled back once; the sums start again from zero."""
    masters, model = make_masters(), Model().double()
    weights = ComputeWeights(model, UNITS, make)
    weights.refresh(masters)
    for x in batches(3):
        model(x).backward()
        assert all(leaf.grad is None for leaf in model.parameters())  # dropped as soon as it is added
    grads = zeros(masters)
    weights.pull_back(grads)
    expected = autograd_gradient(masters, batches(3))
    for name in masters:
        torch.testing.assert_close(grads[name], expected[name], msg=name)
    weights.pull_back(grads)
    for name in masters:
        torch.testing.assert_close(grads[name], expected[name], msg=name)


def test_the_gradient_at_a_moved_point():
    """It is that of the masters of the last refresh, which are only read."""
    masters, model = make_masters(), Model().double()
    weights = ComputeWeights(model, UNITS, make)
    moved = masters | {name: p + 0.3 for name, p in masters.items() if name.endswith("mix")}
    kept = {name: p.clone() for name, p in moved.items()}
    weights.refresh(masters)
    weights.refresh(moved)
    model(batches(1)[0]).backward()
    grads = zeros(masters)
    weights.pull_back(grads)
    expected, elsewhere = (autograd_gradient(at, batches(1)) for at in (moved, masters))
    for name in masters:
        torch.testing.assert_close(grads[name], expected[name], msg=name)
        assert torch.equal(moved[name], kept[name])
    assert not torch.allclose(grads["blocks.0.a.weight"], elsewhere["blocks.0.a.weight"])


def test_gradients_can_be_forgotten():
    masters, model = make_masters(), Model().double()
    weights = ComputeWeights(model, UNITS, make)
    weights.refresh(masters)
    model(batches(1)[0]).backward()
    weights.zero_sums()
    grads = zeros(masters)
    weights.pull_back(grads)
    assert not any(grad.any() for grad in grads.values())


def test_bfloat16_is_rounded_once_and_summed_in_float32():
    masters, model = make_masters(torch.float32), Model().bfloat16()
    weights = ComputeWeights(model, UNITS, make)
    weights.refresh(masters)
    exact = compute_weights(masters, UNITS, make)
    for name, leaf in model.named_parameters():
        assert torch.equal(leaf, exact[name].bfloat16()), name
    x = batches(1)[0].bfloat16()
    model(x).backward()
    single = {name: total.clone() for name, total in weights.sums.items()}
    assert {total.dtype for total in single.values()} == {torch.float32}
    for _ in range(2):
        model(x).backward()
    assert all(torch.equal(total, single[name] + single[name] + single[name]) for name, total in weights.sums.items())


def test_masters_of_a_narrow_dtype():
    """What is made of them is made in float32, and so are their gradients."""
    narrow = make_masters(torch.bfloat16)
    wide = {name: master.float() for name, master in narrow.items()}
    results = []
    for masters in (narrow, wide):
        model = Model()
        weights = ComputeWeights(model, UNITS, make)
        weights.refresh(masters)
        model(batches(1)[0].float()).backward()
        grads = zeros(masters)
        weights.pull_back(grads)
        results.append(grads)
    for name in narrow:
        assert results[0][name].dtype == torch.float32 and torch.equal(results[0][name], results[1][name]), name


def test_units_that_do_not_fit_the_model():
    weights = ComputeWeights(Model().double(), UNITS, lambda masters: {"both.weight": masters["out.weight"].T})
    with pytest.raises(AssertionError, match=r"blocks\.0\.: make and the model differ"):
        weights.refresh(make_masters())


def test_nothing_stays_alive():
    """The garbage collector cannot see into hooks of tensors: a cycle through one would keep a model's memory."""
    model = Model().double()
    weights = ComputeWeights(model, UNITS, make)
    weights.refresh(make_masters())
    model(batches(1)[0]).backward()
    gone = [weakref.ref(weights), weakref.ref(model), *map(weakref.ref, (*weights.sums.values(), *model.parameters()))]
    del model, weights
    gc.collect()
    assert not any(found() is not None for found in gone)
