"""`novelret eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from novelret.cli.options import (
    ConfigOption,
    DataOption,
    DeviceOption,
    ForceOption,
    IgnoreIdenticalOption,
    IndexOption,
    JsonOption,
    QuietOption,
    reporter,
    show_result,
)
from novelret.errors import UserError

if TYPE_CHECKING:
    from novelret.evaluate.evaluate import Evaluation

EXAMPLES = """
[bold]examples:[/]

  novelret eval --data my-data --split test --index runs/index --model supervised=runs/supervised
      --model pg-ret=runs/pg-ret --judge file:judgements.tsv --out runs/report

  novelret eval --data my-data --index runs/index --model pg-ret=runs/pg-ret --base-depth 200 --k 50,100,200
      --judge openai:gpt-4o --max-cost 10 --out runs/report
"""


def evaluate(
    data: DataOption,
    index: IndexOption,
    out: Annotated[Path, typer.Option(help="The REPORT folder to make.")],
    model: Annotated[
        list[str] | None, typer.Option(help="NAME=MODEL, a query encoder to compare; may be repeated.")
    ] = None,
    run: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE, a TREC run of any other retriever; may be repeated.")
    ] = None,
    split: Annotated[str, typer.Option(help="The held-out feedback.")] = "test",
    judge: Annotated[str | None, typer.Option(help="file:PATH.tsv or openai:MODEL.")] = None,
    missing: Annotated[
        str, typer.Option(help="A pair that the judgement file does not list is unknown or irrelevant.")
    ] = "unknown",
    prompt: Annotated[
        str, typer.Option(help="query-keyword, query-document, user-product or a YAML file.")
    ] = "query-document",
    store: Annotated[
        Path | None, typer.Option(help="Judgement store. [default: NOVELRET_STORE, else the user's cache]")
    ] = None,
    max_cost: Annotated[float | None, typer.Option(help="Stop asking before so many dollars.")] = None,
    max_requests: Annotated[int | None, typer.Option(help="Stop asking before more requests.")] = None,
    price: Annotated[str | None, typer.Option(help="INPUT,OUTPUT dollars per million tokens.")] = None,
    base_depth: Annotated[int, typer.Option(help="L: items beyond the deployed top L are novel.")] = 50,
    k: Annotated[str, typer.Option(help="Cuts of the lists.")] = "10,20,50",
    device: DeviceOption = "auto",
    ignore_identical_ids: IgnoreIdenticalOption = True,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Measure novelty, recall and judged precision of query encoders over the unchanged index."""
    cuts = parse_cuts(k)
    from novelret.evaluate.evaluate import EvalConfig, evaluate_models

    settings = EvalConfig(
        data=data,
        index=str(index),
        models=tuple(model or ()),
        runs=tuple(run or ()),
        split=split,
        judge=judge,
        missing=missing,
        prompt=prompt,
        store=str(store) if store else None,
        max_requests=max_requests,
        max_cost=max_cost,
        price=price,
        base_depth=base_depth,
        k=cuts,
        device=device,
        ignore_identical_ids=ignore_identical_ids,
    )
    evaluation = evaluate_models(settings, out, force=force, report=reporter(quiet))
    result = {
        "k": list(cuts),
        "base_depth": base_depth,
        "queries": len(evaluation.split),
        "models": evaluation.means,
        "report": str(out / "report.html"),
    }
    show_result(result, as_json=as_json, render=lambda console: render(console, evaluation, out))


def parse_cuts(text: str) -> tuple[int, ...]:
    """Cuts like 10,20,50 as numbers, ascending."""
    try:
        return tuple(sorted({int(part) for part in str(text).strip("[]() ").split(",")}))
    except ValueError:
        raise UserError(f"--k {text}: expected cuts like 10,20,50") from None


def render(console: Console, evaluation: Evaluation, out: Path) -> None:
    """The summary table and where the report lies."""
    from novelret.evaluate.report import headline_metrics

    names = headline_metrics(evaluation)
    table = Table(
        title=f"{len(evaluation.split):,} queries, L = {evaluation.config.base_depth}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model")
    for name in names:
        table.add_column(
            name.replace("RelevantNovel", "Relevant\nNovel").replace("@", "\n@"), justify="right"
        )
    for model, means in evaluation.means.items():
        cells = []
        for name in names:
            p = evaluation.significance[model].get(name, {}).get("p_holm", 1.0)
            stars = "**" if p < 0.01 else "*" if p < 0.05 else ""
            digits = 2 if "Novel" in name else 3
            cells.append(f"{means[name]:.{digits}f}{stars}" if name in means else "–")
        table.add_row(escape(model), *cells)
    console.print(table)
    console.print("* differs from base with p < 0.05, ** with p < 0.01 (paired, Holm-corrected)", style="dim")
    console.print(f"report: [bold]{escape(str(out / 'report.html'))}[/]", soft_wrap=True)
