"""Sparsify the gated MLPs of a model for the length of a ``with`` block."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from suite.errors import InputError
from suite.methods.base import Activations, Method, Mode
from suite.modeling.decode import DecodeKernels, Fallback, decode_kernels, why_not_numba
from suite.modeling.decode_probe import why_not_equal
from suite.modeling.gated_mlp import GatedMLP, find_gated_mlps
from suite.modeling.generating import with_right_prefill, without_compile
from suite.modeling.modes import (
    PredictorState,
    Select,
    ThresholdState,
    checked_thresholds,
    nan_tokens,
    placed_predictor,
    refuse_nan,
    resolve_mode,
    threshold_selection,
    top_k_selection,
)
from suite.modeling.scope import SCOPES, Explicit, Scope, ScopeRule, Tokens
from suite.registry import did_you_mean

__all__ = ["BACKENDS", "Attached", "Backend", "LayerSparsity", "ThresholdState", "attach", "sparsified"]

Backend = Literal["masked", "numba", "auto"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class LayerSparsity:
    """Realised sparsity of one layer: mean over its tokens in scope; NaN where there were none."""

    layer: int
    threshold: float | None
    sparsity_realized: float
    n_tokens: int


class _Run:
    """What the layers of one attached model share: the forward pass under way and its tokens in scope."""

    def __init__(self) -> None:
        self.under_way = False
        self.tokens: Tokens | None = None
        self.explicit: Explicit | None = None
        self.documents: Tensor | None = None
        self.kernels: DecodeKernels | None = None  # of this pass
        self.decoded: list[_Layer] = []

    def count(self) -> None:
        """Add what the kernels used in this pass to the counters: for all layers at once, which costs few launches."""
        if self.kernels is None or self.tokens is None or not self.decoded:
            return
        kept = self.kernels.kept([layer.mlp.layer for layer in self.decoded], self.tokens.total)
        n_tokens: int | Tensor = self.tokens.total
        if self.tokens.alive is not None:
            kept, n_tokens = kept * self.tokens.alive, self.tokens.alive.sum()
        for layer, used in zip(self.decoded, kept.sum(1).unbind(), strict=True):
            layer.kept += used
            layer.n_tokens += n_tokens


class _Layer:
    """One attached MLP: its forward pass and its counters."""

    def __init__(
        self,
        mlp: GatedMLP,
        method: Method,
        select: Select | None,
        run: _Run,
        predictor: PredictorState | None,
    ) -> None:
        self.mlp = mlp
        self._predictor = predictor
        self._method = method
        self._select = select
        self._run = run
        self._down_norms = cache(mlp.down_norm2)
        self.reset()
        self.nan_tokens = torch.zeros_like(self.kept)

    def reset(self) -> None:
        """Zero the counters; they live on the layer's device, so that counting never makes the host wait."""
        device = self.mlp.weights()[2].device
        self.kept = torch.zeros((), dtype=torch.int64, device=device)
        self.n_tokens = torch.zeros((), dtype=torch.int64, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """The MLP's forward pass, shape (batch, width, d_model), with the entries of v that are dropped set to 0."""
        if not self._run.under_way:
            name = self.mlp.module_name
            raise InputError(f"{name} ran outside the forward pass of the attached model: attach to the model you call")
        tokens = self._run.tokens
        if self._run.kernels is not None and not x.requires_grad:
            self._run.decoded.append(self)
            return self._run.kernels.run(self.mlp.layer, x)
        gate, up = self.mlp.gate_up(x)
        act = self.mlp.act(gate)
        product = act * up
        if tokens is not None:
            product = self._sparsify(x, gate, act, up, product, tokens)
        return self.mlp.down(product)

    def _sparsify(self, x: Tensor, gate: Tensor, act: Tensor, up: Tensor, product: Tensor, tokens: Tokens) -> Tensor:
        n_seen = product.numel() // self.mlp.d_ff
        if n_seen != tokens.total:
            raise InputError(f"{self.mlp.module_name} got {n_seen} tokens where the model got {tokens.total}")
        alive = None if tokens.alive is None else tokens.alive.to(product.device)
        self.n_tokens += len(tokens.documents) if alive is None else alive.sum()
        if self._select is None:
            self.kept = self.n_tokens * self.mlp.d_ff
            return product
        index = tokens.index if isinstance(tokens.index, slice) else tokens.index.to(product.device)
        if self._predictor is None:
            activations = Activations(
                gate=_rows(gate, index),
                act=_rows(act, index),
                up=_rows(up, index),
                down_norms=self._down_norms,
                layer=self.mlp.layer,
                documents=tokens.documents,
                positions=tokens.positions,
            )
            score = self._score(activations)
        else:
            score = self._predictor.logits(self.mlp.layer, _rows(x, index))
        keep = self._select(self.mlp.layer, score)
        self.kept += keep.sum() if alive is None else (keep.sum(-1) * alive).sum()
        return _zero_dropped(product, index, keep if alive is None else keep | ~alive[:, None])

    def _score(self, activations: Activations) -> Tensor:
        score = self._method.score(activations)
        if score.shape != (wanted := activations.up.shape):
            raise InputError(f"method {self._method.name}: score has shape {tuple(score.shape)}, not {tuple(wanted)}")
        self.nan_tokens += nan_tokens(score, activations)
        return score


def _rows(activation: Tensor, index: slice | Tensor) -> Tensor:
    flat = activation.flatten(0, -2)
    return flat[index] if isinstance(index, slice) else flat.index_select(0, index)


def _zero_dropped(product: Tensor, index: slice | Tensor, keep: Tensor) -> Tensor:
    """Set the entries of the rows `index` of v that are not kept to 0, in place where no gradient is asked for."""
    flat = product.flatten(0, -2)
    if product.requires_grad:
        everywhere = torch.ones_like(flat, dtype=torch.bool)
        everywhere[index] = keep
        return torch.where(everywhere.view_as(product), product, 0)
    # As integers: 0.2 ms for 512 x 1536 where masked_fill_ takes 1.6, and NaN or inf that is dropped becomes 0 too.
    integers = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    if isinstance(index, slice):
        integers[index].mul_(keep)
    else:
        integers.index_copy_(0, index, integers.index_select(0, index).mul_(keep))
    return product


class Attached:
    """Handle of a running attach: explicit tokens in scope, realised sparsity."""

    def __init__(self, layers: list[_Layer], thresholds: Tensor | None, run: _Run) -> None:
        self._layers = layers
        self._thresholds = thresholds
        self._run = run

    @contextmanager
    def positions(self, rows: Tensor, columns: Tensor, documents: Tensor, positions: Tensor) -> Iterator[None]:
        """Name the tokens in scope of the forward passes inside, in place of the scope's rule.

        Parameters
        ----------
        rows, columns : Tensor, shape (n_tokens,), int64
            Batch row and column in the input of each token in scope; empty tensors leave the pass dense.
        documents, positions : Tensor, shape (n_tokens,), int64
            Document and position in it of each token: keys of the random method's noise.

        Raises
        ------
        InputError
            Tensors of different lengths, or (at the forward pass) a token outside the batch.
        """
        shapes = {tuple(part.shape) for part in (rows, columns, documents, positions)}
        if len(shapes) != 1 or rows.ndim != 1:
            raise InputError(f"rows, columns, documents and positions must be vectors of one length, not {shapes}")
        before = self._run.explicit
        self._run.explicit = Explicit(rows.long(), columns.long(), documents.long(), positions.long())
        try:
            yield
        finally:
            self._run.explicit = before

    @contextmanager
    def documents(self, documents: Tensor) -> Iterator[None]:
        """Name the document of each batch row while the scope's rule picks the tokens: keys of the random method's noise.

        Parameters
        ----------
        documents : Tensor, shape (batch,), int64
        """
        before = self._run.documents
        self._run.documents = documents.long()
        try:
            yield
        finally:
            self._run.documents = before

    def sparsity(self) -> list[LayerSparsity]:
        """Realised sparsity of every layer over the tokens in scope since the last reset."""
        found = []
        for layer in self._layers:
            n_tokens, kept = int(layer.n_tokens), int(layer.kept)
            realized = 1 - kept / (n_tokens * layer.mlp.d_ff) if n_tokens else math.nan
            threshold = None if self._thresholds is None else float(self._thresholds[layer.mlp.layer])
            found.append(LayerSparsity(layer.mlp.layer, threshold, realized, n_tokens))
        return found

    def reset(self) -> None:
        """Zero the counters."""
        for layer in self._layers:
            layer.reset()

    @property
    def realized(self) -> float:
        """Mean over the layers of their realised sparsity; NaN before the first token in scope."""
        return math.fsum(layer.sparsity_realized for layer in self.sparsity()) / len(self._layers)


@contextmanager
def sparsified(
    model: nn.Module,
    method: Method,
    select: Select | None,
    *,
    scope: Scope = "all",
    thresholds: Tensor | None = None,
    kernels: DecodeKernels | None = None,
    predictor: PredictorState | None = None,
) -> Iterator[Attached]:
    """Install a method with a selection of one's own: what `attach` and the fit of thresholds share.

    Parameters
    ----------
    select : callable (layer, score) -> keep, or None
        Gets the scores of the tokens in scope, shape (n_tokens, d_ff), and returns the kept set, bool; None keeps all.
    thresholds : Tensor, shape (n_layers,), optional
        Only shown in `Attached.sparsity`.
    kernels : DecodeKernels, optional
        What computes a forward pass of few tokens, all in scope.
    predictor : PredictorState, optional
        Its logits take the place of the method's scores.
    """
    if scope not in SCOPES:
        raise InputError(f"unknown scope {scope!r}{did_you_mean(str(scope), SCOPES)}")
    if any(module in _attached for module in model.modules()):
        raise InputError(
            f"model {type(model).__name__} is attached already: leave that block first, nesting is refused"
        )
    mlps = find_gated_mlps(model)
    rule, run = ScopeRule(model, scope), _Run()
    fallback = None if kernels is None else Fallback(model, kernels)
    layers = [_Layer(mlp, method, select, run, predictor) for mlp in mlps]

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run.tokens = rule.tokens(args, kwargs, run.explicit)
        if run.tokens is not None and run.explicit is None and run.documents is not None:
            documents = run.documents.to(run.tokens.documents.device)
            run.tokens = replace(run.tokens, documents=documents[run.tokens.documents])
        run.kernels = kernels if fallback is not None and fallback.takes(run.tokens) else None
        run.decoded.clear()
        run.under_way = True

    def end(_module: nn.Module, _args: Any, output: Any) -> None:
        if output is not None:  # None: it raised
            run.count()
        run.tokens, run.kernels, run.under_way = None, None, False

    with ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        undo.callback(model.register_forward_hook(end, always_call=True).remove)
        undo.callback(without_compile(model))
        if scope != "all":
            undo.callback(with_right_prefill(model, scope))
        for layer in layers:
            undo.callback(_replace_forward(layer.mlp.module, layer.forward))
        yield Attached(layers, thresholds, run)
        refuse_nan(method, {layer.mlp.layer: layer.nan_tokens for layer in layers})


def _replace_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Shadow the forward method of a module; the function returned undoes it."""
    before = module.__dict__.get("forward")  # accelerate, for one, shadows it too
    module.__dict__["forward"] = forward
    _attached.add(module)

    def undo() -> None:
        _attached.discard(module)
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before

    return undo


@contextmanager
def attach(
    model: nn.Module,
    method: Method,
    state: ThresholdState | None = None,
    *,
    mode: Mode | None = None,
    scope: Scope = "all",
    backend: Backend = "masked",
    deterministic: bool = False,
) -> Iterator[Attached]:
    """Sparsify the gated MLPs of a model inside a ``with`` block.

    Tokens out of scope, and a sparsity of 0, give the dense model's output bit for bit; leaving the block, also by an
    exception, restores the model.

    Parameters
    ----------
    model : nn.Module
        Hugging Face causal language model with gated MLPs, the one whose forward pass or ``generate`` is called.
    method : Method
    state : Fit or PredictorFit, optional
        Fitted thresholds, or a trained predictor, for the practical mode.
    mode : {"none", "ideal", "practical"}, optional
        Default: none for a method without a ranking, practical with a state, else ideal.
    scope : {"all", "paper", "scored"}
        Tokens that are sparse, never padding: all; paper: prefill dense, decode steps sparse; scored: as paper, and
        the last token of the prefill sparse.
    backend : {"masked", "numba", "auto"}
        masked computes densely and then masks: the definition. numba computes passes whose every token is in scope
        with kernels that skip what is dropped, equal up to rounding, at the price of a transposed copy of every
        W_down: on the CPU (fp32) passes of one token, on a GPU of up to 8, which share the rows of the union of their
        active sets. All other passes are masked; a decode step too wide for the kernels says so once by a warning.
        auto: numba where it is possible.
    deterministic : bool
        CUDA kernels whose sums have one order, so that equal inputs give equal bits; slower for methods that select by a
        dense projection, the same kernels for all others. All else is deterministic anyway.

    Raises
    ------
    InputError
        Model without gated MLPs or attached already; a mode, a state or the backend numba that is not possible here.
    CellError
        At the end of the block: a score was NaN although the activations were finite.
    """
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}{did_you_mean(str(backend), BACKENDS)}")
    mode = resolve_mode(method, state, mode)
    thresholds = kernels = predictor = None
    select: Select | None = None
    if mode == "practical" and state is not None:
        thresholds = checked_thresholds(model, method, state)
        select = threshold_selection(thresholds)
        if isinstance(state, PredictorState):
            predictor = placed_predictor(model, state)
    elif mode == "ideal":
        select = top_k_selection(method)
    if backend != "masked":
        refused = why_not_numba(model, method, mode, state)
        if refused and backend == "numba":
            raise InputError(f"backend numba cannot run here: {refused}; use backend masked")
        if not refused and thresholds is not None:
            kernels = decode_kernels(model, method, thresholds, predictor, deterministic=deterministic)
            refused = why_not_equal(model, method, thresholds, predictor, kernels)
            if refused and backend == "numba":
                raise InputError(f"backend numba cannot run here: {refused}; use backend masked")
            kernels = None if refused else kernels
    with sparsified(
        model, method, select, scope=scope, thresholds=thresholds, kernels=kernels, predictor=predictor
    ) as attached:
        yield attached
