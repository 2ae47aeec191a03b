"""The library's kernels against plain loops, autograd and emulations; which are chosen, and how they are checked."""

import gc
import importlib.util
import sys
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from slowrun import kernels
from slowrun.kernels import (
    HeadLoss,
    Kernel,
    attend,
    attention_error,
    capped_cross_entropy,
    check_kernels,
    choose_attention,
    dropout,
    fp8_product,
    slower_kernels,
    soft_cap,
    to_fp8,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# ----------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("window", [0, 1, 4, 10, 11, 16])
def test_attention_written_out(window, scale):
    """Position t sees t - window ... t; the scale is 1 / sqrt(D) or as given."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 12, 3, 8, dtype=torch.float64)
    expected = torch.empty_like(q)
    for b in range(2):
        for t in range(12):
            seen = slice(max(0, t - window), t + 1)
            for h in range(3):
                shares = ((k[b, seen, h] @ q[b, t, h]) * (scale or 8**-0.5)).softmax(0)
                expected[b, t, h] = shares @ v[b, seen, h]
    torch.testing.assert_close(attend(q, k, v, window, "sdpa", scale), expected)


def test_attention_error_finds_a_wrong_backend():
    """It is small for a right one, and large for a script's own attention with a window that is off by one."""
    shape, windows = (64, 2, 16), [(16, None), (64, 0.5)]
    assert 0.0 < attention_error("sdpa", shape, windows, CPU) < 0.02

    def wrong(q, k, v, window, backend, scale):
        return attend(q, k, v, window - 1, backend, scale)

    assert attention_error("sdpa", shape, windows, CPU, attention=wrong) > 0.1


def test_choosing_attention(monkeypatch):
    for capability, runs in (((9, 0), True), ((8, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert choose_attention("auto", 128, CUDA, torch.bfloat16) == ("varlen" if runs else "sdpa")
        assert choose_attention("sdpa", 128, CUDA, torch.bfloat16) == "sdpa"
        for head_dim, dtype in ((128, torch.float32), (264, torch.bfloat16), (12, torch.bfloat16)):
            assert choose_attention("auto", head_dim, CUDA, dtype) == "sdpa"
            with pytest.raises(ValueError, match=r"--attention varlen needs a GPU of compute capability 8\.0"):
                choose_attention("varlen", head_dim, CUDA, dtype)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_attention("varlen", 128, CUDA, torch.bfloat16) == "varlen"
    assert choose_attention("auto", 128, CPU, torch.bfloat16) == "sdpa"
    with pytest.raises(ValueError, match="--attention varlen needs"):
        choose_attention("varlen", 128, CPU, torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------- dropout


def test_dropout():
    x = torch.ones(400, 500, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x, 0.2)
    y.sum().backward()
    kept = y != 0
    assert abs(kept.float().mean().item() - 0.8) < 0.005
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.8))
    assert torch.equal(x.grad, y.detach())
    assert dropout(x, 0.0) is x


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_dropout_draws_the_same_numbers(backend):
    x = torch.randn(40, 50, requires_grad=True)
    compiled = torch.compile(dropout, backend=backend, fullgraph=True)
    results = []
    for f in (dropout, compiled):
        torch.manual_seed(0)
        y = f(x, 0.3)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


# ----------------------------------------------------------------------------------------------------- the head's loss

VOCAB, PADDED, CAP = 100, 128, 15.0
WEIGHTS = torch.tensor([1.0, 0.5, 0.25])


def make(dtype=torch.float64, positions: int = 50, channels: int = 32):
    """x (n, C), lm_head (padded V, C), targets (n, 3) of which some are missing or the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(positions, channels, generator=generator).to(dtype)
    lm_head = 0.3 * torch.randn(PADDED, channels, generator=generator).to(dtype)
    targets = torch.randint(VOCAB, (positions, 3), generator=generator)
    targets[3], targets[7, 1:], targets[11:13, 1], targets[20, 2] = 5, -1, -1, targets[20, 0]
    return x, lm_head, targets


def plain_chunk(x, lm_head, targets, weights, vocab_size=VOCAB):
    """What a script makes of capped_cross_entropy."""
    loss, first_loss, grad = capped_cross_entropy(F.linear(x, lm_head), targets, weights, vocab_size, CAP)
    return loss, first_loss, grad @ lm_head, grad.T @ x


@pytest.mark.parametrize("size", [7, 50, 128])
def test_the_loss_and_its_gradients_are_those_of_autograd(monkeypatch, size):
    """Against F.cross_entropy of all logits at once; chunks that do not divide the positions included."""
    monkeypatch.setattr(kernels, "CHUNK_ON_CPU", size)
    x, lm_head, targets = make()
    x.requires_grad_(), lm_head.requires_grad_()
    loss, first = HeadLoss.apply(x, lm_head, partial(plain_chunk, weights=WEIGHTS.double()), targets)
    found = torch.autograd.grad(loss * 0.7, [x, lm_head])

    logits = soft_cap((x @ lm_head.T)[:, :VOCAB], CAP)
    cross_entropy = partial(F.cross_entropy, ignore_index=-1, reduction="sum")
    parts = [cross_entropy(logits, targets[:, k]) for k in range(3)]
    expected = sum(weight * part for weight, part in zip(WEIGHTS.double(), parts, strict=True))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(first, parts[0])
    assert not first.requires_grad
    for ours, theirs in zip(found, torch.autograd.grad(expected * 0.7, [x, lm_head]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_chunks_get_their_rows_of_every_tensor(monkeypatch):
    """Whatever else a position needs is cut as x is, and is not differentiated."""
    monkeypatch.setattr(kernels, "CHUNK_ON_CPU", 3)
    x, lm_head = torch.randn(8, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    index, factor = torch.arange(8), torch.rand(8, 1)

    def chunk(rows, lm_head, index, factor):
        assert torch.equal(rows, x[index])
        return (factor * rows).sum(), index.sum(), factor.expand_as(rows), torch.ones_like(lm_head)

    loss, others = HeadLoss.apply(x, lm_head, chunk, index, factor)
    loss.backward()
    torch.testing.assert_close(x.grad, factor.expand(8, 4))
    assert others == 28 and torch.equal(lm_head.grad, torch.full((5, 4), 3.0))  # of three chunks


def test_the_gradient_of_the_logits_is_rounded_once():
    """Where the prediction is nearly sure, probability minus one is made in float32, then rounded to bfloat16."""
    logits = torch.randn(6, PADDED).bfloat16()
    logits[:, 17] = 12.0
    targets = torch.tensor([[17], [17], [3], [17], [-1], [99]])
    one = torch.ones(1)
    *_, found = capped_cross_entropy(logits, targets, one, VOCAB, CAP)
    exact = capped_cross_entropy(logits.double(), targets, one.double(), VOCAB, CAP)[2]
    assert found.dtype == torch.bfloat16 and 0.0 < -exact[0, 17] < 1e-2
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-9)
    assert not found[:, VOCAB:].any() and not found[4].any()


def test_bfloat16_sums_the_heads_gradient_in_float32(monkeypatch):
    """In chunks of one position: a sum in bfloat16 would lose most of them."""
    monkeypatch.setattr(kernels, "CHUNK_ON_CPU", 1)
    x, lm_head = torch.ones(600, 1).bfloat16(), torch.zeros(4, 1).bfloat16().requires_grad_()

    def chunk(rows, lm_head):
        return rows.sum(), rows.sum(), rows, torch.ones_like(lm_head)

    HeadLoss.apply(x, lm_head, chunk)[0].backward()
    assert lm_head.grad.dtype == torch.bfloat16 and lm_head.grad.unique().item() == 600


def test_columns_of_the_padding_take_no_part():
    x, lm_head, targets = make()
    before = plain_chunk(x, lm_head, targets, WEIGHTS.double())
    lm_head[VOCAB:] = 1e6
    for a, b in zip(before[:3], plain_chunk(x, lm_head, targets, WEIGHTS.double())[:3], strict=True):
        assert torch.equal(a, b)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are still alive, and keeps the peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def free(self, key, size: int) -> None:
        self.now -= size
        self.known.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
                    self.peak = max(self.peak, self.now)
        return outputs


def test_live_bytes_are_counted():
    with LiveBytes() as live:
        a = torch.empty(1000, device="meta")
        b = a[:10] + 1
        del a
        c = torch.empty(500, device="meta")
    assert (live.now, live.peak) == (4 * 510, 4 * 1010) and b is not c


@pytest.mark.parametrize("rows", [32, 16])
def test_memory_at_full_size(rows):
    """A micro-batch of 32 x 2048 positions and 50,304 columns needs less than its bfloat16 logits and their gradient.

    On the meta device, where tensors have sizes and no contents.
    """
    n, C, V = rows * 2048, 1024, 50304
    x = torch.empty(n, C, dtype=torch.bfloat16, device="meta", requires_grad=True)
    lm_head = torch.empty(V, C, dtype=torch.bfloat16, device="meta", requires_grad=True)
    targets, weights = torch.empty(n, 3, dtype=torch.int64, device="meta"), torch.empty(3, device="meta")
    chunk = partial(plain_chunk, weights=weights, vocab_size=50257)
    with LiveBytes() as live:
        HeadLoss.apply(x, lm_head, chunk, targets)[0].backward()
    logits = 2 * n * V
    assert live.peak < 2 * logits * (0.5 if rows == 32 else 1)  # half of it suffices
    with LiveBytes() as live:  # as autograd would do it
        F.cross_entropy(soft_cap(F.linear(x, lm_head), CAP), targets[:, 0]).backward()
    assert live.peak > 4 * logits


# ---------------------------------------------------------------------------------------------------------------- fp8


def rounded(x: torch.Tensor, mantissa: int, least_exponent: int, largest: float) -> torch.Tensor:
    """To the nearest floating-point number of so many bits, ties to even, in float64; beyond the largest, to it."""
    exponent = torch.frexp(x.double()).exponent - 1
    unit = torch.exp2((exponent.clamp_min(least_exponent) - mantissa).double())
    return (torch.round(x.double() / unit) * unit).clamp(-largest, largest)


E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)  # bits of the mantissa, exponent of the least normal number, largest


@pytest.mark.parametrize("dtype, numbers", [(torch.float8_e4m3fn, E4M3), (torch.float8_e5m2, E5M2)], ids=str)
def test_rounding_to_fp8(dtype, numbers):
    """Every fp8 number, all halves between neighbours, large, tiny and random ones, with a scale."""
    torch.manual_seed(0)
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite()].sort().values
    between = (every[1:].double() + every[:-1].double()) / 2
    random = torch.randn(5000).double() * 10 ** torch.empty(5000).uniform_(-8, 6).double()
    x = torch.cat([every.double(), between, random])
    scale = 2.0**-5
    found = to_fp8((x * scale).float(), scale, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.double(), rounded((x * scale).float().double() / scale, *numbers))
    assert found.float().abs().max() == numbers[2]  # saturated, not infinite or NaN


@pytest.mark.parametrize("dtype, numbers", [(torch.float8_e4m3fn, E4M3), (torch.float8_e5m2, E5M2)], ids=str)
def test_products_in_fp8(dtype, numbers):
    """Against float64: the rounded factors' product, its scale, rounded to bfloat16."""
    torch.manual_seed(0)
    a, b, scale = torch.randn(48, 32), torch.randn(64, 32), 0.02
    found = fp8_product(to_fp8(a, scale, dtype), to_fp8(b, 1.0).T, scale)
    expected = scale * rounded(a / scale, *numbers) @ rounded(b, *E4M3).T
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ check at start


def test_check_kernels():
    def never() -> float:
        raise AssertionError("a plain twin is not measured")

    def fail() -> float:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    def too_large() -> float:
        raise torch.OutOfMemoryError("out of memory")

    plain = Kernel("attention", "sdpa", plain="sdpa", fast="varlen", limit=0.05, error=never)
    head = partial(Kernel, "head", "fp8", "plain", "fp8", 0.2)
    assert check_kernels([]) == {}
    assert check_kernels([plain, head(lambda: 0.1)]) == {"attention": 0.0, "head": 0.1}
    for error in (0.2, 3.0, float("nan")):
        with pytest.raises(ValueError, match=f"head fp8 is wrong here, by {error:g}: use --head plain, and report it"):
            check_kernels([plain, head(lambda found=error: found)])
    with pytest.raises(ValueError, match=r"head fp8 fails here \(CUBLAS_STATUS_NOT_SUPPORTED\): use --head plain"):
        check_kernels([head(fail)])
    with pytest.raises(torch.OutOfMemoryError):  # smaller batches help, other kernels do not
        check_kernels([head(too_large)])
    assert slower_kernels([head(never)]) == ""
    assert slower_kernels([plain, head(never)]).startswith("slower than varlen: --attention varlen says why")


def test_a_kernel_that_is_missing_says_what_to_use_instead():
    """Flash attention on a device that does not have it."""
    error = partial(attention_error, "varlen", (16, 2, 16), [(8, None)], CPU)
    with pytest.raises(ValueError, match=r"attention varlen fails here \(.+\): use --attention sdpa"):
        check_kernels([Kernel("attention", "varlen", "sdpa", "varlen", 0.05, error)])


def test_a_second_copy_of_the_module_leaves_the_first_alone(monkeypatch):
    """Importing slowrun/ of a run's code/ into the same process: each copy has an operator of its own."""
    x = torch.ones(64, 64)
    for _ in range(3):
        spec = importlib.util.spec_from_file_location("another_kernels", kernels.__file__)
        copy = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, copy)
        spec.loader.exec_module(copy)
        assert 0.2 < (copy.dropout(x, 0.5) == 0).float().mean() < 0.8
        assert copy._NAMESPACE != kernels._NAMESPACE
        monkeypatch.delitem(sys.modules, spec.name)
        del copy, spec
        gc.collect()
        assert 0.2 < (kernels.dropout(x, 0.5) == 0).float().mean() < 0.8
