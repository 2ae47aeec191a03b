"""Plans of training, what they say a run needs, and the order in which each track's script takes its data."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import SMALL, V, name_of

from slowrun.data import load_split
from slowrun.plan import Sizes, Stage, StepPlan, describe, stages_of, summary
from slowrun.world import World

ALONE = World(0, 1, torch.device("cpu"))
PLAIN, LATE = Stage("plain", 100.0, 4, 4), Stage("late", 150.0, 6, 5, heads=2)
SIZES = Sizes(
    dtype=torch.bfloat16, parameters=1000, layers=4, layer_parameters=100.0, state_elements=2000, moved_parameters=300,
    master_bytes=4000, layer_bytes=10, pass_positions=64, logit_positions=32, padded_vocab=64, n_embd=8,
    member_bytes=2000, members=3,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- plans


@pytest.fixture
def plan() -> StepPlan:
    """Of 5 steps, the last one shorter; the second epoch ends with it, the first with the third step."""
    tokens = np.array([0, 10, 20, 30, 40, 45])
    return StepPlan(tokens, np.array([0, 0, 0, 1, 1, 2]), stages_of([PLAIN, PLAIN, PLAIN, LATE, LATE]))


def test_a_stage_begins_where_something_changes():
    assert stages_of([PLAIN, PLAIN, LATE, LATE, PLAIN]) == {0: PLAIN, 2: LATE, 4: PLAIN}
    assert stages_of([LATE]) == {0: LATE}


def test_steps_of_a_plan(plan):
    assert plan.num_steps == 5 and plan.labels == {0: "plain", 3: "late"}
    assert plan.flops.tolist() == [0.0, 1000.0, 2000.0, 3000.0, 4500.0, 5250.0]
    assert [plan.epoch_ended(step) for step in range(6)] == [0, 0, 0, 1, 0, 2]


def test_what_a_process_holds():
    """By hand: masters and bfloat16 weights, two float32 gradients and a moved copy, a part of the state."""
    held = SIZES.held_bytes(2, LATE)
    assert (held["weights"], held["gradients"], held["optimizer"]) == (6000, 9200, 4000)
    assert held["activations"] == 64 * 10 * 5 and held["logits"] == 32 * 64 * 20 + 8 * 64 * 8
    assert SIZES.static_bytes(2, LATE) == 6000 + 9200 + 4000
    assert SIZES.static_bytes(1, LATE) == 6000 + 9200 + 8000
    assert SIZES.checkpoint_bytes == 4000 + 4 * 2000
    assert SIZES.disk_bytes(checkpoints=True) == 3 * 2000 + 3 * 12_000
    assert SIZES.disk_bytes(checkpoints=False) == 3 * 2000


def test_a_plan_as_json(plan):
    """A stage ends where the model changes, and where a step has other tokens."""
    described = describe(plan, SIZES, 2, checkpoints=True)
    found = [
        (stage["stage"], stage["from_step"], stage["steps"], stage["flops_per_step"]) for stage in described["stages"]
    ]
    assert found == [("plain", 1, 3, 1000.0), ("late", 4, 1, 1500.0), ("late", 5, 1, 750.0)]
    assert (described["num_steps"], described["tokens"], described["dtype"]) == (5, 45, "bfloat16")
    assert described["disk_gib"]["most"] == SIZES.disk_bytes(True) / 2**30
    for size, gib in described["memory_gib"].items():
        assert gib == sum(SIZES.held_bytes(int(size), LATE).values()) / 2**30  # the stage that needs most
    twice = SIZES.moved_bytes(2, LATE, 20), SIZES.moved_bytes(2, LATE, 10)
    assert twice[0]["activations"] == 2 * twice[1]["activations"] and twice[0]["optimizer"] == twice[1]["optimizer"]
    lines = summary(described).splitlines()
    assert lines[0] == "5 steps, 45 tokens" and len(lines) == 5
    assert "from step 4: 1 steps of 10 tokens" in lines[2] and "estimated in bfloat16" in lines[-1]


# -------------------------------------------------------------------------------------------------- tracks' own orders


def small_plan(track, data_dir, **changes) -> tuple:
    """(The settings of a small run, its training split, its plan)."""
    config = track.Config(**SMALL[name_of(track)] | {"data_dir": str(data_dir)} | changes)
    split = load_split(str(data_dir), "train", V, config.sequence_len)
    return config, split, track.make_plan(config, split)


def split_of(split, num_sequences: int):
    """The first sequences of a split."""
    return dataclasses.replace(split, tokens=split.tokens[: num_sequences * 33])


@pytest.mark.parametrize("num_sequences", [64, 70, 87, 100, 129])
def test_every_epoch_ends_once(track, data_dir, num_sequences):
    config, split, _ = small_plan(track, data_dir)
    for epochs in range(1, 8):
        longer = dataclasses.replace(config, num_epochs=epochs, readout_epochs=1)
        plan = track.make_plan(longer, split_of(split, num_sequences))
        ended = [plan.epoch_ended(step) for step in range(plan.num_steps + 1)]
        assert [epoch for epoch in ended if epoch] == list(range(1, epochs + 1)) and ended[-1] == epochs
        assert plan.tokens.tolist() == [1024 * step for step in range(plan.num_steps + 1)]


def test_an_epoch_takes_every_sequence_once(track, data_dir):
    """The first epoch in file order, later ones with other sequences, as the documents are in another order."""
    config, split, _ = small_plan(track, data_dir)
    epochs = [track.epoch_sequences(config, split, epoch) for epoch in (1, 2, 3)]
    in_file = sorted(map(bytes, split.sequences(33)))
    assert [sorted(map(bytes, sequences)) == in_file for sequences in epochs] == [True, False, False]
    assert {len(sequences) for sequences in epochs} == {len(in_file)}
    assert not np.array_equal(epochs[1], epochs[2])


def test_batches_follow_the_epochs_whatever_the_number_of_processes(track, data_dir):
    """Steps that span two epochs included; what does not fill a micro-step is left out."""
    config, split, plan = small_plan(track, data_dir, micro_batch=2)
    assert config.micro_steps == 2 and track.micro_steps_per_epoch(config, split) == 11
    expected = np.concatenate([track.epoch_sequences(config, split, epoch)[: 11 * 16] for epoch in (1, 2)])
    for size in (1, 4):
        worlds = [World(rank, size, torch.device("cpu")) for rank in range(size)]
        loaders = [track.make_loader(config, split, plan, world) for world in worlds]
        batches = [torch.cat([loader.batch(step) for loader in loaders]) for step in range(plan.num_steps)]
        taken = torch.cat([batch.unflatten(1, (2, 2)).swapaxes(0, 1).reshape(-1, 33) for batch in batches])
        assert np.array_equal(taken, expected[: len(taken)]) and len(taken) == len(expected)


def test_too_little_data_for_an_epoch(track, data_dir):
    config, split, _ = small_plan(track, data_dir)
    with pytest.raises(
        ValueError, match=r"makes \d micro-steps per epoch, and two optimizer steps need \d: use more data"
    ):
        track.make_plan(config, split_of(split, 31))
