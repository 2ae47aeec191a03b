"""Judges runs: whether their claims are true and the rules of the benchmark are kept.

    python records/referee.py runs/a runs/b runs/c          # as one submission; --data defaults to the config's
    python records/referee.py runs/demo --other-data        # data other than FineWeb: sound or not, but no record
    python records/referee.py records/limited/22-slug       # a submitted folder, which has no weights: the static part

Prints a line per check and run, PASS, FAIL with the reason, or NOTE, and then a verdict. Exit code: 0 nothing fails,
1 something fails, 2 the arguments are wrong. It takes no claim of a run on trust that it can check. For data, scores
and rules it uses the slowrun/ of this repository; the slowrun/ in a run's code/ must be a version of it that
records/instruments.json lists.

records/judge/ has the checks. The run's code is executed by records/judge/worker.py, in a process of its own with a
time limit. That contains crashes and hangs, but it is NOT a sandbox against malice: judge code that you have not read
on a machine that you can afford to lose, or with --static, which needs no weights and no data and executes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from records.judge.findings import RECORDS, Options
from records.judge.verdict import judge_folders, report
from slowrun.folder import write_json


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that records/submit.py has too."""
    data = "folder with the data [the one that the run's config names]"
    parser.add_argument("--data", metavar="DIR", help=data)
    parser.add_argument("--other-data", action="store_true", help="accept data that are not the official files")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where members predict")
    parser.add_argument("--time-limit-min", type=float, default=60.0, help="minutes for scoring a run [60]")
    lists = "folder with <track>/records.json [records/]"
    parser.add_argument("--records-dir", type=Path, default=RECORDS, metavar="DIR", help=lists)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR", help="run folders, or a submitted record")
    add_options(parser)
    parser.add_argument("--static", action="store_true", help="only what needs no weights, no data and no execution")
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="-", help="write the findings as JSON [instead of the lines]"
    )
    parser.add_argument(
        "--probe-seed", type=int, default=argparse.SUPPRESS, help="repeats the probes of an earlier judgement"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 nothing fails, 1 something fails, 2 refused."""
    arguments = vars(parse_arguments(argv))
    folders, json_to = arguments.pop("folders"), arguments.pop("json")
    if json_to != "-":
        arguments["say"] = partial(print, flush=True)
    try:
        found = report(judge_folders(folders, Options(**arguments)))
        if json_to == "-":
            print(json.dumps(found, indent=1))
        else:
            print(f"verdict: {found['verdict']}")
            if json_to:
                write_json(Path(json_to), found)
    except (ValueError, OSError) as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        return 2
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
