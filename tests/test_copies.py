"""The copies mechanism, on the repository and on a script made of copies; the sections of the scripts."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from copies import SCRIPTS, SECTIONS, SHARED, definitions, fix, marked, problems, text_of


def test_the_copies_in_the_repository_are_right():
    assert problems() == []


def test_the_root_has_the_sections_and_what_is_shared():
    source = (ROOT / "train.py").read_text()
    assert re.findall(r"^# =+\n# (\w+)", source, re.MULTILINE) == SECTIONS
    names = definitions(source)
    assert {name for names in SHARED.values() for name in names} <= names.keys()


@pytest.fixture
def root(tmp_path) -> Path:
    """The root's files and a tiny/train.py that consists of marked copies under the right titles."""
    for name in ("train.py", "model.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    train, model = ((ROOT / name).read_text() for name in ("train.py", "model.py"))
    names, parts = definitions(train), []
    for title in SECTIONS:
        parts.append(f"# {'=' * 118}\n# {title}\n# {'=' * 118}\n")
    for shared in SHARED.values():
        for name in shared:
            text = text_of(train, *names[name])
            if "." in name:
                text = f"class {name.split('.')[0]}{names[name][0]}:\n    # Copied from train.py: {name}\n" + re.sub(
                    "^(?=.)", "    ", text, flags=re.MULTILINE
                )
            else:
                text = f"# Copied from train.py: {name}\n{text}"
            parts.append(text)
    parts.append(f"# Copied from model.py: rotate\n{text_of(model, *definitions(model)['rotate'])}")
    parts.append("# Adapted from model.py: norm -- another norm\ndef norm(x):\n    return x")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/train.py").write_text("\n\n\n".join(parts) + "\n")
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_right_copies_are_accepted(root):
    assert problems(root) == []
    kinds = [copy.kind for copy in marked(root / SCRIPTS[0])]
    assert kinds.count("Adapted") == 1 and len(kinds) == sum(map(len, SHARED.values())) + 2


def test_a_definition_of_the_root_without_a_marker_is_found(root):
    """One that need not be there at all."""
    change(root / "tiny/train.py", "# Adapted from model.py: norm -- another norm\n", "")
    assert problems(root) == [f"{root}/tiny/train.py: norm is in the root's files too: say Copied or Adapted above it"]


@pytest.mark.parametrize(
    "old, new",
    [
        ("self.train_time_s += lap_s", "self.train_time_s += lap_s / 2"),  # a function's body
        ("@dataclass(frozen=True)\nclass Score", "@dataclass\nclass Score"),  # a decorator
        ("cos, sin = rotary", "cos, sin = rotary  # tables"),  # a comment
        ('info["stopped_by"] = ', 'info["stopped_by"] = "" and '),  # a method
    ],
)
def test_a_copy_that_differs_is_found_and_fixed(root, old, new):
    before = (root / "tiny/train.py").read_text()
    change(root / "tiny/train.py", old, new)
    found = problems(root)
    assert len(found) == 1 and "differs from" in found[0]
    assert len(fix(root)) == 1 and problems(root) == []
    assert (root / "tiny/train.py").read_text() == before


def test_a_change_of_the_original_reaches_the_copy(root):
    change(root / "train.py", "os.replace(temporary, path)", "os.replace(temporary, path)\n        os.sync()")
    assert any("write_atomically differs" in problem for problem in problems(root))
    assert [line.split(": ")[1] for line in fix(root)] == ["write_atomically"]
    assert "os.sync()" in (root / "tiny/train.py").read_text() and problems(root) == []


def test_a_removed_marker_is_found(root):
    change(root / "tiny/train.py", "# Copied from train.py: Clock\n", "")
    assert problems(root) == [
        f"{root}/tiny/train.py: Clock (clock) must be a marked copy of the root's",
        f"{root}/tiny/train.py: Clock is in the root's files too: say Copied or Adapted above it",
    ]
    change(root / "tiny/train.py", "# Copied from train.py: EvalSet\n", "# Adapted from train.py: EvalSet -- faster\n")
    assert any("EvalSet (validation) must be a marked copy" in problem for problem in problems(root))


def test_markers_that_say_too_little_or_stand_wrong(root):
    change(root / "tiny/train.py", "# Adapted from model.py: norm -- another norm\n", "# Adapted from model.py: norm\n")
    with pytest.raises(ValueError, match="an adapted copy says why"):
        problems(root)
    change(root / "tiny/train.py", "# Adapted from model.py: norm\n", "# Copied from model.py: block\n")
    with pytest.raises(ValueError, match="the marker names block, but below it stands norm"):
        problems(root)
    change(root / "tiny/train.py", "# Copied from model.py: block\ndef norm", "# Copied from model.py: gone\ndef gone")
    assert any("model.py has no gone" in problem for problem in problems(root))


def test_other_sections_are_found(root):
    change(root / "tiny/train.py", "# Validation\n", "# Evaluation\n")
    assert any("its sections are" in problem for problem in problems(root))
