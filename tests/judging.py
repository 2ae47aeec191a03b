"""What the tests of the referee and of submissions share: honest run folders, and copies of them to cheat with."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, TRACKS, UNLIMITED, flags

from records import instruments, referee
from records.judge import scoring, worker
from records.judge.files import MACHINE_SETTINGS, PER_RUN_SETTINGS
from records.judge.findings import Judgement, Options
from records.judge.runs import Folder, open_folders
from slowrun import rules
from slowrun.clock import duration
from slowrun.data import sha256_file
from slowrun.folder import code_sha256, instrument_sha256, write_json
from slowrun.scoring import data_efficiency


@pytest.fixture(autouse=True)
def known_instruments(tmp_path, monkeypatch):
    """A list of instruments of its own for each test, which has slowrun/ as it is, also while it is being changed."""
    monkeypatch.setattr(instruments, "LIST", tmp_path / "instruments.json")
    list_instruments(instrument_sha256())


def list_instruments(*hashes: str) -> None:
    """Make these the known versions, oldest first."""
    entries = [{"sha256": h, "date": f"2026-01-0{i}", "change": f"change {i}"} for i, h in enumerate(hashes, 1)]
    write_json(instruments.LIST, {"instruments": entries})


class HonestRuns:
    """Small runs, each trained once in a session, in a folder beside the data."""

    def __init__(self, data_dir: Path):
        self.folder, self.data_dir = data_dir.parent / "honest", data_dir

    def __call__(self, track: str, seed: int = 42) -> Path:
        path = self.folder / f"{track}-{seed}"
        if not path.exists():
            values = SMALL[track] | {"data_dir": str(self.data_dir), "runs_dir": str(self.folder), "device": "cpu"}
            script = importlib.import_module((TRACKS | UNLIMITED)[track])
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
                patch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **style: path.write_bytes(b"."))
                assert script.main(flags(**values, seed=seed, run_name=path.name)) == 0
        return path


@dataclass
class Case:
    """A copy of a run folder, which a test changes so that one check alone can notice."""

    path: Path

    def read(self, name: str) -> dict:
        return json.loads((self.path / name).read_text())

    def edit(self, name: str, **values) -> None:
        """Change values of a JSON file."""
        write_json(self.path / name, self.read(name) | values)

    def configure(self, **values) -> None:
        """Change settings as a run with other flags has them."""
        saved = self.read("config.json")
        self.edit("config.json", config=saved["config"] | values, overrides=saved["overrides"] | values)
        self.tell()

    def tell(self) -> None:
        """Let the log say the settings, the seed and the time that the other files have."""
        saved, result = self.read("config.json"), self.read("result.json")
        settings = ", ".join(f"{k} {v}" for k, v in saved["overrides"].items()) or "the defaults, the current record"
        self.replace(r"( settings  ).*$", lambda match: match[1] + settings)
        self.replace(r"( track, seed )\d+,", rf"\g<1>{saved['config']['seed']},")
        self.replace(r"( time +training )\S+,", rf"\g<1>{duration(result['train_time_s'])},")

    def replace(self, pattern: str, by, name: str = "log.txt") -> None:
        """Change a text file; the pattern must be in it."""
        text, count = re.subn(pattern, by, (self.path / name).read_text(), flags=re.MULTILINE)
        assert count, pattern
        (self.path / name).write_text(text)

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def write_metrics(self, lines: list[dict]) -> None:
        (self.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def sign_code(self) -> None:
        """Note the hash of code/ as it is."""
        for name in ("config.json", "result.json"):
            self.edit(name, code_sha256=code_sha256(self.path / "code"))

    def sign_final(self) -> None:
        """Note the hashes of final/ as they are."""
        files = sorted((self.path / "final").iterdir())
        self.edit("result.json", final_sha256={file.name: sha256_file(file) for file in files})

    def sign_instrument(self) -> None:
        """Note the hash of code/slowrun/ as it is."""
        for name in ("config.json", "result.json"):
            self.edit(name, instrument_sha256=instrument_sha256(self.path / "code" / "slowrun"))

    def append_code(self, text: str) -> None:
        with open(self.path / "code" / "train.py", "a") as file:
            file.write("\n\n" + text)
        self.sign_code()

    def claim(self, split: str, loss: float, **values) -> None:
        """Claim another loss, wherever a run says it."""
        result = self.read("result.json")
        old = result[f"{split}_loss"]
        if split == "val":
            (name,) = [name for name, value in result["readouts"].items() if value == old]
            readouts = result["readouts"] | {name: loss}
            values |= {"readouts": readouts, "best_val_loss": min(readouts.values())}
            self.replace(rf"(val_loss +){old:.4f} ", rf"\g<1>{loss:.4f} ")
            self.replace(rf"{old:.4f}  {name}$", f"{loss:.4f}  {name}")
        self.edit("result.json", **{f"{split}_loss": loss} | values)

    def claim_what_it_scores(self) -> None:
        """Claim the losses that the run's own members give."""
        judgement = Judgement(Options(other_data=True, probe_seed=1))
        (run,), _ = open_folders([self.path])
        scored = scoring.score_run(run, judgement)
        self.validate_as(run, [measured["loss"] for measured in scored.measured])
        for split, found in scored.scores.items():
            counts = {"val_tokens": found.tokens, "val_bytes": found.bytes} if split == "val" else {}
            self.claim(split, found.loss, **{f"{split}_bpb": found.bpb}, **counts)

    def validate_as(self, run: Folder, losses: list[float]) -> None:
        """Let the validations in training be of members with these losses."""
        lines, readouts = self.metrics(), self.read("result.json")["readouts"]
        in_stage = run.main.validations_in(run.final["stage"])
        for member, loss in zip(run.members, losses, strict=True):
            for line in lines:
                if line in in_stage and line["step"] == member["step"]:
                    name, old = f"epoch_{member['epoch']}", line["val_loss"]
                    line["val_loss"] = readouts[name] = loss
                    self.replace(rf"(\| step {line['step']}/\d+ \| val ){old:.4f}", rf"\g<1>{loss:.4f}")
                    self.replace(rf"{old:.4f}  {name}$", f"{loss:.4f}  {name}")
        self.write_metrics(lines)
        self.edit("result.json", readouts=readouts, best_val_loss=min(readouts.values()))

    def rename(self, run_id: str, seed: int | None = None) -> None:
        """Another run id, and another seed, everywhere."""
        old = self.read("config.json")["run_id"]
        for path in self.path.rglob("*"):
            if path.suffix in (".json", ".jsonl", ".txt"):
                path.write_text(path.read_text().replace(old, run_id))
        if seed is not None:
            self.configure(seed=seed)
            self.edit("result.json", seed=seed)
        self.sign_final()


