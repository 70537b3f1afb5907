"""Where a task's data comes from; resolves names, checks files and fingerprints data without importing torch or lm-eval."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from suite.data_files import JSONL, is_file, is_folder, need_complete, need_suffix, read_documents
from suite.errors import InputError, named
from suite.registry import did_you_mean

Source = Literal["pack", "data_dir", "hub", "include", "text"]
PACK_DIR = Path(__file__).parent / "pack"
PACK_TASKS = ("pack_grammar", "pack_knowledge", "pack_last_word", "pack_generation")
DECODE_PERPLEXITY = "decode_perplexity"
WINDOW, SPLIT = 2048, 0.5  # tokens of a window, and its dense unscored share (its first half)
ROLLING_TASKS = ("wikitext",)  # perplexity of whole documents over disjoint windows


@dataclass(frozen=True)
class LocalTask:
    """A built-in lm-eval task that runs from a folder of JSON Lines: its folder there, its files by split."""

    folder: str
    files: Mapping[str, str]
    lm_eval_folder: str


def _splits(folder: str, lm_eval_folder: str, *splits: str) -> LocalTask:
    return LocalTask(folder, {split: f"{folder}/{split}.jsonl" for split in splits}, lm_eval_folder)


LOCAL_TASKS: dict[str, LocalTask] = {
    "arc_easy": _splits("arc_easy", "arc", "train", "validation", "test"),
    "arc_challenge": _splits("arc_challenge", "arc", "train", "validation", "test"),
    "winogrande": _splits("winogrande", "winogrande", "train", "validation"),
    "piqa": _splits("piqa", "piqa", "train", "validation"),
    "openbookqa": _splits("openbookqa", "openbookqa", "train", "validation", "test"),
    "hellaswag": _splits("hellaswag", "hellaswag", "train", "validation"),
    "truthfulqa_mc1": _splits("truthfulqa_mc1", "truthfulqa", "validation"),
    "lambada_openai": _splits("lambada_openai", "lambada", "test"),
    "wikitext": _splits("wikitext", "wikitext", "validation", "test"),
    "gsm8k_cot": _splits("gsm8k", "gsm8k", "train", "test"),
}
OWN_EXAMPLES = ("gsm8k_cot",)  # local tasks whose few-shot examples stand in their YAML
# Texts of decode_perplexity in a data folder: task name -> file, field. The scored split, never the calibration one.
LOCAL_TEXTS: dict[str, tuple[str, str]] = {
    f"{DECODE_PERPLEXITY}_wikitext": ("wikitext/test.jsonl", "page"),
    f"{DECODE_PERPLEXITY}_gutenberg": ("calibration/gutenberg.jsonl", "text"),
}


@dataclass(frozen=True)
class TaskSpec:
    """One task with the place of its data.

    ``files`` are the data files by split (data_dir), the text (text), or the YAML folders (include); ``options`` are
    window, split and field of decode_perplexity, the window of rolling tasks; ``chat`` the options of
    ``suite.evaluation.chat`` that are set.
    """

    name: str
    source: Source
    num_fewshot: int | None = None
    limit: int | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    chat: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_text(self) -> bool:
        """True for decode_perplexity, which is the suite's own task."""
        return self.name.startswith(DECODE_PERPLEXITY)


def known_tasks() -> list[str]:
    """Names that ``ls`` shows; any other lm-eval task works by its name too."""
    return [*PACK_TASKS, DECODE_PERPLEXITY, *LOCAL_TEXTS, *LOCAL_TASKS]


