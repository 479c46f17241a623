"""USP attention: Ulysses x ring over a span plan, with the step-0 keys and values exchanged once for all TTT
steps.

*Step-0 keys* are the keys that all slots make at TTT step 0, from the target's hidden states. At every step a
slot attends to those of its document up to its own, so they are exchanged between ranks. A *diagonal key* is
the key that a slot makes at a later step, from the draft's own hidden state. The slot alone attends to it (it
lies on the diagonal of the mask), so it stays on its rank. Values go with their keys.
"""

from eagle3_ds.attention.inference import PackedAttention
from eagle3_ds.attention.patching import patch_attention
from eagle3_ds.attention.prefix_kv import PrefixKV
from eagle3_ds.attention.ring import RingKV, ring_attention_hybrid_masked
from eagle3_ds.attention.usp import LlamaUSPFlashAttention, UnrollKV
from eagle3_ds.kernels import AttentionKernel

__all__ = [
    "AttentionKernel",
    "LlamaUSPFlashAttention",
    "PackedAttention",
    "PrefixKV",
    "RingKV",
    "UnrollKV",
    "patch_attention",
    "ring_attention_hybrid_masked",
]
