"""What begins and continues a run, exit codes, and the package as a whole. Whole runs: test_run.py, test_resume.py."""

import ast
import dataclasses
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import INSTRUMENT, ROOT

import slowrun
from records import judge
from slowrun.clock import duration
from slowrun.config import RESUME_MAY_CHANGE, RunConfig
from slowrun.folder import begin, check_same_data, instrument_sha256, reopen, script_sha256, write_json
from slowrun.session import exit_code, launch, resume_command

HASHES = {"train": "a" * 64, "val": "b" * 64}


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "checkout" / "train.py"
    path.parent.mkdir()
    path.write_text("# a script\n")
    return path


@dataclass(frozen=True)
class Config(RunConfig):
    """Of a script that is not there."""

    vocab_size: int = 97
    sequence_len: int = 32
    time_cap_min: float = 60.0
    seed: int = 42
    n_layer: int = 8


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(runs_dir=str(tmp_path / "runs"), run_name="run", n_layer=4, seed=43)


# --------------------------------------------------------------------------------------------------- begin and reopen


def test_a_run_begins(config, script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--n-layer=4"])
    saved = begin("limited", config, script, HASHES)
    folder = Path(config.runs_dir) / "run"
    assert saved == json.loads((folder / "config.json").read_text()) | {"folder": str(folder)}
    assert saved["command"] == ["train.py", "--n-layer=4"] and saved["config"] == dataclasses.asdict(config)
    assert saved["overrides"] == {"runs_dir": config.runs_dir, "run_name": "run", "n_layer": 4, "seed": 43}
    assert (saved["track"], saved["data_sha256"]) == ("limited", HASHES)
    assert (saved["code_sha256"], saved["instrument_sha256"]) == (script_sha256(script), instrument_sha256())
    assert re.fullmatch("[0-9a-f]{8}", saved["run_id"])
    unnamed = dataclasses.replace(config, run_name="")
    assert re.fullmatch(r"limited-\d{8}-\d{6}-s43", Path(begin("limited", unnamed, script, HASHES)["folder"]).name)


def test_a_run_is_opened_again(config, script):
    saved = begin("limited", config, script, HASHES)
    folder = Path(saved["folder"])

    def refusal(given: dict | None = None, track: str = "limited", **options) -> str:
        with pytest.raises(ValueError) as caught:
            reopen(track, folder, given or {}, script, **options)
        return str(caught.value)

    reopened = saved | {"finished": False, "resumed": True}
    assert reopen("limited", folder, {}, script) == reopened
    may_change = {"seed": 43, "log_every": 1, "data_dir": "x"}
    assert reopen("limited", folder, may_change, script) == reopened
    kept = {"data_dir", "eval_batch", "checkpoint_min", "checkpoints", "log_every", "profile_steps", "wandb"}
    assert kept == RESUME_MAY_CHANGE
    differences = "(n_layer 4, now 6, seed 43, now 42)"
    assert refusal({"n_layer": 6, "seed": 42}) == (
        f"{folder} was started with other settings {differences}: leave them out, or start a new run"
    )
    assert "was started with other settings (seed 43, now 42)" in refusal({"seed": 42}, may_change={"n_layer"})
    expected = f"{folder} is a run of the limited track: resume it with that track's train.py, this one is tiny's"
    assert refusal(track="tiny") == expected
    write_json(folder / "result.json", {"status": "failed"})
    assert not reopen("limited", folder, {}, script)["finished"]
    write_json(folder / "result.json", {"status": "finished"})
    assert reopen("limited", folder, {}, script)["finished"]
    (folder / "result.json").write_text('{"status"')
    assert refusal().endswith("delete it to resume")


def test_a_run_goes_on_with_the_code_it_was_started_with(config, script, monkeypatch, tmp_path):
    """A change of the script, or of the instrument, is refused; both messages name the code that resumes it."""
    folder = Path(begin("limited", config, script, HASHES)["folder"])
    original = script.read_text()
    script.write_text(original + "# another line\n")
    advice = f"resume it with {folder}/code/train.py"
    with pytest.raises(ValueError) as caught:
        reopen("limited", folder, {}, script)
    assert str(caught.value) == f"the script changed since {folder} was started: {advice}"
    script.write_text(original)
    package = shutil.copytree(ROOT / "slowrun", tmp_path / "slowrun")
    monkeypatch.setattr("slowrun.folder.instrument_sha256", lambda: instrument_sha256(package))
    assert reopen("limited", folder, {}, script)
    with open(package / "clock.py", "a") as file:
        file.write("# slower\n")
    with pytest.raises(ValueError) as caught:
        reopen("limited", folder, {}, script)
    assert str(caught.value) == f"slowrun/ changed since {folder} was started: {advice}"


def test_a_run_goes_on_with_the_data_it_was_started_with():
    saved = {"folder": "runs/run", "data_sha256": HASHES}
    check_same_data(saved, "data", HASHES)
    for data, difference in (
        (HASHES | {"val": "c" * 64}, "fineweb_val.pt was bbbbbbbbbbbb..., and that of data is cccccccccccc..."),
        ({"train": HASHES["train"]}, "fineweb_val.pt was bbbbbbbbbbbb..., and that of data is none..."),
        (HASHES | {"holdout": "d" * 64}, "fineweb_holdout.pt was none..., and that of data is dddddddddddd..."),
    ):
        with pytest.raises(ValueError) as caught:
            check_same_data(saved, "data", data)
        assert str(caught.value) == f"runs/run was started on other data ({difference}): give its --data-dir"


# ----------------------------------------------------------------------------------------------------------- exit codes


def raises(error: BaseException):
    def main() -> int:
        raise error

    return main


def test_exit_codes(capsys, monkeypatch):
    assert exit_code(lambda: 1, "train.py") == 1 and capsys.readouterr().err == ""
    assert exit_code(raises(ValueError("no data")), "tiny/train.py") == 2
    assert capsys.readouterr().err == "train.py: error: no data\n"
    assert exit_code(raises(torch.OutOfMemoryError("3 GiB")), "train.py") == 2
    assert capsys.readouterr().err == "train.py: error: 3 GiB\nLess memory: --device-batch, --eval-batch\n"
    with pytest.raises(KeyError):  # a bug keeps its traceback
        exit_code(raises(KeyError("x")), "train.py")
    monkeypatch.setenv("RANK", "1")
    assert exit_code(raises(ValueError("no data")), "train.py") == 2
    assert capsys.readouterr().err == ""  # the main process finds the same


@pytest.mark.parametrize("code", [0, 1, 2])
def test_launching(code):
    with pytest.raises(SystemExit) as caught:
        launch(lambda: code)
    assert caught.value.code == code


def test_what_resumes_a_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tiny/train.py", "--demo"])
    assert resume_command(1, Path("runs/x")) == "python tiny/train.py --resume runs/x"
    expected = "torchrun --standalone --nproc_per_node=8 tiny/train.py --resume runs/x"
    assert resume_command(8, Path("runs/x")) == expected


def test_durations():
    said = {5: "5s", 90: "90s", 91: "1.5m", 2880: "48.0m", 7200: "120.0m", 7201: "2.0h", 288000: "80.0h"}
    assert {seconds: duration(seconds) for seconds in said} == said


# ------------------------------------------------------------------------------------------------------------ the graph

SCRIPTS = {"train.py", "model.py", "tiny/train.py", "two_hour/train.py", "unlimited/train.py"}
NOT_OF_THE_INSTRUMENT = {"train", "model", "tiny", "two_hour", "unlimited", "prepare_data", "records", "tests"}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it; those of a package here as "slowrun.clock"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            is_package = node.module in ("slowrun", "records", "records.judge")
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if is_package else {node.module}
    return found


def test_the_arrows_go_one_way():
    """Each module of the instrument imports only modules that stand below it in the docstring's list, and no script.

    The library imports the frozen modules, which do not need it.
    """
    frozen, library = (re.findall(r"^    (\w+)  ", part, re.MULTILINE) for part in slowrun.__doc__.split("The library"))
    order = [*library, *frozen]
    assert sorted([*order, "__init__"]) == sorted(INSTRUMENT)
    assert {path.name for path in (ROOT / "slowrun").iterdir()} - {"__pycache__"} == {f"{n}.py" for n in INSTRUMENT}
    for name in order:
        found = imports(ROOT / "slowrun" / f"{name}.py")
        of_package = {module for module in found if module.split(".")[0] == "slowrun"}
        below = {f"slowrun.{other}" for other in order[order.index(name) + 1 :]}
        assert of_package <= below, f"{name} imports {of_package - below}"
        assert not {module.split(".")[0] for module in found} & NOT_OF_THE_INSTRUMENT, name
    assert imports(ROOT / "slowrun" / "__init__.py") == set()


def test_the_arrows_of_the_referee_go_one_way():
    """Each part imports only those that stand below it in the docstring's list, and the worker nothing from here."""
    order = re.findall(r"^    (\w+)  ", judge.__doc__, re.MULTILINE)
    folder = ROOT / "records" / "judge"
    assert sorted([*order, "__init__"]) == sorted(path.stem for path in folder.glob("*.py"))
    for name in order:
        found = {module for module in imports(folder / f"{name}.py") if module.split(".")[0] == "records"}
        below = {f"records.judge.{other}" for other in order[order.index(name) + 1 :]}
        assert found <= below | {"records.instruments"}, f"{name} imports {found - below}"
    assert not {module.split(".")[0] for module in imports(folder / "worker.py")} & {"records", "slowrun"}
    assert imports(folder / "__init__.py") == set()


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_no_script_imports_another_track(script):
    """The root's script has its model in model.py, which names the script's Config; the others have the instrument."""
    found = {module.split(".")[0] for module in imports(ROOT / script)}
    allowed = {"train.py": {"model"}, "model.py": {"train"}}
    assert found & NOT_OF_THE_INSTRUMENT == allowed.get(script, set())
    assert "slowrun" in found
