"""Write the fixed splits that every track trains on: fineweb_{val,train,holdout}.pt and meta.json, in one folder.

    python prepare_data.py                                   # FineWeb, 120M GPT-2 tokens -> fineweb_data/
    python prepare_data.py --verify                          # check the files that are there
    python prepare_data.py --source my_texts/ --data-dir my_data --tokenizer bytes \
        --val-tokens 100000 --train-tokens 2000000 --holdout-tokens 100000
    python prepare_data.py --source demo                     # Python's own library, in bytes, no network -> demo_data/
    python prepare_data.py --from-hub USER/REPO              # splits that someone prepared (--push-to-hub USER/REPO)

A stream of documents is cut into val, train and holdout, in this order. A split takes whole documents until its budget
of tokens is full; the rest of its last document is dropped. Every document is a BOS and its tokens. Whatever the
source, the files have the same names and layout, so training needs only --data-dir.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from slowrun.data import SEQ_SHUFFLE_SEEDS, load_split, read_meta, sha256_file
from slowrun.folder import write_json
from slowrun.rules import OFFICIAL_SHA256

FINEWEB = ("HuggingFaceFW/fineweb", "sample-10BT")
SPLITS = ("val", "train", "holdout")  # the order in which they are cut from the stream
BUDGETS = {"fineweb": (10_000_000, 100_000_000, 10_000_000), "demo": (65_000, 320_000, 65_000)}
SEQ_SIZE = 2049
BATCH_CHARS = 1 << 18  # text that a thread tokenizes at a time
TEXT_FILES = (".txt", ".md")
READABLE = (".parquet", ".jsonl", ".json", *TEXT_FILES)


# ======================================================================================================================
# Tokenizers
# ======================================================================================================================


class GPT2Tokenizer:
    """The GPT-2 vocabulary, from tiktoken; the BOS is <|endoftext|>, and special tokens in a text are plain text."""

    name, vocab_size, bos_id = "gpt2", 50257, 50256

    def __init__(self):
        import tiktoken

        def load(_):
            return iter([tiktoken.get_encoding("gpt2")])

        self.encoding = next(retrying(load, "the GPT-2 vocabulary of tiktoken", VOCABULARY_ADVICE))

    def encode(self, text: str) -> np.ndarray:
        """text -> tokens uint32 (n,); runs without Python's global lock."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair, as JSON can escape it
            return self.encode(text.encode("utf-8", errors="replace").decode())

    def token_bytes(self) -> list[int]:
        return [len(self.encoding.decode_single_token_bytes(i)) for i in range(self.bos_id)] + [0]


class ByteTokenizer:
    """The bytes of UTF-8 are the tokens, and 256 is the BOS."""

    name, vocab_size, bos_id = "bytes", 257, 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)

    def token_bytes(self) -> list[int]:
        return [1] * 256 + [0]


# ======================================================================================================================
# Sources of documents
# ======================================================================================================================


HUB_ADVICE = """
  network  is huggingface.co reachable? is there a proxy?{offline}
  token    HF_TOKEN, or `hf auth login`, lifts rate limits and opens private repositories
  cache    HF_HOME names the folder of the cache
  instead  prepare the data on another machine and copy the folder, or use --push-to-hub and --from-hub;
           or give a folder with the parquet files of sample-10BT as --source"""
VOCABULARY_ADVICE = """
  network  is the host above reachable? is there a proxy?
  cache    TIKTOKEN_CACHE_DIR names a folder that has the vocabulary, copied from another machine
  instead  --tokenizer bytes needs no vocabulary (for your own texts); or prepare the data on another machine"""


def retrying(
    open_stream: Callable[[int], Iterable],
    what: str,
    advice: str = HUB_ADVICE,
    attempts: int = 5,
    pause_s: float = 2.0,
) -> Iterator:
    """Yield from open_stream(number of items to skip), and open it again after network errors.

    Every item resets the number of attempts; the pauses between attempts double. ValueError, with the advice, after the
    last attempt, or at once if access is denied.
    """
    done = failed = 0
    while True:
        try:
            for item in open_stream(done):
                yield item
                done, failed = done + 1, 0
            return
        except (ValueError, KeyError, TypeError):  # not an error of the network
            raise
        except Exception as error:
            failed += 1
            status = getattr(getattr(error, "response", None), "status_code", None)
            if failed == attempts or status in (401, 403, 404):
                offline = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name)]
                set_here = f" {', '.join(offline)} is set: unset it" if offline else ""
                message = f"could not reach {what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
                raise ValueError(message + advice.format(offline=set_here)) from error
            pause = pause_s * 2 ** (failed - 1)
            tqdm.write(f"{what}: {type(error).__name__}, attempt {failed} of {attempts}, next in {pause:.0f} s")
            time.sleep(pause)


