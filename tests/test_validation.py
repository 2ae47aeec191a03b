"""Validation: batch sizes, bits per byte, mixtures, data efficiency, members as the referee loads them."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import ALL_TRACKS, flags

import train


@pytest.fixture
def trained(track, small):
    """A trainer after a few steps, so that losses differ between tokens."""
    trainer, _ = track.set_up(flags(**small))
    for step in range(3):
        trainer.train_step(step)()
    trainer.weights.refresh()
    return trainer


def test_loss_does_not_depend_on_the_batch_size(track, trained):
    scores, (lengths, _) = {}, track.token_byte_lengths(trained.config)
    for size in (1, 3, 8, 64):
        config = track.Config(**{**trained.config.__dict__, "eval_batch": size})
        eval_set = track.EvalSet(trained.shards["val"], config, trained.world, lengths)
        scores[size] = eval_set.score(eval_set.nats(trained.token_losses))
    assert scores[1].tokens == 51 * 32  # all sequences, a last batch that is not full included
    for score in scores.values():
        assert score.loss == pytest.approx(scores[1].loss, abs=1e-6)
        assert score.bpb == pytest.approx(scores[1].bpb, abs=1e-6)
        assert (score.tokens, score.bytes) == (scores[1].tokens, scores[1].bytes)


def test_loss_and_bits_per_byte_by_hand(trained):
    """Against a loop over the sequences of the file, one at a time."""
    tokens = trained.shards["val"].tokens.astype(np.int64)
    nats, text_nats, text_bytes = [], 0.0, 0
    for i in range(len(tokens) // 33):
        row = torch.from_numpy(tokens[33 * i : 33 * (i + 1)])[None]
        losses = trained.token_losses(row[:, :-1], row[:, 1:])[0]
        for target, loss in zip(row[0, 1:].tolist(), losses.tolist(), strict=True):
            size = 0 if target == 96 else 1 + target % 4
            nats.append(loss)
            text_nats, text_bytes = text_nats + loss * (size > 0), text_bytes + size
    score = trained.eval_sets["val"].score(trained.eval_sets["val"].nats(trained.token_losses))
    assert score.loss == pytest.approx(sum(nats) / len(nats), abs=1e-6)
    assert score.bpb == pytest.approx(text_nats / math.log(2) / text_bytes, abs=1e-6)
    assert (score.tokens, score.bytes) == (len(nats), text_bytes)


def test_sequences_are_cut_to_what_the_config_says(track, trained):
    config = track.Config(**{**trained.config.__dict__, "val_sequences": 5})
    eval_set = track.EvalSet(trained.shards["val"], config, trained.world, None)
    order = np.random.RandomState(42).permutation(51)[:5]
    assert np.array_equal(eval_set.sequences.numpy(), trained.shards["val"].sequences(33)[order])
    score = eval_set.score(eval_set.nats(trained.token_losses))
    assert score.tokens == 5 * 32 and score.bpb is None


def test_processes_share_the_sequences_without_loss(track, trained):
    whole = trained.eval_sets["val"].sequences
    worlds = [track.World(rank, 8, torch.device("cpu")) for rank in range(8)]
    parts = [track.EvalSet(trained.shards["val"], trained.config, world, None).sequences for world in worlds]
    found = sorted(tuple(row) for part in parts for row in part.tolist())
    assert found == sorted(tuple(row) for row in whole.tolist())


def test_a_process_without_sequences_has_nothing_to_add(track, trained):
    config = track.Config(**{**trained.config.__dict__, "val_sequences": 3})
    eval_set = track.EvalSet(trained.shards["val"], config, track.World(5, 8, torch.device("cpu")), None)
    assert eval_set.nats(trained.token_losses).shape == (0, 32)


def test_mixture_averages_probabilities():
    probabilities = torch.tensor([[0.5, 0.1], [0.2, 0.9]]).double()
    mixed = train.mix(list(-probabilities.log()), [1.0, 3.0])
    torch.testing.assert_close(mixed.exp(), 1 / (0.25 * probabilities[0] + 0.75 * probabilities[1]))
    torch.testing.assert_close(train.mix([torch.tensor([800.0])], [2.0]), torch.tensor([800.0]))  # exp(-800) is 0


@ALL_TRACKS
def test_data_efficiency(track):
    """The published figures, the ends of the range, and beyond."""
    assert track.data_efficiency(3.402) == pytest.approx(3.81, abs=0.005)
    assert track.data_efficiency(3.183) == pytest.approx(6.44, abs=0.005)
    assert track.data_efficiency(2.987) == pytest.approx(13.83, abs=0.005)
    assert track.data_efficiency(3.703) == 2.0 and track.data_efficiency(2.892) == 20.0
    assert track.data_efficiency(3.7031) == "< 2x" and track.data_efficiency(2.8919) == "> 20x"


def test_members_give_the_claimed_loss(track, small):
    """load_members, from the run folder alone, mixed by hand: the val_loss and holdout_loss of result.json."""
    assert track.main(flags(**small | {"dropout": 0.1})) == 0
    folder = track.Path(small["runs_dir"]) / "run"
    result, config = json.loads((folder / "result.json").read_text()), track.Config(**small)
    assert json.loads((folder / "final" / "members.json").read_text())["mixing"] == track.MIXING
    assert ("weight" if track.TRACK == "tiny" else "probability") == track.MIXING
    for split, claimed in (("val", result["val_loss"]), ("holdout", result["holdout_loss"])):
        sequences = torch.from_numpy(track.load_shard(split, config).sequences(33).astype(np.int64))
        mixture, weights = 0, []
        for weight, log_probs in track.load_members(folder, "cpu"):
            found = log_probs(sequences[:, :-1])
            assert found.dtype == torch.float32 and found.shape == (len(sequences), 32, 97)
            torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(sequences), 32))
            mixture = mixture + weight * found.exp().double()
            weights.append(weight)
        assert weights == pytest.approx({"probability": [1 / 3, 2 / 3], "weight": [1.0]}[track.MIXING])
        nats = -mixture.gather(-1, sequences[:, 1:, None]).log().mean().item()
        assert nats == pytest.approx(claimed, abs=1e-6)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"track": "other"}))
    with pytest.raises(ValueError, match="is a run of the other track: use that track's load_members"):
        next(track.load_members(folder, "cpu"))
    (folder / "config.json").write_text(json.dumps(saved))
    if track.MIXING == "probability":
        (_, first), _ = track.load_members(folder, "cpu")
        with pytest.raises(ValueError, match="use them one at a time"):
            first(sequences[:1, :-1])
