"""A preconditioner under the trainers of other libraries: it steps when they do, and resumes with them."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from example_files import example
from torch import nn

import mfac_kernels as mk


def assert_same_run(one: tuple[nn.Module, mk.KFAC], other: tuple[nn.Module, mk.KFAC]) -> None:
    assert one[1].steps == other[1].steps > 0
    assert one[1].diagnostics() == other[1].diagnostics()
    for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(p, q)


def preconditioner() -> mk.KFAC:
    """Of one layer, with a gradient that a step will change."""
    torch.manual_seed(0)
    p = mk.KFAC(net := nn.Linear(4, 2), kl_clip=None)
    p.net = net
    net(torch.randn(8, 4)).square().mean().backward()
    return p


def test_transformers_resumes(tmp_path):
    with_transformers = example("with_transformers")
    whole = with_transformers.train(str(tmp_path / "whole"), 20)
    with_transformers.train(str(tmp_path / "parts"), 10)
    assert_same_run(with_transformers.train(str(tmp_path / "parts"), 20, resume=True), whole)


def test_the_events_of_transformers(tmp_path):
    """What its CallbackHandler calls, in the order of Trainer._inner_training_loop; the Trainer itself needs more."""
    with_transformers = example("with_transformers", ["transformers"])
    from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

    p, state, control = preconditioner(), TrainerState(), TrainerControl()
    args = SimpleNamespace(output_dir=str(tmp_path))
    handler = CallbackHandler([with_transformers.PreconditionerCallback(p)], None, None, None, None)
    before = p.net.weight.grad.clone()
    handler.on_train_begin(args, state, control)
    handler.on_step_begin(args, state, control)
    assert torch.equal(p.net.weight.grad, before) and p.steps == 0
    handler.on_pre_optimizer_step(args, state, control)
    handler.on_optimizer_step(args, state, control)
    handler.on_step_end(args, state, control)
    assert not torch.equal(p.net.weight.grad, before) and p.steps == 1
    state.global_step = 1
    (tmp_path / "checkpoint-1").mkdir()
    handler.on_save(args, state, control)

    resumed = preconditioner()
    handler = CallbackHandler([with_transformers.PreconditionerCallback(resumed)], None, None, None, None)
    handler.on_train_begin(args, state, control)
    assert resumed.steps == 1


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes(tmp_path):
    with_lightning = example("with_lightning")
    whole = with_lightning.train(str(tmp_path), 3)
    *_, trainer = with_lightning.train(str(tmp_path), 1)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    assert_same_run(with_lightning.train(str(tmp_path), 3, str(tmp_path / "net.ckpt"))[:2], whole[:2])


def test_the_hooks_of_lightning(monkeypatch):
    """What its Trainer calls, in its order: state first, then the fit, then each step."""
    stub = ModuleType("lightning.pytorch")
    stub.Callback, stub.LightningModule = object, nn.Module
    monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", stub)
    sys.modules["lightning"].pytorch = stub
    monkeypatch.delitem(sys.modules, "examples.with_lightning", raising=False)
    with_lightning = example("with_lightning", [])
    monkeypatch.delitem(sys.modules, "examples.with_lightning")  # the next one wants the true library

    p = preconditioner()
    callback = with_lightning.PreconditionerCallback(lambda module: p)
    assert callback.state_dict() == {}
    callback.load_state_dict({})
    callback.on_fit_start(None, p.net)
    before = p.net.weight.grad.clone()
    callback.on_before_optimizer_step(None, p.net, None)
    assert not torch.equal(p.net.weight.grad, before)

    other = with_lightning.PreconditionerCallback(lambda module: preconditioner())
    other.load_state_dict(callback.state_dict())
    other.on_fit_start(None, p.net)
    assert other.preconditioner.steps == 1


def test_accelerate_steps_when_the_optimizer_does():
    """Two passes a step are one step of twice the batch."""
    with_accelerate = example("with_accelerate")
    model, p = with_accelerate.train(20, accumulation=2)
    assert p.steps == p.diagnostics()["seen"] == 20
    assert len(list(model.parameters())) == 4


def test_what_accelerate_is_asked_for():
    """register_for_checkpointing, and an optimizer that is the one of torch or wraps it."""
    accelerate = ModuleType("accelerate")
    accelerate.Accelerator = object
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "accelerate", accelerate)
        patch.delitem(sys.modules, "examples.with_accelerate", raising=False)
        attach = example("with_accelerate", []).attach
        patch.delitem(sys.modules, "examples.with_accelerate")
    kept: list[mk.KFAC] = []
    accelerator = SimpleNamespace(register_for_checkpointing=kept.append)
    p = preconditioner()
    optimizer = torch.optim.SGD(p.net.parameters(), lr=0.1)
    attach(accelerator, SimpleNamespace(optimizer=optimizer), p)
    before = p.net.weight.grad.clone()
    optimizer.step()
    assert kept == [p] and p.steps == 1 and not torch.equal(p.net.weight.grad, before)
