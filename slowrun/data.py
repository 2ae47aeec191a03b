"""Splits on disk, the orders in which epochs take them, and the loader of training batches."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slowrun.world import VIRTUAL_RANKS

SEQ_SHUFFLE_SEEDS = {"val": 42, "train": 43, "holdout": 44}  # they also identify the split that a file holds
PREPARE_AGAIN = "prepare the data again, with --force"

# ----------------------------------------------------------------------------------------------------------- files


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, keys: set[str], advice: str) -> dict:
    """A JSON object that has these keys; ValueError with the advice if it is damaged."""
    try:
        content = json.loads(path.read_text())
        missing = keys - content.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {advice}") from None
    return content


# ---------------------------------------------------------------------------------------------------------- splits


@dataclass(frozen=True)
class Split:
    """A data file: tokens (n,) uint16, and the offset of each document's BOS (documents,) int64."""

    tokens: np.ndarray
    doc_starts: np.ndarray
    seq_shuffle_seed: int
    sha256: str  # of the file

    @property
    def num_documents(self) -> int:
        return len(self.doc_starts)

    def sequences(self, length: int) -> np.ndarray:
        """The tokens in file order, cut into sequences (n, length); the tail is dropped."""
        return cut(self.tokens, length)

    def concatenate(self, documents: np.ndarray) -> np.ndarray:
        """The tokens of these documents, in this order: (m,) uint16."""
        starts = self.doc_starts[documents].tolist()
        ends = np.append(self.doc_starts[1:], len(self.tokens))[documents].tolist()
        return np.concatenate([self.tokens[start:end] for start, end in zip(starts, ends, strict=True)])

    def fixed_order(self, num_sequences: int) -> np.ndarray:
        """The order of validation, from the seed in the file: (num_sequences,) int64."""
        return np.random.RandomState(self.seq_shuffle_seed).permutation(num_sequences)


def read_meta(data_dir: str) -> dict | None:
    """meta.json, which prepare_data.py writes beside the splits; None for the original project's files.

    ValueError if it is damaged.
    """
    path = Path(data_dir) / "meta.json"
    keys = {"source", "tokenizer", "vocab_size", "splits", "token_bytes"}
    return read_json(path, keys, PREPARE_AGAIN) if path.exists() else None


def load_split(data_dir: str, split: str, vocab_size: int, sequence_len: int) -> Split:
    """Read a split and check it (ValueError)."""
    path = Path(data_dir) / f"fineweb_{split}.pt"
    if not path.exists():
        prepare = "python prepare_data.py" + " --source demo" * (data_dir == "demo_data")
        raise ValueError(f"{path} not found: run {prepare}, or give --data-dir, the folder that has it")
    sha256 = sha256_file(path)
    meta = read_meta(data_dir)
    if meta is not None:
        check_hash(path, split, sha256, meta)
    tokens, starts, bos, seed = read_split(path)
    kind = {s: name for name, s in SEQ_SHUFFLE_SEEDS.items()}.get(seed, "unknown")
    if kind != split:
        raise ValueError(f"{path} holds the {kind} split (seq_shuffle_seed {seed}), not {split}: {PREPARE_AGAIN}")
    if bos != vocab_size - 1 or tokens.max() > bos:
        raise ValueError(
            f"{path} is of another tokenizer: its BOS is {bos} and its largest token {tokens.max()}, but vocab_size "
            f"{vocab_size} means {vocab_size - 1}: change --data-dir or --vocab-size"
        )
    if len(tokens) <= sequence_len:
        raise ValueError(f"{path} has {len(tokens)} tokens, a sequence needs {sequence_len + 1}: lower --sequence-len")
    return Split(tokens, starts, seed, sha256)


def check_hash(path: Path, split: str, sha256: str, meta: dict) -> None:
    """Check that a file is the one that meta.json describes (ValueError)."""
    if split not in meta["splits"]:
        raise ValueError(f"{path} is not in meta.json: delete it, or {PREPARE_AGAIN}")
    expected = meta["splits"][split]["sha256"]
    if sha256 != expected:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is {sha256[:12]}..., in meta.json {expected[:12]}...: {PREPARE_AGAIN}"
        )


def read_split(path: Path) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(Tokens, which stay on the disk, doc_starts, bos_id, seq_shuffle_seed) of a file; ValueError if it is damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tokens, starts = content["tokens"].numpy(), content["doc_starts"].numpy()
        bos, seed = content["bos_id"], content["seq_shuffle_seed"]
        is_sound = (
            tokens.dtype == np.uint16
            and starts.dtype == np.int64
            and starts[0] == 0
            and starts.max() < len(tokens)
            and (np.diff(starts) > 0).all()
            and (tokens[starts] == bos).all()
        )
    except Exception as error:  # a damaged archive fails in many ways
        raise ValueError(f"{path} is truncated or damaged ({type(error).__name__}): {PREPARE_AGAIN}") from None
    if not is_sound:
        raise ValueError(f"{path} is damaged: its documents do not each start with the BOS {bos}: {PREPARE_AGAIN}")
    return tokens, starts, bos, seed


def load_splits(data_dir: str, vocab_size: int, sequence_len: int) -> dict[str, Split]:
    """The splits by name: train, val, and holdout if there is one (the original project's files have none)."""
    names = ["train", "val"]
    if (Path(data_dir) / "fineweb_holdout.pt").exists():
        names.append("holdout")
    return {name: load_split(data_dir, name, vocab_size, sequence_len) for name in names}


