"""Perplexity of a small transformer, rounded and pruned with and without layer Hessians: `make paper-gptq`.

A decoder on bytes is trained on the sources of Python's standard library, every 20th file held out. Then the linear
layers of its blocks are compressed, block after block, each with the Hessians of inputs that earlier compressed blocks
give. Embeddings and the head stay. Written to --out: quantised_transformer.md, quantised_transformer.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from provenance import commit
from source_bytes import sources, windows
from torch import Tensor, nn

from mfac_kernels.pruning import LayerHessian, gptq, round_to_nearest, sparsegpt
from mfac_kernels.reference.layer_hessian import three_calls

CONTEXT = 128
BATCH = 16


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """Bytes (n, positions) -> logits of the next ones."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bytes(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.last(h))


@dataclass
class Way:
    """A way to compress a layer: on its Hessian, or, if it ``gathers`` none, on None.

    perplexities, seconds: one of each draw of calibration data; if it gathers none, of the first.
    """

    kind: str
    method: str
    compress: Callable[[nn.Module, Tensor | None], object]
    gathers: bool = True
    perplexities: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train(model: nn.Module, data: Tensor, seconds: float) -> int:
    """AdamW until the time is over, with the learning rate a function of the time spent; returns the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    generator, started, steps, said = torch.Generator().manual_seed(0), time.perf_counter(), 0, 0.0
    while (spent := time.perf_counter() - started) < seconds:
        rate = 3e-3 * min(1.0, steps / 50) * math.cos(math.pi / 2 * spent / seconds)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        value = loss(model, windows(data, BATCH, CONTEXT + 1, generator))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if spent - said > max(5.0, seconds / 20):
            print(f"{spent:5.0f} s of {seconds:.0f}  step {steps}, loss {float(value.detach()):.3f}", flush=True)
            said = spent
    return steps


@torch.no_grad()
def perplexity(model: nn.Module, data: Tensor, count: int) -> float:
    """Per byte, over ``count`` windows, evenly spaced."""
    starts = torch.linspace(0, len(data) - CONTEXT - 1, count).long()[:, None]
    batches = data[starts + torch.arange(CONTEXT + 1)].long().split(BATCH)
    return math.exp(sum(float(loss(model, batch)) * len(batch) for batch in batches) / count)


@torch.no_grad()
def compressed(model: nn.Module, calibration: Tensor, way: Way) -> nn.Module:
    """A copy of the model, block after block compressed."""
    model = copy.deepcopy(model)
    for i, block in enumerate(model.blocks):
        if not way.gathers:
            for layer in (block.qkv, block.out, block.up, block.down):
                way.compress(layer, None)
            continue
        with LayerHessian(model, include=[f"blocks.{i}.*"]) as hessians:
            for batch in calibration.split(BATCH):
                model(batch[:, :-1])
        for name, hessian in hessians.items():
            way.compress(hessians.layer(name), hessian)
    return model


def by_magnitude(layer: nn.Module, sparsity: float, group: int | None) -> None:
    """The smaller weights of the layer, or of every ``group`` columns, become 0."""
    sizes = layer.weight.abs().flatten() if group is None else layer.weight.abs().unflatten(1, (-1, group))
    dropped = sizes.argsort(-1)[..., : round(sparsity * sizes.shape[-1])]
    kept = torch.ones_like(sizes).scatter(-1, dropped, 0).view_as(layer.weight)
    layer.weight.mul_(kept)


def quantisers(bits: int, group_size: int | None) -> list[Way]:
    options = {"bits": bits, "group_size": group_size}
    kind = f"{bits} bits"
    return [
        Way(kind, "round to nearest", lambda m, _: round_to_nearest(m, **options), gathers=False),
        Way(kind, "GPTQ", lambda m, h: gptq(m, h, **options)),
        Way(kind, "GPTQ, U by three calls", lambda m, h: gptq(m, h, **options, inverse_factor=three_calls)),
        Way(kind, "GPTQ, actorder", lambda m, h: gptq(m, h, **options, actorder=True)),
    ]


def pruners(kind: str, pattern: str, group: int | None) -> list[Way]:
    def pruned(layer: nn.Module, hessian: Tensor, **options: object) -> None:
        sparsegpt(layer, hessian, 0.5, pattern=pattern, **options)

    return [
        Way(kind, "magnitude", lambda m, _: by_magnitude(m, 0.5, group), gathers=False),
        Way(kind, "diagonal of H", lambda m, h: pruned(m, h.diagonal().diag(), damping=0.0)),
        Way(kind, "SparseGPT", pruned),
        Way(kind, "SparseGPT, U by three calls", lambda m, h: pruned(m, h, inverse_factor=three_calls)),
    ]


def report(dense: float, ways: list[Way], conditions: dict[str, object], out: Path) -> str:
    """Writes the table in both forms; returns it."""
    lines = ["| | method | perplexity | seconds |", "|---|---|---|---|", f"| float32 | | {dense:.4f} | |"]
    for way in ways:
        cell = f"{statistics.mean(way.perplexities):.4f}"
        if len(way.perplexities) > 1:
            cell += f" ± {statistics.stdev(way.perplexities):.4f}"
        lines.append(f"| {way.kind} | {way.method} | {cell} | {statistics.median(way.seconds):.1f} |")
    table = "\n".join(lines)
    said = "\n".join(f"- {key}: {value}" for key, value in conditions.items())
    out.mkdir(parents=True, exist_ok=True)
    text = [
        "# A small transformer, rounded and pruned",
        "`make paper-gptq`. Perplexity per byte of files that were not trained on; mean and deviation over draws of\n"
        "calibration data, where it is used. Seconds: of gathering, if it is, and compressing.",
        table,
        said,
    ]
    (out / "quantised_transformer.md").write_text("\n\n".join(text) + "\n")
    rows = [{k: getattr(way, k) for k in ("kind", "method", "perplexities", "seconds")} for way in ways]
    content = {"conditions": {k: str(v) for k, v in conditions.items()}, "float32": dense, "rows": rows}
    (out / "quantised_transformer.json").write_text(json.dumps(content, indent=1) + "\n")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-seconds", type=float, default=240)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=None, help="columns that share a grid (default: a row)")
    parser.add_argument("--calibration", type=int, default=128, help="windows")
    parser.add_argument("--test", type=int, default=512, help="windows")
    parser.add_argument("--draws", type=int, default=3, help="of the calibration data")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    data, held_out = sources()
    model = Transformer(arguments.width, arguments.depth, arguments.heads)
    steps = train(model, data, arguments.train_seconds)
    model.eval()
    conditions: dict[str, object] = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "text": f"sources of Python {platform.python_version()}: {len(data)} bytes, {len(held_out)} held out",
        "network": f"width {arguments.width}, {arguments.depth} blocks, {arguments.heads} heads, context {CONTEXT}; "
        f"{sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)} weights compressed",
        "training": f"AdamW, {steps} steps of {BATCH} windows in {arguments.train_seconds:g} s",
        "grids": f"asymmetric, one for each {f'{size} columns' if (size := arguments.group_size) else 'row'}",
        "calibration": f"{arguments.calibration} windows, {arguments.draws} draws",
        "test": f"{arguments.test} windows",
    }
    started = time.perf_counter()
    dense = perplexity(model, held_out, arguments.test)
    print(f"float32: {dense:.4f}", flush=True)
    ways = [way for bits in arguments.bits for way in quantisers(bits, arguments.group_size)]
    ways += [*pruners("50%", "unstructured", None), *pruners("2:4", "2:4", 4)]
    for draw in range(arguments.draws):
        calibration = windows(data, arguments.calibration, CONTEXT + 1, torch.Generator().manual_seed(1 + draw))
        for way in ways:
            if draw > 0 and not way.gathers:
                continue
            begun = time.perf_counter()
            small = compressed(model, calibration, way)
            way.seconds.append(time.perf_counter() - begun)
            way.perplexities.append(perplexity(small, held_out, arguments.test))
            spent = time.perf_counter() - started
            print(f"{spent:5.0f} s  {way.kind}, {way.method}, draw {draw}: {way.perplexities[-1]:.4f}", flush=True)
        table = report(dense, ways, conditions, arguments.out)  # what is there is there
    print(table)


if __name__ == "__main__":
    main()
