"""What is refused before a model is loaded: folders, configurations and headers that cannot be."""

import json
import struct
from pathlib import Path

import pytest
import transformers

from suite.config import build_config, models_of
from suite.errors import InputError
from suite.modeling import convert
from suite.modeling.gguf_header import GGUFHeader, read_gguf_header, unread_settings
from suite.modeling.loading import prepare_model, resolve_model, weights_fingerprint
from suite.modeling.sources import file_sha256
from suite.settings import cache_dir, hub_cache_dir, results_dir
from tests.conftest import tiny_model
from tests.modeling.test_loading import gguf
from tests.test_bad_input import GOOD


def index_of(*shards):
    return json.dumps({"weight_map": {str(i): shard for i, shard in enumerate(shards)}})


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("model.safetensors.index.json", index_of("../outside.safetensors"), "no \\*.safetensors in its folder"),
        ("model.safetensors.index.json", index_of("sub/a.safetensors"), "'sub/a.safetensors'"),
        ("model.safetensors.index.json", index_of("/a.safetensors"), "'/a.safetensors'"),
        ("config.json", "[" * 100_000 + "]" * 100_000, "config.json cannot be read"),
        ("config.json", '{"num_hidden_layers": 10000000}', "num_hidden_layers is 10000000, at most 10000"),
        ("config.json", '{"text_config": {"num_hidden_layers": 10000000}}', "num_hidden_layers is 10000000"),
    ],
)
def test_folders_that_cannot_be(tmp_path, name, text, match):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=match) as refused:
        resolve_model(str(folder))
    assert "\n" not in str(refused.value)


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (struct.pack("<II", 4, 0), "general.alignment is 0"),
        (struct.pack("<I", 8) + text("many"), "general.alignment is 'many'"),
        (struct.pack("<IIQ", 9, 4, 0), "general.alignment is None"),
        (struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10_000, "truncated or damaged"),
    ],
)
def test_headers_that_cannot_be(tmp_path, value, match):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("general.alignment") + value)
    with pytest.raises(InputError, match=match):
        read_gguf_header(path)


def test_a_path_may_hold_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lr=1e-3").mkdir()
    config = build_config(GOOD, "test")
    found = models_of(config, ["models/lr=1e-3/final", "lr=1e-3", "models/lr=1e-3/final=bfloat16", "embedded=float16"])
    assert [(model.id, model.dtype) for model in found] == [
        ("models/lr=1e-3/final", "float32"),
        ("lr=1e-3", "float32"),
        ("models/lr=1e-3/final", "bfloat16"),
        ("embedded", "float16"),
    ]
    with pytest.raises(InputError, match="'fp32'"):
        models_of(config, ["embedded=fp32"])


def test_no_home_folder_is_needed_where_variables_name_the_folders(tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in ("COUNTDOWN_CACHE", "COUNTDOWN_RESULTS", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    assert cache_dir() == tmp_path / "COUNTDOWN_CACHE"
    assert results_dir() == tmp_path / "COUNTDOWN_RESULTS"
    assert hub_cache_dir() == tmp_path / "HF_HUB_CACHE"
    monkeypatch.delenv("COUNTDOWN_CACHE")
    with pytest.raises(InputError, match="no home folder: set COUNTDOWN_CACHE"):
        cache_dir()


def test_what_a_killed_conversion_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTDOWN_CACHE", str(tmp_path))
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf())
    models = tmp_path / "models"
    killed, other = models / f".{file_sha256(path)}.999999.part", models / f".{'0' * 64}.999999.part"
    for folder in (killed, other):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="transformers cannot read it"):  # whole, but no model
        prepare_model(str(path))
    assert not killed.exists()
    assert other.exists()  # it may be another process's, under another lock


@pytest.mark.parametrize(
    ("architecture", "key", "value", "tensor", "refused"),
    [
        ("llama", "rope.scaling.type", "linear", "weight", "llama.rope.scaling.type"),
        ("llama", "rope.scaling.type", "none", "weight", ""),
        ("llama", "rope.freq_base", 1e4, "rope_freqs.weight", "rope_freqs.weight"),
        ("phi3", "rope.freq_base", 1e4, "rope_factors_long.weight", "rope_factors_long.weight"),
        ("gemma2", "final_logit_softcapping", 20.0, "weight", "gemma2.final_logit_softcapping"),
        ("gemma2", "final_logit_softcapping", 30.0, "weight", ""),  # what transformers takes anyway
        ("gemma3", "final_logit_softcapping", 30.0, "weight", "gemma3.final_logit_softcapping"),
    ],
)
def test_what_transformers_drops_of_a_gguf_file_is_refused_by_name(
    tmp_path, monkeypatch, architecture, key, value, tensor, refused
):
    monkeypatch.setenv("COUNTDOWN_CACHE", str(tmp_path))
    path = tmp_path / "model.gguf"
    kind = struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<If", 6, value)
    content = b"GGUF" + struct.pack("<IQQ", 3, 1, 3) + text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 0)
    content += text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    content += text(f"{architecture}.{key}") + kind + text(tensor) + struct.pack("<IQIQ", 1, 4, 0, 0)
    path.write_bytes(content + b"\0" * 64)
    with pytest.raises(InputError, match=f"does not read its {refused}:" if refused else "transformers cannot read it"):
        prepare_model(str(path))


