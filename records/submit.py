"""Makes a record from run folders, unless the referee refuses them.

    python records/submit.py runs/a runs/b runs/c --title "Meta-gradient" --by name,name --description change.md

Judges the runs as one submission, writes records/<track>/<number>-<title>/ (the code, and what each run wrote, without
weights), adds it to records/<track>/records.json, and prints the next step. All or nothing: a refused or interrupted
submission leaves nothing behind. Exit code: 0 made, 1 the referee refuses it, 2 the arguments are wrong.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shlex
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from records.judge.files import PER_RUN_SETTINGS, submitted_mb  # noqa: E402
from records.judge.findings import RECORDS, Judgement, Options  # noqa: E402
from records.judge.runs import Folder, open_folders, require  # noqa: E402
from records.judge.verdict import judge_folders, report, verdict  # noqa: E402
from records.leaderboard import table  # noqa: E402
from records.referee import add_options  # noqa: E402
from slowrun.data import read_json  # noqa: E402
from slowrun.folder import write_json  # noqa: E402

FILES = ("config.json", "result.json", "metrics.jsonl", "log.txt", "curve.png")  # of a run
CHAIN_FILES = ("ledger.json", "metrics.jsonl", "log.txt", "curve.png")


def read_list(path: Path, other_data: bool) -> dict:
    """The track's list of records; a new one for other data that have none yet. ValueError if it is missing."""
    if not path.exists() and other_data:
        return {"source": "runs on other data", "records": []}
    require(path.exists(), f"{path} not found: --records-dir names the folder with the lists")
    return read_json(path, {"source", "records"}, "take it from the repository again")


def slug(title: str) -> str:
    """The title as part of a folder's name."""
    words = "-".join(re.findall(r"[a-z0-9]+", title.lower()))[:48].strip("-")
    require(words, f"--title {title!r} has no letter or digit")
    return words


def settings_flags(run: Folder) -> str:
    """The flags that repeat a run's overrides; none for a record, whose settings are its script's defaults."""
    flags = []
    for name, value in run.saved["overrides"].items():
        flag = name.replace("_", "-")
        if name not in PER_RUN_SETTINGS:
            flags.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag}={value}")
    return "".join(f" {shlex.quote(flag)}" for flag in flags)


