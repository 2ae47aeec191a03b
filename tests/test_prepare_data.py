"""Preparation of splits: cutting, sources, verification, the network, the Hub, interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, golden

import prepare_data
from prepare_data import ByteTokenizer, main, prepare, retrying
from slowrun.data import sha256_file
from slowrun.rules import OFFICIAL_SHA256

TEXTS = [f"document {i}: " + "xyz " * (i % 7) for i in range(60)]
BUDGETS = ["--val-tokens=100", "--train-tokens=400", "--holdout-tokens=100", "--tokenizer=bytes"]


def contents(folder: Path, split: str) -> list[int]:
    return torch.load(folder / f"fineweb_{split}.pt", weights_only=True)["tokens"].tolist()


def expected_splits() -> dict[str, list[int]]:
    """The rule, written out: whole documents until the budget is full, the last one cut and its rest dropped."""
    documents, splits = iter(TEXTS), {}
    for split, budget in (("val", 100), ("train", 400), ("holdout", 100)):
        tokens: list[int] = []
        while len(tokens) < budget:
            tokens += [256, *next(documents).encode()]
        splits[split] = tokens[:budget]
    return splits


def write_texts(folder: Path, kind: str) -> Path:
    folder.mkdir()
    if kind == "parquet":
        table = pyarrow.table({"id": list(range(60)), "text": TEXTS})
        pyarrow.parquet.write_table(table.slice(0, 25), folder / "a.parquet", row_group_size=10)
        pyarrow.parquet.write_table(table.slice(25), folder / "b.parquet")
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS))
    else:
        for i, text in enumerate(TEXTS):
            (folder / f"{i:03d}.txt").write_text(text)
        (folder / "ignored.bin").write_bytes(b"\0")
    return folder


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_local_sources_give_the_same_splits(tmp_path, kind):
    source, data_dir = write_texts(tmp_path / "texts", kind), tmp_path / "data"
    assert main([f"--source={source}", f"--data-dir={data_dir}", *BUDGETS]) == 0
    for split, tokens in expected_splits().items():
        assert contents(data_dir, split) == tokens
        content = torch.load(data_dir / f"fineweb_{split}.pt", weights_only=True)
        assert list(content) == ["tokens", "doc_starts", "bos_id", "seq_shuffle_seed", "seq_size"]
        assert content["tokens"].dtype == torch.uint16 and content["doc_starts"].dtype == torch.int64
        assert content["doc_starts"].tolist() == [i for i, token in enumerate(tokens) if token == 256]
        assert (content["bos_id"], content["seq_size"]) == (256, 2049)
    meta = json.loads((data_dir / "meta.json").read_text())
    assert meta["source"] == str(source) and "SHA-256" in meta["revision"]
    assert meta["token_bytes"] == [1] * 256 + [0] and meta["vocab_size"] == 257
    for split, info in meta["splits"].items():
        assert info["sha256"] == sha256_file(data_dir / f"fineweb_{split}.pt")
        assert info["tokens"] == len(contents(data_dir, split))
    assert {path.name for path in data_dir.iterdir()} == {"meta.json", *(f"fineweb_{s}.pt" for s in meta["splits"])}


def test_one_file_and_another_text_field(tmp_path):
    table = pyarrow.table({"body": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    arguments = [f"--source={tmp_path / 'a.parquet'}", f"--data-dir={tmp_path / 'data'}", *BUDGETS]
    assert main([*arguments, "--text-field=body"]) == 0
    assert contents(tmp_path / "data", "train") == expected_splits()["train"]


def test_bad_sources_are_refused(tmp_path, capsys):
    source = write_texts(tmp_path / "texts", "jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": ')
    (tmp_path / "list.json").write_text('["one", "two"]')
    cases = [
        (["--source=nowhere"], "nowhere not found: --source is fineweb, demo, or a file or folder"),
        ([f"--source={tmp_path / 'empty'}"], "has no files that can be read: .parquet"),
        (
            [f"--source={source}", "--text-field=body"],
            "a.jsonl, row 1, has no text in 'body': --text-field names one of n",
        ),
        ([f"--source={source}", "--text-field=n"], "a.jsonl, row 1, has no text in 'n'"),
        ([f"--source={tmp_path / 'broken.jsonl'}"], "broken.jsonl, line 2, is not JSON"),
        ([f"--source={tmp_path / 'list.json'}"], "list.json, line 1, is not a JSON object"),
        ([f"--source={source}", "--train-tokens=100000"], "the source ended after"),
        ([f"--source={source}", "--train-tokens=0"], "must be positive"),
    ]
    for arguments, message in cases:
        assert main([f"--data-dir={tmp_path / 'data'}", *BUDGETS, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert not list((tmp_path / "data").iterdir())


def test_a_source_that_ends_early_says_how_much_there_was(tmp_path):
    rest = sum(len(text) + 1 for text in TEXTS[5:])  # five documents fill the first split
    message = f"the source ended after {rest + 100:,} tokens: train has {rest:,} of 5,000"
    with pytest.raises(ValueError, match=message) as caught:
        prepare(TEXTS, ByteTokenizer(), {"val": 100, "train": 5000}, tmp_path, {}, 1)
    assert "Lower --val-tokens" in str(caught.value)


def test_what_is_there_is_not_prepared_again(tmp_path, capsys):
    source = write_texts(tmp_path / "texts", "jsonl")
    arguments = [f"--source={source}", f"--data-dir={tmp_path / 'data'}", *BUDGETS]
    assert main(arguments) == 0
    path = tmp_path / "data" / "fineweb_train.pt"
    before = path.stat().st_mtime_ns
    assert main(arguments) == 0 and path.stat().st_mtime_ns == before
    assert "is already there" in capsys.readouterr().out
    assert main([*arguments, "--train-tokens=300"]) == 2
    assert "has other data" in capsys.readouterr().err
    assert main([*arguments, "--train-tokens=300", "--force"]) == 0
    assert len(contents(tmp_path / "data", "train")) == 300

    less = [*arguments, "--train-tokens=300"]
    path.unlink()
    assert main(less) == 0 and path.exists()  # one is missing: they are prepared again
    path.write_bytes(path.read_bytes()[:-1])
    assert main(less) == 2 and "prepare the data again, with --force" in capsys.readouterr().err
    assert main([*less, "--holdout-tokens=0", "--force"]) == 0
    assert not (tmp_path / "data" / "fineweb_holdout.pt").exists()
    (source / "more.jsonl").write_text('{"text": "more"}\n')
    assert main([*less, "--holdout-tokens=0"]) == 2
    assert "has other data" in capsys.readouterr().err


def test_files_are_not_overwritten_unasked(tmp_path, hub, monkeypatch, capsys):
    """Splits without a meta.json, as the original project's: kept, and enough if they are the published ones."""
    data = tmp_path / "data"
    arguments = [f"--source={write_texts(tmp_path / 'texts', 'jsonl')}", f"--data-dir={data}", *BUDGETS]
    assert main(arguments) == 0 and main([f"--data-dir={data}", "--push-to-hub=me/shards"]) == 0
    (data / "meta.json").unlink()
    for command in (arguments, [f"--data-dir={data}", "--from-hub=me/shards"], [f"--data-dir={data}"]):
        assert main(command) == 2
        assert "has fineweb_holdout.pt, fineweb_train.pt, fineweb_val.pt: choose another" in capsys.readouterr().err
    hashes = {split: prepare_data.sha256_file(data / f"fineweb_{split}.pt") for split in ("val", "train")}
    monkeypatch.setattr(prepare_data, "OFFICIAL_SHA256", hashes)
    monkeypatch.setattr(prepare_data, "verify", lambda data_dir: [])
    assert main([f"--data-dir={data}"]) == 0 and "has the published files" in capsys.readouterr().out
    assert main([f"--data-dir={data}", "--from-hub=me/shards", "--force"]) == 0 and (data / "meta.json").exists()


