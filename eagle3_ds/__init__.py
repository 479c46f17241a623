"""EAGLE-3 draft training at long context: DeepSpeed ZeRO over `draft_dp`, Ulysses x ring sequence parallelism
per sequence.

    from eagle3_ds import evaluate, export, load_recipe, prepare, train

    recipe = load_recipe("recipes/quickstart.yaml", ["train.steps=100"])
    train(recipe)
    evaluate(recipe)
    export(recipe)

The names in `__all__` are looked up when they are first used, so `import eagle3_ds` alone waits neither for
torch nor for DeepSpeed. `train` and `export` are also names of folders of the package: `eagle3_ds.train` is
that folder's module, which can be called as the function, whether something was imported from the folder
before or not.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eagle3_ds.attention import LlamaUSPFlashAttention, patch_attention, ring_attention_hybrid_masked
    from eagle3_ds.collectives import (
        Gather,
        SeqAllToAll4D,
        all_gather_tensor,
        all_to_all_4D,
        gather_outputs_and_unpad,
    )
    from eagle3_ds.config import load_recipe
    from eagle3_ds.layout import SpanPlan, prepare_usp_input
    from eagle3_ds.run.stages import evaluate, export, prepare
    from eagle3_ds.run.training import train
    from eagle3_ds.topology import maybe_setup_distributed
    from eagle3_ds.train.rollout import RolloutTrainer
    from eagle3_ds.train.rollout_inputs import Rollout, ServedRollout, Texts

__version__ = "0.1.0"

__all__ = [
    "Gather",
    "LlamaUSPFlashAttention",
    "Rollout",
    "RolloutTrainer",
    "SeqAllToAll4D",
    "ServedRollout",
    "SpanPlan",
    "Texts",
    "all_gather_tensor",
    "all_to_all_4D",
    "evaluate",
    "export",
    "gather_outputs_and_unpad",
    "load_recipe",
    "maybe_setup_distributed",
    "patch_attention",
    "prepare",
    "prepare_usp_input",
    "ring_attention_hybrid_masked",
    "train",
]

_HOMES = {
    "Gather": "collectives",
    "LlamaUSPFlashAttention": "attention",
    "Rollout": "train.rollout_inputs",
    "RolloutTrainer": "train.rollout",
    "SeqAllToAll4D": "collectives",
    "ServedRollout": "train.rollout_inputs",
    "SpanPlan": "layout",
    "Texts": "train.rollout_inputs",
    "all_gather_tensor": "collectives",
    "all_to_all_4D": "collectives",
    "evaluate": "run.stages",
    "export": "run.stages",
    "gather_outputs_and_unpad": "collectives",
    "load_recipe": "config",
    "maybe_setup_distributed": "topology",
    "patch_attention": "attention",
    "prepare": "run.stages",
    "prepare_usp_input": "layout",
    "ring_attention_hybrid_masked": "attention",
    "train": "run.training",
}
_ROOMS = ("export", "train")


def __getattr__(name: str) -> Any:
    """A public name, imported now. Raises AttributeError for any other."""
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = _public(name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _public(name: str) -> Any:
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


class _CallableRoom(ModuleType):
    """A room of the package that is the public function of its name as well."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _public(self.__name__.rpartition(".")[2])(*arguments, **options)


class _Package(ModuleType):
    """Python binds a room to the package when anything is imported from it, and would hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ROOMS and isinstance(value, ModuleType):
            value.__class__ = _CallableRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
