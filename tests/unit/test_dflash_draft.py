"""A DFlash draft as it is made, served and exported: its guesses against the dense reference, blocks of many
texts against one by one, decoding that gives the target's own text, and both layouts read back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.algorithms.dflash import DFlashModel, build_dflash_config
from eagle3_ds.algorithms.dflash.config import mask_token
from eagle3_ds.algorithms.dflash.costs import DFlashShape
from eagle3_ds.algorithms.dflash.decoding import DFlashBatchGuesser, DFlashGuesser
from eagle3_ds.algorithms.eagle3 import DraftModel, build_draft_config
from eagle3_ds.config import DraftSection, Recipe, load_recipe
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.eval import decode_alone, evaluate_draft, speculative_decode
from eagle3_ds.eval.lockstep import (
    Clock,
    Limits,
    answer_batch,
    judged_by_answers,
    read_prompts,
    speculative_batch,
)
from eagle3_ds.export import (
    algorithm_of_folder,
    export_speculators,
    export_vllm,
    load_export,
    verify_export,
)
from eagle3_ds.run.finish import export_draft
from eagle3_ds.run.serve_check import check_of_folders
from eagle3_ds.targets import Target, load_target
from eagle3_ds.train.initial_draft import load_initial_draft
from judge.dense_reference import Frozen, MicroBatch
from judge.dflash_reference import block_logits
from tests.unit.tiny_families import AUX_LAYERS, family_config, random_model
from tests.unit.tiny_target import build_tiny_target

SIZE, VOCABULARY, NEW = 5, 64, 18
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"block_causal": True},
    "window": {"sliding_window": 7},
    "causal window": {"block_causal": True, "sliding_window": 7},
    "mask embedding": {"mask_embedding": True},
    "one layer, another width": {"num_layers": 1, "hidden_size": 48, "num_heads": 4, "head_dim": 12},
}


def section(**more: Any) -> DraftSection:
    common = {"algorithm": "dflash", "vocab_size": VOCABULARY, "block_size": SIZE, "mask_token_id": 2}
    return DraftSection(**{**common, "num_layers": 2, **more})


@pytest.fixture(scope="module")
def target() -> Target:
    config = family_config("llama")
    return Target(random_model(config), None, config, AUX_LAYERS)


def random_draft(target: Target, **more: Any) -> DFlashModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        draft = DFlashModel(build_dflash_config(target.config, section(**more), target.aux_layers)).eval()
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.4)
            else:
                torch.nn.init.normal_(parameter, 1.0, 0.3)
    return draft.requires_grad_(False)


def vocabulary_of(target: Target) -> VocabularyMap:
    generator = torch.Generator().manual_seed(2)
    return VocabularyMap.from_counts(
        torch.randint(1000, (target.config.vocab_size,), generator=generator), VOCABULARY
    )


def embedding_of(target: Target, draft: DFlashModel) -> Tensor:
    """The target's, or a random one of the draft's width."""
    width = draft.config.hidden_size
    if width == target.config.hidden_size:
        return target.embedding
    return torch.randn(target.config.vocab_size, width, generator=torch.Generator().manual_seed(3))


def reference_guesses(
    draft: DFlashModel, embedding: Tensor, vocabulary: VocabularyMap, aux: Tensor, tokens: Tensor
) -> list[list[int]]:
    """Of every slot but the last, by the dense reference in fp64."""
    frozen = Frozen(embedding.double(), embedding.double(), vocabulary.d2t)
    weights = {name: tensor.double() for name, tensor in draft.state_dict().items()}
    text = MicroBatch(tokens, torch.ones(len(tokens), dtype=torch.bool), (len(tokens),), aux, aux)
    logits = block_logits(weights, draft.config, frozen, text, torch.arange(len(tokens) - 1))[:, 1:]
    chosen: list[list[int]] = vocabulary.draft_to_target[logits.argmax(-1)].tolist()
    return chosen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [(1,), (4, 1, 3, 2)])
def test_guesses_are_the_references_at_every_place(form: str, steps: Sequence[int], target: Target) -> None:
    draft, vocabulary = random_draft(target, **FORMS[form]), vocabulary_of(target)
    embedding = embedding_of(target, draft)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, target.config.vocab_size, (24,), generator=generator)
    tokens[9] = draft.config.mask_token_id  # a text may contain the mask token
    aux = torch.randn(24, draft.fc.in_features, generator=generator)
    expected = reference_guesses(draft, embedding, vocabulary, aux, tokens)
    guesser, start, compared = DFlashGuesser(draft, embedding, vocabulary), 0, 0
    while start + max(steps) < len(tokens):
        new = steps[compared % len(steps)]
        # Slot i has the states at i and the token after it.
        found = guesser.propose(
            aux[start : start + new], tokens[start + 1 : start + new + 1].tolist(), SIZE - 1
        )
        start, compared = start + new, compared + 1
        assert found == expected[start - 1], f"slot {start - 1}"
    assert compared > 5 and len({tuple(guesses) for guesses in expected}) > 5


def test_a_causal_block_may_be_shorter_and_no_other(target: Target) -> None:
    vocabulary, aux = vocabulary_of(target), torch.randn(3, 3 * target.config.hidden_size)
    causal = random_draft(target, block_causal=True)
    whole, shorter = (
        DFlashGuesser(causal, target.embedding, vocabulary).propose(aux, [5, 6, 7], count)
        for count in (SIZE - 1, 2)
    )
    assert shorter == whole[:2]
    with pytest.raises(ValueError, match=r"5 guesses are asked .* block_size is 5: it makes 1 to 4"):
        DFlashGuesser(causal, target.embedding, vocabulary).propose(aux, [5, 6, 7], SIZE)
    with pytest.raises(ValueError, match="2 guesses .* each input of the block sees all masks"):
        DFlashGuesser(random_draft(target), target.embedding, vocabulary).propose(aux, [5, 6, 7], 2)


class Helped:
    """A draft of which some first guesses are put right, so that rounds accept unequal numbers; each block
    that it makes is kept.
    """

    def __init__(self, guesser: Any, outputs: Mapping[int, Sequence[int]]) -> None:
        self._guesser, self._outputs = guesser, outputs
        self._known = dict.fromkeys(outputs, 0)
        self.said: dict[int, list[list[int]]] = {text: [] for text in outputs}

    def propose(
        self, aux: Mapping[int, Tensor], tokens: Mapping[int, Sequence[int]], count: int
    ) -> dict[int, list[int]]:
        guesses: dict[int, list[int]] = self._guesser.propose(aux, tokens, count)
        for text, own in guesses.items():
            self.said[text].append(list(own))
            # The first call brings the prompt's slots and the token after it.
            first = not self._known[text]
            self._known[text] += 1 if first else len(tokens[text])
            right = (self._known[text] + text) % (count + 1)
            coming = self._outputs[text][self._known[text] : self._known[text] + right]
            guesses[text] = [*coming, *own[len(coming) :]]
        return guesses


class Alone:
    """One text of a batch as a guesser of one text."""

    def __init__(self, helped: Helped, text: int) -> None:
        self._helped, self._text = helped, text

    def propose(self, aux: Tensor, tokens: Sequence[int], count: int) -> list[int]:
        return self._helped.propose({self._text: aux}, {self._text: tokens}, count)[self._text]


class OneText:
    def __init__(self, guesser: DFlashGuesser) -> None:
        self._guesser = guesser

    def propose(
        self, aux: Mapping[int, Tensor], tokens: Mapping[int, Sequence[int]], count: int
    ) -> dict[int, list[int]]:
        ((text, states),) = aux.items()
        return {text: self._guesser.propose(states, tokens[text], count)}


@pytest.mark.parametrize("form", [form for form in FORMS if "width" not in form])
def test_decoding_is_lossless_and_a_batch_guesses_as_one_by_one(form: str, target: Target) -> None:
    draft, vocabulary = random_draft(target, **FORMS[form]), vocabulary_of(target)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in (9, 1, 30, 14)]
    outputs = {text: decode_alone(target, prompt, NEW + SIZE, None) for text, prompt in enumerate(prompts)}
    limits, clock = Limits(NEW, SIZE - 1, None), Clock()
    together = Helped(DFlashBatchGuesser(draft, target.embedding, vocabulary, len(prompts)), outputs)
    read = read_prompts(target, prompts, clock)
    answers = answer_batch(target, read, limits, clock)
    # Raises if what was decoded is not the target's own text.
    rounds = speculative_batch(target, together, read, answers, limits, clock)
    judged = judged_by_answers(
        Helped(DFlashBatchGuesser(draft, target.embedding, vocabulary, len(prompts)), outputs),
        prompts,
        answers,
        limits,
    )
    assert judged == rounds
    for text, prompt in enumerate(prompts):
        single = Helped(OneText(DFlashGuesser(draft, target.embedding, vocabulary)), outputs)
        output, alone = speculative_decode(
            target, Alone(single, text), prompt, NEW, SIZE - 1, None, outputs[text][:NEW]
        )
        assert output == outputs[text][:NEW] and alone == rounds[text]
        assert single.said[text] == together.said[text]
    assert {each.accepted for of_text in rounds for each in of_text} >= {0, 1, SIZE - 1}


def exported(folder: Path, layout: str, draft: DFlashModel, target: Target, dtype: str = "float32") -> Path:
    vocabulary, own = vocabulary_of(target), embedding_of(target, draft)
    state = draft.state_dict()
    if layout == "vllm":
        given = None if own is target.embedding else own
        return export_vllm(
            state, draft.config, vocabulary, folder, dtype, algorithm="dflash", embedding=given
        )
    return export_speculators(
        state,
        draft.config,
        vocabulary,
        own,
        folder,
        "org/target",
        ["LlamaForCausalLM"],
        dtype,
        draft_tokens=SIZE - 1,
        algorithm="dflash",
    )


@pytest.mark.parametrize("layout", ["vllm", "speculators"])
@pytest.mark.parametrize("form", FORMS)
def test_an_export_is_read_back_and_gives_the_same_logits(
    form: str, layout: str, target: Target, tmp_path: Path
) -> None:
    draft = random_draft(target, **FORMS[form])
    folder = exported(tmp_path / "draft", layout, draft, target)
    own = None if embedding_of(target, draft) is target.embedding else embedding_of(target, draft)
    assert verify_export(folder, draft, vocabulary_of(target), algorithm="dflash", embedding=own) == 0.0
    assert algorithm_of_folder(folder) is ALGORITHMS["dflash"]
    config, state, _ = load_export(folder)
    for key in ("block_size", "mask_token_id", "mask_embedding", "block_causal", "aux_layers"):
        assert getattr(config, key) == getattr(draft.config, key), key
    form_there = ALGORITHMS["dflash"].layouts["vllm"]
    assert form_there.keys(config) == form_there.keys(draft.config)
    assert set(state) == set(draft.state_dict())
    there = {path.name for path in folder.iterdir()}
    assert ("mask_embedding.pt" in there) == bool(draft.config.mask_embedding)


def test_the_probe_sees_every_weight_and_every_key(target: Target) -> None:
    algorithm = ALGORITHMS["dflash"]
    draft = random_draft(target, mask_embedding=True, sliding_window=7)
    before = algorithm.probe(draft, 0)
    for name, parameter in draft.named_parameters():
        kept = parameter.clone()
        parameter.mul_(1.5)
        # A norm after which the scale does not matter is seen by another change.
        parameter.flatten()[0].add_(0.5)
        assert not torch.equal(algorithm.probe(draft, 0), before), name
        parameter.copy_(kept)
    for change in ({"block_causal": True}, {"sliding_window": 8}, {"block_size": SIZE + 1}):
        other = random_draft(target, **{"mask_embedding": True, "sliding_window": 7, **change})
        other.load_state_dict(draft.state_dict())
        probe = algorithm.probe(other, 0)
        assert probe.shape != before.shape or not torch.equal(probe, before), change


def test_what_servers_read_of_a_config(target: Target, tmp_path: Path) -> None:
    """docs/dflash.md, "What a server does": layers by their outputs in one layout, by inputs in the other."""
    draft = random_draft(target, sliding_window=7)
    keys = json.loads((exported(tmp_path / "a", "vllm", draft, target) / "config.json").read_text())
    assert keys["architectures"] == ["DFlashDraftModel"] and keys["model_type"] == "qwen3"
    assert keys["dflash_config"] == {
        "mask_token_id": 2,
        "target_layer_ids": [layer - 1 for layer in AUX_LAYERS],
        "causal": False,
        "use_swa": True,
        "swa_window_size": 7,
    }
    assert keys["block_size"] == SIZE and "eagle_config" not in keys
    keys = json.loads((exported(tmp_path / "b", "speculators", draft, target) / "config.json").read_text())
    assert keys["speculators_model_type"] == "dflash" and keys["sliding_window_non_causal"] is True
    assert keys["aux_hidden_state_layer_ids"] == list(AUX_LAYERS)
    assert keys["transformer_layer_config"]["model_type"] == "qwen3"
    assert keys["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == SIZE - 1


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("vllm", {"dflash_config": {"mask_token_id": 2, "target_layer_ids": [1]}}, "says no causal"),
        ("vllm", {"dflash_config": {"sample_from_anchor": True}}, "sample_from_anchor is true"),
        ("vllm", {"block_size": None}, "says no block_size"),
        ("speculators", {"sample_from_anchor": True}, "sample_from_anchor is true"),
        ("speculators", {"aux_hidden_state_layer_ids": [1, 2]}, "not hidden states of 32 of 2 layers"),
        ("speculators", {"sliding_window_non_causal": None}, "says no sliding_window_non_causal"),
    ],
)
def test_an_export_that_is_no_such_draft_is_refused(
    layout: str, change: dict[str, Any], message: str, target: Target, tmp_path: Path
) -> None:
    folder = exported(tmp_path / "draft", layout, random_draft(target), target)
    keys = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ValueError, match=message):
        load_export(folder)


def test_an_export_with_other_layers_than_the_drafts_is_refused(target: Target, tmp_path: Path) -> None:
    draft = random_draft(target)
    with pytest.raises(ValueError, match=r"aux_layers is \[1, 2, 3\], the draft's config has"):
        export_vllm(
            draft.state_dict(),
            draft.config,
            vocabulary_of(target),
            tmp_path / "draft",
            aux_layers=(1, 2, 3),
            algorithm="dflash",
        )


def test_a_mask_embedding_starts_as_the_row_of_the_mask_token(target: Target) -> None:
    draft = random_draft(target, mask_embedding=True)
    draft.start_from(target.embedding)
    assert torch.equal(draft.mask_embedding, target.embedding[draft.config.mask_token_id])
    random_draft(target).start_from(target.embedding)


def test_shape_counts_the_parameters(target: Target) -> None:
    for form in FORMS.values():
        draft = random_draft(target, **form)
        sizes = sorted(parameter.numel() for parameter in draft.parameters())
        assert sizes == sorted(DFlashShape.of(draft.config).parameter_sizes)


def test_the_mask_token_without_a_word_of_the_recipe() -> None:
    def chosen(**keys: Any) -> int:
        return mask_token(LlamaConfig(vocab_size=100, **keys), section(mask_token_id=None))

    assert chosen(pad_token_id=7, eos_token_id=3) == 7
    assert chosen(pad_token_id=3, eos_token_id=[3, 4]) == 99
    assert chosen(pad_token_id=None, eos_token_id=3) == 99
    with pytest.raises(ValueError, match=r"draft.mask_token_id = 100 is not in the target's vocabulary"):
        mask_token(LlamaConfig(vocab_size=100), section(mask_token_id=100))


ROOT = Path(__file__).parents[2]


def recipe_with(folder: Path, start: Path, target: Target, **more: Any) -> Recipe:
    """A run that starts from the export `start`."""
    target.config.save_pretrained(folder / "target")
    keys = {"algorithm": "dflash", "vocab_size": VOCABULARY, "block_size": SIZE, "mask_token_id": 2}
    keys |= {"num_layers": 2, **more}
    layers = f"target.aux_layers={list(target.aux_layers)}"
    places = [f"target.path={folder / 'target'}", f"output_dir={folder}", f"train.init_from={start}"]
    return load_recipe(
        ROOT / "recipes" / "quickstart.yaml",
        [
            *("target.build=null", f"draft={json.dumps(keys)}", f"eval.draft_tokens={SIZE - 1}"),
            *(layers, *places),
        ],
    )


@pytest.mark.parametrize("layout", ["vllm", "speculators"])
def test_training_starts_from_either_layout(layout: str, target: Target, tmp_path: Path) -> None:
    draft = random_draft(target, mask_embedding=True, sliding_window=7)
    start = exported(tmp_path / "draft", layout, draft, target)
    settings: dict[str, Any] = {"mask_embedding": True, "sliding_window": 7}
    recipe = recipe_with(tmp_path, start, target, **settings)
    state, vocabulary = load_initial_draft(recipe)
    assert vocabulary.equals(vocabulary_of(target))
    assert all(torch.equal(state[name], tensor) for name, tensor in draft.state_dict().items())
    assert state.keys() == draft.state_dict().keys()
    for change, word in (
        ({"block_size": 4}, "block_size is 5 there and 4 here"),
        ({"mask_token_id": 3}, "'mask_token_id': 2"),
    ):
        other = recipe_with(tmp_path, start, target, **settings)
        draft_section = other.draft.model_copy(update=change)
        with pytest.raises(ValueError, match=word):
            load_initial_draft(other.model_copy(update={"draft": draft_section}))


def test_training_does_not_start_from_another_algorithm(target: Target, tmp_path: Path) -> None:
    config = build_draft_config(target.config, DraftSection(vocab_size=VOCABULARY))
    other = export_vllm(DraftModel(config).state_dict(), config, vocabulary_of(target), tmp_path / "draft")
    with pytest.raises(ValueError, match="is one of eagle3, and draft.algorithm is dflash"):
        load_initial_draft(recipe_with(tmp_path, other, target))


def test_a_mask_embedding_on_one_side_alone_is_refused(target: Target, tmp_path: Path) -> None:
    start = exported(tmp_path / "draft", "vllm", random_draft(target, mask_embedding=True), target)
    with pytest.raises(ValueError, match="mask_embedding is True there and False here"):
        load_initial_draft(recipe_with(tmp_path, start, target))


def test_a_run_is_evaluated_and_exported_with_its_card(tmp_path: Path) -> None:
    """By the stages that follow training, from the files that training leaves."""
    path = build_tiny_target(tmp_path / "target")
    layers = (1, 2, 3, 4, 5)
    draft_keys = {"algorithm": "dflash", "vocab_size": VOCABULARY, "block_size": SIZE, "mask_embedding": True}
    recipe = load_recipe(
        ROOT / "recipes" / "quickstart.yaml",
        [
            *(f"target.path={path}", "target.build=null", f"target.aux_layers={list(layers)}"),
            *(f"draft={json.dumps(draft_keys)}", f"output_dir={tmp_path / 'run'}"),
            *(f"eval.draft_tokens={SIZE - 1}", f"eval.max_new_tokens={NEW}", "eval.dtype=float32"),
        ],
    )
    target = load_target(recipe.target, "float32", "cpu")
    settings: dict[str, Any] = {"num_layers": 1, "mask_token_id": None, "mask_embedding": True}
    draft, untrained = random_draft(target, **settings), random_draft(target, **settings)
    vocabulary = vocabulary_of(target)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    result = evaluate_draft(recipe, target, draft, untrained, vocabulary, prompts, progress=False)
    assert result["lossless"] and result["acceptance_length"] >= 1.0
    assert result["acceptance_length"] == result["acceptance_length_untrained"]
    assert len(result["acceptance_by_position"]) == SIZE - 1
    (tmp_path / "run").mkdir()
    save_file(draft.state_dict(), tmp_path / "run" / "draft-final.safetensors")
    vocabulary.save(tmp_path / "run" / "vocabulary.safetensors")
    errors = export_draft(recipe)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"input_ids": prompts[0]}))
    assert [folder.name for folder in errors] == ["draft", "draft-speculators"]
    for folder in errors:
        config, _, _ = load_export(folder)
        assert (config.aux_layers, config.block_size) == (list(layers), SIZE)
        serve = (folder / "serve.md").read_text()
        assert '"method": "dflash"' in serve and f'"num_speculative_tokens": {SIZE - 1}' in serve
        check = check_of_folders(
            str(path), str(folder), str(tmp_path / "prompts.jsonl"), 4, SIZE - 1, "float32"
        )
        assert (check.algorithm, check.target.aux_layers) == ("dflash", layers)
