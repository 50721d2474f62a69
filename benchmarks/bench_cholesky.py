"""Batched Cholesky against torch.linalg: inverses by size, a whole network's blocks in one call, what grouping saves.

Each result is verified before it is timed. Floor of an inverse: n^3 flops, n^2/2 elements read and n^2 written.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ceilings import Bound
from torch import Tensor

from mfac_kernels import ops

DAMPING = 1e-2
# (batch, n, what torch.linalg must be beaten by)
SIZES = [(4096, 16, 25.0), (2048, 32, 18.0), (1024, 64, 18.0), (256, 128, 15.0), (16, 256, 8.5), (8, 512, 5.5)]
GROUP = 64
CALLS = 5  # in a row: a thread that has gone to sleep beside a serial contender takes most of a millisecond to wake


def factors(batch: int, n: int, device: str) -> Tensor:
    """Second moments of 2 n samples."""
    x = torch.randn(batch, 2 * n, n, device=device, generator=torch.Generator(device).manual_seed(n))
    return x.mT @ x / (2 * n)


def damped(blocks: Tensor) -> Tensor:
    return blocks + DAMPING * torch.eye(blocks.shape[-1], device=blocks.device)


def factor_and_invert(a: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(a)[0])


def assert_inverse(inverse: Tensor, blocks: Tensor) -> None:
    x = torch.randn(blocks.shape[-1], 4, dtype=torch.float64, device=blocks.device)
    error = float((damped(blocks).double() @ (inverse.double() @ x) - x).abs().max())
    assert error <= 1e-2, error


def contenders(blocks: Tensor) -> dict[str, Callable[[], object]]:
    """Of blocks that are damped already: that is our part alone."""
    a = damped(blocks)
    identity = torch.eye(blocks.shape[-1], device=blocks.device).expand_as(blocks)
    return {
        "cholesky_ex + cholesky_inverse": lambda: factor_and_invert(a),
        "inv_ex": lambda: torch.linalg.inv_ex(a),
        "cholesky_ex + cholesky_solve": lambda: torch.cholesky_solve(identity, torch.linalg.cholesky_ex(a)[0]),
    }


def moved_once(flops: float, elements: int) -> Bound:
    """Half of each block read, all of it written."""
    return Bound(flops, read=2 * elements, written=4 * elements)


@pytest.mark.parametrize(("batch", "n", "gate"), SIZES, ids=[f"{n}" for _, n, _ in SIZES])
def test_inverse(race, device, batch, n, gate):
    blocks = factors(batch, n, device)
    out = torch.empty_like(blocks)
    assert_inverse(ops.cholesky_inverse_ex(blocks, DAMPING, out=out)[0], blocks)
    race(
        "batched inverse",
        f"n={n} batch={batch}",
        lambda: ops.cholesky_inverse_ex(blocks, DAMPING, out=out),
        contenders(blocks),
        gates={"cholesky_ex + cholesky_inverse": gate},
        bound=moved_once(batch * n**3, batch * n * n),
        calls=CALLS,
    )


@pytest.mark.parametrize(("batch", "n"), [(1024, 64), (16, 256)])
def test_factor(race, device, batch, n):
    blocks = factors(batch, n, device)
    a = damped(blocks)
    factor = ops.cholesky_factor_ex(blocks, DAMPING)[0]
    torch.testing.assert_close(factor, torch.linalg.cholesky(a), rtol=1e-3, atol=1e-4)
    race(
        "batched factor",
        f"n={n} batch={batch}",
        lambda: ops.cholesky_factor_ex(blocks, DAMPING, out=factor),
        {"cholesky_ex": lambda: torch.linalg.cholesky_ex(a)},
        bound=moved_once(batch * n**3 / 3, batch * n * n),
        calls=CALLS,
    )


@pytest.mark.parametrize(("batch", "n"), [(1024, 64), (16, 256)])
def test_solve(race, device, batch, n):
    lower = torch.linalg.cholesky(damped(factors(batch, n, device)))
    b = torch.randn(batch, n, n, device=device)
    torch.testing.assert_close(ops.cholesky_solve(lower, b), torch.cholesky_solve(b, lower), rtol=1e-2, atol=1e-2)
    race(
        "batched solve, n right-hand sides",
        f"n={n} batch={batch}",
        lambda: ops.cholesky_solve(lower, b),
        {"cholesky_solve": lambda: torch.cholesky_solve(b, lower)},
        bound=Bound(2 * batch * n**3),
        calls=CALLS,
    )


def resnet50() -> list[tuple[int, int]]:
    """(inputs, outputs) of every layer: with SUA the factors of a convolution are of its channels."""
    layers, channels = [(3, 64)], 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            layers += [(channels, width), (width, width), (width, 4 * width)]
            if block == 0:
                layers.append((channels, 4 * width))
            channels = 4 * width
    return [*layers, (channels + 1, 1000)]  # the last one has a bias


def grouped(dim: int, device: str) -> list[Tensor]:
    """The diagonal blocks of a factor (dim, dim) in groups of 64 channels: the whole ones, and the ragged last."""
    whole, rest = divmod(dim, GROUP)
    return [factors(count, n, device) for count, n in ((whole, GROUP), (1, rest)) if count * n]


def test_resnet50(race, device):
    batches = [blocks for layer in resnet50() for dim in layer for blocks in grouped(dim, device)]
    loop = [damped(blocks) for blocks in batches]
    inverses = ops.grouped_cholesky_inverse_ex(batches, DAMPING)[0]
    for blocks, inverse in zip(batches, inverses, strict=True):
        assert_inverse(inverse, blocks)
    race(
        "every factor of ResNet-50, SUA, groups of 64",
        f"{sum(len(blocks) for blocks in batches)} blocks in {len(batches)} batches",
        lambda: ops.grouped_cholesky_inverse_ex(batches, DAMPING),
        {
            "loop over cholesky_ex + cholesky_inverse": lambda: [factor_and_invert(a) for a in loop],
            "loop over cholesky_inverse_ex": lambda: [ops.cholesky_inverse_ex(blocks, DAMPING) for blocks in batches],
        },
        bound=moved_once(
            sum(blocks.shape[0] * blocks.shape[-1] ** 3 for blocks in batches), sum(map(torch.numel, batches))
        ),
        calls=CALLS,
    )


@pytest.mark.parametrize(("batch", "n"), [(1, 4608), (9, 512), (144, 32)])
def test_grouping(race, device, batch, n):
    """The factor of a 3 x 3 convolution of 512 channels: whole, in 9 blocks, in 144."""
    blocks = factors(batch, n, device)
    out, a = torch.empty_like(blocks), damped(blocks)
    assert_inverse(ops.cholesky_inverse_ex(blocks, DAMPING, out=out)[0], blocks)
    race(
        "one factor of 4608 in groups",
        f"{batch} of {n} x {n}",
        lambda: ops.cholesky_inverse_ex(blocks, DAMPING, out=out),
        {"cholesky_ex + cholesky_inverse": lambda: factor_and_invert(a)},
        bound=moved_once(batch * n**3, batch * n * n),
        calls=1 if n > 1000 else CALLS,
    )
