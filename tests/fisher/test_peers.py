"""The same factors as other libraries compute: curvlinops, nngeometry and einconv.

Each splits N (samples) and S (positions) between A and B in a way of its own; what must agree is B (x) A. They are
installed by `make test`, without what they depend on and do not import.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels import ops

N, CLASSES = 6, 4


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Conv2d(4, 5, 2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(20, CLASSES),
    ).double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, 6, 6, generator=generator).double(), torch.arange(N) % CLASSES


def expected_factors(net: nn.Sequential, x: Tensor, **options: object) -> mk.KFAC:
    """B in expectation over the model's labels: a backward pass for each label k, weighted by sqrt(p_k)."""
    p = mk.KFAC(net, kl_clip=None, fisher_type="mc", **options)
    log_p = net(x).log_softmax(1)
    with p.sampling():
        for k in range(CLASSES):
            loss = -(log_p[:, k].detach().exp().sqrt() * log_p[:, k]).mean()
            loss.backward(retain_graph=True)
    net.zero_grad()
    log_p.sum().backward()
    p.step()
    return p


def empirical_factors(net: nn.Sequential, x: Tensor, y: Tensor, **options: object) -> mk.KFAC:
    p = mk.KFAC(net, kl_clip=None, **options)
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    p.step()
    return p


def block(p: mk.KFAC, layer: int) -> Tensor:
    """B (x) A with the parameters in torch's order: the whole weight, then the bias."""
    (a,), (b,) = p.fisher.factors(layer)
    outputs, columns = len(b), len(a)
    matrix = torch.kron(b, a)
    if p.fisher.shapes[layer].bias:
        index = torch.arange(outputs * columns).view(outputs, columns)
        order = torch.cat([index[:, :-1].flatten(), index[:, -1]])
        matrix = matrix[order[:, None], order]
    return matrix


@pytest.mark.parametrize("fisher_type", ["empirical", "type-2"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_curvlinops_agrees_on_a_whole_network(batch, approximation, fisher_type):
    curvlinops = pytest.importorskip("curvlinops")
    net, (x, y) = cnn(), batch
    if fisher_type == "empirical":
        p = empirical_factors(net, x, y, approximation=approximation)
    else:
        p = expected_factors(net, x, approximation=approximation)
    theirs = curvlinops.KFACLinearOperator(
        net,
        nn.CrossEntropyLoss(),
        list(net.parameters()),
        [(x, y)],
        fisher_type=fisher_type,
        kfac_approx=approximation,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    dense = torch.as_tensor(theirs @ torch.eye(theirs.shape[1], dtype=torch.float64))
    ours = torch.block_diag(*(block(p, layer) for layer in range(3)))
    torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-12)


@pytest.fixture
def float64_by_default():
    """nngeometry makes tensors of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64_by_default")
def test_nngeometry_agrees_on_a_whole_network(batch):
    metrics = pytest.importorskip("nngeometry.metrics")
    from nngeometry.object import PMatKFAC

    net, (x, y) = cnn(), batch
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=N)
    theirs = metrics.FIM(net, loader, PMatKFAC, variant="classif_logits")
    p = expected_factors(net, x)
    for layer, (a, b) in enumerate(theirs.data.values()):
        (our_a,), (our_b,) = p.fisher.factors(layer)
        torch.testing.assert_close(torch.kron(our_b, our_a), torch.kron(b, a), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_einconv_agrees_on_grouped_convolutions(groups):
    """Up to 1 / N, which einconv rounds to float32: here it is a power of two."""
    kfc = pytest.importorskip("einconv.expressions.convNd_kfc")
    x = torch.randn(4, 4, 7, 6, generator=torch.Generator().manual_seed(2)).double()
    equation, operands, shape = kfc.einsum_expression(x, 3, stride=2, padding=1, groups=groups)
    theirs = torch.einsum(equation, *operands).reshape(shape)
    ours = torch.zeros(shape, dtype=torch.float64)
    ops.conv2d_factor_(ours, x, 3, stride=2, padding=1, groups=groups, alpha=1 / len(x))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
