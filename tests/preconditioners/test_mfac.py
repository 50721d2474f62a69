"""MFAC beside an optimizer: the same numbers as the method written out, in every situation a training loop meets."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import mfac_kernels as mk

MODES = ["coupled", "decoupled"]
BOTH = list(product(MODES, MODES))


def mlp(dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return model.to(device=device, dtype=dtype)


def batches(count: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draws = [(torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(count)]
    return [(x.to(device, dtype), y.to(device, dtype)) for x, y in draws]


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()


def flat(tensors: Iterable[Tensor | None], like: Iterable[Tensor]) -> Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if t is None else t.flatten() for t, p in zip(tensors, like, strict=True)]
    )


def grads(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def tensors(state: object) -> list[Tensor]:
    """Every tensor and number of a state dict, copied."""
    if isinstance(state, Tensor):
        return [state.clone()]
    if isinstance(state, dict):
        return [t for value in state.values() for t in tensors(value)]
    if isinstance(state, list):
        return [t for value in state for t in tensors(value)]
    return [torch.tensor(state)] if isinstance(state, (int, float)) else []


def assert_equal(a: object, b: object) -> None:
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


class WrittenOut:
    """The method in plain torch: a list of gradients and a dense solve, in float64."""

    def __init__(
        self,
        params: Iterable[Tensor],
        ngrads: int,
        damping: float = 0.1,
        momentum: float = 0.0,
        momentum_mode: str = "decoupled",
        weight_decay: float = 0.0,
        weight_decay_mode: str = "coupled",
        normalize: str = "ngrads",
    ) -> None:
        self.params = list(params)
        self.ngrads, self.damping, self.momentum, self.decay = ngrads, damping, momentum, weight_decay
        self.momentum_mode, self.decay_mode, self.normalize = momentum_mode, weight_decay_mode, normalize
        self.rows: list[Tensor] = []
        self.average: Tensor | float = 0.0

    def step(self) -> Tensor:
        """What the gradients should become, flat."""
        g = flat([p.grad for p in self.params], self.params).double()
        w = flat([None if p.grad is None else p.detach() for p in self.params], self.params).double()
        if self.decay_mode == "coupled":
            g = g + self.decay * w
        if self.momentum_mode == "coupled":
            g = g + self.momentum * self.average
            self.average = g
        self.rows = [*self.rows, g][-self.ngrads :]
        rows = torch.stack(self.rows)
        n = self.ngrads if self.normalize == "ngrads" else len(rows)
        fisher = self.damping * torch.eye(len(g), dtype=g.dtype, device=g.device) + rows.mT @ rows / n
        u = torch.linalg.solve(fisher, g)
        if self.momentum_mode == "decoupled":
            u = u + self.momentum * self.average
            self.average = u
        return u + self.decay * w if self.decay_mode == "decoupled" else u


def compare(
    model: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    p: mk.MFAC,
    written: WrittenOut,
    tolerance: float,
    before_step: Callable[[int], None] = lambda t: None,
) -> None:
    """Train with SGD on what p makes of the gradients, and compare that with the method written out."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for t, (x, y) in enumerate(data):
        backward(model, x, y)
        before_step(t)
        before = grads(model)
        want = written.step()
        p.step()
        for old, new, param in zip(before, grads(model), model.parameters(), strict=True):
            assert new is old and (new is None or new.dtype == param.dtype)
        present = flat([None if g is None else torch.ones_like(g) for g in before], written.params)
        got = flat(grads(model), written.params).double()
        assert float((got - want * present).norm()) <= tolerance * float(want.norm())
        optimizer.step()


# -- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["ngrads", "seen"])
@pytest.mark.parametrize(("momentum_mode", "weight_decay_mode"), BOTH)
def test_is_the_method_written_out(momentum_mode, weight_decay_mode, normalize, device):
    model = mlp(device=device)
    options = {
        "momentum": 0.9,
        "momentum_mode": momentum_mode,
        "weight_decay": 0.03,
        "weight_decay_mode": weight_decay_mode,
        "normalize": normalize,
    }
    p = mk.MFAC(model.parameters(), 4, 0.1, dtype=torch.float64, **options)
    written = WrittenOut(model.parameters(), 4, 0.1, **options)
    compare(model, batches(11, device=device), p, written, 1e-10)
    assert p.diagnostics() == {"steps": 11, "seen": 11, "skipped": 0}


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_storage_and_parameter_types(dtype, storage, device):
    model = mlp(dtype, device)
    p = mk.MFAC(model.parameters(), 4, 0.1, dtype=storage, momentum=0.5, weight_decay=0.01)
    written = WrittenOut(model.parameters(), 4, 0.1, momentum=0.5, weight_decay=0.01)
    # The gradient enters rounded to the storage's type and its answer leaves rounded to the parameter's; F's condition
    # is below 10 here, and momentum 0.5 adds up no more than two of these errors.
    assert p.windows[0].dtype == storage
    eps = torch.finfo(storage).eps * 10 + torch.finfo(dtype).eps + 2**-22
    compare(model, batches(7, dtype, device), p, written, 2 * eps)


