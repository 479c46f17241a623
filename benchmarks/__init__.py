"""Measurements; each writes JSON under benchmarks/results."""
