"""The score: batch sizes, processes, bits per byte, mixtures, data efficiency."""

import math

import numpy as np
import pytest
import torch
from conftest import V, golden_split

from slowrun.data import load_split, token_bytes
from slowrun.scoring import EvalSet, data_efficiency, mix_probabilities
from slowrun.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def token_losses(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss of each target that depends on the tokens before it: (B, T) float32."""
    return (tokens.cumsum(1) * 7 + targets * 3) % 11 / 5 + 0.1


@pytest.fixture
def split(data_dir):
    return load_split(str(data_dir), "val", V, 32)


@pytest.fixture
def lengths(data_dir):
    return token_bytes(str(data_dir), V)[0]


@pytest.mark.parametrize("batch", [1, 3, 8, 64])
def test_the_score_by_hand(split, lengths, batch):
    """Against a loop over the file's sequences: a batch that is not full counts too, and what fills it does not."""
    nats, text_nats, text_bytes = [], 0.0, 0
    for row in torch.from_numpy(split.tokens[: 51 * 33].astype(np.int64)).view(51, 1, 33):
        losses = token_losses(row[:, :-1], row[:, 1:])[0]
        for target, loss in zip(row[0, 1:].tolist(), losses.tolist(), strict=True):
            size = 0 if target == 96 else 1 + target % 4
            nats.append(loss)
            text_nats, text_bytes = text_nats + loss * (size > 0), text_bytes + size
    eval_set = EvalSet(split, 32, 100, batch, ALONE, lengths)
    score = eval_set.score(eval_set.nats(token_losses))
    assert score.loss == pytest.approx(sum(nats) / len(nats), abs=1e-12)
    assert score.bpb == pytest.approx(text_nats / math.log(2) / text_bytes, abs=1e-12)
    assert (score.tokens, score.bytes) == (51 * 32, text_bytes)


def test_nats_stand_in_the_fixed_order(split):
    sequences = split.sequences(33)[np.random.RandomState(42).permutation(51)].astype(np.int64)
    eval_set = EvalSet(split, 32, 100, 8, ALONE, None)
    assert np.array_equal(eval_set.sequences, sequences)
    expected = token_losses(torch.from_numpy(sequences[:, :-1]), torch.from_numpy(sequences[:, 1:])).double()
    nats = eval_set.nats(token_losses)
    assert torch.equal(nats, expected) and nats.dtype == torch.float64


def test_all_batches_have_one_shape(split):
    """So that compiled code needs no second graph, and all processes take part as often."""
    shapes = {rank: [] for rank in range(4)}
    for rank, seen in shapes.items():

        def losses(tokens, targets, seen=seen):
            seen.append((tuple(tokens.shape), tuple(targets.shape)))
            return token_losses(tokens, targets)

        EvalSet(split, 32, 17, 2, World(rank, 4, CPU), None).nats(losses)
    assert list(shapes.values()) == [[((2, 32), (2, 32))] * 3] * 4  # of 5, 4, 4 and 4 sequences


def test_no_more_sequences_than_asked_for(split):
    eval_set = EvalSet(split, 32, 5, 8, ALONE, None)
    assert np.array_equal(eval_set.sequences, split.sequences(33)[np.random.RandomState(42).permutation(51)[:5]])
    score = eval_set.score(eval_set.nats(token_losses))
    assert (score.tokens, score.bpb, score.bytes) == (5 * 32, None, 0)


class FourProcesses:
    """Stands for the sum over processes that are scored one after the other."""

    def __init__(self, split, count: int, lengths):
        self.sets = [EvalSet(split, 32, count, 2, World(rank, 4, CPU), lengths) for rank in range(4)]

    def score(self, monkeypatch):
        sums = []
        monkeypatch.setattr(World, "sum", lambda world, values: sums.append(values) or [*map(sum, zip(*sums))])  # noqa: B905
        return [eval_set.score(eval_set.nats(token_losses)) for eval_set in self.sets][-1]


@pytest.mark.parametrize("count", [51, 4, 3, 1])
def test_four_processes_score_what_one_does(split, lengths, count, monkeypatch):
    """Fewer sequences than processes included: a process without any takes part, and adds nothing."""
    alone = EvalSet(split, 32, count, 8, ALONE, lengths)
    expected = alone.score(alone.nats(token_losses))
    processes = FourProcesses(split, count, lengths)
    rows = torch.cat([eval_set.sequences for eval_set in processes.sets])
    assert sorted(rows.tolist()) == sorted(alone.sequences.tolist())
    assert [len(eval_set.sequences) for eval_set in processes.sets] == [-(-(count - rank) // 4) for rank in range(4)]
    assert processes.sets[3].nats(token_losses).shape == (len(processes.sets[3].sequences), 32)
    found = processes.score(monkeypatch)
    assert (found.loss, found.bpb) == pytest.approx((expected.loss, expected.bpb), abs=1e-12)
    assert (found.tokens, found.bytes) == (expected.tokens, expected.bytes)


def test_a_score_that_is_interrupted(split):
    """It is asked before each batch."""
    asked = iter([False, False, True])
    seen = []
    eval_set = EvalSet(split, 32, 51, 8, ALONE, None)
    assert eval_set.nats(lambda x, y: seen.append(1) or token_losses(x, y), lambda: next(asked)) is None
    assert len(seen) == 2


def test_a_score_needs_no_gradients(split):
    weight = torch.ones(1, requires_grad=True)
    nats = EvalSet(split, 32, 5, 8, ALONE, None).nats(lambda x, y: token_losses(x, y) * weight)
    assert not nats.requires_grad


def test_a_mixture_averages_probabilities():
    probabilities = torch.tensor([[0.5, 0.1], [0.2, 0.9]]).double()
    mixed = mix_probabilities(list(-probabilities.log()), [1.0, 3.0])
    torch.testing.assert_close(mixed.exp(), 1 / (0.25 * probabilities[0] + 0.75 * probabilities[1]))
    assert torch.equal(mix_probabilities([torch.tensor([800.0])], [2.0]), torch.tensor([800.0]))  # exp(-800) is 0
    with pytest.raises(ValueError):
        mix_probabilities([torch.tensor([1.0])], [1.0, 1.0])


def test_data_efficiency():
    """The published figures, the ends of the range, and beyond."""
    assert data_efficiency(3.402) == pytest.approx(3.81, abs=0.005)
    assert data_efficiency(3.183) == pytest.approx(6.44, abs=0.005)
    assert data_efficiency(2.987) == pytest.approx(13.83, abs=0.005)
    assert data_efficiency(3.703) == 2.0 and data_efficiency(2.892) == 20.0
    assert data_efficiency(3.7031) == "< 2x" and data_efficiency(2.8919) == "> 20x"
    assert data_efficiency(math.nan) == "< 2x"


def test_sequences_are_scored_in_the_golden_order():
    split, expected = golden_split()
    world = World(0, 1, torch.device("cpu"))
    eval_set = EvalSet(split, expected["sequence_len"], max_sequences=10**6, batch=4, world=world, lengths=None)
    found = eval_set.sequences.numpy()
    assert len(found) == expected["validation"]["num_sequences"]
    figures = [[int(s[0]), int(s[-1]), int(s.astype(np.int64).sum())] for s in found[:40]]
    assert figures == expected["validation"]["order"]
