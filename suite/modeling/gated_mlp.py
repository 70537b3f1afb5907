"""One view of the gated MLPs of Hugging Face models, with split or fused gate and up projections."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, one_hot, silu

from suite.errors import InputError
from suite.methods.base import NEURONS, SITES, Activations, Matrix, Side, Site, SiteName, width_of

Activation = Literal["silu", "gelu_tanh"]

_UNIT_VECTORS = 1024  # at a time: 56 MiB in fp32 for 14336
_IN_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp$")


@dataclass(frozen=True)
class MlpNames:
    """Modules of a gated MLP by name.

    Parameters
    ----------
    first : gate and up; or the one matrix whose output is both, gate first
    act, down : activation, and the projection back
    """

    first: tuple[str, ...]
    act: str
    down: str = "down_proj"


_NAMES = (MlpNames(("gate_up_proj",), "activation_fn"), MlpNames(("gate_proj", "up_proj"), "act_fn"))


@dataclass(frozen=True)
class GatedMLP:
    """One gated MLP ``y = W_down (act(W_gate x) * W_up x)`` of a model.

    Every step runs the model's own submodules on the whole tensor, so that a recomposed forward pass is bit-equal to
    the model's.

    Parameters
    ----------
    layer : int
        Index of the decoder layer, from 0.
    module_name : str
        Path of the module in the model.
    module : nn.Module
        The MLP itself.
    d_model, d_ff : int
    activation : {"silu", "gelu_tanh"}
    names : MlpNames
    """

    layer: int
    module_name: str
    module: nn.Module
    d_model: int
    d_ff: int
    activation: Activation
    names: MlpNames

    @property
    def fused(self) -> bool:
        """True if gate and up are one matrix (Phi-3, Phi-4)."""
        return len(self.names.first) == 1

    def gate_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``g`` and ``u`` of shape (..., d_ff) from x of shape (..., d_model); views of one tensor where fused."""
        found = [self.module.get_submodule(name)(x) for name in self.names.first]
        gate, up = found[0].chunk(2, dim=-1) if self.fused else found
        return gate, up

    def act(self, gate: Tensor) -> Tensor:
        """``a = act(g)``, shape (..., d_ff)."""
        return self.module.get_submodule(self.names.act)(gate)

    def down(self, product: Tensor) -> Tensor:
        """``y = W_down v``, shape (..., d_model), from v of shape (..., d_ff)."""
        return self.module.get_submodule(self.names.down)(product)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """``W_gate``, ``W_up`` (d_ff, d_model) and ``W_down`` (d_model, d_ff): the parameters, or views where fused."""
        found = [self._weight(name) for name in self.names.first]
        gate, up = found[0].chunk(2, dim=0) if self.fused else found
        return gate, up, self._weight(self.names.down)

    def _weight(self, name: str) -> Tensor:
        """As an attribute: a parametrised weight is not a parameter."""
        weight: Tensor = self.module.get_submodule(name).weight  # type: ignore[assignment]
        return weight

    def has_bias(self) -> bool:
        """Whether any of the projections adds a bias."""
        return any(name.endswith(".bias") for name, _ in self.module.named_parameters())

    def why_not_plain(self) -> str:
        """What this MLP computes besides its weights' formula (adapters, hooks, quantised layers); empty if nothing.

        Kernels see the weights alone, so they may stand in for nothing else.
        """
        if not type(self.module).__module__.startswith("transformers.models."):
            return f"{self.module_name} is a {type(self.module).__name__}, not an MLP of transformers"
        if "forward" in self.module.__dict__:
            return f"the forward pass of {self.module_name} is replaced"
        for name, part in self.module.named_children():
            place = f"{self.module_name}.{name}"
            linear = name in (*self.names.first, self.names.down)
            if found := _why_not_linear(part, place) if linear else _patched(part, place):
                return found
        return ""

    def site(self, name: SiteName) -> Site:
        """A site of this layer."""
        return Site(name, self.layer, width_of(SITES[name], self.d_model, self.d_ff))

    def activations(
        self,
        x: Tensor,
        *,
        block: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        **more: Any,
    ) -> Activations:
        """What a method ranks the neurons by, of inputs x (n_tokens, d_model), all of them in scope.

        Parameters
        ----------
        block : Tensor, shape (n_tokens, d_model), optional
            `Activations.block`.
        documents, positions : Tensor, shape (n_tokens,), int64, optional
            Keys of noise; zeros by default.
        more : other fields of `Activations`
        """
        gate, up = self.gate_up(x)
        act = self.act(gate)
        nowhere = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        values = {"input": x, "gate": gate, "act": act, "up": up, "product": act * up}
        return Activations(
            site=self.site(NEURONS),
            values=values if block is None else {**values, "block": block},
            documents=nowhere if documents is None else documents,
            positions=nowhere if positions is None else positions,
            act_fn=self.act,
            **{"norms": self.norm2} | more,
        )

    def norm2(self, matrix: Matrix, of: Side) -> Tensor:
        """Squared L2 norms of the rows or columns of a projection as its module applies it, fp32.

        Rows of gate and up, and columns of down, are neurons: shape (d_ff,); the others (d_model,).
        """
        index = ("gate", "up", "down").index(matrix)
        name = self.names.down if matrix == "down" else self.names.first[0 if self.fused else index]
        weight = self.weights()[index].detach()
        if not _why_not_linear(self.module.get_submodule(name), ""):
            return weight.float().square().sum(0 if of == "columns" else 1)
        width = self.d_ff if matrix == "down" else self.d_model

        def apply(vectors: Tensor) -> Tensor:
            return (self.down(vectors) if matrix == "down" else self.gate_up(vectors)[index]).float()

        with torch.no_grad():  # an adapter: its columns are its answers to unit vectors
            bias = apply(torch.zeros(1, width, dtype=weight.dtype, device=weight.device))
            columns, rows = [], torch.zeros_like(bias[0])
            for start in range(0, width, _UNIT_VECTORS):
                entries = torch.arange(start, min(start + _UNIT_VECTORS, width), device=weight.device)
                square = (apply(one_hot(entries, width).to(weight.dtype)) - bias).square()
                columns.append(square.sum(-1))
                rows += square.sum(0)
        return torch.cat(columns) if of == "columns" else rows


