"""Plans, training order, loaders, and data that must be refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, STAGES, V, flags, write_data


def small_plan(track, data_dir, **changes):
    config = track.Config(**SMALL[track.TRACK] | {"data_dir": str(data_dir)} | changes)
    shard = track.load_shard("train", config)
    return shard, track.Plan(config, len(shard.sequences(config.sequence_len + 1)))


def test_steps_of_the_record(track):
    """At full size: sequences per epoch, steps, and where epochs end, which is when their micro-steps are done."""
    plan = track.Plan(track.Config(), 48804)
    (switch, after), *_ = STAGES[track.TRACK][1].items()
    late = [step for step in range(plan.num_steps) if track.stage(plan, step)[switch] == after]
    group = 8 * plan.config.micro_batch
    if track.TRACK == "limited":
        assert plan.epoch_micro_steps * group == 48800 and plan.num_steps == 2097
        assert [plan.epochs_done(s) for s in (0, 190, 191, 381, 382, 2096, 2097)] == [0, 0, 1, 1, 2, 10, 11]
        assert late == list(range(1144, 2097))  # 6 x 1,525 micro-steps are done after 1,143.75 steps
    elif track.TRACK == "two_hour":
        assert plan.epoch_micro_steps * group == 48800 and plan.num_steps == 4194
        assert [plan.epochs_done(s) for s in (0, 190, 191, 381, 382, 4193, 4194)] == [0, 0, 1, 1, 2, 21, 22]
        assert late == list(range(2479, 4194))
        assert track.stage_changes(plan) == {
            0: "replay False, windows (256, 768)",
            1144: "replay False, windows (768, 1792)",
            2479: "replay True, windows (1280, 2048)",
        }
    else:
        assert plan.epoch_micro_steps * group == 48640 and plan.num_steps == 2850
        assert [plan.epochs_done(s) for s in (0, 189, 190, 379, 380, 2849, 2850)] == [0, 0, 1, 1, 2, 14, 15]
        assert late == list(range(1995, 2850))  # 70% of the steps are done


@pytest.mark.parametrize("epochs", range(1, 8))
@pytest.mark.parametrize("num_sequences", [64, 70, 87, 100, 129])
def test_every_epoch_ends_once(track, epochs, num_sequences):
    config = dataclasses.replace(track.Config(**SMALL[track.TRACK]), num_epochs=epochs, readout_epochs=1)
    plan = track.Plan(config, num_sequences)
    done = [plan.epochs_done(step) for step in range(plan.num_steps + 1)]
    assert done[0] == 0 and done[-1] == epochs
    assert set(np.diff(done).tolist()) <= {0, 1}


def test_an_epoch_covers_its_sequences_once(track, data_dir):
    shard, plan = small_plan(track, data_dir)
    for epoch in (1, 2, 3):
        sequences, order = track.TrainLoader(shard, plan, range(8)).make_epoch(epoch)
        assert sorted(order.tolist()) == list(range(len(sequences)))
        ordered = sequences.reshape(-1)
        in_file_order = np.array_equal(ordered, shard.tokens[: len(ordered)])
        assert in_file_order == (epoch == 1)
        assert len(documents(ordered) - documents(shard.tokens)) <= 1  # the one that the tail cuts


def documents(tokens: np.ndarray) -> set[bytes]:
    return {part.tobytes() for part in np.split(tokens, np.flatnonzero(tokens == V - 1)[1:])}


def test_batches_follow_the_order_whatever_the_number_of_processes(track, data_dir):
    """Steps that span two epochs included; all processes together have each micro-step's sequences once."""
    shard, plan = small_plan(track, data_dir, micro_batch=2)
    assert plan.config.micro_steps == 2 and plan.epoch_micro_steps == 11
    b, expected = plan.config.micro_batch, []
    loader = track.TrainLoader(shard, plan, range(8))
    for micro_step in range(plan.num_steps * 2):
        epoch, j = divmod(micro_step, 11)
        sequences, order = loader.make_epoch(epoch + 1)
        expected.append(sequences[order[8 * b * j : 8 * b * (j + 1)]].reshape(8, b, -1))
    for world_size in (1, 2, 4, 8):
        worlds = [track.World(rank, world_size, torch.device("cpu")) for rank in range(world_size)]
        loaders = [track.TrainLoader(shard, plan, world.virtual_ranks) for world in worlds]
        for step in range(plan.num_steps):
            batch = np.concatenate([loader.batch(step) for loader in loaders])
            for k in range(2):
                assert np.array_equal(batch[:, k], expected[2 * step + k])
        assert all(max(loader.epochs) <= 3 and len(loader.epochs) <= 2 for loader in loaders)


def test_a_loader_can_start_in_any_epoch(track, data_dir):
    shard, plan = small_plan(track, data_dir, num_epochs=4)
    continuous = track.TrainLoader(shard, plan, range(8))
    batches = [continuous.batch(step) for step in range(plan.num_steps)]
    for step in (7, 13, plan.num_steps - 1):
        assert np.array_equal(track.TrainLoader(shard, plan, range(8)).batch(step), batches[step])