def test_types_may_be_mixed(device):
    model = mlp(torch.float32, device)
    model[2].to(torch.bfloat16)

    def loss() -> Tensor:
        hidden = model[1](model[0](torch.ones(2, 4, device=device)))
        return model[2](hidden.bfloat16()).float().square().sum()

    p = mk.MFAC(model.parameters(), 3, 0.1, weight_decay=0.1)
    written = WrittenOut(model.parameters(), 3, 0.1, weight_decay=0.1)
    loss().backward()
    want = written.step()
    p.step()
    got = flat([g.float() for g in grads(model)], written.params)
    assert [g.dtype for g in grads(model)] == [q.dtype for q in model.parameters()]
    assert float((got - want).norm()) <= torch.finfo(torch.bfloat16).eps * float(want.norm())


@pytest.mark.parametrize(("momentum_mode", "weight_decay_mode"), BOTH)
def test_a_parameter_without_gradient_counts_as_zero(momentum_mode, weight_decay_mode, device):
    model = mlp(device=device)
    options = {
        "momentum": 0.9,
        "momentum_mode": momentum_mode,
        "weight_decay": 0.03,
        "weight_decay_mode": weight_decay_mode,
    }
    p = mk.MFAC(model.parameters(), 4, 0.1, dtype=torch.float64, **options)
    written = WrittenOut(model.parameters(), 4, 0.1, **options)

    def drop(t: int) -> None:
        if t % 3 == 1:
            model[0].weight.grad = None
        if t % 3 == 2:
            model[2].bias.grad = None

    compare(model, batches(9, device=device), p, written, 1e-10, drop)


def test_hyper_parameters_may_be_functions_of_the_step(device):
    model = mlp(device=device)
    asked: list[int] = []

    def damping(step: int) -> float:
        asked.append(step)
        return 0.1 / (1 + step)

    p = mk.MFAC(
        model.parameters(), 4, damping, dtype=torch.float64,
        momentum=lambda t: 0.1 * t, weight_decay=lambda t: 0.01 if t > 2 else 0.0,
    )  # fmt: skip
    written = WrittenOut(model.parameters(), 4)

    def schedule(t: int) -> None:
        written.damping, written.momentum, written.decay = 0.1 / (1 + t), 0.1 * t, 0.01 * (t > 2)

    compare(model, batches(8, device=device), p, written, 1e-10, schedule)
    assert asked == [0, *range(8)]  # once for the window, then once a step


def test_numbers_may_be_changed_between_steps(device):
    model = mlp(device=device)
    p = mk.MFAC(model.parameters(), 4, 0.1, dtype=torch.float64)
    written = WrittenOut(model.parameters(), 4, 0.1)

    def change(t: int) -> None:
        p.damping = written.damping = 0.1 * (t + 1)
        p.momentum = written.momentum = 0.2 * (t % 3)

    compare(model, batches(7, device=device), p, written, 1e-10, change)


@pytest.mark.parametrize("per_group", [False, True])
def test_groups(per_group, device):
    model, apart = mlp(device=device), mlp(device=device)
    groups = [{"params": model[0].parameters(), "lr": 1}, {"params": list(model[2].parameters())}]
    p = mk.MFAC(groups, 3, 0.1, dtype=torch.float64, momentum=0.5, per_group=per_group)
    parts = [apart[0], apart[2]] if per_group else [apart]
    alone = [mk.MFAC(part.parameters(), 3, 0.1, dtype=torch.float64, momentum=0.5) for part in parts]
    assert len(p.windows) == len(parts)
    for x, y in batches(5, device=device):
        backward(model, x, y)
        backward(apart, x, y)
        p.step()
        for one in alone:
            one.step()
        assert_equal(grads(model), grads(apart))


