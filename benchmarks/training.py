"""Speed of training: against sentence-transformers' own trainer, of adapters, and what is not the encoder.

    python benchmarks/training.py DATA INDEX LABELS [--batch 64] [--rounds 3] [--precision fp32]

DATA, INDEX and LABELS as the other commands take them; INDEX must have been made from sentence-transformers
weights. Rates come from the difference between a long and a short run, so start-up does not count; the two
trainers take turns, so that a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from novelret import TrainConfig, open_index, train_model
from novelret.data.split import load_split
from novelret.label.table import make_table
from novelret.train import loop, matrix, run

SHORT, LONG = 3, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("data", "index", "labels"):
        parser.add_argument(name)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        against_sentence_transformers(options, Path(folder))
        adapter(options, Path(folder))
        overhead(options, Path(folder))
    label_lookup()


def config(options: argparse.Namespace, **changes: object) -> TrainConfig:
    settings = {
        "labels": options.labels, "batch_size": options.batch, "validation_fraction": 0.0, "log_every": 10**6,
        "precision": options.precision, "device": options.device, "eval_every": 10**6, "refit": False,
    }  # fmt: skip
    return TrainConfig(options.data, options.index, **(settings | changes))


def against_sentence_transformers(options: argparse.Namespace, folder: Path) -> None:
    index = open_index(options.index)
    split = load_split(options.data, "train", index.catalog)
    pairs = {
        "anchor": [split.query_texts[row] for row in split.feedback_queries],
        "positive": index.catalog.texts_at(split.feedback_items),
    }

    def theirs(steps: int) -> float:
        model = SentenceTransformer(str(index.folder / "query_encoder"), device=options.device)
        arguments = SentenceTransformerTrainingArguments(
            str(folder / "theirs"), max_steps=steps, per_device_train_batch_size=options.batch, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=options.precision == "bf16",
            use_cpu=options.device == "cpu", learning_rate=2e-5,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model, arguments, train_dataset=Dataset.from_dict(pairs), loss=MultipleNegativesRankingLoss(model)
        )
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began

    def ours(steps: int, alpha: float) -> float:
        settings = config(options, steps=steps, tune="full", alpha=alpha, gamma=0.5)
        began = time.perf_counter()
        train_model(settings, folder / "ours", force=True)
        return time.perf_counter() - began

    kinds = {
        "MultipleNegativesRankingLoss, sentence-transformers' trainer": theirs,
        "PG-Ret": lambda steps: ours(steps, 0.0),
        "PG-Ret, half of the states drawn from the policy": lambda steps: ours(steps, 0.5),
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(options.rounds):
        for name, act in kinds.items():
            rates[name].append(options.batch * (LONG - SHORT) / (act(LONG) - act(SHORT)))
    floor = statistics.median(next(iter(rates.values())))
    print(
        f"\nwhole encoder, batch {options.batch}, {options.precision}, {options.device}, {len(index):,} items"
    )
    print("| trainer | pairs per second | ratio |\n| --- | --- | --- |")
    for name, found in rates.items():
        print(f"| {name} | {statistics.median(found):.1f} | {statistics.median(found) / floor:.2f} |")


def adapter(options: argparse.Namespace, folder: Path) -> None:
    train_model(config(options, tune="adapter", steps=1), folder / "warm", force=True)
    taken = {}
    for steps in (1, 1_000):
        settings = config(
            options, tune="adapter", steps=steps, batch_size=128, validation_fraction=0.1, log_every=10,
            eval_every=100, precision="fp32",
        )  # fmt: skip
        began = time.perf_counter()
        train_model(settings, folder / "adapter", force=True)
        taken[steps] = time.perf_counter() - began
    print(
        f"\nadapter, 1,000 steps of 128 with 10 validations: {taken[1000]:.1f} s, of which {taken[1]:.1f} s",
        end="",
    )
    print(" to start and finish")


def overhead(options: argparse.Namespace, folder: Path) -> None:
    """Time of a step outside encoder (forward, backward, optimizer) and sampler."""
    print("\n| step | ms | encoder | sampler | everything else |\n| --- | --- | --- | --- | --- |")
    for tune, alpha in (("full", 0.0), ("full", 0.25), ("adapter", 0.25)):
        spent = {"encoder": 0.0, "sampler": 0.0, "step": 0.0}
        inside = [False]  # log lines embed a few queries too, outside of a step

        def timed(name: str, act, spent: dict[str, float] = spent, inside: list[bool] = inside):
            def timing(*args, **kwargs):
                if name == "step":
                    inside[0] = True
                began = time.perf_counter()
                result = act(*args, **kwargs)
                if inside[0]:
                    spent[name] += time.perf_counter() - began
                if name == "step":
                    inside[0] = False
                return result

            return timing

        real = (run.Run.embed, loop._step, matrix.ItemMatrix.draw, torch.Tensor.backward)
        optimizer_step = torch.optim.AdamW.step
        run.Run.embed = timed("encoder", run.Run.embed)
        loop._step = timed("step", loop._step)
        matrix.ItemMatrix.draw = timed("sampler", matrix.ItemMatrix.draw)
        torch.Tensor.backward = timed("encoder", torch.Tensor.backward)
        torch.optim.AdamW.step = timed("encoder", torch.optim.AdamW.step)
        steps = 10 if tune == "full" else 200
        train_model(
            config(options, tune=tune, alpha=alpha, gamma=0.5, steps=steps),
            folder / "over",
            force=True,
        )
        run.Run.embed, loop._step, matrix.ItemMatrix.draw, torch.Tensor.backward = real
        torch.optim.AdamW.step = optimizer_step
        rest = spent["step"] - spent["encoder"] - spent["sampler"]
        shares = [f"{part / spent['step']:.1%}" for part in (spent["encoder"], spent["sampler"], rest)]
        print(f"| {tune}, α = {alpha} | {1000 * spent['step'] / steps:.1f} |", " | ".join(shares), "|")


def label_lookup() -> None:
    print("\n| labels | MB held | µs for a step's 128 + 128 × 128 pairs |\n| --- | --- | --- |")
    rng = np.random.default_rng(0)
    for count in (100_000, 1_000_000, 10_000_000):
        queries, items = rng.integers(0, 100_000, count), rng.integers(0, 1_000_000, count)
        table = make_table(queries, items, rng.integers(0, 2, count).astype(np.int8), 1_000_000)
        size = (table.keys.nbytes + table.verdicts.nbytes) / 1e6
        batch = queries[:128]
        times = []
        for _ in range(20):
            began = time.perf_counter()
            table.lookup(batch, items[:128])
            table.lookup(batch[:, None], items[None, :128])
            times.append(time.perf_counter() - began)
        print(f"| {len(table):,} | {size:.0f} | {1e6 * statistics.median(times):.0f} |")
    print(f"\npeak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
