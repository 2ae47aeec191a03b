"""The head and its loss: exact in chunks, with several targets, in little memory; its fp8 products, emulated."""

import dataclasses
import json
import math
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import flags, read_metrics
from torch.utils._python_dispatch import TorchDispatchMode

import tiny.train as tiny
from slowrun import kernels
from slowrun.kernels import HeadLoss, capped_cross_entropy, check_kernels, soft_cap

VOCAB, PADDED, CAP = 100, 128, 15.0
WEIGHTS = torch.tensor([1.0, 0.5, 0.25])


def make(track, dtype=torch.float64, positions: int = 50, channels: int = 32, scale: float = 0.3):
    """x (n, C), lm_head in the track's layout, targets (n, 3) of which some are missing or the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(positions, channels, generator=generator).to(dtype)
    lm_head = scale * torch.randn(PADDED, channels, generator=generator).to(dtype)
    targets = torch.randint(VOCAB, (positions, 3), generator=generator)
    targets[3], targets[7, 1:], targets[11:13, 1], targets[20, 2] = 5, -1, -1, targets[20, 0]
    return x, (lm_head.T.contiguous() if track is tiny else lm_head), targets


def chunk_of(track, model, weights, **settings):
    settings |= {"head": settings.get("head", "plain")} if track is tiny else {}
    return partial(model.head_chunk, weights=weights, vocab_size=VOCAB, cap=CAP, **settings)


@pytest.mark.parametrize("size", [7, 50, 128])
def test_the_loss_and_its_gradients_are_those_of_autograd(track, model, monkeypatch, size):
    """Against F.cross_entropy of all logits at once; chunks that do not divide the positions included."""
    monkeypatch.setattr(kernels, "CHUNK_ON_CPU", size)
    x, lm_head, targets = make(track)
    x.requires_grad_(), lm_head.requires_grad_()
    chunk = chunk_of(track, model, WEIGHTS.double())
    loss, first = HeadLoss.apply(x, lm_head, chunk, targets)
    found = torch.autograd.grad(loss * 0.7, [x, lm_head])

    logits = soft_cap((x @ (lm_head if track is tiny else lm_head.T))[:, :VOCAB], CAP)
    cross_entropy = partial(torch.nn.functional.cross_entropy, ignore_index=-1, reduction="sum")
    parts = [cross_entropy(logits, targets[:, k]) for k in range(3)]
    expected = sum(weight * part for weight, part in zip(WEIGHTS.double(), parts, strict=True))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(first, parts[0])
    assert not first.requires_grad
    for ours, theirs in zip(found, torch.autograd.grad(expected * 0.7, [x, lm_head]), strict=True):
        torch.testing.assert_close(ours, theirs)


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


def test_columns_of_the_padding_take_no_part(track, model):
    x, lm_head, targets = make(track)
    chunk = chunk_of(track, model, WEIGHTS.double())
    before = chunk(x, lm_head, targets)
    (lm_head.T if track is tiny else lm_head)[VOCAB:] = 1e6
    for a, b in zip(before[:3], chunk(x, lm_head, targets)[:3], strict=True):
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
def test_memory_at_full_size(track, model, rows):
    """A micro-batch of 32 x 2048 positions and 50,304 columns needs less than its bfloat16 logits and their gradient.

    On the meta device, where tensors have sizes and no contents.
    """
    n, C, V = rows * 2048, 1024, 50304
    shape = (C, V) if track is tiny else (V, C)
    x = torch.empty(n, C, dtype=torch.bfloat16, device="meta", requires_grad=True)
    lm_head = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    targets, weights = torch.empty(n, 3, dtype=torch.int64, device="meta"), torch.empty(3, device="meta")
    chunk = chunk_of(track, model, weights)
    chunk.keywords["vocab_size"] = 50257
    with LiveBytes() as live:
        HeadLoss.apply(x, lm_head, chunk, targets)[0].backward()
    logits = 2 * n * V
    assert live.peak < 2 * logits * (0.5 if rows == 32 else 1)  # half of it suffices
    with LiveBytes() as live:  # as autograd would do it
        model.cross_entropy(x[None], lm_head, targets[None, :, 0], 50257, CAP).sum().backward()
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
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite()].sort().values
    between = (every[1:].double() + every[:-1].double()) / 2
    x = torch.cat(
        [every.double(), between, torch.randn(5000).double() * 10 ** torch.empty(5000).uniform_(-8, 6).double()]
    )
    scale = 2.0**-5
    found = tiny.to_fp8((x * scale).float(), scale, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.double(), rounded((x * scale).float().double() / scale, *numbers))
    assert found.float().abs().max() == numbers[2]  # saturated, not infinite or NaN


def emulated_chunk(x, lm_head, targets, weights):
    """The fp8 head in float64, every rounding written out: 8-bit operands with the track's scales, bfloat16 results."""
    assert [s * 448 for s in (tiny.X_SCALE, tiny.LM_HEAD_SCALE, tiny.GRAD_SCALE)] == pytest.approx([100, 1.6, 0.75])

    def quantized(value, scale, numbers):
        return rounded(value.float() / scale, *numbers) * scale

    def bfloat16(value):
        return value.bfloat16().double()

    x8, head8 = quantized(x, tiny.X_SCALE, E4M3), quantized(lm_head, tiny.LM_HEAD_SCALE, E4M3)
    logits = bfloat16(x8 @ head8).requires_grad_()
    capped = CAP * torch.tanh(logits[:, :VOCAB] / CAP)
    loss = 0
    for k, weight in enumerate(weights.tolist()):
        loss = loss + weight * torch.nn.functional.cross_entropy(
            capped, targets[:, k], ignore_index=-1, reduction="sum"
        )
    grad8 = quantized(bfloat16(torch.autograd.grad(loss, logits)[0]), tiny.GRAD_SCALE, E5M2)
    return loss.detach(), bfloat16(grad8 @ head8.T), bfloat16(x8.T @ grad8)