def test_a_group_may_be_one_tensor():
    w = torch.ones(3, 2, requires_grad=True)
    p = mk.MFAC([{"params": w}], 2, 0.1)
    w.grad = torch.ones(3, 2)
    p.step()
    # m g / (m lam + |g|^2), in float32
    torch.testing.assert_close(w.grad, torch.full((3, 2), 2 / (2 * 0.1 + 6)))


def test_parameters_that_are_not_trained_are_left_out(device):
    model = mlp(device=device)
    model[0].requires_grad_(False)
    p = mk.MFAC(model.parameters(), 3, 0.1)
    assert p.windows[0].dim == 6 * 3 + 3
    backward(model, *batches(1, device=device)[0])
    p.step()
    assert model[0].weight.grad is None


def test_scalars_and_empty_parameters(device):
    params = [torch.ones(shape, device=device, requires_grad=True) for shape in ((), (0, 3), (2,))]
    p = mk.MFAC(params, 2, 0.5)
    for q in params:
        q.grad = torch.ones_like(q)
    p.step()
    want = 2 / (2 * 0.5 + 3)
    assert [q.grad.tolist() for q in params] == [pytest.approx(want), [], pytest.approx([want] * 2)]


def test_gradients_in_another_memory_format(device):
    def train(memory_format: torch.memory_format) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3, bias=False).to(device).to(memory_format=memory_format)
        p = mk.MFAC(model.parameters(), 3, 0.1)
        seen = []
        for t in range(5):
            model.weight.grad = torch.randn(
                4, 3, 3, 3, generator=torch.Generator().manual_seed(t)
            ).to(device).to(memory_format=memory_format)  # fmt: skip
            p.step()
            assert model.weight.grad.is_contiguous(memory_format=memory_format)
            seen.append(model.weight.grad.clone())
        return seen

    assert_equal(train(torch.contiguous_format), train(torch.channels_last))


def test_gradients_that_share_a_buffer(device):
    """Views of one flat buffer, as data-parallel training makes them."""
    model, plain = mlp(device=device), mlp(device=device)
    pair = [mk.MFAC(m.parameters(), 3, 0.1, dtype=torch.float64) for m in (model, plain)]
    for x, y in batches(4, device=device):
        backward(model, x, y)
        backward(plain, x, y)
        buffer = torch.cat([g.flatten() for g in grads(model)])
        for q, part in zip(model.parameters(), buffer.split([q.numel() for q in model.parameters()]), strict=True):
            q.grad = part.view_as(q)
        for p in pair:
            p.step()
        assert_equal(grads(model), grads(plain))
        assert torch.equal(buffer, flat(grads(plain), plain.parameters()))


# -- training loops ---------------------------------------------------------------------------------------------------


def test_accumulated_gradients_are_those_of_the_whole_batch(device):
    whole, halves = mlp(device=device), mlp(device=device)
    pair = [mk.MFAC(m.parameters(), 3, 0.1, dtype=torch.float64, momentum=0.5) for m in (whole, halves)]
    for x, y in batches(5, device=device):
        backward(whole, x, y)
        halves.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            (nn.functional.mse_loss(halves(x[part]), y[part]) / 2).backward()
        for p in pair:
            p.step()
        got, want = (flat(grads(m), m.parameters()) for m in (halves, whole))
        # sums of 8 products in another order, times cond(F) < 100
        assert float((got - want).norm()) <= 1e-12 * float(want.norm())


def train(
    model: nn.Module, data: list[tuple[Tensor, Tensor]], run: nn.Module | None = None, **options: object
) -> mk.MFAC:
    p = mk.MFAC(model.parameters(), 3, 0.1, momentum=0.9, weight_decay=0.01, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.mse_loss((run or model)(x), y).backward()
        p.step()
        optimizer.step()
    return p


def test_every_run_has_the_same_bits_for_any_number_of_threads(threads):
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        torch.manual_seed(0)
        model = nn.Linear(300, 200)
        p = mk.MFAC(model.parameters(), 3, 0.1, momentum=0.9)
        for t in range(5):
            for q in model.parameters():
                q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(t))
            p.step()
        results.append([grads(model), p.state_dict()])
    for other in results[1:]:
        assert_equal(results[0], other)


def test_a_compiled_model(device):
    model, plain = mlp(torch.float32, device), mlp(torch.float32, device)
    data = batches(5, torch.float32, device)
    a = train(model, data, torch.compile(model, backend="eager", fullgraph=True))
    b = train(plain, data)
    assert_equal(a.state_dict(), b.state_dict())
    assert_equal(model.state_dict(), plain.state_dict())


