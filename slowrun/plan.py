"""The plan of a run: its steps, its stages, and the memory, disk and traffic that they need."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from slowrun.machine import GIB
from slowrun.world import VIRTUAL_RANKS


@dataclass(frozen=True)
class Stage:
    """Consecutive steps with the same computation."""

    name: str  # such as "replay"
    flops_per_token: float  # of a step, forward and backward
    forward_layers: int  # calls of a layer in a forward pass
    backward_layers: int  # those that a backward pass follows
    heads: float = 1.0  # calls of the head


@dataclass(frozen=True)
class StepPlan:
    """The tokens and epochs that each step of a run completes. N is the number of steps."""

    tokens: np.ndarray  # (N + 1,) int64, tokens before step s
    epoch: np.ndarray  # (N + 1,) int64, epochs completed before step s
    stages: dict[int, Stage]  # the stage that begins with step s

    @property
    def num_steps(self) -> int:
        return len(self.tokens) - 1

    @property
    def labels(self) -> dict[int, str]:
        """The names of the stages, by the step they begin with."""
        return {step: stage.name for step, stage in self.stages.items()}

    @cached_property
    def flops(self) -> np.ndarray:
        """(N + 1,) float64, floating-point operations before step s."""
        starts = sorted(self.stages)
        per_token = np.concatenate(
            [
                np.full(end - start, self.stages[start].flops_per_token)
                for start, end in zip(starts, [*starts[1:], self.num_steps], strict=True)
            ]
        )
        return np.cumsum([0.0, *(per_token * np.diff(self.tokens))])

    def epoch_ended(self, step: int) -> int:
        """The epoch that the step before this one completed, counted from 1; 0 if it completed none."""
        ended = step > 0 and self.epoch[step] > self.epoch[step - 1]
        return int(self.epoch[step]) if ended else 0


def stages_of(stages: list[Stage]) -> dict[int, Stage]:
    """The stage of every step -> those that begin, by the step they begin with."""
    return {step: stage for step, stage in enumerate(stages) if step == 0 or stage != stages[step - 1]}


@dataclass(frozen=True)
class Sizes:
    """The sizes from which memory, disk and traffic are counted; in elements, unless the name says bytes."""

    dtype: torch.dtype  # of the compute weights
    parameters: int
    layers: int  # of the trunk
    layer_parameters: float  # of the average layer of the trunk
    state_elements: int  # of the optimizer, and of averages, over all processes
    moved_parameters: int  # that the meta-gradient moves; 0 without it
    master_bytes: int
    layer_bytes: int  # that a layer keeps for the backward pass, per position
    pass_positions: int  # of a forward pass
    logit_positions: int  # whose logits exist at a time
    padded_vocab: int
    n_embd: int
    member_bytes: int  # of weights that are kept for the readout
    members: int  # that are kept
    frozen_parameters: int = 0  # of a second model, which only predicts; checkpoints hold it as a member
    score_bytes: int = 0  # of losses that are kept on the disk
    models: int = 1  # that are trained at the same time, each with its checkpoints

    @property
    def checkpoint_bytes(self) -> int:
        return self.master_bytes + 4 * self.state_elements + self.member_bytes * bool(self.frozen_parameters)

    def disk_bytes(self, checkpoints: bool) -> int:
        """The most that a run takes: the readout's weights, and three checkpoints (two stay as the next is written)."""
        kept = self.members * self.member_bytes + self.score_bytes
        return kept + 3 * self.models * self.checkpoint_bytes * checkpoints

    def held_bytes(self, world_size: int, stage: Stage) -> dict[str, float]:
        """The bytes that a process holds in a stage, by kind; activations and logits are an estimate."""
        item = self.dtype.itemsize
        head = self.padded_vocab * self.n_embd
        return {
            "weights": self.master_bytes + item * (self.parameters + self.frozen_parameters),
            "gradients": 4 * (2 * self.parameters + self.moved_parameters),  # two, and a moved copy
            "optimizer": 4 * self.state_elements / world_size,
            "activations": self.pass_positions * self.layer_bytes * stage.backward_layers,
            "logits": self.logit_positions * self.padded_vocab * (2 * item + 16) * (1 + bool(self.frozen_parameters))
            + 8 * head,  # the head's gradient too
        }

    def static_bytes(self, world_size: int, stage: Stage) -> float:
        """Those of held_bytes that do not depend on the batch."""
        held = self.held_bytes(world_size, stage)
        return held["weights"] + held["gradients"] + held["optimizer"]

    def moved_bytes(self, world_size: int, stage: Stage, tokens: int) -> dict[str, float]:
        """The least bytes that a process reads and writes in an optimizer step of so many tokens, by kind.

        Each pass reads the weights of every call, forward and backward, adds to float32 gradients, and writes and reads
        what the backward pass needs, the logits and their gradient. A step makes compute weights and pulls their
        gradients back once, and with the meta-gradient once more for each virtual rank.
        """
        item = self.dtype.itemsize
        once = self.parameters - self.layer_parameters * self.layers - self.padded_vocab * self.n_embd  # but for wte
        passes = tokens / (world_size * self.pass_positions)
        gradients_taken = 1 + VIRTUAL_RANKS / world_size * bool(self.moved_parameters)
        calls = stage.forward_layers + stage.backward_layers
        return {
            "weights": passes * item * (self.layer_parameters * calls + 2 * once)
            + gradients_taken * (4 + item) * self.parameters,
            "gradients": passes * 8 * (self.layer_parameters * self.layers + once)
            + gradients_taken * 12 * self.parameters,
            "optimizer": (12 * self.parameters + 8 * self.state_elements) / world_size,
            "activations": 2 * passes * self.pass_positions * self.layer_bytes * stage.backward_layers,
            "logits": 4 * passes * self.pass_positions * self.padded_vocab * item * stage.heads,
        }


