"""EAGLE-3 draft training at long context: DeepSpeed ZeRO over `draft_dp`, Ulysses x ring sequence parallelism
per sequence.
"""

__version__ = "0.1.0"
