"""Exact policy draws against the blocked matrix product that they cannot do without.

    python benchmarks/sampler.py [--items 1000000] [--dimension 384] [--batch 128] [--draws 50] [--device cpu]

Times are medians of interleaved rounds in one run, so that a busy machine slows all alike; memory is what the
process's peak grew by during the draws. Items are a float32 memory map on the CPU, float16 on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from novelret.blocks import BLOCK, item_blocks
from novelret.train.policy import moments
from novelret.train.sampler import Key, draw_with_replacement, draw_without_replacement


def make_items(path: Path, n: int, d: int) -> np.ndarray:
    matrix = np.lib.format.open_memmap(path, "w+", np.float32, (n, d))
    rng = np.random.default_rng(0)
    for start in range(0, n, 65_536):
        part = rng.standard_normal((min(65_536, n - start), d), dtype=np.float32)
        matrix[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    matrix.flush()
    return np.load(path, mmap_mode="r")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (
        ("items", 1_000_000),
        ("dimension", 384),
        ("batch", 128),
        ("draws", 50),
        ("rounds", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        items = make_items(Path(folder) / "items.npy", options.items, options.dimension)
        if options.device != "cpu":
            items = torch.from_numpy(np.array(items)).to(options.device, torch.float16)
        queries = torch.nn.functional.normalize(torch.randn(options.batch, options.dimension), dim=1)
        queries = queries.to(options.device)
        key = Key(0, 0, torch.arange(options.batch, device=options.device))
        tau = options.temperature

        def product() -> None:
            for _, block in item_blocks(items, queries, BLOCK):
                queries @ block.T

        kinds = {
            "blocked product": product,
            "log-partition and mean": lambda: moments(queries, items, tau),
            "one draw, with replacement": lambda: draw_with_replacement(queries, items, 1, key, tau),
            "with replacement": lambda: draw_with_replacement(queries, items, options.draws, key, tau),
            "without replacement": lambda: draw_without_replacement(queries, items, options.draws, key, tau),
        }
        times: dict[str, list[float]] = {name: [] for name in kinds}
        peaks = {}
        product()  # warm the page cache
        for _ in range(options.rounds):
            for name, act in kinds.items():
                with Peak(options.device) as memory:
                    began = time.perf_counter()
                    act()
                    if options.device != "cpu":
                        torch.cuda.synchronize()
                    times[name].append(time.perf_counter() - began)
                peaks[name] = max(peaks.get(name, 0.0), memory.highest - memory.before)
    floor = statistics.median(times["blocked product"])
    size = f"{options.items:,} items x {options.dimension}, batch {options.batch}"
    print(f"{size}, {options.draws} draws, {options.device}")
    print("| what | median s | of the product | peak grew by MB |\n| --- | --- | --- | --- |")
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"| {name} | {median:.3f} | {median / floor:.2f} | {peaks[name]:.0f} |")


class Peak:
    """Highest memory while the block runs, less what was there before, in MB; without the mapped items."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> Peak:
        self.running = True
        self.before = self.highest = self.now()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()

    def now(self) -> float:
        if self.device != "cpu":
            return torch.cuda.memory_allocated() / 1e6
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1e3

    def watch(self) -> None:
        while self.running:
            self.highest = max(self.highest, self.now())
            time.sleep(0.002)


if __name__ == "__main__":
    main()
