"""A step of K-FAC against a plain step of SGD and against two libraries, on one network at the same frequencies.

    factors and products every step, inverses every step or every tenth: ours, curvlinops 3.0.1, asdfghjkl 0.1a4

Each contender's figure is whole steps; what it costs beyond a plain step is that less SGD's. Libraries that are not
installed are left out.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels.training.models import ResNet20, vgg11

DAMPING = 1e-2


def resnet20() -> nn.Module:
    return ResNet20(3, 10)


def vgg() -> nn.Module:
    return vgg11(3, 10, 16)


def images(device: str) -> tuple[Tensor, Tensor]:
    return torch.randn(100, 3, 32, 32, device=device), torch.randint(0, 10, (100,), device=device)


def backward(net: nn.Module, x: Tensor, y: Tensor) -> None:
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()


def with_kfac(net: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Callable[[], None]:
    own = copy.deepcopy(net)
    p = mk.KFAC(own, DAMPING, normalization="skip", skip_layers=norms(own), **options)

    def step() -> None:
        backward(own, x, y)
        p.step()

    return step


def norms(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)]


def with_curvlinops(net: nn.Module, x: Tensor, y: Tensor, every: int) -> Callable[[], None]:
    curvlinops = pytest.importorskip("curvlinops")
    own = copy.deepcopy(net)
    layers = [m for m in own.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    params = [p for layer in layers for p in layer.parameters(recurse=False)]
    steps, inverse = itertools.count(), None

    def step() -> None:
        nonlocal inverse
        backward(own, x, y)
        fisher = curvlinops.KFACLinearOperator(
            own,
            nn.CrossEntropyLoss(),
            params,
            [(x, y)],
            fisher_type="empirical",
            separate_weight_and_bias=False,
            check_deterministic=False,
            num_data=len(x),
            num_per_example_loss_terms=1,
        )
        fisher.compute_kronecker_factors()
        if next(steps) % every == 0:
            inverse = curvlinops.KFACInverseLinearOperator(fisher, damping=DAMPING, use_heuristic_damping=True)
        inverse @ [p.grad for p in params]

    return step


def with_asdfghjkl(net: nn.Module, x: Tensor, y: Tensor, every: int) -> Callable[[], None]:
    asdl = pytest.importorskip("asdl")
    own = copy.deepcopy(net)
    config = asdl.PreconditioningConfig(
        data_size=len(x),
        damping=DAMPING,
        curvature_upd_interval=1,
        preconditioner_upd_interval=every,
        ignore_modules=[nn.BatchNorm2d],
    )
    maker = asdl.KfacGradientMaker(own, config)

    def step() -> None:
        own.zero_grad()
        output = maker.setup_model_call(own, x)
        maker.setup_loss_call(F.cross_entropy, output, y)
        maker.forward_and_backward()

    return step


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("model", [resnet20, vgg], ids=["ResNet-20", "VGG-11, a quarter wide"])
def test_whole_step(race, device, model, every):
    """As many steps as there are from one inversion to the next."""
    torch.manual_seed(0)
    net, (x, y) = model().to(device), images(device)
    steps: dict[str, Callable[[], None]] = {"SGD": lambda: backward(net, x, y)}
    for name, make in (("curvlinops", with_curvlinops), ("asdfghjkl", with_asdfghjkl)):
        with suppress(pytest.skip.Exception):
            steps[name] = make(net, x, y, every)
    ours = repeated(with_kfac(net, x, y, inv_update_steps=every), every)
    others = {name: repeated(step, every) for name, step in steps.items()}
    race("K-FAC, factors every step", f"{model.__name__}, batch 100, inverses every {every}", ours, others)


def repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            step()

    return run


@pytest.mark.parametrize(("spatial", "group_size"), [("full", None), ("full", 32), ("sua", None), ("sua", 32)])
def test_step_with_rare_inversions(race, device, spatial, group_size):
    """Inverses every 50 steps, as in Laurent et al. 2018: the share of the rest."""
    torch.manual_seed(0)
    net, (x, y) = vgg().to(device), images(device)
    step = with_kfac(net, x, y, inv_update_steps=50, spatial=spatial, group_size=group_size)
    step()
    groups = f", groups of {group_size}" if group_size else ""
    race("K-FAC step, inverses every 50", f"vgg, {spatial}{groups}", step, {"SGD": lambda: backward(net, x, y)})


@pytest.mark.parametrize(("spatial", "group_size"), [("full", None), ("full", 32), ("sua", None), ("sua", 32)])
def test_inversion_at_real_size(race, device, spatial, group_size):
    """VGG-11 whole: factors of up to 4608, 512 or 32 rows. The ratio is a plain step over the inversion."""
    torch.manual_seed(0)
    net, (x, y) = vgg11(3, 10).to(device), images(device)
    p = mk.KFAC(net, DAMPING, normalization="skip", skip_layers=norms(net), spatial=spatial, group_size=group_size)
    backward(net, x, y)
    p.step()
    groups = f", groups of {group_size}" if group_size else ""
    race("K-FAC inversion", f"VGG-11, {spatial}{groups}", p.fisher.refresh, {"SGD step": lambda: backward(net, x, y)})
    p.remove_hooks()
