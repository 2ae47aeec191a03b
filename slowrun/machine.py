"""The machine: names, speed, memory and disks; the profiler of optimizer steps."""

from __future__ import annotations

import gzip
import json
import os
import platform
import re
import resource
import shutil
import sys
import time
from collections import defaultdict
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
    """Whether the device is a GPU with bfloat16 in hardware: Ampere or newer, compute capability 8.0."""
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


def profile_ranges(text: str) -> list[tuple[int, int]]:
    """Ranges of optimizer steps such as "4-5,9-9", counted from 1, the last step included (ValueError if malformed)."""
    ranges: list[tuple[int, int]] = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r" *(\d+) *- *(\d+) *", part)
        first, last = map(int, match.groups()) if match else (0, 0)
        after = ranges[-1][1] if ranges else 0
        if not after < first <= last:
            raise ValueError(
                f"--profile-steps {text}: {part!r} does not fit, give ranges FIRST-LAST of steps counted from 1, in "
                "order and apart, such as 4-5 or 4-5,9-9"
            )
        ranges.append((first, last))
    return ranges


def profile_table(trace: Path) -> str:
    """A table of the GPU's kernels in a trace, or of operators without what they call: total time, number of calls.

    The longest come first. torch's own table takes a minute for the trace of a step.
    """
    with gzip.open(trace, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    found = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    on_gpu = bool(found)
    found = found or [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    stack: list[tuple[int, float, str]] = []  # thread, end and name of the operators that are under way
    for event in sorted(found, key=lambda event: (event["tid"], event["ts"], -event["dur"])):
        thread, start, name = event["tid"], event["ts"], event["name"]
        while stack and (stack[-1][0] != thread or stack[-1][1] <= start):
            stack.pop()
        if stack and not on_gpu:
            times[stack[-1][2]] -= event["dur"]
        times[name] += event["dur"]
        counts[name] += 1
        stack.append((thread, start + event["dur"], name))
    total = sum(times.values())
    lines = [f"{'ms':>10} {'part':>6} {'number':>8}  {'kernel' if on_gpu else 'operator, without what it calls'}"]
    for name in sorted(times, key=times.get, reverse=True):
        lines.append(f"{times[name] / 1e3:10.3f} {times[name] / total:6.1%} {counts[name]:8}  {name[:160]}")
    return "\n".join(lines) + "\n"


class StepProfiler:
    """Records ranges of optimizer steps with torch.profiler, on the main process, into the run folder.

    profile_4-5.json.gz is a trace (ui.perfetto.dev shows it), profile_4-5.txt a table: see profile_table. The losses do
    not change, but recording and writing take time, which is on the clock.
    """

    def __init__(self, ranges: list[tuple[int, int]], is_main: bool, cuda: bool):
        self.ranges = list(ranges)  # those that have not ended, on all processes
        self.is_main = is_main
        self.cuda = cuda
        self.profile: torch.profiler.profile | None = None
        self.first = 0

    def begins_with(self, number: int) -> bool:
        """Whether a range begins with this step, counted from 1; the same on all processes."""
        while self.ranges and self.first != self.ranges[0][0] < number:  # it began before the run was resumed
            self.ranges.pop(0)
        return bool(self.ranges) and number == self.ranges[0][0]

    def start(self, number: int) -> None:
        """Record from this step on, which comes next."""
        self.first = number
        if not self.is_main:
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.cuda:
            torch.cuda.synchronize()
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile = torch.profiler.profile(activities=kinds)
        self.profile.start()

    def after_step(self, number: int, folder: Path, is_last: bool = False) -> str:
        """Write what was recorded if a range ends with this step, or if no step follows -> a line for the log."""
        if not self.ranges or not (is_last or number == self.ranges[0][1]):
            return ""
        first, last = self.ranges.pop(0)
        if self.profile is not None:
            return self.write(folder, f"profile_{self.first}-{number}")
        return f"profile of steps {first}-{last}: the run did not take them" if is_last else ""

    def write(self, folder: Path, name: str) -> str:
        started = time.monotonic()
        if self.cuda:
            torch.cuda.synchronize()
        self.profile.stop()
        outcome = "written"
        try:
            self.profile.export_chrome_trace(str(folder / "unfinished.json.gz"))
            os.replace(folder / "unfinished.json.gz", folder / f"{name}.json.gz")
            (folder / f"{name}.txt").write_text(profile_table(folder / f"{name}.json.gz"))
        except (OSError, RuntimeError) as error:  # a full disk, or the profiler's fault: no reason to end a run
            outcome = f"NOT written ({error})"
        self.profile = None
        return f"{name}: trace and table {outcome}, which took {time.monotonic() - started:.1f} s"
