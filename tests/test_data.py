"""Splits and what must be refused of them, the stock orders of an epoch, and the loader of batches."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import V, golden_split

from slowrun.data import (
    Loader,
    cut,
    load_split,
    load_splits,
    permuted,
    read_json,
    read_meta,
    sha256_file,
    shuffled_documents,
    shuffled_micro_steps,
    token_bytes,
)
from slowrun.world import World

T = 32

# --------------------------------------------------------------------------------------------------------------- splits


def test_a_split(data_dir):
    splits = load_splits(str(data_dir), V, T)
    assert list(splits) == ["train", "val", "holdout"]
    split = splits["val"]
    assert (len(split.tokens), split.seq_shuffle_seed) == (1700, 42) and split.tokens.dtype == np.uint16
    assert split.sha256 == sha256_file(data_dir / "fineweb_val.pt") == read_meta(data_dir)["splits"]["val"]["sha256"]
    assert split.num_documents == len(split.doc_starts) == read_meta(data_dir)["splits"]["val"]["documents"]
    assert np.array_equal(split.sequences(33), split.tokens[: 51 * 33].reshape(51, 33))
    assert np.array_equal(split.fixed_order(51), np.random.RandomState(42).permutation(51))
    starts, last = split.doc_starts, split.num_documents - 1
    expected = [split.tokens[starts[last] :], split.tokens[starts[2] : starts[3]]]
    assert np.array_equal(split.concatenate(np.array([last, 2])), np.concatenate(expected))


def refusal(folder: Path, vocab_size: int = V, sequence_len: int = T) -> str:
    with pytest.raises(ValueError) as caught:
        load_splits(str(folder), vocab_size, sequence_len)
    return str(caught.value)


def resave(path: Path, **changes) -> None:
    """Change a split, and meta.json with it, so that its hash does not give it away."""
    content = torch.load(path, weights_only=True)
    content.update(changes)
    torch.save(content, path)
    meta_path, split = path.parent / "meta.json", path.stem.removeprefix("fineweb_")
    meta = json.loads(meta_path.read_text())
    meta["splits"][split]["sha256"] = sha256_file(path)
    meta_path.write_text(json.dumps(meta))


def test_bad_data_is_refused_with_what_to_do(data_dir, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    train_path, val_path = folder / "fineweb_train.pt", folder / "fineweb_val.pt"

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(data_dir, folder)

    assert "fineweb_train.pt not found: run python prepare_data.py" in refusal(folder)
    monkeypatch.chdir(tmp_path)  # where no demo was prepared
    assert "run python prepare_data.py --source demo, or give --data-dir" in refusal(Path("demo_data"))

    fresh()
    val_path.unlink()
    assert "fineweb_val.pt not found" in refusal(folder)

    fresh()
    train_path.write_bytes(train_path.read_bytes()[:5000])  # truncated, with and without the hash that tells
    assert "damaged: its SHA-256" in refusal(folder)
    (folder / "meta.json").unlink()
    assert "truncated or damaged" in refusal(folder)

    fresh()
    content = bytearray(train_path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    train_path.write_bytes(content)
    assert "damaged: its SHA-256" in refusal(folder)

    fresh()
    shutil.copy(val_path, train_path)
    (folder / "meta.json").unlink()
    assert "holds the val split (seq_shuffle_seed 42), not train" in refusal(folder)

    fresh()
    meta = json.loads((folder / "meta.json").read_text())
    del meta["splits"]["holdout"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "fineweb_holdout.pt is not in meta.json: delete it" in refusal(folder)

    fresh()
    assert "another tokenizer: its BOS is 96" in refusal(folder, vocab_size=50257)

    tokens = torch.load(train_path, weights_only=True)["tokens"]
    tokens[1] = 200
    resave(train_path, tokens=tokens)
    assert "its largest token 200" in refusal(folder)

    fresh()
    starts = torch.load(train_path, weights_only=True)["doc_starts"]
    for wrong in (torch.tensor([0, 3]), starts[[0, 2, 1]], starts[1:], starts.int()):
        resave(train_path, doc_starts=wrong)
        assert "do not each start with the BOS 96" in refusal(folder)

    fresh()
    resave(train_path, tokens=tokens.to(torch.int32))
    assert "damaged" in refusal(folder)

    fresh()
    assert "a sequence needs 4097: lower --sequence-len" in refusal(folder, sequence_len=4096)

    (folder / "meta.json").write_text('{"splits": ')
    assert "meta.json is damaged" in refusal(folder)
    (folder / "meta.json").write_text('{"splits": {}}')
    assert "it lacks" in refusal(folder)

    fresh()  # and sound data are not refused
    assert load_splits(str(folder), V, T).keys() == {"train", "val", "holdout"}


def test_files_of_the_original_project_are_accepted(tmp_path, data_dir):
    """They have no meta.json and no holdout."""
    folder = tmp_path / "bare"
    shutil.copytree(data_dir, folder)
    (folder / "meta.json").unlink()
    (folder / "fineweb_holdout.pt").unlink()
    assert load_splits(str(folder), V, T).keys() == {"train", "val"}
    assert token_bytes(str(folder), V) == (None, "left out, without a meta.json")


def test_bytes_of_tokens(data_dir):
    lengths, origin = token_bytes(str(data_dir), V)
    assert origin == "from meta.json" and lengths.dtype == torch.int64
    assert lengths.tolist() == [1 + i % 4 for i in range(96)] + [0]
    with pytest.raises(ValueError, match="has the bytes of 97 tokens, vocab_size is 50257: change --vocab-size"):
        token_bytes(str(data_dir), 50257)


def test_bytes_of_tokens_without_meta_json(tmp_path, monkeypatch):
    """From tiktoken for GPT-2's vocabulary; if it cannot load, that is said and nothing is made up."""
    import tiktoken

    class Encoding:
        def decode_single_token_bytes(self, token: int) -> bytes:
            return b"x" * (1 + token % 3)

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": Encoding()}[name])
    lengths, origin = token_bytes(str(tmp_path), 50257)
    assert origin == "from tiktoken" and lengths[:4].tolist() == [1, 2, 3, 1] and lengths[50256] == 0
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {}[name])
    expected = "left out: no meta.json beside the data, and tiktoken fails (KeyError)"
    assert token_bytes(str(tmp_path), 50257) == (None, expected)


