"""A tiny model with a tokenizer of letters, and text to fit it on."""

import json

import numpy as np
import pytest
import torch

from suite.fitting.calibration import Calibration
from suite.modeling.loading import LoadedModel, ModelRef
from tests.conftest import VOCABULARY, tiny_model


class Letters:
    """Tokenizer: one token a character."""

    def __call__(self, text):
        return {"input_ids": [3 + ord(letter) % (VOCABULARY - 3) for letter in text]}


def loaded(tmp_path, architecture="llama", dtype=torch.float32):
    weights = tmp_path / "weights"
    weights.write_bytes(b"of a model")
    ref = ModelRef("tiny", "gguf", "tiny", weights, True, "", 10)
    return LoadedModel(tiny_model(architecture, dtype), Letters(), ref, str(dtype).removeprefix("torch."), "cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "random.jsonl"
    rng = np.random.default_rng(0)
    lines = ["".join(chr(c) for c in rng.integers(48, 122, 300)) for _ in range(60)]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return Calibration(f"file:{path}", max_tokens=4096)


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