def _why_not_linear(part: nn.Module, place: str) -> str:
    """What a projection computes besides its weight's product; empty if nothing."""
    return f"{place} is a {type(part).__name__}, not a Linear" if type(part) is not nn.Linear else _patched(part, place)


def _patched(part: nn.Module, place: str) -> str:
    if "forward" in part.__dict__:
        return f"the forward pass of {place} is replaced"
    return f"{place} has a forward hook" if part._forward_hooks or part._forward_pre_hooks else ""


def find_gated_mlps(model: nn.Module) -> list[GatedMLP]:
    """Gated MLPs of a causal language model, in the order of its layers.

    Raises
    ------
    InputError
        A model without gated MLPs, with only some layers gated, or with an activation that is neither SiLU nor
        GELU-tanh.
    """
    name = type(model).__name__
    found: dict[int, GatedMLP] = {}
    for path, module in model.named_modules():
        match = _IN_LAYER.search(path)
        if match and (mlp := _view(int(match[1]), path, module)):
            found[mlp.layer] = mlp
    n_layers = _layer_count(model)
    if not found:
        known = " or ".join(", ".join((*names.first, names.act, names.down)) for names in _NAMES)
        raise InputError(f"model {name} has no gated MLP ({known})")
    if sorted(found) != list(range(n_layers)):
        raise InputError(f"model {name} has gated MLPs in {len(found)} of {n_layers} layers; all must have one")
    mlps = [found[layer] for layer in range(n_layers)]
    _check_formula(name, mlps[0])
    return mlps


def block_norm(model: nn.Module, mlp: GatedMLP) -> nn.Module:
    """The norm before attention of the block that an MLP is in.

    Raises
    ------
    InputError
        The block has none of the known name.
    """
    place = mlp.module_name.rpartition(".")[0]
    norm = dict(model.get_submodule(place).named_children()).get("input_layernorm")
    if norm is None:
        raise InputError(f"{place} of model {type(model).__name__} has no input_layernorm: use predictor_input mlp")
    return norm


def _layer_count(model: nn.Module) -> int:
    """Decoder layers the model says it has."""
    config = getattr(model, "config", None)
    if config is None:
        raise InputError(f"model {type(model).__name__} is not a Hugging Face model: it has no config")
    return int(getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0))


def _view(layer: int, path: str, module: nn.Module) -> GatedMLP | None:
    """View of a module that has the projections of a gated MLP, else None."""
    children = dict(module.named_children())
    names = next((names for names in _NAMES if {*names.first, names.act, names.down} <= children.keys()), None)
    weight = getattr(children[names.down], "weight", None) if names else None
    if names is None or not isinstance(weight, Tensor):
        return None
    d_model, d_ff = weight.shape
    return GatedMLP(layer, path, module, int(d_model), int(d_ff), _activation(path, children[names.act]), names)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Activation function of a name: silu or gelu_tanh."""
    return silu if name == "silu" else partial(gelu, approximate="tanh")


def _activation(path: str, function: nn.Module) -> Activation:
    """Which activation it is, by its values: one function has many class names in transformers."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    with torch.no_grad():
        y = function(x)
    # GELU by erf differs from GELU-tanh by up to 5e-4
    if torch.allclose(y, silu(x), rtol=0, atol=1e-6):
        return "silu"
    if torch.allclose(y, gelu(x, approximate="tanh"), rtol=0, atol=1e-6):
        return "gelu_tanh"
    raise InputError(f"activation {type(function).__name__} of {path} is not supported: only SiLU and GELU-tanh are")


def _check_formula(name: str, mlp: GatedMLP) -> None:
    """Refuse an MLP whose parts look right but whose forward pass does something else."""
    weight = mlp.weights()[2]
    if weight.is_meta:
        return
    x = torch.linspace(-1, 1, mlp.d_model, dtype=weight.dtype, device=weight.device)[None]
    with torch.no_grad():
        gate, up = mlp.gate_up(x)
        found = mlp.down(mlp.act(gate) * up)
        expected = mlp.module.forward(x)  # not called: hooks must see no probe
    same = torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)
    if not same:
        raise InputError(f"model {name}: {type(mlp.module).__name__} does not compute W_down (act(W_gate x) * W_up x)")
