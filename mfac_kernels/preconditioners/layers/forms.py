"""The form of a factor, by patterns of the names of modules."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from mfac_kernels.fisher._checks import positive_int

Form = Literal["diagonal"] | int | None
"""The size of the blocks that are kept: ``"diagonal"`` is 1; None: dense."""


def blocks_by_name(argument: str, forms: Mapping[str, Form] | None, model: nn.Module) -> dict[str, int | None]:
    """Block sizes in place of forms. TypeError or ValueError, with the argument's name: not forms of modules."""
    if forms is None:
        return {}
    if not isinstance(forms, Mapping):
        raise TypeError(f'{argument}: expected forms by name, as {{"head": "diagonal"}}, got {forms!r}')
    names = [name for name, _ in model.named_modules()]
    blocks: dict[str, int | None] = {}
    for pattern, form in forms.items():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{argument}: expected patterns of the names of modules, got {pattern!r}, which is of none"
            )
        if isinstance(form, str) and form != "diagonal":
            raise ValueError(f'{argument}[{pattern!r}]: expected "diagonal", a block size or None, got {form!r}')
        if form is not None:
            form = 1 if form == "diagonal" else positive_int(f"{argument}[{pattern!r}]", form)
        blocks[pattern] = form
    return blocks


def block_of(names: Sequence[str], blocks: Mapping[str, int | None], default: int | None) -> int | None:
    """That of the first pattern which one of the names fits."""
    fit = (block for pattern, block in blocks.items() if any(fnmatch.fnmatchcase(name, pattern) for name in names))
    return next(fit, default)
