"""TwoLevelKFAC against the dense Fisher matrix of small networks, from per-sample gradients in plain torch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from per_sample import per_sample_gradients
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels.preconditioners.coarse import COARSE_SPACES, FixedSpace

F64 = torch.float64
DAMPING = 0.05
SPACES = list(COARSE_SPACES)
COMBINATIONS = ["corrected", "additive", "deflated", "balanced"]


class Attention(nn.Module):
    """A transformer block: embedding, one head of attention, layer norms, a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 4, padding_idx=0), nn.LayerNorm(4)
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=bias) for bias in (False, True, True))
        self.up, self.down, self.head = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.norm(x)
        x = x + F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        x = x + self.down(torch.tanh(self.up(self.norm(x))))  # the norm is called twice
        return self.head(x)


class Resolutions(nn.Module):
    """Convolutions at two resolutions, with groups, strides, kinds of padding, and a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
        self.b = nn.Conv2d(4, 4, (3, 2), stride=2, padding=(1, 0), groups=2, bias=False)
        self.c = nn.Conv2d(4, 2, 2, padding="same", dilation=(1, 2))
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return self.head(self.c(x).mean((2, 3)))


def build(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    n = 7
    x = torch.randn(n, 4, dtype=F64)
    if kind == "linear":
        net: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Linear(4, 3))
    elif kind == "convolutional":
        net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2, stride=2), nn.Flatten(), nn.Linear(2, 3))
        x = torch.randn(n, 2, 5, 5, dtype=F64)
    elif kind == "normalised":
        net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4))
        net.extend([nn.BatchNorm1d(4), nn.Linear(4, 3)])
        x = torch.randn(n, 2, 5, 5, dtype=F64)
    elif kind == "resolutions":
        net, x = Resolutions(), torch.randn(n, 2, 6, 6, dtype=F64)
    else:
        net, x = Attention(), torch.randint(0, 5, (n, 4))
    net = net.double()
    with torch.no_grad():
        for q in net.parameters():
            q += 0.1 * torch.randn_like(q)
    return net, x


KINDS = ["linear", "convolutional", "normalised", "resolutions", "transformer"]


def loss_of(net: nn.Module, x: Tensor, average: str = "batch") -> Tensor:
    """Cross-entropy against fixed labels; a sum over the positions of a sample."""
    output = net(x)
    labels = torch.arange(output[..., 0].numel()) * 7 % 3
    total = F.cross_entropy(output.flatten(0, -2), labels, reduction="sum")
    return total / {"batch": len(output), "positions": len(labels), "sum": 1}[average]


class Case:
    """A step of two-level K-FAC, with all that it is made of, dense."""

    def __init__(self, kind: str = "linear", average: str = "batch", **options: object) -> None:
        self.net, self.x = build(kind)
        options = {"kl_clip": None, "loss_average": average, **options}
        self.p = mk.TwoLevelKFAC(self.net, DAMPING, **options)
        loss_of(self.net, self.x, average).backward()
        layers = self.p._layers
        self.shapes = [layer.gradient().shape for layer in layers]
        self.gradient = flat([layer.gradient() for layer in layers]).clone()
        self.p.step()
        self.step = flat([layer.gradient() for layer in layers])
        self.inverse = torch.block_diag(*(self.p.fisher.inverse(i) for i in range(len(layers))))
        n = len(self.x)
        rows = per_sample_gradients(self.net, layers, lambda: loss_of(self.net, self.x, average), n)
        # g = N times the gradient of the mean loss; a sum is N times it; a mean over S positions 1 / S of it
        scale = {"batch": n, "sum": 1 / n, "positions": n * 4 if kind == "transformer" else n}[average]
        self.fisher = scale * rows.mT @ rows + DAMPING * torch.eye(rows.shape[1], dtype=F64)
        self.first = self.inverse @ self.gradient
        self.best = torch.linalg.solve(self.fisher, self.gradient)

    def rows(self, space: str) -> Tensor:
        """R0, dense."""
        vectors = self._vectors(space)
        rows = []
        for vector in vectors:
            start = 0
            for shape in self.shapes:
                row = torch.zeros_like(vector)
                row[start : start + shape.numel()] = vector[start : start + shape.numel()]
                rows.append(row / row.abs().max())
                start += shape.numel()
        return torch.stack(rows)

    def _vectors(self, space: str) -> list[Tensor]:
        ones = torch.ones_like(self.gradient)
        residual = self.inverse @ (self.gradient - self.fisher @ self.first)
        if space == "spectral":
            return [flat([self._smallest(i) for i in range(len(self.shapes))])]
        return {
            "nicolaides": [ones],
            "residual": [residual],
            "krylov_nicolaides": [ones, self.inverse @ ones],
            "krylov_residual": [residual, self.inverse @ residual],
        }[space]

    def _smallest(self, i: int) -> Tensor:
        a, b = self.p.fisher.factors(i)
        if a.dim() == 1:
            a = a.diag()[None]
        groups = []
        for g in range(len(a)):
            u, v = torch.linalg.eigh(b[g])[1][:, 0], torch.linalg.eigh(a[g])[1][:, 0]
            groups.append(torch.outer(*(w * w[w.abs().argmax()].sign() for w in (u, v))))
        return torch.cat(groups)

    def coarse(self, space: str) -> tuple[Tensor, Tensor]:
        """F_c and Q."""
        rows = self.rows(space)
        matrix = rows @ self.fisher @ rows.mT
        return matrix, rows.mT @ torch.linalg.solve(matrix, rows)

    def norm(self, x: Tensor) -> float:
        return float((x - self.best) @ self.fisher @ (x - self.best))


def cut(row: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    return [b.view(s) for b, s in zip(row.split([s.numel() for s in shapes]), shapes, strict=True)]


def flat(blocks: list[Tensor]) -> Tensor:
    return torch.cat([b.flatten() for b in blocks])


def close(a: Tensor, b: Tensor) -> None:
    """To rounding: eps times a condition number of at most 1e6 here."""
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(b.abs().max()))


# ---- oracles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_step_is_the_formula_with_the_dense_fisher(kind, space, combination):
    omega = 0.7 if combination in ("corrected", "additive") else 1.0
    case = Case(kind, coarse_space=space, combination=combination, omega=omega)
    f, m, g = case.fisher, case.inverse, case.gradient
    _, q = case.coarse(space)
    one = torch.eye(len(g), dtype=F64)
    operator = {
        "corrected": m + omega * q @ (one - f @ m),
        "additive": m + omega * q,
        "deflated": (one - q @ f) @ m + q,
        "balanced": (one - q @ f) @ m @ (one - f @ q) + q,
    }[combination]
    close(case.step, operator @ g)
    assert case.p.diagnostics()["coarse_fallbacks"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
def test_the_correction_leaves_no_coarse_residual_and_lowers_the_error_by_its_gain(kind, space):
    case = Case(kind, coarse_space=space)
    left = case.rows(space) @ (case.gradient - case.fisher @ case.step)
    size = case.rows(space).abs() @ (case.gradient.abs() + (case.fisher @ case.step).abs())
    assert bool((left.abs() <= 1e-10 * size).all())
    gain = case.p.diagnostics()["coarse_gain"]
    assert gain > 0
    assert case.norm(case.first) - case.norm(case.step) == pytest.approx(gain, rel=1e-7)


@pytest.mark.parametrize("combination", ["corrected", "additive"])
@pytest.mark.parametrize("omega", [0.3, 1.0, 1.6])
def test_the_gain_is_the_change_of_the_error_with_any_omega(combination, omega):
    case = Case("convolutional", coarse_space="krylov_nicolaides", combination=combination, omega=omega)
    gain = case.p.diagnostics()["coarse_gain"]
    assert case.norm(case.first) - case.norm(case.step) == pytest.approx(gain, rel=1e-8)


@pytest.mark.parametrize(
    ("kind", "combination"), [*((kind, "corrected") for kind in KINDS), ("linear", "deflated"), ("linear", "balanced")]
)
def test_the_whole_space_gives_the_natural_gradient(kind, combination):
    """Row k of each layer is the unit vector k, or zero where there is none."""
    shapes = Case(kind).shapes
    units = torch.eye(max(s.numel() for s in shapes), dtype=F64)
    rows = [[unit[: s.numel()].view(s) for s in shapes] for unit in units]
    case = Case(kind, coarse_space=FixedSpace(rows, by_layer=True), combination=combination)
    close(case.step, case.best)


def test_rows_across_layers():
    shapes = Case("linear").shapes
    eye = torch.eye(sum(s.numel() for s in shapes), dtype=F64)
    close(Case("linear", coarse_space=[cut(row, shapes) for row in eye]).step, Case("linear").best)
    some = torch.randn(3, len(eye), dtype=F64)
    case = Case("linear", coarse_space=[cut(row, shapes) for row in some])
    left = some @ (case.gradient - case.fisher @ case.step)
    assert float(left.abs().max()) < 1e-10


@pytest.mark.parametrize("space", SPACES)
def test_balanced_is_symmetric_positive_definite_and_exact_on_the_coarse_space(space):
    """By its action on unit vectors: the operator with the rows of one step fixed."""
    case = Case("linear", coarse_space=space)
    rows = case.rows(space)
    blocks = [cut(row, case.shapes) for row in rows]
    balanced, multiplicative = (operator(case, blocks, name) for name in ("balanced", "corrected"))
    close(balanced, balanced.mT)
    assert float(torch.linalg.eigvalsh((balanced + balanced.mT) / 2)[0]) > 0
    close(balanced @ case.fisher @ rows.mT, rows.mT)
    assert float((multiplicative - multiplicative.mT).norm()) > 1e-3 * float(multiplicative.norm())


def operator(case: Case, blocks: list[list[Tensor]], combination: str) -> Tensor:
    """x as a function of the gradient, a column for each unit vector."""
    columns = []
    for k in range(len(case.gradient)):
        net, x = build("linear")
        p = mk.TwoLevelKFAC(net, DAMPING, coarse_space=blocks, combination=combination, kl_clip=None)
        loss_of(net, x).backward()
        unit = torch.zeros_like(case.gradient)
        unit[k] = 1
        for layer, part in zip(p._layers, cut(unit, case.shapes), strict=True):
            layer.assign(part)
        p.step()
        columns.append(flat([layer.gradient() for layer in p._layers]))
        p.remove_hooks()
    return torch.stack(columns, 1)


def test_tselepidis_factorizes_the_expectation():
    """Its matrix is the product of expectations, which is far from F_c, the expectation of the product."""
    case = Case("linear", coarse_space="tselepidis", omega=0.5)
    inputs, outputs = capture(case)
    a = torch.stack([x.sum(1) for x in inputs], 1)  # (N, layers)
    b = torch.stack([g.sum(1) for g in outputs], 1)
    n = len(a)
    factorized = (a.mT @ a / n) * (b.mT @ b / n)
    rows = case.rows("nicolaides")
    beta = torch.linalg.solve(factorized + DAMPING * torch.eye(len(rows), dtype=F64), rows @ case.gradient)
    close(case.step, case.first + 0.5 * rows.mT @ beta)
    exact = rows @ (case.fisher - DAMPING * torch.eye(len(case.gradient), dtype=F64)) @ rows.mT
    close(((a * b).mT @ (a * b)) / n, exact)
    assert float((factorized - exact).norm()) > 0.2 * float(exact.norm())
    gain = case.p.diagnostics()["coarse_gain"]
    assert case.norm(case.first) - case.norm(case.step) == pytest.approx(gain, rel=1e-8)


def capture(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs with the bias's 1, and N times the gradients of outputs, of every linear layer."""
    inputs, outputs = [], []

    def hook(module: nn.Module, x: tuple[Tensor], y: Tensor) -> None:
        a = x[0].detach()
        inputs.append(F.pad(a, (0, 1), value=1.0) if module.bias is not None else a)
        outputs.append(y)
        y.retain_grad()

    net = copy.deepcopy(case.net)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(hook)
    loss_of(net, case.x).backward()
    return inputs, [len(case.x) * y.grad for y in outputs]


