"""The figures as tables for other programs and for papers: CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from novelret.evaluate.figures import bound_of
from novelret.evaluate.significance import stars

if TYPE_CHECKING:
    from novelret.evaluate.evaluate import Evaluation

_COLUMNS = (
    "model", "metric", "value", "bound", "low", "high", "p", "p_holm", "mark",
    "human_value", "human_low", "human_high", "human_pairs",
)  # fmt: skip


def headline_metrics(evaluation: Evaluation) -> list[str]:
    """The metrics worth a column: novelty at each cut, then the rest at the deepest or shallowest one."""
    cuts = sorted(evaluation.config.k)
    names = [f"Novelty@{k}" for k in cuts] + [f"RelevantNovel@{cuts[-1]}", f"Recall@{cuts[-1]}"]
    if evaluation.config.recall_of == "known":
        names.append(evaluation.config.recall_metric)
    names += [f"Precision@{cuts[0]}", f"Judged@{cuts[0]}"]
    return [name for name in names if any(name in means for means in evaluation.means.values())]


def digits_of(metric: str) -> int:
    """Decimals that a metric is shown with: counts need fewer than shares."""
    return (
        2 if metric.startswith(("Novelty", "RelevantNovel", "Merged")) and metric != "MergedCoverage" else 3
    )


@dataclass(frozen=True)
class Figure:
    """A mean as tables show it.

    Attributes:
        value: the number, behind "≥" or "~" where too few verdicts stand behind it (see `bound_of`).
        mark: stars of its test against the base; none of a bound.
        interval: its 95 % interval; None of a bound, or where there is none.
    """

    value: str
    mark: str
    interval: tuple[str, str] | None


BOUNDS = "≥: a lower bound, as under 95 % of the items are judged; ~: of what was judged alone."
"""What a figure's bound means."""


def figure_of(evaluation: Evaluation, model: str, metric: str) -> Figure | None:
    """A model's mean of a metric, rounded; None where there is none."""
    value, digits = evaluation.means[model].get(metric), digits_of(metric)
    if value is None:
        return None
    bound = bound_of(metric, evaluation.means[model], evaluation.judged)
    found = {} if bound else evaluation.significance[model].get(metric, {})
    interval = (f"{found['low']:.{digits}f}", f"{found['high']:.{digits}f}") if "low" in found else None
    return Figure(f"{bound}{value:.{digits}f}", stars(found.get("p_holm")), interval)


def has_bounds(evaluation: Evaluation) -> bool:
    """Whether any figure is only a bound."""
    return any(
        bound_of(metric, means, evaluation.judged) for means in evaluation.means.values() for metric in means
    )


def write_tables(evaluation: Evaluation, folder: Path) -> None:
    """Write metrics.csv, table.md and table.tex."""
    _write_csv(evaluation, folder / "metrics.csv")
    (folder / "table.md").write_text(_markdown(evaluation), encoding="utf-8")
    (folder / "table.tex").write_text(_latex(evaluation), encoding="utf-8")


def _write_csv(evaluation: Evaluation, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for model, means in evaluation.means.items():
            for metric, value in means.items():
                bound = bound_of(metric, means, evaluation.judged)
                # Of a bound there is neither an interval nor a test, here as in the other tables.
                found = {} if bound else evaluation.significance[model].get(metric, {})
                row = {"model": model, "metric": metric, "value": value, "bound": bound}
                row |= {name: found[name] for name in ("low", "high", "p", "p_holm") if name in found}
                row["mark"] = stars(found.get("p_holm"))
                human = evaluation.human.get(model, {}).get(metric)
                if human is not None:
                    row |= {"human_value": human.value, "human_low": human.low, "human_high": human.high}
                    row["human_pairs"] = human.pairs
                writer.writerow(row)


def _rows(evaluation: Evaluation) -> tuple[list[str], list[tuple[str, list[Figure | None]]]]:
    """Headline metrics, and each model's figures of them."""
    names = headline_metrics(evaluation)
    return names, [
        (model, [figure_of(evaluation, model, name) for name in names]) for model in evaluation.means
    ]


def _caption(evaluation: Evaluation) -> str:
    config = evaluation.config
    judge = f"judge {evaluation.judge}" if evaluation.judge else "no judge"
    return (
        f"{len(evaluation.split):,} queries of split {config.split}, L = {config.base_depth}, {judge}. "
        "Brackets: 95% bootstrap intervals over queries. * p < 0.05, ** p < 0.01 against base "
        "(paired randomisation test, Holm-corrected over the models)."
        + (f" {BOUNDS}" if has_bounds(evaluation) else "")
    )


def _markdown(evaluation: Evaluation) -> str:
    names, rows = _rows(evaluation)
    lines = [f"| model | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for model, cells in rows:
        shown = [
            "–" if cell is None else f"{cell.value}{cell.mark}{_bracket(cell)}".replace("*", r"\*")
            for cell in cells
        ]
        lines.append(f"| {model.replace('|', chr(92) + '|')} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", _caption(evaluation).replace("*", r"\*"), ""])


def _bracket(figure: Figure) -> str:
    return "" if figure.interval is None else f" [{', '.join(figure.interval)}]"


def _latex(evaluation: Evaluation) -> str:
    names, rows = _rows(evaluation)
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'r' * len(names)}}}",
        "\\toprule",
        " & ".join(["model", *map(_tex, names)]) + r" \\",
        "\\midrule",
    ]
    for model, cells in rows:
        figures = [
            "--" if cell is None else _tex(cell.value) + (f"$^{{{cell.mark}}}$" if cell.mark else "")
            for cell in cells
        ]
        intervals = ["" if cell is None else rf"\scriptsize{_bracket(cell)}" for cell in cells]
        lines.append(" & ".join([_tex(model), *figures]) + r" \\")
        # The braces keep LaTeX from reading the bracket as an argument of the line break.
        lines.append("{} & " + " & ".join(intervals) + r" \\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join([*lines, "% " + _caption(evaluation), ""])


def _tex(text: str) -> str:
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "≥": r"$\geq$",
    }
    return "".join(special.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)
