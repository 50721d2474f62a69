"""Input factors of every layer of ResNet-20, ResNet-50 and a transformer: time, roofline.

    python benchmarks/kronecker_layers.py --out benchmarks/results/cpu

Contenders take turns: ours; unfold + mm and its moving average in plain torch; what curvlinops and nngeometry (if
installed) do for this factor; and the bare matrix product of patches that lie ready. Writes kronecker_layers.md, .json
and .png.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels import ops

BETA = 0.95


@dataclass(frozen=True)
class Layer:
    """A convolution of (N, channels, size, size), or a linear layer (size 1) of N * positions rows."""

    channels: int
    size: int = 1
    kernel: int = 1
    stride: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def columns(self) -> int:
        return self.channels * self.kernel**2

    @property
    def positions(self) -> int:
        return ((self.size + 2 * self.padding - self.kernel) // self.stride + 1) ** 2

    def __str__(self) -> str:
        if self.size == 1:
            return f"linear {self.channels}"
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride} {self.channels} @ {self.size}"


def resnet20() -> Counter[Layer]:
    """On 32 x 32 images, batch 128."""
    layers = Counter({Layer(3, 32, 3): 1, Layer(64): 1})
    channels, size = 16, 32
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        layers[Layer(channels, size, 3, stride)] += 1
        size //= stride
        layers[Layer(width, size, 3)] += 5
        channels = width
    return layers


def resnet50() -> Counter[Layer]:
    """On 224 x 224 images, the stride on the 3 x 3 convolutions."""
    layers = Counter({Layer(3, 224, 7, 2): 1, Layer(2048): 1})
    channels, size = 64, 56
    for width, blocks, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            layers[Layer(channels, size)] += 1
            if block == 0:
                layers[Layer(channels, size, 1, stride)] += 1  # the shortcut
            layers[Layer(width, size, 3, stride)] += 1
            size //= stride
            layers[Layer(width, size)] += 1
            channels = 4 * width
    return layers


def transformer() -> Counter[Layer]:
    """12 layers, d = 768, feed-forward 3072; rows are tokens."""
    return Counter({Layer(768): 12 * 5, Layer(3072): 12})


NETWORKS = {"ResNet-20": (resnet20(), 128), "ResNet-50": (resnet50(), 32), "transformer": (transformer(), 32 * 128)}


def contenders(layer: Layer, x: Tensor, factor: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Each leaves beta factor + (1 - beta) sum in its own factor and returns it."""
    theirs = torch.zeros_like(factor)

    def average(total: Tensor) -> Tensor:
        return theirs.mul_(BETA).add_(total, alpha=1 - BETA)

    if layer.size == 1:

        def ours() -> Tensor:
            ops.linear_factor_(factor, x, beta=BETA, alpha=1 - BETA)
            return factor

        return {"ours": ours, "unfold + mm": lambda: average(x.mT @ x), "bare GEMM": lambda: x.mT @ x}

    geometry = {"stride": layer.stride, "padding": layer.padding}

    def conv() -> Tensor:
        ops.conv2d_factor_(factor, x, layer.kernel, beta=BETA, alpha=1 - BETA, **geometry)
        return factor

    def rows() -> Tensor:
        if layer.kernel == 1:
            return x[:, :, :: layer.stride, :: layer.stride].permute(0, 2, 3, 1).reshape(-1, layer.channels)
        return F.unfold(x, layer.kernel, **geometry).transpose(1, 2).reshape(-1, layer.columns)

    def plain() -> Tensor:
        patches = rows()
        return average(patches.mT @ patches)

    held = rows()
    return {"ours": conv, "unfold + mm": plain, **peers(layer, x, average), "bare GEMM": lambda: held.mT @ held}


