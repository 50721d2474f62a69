"""Masks of a pruned model: they hold while it is trained, and go to files and to ``torch.nn.utils.prune``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

__all__ = ["Masks"]


class Masks(Mapping[str, Tensor]):
    """Parameter name -> bool mask of its shape, true for weights that are kept."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = getattr(mask, "dtype", type(mask).__name__)
                raise TypeError(f"masks[{name!r}]: expected a bool tensor, got {got}")
        self._masks = dict(masks)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def sparsity(self) -> float:
        """The share of weights that are dropped, of those that have a mask."""
        total = sum(mask.numel() for mask in self.values())
        return sum(int((~mask).sum()) for mask in self.values()) / max(1, total)

    def sparsities(self) -> dict[str, float]:
        """The share of each parameter that is dropped."""
        return {name: int((~mask).sum()) / max(1, mask.numel()) for name, mask in self.items()}

    def apply(self, model: nn.Module) -> None:
        """Set dropped weights to zero.

        Raises:
            ValueError: a parameter that the model has not, or of another shape; nothing changes.
        """
        parameters = self._parameters(model)
        with torch.no_grad():
            for name, p in parameters.items():
                p.masked_fill_(~self[name].to(p.device), 0)

    def hold(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Held:
        """Keep dropped weights at zero while the optimizer steps, until the returned handle is removed.

        Their gradients are zero, and after every step so are they, whatever momentum, weight decay or a preconditioner
        makes of a zero gradient. Usable in a ``with`` statement.

        Raises:
            ValueError: as :meth:`apply`.
        """
        self.apply(model)
        parameters = self._parameters(model)
        dropped = {name: ~self[name].to(p.device) for name, p in parameters.items()}
        handles: list[Any] = [
            p.register_hook(lambda g, gone=dropped[name]: g.masked_fill(gone, 0))  # type: ignore[no-untyped-call]
            for name, p in parameters.items()
            if p.requires_grad
        ]

        def zero(*_: object) -> None:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.masked_fill_(dropped[name], 0)

        handles.append(optimizer.register_step_post_hook(zero))
        return Held(handles)

    @classmethod
    def of(cls, model: nn.Module) -> Masks:
        """The masks that ``torch.nn.utils.prune`` has put on a model."""
        masks = {}
        for name, buffer in model.named_buffers():
            if name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in dict(model.named_parameters()):
                masks[name.removesuffix("_mask")] = buffer.detach().to(torch.bool)
        return cls(masks)

    def to_torch(self, model: nn.Module) -> None:
        """Put the masks on a model as the parametrisation of ``torch.nn.utils.prune``; its ``remove`` ends it.

        Raises:
            ValueError: as :meth:`apply`.
        """
        for name, p in self._parameters(model).items():
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            torch_prune.custom_from_mask(module, attribute, self[name].to(p.device))  # type: ignore[no-untyped-call]

    def save(self, path: str | os.PathLike[str]) -> None:
        """To a file: of safetensors if its name ends so (needs the package), else of ``torch.save``."""
        tensors = {name: mask.detach().cpu().contiguous() for name, mask in self.items()}
        if Path(path).suffix == ".safetensors":
            _safetensors().save_file(tensors, str(path))
        else:
            torch.save(tensors, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """From a file that :meth:`save` has written; nothing in it is run.

        Raises:
            OSError, TypeError, ValueError: no such file, or one that holds something else.
        """
        if Path(path).suffix == ".safetensors":
            return cls(_safetensors().load_file(str(path)))
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected a dict of masks, got {type(content).__name__}")
        return cls(content)

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        every = dict(model.named_parameters())
        for name, mask in self.items():
            if name not in every:
                raise ValueError(f"masks: expected parameters of the model, got {name!r}")
            if every[name].shape != mask.shape:
                expected, got = tuple(every[name].shape), tuple(mask.shape)
                raise ValueError(f"masks[{name!r}]: expected shape {expected}, got {got}")
        return {name: every[name] for name in self}


class Held:
    """Masks that hold; :meth:`remove` lets them go."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("a file of safetensors needs the package: pip install safetensors") from error
    return safetensors.torch
