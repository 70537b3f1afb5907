"""REPORT.md and everything beside it, from the files of a run folder alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from suite import schema
from suite.errors import InputError
from suite.evaluation.tasks import DECODE_PERPLEXITY, PACK_TASKS
from suite.files import refuse_links, remove_parts, write_atomically
from suite.report import style
from suite.report.claims import NOT_SETTLED, UNTESTED
from suite.report.figures import FIGURES
from suite.report.findings import duels_table, summary
from suite.report.material import Material
from suite.report.methods import sources
from suite.report.results import load_results
from suite.report.tables import TABLES
from suite.report.task_names import bare
from suite.report.text import MISSING, csv_text, markdown_table, percent, without_html
from suite.statistics import METHOD_NAME

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


@dataclass(frozen=True)
class Report:
    """Every text file of a report by relative path, REPORT.md last, and the data of its figures by name."""

    texts: dict[str, str]
    frames: dict[str, pd.DataFrame]


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
    report, figures = report_of(material), {figure.name: figure for figure in FIGURES}
    try:
        remove_parts(folder)
        _remove_stale(folder, set(report.texts), material.results.manifest)
        for name, text in report.texts.items():
            path = folder / name
            write_atomically(path, text.encode())
            if path.parent.name == "figures":
                drawn = figures[path.stem].drawn(report.frames[path.stem])
                if drawn is not None:
                    style.save(drawn, path.with_suffix(""))
    except OSError as error:
        raise InputError(f"cannot write the report into {folder}: {error}; check its permissions and space") from error
    return folder / "REPORT.md"


def report_of(material: Material) -> Report:
    """The report of a run: every table and figure that it has something for."""
    tables = {table.name: text for table in TABLES if (text := table.markdown(material))}
    frames = {figure.name: frame for figure in FIGURES if not (frame := figure.frame(material)).empty}
    texts = {schema.CLAIMS.file: csv_text(material.claims)}
    if not material.equal_bytes.empty:
        texts[schema.EQUAL_BYTES.file] = csv_text(material.equal_bytes)
    texts |= {f"tables/{name}.md": without_html(text) for name, text in tables.items()}
    texts |= {f"figures/{name}.csv": csv_text(frame) for name, frame in frames.items()}
    texts["REPORT.md"] = without_html(_page(material, tables, set(frames)))
    return Report(texts, frames)


def _remove_stale(folder: Path, names: set[str], manifest: Mapping[str, Any]) -> None:
    """Remove tables and figures of an earlier report that this one no longer has: those that the manifest lists."""
    listed = {*(manifest.get("files") or {}), *(manifest.get("unsealed") or [])}
    ours = {"tables": {table.name for table in TABLES}, "figures": {figure.name for figure in FIGURES}}
    for path in [*folder.glob("tables/*.md"), *folder.glob("figures/*.*")]:
        name = path.relative_to(folder).as_posix()
        kept = {name, path.relative_to(folder).with_suffix(".csv").as_posix()}
        if path.stem in ours[path.parent.name] and name in listed and not kept & names:
            path.unlink()


def _page(material: Material, tables: Mapping[str, str], shown: set[str]) -> str:
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
    parts.append(_sources_text(material))
    parts.append(f"## Claims of the abstract\n\n{_claims_text(material.claims)}")
    figures = "\n".join(figure.markdown() for figure in FIGURES if figure.name in shown)
    parts.append("## Figures\n\n" + (figures or "None yet.\n"))
    parts.append("## Tables\n")
    parts += [_demoted(tables[table.name]) for table in TABLES if table.inline and table.name in tables]
    others = ", ".join(f"[{t.name}](tables/{t.name}.md)" for t in TABLES if not t.inline and t.name in tables)
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
    outside = [_SOURCES.get(source, f"`{source}`") for source in sorted(sources) if not material.in_domain.get(source)]
    if outside:
        yield (
            f"Practical methods were fitted out of domain (not on train splits of the tasks): on {', '.join(outside)}."
        )
    if not material.results.manifest:
        yield "There is no manifest.json in this folder: nothing is known about where its numbers come from."
    if not accuracy.empty and material.results.samples.empty:
        yield "There are no samples in this folder: no interval between methods can be made, and nothing is in bold."


def _sources_text(material: Material) -> str:
    """Which of the run's methods are published; the claims are about the paper's."""
    published, own = sources([*material.quality.every["method"], *material.speed["method"]])
    lines = [f"Published: {'; '.join(published)}.\n"] if published else []
    lines += [f"This suite's own, in no paper that is known to it: {', '.join(own)}.\n"] if own else []
    return "### Where the methods come from\n\n" + "\n".join(lines) if lines else ""


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