def test_grad_scaler_skips_a_batch_that_overflows(device):
    """Beside a run that never saw the batch: scales are powers of 2, so the two agree bit for bit."""
    model, plain = mlp(torch.float32, device), mlp(torch.float32, device)
    data = batches(6, torch.float32, device)
    p = mk.MFAC(model.parameters(), 3, 0.1, momentum=0.9, weight_decay=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=1000)
    for t, (x, y) in enumerate([*data[:4], (data[0][0], data[0][1] * 1e38), *data[4:]]):
        weights, state = copy.deepcopy(model.state_dict()), tensors(p.state_dict())
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        scaler.unscale_(optimizer)
        before = tensors(grads(model))
        p.step()
        if t == 4:
            assert not all(g.isfinite().all() for g in before)
            assert_equal(grads(model), before)
            assert (p.skipped, p.windows[0].seen, p.steps) == (1, 4, 5)
        scaler.step(optimizer)
        scaler.update()
        if t == 4:
            assert_equal(model.state_dict(), weights)
            after = tensors(p.state_dict())
            changed = [i for i, (a, b) in enumerate(zip(after, state, strict=True)) if not torch.equal(a, b)]
            assert len(changed) == 2  # the counts of steps and of refusals
            assert scaler.get_scale() == 2.0**9
    assert p.diagnostics() == {"steps": 7, "seen": 6, "skipped": 1}
    q = train(plain, data)
    assert_equal(model.state_dict(), plain.state_dict())
    assert_equal(p.windows[0].window, q.windows[0].window)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("momentum_mode", "weight_decay_mode"), BOTH)
def test_a_gradient_that_is_not_finite_stays_as_it_is(momentum_mode, weight_decay_mode, bad, device):
    model = mlp(torch.float32, device)
    p = train(
        model, batches(4, torch.float32, device), momentum_mode=momentum_mode, weight_decay_mode=weight_decay_mode
    )
    backward(model, *batches(1, torch.float32, device)[0])
    model[2].bias.grad[1] = bad
    before, buffer = tensors(grads(model)), p.state_dict()["momentum_buffers"][0].clone()
    p.step()
    assert_equal(grads(model), before)
    assert_equal(p.state_dict()["momentum_buffers"], [buffer])
    assert (p.skipped, p.windows[0].seen) == (1, 4)


def test_a_gradient_too_large_for_the_window_skips_the_step(device):
    """It is finite, so no GradScaler would see it: left in place it would be applied without F^-1."""
    model = mlp(torch.float32, device)
    p = mk.MFAC(model.parameters(), 3, 0.1, momentum=0.9, weight_decay=0.1, dtype=torch.float16)
    backward(model, *batches(1, torch.float32, device)[0])
    p.step()
    backward(model, *batches(1, torch.float32, device)[0])
    model[2].bias.grad[1] = 1e6
    buffer = p.state_dict()["momentum_buffers"][0].clone()
    p.step()
    assert not any(g.any() for g in grads(model))
    assert_equal(p.state_dict()["momentum_buffers"], [buffer])
    assert (p.skipped, p.windows[0].seen) == (1, 1)


def test_only_the_group_with_the_bad_gradient_is_skipped(device):
    model = mlp(torch.float32, device)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    p = mk.MFAC(groups, 3, 0.1, per_group=True)
    backward(model, *batches(1, torch.float32, device)[0])
    model[2].bias.grad[1] = torch.nan
    p.step()
    assert [w.seen for w in p.windows] == [1, 0] and p.skipped == 1


