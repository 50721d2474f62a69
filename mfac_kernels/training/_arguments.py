"""Values of the command line's arguments: parsed, or refused in one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from typing import TypeVar

__all__ = ["count", "names", "non_negative_float", "positive_float", "positive_int"]

_Number = TypeVar("_Number", int, float)


def _parser(kind: Callable[[str], _Number], fits: Callable[[_Number], bool], expected: str) -> Callable[[str], _Number]:
    def parse(text: str) -> _Number:
        try:
            value: _Number | None = kind(text)
        except ValueError:
            value = None
        if value is None or not (fits(value) and value < math.inf):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


count = _parser(int, lambda value: value >= 0, "a whole number of at least 0")
positive_int = _parser(int, lambda value: value > 0, "a whole number of at least 1")
positive_float = _parser(float, lambda value: value > 0, "a number above 0")
non_negative_float = _parser(float, lambda value: value >= 0, "a number of at least 0")


def names(kind: str, known: Collection[str]) -> Callable[[str], list[str]]:
    """NAME[,NAME] of those that are known; one that is given twice counts once."""

    def parse(text: str) -> list[str]:
        found = list(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {kind} {name!r}: choose from {', '.join(known)}")
        return found

    return parse
