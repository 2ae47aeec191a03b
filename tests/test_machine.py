"""What is asked of the machine."""

import gzip
import json
import os
from collections import namedtuple

import pytest
import torch

from slowrun import machine

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
Properties = namedtuple("Properties", "total_memory")


@pytest.fixture
def gpu(monkeypatch):
    """Whatever torch is asked of, it says that a GPU of this name and compute capability is there."""

    def set_up(name: str, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties(80 * 2**30))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)

    return set_up


def test_a_cpu():
    assert machine.device_name(CPU).startswith("CPU (")
    assert machine.peak_flops(CPU) is None and not machine.has_bfloat16(CPU)
    assert 10**8 < machine.peak_memory(CPU) < machine.total_memory(CPU)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla T4", None),
    ],
)
def test_peak_flops_by_name(gpu, name, peak):
    gpu(name)
    assert machine.device_name(GPU) == name and machine.peak_flops(GPU) == peak


def test_memory_of_a_gpu(gpu):
    gpu("NVIDIA H100 80GB HBM3")
    assert machine.total_memory(GPU) == 80 * machine.GIB and machine.peak_memory(GPU) == 12345


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_the_dtype_of_computing(gpu, capability, dtype):
    """bfloat16 where the GPU has it in hardware, unless another is asked for."""
    gpu("GPU", capability)
    assert machine.compute_dtype("auto", GPU) == dtype and machine.has_bfloat16(GPU) == (dtype == torch.bfloat16)
    assert machine.compute_dtype("float64", GPU) == torch.float64
    assert machine.compute_dtype("auto", CPU) == torch.float32
    assert machine.compute_dtype("bfloat16", CPU) == torch.bfloat16


def test_disk_space(tmp_path):
    """Of a folder that is not there yet, nothing; of a run folder all files, and links once."""
    folder = tmp_path / "runs" / "run"
    used, free = machine.disk_space(folder)
    assert used == 0 and free > 0 and not folder.exists()
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "a").write_bytes(bytes(1000))
    assert machine.disk_space(folder)[0] == 0  # it is no run folder
    (folder / "config.json").write_bytes(bytes(10))
    os.link(folder / "final" / "a", folder / "b")
    assert machine.disk_space(folder)[0] == 1010


# ------------------------------------------------------------------------------------------------------------- profiles


def test_ranges_of_steps():
    assert machine.profile_ranges("") == []
    assert machine.profile_ranges("4-5") == [(4, 5)]
    assert machine.profile_ranges("1-1, 4 - 5,9-20") == [(1, 1), (4, 5), (9, 20)]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("4", "4"),
        ("0-3", "0-3"),  # steps are counted from 1
        ("5-4", "5-4"),
        ("4-5,5-6", "5-6"),  # they touch
        ("9-9,4-5", "4-5"),
        ("4-5,", ""),
        ("-4-5", "-4-5"),
        ("a-b", "a-b"),
    ],
)
def test_ranges_that_are_refused(text, part):
    with pytest.raises(ValueError) as caught:
        machine.profile_ranges(text)
    assert f"--profile-steps {text}: {part!r} does not fit, give ranges FIRST-LAST" in str(caught.value)


def table_of(folder, *events: dict) -> list[list[str]]:
    """The lines of the table of a trace, split into columns, without the title."""
    with gzip.open(folder / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": [{"ph": "X", "tid": 1} | event for event in events] + [{"ph": "M"}]}, file)
    return [line.split() for line in machine.profile_table(folder / "trace.json.gz").splitlines()]


def test_the_table_of_a_trace(tmp_path):
    """Operators without what they call, the longest first; on a GPU its kernels only."""
    operators = [
        {"cat": "cpu_op", "name": "outer", "ts": 0, "dur": 10_000},
        {"cat": "cpu_op", "name": "inner", "ts": 1000, "dur": 6000},
        {"cat": "cpu_op", "name": "inner", "ts": 8000, "dur": 1000},
        {"cat": "cpu_op", "name": "after", "ts": 20_000, "dur": 2000},
        {"cat": "cpu_op", "name": "outer", "ts": 0, "dur": 2000, "tid": 2},
    ]
    title, *lines = table_of(tmp_path, *operators)
    assert title[3:] == ["operator,", "without", "what", "it", "calls"]
    assert lines == [
        ["7.000", "50.0%", "2", "inner"],
        ["5.000", "35.7%", "2", "outer"],
        ["2.000", "14.3%", "1", "after"],
    ]
    kernel = {"cat": "kernel", "name": "matmul", "ts": 500, "dur": 3000}
    title, *lines = table_of(tmp_path, *operators, kernel)
    assert title[3:] == ["kernel"] and lines == [["3.000", "100.0%", "1", "matmul"]]


def test_a_profile_that_cannot_be_written_does_not_end_a_run(tmp_path):
    """Neither does one whose steps a resumed run has behind it; other processes than the main one record nothing."""
    profiler = machine.StepProfiler([(2, 3), (5, 5)], is_main=True, cuda=False)
    assert not profiler.begins_with(1) and profiler.begins_with(2)
    profiler.start(2)
    assert profiler.after_step(2, tmp_path) == ""
    assert "profile_2-3: trace and table NOT written" in profiler.after_step(3, tmp_path / "nowhere")
    assert not profiler.begins_with(4) and profiler.begins_with(5)
    resumed = machine.StepProfiler([(2, 3), (5, 5)], is_main=False, cuda=False)
    assert [resumed.begins_with(number) for number in (3, 4, 5)] == [False, False, True]
    resumed.start(5)
    assert resumed.after_step(5, tmp_path) == "" and not list(tmp_path.iterdir())