def peers(layer: Layer, x: Tensor, average: Callable[[Tensor], Tensor]) -> dict[str, Callable[[], Tensor]]:
    """curvlinops 3.0.1 and nngeometry 0.4, each by its own code."""
    found: dict[str, Callable[[], Tensor]] = {}
    module = nn.Conv2d(layer.channels, 1, layer.kernel, layer.stride, layer.padding, bias=False)
    try:
        from curvlinops.kfac_utils import extract_patches
        from einops import einsum, rearrange
    except ModuleNotFoundError:
        pass
    else:

        def curvlinops() -> Tensor:
            patches = extract_patches(x, module.kernel_size, module.stride, module.padding, module.dilation, 1)
            patches = rearrange(patches, "batch ... d_in -> (batch ...) d_in")
            return average(einsum(patches, patches, "b i,b j -> i j"))

        found["curvlinops"] = curvlinops
    try:
        from nngeometry.backend.torch_hooks.grads import Conv2dJacobianFactory
    except ModuleNotFoundError:
        pass
    else:

        def nngeometry() -> Tensor:
            total = torch.zeros(layer.columns, layer.columns)
            Conv2dJacobianFactory.kfac_xx(total, module, module, x, None)
            return average(total)

        found["nngeometry"] = nngeometry
    return found


def measure(layer: Layer, batch: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(batch, layer.channels, layer.size, layer.size)
    if layer.size == 1:
        x = x[:, :, 0, 0]
    factor = torch.zeros(layer.columns, layer.columns)
    calls = contenders(layer, x, factor)
    want = calls["unfold + mm"]()  # both have taken their second step
    got = calls["ours"]()
    error = float((got - want).norm() / want.norm())
    assert error < 1e-5, (layer, error)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if len(seconds[name]) > 1 and seconds[name][-1] > 0.5:
                continue
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    ms = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    rows = batch * (layer.positions if layer.size > 1 else 1)
    flops = rows * layer.columns * (layer.columns + 1)
    return {
        "layer": str(layer),
        **asdict(layer),
        "batch": batch,
        "ms": ms,
        "error": error,
        "flops": flops,
        "bytes": 4 * (x.numel() + 2 * factor.numel()),
        "GFLOP/s": flops / ms["ours"] / 1e6,
    }


def table(network: str, counts: Counter[Layer], rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        f"## {network}, batch {rows[0]['batch']}",
        "",
        "| layer | uses | ours ms | GFLOP/s | unfold + mm | curvlinops | nngeometry | bare GEMM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = ("unfold + mm", "curvlinops", "nngeometry", "bare GEMM")
    totals: Counter[str] = Counter()
    for row, times in zip(rows, counts.values(), strict=True):
        for name, ms in row["ms"].items():
            totals[name] += times * ms
        ratios = [f"{row['ms'][name] / row['ms']['ours']:.1f}x" if name in row["ms"] else "" for name in names]
        cells = [row["layer"], str(times), f"{row['ms']['ours']:.2f}", f"{row['GFLOP/s']:.0f}", *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    whole = [f"{totals[name] / totals['ours']:.1f}x" if name in ("unfold + mm", "bare GEMM") else "" for name in names]
    lines.append(f"| all layers | {sum(counts.values())} | {totals['ours']:.1f} | | {' | '.join(whole)} |")
    return lines


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """GFLOP/s against flops per byte. Lags and FFT do fewer products than the symmetric half that is counted here."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n = 4096
    a, b = torch.randn(n, n), torch.randn(n, n)
    big = torch.randn(1 << 28)
    gemm = 2 * n**3 / best(lambda: a @ b) / 1e9
    read = big.numel() * 4 / best(lambda: big.sum()) / 1e9
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    at = torch.logspace(-1, 4, 100)
    axes.plot(at, (read * at).clamp(max=gemm), color="grey", label=f"mm {gemm:.0f} GFLOP/s, {read:.0f} GB/s")
    for network, rows in results.items():
        axes.scatter([r["flops"] / r["bytes"] for r in rows], [r["GFLOP/s"] for r in rows], label=network)
    axes.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="GFLOP/s of the symmetric half")
    axes.legend()
    figure.savefig(path, dpi=140)


def best(call: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    conditions = {"date": date.today().isoformat(), "machine": platform.processor(), **mk.build_info()}
    lines = [f"- {key}: {value}" for key, value in conditions.items()]
    results: dict[str, list[dict[str, Any]]] = {}
    for network, (counts, batch) in NETWORKS.items():
        results[network] = [measure(layer, batch, arguments.rounds) for layer in counts]
        lines += table(network, counts, results[network])
        print("\n".join(lines[-len(counts) - 5 :]), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "kronecker_layers.md").write_text("\n".join([*lines, ""]))
    content = {"conditions": conditions, "results": results}
    (arguments.out / "kronecker_layers.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    plot(results, arguments.out / "kronecker_layers.png")


if __name__ == "__main__":
    main()
