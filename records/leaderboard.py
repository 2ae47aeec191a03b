"""Makes the tables and charts of the records from their files.

    python records/leaderboard.py             # writes records/README.md, README.md and records/charts/ anew
    python records/leaderboard.py --check     # writes nothing; exit code 1, with a line for each thing to mend

Read are records/<track>/records.json, the settings files records/<track>/NN-*.json, the folders of verified records
records/<track>/NN-slug/, and records/skeptical/*.json. Written is what stands between the markers
<!-- leaderboard: NAME --> and <!-- /leaderboard -->, and each chart whose data or drawing code are others than its own.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from records import draw
from records.judge.runs import require
from records.judge.submission import FIRST_SEED
from slowrun.config import settings_files
from slowrun.data import read_json
from slowrun.folder import write_atomically
from slowrun.rules import OFFICIAL_SHA256, RULES
from slowrun.scoring import data_efficiency

ROOT = Path(__file__).resolve().parent.parent
TRACKS = tuple(RULES)
COMMAND = "python records/leaderboard.py"
LABEL = 30  # characters of a record's name in the charts
BLOCK = re.compile(r"(<!-- leaderboard: (\w+) -->\n)(.*?)(<!-- /leaderboard -->)", re.DOTALL)

# ======================================================================================================================
# What the files must hold
# ======================================================================================================================


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_text(value) -> bool:
    return isinstance(value, str) and value.strip() == value != "" and len(value.splitlines()) == 1


def is_date(value) -> bool:
    try:
        return isinstance(value, str) and date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


def is_list_of(check, value) -> bool:
    return isinstance(value, list) and all(map(check, value))


def is_name(value) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9-]{1,39}", value) is not None


def is_measured(value) -> bool:
    """What was run, and its losses, a number a seed."""
    known = isinstance(value, dict) and value.keys() == {"what", "losses"} and is_text(value["what"])
    return known and bool(value["losses"]) and is_list_of(is_number, value["losses"])


def is_seeds(value) -> bool:
    return isinstance(value, list) and value == [FIRST_SEED + i for i in range(len(value))] != []


def is_holdout(value) -> bool:
    return is_list_of(lambda loss: loss is None or is_number(loss), value)


TEXT = (is_text, "a line of text")
CHECKS = {  # a field -> what it must satisfy, in code and in words
    "number": (lambda value: type(value) is int and value > 0, "a whole number from 1 on"),
    "val_loss": (is_number, "a finite number"),
    "date": (is_date, "a date such as 2026-09-05"),
    "minutes": (lambda value: is_number(value) and value > 0, "a number above 0"),
    "time_is_approximate": (lambda value: isinstance(value, bool), "true or false"),
    "contributors": (partial(is_list_of, is_name), "a list of GitHub user names"),
    "script": (lambda value: is_text(value) and re.fullmatch(r"https://\S+", value), "a URL that begins with https://"),
    "folder": (lambda value: is_text(value) and re.fullmatch(r"\d\d-[a-z0-9-]+", value), "a name such as 22-an-idea"),
    "seeds": (is_seeds, f"{FIRST_SEED}, {FIRST_SEED + 1}, ... without gaps"),
    "losses": (partial(is_list_of, is_number), "a list of finite numbers"),
    "holdout_losses": (is_holdout, "a list of finite numbers, or of nulls for data without a holdout"),
    "data_sha256": (lambda value: value == OFFICIAL_SHA256["val"], "that of the official validation set"),
    "label": (lambda value: is_text(value) and len(value) <= LABEL, f"a line of at most {LABEL} characters"),
    "record": (lambda value: value is None or (type(value) is int and value > 0), "a record's number, or null"),
    "track": (lambda value: value in list(TRACKS), "one of " + ", ".join(TRACKS)),
    "baseline": (is_measured, 'an object of "what" and "losses"'),
    "found": (is_measured, 'an object of "what" and "losses"'),
    "link": (lambda value: value is None or is_text(value), "a URL, a path from the repository's root, or null"),
} | dict.fromkeys(("kind", "hardware", "change", "title", "scale", "conclusion"), TEXT)
BOTH = ("number", "kind", "val_loss", "date", "minutes", "time_is_approximate", "hardware", "change", "contributors")
ENTRIES = {  # kind -> the fields of an entry of records.json
    "published": {*BOTH, "script", "label"},
    "verified": {*BOTH, "folder", "seeds", "losses", "holdout_losses", "data_sha256"},
}
OPTIONAL = {"verified": {"label"}}  # without this name in the charts they have the beginning of the change
RESULT = {"kind", "track", "record", "title", "date", "contributors", "hardware", "scale", "baseline", "found"}
RESULTS = dict.fromkeys(("rerun", "negative"), RESULT | {"conclusion", "link"})  # kind -> fields in records/skeptical


def field_problems(entry, kinds: dict[str, set[str]]) -> Iterator[str]:
    """What is wrong with the fields of one object, which are those of its kind."""
    if not isinstance(entry, dict) or entry.get("kind") not in list(kinds):
        known = " or ".join(f'"{kind}"' for kind in kinds)
        yield f"the kind is {entry.get('kind') if isinstance(entry, dict) else entry!r}, not {known}"
        return
    needed, optional = kinds[entry["kind"]], OPTIONAL.get(entry["kind"], set())
    yield from (f'the field "{name}" is missing' for name in sorted(needed - entry.keys()))
    yield from (f'the field "{name}" is unknown' for name in sorted(entry.keys() - needed - optional))
    for name, (holds, meaning) in CHECKS.items():
        if name in entry and not holds(entry[name]):
            yield f'"{name}" is {entry[name]!r}, not {meaning}'


def number_problems(entries: list[dict]) -> Iterator[str]:
    """Numbers rise from 1 without gaps, and losses fall."""
    numbers = [entry["number"] for entry in entries]
    yield from (f"record {number} stands there {n} times" for number, n in Counter(numbers).items() if n > 1)
    for place, number in enumerate(numbers, 1):
        if number != place:
            yield f"record {number} stands at place {place}: numbers go 1, 2, 3, ... without gaps"
            return
    for before, entry in pairwise(entries):
        if not entry["val_loss"] < before["val_loss"]:
            losses = f"{entry['val_loss']} is not below {before['val_loss']}"
            yield f"record {entry['number']}: its loss {losses}, that of the record before"


def verified_problems(folder: Path, entry: dict) -> Iterator[str]:
    """A verified entry says what its folder holds: one run a seed, whose losses have the entry's mean."""
    if not folder.is_dir():
        yield f"its folder {entry['folder']}/ is missing: python records/submit.py makes it"
        return
    if folder.parent.name != "unlimited" and not re.fullmatch("8 x .*H100.*", entry["hardware"]):
        yield f'"hardware" is {entry["hardware"]!r}, but records of this track are made on 8 H100'
    if not entry["folder"].startswith(f"{entry['number']:02d}-"):
        yield f"its folder {entry['folder']}/ is not named {entry['number']:02d}-..."
    results = []
    for seed in entry["seeds"]:
        path = folder / f"seed-{seed}" / "result.json"
        if not path.exists():
            yield f"{entry['folder']}/seed-{seed}/result.json is missing"
            return
        results.append(read_json(path, {"val_loss", "holdout_loss"}, "copy it from the run folder again"))
    for field, said in (("losses", "val_loss"), ("holdout_losses", "holdout_loss")):
        found = [result[said] for result in results]
        if entry[field] != found:
            yield f'"{field}" is {entry[field]}, but the {said} of its runs are {found}'
    mean = fmean(result["val_loss"] for result in results)
    if not abs(mean - entry["val_loss"]) <= 1e-9:
        yield f'"val_loss" is {entry["val_loss"]}, but its runs average to {mean}'


