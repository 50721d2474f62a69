"""Curvature objects: made from right or wrong arguments, then asked and changed at random."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mfac_kernels as mk
from fuzzing.draw import Draw, Work
from fuzzing.outcome import REFUSED, Stateful, attempt, expect_finite
from fuzzing.surface import surface
from mfac_kernels.fisher.jacobian import Call
from mfac_kernels.preconditioners.layers.maps import LinearMap

Action = Callable[[], Any]


def several(draw: Draw, state: Stateful, actions: dict[str, Action], count: int = 12) -> None:
    """Some of the actions, one after another. One that is refused changes nothing."""
    for _ in range(draw.int(1, count)):
        attempt(actions[draw.pick(actions)], state)


def reload(draw: Draw, state: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
    """Loads ``state``, perhaps with a flaw."""
    load(flawed_state(draw, copy.deepcopy(state)))


def flawed_state(draw: Draw, state: Any) -> Any:
    """A nested state with something missing, or changed, half of the time."""
    if draw.bool():
        return state
    draw.tame = False
    place = state
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return state
        key = draw.pick(keys)
        inner = place[key]
        if isinstance(inner, dict | list) and inner and draw.chance(3) is False:
            place = inner
            continue
        if isinstance(place, list):
            place[key] = draw.changed(inner)
        elif draw.chance(3):
            del place[key]
        else:
            place[key] = draw.changed(inner)
        return state


def vector(draw: Draw, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Perhaps a wrong one."""
    x = draw.tensor(*shape, dtype=draw.dtype() if draw.chance(3) else dtype)
    if draw.chance(6):
        draw.tame = False
        x = draw.changed(x)
    return x


def index(draw: Draw, dim: int) -> Tensor:
    """Indices (k,), perhaps wrong ones."""
    values = torch.tensor([draw.int(-dim, dim - 1) for _ in range(draw.int(0, 5))], dtype=torch.int64)
    return draw.changed(values) if draw.chance(6) else values


@surface("FisherWindow")
def _(draw: Draw) -> None:
    dim, ngrads = draw.int(1, 20), draw.int(1, 6)
    options = {"dim": Work(dim), "ngrads": Work(ngrads), "damping": draw.positive(), "dtype": draw.dtype()}
    options["normalize"] = draw.pick(("ngrads", "seen"))
    options = draw.flawed(options)
    made = attempt(lambda: mk.FisherWindow(**options))
    if isinstance(made, mk.FisherWindow):
        window = made
        dim = window.dim
        if dim > 1000 or window.ngrads > 1000:
            return

        def damp() -> None:
            window.damping = draw.pick((0.1, 1.0, 0.0, -1.0, float("nan"), float("inf"), 1e-300, 1e30))

        several(
            draw,
            Stateful(window.state_dict),
            {
                "update": lambda: window.update(vector(draw, dim)),
                "update_ihvp": lambda: window.update_ihvp(vector(draw, dim)),
                "try": lambda: window.try_update_ihvp(vector(draw, dim)),
                "ihvp": lambda: window.ihvp(vector(draw, *draw.pick(((dim,), (3, dim), (0, dim))))),
                "diagonal": lambda: window.diagonal(),
                "element": lambda: window.element(draw.int(-dim - 1, dim), draw.int(-dim, dim - 1)),
                "damping": damp,
                "reset": lambda: window.reset(),
                "reload": lambda: reload(draw, window.state_dict(), window.load_state_dict),
            },
        )
        if draw.tame:
            expect_finite("FisherWindow.window", window.window)


@surface("StaticFisher")
def _(draw: Draw) -> None:
    m, d = draw.int(0, 6), draw.int(1, 20)
    options: dict[str, Any] = {
        "grads": draw.tensor(m, d, dtype=draw.dtype(), strided=False),
        "damping": draw.positive(),
    }
    options["ngrads"] = draw.pick((None, 3))
    options["block_size"] = draw.pick((None, 1, 3, 8, 50))
    options["page_size"] = draw.pick((None, 1, 7))
    options["keep_vectors"] = draw.bool()
    options = draw.flawed(options)
    made = attempt(lambda: mk.StaticFisher(**options), options)
    if isinstance(made, mk.StaticFisher):
        fisher, d = made, made.dim
        several(
            draw,
            Stateful(lambda: (fisher.count, fisher.ngrads, fisher.damping)),
            {
                "ihvp": lambda: fisher.ihvp(vector(draw, *draw.pick(((d,), (3, d), (0, d))))),
                "diagonal": lambda: fisher.diagonal(),
                "element": lambda: fisher.element(draw.int(-d - 1, d), draw.int(-d, d - 1)),
                "elements": lambda: fisher.elements(index(draw, d), index(draw, d)),
                "submatrix": lambda: fisher.submatrix(index(draw, d)),
                "groups": lambda: fisher.group_submatrices(index(draw, d)[None]),
                "minimum": lambda: fisher.constrained_minimum(vector(draw, d), draw.normal(d) > 0),
                "vectors": lambda: fisher.vectors(),
                "append": lambda: fisher.append(vector(draw, d)),
            },
            6,
        )


