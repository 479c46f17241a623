"""Any number of captured layers: from the target through the store into a batch, into an export and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.algorithms.eagle3 import DraftModel, Eagle3Shape, build_draft_config
from eagle3_ds.algorithms.eagle3.supervision import TTTSupervision
from eagle3_ds.config import DraftSection, TargetSection, load_recipe
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.export import export_speculators, export_vllm, load_export, verify_export
from eagle3_ds.layout import PackedSequence, SpanPlan, prepare_usp_input
from eagle3_ds.store import HiddenStateStore, HiddenStateWriter, RowFormat
from eagle3_ds.targets import capture_hidden_states, choose_aux_layers, load_target, teacher_tokens
from tests.unit.tiny_target import build_tiny_target

HIDDEN, NUM_LAYERS = 32, 7
CHOICES = ((0,), (1, 4), (0, 2, 3, 5, 6))
RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_target(tmp_path_factory.mktemp("target") / "llama")


@pytest.mark.parametrize("layers", CHOICES)
def test_rows_of_all_layers_reach_the_batch(layers: tuple[int, ...], folder: Path, tmp_path: Path) -> None:
    target = load_target(TargetSection(path=str(folder), aux_layers=layers), dtype="float32")
    token_ids = torch.arange(2, 13)
    aux, teacher = capture_hidden_states(target, token_ids)
    assert aux.shape == (11, len(layers) * HIDDEN)
    output = target.base(input_ids=token_ids[None], output_hidden_states=True)
    expected = torch.cat([output.hidden_states[layer][0] for layer in layers], dim=-1)
    assert torch.equal(aux, expected)
    layout = RowFormat(len(layers) * HIDDEN, HIDDEN, "float32")
    writer = HiddenStateWriter(tmp_path / "store", {0: 11}, layout, {})
    writer.append(0, aux, teacher, teacher_tokens(teacher, target.head))
    writer.finish()
    tokens, rows, last = HiddenStateStore.open(tmp_path / "store", {}).states(
        [0], token_ids, torch.ones(11, dtype=torch.bool), [11]
    )
    pack = PackedSequence(token_ids, torch.ones(11, dtype=torch.bool), (11,), tokens, rows, last)
    batch = prepare_usp_input(pack, SpanPlan.make((11,)), 0, 0, TTTSupervision(2))
    assert torch.equal(batch.aux[:], aux)


@pytest.mark.parametrize("layers", CHOICES)
@pytest.mark.parametrize("layout", ["vllm", "speculators"])
def test_an_export_knows_how_many(layers: tuple[int, ...], layout: str, folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        RECIPE, [f"target.path={folder}", "target.build=null", f"target.aux_layers={list(layers)}"]
    )
    target = load_target(recipe.target, dtype="float32")
    recipe = recipe.model_copy(update={"draft": DraftSection(vocab_size=64)})
    config = ALGORITHMS["eagle3"].build_config(target.config, recipe)
    draft = DraftModel(config)
    assert draft.fc.in_features == len(layers) * HIDDEN
    assert sorted(Eagle3Shape.of(config).parameter_sizes) == sorted(p.numel() for p in draft.parameters())
    vocabulary = VocabularyMap.from_counts(torch.arange(target.config.vocab_size), 64)
    export = tmp_path / "draft"
    if layout == "vllm":
        export_vllm(draft.state_dict(), config, vocabulary, export, "float32", aux_layers=layers)
    else:
        export_speculators(
            draft.state_dict(),
            config,
            vocabulary,
            target.embedding,
            export,
            "t",
            [],
            "float32",
            aux_layers=layers,
        )
    assert verify_export(export, draft, vocabulary) == 0.0
    loaded, _, _ = load_export(export)
    assert (loaded.num_aux_layers, loaded.target_hidden_size) == (len(layers), HIDDEN)


def test_the_number_stands_in_the_config_that_vllm_reads(tmp_path: Path) -> None:
    form = ALGORITHMS["eagle3"].layouts["vllm"]
    target = load_target(
        TargetSection(path=str(build_tiny_target(tmp_path / "llama"))), dtype="float32"
    ).config
    for number, keys in ((3, {}), (5, {"num_aux_hidden_states": 5})):
        assert form.keys(build_draft_config(target, DraftSection(vocab_size=64), number)) == keys


@pytest.mark.parametrize(
    "wanted",
    [(), (3, 3), (4, 2), (-1, 2), (0, NUM_LAYERS)],
    ids=["none", "twice", "descending", "below", "beyond"],
)
def test_layers_that_cannot_be_are_named(wanted: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"target.aux_layers = \[.*they must ascend, each once"):
        choose_aux_layers(NUM_LAYERS, wanted)


def test_a_recipe_has_one_to_eight_of_them() -> None:
    for layers in ([], list(range(9))):
        with pytest.raises(ValueError, match=r"target.aux_layers"):
            load_recipe(RECIPE, [f"target.aux_layers={layers}"])
    assert load_recipe(RECIPE, ["target.aux_layers=[5]"]).target.aux_layers == (5,)
    assert replace(Eagle3Shape(8, 8, 1, 1, 8, 9, 9), aux_size=40).fc_size == 320
