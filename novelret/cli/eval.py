"""`novelret eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from novelret.cli.label import render_plan
from novelret.cli.options import (
    JUDGE,
    AnswerOption,
    ConcurrencyOption,
    ConfigOption,
    DataOption,
    DeviceOption,
    ForceOption,
    IgnoreIdenticalOption,
    IndexesOption,
    JsonOption,
    MaxCostOption,
    MaxRequestsOption,
    MissingOption,
    PriceOption,
    PromptOption,
    QuietOption,
    RetryUnusableOption,
    RpmOption,
    StoreOption,
    ThresholdOption,
    TimeoutOption,
    TpmOption,
    WaitOption,
    joined,
    leave_batches,
    print_whole,
    reporter,
    settings_among,
    show_result,
)
from novelret.errors import BatchesUnderWay, UserError

if TYPE_CHECKING:
    from novelret.evaluate.evaluate import Evaluation

EXAMPLES = """
[bold]examples:[/]

  novelret eval --data my-data --split test --index runs/index --model supervised=runs/supervised
      --model pg-ret=runs/pg-ret --judge file:judgements.tsv --out runs/report

  novelret eval --data my-data --index runs/index --model sweep=runs/sweep --max-recall-drop 0.02
      --judge openai:gpt-4o --plan

  novelret eval --data my-data --index runs/index --model pg-ret=runs/pg-ret --base-depth 200 --k 50,100,200
      --judge openai:gpt-4o --max-cost 10 --out runs/report
"""


def evaluate(
    data: DataOption,
    index: IndexesOption,
    out: Annotated[Path | None, typer.Option(help="The REPORT folder to make.")] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="MODEL or NAME=MODEL, a query encoder to compare, or a folder of several; may be repeated.",
        ),
    ] = None,
    runs: Annotated[
        list[str] | None,
        typer.Option("--run", help="NAME=FILE, a TREC run of any other retriever; may be repeated."),
    ] = None,
    split: Annotated[str, typer.Option(help="The held-out feedback.")] = "test",
    judge: Annotated[
        str | None,
        typer.Option(
            help="file:PATH.tsv, openai:, openai-batch: or cross-encoder:MODEL.", rich_help_panel=JUDGE
        ),
    ] = None,
    missing: MissingOption = "unknown",
    prompt: PromptOption = "query-document",
    answer: AnswerOption = None,
    threshold: ThresholdOption = None,
    retry_unusable: RetryUnusableOption = False,
    store: StoreOption = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Say what the judge would be asked and its cost; send nothing.",
            rich_help_panel=JUDGE,
        ),
    ] = False,
    max_cost: MaxCostOption = None,
    max_requests: MaxRequestsOption = None,
    price: PriceOption = None,
    concurrency: ConcurrencyOption = 32,
    timeout: TimeoutOption = 60.0,
    rpm: RpmOption = None,
    tpm: TpmOption = None,
    wait: WaitOption = True,
    base_depth: Annotated[int, typer.Option(help="L: items beyond the deployed top L are novel.")] = 50,
    k: Annotated[str, typer.Option(help="Cuts of the lists.")] = "10,20,50",
    human: Annotated[
        Path | None,
        typer.Option(help="A few pairs labelled by people, as to_label.tsv of --human-sample or as qrels."),
    ] = None,
    human_threshold: Annotated[
        float | None,
        typer.Option(help="Lowest of these people's scores that is relevant. (default: anything above 0)"),
    ] = None,
    human_sample: Annotated[
        int | None,
        typer.Option(help="Draw so many random pairs of the lists for people to label: OUT/to_label.tsv."),
    ] = None,
    max_recall_drop: Annotated[
        float, typer.Option(help="Relative recall that the selected model may lose.")
    ] = 0.01,
    recall_of: Annotated[
        str,
        typer.Option(help="What that recall counts: feedback, or known (feedback and what is judged so)."),
    ] = "feedback",
    weights: Annotated[
        Path | None,
        typer.Option(help="Query id and frequency, tab-separated. (default: `weight` in the queries file)"),
    ] = None,
    merge_budget: Annotated[
        int | None, typer.Option(help="Novel items that the merged list takes per query. (default: all)")
    ] = None,
    device: DeviceOption = "auto",
    ignore_identical_ids: IgnoreIdenticalOption = True,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Measure novelty, recall and judged precision of query encoders over the unchanged index."""
    arguments = dict(locals())
    cuts = parse_cuts(k)
    from novelret.evaluate.config import EvalConfig
    from novelret.evaluate.evaluate import evaluate_models, plan_judging, result_of
    from novelret.label.asking import gave_up

    values = settings_among(arguments, EvalConfig)
    values |= {"index": joined(index), "models": tuple(models or ()), "runs": tuple(runs or ()), "k": cuts}
    settings = EvalConfig(**values)
    if plan:
        planned = plan_judging(settings, reporter(quiet))
        show_result(asdict(planned), as_json=as_json, render=lambda console: render_plan(console, planned))
        return
    if out is None:
        raise UserError("--out is missing: where should the REPORT go?")
    try:
        evaluation = evaluate_models(settings, out, force=force, report=reporter(quiet))
    except BatchesUnderWay as waiting:
        raise leave_batches("report", waiting, as_json=as_json) from None
    result = {**result_of(evaluation), "report": str(out / "report.html")}
    show_result(result, as_json=as_json, render=lambda console: render(console, evaluation, out))
    if gave_up(evaluation.asked):
        raise typer.Exit(1)


