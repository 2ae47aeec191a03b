"""The machine: names, speed, memory and disks."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from pathlib import Path

import torch

GIB = 2**30
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, by device name


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def peak_flops(device: torch.device) -> float | None:
    """Peak operations per second, by which model FLOPs utilization (MFU) is measured; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name(device)), None)


def has_bfloat16(device: torch.device) -> bool:
    """Whether it is a GPU with bfloat16 in hardware, as all since Ampere are: compute capability 8.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Dtype of the forward and backward pass; "auto" is bfloat16 where the GPU has it, else float32."""
    if wanted != "auto":
        return getattr(torch, wanted)
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process had allocated on the GPU, or in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def disk_space(folder: Path) -> tuple[int, int]:
    """(Bytes of the files in a run folder, 0 before it exists; bytes that are free on its disk)."""
    found = folder.rglob("*") if (folder / "config.json").exists() else ()
    sizes = {path.stat().st_ino: path.stat().st_size for path in found if path.is_file()}  # links count once
    disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return sum(sizes.values()), shutil.disk_usage(disk).free
