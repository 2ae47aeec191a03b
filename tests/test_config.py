"""Flags from a dataclass, the fields that every run has, toy sizes, and settings of records."""

import dataclasses
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from conftest import ALL_TRACKS, TRACKS, name_of, parse

from slowrun.config import (
    CommandLine,
    RunConfig,
    changed_fields,
    demo_of_record,
    field_comments,
    field_types,
    list_records,
    parse_flags,
    read_record,
    records_folder,
    require_at_least,
)


@dataclass(frozen=True)
class Config(RunConfig):
    """Of a script that is not there."""

    vocab_size: int = 97  # tokens
    sequence_len: int = 32  # tokens of a sequence, 100% of them
    time_cap_min: float = 60.0  # minutes
    seed: int = 42  # of all that is random
    n_layer: int = 8  # layers
    num_epochs: int = 10  # passes over the data
    warmdown: float = 0.5  # part of the steps
    mlp: Literal["relu2", "swiglu"] = "swiglu"  # kind of MLP
    u_net: bool = True  # skips
    replay_from_epoch: int = 7  # 0: never

    @property
    def twice(self) -> int:
        return 2 * self.n_layer


DEMO = {"n_layer": 2, "num_epochs": 5, "replay_from_epoch": 3, "warmdown": 0.25, "mlp": "relu2"}


def parsed(*arguments: str, script: Path = Path("train.py"), record_sizes=None) -> CommandLine:
    return parse_flags("limited", Config, DEMO, list(arguments), script, "A script.", record_sizes)


# --------------------------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_sequences": 0}, "--val-sequences is 0: it must be at least 1"),
        ({"eval_batch": 0}, "--eval-batch is 0: it must be at least 1"),
        ({"log_every": 0}, "--log-every is 0: it must be at least 1"),
        ({"seed": -1}, "--seed is -1: it must be at least 0"),
        ({"time_cap_min": -1.0}, "--time-cap-min is -1.0: it must be at least 0"),
        ({"checkpoint_min": float("nan")}, "--checkpoint-min is nan: it must be at least 0"),
        ({"run_name": "../elsewhere"}, "--run-name ../elsewhere is not the name of a folder"),
        ({"run_name": "a/b"}, "--run-name a/b is not the name of a folder"),
        ({"run_name": ".."}, "--run-name .. is not the name of a folder"),
        ({"profile_steps": "3"}, "--profile-steps 3: '3' does not fit, give ranges FIRST-LAST of steps"),
    ],
)
def test_fields_of_a_run_are_checked(change, message):
    with pytest.raises(ValueError) as caught:
        Config(**change)
    assert message in str(caught.value)


def test_the_least_that_is_allowed_is_accepted():
    Config(val_sequences=1, eval_batch=1, log_every=1, seed=0, time_cap_min=0.0, checkpoint_min=0.0, run_name="a.b")
    require_at_least(Config(), "n_layer", 8)
    with pytest.raises(ValueError, match="--n-layer is 8: it must be at least 9"):
        require_at_least(Config(), "n_layer", 9)


def test_every_script_defines_what_the_session_reads():
    """RunConfig declares these four without a default."""
    with pytest.raises(TypeError, match=r"vocab_size.*sequence_len.*time_cap_min.*seed"):
        RunConfig()


def test_comments_and_types_are_those_of_the_source():
    assert field_comments(Config).keys() >= field_types(Config).keys() == Config.__dataclass_fields__.keys()
    comments = field_comments(Config)
    assert comments["sequence_len"] == "tokens of a sequence, 100% of them" and comments["mlp"] == "kind of MLP"
    assert comments["eval_initial"] == "validate before the first step too"
    assert (field_types(Config)["n_layer"], field_types(Config)["warmdown"]) == (int, float)


def test_changed_fields():
    assert changed_fields(Config()) == {}
    assert changed_fields(Config(n_layer=8, seed=43, log_every=1)) == {"seed": 43, "log_every": 1}


# ---------------------------------------------------------------------------------------------------------------- flags


