"""What a run costs before it starts: bytes per rank, calls and bytes on the wire, seconds per step, and the best settings."""

from eagle3_ds.plan.communication import Traffic, attention_traffic, choose_kv_exchange, separate_all_to_alls, state_traffic
from eagle3_ds.plan.setup import DraftShape, Setup, ZeroSettings

__all__ = [
    "DraftShape",
    "Setup",
    "Traffic",
    "ZeroSettings",
    "attention_traffic",
    "choose_kv_exchange",
    "separate_all_to_alls",
    "state_traffic",
]
