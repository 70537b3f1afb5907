"""Text of a model, dense and sparse, with the speed of both: what the verb ``generate`` shows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.config import build_config, load_config
from suite.errors import InputError
from suite.registry import did_you_mean, get_method

if TYPE_CHECKING:
    from suite.fitting.artifacts import Fit, PredictorFit
    from suite.methods.base import Method
    from suite.modeling.loading import LoadedModel

_BACKENDS = ("auto", "masked", "numba")
_WARM_UP = 3


@dataclass(frozen=True)
class Request:
    """What to generate.

    Parameters
    ----------
    model, dtype : as in a matrix; dtype None: float32 on a CPU, bfloat16 on a GPU
    device : auto, cpu or cuda
    backend : of `suite.attach`
    chat, system : the prompt, and an instruction before it, as messages in the model's chat template
    stop : texts at which generation ends; the first that comes and what follows it is cut
    """

    prompt: str
    model: str = "embedded"
    method: str = "m-countdown"
    sparsity: float = 0.7
    max_new_tokens: int = 64
    backend: str = "auto"
    device: str = "auto"
    dtype: str | None = None
    chat: bool = False
    system: str | None = None
    stop: Sequence[str] = ()

    def check(self) -> Method:
        """The method, if the request makes sense without looking at the model."""
        if not self.prompt.strip():
            raise InputError("prompt is empty: give --prompt some text to go on from")
        if self.max_new_tokens < 2:
            raise InputError(f"--max-new-tokens {self.max_new_tokens}: must be at least 2, to time a decode step")
        if self.backend not in _BACKENDS:
            raise InputError(f"unknown backend {self.backend!r}{did_you_mean(self.backend, _BACKENDS)}")
        if self.system is not None and not self.chat:
            raise InputError("--system needs --chat: without a chat template put it before the prompt")
        if "" in self.stop:
            raise InputError("--stop is empty: give the text at which generation ends")
        if self.method == "dense":
            return get_method("dense")
        return get_method(self.method, sparsity=self.sparsity)


@dataclass(frozen=True)
class Generated:
    """Text made, new tokens, decode speed (None: no step to time), realised sparsity (None: dense, or no sparse token)."""

    method: str
    text: str
    n_tokens: int
    tokens_per_s: float | None
    sparsity: float | None


def generate(request: Request, fits: Path, *, no_fit: bool, say: Callable[[str], None]) -> list[Generated]:
    """Generate greedily, dense and then with the method.

    Parameters
    ----------
    fits : folder of the fits; one that is missing is made there, and said
    no_fit : refuse to make it

    Raises
    ------
    InputError
        Empty prompt, a model, device, method or backend that cannot be loaded or used, a prompt too long for the model, a fit
        missing with ``no_fit``.
    """
    method = request.check()
    from suite import devices
    from suite.modeling.loading import load_model

    device = devices.device(request.device).type
    dtype = request.dtype or ("bfloat16" if device == "cuda" else "float32")
    loaded = load_model(request.model, dtype, device, say)
    ids = _tokens(loaded, request)
    found = [_timed(loaded, ids, request, "dense")]
    if request.method == "dense":
        return found
    state = _state(request, loaded, fits, no_fit, say) if "practical" in method.modes else None

    from suite.modeling.attach import attach

    with attach(loaded.model, method, state, scope="paper", backend=request.backend) as attached:  # type: ignore[arg-type]
        return [*found, _timed(loaded, ids, request, request.method, attached)]


def _tokens(loaded: LoadedModel, request: Request) -> Any:
    """Ids of the prompt, shape (1, n_tokens), on the model's device."""
    text, special = (_chat_text(loaded, request), False) if request.chat else (request.prompt, True)
    ids = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids.to(loaded.device)
    context = int(getattr(loaded.model.config, "max_position_embeddings", 0) or 0)
    wanted = ids.shape[1] + request.max_new_tokens
    if context and wanted > context:
        raise InputError(
            f"{ids.shape[1]} tokens of prompt and {request.max_new_tokens} new ones: over the {context} of model "
            f"{loaded.ref.name}; shorten the prompt or give a smaller --max-new-tokens"
        )
    return ids


def _chat_text(loaded: LoadedModel, request: Request) -> str:
    """Prompt in the model's chat template, which writes the special tokens itself."""
    from jinja2 import TemplateError

    from suite.evaluation.chat import need_template

    need_template(loaded)
    messages = [] if request.system is None else [{"role": "system", "content": request.system}]
    messages.append({"role": "user", "content": request.prompt})
    try:
        return str(loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        what = "--chat" if request.system is None else "--system"
        raise InputError(f"{what}: the chat template of model {loaded.ref.name} refuses it: {error}") from error


def _state(
    request: Request, loaded: LoadedModel, fits: Path, no_fit: bool, say: Callable[[str], None]
) -> Fit | PredictorFit:
    """The method's fit, the one that the embedded profile's calibration gives; made if it is missing."""
    from suite.fitting.artifacts import load_fit
    from suite.runs.cells.accuracy import expand
    from suite.runs.fits import has_fit
    from suite.runs.machine import LocalWorld
    from suite.runs.work.worker import TorchSession

    embedded = load_config("embedded")  # its calibration, so that fits are shared with its runs
    block = {
        "methods": [request.method],
        "modes": ["practical"],
        "sparsities": [request.sparsity],
        "tasks": ["decode_perplexity"],
    }
    matrix = {
        "name": "generate",
        "models": [{"id": request.model, "dtype": loaded.dtype}],
        "device": loaded.device,
        "calibration": embedded.calibration.model_dump(),
        "predictor": embedded.predictor.model_dump(),
        "accuracy": [block],
    }
    config = build_config(matrix, "command line")
    cell = next(cell for cell in expand(config, LocalWorld(config)) if cell.fit_key)
    if cell.fit is None or cell.fit_key is None:
        raise InputError(f"method {request.method} has nothing to fit: use mode ideal")
    if not has_fit(fits, cell.fit_key):
        what = f"fit of {request.method} at {request.sparsity} on {loaded.ref.name}"
        if no_fit:
            raise InputError(f"{what} is missing and --no-fit is given: leave it out to make the fit")
        say(f"making the {what}: once, some minutes; kept in {fits.name}/")
    TorchSession(loaded).ensure_fit(cell.fit, cell.fit_key, fits, remake=False)
    return load_fit(fits, cell.fit_key)


class _Clock:
    """Streamer of `generate` that notes when each token arrived; the first call is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        """A new token, already on the host."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """No more."""

    @property
    def tokens_per_s(self) -> float | None:
        """Decode steps per second: without the prefill, which makes the first token; None if nothing came after it."""
        times = self.times[1:]
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None


def _timed(loaded: LoadedModel, ids: Any, request: Request, name: str, attached: Any = None) -> Generated:
    import torch

    model, tokenizer = loaded.model, loaded.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    fixed = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": pad}
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=_WARM_UP, **fixed)  # compiles kernels, allocates
        if attached is not None:
            attached.reset()
        clock = _Clock()
        if request.stop:
            fixed |= {"stop_strings": list(request.stop), "tokenizer": tokenizer}
        out = model.generate(ids, max_new_tokens=request.max_new_tokens, streamer=clock, **fixed)
    new = out[0, ids.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    text = text[: min((at for stop in request.stop if (at := text.find(stop)) >= 0), default=len(text))]
    realised = math.nan if attached is None else attached.realised
    return Generated(name, text, len(new), clock.tokens_per_s, None if math.isnan(realised) else realised)
