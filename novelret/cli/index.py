"""`novelret index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from novelret.cli.options import (
    ConfigOption,
    DataOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    QuietOption,
    reporter,
    show_result,
)

EXAMPLES = """
[bold]examples:[/]

  novelret index --data my-data --model sentence-transformers/all-MiniLM-L6-v2 --out runs/index

  novelret index --data my-data --model ./items --query-model ./queries --dtype float16 --out runs/index

  novelret index --data my-data --embeddings items.npy --ids ids.txt --model ./queries --out runs/index

  novelret index --data my-data --faiss deployed.faiss --ids ids.txt --model openai:text-embedding-3-small
      --out runs/index

  novelret index --data my-data --model ./encoder --factory IVF1024,Flat --search-params nprobe=16
      --out runs/index
"""


def index(
    data: DataOption,
    model: Annotated[str, typer.Option(help="The deployed encoder: a folder, a hub id, or openai:MODEL.")],
    out: Annotated[Path, typer.Option(help="The INDEX folder to make.")],
    query_model: Annotated[
        str | None, typer.Option(help="The deployed query encoder, where it is another model.")
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="Item embeddings that exist: .npy or .fbin, or a folder of such shards."),
    ] = None,
    ids: Annotated[Path | None, typer.Option(help="Their item ids, one per line.")] = None,
    faiss: Annotated[
        Path | None, typer.Option(help="The deployed faiss index: its vectors are taken, it is searched.")
    ] = None,
    factory: Annotated[str, typer.Option(help="faiss index factory string; Flat is exact.")] = "Flat",
    search_params: Annotated[
        str | None, typer.Option(help="faiss search parameters for --factory, like nprobe=16.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="How embeddings are stored: float32 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.")] = 64,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Encode the catalog with the deployed encoder: the frozen item side everything else works against."""
    from novelret.index import IndexConfig, build_index

    settings = IndexConfig(
        data,
        model,
        query_model,
        factory,
        dtype,
        batch_size,
        device,
        embeddings=str(embeddings) if embeddings else None,
        ids=str(ids) if ids else None,
        faiss=str(faiss) if faiss else None,
        search_params=search_params,
    )
    made = build_index(settings, out, force=force, report=reporter(quiet))
    result = {"index": str(out), "fingerprint": made.manifest.fingerprint, **made.manifest.facts}

    def render(console: Console) -> None:
        facts = made.manifest.facts
        console.print(f"[bold]{out}[/]: {facts['items']:,} items x {facts['dimension']} dimensions ({dtype})")
        if "recall" in facts:
            found = facts["recall"]
            console.print(f"faiss finds {found['recall']:.1%} of the exact top {found['k']}")

    show_result(result, as_json=as_json, render=render)
