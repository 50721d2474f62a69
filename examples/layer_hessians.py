"""Three lines in place of a quantiser's own Hessians: `python -m examples.layer_hessians`.

Quantisers and pruners gather H = (2/T) sum_t x_t x_t^T of a layer's inputs, damp it, and take U with H^-1 = U^T U from
three factorizations. The functions below take the place of these:

| here | llm-compressor | GPTQModel |
|---|---|---|
| accumulate | accumulate_hessian of gptq_quantize.py and of sgpt_sparsify.py | GPTQ.process_batch |
| inverse_factor | the head of quantize_weight, of sparsify_weight: dead inputs, damping, U | - |
| retried_inverse_factor | - | GPTQ.hessian_inverse, which raises the damping until it succeeds |

16-bit activations are read as they are, no float32 copy and no transpose of them is made; U takes half the flops and no
second matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfac_kernels import ops


def accumulate(hessian: Tensor, x: Tensor, tokens: int) -> int:
    """H of ``tokens`` rows becomes that of these and the rows of x (..., n); returns how many there are now."""
    total = tokens + x[..., 0].numel()
    if total > tokens:  # an expert may be called with none
        ops.linear_factor_(hessian, x, beta=tokens / total, alpha=2 / total)
    return total


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """U, in the memory of the Hessian; raises torch.linalg.LinAlgError."""
    return ops.cholesky_inverse_factor(hessian, damping, relative=True, dead=True, out=hessian)


def retried_inverse_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """U with the damping that was asked for, in float64 if it has to be, or the first larger one that succeeds."""
    return ops.robust_cholesky_inverse_factor([hessian], damping, relative=True, dead=True).factors[0]


def three_calls(hessian: Tensor, damping: float) -> Tensor:
    """What the last two take the place of."""
    h, diagonal = hessian.clone(), torch.arange(len(hessian))
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    h[diagonal, diagonal] += damping * h.diagonal().mean()
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def main() -> None:
    n, generator = 512, torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 128, n, generator=generator).cumsum(-1).bfloat16() for _ in range(8)]
    hessian, tokens = torch.zeros(n, n), 0
    for x in batches:
        tokens = accumulate(hessian, x, tokens)

    rows = torch.cat(batches).double().flatten(0, 1)
    want = 2 / len(rows) * rows.T @ rows
    print(f"H of {tokens} tokens: relative error {float((hessian - want).norm() / want.norm()):.1e}")
    exact = three_calls(want, 0.01)
    for name, factor in {
        "three calls": three_calls(hessian, 0.01),
        "retried_inverse_factor": retried_inverse_factor(hessian),
        "inverse_factor": inverse_factor(hessian),
    }.items():
        print(f"U by {name}: relative error {float((factor - exact).norm() / exact.norm()):.1e}")


if __name__ == "__main__":
    main()
