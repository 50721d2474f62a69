"""MFAC: the numbers of the method written out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from mfac_cases import BOTH, assert_equal, backward, batches, flat, grads, mlp
from torch import Tensor, nn

import mfac_kernels as mk


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


def both(model: nn.Module, momentum_mode: str, weight_decay_mode: str, **options: object) -> tuple[mk.MFAC, WrittenOut]:
    """A window of 4, momentum 0.9 and weight decay 0.03 in these modes."""
    modes = {"momentum_mode": momentum_mode, "weight_decay_mode": weight_decay_mode}
    options = {"momentum": 0.9, "weight_decay": 0.03, **modes, **options}
    p = mk.MFAC(model.parameters(), 4, 0.1, dtype=torch.float64, **options)
    return p, WrittenOut(model.parameters(), 4, 0.1, **options)


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


@pytest.mark.parametrize("normalize", ["ngrads", "seen"])
@pytest.mark.parametrize(("momentum_mode", "weight_decay_mode"), BOTH)
def test_is_the_method_written_out(momentum_mode, weight_decay_mode, normalize, device):
    model = mlp(device=device)
    p, written = both(model, momentum_mode, weight_decay_mode, normalize=normalize)
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
    p, written = both(model, momentum_mode, weight_decay_mode)

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
