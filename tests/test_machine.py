"""What is asked of the machine."""

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
