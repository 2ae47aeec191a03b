"""Reads traces of torch.profiler: the time of each kind of kernel."""

from __future__ import annotations

import gzip
import json
import re
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path

KINDS = (
    "matrix products", "attention", "head and loss", "elementwise", "optimizer", "communication", "idle",
)  # fmt: skip
GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
CPU = {"cpu_op", "user_annotation"}
LAUNCHES = {"cuda_runtime", "cuda_driver"}
# The kind of a range of the CPU's time, by its whole name; it takes precedence over the names of kernels in it
REGIONS = {"optimizer": "optimizer", "HeadLoss": "head and loss", "HeadLossBackward": "head and loss"}
NAMES = (  # the first pattern in the name of a kernel or an operator decides its kind
    ("communication", r"nccl|c10d::|gloo"),
    ("attention", r"flash|fmha|attention|attn|sdpa|scaled_dot_product"),
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|matmul|aten::(linear|mm|addmm|bmm|baddbmm|_scaled_mm)\b"),
)


def kind_of(name: str) -> str:
    """The kind of a kernel or an operator by its name alone; by default elementwise."""
    return next((kind for kind, pattern in NAMES if re.search(pattern, name, re.IGNORECASE)), "elementwise")


def covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end)."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def gpu_times(events: list[dict]) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """(Microseconds of the GPU's kernels by kind, their intervals).

    A kernel that was launched within one of REGIONS belongs to it; kernel and launch have the same correlation.
    """
    regions: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
    launches: dict[int, tuple[int, float]] = {}
    for event in events:
        if event["cat"] in CPU and event["name"] in REGIONS:
            regions[event["tid"]].append((event["ts"], event["ts"] + event["dur"], REGIONS[event["name"]]))
        elif event["cat"] in LAUNCHES and "correlation" in event.get("args", {}):
            launches[event["args"]["correlation"]] = event["tid"], event["ts"]
    for found in regions.values():
        found.sort()

    def region(event: dict) -> str | None:
        tid, ts = launches.get(event.get("args", {}).get("correlation"), (None, 0.0))
        index = bisect_right(regions[tid], (ts, float("inf"), "")) - 1 if tid in regions else -1
        if index < 0:
            return None
        _, end, kind = regions[tid][index]
        return kind if ts <= end else None

    times, intervals = defaultdict(float), []
    for event in (event for event in events if event["cat"] in GPU):
        kind = kind_of(event["name"])
        if kind != "communication":
            kind = region(event) or kind
        times[kind] += event["dur"]
        intervals.append((event["ts"], event["ts"] + event["dur"]))
    return times, intervals


def cpu_times(events: list[dict]) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """The same for operators on a CPU, each without those that it calls.

    An operator within one of REGIONS, or within attention, belongs to it.
    """
    times, intervals = defaultdict(float), []
    by_thread: dict[int, list[dict]] = defaultdict(list)
    for event in events:
        if event["cat"] in CPU:
            by_thread[event["tid"]].append(event)
    for thread in by_thread.values():
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        stack: list[tuple[float, str]] = []  # (end, kind) of the ranges that are open
        for event in thread:
            start, end = event["ts"], event["ts"] + event["dur"]
            while stack and stack[-1][0] <= start:
                stack.pop()
            kind = REGIONS.get(event["name"]) or kind_of(event["name"])
            if stack and stack[-1][1] not in ("elementwise", "matrix products"):
                kind = stack[-1][1]
            if stack:
                times[stack[-1][1]] -= event["dur"]
            elif event["cat"] == "cpu_op" or event["name"] in REGIONS:
                intervals.append((start, end))
            times[kind] += event["dur"]
            stack.append((end, kind))
    return times, intervals


def breakdown(path: Path, steps: int = 1) -> dict[str, float]:
    """Milliseconds of a step by KINDS, from a trace (json.gz) of this many steps.

    Times are those of the GPU's kernels, or of operators where there is no GPU. Kernels that overlap are counted in
    full; idle is the part of the trace in which nothing ran.
    """
    with gzip.open(path, "rt") as file:
        content = json.load(file)
    events = [event for event in content["traceEvents"] if event.get("ph") == "X" and event.get("cat")]
    on_gpu = any(event["cat"] in GPU for event in events)
    times, intervals = (gpu_times if on_gpu else cpu_times)(events)
    ran = [event for event in events if event["cat"] in GPU | CPU]
    first, last = min(event["ts"] for event in ran), max(event["ts"] + event["dur"] for event in ran)
    times["idle"] = last - first - covered(intervals)
    return {kind: times.get(kind, 0.0) / 1e3 / steps for kind in KINDS}