@dataclass
class Found:
    """What the referee said."""

    exit_code: int
    verdict: str
    findings: list[dict]

    def texts(self, status: str) -> dict[str, str]:
        """By check."""
        return {finding["check"]: finding["text"] for finding in self.findings if finding["status"] == status}

    @property
    def fails(self) -> dict[str, str]:
        return self.texts("FAIL")


def judge(capsys, *paths: Path | Case, options: list[str] | None = None) -> Found:
    """What the referee says, with --other-data if no options are given."""
    folders = [str(path.path if isinstance(path, Case) else path) for path in paths]
    capsys.readouterr()
    code = referee.main([*folders, *(["--other-data"] if options is None else options), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert code == (0 if said["ok"] else 1)
    return Found(code, said["verdict"], said["findings"])


def as_defaults(case: Case) -> None:
    """Put a run's settings into its script, as a record has them."""
    saved = case.read("config.json")
    settings = {k: v for k, v in saved["overrides"].items() if k not in PER_RUN_SETTINGS | MACHINE_SETTINGS}
    for name, value in settings.items():
        case.replace(rf"^(    {name}: .*? = )[^#]*?(  #.*)?$", rf"\g<1>{value!r}\g<2>", "code/train.py")
    case.edit("config.json", overrides={k: v for k, v in saved["overrides"].items() if k not in settings})
    case.sign_code()
    case.tell()


def make_record(case: Case, monkeypatch) -> None:
    """Turn a small run of two_hour into one that would be a record if the test's data were the benchmark's."""
    result = case.read("result.json")
    monkeypatch.setattr(rules, "OFFICIAL_SHA256", {s: result["data_sha256"][s] for s in ("val", "train")})
    monkeypatch.setattr(rules, "SEQUENCE_LEN", 32)
    monkeypatch.setattr(rules, "OFFICIAL_TRAIN_TOKENS", 6000)
    monkeypatch.setitem(rules.RULES, "two_hour", rules.Rules(cap_min=120.0, val_sequences=51, hardware="H100"))
    as_defaults(case)
    gpus = {"world_size": 8, "device": "NVIDIA H100 80GB HBM3"}
    case.replace(r"1 x CPU \(.*?\)", "8 x NVIDIA H100 80GB HBM3")
    efficiency = data_efficiency(result["val_loss"])
    case.edit("result.json", **gpus, eligible=True, not_eligible_because=[], data_efficiency=efficiency)


def in_this_process(task: dict, time_limit_s: float) -> dict:
    """In place of scoring.run_worker."""
    return worker.run(task)


def with_val_document(data_dir: Path, folder: Path) -> str:
    """The data with one training document replaced by one of the validation set -> the hash of the training data."""
    import prepare_data

    shutil.copytree(data_dir, folder)
    content = {s: torch.load(folder / f"fineweb_{s}.pt", weights_only=True) for s in ("val", "train")}
    spans = {}
    for split, saved in content.items():
        starts = saved["doc_starts"].tolist()
        spans[split] = {b - a: (a, b) for a, b in zip(starts, [*starts[1:], len(saved["tokens"])], strict=True)}
    size = max(spans["val"].keys() & spans["train"].keys())
    assert size > 50
    tokens, path = content["train"]["tokens"].numpy().copy(), folder / "fineweb_train.pt"
    tokens[slice(*spans["train"][size])] = content["val"]["tokens"].numpy()[slice(*spans["val"][size])]
    path.unlink()
    prepare_data.save_split(path, tokens, content["train"]["doc_starts"].numpy().astype(np.int64), 96, "train")
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["train"]["sha256"] = sha256_file(path)
    write_json(folder / "meta.json", meta)
    return sha256_file(path)
