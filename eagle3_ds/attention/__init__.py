"""USP attention: Ulysses x ring over a span plan, with the step-0 keys and values exchanged once for all TTT
steps.
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
