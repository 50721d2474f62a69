"""K-FAC on a GPT-2 of the transformers library beside plain SGD: `make gpt2`.

Twelve layers of width 256, random weights, a vocabulary of bytes, on the sources of Python's standard library. Each
optimizer has a process of its own, for its peak memory; their steps are taken in turns. Written to --out:
gpt2_kfac.md, gpt2_kfac.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from dataclasses import asdict
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from provenance import commit
from source_bytes import sources, windows
from torch import nn

import mfac_kernels as mk
from mfac_kernels.preconditioners._covered import Covered

try:
    import transformers
except ImportError as missing:
    sys.exit(f'benchmarks/gpt2_kfac.py needs the transformers library ({missing}): pip install "mfac_kernels[bench]"')

MOMENTUM = 0.9


def network(arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=arguments.context,
        n_embd=arguments.width,
        n_layer=arguments.depth,
        n_head=arguments.width // 64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config).train()


def kfac(model: nn.Module, arguments: argparse.Namespace) -> mk.KFAC:
    return mk.KFAC(
        model,
        arguments.damping,
        inv_update_steps=arguments.inv_update_steps,
        loss_average="positions",
        kl_clip=arguments.kl_clip,
        lr=arguments.kfac_lr,
    )


def work(name: str, arguments: argparse.Namespace, parent: Connection) -> None:
    """A step for each message; what came of it. At the end, the peak of resident memory."""
    model, (data, _) = network(arguments), sources()
    preconditioner = kfac(model, arguments) if name == "K-FAC" else None
    rate = arguments.kfac_lr if preconditioner is not None else arguments.sgd_lr
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(1)
    while parent.recv():
        batch = windows(data, arguments.batch, arguments.context + 1, generator)
        begun = time.perf_counter()
        optimizer.zero_grad()
        logits = model(input_ids=batch[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()
        parent.send((time.perf_counter() - begun, float(loss.detach())))
    parent.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def take_turns(arguments: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Seconds and losses of each step, and peak memory in MB, by optimizer."""
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    for name in ("SGD", "K-FAC"):
        ends[name], theirs = context.Pipe()
        context.Process(target=work, args=(name, arguments, theirs), daemon=True).start()
        theirs.close()
    seconds: dict[str, list[float]] = {name: [] for name in ends}
    losses: dict[str, list[float]] = {name: [] for name in ends}
    for step in range(arguments.steps):
        for name, end in ends.items():
            end.send(True)
            spent, loss = end.recv()
            seconds[name].append(spent)
            losses[name].append(loss)
        now = "; ".join(f"{name}: loss {losses[name][-1]:.3f}, {seconds[name][-1]:.2f} s" for name in ends)
        print(f"step {step + 1} of {arguments.steps}  {now}", flush=True)
    for end in ends.values():
        end.send(False)
    return {
        name: {"seconds": seconds[name], "losses": losses[name], "peak_mb": end.recv()} for name, end in ends.items()
    }


def report(found: dict[str, dict[str, object]], covered: Covered, conditions: dict[str, str], out: Path) -> str:
    """Writes the table in both forms; returns it."""
    rows = {
        "seconds a step, median": lambda f: f"{statistics.median(f['seconds']):.3f}",
        "seconds a step, mean": lambda f: f"{statistics.mean(f['seconds']):.3f}",
        "peak resident memory, MB": lambda f: f"{f['peak_mb']:.0f}",
        "loss of the first step": lambda f: f"{f['losses'][0]:.3f}",
        "loss, mean of the last five": lambda f: f"{statistics.mean(f['losses'][-5:]):.3f}",
    }
    lines = [f"| | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    lines += [f"| {what} | {' | '.join(cell(f) for f in found.values())} |" for what, cell in rows.items()]
    table = "\n".join(lines)
    text = [
        "# GPT-2 of the transformers library under K-FAC",
        "`make gpt2`. Steps in turns, a process for each optimizer.",
        table,
        f"K-FAC covers {covered.share:.2%} of {covered.trained:,} trained parameters; factors, sums and inverses take "
        f"{covered.megabytes:.0f} MB.",
        "\n".join(f"- {key}: {value}" for key, value in conditions.items()),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpt2_kfac.md").write_text("\n\n".join(text) + "\n")
    content = {"conditions": conditions, "share": covered.share, "covered": asdict(covered), "optimizers": found}
    (out / "gpt2_kfac.json").write_text(json.dumps(content, indent=1) + "\n")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64, the width of a head")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="windows")
    parser.add_argument("--sgd-lr", type=float, default=0.01)
    parser.add_argument("--kfac-lr", type=float, default=0.01)
    parser.add_argument("--damping", type=float, default=1e-2)
    parser.add_argument("--kl-clip", type=float, default=3e-4)
    parser.add_argument("--inv-update-steps", type=int, default=10)
    arguments = parser.parse_args()

    preconditioner = kfac(network(arguments), arguments)
    covered = preconditioner.covered()
    print(preconditioner)
    del preconditioner
    conditions = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads; transformers {transformers.__version__}",
        "text": f"sources of Python {platform.python_version()}, as bytes",
        "network": f"GPT2LMHeadModel, {arguments.depth} layers of width {arguments.width}, random weights, no dropout",
        "steps": f"{arguments.steps}, of {arguments.batch} windows of {arguments.context} bytes",
        "SGD": f"learning rate {arguments.sgd_lr:g}, momentum {MOMENTUM:g}",
        "K-FAC": f"beside SGD with learning rate {arguments.kfac_lr:g}, momentum {MOMENTUM:g}; damping "
        f"{arguments.damping:g}, kl_clip {arguments.kl_clip:g}, factors every step, inverses every "
        f"{arguments.inv_update_steps}",
    }
    print(report(take_turns(arguments), covered, conditions, arguments.out))


if __name__ == "__main__":
    main()