def test_damaged_json_is_refused_with_the_advice(tmp_path):
    path = tmp_path / "x.json"
    for content, cause in (("[1]", ""), ("{", "Expecting"), ('{"a": 1}', "it lacks b, c")):
        path.write_text(content)
        with pytest.raises(ValueError) as caught:
            read_json(path, {"a", "b", "c"}, "make it again")
        assert str(caught.value).startswith(f"{path} is damaged (") and str(caught.value).endswith("): make it again")
        assert cause in str(caught.value)
    path.write_text('{"a": 1, "b": 2, "c": 3, "d": 4}')
    assert read_json(path, {"a", "b", "c"}, "")["d"] == 4


# --------------------------------------------------------------------------------------------------------------- orders


def documents(tokens: np.ndarray) -> set[bytes]:
    return {part.tobytes() for part in np.split(tokens, np.flatnonzero(tokens == V - 1)[1:])}


def test_rows_and_permutations():
    assert cut(np.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]] and cut(np.arange(2), 3).shape == (0, 3)
    once = permuted(np.arange(10), [5])
    assert once.tolist() == torch.randperm(10, generator=torch.Generator().manual_seed(5)).tolist()
    again = once[torch.randperm(10, generator=torch.Generator().manual_seed(6)).numpy()]
    assert np.array_equal(permuted(np.arange(10), [5, 6]), again)
    assert permuted(np.arange(3), []).tolist() == [0, 1, 2]


def test_shuffled_documents_are_the_golden_orders():
    split, expected = golden_split()
    length = expected["sequence_len"] + 1
    for epoch, order in expected["train_epochs"]["order"].items():
        seeds = range(2, int(epoch) + 1)
        found = shuffled_documents(split, length, document_seeds=seeds, sequence_seed=int(epoch) + 1000)
        figures = [[int(row[0]), int(row[-1]), int(row.astype(np.int64).sum())] for row in found[: len(order)]]
        assert figures == order


