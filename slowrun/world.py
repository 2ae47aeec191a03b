"""Processes: groups, virtual ranks, collective operations, seeds.

Small values are exchanged through the CPU, so that no GPU waits for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

VIRTUAL_RANKS = 8


@dataclass(frozen=True)
class World:
    """The processes that train one model."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # None for all processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def virtual_ranks(self) -> range:
        """The virtual ranks that this process computes."""
        count = VIRTUAL_RANKS // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the processes, in float64 and the same on all of them. Collective."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total, group=self.group)
        return total.tolist()

    def any(self, flags: list[bool]) -> list[bool]:
        """Whether each flag is set on at least one process. Collective."""
        return [count > 0 for count in self.sum([float(flag) for flag in flags])]

    def barrier(self) -> None:
        """Wait until all processes have come here. Collective."""
        self.sum([0.0])

    def on_main(self, function: Callable, *args) -> Any:
        """Call the function on the main process and return its result on all of them. Collective.

        A ValueError or OSError is raised on the main process as ValueError; the others exit with code 2.
        """
        result, error = None, None
        if self.is_main:
            try:
                result = function(*args)
            except (ValueError, OSError) as caught:
                error = str(caught)
        if self.size > 1:
            outcome = [result, error]
            dist.broadcast_object_list(outcome, group_src=0, group=self.group, device=torch.device("cpu"))
            result, error = outcome
        if error is not None:
            raise ValueError(error) if self.is_main else SystemExit(2)
        return result

    def main_first(self, function: Callable, *args) -> Any:
        """Call the function on the main process, then on the others -> each process's own result. Collective.

        For calls that fail on all processes alike: only the main process raises its ValueError or OSError.
        """
        result = None

        def call() -> None:
            nonlocal result
            result = function(*args)

        self.on_main(call)
        return result if self.is_main else function(*args)

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a tensor with that of the main process. Collective."""
        if self.size > 1:
            dist.broadcast(tensor, group_src=0, group=self.group)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over the processes, in place and on its device. Collective."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)

    def gather_rows(self, part: Tensor, count: int) -> Tensor:
        """Rows r, r + size, ... of a table from each process r -> the whole table (count, T), on the CPU. Collective.

        part (n, T), on the CPU.
        """
        if self.size == 1:
            return part
        padded = torch.zeros(-(-count // self.size), part.size(1), dtype=part.dtype)
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.stack(parts, dim=1).flatten(0, 1)[:count]

    def check_groups(self, group_size: int, flag: str = "a group size of") -> None:
        """Check that the processes can form groups of this size that divide the virtual ranks (ValueError).

        flag: what sets the size, for the message.
        """
        if self.size % group_size or VIRTUAL_RANKS % group_size:
            raise ValueError(
                f"{self.size} processes cannot form groups of {group_size} that divide {VIRTUAL_RANKS} virtual ranks: "
                f"use {flag} 1, 2, 4 or 8, a divisor of the number of processes"
            )

    def split(self, group_size: int) -> World:
        """The group of consecutive processes that this one belongs to (see check_groups). Collective."""
        self.check_groups(group_size)
        if self.size == 1:
            return self
        backend = dist.get_backend_config()
        starts = range(0, self.size, group_size)
        groups = [dist.new_group([*range(start, start + group_size)], backend=backend) for start in starts]
        return World(self.rank % group_size, group_size, self.device, groups[self.rank // group_size])

    def seed(self, value: int) -> None:
        """Seed the generator of the device, which dropout draws from."""
        if self.cuda:
            torch.cuda.manual_seed(value)
        else:
            torch.default_generator.manual_seed(value)


def processes_here() -> int:
    """Processes that torchrun started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def join(device: str, one_model: bool = True) -> World:
    """Join the processes that torchrun started; without torchrun this process is the only one. device: auto, cuda, cpu.

    ValueError if there are more processes than GPUs on this machine, or, where all processes train one model, if they
    cannot divide the virtual ranks evenly.
    """
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if one_model and VIRTUAL_RANKS % size:
        raise ValueError(f"{size} processes cannot divide {VIRTUAL_RANKS} virtual ranks: use 1, 2, 4 or 8")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA GPU here")
    use_cuda = torch.cuda.is_available() and device != "cpu"
    if use_cuda:
        gpus = torch.cuda.device_count()
        processes = max(processes_here(), local_rank + 1)
        if processes > gpus:
            raise ValueError(f"{processes} processes for {gpus} GPU(s): use --nproc_per_node={gpus} or fewer")
        torch.cuda.set_device(local_rank)
    if size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")
    return World(rank, size, torch.device("cuda", local_rank) if use_cuda else torch.device("cpu"))


def seed_of(*numbers: int) -> int:
    """A seed that depends on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
