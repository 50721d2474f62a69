"""Stands in for hypothesis where it cannot be installed: property tests are skipped, the other tests of a file run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest


class _Anything:
    """Strategies are built when a test file is imported, and never drawn from."""

    def __getattr__(self, name: str) -> _Anything:
        return self

    def __call__(self, *args: object, **kwargs: object) -> _Anything:
        return self


def given(*args: object, **kwargs: object) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return pytest.mark.skip(reason="hypothesis is not installed")


def example(*args: object, **kwargs: object) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda test: test


class settings:
    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, test: Callable[..., Any]) -> Callable[..., Any]:
        return test

    register_profile = get_profile = load_profile = staticmethod(lambda *args, **kwargs: None)


HealthCheck = strategies = assume = note = target = reproduce_failure = _Anything()

sys.modules["hypothesis"] = sys.modules[__name__]
sys.modules["hypothesis.strategies"] = strategies
