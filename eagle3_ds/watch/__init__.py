"""Watching a run from outside its ranks: a supervisor beside each rank, and what they write for each other.

Nothing but the standard library is imported here, so that a supervisor weighs little and outlives what breaks its rank.
"""
