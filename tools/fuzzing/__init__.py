"""Random calls of the whole public surface, for tools/fuzz.py: what is called, and what may come of it."""

from fuzzing import compression, fisher, ops, physics, preconditioners
from fuzzing.surface import SURFACES, missing

__all__ = ["SURFACES", "compression", "fisher", "missing", "ops", "physics", "preconditioners"]
