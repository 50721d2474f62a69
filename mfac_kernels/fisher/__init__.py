"""Curvature objects: state and products with the inverse. They know nothing of models."""
