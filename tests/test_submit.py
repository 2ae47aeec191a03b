"""A submission becomes a record folder and an entry, or leaves nothing behind."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import parse
from judging import (
    Case,
    HonestRuns,
    in_this_process,
    judge,
    known_instruments,  # noqa: F401
    list_instruments,
)

import two_hour.train as two_hour
from records import referee, submit
from records.judge import files, scoring
from slowrun.folder import PACKAGE, instrument_sha256, write_json


@pytest.fixture(scope="session")
def honest(data_dir) -> HonestRuns:
    return HonestRuns(data_dir)


@pytest.fixture
def records(tmp_path, monkeypatch) -> Path:
    """A folder for records; runs are scored in this process."""
    monkeypatch.setattr(scoring, "run_worker", in_this_process)
    return tmp_path / "records"


def make(records: Path, *runs: Path, title: str = "A trial: of it!", options: tuple = ()) -> int:
    names = [str(run) for run in runs]
    return submit.main([*names, "--title", title, "--other-data", "--records-dir", str(records), *options])


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


CODE = {"code/train.py", *(f"code/slowrun/{path.name}" for path in PACKAGE.glob("*.py"))}


def test_a_record_folder(honest, records, tmp_path, capsys):
    (tmp_path / "text.md").write_text("What is *new*.")
    runs = [honest("two_hour", seed) for seed in (43, 42)]
    assert make(records, *runs, options=("--by", "ada, bob", "--description", str(tmp_path / "text.md"))) == 0
    assert "01-a-trial-of-it made" in capsys.readouterr().out
    folder = records / "two_hour" / "01-a-trial-of-it"
    of_run = {"config.json", "result.json", "metrics.jsonl", "log.txt", "curve.png"}
    expected = {f"seed-{seed}/{name}" for seed in (42, 43) for name in of_run}
    assert files_in(folder) == expected | {"README.md"} | CODE
    assert (folder / "seed-43" / "log.txt").read_bytes() == (runs[0] / "log.txt").read_bytes()
    results = [json.loads((run / "result.json").read_text()) for run in runs[::-1]]
    text = (folder / "README.md").read_text()
    assert text.startswith("# A trial: of it!\n") and "by ada, bob" in text and "What is *new*." in text
    for result in results:
        assert f"| {result['seed']} | {result['val_loss']:.4f} | {result['best_val_loss']:.4f} | " in text
        assert result["run_id"] in text and f"torch {result['torch']}" in text
    command = re.search(r"code/train.py (.+)", text)[1]
    given = two_hour.Config(**parse(two_hour, shlex.split(command)))
    config = json.loads((runs[1] / "config.json").read_text())["config"]
    assert all(getattr(given, name) == value for name, value in config.items() if name not in files.PER_RUN_SETTINGS)
    (entry,) = json.loads((records / "two_hour" / "records.json").read_text())["records"]
    assert entry["seeds"] == [42, 43] and entry["losses"] == [result["val_loss"] for result in results]
    assert entry["val_loss"] == pytest.approx(sum(entry["losses"]) / 2) and entry["kind"] == "verified"
    assert (entry["number"], entry["folder"], entry["contributors"]) == (1, folder.name, ["ada", "bob"])
    assert entry["data_sha256"] == results[0]["data_sha256"]["val"]
    found = judge(capsys, folder, options=["--other-data", "--records-dir", str(records)])
    assert found.fails == {} and found.verdict.startswith("static part only")
    assert list(records.rglob(".*")) == []


def test_the_next_one_is_numbered_on_and_has_to_be_better(honest, records, tmp_path, capsys):
    assert make(records, honest("two_hour")) == 0
    before = files_in(records)
    assert make(records, honest("two_hour"), title="again") == 1
    output = capsys.readouterr().out
    assert "FAIL  significance" in output and "REFUSED, 1 of the checks fail; nothing was written" in output
    assert files_in(records) == before and list(records.rglob(".*")) == []
    better = Case(shutil.copytree(honest("two_hour"), tmp_path / "better"))
    better.append_code(
        "honest_members = load_members\n\n\ndef load_members(run_dir, device):\n"
        "    for weight, log_probs in honest_members(run_dir, device):\n"
        "        yield weight, lambda tokens, f=log_probs: (1.1 * f(tokens)).log_softmax(-1)\n"
    )
    better.claim_what_it_scores()
    assert make(records, better.path, title="sharper") == 0
    entries = json.loads((records / "two_hour" / "records.json").read_text())["records"]
    assert [entry["folder"] for entry in entries] == ["01-a-trial-of-it", "02-sharper"]
    options = ["--other-data", "--records-dir", str(records)]
    for entry in entries:  # neither has to beat itself, nor what came later
        assert judge(capsys, records / "two_hour" / entry["folder"], options=options).fails == {}
    entries[0]["val_loss"] = entries[1]["val_loss"]
    write_json(records / "two_hour" / "records.json", {"source": "", "records": entries})
    found = judge(capsys, records / "two_hour" / entries[1]["folder"], options=options)
    assert found.fails.keys() == {"significance"}


def test_a_record_made_with_an_earlier_instrument(honest, records, tmp_path, capsys):
    """Its folder keeps it; one that no version of this repository had is refused, and nothing is left."""
    run = Case(shutil.copytree(honest("two_hour"), tmp_path / "run"))
    run.replace(r"\Z", "# a remark\n", "code/slowrun/clock.py")
    run.sign_instrument()
    assert make(records, run.path) == 1
    assert "FAIL  instrument" in capsys.readouterr().out and not records.exists()
    list_instruments(instrument_sha256(run.path / "code" / "slowrun"), instrument_sha256())
    assert make(records, run.path) == 0
    folder = records / "two_hour" / "01-a-trial-of-it"
    assert (folder / "code" / "slowrun" / "clock.py").read_text().endswith("# a remark\n")
    found = judge(capsys, folder)
    assert found.fails == {} and "change 1" in found.texts("PASS")["instrument"]


def test_an_ensemble(honest, records, capsys):
    """The metrics of its chains are packed."""
    assert make(records, honest("unlimited")) == 0
    folder = records / "unlimited" / "01-a-trial-of-it"
    chain = {"ledger.json", "metrics.jsonl.gz", "log.txt", "curve.png"}
    expected = {f"seed-42/chains/chain_0{i}/{name}" for i in (0, 1) for name in chain}
    of_run = {"config.json", "result.json", "metrics.jsonl", "log.txt", "curve.png"}
    assert files_in(folder) == expected | {f"seed-42/{name}" for name in of_run} | {"README.md"} | CODE
    assert judge(capsys, folder).fails == {}


def test_a_large_folder_is_made_smaller(honest, records, monkeypatch, capsys):
    run = honest("two_hour")
    size = sum((run / name).stat().st_size for name in (*CODE, "config.json", "result.json", "log.txt"))
    size += (run / "metrics.jsonl").stat().st_size
    monkeypatch.setattr(files, "SUBMITTED_MB", size / 1e6)  # the README is too much
    assert make(records, run) == 0
    folder = records / "two_hour" / "01-a-trial-of-it"
    assert "seed-42/metrics.jsonl.gz" in files_in(folder) and "seed-42/curve.png" in files_in(folder)
    assert judge(capsys, folder).fails == {}
    monkeypatch.setattr(files, "SUBMITTED_MB", 0.1)
    assert "MB, at most 0.1 are allowed" in judge(capsys, folder).fails["files"]
    shutil.rmtree(records)
    assert make(records, run) == 1
    assert "FAIL  files" in capsys.readouterr().out and files_in(records) == set()


def test_what_is_refused_leaves_nothing(honest, records, tmp_path, capsys):
    alone = honest("two_hour", 43)  # without seed 42
    assert make(records, alone) == 1
    assert "FAIL  seeds" in capsys.readouterr().out and not records.exists()
    for arguments, said in (
        ([str(alone), "--title", "x", "--other-data"], "needs a --records-dir of its own"),
        ([str(alone), "--title", "x", "--records-dir", str(records)], "records.json not found"),
        ([str(tmp_path / "nowhere"), "--title", "x"], "is not a folder"),
    ):
        assert submit.main(arguments) == 2
        assert said in capsys.readouterr().err
    assert make(records, honest("two_hour"), title="!?") == 2
    assert "has no letter or digit" in capsys.readouterr().err and files_in(records) == set()


@pytest.mark.parametrize("function", ["shrink", "write_json"])
def test_an_interruption_leaves_nothing(honest, records, monkeypatch, function):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, function, interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(records, honest("two_hour"))
    assert files_in(records) == set() and [path.name for path in records.rglob("*")] == ["two_hour"]


def test_a_submitted_folder_is_judged_alone_and_by_its_names(honest, records, capsys):
    assert make(records, honest("two_hour")) == 0
    folder = records / "two_hour" / "01-a-trial-of-it"
    assert referee.main([str(folder), str(honest("two_hour"))]) == 2
    assert "is a submitted record: name it alone" in capsys.readouterr().err
    (folder / "seed-42").rename(folder / "seed-43")
    (folder / "seed-43" / "model.safetensors").write_bytes(b"")
    (folder / "README.md").unlink()
    found = judge(capsys, folder)
    assert found.fails.keys() == {"files", "seeds"} and "seed-43/ is the run with seed 42" in found.fails["seeds"]
    assert "README.md is missing" in found.fails["files"]
    assert "seed-43/model.safetensors is not a file of such a folder" in found.fails["files"]
