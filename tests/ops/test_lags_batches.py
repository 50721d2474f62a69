"""The compressed form by both ways: averages of batches, batches of every shape, batches that are not finite."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kronecker_cases import DTYPES, SIMT, factor_dtype, random
from lags_cases import RESNET, WAYS
from torch import Tensor

from mfac_kernels import ops


@pytest.mark.parametrize("fft", WAYS)
def test_an_average_of_states_is_that_of_factors(fft, instruction_set, device):
    """Over batches of several sizes."""
    conv = replace(RESNET, channels=6, bias=True)
    state, want = conv.state(torch.float64).to(device), torch.zeros(1, 55, 55).double()
    for step, image in enumerate([(9, 10), (4, 7), (12, 5)]):
        batch = replace(conv, image=image, seed=5 * step, n=step + 1)
        x = batch.input(torch.float64)
        batch.lags_(state, x.to(device), 0.9, 0.1, fft=fft)
        want = 0.9 * want + 0.1 * batch.dense(x)
    factor = torch.empty(55, 55, device=device, dtype=torch.float64)
    conv.expand_(factor, state)
    torch.testing.assert_close(factor.cpu(), want[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fft", WAYS)
@pytest.mark.parametrize(
    ("value", "dtype"), [*((float("nan"), dtype) for dtype in DTYPES), (float("inf"), torch.float32)]
)
def test_non_finite_images_change_nothing(value, dtype, fft, instruction_set, device):
    conv = replace(RESNET, channels=35, bias=True)
    x = conv.input(dtype).contiguous()
    bad = x.clone()
    bad[1, 34, 8, 9] = value
    old = conv.reference(x).to(factor_dtype(dtype))
    state, flag = old.clone().to(device), torch.zeros(1, dtype=torch.int32, device=device)
    conv.lags_(state, bad.to(device), 0.5, refused=flag, fft=fft)
    assert flag.tolist() == [1] and torch.equal(state.cpu(), old)
    flag.zero_()
    conv.lags_(state, x.to(device), 0.5, refused=flag, fft=fft)
    assert flag.tolist() == [0] and not torch.equal(state.cpu(), old)


@pytest.mark.parametrize("fft", WAYS)
def test_samples_far_apart(fft, device):
    """Offsets beyond 2^31; the memory between the samples is never touched."""
    conv = replace(RESNET, channels=3, seed=0)
    x = conv.input(torch.bfloat16)
    far = torch.empty(2**31 + 512, dtype=torch.bfloat16, device=device)
    far = far.as_strided(x.shape, (2**31 + 5, *x.stride()[1:])).copy_(x)
    states = [conv.state(torch.float32).to(device) for _ in range(2)]
    conv.lags_(states[0], x.to(device), fft=fft)
    conv.lags_(states[1], far, fft=fft)
    assert torch.equal(*states)


@pytest.mark.skipif(SIMT, reason="too long for an interpreter")
@pytest.mark.parametrize("fft", WAYS)
def test_chunks_of_samples(fft, instruction_set):
    """More than the panels hold at a time: 16 MiB, or 16 samples."""
    conv = replace(RESNET, n=40, channels=34, image=(40, 60), bias=True, seed=0)
    x = conv.input(torch.float32)
    whole, parts = conv.state(torch.float32), conv.state(torch.float32)
    flag = torch.zeros(1, dtype=torch.int32)
    conv.lags_(whole, x, 0.0, refused=flag, fft=fft)
    for part in x.split(5):
        conv.lags_(parts, part, fft=fft)
    assert not flag.any()
    assert float((whole - parts).norm() / whole.norm()) <= 1e-6
    x[39, 33, 39, 59] = float("nan")
    before = whole.clone()
    conv.lags_(whole, x, refused=flag, fft=fft)
    assert flag.all() and torch.equal(whole, before)


@pytest.mark.parametrize("fft", WAYS)
@pytest.mark.parametrize("image", [(5, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("samples", [0, 1])
def test_images_without_pixels(samples, image, fft, device):
    """Patches of padding alone: no products, and as many ones as there are patches."""
    x = torch.zeros(samples, 3, *image, device=device)
    state = torch.full(ops.conv2d_lags_size(3, 3, padding=2, bias=True), float("nan"), device=device)
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    ops.conv2d_lags_(state, x, 3, padding=2, bias=True, beta=0.0, check_finite=flag, algorithm="fft" if fft else "lags")
    factor = torch.zeros(28, 28, device=device)
    ops.conv2d_expand_(factor, state, 3, padding=2, bias=True)
    want = torch.zeros(28, 28)
    want[27, 27] = samples * (image[0] + 2) * (image[1] + 2)
    assert torch.equal(factor.cpu(), want) and not flag.any()
    for algorithm in ("auto", "tiles"):
        again = torch.full((28, 28), float("nan"), device=device)
        ops.conv2d_factor_(again, x, 3, padding=2, bias=True, beta=0.0, algorithm=algorithm)
        assert torch.equal(again.cpu(), want)


def test_images_without_pixels_under_a_kernel_of_one(device):
    """A dimension without pixels or reach has no frequencies to count either."""
    x, factor = torch.zeros(2, 3, 0, 5, device=device), torch.ones(4, 4, device=device)
    ops.conv2d_factor_(factor, x, 1, padding=1, bias=True, beta=0.0)
    want = torch.zeros(4, 4)
    want[3, 3] = 2 * 2 * 7
    assert torch.equal(factor.cpu(), want)
    state = torch.ones(ops.conv2d_lags_size(3, 1, padding=1), device=device)
    ops.conv2d_lags_(state, x, 1, padding=1, beta=0.0)
    assert not state.any()


@pytest.mark.parametrize("fft", WAYS)
@pytest.mark.parametrize("layout", ["channels first", "channels last", "strided"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_the_ends_of_many_samples_are_looked_at(last, layout, fft, instruction_set, device):
    """More samples than the frequencies take at a time, a ragged number of elements."""
    conv = replace(RESNET, n=17, channels=3, image=(5, 7), seed=0)
    x = conv.input(torch.float32)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        around = torch.full((17, 3, 5, 9), float("nan"))
        around[..., 1:8] = x
        x = around[..., 1:8]
    state = conv.state(torch.float32).to(device)
    for spoiled in (False, True):
        if spoiled:
            x[(-1 if last else 0,) * 4] = float("inf")
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        conv.lags_(state, x.to(device), refused=flag, fft=fft)
        assert flag.tolist() == [int(spoiled)]
        assert bool(state.isfinite().all())


@pytest.mark.skipif(SIMT, reason="threads of the CPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, same_bits, instruction_set):
    def results() -> list[Tensor]:
        found = []
        for conv in (RESNET, replace(RESNET, n=20, channels=18, groups=2, image=(20, 20), bias=True)):
            for fft in (False, True):
                state = conv.state(factor_dtype(dtype))
                conv.lags_(state, conv.input(dtype), fft=fft)
                factor = torch.zeros_like(conv.expanded(state))
                conv.expand_(factor if conv.groups > 1 else factor[0], state)
                found += [state, factor]
        return found

    same_bits(results)


def test_python_surface(instruction_set, device):
    x = random((2, 6, 7, 8), torch.float32, 0).to(device)
    for how in ({"padding": 1}, {"padding": "same", "dilation": 2, "groups": 2}, {"bias": True}):
        bias, groups = how.get("bias", False), how.get("groups", 1)
        state = torch.zeros(ops.conv2d_lags_size(6, 3, **how), device=device)
        flag = ops.conv2d_lags_(state, x, 3, **how, beta=0.0, check_finite=True)
        size = 6 // groups * 9 + bias
        got = torch.empty(*([groups] if groups > 1 else []), size, size, device=device)
        ops.conv2d_expand_(got, state, 3, **how)
        want = torch.zeros_like(got)
        ops.conv2d_factor_(want, x, 3, **how, algorithm="tiles")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
        assert flag.tolist() == [0]
    with pytest.raises(RuntimeError, match='conv2d_lags_: algorithm: expected "auto", "lags" or "fft", got "tiles"'):
        ops.conv2d_lags_(state, x, 3, bias=True, algorithm="tiles")
