"""`novelret train`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

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
    RpmOption,
    StoreOption,
    ThresholdOption,
    TimeoutOption,
    TpmOption,
    joined,
    print_whole,
    reporter,
    settings_among,
    show_result,
)
from novelret.progress import shown

UPDATES, STATES, CHOICE = "What is trained, and how", "States and their loss", "Which checkpoint is kept"
EXAMPLES = """
[bold]examples:[/]

  novelret train --data my-data --split train --index runs/index --objective supervised --out runs/supervised

  novelret train --data my-data --split train --index runs/index --labels runs/labels --objective pg-ret
      --out runs/pg-ret

  novelret train --data my-data --index runs/index --labels runs/labels --alpha 0.25
      --judge openai:gpt-4o-mini --max-cost 20 --out runs/pg-ret

  novelret train --data my-data --index runs/index --labels runs/labels --labels runs/confirmed
      --out runs/pg-ret

  torchrun --nproc-per-node 4 -m novelret train --data my-data --index runs/index --labels runs/labels
      --tune full --precision bf16 --out runs/pg-ret
"""


def train(
    data: DataOption,
    index: IndexesOption,
    out: Annotated[Path, typer.Option(help="The MODEL folder to make.")],
    objective: Annotated[
        str,
        typer.Option(
            help="supervised, supervised-judged, pg-ret; or over lists drawn from the policy: reinforce, "
            "v-pg, v-pg-swr, ca-pg, ca-pg-loo, ca-pg-swr, gumbel-threshold, "
            "expected-threshold, pl-rank, swap."
        ),
    ] = "pg-ret",
    labels: Annotated[
        list[Path] | None,
        typer.Option(
            help="LABELS made by `novelret label`; repeatable: where several judged a pair, the last counts."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="The feedback to train on.")] = "train",
    loss: Annotated[
        str,
        typer.Option(
            help="pg-ret's form: conservative, aggressive, boundary or inclusion. inclusion searches the "
            "catalog in each step; boundary does not.",
            rich_help_panel=STATES,
        ),
    ] = "boundary",
    reward: Annotated[
        str,
        typer.Option(
            help="eq6, eq7, graded, or your own as module:function, of a module that is installed or lies "
            "here.",
            rich_help_panel=STATES,
        ),
    ] = "eq7",
    trust: Annotated[
        bool,
        typer.Option(
            "--trust/--no-trust",
            help="Weigh each novel yes of the judge by the probability that it is right. Assumes that wrong "
            "yeses fall anywhere, right ones where scores, other yeses and feedback suggest them.",
            rich_help_panel=STATES,
        ),
    ] = True,
    tune: Annotated[
        str,
        typer.Option(
            help="memory: a residual map behind the frozen encoder, with a memory of training queries and of "
            "what is relevant to them in front; adapter: the map alone; full: the whole query encoder; lora: "
            "low-rank updates of it.",
            rich_help_panel=UPDATES,
        ),
    ] = "memory",
    lora_rank: Annotated[int, typer.Option(help="Rank of the LoRA matrices.", rich_help_panel=UPDATES)] = 16,
    memory_size: Annotated[
        int,
        typer.Option(
            help="Most entries of the memory: training queries, and items relevant to them.",
            rich_help_panel=UPDATES,
        ),
    ] = 30_000,
    init: Annotated[
        str | None,
        typer.Option(
            help="MODEL to start from instead of the deployed query encoder.", rich_help_panel=UPDATES
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", rich_help_panel=UPDATES)] = 400,
    batch_size: Annotated[int, typer.Option(help="Queries encoded per step.", rich_help_panel=UPDATES)] = 128,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            help="Queries encoded at a time, if a batch does not fit; same result.", rich_help_panel=UPDATES
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. (default: 2e-5 full, 2e-4 lora, 1e-3 adapter and memory)",
            rich_help_panel=UPDATES,
        ),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            help="How the rate falls after the warm-up: linear, cosine or constant.", rich_help_panel=UPDATES
        ),
    ] = "linear",
    warmup: Annotated[
        float, typer.Option(help="Share of the steps for warm-up.", rich_help_panel=UPDATES)
    ] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.", rich_help_panel=UPDATES)] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradient clipping.", rich_help_panel=UPDATES)] = 1.0,
    alpha: Annotated[
        float, typer.Option(help="Share of states drawn from the current policy.", rich_help_panel=STATES)
    ] = 0.0,
    gamma: Annotated[
        float,
        typer.Option(
            help="Share of feedback pairs; the rest comes from the base model's novel ranks.",
            rich_help_panel=STATES,
        ),
    ] = 0.5,
    draw: Annotated[
        str,
        typer.Option(
            help="Base states: queries (each with all its positive states), states (one each) or plain (any "
            "query and rank).",
            rich_help_panel=STATES,
        ),
    ] = "queries",
    per_query: Annotated[
        int, typer.Option(help="With --draw queries, most states a query.", rich_help_panel=STATES)
    ] = 32,
    mirror: Annotated[
        str,
        typer.Option(
            help="Train on items as queries, too, each relevant to what it is relevant to: auto (where "
            "judged feedback shows that relevance goes both ways), always or never.",
            rich_help_panel=STATES,
        ),
    ] = "auto",
    negative_share: Annotated[
        float, typer.Option(help="Share of base states drawn with a reward below 0.", rich_help_panel=STATES)
    ] = 0.0,
    base_depth: Annotated[
        int, typer.Option(help="L: items beyond the deployed top L are novel.", rich_help_panel=STATES)
    ] = 50,
    depth: Annotated[
        int,
        typer.Option(
            help="How deep the deployed lists are searched, for negatives and --draw plain; as deep as the "
            "labels', one search serves both. Labels count at any rank.",
            rich_help_panel=STATES,
        ),
    ] = 200,
    negatives: Annotated[
        int, typer.Option(help="M: top base items that aggressive contrasts with.", rich_help_panel=STATES)
    ] = 5,
    catalog_negatives: Annotated[
        int,
        typer.Option(
            help="Contrast feedback pairs with so many random items, which stand for the whole catalog; 4096 "
            "hold recall better. 0: with the batch's other items, as published.",
            rich_help_panel=STATES,
        ),
    ] = 0,
    hard_negatives: Annotated[
        int,
        typer.Option(help="Top base items among the negatives of supervised-judged.", rich_help_panel=STATES),
    ] = 0,
    judged_negatives: Annotated[
        int,
        typer.Option(
            help="Items that labels call irrelevant to the query among the negatives of supervised-judged, "
            "so many drawn for each pair and step.",
            rich_help_panel=STATES,
        ),
    ] = 0,
    list_size: Annotated[
        int, typer.Option(help="K: items that a list objective draws per query.", rich_help_panel=STATES)
    ] = 50,
    window: Annotated[
        str | None,
        typer.Option(
            help="Contrast with ranks between these multiples of L, of the base list or, for inclusion, of "
            "the policy's own. (default: 1,2 boundary, 0.7,1.3 inclusion)",
            rich_help_panel=STATES,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the loss.", rich_help_panel=STATES)
    ] = 0.03,
    sampling_temperature: Annotated[
        float,
        typer.Option(
            help="Temperature of policy draws; list objectives draw at --temperature.", rich_help_panel=STATES
        ),
    ] = 0.05,
    support: Annotated[
        int | None,
        typer.Option(
            help="Draw policy states among so many top items only. (default: the whole catalog)",
            rich_help_panel=STATES,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Asked about unlabelled policy states: openai:, cross-encoder: or file:.",
            rich_help_panel=JUDGE,
        ),
    ] = None,
    missing: MissingOption = "unknown",
    prompt: PromptOption = "query-document",
    answer: AnswerOption = None,
    threshold: ThresholdOption = None,
    store: StoreOption = None,
    max_cost: MaxCostOption = None,
    max_requests: MaxRequestsOption = None,
    price: PriceOption = None,
    concurrency: ConcurrencyOption = 32,
    timeout: TimeoutOption = 60.0,
    rpm: RpmOption = None,
    tpm: TpmOption = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of queries held back, 2,000 at most.", rich_help_panel=CHOICE)
    ] = 0.2,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Steps between validations. (default: steps / 10)", rich_help_panel=CHOICE),
    ] = None,
    max_recall_drop: Annotated[
        float, typer.Option(help="Relative recall a checkpoint may lose.", rich_help_panel=CHOICE)
    ] = 0.01,
    recall_of: Annotated[
        str,
        typer.Option(
            help="What that recall counts: feedback, or known (feedback and relevant labels).",
            rich_help_panel=CHOICE,
        ),
    ] = "feedback",
    patience: Annotated[
        int,
        typer.Option(
            help="Stop after so many validations in a row below the recall budget; 0: never.",
            rich_help_panel=CHOICE,
        ),
    ] = 0,
    blends: Annotated[
        int,
        typer.Option(
            help="Parts of the line from start to last weights that are validated too, with --tune memory "
            "also with less of it; 1: none.",
            rich_help_panel=CHOICE,
        ),
    ] = 10,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit/--no-refit",
            help="Train the chosen checkpoint anew on all queries, those held back too; not where fewer than "
            "one in twenty is, nor with --judge.",
            rich_help_panel=CHOICE,
        ),
    ] = True,
    keep: Annotated[int, typer.Option(help="Also save the N best checkpoints.", rich_help_panel=CHOICE)] = 0,
    seed: Annotated[int, typer.Option(help="Decides every draw.")] = 0,
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, bf16 or fp16 forward passes of --tune full and lora.", rich_help_panel=UPDATES
        ),
    ] = "fp32",
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Less memory, a fourth more time, for --tune full and lora.",
            rich_help_panel=UPDATES,
        ),
    ] = False,
    log_every: Annotated[int, typer.Option(help="Steps between lines of log.jsonl.")] = 10,
    wandb: Annotated[str | None, typer.Option(help="Weights & Biases project to log to as well.")] = None,
    device: DeviceOption = "auto",
    ignore_identical_ids: IgnoreIdenticalOption = True,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Finetune the query encoder; the items stay as they are in the index."""
    arguments = dict(locals())
    from novelret.encode import has_own_modules
    from novelret.train.config import TrainConfig
    from novelret.train.trainer import train_model
    from novelret.train.validation import pareto_set, worth_showing

    values = settings_among(arguments, TrainConfig)
    values["index"] = joined(index)
    values["labels"] = joined(labels) if labels else None
    settings = TrainConfig(**values)
    trained = train_model(settings, out, force=force, report=reporter(quiet))
    result = {
        "model": str(out),
        "chosen": None if trained.chosen is None else asdict(trained.chosen),
        "points": [asdict(point) for point in trained.points],
    }

    def render(console: Console) -> None:
        table = Table(title="held-back queries", title_justify="left")
        figures = (f"Novelty@{base_depth}", f"RelevantNovel@{base_depth}", "likely", f"Recall@{base_depth}")
        for name in ("step", *figures):
            table.add_column(name, justify="right")
        best = pareto_set(trained.points)
        for point in worth_showing(trained.points, trained.chosen):
            mark = " ←" if point is trained.chosen else ""
            table.add_row(
                f"{point.name}{'*' if point in best else ''}{mark}",
                f"{point.novelty:.2f}",
                f"{point.relevant_novel:.3f}",
                f"{point.likely:.3f}",
                f"{point.recall:.4f}",
            )
        if trained.points:
            print_whole(console, table)
            console.print("* no other has as many relevant novel items and as much recall", style="dim")
        trust = ", trust_remote_code=True" if has_own_modules(out) else ""
        call = shown(f"SentenceTransformer({str(out)!r}{trust})")
        console.print(f"[bold]{shown(str(out))}[/]: query encoder, for {call}", soft_wrap=True)

    show_result(result, as_json=as_json, render=render)