def history_problems(folder: Path, entries: list) -> Iterator[str]:
    """What is wrong with a track's records.json and with the files beside it."""
    malformed = [
        f"entry {place}: {problem}"
        for place, entry in enumerate(entries, 1)
        for problem in field_problems(entry, ENTRIES)
    ]
    if malformed:
        yield from malformed
        return
    yield from number_problems(entries)
    verified = [entry for entry in entries if entry["kind"] == "verified"]
    for entry in verified:
        where = f"record {entry['number']}"
        yield from (f"{where}: {problem}" for problem in verified_problems(folder / entry["folder"], entry))
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in [entry["folder"] for entry in verified]:
            yield f"no entry has the folder {path.name}/: python records/submit.py makes both"
    numbers = Counter(int(path.name[:2]) for path in folder.glob("[0-9][0-9]-*.json"))
    for number, n in numbers.items():
        if n > 1 or number not in [entry["number"] for entry in entries]:
            yield f"there are {n} settings files {number:02d}-*.json for record {number}, or there is no such record"


# ======================================================================================================================
# Reading
# ======================================================================================================================


def read_histories(root: Path) -> dict[str, list[dict]]:
    """Track -> the entries of its records.json; ValueError with a line for each problem."""
    histories, problems = {}, []
    for track in TRACKS:
        path = Path("records") / track / "records.json"
        require((root / path).exists(), f"{path} not found: git checkout {path}")
        histories[track] = read_json(root / path, {"source", "records"}, f"git checkout {path}")["records"]
        require(isinstance(histories[track], list) and histories[track], f'{path}: "records" is not a list of records')
        problems += [f"{path}: {problem}" for problem in history_problems((root / path).parent, histories[track])]
    require(not problems, "\n".join(problems))
    return histories


