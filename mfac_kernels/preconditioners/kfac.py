"""K-FAC as a preconditioner beside any torch optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mfac_kernels.fisher._checks import one_of
from mfac_kernels.fisher._state import check_entries
from mfac_kernels.fisher.kronecker import Approximate, KroneckerFisher
from mfac_kernels.preconditioners._construction import check_approximate
from mfac_kernels.preconditioners._coverage import Coverage
from mfac_kernels.preconditioners._covered import covered, kronecker_row
from mfac_kernels.preconditioners._distributed import ProcessGroup, Ranks
from mfac_kernels.preconditioners._gathered import GatheringPreconditioner
from mfac_kernels.preconditioners._gathering import Gatherer
from mfac_kernels.preconditioners._memory import check_memory
from mfac_kernels.preconditioners._sizes import Counting, Gather, LossAverage
from mfac_kernels.preconditioners.base import Hyperparameter
from mfac_kernels.preconditioners.layers.base import Approximation, Layer, Normalization, Options, Spatial
from mfac_kernels.preconditioners.layers.find import Names
from mfac_kernels.preconditioners.layers.forms import Form, blocks_by_name
from mfac_kernels.preconditioners.layers.kinds import register


class KFAC(GatheringPreconditioner):
    """Replaces the gradients of a model's layers by (B + ..)^-1 dW (A + ..)^-1 with Kronecker factors of their Fisher
    blocks.

        preconditioner = mk.KFAC(model, damping=1e-3, inv_update_steps=10)
        loss_function(model(x), y).backward()
        preconditioner.step()
        optimizer.step()

    With N samples, S positions of a layer over all its calls and g = N times the gradient of the mean loss,

        expand   A = (1/N) sum_{n,s} a a^T                B = (1/(N S)) sum_{n,s} g g^T
        reduce   A = (1/N) sum_n (sum_s a)(sum_s a)^T     B = (1/N) sum_n (mean_s g)(mean_s g)^T

    so that B (x) A is the expected Fisher block of the mean loss. Neither forms patches.

    A call of a layer in training mode enters both factors when a backward pass reaches its output, if that pass also
    computes the gradient of the weight. So derivatives with respect to inputs are no part of the factors, nor are calls
    whose outputs are dropped, and checkpoints change nothing; B has the whole gradient that arrives at an output, but
    not what a penalty on derivatives sends to the weights by a way of its own. Calls of one pass share a sum, passes
    before a step are averaged. Several passes through one forward pass are one, with a B of each: with
    ``fisher_type="mc"`` A enters with the first pass of :meth:`sampling`. What trains the weights and is no training,
    as the second pass of SAM, belongs inside :meth:`paused`.

    A batch that is not finite (an overflow under a GradScaler) changes nothing and is counted; one without samples is
    as if there were none. Nothing in a step waits for the device, but for eigenvalues: ``damping_style="exact"``,
    ``approximate="deflation"``.
    What has seen no batch yet keeps its gradient, and is named in one warning if it has one.

    Covered: Linear with any leading dimensions, Conv1d, Conv2d, Conv3d with any groups and padding, their transposes
    (:class:`mk.layers.ConvTransposeLayer`), Embedding, one whose weight is a head's too (:class:`mk.layers.TiedLayer`),
    normalization layers, the four projections of MultiheadAttention, each as a Linear, Conv1D of the transformers
    library, and what is :meth:`registered <register>`. What else is trained keeps its gradient; one warning lists it.
    Models under ``torch.compile`` work if the preconditioner is made before their first call. The model does not keep
    the preconditioner alive, and its copies come without one.

    Args:
        model: inputs and outputs of its modules have the samples in the first dimension, or see ``batch_dim``.
        damping: > 0.
        factor_update_steps: gather factors every so many steps.
        inv_update_steps: invert them every so many steps; a batch that is refused is a step too.
        factor_decay: of the factors' moving averages, in [0, 1). Averages are debiased.
        kl_clip: scale the update u by min(1, sqrt(kl_clip / (lr^2 <u, gradient>))); None: do not.
        lr: the optimizer's learning rate, for kl_clip alone.
        accumulation_steps: backward passes before a step, of equal batches, the loss divided by their number.
        spatial: ``"full"``, or ``"sua"``: a convolution's pixels are taken for uncorrelated, A is over channels alone.
        group_size: block size of block-diagonal factors, for both, or (for A, for B) with None for dense. Layers of
            grouped convolutions keep one factor for each group.
        input, output: the form of A, of B, by patterns (``fnmatch``) of the names of modules, the first that fits, in
            place of ``group_size``: ``"diagonal"``, a block size, or None for dense.
        approximation: ``"expand"`` or ``"reduce"``.
        approximate: ``"kfac"``; ``"tkfac"``, ``"kpsvd"``: the product B (x) A that has the partial traces of the block
            (1/N) sum g g^T (x) a a^T, or that is nearest to it in the Frobenius norm, found by a power iteration a
            batch (:mod:`mfac_kernels.fisher._pairs`); ``"deflation"``: that one and a second, which is nearest to what
            it leaves. These form a convolution's patches. Not with a weight that is both an embedding's and a head's;
            blocks of normalization layers are exact with all of them. The sum of two products is inverted exactly, by
            joint eigenvalues, with the damping of ``"factored"`` in the first one; where it is not positive it is
            raised to the damping (:class:`mfac_kernels.fisher._joint_bases.JointBases`), and
            :meth:`diagnostics` says how often.
        fisher_type: ``"empirical"``: B from the gradients of the loss. ``"mc"``: from those of labels drawn from the
            model: run their backward pass inside :meth:`sampling`.
        pi_correction: divide the damping between A and B by their mean eigenvalues; else evenly.
        damping_style: ``"factored"``, or ``"exact"``: B (x) A + damping I, in the eigenbasis.
        eigen_correction: EKFAC: re-estimate the eigenvalues; needs ``damping_style="exact"``.
        loss_average: what the loss is: ``"batch"``, a mean over samples of sums over positions; ``"positions"``, a mean
            over samples and positions, as of the tokens of a language model, which then count as samples (all of them,
            unless :meth:`valid` says which); ``"sum"``.
        normalization: blocks of normalization layers: ``"unit"`` (2 x 2), ``"diagonal"`` or ``"skip"``.
        include: patterns (``fnmatch``) of the names of modules to precondition; None: all.
        skip_layers: patterns of those to leave alone.
        scaler: the ``torch.amp.GradScaler`` that scales the loss. Call ``scaler.unscale_(optimizer)`` before
            :meth:`step`.
        gather: ``"train"``: from a model in training mode; ``"always"``: in evaluation mode too.
        batch_size: N. None: the first dimension of a layer's inputs; where that is 1, or inputs are indices (S,), and
            most layers have another, they are taken for shared by all samples and N for that of the others. Given, rows
            that are not N count as positions.
        batch_dim: 1: samples are in the second dimension of what linear layers, embeddings, LayerNorm and RMSNorm are
            given. Convolutions and other normalization layers have them in the first.
        masked: :meth:`valid` will be used with convolutions of stride 1, whose A then is not kept in compressed form.
        max_layer_bytes: what the factors, sums and inverses of a layer may take. One that needs more, as a head with
            50,257 outputs does, is an error that names it, before anything is allocated. None: whatever they need.
        process_group: the ranks that share a batch: ``"default"``, a group, or None for this rank alone. All of them
            make a preconditioner of the same layers.

    damping, factor_decay, kl_clip and lr may be functions of the step.

    Sources: Martens, Grosse, ICML 2015; Grosse, Martens, ICML 2016; Laurent et al., ICLR workshop 2018; Eschenhagen et
    al., NeurIPS 2023; Gao et al., AAAI 2021 (TKFAC); Koroko et al., 2022 (KPSVD, deflation).

    Raises:
        TypeError, ValueError: an argument outside these ranges; no layer, one too large, or layers on several devices.
        RuntimeError: ranks of the process group have other layers, or none in a minute.
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
        input: Mapping[str, Form] | None = None,
        output: Mapping[str, Form] | None = None,
        approximation: Approximation = "expand",
        approximate: Approximate = "kfac",
        fisher_type: Literal["empirical", "mc"] = "empirical",
        pi_correction: bool = True,
        damping_style: Literal["factored", "exact"] = "factored",
        eigen_correction: bool = False,
        loss_average: LossAverage = "batch",
        normalization: Normalization = "unit",
        include: Sequence[str] | None = None,
        skip_layers: Sequence[str] = (),
        scaler: torch.amp.GradScaler | None = None,
        gather: Gather = "train",
        batch_size: int | None = None,
        batch_dim: int = 0,
        masked: bool = False,
        max_layer_bytes: int | None = 8 << 30,
        process_group: ProcessGroup | Literal["default"] | None = "default",
    ) -> None:
        one_of("spatial", spatial, ("full", "sua"))
        one_of("approximation", approximation, ("expand", "reduce"))
        one_of("fisher_type", fisher_type, ("empirical", "mc"))
        one_of("normalization", normalization, ("unit", "diagonal", "skip"))
        if eigen_correction and spatial == "sua":
            raise ValueError('eigen_correction: expected spatial "full", got "sua"')
        counting = Counting(
            loss_average=loss_average,
            sampled=fisher_type == "mc",
            reduce=approximation == "reduce" and loss_average != "positions",  # one position each: both are the same
            accumulation_steps=accumulation_steps,
            batch_size=batch_size,
            batch_dim=batch_dim,
            gather=gather,
        )
        input_block, output_block = group_size if isinstance(group_size, tuple) else (group_size, group_size)
        inputs, outputs = blocks_by_name("input", input, model), blocks_by_name("output", output, model)
        masked = masked or approximate != "kfac"  # A is not kept in compressed form
        reduced: Approximation = "reduce" if counting.reduce else "expand"
        options = Options(spatial, reduced, input_block, output_block, masked, normalization, inputs, outputs)
        names = Names(None if include is None else tuple(include), tuple(skip_layers))
        super().__init__(
            model,
            damping,
            factor_update_steps=factor_update_steps,
            inv_update_steps=inv_update_steps,
            factor_decay=factor_decay,
            kl_clip=kl_clip,
            lr=lr,
            scaler=scaler,
            options=options,
            names=names,
        )
        check_approximate(approximate, damping_style, self._layers)
        dtype = self._dtype
        products = 2 if approximate == "deflation" else 1
        moments = 1 + eigen_correction if damping_style == "exact" else products - 1
        check_memory(self._layers, dtype.itemsize, moments, products, max_layer_bytes)
        self._covered = covered(
            model,
            self._layers,
            self.skipped_layers,
            lambda layer: kronecker_row(layer, dtype.itemsize, moments, products),
        )
        self._ranks = Ranks(process_group)
        self._ranks.check_layers({layer.title: layer.shape for layer in self._layers})
        self.fisher = KroneckerFisher(
            [layer.shape for layer in self._layers],
            self._at_step("damping"),
            factor_decay=self._decay(),
            style=damping_style,
            pi_correction=pi_correction,
            eigen_correction=eigen_correction,
            approximate=approximate,
            dtype=dtype,
            device=self._layers[0].weight.device,
        )
        self._gatherer = Gatherer(model, self._layers, self.fisher, counting)
        self._coverage = Coverage(model, self._layers, names, self._gatherer)

    @staticmethod
    def register(kind: type[nn.Module] | str, layer: type[Layer]) -> None:
        """Let modules of a class, and of classes derived from it, be layers of a kind.

            class Scaled(nn.Module):
                def __init__(self, inputs, outputs):
                    super().__init__()
                    self.weight = nn.Parameter(torch.randn(outputs, inputs))

                def forward(self, x):
                    return x * self.weight.shape[1] ** -0.5 @ self.weight.T

            class ScaledLayer(mk.layers.LinearLayer):
                def features(self, x):  # what the weight multiplies
                    return x * self.weight.shape[1] ** -0.5

            mk.KFAC.register(Scaled, ScaledLayer)

        The kinds that come with the package are registered in the same way, and may be registered anew. Derive from the
        one that is nearest and override what differs: ``weight_name``, ``bias_name``; :meth:`Layer.features`;
        :meth:`Layer.part`, where the weight is stored in another order.

        Args:
            kind: the class, or its name as ``"package.module.Class"``, which then need not be imported.
            layer: a class derived from :class:`mk.layers.Layer`.

        Raises:
            TypeError: not such a class.
        """
        register(kind, layer)

    # ---- gathering -------------------------------------------------------------------------------------------------

    @property
    def gathering(self) -> bool:
        """Whether backward passes before the next step gather factors."""
        return self._factors_due

    # ---- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Precondition the gradients in place: those of modules that were not called stay zero or None.

        Raises:
            ValueError: a hyper-parameter's function returned a value out of range.
            RuntimeError: a parameter that was frozen at construction is trained. Nothing changes in either case.
        """
        damping, decay, clip, gradients = self._begin()
        self.fisher.damping, self.fisher.factor_decay = damping, decay
        if self._factors_due:
            self._coverage.warn(self._ranks.count > 1)
            self._coverage.warn_of_sizes()
            self._gatherer.finish()
            self._ranks.average_sums(self.fisher)
            self.fisher.update(self._output_scale())
        refreshed = self.steps % self.inv_update_steps == 0
        if refreshed:
            self._ranks.share_refresh(self.fisher)
        updates = self._updates(gradients, refreshed)
        self._gatherer.begin()
        self._finish(self._bounded(gradients, updates, clip))
        self._gatherer.active = self._factors_due

    def _updates(self, gradients: list[Tensor], refreshed: bool) -> list[Tensor]:
        """What becomes of the gradients, before ``kl_clip``; ``refreshed``: the inverses are new."""
        return self.fisher.ihvp(gradients)

    def diagnostics(self) -> dict[str, float]:
        """steps; seen and skipped batches; layers_without_factors: how many have a gradient and no factors; what
        became of the blocks: :meth:`KroneckerFisher.diagnostics`.
        """
        without = len(self._coverage.without_factors(self._ranks.count > 1))
        return {"steps": self.steps, **self.fisher.diagnostics(), "layers_without_factors": without}

    def state_dict(self) -> dict[str, Any]:
        """Between backward passes and their step, with what they have gathered."""
        return {"steps": self.steps, "fisher": self.fisher.state_dict(), "gathered": self._gatherer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_entries("state_dict", ("steps", "fisher", "gathered"), state_dict)
        steps = int(state_dict["steps"])
        self._gatherer.check_state_dict("state_dict['gathered']", state_dict["gathered"])
        self.fisher.load_state_dict(state_dict["fisher"])
        self._gatherer.load_state_dict(state_dict["gathered"])
        self.steps = steps
        self._gatherer.active = self._factors_due
