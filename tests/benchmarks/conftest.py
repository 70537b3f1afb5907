"""Option of the benchmarks: which layer shapes."""

from __future__ import annotations


def pytest_addoption(parser):
    parser.addoption(
        "--speed-shapes",
        default="embedded,llama-3.1-8b",
        help="Layer shapes of the speed benchmarks, comma-separated (suite.decoding.shapes.SHAPES).",
    )