def lm_eval_tasks_dir() -> Path:
    """Folder of lm-eval's built-in task YAMLs."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise InputError("lm-eval is not installed: pip install lm-eval")
    return Path(spec.origin).parent / "tasks"


def resolve_task(
    name: str,
    *,
    data_dir: str | Path | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
    chat: Mapping[str, Any] | None = None,
) -> TaskSpec:
    """Find a task's data: embedded pack, local data folder, the user's own YAMLs, or the hub, in this order.

    Parameters
    ----------
    name : str
        ``pack_*``, ``decode_perplexity`` (of the pack's passages, or of ``options["text"]``: a .txt or .jsonl file),
        ``decode_perplexity_<text>`` of a data folder, or any lm-eval task.
    data_dir : folder laid out as ``<task>/<split>.jsonl`` in the hub data set's schema; used for the tasks it holds.
    include_path : folder of the user's own lm-eval task YAMLs.
    num_fewshot, limit : few-shot examples (None: the task's own), documents (None: all).
    options : ``window`` (tokens), ``split`` (dense share), ``text``, ``field`` of decode_perplexity; ``window`` of a rolling
        task, the model's context where none is given.
    chat : from ``chat_options``

    Raises
    ------
    InputError
        Unknown task or option, missing or unreadable file.
    """
    options = dict(options or {})
    common: dict[str, Any] = {"name": name, "num_fewshot": num_fewshot, "limit": limit}
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise InputError(
            f"limit {limit!r} of task {name}: must be a whole number, at least 1, or none for all documents"
        )
    if name.startswith(DECODE_PERPLEXITY):
        if chat:
            raise InputError(f"task {name} scores a text as it is: {', '.join(chat)} does not apply to it")
        return _resolve_text(name, data_dir, options, limit)
    common["chat"] = dict(chat or {})
    _check_options(name, options)
    common["options"] = options
    if name in PACK_TASKS:
        return TaskSpec(**common, source="pack", files={"test": PACK_DIR / f"{name.removeprefix('pack_')}.jsonl"})
    if include_path is not None and (found := _included(Path(include_path), name)):
        return TaskSpec(**common, source="include", files={"yaml": found})
    if data_dir is not None and name in LOCAL_TASKS:
        return TaskSpec(**common, source="data_dir", files=_local_files(Path(data_dir), name))
    if name not in LOCAL_TASKS and builtin_file(name) is None:
        raise InputError(f"unknown task {name!r}{did_you_mean(name, known_tasks())}")
    return TaskSpec(**common, source="hub")


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options of a task of lm-eval, but for the window of a rolling one."""
    if not options:
        return
    if name not in ROLLING_TASKS:
        raise InputError(
            f"task {name} takes no options, got {', '.join(options)}; only {DECODE_PERPLEXITY} and "
            f"{', '.join(ROLLING_TASKS)} do"
        )
    for option in options:
        if option != "window":
            raise InputError(f"task {name} has no option {option!r}{did_you_mean(option, ['window'])}")
    _check_window(name, options["window"])


def _check_window(name: str, window: Any) -> None:
    if not isinstance(window, int) or window < 4:
        raise InputError(f"option window {window!r} of task {name}: must be a whole number of tokens, at least 4")


def _resolve_text(name: str, data_dir: str | Path | None, options: dict[str, Any], limit: int | None) -> TaskSpec:
    for option in options:
        if option not in ("window", "split", "text", "field"):
            known = ["window", "split", "text", "field"]
            raise InputError(f"task {name} has no option {option!r}{did_you_mean(option, known)}")
    window, split = options.setdefault("window", WINDOW), options.setdefault("split", SPLIT)
    _check_window(name, window)
    if not isinstance(split, (int, float)) or not 0 < split < 1:
        raise InputError(f"option split {split!r} of task {name}: must be in (0, 1), the dense unscored share")
    text, text_field = options.pop("text", None), options.get("field", "text")
    if text is not None:
        path = Path(text)
    elif name == DECODE_PERPLEXITY:
        path = PACK_DIR / "passages.jsonl"
    elif name in LOCAL_TEXTS:
        if data_dir is None:
            raise InputError(f"task {name} needs a data folder: give --data-dir, or option text of {DECODE_PERPLEXITY}")
        relative, text_field = LOCAL_TEXTS[name]
        path = Path(data_dir) / relative
    else:
        raise InputError(f"unknown task {name!r}{did_you_mean(name, known_tasks())}")
    if not is_file(path):
        raise InputError(f"text {path} of task {name}: no such file")
    with named(f"text of task {name}"):
        need_suffix(path)
    options["field"] = text_field
    source: Source = "pack" if path.parent == PACK_DIR else "text"
    return TaskSpec(name=name, source=source, limit=limit, files={"test": path}, options=options)


def need_data_folder(data_dir: str | Path) -> None:
    """Refuse a data folder that is not there."""
    if not is_folder(Path(data_dir)):
        raise InputError(f"data folder {data_dir}: no such folder; give the one that holds <task>/<split>.jsonl")


def _local_files(data_dir: Path, name: str) -> dict[str, Path]:
    need_data_folder(data_dir)
    files = {split: data_dir / file for split, file in LOCAL_TASKS[name].files.items()}
    scored = "test" if "test" in files else "validation"
    if not files[scored].is_file():
        raise InputError(f"task {name}: {files[scored]} is missing; the folder must hold <task>/<split>.jsonl")
    return {split: path for split, path in files.items() if path.is_file()}


def _included(folder: Path, name: str) -> Path | None:
    if not is_folder(folder):
        raise InputError(f"include_path {folder}: no such folder; give the one that holds your task YAMLs")
    import yaml

    for path in sorted(folder.rglob("*.yaml")):
        try:
            # !function and !include tags are lm-eval's business; only the task name is read here
            config = yaml.load(path.read_text(encoding="utf-8"), Loader=_tolerant_loader())
        except yaml.YAMLError as error:
            raise InputError(f"task file {path} is not YAML: {str(error).splitlines()[0]}") from error
        if isinstance(config, dict) and config.get("task") == name:
            return path
    return None


def _tolerant_loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader that reads an unknown tag as None."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    return Loader


@cache
def _builtin_files() -> dict[str, Path]:
    """File of each task below lm-eval's task folder, by a text search: .1 s against TaskManager's 10."""
    name = re.compile(r"""^(?:task|"task"|'task'):[ \t]*(?:"([^"\n]+)"|'([^'\n]+)'|([^"'\s#\[]+))""", re.MULTILINE)
    group = re.compile(r"""^(?:group|"group"|'group'):""", re.MULTILINE)
    found: dict[str, Path] = {}
    for path in sorted(lm_eval_tasks_dir().rglob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if not group.search(text):
            for quoted, single, bare in name.findall(text):
                found.setdefault(quoted or single or bare, path)
    return found


def builtin_file(name: str) -> Path | None:
    """YAML below lm-eval's task folder that defines the task ``name``."""
    return _builtin_files().get(name)


def named_by_lm_eval(name: str) -> bool:
    """Whether ``name`` stands anywhere in lm-eval's YAMLs, as that of a task, group or tag must."""
    return name in _builtin_files() or any(
        name in path.read_text(encoding="utf-8", errors="ignore") for path in lm_eval_tasks_dir().rglob("*.yaml")
    )


def is_task(name: str, include_path: str | Path | None = None) -> bool:
    """Whether ``name`` is one task, of the suite, the user's own folder or lm-eval; not a group of tasks."""
    return (
        name.startswith(DECODE_PERPLEXITY)
        or name in PACK_TASKS
        or name in LOCAL_TASKS
        or (include_path is not None and _included(Path(include_path), name) is not None)
        or builtin_file(name) is not None
    )


def data_fingerprint(spec: TaskSpec) -> str:
    """First 16 hex digits of the SHA-256 over the files that decide the task; ``hub:<task>`` for data of the hub.

    Reads every row, so that a broken line is found before a model is loaded.
    """
    if spec.source == "hub":
        return f"hub:{spec.name}"
    digest = hashlib.sha256()
    files = dict(spec.files)
    if spec.source == "pack":
        files["yaml"] = PACK_DIR / f"{spec.name}.yaml"
    if spec.source == "include":
        folder = spec.files["yaml"].parent
        files |= {
            str(p.relative_to(folder)): p
            for p in sorted(folder.rglob("*"))
            if p.is_file() and "__pycache__" not in p.parts
        }
    for name, path in sorted(files.items()):
        if not path.is_file():
            continue
        if spec.is_text and name == "test":
            read_documents(path, spec.options["field"])
        elif path.name.endswith(JSONL):
            read_documents(path)
            if spec.source == "data_dir":
                need_complete(path)
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
