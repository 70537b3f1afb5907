"""Trained layers on disk: only what was written for this training, round and layer is taken up again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from suite.errors import InputError
from suite.fitting.artifacts import load_fit
from suite.fitting.partial import Finished

KEY = "a" * 64


def layer(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"v": torch.randn(6, 2, generator=generator), "u": torch.randn(9, 2, generator=generator)}


@pytest.fixture
def files(tmp_path):
    """Two layers of round 1 and the first of round 2."""
    kept = Finished(tmp_path, KEY)
    for seed, (number, index) in enumerate([(1, 0), (1, 1), (2, 0)]):
        kept.put(number, index, layer(seed), 0.5, 1.0)
    return {path.name: path for path in (tmp_path / f"partial-{KEY[:32]}").iterdir()}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)


def test_a_layer_that_was_put_is_got(tmp_path, files):
    found = Finished(tmp_path, KEY).get(1, 1)
    assert torch.equal(found["u"], layer(1)["u"])
    assert float(found["loss"]) == 0.5
    assert Finished(tmp_path, KEY).get(2, 1) is None


DAMAGE = {
    "bit": flip,
    "other layer": lambda path: shutil.copy(path.with_name("round-1-layer-001.safetensors"), path),
    "other round": lambda path: shutil.copy(path.with_name("round-2-layer-000.safetensors"), path),
    "no matrix": lambda path: save_file({"v": load_file(path)["v"]}, path),
    "no label": lambda path: save_file(load_file(path), path),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_layer_that_is_not_what_was_put_is_trained_anew(tmp_path, files, damage):
    DAMAGE[damage](files["round-1-layer-000.safetensors"])
    kept = Finished(tmp_path, KEY)
    assert kept.get(1, 0) is None
    assert kept.get(1, 1) is not None
    kept.put(1, 0, layer(0), 0.5, 1.0)
    assert torch.equal(Finished(tmp_path, KEY).get(1, 0)["u"], layer(0)["u"])


def test_a_layer_of_another_training_is_trained_anew(tmp_path, files):
    other = KEY[:32] + "b" * 32  # of the same folder
    assert Finished(tmp_path, other).get(1, 0) is None


@pytest.mark.parametrize("meta", [["a"], 3, "text"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_fit_whose_description_has_the_wrong_type_is_damaged(tmp_path, meta, whole):
    path = tmp_path / "x.safetensors"
    description = {"method": "cats", "sparsity": 0.5, "estimator": "calibrated", "key": "x", "sha256": "", "meta": meta}
    said = json.dumps(meta if whole else description)
    save_file({"thresholds": torch.zeros(2)}, path, metadata={"fit": said})
    with pytest.raises(InputError, match=r"x\.safetensors is damaged"):
        load_fit(path)