# ---- which samples, which scale -------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["batch", "positions", "sum"])
def test_every_average_of_the_loss(average):
    case = Case("transformer", average=average, coarse_space="residual")
    _, q = case.coarse("residual")
    close(case.step, case.first + q @ (case.gradient - case.fisher @ case.first))


def test_accumulated_passes_are_one_batch():
    joint, x = build("convolutional")
    parts = copy.deepcopy(joint)
    x = torch.cat([x, x[:1]])
    y = torch.arange(8) % 3
    ps = [
        mk.TwoLevelKFAC(net, DAMPING, coarse_space="krylov_residual", accumulation_steps=k)
        for net, k in ((joint, 1), (parts, 2))
    ]
    F.cross_entropy(joint(x), y).backward()
    for half in (slice(0, 4), slice(4, 8)):
        (F.cross_entropy(parts(x[half]), y[half]) / 2).backward()
    for p in ps:
        p.step()
    for a, b in zip(joint.parameters(), parts.parameters(), strict=True):
        close(a.grad, b.grad)
    assert ps[0].diagnostics()["coarse_gain"] == pytest.approx(ps[1].diagnostics()["coarse_gain"], rel=1e-9)


def test_a_part_of_the_batch_is_the_fisher_of_that_part():
    net, x = build("linear")
    p = mk.TwoLevelKFAC(net, DAMPING, coarse_space="residual", fisher_batch=0.4, kl_clip=None)  # 3 of 7
    loss_of(net, x).backward()
    gradient = flat([layer.gradient() for layer in p._layers]).clone()
    rows = per_sample_gradients(net, p._layers, lambda: loss_of(net, x), 7)[:3] * 7
    p.step()
    fisher = rows.mT @ rows / 3 + DAMPING * torch.eye(rows.shape[1], dtype=F64)
    inverse = torch.block_diag(*(p.fisher.inverse(i) for i in range(len(p._layers))))
    first, best = inverse @ gradient, torch.linalg.solve(fisher, gradient)
    step = flat([layer.gradient() for layer in p._layers])
    errors = [float((x - best) @ fisher @ (x - best)) for x in (first, step)]
    assert errors[0] - errors[1] == pytest.approx(p.diagnostics()["coarse_gain"], rel=1e-8)


