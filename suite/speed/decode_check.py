"""Are the kernels' logits right? The same tokens through the kernels and through the masked computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels_numba.reference import UNIT_ROUNDOFF
from suite.decoding.sparse import MaskedMlp, SparseMethod
from suite.devices import dtype_name

if TYPE_CHECKING:
    from suite.decoding.step import DecodeModel, Mlp
    from suite.modeling.decode import DecodeKernels

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


def _rounding(decode: DecodeModel) -> float:
    """Standard deviation of an MLP's output relative to itself: g, u, v and y in the dtype, sums in fp32."""
    mlp = decode.mlps[0]
    return 2 * UNIT_ROUNDOFF[dtype_name(decode.dtype)] / math.sqrt(3) + UNIT_ROUNDOFF["float32"] * math.sqrt(
        mlp.d_model + mlp.d_ff
    )


def _limit(decode: DecodeModel) -> float:
    return 4 * _rounding(decode) * math.sqrt(2 * len(decode.mlps))


def check(
    decode: DecodeModel, method: SparseMethod, kernels: DecodeKernels, start: tuple[int, int], *, real: bool
) -> Outcome:
    """Compare some steps (200 of a model with real weights, else 8) that follow the kernels' own tokens.

    The error of a step is ``||logits - replayed|| / ||replayed||``, head in fp32. A layer's MLP differs by the roundings
    of g, u, v and y to the dtype (independent and uniform: 2 u / sqrt(3)) and by fp32 sums of d_model and d_ff terms in another
    order; the errors of the layers' additions to the hidden state add up like a random walk, twice as far because the
    attention passes them on; 4 standard deviations are allowed. A sparse model may amplify them more: the replay is made
    once again with random errors of that size in every MLP's output, and 4 times their largest effect is allowed. The
    median step has to keep the first bound.
    """
    n_steps = min(_REAL_STEPS if real else _STEPS, decode.length - start[1] - 1)
    found, tokens, sets = _follow_kernels(decode, kernels, start, n_steps)
    now: list[list[Tensor]] = [[]]
    masked = MaskedMlp(decode, lambda activations: now[0][activations.site.layer])

    def replay(mlp: Mlp) -> list[Tensor]:
        at = iter(sets)
        return _follow(decode, mlp, tokens, start[1], lambda: now.__setitem__(0, next(at)))

    replayed = replay(masked)
    amplified = max(_errors(replay(_shaken(decode, masked)), replayed))
    own = _follow(decode, MaskedMlp(decode, method.choose), tokens, start[1], lambda: None)
    return _outcome(_errors(found, replayed), _limit(decode), 4 * amplified, found, own)


def _follow_kernels(
    decode: DecodeModel, kernels: DecodeKernels, start: tuple[int, int], n_steps: int
) -> tuple[list[Tensor], list[int], list[list[Tensor]]]:
    """Logits of each step, the tokens (one more than steps), and by step the set that each layer used."""
    sets: list[list[Tensor]] = []

    def recorded(layer: int, x: Tensor, block: Tensor) -> Tensor:
        y = kernels.run(layer, x, block)
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
    return found, tokens, sets


def _outcome(errors: list[float], bound: float, amplified: float, found: list[Tensor], own: list[Tensor]) -> Outcome:
    """What the errors of the replay say, and how far the method's own sets lead elsewhere (``own``: logits)."""
    n_steps = len(errors)
    errors = sorted(errors)
    error, middle, limit = errors[-1], errors[n_steps // 2], max(bound, amplified)
    finite = math.isfinite(error)  # a bound may be infinite, where what is not finite in the replay is amplified
    reason = "" if finite and error <= limit else f"check failed: logits off by {error:.3g}, over the bound {limit:.3g}"
    if not reason and middle > bound:
        reason = f"check failed: logits of half of the steps off by {middle:.3g}, over the bound {bound:.3g}"
    kl = sorted(_kl(b, a) for a, b in zip(found, own, strict=True))
    same = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(found, own, strict=True)) / n_steps
    summary = (
        f"{n_steps} steps, sets replayed: error {error:.2g} (bound {limit:.2g}); own sets: KL median "
        f"{kl[n_steps // 2]:.2g}, largest {kl[-1]:.2g}, equal next tokens {same:.1%}"
    )
    row = {"n_steps": n_steps, "max_error": error, "bound": limit, "kl_median": kl[n_steps // 2]}
    row |= {"kl_q95": kl[int(0.95 * (n_steps - 1))], "kl_max": kl[-1], "top1_agreement": same}
    return Outcome(error, reason, summary, row if finite else None)


def _errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative error of every step's logits; NaN counts as infinite."""
    return [
        float(((a - b).norm() / b.norm()).nan_to_num(math.inf, math.inf)) for a, b in zip(found, expected, strict=True)
    ]


def _shaken(decode: DecodeModel, mlp: Mlp) -> Mlp:
    """The MLP with independent errors of the size of `_rounding` in its outputs."""
    generator, size = torch.Generator(device=decode.device).manual_seed(0), _rounding(decode)

    def run(layer: int, x: Tensor, block: Tensor) -> Tensor:
        y = mlp(layer, x, block)
        return (y.float() * (1 + size * torch.randn(y.shape, generator=generator, device=y.device))).to(y.dtype)

    return run


def _follow(
    decode: DecodeModel, mlp: Mlp, tokens: list[int], position: int, begin: Callable[[], object]
) -> list[Tensor]:
    found = []
    for number, token in enumerate(tokens[:-1]):
        begin()
        decode.rewind(token, position + number)
        found.append(_logits(decode, mlp))
    return found


@torch.no_grad()
def _logits(decode: DecodeModel, mlp: Mlp) -> Tensor:
    return decode.logits(decode.hidden(mlp), wide=True)


def _kl(reference: Tensor, other: Tensor) -> float:
    p, q = functional.log_softmax(reference.double(), -1), functional.log_softmax(other.double(), -1)
    return float((p.exp() * (p - q)).sum())