@pytest.mark.parametrize("seeds", [(), (2,), (2, 3, 4)])
def test_shuffling_documents_loses_none(data_dir, seeds):
    """But for the one that the tail cuts; without seeds they are in file order."""
    split = load_split(str(data_dir), "train", V, T)
    sequences = shuffled_documents(split, 33, document_seeds=seeds, sequence_seed=7)
    in_order = cut(split.concatenate(permuted(np.arange(split.num_documents), seeds)), 33)
    assert np.array_equal(sequences, permuted(in_order, [7])) and len(sequences) == len(split.tokens) // 33
    assert np.array_equal(in_order, split.sequences(33)) == (not seeds)
    assert len(documents(in_order.ravel()) - documents(split.tokens)) <= 1


def test_shuffled_micro_steps_have_the_same_sequences_in_each_epoch(data_dir):
    """Sequences permuted once by the file's seed; whole micro-steps, of 8 x micro_batch, permuted cumulatively."""
    split = load_split(str(data_dir), "train", V, T)
    sequences, order = split.sequences(33), np.random.RandomState(43).permutation(181)
    for micro_batch, count in ((1, 22), (2, 11)):
        micro_steps = order[: count * 8 * micro_batch].reshape(count, -1)
        for seed in (2, 3):
            micro_steps = micro_steps[torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()]
        found = shuffled_micro_steps(split, 33, micro_batch, [2, 3])
        assert np.array_equal(found, sequences[micro_steps.ravel()])
    assert np.array_equal(shuffled_micro_steps(split, 33, 1, []), sequences[order[:176]])


# --------------------------------------------------------------------------------------------------------------- loader


def numbered_epoch(epoch: int) -> np.ndarray:
    """89 sequences of 2 tokens that say their epoch and their number: 5 micro-steps of 8 x 2, and 9 that are left."""
    return np.stack([np.full(89, epoch), np.arange(89)], axis=1).astype(np.uint16)


def make_loader(micro_steps_before: list[int], virtual_ranks: range = range(8), make_epoch=numbered_epoch) -> Loader:
    return Loader(make_epoch, 2, np.array(micro_steps_before), 5, virtual_ranks)


STEPS = {
    "one size, spanning epochs": [*range(0, 16, 2), 15],
    "two sizes": [0, 1, 2, 3, 5, 7, 9, 12, 15],
    "longer than an epoch": [0, 7, 15],
}


@pytest.mark.parametrize("before", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_sequence_is_taken_once_whatever_the_number_of_processes(before, size):
    """In three epochs, micro-step after micro-step, virtual rank after virtual rank."""
    loaders = [make_loader(before, World(rank, size, torch.device("cpu")).virtual_ranks) for rank in range(size)]
    taken = []
    for step, micro_steps in enumerate(np.diff(before)):
        batches = [loader.batch(step) for loader in loaders]
        for batch in batches:
            assert batch.shape == (8 // size, 2 * micro_steps, 2) and batch.dtype == torch.int64
        by_micro_step = torch.cat(batches).unflatten(1, (-1, 2)).swapaxes(0, 1)  # (micro-steps, virtual ranks, 2, 2)
        taken += by_micro_step.reshape(-1, 2).tolist()
    assert taken == [[epoch, i] for epoch in (1, 2, 3) for i in range(80)]


def test_a_loader_can_start_at_any_step():
    before = STEPS["two sizes"]
    continuous = make_loader(before)
    for step in range(len(before) - 1):
        assert torch.equal(make_loader(before).batch(step), continuous.batch(step))


def test_an_epoch_is_made_ahead_in_a_thread_and_none_is_made_twice():
    made, main = [], threading.get_ident()

    def make_epoch(epoch: int) -> np.ndarray:
        assert threading.get_ident() != main
        made.append(epoch)
        return numbered_epoch(epoch)

    loader = make_loader(STEPS["one size, spanning epochs"], make_epoch=make_epoch)
    loader.batch(0)
    loader.epochs[2].result()
    assert made == [1, 2]
    for step in range(8):
        loader.batch(step)
        assert len(loader.epochs) <= 2 and max(loader.epochs) <= 3  # nor one after the last
    assert made == [1, 2, 3]


def test_an_error_in_the_thread_reaches_the_caller():
    def fail(epoch: int) -> np.ndarray:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        make_loader([0, 1], make_epoch=fail).batch(0)
