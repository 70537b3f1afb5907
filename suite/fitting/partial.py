"""Layers of a predictor that are trained already, on disk, so that a fit that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
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
        self._folder = None if folder is None else folder / f"partial-{key[:32]}"
        self._layers: dict[tuple[int, int], dict[str, Tensor]] = {}

    def _path(self, number: int, layer: int) -> Path | None:
        return None if self._folder is None else self._folder / f"round-{number}-layer-{layer:03d}.safetensors"

    def get(self, number: int, layer: int) -> dict[str, Tensor] | None:
        """Matrices, ``loss`` and ``fit_s`` of a layer; None if it is not there or cannot be read."""
        path = self._path(number, layer)
        if (number, layer) not in self._layers and path is not None and path.exists():
            try:
                self._layers[number, layer] = load_file(path)
            except (SafetensorError, OSError):  # trained anew, as if it had never been
                return None
        return self._layers.get((number, layer))

    def put(self, number: int, layer: int, matrices: Mapping[str, Tensor], loss: float, fit_s: float) -> None:
        """Keep a trained layer."""
        tensors = {**matrices, "loss": torch.tensor([loss]), "fit_s": torch.tensor([fit_s])}
        self._layers[number, layer] = tensors
        path = self._path(number, layer)
        if path is not None:
            write_atomically(path, save(tensors))

    def discard(self) -> None:
        """Remove the files; called when the whole fit is stored."""
        if self._folder is not None and self._folder.exists():
            for path in self._folder.iterdir():
                path.unlink()
            self._folder.rmdir()
