"""The method contract: a method scores the entries of a site; selection, masking, counting and fitting are done once, outside."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from suite.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["none", "ideal", "practical"]
Projection = Literal["gate", "up"]
Matrix = Literal["gate", "up", "down"]
Side = Literal["rows", "columns"]
SiteName = Literal["mlp.input", "mlp.neurons"]
NEURONS: SiteName = "mlp.neurons"
THIS_SUITE = "this suite"  # source of methods that are published nowhere else
PredictorInput = Literal["mlp", "block"]
Quantity = Literal["input", "gate", "act", "up", "product", "block"]
SITES: Mapping[SiteName, Quantity] = {"mlp.input": "input", NEURONS: "product"}  # the vector that is masked there


@dataclass(frozen=True)
class Site:
    """A vector of one layer whose entries a method sets to zero.

    Parameters
    ----------
    name : {"mlp.input", "mlp.neurons"}
        ``mlp.input``: the input x of gate_proj and up_proj. ``mlp.neurons``: v, the input of down_proj; what is dropped
        there need not be computed by gate_proj and up_proj either.
    layer : int
        Index of the layer, from 0.
    width : int
        Entries of the vector: d_model at ``mlp.input``, d_ff at ``mlp.neurons``.
    """

    name: SiteName
    layer: int
    width: int


@dataclass(frozen=True)
class Factor:
    """The best approximation of a projection by a low rank on the inputs that occur: ``W ~ U V^T``.

    Parameters
    ----------
    v : Tensor, shape (d_model, rank), the model's dtype
    u : Tensor, shape (d_ff, rank), the model's dtype
    residual : Tensor, shape (d_ff,), fp32
        Mean square over calibration tokens of what the approximation misses: of ``act(g)`` for gate, of ``u`` for up.
    """

    v: Tensor
    u: Tensor
    residual: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """``(x V) U^T``, shape (n_tokens, d_ff), of x (n_tokens, d_model): in fp64 where x is, else in fp32."""
        wide = x if x.element_size() == 8 else x.float()
        return wide @ self.v.to(wide.dtype) @ self.u.to(wide.dtype).T

    def rms(self, x: Tensor, act: Callable[[Tensor], Tensor] | None) -> Tensor:
        """``sqrt(act(q)^2 + residual)``, the root of the expected square, like ``q`` of `apply`; ``act`` is None for up."""
        guess = self.apply(x)
        return ((guess if act is None else act(guess)).square() + self.residual).sqrt()


@dataclass(frozen=True)
class Calibrated:
    """What a fit knows of one layer beside its thresholds.

    Parameters
    ----------
    moments : mapping of quantity to Tensor, shape (d_model,) for ``input`` and ``block``, else (d_ff,), fp32
        Mean squares over calibration tokens.
    factors : mapping of projection to Factor
    """

    moments: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Mapping[str, Factor] = field(default_factory=dict)


@dataclass(frozen=True)
class Activations:
    """What a method may rank by at one site, for the tokens in scope; each part is made when it is asked for.

    Notation of the paper: ``g = W_gate x``, ``a = act(g)``, ``u = W_up x``, ``v = a * u``, ``y = W_down v``.

    Parameters
    ----------
    site : Site
    values : mapping of quantity to Tensor, shape (n_seen, width), the model's dtype
        ``input`` (x), and at ``mlp.neurons`` ``gate`` (g), ``act`` (a), ``up`` (u) and ``product`` (v), of all tokens;
        ``block`` where the method's `predictor_input` asks for it.
    documents, positions : Tensor, shape (n_tokens,), int64
        Which document and which position in it each token is; noise is keyed by them so that batching cannot change it.
    norms : callable
        Makes `norm2`.
    act_fn : callable
        The model's activation function, for a method that approximates g.
    rows : slice or Tensor, shape (n_tokens,), int64
        Tokens in scope among those of ``values``.
    calibrated : Calibrated, optional
        What the fit knows of the layer.
    prompts : callable, optional
        Makes `prompt`.
    """

    site: Site
    values: Mapping[str, Tensor]
    documents: Tensor
    positions: Tensor
    norms: Callable[[Matrix, Side], Tensor]
    act_fn: Callable[[Tensor], Tensor]
    rows: slice | Tensor = field(default_factory=lambda: slice(None))
    calibrated: Calibrated | None = None
    prompts: Callable[[], Tensor] | None = None

    @property
    def x(self) -> Tensor:
        """The vector whose entries are set to zero, shape (n_tokens, site.width), the model's dtype."""
        vector: Tensor = getattr(self, SITES[self.site.name])
        return vector

    @cached_property
    def input(self) -> Tensor:
        """``x`` of the MLP, shape (n_tokens, d_model), the model's dtype."""
        return self._rows("input")

    @cached_property
    def block(self) -> Tensor:
        """Input of the layer's block behind its first norm, known before attention; (n_tokens, d_model), the model's dtype."""
        return self._rows("block")

    @cached_property
    def gate(self) -> Tensor:
        """``g``, shape (n_tokens, d_ff), the model's dtype."""
        return self._rows("gate")

    @cached_property
    def act(self) -> Tensor:
        """``a = act(g)``, shape (n_tokens, d_ff), the model's dtype."""
        return self._rows("act")

    @cached_property
    def up(self) -> Tensor:
        """``u``, shape (n_tokens, d_ff), the model's dtype."""
        return self._rows("up")

    @cached_property
    def product(self) -> Tensor:
        """``v = act(g) * u``, shape (n_tokens, d_ff), in the model's dtype."""
        return self._rows("product")

    def _rows(self, name: str) -> Tensor:
        if name not in self.values:
            raise InputError(f"a score at site {self.site.name} asks for {name!r}, which is computed after it")
        value = self.values[name]
        return value[self.rows] if isinstance(self.rows, slice) else value.index_select(0, self.rows)

    def norm2(self, matrix: Matrix, of: Side) -> Tensor:
        """Squared L2 norms of the rows or columns of ``W_gate``, ``W_up`` (d_ff, d_model) or ``W_down`` (d_model, d_ff), fp32."""
        return self.norms(matrix, of)

    def moments(self, name: Quantity) -> Tensor:
        """Mean square of every entry of a quantity over calibration tokens, fp32: (d_model,) for ``input``, else (d_ff,).

        Raises
        ------
        InputError
            The fit does not hold it, or there is none.
        """
        if self.calibrated is None or name not in self.calibrated.moments:
            place = f"the fit of layer {self.site.layer}"
            raise InputError(f"{place} holds no moments of {name!r}: name them in the method's `moments`, and fit")
        return self.calibrated.moments[name]

    def factor(self, name: Projection) -> Factor:
        """Approximation of a projection by a low rank.

        Raises
        ------
        InputError
            The fit does not hold it, or there is none.
        """
        if self.calibrated is None or name not in self.calibrated.factors:
            place = f"the fit of layer {self.site.layer}"
            raise InputError(f"{place} holds no factor of {name!r}: name it in the method's `factors`, and fit")
        return self.calibrated.factors[name]

    @cached_property
    def prompt(self) -> Tensor:
        """Sum over the tokens of its prompt of ``v^2 / norm(v)^2`` for every token, shape (n_tokens, d_ff), fp32 (GRIFFIN).

        Raises
        ------
        InputError
            The method does not declare `needs_prompt`, or a token has no prompt.
        """
        if self.prompts is None:
            raise InputError("no statistics of the prompt are kept: set the method's `needs_prompt`")
        return self.prompts()


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A sparsification method of a gated MLP; its fields are its parameters.

    Class attributes
    ----------------
    name : registry name.
    modes : modes that exist for it (``none`` for methods without a ranking).
    sites : where it sets entries to zero, in the order of the forward pass; it scores at each.
    first_projection : projections computed densely before neurons are ranked: one, "both", or None. With one, the
        practical mode of its magnitude, or of that times `neuron_scale` or what `low_rank` says, has kernels.
    needs_predictor : True if the practical mode needs a trained predictor of the kept set; then it has no other site.
    moments : quantities whose mean squares over calibration tokens the fit holds, for `Activations.moments`.
    needs_prompt : True if it ranks by `Activations.prompt`.
    predicted : quantities whose expected squares, multiplied, stand in for the square of the score where they come from
        low-rank approximations of gate and up: what a gated predictor is made of. Empty: it has none.
    fixed_set : True if its scores are the same for all tokens that follow a prompt, or for all tokens, so that its set is
        known before any of them is computed: its practical mode then keeps exactly k too, and needs no threshold.
    source : where it was published, or `THIS_SUITE`; empty for a method of a user's own.
    """

    sparsity: float = 0.0

    name: ClassVar[str]
    modes: ClassVar[tuple[Mode, ...]] = ("ideal", "practical")
    sites: ClassVar[tuple[SiteName, ...]] = (NEURONS,)
    first_projection: ClassVar[Projection | Literal["both"] | None] = None
    needs_predictor: ClassVar[bool] = False
    moments: ClassVar[tuple[Quantity, ...]] = ()
    needs_prompt: ClassVar[bool] = False
    predicted: ClassVar[tuple[Quantity, ...]] = ()
    fixed_set: ClassVar[bool] = False
    source: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, (int, float)) or isinstance(self.sparsity, bool) or not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity {self.sparsity!r} of method {self.name}: must be a number in [0, 1)")
        for declared, known in ((self.sites, SITES), (self.moments, get_args(Quantity))):
            for one in declared:
                if one not in known:
                    raise InputError(f"method {self.name} declares {one!r}; known: {', '.join(known)}")

    @property
    def factors(self) -> Mapping[Projection, int]:
        """Projections whose approximation the fit holds, for `Activations.factor`, and their rank."""
        return {}

    @property
    def needs_calibration(self) -> bool:
        """Whether its score asks the fit for moments or factors: then its ideal mode takes a fit too."""
        return bool(self.moments or self.factors)

    @property
    def predictor_input(self) -> PredictorInput:
        """What its factors read: the input of the MLP, or that of the block behind the block's first norm."""
        return "mlp"

    @property
    def fit_rounds(self) -> int:
        """Rounds of its fit: the first on dense activations, later ones on those behind layers sparse by the round before."""
        return 1

    @property
    def needs_threshold(self) -> bool:
        """Whether its practical mode keeps what is not below a threshold a site and layer."""
        return "practical" in self.modes and not self.needs_predictor and not self.fixed_set

    @property
    def exact_projection(self) -> str:
        """Projection that is computed for all neurons: gate, up or both; "auto" where a fit chooses it, "" where none is."""
        return self.first_projection or ""

    @property
    def candidates(self) -> Mapping[str, Sequence[Any]]:
        """Values, by parameter, that a fit chooses one of on its calibration text; no parameter is left open by default."""
        return {}

    def predicted_weight(self, norm2: Callable[[Matrix, Side], Tensor]) -> Tensor | None:
        """Weight of each neuron in the square of a score that a gated predictor stands in for, (d_ff,), fp32; None for 1."""
        return None

    def neuron_scale(self, calibrated: Calibrated) -> Tensor | None:
        """The factor of each neuron in a score that is ``abs(first projection)`` times it; None if the score is not such.

        Parameters
        ----------
        calibrated : Calibrated
            What the fit knows of the layer.

        Returns
        -------
        Tensor, shape (d_ff,), fp32, or None
        """
        return None

    def low_rank(self, calibrated: Calibrated) -> Factor | None:
        """The factor of the other projection, in a score ``abs(exact projection) sqrt(q^2 + residual)``; None if it is no such.

        ``q`` is what the factor, of what the fit knows of the layer, gives of `predictor_input`; it and `exact_projection`
        stand behind the activation function where they are the gate's.
        """
        return None

    def sparsity_at(self, site: Site) -> float:
        """Share of a site's entries that are dropped: the same at all, unless a method allocates it."""
        return self.sparsity

    @abstractmethod
    def score(self, activations: Activations) -> Tensor:
        """Rank of every entry at the site, larger is kept: shape (n_tokens, site.width), any float dtype (compared in fp32)."""

    def parameters(self) -> dict[str, Any]:
        """Fields by name: what identifies this method in a cell's key."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def width_of(quantity: str, d_model: int, d_ff: int) -> int:
    """Entries of a quantity of one token."""
    return d_model if quantity in ("input", "block") else d_ff


def kept_count(width: int, sparsity: float) -> int:
    """Entries kept of a site: ``k = width - floor(sparsity * width)``, at least 1; exact for decimal sparsities such as .29."""
    return max(1, width - math.floor(Fraction(str(sparsity)) * width))


def select_top_k(score: Tensor, k: int) -> Tensor:
    """Exactly k entries a token: all above the kth value, then those equal to it, lowest index first.

    Parameters
    ----------
    score : Tensor, shape (n_tokens, width), any float dtype
        Compared in fp32. NaN ranks above everything, so that it reaches the output.
    k : int, 1 <= k <= width

    Returns
    -------
    Tensor, shape (n_tokens, width), bool
    """
    import numpy as np  # late: listing the methods must load neither
    import torch

    width = score.shape[-1]
    if not 1 <= k <= width:
        raise InputError(f"cannot keep k={k} of width={width} entries")
    if k == width:
        return torch.ones_like(score, dtype=torch.bool)
    score = score.detach()
    if score.device.type == "cuda" and (kernel := _cuda_top_k()) is not None:
        return kernel(score if score.dtype == torch.bfloat16 else score.float(), k)
    score = score.float()
    if score.device.type != "cpu":  # looking for ties first would make the host wait for the device
        return _break_ties(score, torch.topk(score, k, dim=-1, sorted=True).values[:, -1:], k)
    # numpy's vectorised partition takes 1.6 ms for 512 x 1536 scores, torch.topk 4.4 to 10
    kth = torch.from_numpy(np.partition(score.numpy(), width - k, axis=-1)[:, width - k, None])
    keep = ~(score < kth)  # NaN, which numpy and torch sort above everything, is kept
    surplus = (keep.sum(-1) > k).nonzero().flatten()  # bf16 scores tie often; fp32 hardly ever
    if len(surplus):
        keep[surplus] = _break_ties(score[surplus], kth[surplus], k)
    return keep


@cache
def _cuda_top_k() -> Callable[[Tensor, int], Tensor] | None:
    """Kernel of the selection, None where Numba has no CUDA target: `torch.topk` gives the same set, more slowly."""
    try:
        from kernels_numba.gpu.masking import keep_top_k
    except ImportError:
        return None
    return keep_top_k


def _break_ties(score: Tensor, kth: Tensor, k: int) -> Tensor:
    """Of the scores equal to the kth, keep those of lowest index until there are k; NaN equals NaN, above infinity."""
    import torch  # late: listing the methods must not load it

    nan, kth_nan = score.isnan(), kth.isnan()
    above = (score > kth) | (nan & ~kth_nan)
    equal = (score == kth) | (nan & kth_nan)
    room = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def select_threshold(score: Tensor, threshold: float | Tensor) -> Tensor:
    """Entries that the practical mode keeps: all but those with ``score < threshold``; so NaN is kept, and -inf keeps all."""
    return ~(score.float() < threshold)
