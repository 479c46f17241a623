"""The dense reference of DFlash beside the losses and gradients of speculators and SpecForge, of the same
weights and rows: equal where docs/dflash.md says that definitions agree, and apart where it says they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from judge.dense_reference import Frozen, LossRules, MicroBatch, StepResult, is_supervised
from judge.dflash_reference import dflash_step
from tests.served.dflash_drafts import random_weights

OTHERS = Path(__file__).with_name("dflash_by_others.py")
V, H, SIZE, DECAY, CLOSE = 61, 64, 5, 0.8, 1e-5
SLIDING = {"sliding_window": 7, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}
Beside = Callable[..., tuple[dict[str, Any], StepResult, float]]


def config_of(**more: Any) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    for name, value in {"block_size": SIZE, "mask_token_id": 0, "block_causal": False, **more}.items():
        setattr(config, name, value)
    return config


def theirs_of(config: LlamaConfig, **more: Any) -> dict[str, Any]:
    """The keys of a Qwen3 config for the same layers."""
    names: tuple[str, ...] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    names += ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_parameters")
    return {name: getattr(config, name) for name in names} | more


@pytest.fixture
def beside(run_there: Callable[..., str], tmp_path: Path) -> Beside:
    """Call (package, lengths, mask, anchors, our settings, theirs): their result, ours, and the factor
    between both losses, which is their one mean over all guesses beside a mean for each of ours.
    """

    def run(
        package: str,
        lengths: tuple[int, ...],
        mask: Tensor,
        anchors: list[int],
        ours: Mapping[str, Any],
        theirs: Mapping[str, Any],
    ) -> tuple[dict[str, Any], StepResult, float]:
        generator = torch.Generator().manual_seed(7)
        length, config = sum(lengths), config_of(**ours)
        weights = {name: w.double() for name, w in random_weights(config, 3 * H, V).items()}
        tokens = torch.randint(1, V, (length,), generator=generator)
        shapes = ((length, 3 * H), (length, H), (H,), (V, H), (V, H))
        aux, hidden, norm, embedding, head = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
        )
        case = {"weights": weights, "config": theirs_of(config, **theirs), "block_size": SIZE, "decay": DECAY}
        case |= {"mask_token_id": 0, "anchors": torch.tensor(anchors) + 1, "tokens": tokens, "mask": mask}
        case |= {"lengths": lengths, "aux": aux, "hidden": hidden, "norm": norm}
        case |= {"embedding": embedding, "head": head}
        torch.save(case, tmp_path / "case")
        run_there(OTHERS, package, tmp_path / "case", tmp_path / "result")
        teacher = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm
        if package == "specforge":
            # Its teacher is the text: rows whose softmax is the next token, to the last digit of fp64.
            teacher, head = (
                1e3 * torch.nn.functional.one_hot(tokens.roll(-1), V).double(),
                torch.eye(V).double(),
            )
        is_anchor = torch.zeros(length, dtype=torch.bool)
        is_anchor[anchors] = True
        batch = MicroBatch(tokens, mask, lengths, aux, teacher, is_anchor)
        frozen = Frozen(embedding, head, torch.zeros(V, dtype=torch.int64))
        # With an eta of 0 `lk_lambda` is KL(p, q), the loss of speculators. Of a hard teacher the cross
        # entropy, `kl`, is that already.
        kind = "kl" if package == "specforge" else "lk_lambda"
        rules = LossRules(SIZE - 1, DECAY, "predicted", "slots", kind, 0.0)
        counts = torch.stack([is_supervised(batch, "predicted", k).sum() for k in range(SIZE - 1)])
        weight = DECAY ** torch.arange(SIZE - 1) if package == "specforge" else torch.ones(SIZE - 1)
        factor = len(anchors) / float((counts * weight).sum())
        return torch.load(tmp_path / "result"), dflash_step(weights, config, frozen, [batch], rules), factor

    return run


def largest_difference(theirs: dict[str, Any], ours: StepResult, factor: float) -> float:
    """Of all gradients, by the norm of each."""
    apart = []
    for name, gradient in ours.gradients.items():
        expected = gradient * factor
        apart.append(float((theirs["gradients"][name] - expected).norm() / expected.norm()))
    return max(apart)


def with_holes(length: int) -> Tensor:
    """A mask whose blocks lose a guess here and there."""
    mask = torch.ones(length, dtype=torch.bool)
    mask[[5, 12, 13, 30]] = False
    return mask


@pytest.mark.parametrize(
    ("package", "lengths", "anchors", "ours", "theirs"),
    [
        ("speculators", (20, 24), [0, 1, 6, 9, 13, 20, 26, 31, 37], {}, {}),
        ("specforge", (44,), [0, 1, 6, 9, 15, 20, 26, 31, 37, 40], {}, {}),
        ("specforge", (44,), [0, 1, 6, 9, 15, 20, 26, 31, 37, 40],
         {"block_causal": True, "sliding_window": 7}, SLIDING),
    ],
    ids=["speculators, two documents", "specforge", "specforge, causal with a window"],
)  # fmt: skip
def test_gradients_agree_where_definitions_do(
    package: str,
    lengths: tuple[int, ...],
    anchors: list[int],
    ours: dict[str, Any],
    theirs: dict[str, Any],
    beside: Beside,
) -> None:
    found, result, factor = beside(package, lengths, with_holes(44), anchors, ours, theirs)
    apart = largest_difference(found, result, factor)
    print(f"{package}: gradients apart by {apart:.1e}, losses {found['loss']:.7f} {result.loss * factor:.7f}")
    assert apart <= CLOSE
    assert found["loss"] == pytest.approx(result.loss * factor, rel=CLOSE)


@pytest.mark.parametrize(
    ("why", "anchors", "ours", "theirs"),
    [
        # Anchor 17 has tokens 18 (its own) and 19 in its document; speculators lets it guess three more.
        ("a block runs into the next document", [1, 17], {}, {}),
        # Its window has its left edge at the anchor for the whole block, one key further left.
        ("a window", [14, 37], {"block_causal": True, "sliding_window": 7}, SLIDING),
    ],
)
def test_speculators_differs_as_the_page_says(
    why: str, anchors: list[int], ours: dict[str, Any], theirs: dict[str, Any], beside: Beside
) -> None:
    mask = torch.ones(44, dtype=torch.bool)
    found, result, factor = beside("speculators", (20, 24), mask, anchors, ours, theirs)
    assert largest_difference(found, result, factor) > 1e-2, why