def result_problems(root: Path, path: Path, result: dict, histories: dict[str, list[dict]]) -> Iterator[str]:
    """What is wrong with a rerun or a negative result whose fields are right by themselves."""
    track, number, link = result["track"], result["record"], result["link"]
    if link and not link.startswith("https://") and not (root / link.split("#")[0]).exists():
        yield f'"link" is {link!r}: there is no such path in the repository'
    if number is not None and number > len(histories[track]):
        yield f'"record" is {number}, but the {track} track has {len(histories[track])}'
    if path.name == "TEMPLATE.json":
        return
    if number is None and result["kind"] == "rerun":
        yield '"record" is null: a rerun is of a record, name its number'
    if not path.name.startswith(result["date"] + "-"):
        yield f"its name does not begin with its date, {result['date']}-"
    template = json.loads((path.parent / "TEMPLATE.json").read_text())
    left = [name for name in ("title", "conclusion", "baseline", "found") if result[name] == template[name]]
    yield from (f'"{name}" is still that of TEMPLATE.json: fill it in' for name in left)


def read_results(root: Path, histories: dict[str, list[dict]]) -> list[dict]:
    """The reruns and negative results, by date; ValueError with a line for each problem."""
    folder = root / "records" / "skeptical"
    template = folder / "TEMPLATE.json"
    require(template.exists(), "records/skeptical/TEMPLATE.json not found: git checkout records/skeptical")
    results, problems = [], []
    for path in sorted(folder.glob("*.json")):
        result = read_json(path, set(), "correct it by TEMPLATE.json beside it")
        found = list(field_problems(result, RESULTS)) or list(result_problems(root, path, result, histories))
        problems += [f"records/skeptical/{path.name}: {problem}" for problem in found]
        if path != template:
            results.append(result)
    require(not problems, "\n".join(problems))
    return sorted(results, key=lambda result: result["date"])


# ======================================================================================================================
# Tables
# ======================================================================================================================


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def people(names: list[str]) -> str:
    return ", ".join(f"[{name}](https://github.com/{name})" for name in names)


def times(loss: float) -> str:
    value = data_efficiency(loss)
    return value if isinstance(value, str) else f"{value:.2f}x"


def duration(track: str, entry: dict) -> str:
    """Minutes, on the unlimited track hours; ~ if approximate."""
    value = entry["minutes"] / 60 if track == "unlimited" else entry["minutes"]
    return f"{'~' if entry['time_is_approximate'] else ''}{value:.1f}"


def loss_text(entry: dict) -> str:
    return f"{entry['val_loss']:.{3 if entry['kind'] == 'published' else 4}f}"


def kind_text(entry: dict) -> str:
    return "published" if entry["kind"] == "published" else f"verified here, {len(entry['seeds'])} seeds"


