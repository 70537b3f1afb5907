"""``generate`` with a chat template and stop strings."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from suite.cli import main
from tests.runs.tiny_world import tiny_models

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and 'no system' in m.content %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model without a chat template, and one with."""
    plain, chatty = tiny_models(tmp_path_factory.mktemp("models"))[:2]
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chatty)
    return plain, chatty


@pytest.fixture
def run(tmp_path, capsys):
    def call(model, *arguments):
        fixed = ["--results", str(tmp_path), "--max-new-tokens", "12", "--device", "cpu", "--method", "dense"]
        code = main(["generate", "--model", str(model), "--prompt", "ab", *fixed, *arguments])
        return code, *capsys.readouterr()

    return call


def own(folder, prompt):
    """What transformers generates after a prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


def test_chat_and_system_are_messages_of_the_template(run, folders):
    code, out, _ = run(folders[1], "--chat", "--system", "be kind")
    assert code == 0
    expected = own(folders[1], "<system>be kind</><user>ab</><me>")
    assert out.split("tokens/s\n")[1] == expected + "\n"
    assert expected != own(folders[1], "ab")


def test_a_stop_string_ends_the_text(run, folders):
    text = own(folders[0], "ab")
    stop = next(one for one in text[3:] if one.isascii() and one.isprintable())
    at = text.index(stop)
    assert 0 < at < len(text) - 1
    code, out, _ = run(folders[0], "--stop", "never there", "--stop", stop)
    assert code == 0
    assert out.split("tokens/s\n")[1] == text[:at] + "\n"
    assert int(out.split("dense: ")[1].split()[0]) < 12


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        (0, ["--chat"], "has no chat template"),
        (0, ["--system", "be kind"], "--system needs --chat"),
        (0, ["--stop", ""], "--stop is empty"),
        (1, ["--chat", "--system", "no system"], "refuses it: roles must alternate"),
    ],
)
def test_what_cannot_be_is_one_line(run, folders, model, arguments, said):
    code, out, err = run(folders[model], *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err
