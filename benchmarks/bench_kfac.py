"""A step of K-FAC against a plain step of SGD and against two libraries, on one network at the same frequencies.

    factors + inverses + products, every step        ours, curvlinops 3.0.1, asdfghjkl 0.1a4 (if installed)

The libraries' figure is the whole call less a plain forward and backward pass; ours is measured the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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


def with_curvlinops(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    curvlinops = pytest.importorskip("curvlinops")
    own = copy.deepcopy(net)
    layers = [m for m in own.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    params = [p for layer in layers for p in layer.parameters(recurse=False)]

    def step() -> None:
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
        inverse = curvlinops.KFACInverseLinearOperator(fisher, damping=DAMPING, use_heuristic_damping=True)
        inverse @ [p.grad for p in params]

    return step


def with_asdfghjkl(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    asdl = pytest.importorskip("asdl")
    own = copy.deepcopy(net)
    config = asdl.PreconditioningConfig(data_size=len(x), damping=DAMPING, ignore_modules=[nn.BatchNorm2d])
    maker = asdl.KfacGradientMaker(own, config)

    def step() -> None:
        own.zero_grad()
        output = maker.setup_model_call(own, x)
        maker.setup_loss_call(F.cross_entropy, output, y)
        maker.forward_and_backward()

    return step


@pytest.mark.parametrize("model", [resnet20, vgg], ids=["ResNet-20", "VGG-11, a quarter wide"])
def test_whole_step(race, model):
    """factor + inverse + product on every step."""
    torch.manual_seed(0)
    net = model()
    x, y = torch.randn(100, 3, 32, 32), torch.randint(0, 10, (100,))
    others: dict[str, Callable[[], object]] = {"SGD": lambda: backward(net, x, y)}
    for name, make in (("curvlinops", with_curvlinops), ("asdfghjkl", with_asdfghjkl)):
        try:
            others[name] = make(net, x, y)
        except pytest.skip.Exception:
            continue
    race("K-FAC step, all of it", f"{model.__name__}, batch 100", with_kfac(net, x, y), others)


@pytest.mark.parametrize(("spatial", "group_size"), [("full", None), ("full", 32), ("sua", None), ("sua", 32)])
def test_step_with_rare_inversions(race, spatial, group_size):
    """Inverses every 50 steps, as in Laurent et al. 2018: the share of the rest."""
    torch.manual_seed(0)
    net = vgg()
    x, y = torch.randn(100, 3, 32, 32), torch.randint(0, 10, (100,))
    step = with_kfac(net, x, y, inv_update_steps=50, spatial=spatial, group_size=group_size)
    step()
    groups = f", groups of {group_size}" if group_size else ""
    race("K-FAC step, inverses every 50", f"vgg, {spatial}{groups}", step, {"SGD": lambda: backward(net, x, y)})


@pytest.mark.parametrize(("spatial", "group_size"), [("full", None), ("full", 32), ("sua", None), ("sua", 32)])
def test_inversion_at_real_size(race, spatial, group_size):
    """VGG-11 whole: factors of up to 4608, 512 or 32 rows. The ratio is a plain step over the inversion."""
    torch.manual_seed(0)
    net = vgg11(3, 10)
    x, y = torch.randn(100, 3, 32, 32), torch.randint(0, 10, (100,))
    p = mk.KFAC(net, DAMPING, normalization="skip", skip_layers=norms(net), spatial=spatial, group_size=group_size)
    backward(net, x, y)
    p.step()
    groups = f", groups of {group_size}" if group_size else ""
    race("K-FAC inversion", f"VGG-11, {spatial}{groups}", p.fisher.refresh, {"SGD step": lambda: backward(net, x, y)})
    p.remove_hooks()
