"""Prediction of what a run will cost: bytes per rank, collective calls and bytes sent, seconds per step; and
a search for the best settings. Each draft algorithm states the costs of its draft (costs/shape.py); this
package adds them up.
"""

from eagle3_ds.plan.advice import explain_shortage, helpful_changes
from eagle3_ds.plan.communication import attention_traffic, separate_all_to_alls, state_traffic, step_traffic
from eagle3_ds.plan.devices import DEVICES, Assumptions, Device
from eagle3_ds.plan.memory import Memory, predict_memory
from eagle3_ds.plan.search import Candidate, fastest, largest_length, meshes
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
    "meshes",
    "predict_memory",
    "predict_time",
    "separate_all_to_alls",
    "state_traffic",
    "step_flops",
    "step_traffic",
]