def unread_split(num_tokens: int) -> Split:
    """A stand-in for a missing split, for plans: tokens that take no memory, in documents of 1,000."""
    tokens = np.broadcast_to(np.uint16(0), num_tokens)
    return Split(tokens, np.arange(0, num_tokens, 1000), SEQ_SHUFFLE_SEEDS["train"], sha256="")


def token_bytes(data_dir: str, vocab_size: int) -> tuple[Tensor | None, str]:
    """(The length in bytes of every token, 0 for the BOS: (V,) int64; its source, for the header).

    Without a meta.json the lengths come from tiktoken, for GPT-2's tokens, or are None. ValueError if meta.json is of
    another tokenizer.
    """
    meta = read_meta(data_dir)
    if meta is not None:
        found = len(meta["token_bytes"])
        if found != vocab_size:
            raise ValueError(
                f"meta.json has the bytes of {found} tokens, vocab_size is {vocab_size}: change --vocab-size"
            )
        return torch.tensor(meta["token_bytes"]), "from meta.json"
    if vocab_size != 50257:
        return None, "left out, without a meta.json"
    try:
        import tiktoken

        encoding = tiktoken.get_encoding("gpt2")
        lengths = [len(encoding.decode_single_token_bytes(i)) for i in range(50256)]
        return torch.tensor([*lengths, 0]), "from tiktoken"
    except Exception as error:  # not installed, or its vocabulary cannot be downloaded
        return None, f"left out: no meta.json beside the data, and tiktoken fails ({type(error).__name__})"


# ---------------------------------------------------------------------------------------------------------- orders


def cut(items: np.ndarray, length: int) -> np.ndarray:
    """Items (n,) cut into rows (n // length, length); the tail is dropped."""
    return items[: len(items) // length * length].reshape(-1, length)


def permutation(n: int, seed: int) -> np.ndarray:
    """torch.randperm of a generator with this seed: (n,) int64."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()


def permuted(items: np.ndarray, seeds: Iterable[int]) -> np.ndarray:
    """The items (n, ...), permuted once for each seed, every time starting from the order before."""
    for seed in seeds:
        items = items[permutation(len(items), seed)]
    return items


def shuffled_documents(split: Split, length: int, document_seeds: Iterable[int], sequence_seed: int) -> np.ndarray:
    """The sequences (n, length) uint16 of an epoch that shuffles documents, in the order of training.

    The documents are permuted once for each of their seeds, concatenated and cut; then the sequences are permuted.
    """
    documents = permuted(np.arange(split.num_documents), document_seeds)
    return permuted(cut(split.concatenate(documents), length), [sequence_seed])


def shuffled_micro_steps(split: Split, length: int, micro_batch: int, micro_step_seeds: Iterable[int]) -> np.ndarray:
    """The sequences (n, length) uint16 of an epoch that shuffles micro-steps, which always have the same sequences.

    The sequences of the file, in their fixed order, are cut into micro-steps of 8 x micro_batch, which are permuted
    once for each seed; sequences that do not fill a micro-step are dropped.
    """
    sequences = split.sequences(length)
    micro_steps = cut(split.fixed_order(len(sequences)), VIRTUAL_RANKS * micro_batch)
    return sequences[permuted(micro_steps, micro_step_seeds).ravel()]


class Loader:
    """The batches of optimizer steps, in an order that does not depend on the number of processes.

    make_epoch(epoch) returns the sequences of an epoch, counted from 1, in the order of training: (n, T + 1) uint16. A
    thread calls it one epoch ahead. Each micro-step takes the epoch's next 8 x micro_batch sequences, virtual rank
    after virtual rank; sequences that do not fill a micro-step are dropped. An optimizer step may span two epochs.
    """

    def __init__(
        self,
        make_epoch: Callable[[int], np.ndarray],
        micro_batch: int,
        micro_steps_before: np.ndarray,
        micro_steps_per_epoch: int,
        virtual_ranks: range,
    ):
        """micro_steps_before (N + 1,): the micro-steps before each optimizer step, over all epochs, and their total."""
        self.make_epoch = make_epoch
        self.micro_batch = micro_batch
        self.micro_steps_before = micro_steps_before
        self.micro_steps_per_epoch = micro_steps_per_epoch
        self.virtual_ranks = virtual_ranks
        self.last_epoch = math.ceil(int(micro_steps_before[-1]) / micro_steps_per_epoch)
        self.epochs: dict[int, Future] = {}
        self.thread = ThreadPoolExecutor(1)

    def epoch(self, epoch: int) -> np.ndarray:
        """The sequences of an epoch. Starts making the next epoch, and drops those before."""
        for number in range(epoch, min(epoch + 1, self.last_epoch) + 1):
            if number not in self.epochs:
                self.epochs[number] = self.thread.submit(self.make_epoch, number)
        for number in [number for number in self.epochs if number < epoch]:
            del self.epochs[number]
        return self.epochs[epoch].result()

    def batch(self, step: int) -> Tensor:
        """The sequences of a step: (virtual ranks of this process, micro-steps * micro_batch, T + 1) int64."""
        rows: list[list[np.ndarray]] = [[] for _ in self.virtual_ranks]
        for micro_step in range(self.micro_steps_before[step], self.micro_steps_before[step + 1]):
            epoch, index = divmod(micro_step, self.micro_steps_per_epoch)
            sequences = self.epoch(epoch + 1)
            for rows_of_rank, virtual_rank in zip(rows, self.virtual_ranks, strict=True):
                first = (index * VIRTUAL_RANKS + virtual_rank) * self.micro_batch
                rows_of_rank.append(sequences[first : first + self.micro_batch])
        batch = np.stack([np.concatenate(rows_of_rank) for rows_of_rank in rows])
        return torch.from_numpy(batch.astype(np.int64))
