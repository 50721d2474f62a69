"""What K-FAC and its relatives refuse, or say, of the layers that they found."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from mfac_kernels.fisher._checks import one_of
from mfac_kernels.fisher._pairs import APPROXIMATE
from mfac_kernels.preconditioners._gathering import is_gathered
from mfac_kernels.preconditioners.layers.base import Layer
from mfac_kernels.preconditioners.layers.find import ASKED


def check_layers(owner: str, layers: Sequence[Layer], skipped: Mapping[str, str]) -> None:
    """ValueError: none, or on several devices. Warns of modules left alone unasked, and of layers taken twice."""
    if not layers:
        raise ValueError(f"model: expected layers to precondition, found none; left alone: {skipped}")
    device = layers[0].weight.device
    other = next((layer for layer in layers if layer.weight.device != device), None)
    if other is not None:
        raise ValueError(f"model: expected layers on one device, {device}, got {other.title} on {other.weight.device}")
    unasked = {n: why for n, why in skipped.items() if why not in ASKED}
    if unasked:
        listed = "; ".join(f"{name}: {why}" for name, why in unasked.items())
        warnings.warn(f"{owner} leaves the gradients of these modules as they are: {listed}", stacklevel=4)
    twice = next((layer.title for layer in layers if is_gathered(layer)), None)
    if twice is not None:
        warnings.warn(
            f"{owner}: another one is made for {twice}: both precondition its gradient unless remove_hooks() of the "
            "first is called and its step() no longer",
            stacklevel=4,
        )


def check_approximate(approximate: str, damping_style: str, layers: Sequence[Layer]) -> None:
    """ValueError: no such way, or one that a layer or the style of damping has not."""
    one_of("approximate", approximate, APPROXIMATE)
    if approximate == "deflation" and damping_style == "exact":
        raise ValueError(
            'damping_style: expected "factored" with approximate "deflation", got "exact": two products and damping I '
            "have no joint eigenvalues"
        )
    tied = next((layer.title for layer in layers if layer.shape.two_uses), None)
    if approximate != "kfac" and tied is not None:
        raise ValueError(
            f'approximate: expected "kfac" with a weight that is used both ways, {tied}, or skip_layers with its name, '
            f'got "{approximate}"'
        )
