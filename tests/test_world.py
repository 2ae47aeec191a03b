"""Processes: who takes part, how they agree, and what one of them says when something is wrong."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from slowrun.world import World, join, seed_of

CPU = torch.device("cpu")


def on_processes(count: int, program: str) -> list[tuple[int, str]]:
    """Run a program on so many processes, which can `join` each other -> the exit code and the output of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    shared |= {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
    started = []
    for rank in range(count):
        own = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", program], env=os.environ | own, **pipes))
    outputs = [process.communicate(timeout=120)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


AGREEMENTS = """
import os, sys
import torch
from slowrun.session import exit_code
from slowrun.world import join

world = join("cpu")
rank = world.rank
assert (world.size, world.is_main, list(world.virtual_ranks)) == (2, rank == 0, list(range(4 * rank, 4 * rank + 4)))
assert world.sum([1.0, 0.1 + rank]) == [2.0, 1.2000000000000002]  # of float64
assert world.any([rank == 1, False, True]) == [True, False, True]
assert world.on_main(lambda x: (rank, x), 7) == (0, 7)  # of the main process, on both

tensor = torch.full((3,), float(rank + 1))
world.broadcast(tensor)
assert tensor.tolist() == [1.0, 1.0, 1.0]

for count in (0, 1, 5, 6):  # of one process, of both, with as many each
    table = torch.arange(2 * count).view(count, 2)
    assert torch.equal(world.gather_rows(table[rank::2], count), table), count

alone, both = world.split(1), world.split(2)
assert (alone.rank, alone.size, alone.sum([5.0 + rank])) == (0, 1, [5.0 + rank])
assert (both.rank, both.size, both.sum([1.0])) == (rank, 2, [2.0])


def refuse(error):
    raise error


for error in (ValueError("no data"), OSError("no disk")):
    try:
        world.on_main(refuse, error)
        print("went on")
    except ValueError as caught:
        assert rank == 0 and str(caught) == str(error)
    except SystemExit as end:
        assert rank == 1 and end.code == 2
assert world.sum([1.0]) == [2.0]  # nobody waits any more
print("done", flush=True)
code = exit_code(lambda: world.on_main(refuse, ValueError("no data")), "train.py")
sys.stderr.flush()
os._exit(code)
"""


def test_two_processes_agree():
    """An error of the main process ends both, with exit code 2, and is said once."""
    assert on_processes(2, AGREEMENTS) == [(2, "done\ntrain.py: error: no data\n"), (2, "done\n")]


GROUPS = """
import torch
from slowrun.world import join

world = join("cpu")
group = world.split(2)
assert (group.rank, group.size, group.is_main) == (world.rank % 2, 2, world.rank in (0, 2))
first = world.rank // 2 * 2  # the group's main process
assert group.sum([float(world.rank)]) == [2 * first + 1]
assert group.on_main(lambda: world.rank) == first
tensor = torch.tensor([world.rank])
group.broadcast(tensor)
assert tensor.item() == first
rows = group.gather_rows(torch.tensor([[10 * world.rank]]), 2)
assert rows.tolist() == [[10 * first], [10 * first + 10]]
print("done")
"""


def test_groups_of_processes_agree_among_themselves():
    assert on_processes(4, GROUPS) == [(0, "done\n")] * 4


def refuse(error: Exception):
    raise error


def test_one_process_needs_no_other():
    world = World(0, 1, CPU)
    table = torch.arange(6).view(3, 2)
    assert world.sum([1.5]) == [1.5] and world.any([False, True]) == [False, True]
    assert torch.equal(world.gather_rows(table, 3), table) and world.split(1) is world
    assert world.is_main and list(world.virtual_ranks) == list(range(8))
    for error in (ValueError("no"), OSError("no")):
        with pytest.raises(ValueError, match=r"^no$"):
            world.on_main(refuse, error)
    with pytest.raises(KeyError):  # an error of the code, not of the user
        world.on_main(refuse, KeyError("no"))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_virtual_rank_belongs_to_one_process(size):
    ranks = [World(rank, size, CPU).virtual_ranks for rank in range(size)]
    assert [v for own in ranks for v in own] == list(range(8)) and {len(own) for own in ranks} == {8 // size}


@pytest.mark.parametrize(
    "size, group, fits",
    [(8, 8, True), (16, 8, True), (6, 2, True), (5, 1, True), (8, 3, False), (6, 4, False), (16, 16, False)],
)
def test_groups_that_do_not_fit_are_refused(size, group, fits):
    world = World(0, size, CPU)
    if fits:
        world.check_groups(group)
        return
    with pytest.raises(ValueError, match=f"^{size} processes cannot form groups of {group} that divide 8 virtual"):
        world.check_groups(group, "--group")


def test_a_number_of_processes_that_does_not_fit(monkeypatch):
    """On the timed tracks, where all processes train one model."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes cannot divide 8 virtual ranks: use 1, 2, 4 or 8"):
        join("cpu")
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend: None)
    assert join("cpu", one_model=False).size == 3


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: torch finds no CUDA GPU here"):
        join("cuda")
    assert join("auto") == World(0, 1, CPU)


def test_more_processes_than_gpus(monkeypatch):
    """All processes find it, so that the main one can say it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"8 processes for 4 GPU\(s\): use --nproc_per_node=4 or fewer"):
        join("auto")
    for name, value in {"RANK": "5", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "1"}.items():  # a launcher that says less
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"6 processes for 4 GPU\(s\)"):
        join("auto")


def test_seeds_depend_on_all_numbers_and_their_order():
    """The first is a fixed value: seeds are part of a record's mathematics."""
    assert seed_of(42, 0, 1) == 16016570408942317940
    assert len({seed_of(42, 0, 1), seed_of(42, 1, 0), seed_of(43, 0, 1), seed_of(42, 0), seed_of(42, 0, 1, 1)}) == 5
    World(0, 1, CPU).seed(seed_of(42, 0, 1))
    first = torch.rand(3)
    World(0, 1, CPU).seed(seed_of(42, 0, 1))
    assert torch.equal(torch.rand(3), first)