def test_half_a_surrogate_pair(gpt2, tmp_path):
    text = json.loads('"a \\ud83d b"')
    assert gpt2.encode(text).tolist() == gpt2.encode("a ? b").tolist()
    assert bytes(ByteTokenizer().encode(text)) == b"a ? b"


def test_special_tokens_in_a_text_are_text(gpt2):
    """And encode, which gives arrays, equals encode_ordinary."""
    for text in ("", "one <|endoftext|> two", "naïve 東京 🚲\n\n\ttabs", "   spaces", "a" * 300):
        assert gpt2.encode(text).tolist() == gpt2.encoding.encode_ordinary(text)
        assert 50256 not in gpt2.encode(text)
    lengths = gpt2.token_bytes()
    assert len(lengths) == 50257 and lengths[50256] == 0
    text = "naïve 東京 costs 12 €"
    assert sum(lengths[token] for token in gpt2.encode(text)) == len(text.encode())


def test_bytes_round_trip():
    tokens = ByteTokenizer().encode("naïve 東京")
    assert bytes(tokens.tolist()).decode() == "naïve 東京"


def test_threads_keep_the_order(monkeypatch):
    monkeypatch.setattr(prepare_data, "BATCH_CHARS", 50)

    class Uneven(ByteTokenizer):
        def encode(self, text):
            time.sleep(0.002 * (hash(text) % 3))
            return super().encode(text)

    found = prepare_data.tokenized(TEXTS, Uneven(), 4)
    assert [bytes(tokens.tolist()).decode() for tokens in found] == TEXTS


