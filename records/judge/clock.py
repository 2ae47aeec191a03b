"""Checks of time and steps: times add up and keep the cap; steps and tokens follow from config and data."""

from __future__ import annotations

from itertools import pairwise

from records.judge.data import official_sequences, training_sequences
from records.judge.findings import Check, Judgement
from records.judge.runs import Folder, Part, close, number
from slowrun.clock import duration
from slowrun.world import VIRTUAL_RANKS

CLOCK_TOLERANCE = 0.01  # relative, of the sum of the steps' times

# ======================================================================================================================
# Times
# ======================================================================================================================


def check_clock(check: Check, run: Folder, judgement: Judgement) -> str:
    """The steps' times add up to the training time, which is within the cap; nothing is trained off the clock."""
    result, seconds = run.result, number(run.result["train_time_s"])
    for part in run.parts:
        check_part(check, part, part.ledger if run.track == "unlimited" else result)
    if run.track == "unlimited":
        check_chains(check, run)
    else:
        check_cap(check, run)
    wall_s = number(result["wall_time_s"])
    check.need(seconds <= wall_s, f"train_time_s {seconds:.1f} is more than wall_time_s {wall_s:.1f}")
    check.note(f"{wall_s - seconds:.0f} s were not timed (set-up, compilation, validation, checkpoints)")
    return f"{result['steps']:,} steps add up to {duration(seconds)} of training"


def check_part(check: Check, part: Part, summary: dict) -> None:
    """Each step is there once, in order, with its time and tokens, as the part's summary (result or ledger) has it."""
    steps, name = part.steps, f"{part.name}: " if part.name else ""
    numbers, count = [line["step"] for line in steps], summary["steps"]
    text = f"{name}metrics.jsonl has {len(numbers)} timed steps, up to {max(numbers, default=0)}"
    check.need(numbers == list(range(1, count + 1)), f"{text}, not 1 to {count} in order")
    untimed = [line["step"] for line in part.metrics if "train_loss" in line and "dt_s" not in line]
    check.need(not untimed, f"{name}steps {untimed[:5]} were trained off the clock")
    late = [line["step"] for line in part.metrics if line["step"] > count]
    check.need(not late, f"{name}steps {late[:5]} come after the last one counted, {count}")
    wrong = [line["step"] for line in steps if not number(line["dt_s"]) > 0]
    check.need(not wrong, f"{name}steps {wrong[:5]} took no time")
    total, seconds = sum(line["dt_s"] for line in steps), number(summary["train_time_s"])
    fits = close(total, seconds, CLOCK_TOLERANCE * seconds)
    check.need(fits, f"{name}the times of the steps add up to {total:.2f} s, train_time_s is {seconds:.2f} (within 1%)")
    last = steps[-1]["tokens"] if steps else 0
    check.need(summary["tokens"] == last, f"{name}tokens is {summary['tokens']}, after the last step they were {last}")


def check_cap(check: Check, run: Folder) -> None:
    """Training ended within the track's cap, and within the run's own."""
    seconds, cap, run_cap = run.result["train_time_s"], run.rules.cap_min, number(run.config["time_cap_min"])
    check.record_needs(seconds <= 60 * cap, f"training took {seconds / 60:.2f} min, the cap is {cap:g}")
    change = "lifted" if run_cap <= 0 else f"set to {run_cap:g}"
    check.record_needs(0 < run_cap <= cap, f"the cap of {cap:g} min was {change}")
    fits = run_cap <= 0 or seconds <= 60 * run_cap
    check.need(fits, f"training took {seconds / 60:.2f} min, the run's own cap is {run_cap:g}")
    if run.result["stopped_by"] == "time_cap":
        slack = 3 * max(line["dt_s"] for line in run.main.steps[-6:])  # it stops before the step that may pass the cap
        near = run_cap > 0 and seconds + slack >= 60 * run_cap
        check.need(near, f"stopped_by is time_cap after {seconds / 60:.2f} min, but the cap is {run_cap:g}")


