"""Whether a model got every one of its weights from the file, and nothing lay there that it has no place for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from suite.errors import InputError

_NAMED = 3  # keys of each kind in the message


def check_complete(name: str, info: Mapping[str, Any]) -> None:
    """Refuse a model that transformers has filled up with random weights, or whose file holds others.

    Parameters
    ----------
    name : str
        The model, for the message.
    info : mapping
        What ``from_pretrained`` gives for ``output_loading_info=True, ignore_mismatched_sizes=True``. Tied weights are
        not among the missing.

    Raises
    ------
    InputError
        Weights are missing, unexpected or of another shape; the message names them.
    """
    shapes = [f"{key} {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"]]
    kinds = {"missing": info["missing_keys"], "of another shape": shapes, "unexpected": info["unexpected_keys"]}
    faults = [f"{kind}: {_some(keys)}" for kind, keys in kinds.items() if keys]
    if faults:
        raise InputError(
            f"model {name}: its weights do not fit its configuration ({'; '.join(faults)}): get the whole model again"
        )


def _some(keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(ordered[:_NAMED]) + more


@contextmanager
def no_report() -> Iterator[None]:
    """Keep transformers from printing a table of what `check_complete` says in one line."""
    # the second warns of layers that are not spread over GPUs, where there is nothing to spread
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "distributed.tensor_parallel")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
