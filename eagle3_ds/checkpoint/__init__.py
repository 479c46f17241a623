"""Checkpoints that any mesh and any ZeRO stage resumes: their format, and writing and reading them with all
ranks.
"""
