"""Communication over torch.distributed groups. A group of None means a single rank: every function then
returns its input.
"""

from eagle3_ds.collectives.all_to_all import (
    SeqAllToAll4D,
    all_heads_to_sequence,
    all_sequence_to_heads,
    all_to_all_4D,
    heads_to_sequence,
    sequence_to_heads,
    start_sequence_to_heads,
)
from eagle3_ds.collectives.gather import (
    Gather,
    all_gather_rows,
    all_gather_tensor,
    gather_outputs_and_unpad,
    reduce_scatter_rows,
)
from eagle3_ds.collectives.ring import RingExchange, RingTransfer

__all__ = [
    "Gather",
    "RingExchange",
    "RingTransfer",
    "SeqAllToAll4D",
    "all_gather_rows",
    "all_gather_tensor",
    "all_heads_to_sequence",
    "all_sequence_to_heads",
    "all_to_all_4D",
    "gather_outputs_and_unpad",
    "heads_to_sequence",
    "reduce_scatter_rows",
    "sequence_to_heads",
    "start_sequence_to_heads",
]
