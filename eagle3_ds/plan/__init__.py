"""What a run costs before it starts: bytes per rank, calls and bytes on the wire, seconds per step, and the
best settings. What a draft costs is said by its algorithm; the sums are made here.
"""

from eagle3_ds.plan.advice import explain_shortage, helpful_changes
from eagle3_ds.plan.communication import attention_traffic, separate_all_to_alls, state_traffic, step_traffic
from eagle3_ds.plan.devices import DEVICES, Assumptions, Device
from eagle3_ds.plan.memory import Memory, predict_memory
from eagle3_ds.plan.search import Candidate, fastest, largest_length
from eagle3_ds.plan.time import StepTime, attention_pairs, predict_time, step_flops

__all__ = [
    "DEVICES",
    "Assumptions",
    "Candidate",
    "Device",
    "Memory",
    "StepTime",
    "attention_pairs",
    "attention_traffic",
    "explain_shortage",
    "fastest",
    "helpful_changes",
    "largest_length",
    "predict_memory",
    "predict_time",
    "separate_all_to_alls",
    "state_traffic",
    "step_flops",
    "step_traffic",
]