def test_documents_are_taken_only_as_far_as_needed(tmp_path):
    """A stream of 10 billion tokens must not be read to its end."""

    def endless():
        i = 0
        while True:
            yield f"document {i}" * 1000
            i += 1

    prepare(endless(), ByteTokenizer(), {"val": 3000, "train": 50_000}, tmp_path, {"source": "x", "revision": "y"}, 2)
    assert len(contents(tmp_path, "train")) == 50_000


def test_verify(tmp_path, capsys):
    arguments = [f"--source={write_texts(tmp_path / 'texts', 'jsonl')}", f"--data-dir={tmp_path / 'data'}", *BUDGETS]
    assert main(arguments) == 0
    verify = ["--verify", f"--data-dir={tmp_path / 'data'}"]
    assert main(verify) == 0
    assert "train: 400 tokens, " in capsys.readouterr().out
    path = tmp_path / "data" / "fineweb_train.pt"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert main(verify) == 2
    assert "fineweb_train.pt is damaged: its SHA-256" in capsys.readouterr().err
    path.unlink()
    assert main(verify) == 2
    assert "fineweb_train.pt not found" in capsys.readouterr().err
    assert main(["--verify", f"--data-dir={tmp_path / 'nothing'}"]) == 2


def test_fineweb_is_streamed_and_must_be_the_published_files(tmp_path, monkeypatch, capsys):
    """The real loading code on a small file of its form; at full size the hashes are compared with published ones."""
    columns = {"text": TEXTS, "id": [f"<urn:uuid:{i}>" for i in range(60)], "language_score": [0.9] * 60}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "000_00000.parquet", row_group_size=20)
    real, asked = datasets.load_dataset, {}

    def load_dataset(*path, split, streaming, revision):
        asked.update(path=path, revision=revision)
        return real("parquet", data_files=str(tmp_path / "000_00000.parquet"), split=split, streaming=streaming)

    class Info:
        sha = "abc123"

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    known = {"HuggingFaceFW/fineweb": Info}
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: known[name])
    monkeypatch.setitem(prepare_data.BUDGETS, "fineweb", (100, 400, 100))
    arguments = [f"--data-dir={tmp_path / 'data'}", "--tokenizer=bytes"]
    assert main(arguments) == 2  # these documents are not FineWeb
    assert "train is FineWeb at full size, but not the published file" in capsys.readouterr().err
    assert asked == {"path": ("HuggingFaceFW/fineweb", "sample-10BT"), "revision": "abc123"}
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    assert (meta["source"], meta["revision"]) == ("fineweb", "abc123")
    assert contents(tmp_path / "data", "train") == expected_splits()["train"]
    for split in ("val", "train"):
        monkeypatch.setitem(OFFICIAL_SHA256, split, meta["splits"][split]["sha256"])
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("the published file") == 2