def track_block(root: Path, track: str, entries: list[dict]) -> str:
    """A track's charts and its table, for records/README.md."""
    settings = settings_files(root / "records" / track)
    of_unlimited = track == "unlimited"
    rows = []
    for entry in entries:
        number, path = entry["number"], settings.get(entry["number"])
        source = entry["script"] if entry["kind"] == "published" else f"{track}/{entry['folder']}"
        row = [
            f"[{number}]({source})",
            loss_text(entry),
            times(entry["val_loss"]),
            duration(track, entry),
            *([cell(entry["hardware"])] if of_unlimited else []),
            entry["date"],
            cell(entry["change"]),
            people(entry["contributors"]),
            kind_text(entry),
            f"[settings]({track}/{path.name}), `--record {number}`" if path else "",
        ]
        rows.append(row)
    titles = ["#", "loss", "data efficiency", *(["hours", "hardware"] if of_unlimited else ["min"])]
    full = table([*titles, "date", "change", "by", "kind", "run it"], rows)
    progress, gains = (f"![{track}: {what}](charts/{name}-{track}.svg)\n" for name, what in TRACK_CHARTS.items())
    return f"{progress}\n{full}\n{gains}"


def measured(result: dict, which: str) -> str:
    losses = result[which]["losses"]
    return f"{cell(result[which]['what'])}: {fmean(losses):.4f} (n = {len(losses)})"


def skeptical_block(results: list[dict]) -> str:
    """Reruns that did not confirm a record and negative results, track by track."""
    parts = []
    for track in TRACKS:
        for kind, title in (("rerun", "reruns"), ("negative", "negative results")):
            rows = [
                [
                    cell(result["title"]) if result["link"] is None else f"[{cell(result['title'])}]({linked(result)})",
                    str(result["record"] or ""),
                    cell(result["scale"]),
                    cell(result["hardware"]),
                    measured(result, "baseline"),
                    measured(result, "found"),
                    cell(result["conclusion"]),
                    result["date"],
                    people(result["contributors"]),
                ]
                for result in results
                if (result["track"], result["kind"]) == (track, kind)
            ]
            titles = ["what", "record", "scale", "hardware", "against", "found", "conclusion", "date", "by"]
            parts.append(f"**{track}, {title}**" + (f"\n\n{table(titles, rows)}" if rows else ": none yet\n"))
    return "\n".join(parts)


def linked(result: dict) -> str:
    return result["link"] if result["link"].startswith("https://") else f"../{result['link']}"


def tracks_block(histories: dict[str, list[dict]]) -> str:
    """The short table of tracks, for the top-level README."""
    rows = []
    for track, entries in histories.items():
        best = entries[-1]
        hardware = (
            best["hardware"]
            .removeprefix("1 node, ")
            .replace("nodes, ", "nodes of ")
            .replace("8xH", "8\N{MULTIPLICATION SIGN}H")
        )
        time = f"{duration(track, best).removesuffix('.0')} {'h' if track == 'unlimited' else 'min'}"
        script = "[train.py](train.py), [model.py](model.py)"
        if track != "limited":
            script = f"[{track}/train.py]({track}/train.py), [about it]({track}/README.md)"
        row = [track, script, f"{cap(track):g} min" if cap(track) else "none"]
        row += [f"{loss_text(best)} in {time} on {cell(hardware)}, {kind_text(best)}", times(best["val_loss"])]
        rows.append([*row, f"[{len(entries)}](records/README.md#{track})"])
    return table(["track", "script", "time cap", "best record", "data efficiency", "records"], rows)


def cap(track: str) -> float:
    """Minutes; 0 for none."""
    return RULES[track].cap_min


def replace_blocks(path: Path, text: str, blocks: dict[str, str]) -> str:
    """Put the blocks between their markers; ValueError if a marker is missing, twice there or of no block."""
    found = Counter(name for _, name, _, _ in BLOCK.findall(text))
    for name in blocks:
        lines = f"<!-- leaderboard: {name} --> and <!-- /leaderboard -->"
        require(found[name] == 1, f"{path} has the markers {lines} {found[name]} times, not once: put them in by hand")
    unknown = ", ".join(found.keys() - blocks.keys())
    require(not unknown, f"{path} has markers of no table: {unknown}. Take them out by hand")
    return BLOCK.sub(lambda match: f"{match[1]}\n{blocks[match[2]]}\n{match[4]}", text)


# ======================================================================================================================
# Charts
# ======================================================================================================================

TRACK_CHARTS = {"progress": "the losses of the records by date", "contributions": "what each record brought"}


