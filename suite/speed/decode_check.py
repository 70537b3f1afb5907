"""Are the kernels' logits right? The same tokens through the kernels and through the masked computation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from suite.modeling.decode import DecodeKernels
    from suite.speed.decode import Method
    from suite.speed.step import DecodeModel, Mlp

_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
_STEPS, _REAL_STEPS = 8, 200


@dataclass(frozen=True)
class Outcome:
    """Largest relative error of a step's logits with the kernels' own sets replayed, what is wrong, and a line to show.

    ``row`` has the columns of ``schema.DECODE_CHECK`` but the cell's id; None for dense.
    """

    error: float
    reason: str
    summary: str
    row: dict[str, float] | None = None


def check_dense(decode: DecodeModel, prompt: Tensor, start: tuple[int, int]) -> Outcome:
    """Compare the first dense step with the model's own forward pass over prompt and token.

    Attention rounds differently, too (scores and probabilities to the dtype): twice the bound of `check`.
    """
    decode.rewind(*start)
    found = _logits(decode, decode.dense)
    ids = torch.cat([prompt, decode.token[None]], 1)
    with torch.no_grad():
        model: Any = decode.model
        expected = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    error, limit = float((found - expected).norm() / expected.norm()), 2 * _limit(decode)
    reason = "" if error <= limit else f"check failed: logits off by {error:.3g}, over the bound {limit:.3g}"
    return Outcome(error, reason, f"dense step against the model's own: error {error:.2g} (bound {limit:.2g})")


def _limit(decode: DecodeModel) -> float:
    mlp = decode.mlps[0]
    one = 2 * _UNIT[decode.dtype] / math.sqrt(3) + _UNIT[torch.float32] * math.sqrt(mlp.d_model + mlp.d_ff)
    return 4 * one * math.sqrt(2 * len(decode.mlps))


def check(
    decode: DecodeModel, method: Method, kernels: DecodeKernels, start: tuple[int, int], *, real: bool
) -> Outcome:
    """Compare some steps (200 of a model with real weights, else 8) that follow the kernels' own tokens.

    The error of a step is ``||logits - replayed|| / ||replayed||``, head in fp32. A layer's MLP differs by the roundings
    of g, u, v and y to the dtype (independent and uniform: 2 u / sqrt(3)) and by fp32 sums of d_model and d_ff terms in another
    order; the errors of the layers' additions to the hidden state add up like a random walk, twice as far because the
    attention passes them on; 4 standard deviations are allowed.
    """
    from suite.speed.decode import MaskedMlp

    n_steps = min(_REAL_STEPS if real else _STEPS, decode.length - start[1] - 1)
    sets: list[list[Tensor]] = []

    def recorded(layer: int, x: Tensor) -> Tensor:
        y = kernels.run(layer, x)
        keep = torch.zeros(1, decode.mlps[layer].d_ff, dtype=torch.bool, device=x.device)
        keep[0, kernels.active(layer)] = True
        sets[-1].append(keep)
        return y

    decode.rewind(*start)
    tokens, found = [start[0]], []
    for _ in range(n_steps):
        sets.append([])
        found.append(_logits(decode, recorded))
        tokens.append(int(found[-1].argmax()))
        decode.rewind(tokens[-1], start[1] + len(found))
    at = iter(sets)
    now: list[list[Tensor]] = [[]]
    replayed = _follow(
        decode, MaskedMlp(decode, lambda layer, *_: now[0][layer]), tokens, start[1], lambda: now.__setitem__(0, next(at))
    )  # fmt: skip
    own = _follow(decode, MaskedMlp(decode, method.masked), tokens, start[1], lambda: None)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, replayed, strict=True)]
    error = max((math.inf if math.isnan(e) else e) for e in errors)
    limit = _limit(decode)
    reason = "" if error <= limit else f"check failed: logits off by {error:.3g}, over the bound {limit:.3g}"
    kl = sorted(_kl(b, a) for a, b in zip(found, own, strict=True))
    same = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(found, own, strict=True)) / n_steps
    summary = (
        f"{n_steps} steps, sets replayed: error {error:.2g} (bound {limit:.2g}); own sets: KL median "
        f"{kl[n_steps // 2]:.2g}, largest {kl[-1]:.2g}, equal next tokens {same:.1%}"
    )
    row = {"n_steps": n_steps, "max_error": error, "bound": limit, "kl_median": kl[n_steps // 2]}
    row |= {"kl_q95": kl[int(0.95 * (n_steps - 1))], "kl_max": kl[-1], "top1_agreement": same}
    return Outcome(error, reason, summary, row if math.isfinite(error) else None)


def _follow(decode: DecodeModel, mlp: Mlp, tokens: list[int], position: int, begin: object) -> list[Tensor]:
    found = []
    for number, token in enumerate(tokens[:-1]):
        begin()  # type: ignore[operator]
        decode.rewind(token, position + number)
        found.append(_logits(decode, mlp))
    return found


@torch.no_grad()
def _logits(decode: DecodeModel, mlp: Mlp) -> Tensor:
    return decode.logits(decode.hidden(mlp), wide=True)


def _kl(reference: Tensor, other: Tensor) -> float:
    p, q = functional.log_softmax(reference.double(), -1), functional.log_softmax(other.double(), -1)
    return float((p.exp() * (p - q)).sum())