def test_an_interrupted_stream_of_fineweb_goes_on(tmp_path, monkeypatch):
    """The connection breaks after 7 documents: the stream is opened again and the 7 are skipped."""
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    real, opened = datasets.load_dataset, []

    class Breaking:
        def __init__(self, rows):
            self.rows = rows

        def select_columns(self, name):
            return Breaking(self.rows.select_columns(name))

        def skip(self, n):
            opened.append(n)
            return Breaking(self.rows.skip(n))

        def __iter__(self):
            for i, row in enumerate(self.rows):
                if len(opened) == 1 and i == 7:
                    raise ConnectionError("reset by peer")
                yield row

    def load_dataset(*path, split, streaming, revision):
        return Breaking(real("parquet", data_files=str(tmp_path / "a.parquet"), split=split, streaming=streaming))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(prepare_data.time, "sleep", lambda seconds: None)
    assert list(prepare_data.fineweb_documents("abc123")) == TEXTS
    assert opened == [0, 7]


def test_retries_go_on_where_the_stream_broke(monkeypatch, capsys):
    pauses, opened = [], []
    monkeypatch.setattr(prepare_data.time, "sleep", pauses.append)

    def open_stream(skip):
        opened.append(skip)
        for i in range(skip, 10):
            if i in (4, 5) and len(opened) < 4:
                raise ConnectionError("reset by peer")
            yield i

    assert list(retrying(open_stream, "the source")) == list(range(10))
    assert opened == [0, 4, 4, 4] and pauses == [2, 4, 8]
    assert "the source: ConnectionError, attempt 1 of 5, next in 2 s" in capsys.readouterr().out


