"""`novelret convert`: one subcommand per source."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from novelret.cli.options import ConfigOption, ForceOption, JsonOption, QuietOption, reporter, show_result

if TYPE_CHECKING:
    from novelret.convert.writer import Converted

EXAMPLES = """
[bold]examples:[/]

  novelret convert orcas --orcas orcas.tsv.gz --documents msmarco-docs.tsv.gz --out data/orcas

  novelret convert recformer --source Scientific --out data/amazon

  novelret convert msmarco --collection collection.tsv --split train=queries.train.tsv,qrels.train.tsv
      --split test=queries.dev.tsv,qrels.dev.small.tsv --out data/msmarco

  novelret convert trec --corpus docs.sgml --split test=topics.txt,qrels.txt --out data/trec

  novelret convert query-keyword --pairs log.tsv.gz --keywords pool.txt --train 1230000 --test 6200
      --out data/ads

  novelret convert hf --dataset sentence-transformers/natural-questions --item-column answer --out data/nq
"""

app = typer.Typer(
    help="Turn published data sets into the BEIR folder that every other command reads.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

OutOption = Annotated[Path, typer.Option(help="The BEIR folder to make.")]
SeedOption = Annotated[int, typer.Option(help="Decides the splits.")]
PartsOption = Annotated[list[str], typer.Option("--split", help="NAME=QUERIES,QRELS; may be repeated.")]


@app.command()
def orcas(
    orcas: Annotated[Path, typer.Option(help="orcas.tsv(.gz): query id, query, document id, url.")],
    documents: Annotated[Path, typer.Option(help="msmarco-docs.tsv(.gz): document id, url, title, body.")],
    out: OutOption,
    train: Annotated[int, typer.Option(help="Pairs of the train split.")] = 1_000_000,
    test: Annotated[
        int, typer.Option(help="Pairs of the test split; all others are base. Few pairs give smaller splits.")
    ] = 8_500,
    seed: SeedOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """ORCAS: clicked documents, known by their titles in MS MARCO."""
    from novelret.convert.orcas import convert_orcas

    report = reporter(quiet)
    made = convert_orcas(orcas, documents, out, train=train, test=test, seed=seed, force=force, report=report)
    _show(made, as_json)


@app.command()
def recformer(
    source: Annotated[Path, typer.Option(help="Folder with train.json, …, smap.json and meta_data.json.")],
    out: OutOption,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """RecFormer's Amazon files: a user's history is the query, the next product the positive."""
    from novelret.convert.recformer import convert_recformer

    _show(convert_recformer(source, out, force=force, report=reporter(quiet)), as_json)


@app.command()
def msmarco(
    collection: Annotated[Path, typer.Option(help="collection.tsv(.gz): passage id, passage.")],
    split: PartsOption,
    out: OutOption,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """MS MARCO passages."""
    from novelret.convert.collections import parse_parts
    from novelret.convert.msmarco import convert_msmarco

    made = convert_msmarco(collection, parse_parts(split), out, force=force, report=reporter(quiet))
    _show(made, as_json)


@app.command()
def trec(
    corpus: Annotated[
        list[Path], typer.Option(help="Documents: <DOC> markup, .jsonl or two-column .tsv; repeatable.")
    ],
    split: PartsOption,
    out: OutOption,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """A TREC collection with its topics and qrels."""
    from novelret.convert.collections import parse_parts
    from novelret.convert.trec import convert_trec

    _show(convert_trec(corpus, parse_parts(split), out, force=force, report=reporter(quiet)), as_json)


@app.command("query-keyword")
def query_keyword(
    pairs: Annotated[Path, typer.Option(help="TSV(.gz): query, keyword, count; with or without a header.")],
    out: OutOption,
    keywords: Annotated[Path | None, typer.Option(help="Further keywords, one per line.")] = None,
    min_count: Annotated[float, typer.Option(help="Drop pairs seen less often.")] = 1,
    train: Annotated[int, typer.Option(help="Pairs of the train split.")] = 1_230_000,
    test: Annotated[
        int, typer.Option(help="Pairs of the test split; all others are base. Few pairs give smaller splits.")
    ] = 6_200,
    seed: SeedOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """A log of queries and the keywords that they led to."""
    from novelret.convert.query_keyword import convert_query_keyword

    made = convert_query_keyword(
        pairs,
        out,
        keywords=keywords,
        min_count=min_count,
        train=train,
        test=test,
        seed=seed,
        force=force,
        report=reporter(quiet),
    )
    _show(made, as_json)


@app.command()
def hf(
    dataset: Annotated[str, typer.Option(help="Hub id, or a local folder that `datasets` reads.")],
    out: OutOption,
    query_column: Annotated[str, typer.Option(help="The query's text.")] = "query",
    item_column: Annotated[str, typer.Option(help="The item's text, or a list of texts.")] = "document",
    title_column: Annotated[str | None, typer.Option(help="The item's title.")] = None,
    query_id_column: Annotated[str | None, typer.Option(help="The query's id.")] = None,
    item_id_column: Annotated[str | None, typer.Option(help="The item's id.")] = None,
    score_column: Annotated[str | None, typer.Option(help="The pair's score.")] = None,
    configuration: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="One of its splits, or OURS=THEIRS; repeatable. (default: all)")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Any Hugging Face data set whose rows are pairs of texts."""
    from novelret.convert.hf import Columns, convert_hf

    columns = Columns(query_column, item_column, title_column, query_id_column, item_id_column, score_column)
    made = convert_hf(
        dataset, out, columns, config=configuration, splits=split, force=force, report=reporter(quiet)
    )
    _show(made, as_json)


def _show(made: Converted, as_json: bool) -> None:
    def render(console: Console) -> None:
        counts = ", ".join(f"{split} {count:,}" for split, count in made.pairs.items())
        console.print(
            f"[bold]{escape(str(made.folder))}[/]: {made.items:,} items, {made.queries:,} queries; "
            f"pairs: {escape(counts)}",
            soft_wrap=True,
        )
        for reason, count in made.dropped.items():
            console.print(f"dropped {count:,}: {escape(reason)}", soft_wrap=True)

    show_result(asdict(made), as_json=as_json, render=render)
