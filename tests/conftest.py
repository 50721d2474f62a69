"""What the tests share: devices, instruction sets, and makers of gradients.

MFAC_KERNELS_TEST_DEVICES="cpu,cuda" chooses the devices; the default is the CPU, and CUDA where torch finds a GPU
and the package was built for it. Without the CPU among them, tests that do not take the fixture `device` are left out.

MFAC_KERNELS_EXAMPLES=500 draws so many examples for each property, new ones every time; the default is 25. With CI set
they are the same every time.

Without hypothesis the tests that need it are skipped, each by name; plain cases of the same files still run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

try:
    import hypothesis
except ModuleNotFoundError:
    import no_hypothesis as hypothesis

import mfac_kernels as mk

# Before they are imported: what they assert is then shown in full, as in the tests themselves.
pytest.register_assert_rewrite(*(path.stem for path in Path(__file__).with_name("support").glob("*.py")))

hypothesis.settings.register_profile(
    "local",
    deadline=None,
    max_examples=int(os.environ.get("MFAC_KERNELS_EXAMPLES", "25")),
    # instruction_set holds for every example of a test alike
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("local"), derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def _devices() -> list[str]:
    chosen = os.environ.get("MFAC_KERNELS_TEST_DEVICES")
    if chosen:
        return [name.strip() for name in chosen.split(",")]
    has_cuda = torch.cuda.is_available() and mk.build_info()["cuda_built"] is not None
    return ["cpu", "cuda"] if has_cuda else ["cpu"]


def _instruction_sets() -> list[str]:
    """Those that this CPU has: asking for one that it lacks gives the best it has. CUDA kernels know of none."""
    if mk.build_info()["simt"] or "cpu" not in _devices():
        return [mk.cpu_capability()]
    before = mk.cpu_capability()
    names = [name for name in ("default", "avx2", "avx512") if mk.cpu_capability(name) == name]
    mk.cpu_capability(before)
    return names


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("not_on_cuda") and item.callspec.params.get("device") == "cuda":
            item.add_marker(pytest.mark.skip(reason="CUDA refuses this case"))
    if "cpu" in _devices():
        return
    chosen = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """A kernel that faults leaves its process without a GPU: the process ends, and xdist goes on in another."""
    if call.excinfo is None or "PYTEST_XDIST_WORKER" not in os.environ or "cuda" not in _devices():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"{item.nodeid}: the GPU is lost\n{call.excinfo.getrepr(style='short')}", file=sys.stderr, flush=True)
        os._exit(1)


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=_instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = mk.cpu_capability()
    yield mk.cpu_capability(request.param)
    mk.cpu_capability(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def same_bits(threads: Callable[[int], None]) -> Callable[[Callable[[], list[Tensor]]], None]:
    """same_bits(results): what results() returns does not depend on the number of threads, nor on the run."""

    def check(results: Callable[[], list[Tensor]]) -> None:
        threads(1)
        once = results()
        for count in (1, 2, 3):
            threads(count)
            for got, want in zip(results(), once, strict=True):
                assert torch.equal(got, want), f"{count} threads"

    return check


GradientMaker = Callable[..., Tensor]


@pytest.fixture(scope="session")
def gradients() -> GradientMaker:
    """gradients(m, d, ...) -> (m, d) on the CPU: rows of about the given norm, each correlated by rho with the last."""

    def make(
        m: int,
        d: int,
        *,
        rho: float = 0.0,
        norm: float = 10.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        work = torch.float64 if dtype == torch.float64 else torch.float32
        g = torch.randn(m, d, generator=generator, dtype=work).mul_(norm / d**0.5)
        if rho:
            for t in range(1, m):
                g[t].mul_((1 - rho**2) ** 0.5).add_(g[t - 1], alpha=rho)
        return g.to(dtype)

    return make