def test_a_gguf_file_with_a_missing_tensor_is_refused_by_its_name(tmp_path, monkeypatch):
    """transformers fills it with random numbers and only says so in its loading info."""
    monkeypatch.setenv("COUNTDOWN_CACHE", str(tmp_path))
    info = {"missing_keys": {"model.norm.weight"}, "unexpected_keys": set(), "mismatched_keys": set()}
    model = tiny_model("llama")
    load = transformers.AutoModelForCausalLM
    monkeypatch.setattr(load, "from_pretrained", lambda *_, **o: (model, info) if "output_loading_info" in o else model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf())
    with pytest.raises(InputError, match=r"missing: model\.norm\.weight"):
        prepare_model(str(path))


@pytest.mark.parametrize(("said", "refused"), [(1, True), (2, False), (3, True), (None, True), (10**7, True)])
def test_layers_of_a_gguf_file_are_as_many_as_it_says(tmp_path, said, refused):
    """Tensors of layers beyond the count are dropped by transformers without a word."""
    path = tmp_path / "model.gguf"
    count = b"" if said is None else text("llama.block_count") + struct.pack("<II", 4, said)
    names = ("blk.0.ffn_up.weight", "blk.1.ffn_up.weight")
    tensors = b"".join(text(name) + struct.pack("<IQIQ", 1, 4, 0, 0) for name in names)
    content = b"GGUF" + struct.pack("<IQQ", 3, len(names), 1 + bool(count))
    content += text("general.architecture") + struct.pack("<I", 8) + text("llama") + count + tensors
    path.write_bytes(content + b"\0" * 64)
    if refused:
        with pytest.raises(InputError, match=f"block_count is {said}, its tensors are of 2 layers"):
            read_gguf_header(path)
    else:
        read_gguf_header(path)


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "added_tokens.json", "merges.txt"])
def test_files_beside_the_weights_that_decide_what_it_computes_are_in_its_fingerprint(tmp_path, name):
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    bare = weights_fingerprint(resolve_model(str(folder)))
    (folder / "README.md").write_text("no matter")
    assert weights_fingerprint(resolve_model(str(folder))) == bare
    (folder / name).write_text("{}")
    first = weights_fingerprint(resolve_model(str(folder)))
    (folder / name).write_text("{ }")
    assert len({bare, first, weights_fingerprint(resolve_model(str(folder)))}) == 3


def test_a_conversion_by_another_version_is_made_again(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_text("weights")
    versions = {name: convert.importlib.metadata.version(name) for name in ("gguf", "torch", "transformers")}
    files = {"model.safetensors": file_sha256(tmp_path / "model.safetensors")}
    manifest = {"format": convert._FORMAT, "source_sha256": "a", "versions": versions, "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert convert.is_intact(tmp_path, "a")
    assert not convert.is_intact(tmp_path, "b")
    for name in ("gguf", "transformers"):
        newer = versions | {name: "999"}
        with monkeypatch.context() as patch:
            patch.setattr(convert.importlib.metadata, "version", newer.__getitem__)
            assert not convert.is_intact(tmp_path, "a")


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [
        ("attention.head_count", 4, True),
        ("attention.value_length", 8, True),
        ("attention.value_length", 16, False),
        ("attention.sliding_window", 2048, True),  # as long as the context
        ("attention.sliding_window", 512, False),
        ("rope.scaling.factor", 4.0, False),
        ("rope.scaling.factor", 1.0, True),
        ("attention.scale", 0.1, False),
        ("logit_scale", 0.5, False),
        ("use_parallel_residual", True, False),
        ("expert_count", 0, True),
    ],
)
def test_settings_of_a_gguf_file_that_nobody_reads_are_named(key, value, fits):
    read = dict.fromkeys(("attention.head_count", "embedding_length", "context_length", "block_count"), "x")
    said = {
        "llama.attention.head_count": 4,
        "llama.embedding_length": 32,
        "llama.context_length": 2048,
        f"llama.{key}": value,
    }
    header = GGUFHeader("llama", frozenset(said), 0, False, (), (), said)
    assert unread_settings(header, read) == ([] if fits else [f"llama.{key}"])
