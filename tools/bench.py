"""Run a few steps of every stage of the tracks on this machine, and project the official runs.

    python tools/bench.py                        # all tracks that fit this machine's memory, in eight minutes
    python tools/bench.py limited --profile      # where the time goes, by kind of kernel
    python tools/bench.py --counted              # without a GPU: operations, bytes, and the least time they take
    python tools/bench.py --demo                 # the same at toy size, on a CPU
    python tools/bench.py --against ../other --stage limited/plain    # A B A B, and the ratios of their times

The real scripts run at full size, with torchrun on all GPUs (up to 8), on random tokens in a temporary folder. Each is
stopped after a few optimizer steps of each stage. Nothing is read from or written to runs/ and fineweb_data/; torch's
cache of compiled kernels is used and filled, as by any run.

ms/step is the median over the steps of a stage except the first, followed by half of their range. MFU, the model FLOPs
utilization, is

    flops_per_token * tokens_per_step / (seconds_per_step * GPUs * peak)

where flops_per_token is what the script counts: forward and backward of all matrix products and of attention (causal,
and within its window), replayed layers, earlier passes, a teacher and all heads included; the optimizer, recomputation
and elementwise operations are not. The peak is that of dense bfloat16 products (989 TFLOP/s on an H100).

Exit code: 0 everything that was wanted was measured, or left out for lack of memory or time; 1 something failed; 2
refused; 130 interrupted (the results so far are printed).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import re
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import original  # noqa: E402
from tools.trace import KINDS, breakdown  # noqa: E402
from tools.workplace import ScriptFailed, Workplace, launch_command  # noqa: E402

SCRIPTS = {"limited": "train.py", "tiny": "tiny/train.py", "two_hour": "two_hour/train.py"}
SCRIPTS["unlimited"] = "unlimited/train.py"
FIRST = (  # the stages that matter most, by their place in the track
    ("limited", 0), ("tiny", -1), ("limited", -1), ("tiny", 0), ("two_hour", -1), ("unlimited", -1),
)  # fmt: skip
H100 = {"tflops": 989.0, "tbs": 3.35}  # dense bfloat16, and memory
LINK_BYTES_PER_S = 300e9  # assumed for NVLink between the GPUs of a machine, where only one GPU was measured
# Guesses of what fits into the time: seconds until a script trains, for each further stage, to write a trace; the MFU
START_S, STAGE_S, PROFILE_S, EXPECTED_MFU = 100.0, 40.0, 20.0, 0.4
ON_CPU = {"start_s": 12.0, "stage_s": 0.0, "flops": 2e10}
ENOUGH_S = 20.0  # with less time left nothing is started


@dataclass(frozen=True)
class Options:
    """The content of the command line."""

    tracks: list[str]
    named: bool  # whether the tracks were named, so that they are tried whatever their memory
    stage: tuple[str, str] | None
    minutes: float
    steps: int
    gpus: int  # 0: no GPU
    demo: bool
    profile: bool
    peaks: dict[str, float]

    @property
    def processes(self) -> int:
        return max(1, self.gpus)

    @property
    def flags(self) -> list[str]:
        """The flags of every script, also for its plan, that decide the size and the device."""
        return ["--demo"] * self.demo + ([] if self.gpus else ["--device=cpu"])

    def peak_flops(self, plan: dict) -> float | None:
        """Operations per second of a GPU; None where it is not known."""
        given = self.peaks.get("tflops")
        return given * 1e12 if given else plan["device"]["peak_flops"]


@dataclass
class Report:
    """The results, as --json writes them."""

    machine: dict
    tracks: dict[str, dict] = field(default_factory=dict)
    interrupted: bool = False

    def of(self, track: str) -> dict:
        return self.tracks.setdefault(track, {"stages": {}, "left_out": {}, "failed": ""})


# ======================================================================================================================
# Plans: the steps and sizes that the scripts count
# ======================================================================================================================


def read_plan(place: Workplace, script: Path, flags: list[str], processes: int) -> dict:
    """The JSON that a script's --plan writes; ScriptFailed, with the script's reason, if it fails."""
    path = place.folder / "plan.json"
    path.unlink(missing_ok=True)
    command = launch_command(script, [*flags, f"--plan={path}"], 1)
    place.run(command, None, time.monotonic() + 120, WORLD_SIZE=str(processes), **quiet_threads())
    return json.loads(path.read_text())


def quiet_threads() -> dict[str, str]:
    """The environment of processes that compute on the same CPU: their threads would wait for each other."""
    return {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}


def official_plan(place: Workplace, track: str, options: Options, processes: int | None = None) -> dict:
    """The plan of a whole run of a track on the official number of tokens."""
    flags = [*options.flags, f"--data-dir={place.folder / 'none'}"]
    return read_plan(place, ROOT / SCRIPTS[track], flags, processes or options.processes)


def stage_names(plan: dict) -> list[str]:
    return list(dict.fromkeys(stage["stage"] for stage in plan["stages"]))


def flops_of(plan: dict, stage: str) -> float:
    """Operations of a step of a stage, the first one of its name."""
    return next(each["flops_per_step"] for each in plan["stages"] if each["stage"] == stage)


def seconds_for(plan: dict, stages: list[str], options: Options) -> float:
    """The estimated time to measure some stages of a track; several of them take as long as all do."""
    if not stages:
        return 0.0
    stages = stages if len(stages) == 1 else stage_names(plan)
    peak = options.peak_flops(plan)
    rate = EXPECTED_MFU * peak * options.processes if peak else ON_CPU["flops"]
    start_s, stage_s = (START_S, STAGE_S) if options.gpus else (ON_CPU["start_s"], ON_CPU["stage_s"])
    steps = options.steps + options.profile
    start_s += stage_s * (len(stages) - 1) + PROFILE_S * options.profile * len(stages)
    return start_s + sum(steps * flops_of(plan, stage) / rate for stage in stages)


def choose_stages(plans: dict[str, dict], options: Options) -> dict[str, list[str]]:
    """The stages by track that fit into the time, in the order of their importance (FIRST, then the rest)."""
    wanted = [(track, stage_names(plans[track])[i]) for track, i in FIRST if track in plans]
    wanted += [(track, stage) for track, plan in plans.items() for stage in stage_names(plan)]
    if options.stage:
        wanted = [options.stage]
    chosen: dict[str, list[str]] = {}
    for track, stage in dict.fromkeys(wanted):
        more = chosen | {track: [*chosen.get(track, []), stage]}
        needed_s = sum(seconds_for(plans[name], stages, options) for name, stages in more.items())
        if needed_s <= 60 * options.minutes or not chosen:
            chosen = more
    return {track: [s for s in stage_names(plans[track]) if s in stages] for track, stages in chosen.items()}


# ======================================================================================================================
# Measurement
# ======================================================================================================================


@dataclass(frozen=True)
class Short:
    """A short run: its script, its flags, and the steps to measure of each stage, by name."""

    script: Path
    flags: list[str]
    plan: dict
    steps: dict[str, list[int]]  # counted from 1
    profiled: dict[str, int]

    @property
    def last_step(self) -> int:
        return max(steps[-1] for steps in self.steps.values())


def short_run(place: Workplace, track: str, official: dict, stages: list[str], options: Options) -> Short:
    """A run in which a script goes through some stages of a track; its epochs have the wanted number of steps."""
    script, T = ROOT / SCRIPTS[track], official["sequence_len"]
    name = "all" if len(stages) > 1 else stages[0]
    steps = options.steps + options.profile
    sizes = [next(each["tokens_per_step"] for each in official["stages"] if each["stage"] == stage) for stage in stages]
    tokens = (steps + (len(stages) == 1)) * max(sizes)  # a run of one stage is stopped before it ends its epoch
    data = place.data(official["vocab_size"], T, tokens * (T + 1) // T + 40_000)
    flags = [*options.flags, *official["short_runs"][name], f"--data-dir={data}"]
    plan = read_plan(place, script, flags, options.processes)
    wanted = {}
    for each in plan["stages"]:
        if each["stage"] in stages and each["stage"] not in wanted:
            first = each["from_step"]
            wanted[each["stage"]] = list(range(first, first + min(steps, each["steps"])))
    missing = ", ".join(stage for stage in stages if stage not in wanted)
    if missing:
        raise ScriptFailed(f"its short run has no stage {missing}")
    profiled = {stage: numbers[-1] for stage, numbers in wanted.items()} if options.profile else {}
    if profiled:
        flags.append("--profile-steps=" + ",".join(f"{step}-{step}" for step in profiled.values()))
    return Short(script, flags, plan, wanted, profiled)


def read_steps(runs: Path) -> dict[int, dict]:
    """Lines of optimizer steps in the metrics of the run folder (or its chain) that is in a folder, by step."""
    lines = {}
    for path in runs.rglob("metrics.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            values = json.loads(line) if line.endswith("\n") else {}  # the last may be half written
            if "dt_s" in values:
                lines[values["step"]] = values
    return lines


def run_short(place: Workplace, short: Short, runs: Path, options: Options, until: float) -> None:
    """Run a script until it has made the wanted steps, or until a time; runs: where it makes its run folder."""
    command = launch_command(short.script, [*short.flags, f"--runs-dir={runs}", "--run-name=bench"], options.processes)

    def done(output: str) -> bool:
        profiles = len(list(runs.rglob("profile_*.json.gz")))
        return short.last_step in read_steps(runs) and profiles >= len(short.profiled)

    place.run(command, done, until, **quiet_threads())


def summary(ms: list[float]) -> dict:
    """Median, half of the range and all of some durations."""
    return {"ms": statistics.median(ms), "spread_ms": (max(ms) - min(ms)) / 2, "all_ms": ms}


def stage_result(short: Short, stage: str, lines: dict[int, dict], options: Options) -> dict | None:
    """The entry of --json for a stage; None if too few of its steps were made."""
    numbers = short.steps[stage]
    counted = [n for n in numbers[1:] if n in lines and n != short.profiled.get(stage)]
    if not counted:
        return None
    planned = next(each for each in short.plan["stages"] if each["from_step"] == numbers[0])
    found = summary([1e3 * lines[n]["dt_s"] for n in counted])
    seconds, tokens, peak = found["ms"] / 1e3, planned["tokens_per_step"], options.peak_flops(short.plan)
    used = planned["flops_per_step"] / seconds / options.processes
    found |= {"steps": len(counted), "tokens_per_s": tokens / seconds, "mfu": used / peak if peak else None}
    found |= {"tokens_per_s_per_gpu": tokens / seconds / options.processes}
    found |= {"peak_memory_gib": max(lines[n].get("peak_memory_gib", 0.0) for n in numbers if n in lines)}
    return found | {"flops_per_step": planned["flops_per_step"], "floor_ms": floors(planned, options.processes, H100)}


def floors(stage: dict, processes: int, peaks: dict[str, float]) -> dict[str, float]:
    """The least milliseconds that a step takes, by its operations and by the bytes of a process."""
    moved = sum(stage["moved_bytes"].values())
    operations = stage["flops_per_step"] / processes
    return {"operations": operations / peaks["tflops"] / 1e9, "bytes": moved / peaks["tbs"] / 1e9}


def measure(
    place: Workplace, track: str, official: dict, stages: list[str], found: dict, options: Options, until
) -> None:
    """Measure stages of a track until a time, into its entry of the report (`found`), also if it is interrupted."""
    short, runs = short_run(place, track, official, stages, options), place.folder / f"runs-{track}"
    why = "its script failed before it"
    try:
        run_short(place, short, runs, options, until)
        why = "no time was left for it"
    except KeyboardInterrupt:
        why = "interrupted before it"
        raise
    finally:
        warm_up = re.search(r"\bwarm-up +([\d.]+) s[^;]*; (.+)$", place.printed(), re.MULTILINE)
        found |= {"warm_up_s": float(warm_up[1]), "kernels": warm_up[2]} if warm_up else {}
        lines = read_steps(runs)
        results = {stage: stage_result(short, stage, lines, options) for stage in stages}
        found["stages"] = {stage: result for stage, result in results.items() if result}
        found["left_out"] |= {stage: why for stage, result in results.items() if not result}
        found["projection"] = project(official, found["stages"], options.processes)
    for stage, result in found["stages"].items():
        traces = list(runs.rglob(f"profile_{short.profiled.get(stage)}-*.json.gz"))
        if traces:
            result["breakdown_ms"] = breakdown(traces[0])
    shutil.rmtree(runs, ignore_errors=True)  # makes space for the next


# ======================================================================================================================
# Projection
# ======================================================================================================================


def project(official: dict, measured: dict[str, dict], processes: int) -> dict | None:
    """Minutes of the official run on this machine and on 8 such GPUs; None if nothing was measured.

    A stage that was not measured is named, and assumed to make as many operations per second as the last that was. A
    step measured on n GPUs is assumed to take n / 8 of the time on 8; if n is 1, the time to exchange the bytes of 8 is
    added, at LINK_BYTES_PER_S, as if nothing overlapped with it.
    """
    if not measured:
        return None
    minutes, minutes_of_8, guessed = 0.0, 0.0, []
    exchange_s = official["communication_bytes_of_8"] / LINK_BYTES_PER_S if processes == 1 else 0.0
    for each in official["stages"]:
        name = each["stage"]
        like = measured.get(name) or list(measured.values())[-1]
        guessed += [name] * (name not in measured and name not in guessed)
        step_s = like["ms"] / 1e3 * each["flops_per_step"] / like["flops_per_step"]
        runs = each["steps"] * official["repeats"] / 60
        minutes += runs * step_s
        minutes_of_8 += runs * (step_s * processes / 8 + exchange_s)
    cap = official["time_cap_min"]
    found = {"minutes": minutes, "minutes_on_8": minutes_of_8, "cap_min": cap, "guessed": guessed}
    return found | {"stopped": 0 < cap < minutes, "stopped_on_8": 0 < cap < minutes_of_8}


def length(minutes: float) -> str:
    return f"{minutes:.1f} min" if minutes < 600 else f"{minutes / 60:.0f} h"


def projection_line(track: str, found: dict, processes: int, gpus: bool) -> str:
    """The official run in a sentence."""
    cap = f"cap {found['cap_min']:g} min" if found["cap_min"] else "no cap"
    where = f"{processes} GPU{'s' * (processes > 1)}" if gpus else "this CPU"
    stop = {True: ", it would be stopped", False: ""}
    line = f"{track}: {length(found['minutes'])} on {where}{stop[found['stopped']]}"
    if gpus and processes < 8:
        line += f"; {length(found['minutes_on_8'])} on 8{stop[found['stopped_on_8']]}"
        if processes == 1:
            line += (
                f" (an eighth of a step, and communication at {LINK_BYTES_PER_S / 1e9:.0f} GB/s that overlaps nothing)"
            )
        else:
            line += f" ({processes}/8 of a step)"
    guessed = f"; not measured, at the same operations per second: {', '.join(found['guessed'])}" * bool(
        found["guessed"]
    )
    return f"{line}; {cap}{guessed}"


# ======================================================================================================================
# Tables
# ======================================================================================================================


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for first, *others in [header, *rows]:
        cells = [first.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def print_report(report: Report, options: Options) -> None:
    """The tables of a measurement."""
    rows, parts = [], []
    for track, found in report.tracks.items():
        for stage, each in found["stages"].items():
            mfu = f"{100 * each['mfu']:.1f}%" if each["mfu"] else "-"
            row = [f"{track}/{stage}", str(each["steps"]), f"{each['ms']:,.1f}", f"{each['spread_ms']:,.1f}"]
            row += [f"{each['tokens_per_s']:,.0f}", f"{each['tokens_per_s_per_gpu']:,.0f}", mfu]
            floor = each["floor_ms"]
            row += [f"{each['peak_memory_gib']:.1f}", f"{floor['operations']:,.3g}", f"{floor['bytes']:,.3g}"]
            rows.append(row)
            if "breakdown_ms" in each:
                parts.append([f"{track}/{stage}", *(f"{each['breakdown_ms'][kind]:,.1f}" for kind in KINDS)])
    print(f"\n{report.machine['name']}, {report.machine['processes']} process(es), torch {report.machine['torch']}")
    if options.demo:
        print("toy size: figures, and the projections on 100M tokens, are of the toy models")
    if rows:
        each = "tok/s/GPU" if options.gpus else "tok/s/process"
        header = ["stage", "steps", "ms/step", "+-", "tok/s", each, "MFU", "peak GiB", "H100 ops ms", "H100 bytes ms"]
        print(table(header, rows))
    if parts:
        print("\nms of a profiled step, by kind of kernel\n" + table(["stage", *KINDS], parts))
    print()
    for track, found in report.tracks.items():
        if found.get("kernels"):
            print(f"{track}: compilation and warm-up {found['warm_up_s']:.1f} s; {found['kernels']}")
    for track, found in report.tracks.items():
        if found.get("projection"):
            print(projection_line(track, found["projection"], options.processes, options.gpus > 0))
    for track, found in report.tracks.items():
        for why in dict.fromkeys(found["left_out"].values()):
            stages = ", ".join(stage for stage, reason in found["left_out"].items() if reason == why)
            print(f"{track}/{stages}: left out, {why}")
        if found["failed"]:
            print(f"{track}: FAILED, {found['failed']}")
    if not options.gpus and not options.demo:
        print("there is no GPU: --counted counts without one, --demo measures toy sizes")


def counted_table(plans: dict[str, dict], options: Options) -> str:
    """Operations and bytes of a step of each stage, and the time they take at least."""
    peaks = [("H100", H100)]
    if options.peaks:
        peaks.append(("given", H100 | options.peaks))
    rows = []
    for track, plan in plans.items():
        first = {}
        for each in plan["stages"]:
            first.setdefault((each["stage"], each["tokens_per_step"]), each)
        for (stage, tokens), each in first.items():
            held = sum(each["held_bytes"].values())
            row = [f"{track}/{stage}", f"{tokens:,}", f"{each['flops_per_step'] / 1e15:,.3g}"]
            row += [f"{each['moved_bytes'][part] / 1e9:,.1f}" for part in MOVED]
            row += [f"{sum(each['moved_bytes'].values()) / 1e9:,.0f}", f"{held / 2**30:.1f}"]
            for _, peak in peaks:
                floor = floors(each, options.processes, peak)
                row += [f"{floor['operations']:,.4g}", f"{floor['bytes']:,.4g}"]
            rows.append(row)
    header = ["stage", "tokens", "PFLOP", *MOVED, "GB moved", "GiB held"]
    header += [f"{name} {what} ms" for name, _ in peaks for what in ("ops", "bytes")]
    return table(header, rows)


MOVED = ("weights", "gradients", "optimizer", "activations", "logits")

# ======================================================================================================================
# Against another checkout
# ======================================================================================================================


def help_of(place: Workplace, script: Path) -> str:
    """The output of a script's --help; ScriptFailed if it cannot be called."""
    if not script.exists():
        raise ScriptFailed(f"{script} is not there")
    return place.run(launch_command(script, ["--help"], 1), None, time.monotonic() + 120, **quiet_threads())