def test_a_step_without_any_gradient_does_nothing(device):
    model = mlp(torch.float32, device)
    p = train(model, batches(4, torch.float32, device))
    before = tensors([p.state_dict()["windows"], p.state_dict()["momentum_buffers"]])
    model.zero_grad()
    p.step()
    assert_equal([p.state_dict()["windows"], p.state_dict()["momentum_buffers"]], before)
    assert grads(model) == [None] * 4 and (p.steps, p.skipped) == (5, 0)


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum_mode", MODES)
def test_resumes_bit_for_bit(momentum_mode, storage, per_group, device):
    data = batches(10, torch.float32, device)

    def make(model: nn.Module) -> tuple[mk.MFAC, torch.optim.Optimizer]:
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        p = mk.MFAC(
            groups, 3, lambda t: 0.1 / (1 + t), momentum=0.9, momentum_mode=momentum_mode,
            weight_decay=0.01, dtype=storage, per_group=per_group,
        )  # fmt: skip
        return p, torch.optim.SGD(model.parameters(), lr=0.05)

    def run(model: nn.Module, p: mk.MFAC, optimizer: torch.optim.Optimizer, part: slice) -> None:
        for x, y in data[part]:
            backward(model, x, y)
            p.step()
            optimizer.step()

    model = mlp(torch.float32, device)
    p, optimizer = make(model)
    run(model, p, optimizer, slice(0, 5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "p": p.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, p, optimizer, slice(5, 10))

    other = mlp(torch.float32, device, seed=7)
    p2, optimizer2 = make(other)
    run(other, p2, optimizer2, slice(0, 2))
    state = torch.load(io.BytesIO(file.getvalue()))
    other.load_state_dict(state["model"])
    p2.load_state_dict(state["p"])
    optimizer2.load_state_dict(state["optimizer"])
    run(other, p2, optimizer2, slice(5, 10))
    assert_equal(other.state_dict(), model.state_dict())
    assert_equal(p2.state_dict(), p.state_dict())
    assert_equal(grads(other), grads(model))


def test_state_dict_is_live_and_loads_onto_itself(device):
    model = mlp(torch.float32, device)
    p = train(model, batches(4, torch.float32, device))
    state = p.state_dict()
    backward(model, *batches(1, torch.float32, device)[0])
    p.step()
    live = {**state, "steps": p.steps}
    before = tensors(p.state_dict())
    assert_equal(live, before)
    p.load_state_dict(live)
    assert_equal(p.state_dict(), before)


# -- errors -----------------------------------------------------------------------------------------------------------


def freeze(model: nn.Module) -> None:
    model[2].bias.requires_grad_(False)


def resize(model: nn.Module) -> None:
    model[2].bias.grad = None
    model[2].bias.data = torch.zeros(5)


def sparse_gradient(model: nn.Module) -> None:
    model[2].weight.grad = model[2].weight.grad.to_sparse()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (freeze, r"parameter 3 of shape \(3,\) no longer requires a gradient"),
        (resize, r"parameter 3: expected shape \(3,\) on cpu, as at construction, got \(5,\) on cpu"),
        (sparse_gradient, "parameter 2: expected a dense gradient, got a sparse one"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
@pytest.mark.parametrize("per_group", [False, True])
def test_changed_parameters_are_refused_and_nothing_changes(change, message, per_group):
    model = mlp(torch.float32)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    p = mk.MFAC(groups, 3, lambda t: 0.1 / (1 + t), momentum=0.9, per_group=per_group)
    for x, y in batches(2, torch.float32):
        backward(model, x, y)
        p.step()
    backward(model, *batches(1, torch.float32)[0])
    change(model)
    if per_group:
        message = message.replace("parameter 3", "parameter 1").replace("parameter 2", "parameter 0")
    before, dense = tensors(p.state_dict()), tensors(model[0].weight.grad)
    with pytest.raises(RuntimeError, match=f"MFAC: {message}"):
        p.step()
    assert_equal(p.state_dict(), before)
    assert_equal(model[0].weight.grad, dense)


def test_a_parameter_unfrozen_later_is_refused():
    model = mlp(torch.float32)
    freeze(model)
    p = mk.MFAC(model.parameters(), 3, 0.1)
    backward(model, *batches(1, torch.float32)[0])
    p.step()
    model[2].bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen at construction requires a gradient now"):
        p.step()
    assert (p.steps, p.windows[0].seen) == (1, 1)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("momentum", 1.0, ValueError),
        ("momentum", -0.1, ValueError),
        ("momentum", float("nan"), ValueError),
        ("momentum", None, TypeError),
        ("weight_decay", -1e-9, ValueError),
        ("weight_decay", float("inf"), ValueError),
        ("weight_decay", "0.1", TypeError),
        ("damping", 0.0, ValueError),
        ("damping", float("nan"), ValueError),
        ("damping", [1e-5], TypeError),
    ],
)
@pytest.mark.parametrize("function", [False, True], ids=["number", "function"])
def test_hyper_parameters_out_of_range(name, value, kind, function):
    bad = (lambda t: value) if function else value
    with pytest.raises(kind, match=rf"^{name}: expected .* got "):
        mk.MFAC(mlp().parameters(), 3, **{name: bad})
    model = mlp(torch.float32)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    p = mk.MFAC(groups, 3, 0.1, momentum=0.9, per_group=True)
    backward(model, *batches(1, torch.float32)[0])
    p.step()
    setattr(p, name, bad)
    before = tensors([p.state_dict(), grads(model)])
    with pytest.raises(kind, match=rf"^{name}: expected .* got "):
        p.step()
    assert_equal([p.state_dict(), grads(model)], before)


