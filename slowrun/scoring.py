"""Validation: the mean next-token loss of a split, the same for any number of processes and any batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from slowrun.data import Split
from slowrun.world import World

TokenLosses = Callable[[Tensor, Tensor], Tensor]  # tokens, targets (B, T) int64 -> (B, T), nats

# The loss of a standard pretraining run: (million tokens, nats), nanochat at the best of three sizes
PRETRAINING = ((200, 3.703), (400, 3.370), (600, 3.200), (800, 3.123), (1000, 3.046), (2000, 2.892))


@dataclass(frozen=True)
class Score:
    loss: float  # nats per target
    bpb: float | None  # bits per byte of text; None where the bytes are not known
    tokens: int  # targets
    bytes: int  # of the targets


def never() -> bool:
    return False


class EvalSet:
    """A split to score. It holds this process's sequences, every world.size-th one: (n, T + 1) int64."""

    def __init__(
        self, split: Split, sequence_len: int, max_sequences: int, batch: int, world: World, lengths: Tensor | None
    ):
        """At most max_sequences are scored, `batch` at a time. lengths (V,) int64: bytes of the tokens, if known."""
        sequences = split.sequences(sequence_len + 1)
        order = split.fixed_order(len(sequences))[:max_sequences]
        local = sequences[order[world.rank :: world.size]]
        self.world = world
        self.batch = batch
        self.count = len(order)  # sequences of all processes
        self.sequences = torch.from_numpy(local.astype(np.int64))
        self.filler = torch.from_numpy(sequences[order[:1]].astype(np.int64))  # also if this process has no sequence
        self.num_batches = math.ceil(math.ceil(len(order) / world.size) / batch)  # the same on all processes
        self.bytes = None if lengths is None else lengths[self.sequences[:, 1:]]  # (n, T) of the targets

    @torch.no_grad()
    def nats(self, token_losses: TokenLosses, interrupted: Callable[[], bool] = never) -> Tensor | None:
        """The losses of this process's targets: (n, T) float64, on the CPU; None if `interrupted` before the end.

        All batches have one shape, because compiled code depends on it: the last ones are padded with copies of a
        sequence, which do not count. Collective if token_losses or interrupted is.
        """
        parts = []
        for i in range(self.num_batches):
            if interrupted():
                return None
            rows = self.sequences[i * self.batch : (i + 1) * self.batch]
            filler = self.filler.expand(self.batch - len(rows), -1)
            filled = torch.cat([rows, filler]).to(self.world.device)
            losses = token_losses(filled[:, :-1], filled[:, 1:])[: len(rows)]
            parts.append(losses.double().cpu())
        return torch.cat(parts)

    def score(self, nats: Tensor) -> Score:
        """Mean over the targets of all processes, in float64. nats (n, T): those of this process. Collective."""
        text_nats, text_bytes = 0.0, 0
        if self.bytes is not None:
            text_nats = (nats * (self.bytes > 0)).sum().item()
            text_bytes = self.bytes.sum().item()
        total, targets, text_nats, text_bytes = self.world.sum([nats.sum().item(), nats.numel(), text_nats, text_bytes])
        bpb = text_nats / math.log(2) / text_bytes if text_bytes else None
        return Score(total / targets, bpb, int(targets), int(text_bytes))


def mix_probabilities(nats: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Nats of the weighted average of members' probabilities, the weights made to sum to 1: (n, T) each -> (n, T)."""
    logs = [math.log(weight / sum(weights)) - member for weight, member in zip(weights, nats, strict=True)]
    return -torch.logsumexp(torch.stack(logs), dim=0)


def data_efficiency(loss: float) -> float | str:
    """The tokens that a standard pretraining run needs for this loss, as a multiple of 100M.

    Linear between the measured losses; "< 2x" or "> 20x" outside of them.
    """
    if not loss <= PRETRAINING[0][1]:
        return "< 2x"
    for (tokens_a, loss_a), (tokens_b, loss_b) in pairwise(PRETRAINING):
        if loss >= loss_b:
            return round((tokens_a + (loss_a - loss) / (loss_a - loss_b) * (tokens_b - tokens_a)) / 100, 4)
    return "> 20x"
