"""Checkpoints that can be resumed on any mesh and at any ZeRO stage: their format on disk, and how all ranks
write and read them.
"""
