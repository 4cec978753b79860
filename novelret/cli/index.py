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
from novelret.errors import UserError
from novelret.progress import shown

EXAMPLES = """
[bold]examples:[/]

  novelret index --data my-data --model sentence-transformers/all-MiniLM-L6-v2 --out runs/index

  novelret index --data my-grown-data --append runs/index --out runs/index-new

  novelret index --data my-data --model ./items --query-model ./queries --dtype float16 --out runs/index

  novelret index --data my-data --embeddings items.npy --ids ids.txt --model ./queries --out runs/index

  novelret index --data my-data --faiss deployed.faiss --ids ids.txt --model openai:text-embedding-3-small
      --out runs/index

  novelret index --data my-data --model ./encoder --factory IVF1024,Flat --search-params nprobe=16
      --out runs/index
"""


def index(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="The INDEX folder to make.")],
    model: Annotated[
        str | None,
        typer.Option(help="The deployed encoder: a folder, a hub id or openai:MODEL; not with --append."),
    ] = None,
    append: Annotated[
        Path | None,
        typer.Option(help="INDEX whose items --data holds beside new ones: only these are encoded."),
    ] = None,
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
    factory: Annotated[
        str | None, typer.Option(help="faiss index factory string. (default: Flat, which is exact)")
    ] = None,
    search_params: Annotated[
        str | None, typer.Option(help="faiss search parameters for --factory, like nprobe=16.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="How embeddings are stored: float32 or float16. (default: float32)")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.")] = 64,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Encode the catalog with the deployed encoder: the frozen item side everything else works against."""
    if append is not None:
        from novelret.append import AppendConfig, append_items

        fixed = {
            "--model": model,
            "--query-model": query_model,
            "--embeddings": embeddings,
            "--ids": ids,
            "--faiss": faiss,
            "--factory": factory,
            "--search-params": search_params,
            "--dtype": dtype,
        }
        given = [flag for flag, value in fixed.items() if value is not None]
        if given:
            raise UserError(
                f"{given[0]}: new items are encoded like those of --append {append}; leave it out"
            )
        made = append_items(
            AppendConfig(data, str(append), batch_size, device), out, force=force, report=reporter(quiet)
        )
    else:
        from novelret.build import IndexConfig, build_index

        if model is None:
            raise UserError("--model is missing: the deployed encoder (or --append INDEX for new items)")
        settings = IndexConfig(
            data,
            model,
            query_model,
            factory or "Flat",
            dtype or "float32",
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
        size = f"{len(made):,} items x {made.dimension} dimensions ({made.embeddings.dtype.name})"
        console.print(f"[bold]{shown(str(out))}[/]: {size}", soft_wrap=True)
        if "recall" in made.manifest.facts:
            found = made.manifest.facts["recall"]
            console.print(f"faiss finds {found['recall']:.1%} of the exact top {found['k']}")

    show_result(result, as_json=as_json, render=render)
