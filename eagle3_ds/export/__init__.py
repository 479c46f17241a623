"""Writing and reading drafts in the layouts that servers load: that of vLLM and SGLang, and that of
speculators.
"""

from eagle3_ds.export.card import Card, license_in, write_card
from eagle3_ds.export.folder import algorithm_of_folder
from eagle3_ds.export.hub import check_push, push_folder
from eagle3_ds.export.speculators import export_speculators, load_speculators
from eagle3_ds.export.verify import load_embedding, load_export, verify_export
from eagle3_ds.export.vllm import export_vllm, load_vllm, vllm_tensors

__all__ = [
    "Card",
    "algorithm_of_folder",
    "check_push",
    "export_speculators",
    "export_vllm",
    "license_in",
    "load_embedding",
    "load_export",
    "load_speculators",
    "load_vllm",
    "push_folder",
    "verify_export",
    "vllm_tensors",
    "write_card",
]