def parameter(*shape: int, **options: object) -> Tensor:
    return torch.ones(*shape, requires_grad=True, **options)


W = parameter(2)


FLOATS = "float32, float64, bfloat16 or float16"
NONE_TRAINED = "params: expected at least one parameter that requires a gradient, got none"
TWICE = "params: expected each parameter once, got one twice"
TWO_DEVICES = [W, parameter(2, device="meta")]
COMPLEX = [parameter(2, dtype=torch.complex64)]


@pytest.mark.parametrize(
    ("params", "options", "kind", "message"),
    [
        ([], {}, ValueError, NONE_TRAINED),
        ([torch.ones(2)], {}, ValueError, NONE_TRAINED),
        (W, {}, TypeError, "params: expected an iterable of tensors or groups, got a tensor"),
        ([W, W], {}, ValueError, TWICE),
        ([{"params": [W]}, {"params": W}], {}, ValueError, TWICE),
        ([W, 3], {}, TypeError, "params: expected tensors, got int"),
        ([("w", W)], {}, TypeError, "params: expected tensors, got tuple"),
        ([{"params": [W]}, W], {}, TypeError, "params: expected tensors, got dict"),
        (TWO_DEVICES, {}, ValueError, "params: expected parameters on one device, got cpu, meta"),
        (COMPLEX, {}, TypeError, "params: expected floating-point parameters, got torch.complex64"),
        ([W], {"ngrads": 0}, ValueError, "ngrads: expected at least 1, got 0"),
        ([W], {"dtype": torch.int8}, TypeError, f"dtype: expected {FLOATS}, got torch.int8"),
        ([W], {"momentum_mode": "n"}, ValueError, "momentum_mode: expected 'coupled' or 'decoupled', got 'n'"),
        (
            [W],
            {"weight_decay_mode": None},
            ValueError,
            "weight_decay_mode: expected 'coupled' or 'decoupled', got None",
        ),
        ([W], {"normalize": "m"}, ValueError, "normalize: expected 'ngrads' or 'seen', got 'm'"),
    ],
)
def test_bad_arguments(params, options, kind, message):
    with pytest.raises(kind) as caught:
        mk.MFAC(params, **options)
    assert str(caught.value) == message


def test_parameters_cannot_be_added():
    p = mk.MFAC([parameter(2)])
    with pytest.raises(RuntimeError, match=r"parameters cannot be added: .* construct a new MFAC"):
        p.add_param_group({"params": [parameter(2)]})


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda s: s.pop("steps"), KeyError, r"expected the entries \['steps'\]"),
        (lambda s: s.pop("windows"), KeyError, r"expected the entries \['windows'\]"),
        (lambda s: s["windows"].pop(), ValueError, r"state_dict\['windows'\]: expected 2, got 1"),
        (lambda s: s["momentum_buffers"].pop(), ValueError, r"state_dict\['momentum_buffers'\]: expected 2, got 1"),
        (
            lambda s: s["momentum_buffers"].__setitem__(1, torch.zeros(4)),
            ValueError,
            r"state_dict\['momentum_buffers'\]\[1\]: expected torch.float32 of shape \(21,\), got .* of shape \(4,\)",
        ),
        (lambda s: s["windows"][1].pop("gram"), KeyError, r"expected the entries \['gram'\]"),
        (
            lambda s: s["windows"][1].update(window=torch.zeros(2, 2)),
            ValueError,
            r"state_dict\['window'\]: expected torch.float32 of shape \(3, 21\), got torch.float32 of shape \(2, 2\)",
        ),
    ],
)  # fmt: skip
def test_state_dicts_that_do_not_fit(spoil, kind, message):
    def make(seed: int) -> mk.MFAC:
        model = mlp(torch.float32, seed=seed)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        p = mk.MFAC(groups, 3, 0.1, momentum=0.9, per_group=True)
        for x, y in batches(4, torch.float32):
            backward(model, x, y)
            p.step()
        return p

    p, state = make(0), copy.deepcopy(make(1).state_dict())
    spoil(state)
    before = tensors(p.state_dict())
    with pytest.raises(kind, match=message):
        p.load_state_dict(state)
    assert_equal(p.state_dict(), before)
