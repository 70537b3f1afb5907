"""What `generate` does differently while a method is attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from suite.errors import InputError


def without_compile(model: nn.Module) -> Callable[[], None]:
    """Keep `generate` from compiling the attached passes (it does with a static cache on a GPU); returns the undoing."""
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return lambda: None
    before = config.disable_compile
    config.disable_compile = True

    def undo() -> None:
        config.disable_compile = before

    return undo


def with_right_prefill(model: nn.Module, scope: str) -> Callable[[], None]:
    """Let `generate` refuse what hides from the scope's rule which pass is the prefill; returns the undoing.

    A prefill is the pass without a past: in chunks only the first has none, and without a cache every pass. With
    candidates of another model or of the prompt, passes after it check several tokens, which may be thrown away.
    """
    generate: Any = getattr(model, "generate", None)
    if generate is None:
        return lambda: None
    before = model.__dict__.get("generate")

    def checked(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        holders = [holder for holder in (config, getattr(model, "generation_config", None)) if holder is not None]

        def setting(name: str) -> Any:
            given = (kwargs.get(name), *(getattr(holder, name, None) for holder in holders))
            return next((value for value in given if value is not None), None)

        if setting("prefill_chunk_size") is not None:
            raise InputError(f"generate with prefill_chunk_size in scope {scope}: leave it out, or use scope all")
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if setting(name) is not None:
                raise InputError(f"generate with {name} in scope {scope}: leave it out, or use scope all")
        if setting("use_cache") is False:
            raise InputError(f"generate with use_cache=False in scope {scope}: leave it out, or use scope all")
        return generate(*args, **kwargs)

    model.__dict__["generate"] = checked

    def undo() -> None:
        del model.__dict__["generate"]
        if before is not None:
            model.__dict__["generate"] = before

    return undo