def test_labels_drawn_from_the_model_make_the_fisher():
    """The pass of the loss gives the gradient alone."""
    net, x = build("linear")
    p = mk.TwoLevelKFAC(net, DAMPING, coarse_space="nicolaides", fisher_type="mc", kl_clip=None)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    output = net(x)
    with p.sampling():
        F.cross_entropy(output, labels).backward(retain_graph=True)
    loss_of(net, x).backward()
    gradient = flat([layer.gradient() for layer in p._layers]).clone()
    p.step()
    rows = per_sample_gradients(net, p._layers, lambda: F.cross_entropy(net(x), labels), 7) * 7
    fisher = rows.mT @ rows / 7 + DAMPING * torch.eye(rows.shape[1], dtype=F64)
    inverse = torch.block_diag(*(p.fisher.inverse(i) for i in range(len(p._layers))))
    step = flat([layer.gradient() for layer in p._layers])
    r0 = torch.block_diag(*(torch.ones(1, layer.gradient().numel(), dtype=F64) for layer in p._layers))
    q = r0.mT @ torch.linalg.solve(r0 @ fisher @ r0.mT, r0)
    close(step, inverse @ gradient + q @ (gradient - fisher @ inverse @ gradient))


def test_the_positions_of_a_sample_among_the_samples():
    """Tokens flattened into the first dimension, with the batch's size given: a row for each sample all the same."""
    torch.manual_seed(0)
    a, b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    x = torch.randn(5, 6, 3, dtype=F64)
    steps = []
    for flatten in (False, True):
        first, last = copy.deepcopy((a, b))
        net = nn.ModuleList([first, last])
        p = mk.TwoLevelKFAC(net, DAMPING, coarse_space="residual", kl_clip=None, batch_size=5)
        hidden = first(x.flatten(0, 1)).view(5, 6, 4) if flatten else first(x)
        last(torch.tanh(hidden).mean(1)).square().sum().div(5).backward()
        p.step()
        steps.append(flat([q.grad for q in net.parameters()]))
    close(steps[1], steps[0])


