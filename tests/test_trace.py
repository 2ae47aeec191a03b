"""The trace: nothing where nothing changed, the first step where something did, and no case left out in silence."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT

CASE = "limited/float64/record-01"  # four steps


def load_trace():
    """tests/trace.py, under another name than that of the standard library's trace."""
    spec = importlib.util.spec_from_file_location("step_trace", ROOT / "tests" / "trace.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


trace = load_trace()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trace") / "recording"
    assert trace.main(["record", str(folder), f"--only={CASE}"]) == 0
    return folder


@pytest.fixture
def recording(recorded, tmp_path) -> Path:
    """A recording that a test may change."""
    return Path(shutil.copytree(recorded, tmp_path / "recording"))


@pytest.fixture
def edited(tmp_path) -> Path:
    """A copy of the checkout with another coefficient of Polar Express."""
    unneeded = shutil.ignore_patterns(".*", "__pycache__", "tests", "charts", "shared", "*_data", "runs", "wandb")
    checkout, edits = Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=unneeded)), 0
    for path in checkout.rglob("*.py"):
        text = path.read_text()
        edits += text.count("8.156554524902461")
        path.write_text(text.replace("8.156554524902461", "8.1566"))
    assert edits
    return checkout


def compare(recording: Path, capsys, *arguments: str) -> tuple[int, str]:
    """-> (Exit code, what is printed)"""
    capsys.readouterr()
    code = trace.main(["compare", str(recording), *arguments])
    return code, "".join(capsys.readouterr())


def returns(monkeypatch, recording: Path, change=lambda numbers: None) -> None:
    """Let runs give what is recorded, with changed numbers."""

    def run_case(*_):
        run, files = trace.read_recorded(recording, CASE)
        change(run["numbers"])
        return run, files

    monkeypatch.setattr(trace, "run_case", run_case)


def test_the_same_code_is_identical(recorded, capsys):
    code, printed = compare(recorded, capsys)
    assert code == 0 and "1 cases: 1 identical, 0 within the tolerance, 0 different, 0 failed" in printed


def test_a_changed_coefficient_is_found(recorded, edited, capsys):
    """From the second step on: the first has the initial weights."""
    code, printed = compare(recorded, capsys, f"--checkout={edited}")
    assert code == 1 and "1 different" in printed and "first    step 2 train_loss: " in printed
    assert "final/   epoch_" in printed


def test_tolerance(recording, monkeypatch, capsys):
    def shift(factor: float):
        return lambda numbers: numbers.update({"step 3 train_loss": numbers["step 3 train_loss"] * factor})

    returns(monkeypatch, recording, shift(1 + 1e-13))
    code, printed = compare(recording, capsys, "--tolerance=1e-12")
    assert code == 0 and "within 1.0e-13" in printed
    code, printed = compare(recording, capsys)
    assert code == 1 and "first    step 3 train_loss" in printed
    returns(monkeypatch, recording, shift(1 + 1e-11))
    assert compare(recording, capsys, "--tolerance=1e-12")[0] == 1


def test_what_is_missing_or_of_another_kind_is_no_rounding(recording, monkeypatch, capsys):
    for change in (
        lambda numbers: numbers.pop("step 4 train_loss"),
        lambda numbers: numbers.update({"step 5 train_loss": 4.0}),
        lambda numbers: numbers.update({"step 4 train_loss": float("nan")}),
        lambda numbers: numbers.update({"result stopped_by": "time_cap"}),
        lambda numbers: numbers.update({"result steps": 5}),
    ):
        returns(monkeypatch, recording, change)
        code, printed = compare(recording, capsys, "--tolerance=1e-3")
        assert code == 1 and "DIFFERENT by inf" in printed


def test_differences_of_tensors():
    x = trace.torch.tensor([1.0, 4.0], dtype=trace.torch.float64)
    assert trace.tensor_difference(x, x + 4e-13) == pytest.approx(1e-13, rel=1e-3)
    assert trace.tensor_difference(x, x.float()) == trace.tensor_difference(x, x[:1]) == float("inf")
    assert trace.tensor_difference(x.float(), (x + 2e-7).float()) == 0  # a rounding of float32
    assert trace.tensor_difference(x.float(), (x + 2e-6).float()) > 0


def test_a_failing_script_is_reported(recording, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "train.py").write_text("raise SystemExit('no such thing')")
    code, printed = compare(recording, capsys, f"--checkout={broken}")
    assert code == 1 and "FAILED" in printed and "no such thing" in printed and "1 failed" in printed
    (recording / "cases" / CASE / "run.json").unlink()  # as if it had failed when it was recorded
    code, printed = compare(recording, capsys)
    assert code == 1 and "NOT RECORDED" in printed and "1 failed" in printed


def test_bits_of_another_machine_are_refused(recording, monkeypatch, capsys):
    returns(monkeypatch, recording)
    path = recording / "trace.json"
    content = json.loads(path.read_text())
    content["environment"]["cpu"] = "an abacus"
    path.write_text(json.dumps(content))
    code, printed = compare(recording, capsys)
    assert code == 2 and "recording was made elsewhere: cpu an abacus, now" in printed and "not portable" in printed
    assert compare(recording, capsys, "--other-machine")[0] == compare(recording, capsys, "--tolerance=1e-12")[0] == 0


def test_what_cannot_be_done_is_refused(recording, tmp_path, capsys):
    code, printed = compare(tmp_path / "nothing", capsys)
    assert code == 2 and "make a recording with python tests/trace.py record" in printed
    code, printed = compare(recording, capsys, "--only=nonsense")
    assert code == 2 and "no case is left" in printed
    assert trace.main(["record", str(tmp_path)]) == 2 and "no recording: name another" in capsys.readouterr().err
    assert trace.main(["record", str(tmp_path / "new"), f"--checkout={tmp_path}"]) == 2


def test_renamed_flags(monkeypatch):
    settings = {"decay_low": 1, "decay_low_value": 0.1, "passes": 2, "meta_gradient": False}
    offered = {"decay-low", "decay-low-value", "passes"}
    monkeypatch.setattr(trace, "offered_flags", lambda script: offered)
    old = ["--decay-low=1", "--decay-low-value=0.1", "--passes=2", "--no-meta-gradient"]
    assert trace.flags(Path("train.py"), "tiny", settings) == old
    offered = {"decay-low-epochs", "decay-low", "late-passes"}
    new = ["--decay-low-epochs=1", "--decay-low=0.1", "--late-passes=2", "--no-meta-gradient"]
    assert trace.flags(Path("train.py"), "tiny", settings) == new
    offered = set()
    with pytest.raises(trace.RunFailed, match=r"has no flag for decay_low: name the new one in RENAMED"):
        trace.flags(Path("train.py"), "tiny", settings)


def test_every_settings_file_is_a_case():
    names = {case.name for case in trace.case_list(ROOT)}
    for track in trace.SCRIPTS:
        for path in (ROOT / "records" / track).glob("[0-9][0-9]-*.json"):
            assert {f"{track}/{dtype}/record-{path.name[:2]}" for dtype in ("float32", "float64")} <= names
