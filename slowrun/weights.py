"""Compute weights: what a model computes with, made from the masters once per gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]  # by name


def unit_weights(masters: Weights, unit: str, make: Callable[[Weights], Weights]) -> Weights:
    """The compute weights of one unit, such as a block; their names begin with `unit`."""
    wide = {}  # masters may be stored in a narrow dtype
    for name, master in masters.items():
        if name.startswith(unit):
            wide[name.removeprefix(unit)] = master.to(torch.promote_types(master.dtype, torch.float32))
    return {unit + name: weight for name, weight in make(wide).items()}


def compute_weights(masters: Weights, units: Iterable[str], make: Callable[[Weights], Weights]) -> Weights:
    """The parameters of a model by name, made from its masters; differentiable.

    units: prefixes of names, such as "transformer.h.3.". make: the masters of a unit, by name without the prefix -> its
    parameters, likewise. All other masters are parameters without change.
    """
    weights = dict(masters)
    for unit in units:
        for name in masters:
            if name.startswith(unit):
                del weights[name]
        weights |= unit_weights(masters, unit, make)
    return weights


def accumulate_and_drop(total: Tensor, leaf: Tensor) -> None:
    """Add the gradient of a leaf to a total of a wider dtype, and drop it, as soon as the backward pass has made it."""
    total.add_(leaf.grad)
    leaf.grad = None


class ComputeWeights:
    """The link between the parameters of a model, its leaves, and the masters that they are made from.

    See compute_weights for `units` and `make`; the leaves may have a narrower dtype than the masters.

        weights.refresh(masters)         # leaves = compute weights of the masters, rounded once
        loss.backward()                  # any number of times: gradients add up in float32
        weights.pull_back(grads)         # grads += gradients of the masters; the sums start again from zero

    Masters are only read. Other values by the same names (a moved copy, an average) can take their place.
    """

    def __init__(self, model: nn.Module, units: Iterable[str], make: Callable[[Weights], Weights]):
        self.units = list(units)
        self.make = make
        self.leaves = dict(model.named_parameters())
        self.unit_leaves = {unit: [name for name in self.leaves if name.startswith(unit)] for unit in self.units}
        in_units = {name for names in self.unit_leaves.values() for name in names}
        self.plain = [name for name in self.leaves if name not in in_units]  # rounded, nothing else
        self.masters: Weights = {}
        self.sums: Weights = {}
        for name, leaf in self.leaves.items():
            self.sums[name] = torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
            # not a method: the garbage collector does not see a cycle through a hook, and would free nothing
            leaf.register_post_accumulate_grad_hook(partial(accumulate_and_drop, self.sums[name]))

    @torch.no_grad()
    def refresh(self, masters: Weights) -> None:
        """Make the leaves from these masters."""
        self.masters = masters
        for name in self.plain:
            self.leaves[name].copy_(masters[name])
        for unit in self.units:  # one after the other, because each makes float32 copies
            made = unit_weights(masters, unit, self.make)
            assert made.keys() == set(self.unit_leaves[unit]), f"{unit}: make and the model differ"
            for name, weight in made.items():
                self.leaves[name].copy_(weight)

    def pull_back(self, grads: Weights) -> None:
        """Add the gradients of the masters, as of the last refresh, to grads, which are float32 or wider."""
        for name in self.plain:
            grads[name].add_(self.sums[name])
        for unit in self.units:
            inputs = {}
            for name, master in self.masters.items():
                if name.startswith(unit):
                    wide = master.detach().to(torch.promote_types(master.dtype, torch.float32))
                    inputs[name] = wide.requires_grad_()
            with torch.enable_grad():
                made = unit_weights(inputs, unit, self.make)
            names = self.unit_leaves[unit]
            outputs = [made[name] for name in names]
            pulled = torch.autograd.grad(outputs, list(inputs.values()), [self.sums[name] for name in names])
            for name, grad in zip(inputs, pulled, strict=True):
                grads[name].add_(grad)
        self.zero_sums()

    def zero_sums(self) -> None:
        """Forget the gradients since the last pull_back."""
        for total in self.sums.values():
            total.zero_()
