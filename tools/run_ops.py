"""Runs every op of the library on the inputs of op_samples.py.

python tools/run_ops.py --fake            shapes alone, on fake CUDA tensors: needs no GPU
python tools/run_ops.py --device cuda     for real, as under compute-sanitizer; ops without a kernel there are named
python tools/run_ops.py --device cpu --save results.pt       and with another build:
python tools/run_ops.py --device cpu --compare results.pt    whether it gives the same bits
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext

import op_samples
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves


def describe(tensors: list[torch.Tensor]) -> str:
    return ", ".join(f"{str(t.dtype)[6:]}{tuple(t.shape)}" for t in tensors) or "nothing"


def same_bits(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(got) == len(wanted) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()
        for a, b in zip(map(viewable, got), map(viewable, wanted), strict=True)
    )


def viewable(tensor: torch.Tensor) -> torch.Tensor:
    """numpy knows no bfloat16."""
    return tensor.contiguous().view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fake", action="store_true", help="on fake CUDA tensors")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--save", metavar="FILE", help="write the results to a file")
    parser.add_argument("--compare", metavar="FILE", help="fail unless the results are those of a file, bit for bit")
    options = parser.parse_args()
    kept: dict[str, list[torch.Tensor]] = {}
    wanted = torch.load(options.compare) if options.compare else {}

    ran, skipped = set(), set()
    failed = [f"{op}: no inputs in tools/op_samples.py" for op in op_samples.missing()]
    for op, index in op_samples.cases():
        if not options.fake and not op_samples.has_kernel(op, options.device):
            skipped.add(op)
            continue
        try:
            with FakeTensorMode() if options.fake else nullcontext():
                arguments = op_samples.arguments(op, index, options.device)
                result = op_samples.results(op, arguments)
            if options.device == "cuda" and not options.fake:
                torch.cuda.synchronize()
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            if any(t.device.type != options.device for t in tensors):
                raise RuntimeError(f"expected results on {options.device}")
            kept[f"{op} {index}"] = [t.cpu() for t in tensors] if options.save or options.compare else []
            if options.compare and not same_bits(kept[f"{op} {index}"], wanted[f"{op} {index}"]):
                raise RuntimeError(f"expected the bits of {options.compare}")
        except Exception as error:
            failed.append(f"{op} {index}: {type(error).__name__}: {error}")
            continue
        ran.add(op)
        print(f"{op} {index}: {describe(tensors)}")
    print(f"{len(ran)} of {len(op_samples.all_ops())} ops ran on {'fake ' if options.fake else ''}{options.device}")
    if skipped:
        print(f"without a kernel for {options.device}: {', '.join(sorted(skipped))}")
    if failed:
        sys.exit("\n".join(["failed:", *failed]))
    if options.save:
        torch.save(kept, options.save)


if __name__ == "__main__":
    main()
