"""Masters and gradients in buckets, optimizer state sharded over the processes (ZeRO-2, arXiv 1910.02054).

This module only communicates: the update rules are the script's. Every process holds all masters and all gradients, but
only its shard of the optimizer state. A script's step is

    for bucket, grad in shards.reduce():      # this process's shard of the summed gradient, as it arrives
        update(bucket.shard, grad, bucket.state, bucket.group)
        shards.gather(bucket)                 # start sending the updated shard to the others
    shards.wait()                             # until all shards have arrived
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from slowrun.world import World

# torch 2.13 renamed these
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group(Protocol):
    """The part of a script's optimizer group that Shards needs."""

    names: list[str]
    layout: Literal["stacked", "flat"]


class Bucket:
    """Masters of one group in one buffer, their gradients in another. Each process has an equal shard of both.

    stacked: matrices of one shape, (n, rows, cols); matrix i belongs to process i mod world size. flat: elements, (n,).
    Both are padded with zeros to a multiple of the world size. Gradients are float32 or wider.
    """

    def __init__(self, masters: dict[str, Tensor], group: Group, world: World):
        self.group = group
        self.shapes = {name: master.shape for name, master in masters.items()}
        self.state: dict[str, Tensor] = {}  # by name, (shard size, ...); filled by the script
        first = next(iter(masters.values()))
        if group.layout == "stacked":
            item = first.shape
            self.shard_size = math.ceil(len(masters) / world.size)
            starts = [i % world.size * self.shard_size + i // world.size for i in range(len(masters))]
            sizes = [1] * len(masters)
        else:
            item = ()
            sizes = [master.numel() for master in masters.values()]
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            self.shard_size = math.ceil(sum(sizes) / world.size)
        self.spans = {name: slice(a, a + n) for name, a, n in zip(masters, starts, sizes, strict=True)}
        here = slice(world.rank * self.shard_size, (world.rank + 1) * self.shard_size)
        self.values = torch.zeros(self.shard_size * world.size, *item, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros_like(self.values, dtype=torch.promote_types(first.dtype, torch.float32))
        self.shard = self.values[here]
        self.grad_shard = self.grads[here]
        for name, master in masters.items():
            self.view(self.values, name).copy_(master)

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """The part of a whole buffer (of masters, gradients or state) that belongs to one name."""
        part = buffer[self.spans[name]]
        return part[0] if self.group.layout == "stacked" else part.view(self.shapes[name])


class Shards:
    """The buckets of a model.

    masters and grads, by name, are views of the buckets' buffers, so communication copies nothing.
    """

    def __init__(self, masters: dict[str, Tensor], groups: Sequence[Group], world: World):
        self.world = world
        self.buckets: list[Bucket] = []
        self.gathers: list[dist.Work] = []
        for group in groups:  # one bucket per dtype, and per shape of matrices
            kinds: dict[tuple, dict[str, Tensor]] = {}
            for name in group.names:
                shape = masters[name].shape if group.layout == "stacked" else ()
                kinds.setdefault((masters[name].dtype, shape), {})[name] = masters[name]
            self.buckets += [Bucket(members, group, world) for members in kinds.values()]
        self.buckets.sort(key=lambda bucket: -bucket.values.numel())  # the longest transfers start first
        where = {name: bucket for bucket in self.buckets for name in bucket.spans}
        self.masters = {name: where[name].view(where[name].values, name) for name in masters}
        self.grads = {name: where[name].view(where[name].grads, name) for name in masters}
        for bucket in self.buckets:
            world.broadcast(bucket.values)

    def add_state(self, bucket: Bucket, name: str, initial: Tensor) -> None:
        """Give a bucket this process's shard of a state, such as a moment: (shard size, ...)."""
        assert len(initial) == bucket.shard_size, f"{name} has {len(initial)} rows, the shard has {bucket.shard_size}"
        bucket.state[name] = initial

    @property
    def num_parameters(self) -> int:
        return sum(master.numel() for master in self.masters.values())

    def zero_grads(self) -> None:
        for bucket in self.buckets:
            bucket.grads.zero_()

    def reduce(self) -> Iterator[tuple[Bucket, Tensor]]:
        """Sum the gradients over the processes; yields each bucket with this process's shard, as it arrives."""
        assert not self.gathers, "the step before did not end with wait()"
        if self.world.size == 1:
            for bucket in self.buckets:
                yield bucket, bucket.grad_shard
            return
        transfers = []
        for bucket in self.buckets:
            summed = torch.empty_like(bucket.grad_shard)
            work = reduce_scatter(summed, bucket.grads, group=self.world.group, async_op=True)
            transfers.append((bucket, summed, work))
        for bucket, summed, work in transfers:
            work.wait()
            yield bucket, summed

    def gather(self, bucket: Bucket) -> None:
        """Start sending this process's shard of the masters to the others, and receiving theirs."""
        if self.world.size > 1:
            self.gathers.append(all_gather(bucket.values, bucket.shard, group=self.world.group, async_op=True))

    def wait(self) -> None:
        """Wait for all gathers. No process may read masters between the first gather and this."""
        for work in self.gathers:
            work.wait()
        self.gathers.clear()

    def whole(self, shard: Tensor) -> Tensor:
        """The shards of all processes, concatenated. Collective."""
        if self.world.size == 1:
            return shard
        buffer = shard.new_empty(len(shard) * self.world.size, *shard.shape[1:])
        all_gather(buffer, shard, group=self.world.group)
        return buffer

    def gather_state(self, key: str) -> dict[str, Tensor]:
        """A state that all buckets have, unsharded, by name of the master. Collective."""
        found = {}
        for bucket in self.buckets:
            whole = self.whole(bucket.state[key])
            for name in bucket.spans:
                found[name] = bucket.view(whole, name)
        return {name: found[name] for name in self.masters}

    def state_dict(self) -> dict:
        """Masters and state by name, on the CPU, for any number of processes. Collective; {} except on the main one."""
        saved: dict[str, dict[str, Tensor]] = {name: {"master": master.cpu()} for name, master in self.masters.items()}
        for bucket in self.buckets:
            for key, shard in bucket.state.items():
                whole = self.whole(shard)
                for name in bucket.spans:
                    saved[name][key] = bucket.view(whole, name).to("cpu", copy=True)
        return saved if self.world.is_main else {}

    @torch.no_grad()
    def load_state_dict(self, saved: dict) -> None:
        """Load a state_dict that the main process has, written by any number of processes. Collective."""
        for bucket in self.buckets:
            for name in bucket.spans if self.world.is_main else ():
                self.masters[name].copy_(saved[name]["master"])
            self.world.broadcast(bucket.values)
            for key, shard in bucket.state.items():
                whole = shard.new_zeros(len(shard) * self.world.size, *shard.shape[1:])
                for name in bucket.spans if self.world.is_main else ():
                    bucket.view(whole, name).copy_(saved[name][key])
                self.world.broadcast(whole)
                start = self.world.rank * bucket.shard_size
                shard.copy_(whole[start : start + bucket.shard_size])
