"""Table of what the checks of decode rows found: kernels against the masked computation, token by token."""

from __future__ import annotations

from suite.report.material import Material
from suite.report.objects import Block, Content, ReportTable

_ROW = ["model_shape", "dtype", "method", "sparsity_target", "context_tokens", "backend"]


def checks(material: Material) -> Content | None:
    """One row a checked decode case."""
    results = material.results
    found = results.speed[[*_ROW, "cell_id"]].merge(results.decode_check, on="cell_id", how="inner")
    if found.empty:
        return None
    rows = [
        [
            f"{row['model_shape']} {row['dtype']}",
            f"{row['method']}, {row['backend']}",
            f"{row['sparsity_target']:g}",
            str(row["context_tokens"]),
            f"{row['n_steps']:.0f}",
            f"{row['max_error']:.2g} ({row['bound']:.2g})",
            f"{row['kl_median']:.2g} / {row['kl_q95']:.2g} / {row['kl_max']:.2g}",
            f"{row['top1_agreement']:.1%}",
        ]
        for _, row in found.sort_values(_ROW).iterrows()
    ]
    columns = ["model", "method", "sparsity", "context", "steps", "error (bound)", "KL median / 95 % / largest"]
    return Content([Block([*columns, "equal tokens"], rows)])


TABLES = (
    ReportTable(
        "decode_check",
        "Kernels against the masked computation",
        "The same tokens through the kernels and through dense products with a mask, before a row is timed. Error: of the "
        "logits, with the kernels' own active sets in the mask, largest over the steps. KL (nats) and equal next tokens: "
        "with the mask's own sets, which differ where a score lies within rounding of the threshold.",
        checks,
        is_open=False,
    ),
)
