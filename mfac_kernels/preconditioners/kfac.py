"""K-FAC as a preconditioner beside any torch optimizer."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mfac_kernels.fisher._checks import positive_int
from mfac_kernels.fisher._state import check_entries
from mfac_kernels.fisher.kronecker import KroneckerFisher
from mfac_kernels.preconditioners._distributed import average_sums, share_refresh
from mfac_kernels.preconditioners.base import Hyperparameter, Preconditioner, own_gradients
from mfac_kernels.preconditioners.layers.base import Add, Approximation, Normalization, Options, Spatial
from mfac_kernels.preconditioners.layers.find import ASKED, NOT_INCLUDED, SKIPPED, find_layers
from mfac_kernels.preconditioners.layers.normalization import NormalizationLayer

LossAverage = Literal["batch", "positions", "sum"]


class KFAC(Preconditioner):
    """Replaces the gradients of a model's layers by (B + ..)^-1 dW (A + ..)^-1 with Kronecker factors of their Fisher
    blocks.

        preconditioner = mk.KFAC(model, damping=1e-3, inv_update_steps=10)
        loss_function(model(x), y).backward()
        preconditioner.step()
        optimizer.step()

    Hooks gather the factors while the model is in training mode: A from the inputs of a layer, B from the gradients
    of its outputs, both without forming patches. With N samples, S positions of a layer's output and g = N times the
    gradient of the mean loss,

        expand   A = (1/N) sum_{n,s} a a^T                B = (1/(N S)) sum_{n,s} g g^T
        reduce   A = (1/N) sum_n (sum_s a)(sum_s a)^T     B = (1/N) sum_n (mean_s g)(mean_s g)^T

    so that B (x) A is the expected Fisher block of the mean loss. A batch that is not finite (an overflow under a
    GradScaler) changes nothing and is counted. Nothing in a step waits for the device, but for the eigenvalues of
    ``damping_style="exact"``. What has seen no batch yet keeps its gradient.

    Covered: Linear with any leading dimensions, Conv1d, Conv2d, Conv3d with any groups and padding, Embedding, and the
    normalization layers. What else is trained keeps its gradient; one warning lists it. Models under ``torch.compile``
    work if the preconditioner is made before their first call.

    Args:
        model: inputs and outputs of its modules have the samples in the first dimension.
        damping: > 0.
        factor_update_steps: gather factors every so many steps.
        inv_update_steps: invert them every so many steps.
        factor_decay: of the factors' moving averages, in [0, 1). Averages are debiased.
        kl_clip: scale the update u by min(1, sqrt(kl_clip / (lr^2 <u, gradient>))); None: do not.
        lr: the optimizer's learning rate, for kl_clip alone.
        accumulation_steps: backward passes before a step, of equal batches, the loss divided by their number.
        spatial: ``"full"``, or ``"sua"``: a convolution's pixels are taken for uncorrelated, A is over channels alone.
        group_size: block size of block-diagonal factors, for both, or (for A, for B) with None for dense. Layers of
            grouped convolutions keep one factor for each group.
        approximation: ``"expand"`` or ``"reduce"``.
        fisher_type: ``"empirical"``: B from the gradients of the loss. ``"mc"``: from those of labels drawn from the
            model: run their backward pass inside :meth:`sampling`.
        pi_correction: divide the damping between A and B by their mean eigenvalues; else evenly.
        damping_style: ``"factored"``, or ``"exact"``: B (x) A + damping I, in the eigenbasis.
        eigen_correction: EKFAC: re-estimate the eigenvalues; needs ``damping_style="exact"``.
        loss_average: what the loss is: ``"batch"``, a mean over samples of sums over positions; ``"positions"``, a mean
            over samples and positions, as of the tokens of a language model, which then count as samples; ``"sum"``.
        normalization: blocks of normalization layers: ``"unit"`` (2 x 2), ``"diagonal"`` or ``"skip"``.
        include: patterns (``fnmatch``) of the names of modules to precondition; None: all.
        skip_layers: patterns of those to leave alone.
        scaler: the ``torch.amp.GradScaler`` that scales the loss. Call ``scaler.unscale_(optimizer)`` before
            :meth:`step`.

    damping, factor_decay, kl_clip and lr may be functions of the step.

    Sources: Martens, Grosse, ICML 2015; Grosse, Martens, ICML 2016; Laurent et al., ICLR workshop 2018; Eschenhagen et
    al., NeurIPS 2023.

    Raises:
        TypeError, ValueError: an argument outside these ranges, a model without a layer to precondition.
    """

    def __init__(
        self,
        model: nn.Module,
        damping: Hyperparameter = 1e-3,
        *,
        factor_update_steps: int = 1,
        inv_update_steps: int = 1,
        factor_decay: Hyperparameter = 0.95,
        kl_clip: Hyperparameter | None = 1e-3,
        lr: Hyperparameter = 0.1,
        accumulation_steps: int = 1,
        spatial: Spatial = "full",
        group_size: int | tuple[int | None, int | None] | None = None,
        approximation: Approximation = "expand",
        fisher_type: Literal["empirical", "mc"] = "empirical",
        pi_correction: bool = True,
        damping_style: Literal["factored", "exact"] = "factored",
        eigen_correction: bool = False,
        loss_average: LossAverage = "batch",
        normalization: Normalization = "unit",
        include: Sequence[str] | None = None,
        skip_layers: Sequence[str] = (),
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__()
        _one_of("spatial", spatial, ("full", "sua"))
        _one_of("approximation", approximation, ("expand", "reduce"))
        _one_of("fisher_type", fisher_type, ("empirical", "mc"))
        _one_of("loss_average", loss_average, ("batch", "positions", "sum"))
        _one_of("normalization", normalization, ("unit", "diagonal", "skip"))
        if eigen_correction and spatial == "sua":
            raise ValueError('eigen_correction: expected spatial "full", got "sua"')
        self._model = model
        self.damping, self.factor_decay, self.kl_clip, self.lr = damping, factor_decay, kl_clip, lr
        self.factor_update_steps = positive_int("factor_update_steps", factor_update_steps)
        self.inv_update_steps = positive_int("inv_update_steps", inv_update_steps)
        self.accumulation_steps = positive_int("accumulation_steps", accumulation_steps)
        self.fisher_type, self.loss_average, self.scaler = fisher_type, loss_average, scaler
        input_block, output_block = group_size if isinstance(group_size, tuple) else (group_size, group_size)
        options = Options(spatial, approximation, input_block, output_block)

        def unwanted(name: str, module: nn.Module) -> str | None:
            if include is not None and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
                return NOT_INCLUDED
            return SKIPPED if any(fnmatch.fnmatchcase(name, p) for p in skip_layers) else None

        self._layers, self.skipped_layers = find_layers(model, options, normalization, unwanted)
        if not self._layers:
            raise ValueError(f"model: expected layers to precondition, found none; left alone: {self.skipped_layers}")
        unasked = {n: why for n, why in self.skipped_layers.items() if why not in ASKED}
        if unasked:
            listed = "; ".join(f"{name}: {why}" for name, why in unasked.items())
            warnings.warn(f"KFAC leaves the gradients of these modules as they are: {listed}", stacklevel=2)
        weight = self._layers[0].weight
        self.fisher = KroneckerFisher(
            [layer.shape for layer in self._layers],
            self._at_step("damping"),
            factor_decay=self._decay(),
            style=damping_style,
            pi_correction=pi_correction,
            eigen_correction=eigen_correction,
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
            device=weight.device,
        )
        self._sampling = False
        self._calls = [_Calls() for _ in self._layers]
        self._hooks = [
            layer.module.register_forward_hook(_Capture(self, i), with_kwargs=True)
            for i, layer in enumerate(self._layers)
        ]

    # ---- gathering -------------------------------------------------------------------------------------------------

    @property
    def gathering(self) -> bool:
        """Whether backward passes before the next step gather factors."""
        return self.steps % self.factor_update_steps == 0

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Backward passes inside are those of labels drawn from the model: they give B and leave ``.grad`` as it was.

        logits = model(x)
        with preconditioner.sampling():
            labels = torch.distributions.Categorical(logits=logits.detach()).sample()
            cross_entropy(logits, labels).backward(retain_graph=True)
        cross_entropy(logits, y).backward()
        """
        parameters = list(self._model.parameters())
        gradients = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        self._sampling = True
        try:
            yield
        finally:
            self._sampling = False
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient

    def remove_hooks(self) -> None:
        """Detach from the model."""
        for hook in self._hooks:
            hook.remove()

    def _on_forward(self, i: int, x: Tensor, output: Tensor) -> None:
        layer, calls = self._layers[i], self._calls[i]
        if not (self.gathering and self._model.training and torch.is_grad_enabled() and output.requires_grad):
            return
        x = x.detach()
        if not calls.begin(layer.positions(output)):
            return
        if not isinstance(layer, NormalizationLayer):
            samples = len(x) * (layer.positions(output) if self.loss_average == "positions" else 1)
            alpha = 1 / max(1, self.accumulation_steps * samples)
            with torch.no_grad():
                self.fisher.add_inputs(
                    i, lambda total, beta: layer.add_inputs(total, x, Add(beta, alpha, self.refused))
                )
        # Inputs outlive the forward pass only where they are needed again.
        kept = x if isinstance(layer, NormalizationLayer) or self.fisher.eigen_correction else None
        samples = len(x)
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self._on_backward(i, samples, kept, gradient)
        )

    def _on_backward(self, i: int, samples: int, x: Tensor | None, gradient: Tensor) -> None:
        if self._sampling != (self.fisher_type == "mc"):
            return
        layer, gradient = self._layers[i], gradient.detach()
        positions = max(1, self._calls[i].end())
        by_position = self.loss_average == "positions"
        if by_position:  # those of this call count as samples
            own = max(1, layer.positions(gradient))
            samples, positions = samples * own, max(1, positions // own)
        # With c what arrives here, g = steps N c for a mean and g = c for a sum; the sum over g g^T / (steps N S) is
        # due.
        steps = self.accumulation_steps * samples
        scale = steps if self.loss_average != "sum" else 1 / max(1, steps)
        with torch.no_grad():
            if isinstance(layer, NormalizationLayer):
                assert x is not None
                rows = layer.block_rows(x, gradient, by_position)
                self.fisher.add_inputs(
                    i, lambda total, beta: layer.add_block(total, rows, Add(beta, scale, self.refused))
                )
            self.fisher.add_outputs(
                i,
                lambda total, beta: layer.add_outputs(total, gradient, Add(beta, scale / positions, self.refused)),
            )
            if self.fisher.eigen_correction and not isinstance(layer, NormalizationLayer):
                assert x is not None
                self.fisher.add_moments(i, *layer.rows(x, gradient), scale)

    @property
    def refused(self) -> Tensor:
        return self.fisher.refused

    # ---- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Precondition the gradients in place: those of modules that were not called stay zero or None.

        Raises:
            ValueError: a hyper-parameter's function returned a value out of range. Nothing changes.
        """
        damping, decay = self._at_step("damping"), self._decay()
        clip = self._clip()
        if not damping > 0:
            raise ValueError(f"damping: expected a positive number, got {damping}")
        own_gradients(p for layer in self._layers for p in layer.module.parameters(recurse=False))
        self.fisher.damping, self.fisher.factor_decay = damping, decay
        if self.gathering:
            average_sums(self.fisher)
            self.fisher.update(self._output_scale())
        if self.steps % self.inv_update_steps == 0:
            share_refresh(self.fisher)
        for calls in self._calls:
            calls.reset()
        gradients = [layer.gradient() for layer in self._layers]
        updates = self.fisher.ihvp(gradients)
        if clip is not None:
            product = torch.stack([(u * g).sum() for u, g in zip(updates, gradients, strict=True)]).sum()
            torch._foreach_mul_(updates, (clip / product.clamp(min=0)).sqrt().clamp(max=1.0))
        for layer, update in zip(self._layers, updates, strict=True):
            layer.assign(update)
        self.steps += 1

    def _output_scale(self) -> Tensor | None:
        """1 / scale^2 of the loss, on the device."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        scale = self.scaler._get_scale_async()
        return None if scale is None else scale.double().reciprocal().square()

    def _clip(self) -> float | None:
        """What bounds <u, gradient>; None: nothing does, as where the learning rate is 0."""
        if self.kl_clip is None:
            return None
        kl_clip, lr = self._at_step("kl_clip"), self._at_step("lr")
        if not kl_clip > 0:
            raise ValueError(f"kl_clip: expected a positive number or None, got {kl_clip}")
        if not lr >= 0:
            raise ValueError(f"lr: expected a number >= 0, got {lr}")
        return kl_clip / lr**2 if lr > 0 else None

    def _decay(self) -> float:
        decay = self._at_step("factor_decay")
        if not 0 <= decay < 1:
            raise ValueError(f"factor_decay: expected a number in [0, 1), got {decay}")
        return decay

    def diagnostics(self) -> dict[str, float]:
        """steps; seen and skipped batches; what became of the blocks: :meth:`KroneckerFisher.diagnostics`."""
        return {"steps": self.steps, **self.fisher.diagnostics()}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "fisher": self.fisher.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_entries("state_dict", ("steps", "fisher"), state_dict)
        steps = int(state_dict["steps"])
        self.fisher.load_state_dict(state_dict["fisher"])
        self.steps = steps


class _Capture:
    """A forward hook that ``torch.compile`` leaves to the interpreter."""

    def __init__(self, preconditioner: KFAC, layer: int) -> None:
        self.preconditioner, self.layer = preconditioner, layer

    @torch.compiler.disable
    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
        x = arguments[0] if arguments else next(iter(keywords.values()))
        self.preconditioner._on_forward(self.layer, x, output)


class _Calls:
    """Positions of a sample over all calls of a module in one forward pass: they share its weights as positions do."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.positions, self.returned, self.recomputed = 0, False, True

    def begin(self, positions: int) -> bool:
        """Whether this call counts: not so if a backward pass repeats a call that has been counted (checkpointing)."""
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self.recomputed:
            return False
        if self.returned and not in_backward:  # the backward pass of an earlier batch is behind us
            self.reset()
        self.positions += positions
        self.recomputed = in_backward
        return True

    def end(self) -> int:
        self.returned = True
        return self.positions


def _one_of(name: str, value: object, values: tuple[str, ...]) -> None:
    if value not in values:
        raise ValueError(f"{name}: expected one of {', '.join(values)}, got {value!r}")