# ---- what can go wrong ----------------------------------------------------------------------------------------------


def twins(**options: object) -> list[tuple[nn.Module, mk.KFAC]]:
    nets = [build("linear")[0] for _ in range(2)]
    return [(nets[0], mk.KFAC(nets[0], DAMPING)), (nets[1], mk.TwoLevelKFAC(nets[1], DAMPING, **options))]


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_singular_coarse_matrix_leaves_the_step_of_kfac_and_is_counted(combination):
    shapes = Case("linear").shapes
    row = [torch.ones(s, dtype=F64) for s in shapes]
    (plain, k), (net, p) = twins(coarse_space=FixedSpace([row, row], by_layer=True), combination=combination)
    _, x = build("linear")
    for module, preconditioner in ((plain, k), (net, p)):
        loss_of(module, x).backward()
        preconditioner.step()
    for a, b in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert (p.diagnostics()["coarse_fallbacks"], p.diagnostics()["coarse_gain"]) == (1, 0)


@pytest.mark.parametrize("space", [*SPACES, "tselepidis"])
def test_a_sampling_pass_that_is_not_finite_leaves_the_step_of_kfac(space):
    (plain, k), (net, p) = twins(coarse_space=space, fisher_type="mc")
    k = mk.KFAC(plain, DAMPING, fisher_type="mc") if k.remove_hooks() is None else k
    _, x = build("linear")
    for step in range(2):
        for module, preconditioner in ((plain, k), (net, p)):
            module.zero_grad()
            output = module(x)
            with preconditioner.sampling():
                (output.sum() * (math.inf if step else 1)).backward(retain_graph=True)
            loss_of(module, x).backward()
            preconditioner.step()
            if step == 0:
                with torch.no_grad():
                    for q, w in zip(module.parameters(), build("linear")[0].parameters(), strict=True):
                        q.copy_(w)
    for a, b in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad) and a.grad.isfinite().all()
    assert (p.diagnostics()["coarse_fallbacks"], p.diagnostics()["skipped"]) == (1, 1)