def check_chains(check: Check, run: Folder) -> None:
    """result.json sums up the ledgers of an unlimited run's chains, and the run keeps the limits of its track."""
    result, ledgers = run.result, [part.ledger for part in run.parts]
    states = {ledger["state"] for ledger in ledgers}
    check.need(states == {"finished"}, f"chains are {', '.join(states)}, not all finished")
    seeds = [ledger["seed"] for ledger in ledgers]
    check.need(seeds == [run.config["seed"] + i for i in range(len(ledgers))], f"the chains' seeds are {seeds}")
    by_layout: dict[int, dict[int, float]] = {}  # seconds, by number of groups, by group
    for ledger in ledgers:
        groups, index, _ = ledger["layout"]
        of_group = by_layout.setdefault(groups, {})
        of_group[index] = of_group.get(index, 0.0) + number(ledger["train_time_s"])
        enough = number(ledger["process_s"]) >= 0.99 * ledger["train_time_s"]
        check.need(enough, f"chain {ledger['chain']} says fewer process seconds than seconds")
    sums = {
        "steps": sum(ledger["steps"] for ledger in ledgers),
        "tokens": sum(ledger["tokens"] for ledger in ledgers),
        "train_time_s": sum(max(of_group.values()) for of_group in by_layout.values()),
        "process_hours": sum(ledger["process_s"] for ledger in ledgers) / 3600,
        "world_size": max(ledger["layout"][0] * ledger["layout"][2] for ledger in ledgers),
    }
    for name, total in sums.items():
        found = number(result[name])
        check.need(close(found, total, 1e-6 * total), f"{name} is {found}, by the ledgers of the chains {total}")
    days, hours = sums["train_time_s"] / 86400, sums["process_hours"]
    max_gpus, max_days = run.rules.max_gpus, run.rules.max_days
    fits = days <= max_days and hours <= max_days * 24 * max_gpus and sums["world_size"] <= max_gpus
    most = f"{max_gpus} GPUs for {max_days:g} days"
    check.record_needs(fits, f"{sums['world_size']} GPUs, {days:.2f} days, {hours:.0f} GPU hours: at most {most}")


# ======================================================================================================================
# Steps and tokens
# ======================================================================================================================


def check_steps(check: Check, run: Folder, judgement: Judgement) -> str:
    """Steps and tokens are those that follow from the config and the number of training sequences."""
    if not judgement.options.static:
        sequences = training_sequences(run, judgement)
    elif run.official and run.track != "unlimited":
        sequences = official_sequences()
    else:
        check.note("how many steps follow from the data was not checked, as these were not read")
        return check_batches(check, run)
    plan = planned_tokens(run.config, sequences)
    for part in run.parts:
        name, done = f"{part.name}: " if part.name else "", len(part.steps)
        by_cap = run.result["stopped_by"] == "time_cap" and run.track != "unlimited"
        fits = 0 < done < len(plan) if by_cap else done == len(plan) - 1
        check.need(fits, f"{name}{done} steps, by config and data {len(plan) - 1} (fewer only if the cap stops a run)")
        tokens = [line["tokens"] for line in part.steps]
        other = [i + 1 for i, pair in enumerate(zip(tokens, plan[1:], strict=False)) if pair[0] != pair[1]]
        check.need(not other, f"{name}other tokens than the batches of the config make, at steps {other[:5]}")
    return f"{len(plan) - 1:,} follow from the config and {sequences:,} training sequences"


def planned_tokens(config: dict, sequences: int) -> list[int]:
    """Tokens after 0, 1, ... steps of a run, or of a chain, up to the last, as its config plans them."""
    group = VIRTUAL_RANKS * config["micro_batch"]
    epoch_tokens = sequences // group * group * config["sequence_len"]
    if "cycles" not in config:
        batch = config["batch_tokens"]
        return [batch * step for step in range(round(epoch_tokens * config["num_epochs"] / batch) + 1)]
    tokens, last = [0], config["cycles"] - 1
    for cycle in range(config["cycles"]):
        is_middle = 2 * (last - abs(2 * cycle - last)) >= last
        batch = config["batch_tokens" if is_middle else "outer_batch_tokens"]
        epochs = config["cycle_epochs"]
        if cycle == 0:
            epochs = config.get("first_cycle_epochs") or epochs
        tokens += [tokens[-1] + batch * i for i in range(1, max(1, round(epochs * epoch_tokens / batch)) + 1)]
    return tokens


def check_batches(check: Check, run: Folder) -> str:
    """Every step takes the tokens of one batch."""
    sizes = {run.config["batch_tokens"], run.config.get("outer_batch_tokens", run.config["batch_tokens"])}
    for part in run.parts:
        tokens = [0, *(line["tokens"] for line in part.steps)]
        other = [i + 1 for i, (a, b) in enumerate(pairwise(tokens)) if b - a not in sizes]
        check.need(not other, f"{part.name} steps {other[:5]} have other tokens than a batch, {sizes}".strip())
    return f"each has {' or '.join(f'{size:,}' for size in sorted(sizes))} tokens"
