"""Tiny random models of the paper's four architectures and a data folder with every task of the paper, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Phi3Config, Qwen2Config

from tests.evaluation.conftest import byte_tokenizer

ARCHITECTURES = {
    "tiny-llama": LlamaConfig,
    "tiny-gemma2": Gemma2Config,
    "tiny-qwen2": Qwen2Config,
    "tiny-phi3": Phi3Config,
}
_SHAPE = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 8192,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def save_model(folder: Path, config: Any, *, nan: bool = False) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if nan:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tiny_models(folder: Path) -> list[Path]:
    return [save_model(folder / name, config(**_SHAPE)) for name, config in ARCHITECTURES.items()]


def nan_model(folder: Path) -> Path:
    return save_model(folder / "nan-llama", LlamaConfig(**_SHAPE), nan=True)


def model_without_gated_mlp(folder: Path) -> Path:
    config = GPT2Config(vocab_size=260, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return save_model(folder / "tiny-gpt2", config)


def _rows(task: str, number: int) -> dict[str, Any]:
    """One made-up row in the schema of a task's data set."""
    letters = {"text": [f"thing {number}", "red", "blue", "none"], "label": ["A", "B", "C", "D"]}
    goods = {"choices": [f"Yes, {number}.", "No.", "Maybe."], "labels": [1, 0, 0]}
    return {
        "arc_easy": {"id": str(number), "question": f"What is {number}?", "choices": letters, "answerKey": "A"},
        "arc_challenge": {"id": str(number), "question": f"Why {number}?", "choices": letters, "answerKey": "B"},
        "winogrande": {
            "sentence": f"The cup number {number} hit the box, so _ broke.",
            "option1": "the cup",
            "option2": "the box",
            "answer": "1",
        },
        "piqa": {"goal": f"open box {number}", "sol1": "lift the lid", "sol2": "wait a year", "label": 0},
        "openbookqa": {"id": str(number), "question_stem": f"{number} is", "choices": letters, "answerKey": "C"},
        "hellaswag": {
            "ind": number,
            "activity_label": "Running",
            "ctx_a": f"Runner {number} starts.",
            "ctx_b": "she",
            "ctx": f"Runner {number} starts. she",
            "endings": ["runs.", "flies.", "sings.", "melts."],
            "source_id": "",
            "split": "val",
            "split_type": "",
            "label": "0",
        },
        "truthfulqa_mc1": {"question": f"Is {number} odd?", "mc1_targets": goods, "mc2_targets": goods},
        "gsm8k": {"question": f"What is {number} plus 1?", "answer": f"One more.\n#### {number + 1}"},
        "lambada_openai": {"text": f"There were {number} cats and then a dog came and chased the cats"},
        "wikitext": {"page": f" = Page {number} = \n \n It has a few words , and then it ends . \n"},
    }[task]


def data_folder(folder: Path) -> Path:
    splits = {
        **dict.fromkeys(("arc_easy", "arc_challenge", "openbookqa"), ("train", "validation", "test")),
        **dict.fromkeys(("winogrande", "piqa"), ("train", "validation")),
        **dict.fromkeys(("hellaswag", "truthfulqa_mc1"), ("validation",)),
        "gsm8k": ("train", "test"),
        "lambada_openai": ("test",),
        "wikitext": ("validation", "test"),
    }
    for task, names in splits.items():
        (folder / task).mkdir(parents=True)
        for split in names:
            text = "".join(json.dumps(_rows(task, number)) + "\n" for number in range(3))
            (folder / task / f"{split}.jsonl").write_text(text)
    return folder
