"""First weights with which a draft looks up what follows in its context, before it has learnt anything.

From random weights the draft's one attention layer learns to look back only after many steps, if at all
(docs/lab-notes.md): until it finds the right places, the gradient does not say where they are. But what such
a look-up needs is in what a draft reads. Slot m holds the embedding of token m + 1 and the state that the
target captured when it read token m. So slot m answers the question "what followed token m": its key is the
state, its value the embedding. And slot i asks with what it has of token i + 1: its embedding, and the state
before it.

Let u_i = [norm(embedding of token i + 1); norm(state_i)] and v_i = norm(state_i), for the states of a text.

- `fc` passes the lowest captured layer on, which still holds the token itself.
- Query and key are the canonical correlations of u_i and v_{i+1}: directions a_c and b_c with
  E[a_c u_i * b_d v_{i+1}] = rho_c where c = d, else 0. So a query matches the states that it expects next.
  They take the channels that turn least within the longest context, so that it does not matter how far back.
- Value and output map the embedding of a token to the head's row of that token, by least squares.
- The head is the target's, for the draft's vocabulary.

Nothing is frozen, and whatever is not named here is random. Legend: N slots of a text, H hidden size, D head
size, A entries of a slot's captured states, V vocabulary, Vd the draft's, P places of a canonical pair.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eagle3_ds.attention.rotary import rotary_frequencies, rotary_length
from eagle3_ds.draft import ReadText

MATCH_LOGIT = 10.0
"""The mean score of a slot that holds what was expected, before the softmax."""
FOUND_LOGIT = 15.0
"""The logit of a token that was found, without what the residual adds."""
FOUND_SHARE = 1.5
"""Norm of what is found, as a multiple of the residual that it is added to."""
RIDGE, MEAN_AS_NOISE = 1e-2, 1e3
"""Of mean variance, added to all directions; and how much of it lies in the direction of the mean, so that no
score depends on what all slots have in common.
"""
KEPT_SHARE = 0.3
"""What is left of the random queries and keys beside the wired ones, whose scores they would drown."""
FASTEST_TURN, FEWEST_PAIRS = 1.0, 1 / 8
"""Radians within the longest context that a channel may turn; but at least so many of all pairs are taken."""


@torch.no_grad()
def wire_lookup(draft: Any, text: ReadText, embedding: Tensor, head: Tensor) -> None:
    """Give a fresh `DraftModel` on the CPU, fp32, these weights, in place; some are drawn.

    Args:
        text: a piece of what it will be trained on.
        embedding: [V, H], what the draft reads. head: [Vd, H], the target's rows of the draft's vocabulary.
    """
    layer, config = draft.layers[0], draft.config
    attention, size = layer.self_attn, config.head_dim
    groups, share = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    head = head.float()
    draft.fc.weight.zero_()[:, : config.hidden_size].copy_(torch.eye(config.hidden_size))
    draft.lm_head.weight.copy_(head)
    states = torch.cat([draft.project_aux(rows.float()) for rows in text.aux.split(1024)])
    normed = _normed(states, layer.eps)
    channels = slow_channels(config)
    read = torch.cat((_normed(embedding[text.tokens].float(), layer.eps), normed), dim=1)
    (asking,) = torch.nonzero(text.follows, as_tuple=True)
    query, key, strength = _canonical_pairs(read[asking], normed[asking + 1], groups * len(channels))
    queries = attention.q_proj.weight.mul_(KEPT_SHARE).unflatten(0, (groups, share, size))
    keys = attention.k_proj.weight.mul_(KEPT_SHARE).unflatten(0, (groups, size))
    for group in range(groups):
        # Every key head gets some of the strongest pairs, spread evenly over its channels.
        own = slice(group, None, groups)
        spread = torch.linalg.qr(torch.randn(len(channels), len(channels)))[0]
        spread = spread[:, : len(strength[own])]
        # q k / sqrt(D) = gain^2 * sum of rho_c = MATCH_LOGIT
        least = 0.1 * len(channels)
        gain = math.sqrt(MATCH_LOGIT * math.sqrt(size) / max(least, float(strength[own].sum())))
        keys[group, channels] = functional.pad(gain * spread @ key[own], (config.hidden_size, 0))
        for rows in queries[group]:
            rows[channels] = gain * spread @ query[own]
    residual = layer.residual(states).norm(dim=1).mean()
    embeds = _normed(embedding[text.vocabulary].float(), layer.eps)
    _write_found(attention, embeds, head, groups, share, float(residual))
    # The final norm gives a residual that is all found the norm sqrt(H): its logit is then FOUND_LOGIT.
    draft.norm.weight.fill_(FOUND_LOGIT / (math.sqrt(config.hidden_size) * float(head.norm(dim=1).mean())))


def slow_channels(config: Any) -> Tensor:
    """The channels of a head that hardly turn within the longest context, int64 [P], and those that never do;
    at least an eighth of all that turn.
    """
    turn = rotary_frequencies(config, torch.device("cpu")).frequencies * rotary_length(config)
    pairs, turning = len(turn), 2 * len(turn)
    slow = max(1, round(FEWEST_PAIRS * pairs), int((turn < FASTEST_TURN).sum()))
    first = turn.argsort()[:slow].sort().values
    return torch.cat((first, first + pairs, torch.arange(turning, config.head_dim)))


def _normed(x: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), eps=eps)


def _canonical_pairs(u: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The strongest canonical pairs of u [N, Hu] and v [N, Hv]: fp32 [P, Hu], [P, Hv] and rho [P], P at most
    `count`. With M = L L^T for each covariance M and C between both, they are L_u^-T x and L_v^-T y of the
    singular vectors x and y of L_u^-1 C L_v^-T.
    """
    # A text of single tokens has no pair: then there is nothing but noise.
    number = max(1, len(u))
    mean_u, mean_v = u.sum(0) / number, v.sum(0) / number
    between = ((u - mean_u).T @ (v - mean_v) / number).double()
    root_u, root_v = _root(u - mean_u, mean_u), _root(v - mean_v, mean_v)
    half = torch.linalg.solve_triangular(root_u, between, upper=False)
    whitened = torch.linalg.solve_triangular(root_v, half.T, upper=False).T
    count = min(count, *whitened.shape)
    x, rho, y = torch.svd_lowrank(whitened, q=min(count + 16, *whitened.shape), niter=4)
    a = torch.linalg.solve_triangular(root_u.T, x[:, :count], upper=True).T
    b = torch.linalg.solve_triangular(root_v.T, y[:, :count], upper=True).T
    return a.float(), b.float(), rho[:count].float()


