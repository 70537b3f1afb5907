"""GGUF files turned once into a folder of safetensors in the cache, bit-equal to what transformers makes of them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from suite.errors import InputError
from suite.modeling.complete import check_complete, no_report
from suite.modeling.gguf_header import read_gguf_header, unread_settings
from suite.modeling.sources import file_sha256
from suite.settings import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str], None]

_MANIFEST = "manifest.json"
_FORMAT = 2  # 2: the tokenizer is checked


def converted_folder(gguf: Path, progress: Progress | None = None) -> Path:
    """Folder of the converted model; made if it is missing or damaged.

    The embedded model takes 25 s the first time and 2 s of loading every time after.

    Raises
    ------
    InputError
        transformers cannot read the file, or the cache folder cannot be written.
    """
    if dropped := read_gguf_header(gguf).dropped:
        raise InputError(
            f"model file {gguf}: transformers does not read its {', '.join(dropped)}: use the hub's folder"
        )
    sha256 = file_sha256(gguf)
    folder = cache_dir() / "models" / sha256
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            for killed in folder.parent.glob(f".{folder.name}.*.part"):  # nobody else writes one while we hold the lock
                shutil.rmtree(killed, ignore_errors=True)
            if is_intact(folder, sha256):
                return folder
            if progress is not None:
                progress(
                    f"converting {gguf.name} to safetensors, once"
                    + (", again: damaged, or of other versions" * folder.exists())
                )
            with no_progress_bars(), _own_bar():
                _convert(gguf, sha256, folder)
    except OSError as error:
        raise InputError(f"model cache {folder.parent}: {error.strerror or error}; set COUNTDOWN_CACHE") from error
    return folder


def is_intact(folder: Path, source_sha256: str) -> bool:
    """Whether a folder is of this source, converted by the versions that keys of cells name, and no file has changed."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        made = (manifest["format"], manifest["source_sha256"], manifest["versions"])
        if made != (_FORMAT, source_sha256, _versions()):
            return False
        return all(file_sha256(folder / name) == sha256 for name, sha256 in manifest["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # InputError of a missing file is a ValueError
        return False


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("gguf", "torch", "transformers")}


def _convert(gguf: Path, sha256: str, folder: Path) -> None:
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        model, tokenizer = _load_gguf(gguf)
        check_tokenizer(tokenizer, gguf, adds_bos=read_gguf_header(gguf).adds_bos)
        clear_quantizer_marks(model)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        _check_bit_equal(model, part)
        manifest = {
            "format": _FORMAT,
            "source": gguf.name,
            "source_sha256": sha256,
            "versions": _versions(),
            "files": {path.name: file_sha256(path) for path in sorted(part.iterdir())},
        }
        (part / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _load_gguf(gguf: Path) -> tuple[PreTrainedModel, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, "trust_remote_code": False, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        with no_report():
            model, info = AutoModelForCausalLM.from_pretrained(
                gguf.parent, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **source
            )
    except Exception as error:
        raise InputError(f"model file {gguf}: transformers cannot read it: {first_line(error)}") from error
    check_complete(str(gguf), info)
    _check_all_read(gguf, model)
    return model.eval(), tokenizer


def _check_all_read(gguf: Path, model: PreTrainedModel) -> None:
    """Refuse a file with tensors or settings that transformers passes over: they may change what the model computes."""
    from transformers import modeling_gguf_pytorch_utils as reading

    header = read_gguf_header(gguf)
    processor = reading.TENSOR_PROCESSORS.get(header.architecture, reading.TensorProcessor)(config={})
    known = reading.get_gguf_hf_weights_map(model, processor)
    settings = reading.GGUF_CONFIG_MAPPING.get(header.architecture, {})
    unread = [name for name in header.tensors if name not in known]
    unread += unread_settings(header, settings)
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        raise InputError(
            f"model file {gguf}: transformers does not read its {', '.join(unread[:3])}{more}: without it the model "
            "computes something else; take the model's safetensors"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, gguf: Path, *, adds_bos: bool) -> None:
    """Refuse a tokenizer that does not know its own vocabulary or leaves the first token out.

    transformers 5.17 makes of Gemma 3's GGUF file a tokenizer that splits every text into characters (perplexity of
    wikitext 2.8e19, and no word of warning), 5.20 and 5.22 one that leaves <bos> out; 5.23 is right.

    Raises
    ------
    InputError
        Most lower-case words of the vocabulary are split, or ``adds_bos`` and a text does not begin with <bos>.
    """
    words = sorted(token for token in tokenizer.get_vocab() if re.fullmatch("[a-z]{4,12}", token))
    words = words[:: max(1, len(words) // 200)]
    whole = sum(len(tokenizer.encode(word, add_special_tokens=False)) == 1 for word in words)
    remedy = f"transformers {importlib.metadata.version('transformers')} misreads it: pip install -U transformers"
    if 2 * whole < len(words):
        raise InputError(
            f"model file {gguf}: its tokenizer splits {len(words) - whole} of {len(words)} words of its own vocabulary; "
            + remedy
        )
    if adds_bos and tokenizer.encode("a")[0] != tokenizer.bos_token_id:
        raise InputError(f"model file {gguf}: its tokenizer begins no text with <bos>, as the file demands; {remedy}")


def clear_quantizer_marks(model: PreTrainedModel) -> None:
    """Make a model loaded from GGUF one that can be saved: its weights are dequantised, the marks say otherwise."""
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(mark, None)
    for mark in ("quantization_config", "_is_quantized"):
        model.config.__dict__.pop(mark, None)


def _check_bit_equal(model: PreTrainedModel, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights = model.state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        for name, saved in load_file(path).items():
            if not torch.equal(saved, weights[name]):
                raise RuntimeError(f"{name} in the converted model differs from the GGUF file's: report this")


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing its own progress bars over ours."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@contextmanager
def _own_bar() -> Iterator[None]:
    """Draw our bar, on a terminal only, where transformers draws its own over GGUF tensors whatever its switch says."""
    from tqdm import tqdm
    from transformers import modeling_gguf_pytorch_utils as gguf

    theirs = gguf.tqdm
    gguf.tqdm = lambda tensors, **_: tqdm(tensors, desc="converting", unit="tensor", leave=False, disable=None)
    try:
        yield
    finally:
        gguf.tqdm = theirs


def first_line(error: BaseException) -> str:
    """First line of an error's message, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
