"""The diagonal blocks of a matrix, as views, and products with them."""

from __future__ import annotations

import torch
from cholesky_cases import EPS, assert_inverse, seeds, spd
from hypothesis import given
from hypothesis import strategies as st

from mfac_kernels import ops


@given(
    dim=st.integers(0, 40), size=st.integers(1, 45), k=st.integers(0, 5), lead=st.sampled_from([(), (2,)]), seed=seeds
)
def test_block_diagonal(dim, size, k, lead, seed, device):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(dim, dim, generator=generator, dtype=torch.float64).to(device)
    blocks = ops.diagonal_blocks(matrix, size)
    assert len(blocks) <= 2 and all(
        b.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr() for b in blocks
    )
    masked = torch.block_diag(*(block for batch in blocks for block in batch)).view(dim, dim)
    group = torch.arange(dim, device=device) // size
    assert torch.equal(masked, torch.where(group[:, None] == group, matrix, 0.0))
    x = torch.randn(*lead, dim, k, generator=generator, dtype=torch.float64).to(device)
    bound = 2 * (dim + 1) * EPS[torch.float64] * (masked.abs() @ x.abs())
    assert bool(((ops.block_diagonal_matmul(blocks, x) - masked @ x).abs() <= bound).all())
    right = ops.matmul_block_diagonal(x.mT, blocks)
    assert right.shape == x.mT.shape and bool(((right - x.mT @ masked).abs().mT <= bound + 1).all())


def test_block_diagonal_of_a_batch():
    matrices = torch.randn(3, 2, 7, 7)
    whole, ragged = ops.diagonal_blocks(matrices, 3)
    assert whole.shape == (3, 2, 2, 3, 3) and ragged.shape == (3, 2, 1, 1, 1)
    assert torch.equal(whole[:, :, 1], matrices[..., 3:6, 3:6]) and torch.equal(
        ragged[..., 0, 0, 0], matrices[..., 6, 6]
    )


def test_inverse_of_the_block_diagonal_in_place(device):
    """What K-FAC with channel groups does: cut, invert, apply; the rest of the factor stays as it was."""
    factor = spd((), 70, dtype=torch.float32)
    moved = factor.clone().to(device)
    blocks = ops.diagonal_blocks(moved, 32)
    for batch in blocks:
        ops.cholesky_inverse(batch, 0.01, out=batch)
    for start in (0, 32, 64):
        part = slice(start, start + 32)
        assert_inverse(moved[part, part], factor[part, part], 0.01)
    assert torch.equal(moved.cpu()[:32, 32:], factor[:32, 32:])
    x = torch.randn(70, 3)
    product = ops.block_diagonal_matmul(blocks, x.to(device))
    want = torch.block_diag(*(block for batch in blocks for block in batch)) @ x.to(device)
    torch.testing.assert_close(product, want)
