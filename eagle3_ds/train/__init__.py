"""Training: the DeepSpeed engine, the step, the loop. The only room that imports deepspeed.

Nothing is imported here: the command line reads checkpoints without waiting for deepspeed.
"""