def known_flags(text: str) -> set[str]:
    """The flags that a --help names."""
    return set(re.findall(r"--[a-zA-Z][\w-]*", text))


def step_times(place: Workplace, short: Short, stage: str, options: Options, until: float) -> list[float]:
    """Milliseconds of the steps of a stage in a short run."""
    runs = place.folder / f"runs-{time.monotonic_ns()}"
    run_short(place, short, runs, options, until)
    lines = read_steps(runs)
    shutil.rmtree(runs, ignore_errors=True)
    return [1e3 * lines[n]["dt_s"] for n in short.steps[stage] if n in lines]


def original_step_times(
    place: Workplace, script: Path, flags: list[str], steps: int, options: Options, until
) -> list[float]:
    """Milliseconds of the first steps of a script of the original project."""

    def done(output: str) -> bool:
        return len(original.step_ms(output)) >= steps

    command = launch_command(script, flags, options.processes)
    output = place.run(command, done, until, **original.ENVIRONMENT, **quiet_threads())
    return list(original.step_ms(output).values())


def compare(place: Workplace, other: Path, options: Options) -> dict:
    """Run this checkout (A) and another (B) alternately, A B A B, on one stage -> durations and ratios, for --json.

    A ratio is the time of B over that of A, for runs that followed one another: above 1 this checkout is faster.
    """
    options = dataclasses.replace(options, profile=False)
    track, stage = options.stage or (options.tracks[0], "")
    plan = official_plan(place, track, options)
    check_stage(plan, track, stage)
    stage = stage or stage_names(plan)[0]
    short = short_run(place, track, plan, [stage], options)
    script = other / SCRIPTS[track]
    text = help_of(place, script)
    found = {
        "path": str(other),
        "original_project": original.is_original(text),
        "stage": f"{track}/{stage}",
        "runs": [],
    }
    kept = [flag for flag in short.flags if flag.split("=")[0] in known_flags(text)]
    run_a, run_b = (
        partial(step_times, place, dataclasses.replace(short, script=path, flags=flags), stage, options)
        for path, flags in ((short.script, short.flags), (script, kept))
    )
    if found["original_project"]:
        data = Path(next(flag for flag in short.flags if flag.startswith("--data-dir=")).split("=")[1])
        flags = original.original_flags(found["stage"], data, known_flags(text))
        run_b = partial(original_step_times, place, script, flags, len(short.steps[stage]), options)
    found["dropped_flags"] = [] if found["original_project"] else [flag for flag in short.flags if flag not in kept]
    end = time.monotonic() + 60 * options.minutes
    for i, (which, run_one) in enumerate([("A", run_a), ("B", run_b)] * 2):
        ms = run_one(time.monotonic() + (end - time.monotonic()) / (4 - i))[1:]
        if not ms:
            raise ScriptFailed(f"run {i + 1} ({which}) made fewer than two steps in its time: raise --minutes")
        found["runs"].append({"which": which} | summary(ms))
        print(f"{which}: {found['runs'][-1]['ms']:,.1f} ms/step +- {found['runs'][-1]['spread_ms']:,.1f}", flush=True)
    pairs = ((a, b) if a["which"] == "A" else (b, a) for a, b in pairwise(found["runs"]))
    ratios = [b["ms"] / a["ms"] for a, b in pairs]
    return found | {"ratios": ratios, "ratio": statistics.median(ratios), "spread": (max(ratios) - min(ratios)) / 2}


