"""The batched Cholesky ops as ops of torch: derivatives, compilation, threads."""

from __future__ import annotations

import pytest
import torch
from cholesky_cases import DTYPES, FLOATS, SIMT, spd
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.reference import cholesky as reference


def symmetric(root: Tensor) -> Tensor:
    return root @ root.mT / root.shape[-1] + torch.eye(root.shape[-1], dtype=root.dtype)


@pytest.mark.parametrize("shape", [(3, 3), (2, 1, 4, 4), (2, 0, 0), (2, 1, 1)])
@pytest.mark.parametrize("damped", [(), (2,), (1, 3)])
def test_gradients(shape, damped):
    if len(shape) == 3 and damped == (1, 3) and shape[0] == 2:
        damped = (3, 1)
    root = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    damping = torch.full(damped, 0.3, dtype=torch.float64, requires_grad=True)

    def inverse(root: Tensor, damping: Tensor) -> Tensor:
        return ops.cholesky_inverse_ex(symmetric(root), damping)[0]

    assert torch.autograd.gradcheck(inverse, (root, damping))
    assert torch.autograd.gradgradcheck(inverse, (root, damping))


def test_gradient_is_symmetric_and_that_of_torch():
    a = spd((4,), 6).requires_grad_()
    weights = torch.randn(4, 6, 6, dtype=torch.float64)
    (got,) = torch.autograd.grad((ops.cholesky_inverse(a) * weights).sum(), a)
    (want,) = torch.autograd.grad((torch.linalg.inv(a) * weights).sum(), a)
    want = (want + want.mT) / 2
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11 * float(want.abs().max()))
    torch.testing.assert_close(got, got.mT, rtol=1e-13, atol=1e-13 * float(want.abs().max()))


def test_gradients_of_lists_and_dtypes():
    batches = [
        spd((2,), n, 4.0, dtype).requires_grad_(n != 3) for n, dtype in ((3, torch.float32), (5, torch.bfloat16))
    ]
    damping = torch.tensor(0.1, requires_grad=True)
    inverses, infos = ops.grouped_cholesky_inverse_ex(batches, damping)
    assert not any(info.requires_grad for info in infos)
    sum(inverse.sum() for inverse in inverses).backward()
    assert batches[0].grad is None and batches[1].grad.dtype == torch.bfloat16
    want = -sum(reference.inverse(b.detach(), 0.1).sum(-1).square().sum() for b in batches)
    torch.testing.assert_close(damping.grad.double(), want, rtol=1e-5, atol=0)


def test_what_is_not_differentiable_says_so():
    a = spd((2,), 3).requires_grad_()
    for op, arguments in (
        (ops.cholesky_factor_ex, (a,)),
        (ops.cholesky_solve, (a.detach(), a)),
        (ops.robust_cholesky_inverse, ([a],)),
    ):
        with pytest.raises(RuntimeError, match=f"^{op.__name__}: not differentiable"):
            op(*arguments)
        with torch.no_grad():
            op(*arguments)
    with pytest.raises(RuntimeError, match="cholesky_inverse_ex: out: expected none where a gradient is required"):
        ops.cholesky_inverse_ex(a, out=torch.empty(2, 3, 3).double())


def samples(dtype: torch.dtype, device: str = "cpu") -> list[tuple[str, tuple[object, ...]]]:
    blocks = [spd((4,), 3, 4.0, dtype).to(device), spd((2, 1), 20, 4.0, dtype).mT.to(device)]
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    out = [torch.zeros_like(b, dtype=computed) for b in blocks]
    damping = [torch.ones(4, device=device).double(), torch.ones(1, device=device).double()]
    only = torch.tensor([1, 0, 0, 2, -1, 0], dtype=torch.int32, device=device)
    factors = [ops.cholesky_factor(b.to(computed)) for b in blocks]
    x = [torch.ones(*f.shape[:-1], 2, dtype=computed, device=device) for f in factors]
    return [
        *((f"cholesky_{what}_ex", (b, 0.1)) for what in ("inverse", "factor") for b in blocks),
        ("cholesky_inverse_", (out, blocks, damping)),
        ("cholesky_inverse_", (out, blocks, damping, only)),
        ("cholesky_factor_", (out, blocks, damping)),
        ("cholesky_factor_", (out, blocks, damping, only)),
        ("cholesky_solve_", (x, factors)),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, device):
    for name, arguments in samples(dtype, device):
        torch.library.opcheck(getattr(torch.ops.mfac_kernels, name).default, arguments)


def test_compiles_to_one_graph(device):
    def everything(a: Tensor, b: Tensor, bad: Tensor, damping: Tensor) -> list[Tensor]:
        inverses, infos = ops.grouped_cholesky_inverse_ex([a, b], [damping, 0.5])
        factor, info = ops.cholesky_factor_ex(a, 0.1)
        robust = ops.robust_cholesky_inverse([bad, b], 0.0)
        blocks = ops.diagonal_blocks(b[0], 3)
        product = ops.block_diagonal_matmul(blocks, b[0])
        inverse, _ = ops.cholesky_inverse_ex(a, damping, out=torch.empty_like(a))
        tail = [inverse, product, ops.cholesky_solve(factor, a), factor, info]
        return [*inverses, *infos, *robust.inverses, *robust.attempts, *robust.dampings, *tail]

    a, b = spd((4,), 5, dtype=torch.float32).to(device), spd((2,), 7, 4.0).to(device)
    bad = torch.stack([torch.ones(4, 4), torch.eye(4), torch.zeros(4, 4)]).to(device)
    damping = torch.tensor([0.1, 0.2, 0.3, 0.0], device=device)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(a, b, bad, damping), everything(a, b, bad, damping), strict=True):
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_gradients_compile_to_one_graph(device):
    def loss(a: Tensor, damping: Tensor) -> Tensor:
        inverse, _ = ops.cholesky_inverse_ex(a, damping)
        return inverse.square().sum()

    a, damping = spd((4,), 5).to(device).requires_grad_(), torch.tensor(0.1, device=device).double().requires_grad_()
    want = torch.autograd.grad(loss(a, damping), (a, damping))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(a, damping), (a, damping))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_for_any_number_of_threads(dtype, device, same_bits, instruction_set):
    shapes = [(40, 16), (5, 33), (2, 64), (1, 100)] if SIMT else [(200, 16), (40, 33), (20, 64), (5, 130), (2, 300)]
    batches = [spd((b,), n, 100.0, dtype).to(device) for b, n in shapes]

    def results() -> list[Tensor]:
        inverses, infos = ops.grouped_cholesky_inverse_ex(batches, 0.01)
        factors = [ops.cholesky_factor(batch, 0.01) for batch in batches]
        return [*inverses, *infos, *factors, *(ops.cholesky_solve(f, b) for f, b in zip(factors, batches, strict=True))]

    same_bits(results)