def make_charts(histories: dict[str, list[dict]]) -> dict[str, partial]:
    """The file name of each chart -> what draws it on a figure."""
    points = {
        track: [
            {
                "number": entry["number"],
                "date": entry["date"],
                "loss": entry["val_loss"],
                "minutes": entry["minutes"],
                "label": entry.get("label", entry["change"][:LABEL]),
                "verified": entry["kind"] == "verified",
                "efficiency": data_efficiency(entry["val_loss"]),
            }
            for entry in entries
        ]
        for track, entries in histories.items()
    }
    charts = {"efficiency.svg": partial(draw.efficiency, histories=points)}
    charts["training-time.svg"] = partial(draw.training_time, histories=points, caps={t: cap(t) for t in TRACKS})
    for track in TRACKS:
        charts[f"progress-{track}.svg"] = partial(draw.progress, track=track, points=points[track])
        charts[f"contributions-{track}.svg"] = partial(draw.contributions, track=track, points=points[track])
    return charts


def stale(folder: Path, charts: dict[str, partial]) -> dict[str, str]:
    """Charts to draw anew, or to take away -> why."""
    reasons = {path.name: "is not a chart of this page" for path in folder.glob("*") if path.name not in charts}
    for name, chart in charts.items():
        path = folder / name
        if not path.exists():
            reasons[name] = "is missing"
        elif draw.digest(chart) not in path.read_text():
            reasons[name] = "was drawn from other data, or by other code"
    return reasons


# ======================================================================================================================
# The command
# ======================================================================================================================


def make_pages(root: Path, histories: dict[str, list[dict]], results: list[dict]) -> dict[Path, tuple[str, str]]:
    """Each page with tables -> (its text, its text with the tables of today)."""
    full = {track: track_block(root, track, entries) for track, entries in histories.items()}
    blocks = {
        Path("records/README.md"): full | {"skeptical": skeptical_block(results)},
        Path("README.md"): {"tracks": tracks_block(histories)},
    }
    for path in blocks:
        require((root / path).exists(), f"{path} not found: git checkout {path}")
    texts = {path: (root / path).read_text() for path in blocks}
    return {path: (text, replace_blocks(path, text, blocks[path])) for path, text in texts.items()}


def problems(root: Path) -> list[str]:
    """A line for each thing that is malformed or out of date, and what mends it. Writes nothing."""
    try:
        histories = read_histories(root)
        results = read_results(root, histories)
        pages = make_pages(root, histories, results)
    except ValueError as error:
        return str(error).splitlines()
    found = []
    for path, (old, new) in pages.items():
        blocks = zip(BLOCK.findall(old), BLOCK.findall(new), strict=True)
        changed = [name for (_, name, text, _), (_, _, wanted, _) in blocks if text != wanted]
        found += [f'{path}: "{name}" is not what the records\' files say: {COMMAND}' for name in changed]
    charts = stale(root / "records" / "charts", make_charts(histories))
    return found + [f"records/charts/{name} {reason}: {COMMAND}" for name, reason in charts.items()]


def update(root: Path) -> list[str]:
    """Write what is out of date -> what was written; ValueError with a line for each thing that is malformed."""
    histories = read_histories(root)
    results = read_results(root, histories)
    written, folder, charts = [], root / "records" / "charts", make_charts(histories)
    for path, (old, new) in make_pages(root, histories, results).items():
        if old != new:
            write_atomically(root / path, lambda temporary, new=new: temporary.write_text(new))
            written.append(str(path))
    folder.mkdir(exist_ok=True)
    for name in stale(folder, charts):
        if name in charts:
            draw.save(charts[name], folder / name)
        else:
            (folder / name).unlink()
        written.append(f"records/charts/{name}")
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, say what is out of date")
    if parser.parse_args(argv).check:
        found = problems(ROOT)
        print("\n".join(found) or "the records' tables and charts are up to date")
        return 1 if found else 0
    try:
        written = update(ROOT)
    except ValueError as error:
        for line in str(error).splitlines():
            print(f"leaderboard.py: error: {line}", file=sys.stderr)
        return 2
    print("\n".join(f"wrote {path}" for path in written) or "nothing to write: all is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
