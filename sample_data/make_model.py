"""Train the sample world's deployed model from scratch, on the feedback that was there before.

    python sample_data/make_model.py [--data DIR] [--out DIR]

Two transformer layers over a vocabulary of the catalog's own words. Half of each batch are the clicks of
`qrels/base.tsv`; the other half asks for an item by a few words of its title, the habit of matching words
that every deployed encoder has. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertConfig, BertModel, BertTokenizerFast

HERE = Path(__file__).parent
SEED = 0
HIDDEN, LAYERS, HEADS, FEED_FORWARD, MAX_TOKENS = 96, 2, 4, 192, 48
STEPS, BATCH, LEARNING_RATE, TEMPERATURE = 600, 128, 1e-3, 0.05


def read_texts(path: Path) -> dict[str, str]:
    """Texts by id, the title in front."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in rows}


def word_vocabulary(texts: Sequence[str]) -> list[str]:
    """Whole words, the frequent ones first, then single characters to spell what is none of them."""
    counts = Counter(piece for text in texts for piece in re.findall(r"[a-z0-9]+|[^a-z0-9\s]", text.lower()))
    common = [
        word for word, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])) if count > 1
    ]
    letters = [chr(code) for code in (*range(ord("a"), ord("z") + 1), *range(ord("0"), ord("9") + 1))]
    spelling = [*letters, *(f"##{letter}" for letter in letters)]
    return list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *common, *spelling]))


def untrained(vocabulary: Sequence[str]) -> SentenceTransformer:
    """The encoder with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder) / "words.txt"
        words.write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
        BertTokenizerFast(vocab=str(words), do_lower_case=True).save_pretrained(folder)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=FEED_FORWARD,
            max_position_embeddings=MAX_TOKENS,
        )
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=MAX_TOKENS)
    return SentenceTransformer(modules=[transformer, Pooling(HIDDEN), Normalize()], device="cpu")


def few_words(title: str, rng: np.random.Generator) -> str:
    """One to three words of a title, as a query that should find it."""
    words = title.split()
    size = min(len(words), int(rng.integers(1, 4)))
    return " ".join(words[place] for place in rng.permutation(len(words))[:size])


def train(data: Path, out: Path) -> None:
    """Train with in-batch InfoNCE and save a sentence-transformers folder."""
    torch.set_num_threads(1)  # batches this small gain nothing from more, and the sums stay the same
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    items, queries = read_texts(data / "corpus.jsonl"), read_texts(data / "queries.jsonl")
    titles = {
        row["_id"]: row["title"]
        for row in map(json.loads, (data / "corpus.jsonl").read_text(encoding="utf-8").splitlines())
    }
    pairs = [line.split("\t")[:2] for line in (data / "qrels" / "base.tsv").read_text().splitlines()[1:]]
    item_ids = list(items)

    model = untrained(word_vocabulary([*items.values(), *queries.values()]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    model.train()
    for step in range(STEPS):
        clicked = [pairs[row] for row in rng.integers(len(pairs), size=BATCH // 2)]
        named = [item_ids[row] for row in rng.integers(len(items), size=BATCH // 2)]
        asked = [queries[query] for query, _ in clicked] + [few_words(titles[item], rng) for item in named]
        answers = [items[item] for _, item in clicked] + [items[item] for item in named]
        found = model(model.preprocess(asked))["sentence_embedding"]
        sought = model(model.preprocess(answers))["sentence_embedding"]
        loss = torch.nn.functional.cross_entropy(found @ sought.T / TEMPERATURE, torch.arange(BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.eval()
    model.save(str(out), create_model_card=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the sample world's deployed model.")
    parser.add_argument("--data", type=Path, default=HERE, help="folder that make.py wrote")
    parser.add_argument("--out", type=Path, default=HERE / "deployed_model", help="folder to write")
    arguments = parser.parse_args()
    train(arguments.data, arguments.out)
