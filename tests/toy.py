"""A script for tests of the session: it has the parts of a track's script, and a model that knows no context.

The model is the logarithm of each token's frequency, in float64, so a run takes a fraction of a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(next(p for p in Path(__file__).resolve().parents if (p / "slowrun").is_dir())))

from slowrun.config import RunConfig
from slowrun.data import Loader, Split, shuffled_documents
from slowrun.plan import Sizes, Stage, StepPlan, stages_of
from slowrun.scoring import mix_probabilities
from slowrun.session import Session, launch
from slowrun.world import VIRTUAL_RANKS, World

DEMO = {"data_dir": "demo_data", "num_epochs": 3}


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The experiment."""

    vocab_size: int = 97  # token ids in the data
    sequence_len: int = 32  # tokens per sequence
    time_cap_min: float = 60.0  # minutes of training time; 0 for no cap
    seed: int = 42  # of nothing
    eval_batch: int = 8  # sequences per batch in validation
    log_every: int = 5  # steps between printed lines
    num_epochs: int = 2  # passes over the data
    batch_tokens: int = 1024  # tokens per step
    micro_batch: int = 2  # sequences per micro-step
    readout_epochs: int = 2  # last epochs whose weights are averaged
    lr: float = 5.0  # learning rate
    layers: int = 1  # that the sizes pretend
    mlp: Literal["swiglu", "relu2"] = "swiglu"  # without effect

    @property
    def micro_step_tokens(self) -> int:
        return VIRTUAL_RANKS * self.micro_batch * self.sequence_len


@dataclass(frozen=True)
class Scheduled:
    lr: float
    late: bool  # from the second epoch on


def schedule(config: Config, step: int, plan: StepPlan) -> Scheduled:
    return Scheduled(config.lr * (1 - step / plan.num_steps), bool(plan.epoch[step] > 0))


def epoch_sequences(config: Config, split: Split, epoch: int) -> np.ndarray:
    length = config.sequence_len + 1
    return shuffled_documents(split, length, document_seeds=range(2, epoch + 1), sequence_seed=epoch + 1000)


def make_plan(config: Config, split: Split) -> StepPlan:
    per_step = config.batch_tokens // config.micro_step_tokens
    per_epoch = len(split.tokens) // (config.sequence_len + 1) // (VIRTUAL_RANKS * config.micro_batch)
    if per_epoch < 2 * per_step:
        raise ValueError(f"{per_epoch} micro-steps per epoch are too few: use more data")
    num_steps = round(per_epoch * config.num_epochs / per_step)
    done = np.arange(num_steps + 1) * per_step
    epoch = done // per_epoch
    epoch[-1] = config.num_epochs
    stages = [Stage("late", 2000.0, 2, 2) if epochs else Stage("early", 1000.0, 1, 1) for epochs in epoch[:-1]]
    return StepPlan(done * config.micro_step_tokens, epoch, stages_of(stages))


def make_loader(config: Config, split: Split, plan: StepPlan, world: World) -> Loader:
    per_epoch = len(split.tokens) // (config.sequence_len + 1) // (VIRTUAL_RANKS * config.micro_batch)
    make_epoch = partial(epoch_sequences, config, split)
    before = plan.tokens // config.micro_step_tokens
    return Loader(make_epoch, config.micro_batch, before, per_epoch, world.virtual_ranks)


def count_sizes(config: Config, dtype: torch.dtype) -> Sizes:
    count = 97 * config.layers
    return Sizes(
        dtype=dtype, parameters=count, layers=1, layer_parameters=0, state_elements=count, moved_parameters=0,
        master_bytes=8 * count, layer_bytes=1, pass_positions=64, logit_positions=64, padded_vocab=97, n_embd=1,
        member_bytes=8 * count, members=config.readout_epochs,
    )  # fmt: skip


class Training:
    """What training changes: the logits of all tokens."""

    def __init__(self, config: Config, world: World):
        self.config = config
        self.world = world
        self.masters = {"logits": torch.zeros(config.vocab_size, dtype=torch.float64)}

    def state_dict(self) -> dict:
        return {"logits": self.masters["logits"].clone()} if self.world.is_main else {}

    def load_state_dict(self, state: dict) -> None:
        if self.world.is_main:
            self.masters["logits"].copy_(state["logits"])
        self.world.broadcast(self.masters["logits"])

    def step(self, step: int, batch: Tensor, values: Scheduled) -> dict[str, Tensor]:
        """A step of gradient descent -> this process's part of the loss."""
        logits = self.masters["logits"]
        targets = batch[..., 1:].flatten()
        frequency = torch.bincount(targets, minlength=len(logits)).double() / self.config.batch_tokens
        loss = -(logits.log_softmax(0) * frequency).sum()
        gradient = logits.softmax(0) * frequency.sum() - frequency
        logits -= values.lr * torch.tensor(self.world.sum(gradient.tolist()), dtype=torch.float64)
        return {"train_loss": loss}

    def scorer(self, masters: dict[str, Tensor], late: bool) -> Callable[[Tensor, Tensor], Tensor]:
        log_probs = masters["logits"].log_softmax(0)
        return lambda tokens, targets: -log_probs[targets]

    def warm_up(self) -> None:
        pass


def read_out(run: Session, train: Training) -> int:
    members = run.members[-run.config.readout_epochs :]
    weights = dict.fromkeys(members, 1 / len(members))
    nats = {member: run.token_nats(train.scorer(run.load_member(member), True)) for member in members}
    if None in nats.values():
        return run.stopped(train)
    mixed = mix_probabilities([nats[member]["val"] for member in members], list(weights.values()))
    run.read_out("probability_average", {"val": mixed})
    average = sum(weights[member] * run.load_member(member)["logits"] for member in members)
    token_losses = train.scorer({"logits": average}, True)
    if not run.read_out("weight_average", token_losses):
        return run.stopped(train)
    return run.finish("weight_average", token_losses, mixing="weight", members=weights, stage={"late": True})


def end_epoch(run: Session, train: Training) -> None:
    c = run.config
    epoch = run.plan.epoch_ended(run.step)
    number = epoch or run.plan.epoch[run.step] + 1
    run.save(train)
    is_kept = number > c.num_epochs - c.readout_epochs or run.stopped_by == "time_cap"
    name = f"epoch_{number}" if epoch else f"epoch_{number}_cut_short"
    if run.validate(name, train.scorer(train.masters, number > 1)) and is_kept:
        run.keep_member(f"epoch_{number:02d}", train.masters)


def main(argv: list[str] | None = None) -> int:
    run = Session("limited", Config, DEMO, argv, __file__)
    c = run.config
    plan = run.world.main_first(make_plan, c, run.splits["train"])
    run.require(plan, count_sizes(c, run.dtype), short_runs={"all": {"num_epochs": 1}})
    run.open({"attention": "none"})
    train = Training(c, run.world)
    loader = make_loader(c, run.splits["train"], plan, run.world)
    train.warm_up()
    run.warmed_up({"attention": 0.0})
    run.resume(train)

    if c.eval_initial and run.step == 0:
        run.validate("initial", train.scorer(train.masters, False))
    while True:
        if plan.epoch_ended(run.step):
            end_epoch(run, train)
        if not run.may_step():
            break
        if run.save_is_due:
            run.save(train)
        batch = loader.batch(run.step)
        values = schedule(c, run.step, plan)
        run.did_step(train.step(run.step, batch, values), asdict(values), batch)

    if run.stopped_by == "time_cap":
        end_epoch(run, train)
    if run.interrupted:
        return run.stopped(train)
    return read_out(run, train)


if __name__ == "__main__":
    launch(main)