def print_comparison(found: dict) -> None:
    kind = "the original project" if found["original_project"] else "another checkout"
    print(f"\n{found['stage']}: A is this checkout, B {found['path']} ({kind})")
    if found["dropped_flags"]:
        print(f"B does not know and was not given: {' '.join(found['dropped_flags'])}")
    ratios = ", ".join(f"{ratio:.3f}" for ratio in found["ratios"])
    print(f"time of B / time of A: {found['ratio']:.3f} +- {found['spread']:.3f} (of neighbours: {ratios})")


# ======================================================================================================================
# Command line
# ======================================================================================================================


def check_stage(plan: dict, track: str, stage: str) -> None:
    """Refuse a stage that the track does not have (ValueError)."""
    names = stage_names(plan)
    if stage and stage not in names:
        raise ValueError(f"--stage {track}/{stage}: {track} has the stages {', '.join(names)}")


def reason_to_leave_out(plan: dict, options: Options) -> str:
    """Why a track does not fit this machine by its script's own estimate; empty if it does."""
    needed, available = plan["memory_gib"][str(options.processes)], plan["device"]["memory_gib"]
    processes = 1 if options.gpus else options.processes  # that use the same memory
    if needed * processes <= available or options.named:
        return ""
    has = f"{plan['device']['name']} has {available:.0f} GiB"
    return f"it takes {needed:.0f} GiB by its own estimate, and {has}: name the track to try it"