def test_layers_that_rest_and_rows_of_zeros_count_for_nothing():
    a, b, c = (nn.Linear(3, 3).double() for _ in range(3))
    net = nn.ModuleList([a, b, c])
    p = mk.TwoLevelKFAC(net, DAMPING, coarse_space="krylov_residual", kl_clip=None)
    x = torch.randn(6, 3, dtype=F64)
    b(torch.tanh(a(x))).square().sum().backward()
    p.step()
    assert c.weight.grad is None
    d = p.diagnostics()
    assert d["coarse_fallbacks"] == 0 and d["coarse_gain"] > 0


def test_factors_rest_and_the_correction_goes_on():
    net, x = build("linear")
    p = mk.TwoLevelKFAC(net, DAMPING, factor_update_steps=3, inv_update_steps=3)
    for _ in range(4):
        net.zero_grad()
        loss_of(net, x).backward()
        p.step()
        assert p.diagnostics()["coarse_gain"] > 0
    assert p.fisher.seen == 2


@pytest.mark.parametrize("space", SPACES)
def test_resumes_bit_for_bit(space):
    def steps(net: nn.Module, p: mk.TwoLevelKFAC, count: int) -> None:
        _, x = build("linear")
        for _ in range(count):
            net.zero_grad()
            loss_of(net, x).backward()
            p.step()
            with torch.no_grad():
                for q in net.parameters():
                    q -= 0.1 * q.grad

    net, _ = build("linear")
    p = mk.TwoLevelKFAC(net, DAMPING, coarse_space=space, inv_update_steps=3)
    steps(net, p, 2)
    other = copy.deepcopy(net)
    q = mk.TwoLevelKFAC(other, DAMPING, coarse_space=space, inv_update_steps=3)
    q.load_state_dict(copy.deepcopy(p.state_dict()))
    steps(net, p, 3)
    steps(other, q, 3)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert p.diagnostics() == q.diagnostics()


def test_no_state_between_a_backward_pass_and_its_step():
    net, x = build("linear")
    p = mk.TwoLevelKFAC(net, DAMPING)
    loss_of(net, x).backward()
    with pytest.raises(RuntimeError, match="between a backward pass and its step"):
        p.state_dict()


def test_inputs_that_are_overwritten_before_the_step():
    net, x = build("linear")
    p = mk.TwoLevelKFAC(net, DAMPING)
    loss_of(net, x).backward()
    x.zero_()
    with pytest.raises(RuntimeError, match="the input of 0, or its output's gradient, was written to"):
        p.step()


def test_a_space_of_ten_lines():
    class Signs(mk.CoarseSpace):
        def rows(self, step):
            return [[g.sign() for g in step.gradients]]

    case = Case("linear", coarse_space=Signs())
    assert case.norm(case.first) - case.norm(case.step) == pytest.approx(case.p.diagnostics()["coarse_gain"], rel=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"coarse_space": "coarse"},
            "coarse_space: expected one of nicolaides, .*, tselepidis, a CoarseSpace or rows, got 'coarse'",
        ),
        ({"combination": "added"}, "combination: expected one of corrected, .*, got 'added'"),
        ({"combination": "balanced", "omega": 0.5}, 'omega: expected 1 with combination "balanced", got 0.5'),
        (
            {"combination": "additive", "coarse_space": "tselepidis"},
            'combination: expected "corrected" with "tselepidis"',
        ),
        ({"omega": 0.0}, "omega: expected a positive number, got 0.0"),
        ({"omega": math.nan}, "omega: expected a positive number, got nan"),
        ({"fisher_batch": 0.0}, r"fisher_batch: expected a number in \(0, 1\], got 0.0"),
        ({"fisher_batch": 2}, r"fisher_batch: expected a number in \(0, 1\], got 2"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        mk.TwoLevelKFAC(build("linear")[0], **options)
