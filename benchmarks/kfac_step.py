"""Where the time of a K-FAC step goes, beyond a plain step: factors, inverses, products, hooks.

python benchmarks/kfac_step.py [DIR]      writes DIR/kfac_step.md (default: benchmarks/results/cpu)

The networks of bench_kfac.py, batch 100, factors every step, inverses every tenth. CPU time of one thread, plain steps
and K-FAC's in turns. What a part calls of another part's is not counted in it.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_kfac import DAMPING, backward, images, norms, resnet20, vgg
from provenance import made

import mfac_kernels as mk
from mfac_kernels.fisher.kronecker import KroneckerFisher
from mfac_kernels.preconditioners._gathering import Gatherer, Record
from mfac_kernels.preconditioners.layers.base import Layer

EVERY, ROUNDS = 10, 4

PARTS = {
    "A of all layers": [(Layer, "add_inputs")],
    "B of all layers": [(Layer, "add_outputs")],
    "hooks": [(Gatherer, "on_forward"), (Record, "__call__")],
    "moving averages": [(KroneckerFisher, "update")],
    "inverses": [(KroneckerFisher, "refresh")],
    "products": [(KroneckerFisher, "ihvp")],
    "the rest of step()": [(mk.KFAC, "step")],
}


REST = "none of these"  # caches and memory that K-FAC shares with the step, and the noise of both


class Meter:
    """Adds up what functions take, without what others of them take inside."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.process_time() - begin
                self.spent[part] += whole - self._inner.pop()
                if self._inner:
                    self._inner[-1] += whole

        return call


def classes(kind: type) -> Iterator[type]:
    yield kind
    for derived in kind.__subclasses__():
        yield from classes(derived)


def measure(meter: Meter, model: Callable[[], torch.nn.Module]) -> dict[str, list[float]]:
    """Seconds of each part in each step; the rare inverses are spread over the steps."""
    torch.manual_seed(0)
    net, (x, y) = model(), images("cpu")
    own = copy.deepcopy(net)
    p = mk.KFAC(own, DAMPING, normalization="skip", skip_layers=norms(own), inv_update_steps=EVERY)
    found: dict[str, list[float]] = defaultdict(list)
    for i in range((ROUNDS + 1) * EVERY):
        begin = time.process_time()
        backward(net, x, y)
        between = time.process_time()
        meter.spent.clear()
        backward(own, x, y)
        p.step()
        end = time.process_time()
        if i < EVERY:
            continue
        inverses = meter.spent.pop("inverses", None)
        if inverses is not None:
            found["inverses"].append(inverses / EVERY)
        plain, whole = between - begin, end - between - (inverses or 0.0)
        found["plain"].append(plain)
        found["whole"].append(whole)
        found[REST].append(whole - plain - sum(meter.spent.values()))
        for part, seconds in meter.spent.items():
            found[part].append(seconds)
    p.remove_hooks()
    return found


def main(directory: str = "benchmarks/results/cpu") -> None:
    torch.set_num_threads(1)
    meter = Meter()
    for part, functions in PARTS.items():
        for kind, name in functions:
            for owner in {*classes(kind)}:
                if name in vars(owner):
                    setattr(owner, name, meter.timed(vars(owner)[name], part))
    lines = ["# Where a K-FAC step goes", "", *(f"- {name}: {value}" for name, value in made().items()), ""]
    lines += ["Milliseconds of CPU time, best (median), and the share of a plain step.", ""]
    for model in (resnet20, vgg):
        found = measure(meter, model)
        plain, middle = min(found["plain"]), statistics.median(found["plain"])
        inverses = found["inverses"]
        whole, medians = (f(found["whole"]) + f(inverses) for f in (min, statistics.median))
        lines += [f"| {model.__name__} | ms | of a plain step |", "|---|---|---|"]
        lines.append(f"| plain step | {plain * 1e3:.1f} ({middle * 1e3:.1f}) | 1 (1) |")
        for part in (*PARTS, REST):
            usual = statistics.median(found[part])
            least = usual if part == REST else min(found[part])
            share = f"{least / plain:.3f} ({usual / middle:.3f})"
            lines.append(f"| {part} | {least * 1e3:.2f} ({usual * 1e3:.2f}) | {share} |")
        share = f"{whole / plain:.2f} ({medians / middle:.2f})"
        lines += [f"| K-FAC | {whole * 1e3:.1f} ({medians * 1e3:.1f}) | {share} |", ""]
    Path(directory, "kfac_step.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