UNUSABLE = (ScriptFailed, OSError, LookupError, ValueError, TypeError)  # a script, or what it wrote


def reason(failure: Exception) -> str:
    """Why a track failed, in a line."""
    return str(failure) if isinstance(failure, ScriptFailed) else f"{type(failure).__name__}: {failure}"


def measure_all(place: Workplace, report: Report, options: Options) -> None:
    """Measure what fits, into the report."""
    end, plans = time.monotonic() + 60 * options.minutes, {}
    for track in options.tracks:
        try:
            plan = official_plan(place, track, options)
        except UNUSABLE as failure:
            report.of(track)["failed"] = reason(failure)
            continue
        if options.stage:
            check_stage(plan, *options.stage)
        report.machine["name"] = plan["device"]["name"]
        why = reason_to_leave_out(plan, options)
        if why:
            report.of(track)["left_out"] = dict.fromkeys(stage_names(plan), why)
        else:
            plans[track] = plan
    chosen = choose_stages(plans, options)
    for track, plan in plans.items():
        wanted = stage_names(plan) if not options.stage else []
        late = [stage for stage in wanted if stage not in chosen.get(track, [])]
        report.of(track)["left_out"] |= dict.fromkeys(late, f"{options.minutes:g} minutes are too few for it")
    for track, stages in chosen.items():
        started = time.monotonic()
        if end - started < ENOUGH_S:
            report.of(track)["left_out"] |= dict.fromkeys(stages, "no time was left for it")
            continue
        print(f"{track}: {', '.join(stages)} ...", flush=True)
        found = report.of(track)
        try:
            measure(place, track, plans[track], stages, found, options, end)
        except UNUSABLE as failure:
            found["failed"] = reason(failure)
            continue
        print(f"{track}: {len(found['stages'])} stages in {time.monotonic() - started:.0f} s", flush=True)


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, Options]:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    text = f"{', '.join(SCRIPTS)} [all that fit this machine's memory]"
    parser.add_argument("tracks", nargs="*", metavar="TRACK", help=text)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything [8]")
    parser.add_argument(
        "--steps", type=int, default=4, help="optimizer steps of a stage, of which the first is left out [4]"
    )
    parser.add_argument("--stage", metavar="TRACK/STAGE", help="this stage alone, such as limited/plain")
    parser.add_argument(
        "--gpus", type=int, help="1, 2, 4 or 8 [all that there are]; with --counted, those to count for [1]"
    )
    parser.add_argument("--profile", action="store_true", help="profile a step more of each stage")
    parser.add_argument("--demo", action="store_true", help="toy size, on a CPU")
    parser.add_argument("--counted", action="store_true", help="run nothing: operations, bytes, and least times")
    parser.add_argument("--peak-tflops", type=float, help="of a GPU, for MFU and --counted [that of its model; H100's]")
    parser.add_argument("--peak-tbs", type=float, help="TB/s of a GPU's memory, for --counted")
    parser.add_argument("--against", metavar="PATH", type=Path, help="another checkout, or the original project's")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was found here too")
    a = parser.parse_args(argv)
    unknown = [track for track in a.tracks if track not in SCRIPTS]
    stage = tuple(a.stage.split("/", 1)) if a.stage and "/" in a.stage else None
    if unknown:
        parser.error(f"there is no track {unknown[0]}: choose of {', '.join(SCRIPTS)}")
    if a.stage and (stage is None or stage[0] not in SCRIPTS or not stage[1]):
        parser.error(f"--stage {a.stage} must be a track and its stage, such as limited/plain")
    if stage and a.tracks not in ([], [stage[0]]):
        parser.error(f"--stage {a.stage} is not of {' '.join(a.tracks)}: name no track beside it")
    for name in ("minutes", "steps", "peak_tflops", "peak_tbs"):
        value, least = getattr(a, name), 2 if name == "steps" else 0
        if value is not None and not (value >= least and value > 0):
            parser.error(
                f"--{name.replace('_', '-')} {value:g} must be {'2 or more' if name == 'steps' else 'positive'}"
            )
    if a.counted and a.against:
        parser.error("--counted runs nothing, --against does: give one of them")
    there = 0 if a.demo else torch.cuda.device_count()
    gpus = max((n for n in (0, 1, 2, 4, 8) if n <= there), default=0) if a.gpus is None else a.gpus
    if a.gpus is not None and (a.gpus not in (1, 2, 4, 8) or (a.gpus > there and not a.counted)):
        parser.error(f"--gpus {a.gpus}: this machine has {there}, and 1, 2, 4 or 8 can be used")
    if a.against and not a.against.is_dir():
        parser.error(f"--against {a.against} is not a folder: give a checkout")
    if a.json and not a.json.absolute().parent.is_dir():
        parser.error(f"--json {a.json}: there is no folder {a.json.absolute().parent}")
    given = {"tflops": a.peak_tflops, "tbs": a.peak_tbs}
    tracks = [stage[0]] if stage else a.tracks or list(SCRIPTS)
    named, peaks = bool(a.tracks or stage), {name: value for name, value in given.items() if value}
    if a.counted:
        gpus = a.gpus or 1
    return a, Options(tracks, named, stage, a.minutes, a.steps, gpus, a.demo, a.profile, peaks)


def interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt


def run(place: Workplace, arguments: argparse.Namespace, options: Options) -> tuple[dict, int]:
    """Do what the command line wants -> (the content of --json, the exit code)."""
    processes = options.processes
    machine = {"name": platform.processor() or platform.machine(), "gpus": options.gpus, "processes": processes}
    report = Report(machine | {"torch": torch.__version__, "cuda": torch.version.cuda, "demo": options.demo})
    if arguments.counted:
        plans = {track: official_plan(place, track, options) for track in options.tracks}
        each = "" if processes == 1 else f" of {processes}"
        print(f"A step, counted; bytes in GB, of one GPU{each}\n" + counted_table(plans, options))
        return {"counted": plans}, 0
    if arguments.against:
        found = compare(place, arguments.against.resolve(), options)
        print_comparison(found)
        return {"machine": report.machine, "against": found}, 0
    try:
        measure_all(place, report, options)
    except KeyboardInterrupt:
        report.interrupted = True
    print_report(report, options)
    failed = any(found["failed"] for found in report.tracks.values())
    content = {"machine": report.machine, "interrupted": report.interrupted, "tracks": report.tracks}
    return content, 130 if report.interrupted else int(failed)


def main(argv: list[str] | None = None) -> int:
    """Measure, count or compare -> exit code: see the top of this file."""
    arguments, options = parse_arguments(argv)
    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with Workplace() as place:
            content, code = run(place, arguments, options)
        if arguments.json:
            arguments.json.write_text(json.dumps(content, indent=1) + "\n")
        return code
    except (ScriptFailed, ValueError, OSError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ScriptFailed) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
