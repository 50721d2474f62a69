"""Physics-informed networks on equations with known solutions, by several optimizers, for the same seconds each.

Used by ``mfac-kernels pinn``.
"""