def fineweb_documents(revision: str) -> Iterator[str]:
    """FineWeb's sample-10BT, streamed in its original order."""
    from datasets import load_dataset

    def open_stream(skip: int):
        dataset = load_dataset(*FINEWEB, split="train", streaming=True, revision=revision)
        return dataset.select_columns("text").skip(skip)

    return (row["text"] for row in retrying(open_stream, f"{FINEWEB[0]} {FINEWEB[1]}"))


def fineweb_revision() -> str:
    from huggingface_hub import HfApi

    return next(retrying(lambda _: iter([HfApi().dataset_info(FINEWEB[0]).sha]), f"{FINEWEB[0]}'s revision"))


def local_files(source: Path) -> list[Path]:
    """The files of a source that can be read, sorted by path."""
    if not source.exists():
        raise ValueError(f"{source} not found: --source is fineweb, demo, or a file or folder ({', '.join(READABLE)})")
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    files = [path for path in files if path.suffix in READABLE]
    if not files:
        raise ValueError(f"{source} has no files that can be read: {', '.join(READABLE)}")
    return files


def local_documents(files: list[Path], text_field: str) -> Iterator[str]:
    """Rows of parquet and JSON lines files by their text field, text files whole."""
    for path in files:
        if path.suffix in TEXT_FILES:
            yield path.read_text(encoding="utf-8", errors="replace")
            continue
        for number, row in enumerate(read_parquet(path) if path.suffix == ".parquet" else read_json_lines(path), 1):
            text = row.get(text_field)
            if not isinstance(text, str):
                fields = ", ".join(sorted(row))
                raise ValueError(
                    f"{path}, row {number}, has no text in {text_field!r}: --text-field names one of {fields}"
                )
            yield text


def read_parquet(path: Path) -> Iterator[dict]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
        yield from batch.to_pylist()


def read_json_lines(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not JSON ({error}): one object a line is needed") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}, is not a JSON object: one object a line is needed")
            yield row


def demo_documents() -> Iterator[str]:
    """The standard library's sources and its documentation, in documents of about 4,000 characters.

    Files are in the order of the hashes of their names, which mixes packages; the documents of a file stay together.
    """
    from pydoc_data.topics import topics

    texts = {f"topic {name}": text for name, text in topics.items()}
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in library.rglob("*.py"):
        name = path.relative_to(library).as_posix()
        if not name.startswith(("site-packages/", "dist-packages/", "test/", "idlelib/", "encodings/", "pydoc_data/")):
            texts[name] = path.read_text(encoding="utf-8", errors="replace")
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        document = ""
        for line in texts[name].splitlines(keepends=True):
            document += line
            if len(document) >= 4000:
                yield document
                document = ""
        if document:
            yield document


# ======================================================================================================================
# From documents to splits
# ======================================================================================================================


def tokenized(documents: Iterable[str], tokenizer, threads: int) -> Iterator[np.ndarray]:
    """The documents' tokens, in order; threads tokenize batches ahead of the consumer."""

    def encode(batch: list[str]) -> list[np.ndarray]:
        return [tokenizer.encode(text) for text in batch]

    with ThreadPoolExecutor(threads) as pool:
        waiting, batch, size = deque(), [], 0
        try:
            for text in documents:
                batch.append(text)
                size += len(text)
                if size >= BATCH_CHARS:
                    waiting.append(pool.submit(encode, batch))
                    batch, size = [], 0
                    if len(waiting) > 2 * threads:
                        yield from waiting.popleft().result()
            waiting.append(pool.submit(encode, batch))
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def take_split(stream: Iterator[np.ndarray], budget: int, bos_id: int, bar: tqdm) -> tuple[np.ndarray, np.ndarray]:
    """Take documents until `budget` tokens are full, and cut the last -> tokens uint16 (budget,), doc_starts int64."""
    tokens, starts, used = np.empty(budget, dtype=np.uint16), array("q"), 0
    while used < budget:
        document = next(stream, None)
        if document is None:
            break
        starts.append(used)
        tokens[used] = bos_id
        taken = document[: budget - used - 1]
        tokens[used + 1 : used + 1 + len(taken)] = taken
        used += 1 + len(taken)
        bar.update(1 + len(taken))
    return tokens[:used], np.array(starts, dtype=np.int64)


