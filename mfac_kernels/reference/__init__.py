"""The formulas in plain torch, float64: what every kernel is tested against."""
