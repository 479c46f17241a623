"""Checks on a training run: all ranks run the same program on the same data, replicas stay equal, and steps
are finite. Besides, heartbeats to the supervisor, and requests to stop.
"""
