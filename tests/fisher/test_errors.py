"""Bad input: each row raises one exception; its message names the argument, what was expected and what came.

Nothing changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mfac_kernels as mk

D, M = 6, 3
NAN, INF = float("nan"), float("inf")


def window() -> mk.FisherWindow:
    w = mk.FisherWindow(D, M, 0.1)
    for g in torch.randn(5, D, generator=torch.Generator().manual_seed(0)):
        w.update(g)
    return w


def static(block_size: int | None = None) -> mk.StaticFisher:
    g = torch.randn(M, D, generator=torch.Generator().manual_seed(0))
    s = mk.StaticFisher(g, 0.1, block_size=block_size)
    s.append(g[0] * 2)
    return s


def vector(size: int = D, value: float = 1.0, **options: object) -> Tensor:
    x = torch.ones(size, **options)
    if options.get("device") != "meta":
        x[-1:] = value
    return x


# What every vector argument of a (dim,)-or-batch kind refuses: (argument, exception, words after the argument's name)
VECTOR = [
    (vector(5), ValueError, r"expected shape \(6,\).*, got \(5,\)"),
    (torch.ones(()), ValueError, r"expected shape \(6,\).*, got \(\)"),
    (vector(0), ValueError, r"expected shape \(6,\).*, got \(0,\)"),
    (torch.ones(2, 2, D), ValueError, r"expected shape \(6,\).*, got \(2, 2, 6\)"),
    (torch.ones(D, 1), ValueError, r"expected shape \(6,\).*, got \(6, 1\)"),
    (vector(dtype=torch.int64), TypeError, r"expected float32, float64, bfloat16 or float16, got torch\.int64"),
    (vector(dtype=torch.complex64), TypeError, r"expected float32, .*, got torch\.complex64"),
    (vector(device="meta"), ValueError, r"expected a tensor on cpu, got one on meta"),
    (vector(value=NAN), ValueError, r"expected .*finite.*, got NaN or infinity"),
    (vector(value=-INF), ValueError, r"expected .*finite.*, got NaN or infinity"),
    ([1.0] * D, TypeError, r"expected a tensor of shape \(6,\).*, got list"),
    (None, TypeError, r"expected a tensor of shape \(6,\).*, got NoneType"),
]  # fmt: skip
MATRIX = (torch.ones(1, D), ValueError, r"expected shape \(6,\), got \(1, 6\)")

Row = tuple[Callable[[], object], Callable[[object], object], type[Exception], str]


def rows_of(name: str, method: str, make: Callable[[], object], table: list[tuple]) -> list[Row]:
    return [(make, lambda o, x=x: getattr(o, method)(x), kind, f"^{name}: {words}$") for x, kind, words in table]


def integers(name: str, method: str, make: Callable[[], object]) -> list[Row]:
    """Index tensors (k,)."""
    table = [
        (torch.tensor([0, 6]), IndexError, r"expected indices in \[-6, 6\), got one outside"),
        (torch.tensor([-7]), IndexError, r"expected indices in \[-6, 6\), got one outside"),
        (torch.tensor([0.0]), TypeError, r"expected an int64 or int32 tensor, got torch\.float32"),
        (torch.tensor([True]), TypeError, r"expected an int64 or int32 tensor, got torch\.bool"),
        ([0, 1], TypeError, r"expected an int64 or int32 tensor, got list"),
        (torch.tensor(0), ValueError, r"expected shape \(k,\), got \(\)"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"expected shape \(k,\), got \(2, 2\)"),
    ]
    if method == "submatrix":
        return rows_of(name, method, make, table)
    zero = torch.tensor([0])

    def pair(o: mk.StaticFisher, x: Tensor) -> Tensor:
        return o.elements(x, zero) if name == "rows" else o.elements(zero, x)

    return [(make, lambda o, x=x: pair(o, x), kind, f"^{name}: {words}$") for x, kind, words in table]


def elements(make: Callable[[], object]) -> list[Row]:
    """The two indices of element."""
    return [
        (make, lambda o: o.element(6, 0), IndexError, r"^i: expected an index in \[-6, 6\), got 6$"),
        (make, lambda o: o.element(0, -7), IndexError, r"^j: expected an index in \[-6, 6\), got -7$"),
        (make, lambda o: o.element(0.0, 0), TypeError, r"^i: expected an int, got 0\.0$"),
        (make, lambda o: o.element(0, True), TypeError, r"^j: expected an int, got True$"),
    ]


def assigned(w: mk.FisherWindow, value: object) -> None:
    w.damping = value


def loaded(
    change: Callable[[dict], object], source: Callable[[], mk.FisherWindow]
) -> Callable[[mk.FisherWindow], None]:
    """Loads the state of another window, spoiled by `change`."""

    def load(w: mk.FisherWindow) -> None:
        state = copy.deepcopy(source().state_dict())
        change(state)
        w.load_state_dict(state)

    return load


def other(**options: object) -> Callable[[], mk.FisherWindow]:
    arguments = {"dim": D, "ngrads": M, "damping": 0.7, **options}
    return lambda: mk.FisherWindow(**arguments)


def keep(state: dict) -> None:
    pass


DAMPING = [
    (0, ValueError, r"expected a positive finite number, got 0"),
    (0.0, ValueError, r"expected a positive finite number, got 0\.0"),
    (-1e-5, ValueError, r"expected a positive finite number, got -1e-05"),
    (NAN, ValueError, r"expected a positive finite number, got nan"),
    (INF, ValueError, r"expected a positive finite number, got inf"),
    ("1e-5", TypeError, r"expected a number, got '1e-5'"),
    (None, TypeError, r"expected a number, got None"),
    (True, TypeError, r"expected a number, got True"),
]

METHODS: list[Row] = [
    *rows_of("g", "update", window, [*VECTOR, MATRIX]),
    *rows_of("g", "update_ihvp", window, [*VECTOR, MATRIX]),
    # a gradient that is not finite is not an error of try_update_ihvp
    *rows_of("g", "try_update_ihvp", window, [row for row in VECTOR if "finite" not in row[2]]),
    *rows_of("x", "ihvp", window, VECTOR),
    *rows_of("x", "ihvp", static, VECTOR),
    *rows_of("x", "ihvp", lambda: static(2), VECTOR),
    *rows_of("g", "append", static, [*VECTOR, MATRIX]),
    *rows_of("g", "append", lambda: static(2), [*VECTOR, MATRIX]),
    *elements(window),
    *elements(static),
    *integers("index", "submatrix", static),
    *integers("rows", "elements", static),
    *integers("cols", "elements", lambda: static(2)),
    (
        static,
        lambda s: s.elements(torch.tensor([0, 1]), torch.tensor([0])),
        ValueError,
        r"^cols: expected shape \(2,\), as rows has, got \(1,\)$",
    ),
    (
        lambda: static(2),
        lambda s: s.vectors(),
        ValueError,
        r"^vectors: expected blocks wider than the 3 gradients, got block_size 2$",
    ),
    *[
        (window, lambda w, value=value: assigned(w, value), kind, f"^damping: {words}$")
        for value, kind, words in DAMPING
    ],
    (
        window,
        loaded(keep, other(dim=D + 1)),
        ValueError,
        r"^state_dict\['window'\]: expected torch\.float32 of shape \(3, 6\), got torch\.float32 of shape \(3, 7\)$",
    ),
    (
        window,
        loaded(keep, other(ngrads=M + 1)),
        ValueError,
        r"^state_dict\['window'\]: expected .* of shape \(3, 6\), got .* of shape \(4, 6\)$",
    ),
    (
        window,
        loaded(keep, other(dtype=torch.bfloat16)),
        ValueError,
        r"^state_dict\['window'\]: expected torch\.float32 .*, got torch\.bfloat16 of shape \(3, 6\)$",
    ),
    (
        window,
        loaded(keep, other(normalize="seen")),
        ValueError,
        r"^state_dict\['normalize'\]: expected 'ngrads', got 'seen'$",
    ),
    (
        window,
        loaded(lambda s: s.update(gram=s["gram"].float()), window),
        ValueError,
        r"^state_dict\['gram'\]: expected torch\.float64 of .*, got torch\.float32 of shape \(3, 3\)$",
    ),
    (
        window,
        loaded(lambda s: s.update(factor=[1.0]), window),
        TypeError,
        r"^state_dict\['factor'\]: expected a tensor, got list$",
    ),
    (
        window,
        loaded(lambda s: s["state"].sub_(9), window),
        ValueError,
        r"^state_dict\['state'\]: expected counts >= 0, got \[-4, -9\]$",
    ),
    (
        window,
        loaded(lambda s: s.update(damping=-1.0), window),
        ValueError,
        r"^state_dict\['damping'\]: expected a positive finite number, got -1\.0$",
    ),
    *[
        (window, loaded(lambda s, k=k: s.pop(k), window), KeyError, rf"state_dict: expected the entries \['{k}'\]")
        for k in ("window", "gram", "factor", "state", "damping", "normalize")
    ],
]  # fmt: skip


def bits(o: object) -> list[object]:
    """Everything an object's answers depend on."""
    if isinstance(o, mk.FisherWindow):
        return [o.damping, o.seen, o.refused, *o.state_dict().values()]
    assert isinstance(o, mk.StaticFisher)
    x = torch.linspace(-1, 1, D)
    return [o.count, o.damping, o.ihvp(x), o.diagonal(), o.submatrix(torch.arange(D))]


