"""P-EAGLE as docs/peagle.md defines it, by a real vLLM: the same tokens in, the same logits out, at every
guess of every round.

vLLM keeps its cache over the rounds, overwrites masks and rejected guesses, and reads a prompt in one piece
or in several; the reference computes all slots of the whole text at once. Equal logits say that what is
trained is what is served.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from judge.dense_reference import MicroBatch
from judge.peagle_reference import peagle_guesses
from tests.served.peagle_pairs import (
    GUESSES,
    MASK_TOKEN,
    NORMS,
    PEagleDraft,
    Workshop,
    own_embedding,
    write_speculators,
    write_vllm,
)

TRAINER = Path(__file__).with_name("peagle_by_speculators.py")
SERVER = Path(__file__).with_name("peagle_by_vllm.py")
NEW_TOKENS = 30
VARIANTS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"layers": 2},
    "window": {"window": 8},
    "window smaller than the chain": {"window": 3},
    "norms": {"norms": NORMS},
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.open(tmp_path_factory.mktemp("peagle"))


@pytest.fixture(scope="module")
def drafts(workshop: Workshop) -> dict[str, PEagleDraft]:
    return {}


def draft_of(name: str, workshop: Workshop, drafts: dict[str, PEagleDraft]) -> PEagleDraft:
    if name not in drafts:
        drafts[name] = workshop.draft(**VARIANTS[name])
    return drafts[name]


def served(
    run_there: Callable[..., str], workshop: Workshop, folder: Path, **job: Any
) -> dict[str, torch.Tensor]:
    asked = {
        "target": str(workshop.path),
        "prompts": workshop.judged,
        "guesses": GUESSES,
        "new_tokens": NEW_TOKENS,
    }
    (folder / "job.json").write_text(json.dumps(asked | job))
    run_there(SERVER, folder / "job.json", folder / "record.safetensors")
    return load_file(folder / "record.safetensors")


def compare(found: dict[str, torch.Tensor], draft: PEagleDraft, guesses: int = GUESSES) -> list[int]:
    """Every guess of every round of every prompt; returns how many positions each round moved on."""
    weights = {name: weight.double() for name, weight in draft.weights.items()}
    assert torch.equal(found["embedding"][: len(draft.frozen.embedding)], own_embedding(draft))
    moved = []
    for prompt in range(sum(name.startswith("text.") for name in found)):
        fed, aux, slots, theirs = (found[f"{name}.{prompt}"] for name in ("fed", "aux", "slots", "logits"))
        # The first token is read by no slot. The last one has no hidden state yet; its slot is not asked.
        tokens = torch.cat((torch.zeros(1, dtype=torch.int64), fed))
        rows = torch.cat((aux, torch.zeros(1, aux.shape[1])))
        batch = MicroBatch(
            tokens, torch.ones(len(rows)).bool(), (len(rows),), rows, torch.zeros(len(rows), 1)
        )
        ours = torch.stack(peagle_guesses(weights, draft.config, draft.frozen, batch, guesses))[:, slots]
        assert theirs.shape == (len(slots), guesses, ours.shape[-1])
        error = (theirs.transpose(0, 1) - ours).norm(dim=-1) / ours.norm(dim=-1)
        assert error.max() <= 1e-5, error
        moved += slots.diff().tolist()
    return moved


def misfed(found: dict[str, torch.Tensor], prompt: int) -> list[int]:
    """The slots that were made of another token than the text's next one."""
    text, fed = found[f"text.{prompt}"][1:], found[f"fed.{prompt}"]
    known = min(len(text), len(fed))
    return (text[:known] != fed[:known]).nonzero().flatten().tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_vllm_guesses_what_the_reference_guesses(
    name: str,
    workshop: Workshop,
    drafts: dict[str, PEagleDraft],
    run_there: Callable[..., str],
    tmp_path: Path,
) -> None:
    draft = draft_of(name, workshop, drafts)
    folder = write_vllm(draft, tmp_path / "draft")
    found = served(run_there, workshop, tmp_path, draft=str(folder))
    assert not any(misfed(found, prompt) for prompt in range(len(workshop.judged)))
    moved = compare(found, draft)
    # Rounds that accept nothing, and rounds that accept a part of the chain: masks are overwritten.
    assert min(moved) == 1 and max(moved) > 2, moved


