"""`novelret label`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from novelret.cli.options import (
    JUDGE,
    AnswerOption,
    ConcurrencyOption,
    ConfigOption,
    DataOption,
    DeviceOption,
    ForceOption,
    IgnoreIdenticalOption,
    IndexOption,
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
    leave_batches,
    reporter,
    settings_among,
    show_result,
)
from novelret.progress import shown

EXAMPLES = """
[bold]examples:[/]

  novelret label --data my-data --split train --index runs/index --judge file:judgements.tsv --out runs/labels

  novelret label --data my-data --split train --index runs/index --judge openai:gpt-4o-mini
      --prompt query-keyword --per-query 20 --plan

  novelret label --data my-data --split train --index runs/index --judge openai:gpt-4o-mini
      --prompt query-keyword --per-query 20 --max-cost 25 --out runs/labels

  novelret label --data my-data --split train --index runs/index --judge openai-batch:gpt-4o-mini
      --prompt query-keyword --per-query 20 --max-cost 25 --no-wait --out runs/labels

  novelret label --data my-data --split train --index runs/index --judge cross-encoder:BAAI/bge-reranker-v2-m3
      --threshold 0.6 --out runs/free-labels

  novelret label --data my-data --split train --index runs/index --judge openai:gpt-4o --from yes:runs/labels
      --prompt query-keyword --out runs/confirmed
"""


def label(
    data: DataOption,
    index: IndexOption,
    judge: Annotated[
        str,
        typer.Option(
            help="file:PATH.tsv, openai:MODEL or openai-batch:MODEL (OPENAI_API_KEY, OPENAI_BASE_URL), or "
            "cross-encoder:MODEL."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The LABELS folder to make.")] = None,
    split: Annotated[str, typer.Option(help="Whose queries are labelled.")] = "train",
    sources: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            help="base-novel (the default), base-top, feedback, random, model:PATH, pairs:QRELS, or "
            "yes:LABELS, the pairs that LABELS call relevant, to be asked about again with another --judge "
            "or --prompt; repeatable.",
        ),
    ] = None,
    base_depth: Annotated[int, typer.Option(help="L: the deployed list's length.")] = 50,
    depth: Annotated[int, typer.Option(help="Deepest base rank of base-novel.")] = 200,
    per_query: Annotated[
        int | None, typer.Option(help="At most so many pairs of each source for a query.")
    ] = None,
    missing: MissingOption = "unknown",
    prompt: PromptOption = "query-document",
    answer: AnswerOption = None,
    threshold: ThresholdOption = None,
    reparse: Annotated[
        bool,
        typer.Option(
            "--reparse",
            help="Read the stored answers again; ask nothing, pay nothing.",
            rich_help_panel=JUDGE,
        ),
    ] = False,
    retry_unusable: RetryUnusableOption = False,
    store: StoreOption = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be asked and its cost; send nothing.")
    ] = False,
    max_cost: MaxCostOption = None,
    max_requests: MaxRequestsOption = None,
    price: PriceOption = None,
    concurrency: ConcurrencyOption = 32,
    timeout: TimeoutOption = 60.0,
    rpm: RpmOption = None,
    tpm: TpmOption = None,
    wait: WaitOption = True,
    seed: Annotated[int, typer.Option(help="Decides which pairs are sampled.")] = 0,
    device: DeviceOption = "auto",
    ignore_identical_ids: IgnoreIdenticalOption = True,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Have candidate pairs judged for relevance; every answer is kept and never paid for twice."""
    arguments = dict(locals())
    import gc
    from dataclasses import asdict

    from novelret.errors import BatchesUnderWay, UserError
    from novelret.label import label as stage
    from novelret.label.asking import gave_up

    # The libraries' million objects stay; going through them again and again would double the time per pair.
    gc.freeze()
    values = settings_among(arguments, stage.LabelConfig) | {"sources": tuple(sources or ("base-novel",))}
    settings = stage.LabelConfig(**values)
    if plan:
        planned = stage.plan(settings, report=reporter(quiet))
        show_result(asdict(planned), as_json=as_json, render=lambda console: render_plan(console, planned))
        return
    if out is None:
        raise UserError("--out is missing: where should the LABELS go?")
    try:
        facts = stage.build_labels(settings, out, force=force, report=reporter(quiet)).facts
    except BatchesUnderWay as waiting:
        raise leave_batches("labels", waiting, as_json=as_json) from None
    show_result(
        {"labels": str(out), **facts}, as_json=as_json, render=lambda console: _render(console, out, facts)
    )
    if gave_up(facts):
        raise typer.Exit(1)


def _render(console: Console, out: Path, facts: dict[str, Any]) -> None:
    verdicts = ", ".join(f"{n:,} {name}" for name, n in facts["verdicts"].items())
    console.print(
        f"[bold]{escape(str(out))}[/]: {facts['pairs']:,} judged pairs ({verdicts})", soft_wrap=True
    )


def render_plan(console: Console, plan: Any) -> None:
    """What would be asked, what it would cost, and one question."""
    pairs = ", ".join(
        f"{n:,} from {escape(source)} ({plan.known_by_source[source]:,} already judged)"
        for source, n in plan.pairs.items()
    )
    is_counted = plan.tokens_are == "counted"
    cost = f"{'at most' if is_counted else 'at most about'} ${plan.cost or 0:,.4f}"
    cost = "unknown (give --price INPUT,OUTPUT)" if plan.cost is None else cost
    how = "counted" if is_counted else "estimated from text lengths"
    console.print(f"pairs:          {pairs}", soft_wrap=True)
    console.print(f"already known:  {plan.known:,} pairs")
    if plan.in_batches:
        under_way = f"{plan.in_batches:,} questions, in batches that are not collected yet"
        console.print(f"under way:      {under_way}", soft_wrap=True)
    to_ask = f"{plan.to_ask:,} questions, {plan.prompt_tokens:,} prompt tokens ({how})"
    console.print(f"to ask:         {to_ask}", soft_wrap=True)
    console.print(f"cost:           {cost}")
    console.print("[bold]one question:[/]")
    for message in plan.example:
        parts = message.items() if "role" not in message else [(message["role"], message["content"])]
        for name, text in parts:
            console.print(f"  {name}: {shown(text)}", soft_wrap=True)
