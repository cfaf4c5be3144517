"""The choice of each request's next token from its logits."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu.sampling import invert
from runtime.messages import SamplingParams, TokenLogprobs
from runtime.request import Request
from runtime.scheduler import Chunk

_MASK64 = (1 << 64) - 1
_FIRST_CANDIDATES = 1024
# Parameters and logits beyond these bounds change no choice, but would overflow float32. A forbidden token is less
# likely than any other and its logit finite: if all tokens are forbidden, one is drawn all the same.
LEAST_DIVISOR = 1e-6
LARGEST_LOGIT = 1e30
FORBIDDEN = -1e31
SECOND_DRAW = 1 << 32  # added to the choice, for a stream of its own


class Sampled(NamedTuple):
    """A chosen token, and the log-probabilities of the prompt's tokens that a chunk computes."""

    token_id: int | None  # None: none was sampled, or the logits were not finite, so that none could be chosen
    logprobs: TokenLogprobs | None = None
    prompt: list[TokenLogprobs] | None = None  # None: none were asked for, or their logits were not finite


class Best(NamedTuple):
    """What is known of a row of logits before a choice."""

    highest: float  # NaN if any logit is
    token_id: int  # of the highest
    log_total: float | None  # log Σ exp(logit); None: not computed


def sample(logits: Tensor, requests: list[Request]) -> list[Sampled]:
    """Choose one token for each row of `logits`, float32 (n, vocab), by the parameters of its request.

    A row's token depends on its own logits, parameters, seed and position alone, never on other rows.
    """
    highest, greedy = logits.max(dim=-1)
    best = [Best(*each, None) for each in zip(highest.tolist(), greedy.tolist(), strict=True)]
    return choose(logits, requests, best)


def choose(logits: Tensor, requests: list[Request], best: Sequence[Best]) -> list[Sampled]:
    """`sample` with the best token of each row known."""
    sampled = []
    for row, (request, (highest, token_id, log_total)) in enumerate(zip(requests, best, strict=True)):
        params = request.params
        if not math.isfinite(highest):
            sampled.append(Sampled(None))
            continue
        if params.temperature > 0:
            token_id = _draw_allowed(logits[row], request)
        elif changes_values(request) or not allows(request, token_id):
            token_id = int(adjust(logits[row], request).argmax())
        sampled.append(Sampled(token_id, logprobs_of(logits[row], token_id, params.logprobs, log_total)))
    return sampled


def changes_values(request: Request) -> bool:
    """Whether `adjust` changes more of the logits than to forbid tokens."""
    return request.has_penalty or bool(request.params.logit_bias)


def adjusts(request: Request) -> bool:
    """Whether `adjust` changes the logits of a request."""
    params = request.params
    forbids = request.forbidden_ids or params.allowed_token_ids or request.constraint
    return changes_values(request) or bool(forbids)


def allows(request: Request, token_id: int) -> bool:
    """Whether a token may be generated next."""
    only, constraint = request.params.allowed_token_ids, request.constraint
    return (
        token_id not in request.forbidden_ids
        and (not only or token_id in only)
        and (constraint is None or constraint.allows(request.generated, token_id))
    )


def allowed_tokens(request: Request, vocab: int) -> NDArray[np.bool_] | None:
    """For each token whether it may be generated next, by the request's grammar and list; None if it has neither.

    Forbidden tokens are taken away unless they are all that is left: a text that has come to its end ends.
    """
    only, constraint = request.params.allowed_token_ids, request.constraint
    if not only and constraint is None:
        return None
    allowed = np.full(vocab, not only)
    allowed[list(only)] = True
    if constraint is not None:
        follows = constraint.allowed(request.generated)[:vocab]
        both = allowed & follows
        allowed = both if both.any() else follows
    rest = allowed.copy()
    rest[list(request.forbidden_ids)] = False
    return rest if rest.any() else allowed


def adjust(logits: Tensor, request: Request, *, by_grammar: bool = True) -> Tensor:
    """Apply penalties, biases and forbidden tokens to a copy of `logits`; the same tensor if there are none.

    Without `by_grammar`, tokens that only the grammar forbids stay.
    """
    if not adjusts(request) or not (by_grammar or changes_values(request) or request.forbidden_ids):
        return logits
    params, forbidden = request.params, request.forbidden_ids
    logits = logits.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(request.token_ids)), device=logits.device)
        values, penalty = logits[seen], max(params.repetition_penalty, LEAST_DIVISOR)
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    generated = request.generated
    if generated and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(generated, device=logits.device).unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        logits[torch.tensor(list(params.logit_bias), device=logits.device)] += torch.tensor(
            list(params.logit_bias.values()), device=logits.device
        )
    logits.clamp_(-LARGEST_LOGIT, LARGEST_LOGIT)
    allowed = allowed_tokens(request, len(logits)) if by_grammar else None
    if allowed is not None:
        logits.masked_fill_(torch.from_numpy(~allowed).to(logits.device), FORBIDDEN)
    elif forbidden:
        logits[torch.tensor(sorted(forbidden), device=logits.device)] = FORBIDDEN
    return logits


