"""The verb ``generate`` as a user runs it, on a tiny model."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from suite.cli import main
from tests.runs.tiny_world import model_without_gated_mlp, tiny_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("models"))[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def run(folder, results, capsys):
    def call(*arguments, model=folder):
        fixed = ["--results", str(results), "--max-new-tokens", "12", "--device", "cpu"]
        code = main(["generate", "--model", str(model), "--prompt", "ab", *fixed, *arguments])
        return code, *capsys.readouterr()

    return call


def test_shows_both_texts_with_speed_and_makes_the_fit_once(run, folder):
    code, _, err = run("--no-fit")
    assert (code, err.count("\n")) == (2, 1)
    assert "is missing and --no-fit is given" in err
    code, out, err = run("--sparsity", ".7")
    assert code == 0
    assert "making the fit of m-countdown at 0.7" in err
    pattern = r"--- dense: \d+ tokens, [\d.]+ tokens/s\n.*--- m-countdown: \d+ tokens, [\d.]+ tokens/s "
    found = re.match(pattern + r"\(([\d.]+)x dense\), sparsity (0\.\d+) \(target 0.7\)\n", out, re.DOTALL)
    assert found
    assert 0.3 < float(found[2]) < 0.95
    dense = out.split("tokens/s\n")[1].split("--- m-countdown")[0].strip()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("ab", return_tensors="pt").input_ids
    with torch.inference_mode():
        own = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert dense == tokenizer.decode(own, skip_special_tokens=True).strip()
    code, again, err = run("--no-fit", "--sparsity", ".7")
    assert code == 0
    assert "making" not in err
    assert again.splitlines()[-1] == out.splitlines()[-1]  # the same text from the stored fit


def test_a_method_with_a_predictor_trains_it_and_runs_the_kernels(run):
    code, out, err = run("--method", "d-countdown", "--sparsity", "0.5", "--backend", "numba")
    assert code == 0
    assert "making the fit of d-countdown at 0.5" in err
    sparse = out.split("--- d-countdown")[1]
    assert 0.2 < float(re.search(r"sparsity (0\.\d+)", sparse)[1]) < 0.8
    code, masked, _ = run("--method", "d-countdown", "--sparsity", "0.5", "--backend", "masked", "--no-fit")
    assert code == 0
    assert masked.split("--- d-countdown")[1].splitlines()[1:] == sparse.splitlines()[1:]  # the same text


def test_dense_alone_and_a_method_without_a_fit(run):
    code, out, _ = run("--method", "dense")
    assert (code, out.count("---")) == (0, 1)
    code, out, _ = run("--method", "random", "--sparsity", "0.5")
    assert code == 0
    assert "sparsity 0.5" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", " "], "prompt is empty"),
        (["--max-new-tokens", "1"], "at least 2"),
        (["--max-new-tokens", "9000"], "over the 8192 of model"),
        (["--method", "m-cuntdown"], "did you mean 'm-countdown'"),
        (["--sparsity", "1.5"], "sparsity 1.5"),
        (["--backend", "cuda"], "unknown backend 'cuda'"),
        (["--method", "random", "--backend", "numba"], "backend numba cannot run here"),
        (["--device", "cuda"], "device cuda: there is none"),
        (["--model", "nowhere/at-all.gguf"], "nowhere/at-all.gguf"),
    ],
)
def test_bad_input_is_one_line(run, arguments, said):
    if "--device" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err


def test_a_model_without_gated_mlps_is_refused(run, tmp_path):
    code, _, err = run(model=model_without_gated_mlp(tmp_path))
    assert code == 2
    assert "no gated MLP" in err.splitlines()[-1]  # above it transformers may warn


def test_a_model_that_ends_at_once_has_no_speed_and_no_nan(run, folder, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("ab", return_tensors="pt").input_ids
    with torch.inference_mode():
        first = int(model(ids).logits[0, -1].argmax())
    model.generation_config.eos_token_id = first  # the token that greedy decoding takes first ends the text
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, out, _ = run("--method", "random", "--sparsity", "0.5", model=tmp_path)
    lines = [line for line in out.splitlines() if line.startswith("---")]
    assert code == 0
    assert lines == [
        f"--- {name}: 1 token, then the model ended: no step to time; give another --prompt"
        for name in ("dense", "random")
    ]
