"""Sparsify the gated MLPs of a model for the length of a ``with`` block."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from suite.errors import InputError
from suite.methods.base import Calibrated, Method, Mode
from suite.modeling.decode import DecodeKernels, Fallback, why_not_numba
from suite.modeling.decode_layers import decode_kernels
from suite.modeling.decode_probe import why_not_equal
from suite.modeling.gated_mlp import block_norm, find_gated_mlps
from suite.modeling.generating import with_right_prefill, without_compile
from suite.modeling.layer import LayerSparsity, Run, SparseLayer
from suite.modeling.modes import (
    PredictorState,
    Select,
    ThresholdState,
    checked_thresholds,
    placed_calibration,
    placed_predictor,
    refuse_nan,
    resolve_mode,
    settled,
    site_thresholds,
    threshold_selection,
    top_k_selection,
)
from suite.modeling.scope import SCOPES, Explicit, Scope, ScopeRule
from suite.registry import did_you_mean

__all__ = ["BACKENDS", "Attached", "Backend", "LayerSparsity", "ThresholdState", "attach", "sparsified"]

Backend = Literal["masked", "numba", "auto"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Attached:
    """Handle of a running attach: explicit tokens in scope, realised sparsity.

    Attributes
    ----------
    needs_prompt : bool
        Whether the method ranks by the prompt, so that one pass must hold it and the tokens in scope, or begin their rows.
    """

    def __init__(self, layers: list[SparseLayer], method: Method, thresholds: Tensor | None, run: Run) -> None:
        self._layers = layers
        self._thresholds = {} if thresholds is None else site_thresholds(method, thresholds)
        self._run = run
        self.needs_prompt = method.needs_prompt

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
        """Realised sparsity of every layer and site over the tokens in scope since the last reset."""
        found = []
        for layer in self._layers:
            for counter in layer.counters.values():
                site, n_tokens, kept = counter.site, int(counter.n_tokens), int(counter.kept)
                realised = 1 - kept / (n_tokens * site.width) if n_tokens else math.nan
                threshold = self._thresholds.get((site.name, site.layer))
                found.append(LayerSparsity(site.layer, site.name, threshold, realised, n_tokens))
        return found

    def reset(self) -> None:
        """Zero the counters."""
        for layer in self._layers:
            for counter in layer.counters.values():
                counter.reset()

    @property
    def realised(self) -> float:
        """Mean over the layers and sites of their realised sparsity; NaN before the first token in scope."""
        found = self.sparsity()
        return math.fsum(layer.sparsity_realized for layer in found) / len(found)


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
    calibrated: Sequence[Calibrated] | None = None,
) -> Iterator[Attached]:
    """Install a method with a selection of one's own: what `attach` and the fit of thresholds share.

    Parameters
    ----------
    select : callable (site, score) -> keep, or None
        Gets the scores of the tokens in scope, shape (n_tokens, site.width), and returns the kept set, bool; None keeps
        all.
    thresholds : Tensor, shape (n_sites * n_layers,), optional
        Only shown in `Attached.sparsity`.
    kernels : DecodeKernels, optional
        What computes a forward pass of few tokens, all in scope.
    predictor : PredictorState, optional
        Its logits take the place of the method's scores.
    calibrated : sequence of Calibrated, one a layer, optional
        What the method's scores ask of a fit.
    """
    if scope not in SCOPES:
        raise InputError(f"unknown scope {scope!r}{did_you_mean(str(scope), SCOPES)}")
    if any(module in _attached for module in model.modules()):
        raise InputError(
            f"model {type(model).__name__} is attached already: leave that block first, nesting is refused"
        )
    mlps = find_gated_mlps(model)
    rule, run = ScopeRule(model, scope), Run()
    fallback = None if kernels is None else Fallback(model, kernels, steps_only=method.needs_prompt)
    layers = [
        SparseLayer(
            mlp, method, select, run, predictor=predictor, calibrated=calibrated[mlp.layer] if calibrated else None
        )
        for mlp in mlps
    ]

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run.tokens = rule.tokens(args, kwargs, run.explicit)
        if run.tokens is not None and run.explicit is None and run.documents is not None:
            documents = run.documents.to(run.tokens.documents.device)
            run.tokens = replace(run.tokens, documents=documents[run.tokens.documents])
        run.prompt = rule.prompt(args, kwargs, run.tokens, run.explicit) if method.needs_prompt else None
        run.kernels = kernels if fallback is not None and fallback.takes(run.tokens) else None
        run.decoded.clear()
        run.under_way = True

    def end(_module: nn.Module, _args: Any, output: Any) -> None:
        if output is not None:  # None: it raised
            run.count()
        run.tokens, run.prompt, run.kernels, run.under_way = None, None, None, False

    with ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        undo.callback(model.register_forward_hook(end, always_call=True).remove)
        undo.callback(without_compile(model))
        if scope != "all":
            undo.callback(with_right_prefill(model, scope))
        for layer in layers:
            undo.callback(_replace_forward(layer.mlp.module, layer.forward))
            if layer.reads == "block":
                norm = block_norm(model, layer.mlp)
                undo.callback(norm.register_forward_hook(_hand_to(layer)).remove)
        yield Attached(layers, method, thresholds, run)
        refuse_nan(method, {c.site: c.nan_tokens for layer in layers for c in layer.counters.values()})


def _hand_to(layer: SparseLayer) -> Callable[[nn.Module, Any, Tensor], None]:
    """Hook of a block's first norm that hands its output to the layer of the block."""

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        layer.block = output

    return hook


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
        Fitted thresholds, or a trained predictor, for the practical mode; also what an ideal mode asks of a calibration.
    mode : {"none", "ideal", "practical"}, optional
        Default: none for a method without a ranking, practical with a state, else ideal.
    scope : {"all", "paper", "scored"}
        Tokens that are sparse, never padding: all; paper: prefill dense, decode steps sparse; scored: as paper, and
        the last token of the prefill sparse.
    backend : {"masked", "numba", "auto"}
        masked computes densely and then masks: the definition. numba computes passes whose every token is in scope
        with kernels that skip what is dropped, equal up to rounding, at the price of a transposed copy of every
        W_down: on the CPU (fp32) passes of one token, on a GPU of up to 8, which share the rows of the union of their
        active sets; only one where a choice that reads the block's input is made by torch. All other passes are masked; a
        decode step too wide for the kernels says so once by a warning. Of methods with a fixed set the kept neurons are
        gathered, once or once a prompt, and torch multiplies them: on any device, in any dtype; sets of each row's own in
        batches of up to 1 / (1 - sparsity) rows, whose copies are no larger than the dense layers.
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
    method = settled(method, state)
    thresholds = kernels = predictor = None
    calibrated = placed_calibration(model, method, state) if method.needs_calibration else None
    select: Select | None = None
    if mode == "ideal" or (mode == "practical" and method.fixed_set):
        select = top_k_selection(method)
    elif mode == "practical" and state is not None:
        thresholds = checked_thresholds(model, method, state)
        select = threshold_selection(method, thresholds)
        if isinstance(state, PredictorState):
            predictor = placed_predictor(model, state)
    if backend != "masked":
        refused = why_not_numba(model, method, mode, state)
        if refused and backend == "numba":
            raise InputError(f"backend numba cannot run here: {refused}; use backend masked")
        if not refused:
            options: dict[str, Any] = {"calibrated": calibrated, "deterministic": deterministic}
            kernels = decode_kernels(model, method, thresholds, predictor, **options)
            refused = why_not_equal(model, method, thresholds, predictor, kernels, calibrated)
            if refused and backend == "numba":
                raise InputError(f"backend numba cannot run here: {refused}; use backend masked")
            kernels = None if refused else kernels
    with sparsified(
        model,
        method,
        select,
        scope=scope,
        thresholds=thresholds,
        kernels=kernels,
        predictor=predictor,
        calibrated=calibrated,
    ) as attached:
        yield attached
