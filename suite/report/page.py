"""REPORT.md and everything beside it, from the files of a run folder alone; also checks that they still follow from them."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from suite.errors import InputError
from suite.evaluation.tasks import DECODE_PERPLEXITY, PACK_TASKS
from suite.files import refuse_links, remove_parts, write_atomically
from suite.report import figures, style
from suite.report.claims import NOT_SETTLED, UNTESTED, make_claims
from suite.report.decode_check import decode_check_table
from suite.report.findings import duels_table, summary
from suite.report.load import load_results
from suite.report.predictors import predictor_table
from suite.report.series import Material
from suite.report.tables import all_tables
from suite.report.task_names import bare
from suite.report.text import MISSING, markdown_table, percent, without_html
from suite.statistics import METHOD_NAME

_RELATIVE = 1e-6  # of rebuilt figures: the files carry 10 digits, another numpy may round the sums otherwise
CAPTIONS = {
    "quality_vs_bytes": "Quality against MLP bytes per token at the realised sparsity, what a user decides by. Ideal "
    "methods know the active set for free: no predictor's bytes are in them. Measured speed-up only where it is of the "
    "same model. Scope `scored` where the run has several.",
    "quality_vs_sparsity": "Task average against realised sparsity. Bars: 95 % interval of the paired difference to "
    "dense, set upon dense's value. Methods of equal sparsity are set apart sideways so that bars can be read.",
    "quality_per_task": "The same, task by task; scope `scored` where the run has several.",
    "perplexity_vs_sparsity": "Perplexity against realised sparsity, log axis; bars as above, from log-ratios. Without "
    "random, which is in the table, and scope `paper` where the run has `scored`.",
    "speedup_vs_sparsity": "Speed-up over the fastest dense row of the same run and shape; band: between quartiles; "
    "dashed: bound, the row's bytes at the read bandwidth measured in the run.",
    "cif_caf": "Generated tokens, kept set D of D-COUNTDOWN (ideal) against CATS and M-COUNTDOWN at equal sparsity. Left, "
    "share of D: solid, missed by one method; dashed, missed by it and kept by the other. Right, share of the neurons "
    "outside D: solid, kept needlessly by one method; dashed, kept by it and dropped by the other.",
    "activations": "Why the methods differ, layer by layer on generated tokens. Left: share of the sum of v^2 that each "
    "ranking keeps at sparsity .8. Right: median of |u|, |act(g)| and |v| over tokens and neurons, band from the 5th to "
    "the 95th percentile.",
    "predictors": "Predictors on held-out documents, means over the fits of a method at one sparsity. Left: share of the sum "
    "of v^2 that is kept, dashed what the true top k keeps. Right: share of the true top k among the k largest logits.",
    "efficiency": "Efficiency (needed bytes over time x the read bandwidth of the run; 1 is the limit of memory) by shape "
    "and sparsity.",
    "phases": "Where the time of a layer goes: median over all blocks of each phase, by their own clocks, from the end of the "
    "layer in front on.",
    "decode_tokens": "Tokens per second of whole models, batch 1, greedy, in one loop that differs in the MLP alone. Dashed: "
    "what the read bandwidth of the run allows at the bytes of a token. Dense also by transformers' own generate. Contexts "
    "with a single sparsity are in the table.",
    "decode_phases": "Where a token's time goes: all attentions, all MLPs and the head, each timed alone, and the rest. Of "
    "every model the first context; phases.csv has all.",
    "break_even": "Where sparsity does not pay: left of a point a layer (timed at four sparsities or more) or a token of a whole "
    "model takes longer than with the fastest dense row; no point: at every sparsity that was timed.",
    "sparsity_per_layer": "Realised sparsity per layer against the target.",
}
INLINE_TABLES = (
    "accuracy", "difference_to_dense", "methods_against_each_other", "above_chance", "scope_effect", "seeds",
    "calibration", "perplexity", "predictors", "speed", "decode_check",
)  # fmt: skip
_SOURCES = {"pydoc": "the English reference prose that every Python carries (`pydoc_data.topics`)"}
DEFECTS = (
    "Gemma kernels that apply SiLU instead of GELU-tanh.",
    "End-to-end D-COUNTDOWN that passes an index list to kernels that read a flag mask.",
    "Predictors trained on the first 10 % of the traces and tested on 90 %.",
    "A ternary predictor loaded with a random bias.",
    "Deja Vu by signed g in ideal mode, by |g| in the labels and by |logit| in the selection; here the signed and the "
    "absolute form are two methods, and claims are shown against both.",
    "Nominal sparsity reported as if it were realised; here both stand in every row, and practical methods more than "
    ".01 apart are not compared.",
    "Padding and context tokens in the statistics.",
    "Timing with a synchronise inside every call, one mean, a warm cache, sums of two timings on unrelated masks.",
    "Kernels never compared with a dense reference; here a row whose check failed has no time.",
    "Inputs prepared with one mask for 500 runs.",
    "fp32 only, batch 1 only.",
    "A transposed copy of W_down that no memory figure holds; here extra_memory_mib does.",
)


def write_report(folder: str | Path) -> Path:
    """Write claims.csv, tables/, figures/ and REPORT.md of a run folder, finished or not.

    Returns
    -------
    Path of REPORT.md.

    Raises
    ------
    InputError
        No run folder, a newer schema, a broken file, a link in it, no permission to write.
    """
    folder = Path(folder)
    refuse_links(folder)
    material = Material(load_results(folder))
    texts, data = _texts(material)
    try:
        remove_parts(folder)
        _remove_stale(folder, set(texts), material.results.manifest)
        for name, text in texts.items():
            path = folder / name
            write_atomically(path, text.encode())
            if path.parent.name == "figures":
                drawn = figures.draw(path.stem, data[path.stem])
                if drawn is not None:
                    style.save(drawn, path.with_suffix(""))
    except OSError as error:
        raise InputError(f"cannot write the report into {folder}: {error}; check its permissions and space") from error
    return folder / "REPORT.md"


def rebuild_problems(folder: str | Path) -> list[str]:
    """Differences between the report in a run folder and the one that its CSVs give; none if it follows from them."""
    material = Material(load_results(folder))
    texts = _texts(material)[0]
    problems = _strangers(Path(folder), set(texts))
    for name, text in texts.items():
        path = Path(folder) / name
        if not path.is_file():
            problems.append(f"{name}: is missing; write the report again")
            continue
        found = path.read_text(encoding="utf-8", errors="replace")
        differs = _csv_difference(found, text) if name.endswith(".csv") else _text_difference(found, text)
        if differs:
            problems.append(f"{name}: is not what the run's CSVs give: {differs}")
        if path.parent.name == "figures":
            problems += [f"{name}: has no {s}" for s in (".png", ".svg") if not path.with_suffix(s).is_file()]
    return problems


def _texts(material: Material) -> tuple[dict[str, str], dict[str, pd.DataFrame]]:
    """Every text file of the report by relative path, REPORT.md last, and the data of its figures by name."""
    claims = make_claims(material.quality, material.speed)
    in_domain = material.results.manifest.get("in_domain") or {}
    tables = all_tables(material.quality, material.speed, in_domain)
    if found := predictor_table(material.results):
        tables["predictors"] = found
    if found := decode_check_table(material.results):
        tables["decode_check"] = found
    data = {name: make(material) for name, (make, _) in figures.FIGURES.items()}
    data = {name: frame for name, frame in data.items() if not frame.empty}
    texts = {"claims.csv": _csv(claims)}
    texts |= {f"tables/{name}.md": without_html(text) for name, text in tables.items()}
    texts |= {f"figures/{name}.csv": _csv(frame) for name, frame in data.items()}
    texts["REPORT.md"] = without_html(_page(material, claims, tables, [name for name in CAPTIONS if name in data]))
    return texts, data


def _csv(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def _remove_stale(folder: Path, names: set[str], manifest: Mapping[str, Any]) -> None:
    """Remove tables and figures of an earlier report that this one no longer has: those that the manifest lists."""
    listed = {*(manifest.get("files") or {}), *(manifest.get("unsealed") or [])}
    for path in [*folder.glob("tables/*.md"), *folder.glob("figures/*.*")]:
        name = path.relative_to(folder).as_posix()
        known = path.stem in ({*INLINE_TABLES, "speed_rows"} if path.parent.name == "tables" else figures.FIGURES)
        kept = {name, path.relative_to(folder).with_suffix(".csv").as_posix()}
        if known and name in listed and not kept & names:
            path.unlink()


def _strangers(folder: Path, names: set[str]) -> list[str]:
    """Tables and figures in a run folder that are no part of its report."""
    drawn = {str(Path(n).with_suffix(s)) for n in names if n.startswith("figures/") for s in (".png", ".svg")}
    found = [path.relative_to(folder).as_posix() for path in [*folder.glob("tables/*"), *folder.glob("figures/*")]]
    return [f"{name}: is no part of the report" for name in sorted(found) if name not in names | drawn]


def _csv_difference(found: str, expected: str) -> str:
    try:
        ours, theirs = (pd.read_csv(io.StringIO(t), dtype=str, keep_default_na=False) for t in (expected, found))
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        return " ".join(str(error).split())
    if list(ours.columns) != list(theirs.columns) or len(ours) != len(theirs):
        return f"{len(theirs)} rows and {len(theirs.columns)} columns, expected {len(ours)} and {len(ours.columns)}"
    for column in ours:
        for line, (a, b) in enumerate(zip(ours[column], theirs[column], strict=True), 2):
            if a != b and not _close(a, b):
                return f"line {line}, column {column}: {b!r}, expected {a!r}"
    return ""


def _close(one: str, other: str) -> bool:
    try:
        return math.isclose(float(one), float(other), rel_tol=_RELATIVE, abs_tol=1e-9)
    except ValueError:
        return False


def _text_difference(found: str, expected: str) -> str:
    ours, theirs = expected.splitlines(), found.splitlines()
    for line, (a, b) in enumerate(zip(ours, theirs, strict=False), 1):
        if a != b:
            return f"line {line}: {b[:120]!r}, expected {a[:120]!r}"
    return "" if len(ours) == len(theirs) else f"{len(theirs)} lines, expected {len(ours)}"


def _page(material: Material, claims: pd.DataFrame, tables: Mapping[str, str], drawn: list[str]) -> str:
    results = material.results
    title = results.manifest.get("title") or results.name
    parts = [f"# {title}\n\nRun `{results.name}`. {_state(material)}\n"]
    parts += [f"{line}\n" for line in _warnings(material)]
    parts.append(f"## In short\n\n{summary(material)}")
    parts.append(
        "### COUNTDOWN against the baselines\n\nEvery task (and perplexity) at every sparsity and mode of this run. Better "
        "and worse: the paired 95 % interval excludes 0, not corrected for the number of comparisons; differences in "
        f"points, of perplexities as they are.\n\n{duels_table(material.quality)}"
    )
    parts.append(f"## Claims of the abstract\n\n{_claims_text(claims)}")
    parts.append("## Figures\n\n" + ("\n".join(_figure_text(name) for name in drawn) or "None yet.\n"))
    parts.append("## Tables\n")
    parts += [_demoted(tables[name]) for name in INLINE_TABLES if name in tables]
    others = ", ".join(f"[{name}](tables/{name}.md)" for name in tables if name not in INLINE_TABLES)
    parts.append(f"More: {others}.\n" if others else "")
    parts.append(f"## Failed and skipped\n\n{_failures(material)}")
    parts.append(f"## Provenance\n\n{_provenance(results.manifest)}")
    parts.append(
        "## How the numbers are made\n\n"
        f"Intervals: {METHOD_NAME}; generated items are resampled by template, averages over tasks within each task, "
        "perplexities in log space. What every column means stands in `results/README.md`.\n"
    )
    parts.append(
        "## Defects of the reference code that this suite does not repeat\n\n"
        + "".join(f"{number}. {defect}\n" for number, defect in enumerate(DEFECTS, 1))
    )
    return "\n".join(part for part in parts if part)


def _state(material: Material) -> str:
    counts = Counter(str(cell.get("status")) for cell in (material.results.manifest.get("cells") or {}).values())
    if not counts:  # a run of CSVs alone
        for frame in (material.quality.every, material.speed):
            for state, cells in frame.groupby("status")["cell_id"].nunique().items():
                counts[str(state)] += int(cells)
    done = ", ".join(f"{counts[state]} {state}" for state in ("ok", "failed", "skipped", "missing") if state in counts)
    unfinished = " The run is not finished: tables and claims hold what there is." if "missing" in counts else ""
    return f"Cells: {done or 'none yet'}.{unfinished}"


def _warnings(material: Material) -> Iterator[str]:
    accuracy = material.quality.rows
    tasks, sources = set(map(bare, accuracy["task"])), set(accuracy["calibration"]) - {""}
    pack = sorted(tasks & {*PACK_TASKS, DECODE_PERPLEXITY})
    if pack:
        yield (
            "The embedded task pack is a smoke-level instrument: small, generated or hand-written, made to show that "
            "everything runs and to tell methods apart roughly. The paper's tasks are the real ones (profiles `small` "
            "and `paper`)."
        )
    in_domain = material.results.manifest.get("in_domain") or {}
    outside = [_SOURCES.get(source, f"`{source}`") for source in sorted(sources) if not in_domain.get(source)]
    if outside:
        yield (
            f"Practical methods were fitted out of domain (not on train splits of the tasks): on {', '.join(outside)}."
        )
    if not material.results.manifest:
        yield "There is no manifest.json in this folder: nothing is known about where its numbers come from."
    if not accuracy.empty and material.results.samples.empty:
        yield "There are no samples in this folder: no interval between methods can be made, and nothing is in bold."


def _claims_text(claims: pd.DataFrame) -> str:
    tested = claims[claims["verdict"] != UNTESTED]
    rows = []
    for _, row in tested.iterrows():
        speed = str(row["quantity"]).startswith("speed_up")
        ends = (row["ci_low"], row["ci_high"])
        if speed:
            value = f"{row['value']:.2f}x"
        else:
            value = f"{percent(row['value'])} %"
            value += f" [{percent(ends[0])}, {percent(ends[1])}]" if all(map(math.isfinite, ends)) else ""
        verdict = str(row["verdict"]) + (" (not settled)" if NOT_SETTLED in str(row["reason"]) else "")
        verdict += "; unequal sparsities, no fair comparison" if "no fair comparison" in str(row["reason"]) else ""
        place = " ".join(str(row[c]) for c in ("model", "mode", "scope") if row[c])
        where = str(row["reason"]).partition(";")[0] if speed else place  # speed: what was timed, dtype and batch too
        pair = f"{row['method']} against {row['against']}"
        sparsity = f"{row['sparsity_target']:g}"
        rows.append([str(row["claim"]), str(row["quantity"]), pair, where, sparsity, value, verdict])
    header = ["claim", "quantity", "pair", "where", "sparsity", "value", "verdict"]
    text = (
        "C1: D-COUNTDOWN, ideal, at 90 %: loss as low as 5.5 %. C2: M-COUNTDOWN: up to 29.4 % better preservation than "
        "existing methods; retention is a method's task average over dense's, shown for every pair as difference and as "
        "ratio - 1, and for the best case over sparsities. C3: faster than dense. The verdict is that of the point "
        "estimate; `(not settled)`: the interval includes the figure it is held against. Reasons stand in `claims.csv`.\n\n"
    )
    text += markdown_table(header, rows) if rows else "Nothing to test yet.\n"
    untested = claims[claims["verdict"] == UNTESTED]
    if len(untested):
        by_claim = [
            f"{claim} for {', '.join(dict.fromkeys(group['model']))}" for claim, group in untested.groupby("claim")
        ]
        text += f"\nUntested here: {'; '.join(by_claim)}.\n"
    return text


def _figure_text(name: str) -> str:
    return f"![{name}](figures/{name}.png)\n\n{CAPTIONS[name]} Data: [CSV](figures/{name}.csv); [SVG](figures/{name}.svg).\n"


def _demoted(text: str) -> str:
    """Markdown with its headings two levels lower."""
    lines = (
        line.replace("# ", "### ", 1)
        if line.startswith("# ")
        else line.replace("### ", "#### ", 1)
        if line.startswith("### ")
        else line
        for line in text.splitlines()
    )
    return "\n".join(lines) + "\n"


def _failures(material: Material) -> str:
    found: dict[tuple[str, str], list[str]] = {}
    for _, row in material.quality.failed.iterrows():
        if row["status"] != "missing":
            setting = f"{row['label']} {row['mode']} {row['sparsity_target']:g} on {row['task']}"
            found.setdefault((str(row["status"]), str(row["reason"])), []).append(setting)
    for _, row in material.speed[~material.speed["status"].isin(("ok", "missing"))].iterrows():
        sparsity = MISSING if math.isnan(row["sparsity_target"]) else f"{row['sparsity_target']:g}"
        setting = f"{row['method']} {sparsity} {row['model_shape']} {row['dtype']} {row['backend']}"
        found.setdefault((str(row["status"]), str(row["reason"])), []).append(setting)
    for cell in (material.results.manifest.get("cells") or {}).values():
        if cell.get("kind") == "analysis" and cell.get("status") == "failed":
            found.setdefault(("failed", str(cell.get("reason", ""))), []).append(str(cell.get("label")))
    if not found:
        return "None.\n"
    rows = [
        [status, str(len(which)), which[0] + (" ..." if len(which) > 1 else ""), reason or "no reason recorded"]
        for (status, reason), which in found.items()
    ]
    return markdown_table(["status", "cells", "which", "reason"], rows)


def _provenance(manifest: Mapping[str, Any]) -> str:
    keys = ("run_id", "suite_version", "argv", "config_sha256", "git", "python", "platform", "packages", "device")
    rows = [[key, _plain(manifest[key])] for key in (*keys, "seeds", "models", "data", "fits") if manifest.get(key)]
    return markdown_table(["what", "value"], rows) if rows else "Unknown: the folder has no manifest.\n"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items() if item not in ("", None))
    if isinstance(value, list):
        return " ".join(_plain(item) for item in value)
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text[:16]}`" if len(text) >= 32 and " " not in text else text
