"""Measurements and judgements; each writes JSON under benchmarks/results."""
