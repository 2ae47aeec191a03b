"""The list of the versions of slowrun/: it says whether slowrun/ is in it, and grows by a command."""

import json
import shutil
import time
from pathlib import Path

import pytest

from records import instruments
from slowrun.folder import PACKAGE, instrument_sha256, write_json


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """An empty list in place of the repository's."""
    monkeypatch.setattr(instruments, "LIST", tmp_path / "instruments.json")
    write_json(instruments.LIST, {"instruments": []})
    return instruments.LIST


def test_the_repositorys_list_is_sound():
    entries = instruments.read_list()
    assert entries and len({entry["sha256"] for entry in entries}) == len(entries)
    assert [entry["date"] for entry in entries] == sorted(entry["date"] for entry in entries)
    assert all(len(entry["sha256"]) == 64 for entry in entries)


def test_a_version_is_appended_once(path, capsys):
    assert instruments.main(["--check"]) == 1
    assert "lacks slowrun/ as it is here" in capsys.readouterr().out
    earlier = {"sha256": "0" * 64, "date": "2026-01-01", "change": "an earlier one"}
    write_json(path, {"instruments": [earlier]})
    assert instruments.main(["--check"]) == 1
    assert instruments.main(["--add", " the clock "]) == 0
    added = {"sha256": instrument_sha256(), "date": time.strftime("%Y-%m-%d", time.gmtime()), "change": "the clock"}
    assert json.loads(path.read_text()) == {"instruments": [earlier, added]}
    assert instruments.main(["--check"]) == 0
    capsys.readouterr()
    assert instruments.main(["--add", "again"]) == 2
    assert "there is nothing to add" in capsys.readouterr().err


def test_what_is_refused(path, capsys):
    for content, said in (
        ({}, "it lacks instruments"),
        ({"instruments": {}}, "every entry needs sha256, date and change"),
        ({"instruments": [{"sha256": "0", "date": "2026-01-01"}]}, "every entry needs"),
        ({"instruments": [{"sha256": "0", "date": "2026-01-01", "change": ""}]}, "every entry needs"),
    ):
        write_json(path, content)
        assert instruments.main(["--check"]) == 2
        assert said in capsys.readouterr().err
    path.unlink()
    assert instruments.main(["--add", "x"]) == 2
    assert "instruments.json not found: git checkout" in capsys.readouterr().err
    write_json(path, {"instruments": []})
    assert instruments.main(["--add", " "]) == 2
    assert "say what changed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        instruments.main([])


def test_what_differs_is_named(tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / "slowrun")
    assert instruments.different_files(copy) == []
    assert instrument_sha256(copy) == instrument_sha256()
    (copy / "clock.py").unlink()
    (copy / "more.py").touch()
    with open(copy / "data.py", "a") as file:
        file.write("\n")
    assert instruments.different_files(copy) == ["clock.py", "data.py", "more.py"]
    assert instrument_sha256(copy) != instrument_sha256()


def test_files_that_are_no_modules_do_not_count(tmp_path):
    """What an editor or Python leaves there is not in the hash. The referee wants none of it in code/slowrun/."""
    copy = shutil.copytree(PACKAGE, tmp_path / "code" / "slowrun")
    (copy / "__pycache__").mkdir(exist_ok=True)
    assert instruments.copy_problems(tmp_path / "code") == []
    for name in (".clock.py.swp", "clock.py~"):
        (copy / name).touch()
    assert instrument_sha256(copy) == instrument_sha256()
    (copy / "link.py").symlink_to(copy / "clock.py")
    found = " ".join(instruments.copy_problems(tmp_path / "code"))
    assert all(f"code/slowrun/{name} is not a module" in found for name in (".clock.py.swp", "clock.py~", "link.py"))
