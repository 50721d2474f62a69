"""Inverses of a trained network's K-FAC factors, float32: which fail, what the robust form does, how exact they are.

    python benchmarks/cholesky_real_factors.py [--steps 60] [--out benchmarks/results/cpu/cholesky_real_factors.md]

ResNet-20 is trained for some steps of SGD on CIFAR-10, which the package fetches and keeps. Then, for one batch of
images, A = (1/N) sum a a^T over the patches and B = (1/(N S)) sum g g^T over the output gradients of every layer, in
plain torch. They are inverted whole and as block diagonals of 32 channels or patch entries.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels import ops, training
from mfac_kernels.training import datasets

DAMPINGS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 0.0)
GROUP = 32
BATCH = 128  # of training
IMAGES = (128, 4)  # of a factor
HEAD = """\
# Inverses of a trained network's factors

`python benchmarks/cholesky_real_factors.py`: factors in float32 of {model}; {build}.

The residual is |(A + damping I) X - I| in the Frobenius norm over sqrt(n), computed in float64: median and largest of
the blocks. The robust form repeats a block that fails in float64, then with a damping that grows by 10 from 10 damping
or, if that is larger, eps times the mean diagonal; its residual is that of the damping used. LAPACK is
torch.linalg.cholesky_ex and torch.cholesky_inverse in float32.

A small batch leaves factors without full rank, as in the first steps of training: their smallest eigenvalues are the
rounding of their entries.
"""
SECTION = """
## {images} images: the {count} factors whole, n = {smallest} to {largest}

{whole}

## {images} images: their block diagonals, {blocks} blocks of at most {group}

{cut}

## {images} images: each factor

Residual of the robust form; f64: repeated in float64; in brackets: the larger damping it took.

{each}
"""


def trained(data: datasets.Dataset, steps: int) -> tuple[nn.Module, float]:
    """ResNet-20 after so many steps, and the loss of the last one."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = training.build_model("resnet20", 3, len(data.classes), (32, 32)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    loss = torch.zeros(())
    for _ in range(steps):
        index = torch.randint(len(data.train_images), (BATCH,), generator=generator)
        images = datasets.augment(data.train_images[index], generator, pad=data.pad, flip=data.flip)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(datasets.normalize(images, data.mean, data.std)), data.train_labels[index])
        loss.backward()
        optimizer.step()
    return model, loss.item()


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """One row per output position: (N S, inputs of the layer), and a column of ones for its bias."""
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT.flatten(0, 1)
    return F.pad(x, (0, 1), value=1.0) if layer.bias is not None else x


def rows(gradient: Tensor) -> Tensor:
    """(N, C, H, W) or (N, C) -> (N S, C)."""
    return gradient.movedim(1, -1).flatten(0, -2)


