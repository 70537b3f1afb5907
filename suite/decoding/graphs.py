"""CUDA graphs of calls."""

from __future__ import annotations

from collections.abc import Callable

import torch


def captured(run: Callable[[], object], warm_up: int = 3) -> torch.cuda.CUDAGraph:
    """Graph of a call, made after a few calls that compile what there is to compile."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    torch.cuda.synchronize()
    return graph
