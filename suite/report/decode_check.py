"""Table of what the checks of decode rows found: kernels against the masked computation, token by token."""

from __future__ import annotations

from suite.report.load import Results
from suite.report.text import markdown_table

_COLUMNS = ["model_shape", "dtype", "method", "sparsity_target", "context_tokens", "backend"]


def decode_check_table(results: Results) -> str:
    """Markdown, one row a checked decode case; empty without any."""
    rows = results.speed[[*_COLUMNS, "cell_id"]].merge(results.decode_check, on="cell_id", how="inner")
    if rows.empty:
        return ""
    cells = [
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
        for _, row in rows.sort_values(_COLUMNS).iterrows()
    ]
    header = [
        "model",
        "method",
        "sparsity",
        "context",
        "steps",
        "error (bound)",
        "KL median / 95 % / largest",
        "equal tokens",
    ]
    return (
        "# Kernels against the masked computation\n\nThe same tokens through the kernels and through dense products with a "
        "mask, before a row is timed. Error: of the logits, with the kernels' own active sets in the mask, largest over the "
        "steps. KL (nats) and equal next tokens: with the mask's own sets, which differ where a score lies within rounding of "
        "the threshold.\n\n" + markdown_table(header, cells)
    )