def relative(found, expected) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_the_fp8_head_is_what_its_formats_say():
    """It agrees with the emulation far better than with the head in float32, from which the formats keep it apart."""
    x, lm_head, targets = make(tiny, torch.bfloat16, positions=256, scale=0.05)
    loss, _, *grads = tiny.head_chunk(x, lm_head, targets, WEIGHTS, VOCAB, CAP, "fp8")
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2
    emulated_loss, *emulated = emulated_chunk(x, lm_head, targets, WEIGHTS)
    plain_loss, _, *plain = tiny.head_chunk(x.float(), lm_head.float(), targets, WEIGHTS, VOCAB, CAP, "plain")
    assert loss.item() == pytest.approx(emulated_loss.item(), rel=1e-5)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-2)
    for ours, theirs, exact in zip(grads, emulated, plain, strict=True):
        assert relative(ours, theirs) < 0.005
        assert 0.02 < relative(ours, exact) < 0.1


def test_the_fp8_products_are_laid_out_as_tensor_cores_want(monkeypatch):
    """By rows times by columns, in multiples of 16; a CPU takes other layouts too, a GPU does not."""
    shapes, product = [], tiny.fp8_product

    def spy(a, b, scale, fast=False):
        assert a.stride(1) == b.stride(0) == 1 and a.size(1) % 16 == b.size(1) % 16 == 0
        assert a.stride(0) % 16 == b.stride(1) % 16 == 0
        assert not a.dtype == b.dtype == torch.float8_e5m2
        shapes.append((*a.shape, b.size(1)))
        return product(a, b, scale, fast)

    monkeypatch.setattr(tiny, "fp8_product", spy)
    x, lm_head, targets = make(tiny, torch.bfloat16, positions=48)
    tiny.head_chunk(x, lm_head, targets, WEIGHTS, VOCAB, CAP, "fp8")
    assert shapes == [(48, 32, PADDED), (48, PADDED, 32), (32, 48, PADDED)]


@pytest.mark.parametrize("head", ["fp8", "plain"])
def test_the_compiled_head_is_the_same(head):
    x, lm_head, targets = make(tiny, torch.bfloat16, positions=48)
    compiled = torch.compile(tiny.head_chunk, backend="aot_eager", fullgraph=True, dynamic=False)
    results = [f(x, lm_head, targets, WEIGHTS, VOCAB, CAP, head) for f in (tiny.head_chunk, compiled)]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