def test_network_errors_are_explained(monkeypatch):
    monkeypatch.setattr(prepare_data.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tries = []

    def open_stream(skip):
        tries.append(skip)
        raise ConnectionError("no route to host\nand more")

    with pytest.raises(ValueError) as caught:
        list(retrying(open_stream, "the source"))
    message = str(caught.value)
    assert len(tries) == 5 and "could not reach the source: ConnectionError: no route to host\n" in message
    for advice in ("HF_HUB_OFFLINE is set: unset it", "HF_TOKEN", "HF_HOME", "--from-hub"):
        assert advice in message
    with pytest.raises(ValueError, match=r"TIKTOKEN_CACHE_DIR names a folder(.|\n)*--tokenizer bytes"):
        list(retrying(open_stream, "the vocabulary", prepare_data.VOCABULARY_ADVICE, attempts=1))
    tries.pop()

    class Denied(Exception):
        class response:
            status_code = 401

    def denied(skip):
        tries.append(skip)
        raise Denied("401 Client Error")

    with pytest.raises(ValueError, match="HF_TOKEN"):
        list(retrying(denied, "the source"))
    assert len(tries) == 6  # denied: not tried again

    def wrong(skip):
        raise KeyError("a mistake in the code")

    with pytest.raises(KeyError):
        list(retrying(wrong, "the source"))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder in place of the Hub."""
    folder = tmp_path / "hub"

    def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns):
        (folder / repo_id).mkdir(parents=True)
        for pattern in allow_patterns:
            for path in Path(folder_path).glob(pattern):
                (folder / repo_id / path.name).write_bytes(path.read_bytes())

    def snapshot_download(repo_id, *, repo_type, allow_patterns, local_dir):
        for path in (folder / repo_id).iterdir():
            (Path(local_dir) / path.name).write_bytes(path.read_bytes())
        (Path(local_dir) / ".cache").mkdir()

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, repo_type, private, exist_ok: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return folder


def test_through_the_hub(tmp_path, hub, capsys):
    data, other = tmp_path / "data", tmp_path / "other"
    assert main([f"--source={write_texts(tmp_path / 'texts', 'jsonl')}", f"--data-dir={data}", *BUDGETS]) == 0
    assert main([f"--data-dir={data}", "--push-to-hub=me/shards"]) == 0
    assert main([f"--data-dir={other}", "--from-hub=me/shards"]) == 0
    for path in data.iterdir():
        assert (other / path.name).read_bytes() == path.read_bytes()
    assert len(list(other.iterdir())) == 4

    damaged = hub / "me/shards/fineweb_val.pt"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    third = tmp_path / "third"
    assert main([f"--data-dir={third}", "--from-hub=me/shards"]) == 2
    assert "the files of me/shards are not sound" in capsys.readouterr().err
    assert not list(third.iterdir())
    (data / "fineweb_val.pt").write_bytes(b"broken")
    assert main([f"--data-dir={data}", "--push-to-hub=me/other"]) == 2
    assert "not uploading" in capsys.readouterr().err and not (hub / "me/other").exists()


def test_demo_corpus(tmp_path):
    """Text of the Python installation, offline, the same each time."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        assert main(["--source=demo", f"--data-dir={folder}", "--train-tokens=90000", "--val-tokens=20000"]) == 0
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()
    tokens = contents(folders[0], "train")
    text = bytes(token for token in tokens if token < 256).decode(errors="replace")
    assert "def " in text and "import " in text
    documents = np.array(tokens) == 256
    assert documents.sum() > 15 and text.count("\ufffd") < 10
    assert json.loads((folders[0] / "meta.json").read_text())["revision"].startswith("Python 3.")


def test_killed_while_writing(tmp_path):
    """kill -9 in the middle leaves nothing under a final name; the next run clears what was left and succeeds."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import prepare_data\n"
        "prepare_data.move_into = lambda *folders: (print('written', flush=True), time.sleep(60))\n"
        "prepare_data.main(['--source=demo', '--data-dir=' + sys.argv[2], '--train-tokens=50000'])"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path / "data")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while process.stdout.readline() != "written\n":
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = list((tmp_path / "data").iterdir())
    assert len(left) == 1 and left[0].name.startswith(".preparing-")
    assert main(["--source=demo", f"--data-dir={tmp_path / 'data'}", "--train-tokens=50000"]) == 0
    assert len(list((tmp_path / "data").iterdir())) == 4


class GoldenTokenizer:
    """Looks up the golden tokens of each golden document, so that a test of the files needs no vocabulary."""

    name, vocab_size, bos_id = "gpt2", 50257, 50256

    def __init__(self, expected: dict):
        self.tokens, documents = {}, iter(expected["documents"])
        for split in ("val", "train"):
            starts, tokens = expected[split]["doc_starts"], expected[split]["tokens"]
            for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
                self.tokens[next(documents)] = np.array(tokens[start + 1 : end], dtype=np.uint32)

    def encode(self, text: str) -> np.ndarray:
        return self.tokens.get(text, np.zeros(0, dtype=np.uint32))

    def token_bytes(self) -> list[int]:
        return [1] * 50257


def check_golden_splits(tokenizer, folder: Path) -> None:
    expected = golden("shards")
    budgets = {split: expected[f"{split}_tokens"] for split in ("val", "train")}
    origin = {"source": "golden", "revision": "0"}
    meta = prepare(expected["documents"], tokenizer, budgets, folder, origin, 2)
    for split in budgets:
        content = torch.load(folder / f"fineweb_{split}.pt", weights_only=True)
        assert content["tokens"].tolist() == expected[split]["tokens"]
        assert content["doc_starts"].tolist() == expected[split]["doc_starts"]
        assert meta["splits"][split]["sha256"] == expected[split]["sha256"], "the file's bytes differ"


def test_golden_splits_from_golden_tokens(tmp_path):
    check_golden_splits(GoldenTokenizer(golden("shards")), tmp_path)


def test_golden_splits_from_golden_documents(tmp_path, gpt2):
    """With the real tokenizer."""
    check_golden_splits(gpt2, tmp_path)
