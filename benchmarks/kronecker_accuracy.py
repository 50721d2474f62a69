"""How accurate each way to a convolution's factor is: float32 and bfloat16 inputs against float64.

python benchmarks/kronecker_accuracy.py [DIR]      writes DIR/kronecker_accuracy.md (default: benchmarks/results/cpu)

A 3x3 kernel, stride 1, padding 1. Errors: relative in the Frobenius norm; the worst entry, relative to
sqrt(A_ii A_jj), the size that Cauchy and Schwarz allow it; and the worst entry relative to |X|^T |X|, the sum of the
absolute products, which is what direct summation answers for.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.reference.kronecker import patches

N, C, SIZE = 16, 32, 20


def rows(x: Tensor) -> Tensor:
    columns = patches(x, (3, 3), (1, 1), [(1, 1), (1, 1)], (1, 1))
    return columns.permute(0, 3, 1, 2).reshape(-1, 9 * x.shape[1])


def by_tiles(x: Tensor) -> Tensor:
    factor = torch.zeros(9 * C, 9 * C)
    ops.conv2d_factor_(factor, x, 3, padding=1, beta=0.0, algorithm="tiles")
    return factor


def by_state(x: Tensor, algorithm: str) -> Tensor:
    state, factor = torch.zeros(ops.conv2d_lags_size(C, 3, padding=1)), torch.zeros(9 * C, 9 * C)
    ops.conv2d_lags_(state, x, 3, padding=1, beta=0.0, algorithm=algorithm)
    ops.conv2d_expand_(factor, state, 3, padding=1)
    return factor


def by_torch(x: Tensor) -> Tensor:
    matrix = F.unfold(x.float(), 3, padding=1).transpose(1, 2).reshape(-1, 9 * C)
    return matrix.mT @ matrix


WAYS = {
    "unfold + torch.mm, float32": by_torch,
    "tiles": by_tiles,
    "lags": lambda x: by_state(x, "lags"),
    "fft": lambda x: by_state(x, "fft"),
}


def inputs() -> dict[str, Tensor]:
    noise = torch.randn(N, C, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    inside, border, row = noise.clone(), noise.clone(), noise.clone()
    inside[3, 5, 9, 11] = 1e6
    border[3, 5, 0, 11] = 1e6
    row[:, 5, 0] *= 30
    return {
        "mean 0": noise,
        "mean 10": noise + 10,
        "one pixel of 1e6 inside": inside,
        "one pixel of 1e6 on the border": border,
        "a channel's first row times 30": row,
    }


def main(folder: Path) -> None:
    lines = [
        "# Accuracy of the ways to a convolution's factor",
        "",
        f"N = {N}, C = {C}, {SIZE} x {SIZE}, kernel 3, padding 1; `python benchmarks/kronecker_accuracy.py`.",
        "Errors against float64: Frobenius, relative; worst entry over sqrt(A_ii A_jj); worst entry over |X|^T |X|.",
        "",
        "| input | type | way | Frobenius | worst / sqrt(A_ii A_jj) | worst / sum of absolute products |",
        "|---|---|---|---|---|---|",
    ]
    for name, base in inputs().items():
        for dtype in (torch.float32, torch.bfloat16):
            x = base.to(dtype)
            exact = rows(x.double())
            want, size = exact.mT @ exact, exact.abs().mT @ exact.abs()
            scale = want.diagonal().sqrt()
            for way, compute in WAYS.items():
                error = (compute(x).double() - want).abs()
                figures = (
                    float(error.norm() / want.norm()),
                    float((error / (scale[:, None] * scale)).max()),
                    float((error / size).max()),
                )
                cells = " | ".join(f"{figure:.1e}" for figure in figures)
                lines.append(f"| {name} | {str(dtype).removeprefix('torch.')} | {way} | {cells} |")
    lines += [
        "",
        "The frequencies spread rounding errors over the whole plane, and what a kernel offset does not meet is",
        "taken off at the border. So the error of an entry of `fft` is relative to the norms of its two channels",
        "over the plane: an outlier costs digits in the small entries of its channel, none over sqrt(A_ii A_jj).",
        "It is refused, and the samples at work (at most 16) are summed directly, when in any channel the pixels",
        "that all offsets meet have less than 1/16 of the sum of squares: the norm over the plane then exceeds",
        "none over a region by more than 4.",
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kronecker_accuracy.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "cpu")
