"""Faults put into real runs: what, where, and how a run is struck and brought back."""