def parse_cuts(text: str) -> tuple[int, ...]:
    """Cuts like 10,20,50 as numbers, ascending."""
    try:
        return tuple(sorted({int(part) for part in str(text).strip("[]() ").split(",")}))
    except ValueError:
        raise UserError(f"--k {text}: expected cuts like 10,20,50") from None


def render(console: Console, evaluation: Evaluation, out: Path) -> None:
    """The summary table, what people's labels say of it, the frontier, and where the report lies."""
    from novelret.evaluate.tables import BOUNDS, has_bounds, headline_metrics

    print_whole(console, _summary(evaluation, headline_metrics(evaluation)))
    console.print("* differs from base with p < 0.05, ** with p < 0.01 (paired, Holm-corrected)", style="dim")
    if has_bounds(evaluation):
        console.print(BOUNDS, style="dim")
    if len(evaluation.means) > 1:
        console.print(
            "N, R: no model has more Novelty, RelevantNovel at as much recall (Pareto)", style="dim"
        )
    if any(evaluation.human.values()):
        print_whole(console, _human(evaluation))
    if evaluation.buckets:
        print_whole(console, _buckets(evaluation))
    if len(evaluation.means) > 1:
        console.print(_frontier_line(evaluation), soft_wrap=True, highlight=False)
    if evaluation.config.human_sample is not None:
        console.print(f"for people to label: [bold]{escape(str(out / 'to_label.tsv'))}[/]", soft_wrap=True)
    console.print(f"report: [bold]{escape(str(out / 'report.html'))}[/]", soft_wrap=True)


def _summary(evaluation: Evaluation, names: list[str]) -> Table:
    from novelret.evaluate.tables import figure_of

    table = _table(f"{len(evaluation.split):,} queries, L = {evaluation.config.base_depth}", "model")
    for name in names:
        short = name.replace("RelevantNovel", "Relev.\nNovel").replace("Precision", "Prec.")
        table.add_column(short.replace("@", "\n@"), justify="right")
    table.add_column()
    for model in evaluation.means:
        figures = [figure_of(evaluation, model, name) for name in names]
        cells = ["–" if figure is None else figure.value + figure.mark for figure in figures]
        table.add_row(escape(model), *cells, _pareto(evaluation, model))
    return table


def _pareto(evaluation: Evaluation, model: str) -> str:
    """What a model is best at, given its recall: "N" for Novelty, "R" for RelevantNovel."""
    if len(evaluation.means) == 1:
        return ""
    point = next(point for point in evaluation.frontier.points if point.model == model)
    marks = (("N", point.pareto_novelty), ("R", point.pareto_relevant_novel))
    return " ".join(mark for mark, is_on in marks if is_on)


def _human(evaluation: Evaluation) -> Table:
    from novelret.evaluate.tables import headline_metrics

    table = _table("Corrected by human labels (95 % intervals)", "model")
    for name in ("metric", "judge's", "corrected", "interval", "labels"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    headline = headline_metrics(evaluation)  # metrics.json holds all of them
    for model, figures in evaluation.human.items():
        for metric, figure in ((name, figures[name]) for name in headline if name in figures):
            raw = evaluation.means[model].get(metric)
            table.add_row(
                escape(model),
                metric,
                "–" if raw is None else f"{raw:.3f}",
                f"{figure.value:.3f}",
                f"{figure.low:.3f} – {figure.high:.3f}",
                str(figure.pairs),
            )
    return table


def _buckets(evaluation: Evaluation) -> Table:
    from novelret.evaluate.figures import bound_of

    table = _table("The merged list by query frequency", "queries")
    names = [
        name
        for name in ("MergedAdded", "MergedDensity", "MergedCoverage")
        if name in evaluation.means["base"]
    ]
    for name in ("number", "traffic", "model", *(name.removeprefix("Merged").lower() for name in names)):
        table.add_column(name, justify="left" if name == "model" else "right")
    for bucket in evaluation.buckets:
        for place, (model, figures) in enumerate(bucket.models.items()):
            head = ("", "", "") if place else (bucket.name, f"{bucket.queries:,}", f"{bucket.traffic:.0%}")
            cells = [f"{bound_of(name, figures, evaluation.judged)}{figures[name]:.3f}" for name in names]
            table.add_row(*head, escape(model), *cells)
    return table


def _frontier_line(evaluation: Evaluation) -> str:
    from novelret.evaluate.breakdown import gain_metric, gained_items
    from novelret.evaluate.tables import figure_of

    frontier = evaluation.frontier
    budget = f"recall within {frontier.max_recall_drop:.1%} of base"
    if frontier.selected is None:
        return f"selected: [bold]none[/]: no model brings {gained_items(evaluation)} and keeps {budget}"
    point = next(point for point in frontier.points if point.model == frontier.selected)
    metric = gain_metric(evaluation)
    gain = figure_of(evaluation, point.model, metric)
    return (
        f"selected: [bold]{escape(point.model)}[/], most {metric} ({gain.value if gain else '–'}) with "
        f"{budget} ({point.recall_change:+.1%})"
    )


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    return table