def factors_of(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """A and B of every convolution and linear layer, by name, float32."""
    factors: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        a = patches(layer, x.detach())
        factors[f"{name} A"] = a.mT @ a / len(x)

        def keep_gradient(gradient: Tensor) -> None:
            g = rows(gradient)
            factors[f"{name} B"] = g.mT @ g / len(g)

        y.register_hook(keep_gradient)

    hooks = [
        layer.register_forward_hook(lambda layer, x, y, name=name: keep(name, layer, x[0], y))
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    F.cross_entropy(model(images), labels, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return dict(sorted(factors.items()))


def residuals(batches: Sequence[Tensor], inverses: Sequence[Tensor], dampings: Sequence[Tensor]) -> Tensor:
    """|(A + damping I) X - I| in the Frobenius norm, over sqrt(n), in float64, of every block."""
    parts = []
    for a, x, damping in zip(batches, inverses, dampings, strict=True):
        eye = torch.eye(a.shape[-1], dtype=torch.float64)
        product = (a.double() + damping[..., None, None] * eye) @ x.double()
        parts.append(torch.linalg.matrix_norm(product - eye).flatten() / a.shape[-1] ** 0.5)
    return torch.cat(parts)


def lapack(batches: Sequence[Tensor], damping: float) -> list[Tensor]:
    """torch's Cholesky inverse, NaN where it fails."""
    inverses = []
    for a in batches:
        factor, info = torch.linalg.cholesky_ex(a + damping * torch.eye(a.shape[-1]))
        inverse = torch.full_like(a, torch.nan)
        inverse[info == 0] = torch.cholesky_inverse(factor[info == 0])
        inverses.append(inverse)
    return inverses


@dataclass
class Row:
    """One damping: of every block what was done, with which damping, and residuals (NaN: no inverse)."""

    damping: float
    plain: Tensor
    lapack: Tensor
    robust: Tensor
    attempts: Tensor
    used: Tensor


def measure(batches: Sequence[Tensor], damping: float) -> Row:
    asked = [torch.full(a.shape[:-2], damping, dtype=torch.float64) for a in batches]
    plain, _ = ops.grouped_cholesky_inverse_ex(batches, damping)
    robust = ops.robust_cholesky_inverse(batches, damping)
    return Row(
        damping,
        residuals(batches, plain, asked),
        residuals(batches, lapack(batches, damping), asked),
        residuals(batches, robust.inverses, robust.dampings),
        torch.cat([attempts.flatten() for attempts in robust.attempts]),
        torch.cat([used.flatten() for used in robust.dampings]),
    )


def spread(values: Tensor) -> str:
    values = values[values.isfinite()]
    return f"{values.median():.1e}, {values.max():.1e}" if len(values) else "-"


def summary(measured: Sequence[Row]) -> list[str]:
    columns = [
        "damping",
        "fail",
        "fail in LAPACK",
        "repeated in float64",
        "with larger damping, at most",
        "given up",
        "residual where none fails",
        "LAPACK's",
        "robust form's",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in measured:
        grown = row.attempts > 1
        most = f"{int(grown.sum())}, {row.used[grown].max():.1e}" if grown.any() else "0"
        cells = [
            f"{row.damping:g}",
            str(int(row.plain.isnan().sum())),
            str(int(row.lapack.isnan().sum())),
            str(int((row.attempts == 1).sum())),
            most,
            str(int((row.attempts < 0).sum())),
            spread(row.plain),
            spread(row.lapack),
            spread(row.robust),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def each(factors: dict[str, Tensor], measured: Sequence[Row]) -> list[str]:
    """A line per factor: its spectrum, then the residual at every damping and how it was reached."""
    dampings = " | ".join(f"{row.damping:g}" for row in measured)
    lines = [
        f"| factor | n | mean diagonal | eigenvalues, largest and smallest | {dampings} |",
        "|---" * (4 + len(measured)) + "|",
    ]
    for i, (name, factor) in enumerate(factors.items()):
        eigenvalues = torch.linalg.eigvalsh(factor.double())
        cells = [name, str(len(factor)), f"{factor.diagonal().mean():.1e}"]
        cells.append(f"{eigenvalues[-1]:.1e}, {eigenvalues[0]:.1e}")
        for row in measured:
            attempt = int(row.attempts[i])
            how = (
                ""
                if attempt == 0
                else " f64"
                if attempt == 1
                else f" ({row.used[i]:.0e})"
                if attempt > 1
                else " failed"
            )
            cells.append(f"{row.robust[i]:.0e}{how}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def section(model: nn.Module, data: datasets.Dataset, images: int) -> str:
    inputs = datasets.normalize(data.train_images[:images], data.mean, data.std)
    factors = factors_of(model, inputs, data.train_labels[:images])
    whole = [measure([factor[None] for factor in factors.values()], damping) for damping in DAMPINGS]
    blocks = [batch for factor in factors.values() for batch in ops.diagonal_blocks(factor, GROUP)]
    return SECTION.format(
        images=images,
        count=len(factors),
        smallest=min(map(len, factors.values())),
        largest=max(map(len, factors.values())),
        whole="\n".join(summary(whole)),
        blocks=sum(map(len, blocks)),
        group=GROUP,
        cut="\n".join(summary([measure(blocks, damping) for damping in DAMPINGS])),
        each="\n".join(each(factors, whole)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="of training (default 60)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/cpu/cholesky_real_factors.md")
    arguments = parser.parse_args()
    data = datasets.load("cifar10")
    model, loss = trained(data, arguments.steps)
    head = HEAD.format(
        model=f"ResNet-20 after {arguments.steps} steps of SGD on CIFAR-10 ({data.source}), loss {loss:.2f}",
        build="torch {torch}, {instruction_set}".format(**mk.build_info()),
    )
    text = head + "".join(section(model, data, images) for images in IMAGES)
    arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
