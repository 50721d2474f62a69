"""K-BFGS: the inverses of both Kronecker factors, kept by quasi-Newton updates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mfac_kernels.fisher._bfgs import InverseFactors, Pair
from mfac_kernels.preconditioners._covered import CoveredLayer, covered_row
from mfac_kernels.preconditioners._kept import Closure, Kept, KeptPreconditioner
from mfac_kernels.preconditioners._memory import factor_text
from mfac_kernels.preconditioners.base import Hyperparameter
from mfac_kernels.preconditioners.layers.base import Add, Layer
from mfac_kernels.preconditioners.layers.convolution import ConvLayer
from mfac_kernels.preconditioners.layers.maps import ConvolutionMap, LinearMap


class KBFGS(KeptPreconditioner):
    """Replaces gradients by H_B dW H_A, with H_A near (A + ..)^-1 and H_B near the inverse of a Hessian's factor.

        preconditioner = mk.KBFGS(model, damping=0.1, lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss_function(model(x), y).backward()

        closure()
        preconditioner.step(closure)
        optimizer.step()

    With a the inputs of a layer, g its output gradients (as :class:`KFAC`'s), h its outputs, S its positions, and bars
    for means over samples and positions, a step is

        p        H_B dW H_A, with what the last steps have left
        A        the average of (1/N) sum_{n,s} a a^T
        H_A      BFGS with s = H_A abar, y = (A + sqrt(damping S) I) s; at first the inverse of that matrix
        h+, g+   of the same batch with the weights W - lr p, from a second forward and backward pass: the closure
        H_B      BFGS with averages of s = hbar+ - hbar and y = gbar+ - gbar, damped twice; at first I
                 s <- theta s + (1 - theta) H_B y, theta the largest of [0, 1] for which s^T y >= mu y^T H_B y
                 y <- y + sqrt(damping / S) s

    and BFGS is the symmetric update of H with H y = s. No matrix is inverted but in the first step, and outputs need no
    hooks: hbar+ - hbar = W+ abar+ - W abar. The weights are put back and the gradients are p, so that any optimizer
    may follow; with plain SGD of rate lr the trial weights are those that it sets. What the second pass does besides
    is done twice: running statistics of batch normalization, random numbers of dropout.

    The authors' program for linear layers (renyiryry/kbfgs_neurips2020_public) has the same pairs, averages, trial
    weights, first matrices and theta. Apart from these: y becomes theta y + (1 - theta) s, and only where s^T y is less
    than sqrt(damping) s^T s, in place of y + sqrt(damping / S) s; updates with s^T y <= 1e-4 s^T s |gbar| are left out,
    here those with s^T y <= 0; the mean input has its own mean in the bias's place, here 1; A begins with a pass over
    the data, here with the first batch and debiased, so that the first step's H_A is I; momentum is of gradients before
    they are preconditioned. The powers of S are those of the extension to convolutions.

    Covered: linear layers and convolutions. A batch that is not finite, in either pass, changes nothing and is counted.

    Args:
        lr: of the trial weights, and for kl_clip: the optimizer's learning rate, > 0.
        pair_decay: of the moving averages of s and y for H_B, in [0, 1).
        mu: as above, in (0, 1).

    The others are :class:`KFAC`'s: damping, factor_update_steps (other steps leave H alone and need no closure),
    factor_decay, kl_clip, accumulation_steps, loss_average, include, skip_layers, scaler, gather, batch_size,
    batch_dim, max_layer_bytes.

    Sources: Goldfarb, Ren, Bahamou, "Practical quasi-Newton methods for training deep neural networks", NeurIPS 2020;
    Ren, Bahamou, Goldfarb, "Kronecker-factored quasi-Newton methods for deep learning", 2021.

    Raises:
        TypeError, ValueError: an argument outside its range; no layer, or one too large.
        RuntimeError: several processes.
    """

    _owner = "KBFGS"

    def __init__(
        self,
        model: nn.Module,
        damping: Hyperparameter = 1e-1,
        *,
        lr: Hyperparameter = 0.1,
        pair_decay: float = 0.9,
        mu: float = 0.2,
        **options: Any,
    ) -> None:
        if not 0 <= pair_decay < 1:
            raise ValueError(f"pair_decay: expected a number in [0, 1), got {pair_decay}")
        if not 0 < mu < 1:
            raise ValueError(f"mu: expected a number in (0, 1), got {mu}")
        for name in ("fisher_type", "normalization", "inv_update_steps"):
            if name in options:
                raise TypeError(f"KBFGS: unexpected argument {name}")
        if options.get("loss_average") == "positions":
            raise ValueError('loss_average: expected "batch" or "sum", got "positions"')
        super().__init__(model, damping, lr=lr, normalization="skip", **options)
        self.pair_decay, self.mu = pair_decay, mu
        self.factors = InverseFactors([layer.shape for layer in self._layers], self._dtype, self._device)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:
        """Precondition the gradients in place: those of modules that were not called stay zero or None.

        Args:
            closure: the forward and backward passes of the batch again, each of them; may set gradients to zero first.

        Raises:
            TypeError: no closure, in a step that has use for one.
            ValueError: a hyper-parameter's function returned a value out of range.
            RuntimeError: a parameter that was frozen at construction is trained; the closure reaches other layers than
                the passes before. Nothing changes in any case, but after an error of the closure the batch is to be
                repeated.
        """
        damping, decay, clip, gradients = self._begin()
        lr = self._at_step("lr")
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"lr: expected a positive number, got {lr}")
        if self._factors_due and closure is None:
            raise TypeError("closure: expected a function that repeats the batch's passes, got None")
        kept = self._kept()
        updates = self._bounded(gradients, self.factors.apply(gradients), clip)
        before = None if kept is None else self._means(kept, True)
        if before and closure is not None:
            after = self._after(closure, updates, lr)
            if after.keys() != before.keys():
                names = [self._layers[i].title for i in before.keys() ^ after.keys()]
                raise RuntimeError(f"closure: expected passes through the same layers, got others: {', '.join(names)}")
            self._learn(before, after, damping, decay)
        self._finish(updates)
        self._rest()

    # ---- both passes -----------------------------------------------------------------------------------------------

    def _means(self, kept: Kept, covariance: bool) -> dict[int, Means]:
        called = sorted({call.layer for call in kept.jacobian.calls})
        return {i: Means(self._layers[i], i, kept, covariance) for i in called}

    def _after(self, closure: Closure, updates: list[Tensor], lr: float) -> dict[int, Means]:
        """The means of the closure's passes at W - lr p; weights and gradients are as before in the end."""
        layers = self._layers
        everything = list(self._model.parameters())
        gradients = [q.grad for q in everything]
        weights = [q.detach().clone() for layer in layers for q in layer.parameters()]
        try:
            for q in everything:
                q.grad = None
            for layer, update in zip(layers, updates, strict=True):
                layer.move(update, -lr)
            self._gatherer.begin()
            with torch.enable_grad():
                closure()
            jacobian = self._batch.jacobian(self._output_scale(), self._dtype, self._device)
            return self._means(Kept(layers, jacobian), False)
        finally:
            torch._foreach_copy_([q.data for layer in layers for q in layer.parameters()], weights)
            for q, gradient in zip(everything, gradients, strict=True):
                q.grad = gradient

    def _learn(self, before: dict[int, Means], after: dict[int, Means], damping: float, decay: float) -> None:
        pairs = [
            Pair(m.covariance, m.input, after[i].output - m.output, after[i].gradient - m.gradient, m.positions)
            for i, m in before.items()
        ]
        finite = torch.stack([m.finite for both in (before, after) for m in both.values()]).all()
        accepted = self.factors.update(list(before), pairs, damping, decay, self.pair_decay, self.mu, finite)
        self._count(accepted)

    # ---- what it keeps ---------------------------------------------------------------------------------------------

    def _unusable(self, layer: Layer) -> str | None:
        shape = layer.shape
        usable = isinstance(layer.linear_map(), LinearMap | ConvolutionMap)
        return None if usable and not (shape.two_uses or shape.exchanged) else "no linear layer and no convolution"

    def _row(self, layer: Layer) -> CoveredLayer:
        a, b = layer.shape.input_factor, layer.shape.output_factor
        elements = 2 * math.prod(a) + math.prod(b)  # A, H_A; H_B
        return covered_row(layer, factor_text(a), factor_text(b), self._dtype.itemsize * elements)

    def diagnostics(self) -> dict[str, float]:
        """Also updates of H_A and H_B since the start that were left out, as s^T y was not positive, or not finite."""
        return {**super().diagnostics(), "updates_left_out": int(self.factors.left_out)}

    def _state(self) -> dict[str, Any]:
        return self.factors.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.factors.started = state_dict["state"]["started"].tolist()


class Means:
    """Of a layer over the passes of a step.

    covariance: (1/N) sum a a^T (groups, columns, columns), if asked for; input: abar (groups, columns); output: hbar,
    less a bias that is not trained, and gradient: gbar (groups, outputs); positions: S.
    """

    def __init__(self, layer: Layer, i: int, kept: Kept, covariance: bool) -> None:
        shape = layer.shape
        dtype, device = kept.jacobian.dtype, kept.jacobian.device
        count = (shape.groups, shape.outputs)
        self.covariance = torch.zeros(shape.input_factor if covariance else 0, dtype=dtype, device=device)
        self.input = torch.zeros(shape.groups, shape.columns, dtype=dtype, device=device)
        self.gradient = torch.zeros(count, dtype=dtype, device=device)
        refused = torch.zeros(1, dtype=torch.int32, device=device)
        of_layer = layer.linear_map()
        assert isinstance(of_layer, LinearMap | ConvolutionMap)
        one_output = replace(of_layer, outputs=shape.groups)
        total = 0
        for n, call in enumerate(kept.of(i)):
            g = kept.scaled(call, math.sqrt(kept.samples))
            spatial = isinstance(layer, ConvLayer)
            flat = g.flatten(2).sum(2) if spatial else g.reshape(len(g), -1, g.shape[-1]).sum(1)
            self.gradient += flat.sum(0).view(count)
            ones = g[:, : shape.groups] if spatial else g[..., :1]
            self.input += one_output.weight_gradient(call.inputs, torch.ones_like(ones))
            total += len(g) * layer.positions(g)
            if covariance:
                factor = self.covariance[0] if shape.groups == 1 else self.covariance
                layer.add_inputs(factor, call.inputs, Add(min(n, 1), 1 / kept.samples, refused))
        self.positions = total / kept.samples
        self.input /= total
        self.gradient /= total
        self.finite = refused[0] == 0
        weights = layer.matrix().to(dtype).view(shape.groups, shape.outputs, shape.columns)
        self.output = (weights @ self.input[..., None])[..., 0]