def test_scales_leave_room():
    """Normed x, the initial head and one of large weights, gradients from 1 down to a millionth: none is lost."""
    x = tiny.norm(torch.randn(64, 1024))
    assert x.abs().max() < 100 and relative(tiny.to_fp8(x, tiny.X_SCALE).float() * tiny.X_SCALE, x) < 0.04
    for deviation in (0.001, 0.3):
        weights = deviation * torch.randn(64, 1024)
        assert relative(tiny.to_fp8(weights, tiny.LM_HEAD_SCALE).float() * tiny.LM_HEAD_SCALE, weights) < 0.04
    grad = torch.tensor([1.75, -1.0, 1e-2, 1e-4, 1e-6])
    kept = tiny.to_fp8(grad, tiny.GRAD_SCALE, torch.float8_e5m2).float() * tiny.GRAD_SCALE
    torch.testing.assert_close(kept, grad, rtol=0.13, atol=0.0)


def test_check_kernels_finds_a_wrong_fp8_head(monkeypatch):
    """By this the warm-up checks a GPU's fp8: small for the right one; one wrong product, or an error, is refused."""
    config, cpu = tiny.Config(vocab_size=VOCAB, n_embd=64, n_head=2, head="fp8"), torch.device("cpu")
    chosen = tiny.choose_kernels(config, cpu, torch.bfloat16)
    errors = check_kernels(chosen)
    assert errors == {"attention": 0.0, "head": tiny.head_error(config, cpu, "fp8")} and 0.0 < errors["head"] < 0.1
    product = tiny.fp8_product

    def one_wrong(a, b, scale, fast=False):
        return (1.5 if a.dtype == torch.float8_e5m2 else 1.0) * product(a, b, scale, fast)

    monkeypatch.setattr(tiny, "fp8_product", one_wrong)
    with pytest.raises(ValueError, match="head fp8 is wrong here, by "):
        check_kernels(chosen)

    def fail(*args, **options):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(tiny, "fp8_product", fail)
    with pytest.raises(ValueError, match=r"head fp8 fails here \(CUBLAS_STATUS_NOT_SUPPORTED\): use --head plain"):
        check_kernels(chosen)
    plain = dataclasses.replace(config, head="plain")
    assert check_kernels(tiny.choose_kernels(plain, cpu, torch.bfloat16)) == {"attention": 0.0, "head": 0.0}


def test_choosing_the_head(monkeypatch):
    config, cuda, cpu = tiny.Config(), torch.device("cuda"), torch.device("cpu")
    for capability, auto in (((9, 0), "fp8"), ((8, 9), "fp8"), ((8, 0), "plain")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert tiny.choose_head("auto", config, cuda, torch.bfloat16) == auto
        assert tiny.choose_head("plain", config, cuda, torch.bfloat16) == "plain"
        assert tiny.choose_head("auto", config, cuda, torch.float32) == "plain"
    with pytest.raises(ValueError, match="--head fp8 needs"):
        tiny.choose_head("fp8", config, cuda, torch.bfloat16)
    assert tiny.choose_head("auto", config, cpu, torch.bfloat16) == "plain"


@pytest.mark.parametrize("track", ["tiny"], indirect=True)
def test_a_run_with_the_fp8_head(track, small):
    """In training alone: the first validation is the same to the last bit, and the losses stay close."""
    runs, losses, validations = Path(small["runs_dir"]), {}, {}
    for head in ("fp8", "plain"):
        values = {"dtype": "bfloat16", "head": head, "run_name": head, "eval_initial": True}
        assert track.main(flags(**small | values)) == 0
        steps, found = read_metrics(runs / head)
        losses[head], validations[head] = [line["train_loss"] for line in steps], found
        assert json.loads((runs / head / "result.json").read_text())["head"] == head
    assert validations["fp8"][0]["val_loss"] == validations["plain"][0]["val_loss"]
    assert losses["fp8"] != losses["plain"]
    assert losses["fp8"] == pytest.approx(losses["plain"], abs=0.05)
    assert math.isfinite(validations["fp8"][-1]["val_loss"])