def readme(entry: dict, runs: list[Folder], description: str, finding: str, records_dir: Path) -> str:
    """The README.md of a submitted folder."""
    results = [run.result for run in runs]
    head = ["seed", "val_loss", "best", "holdout", "minutes", "run"]
    rows = []
    for r in results:
        holdout = "" if r["holdout_loss"] is None else f"{r['holdout_loss']:.4f}"
        losses = f"{r['val_loss']:.4f}", f"{r['best_val_loss']:.4f}", holdout
        rows.append([str(r["seed"]), *losses, f"{r['train_time_s'] / 60:.1f}", r["run_id"]])
    versions = sorted({f"torch {r['torch']}, CUDA {r['cuda']}" for r in results})
    track, by = runs[0].track, ", ".join(entry["contributors"]) or "unnamed"
    data = "the official files" if runs[0].official else f"not the official files, val {entry['data_sha256'][:12]}"
    processes = f"torchrun --standalone --nproc_per_node={min(8, results[0]['world_size'])}"
    where, flags, other = f"records/{track}/{entry['folder']}", settings_flags(runs[0]), ""
    if not runs[0].official:
        where, other = f"{records_dir}/{track}/{entry['folder']}", f" --other-data --records-dir {records_dir}"
        flags += f" --data-dir {shlex.quote(runs[0].config['data_dir'])}"
    parts = [
        f"# {entry['change']}",
        f"Track {track}, number {entry['number']}, by {by}, {entry['date']}.",
        description.strip(),
        table(head, rows).strip(),
        f"Significance: {finding}.",
        f"On {entry['hardware']}; {'; '.join(versions)}; data: {data}.",
        f"Run it again:\n\n```sh\n{processes} {where}/code/train.py --seed 42{flags}\n```",
        f"Check this folder: `python records/referee.py {where}{other}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def pack(path: Path) -> None:
    """Replace a file with its .gz, whose bytes depend on the content alone."""
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()


def copy_code(code: Path, target: Path) -> None:
    """Copy the script and its slowrun/ as they ran."""
    for folder in (code, code / "slowrun"):
        copied = target / folder.relative_to(code)
        copied.mkdir(parents=True)
        for file in folder.glob("*.py"):
            shutil.copyfile(file, copied / file.name)


def copy_run(run: Folder, folder: Path) -> None:
    """Copy what a run wrote, without weights; the metrics of chains are packed."""
    parts = [(run.path, folder, FILES)]
    if run.track == "unlimited":
        parts += [(part.path, folder / "chains" / part.name, CHAIN_FILES) for part in run.parts]
    for source, target, names in parts:
        target.mkdir(parents=True)
        for name in names:
            if name != "curve.png" or (source / name).exists():  # a full disk leaves a run without it
                shutil.copyfile(source / name, target / name)
        if names is CHAIN_FILES:
            pack(target / "metrics.jsonl")


def shrink(folder: Path) -> None:
    """Bring a folder under its size limit: pack the metrics, then drop the curves, which can be drawn from them."""

    def too_large() -> bool:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return size > submitted_mb(folder) * 1e6

    for pattern, change in (("metrics.jsonl", pack), ("curve.png", Path.unlink)):
        if too_large():
            for path in list(folder.rglob(pattern)):
                change(path)


def make_entry(runs: list[Folder], number: int, folder: str, title: str, by: str) -> dict:
    """The entry of records.json."""
    results = [run.result for run in runs]
    return {
        "number": number,
        "kind": "verified",
        "val_loss": mean(r["val_loss"] for r in results),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "minutes": round(mean(r["train_time_s"] for r in results) / 60, 2),
        "time_is_approximate": False,
        "hardware": f"{results[0]['world_size']} x {results[0]['device']}",
        "change": title,
        "contributors": [name.strip() for name in by.split(",") if name.strip()],
        "folder": folder,
        "seeds": [r["seed"] for r in results],
        "losses": [r["val_loss"] for r in results],
        "holdout_losses": [r["holdout_loss"] for r in results],
        "data_sha256": results[0]["data_sha256"]["val"],
    }


def write_record(entry: dict, runs: list[Folder], text: str, path: Path, listed: dict, options: Options) -> Judgement:
    """Make the folder and list it -> the referee's judgement of it. If anything fails, nothing is left behind."""
    with tempfile.TemporaryDirectory(prefix=".submission-", dir=path.parent) as temporary:
        folder, final = Path(temporary) / entry["folder"], path.parent / entry["folder"]
        copy_code(runs[0].code, folder / "code")
        for run in runs:
            copy_run(run, folder / f"seed-{run.config['seed']}")
        (folder / "README.md").write_text(text)
        shrink(folder)
        judgement = judge_folders([folder], options)
        if not report(judgement)["ok"]:
            return judgement
        require(not final.exists(), f"{final} exists, but {path} does not list it: move it away")
        folder.rename(final)
        try:
            write_json(path, listed | {"records": [*listed["records"], entry]})
        except BaseException:
            shutil.rmtree(final)
            raise
    return judgement


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR", help="a run folder for each seed")
    parser.add_argument("--title", required=True, help="what is new, in a few words")
    parser.add_argument("--by", default="", metavar="NAME,NAME", help="contributors")
    parser.add_argument("--description", type=Path, metavar="FILE", help="Markdown text for the README")
    add_options(parser)
    return parser.parse_args(argv)


def submit(arguments: argparse.Namespace) -> int:
    """Judge the runs and make the record unless it is refused -> the exit code. ValueError if they cannot be judged."""
    options = {name: getattr(arguments, name) for name in ("data", "other_data", "device", "time_limit_min")}
    options = Options(**options, records_dir=arguments.records_dir, submission=True, say=partial(print, flush=True))
    elsewhere = arguments.records_dir.resolve() != RECORDS
    text = "--other-data needs a --records-dir of its own: the repository lists results on FineWeb only"
    require(elsewhere or not arguments.other_data, text)
    description = arguments.description.read_text() if arguments.description else ""
    runs, submitted = open_folders(arguments.folders)
    require(submitted is None, f"{submitted} is a submitted record already: name run folders")
    path = arguments.records_dir / runs[0].track / "records.json"
    listed = read_list(path, arguments.other_data)
    number = 1 + max((entry["number"] for entry in listed["records"]), default=0)
    folder = path.parent / f"{number:02d}-{slug(arguments.title)}"
    print("The runs:", flush=True)
    judgement = judge_folders(arguments.folders, options)
    if report(judgement)["ok"]:
        print(f"\nThe folder that is to be {folder}:", flush=True)
        runs.sort(key=lambda run: run.config["seed"])
        entry = make_entry(runs, number, folder.name, arguments.title, arguments.by)
        significance = next(f.text for f in judgement.findings[::-1] if f.check == "significance")
        text = readme(entry, runs, description, significance, arguments.records_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        judgement = write_record(entry, runs, text, path, listed, options)
    if not report(judgement)["ok"]:
        print(f"verdict: {verdict(judgement)}; nothing was written")
        return 1
    print(f"\n{folder} made: val_loss {entry['val_loss']:.5f}, number {entry['number']} of {path}")
    if arguments.other_data:
        print("It is no record of the benchmark, as the data are others. Its README.md says how to run and check it.")
    else:
        print(f"next: python records/leaderboard.py; commit {folder}, {path} and the tables, and open a pull request")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 made, 1 the referee refuses it, 2 refused."""
    try:
        return submit(parse_arguments(argv))
    except (ValueError, OSError, KeyError) as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
