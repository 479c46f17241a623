"""A draft that begins with a look-up begins with the same weights on any mesh."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from eagle3_ds.algorithms.eagle3 import DraftModel
from eagle3_ds.draft import ReadText
from eagle3_ds.layout import PackedSequence
from eagle3_ds.topology import maybe_setup_distributed
from eagle3_ds.train import first_text
from eagle3_ds.train.first_text import look_up_from_start
from judge.cases import Case, make_inputs
from judge.product import as_pack, make_recipe, vocabulary_map
from judge.ranks import run_ranks

pytestmark = pytest.mark.ranks
ONE = Case(documents="answers")


def begun(case: Case, at_once: int) -> tuple[dict[str, Tensor], Tensor]:
    """On a rank: a fresh draft's weights after the look-up start, and the next random number."""
    topology = maybe_setup_distributed(case.ulysses, case.ring, case.draft_dp)
    inputs = make_inputs(ONE)
    frozen = inputs.frozen
    # Another draft_dp rank has another pack, which must not matter.
    pack = as_pack(inputs.steps[topology.place.dp_rank][0][0], frozen)
    torch.manual_seed(1)
    draft = DraftModel(inputs.config)
    with (
        mock.patch.object(first_text, "SLOTS_AT_ONCE", at_once),
        mock.patch.object(draft, "look_up_from_start", wraps=draft.look_up_from_start) as made,
    ):
        look_up_from_start(
            draft, make_recipe(case), topology, pack, frozen.embedding, frozen.head, vocabulary_map(frozen)
        )
    if topology.place.rank == 0:
        require_text_of(pack, made.call_args.args[0])
    else:
        made.assert_not_called()
    return {name: parameter.detach() for name, parameter in draft.named_parameters()}, torch.rand(3)


def require_text_of(pack: PackedSequence, text: ReadText) -> None:
    """Rank 0 got the pack's rows, the token behind each, and no pair across documents."""
    count = sum(pack.lengths)
    assert torch.equal(text.aux, pack.aux[:count].float())
    assert torch.equal(text.tokens[:-1], pack.token_ids[1:count])
    follows = torch.ones(count, dtype=torch.bool)
    follows[torch.tensor(pack.lengths).cumsum(0) - 1] = False
    assert len(pack.lengths) > 1 and torch.equal(text.follows, follows)


def test_it_is_the_same_on_any_mesh() -> None:
    ((alone, drawn),) = run_ranks(1, begun, ONE, 1024)
    torch.manual_seed(1)
    fresh = dict(DraftModel(make_inputs(ONE).config).named_parameters())
    changed = {name for name in alone if not torch.equal(alone[name], fresh[name])}
    assert {"fc.weight", "lm_head.weight", "norm.weight"} < changed and any(
        "k_proj" in name for name in changed
    )
    for draft_dp, ring, ulysses in ((1, 2, 2), (2, 1, 2), (1, 2, 1)):
        case = replace(ONE, draft_dp=draft_dp, ring=ring, ulysses=ulysses)
        for weights, next_number in run_ranks(case.world_size, begun, case, 7):
            assert all(torch.equal(weights[name], alone[name]) for name in alone), str(case)
            assert torch.equal(next_number, drawn), "the ranks' random state is no longer equal"
