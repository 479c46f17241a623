"""Ranks from outside: the command that starts them, a supervisor beside each, their logs, restarts.

The supervisor imports nothing but the standard library, so that it weighs little and outlives what breaks its
rank: this file stays empty of imports.
"""
