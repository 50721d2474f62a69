"""Gradients of a model, one a row, of any loss: what a Fisher for pruning is made of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mfac_kernels.fisher import _checks
from mfac_kernels.fisher.static import StaticFisher

__all__ = ["Gradients", "collect"]

Loss = Callable[[nn.Module, Any], Tensor]
Each = Literal["batch", "sample", "loop"]

_CHUNK = 32  # samples whose gradients are computed together


@dataclass(frozen=True)
class Gradients:
    """Gradients of the parameters ``names``, flattened and concatenated in that order.

    Attributes:
        rows: (m, d), the gradients used; of the entries that are kept alone, if there were masks.
        names: of the parameters.
        skipped: gradients that were not finite and are not among the rows.
        memory: bytes that a page may take where rows stream to another device, or None.
    """

    rows: Tensor
    names: tuple[str, ...]
    skipped: int
    memory: int | None

    def fisher(
        self, damping: float = 1e-5, *, block_size: int | None = None, device: torch.device | str | None = None
    ) -> StaticFisher:
        """F = damping I + (1/m) sum g g^T over the m rows, and no other number."""
        page = None
        if self.memory is not None:
            page = max(1, self.memory // max(1, self.rows[:, :1].nbytes))
        return StaticFisher(self.rows, damping, block_size=block_size, device=device, page_size=page)


def collect(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    count: int,
    *,
    each: Each = "batch",
    names: Sequence[str] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    memory: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Gradients:
    """Up to ``count`` gradients of ``loss`` at the model's present weights; neither ``.grad`` nor the mode changes.

    Args:
        loss: loss(model, batch) -> scalar.
        batches: what ``loss`` takes; read until there are ``count`` finite gradients, or to the end.
        each: what a gradient is of. ``"batch"``: a batch. ``"sample"``: a sample; batches are nested tuples, lists and
            dicts of tensors whose first dimension counts the samples, and ``loss`` sees one at a time, through
            ``torch.func``. ``"loop"``: the same by a loop, for what ``torch.func`` cannot transform.
        names: of the parameters; by default all that require a gradient.
        masks: name -> mask of what is kept: the rows have these entries and no others.
        dtype: of the rows; bfloat16 halves the memory.
        memory: bytes that the rows may take. More is an error, unless ``path`` is given: then the bound is that of a
            page.
        path: a folder for the rows, in a file that is mapped into memory. A collection that was interrupted goes on
            from there, if the weights are the same and ``batches`` begins again as it did.
        progress: show a bar (needs tqdm).

    Raises:
        TypeError, ValueError: an argument outside these ranges; rows above ``memory``; no finite gradient; a folder
            with gradients of other weights.
    """
    _checks.positive_int("count", count)
    _checks.floating("dtype", dtype)
    if each not in ("batch", "sample", "loop"):
        raise ValueError(f"each: expected 'batch', 'sample' or 'loop', got {each!r}")
    parameters = _parameters(model, names)
    if each != "batch":
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(f"each: expected 'batch' where batch statistics are used ({name}), got {each!r}")
    kept = None
    if masks is not None:
        unit = [masks[n].to(p.device) if n in masks else torch.ones_like(p) for n, p in parameters.items()]
        kept = torch.cat([m.reshape(-1).to(torch.bool) for m in unit]).nonzero()[:, 0]
    dim = sum(p.numel() for p in parameters.values()) if kept is None else len(kept)
    size = count * dim * dtype.itemsize
    if memory is not None and path is None and size > _checks.positive_int("memory", memory):
        raise ValueError(
            f"memory: expected at least {size} bytes for {count} gradients of {dim} {dtype} elements, got {memory} "
            f"(enough for {memory // (dim * dtype.itemsize)}); take fewer, another dtype or a path"
        )
    rows = _Rows(count, dim, dtype, path, _fingerprint(parameters, kept, each) if path is not None else "")
    chunk = _CHUNK if memory is None else max(1, min(_CHUNK, memory // (4 * dim)))
    source = _gradients(model, loss, parameters, islice(batches, rows.batches, None), each, chunk)
    with _bar(count, rows.count, progress) as update:
        while rows.count < count and (batch := next(source, None)) is not None:
            for g in batch:
                rows.add(g if kept is None else g[kept])
                update(rows.count)
                if rows.count == count:
                    break
            rows.end_batch()
    if not rows.count:
        raise ValueError(f"batches: expected a finite gradient, got none ({rows.skipped} were not finite)")
    return Gradients(rows.rows[: rows.count], tuple(parameters), rows.skipped, memory)


def _parameters(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    every = dict(model.named_parameters())
    if names is None:
        chosen = {n: p for n, p in every.items() if p.requires_grad}
    else:
        unknown = [n for n in names if n not in every]
        if unknown:
            raise ValueError(f"names: expected parameters of the model, got {unknown[0]!r}")
        chosen = {n: every[n] for n in names}
    if not chosen:
        raise ValueError("names: expected at least one parameter that requires a gradient, got none")
    return chosen


def _gradients(
    model: nn.Module, loss: Loss, parameters: dict[str, nn.Parameter], batches: Iterator[Any], each: Each, chunk: int
) -> Iterator[Iterator[Tensor]]:
    """The gradients (d,) of each batch."""
    if each != "sample":

        def one(batch: Any) -> Tensor:
            value = loss(model, batch)
            if not isinstance(value, Tensor) or value.dim() != 0:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"loss: expected a scalar tensor, got {got}")
            grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
            return torch.cat([g.reshape(-1) for g in grads])

        for batch in batches:
            samples = _samples(batch) if each == "loop" else [batch]
            with torch.enable_grad():
                yield (one(sample) for sample in samples)
        return

    inner = {f"model.{name}": p.detach() for name, p in parameters.items()}
    whole = _Whole(model, loss)

    def of_sample(values: dict[str, Tensor], sample: Any) -> Tensor:
        batch = _map(lambda t: t[None], sample)
        result: Tensor = torch.func.functional_call(whole, values, (batch,))
        return result

    several = torch.func.vmap(torch.func.grad(of_sample), in_dims=(None, 0), randomness="different")

    def rows(batch: Any) -> Iterator[Tensor]:
        for start in range(0, _length(batch), chunk):
            part = _map(lambda t: t[start : start + chunk], batch)  # noqa: B023  (used at once)
            grads = several(inner, part)
            for i in range(_length(part)):
                yield torch.cat([grads[name][i].reshape(-1) for name in inner])

    for batch in batches:
        yield rows(batch)


class _Whole(nn.Module):
    """Model and loss as one module, for ``functional_call``: the closure sees the model itself."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def _map(f: Callable[[Tensor], Tensor], batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return f(batch)
    if isinstance(batch, Mapping):
        return {key: _map(f, value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_map(f, value) for value in batch]
    raise TypeError(f"batches: expected tensors in tuples, lists and dicts, got {type(batch).__name__}")


def _length(batch: Any) -> int:
    lengths: list[int] = []
    _map(lambda t: lengths.append(len(t)) or t, batch)  # type: ignore[func-returns-value]
    if not lengths or len(set(lengths)) > 1:
        raise ValueError(f"batches: expected tensors of one first dimension, got {sorted(set(lengths))}")
    return lengths[0]


def _samples(batch: Any) -> Iterator[Any]:
    for i in range(_length(batch)):
        yield _map(lambda t: t[i : i + 1], batch)  # noqa: B023  (used before the next)


class _Rows:
    """Room for the gradients, in memory or in a mapped file with a record of how far it is filled."""

    def __init__(
        self, count: int, dim: int, dtype: torch.dtype, path: str | os.PathLike[str] | None, fingerprint: str
    ) -> None:
        self.count = self.skipped = self.batches = 0
        self._record: Path | None = None
        if path is None:
            self.rows = torch.empty(count, dim, dtype=dtype)
            return
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self._record = folder / "gradients.json"
        self._kind = {"count": count, "dim": dim, "dtype": str(dtype), "fingerprint": fingerprint}
        if self._record.exists():
            record = json.loads(self._record.read_text())
            if record["kind"] != self._kind:
                raise ValueError(f"path: expected gradients of {self._kind}, got {record['kind']} in {folder}")
            self.count, self.skipped, self.batches = record["rows"], record["skipped"], record["batches"]
        flat = torch.from_file(str(folder / "gradients.bin"), shared=True, size=count * dim, dtype=dtype)
        self.rows = flat.view(count, dim)

    def add(self, g: Tensor) -> None:
        row = g.detach().to(self.rows.dtype)
        if not bool(row.isfinite().all()):
            self.skipped += 1
            return
        self.rows[self.count] = row
        self.count += 1

    def end_batch(self) -> None:
        self.batches += 1
        if self._record is None:
            return
        content = {"kind": self._kind, "rows": self.count, "skipped": self.skipped, "batches": self.batches}
        partial = self._record.with_suffix(".partial")
        partial.write_text(json.dumps(content) + "\n")
        partial.replace(self._record)  # whole or not at all


def _fingerprint(parameters: dict[str, nn.Parameter], kept: Tensor | None, each: Each) -> str:
    digest = hashlib.sha256(each.encode())
    for name, p in parameters.items():
        digest.update(name.encode())
        digest.update(_bytes(p.detach()))
    if kept is not None:
        digest.update(_bytes(kept))
    return digest.hexdigest()


def _bytes(t: Tensor) -> memoryview:
    return t.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


class _bar:
    """A bar of tqdm, if wanted."""

    def __init__(self, total: int, start: int, enabled: bool) -> None:
        self._bar: Any = None
        if enabled:
            try:
                from tqdm import tqdm
            except ImportError as error:
                raise ImportError('progress needs tqdm: pip install "mfac_kernels[demo]"') from error
            self._bar = tqdm(total=total, initial=start, unit="gradient", leave=False, dynamic_ncols=True)

    def __enter__(self) -> Callable[[int], None]:
        return self._to

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _to(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count - self._bar.n)
