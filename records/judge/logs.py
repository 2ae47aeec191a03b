"""Checks of what a run wrote while it trained: log.txt, and the losses in metrics.jsonl."""

from __future__ import annotations

import re

from records.judge.findings import Check, Judgement
from records.judge.runs import Folder, Part, close, not_finite, number
from slowrun.clock import duration

STEP_LINE = re.compile(r"step (\d+)/\d+ \| train (\S+) ")
VALIDATION_LINE = re.compile(r" \| step (\d+)/\d+ \| val (\S+)")
RESUMED = re.compile(r" resumed at step (\d+)/| no checkpoint yet: starting from step (0)$")


def printed_losses(log: list[str]) -> tuple[dict[int, float], dict[int, float]]:
    """Training and validation losses by step, as printed. Steps that were lost before a resume do not count."""
    steps: dict[int, float] = {}
    validations: dict[int, float] = {}
    for line in log:
        if match := RESUMED.search(line):
            last = int(match[1] or match[2])
            for found in (steps, validations):
                for step in [step for step in found if step > last]:
                    del found[step]
        elif match := STEP_LINE.search(line):
            steps[int(match[1])] = float(match[2])
        elif match := VALIDATION_LINE.search(line):
            validations[int(match[1])] = float(match[2])
    return steps, validations


def check_log(check: Check, run: Folder, judgement: Judgement) -> str:
    """The logs are those of this run: its id in every line, its track, its losses, its results."""
    lines = check_log_lines(check, run)
    for part in run.parts:
        check_printed_losses(check, part, run.config["log_every"])
    check_printed_results(check, run)
    return f"{lines} lines with the run's id {run.main.run_id}, losses as in metrics.jsonl"


def check_log_lines(check: Check, run: Folder) -> int:
    """Every line carries the run's id, and the only header is its own -> how many lines there are."""
    header, lines = f"{run.main.run_id} NanoGPT Slowrun, {run.track} track", 0
    headers = {line for line in run.main.log if " NanoGPT Slowrun, " in line}
    check.need(headers == {header}, f"log.txt has the headers {sorted(headers)}, not {header!r} alone")
    for part in [run.main, *(part for part in run.parts if part is not run.main)]:
        where = f"{part.name}/log.txt".lstrip("/")
        lines += len(part.log)
        others = [line for line in part.log if not line.startswith(part.run_id + " ")]
        check.need(not others, f"{len(others)} lines of {where} are not of run {part.run_id}: {others[:1]}")
        ids = {line.get("run") for line in part.metrics}
        check.need(ids <= {part.run_id}, f"metrics.jsonl has lines of runs {ids}, not only of {part.run_id}")
    return lines


def check_printed_losses(check: Check, part: Part, log_every: int) -> None:
    """The losses that a run or a chain printed are those in its metrics."""
    where = f"{part.name}/log.txt".lstrip("/")
    steps, validations = printed_losses(part.log)
    check.need(steps or len(part.steps) < log_every, f"{where} has no line of a step")
    step_metrics = {line["step"]: line["train_loss"] for line in part.steps}
    validation_metrics = {line["step"]: line["val_loss"] for line in part.metrics if "val_loss" in line}
    for kind, printed, recorded in (
        ("training", steps, step_metrics),
        ("validation", validations, validation_metrics),
    ):
        beyond = [step for step in printed if step not in recorded]
        check.need(not beyond, f"{where} has steps that metrics.jsonl has not ({kind}): {beyond[:5]}")
        other = [step for step in printed if step in recorded and not close(printed[step], recorded[step], 1e-4)]
        check.need(not other, f"{where} has other {kind} losses than metrics.jsonl, at steps {other[:5]}")


def check_printed_results(check: Check, run: Folder) -> None:
    """The log prints the settings, devices and results that config.json and result.json have."""
    track, result = run.track, run.result
    text, by = "\n".join(run.main.log), re.escape(f"{run.main.run_id} ")
    settings = ", ".join(f"{k} {v}" for k, v in run.saved["overrides"].items()) or "the defaults, the current record"
    ended = rf"(finished|stopped by \w+) after {result['steps']:,} steps"
    took = duration(number(result["train_time_s"]))
    claims = {
        rf"^{by}settings +{re.escape(settings)}$": "its overrides, of config.json",
        rf"^{by}val_loss +{result['val_loss']:.4f} ": "its val_loss",
        rf"^{by}{track} track, seed {result['seed']}, {ended}$": "its seed and number of steps",
        rf"^{by}time +training {re.escape(took)}, ": "its training time",
        rf"^{by}device +{result['world_size']} x {re.escape(result['device'])},": "its number and kind of devices",
        rf"^{by}model +{result['parameters']:,} parameters$": "its number of parameters",
    }
    devices = {m[1] for m in re.finditer(rf"^{by}device +(\d+ x [^,]+),", text, re.MULTILINE)}
    check.record_needs(len(devices) <= 1, f"it ran on several devices: {', '.join(sorted(devices))}")
    for name, loss in result["readouts"].items():
        claims[rf"^{by} +{loss:.4f}  {re.escape(name)}$"] = f"its readout {name}"
    for pattern, what in claims.items():
        check.need(re.search(pattern, text, re.MULTILINE), f"log.txt does not say {what}, as result.json does")


def check_losses(check: Check, run: Folder, judgement: Judgement) -> str:
    """Every loss is finite, and best_val_loss is the smallest readout. The readouts agree with the metrics."""
    result, readouts, count = run.result, run.result["readouts"], 0
    for part in run.parts:
        for line in part.steps:
            wrong = not_finite({k: v for k, v in line.items() if "loss" in k})
            check.need(not wrong, f"{part.name} step {line['step']}: {', '.join(wrong)} not finite".strip())
            number(line["train_loss"])
        wrong = [line["step"] for line in part.validations if not_finite(line)]
        check.need(not wrong, f"{part.name} validations that are not finite, at steps {wrong[:5]}".strip())
        count += len(part.steps)
    losses = {name: number(loss) for name, loss in readouts.items()}
    best, val_loss = number(result["best_val_loss"]), number(result["val_loss"])
    check.need(best == min(losses.values()), f"best_val_loss is {best}, the smallest readout {min(losses.values())}")
    check.need(val_loss in losses.values(), f"val_loss {val_loss} is not among the readouts")
    if run.track == "unlimited":
        ledgers, recorded = [part.ledger for part in run.parts], [part.validations for part in run.parts]
        in_ledgers = [[member["val_loss"] for member in ledger["members"]] for ledger in ledgers]
        found = [[line["val_loss"] for line in lines] for lines in recorded]
        agree = run.config["keep"] or in_ledgers == found
        check.need(agree, "other losses of members in the ledgers than in metrics.jsonl")
        recorded = {line["val_loss"] for line in run.main.metrics}
        other = [name for name, loss in losses.items() if name.startswith("mixture_of_") and loss not in recorded]
        check.need(not other, f"readouts that are not in metrics.jsonl: {', '.join(other)}")
        best_member = losses["best_member"]
        known = [loss for losses_of_chain in in_ledgers for loss in losses_of_chain]
        check.need(best_member in known, f"no ledger has the loss of the best member, {best_member}")
    else:
        claimed = [loss for name, loss in losses.items() if name.startswith("epoch_")]
        found = [line["val_loss"] for line in run.main.validations]
        check.need(claimed == found, f"readouts of epochs are {claimed}, the validations in metrics.jsonl {found}")
    return f"{count} training losses and {len(losses)} readouts are finite; best {best:.4f}, declared {val_loss:.4f}"
