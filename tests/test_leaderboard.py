"""The published history, the tables and charts made from it, and what the check finds on a damaged copy."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from matplotlib.text import Text

from records import draw, leaderboard
from slowrun.folder import write_json
from slowrun.rules import OFFICIAL_SHA256

HISTORIES = leaderboard.read_histories(ROOT)
COUNTS = {"limited": 21, "tiny": 15, "two_hour": 6, "unlimited": 12}
ENDS = {"limited": (3.402, 3.183), "tiny": (3.428, 3.295), "two_hour": (3.203, 3.139), "unlimited": (3.402, 2.987)}


@pytest.fixture
def root(tmp_path) -> Path:
    """A copy of what the tables are made from, of published records only, and of the pages that have them."""
    for name in ("records", "tiny"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    for track, entries in HISTORIES.items():
        for entry in entries[COUNTS[track] :]:
            shutil.rmtree(tmp_path / "records" / track / entry["folder"])
        path = tmp_path / "records" / track / "records.json"
        change_json(path, lambda content, n=COUNTS[track]: content.update(records=content["records"][:n]))
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def change_json(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    write_json(path, content)


# ======================================================================================================= the repository


def test_the_repository_is_up_to_date(capsys):
    assert leaderboard.main(["--check"]) == 0
    assert capsys.readouterr().out == "the records' tables and charts are up to date\n"


@pytest.mark.parametrize("track", COUNTS)
def test_the_published_history(track):
    entries = [entry for entry in HISTORIES[track] if entry["kind"] == "published"]
    assert len(entries) == COUNTS[track] and entries == HISTORIES[track][: len(entries)]
    assert (entries[0]["val_loss"], entries[-1]["val_loss"]) == ENDS[track]
    assert [entry["date"] for entry in entries] == sorted(entry["date"] for entry in entries)
    assert len({entry["label"] for entry in entries}) == len(entries)


def test_the_tables_have_every_record():
    text = (ROOT / "records/README.md").read_text()
    for track, entries in HISTORIES.items():
        section = text.split(f"\n## {track}\n")[1].split("\n## ")[0]
        rows = re.findall(
            r"^\| \[(\d+)\]\((\S+)\) \| ([\d.]+) \|.*\| (\d{4}-\d\d-\d\d) \| (.*?) \|", section, re.MULTILINE
        )
        assert [int(row[0]) for row in rows] == list(range(1, len(entries) + 1))
        for entry, (_, script, loss, date, said) in zip(entries, rows, strict=True):
            assert (entry["date"], entry["change"]) == (date, said)
            assert float(loss) == pytest.approx(entry["val_loss"], abs=6e-5)
            assert script in (entry.get("script"), f"{track}/{entry.get('folder')}")


def test_the_techniques_agree_with_the_history():
    """The last column of the table of techniques: the numbers of records, and the loss of the last of them."""
    section = (ROOT / "README.md").read_text().split("\n## Techniques\n")[1].split("\n## ")[0]
    losses = {entry["number"]: entry["val_loss"] for entry in HISTORIES["limited"]}
    found = re.findall(r"\| ([\d, ]+) \(([\d.]+)\) \|$", section, re.MULTILINE)
    assert len(found) > 15
    for numbers, loss in found:
        assert losses[int(numbers.split(", ")[-1])] == float(loss)


def test_a_negative_result_is_what_was_measured():
    (fp8,) = [result for result in leaderboard.read_results(ROOT, HISTORIES) if "fp8" in result["title"]]
    text, numbers = (ROOT / "tiny/README.md").read_text(), re.findall(r"2\.\d{3}", fp8["conclusion"])
    assert f"readout {fp8['found']['losses'][0]} against {fp8['baseline']['losses'][0]:.4f}, one seed" in text
    assert len(numbers) == 4 and all(number in text for number in numbers)
    assert "one seed" in fp8["scale"] and fp8["scale"].split(",")[0].startswith("toy: 311")


def test_the_significance_rule_in_numbers():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    runs, gains = (
        [float(value) for value in re.search(rf"^\| {title} \| (.*) \|$", text, re.MULTILINE)[1].split(" | ")]
        for title in ("runs", "nats below the record")
    )
    assert gains == [math.ceil(0.0047 / math.sqrt(n) * 1e4 - 1e-9) / 1e4 for n in runs]
    losses = [float(loss) for loss in re.search(r"three runs end at (\S+), (\S+) and (\S+)\. Their", text).groups()]
    mean = sum(losses) / 3
    assert f"mean is {mean:.5f}, which is {3.183 - mean:.5f} lower" in text
    assert (3.183 - mean) * math.sqrt(3) == pytest.approx(0.00479, abs=5e-6) and "this is 0.00479" in text
    assert f"run alone, {3.183 - losses[1]:.4f} lower, would not" in text and 3.183 - losses[1] < 0.0047


# =============================================================================================================== damage

LIMITED, TINY, PAGE = "records/limited/records.json", "records/tiny/records.json", "records/README.md"
FP8 = "records/skeptical/2026-11-22-fp8-head-at-toy-size.json"
EDITED = {  # what is done to a file's text -> what the check says
    (PAGE, "3.276 |", "3.275 |"): '"limited" is not what the records\' files say: python records/leaderboard.py',
    (PAGE, "<!-- leaderboard: tiny -->", ""): "README.md has the markers <!-- leaderboard: tiny --> and <!-- /leaderb",
    (
        PAGE,
        "leaderboard: two_hour",
        "leaderboard: three_hour",
    ): "two_hour --> and <!-- /leaderboard --> 0 times",
    ("README.md", "| 3.183 in", "| 3.182 in"): 'README.md: "tracks" is not what the records\' files say',
    (PAGE, "## tiny", "<!-- leaderboard: a -->\n<!-- /leaderboard -->\n"): "README.md has markers of no table: a. Take",
    (PAGE, "## tiny", "<!-- leaderboard: tiny -->\n<!-- /leaderboard -->\n"): "<!-- /leaderboard --> 2 times, not once",
    (TINY, "3.353", "3.354"): f'{PAGE}: "tiny" is not',
    (TINY, "3.353", "NaN"): 'records/tiny/records.json: entry 8: "val_loss" is nan, not a finite number',
    (TINY, "3.353", "3.365"): "record 8: its loss 3.365 is not below 3.365, that of the record before",
    (TINY, '"number": 8', '"number": 7'): "record 7 stands there 2 times",
    (TINY, '"number": 8', '"number": 80'): "record 80 stands at place 8: numbers go 1, 2, 3, ... without gaps",
    (TINY, '"kind": "published"', '"kind": "rumoured"'): "entry 1: the kind is 'rumoured', not",
    (TINY, '"date": "2026-03-18"', '"day": "2026-03-18"'): 'entry 8: the field "date" is missing',
    (TINY, '"date": "2026-03-18"', '"date": "18.3."'): "entry 8: \"date\" is '18.3.', not a date such as",
    (TINY, '"label": "EMA of weights"', '"labell": ""'): 'entry 8: the field "labell" is unknown',
    (TINY, "EMA of weights", "much too long a name for a chart"): "not a line of at most 30 characters",
    (TINY, '"script": "https', '"script": "http'): 'entry 1: "script" is \'http:',
    (TINY, '"clarkkev"', '"a b"'): "entry 8: \"contributors\" is ['a b'], not a list of GitHub user names",
    (TINY, '"records": [', '"records": {'): "records.json is damaged",
    (TINY, "EMA of weights", "average of weights"): "progress-tiny.svg was drawn from other data, or by other code",
    (FP8, "1.6327", "Infinity"): '"found" is',
    (FP8, "tiny/README.md#", "tiny/NOTES.md#"): "'tiny/NOTES.md#measured-here': there is no such path",
    (FP8, '"record": 13', '"record": 99'): '"record" is 99, but the tiny track has 15',
    (FP8, "2026-11-22", "2026-11-21"): "its name does not begin with its date, 2026-11-21-",
    (FP8, "lm_head in fp8 at toy size", "What was tried, or which record was run again, in a line"): "is still that of",
    ("records/skeptical/TEMPLATE.json", '"scale"', '"size"'): 'TEMPLATE.json: the field "scale" is missing',
}


@pytest.mark.parametrize("edit", EDITED, ids=range(len(EDITED)))
def test_an_edited_file_is_found(edit, root):
    name, old, new = edit
    change(root / name, old, new)
    found = leaderboard.problems(root)
    assert any(EDITED[edit] in problem for problem in found), found


def touch(name: str):
    return lambda root: (root / name).write_text("{}")


FILES = {  # what is done to the files -> what the check says
    "records/charts/efficiency.svg is missing": lambda root: (root / "records/charts/efficiency.svg").unlink(),
    "records/charts/old.svg is not a chart of this page": touch("records/charts/old.svg"),
    "2 settings files 07-*.json for record 7": lambda root: [touch(f"records/tiny/07-{x}.json")(root) for x in "ab"],
    "1 settings files 16-*.json for record 16, or there is no such": touch("records/tiny/16-later.json"),
    "no entry has the folder 16-later/": lambda root: (root / "records/tiny/16-later").mkdir(),
    "records/limited/records.json not found": lambda root: (root / LIMITED).unlink(),
    "records/README.md not found: git checkout": lambda root: (root / PAGE).unlink(),
    "a rerun is of a record, name its number": lambda root: change_json(
        root / FP8, lambda content: content.update(kind="rerun", record=None)
    ),
    "TEMPLATE.json not found": lambda root: (root / "records/skeptical/TEMPLATE.json").unlink(),
}


@pytest.mark.parametrize("said", FILES)
def test_a_wrong_file_is_found(said, root):
    for path in (root / "records/tiny").glob("07-*.json"):
        path.unlink()
    FILES[said](root)
    assert any(said in problem for problem in leaderboard.problems(root))


# ==================================================================================================== a verified record


@pytest.fixture
def verified(root) -> Path:
    """The copy with a verified record 22 on the limited track -> its folder."""
    losses, folder = [3.1712, 3.1695, 3.17], root / "records/limited/22-an-idea"
    entry = {
        "number": 22, "kind": "verified", "val_loss": sum(losses) / 3, "date": "2026-12-01", "minutes": 58.25,
        "time_is_approximate": False, "hardware": "8 x NVIDIA H100 80GB HBM3", "change": "An idea | with <b>tags",
        "contributors": ["somebody"], "folder": folder.name, "seeds": [42, 43, 44], "losses": losses,
        "holdout_losses": [3.2, 3.21, 3.22], "data_sha256": OFFICIAL_SHA256["val"],
    }  # fmt: skip
    for seed, loss, holdout in zip(entry["seeds"], losses, entry["holdout_losses"], strict=True):
        (folder / f"seed-{seed}").mkdir(parents=True)
        write_json(folder / f"seed-{seed}" / "result.json", {"val_loss": loss, "holdout_loss": holdout})
    change_json(root / LIMITED, lambda content: content["records"].append(entry))
    return folder


def test_a_verified_record_enters_the_tables(verified, root):
    charts = {"progress-limited.svg", "contributions-limited.svg", "efficiency.svg", "training-time.svg"}
    stale = {"records/README.md", "README.md"} | {f"records/charts/{name}" for name in charts}
    assert stale <= {problem.split(" ")[0].strip(":") for problem in leaderboard.problems(root)}
    assert stale <= set(leaderboard.update(root))
    row = "| [22](limited/22-an-idea) | 3.1702 | 6.77x | 58.2 | 2026-12-01 | An idea \\| with &lt;b>tags | "
    row += "[somebody](https://github.com/somebody) | verified here, 3 seeds | |"
    assert row in (root / PAGE).read_text()
    best = "| 3.1702 in 58.2 min on 8 x NVIDIA H100 80GB HBM3, verified here, 3 seeds |"
    assert best in (root / "README.md").read_text()


def other_loss(folder: Path) -> None:
    change(folder / "seed-43/result.json", "3.1695", "3.1696")


def edit_entry(**values):
    return lambda folder: change_json(
        folder.parent / "records.json", lambda content: content["records"][-1].update(values)
    )


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "record 22: its folder 22-an-idea/ is missing: python records/submit.py makes it"),
        (other_loss, "record 22: \"val_loss\" is 3.17023"),
        (other_loss, 'record 22: "losses" is [3.1712, 3.1695, 3.17], but the val_loss of its runs are [3.1712, 3.1696'),
        (edit_entry(holdout_losses=[3.2, 3.2, 3.2]), 'record 22: "holdout_losses" is'),
        (edit_entry(val_loss=3.17), "but its runs average to 3.1702"),
        (edit_entry(seeds=[42, 44]), 'entry 22: "seeds" is [42, 44], not 42, 43, ... without gaps'),
        (edit_entry(seeds=[42, 43, 44, 45]), "record 22: 22-an-idea/seed-45/result.json is missing"),
        (edit_entry(data_sha256="0" * 64), "not that of the official validation set"),
        (edit_entry(hardware="1 x CPU (x86_64)"), "but records of this track are made on 8 H100"),
        (lambda folder: folder.rename(folder.parent / "23-an-idea"), "record 22: its folder 22-an-idea/ is missing"),
        (lambda folder: (folder / "seed-42/result.json").write_text("{}"), "result.json is damaged (it lacks"),
        (edit_entry(holdout_losses=[None, None, None]), "but the holdout_loss of its runs are [3.2, 3.21, 3.22]"),
        (edit_entry(script="https://a"), 'entry 22: the field "script" is unknown'),
    ],
)  # fmt: skip
def test_a_verified_record_must_be_what_its_folder_holds(verified, root, damage, said):
    damage(verified)
    found = leaderboard.problems(root)
    assert any(said in problem for problem in found), found


# =============================================================================================================== charts


def test_the_digest_is_of_data_and_drawing_code(monkeypatch, tmp_path):
    charts, other = (leaderboard.make_charts(HISTORIES) for _ in range(2))
    digests = {name: draw.digest(chart) for name, chart in charts.items()}
    assert len(set(digests.values())) == len(charts) == 10
    other["progress-tiny.svg"].keywords["points"][3]["loss"] += 0.001
    same = [name for name, chart in other.items() if draw.digest(chart) == digests[name]]
    assert set(charts) - set(same) == {"progress-tiny.svg", "contributions-tiny.svg"} | {
        "efficiency.svg",
        "training-time.svg",
    }
    monkeypatch.setattr(draw, "__file__", tmp_path / "draw.py")
    (tmp_path / "draw.py").write_bytes(Path(leaderboard.__file__).with_name("draw.py").read_bytes() + b"\n")
    assert not {draw.digest(chart) for chart in charts.values()} & set(digests.values())


@pytest.mark.draws
def test_only_stale_charts_are_drawn_and_alike(root, monkeypatch, capsys):
    monkeypatch.setattr(leaderboard, "ROOT", root)
    names = ("contributions-two_hour.svg", "old.svg")
    path = root / "records/charts/contributions-two_hour.svg"
    path.write_text("")
    (root / "records/charts/old.svg").write_text("")
    assert leaderboard.main(["--check"]) == 1
    checked = capsys.readouterr().out
    assert leaderboard.main([]) == 0
    written = capsys.readouterr().out
    assert all(f"records/charts/{name} " in checked and f"wrote records/charts/{name}\n" in written for name in names)
    first = path.read_bytes()
    path.unlink()
    assert leaderboard.update(root) == ["records/charts/contributions-two_hour.svg"]
    assert path.read_bytes() == first and b"<svg" in first and leaderboard.problems(root) == []


def test_malformed_records_are_refused(root, monkeypatch, capsys):
    monkeypatch.setattr(leaderboard, "ROOT", root)
    change(root / TINY, '"minutes": 14.9', '"minutes": 0')
    change(root / TINY, '"kind": "published"', '"kind": 3')
    assert leaderboard.main([]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("leaderboard.py: error: records/tiny/records.json: entry 1: the kind is 3, not")
    assert len(errors) == 2 and errors[1].endswith('entry 8: "minutes" is 0, not a number above 0')


def with_a_verified_one(histories: dict) -> dict:
    verified = HISTORIES["limited"][-1] | {"number": 22, "kind": "verified", "val_loss": 3.17, "change": "an idea"}
    return histories | {"limited": [*HISTORIES["limited"], verified]}


@pytest.mark.parametrize("name", leaderboard.make_charts(HISTORIES))
def test_no_text_lies_on_another_and_all_is_in_the_picture(name):
    import matplotlib

    with matplotlib.rc_context(draw.SETTINGS):
        figure = Figure(layout="constrained")
        leaderboard.make_charts(with_a_verified_one(HISTORIES))[name](figure)
        figure.draw_without_rendering()
        (axes,) = figure.axes
        names = axes.get_yticklabels() if name.startswith("contributions") else []
        texts, legend = [*axes.texts, *names], axes.get_legend()
        boxes = [Text.get_window_extent(text) for text in texts]  # an annotation's own has its line, too
        boxes += [legend.get_window_extent()] if legend else []
        assert len(axes.texts) >= 4
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i]), texts[i : i + 1]
            assert box.x1 <= figure.bbox.x1 + 1 and box.y0 >= figure.bbox.y0 - 1
        if name.startswith("contributions"):
            bars = axes.containers[0].datavalues
            assert axes.get_xlim()[0] == 0 and max(bars) < axes.get_xlim()[1] < 1.2 * max(bars)
        if name in ("progress-limited.svg", "contributions-limited.svg", "training-time.svg", "efficiency.svg"):
            assert "verified here" in [text.get_text() for text in legend.get_texts()]


def test_rows_are_spread():
    assert draw.spread([0.9], 0.1) == [0.9]
    assert draw.spread([0.9, 0.5, 0.1], 0.2) == [0.9, 0.5, 0.1]
    assert draw.spread([0.9, 0.12, 0.11, 0.1], 0.2) == pytest.approx([0.9, 0.5, 0.3, 0.1])
    assert draw.spread([0.95, 0.94, 0.93, 0.1], 0.2) == pytest.approx([1.0, 0.8, 0.6, 0.1])
    crowded = draw.spread([0.5] * 5, 0.2)
    assert crowded == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5])