def save_split(path: Path, tokens: np.ndarray, doc_starts: np.ndarray, bos_id: int, split: str) -> None:
    """Write a split, byte for byte in the form of the published files; `path` has its final name, in another folder.

    The archive contains the stem of the path, and each tensor's whole storage.
    """
    content = {
        "tokens": torch.from_numpy(tokens),
        "doc_starts": torch.from_numpy(doc_starts),
        "bos_id": int(bos_id),
        "seq_shuffle_seed": int(SEQ_SHUFFLE_SEEDS[split]),
        "seq_size": SEQ_SIZE,
    }
    for key in ("tokens", "doc_starts"):
        assert content[key].untyped_storage().nbytes() == content[key].nbytes, f"{key} must own its storage"
    torch.save(content, path)


def entropy(tokens: np.ndarray) -> float:
    """The entropy of single tokens, in nats: the loss of the best model without context."""
    chunks = np.array_split(tokens, len(tokens) // 1_000_000 + 1)  # to save memory
    frequencies = sum(np.bincount(chunk, minlength=1 << 16) for chunk in chunks) / len(tokens)
    frequencies = frequencies[frequencies > 0]
    return float(-(frequencies * np.log(frequencies)).sum())


def prepare(
    documents: Iterable[str], tokenizer, budgets: dict[str, int], data_dir: Path, origin: dict, threads: int
) -> dict:
    """Write all splits and meta.json -> meta. The files get their names once all are complete."""
    start_s = time.perf_counter()
    for stale in data_dir.glob(".preparing-*"):  # left by a run that was killed
        shutil.rmtree(stale)
    with (
        tempfile.TemporaryDirectory(dir=data_dir, prefix=".preparing-") as staging,
        tqdm(total=sum(budgets.values()), unit="tok", unit_scale=True, desc="tokenizing") as bar,
    ):
        stream, splits = tokenized(documents, tokenizer, threads), {}
        for split, budget in budgets.items():
            tokens, doc_starts = take_split(stream, budget, tokenizer.bos_id, bar)
            if len(tokens) < budget:
                raise ValueError(
                    f"the source ended after {bar.n:,} tokens: {split} has {len(tokens):,} of {budget:,}. "
                    f"Lower --val-tokens, --train-tokens or --holdout-tokens"
                )
            path = Path(staging) / f"fineweb_{split}.pt"
            save_split(path, tokens, doc_starts, tokenizer.bos_id, split)
            splits[split] = {"tokens": len(tokens), "documents": len(doc_starts), "sha256": sha256_file(path)}
            sizes = f"{len(tokens):,} tokens, {len(doc_starts):,} documents"
            bar.write(f"{split}: {sizes}, entropy of single tokens {entropy(tokens):.4f} nats")
        meta = origin | {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id}
        meta |= {"splits": splits, "token_bytes": tokenizer.token_bytes()}
        write_json(Path(staging) / "meta.json", meta)
        move_into(Path(staging), data_dir)
    total, elapsed_s = sum(budgets.values()), time.perf_counter() - start_s
    print(f"wrote {data_dir}: {total:,} tokens in {elapsed_s:.1f} s, {total / elapsed_s / 1e6:.2f}M tok/s")
    return meta


def move_into(staging: Path, data_dir: Path) -> None:
    """Replace the files of a data folder with those of a folder on the same disk.

    meta.json comes last: until then the hashes in the old one make training refuse a mixture.
    """
    for name in [*(f"fineweb_{split}.pt" for split in SPLITS), "meta.json"]:
        if not (staging / name).exists():
            (data_dir / name).unlink(missing_ok=True)
            continue
        with open(staging / name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(staging / name, data_dir / name)


# ======================================================================================================================
# Verification and the Hub
# ======================================================================================================================


def verify(data_dir: Path) -> list[str]:
    """Check the files of a data folder and print what they are -> the problems, empty if there are none."""
    try:
        meta = read_meta(str(data_dir))
    except ValueError as error:
        return [str(error)]
    problems, published = [], {}
    vocab_size = meta["vocab_size"] if meta else 50257
    for split in SPLITS:
        promised = split in (meta["splits"] if meta else OFFICIAL_SHA256)
        if not promised and not (data_dir / f"fineweb_{split}.pt").exists():
            print(f"{split}: none")
            continue
        try:
            found = load_split(str(data_dir), split, vocab_size, sequence_len=1)
        except ValueError as error:
            problems.append(str(error))
            continue
        published[split] = found.sha256 == OFFICIAL_SHA256.get(split)
        verdict = "sound"
        if split in OFFICIAL_SHA256 and (not meta or meta["source"] == "fineweb"):
            verdict = "sound, the published file" if published[split] else "sound, but not the published file"
        sizes = f"{len(found.tokens):,} tokens, {found.num_documents:,} documents"
        print(f"{split}: {sizes}, {verdict} ({found.sha256[:16]})")
    if meta and meta["source"] == "fineweb":
        full = dict(zip(SPLITS, BUDGETS["fineweb"], strict=True))
        if all(meta["splits"][split]["tokens"] == full[split] for split in OFFICIAL_SHA256):
            wrong = [split for split in OFFICIAL_SHA256 if not published.get(split)]
            problems += [f"{split} is FineWeb at full size, but not the published file" for split in wrong]
    return problems


def is_published(data_dir: Path) -> bool:
    """Whether a folder has the files whose hashes are published."""
    paths = {data_dir / f"fineweb_{split}.pt": sha256 for split, sha256 in OFFICIAL_SHA256.items()}
    return all(path.exists() and sha256_file(path) == sha256 for path, sha256 in paths.items())


def from_hub(repo: str, data_dir: Path) -> None:
    """Download splits that --push-to-hub uploaded, and verify them before they get their names."""
    from huggingface_hub import snapshot_download

    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".preparing-") as staging:
        patterns = ["fineweb_*.pt", "meta.json"]

        def download(_):
            return iter([snapshot_download(repo, repo_type="dataset", allow_patterns=patterns, local_dir=staging)])

        next(retrying(download, f"the dataset {repo}"))
        if problems := verify(Path(staging)):
            raise ValueError(f"the files of {repo} are not sound: " + "; ".join(problems))
        move_into(Path(staging), data_dir)


def push_to_hub(repo: str, data_dir: Path) -> None:
    """Upload verified splits to a private dataset repository, which is created if it does not exist."""
    from huggingface_hub import HfApi

    if problems := verify(data_dir):
        raise ValueError(f"not uploading {data_dir}: " + "; ".join(problems))

    def upload(_):
        HfApi().create_repo(repo, repo_type="dataset", private=True, exist_ok=True)
        options = {"repo_type": "dataset", "folder_path": data_dir, "allow_patterns": ["fineweb_*.pt", "meta.json"]}
        return iter([HfApi().upload_folder(repo_id=repo, **options)])

    next(retrying(upload, f"the dataset {repo}"))
    print(f"uploaded {data_dir} to https://huggingface.co/datasets/{repo}")


# ======================================================================================================================
# Command line
# ======================================================================================================================


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--source", default="fineweb", help="fineweb, demo, or a file or folder of texts [fineweb]")
    parser.add_argument("--data-dir", type=Path, help="where the splits are [fineweb_data; demo_data for the demo]")
    parser.add_argument("--text-field", default="text", help="field of parquet and JSON files that has the text [text]")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"), help="[gpt2; bytes for the demo]")
    for split, budget in zip(SPLITS, BUDGETS["fineweb"], strict=True):
        parser.add_argument(f"--{split}-tokens", type=int, help=f"budget of {split} [{budget}; less for the demo]")
    parser.add_argument("--revision", help="revision of FineWeb [the newest, which meta.json records]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads that tokenize [all cores]")
    parser.add_argument("--force", action="store_true", help="prepare again what is already there")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="only check the files that are there")
    what.add_argument("--from-hub", metavar="REPO", help="download prepared splits from a dataset repository")
    what.add_argument("--push-to-hub", metavar="REPO", help="upload the splits to a dataset repository")
    arguments = parser.parse_args(argv)
    demo = arguments.source == "demo"
    arguments.data_dir = arguments.data_dir or Path("demo_data" if demo else "fineweb_data")
    arguments.tokenizer = arguments.tokenizer or ("bytes" if demo else "gpt2")
    defaults = BUDGETS["demo" if demo else "fineweb"]
    given = [getattr(arguments, f"{split}_tokens") for split in SPLITS]
    arguments.budgets = {s: b if g is None else g for s, b, g in zip(SPLITS, defaults, given, strict=True)}
    return arguments


