"""Training: the DeepSpeed engine, the optimizer step, the loop. No other package imports deepspeed.

This file imports nothing, so that the command line reads checkpoints without the seconds that importing
deepspeed takes.
"""