def test_flags():
    """Only what is given comes back, with the field's type."""
    assert parsed() == CommandLine({}, resume=None, plan=None)
    line = parsed("--n-layer=4", "--warmdown", "1", "--no-u-net", "--mlp=relu2", "--resume", "runs/x")
    assert line.values == {"n_layer": 4, "warmdown": 1.0, "u_net": False, "mlp": "relu2"}
    assert (line.resume, line.plan) == ("runs/x", None) and type(line.values["warmdown"]) is float
    assert parsed("--plan=plan.json", "--seed=1") == CommandLine({"seed": 1}, resume=None, plan="plan.json")


def test_toy_sizes():
    assert parsed("--demo").values == DEMO
    assert parsed("--demo", "--n-layer=3", "--seed=1").values == DEMO | {"n_layer": 3, "seed": 1}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--n-layers=4", "unrecognized arguments: --n-layers=4"),
        ("--n-lay=4", "unrecognized arguments: --n-lay=4"),
        ("--n-layer=many", "argument --n-layer: invalid int value: 'many'"),
        ("--device=tpu", "argument --device: invalid choice: 'tpu'"),
        ("--record=last", "argument --record: invalid int value: 'last'"),
    ],
)
def test_unknown_flags_and_values_are_refused(argument, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(argument)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_help(capsys):
    """What a field means, and its default."""
    with pytest.raises(SystemExit) as caught:
        parsed("--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and "A script." in printed
    assert "--sequence-len int tokens of a sequence, 100% of them [32]" in printed
    assert "--mlp {relu2,swiglu} kind of MLP [swiglu]" in printed and "--u-net, --no-u-net skips [True]" in printed
    assert "--demo toy sizes" in printed and "--record N" in printed


@ALL_TRACKS
def test_every_flag_of_a_script_has_a_help_text(track, capsys):
    with pytest.raises(SystemExit):
        track.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name in track.Config.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in printed
    expected = {
        "limited": "first epoch with layer replay; 0 for never [7]",
        "tiny": "fraction of the steps after which training runs late_passes [0.7]",
        "two_hour": "[1-6:256,768;7-13:768,1792;14-22:1280,2048]",
    }
    assert expected.get(name_of(track), "") in printed


# -------------------------------------------------------------------------------------------------------------- records


@pytest.fixture
def script(tmp_path) -> Path:
    """A script with three records beside it, of which two have settings."""
    folder = tmp_path / "records" / "limited"
    folder.mkdir(parents=True)
    entry = {"val_loss": 3.4, "minutes": 60, "time_is_approximate": True, "change": "begun"}
    entries = [
        entry | {"number": 1},
        entry | {"number": 2, "val_loss": 3.3502, "change": "more layers"},
        entry | {"number": 3, "minutes": 59.25, "time_is_approximate": False, "change": "a secret"},
    ]
    (folder / "records.json").write_text(json.dumps({"records": entries}))
    first = {"n_layer": 4, "num_epochs": 20, "warmdown": 0.0, "mlp": "relu2", "u_net": False, "replay_from_epoch": 0}
    (folder / "01-first.json").write_text(json.dumps({"settings": first}))
    (folder / "02-more-layers.json").write_text(json.dumps({"settings": {"num_epochs": 20}}))
    return tmp_path / "train.py"


def test_listing_the_records(script, capsys):
    """In the order of the file; a star stands where --record can train one. Only the main process prints."""
    expected = [
        "number, validation loss, time, change; --record trains those with a star",
        "*  1  3.400     ~60 min  begun",
        "*  2  3.350     ~60 min  more layers",
        "   3  3.400   59.25 min  a secret",
    ]
    assert list_records(script.parent / "records/limited").splitlines() == expected
    with pytest.raises(SystemExit) as caught:
        parsed("--list-records", script=script)
    assert caught.value.code == 0 and capsys.readouterr().out.splitlines() == expected
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setenv("RANK", "1")
        parsed("--list-records", script=script)
    assert capsys.readouterr().out == ""


def test_every_track_lists_its_records(capsys):
    for name in TRACKS:
        with pytest.raises(SystemExit) as caught:
            importlib.import_module(TRACKS[name]).main(["--list-records"])
        lines = capsys.readouterr().out.splitlines()[1:]
        assert caught.value.code == 0 and len(lines) > 5
        assert all(line.startswith("*") and " min  " in line for line in lines)


def test_records_are_found_beside_the_script_and_one_folder_up(script):
    folder = script.parent / "records/limited"
    assert records_folder("limited", script) == records_folder("limited", script.parent / "tiny/train.py") == folder
    with pytest.raises(ValueError, match="--record and --list-records need the repository's own script"):
        records_folder("limited", script.parent / "runs/x/code/train.py")


def test_flags_come_before_a_records_settings(script):
    first = read_record(Config, script.parent / "records/limited", 1)
    assert parsed("--record=1", script=script).values == first
    assert parsed("--record=1", "--n-layer=6", script=script).values == first | {"n_layer": 6}
    assert parsed("--record=2", "--plan=p.json", script=script) == CommandLine({"num_epochs": 20}, None, "p.json")


def test_toy_sizes_of_a_record(script):
    """In the record's proportion to the defaults; what it has off stays off. A script may have rules of its own."""
    given = parsed("--record=1", "--demo", script=script).values
    off = {"warmdown": 0.0, "u_net": False, "replay_from_epoch": 0}
    assert given == {"n_layer": 1, "num_epochs": 10, "mlp": "relu2"} | off
    settings = {"replay_from_epoch": 14, "warmdown": 1.0, "mlp": "swiglu"}
    assert demo_of_record(Config, DEMO, settings) == DEMO | {"replay_from_epoch": 6, "warmdown": 0.5, "mlp": "swiglu"}
    assert demo_of_record(Config, DEMO, settings, unscaled=["replay_from_epoch"])["replay_from_epoch"] == 3
    line = parsed("--record=2", "--demo", "--n-layer=6", script=script, record_sizes=lambda settings: {"seed": 7})
    assert line.values == {"num_epochs": 20, "seed": 7, "n_layer": 6}


def test_records_that_cannot_be_trained(script):
    def refusal(*arguments: str) -> str:
        with pytest.raises(ValueError) as caught:
            parsed(*arguments, script=script)
        return str(caught.value)

    assert refusal("--record=3") == "--record 3: the limited track has settings of 1, 2; see --list-records"
    for flag in ("--record=1", "--plan=p.json"):
        assert "--record and --plan are for a new run: --resume continues with" in refusal(flag, "--resume=runs/x")
    for content, message in (
        ({"settings": {"n_layers": 3}}, "sets n_layers, which this script does not have"),
        ({}, "it lacks settings"),
        ({"settings": []}, "its settings are not a JSON object"),
        ({"settings": {"mlp": "relu"}}, "sets mlp to 'relu': it must be relu2 or swiglu"),
        ({"settings": {"n_layer": "3"}}, "sets n_layer to '3': it must be of type int"),
        ({"settings": {"n_layer": 3.0}}, "sets n_layer to 3.0: it must be of type int"),
        ({"settings": {"u_net": "no"}}, "sets u_net to 'no': it must be of type bool"),
        ({"settings": {"u_net": 1}}, "sets u_net to 1: it must be of type bool"),
    ):
        (script.parent / "records/limited/02-more-layers.json").write_text(json.dumps(content))
        assert message in refusal("--record=2")
    (script.parent / "records/limited/02-more-layers.json").write_text('{"settings": {"warmdown": 1}}')
    assert parsed("--record=2", script=script).values == {"warmdown": 1}  # a whole number where a float is meant
    (script.parent / "records/limited/records.json").write_text("{}")
    assert "records.json is damaged (it lacks records): restore it" in refusal("--list-records")


@ALL_TRACKS
def test_the_demo_of_a_script_is_a_config(track):
    config = track.Config(**parse(track, ["--demo"]))
    assert config.n_embd == 64 and changed_fields(config).keys() <= track.DEMO.keys()
    assert dataclasses.asdict(config).items() >= track.DEMO.items()
    assert config.data_dir == "demo_data"