def check_overwriting(data_dir: Path) -> None:
    """Refuse a data folder that has splits, which only --force may replace (ValueError)."""
    present = sorted(path.name for path in data_dir.glob("fineweb_*.pt"))
    if present:
        raise ValueError(f"{data_dir} has {', '.join(present)}: choose another --data-dir, or --force")


def is_there(data_dir: Path, origin: dict, wanted: dict[str, int]) -> bool:
    """Whether a data folder has all wanted splits; ValueError if it has other data."""
    meta = read_meta(str(data_dir))
    if meta is None:
        if origin["source"] == "fineweb" and is_published(data_dir):
            print(f"{data_dir} has the published files (--force prepares them again, with a holdout and a meta.json)")
            return True
        check_overwriting(data_dir)
        return False
    present = {split: info["tokens"] for split, info in meta["splits"].items()}
    if present != wanted or any(meta.get(key) != value for key, value in origin.items()):
        found = f"{data_dir} has other data, {meta['source']} {present}"
        raise ValueError(f"{found}: choose another --data-dir, or --force")
    complete = all((data_dir / f"fineweb_{split}.pt").exists() for split in wanted)
    if complete:
        print(f"{data_dir} is already there (--force prepares it again)")
    return complete


def prepare_source(arguments: argparse.Namespace) -> None:
    """Prepare --source, unless the data folder has the same data already."""
    source, data_dir, budgets = arguments.source, arguments.data_dir, arguments.budgets
    if min(budgets["val"], budgets["train"]) < 2 or min(budgets["holdout"], arguments.threads - 1) < 0:
        raise ValueError(f"the budgets {budgets} and the number of threads {arguments.threads} must be positive")
    wanted = {split: budget for split, budget in budgets.items() if budget}
    origin = {"source": source}
    if source not in ("fineweb", "demo"):
        files = local_files(Path(source))
        listing = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
        digest = hashlib.sha256(listing.encode()).hexdigest()
        origin |= {"revision": f"{len(files)} file(s), SHA-256 of names and sizes {digest}"}
        origin |= {"text_field": arguments.text_field}
    if not arguments.force and is_there(data_dir, origin | {"tokenizer": arguments.tokenizer}, wanted):
        return
    if source == "fineweb":
        origin["revision"] = arguments.revision or fineweb_revision()
        documents = fineweb_documents(origin["revision"])
    elif source == "demo":
        origin["revision"], documents = f"Python {platform.python_version()}", demo_documents()
    else:
        documents = local_documents(files, arguments.text_field)
    tokenizer = GPT2Tokenizer() if arguments.tokenizer == "gpt2" else ByteTokenizer()
    prepare(documents, tokenizer, wanted, data_dir, origin, arguments.threads)


def main(argv: list[str] | None = None) -> int:
    """Prepare, verify, download or upload -> exit code: 0 all is well, 2 it is not; the reason is printed."""
    arguments = parse_arguments(argv)
    try:
        arguments.data_dir.mkdir(parents=True, exist_ok=True)
        if arguments.push_to_hub:
            push_to_hub(arguments.push_to_hub, arguments.data_dir)
        else:
            if arguments.from_hub:
                if not arguments.force:
                    check_overwriting(arguments.data_dir)
                from_hub(arguments.from_hub, arguments.data_dir)
            elif not arguments.verify:
                prepare_source(arguments)
            if problems := verify(arguments.data_dir):
                raise ValueError("\n".join(problems))
    except (ValueError, OSError) as error:
        print(f"prepare_data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
