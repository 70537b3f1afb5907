"""Layers of a predictor that are trained already, on disk, so that a fit that was killed goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from suite.files import write_atomically


class Finished:
    """Trained layers of one training, by round and layer.

    Parameters
    ----------
    folder : Path or None
        Of the fits; None keeps them in memory only.
    key : str
        Hash of all that decides the training.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._key = key
        self._folder = None if folder is None else folder / f"partial-{key[:32]}"
        self._layers: dict[tuple[int, int], dict[str, Tensor]] = {}

    def _path(self, number: int, layer: int) -> Path | None:
        return None if self._folder is None else self._folder / f"round-{number}-layer-{layer:03d}.safetensors"

    def get(self, number: int, layer: int) -> dict[str, Tensor] | None:
        """Matrices, ``loss`` and ``fit_s`` of a layer; None, to train it anew, if there is no file that `put` wrote for it."""
        path = self._path(number, layer)
        if (number, layer) not in self._layers and path is not None and path.exists():
            try:
                with safe_open(path, framework="pt") as stored:
                    tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  no mapping
                    said = stored.metadata()
            except (SafetensorError, OSError):  # trained anew, as if it had never been
                return None
            if said != self._label(number, layer, tensors):
                return None
            self._layers[number, layer] = tensors
        return self._layers.get((number, layer))

    def put(self, number: int, layer: int, matrices: Mapping[str, Tensor], loss: float, fit_s: float) -> None:
        """Keep a trained layer."""
        tensors = {**matrices, "loss": torch.tensor([loss]), "fit_s": torch.tensor([fit_s])}
        self._layers[number, layer] = tensors
        path = self._path(number, layer)
        if path is not None:
            write_atomically(path, save(tensors, metadata=self._label(number, layer, tensors)))

    def _label(self, number: int, layer: int, tensors: dict[str, Tensor]) -> dict[str, str]:
        """What a layer is of, and the hash of its tensors with their names, types and shapes."""
        digest = hashlib.sha256(save(tensors)).hexdigest()
        return {"key": self._key, "round": str(number), "layer": str(layer), "sha256": digest}

    def discard(self) -> None:
        """Remove the files; called when the whole fit is stored."""
        if self._folder is not None and self._folder.exists():
            for path in self._folder.iterdir():
                path.unlink()
            self._folder.rmdir()