def _draw_allowed(logits: Tensor, request: Request) -> int:
    """Draw from the tokens that may be generated.

    A mask of a grammar takes up to a millisecond. So a token is first drawn from all, if nothing is to be cut: if it is
    allowed, it stays, and else another one is drawn by the mask. Together they have the masked distribution.
    """
    params = request.params
    draw = uniform(request.seed, params.choice, request.num_generated)
    uncut = params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0
    if request.constraint is not None and uncut:
        token_id = _draw(adjust(logits, request, by_grammar=False), request, draw)
        if allows(request, token_id):
            return token_id
        draw = uniform(request.seed, params.choice + SECOND_DRAW, request.num_generated)
    return _draw(adjust(logits, request), request, draw)


def _draw(logits: Tensor, request: Request, draw: float) -> int:
    """Draw from softmax(logits / temperature), cut by top_k, by top_p of the rest, and by min_p of the maximum."""
    params = request.params
    probabilities = ((logits - logits.max()) / max(params.temperature, LEAST_DIVISOR)).softmax(-1)
    if params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0:
        return invert(probabilities, draw)
    values, ids = _likeliest(probabilities, params)
    keep = values.cumsum(-1) - values < params.top_p * (values.sum() if params.top_k else 1.0)
    keep &= values >= params.min_p * values[0]
    keep[0] = True
    return int(ids[invert(torch.where(keep, values, 0.0), draw)])


def _likeliest(probabilities: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Candidates in falling order: top_k of them, or enough to contain top_p and all above min_p."""
    vocab = probabilities.shape[0]
    if params.top_k:
        return probabilities.topk(min(params.top_k, vocab))
    values, ids = probabilities.topk(min(_FIRST_CANDIDATES, vocab))
    enough = bool(values.sum() >= params.top_p) or bool(values[-1] < params.min_p * values[0])
    return (values, ids) if enough else probabilities.sort(descending=True)


def uniform(seed: int, choice: int, position: int) -> float:
    """A uniform number in [0, 1): SplitMix64's finaliser (Steele, Lea and Flood 2014), applied to each argument."""
    state = 0
    for part in (seed, choice, position):
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def logprobs_of(
    logits: Tensor, token_id: int, alternatives: int | None, log_total: float | None = None
) -> TokenLogprobs | None:
    """The token's log-probability and the likeliest `alternatives`, before penalties; None if none are asked for."""
    if alternatives is None:
        return None
    if log_total is None:
        log_total = float(logits.logsumexp(-1))
    values, ids = logits.topk(alternatives)
    return TokenLogprobs(float(logits[token_id]) - log_total, ids.tolist(), (values - log_total).tolist())


def with_scores(chunks: Sequence[Chunk], sampled: Sequence[Sampled], scored: Tensor) -> list[Sampled]:
    """One entry for each chunk that samples or scores: its choice, with its prompt's log-probabilities.

    `scored` has the logits (m, vocab) of all scored rows, in the order of the chunks.
    """
    choices, found, row = iter(sampled), [], 0
    for chunk in chunks:
        rows = len(chunk.scored)
        choice = next(choices) if chunk.samples else Sampled(None)
        if rows:
            choice = choice._replace(prompt=_score(scored[row : row + rows], chunk))
            row += rows
        if rows or chunk.samples:
            found.append(choice)
    return found


def _score(logits: Tensor, chunk: Chunk) -> list[TokenLogprobs] | None:
    """The log-probability of the token that follows each scored row; None if logits are not finite."""
    request, logits = chunk.request, logits.float()
    first = chunk.start + chunk.scored.start + 1
    following = torch.tensor(request.token_ids[first : first + len(logits)], device=logits.device)
    totals = logits.logsumexp(-1, keepdim=True)
    if not bool(torch.isfinite(totals).all()):
        return None
    own = logits.gather(1, following[:, None])
    ranks = (logits > own).sum(-1) + 1
    values, ids = logits.topk(request.params.prompt_logprobs or 0)
    each = ((own - totals)[:, 0].tolist(), ids.tolist(), (values - totals).tolist(), ranks.tolist())
    return [TokenLogprobs(*one) for one in zip(*each, strict=True)]
