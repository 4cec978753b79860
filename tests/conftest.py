"""A tiny world for the tests: forty items and a random two-layer encoder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is computed here is tiny: on a busy machine several threads mostly wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

COLOURS = ("red", "blue", "green", "grey", "black")
THINGS = ("sofa", "couch", "lamp", "chair", "table", "desk", "shelf", "rug")


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_qrels(path: Path, rows: list[tuple[str, str, object]], header: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "query-id\tcorpus-id\tscore\n" if header else ""
    path.write_text(head + "".join(f"{q}\t{i}\t{s}\n" for q, i, s in rows), encoding="utf-8")


def make_world(folder: Path) -> Path:
    """Items are colour × thing; a query names one and likes every item of the same thing."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [(f"i{n:02d}", f"{c} {t}") for n, (c, t) in enumerate((c, t) for t in THINGS for c in COLOURS)]
    queries = [(f"q{n:02d}", f"buy {text}") for n, (_, text) in enumerate(items)]
    write_jsonl(folder / "corpus.jsonl", [{"_id": i, "title": "", "text": text} for i, text in items])
    write_jsonl(folder / "queries.jsonl", [{"_id": q, "text": text} for q, text in queries])
    thing = {i: text.split()[1] for i, text in items}
    pairs = [
        (q, i, 1)
        for q, text in queries
        for i, of in thing.items()
        if of == text.split()[2] and i[1:] != q[1:]
    ]
    train = {q for q, _ in queries[::2]}
    write_qrels(folder / "qrels" / "train.tsv", [p for n, p in enumerate(pairs) if p[0] in train and n % 2])
    write_qrels(
        folder / "qrels" / "test.tsv", [p for n, p in enumerate(pairs) if p[0] not in train and n % 2]
    )
    write_qrels(folder / "judgements.tsv", pairs)
    return folder


def make_encoder(folder: Path, dimension: int = 16, seed: int = 0) -> Path:
    """A random BERT with a word-level vocabulary, saved as a sentence-transformers folder."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "buy", *COLOURS, *THINGS]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    bert = folder.with_name(folder.name + "-bert")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(bert)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=dimension,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * dimension,
            max_position_embeddings=32,
            initializer_range=0.5,
        )
    ).save_pretrained(bert)
    transformer = Transformer(str(bert), max_seq_length=16)
    pooling = Pooling(transformer.get_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data folder; read-only by convention."""
    return make_world(tmp_path_factory.mktemp("world") / "data")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny deployed encoder."""
    return make_encoder(tmp_path_factory.mktemp("encoder") / "deployed")


@pytest.fixture(scope="session")
def index_folder(world: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INDEX of the tiny world."""
    from novelret.build import IndexConfig, build_index

    out = tmp_path_factory.mktemp("index") / "index"
    build_index(IndexConfig(str(world), str(encoder), device="cpu"), out)
    return out
