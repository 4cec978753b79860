"""The model card: README.md in a MODEL folder, for whoever finds it later."""

from __future__ import annotations

from dataclasses import asdict, fields

from novelret.index import Index
from novelret.train.config import TrainConfig
from novelret.train.validation import Point, worth_showing

_TEMPLATE = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [novelret, dense-retrieval]
---

# Query encoder finetuned for novelty

Finetuned by novelret {version} so that its top {depth} holds relevant items that the deployed model does not
already return. Item embeddings are those of the deployed model, unchanged: this encoder is for queries,
against the index it was trained with.

    from sentence_transformers import SentenceTransformer
    query_encoder = SentenceTransformer("this folder"{trust})
    embeddings = query_encoder.encode_query(["a query"]{normalize})
{remark}
## Results on held-back training queries

{results}
{refit}
## Data

| | |
| --- | --- |
| data | {data}, split {split}{mirrored} |
| index | {index} ({items:,} items, {dimension} dimensions) |
| deployed encoder | {encoder} |
| labels | {labels} |

## Settings that differ from the defaults

{settings}
"""

_REMARK = """
torch may warn once that a softmax guesses its dimension; it guesses right.
"""

_REFIT = """
These weights were then trained anew on all queries, the held-back ones too, with the same settings for the
same number of steps. The figures above are of those trained without the held-back queries.
"""


def model_card(
    config: TrainConfig,
    index: Index,
    judges: list[str],
    points: list[Point],
    chosen: Point | None,
    version: str,
    *,
    own_modules: bool,
    has_memory: bool,
    is_refit: bool,
    mirrored: int,
) -> str:
    """The card's text, in Markdown.

    Args:
        config: of the run.
        index: what it was finetuned against.
        judges: those of the config's LABELS, in their order.
        points: every validation point.
        chosen: that of the weights kept.
        version: novelret's.
        own_modules: whether the encoder holds modules of novelret, which have to be installed and allowed.
        has_memory: whether it holds a memory.
        is_refit: whether its weights were trained anew on all queries.
        mirrored: how many items served as queries.
    """
    made = index.manifest.config
    labels = ", ".join(
        f"{folder} (judge: {judge})" for folder, judge in zip(config.label_folders, judges, strict=True)
    )
    return _TEMPLATE.format(
        version=version,
        depth=config.base_depth,
        trust=", trust_remote_code=True" if own_modules else "",
        remark=_REMARK if has_memory else "",
        normalize=", normalize_embeddings=True" if index.normalized else "",
        results=_results(config, points, chosen),
        refit=_REFIT if is_refit else "",
        data=config.data,
        split=config.split,
        mirrored=f"; {mirrored:,} items as queries, too" if mirrored else "",
        index=", ".join(config.indexes),
        items=len(index),
        dimension=index.dimension,
        encoder=made["query_model"] or made["model"],
        labels=labels or "none",
        settings=_settings(config),
    )


def _results(config: TrainConfig, points: list[Point], chosen: Point | None) -> str:
    if chosen is None:
        return (
            "No queries were held back (`--validation-fraction 0`): the weights are those of the last step."
        )
    length = config.base_depth
    of_known = " of what is known to be relevant" if config.recall_of == "known" else ""
    lines = [
        f"| step | Novelty@{length} | RelevantNovel@{length} | likely | Recall@{length}{of_known} |",
        "| --- | --- | --- | --- | --- |",
    ]
    for point in worth_showing(points, chosen):
        mark = " (kept)" if point is chosen else ""
        lines.append(
            f"| {point.name}{mark} | {point.novelty:.2f} | {point.relevant_novel:.3f} | {point.likely:.3f} "
            f"| {point.recall:.4f} |"
        )
    return "\n".join(lines)


def _settings(config: TrainConfig) -> str:
    values = asdict(config)
    skipped = ("data", "index", "labels", "split")
    changed = [
        f"* `{field.name}`: {values[field.name]}"
        for field in fields(config)
        if field.name not in skipped and values[field.name] != field.default
    ]
    return "\n".join(changed) or "None."
