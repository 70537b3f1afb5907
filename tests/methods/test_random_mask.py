"""Noise of the random method: keyed by document, position, layer and seed."""

import dataclasses

import torch

from suite.methods.base import Site
from suite.modeling.attach import attach
from suite.registry import get_method
from tests.conftest import activations, tiny_model


def test_random_noise_does_not_depend_on_the_batch(ids):
    model, method = tiny_model("llama"), get_method("random", sparsity=0.5, seed=3)
    whole = torch.arange(12)

    def run(rows, documents):
        index = torch.arange(len(rows)).repeat_interleave(12)
        columns = whole.repeat(len(rows))
        keys = torch.tensor(documents).repeat_interleave(12)
        with (
            attach(model, method) as attached,
            attached.positions(index, columns, keys, columns),
            torch.inference_mode(),
        ):
            return model(input_ids=ids[rows]).logits

    together, alone = run([0, 1], [10, 11]), run([1], [11])
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-4)
    assert not torch.allclose(run([1], [12])[0], alone[0], atol=1e-2)


def test_random_noise_is_uniform_and_differs_by_every_key():
    inputs = activations(n_tokens=40, d_ff=1000)
    score = get_method("random", seed=1).score(inputs)
    # mean of 40000 uniforms: standard error 1 / sqrt(12 * 40000); 5 of them
    assert abs(score.mean() - 0.5) < 5 / (12 * 40000) ** 0.5
    others = [
        get_method("random", seed=2).score(inputs),
        get_method("random", seed=1).score(dataclasses.replace(inputs, site=Site("mlp.neurons", 1, 1000))),
        get_method("random", seed=1).score(dataclasses.replace(inputs, documents=inputs.documents + 1)),
        get_method("random", seed=1).score(dataclasses.replace(inputs, positions=inputs.positions + 1)),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([score.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / 40000**0.5