def describe_stages(plan: StepPlan, sizes: Sizes, world_size: int) -> list[dict]:
    """The stages of a plan in order, as JSON; bytes are those of a process.

    A stage ends where the number of tokens of a step changes, too.
    """
    tokens = np.diff(plan.tokens)
    starts = sorted({*plan.stages, *(int(step) + 1 for step in np.flatnonzero(np.diff(tokens)))})
    described = []
    for start, end in zip(starts, [*starts[1:], plan.num_steps], strict=True):
        stage = plan.stages[max(step for step in plan.stages if step <= start)]
        per_step = int(tokens[start])
        described.append(
            {
                "stage": stage.name,
                "from_step": start + 1,
                "steps": end - start,
                "tokens_per_step": per_step,
                "flops_per_token": stage.flops_per_token,
                "flops_per_step": stage.flops_per_token * per_step,
                "moved_bytes": sizes.moved_bytes(world_size, stage, per_step),
                "held_bytes": sizes.held_bytes(world_size, stage),
            }
        )
    return described


def describe(plan: StepPlan, sizes: Sizes, world_size: int, checkpoints: bool) -> dict:
    """A plan as JSON, for tools."""
    stages = list(plan.stages.values())
    memory = {
        str(size): max(sum(sizes.held_bytes(size, stage).values()) for stage in stages) / GIB for size in (1, 2, 4, 8)
    }
    disk = {
        "member": sizes.member_bytes / GIB,
        "checkpoint": sizes.checkpoint_bytes / GIB,
        "most": sizes.disk_bytes(checkpoints) / GIB,
    }
    return {
        "parameters": sizes.parameters,
        "num_steps": plan.num_steps,
        "tokens": int(plan.tokens[-1]),
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "virtual_ranks": VIRTUAL_RANKS,
        "world_size": world_size,
        "stages": describe_stages(plan, sizes, world_size),
        "memory_gib": memory,
        "disk_gib": disk,
        # gradients are summed and masters gathered in float32; each of 8 processes sends and receives 7/8 of both
        "communication_bytes_of_8": 2 * 4 * sizes.parameters * (VIRTUAL_RANKS - 1) / VIRTUAL_RANKS,
    }


def summary(described: dict) -> str:
    """A plan that `describe` made, in a few lines."""
    lines = [f"{described['num_steps']:,} steps, {described['tokens']:,} tokens"]
    for stage in described["stages"]:
        steps = f"from step {stage['from_step']:,}: {stage['steps']:,} steps of {stage['tokens_per_step']:,} tokens"
        lines.append(f"{stage['stage']:24} {steps}, {stage['flops_per_step'] / 1e15:,.3g} PFLOP each")
    memory = ", ".join(f"{gib:.3g} on {size}" for size, gib in described["memory_gib"].items())
    disk = described["disk_gib"]["most"]
    lines.append(f"GiB of memory per process, estimated in {described['dtype']}: {memory}; of disk: {disk:.3g}")
    return "\n".join(lines)
