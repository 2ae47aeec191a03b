"""Kernels: attention, dropout, the loss of the head, and products in fp8; their choice, and their check at start.

Every fast kernel has a plain twin, which is its reference: "sdpa" for attention, autograd through the logits for the
head's loss, bfloat16 for fp8. A script may replace any of them with its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from slowrun.machine import has_bfloat16

# ------------------------------------------------------------------------------------------------------- attention


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, backend: str = "sdpa", scale: float | None = None) -> Tensor:
    """Causal attention; position t sees t - window ... t: 3 x (B, T, H, D) -> (B, T, H, D).

    backend: "varlen" is the flash attention that torch carries (CUDA, compute capability 8.0 or newer, bfloat16);
    "sdpa" is F.scaled_dot_product_attention, with a mask where the window is shorter than the sequence. scale: factor
    on the logits; None for 1 / sqrt(D).
    """
    B, T, H, D = q.shape
    sees_all = window >= T - 1
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn  # takes a second to import

        borders = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
        # contiguous, because the operator promises the compiler outputs and gradients laid out like its inputs
        q, k, v = (t.reshape(B * T, H, D).contiguous() for t in (q, k, v))
        left = -1 if sees_all else window
        y = varlen_attn(q, k, v, borders, borders, T, T, window_size=(left, 0), scale=scale)
        return y.view(B, T, H, D)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if sees_all:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    position = torch.arange(T, device=q.device)
    distance = position[:, None] - position
    mask = (distance >= 0) & (distance <= window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def choose_attention(wanted: str, head_dim: int, device: torch.device, dtype: torch.dtype) -> str:
    """The backend of attend: varlen where it runs, else sdpa. ValueError if varlen is wanted and does not run."""
    runs = has_bfloat16(device) and dtype == torch.bfloat16 and head_dim <= 256 and head_dim % 8 == 0
    if wanted == "varlen" and not runs:
        raise ValueError(
            "--attention varlen needs a GPU of compute capability 8.0, bfloat16, and heads of 8, 16, ... 256 channels"
        )
    if wanted == "auto":
        return "varlen" if runs else "sdpa"
    return wanted


def attention_error(
    backend: str,
    shape: tuple[int, int, int],
    windows: Iterable[tuple[int, float | None]],
    device: torch.device,
    attention: Callable | None = None,
) -> float:
    """The largest error of a backend in bfloat16, over its output and gradients, on random q, k and v.

    shape: (T, H, D). windows: (window, scale) pairs, as the model uses them. attention: what the model calls, where a
    script has its own, with the arguments of attend. The reference is sdpa in float32; errors are relative to the
    largest value.
    """
    generator = torch.Generator(device).manual_seed(0)
    *qkv, weight = torch.randn((4, 2, *shape), generator=generator, device=device).bfloat16()
    worst = 0.0
    for window, scale in windows:
        results = []
        for function, name, dtype in ((attention or attend, backend, torch.bfloat16), (attend, "sdpa", torch.float32)):
            inputs = [t.to(dtype).requires_grad_() for t in qkv]
            output = function(*inputs, window, name, scale)
            results.append([output, *torch.autograd.grad(output, inputs, weight.to(dtype))])
        for found, expected in zip(*results, strict=True):
            error = (found.float() - expected).abs().max() / expected.abs().max()
            worst = max(worst, error.item())
    return worst


# --------------------------------------------------------------------------------------------------------- dropout


# Another copy of this module, of a run's code/, may be imported into the same process. It needs an operator of its own:
# defining one again frees the first, which the first copy would go on calling. The first import has the plain name, so
# that compiled graphs are found in the compiler's cache.
_imports = torch.__dict__.setdefault("_slowrun_imports", itertools.count(1))
_number = next(_imports)
_NAMESPACE = "slowrun" if _number == 1 else f"slowrun_{_number}"


@torch.library.custom_op(f"{_NAMESPACE}::dropout", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return torch.native_dropout(x, p, True)


@_dropout.register_fake
def _dropout_fake(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


def _dropout_setup(ctx, inputs, output) -> None:
    ctx.p = inputs[1]
    ctx.save_for_backward(output[1])


@partial(_dropout.register_autograd, setup_context=_dropout_setup)
def _dropout_backward(ctx, grad, _):
    return grad * ctx.saved_tensors[0] * (1 / (1 - ctx.p)), None


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout (arXiv 1207.0580); the identity for p = 0.

    It is a custom operator, so that compiled graphs call ATen's kernel and draw the same numbers as the uncompiled
    model. Inductor's replacement can corrupt masks in torch 2.13 (pytorch issue 198333).
    """
    return _dropout(x, p)[0] if p else x


# ------------------------------------------------------------------------------------------------ the head's loss

