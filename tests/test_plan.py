"""Plans of training, and the order in which each track's script takes its data."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import SMALL, STAGES, V, flags, write_data

from slowrun.data import load_split
from slowrun.world import World


def small_plan(track, data_dir, **changes) -> tuple:
    """(The training split, the plan of a small run on it.)"""
    config = track.Config(**SMALL[track.TRACK] | {"data_dir": str(data_dir)} | changes)
    split = load_split(str(data_dir), "train", V, config.sequence_len)
    return split, track.Plan(config, len(split.sequences(config.sequence_len + 1)))


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


def test_an_epoch_takes_every_sequence_once(track, data_dir):
    """The first epoch in file order, later ones with other sequences, as the documents are in another order."""
    split, plan = small_plan(track, data_dir)
    epochs = [track.epoch_sequences(plan.config, split, epoch) for epoch in (1, 2, 3)]
    in_file = sorted(map(bytes, split.sequences(33)))
    assert [sorted(map(bytes, sequences)) == in_file for sequences in epochs] == [True, False, False]
    assert {len(sequences) for sequences in epochs} == {len(in_file)}
    assert not np.array_equal(epochs[1], epochs[2])


def test_batches_follow_the_epochs_whatever_the_number_of_processes(track, data_dir):
    """Steps that span two epochs included; what does not fill a micro-step is left out."""
    split, plan = small_plan(track, data_dir, micro_batch=2)
    assert plan.config.micro_steps == 2 and plan.epoch_micro_steps == 11
    expected = np.concatenate([track.epoch_sequences(plan.config, split, epoch)[: 11 * 16] for epoch in (1, 2)])
    for size in (1, 4):
        worlds = [World(rank, size, torch.device("cpu")) for rank in range(size)]
        loaders = [track.make_loader(plan, split, world.virtual_ranks) for world in worlds]
        batches = [torch.cat([loader.batch(step) for loader in loaders]) for step in range(plan.num_steps)]
        taken = torch.cat([batch.unflatten(1, (2, 2)).swapaxes(0, 1).reshape(-1, 33) for batch in batches])
        assert np.array_equal(taken, expected[: len(taken)]) and len(taken) == len(expected)


def test_too_little_data_for_an_epoch(track, tmp_path, small):
    folder = write_data(tmp_path / "little", {"val": 500, "train": 900})
    with pytest.raises(ValueError, match="an epoch needs 64, two optimizer steps: use more data"):
        track.set_up(flags(**small | {"data_dir": str(folder)}))
    assert not (tmp_path / "runs").exists()
