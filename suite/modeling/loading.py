"""Load a model and its tokenizer: hub id, folder, GGUF file or the embedded model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.devices import DTYPES, torch_dtype
from suite.errors import InputError
from suite.modeling.complete import check_complete, no_report
from suite.modeling.convert import Progress, converted_folder, first_line, no_progress_bars
from suite.modeling.sources import ModelRef, resolve_model, weights_fingerprint
from suite.registry import did_you_mean
from suite.settings import hub_cache_dir, hub_offline

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LoadedModel", "ModelRef", "load_model", "prepare_model", "resolve_model", "weights_fingerprint"]

# safetensors and text only: a repository's pickle files are not even downloaded
_DOWNLOADS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and where they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ref: ModelRef
    dtype: str
    device: str


def prepare_model(spec: str | ModelRef, progress: Progress | None = None) -> ModelRef:
    """Do once what loading needs: download a hub model, convert a GGUF file.

    Parameters
    ----------
    progress : callable, optional
        Gets one line of text for each thing that takes long.

    Raises
    ------
    InputError
        The model cannot be loaded; the message says what to do.
    """
    ref = resolve_model(spec) if isinstance(spec, str) else spec
    if ref.kind in ("embedded", "gguf") and ref.path is not None:
        converted_folder(ref.path, progress)
    elif ref.kind == "hub" and not ref.available and not hub_offline():
        _download(ref, progress)
        ref = resolve_model(ref.spec)
    if not ref.available:
        raise InputError(ref.remedy)
    return ref


def _download(ref: ModelRef, progress: Progress | None) -> None:
    from huggingface_hub import snapshot_download

    if progress is not None:
        progress(f"downloading {ref.spec}")
    model_id, _, revision = ref.spec.partition("@")
    try:
        snapshot_download(
            model_id,
            revision=revision or None,
            cache_dir=hub_cache_dir(),
            allow_patterns=_DOWNLOADS,
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (OSError, ValueError) as error:  # the hub's errors are both of requests' kind and OSError
        raise InputError(f"model {ref.spec} cannot be downloaded: {first_line(error)}") from error


def load_model(
    spec: str | ModelRef, dtype: str = "float32", device: str = "cpu", progress: Progress | None = None
) -> LoadedModel:
    """Load a causal language model with gated MLPs; converted or downloaded first if need be.

    Only safetensors are read, and no code that comes with a model is run.

    Parameters
    ----------
    spec : str or ModelRef
        ``embedded``, hub id, folder or GGUF file.
    dtype : {"float32", "bfloat16", "float16"}
    device : str
        ``cpu``, ``cuda`` or ``cuda:<index>``.

    Raises
    ------
    InputError
        Unknown dtype, device that is not there, model that cannot be loaded or has no gated MLP.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}{did_you_mean(dtype, DTYPES)}")
    _check_device(device)
    ref = prepare_model(spec, progress)
    if ref.path is None:
        raise InputError(ref.remedy)
    folder = ref.path if ref.path.is_dir() else converted_folder(ref.path)
    _check_type(ref, folder)
    model, tokenizer = _from_folder(ref, folder, dtype, device)

    from suite.modeling.gated_mlp import find_gated_mlps

    find_gated_mlps(model)
    return LoadedModel(model.eval(), tokenizer, ref, dtype, device)


def _from_folder(ref: ModelRef, folder: Path, dtype: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        with no_progress_bars(), no_report():
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are named below
                dtype=torch_dtype(dtype),
                use_safetensors=True,
                device_map=None if device == "cpu" else device,
                **options,
            )
    except Exception as error:
        raise InputError(
            f"model {ref.spec} cannot be loaded: {first_line(error)}; get the whole model again"
        ) from error
    check_complete(ref.spec, info)
    return model, tokenizer


def _check_type(ref: ModelRef, folder: Path) -> None:
    """Refuse by one line what transformers refuses by many."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"model {ref.spec}: config.json names no model_type")


def _check_device(device: str) -> None:
    import torch

    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise InputError(f"unknown device {device!r}: cpu, cuda or cuda:<index>")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: no CUDA device here, or torch is built without CUDA; use cpu")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise InputError(f"device {device!r}: only {torch.cuda.device_count()} CUDA devices here")