def same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize(("make", "call", "kind", "message"), METHODS, ids=[row[3] for row in METHODS])
def test_a_bad_call_raises_and_changes_nothing(make, call, kind, message):
    o = make()
    before = copy.deepcopy(bits(o))
    with pytest.raises(kind, match=message) as caught:
        call(o)
    assert type(caught.value) is kind
    assert all(same(a, b) for a, b in zip(bits(o), before, strict=True))
    g = torch.ones(D)
    twin = make()  # and it goes on as if nothing had been
    for each in (o, twin):
        each.update(g) if isinstance(each, mk.FisherWindow) else each.append(g)
    assert all(same(a, b) for a, b in zip(bits(o), bits(twin), strict=True))


G = torch.ones(3, 4)


def with_one(value: float) -> Tensor:
    g = G.clone()
    g[1, 2] = value
    return g


COUNT = [
    (0, ValueError, r"expected at least 1, got 0"),
    (-3, ValueError, r"expected at least 1, got -3"),
    (2.0, TypeError, r"expected an int, got 2\.0"),
    (True, TypeError, r"expected an int, got True"),
    (None, TypeError, r"expected an int, got None"),
]
MAKERS: list[tuple[Callable[[], object], type[Exception], str]] = [
    *[(lambda v=v: mk.FisherWindow(v, 3), kind, f"^dim: {words}$") for v, kind, words in COUNT],
    *[(lambda v=v: mk.FisherWindow(3, v), kind, f"^ngrads: {words}$") for v, kind, words in COUNT],
    *[(lambda v=v: mk.FisherWindow(3, 3, v), kind, f"^damping: {words}$") for v, kind, words in DAMPING],
    (lambda: mk.FisherWindow(3, 3, dtype=torch.int32), TypeError, r"^dtype: expected float32, .*, got torch\.int32$"),
    (lambda: mk.FisherWindow(3, 3, dtype="float32"), TypeError, r"^dtype: expected float32, .*, got float32$"),
    (lambda: mk.FisherWindow(3, 3, normalize="m"), ValueError, r"^normalize: expected 'ngrads' or 'seen', got 'm'$"),
    *[(lambda v=v: mk.StaticFisher(G, v), kind, f"^damping: {words}$") for v, kind, words in DAMPING],
    *[(lambda v=v: mk.StaticFisher(G, block_size=v), kind, f"^block_size: {words}$") for v, kind, words in COUNT[:4]],
    *[(lambda v=v: mk.StaticFisher(G, page_size=v), kind, f"^page_size: {words}$") for v, kind, words in COUNT[:4]],
    *[(lambda v=v: mk.StaticFisher(G, ngrads=v), kind, f"^ngrads: {words}$") for v, kind, words in COUNT[:4]],
    (lambda: mk.StaticFisher([[1.0]]), TypeError, r"^grads: expected a tensor of shape \(m, d\), got list$"),
    (lambda: mk.StaticFisher(G.long()), TypeError, r"^grads: expected float32, .*, got torch\.int64$"),
    (lambda: mk.StaticFisher(G[0]), ValueError, r"^grads: expected shape \(m, d\) with m >= 1 and d >= 1, got \(4,\)$"),
    (lambda: mk.StaticFisher(G[:0]), ValueError, r"^grads: expected shape \(m, d\) with m >= 1 .*, got \(0, 4\)$"),
    (lambda: mk.StaticFisher(G[:, :0]), ValueError, r"^grads: expected shape \(m, d\) .* d >= 1, got \(3, 0\)$"),
    (lambda: mk.StaticFisher(G[:, ::2]), ValueError, r"^grads: expected contiguous rows, got stride 2$"),
    (lambda: mk.StaticFisher(G.mT), ValueError, r"^grads: expected contiguous rows, got stride 4$"),
    *[
        (
            lambda bad=bad, b=b, dtype=dtype: mk.StaticFisher(with_one(bad).to(dtype), block_size=b),
            ValueError,
            "^grads: expected finite values, got NaN or infinity$",
        )
        for bad in (NAN, INF)
        for b in (None, 2)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ],
    (
        lambda: mk.StaticFisher(G, block_size=3, keep_vectors=True),
        ValueError,
        r"^keep_vectors: expected blocks wider than the 3 gradients .*, got block_size 3$",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "message"), MAKERS, ids=[row[2] for row in MAKERS])
def test_bad_arguments_of_the_constructors(make, kind, message):
    with pytest.raises(kind, match=message) as caught:
        make()
    assert type(caught.value) is kind