@pytest.mark.parametrize("way", ["as the draft", "alone"])
def test_the_speculators_layout_is_served_alike(
    way: str,
    workshop: Workshop,
    drafts: dict[str, PEagleDraft],
    run_there: Callable[..., str],
    tmp_path: Path,
) -> None:
    draft = draft_of("one layer", workshop, drafts)
    folder = str(write_speculators(draft, tmp_path / "draft", workshop.path))
    job = {"draft": folder} if way == "as the draft" else {"target": folder, "draft": None}
    compare(served(run_there, workshop, tmp_path, **job), draft)


def test_prompts_in_pieces_and_another_number_of_guesses(
    workshop: Workshop, drafts: dict[str, PEagleDraft], run_there: Callable[..., str], tmp_path: Path
) -> None:
    """A piece ends with masks too, which the next piece overwrites. Seven guesses of a draft that was trained
    on five.

    vLLM 0.32 makes a piece's last state of the prompt's last token instead of the next one, and keeps its
    key. With that token the reference agrees; if a later vLLM feeds the next token, this test says so.
    """
    draft = draft_of("one layer", workshop, drafts)
    folder = write_vllm(draft, tmp_path / "draft")
    long = [prompt for prompt in workshop.judged if len(prompt) > 20]
    found = served(run_there, workshop, tmp_path, draft=str(folder), guesses=7, chunk=20, prompts=long)
    compare(found, draft, 7)
    for number, prompt in enumerate(long):
        ends = [slot for slot in found[f"slots.{number}"].tolist() if slot < len(prompt) - 1]
        assert ends and misfed(found, number) == [end for end in ends if prompt[end + 1] != prompt[-1]]
    assert any(misfed(found, number) for number in range(len(long)))


def test_vllm_refuses_a_draft_without_its_mask(
    workshop: Workshop, drafts: dict[str, PEagleDraft], run_there: Callable[..., str], tmp_path: Path
) -> None:
    draft = draft_of("one layer", workshop, drafts)
    folder = write_vllm(draft, tmp_path / "draft", leave_out="mask_hidden")
    with pytest.raises(AssertionError, match="mask_hidden not found in weights"):
        served(run_there, workshop, tmp_path, draft=str(folder))


def test_speculators_has_our_loss_and_gradients(
    workshop: Workshop, drafts: dict[str, PEagleDraft], run_there: Callable[..., str], tmp_path: Path
) -> None:
    """One pass of its own training on one document, against the reference at the guesses that it drew, with
    its reduction: one mean over all of them. Its loss is the divergence, less than ours by the teacher's
    entropy; its gradient is the same.
    """
    draft = draft_of("two layers", workshop, drafts)
    folder = write_speculators(draft, tmp_path / "draft", workshop.path)
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(3, 320, (48,), generator=generator)
    mask = torch.rand(48, generator=generator) < 0.8
    mask[:2] = False  # A supervised first slot would make a chain of slot -1 there.
    aux, last = (torch.randn(48, width, generator=generator) for width in (384, 128))
    save_file({"tokens": tokens, "mask": mask, "aux": aux, "last": last}, tmp_path / "rows")
    run_there(TRAINER, folder, tmp_path / "rows", tmp_path / "result")
    theirs = load_file(tmp_path / "result")
    slots, guesses = theirs.pop("slots"), theirs.pop("guesses")
    assert guesses.max() == GUESSES - 1, "every guess is judged"

    weights = {name: weight.double().requires_grad_() for name, weight in draft.weights.items()}
    with torch.no_grad():
        normed = workshop.target.model.model.norm(last).double()
    batch = MicroBatch(tokens, mask, (48,), aux, normed)
    logits = torch.stack(peagle_guesses(weights, draft.config, draft.frozen, batch, GUESSES))
    counted = mask[slots + 1 + guesses]
    slots, guesses = slots[counted], guesses[counted]
    kept = torch.arange(len(draft.frozen.d2t)) + draft.frozen.d2t
    teacher = (normed[slots + 1 + guesses] @ draft.frozen.head.double()[kept].T).log_softmax(-1)
    drafted = logits[guesses, slots].log_softmax(-1)
    loss = (teacher.exp() * (teacher - drafted)).sum(-1).mean()
    loss.backward()
    assert theirs.pop("loss").item() == pytest.approx(loss.item(), rel=1e-5)
    # Of the whole embedding, which it trains, the mask token's row is ours.
    theirs["mask_embedding"] = theirs.pop("embed_tokens.weight")[MASK_TOKEN]
    # Its draft's head is frozen.
    assert theirs.keys() == weights.keys() - {"lm_head.weight"}
    for name in theirs:
        weight = weights[name]
        assert weight.grad is not None
        difference = theirs[name].reshape(weight.shape) - weight.grad
        assert difference.norm() <= 1e-5 * weight.grad.norm(), name
