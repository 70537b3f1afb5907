"""Options of chat models, named and defaulted as lm-eval does: template, system instruction, few-shot turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, StrictBool

from suite.errors import InputError

if TYPE_CHECKING:
    from suite.modeling.loading import LoadedModel


def chat_options(
    name: str,
    *,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool | None = None,
) -> dict[str, Any]:
    """Options of a task that are set, checked; empty where none is, so that keys of cells without them stay.

    Parameters
    ----------
    name : task, for the message
    fewshot_as_multiturn : each example a turn of its own; None: where a chat template is applied

    Raises
    ------
    InputError
        Turns without a template, or values of the wrong type.
    """
    for option, value in (
        ("apply_chat_template", apply_chat_template),
        ("fewshot_as_multiturn", bool(apply_chat_template) if fewshot_as_multiturn is None else fewshot_as_multiturn),
    ):
        if not isinstance(value, bool):
            raise InputError(f"{option} {value!r} of task {name}: must be true or false")
    if system_instruction is not None and not isinstance(system_instruction, str):
        raise InputError(f"system_instruction {system_instruction!r} of task {name}: must be a text")
    if fewshot_as_multiturn and not apply_chat_template:
        raise InputError(f"fewshot_as_multiturn of task {name}: needs apply_chat_template, which makes the turns")
    options: dict[str, Any] = {}
    if apply_chat_template:
        options = {"apply_chat_template": True, "fewshot_as_multiturn": fewshot_as_multiturn is not False}
    if system_instruction is not None:
        options["system_instruction"] = system_instruction
    return options


class ChatSettings(BaseModel):
    """Keys of a task in a matrix, named as lm-eval names them."""

    apply_chat_template: StrictBool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: StrictBool | None = None

    def chat(self, name: str) -> dict[str, Any]:
        """The options that are set, of the task ``name``."""
        return chat_options(
            name,
            apply_chat_template=self.apply_chat_template,
            system_instruction=self.system_instruction,
            fewshot_as_multiturn=self.fewshot_as_multiturn,
        )


def need_template(loaded: LoadedModel) -> None:
    """Refuse a model whose tokenizer has no chat template."""
    if not loaded.tokenizer.chat_template:
        raise InputError(
            f"model {loaded.ref.name} has no chat template: use its instruct version, or leave the template out"
        )


def request_options(chat: Mapping[str, Any], lm: Any) -> dict[str, Any]:
    """Arguments of lm-eval's ``build_all_requests``; ``lm`` applies the template of its tokenizer."""
    if not chat.get("apply_chat_template"):
        return dict(chat)
    need_template(lm.loaded)
    return {**chat, "chat_template": lm.apply_chat_template}