def shape_of(draw: Draw) -> dict[str, Any]:
    groups = draw.pick((1, 1, 2))
    block = draw.pick((None, None, 1, 2)) if groups == 1 else None
    return {
        "outputs": draw.int(1, 5),
        "inputs": draw.int(1, 5),
        "groups": groups,
        "bias": draw.bool(),
        "input_block": block,
        "output_block": draw.pick((None, block)),
    }


@surface("KroneckerFisher", "KroneckerShape")
def _(draw: Draw) -> None:
    shapes = [attempt(lambda: mk.KroneckerShape(**draw.flawed(shape_of(draw)))) for _ in range(draw.int(0, 3))]
    if any(s is REFUSED or max(s.outputs, s.inputs, s.groups, s.offsets) > 100 for s in shapes):
        return
    options: dict[str, Any] = {"shapes": shapes, "damping": draw.positive(), "factor_decay": 0.5}
    options["style"] = draw.pick(("factored", "exact"))
    options["eigen_correction"] = options["style"] == "exact" and draw.bool()
    options["approximate"] = draw.pick(("kfac", "kfac", "tkfac", "kpsvd"))
    options["dtype"] = draw.pick((torch.float32, torch.float64))
    options = draw.flawed(options)
    made = attempt(lambda: mk.KroneckerFisher(**options))
    if not isinstance(made, mk.KroneckerFisher) or not made.shapes:
        return
    fisher = made
    layer = draw.int(0, len(fisher.shapes) - 1)

    def rows() -> tuple[Tensor, Tensor]:
        shape, n = fisher.shapes[layer], draw.pick((1, 3, 0))
        return vector(draw, n, shape.inputs, dtype=fisher.dtype), vector(draw, n, shape.outputs, dtype=fisher.dtype)

    def gradients() -> list[Tensor]:
        sizes = [(s.groups * s.outputs, s.columns) for s in fisher.shapes]
        return [vector(draw, *size, dtype=fisher.dtype) for size in sizes]

    several(
        draw,
        Stateful(lambda: (fisher.state_dict(), fisher.damping)),
        {
            "accumulate": lambda: fisher.accumulate(layer, *rows()),
            "update": lambda: fisher.update(),
            "refresh": lambda: fisher.refresh(),
            "ihvp": lambda: fisher.ihvp(gradients()),
            "factors": lambda: fisher.factors(draw.int(-1, 4)),
            "reload": lambda: reload(draw, fisher.state_dict(), fisher.load_state_dict),
            "diagnostics": lambda: fisher.diagnostics(),
            "smallest": lambda: fisher.smallest_eigenvectors(),
        },
    )


@surface("KroneckerSum")
def _(draw: Draw) -> None:
    a, b, shape = draw.int(0, 6), draw.int(1, 6), draw.pick(((), (2,), (0,)))
    dtype = draw.pick((torch.float32, torch.float64))
    first, second = ([draw.spd(*shape, n, dtype=dtype) for n in (a, b)] for _ in range(2))
    options = {"first": first, "second": second, "damping": draw.positive(), "floor": draw.pick((None, 1e-3))}
    options = draw.flawed(options)
    total = attempt(lambda: mk.KroneckerSum(**options), options)
    if isinstance(total, mk.KroneckerSum):
        attempt(lambda: total.ihvp(vector(draw, *total.values.shape, dtype=total.values.dtype)))


@surface("nearest_kronecker_sum")
def _(draw: Draw) -> None:
    n, dtype = draw.int(0, 6), draw.pick((torch.float32, torch.float64))
    options: dict[str, Any] = {"inputs": draw.tensor(n, draw.int(1, 5), dtype=dtype)}
    options["gradients"] = draw.tensor(n, draw.int(1, 5), dtype=dtype)
    options["weights"] = draw.tensor(n, dtype=dtype) if draw.bool() else None
    options = draw.flawed({**options, "rank": draw.int(1, 2), "iterations": 5}, sound=("rank", "iterations"))
    found = attempt(lambda: mk.nearest_kronecker_sum(**options), options)
    if found is not REFUSED and draw.tame:
        expect_finite("nearest_kronecker_sum", found)


@surface("JacobianProduct")
def _(draw: Draw) -> None:
    n, inputs, outputs, bias = draw.int(0, 5), draw.int(1, 5), draw.int(1, 5), draw.bool()
    maps = [LinearMap(outputs, inputs, bias)]
    calls = [Call(0, vector(draw, n, inputs), vector(draw, n, outputs)) for _ in range(draw.int(0, 2))]
    options: dict[str, Any] = {"maps": maps, "calls": calls, "samples": draw.pick((None, n))}
    options["dtype"] = draw.pick((torch.float32, torch.float64))
    made = attempt(lambda: mk.JacobianProduct(**draw.flawed(options, sound=("maps",))))
    if isinstance(made, mk.JacobianProduct):
        product = made
        if product.samples > 1000:
            return
        block = [draw.tensor(outputs, inputs + bias)]
        several(
            draw,
            Stateful(lambda: (product.samples,)),
            {
                "jvp": lambda: product.jvp(draw.changed(block) if draw.chance(3) else block),
                "vjp": lambda: product.vjp(vector(draw, product.samples)),
                "fisher": lambda: product.fisher_product(block, draw.positive()),
            },
            4,
        )
