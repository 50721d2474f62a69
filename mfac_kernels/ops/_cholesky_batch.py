"""Batches of blocks as the Cholesky ops take them: broadcast with their damping, which is a float64 tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfac_kernels.ops._checks import FLOATS, shape_text, type_text

Damping = float | Tensor
_EXPECTED = "float32, float64, bfloat16 or float16"


def _float64(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.to(torch.float64)


def _wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """What to compute in: float64 if either is, else float32."""
    return torch.float64 if torch.float64 in (a, b) else torch.float32


class Batch:
    """One batch as the kernels take it: blocks and damping broadcast, what to compute in, where the result goes."""

    def __init__(
        self,
        op: str,
        name: str,
        blocks: Tensor,
        damping: Damping,
        out: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = blocks.shape
        if len(shape) < 2:
            raise RuntimeError(f"{op}: {name}: expected shape (..., n, n), got {shape_text(shape)}")
        if blocks.dtype not in FLOATS:
            raise RuntimeError(f"{op}: {name}: expected {_EXPECTED}, got {type_text(blocks.dtype)}")
        self.shape = shape[:-2]  # (...)
        if not isinstance(damping, Tensor):
            self.damping = torch.full((1,), damping, dtype=torch.float64, device=blocks.device)
        elif damping.dim() == 0:
            self.damping = _float64(damping).view(1)
        else:
            if damping.shape != self.shape:
                self.shape = broadcast(op, "damping", damping.shape, self.shape)
                blocks = blocks.expand(*self.shape, *shape[-2:])
                shape = blocks.shape
                damping = damping.expand(self.shape)
            self.damping = _float64(damping).reshape(-1).contiguous()
        self.blocks = blocks
        self.out = out
        if out is not None:
            if isinstance(damping, Tensor):
                self.damping = self.damping.clone()  # it may be a part of out
            if out.shape != shape:
                wanted, got = shape_text(shape), shape_text(out.shape)
                raise RuntimeError(f"{op}: out: expected shape {wanted}, got {got}")
            if any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True)):
                raise RuntimeError(
                    f"{op}: out: expected memory of its own for each element, got strides {out.stride()}"
                )
            if dtype is not None and dtype != out.dtype:
                wanted, got = type_text(out.dtype), type_text(dtype)
                raise RuntimeError(f"{op}: dtype: expected {wanted}, as out is, got {got}")
            dtype = out.dtype
        self.dtype = dtype or _wider(blocks.dtype, torch.float32)
        if self.dtype not in FLOATS:
            raise RuntimeError(f"{op}: dtype: expected {_EXPECTED}, got {type_text(self.dtype)}")
        self.compute_dtype = _wider(self.dtype, blocks.dtype)

    def buffer(self) -> Tensor:
        """Where the kernels write: out if they can, else a new tensor."""
        if self.out is not None and self.out.dtype == self.compute_dtype:
            return self.out
        return torch.empty(self.blocks.shape, dtype=self.compute_dtype, device=self.blocks.device)

    @property
    def tensors(self) -> list[Tensor]:
        """That a graph may reach."""
        return [self.blocks, self.damping] if self.out is None else [self.blocks, self.damping, self.out]

    def codes(self, info: Tensor) -> Tensor:
        """A code per block, in the batch's shape."""
        return info if len(self.shape) == 1 else info.view(self.shape)

    def finish(self, result: Tensor) -> Tensor:
        """The result in the dtype and the place asked for."""
        if self.out is None:
            return result if result.dtype == self.dtype else result.to(self.dtype)
        return self.out if result is self.out else self.out.copy_(result)

    def relative_damping(self) -> Tensor:
        """The damping times the mean of each block's diagonal: a value per block."""
        means = self.blocks.diagonal(dim1=-2, dim2=-1).mean(-1, dtype=torch.float64)
        return self.damping * means.reshape(-1)


def prepare(
    op: str, batches: Sequence[Tensor], damping: Damping | Sequence[Damping], dtype: torch.dtype | None = None
) -> list[Batch]:
    """The batches of a list, with one damping for all or one for each."""
    if isinstance(batches, Tensor):  # one is a sequence too, of its rows
        raise RuntimeError(f"{op}: batches: expected a list of tensors, got one tensor")
    if isinstance(damping, Sequence):
        count = len(batches)
        if len(damping) != count:
            raise RuntimeError(f"{op}: damping: expected {count}, one per batch, got {len(damping)}")
        dampings = damping
    else:
        if batches and not isinstance(damping, Tensor):  # made once for all
            damping = torch.full((), damping, dtype=torch.float64, device=batches[0].device)
        dampings = [damping] * len(batches)
    return [
        Batch(op, f"batches[{i}]", blocks, shift, dtype=dtype)
        for i, (blocks, shift) in enumerate(zip(batches, dampings, strict=True))
    ]


def per_batch(values: Tensor, batches: Sequence[Batch]) -> list[Tensor]:
    """A value per block, batch after batch, as a view for each batch."""
    parts = values.split_with_sizes([batch.shape.numel() for batch in batches])
    return [part.view(batch.shape) for part, batch in zip(parts, batches, strict=True)]


def refuse_gradients(op: str, *tensors: Tensor) -> None:
    """What has no derivative says so, rather than cut the graph in silence."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(f"{op}: not differentiable: expected tensors that require no gradient, or torch.no_grad()")


def raise_if_failed(
    op: str, info: Tensor, damping: Damping | None, failure: str = "the leading minor of order {} is not positive"
) -> None:
    """torch.linalg.LinAlgError for the first block (of info (...)) that has failed. Waits for the device."""
    if info.numel() == 1 and info.item() == 0:
        return
    failed = info.nonzero()
    if failed.size(0) == 0:
        return
    index = tuple(failed[0].tolist())
    code = int(info[index])
    where = f"block {index}" if index else "the block"
    what = failure.format(code) if code > 0 else "not finite"
    if damping is not None:
        what += f", with damping {float(torch.as_tensor(damping).expand(info.shape)[index]):g}"
    raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
        f"{op}: {where}: {what}; blocks that failed: {len(failed)} of {info.numel()}"
    )


def broadcast(op: str, name: str, shape: torch.Size, batch: torch.Size) -> torch.Size:
    try:
        return torch.Size(torch.broadcast_shapes(shape, batch))  # type: ignore[no-untyped-call]
    except RuntimeError:
        message = f"{op}: {name}: expected a batch that broadcasts with {shape_text(batch)}, got {shape_text(shape)}"
        raise RuntimeError(message) from None
