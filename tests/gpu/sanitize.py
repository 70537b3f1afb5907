"""Small launches of every kernel, for ``compute-sanitizer --tool memcheck|racecheck python -m tests.gpu.sanitize``."""

from __future__ import annotations

import torch

from tests.gpu.test_layers import Weights, check

if __name__ == "__main__":
    for dtype in (torch.bfloat16, torch.float32):
        for method in ("up", "gate", "cw", "chess", "predictor", "gated", "gated-gate"):
            weights = Weights(576, 264, dtype)
            x = weights.x(1)
            threshold = float(weights.scores(method, x, "silu").median())
            for deterministic in (False, True):
                layer = weights.layer(method, "silu", threshold, deterministic=deterministic)
                check(weights, layer, method, "silu", x)
    torch.cuda.synchronize()
