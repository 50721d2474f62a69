"""Preconditioners beside any torch optimizer. They know nothing of kernels."""
