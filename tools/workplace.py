"""The place where tools run scripts: a temporary folder, random data in it, and processes that never outlive it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

MARK = "SLOWRUN_WORKPLACE"  # environment variable by which the processes of a workplace are found
SEEDS = {"train": 43, "val": 42}  # seq_shuffle_seed of the splits: part of the data format
MEDIAN_DOCUMENT = 467  # tokens; with sigma 1 the mean is 770, as in FineWeb, where 100M tokens are 130,000 documents
POLL_S = 0.2
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ScriptFailed(RuntimeError):
    """A script ended before it had done what was wanted; the message is one line."""


def launch_command(script: Path, flags: list[str], processes: int) -> list[str]:
    """The command by which a user starts a script: with torchrun if there are several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else []), str(script), *flags]


def last_error(output: str) -> str:
    """The line of a script's output that says why it failed: its own error message, an exception, or the last line."""
    lines = [re.sub(r"^\[rank\d+\]: *", "", line).strip() for line in output.splitlines() if line.strip()]
    forms = (r"^\S+\.py: error: ", r"^([\w.]+\.)?\w*(Error|Exception|Interrupt|Exit)\b(: |$)")
    for form in forms:
        found = [line for line in lines if re.search(form, line)]
        if found:
            return found[-1] if form == forms[0] else found[0]
    return lines[-1] if lines else "it printed nothing"


class Workplace:
    """A temporary folder (TMPDIR says where) and the processes that are started from it.

    As a context manager: on leaving it, whatever the reason, all its processes are killed, those that they started
    included, and the folder is removed.
    """

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slowrun-"))
        self.started: list[subprocess.Popen] = []
        self.output = self.folder / "output.txt"  # of the last process that was run
        self.data_folders: dict[tuple[int, int, int], Path] = {}

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, *_) -> None:
        kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.kill()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            for number, handler in kept.items():
                signal.signal(number, handler)

    def marked(self) -> list[int]:
        """The processes that were started here, and those that they started; none where there is no /proc."""
        mark, found = f"{MARK}={self.folder}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def kill(self) -> None:
        """End all processes. torchrun starts each worker in a new process group, so killing one group is not enough."""
        for process in self.started:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
        until = time.monotonic() + 10
        while (left := self.marked()) and time.monotonic() < until:
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for process in self.started:
            process.wait()
        self.started.clear()

    def start(self, command: list[str], output: Path, **environment: str) -> subprocess.Popen:
        """Start a process in a new process group, in the folder, with its output in a file."""
        inherited = {name: value for name, value in os.environ.items() if name not in RANKS}
        marked = inherited | {MARK: str(self.folder), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        with open(output, "wb") as file:
            options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(
                command, cwd=self.folder, env=marked | environment, start_new_session=True, **options
            )
        self.started.append(process)
        return process

    def run(self, command: list[str], wanted: Callable[[str], bool] | None, until: float, **environment: str) -> str:
        """Run a command until its output is enough, or until a time, by time.monotonic -> its output.

        wanted: output so far -> whether it is enough (None: it runs to its end). ScriptFailed if it ends before, or
        with another exit code than 0. None of its processes is left afterwards.
        """
        process = self.start(command, self.output, **environment)
        try:
            while process.poll() is None and time.monotonic() < until:
                if wanted is not None and wanted(self.printed()):
                    break
                time.sleep(POLL_S)
            code = process.poll()
        finally:
            self.kill()
        text = self.printed()
        if code is None and wanted is None:
            raise ScriptFailed("no answer in time: give it more --minutes")
        enough = code == 0 if wanted is None else code is None or wanted(text)
        if not enough:
            raise ScriptFailed(f"exit code {code}: {last_error(text)[:300]}")
        return text

    def printed(self) -> str:
        """The output of the last process that was run."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def data(self, vocab_size: int, sequence_len: int, train_tokens: int) -> Path:
        """A data folder with random training and validation splits, made once for each size."""
        key = vocab_size, sequence_len, train_tokens
        if key not in self.data_folders:
            self.data_folders[key] = self.folder / f"data-{len(self.data_folders)}"
            write_splits(self.data_folders[key], vocab_size, {"train": train_tokens, "val": 17 * (sequence_len + 1)})
        return self.data_folders[key]


def random_documents(random: np.random.Generator, vocab_size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random (tokens (count,) uint16, offsets of the documents' BOS int64).

    Frequencies of tokens fall as those of words do (Zipf), lengths of documents are log-normal; the BOS is the last id.
    """
    lengths = np.exp(random.normal(np.log(MEDIAN_DOCUMENT), 1.0, size=count // 20 + 10)).astype(np.int64) + 2
    starts = np.concatenate([[0], np.cumsum(lengths)])
    starts = starts[starts < count]
    ranks = 1 / (np.arange(vocab_size - 1) + 2.7)
    cumulated = np.cumsum(ranks / ranks.sum())
    tokens = np.searchsorted(cumulated, random.random(count)).clip(max=vocab_size - 2).astype(np.uint16)
    tokens[starts] = vocab_size - 1
    return tokens, starts.astype(np.int64)


def write_splits(folder: Path, vocab_size: int, splits: dict[str, int]) -> None:
    """Write random splits in the benchmark's format, with a meta.json; splits: number of tokens by name."""
    folder.mkdir()
    random, described = np.random.default_rng(0), {}
    for split, count in splits.items():
        tokens, starts = random_documents(random, vocab_size, count)
        content = {"tokens": torch.from_numpy(tokens), "doc_starts": torch.from_numpy(starts)}
        content |= {"bos_id": vocab_size - 1, "seq_shuffle_seed": SEEDS[split], "seq_size": 2049}
        path = folder / f"fineweb_{split}.pt"
        torch.save(content, path)
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        described[split] = {"tokens": count, "documents": len(starts), "sha256": sha256}
    meta = {"source": "random tokens", "revision": "0", "tokenizer": "none", "vocab_size": vocab_size}
    meta |= {"bos_id": vocab_size - 1, "splits": described, "token_bytes": [1] * (vocab_size - 1) + [0]}
    (folder / "meta.json").write_text(json.dumps(meta))
