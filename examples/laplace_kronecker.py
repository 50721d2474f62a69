"""laplace-torch's Kronecker Laplace approximation on these kernels: `python -m examples.laplace_kronecker`.

Its curvlinops backend takes the factors of :class:`curvlinops.KFACLinearOperator`; inside ``on_our_kernels`` they are
computed here, and nothing of laplace-torch changes.
"""

from __future__ import annotations

import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsEF
from torch import Tensor, nn

from examples._timing import before_and_after
from examples.curvlinops_factors import on_our_kernels


def posterior(model: nn.Module, data: torch.utils.data.DataLoader[tuple[Tensor, ...]]) -> Laplace:
    """A Laplace approximation of all weights, with the empirical Fisher in Kronecker factors."""
    approximation = Laplace(model, "classification", "all", "kron", backend=CurvlinopsEF)
    approximation.fit(data)
    return approximation


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    dataset = torch.utils.data.TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(10, (64,)))
    data = torch.utils.data.DataLoader(dataset, batch_size=32)

    def ours() -> Laplace:
        with on_our_kernels():
            return posterior(model, data)

    got, want = ours(), posterior(model, data)
    evidence = float(want.log_marginal_likelihood())
    difference = abs(float(got.log_marginal_likelihood()) - evidence) / abs(evidence)
    print(f"log marginal likelihood {evidence:.2f}: relative error {difference:.1e}")
    x = dataset.tensors[0][:8]
    print(f"predictive probabilities: largest error {float((got(x) - want(x)).abs().max()):.1e}")
    print(f"fit: {before_and_after(lambda: posterior(model, data), ours, rounds=3)}")


if __name__ == "__main__":
    main()