def refusal(track, config) -> str:
    with pytest.raises(ValueError) as caught:
        track.load_data(config)
    return str(caught.value)


def resave(path: Path, **changes) -> None:
    """Change a shard, and meta.json with it, so that its hash does not give it away."""
    content = torch.load(path, weights_only=True)
    content.update(changes)
    torch.save(content, path)
    meta_path, split = path.parent / "meta.json", path.stem.removeprefix("fineweb_")
    meta = json.loads(meta_path.read_text())
    from train import sha256_file

    meta["splits"][split]["sha256"] = sha256_file(path)
    meta_path.write_text(json.dumps(meta))


def test_bad_data_is_refused_with_what_to_do(track, data_dir, tmp_path):
    folder = tmp_path / "data"
    config = track.Config(**SMALL[track.TRACK] | {"data_dir": str(folder)})
    train_path, val_path = folder / "fineweb_train.pt", folder / "fineweb_val.pt"

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(data_dir, folder)

    assert "fineweb_train.pt not found: run python prepare_data.py" in refusal(track, config)

    fresh()
    val_path.unlink()
    assert "fineweb_val.pt not found" in refusal(track, config)

    fresh()
    train_path.write_bytes(train_path.read_bytes()[:5000])  # truncated, with and without the hash that tells
    assert "damaged: its SHA-256" in refusal(track, config)
    (folder / "meta.json").unlink()
    assert "truncated or damaged" in refusal(track, config)

    fresh()
    content = bytearray(train_path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    train_path.write_bytes(content)
    assert "damaged: its SHA-256" in refusal(track, config)

    fresh()
    shutil.copy(val_path, train_path)
    (folder / "meta.json").unlink()
    assert "holds the val split (seq_shuffle_seed 42), not train" in refusal(track, config)

    fresh()
    other = dataclasses.replace(config, vocab_size=50257)
    assert "another tokenizer: its BOS is 96" in refusal(track, other)

    fresh()
    tokens = torch.load(train_path, weights_only=True)["tokens"]
    tokens[1] = 200
    resave(train_path, tokens=tokens)
    assert "its largest token 200" in refusal(track, config)

    fresh()
    resave(train_path, doc_starts=torch.tensor([0, 3]))
    assert "do not each start with the BOS 96" in refusal(track, config)

    fresh()
    resave(train_path, tokens=tokens.to(torch.int32))
    assert "damaged" in refusal(track, config)

    fresh()
    long = dataclasses.replace(config, sequence_len=4096, batch_tokens=8 * 2 * 2 * 4096)
    assert "lower --sequence-len" in refusal(track, long)

    fresh()
    (folder / "meta.json").write_text('{"splits": ')
    assert "meta.json is damaged" in refusal(track, config)
    (folder / "meta.json").write_text('{"splits": {}}')
    assert "it lacks" in refusal(track, config)

    fresh()  # and sound data are not refused
    assert track.load_data(config).keys() == {"train", "val", "holdout"}


def test_files_without_meta_json_and_holdout_are_accepted(track, tmp_path, data_dir, small):
    """As the original project writes them: no meta.json, no holdout. Bits per byte are then left out or by tiktoken."""
    folder = tmp_path / "bare"
    shutil.copytree(data_dir, folder)
    (folder / "meta.json").unlink()
    (folder / "fineweb_holdout.pt").unlink()
    trainer, _ = track.set_up(flags(**small | {"data_dir": str(folder), "vocab_size": V}))
    assert "holdout" not in trainer.eval_sets
    assert trainer.eval_sets["val"].bytes is None


def test_bytes_of_tokens_without_meta_json(track, tmp_path, monkeypatch):
    """From tiktoken for GPT-2's vocabulary; if it cannot load, that is said and nothing is made up."""
    import tiktoken

    class Encoding:
        def decode_single_token_bytes(self, token: int) -> bytes:
            return b"x" * (1 + token % 3)

    config = track.Config(data_dir=str(tmp_path))
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": Encoding()}[name])
    lengths, origin = track.token_byte_lengths(config)
    assert origin == "from tiktoken" and lengths[:4].tolist() == [1, 2, 3, 1] and lengths[50256] == 0
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {}[name])
    said = "left out: no meta.json beside the shards, and tiktoken fails (KeyError)"
    assert track.token_byte_lengths(config) == (None, said)


def test_too_little_data_for_an_epoch(track, tmp_path, small):
    folder = write_data(tmp_path / "little", {"val": 500, "train": 900})
    with pytest.raises(ValueError, match="an epoch needs 64, two optimizer steps: use more data"):
        track.set_up(flags(**small | {"data_dir": str(folder)}))
    assert not (tmp_path / "runs").exists()