def _root(centred: Tensor, mean: Tensor) -> Tensor:
    """The Cholesky factor, fp64, of what `centred` [N, H] varies and of the noise that is added to it."""
    covariance = (centred.T @ centred / max(1, len(centred))).double()
    scale = max(float(covariance.diagonal().mean()), 1e-12)
    covariance.diagonal().add_(RIDGE * scale)
    direction = functional.normalize(mean.double(), dim=0)
    covariance += MEAN_AS_NOISE * scale * torch.outer(direction, direction)
    return torch.linalg.cholesky(covariance)


def _write_found(
    attention: Any, embeds: Tensor, head: Tensor, groups: int, share: int, residual: float
) -> None:
    """Value and output: from the normalised embeddings [Vd, H] of the draft's vocabulary to the directions of
    the head's rows [Vd, H], of norm FOUND_SHARE * `residual`; the strongest directions, over all key heads.
    """
    size = len(attention.v_proj.weight) // groups
    wanted = functional.normalize(head, dim=1)
    gram = (embeds.T @ embeds).double()
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()))
    mapping = torch.linalg.solve(gram, (embeds.T @ wanted).double())  # [from H, to H]
    reached = (embeds @ mapping.float()).norm(dim=1).mean()
    mapping *= FOUND_SHARE * residual / max(float(reached), 1e-12)
    count = min(groups * size, *mapping.shape)
    x, strength, y = torch.svd_lowrank(mapping, q=min(count + 16, *mapping.shape), niter=4)
    # Value and output are equally large, so that both learn alike.
    balance = strength[:count].sqrt()
    into, out = (x[:, :count] * balance).T.float(), (y[:, :count] * balance).float()
    values = attention.v_proj.weight.unflatten(0, (groups, size))
    outputs = attention.o_proj.weight.unflatten(1, (groups, share, size))
    for group in range(groups):
        own = slice(group, count, groups)
        number = len(into[own])
        values[group, :number] = functional.pad(into[own], (0, embeds.shape[1]))
        outputs[:, group, :, :number] = out[:, None, own] / share
