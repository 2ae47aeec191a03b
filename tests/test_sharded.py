"""Shards: how masters lie in buckets, what is padded, and that any number of processes computes and saves the same."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_world import on_processes

from slowrun.sharded import Bucket, Shards
from slowrun.world import World

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Group:
    names: list[str]
    layout: str


def make_masters() -> dict[str, torch.Tensor]:
    shapes = {"a": (2, 3), "b": (2, 3), "c": (2, 3), "d": (3, 2), "e": (3, 2), "x": (5,), "y": (2, 2), "z": ()}
    masters = {name: torch.full(shape, float(i)).double() for i, (name, shape) in enumerate(shapes.items(), start=1)}
    return masters | {"table": torch.full((3, 2), 9.0).bfloat16()}


GROUPS = [Group(["a", "b", "c", "d", "e"], "stacked"), Group(["x", "y", "z", "table"], "flat")]


def alone(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, CPU)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stacked_bucket_deals_out_whole_matrices(rank):
    """Matrix i belongs to process i mod 2; with three of them the last place is padding."""
    masters = {name: make_masters()[name] for name in "abc"}
    bucket = Bucket(masters, GROUPS[0], alone(rank, 2))
    assert bucket.values.shape == (4, 2, 3) and bucket.shard.shape == bucket.grad_shard.shape == (2, 2, 3)
    assert bucket.values[:, 0, 0].tolist() == [1.0, 3.0, 2.0, 0.0]
    assert bucket.shard[:, 0, 0].tolist() == [[1.0, 3.0], [2.0, 0.0]][rank]
    for name, master in masters.items():
        assert torch.equal(bucket.view(bucket.values, name), master)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_a_flat_bucket_deals_out_elements(rank):
    masters = {name: make_masters()[name] for name in "xyz"}
    bucket = Bucket(masters, GROUPS[1], alone(rank, 4))
    assert bucket.values.tolist() == [6.0] * 5 + [7.0] * 4 + [8.0, 0.0, 0.0]
    assert bucket.shard.tolist() == bucket.values[3 * rank : 3 * rank + 3].tolist()
    assert [bucket.view(bucket.values, name).shape for name in "xyz"] == [(5,), (2, 2), ()]


def test_masters_and_gradients_are_views_of_their_buckets():
    """A bucket per shape of matrices and per dtype; gradients are float32 or wider."""
    shards = Shards(make_masters(), GROUPS, alone())
    assert [sorted(bucket.spans) for bucket in shards.buckets] == [
        ["a", "b", "c"],
        ["d", "e"],
        ["x", "y", "z"],
        ["table"],
    ]
    assert list(shards.masters) == list(shards.grads) == list(make_masters())
    assert shards.num_parameters == 5 * 6 + 5 + 4 + 1 + 6
    for bucket in shards.buckets:
        bucket.values.fill_(7.0)
        bucket.grads.fill_(2.0)
    for name, master in shards.masters.items():
        assert (master == 7).all() and (shards.grads[name] == 2).all(), name
        assert shards.grads[name].shape == master.shape
    assert (shards.masters["table"].dtype, shards.grads["table"].dtype) == (torch.bfloat16, torch.float32)
    shards.zero_grads()
    assert not any(grad.any() for grad in shards.grads.values())


def test_state_is_of_the_shards_size():
    shards = Shards(make_masters(), GROUPS, alone())
    bucket = shards.buckets[0]
    with pytest.raises(AssertionError, match="momentum has 4 rows, the shard has 3"):
        shards.add_state(bucket, "momentum", torch.zeros(4))
    for bucket in shards.buckets:
        shards.add_state(bucket, "mean", torch.arange(bucket.shard_size).double())
    found = shards.gather_state("mean")
    assert list(found) == list(shards.masters)
    assert found["b"].item() == 1 and found["y"].tolist() == [[5, 6], [7, 8]]


def test_a_step_that_was_not_waited_for_is_noticed():
    shards = Shards(make_masters(), GROUPS, alone())
    shards.gathers.append(None)
    with pytest.raises(AssertionError, match="did not end with wait"):
        next(shards.reduce())


def train(world: World, start: dict, first: int, last: int) -> dict:
    """Steps of momentum, from a saved state if there is one -> the state.

    The gradients of virtual ranks are whole numbers, so that sums are exact.
    """
    shards = Shards({name: p * world.is_main for name, p in make_masters().items()}, GROUPS, world)
    assert all(torch.equal(shards.masters[name], p) for name, p in make_masters().items())  # those of the main process
    for bucket in shards.buckets:
        shard = bucket.grad_shard
        shards.add_state(bucket, "momentum", torch.zeros_like(shard))
        shards.add_state(bucket, "sum", torch.zeros_like(shard.sum((1, 2)) if shard.ndim == 3 else shard))
    if any(world.any([bool(start)])):
        shards.load_state_dict(start)
    for step in range(first, last):
        for rank in world.virtual_ranks:
            for i, grad in enumerate(shards.grads.values()):
                generator = torch.Generator().manual_seed(1000 * step + 100 * rank + i)
                grad += torch.randint(-8, 8, grad.shape, generator=generator)
        for bucket, grad in shards.reduce():
            bucket.state["momentum"].mul_(0.5).add_(grad)
            bucket.state["sum"] += grad.sum((1, 2)) if grad.ndim == 3 else grad
            bucket.shard.sub_(0.25 * bucket.state["momentum"].to(bucket.shard.dtype))
            shards.gather(bucket)
        shards.wait()
        shards.zero_grads()
    sums, saved = shards.gather_state("sum"), shards.state_dict()
    assert bool(saved) == world.is_main
    assert all(torch.equal(sums[name], parts["sum"]) for name, parts in saved.items())
    return saved


PROGRAM = """
import os, sys
sys.path.insert(0, "tests")
import torch
from slowrun.world import join
from test_sharded import train

world = join("cpu")
start = torch.load({start!r}, weights_only=True) if {start!r} and world.is_main else {{}}
saved = train(world, start, {first}, {last})
if world.is_main:
    torch.save(saved, {path!r})
world.sum([0.0])
os._exit(0)  # a thread of gloo can abort a regular exit
"""


def train_on(processes: int, path: Path, first: int, last: int, start: Path | str = "") -> dict:
    program = PROGRAM.format(path=str(path), start=str(start), first=first, last=last)
    for code, output in on_processes(processes, program):
        assert code == 0, output
    return torch.load(path, weights_only=True)


def test_any_number_of_processes_trains_and_saves_the_same(tmp_path):
    """Padding, uneven shards and exchange included; a state that two processes saved continues on four and on one."""
    expected, masters = train(alone(), {}, 0, 3), make_masters()
    assert list(expected) == list(masters)
    assert all(not torch.equal(parts["master"], masters[name]) for name, parts in expected.items())
    assert all(parts["momentum"].shape == masters[name].shape for name, parts in expected.items())
    assert (expected["a"]["sum"].shape, expected["y"]["sum"].shape) == ((), (2, 2))
    begun = train_on(2, tmp_path / "two.pt", 0, 1)
    for found in (train_on(4, tmp_path / "four.pt", 1, 3, tmp_path / "two.pt"), train(alone(), begun, 1, 3)):
        for name, parts in expected.items():
            for key, part in parts.items():
                assert torch.equal(found[name][key], part), (name, key)