CHUNK = 4096  # positions whose logits exist at a time in training on a GPU: enough to keep it busy
CHUNK_ON_CPU = 128  # the same on a CPU: few enough to stay in its caches


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) (arXiv 2408.00118), float32 or wider."""
    return cap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap)


def capped_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, vocab_size: int, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of n positions with K targets each, and its gradient with respect to the logits before their soft cap.

    logits (n, padded V); targets (n, K) int64, negative for none; weights (K,) float32 or wider. Returns the sum of
    weight * nats over positions and targets, the sum of the first targets' nats, both () float32 or wider, and the
    gradient of the former (n, padded V) in the logits' dtype, rounded once. Columns from vocab_size on are ignored.
    """
    bent = torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap)
    capped = cap * bent
    capped[:, vocab_size:] = -torch.inf
    log_probs = capped.log_softmax(-1)
    slope = 1 - bent.square()
    index = targets.clamp_min(0)
    target_weights = weights * (targets >= 0)  # (n, K), 0 where there is no target
    nats = -log_probs.gather(1, index)
    total = target_weights.sum(1, keepdim=True)
    grad = (total * log_probs.exp() * slope).to(logits.dtype)
    # At the targets the difference is computed before it is rounded; a token may be a target more than once.
    wanted = (target_weights[:, None] * (index[:, :, None] == index[:, None])).sum(-1)
    at_targets = (total * (-nats).exp() - wanted) * slope.gather(1, index)
    grad = grad.scatter(1, index, at_targets.to(grad.dtype))
    return (target_weights * nats).sum(), (nats * (targets >= 0))[:, 0].sum(), grad


class HeadLoss(torch.autograd.Function):
    """The head and the loss behind it, in chunks of positions whose gradients are computed in the forward pass.

    Autograd would keep the logits of all positions, and float32 copies of them, until the backward pass. Here the
    logits of one chunk exist at a time, and only the gradients are kept: of x, and, summed in float32, of the head.
    """

    @staticmethod
    def forward(ctx, x: Tensor, lm_head: Tensor, chunk: Callable, *others: Tensor):
        """x (n, C); others (n, ...): further inputs of each position, such as its targets.

        chunk: (x, lm_head, *others) of some positions -> (their loss, the first targets' loss, the gradients of the
        former with respect to x and lm_head). Returns the sums of both losses, () each; only the first has a gradient.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        losses = torch.zeros(2, dtype=wide, device=x.device)
        x_grad = torch.empty_like(x)
        lm_head_grad = torch.zeros_like(lm_head, dtype=wide)
        size = CHUNK_ON_CPU if x.device.type == "cpu" else CHUNK
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            loss, first_loss, x_grad[rows], lm_head_part = chunk(x[rows], lm_head, *(other[rows] for other in others))
            losses += torch.stack([loss, first_loss])
            lm_head_grad += lm_head_part
        ctx.save_for_backward(x_grad, lm_head_grad.to(lm_head.dtype))
        loss, first_loss = losses.unbind()
        ctx.mark_non_differentiable(first_loss)
        return loss, first_loss

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        x_grad, lm_head_grad = ctx.saved_tensors
        return x_grad * grad, lm_head_grad * grad, *(None for _ in ctx.needs_input_grad[2:])


# ------------------------------------------------------------------------------------------------- fp8 products


def to_fp8(x: Tensor, scale: float, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """x / scale, rounded to an 8-bit floating-point format (arXiv 2209.05433); values too large for it saturate."""
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)


def fp8_product(a: Tensor, b: Tensor, scale: float, fast: bool = False) -> Tensor:
    """scale * a @ b, summed in float32, for a (n, k) by rows and b (k, m) by columns in fp8 -> (n, m) bfloat16.

    fast: tensor cores keep fewer bits of the sums.
    """
    scales = (torch.full((), value, device=a.device) for value in (scale, 1.0))
    return torch._scaled_mm(a, b, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)


# -------------------------------------------------------------------------------------------------- check at start


@dataclass(frozen=True)
class Kernel:
    """The choice of a kernel, and how to check it."""

    name: str  # of the setting, such as attention
    chosen: str
    plain: str  # the twin that runs everywhere
    fast: str  # what a GPU runs if it can
    limit: float  # largest error that passes
    error: Callable[[], float]  # measures the error of the chosen one against the plain one


def check_kernels(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Compare kernels with their plain twins on random numbers -> the error of each, 0 for a plain twin itself.

    ValueError if one fails or is wrong on this machine.
    """
    errors = {}
    for kernel in kernels:
        errors[kernel.name] = 0.0
        if kernel.chosen == kernel.plain:
            continue
        advice = f"use --{kernel.name} {kernel.plain}"
        try:
            error = kernel.error()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as failure:
            reason = str(failure).partition("\n")[0]  # torch lists at length where the operator does run
            raise ValueError(f"{kernel.name} {kernel.chosen} fails here ({reason}): {advice}") from failure
        if not error < kernel.limit:
            raise ValueError(f"{kernel.name} {kernel.chosen} is wrong here, by {error:g}: {advice}, and report it")
        errors[kernel.name] = error
    return errors


def slower_kernels(kernels: Iterable[Kernel]) -> str:
    """The header's note on fast kernels that their plain twins replace; empty if there are none."""
    return "; ".join(
        f"slower than {kernel.fast}: --{kernel.name} {kernel.fast} says why it does not run"
        for kernel in kernels
        if kernel.chosen == kernel.plain
    )
