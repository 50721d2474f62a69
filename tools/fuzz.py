"""Random calls of the whole public surface: `python tools/fuzz.py --seconds 1800`, or `make fuzz` with the sanitizers.

Shapes, dtypes, strides, nothing at all, NaN and infinity, dampings of every size, sequences of calls on what has a
state. What may come of a call stands in tools/fuzzing/outcome.py. Surfaces take turns, each time with a seed of its
own, printed before: what is found, a crash or a call that hangs included, comes again by the command that is shown.
Exits with 1 if something is found.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter

import hypothesis
import torch
from fuzzing import SURFACES
from fuzzing.draw import Draw
from hypothesis import strategies as st

LIMIT = 20
"""Seconds for an example; one that takes longer ends the program, with a traceback."""


def known_by(error: BaseException) -> str:
    """What two examples of one fault have in common."""
    place = [f"{f.name}:{f.lineno}" for f in traceback.extract_tb((error.__cause__ or error).__traceback__)]
    return f"{type(error).__name__} {place[-1:]} {re.sub(r'[0-9.]+|torch[.]w+', '#', str(error))}"


def examine(
    name: str, seed: int, examples: int, known: set[str], done: Counter[str], *, shrink: bool = True
) -> BaseException | None:
    """So many examples of a surface; what is found that is not ``known``."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])],
    )
    @hypothesis.given(st.data())
    def run(data: st.DataObject) -> None:
        done[name] += 1
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                SURFACES[name](Draw(data))
        except Exception as error:
            if known_by(error) not in known:
                raise
        finally:
            faulthandler.cancel_dump_traceback_later()

    try:
        run()
    except Exception as error:
        return error
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--examples", type=int, default=25, help="of a surface in a turn")
    parser.add_argument("--only", nargs="+", choices=sorted(SURFACES), metavar="SURFACE", help="some of the surfaces")
    parser.add_argument("--seed", type=int, help="one turn with this seed")
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(2)
    names = options.only or sorted(SURFACES)
    seeds = random.Random(time.time_ns())
    known: set[str] = set()
    done: Counter[str] = Counter()
    stop = time.monotonic() + options.seconds
    turn = 0
    while (options.seed is None and time.monotonic() < stop) or turn < len(names):
        name = names[turn % len(names)]
        turn += 1
        seed = seeds.randrange(2**32) if options.seed is None else options.seed
        command = f"python tools/fuzz.py --only {name} --seed {seed} --examples {options.examples}"
        print(f"{name} {seed}", flush=True)
        error = examine(name, seed, options.examples, known, done)
        if error is not None:
            known.add(known_by(error))
            traceback.print_exception(error, file=sys.stdout)
            print(f"found {len(known)}: {command}", flush=True)
    for name in names:
        print(f"{name}: {done[name]} examples")
    print(f"{sum(done.values())} examples of {len(names)} surfaces; found: {len(known)}")
    sys.exit(1 if known else 0)


if __name__ == "__main__":
    main()
