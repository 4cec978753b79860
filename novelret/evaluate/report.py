"""report.html: one self-contained page, every text escaped since items are untrusted."""

from __future__ import annotations

import shlex
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from novelret.evaluate.chart import Mark, scatter
from novelret.evaluate.metrics.membership import is_in
from novelret.evaluate.tables import headline_metrics
from novelret.label.table import RELEVANT

if TYPE_CHECKING:
    from novelret.evaluate.evaluate import Evaluation

_SHOWN_QUERIES = 5
_SHOWN_ITEMS = 10

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6575; --rule: #d8dde5; --page: #fff;
  --m0: #1c2330; --m1: #0b6bcb; --m2: #b5460f; --m3: #1d7a46; --m4: #7a3fb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b5; --rule: #343c49;
  --page: #14181f; --m0: #e6eaf0; --m1: #6cb2ff; --m2: #ff9a62; --m3: #6fd39b; --m4: #c79bf2; } }
body { margin: 0 auto; max-width: 1100px; padding: 24px 20px 64px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 4px; } h2 { font-size: 1.2rem; margin: 40px 0 8px; }
h3 { font-size: 1rem; margin: 24px 0 4px; } p, li { max-width: 75ch; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 0; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td small { display: block; color: var(--soft); }
svg { width: 100%; max-width: 760px; height: auto; } svg text { fill: var(--ink); font-size: 13px; }
svg .tick { fill: var(--soft); font-size: 12px; } .grid { stroke: var(--rule); }
.rule { stroke: var(--soft); stroke-dasharray: 5 4; } .leader { stroke: var(--rule); }
.mark0 { fill: var(--m0); } .mark1 { fill: var(--m1); } .mark2 { fill: var(--m2); }
.mark3 { fill: var(--m3); } .mark4 { fill: var(--m4); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
.pair ol { margin: 4px 0 0; padding-left: 1.6em; } .pair li { overflow-wrap: anywhere; }
.novel { font-weight: 650; } code { font-size: .85em; overflow-wrap: anywhere; }
@media (max-width: 640px) { .pair { grid-template-columns: 1fr; } body { padding: 16px 14px 48px; } }
"""


def write_report(evaluation: Evaluation, path: Path) -> None:
    """Write the page."""
    config = evaluation.config
    judge = escape(evaluation.judge) if evaluation.judge else "none (relevance is not measured)"
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>novelret report</title>",
        f"<style>{_STYLE}</style><h1>What the new retriever brings</h1>",
        f"<p class='soft'>{len(evaluation.split):,} queries of split {escape(config.split)}, "
        f"{len(evaluation.index):,} items; an item is novel when the deployed top {config.base_depth} "
        f"does not hold it; judge: {judge}</p>",
        "<h2>Summary</h2>",
        _summary(evaluation),
        _frontier(evaluation),
        _merged(evaluation),
        _side_by_side(evaluation),
        _provenance(evaluation),
        "</html>",
    ]
    path.write_text("".join(parts), encoding="utf-8")


def _summary(evaluation: Evaluation) -> str:
    names = headline_metrics(evaluation)
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = []
    for model, means in evaluation.means.items():
        cells = "".join(
            _cell(evaluation.significance[model].get(name, {}), means.get(name)) for name in names
        )
        rows.append(f"<tr><td>{escape(model)}</td>{cells}</tr>")
    return (
        f"<div class='scroll'><table><tr><th>model</th>{head}</tr>{''.join(rows)}</table></div>"
        "<p class='soft'>Novelty and RelevantNovel are mean counts per query, the others shares. "
        "Small print: 95 % bootstrap intervals over queries. * differs from the base with p &lt; 0.05, "
        "** with p &lt; 0.01 "
        "(paired randomisation test, Holm-corrected over the models).</p>"
    )


def _cell(significance: dict[str, Any], value: float | None) -> str:
    if value is None:
        return "<td>–</td>"
    p = significance.get("p_holm", 1.0)
    stars = "**" if p < 0.01 else "*" if p < 0.05 else ""
    interval = ""
    if "low" in significance:
        interval = f"<small>{significance['low']:.3f} – {significance['high']:.3f}</small>"
    return f"<td>{value:.3f}{stars}{interval}</td>"


def _frontier(evaluation: Evaluation) -> str:
    deepest = max(evaluation.config.k)
    pictures = []
    for metric in (f"Novelty@{deepest}", f"RelevantNovel@{deepest}"):
        marks = [
            Mark(model, means[f"Recall@{deepest}"], means[metric])
            for model, means in evaluation.means.items()
            if metric in means
        ]
        if marks:
            base_recall = evaluation.means["base"][f"Recall@{deepest}"]
            pictures.append(scatter(marks, f"Recall@{deepest}", metric, line_at=base_recall))
    return (
        "<h2>Novelty against recall</h2><p>Up is more that the deployed system does not return; right of the "
        "dashed line is no loss of recall.</p>" + "".join(pictures)
    )


def _merged(evaluation: Evaluation) -> str:
    if "MergedDensity" not in evaluation.means["base"]:
        return ""
    names = ("MergedAdded", "MergedDensity", "MergedCoverage")
    rows = "".join(
        "<tr><td>{}</td>{}</tr>".format(
            escape(model),
            "".join(_cell(evaluation.significance[model].get(name, {}), means.get(name)) for name in names),
        )
        for model, means in evaluation.means.items()
    )
    deepest = max(evaluation.config.k)
    return (
        "<h2>As deployed: the merged list</h2><p>The deployed top "
        f"{evaluation.config.base_depth}, then the novel items of the new model's top {deepest}. "
        "Density: relevant items per query. Coverage: share of queries with a relevant item.</p>"
        "<div class='scroll'><table>"
        "<tr><th>model</th><th>items added</th><th>density</th><th>coverage</th></tr>"
        f"{rows}</table></div>"
    )


def _side_by_side(evaluation: Evaluation) -> str:
    others = [name for name in evaluation.lists if name != "base"]
    if not others:
        return ""
    deepest = max(evaluation.config.k)
    metric = f"RelevantNovel@{deepest}" if evaluation.judge else f"Novelty@{deepest}"
    best = max(others, key=lambda name: evaluation.means[name].get(metric, 0.0))
    change = evaluation.per_query[best][metric] - evaluation.per_query["base"][metric]
    loss = evaluation.per_query[best][f"Recall@{deepest}"] - evaluation.per_query["base"][f"Recall@{deepest}"]
    gained = np.argsort(-change, kind="stable")[:_SHOWN_QUERIES]
    lost = [q for q in np.argsort(loss, kind="stable")[:_SHOWN_QUERIES] if loss[q] < 0]
    parts = [
        f"<h2>Side by side: base and {escape(best)}</h2>",
        "<p>＋ novel, ✓ judged relevant, ● held-out feedback.</p>",
        f"<h3>Most gained ({metric})</h3>",
        *(_query(evaluation, best, int(q), f"{change[q]:+g}") for q in gained),
    ]
    if lost:
        parts.append(f"<h3>Most lost (Recall@{deepest})</h3>")
        parts += [_query(evaluation, best, int(q), f"{loss[q]:+.2f}") for q in lost]
    return "".join(parts)


def _query(evaluation: Evaluation, model: str, query: int, figure: str) -> str:
    split = evaluation.split
    base_top = evaluation.base.rows[query : query + 1, : evaluation.config.base_depth]
    feedback = set(split.feedback_items[split.feedback_queries == query].tolist())
    columns = []
    for name in ("base", model):
        lists = evaluation.lists[name]
        rows = lists.rows[query, :_SHOWN_ITEMS]
        rows = rows[rows >= 0]
        texts = evaluation.index.catalog.texts_at(rows)
        known = is_in(rows[None, :], base_top)[0]
        items = []
        for place, (row, text) in enumerate(zip(rows.tolist(), texts, strict=True)):
            marks = "" if known[place] else "＋"
            marks += "✓" if lists.verdicts[query, place] == RELEVANT else ""
            marks += "●" if row in feedback else ""
            style = "" if known[place] else " class='novel'"
            items.append(f"<li{style}>{escape(text[:160])} {marks}</li>")
        columns.append(f"<div><b>{escape(name)}</b><ol>{''.join(items)}</ol></div>")
    text = escape(split.query_texts[query][:300])
    return (
        f"<p><b>{text}</b> <span class='soft'>{figure}</span></p><div class='pair'>{''.join(columns)}</div>"
    )


def _provenance(evaluation: Evaluation) -> str:
    config = evaluation.config
    words = ["novelret", "eval", "--data", config.data, "--split", config.split, "--index", config.index]
    for model in config.models:
        words += ["--model", model]
    for run in config.runs:
        words += ["--run", run]
    if config.judge:
        words += ["--judge", config.judge, "--missing", config.missing]
    words += ["--base-depth", str(config.base_depth), "--k", ",".join(map(str, config.k))]
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{value}</code></td></tr>"
        for name, value in evaluation.inputs.items()
    )
    return (
        f"<h2>Where these figures come from</h2><p><code>{escape(shlex.join(words))}</code></p>"
        f"<div class='scroll'><table><tr><th>input</th><th>fingerprint</th></tr>{rows}</table></div>"
    )
