"""The two-stage experiment of the CA-PG paper, rebuilt from its description: estimators against each other.

    pip install matplotlib
    python benchmarks/two_stage.py OUT [--steps 4000] [--seeds 5] [--k 5,10,20] [--published-steps 20000]

1,000 users and 1,000 actions with contexts of 10 dimensions, expected reward 10 uᵀ((1 − η) M₀ + η M_z) a,
noise 0.7; the policy is two embedding tables; an early-stage ranker draws K candidates without replacement,
a late-stage ranker shows one of them (the best: "optimal"; the worst: "anti-optimal"), whose reward is seen.
Every method's Adagrad learning rate is chosen at K = 10 from the same grid on seeds that are not used later.
Prints and writes one table, policy_value.csv and one figure of policy value against steps. One long run of
CA-PG at its published rate says how many steps the others need to reach where it ends. Finished runs in OUT
are not repeated.

Swap is given more feedback than the others: the rewards that the late-stage ranker would have earned on the
K swapped sets.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import time
from pathlib import Path

import torch
from torch import Tensor

from novelret.train.objectives import ca_pg, expected_threshold, gumbel_threshold, reinforce, swap

USERS = ACTIONS = 1_000
DIMENSION, BATCH, NOISE = 10, 128, 0.7
METHODS = (
    "v-pg", "v-pg-swr", "ca-pg", "ca-pg-loo", "ca-pg-swr", "gumbel-threshold", "swap", "expected-threshold"
)  # fmt: skip
GRID = (1e-2, 1e-1, 3e-1, 1.0, 3.0)
PUBLISHED = {"v-pg": 1e-1, "ca-pg": 1e-2}
POINTS = 40


def make_world(seed: int) -> Tensor:
    """(users, actions) expected rewards."""
    g = torch.Generator().manual_seed(seed)

    def rows(n: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(n, DIMENSION, generator=g), dim=1)

    users = torch.nn.functional.normalize(torch.rand(USERS, DIMENSION, generator=g) * 2 - 1, dim=1)
    actions, first, second = rows(ACTIONS), rows(DIMENSION), rows(DIMENSION)
    reactive = (
        torch.sigmoid(torch.randn(USERS, generator=g) + 3),
        torch.sigmoid(torch.randn(ACTIONS, generator=g) + 3),
    )
    eta = torch.sqrt(reactive[0][:, None] * reactive[1][None])
    return 10 * ((1 - eta) * (users @ first @ actions.T) + eta * (users @ second @ actions.T))


def show(expected: Tensor, ranker: str) -> Tensor:
    """Which of the candidates the late-stage ranker shows, along the last dimension."""
    return expected.argmax(dim=-1) if ranker == "optimal" else expected.argmin(dim=-1)


def surrogate(
    method: str, phi: Tensor, rows: Tensor, perturbed: Tensor, expected: Tensor, ranker: str, g
) -> Tensor:
    """(B,) surrogate losses for drawn candidates; `rows` and `perturbed` hold K + 1 items."""
    k = rows.shape[1] - 1
    logits = phi.gather(1, rows)
    observed = expected + NOISE * torch.randn(expected.shape, generator=g)
    shown = show(expected[:, :k], ranker)[:, None]
    reward = observed.gather(1, shown)[:, 0]
    credit = torch.zeros_like(expected[:, :k]).scatter_(1, shown, reward[:, None])
    log_z = torch.logsumexp(phi, dim=1)

    def rest(listed: Tensor) -> Tensor:
        return torch.logsumexp(phi.scatter(1, listed, -torch.inf), dim=1)

    if method == "v-pg":
        return reinforce.top_k(logits[:, :k], rest(rows[:, :k]), reward)
    if method == "v-pg-swr":
        return reinforce.top_k_with_replacement(logits[:, :k], log_z, reward)
    if method == "ca-pg-swr":
        return ca_pg.with_replacement(logits[:, :k], log_z, credit)
    if method == "gumbel-threshold":
        return gumbel_threshold.pathwise(logits[:, :k], logits[:, k], perturbed[:, k], credit)
    if method == "swap":
        whole = expected[:, :k].unsqueeze(1).repeat(1, k, 1)
        swapped = torch.diagonal_scatter(whole, expected[:, k:].expand(-1, k), dim1=1, dim2=2)
        place = show(swapped, ranker)
        source = torch.where(place == torch.arange(k), k, place)
        return swap.swap(logits[:, :k], perturbed[:, k], reward[:, None] - observed.gather(1, source))
    if method == "expected-threshold":
        top = torch.topk(phi, 4 * k, dim=1)
        log_t = expected_threshold.log_time(top.values, rest(top.indices), k)
        return expected_threshold.credited(logits[:, :k], log_t, credit)
    best = torch.topk(phi.detach(), k, dim=1).indices
    is_best = rows[:, :k, None] == best[:, None]
    if method == "ca-pg-loo":
        credit = credit - ca_pg.leave_one_out(credit, torch.ones_like(credit, dtype=torch.bool))
    return ca_pg.plug_in(logits[:, :k], rest(best), credit, phi.gather(1, best), is_best)


def run(job: dict) -> dict:
    """Train one (method, K, ranker, learning rate) on all seeds at once; policy value along the way."""
    path = Path(job["path"])
    if path.is_file():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    k, seeds = job["k"], job["seeds"]
    worlds = torch.stack([make_world(seed) for seed in seeds])
    g = torch.Generator().manual_seed(12345 + seeds[0])
    tables = [torch.randn(len(seeds), n, DIMENSION, generator=g).requires_grad_() for n in (USERS, ACTIONS)]
    optimizer = torch.optim.Adagrad(tables, lr=job["learning_rate"])
    of_seed = torch.arange(len(seeds)).repeat_interleave(BATCH)

    def gumbel(*shape: int) -> Tensor:
        return -torch.log(-torch.log(torch.rand(*shape, generator=g).clamp_min(1e-30)))

    def value() -> list[float]:
        with torch.no_grad():
            phi = tables[0] @ tables[1].transpose(1, 2)
            rows = torch.topk(phi + gumbel(*phi.shape), k, dim=2).indices
            expected = worlds.gather(2, rows)
            shown = show(expected, job["ranker"])[..., None]
            return expected.gather(2, shown)[..., 0].mean(dim=1).tolist()

    every = max(1, job["steps"] // POINTS)
    curve, broke, began = [(0, value())], None, time.perf_counter()
    for step in range(1, job["steps"] + 1):
        users = torch.randint(USERS, (len(of_seed),), generator=g)
        chosen = tables[0][of_seed, users].view(len(seeds), BATCH, DIMENSION)
        phi = (chosen @ tables[1].transpose(1, 2)).view(-1, ACTIONS)
        top = torch.topk(phi.detach() + gumbel(*phi.shape), k + 1, dim=1)
        expected = worlds[of_seed[:, None], users[:, None], top.indices]
        loss = surrogate(job["method"], phi, top.indices, top.values, expected, job["ranker"], g)
        optimizer.zero_grad()
        (loss.sum() / BATCH).backward()
        if not all(torch.isfinite(t.grad).all() for t in tables):
            broke = step
            break
        optimizer.step()
        if step % every == 0:
            curve.append((step, value()))
    result = {
        **{key: job[key] for key in ("method", "k", "ranker", "learning_rate", "steps")},
        "curve": curve,
        "broke_at": broke,
        "bound": worlds.max(dim=2).values.mean().item(),
        "seconds_per_step": (time.perf_counter() - began) / max(1, curve[-1][0]),
    }
    path.write_text(json.dumps(result))
    return result


def final(result: dict) -> float:
    """Mean value over seeds and over the last tenth of the curve; −inf where it broke."""
    if result["broke_at"]:
        return float("-inf")
    last = [values for _, values in result["curve"]][-max(1, POINTS // 10) :]
    return float(torch.tensor(last).mean())


def spread(result: dict) -> float:
    """Half width of the 95 % interval over seeds."""
    last = torch.tensor([values for _, values in result["curve"]][-max(1, POINTS // 10) :]).mean(dim=0)
    return 1.96 * last.std().item() / max(1, len(last)) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--k", default="5,10,20")
    parser.add_argument("--published-steps", type=int, default=20_000)
    parser.add_argument("--rankers", default="optimal,anti-optimal")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    (options.out / "runs").mkdir(parents=True, exist_ok=True)

    def job(method: str, k: int, ranker: str, rate: float, seeds: list[int], steps: int) -> dict:
        name = f"{method}-{k}-{ranker}-{rate:g}-{seeds[0]}x{len(seeds)}-{steps}.json"
        return {
            "method": method, "k": k, "ranker": ranker, "learning_rate": rate, "seeds": seeds, "steps": steps,
            "path": str(options.out / "runs" / name),
        }  # fmt: skip

    seeds = list(range(options.seeds))
    rankers = options.rankers.split(",")
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        tuning = pool.map(
            run,
            [job(m, 10, r, rate, [1000], options.steps) for m in METHODS for r in rankers for rate in GRID],
            chunksize=1,
        )
        best = {}
        for result in tuning:
            key = (result["method"], result["ranker"])
            if key not in best or final(result) > final(best[key]):
                best[key] = result
        jobs = [
            job(m, int(k), r, best[m, r]["learning_rate"], seeds, options.steps)
            for m in METHODS
            for r in rankers
            for k in options.k.split(",")
        ]
        jobs += [job(m, 10, rankers[0], rate, seeds, options.steps) for m, rate in PUBLISHED.items()]
        jobs.append(job("ca-pg", 10, rankers[0], PUBLISHED["ca-pg"], seeds[:1], options.published_steps))
        results = pool.map(run, jobs, chunksize=1)
    write(options.out, results)


def write(out: Path, results: list[dict]) -> None:
    """The table, the figure's data and the figure."""
    print("| method | late stage | K | lr | value | ± 95 % | bound | ms per step | broke at |")
    print("| --- " * 9 + "|")
    with (out / "policy_value.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["method", "ranker", "k", "learning_rate", "step", "value"])
        for r in results:
            note = r["broke_at"] or "–"
            print(
                f"| {r['method']} | {r['ranker']} | {r['k']} | {r['learning_rate']:g} | {final(r):.3f} | "
                f"{spread(r):.3f} | {r['bound']:.2f} | {1000 * r['seconds_per_step']:.1f} | {note} |"
            )
            for step, values in r["curve"]:
                rows.writerow(
                    [r["method"], r["ranker"], r["k"], r["learning_rate"], step, sum(values) / len(values)]
                )
    reached(results)
    draw(out, results)


def reached(results: list[dict]) -> None:
    """Steps in which each method's mean curve reaches the end of the long published run."""
    target = final(results[-1])
    print(
        f"\nCA-PG at its published rate, {results[-1]['steps']:,} steps, one seed: {target:.3f}; reached by"
    )
    for r in results[:-1]:
        if r["k"] == results[-1]["k"] and r["ranker"] == results[-1]["ranker"]:
            steps = [step for step, values in r["curve"] if sum(values) / len(values) >= target]
            print(f"  {r['method']} at {r['learning_rate']:g}: {f'step {steps[0]:,}' if steps else 'never'}")


def draw(out: Path, results: list[dict]) -> None:
    """Policy value against steps, one chart for each K and late stage; methods differ by line and marker."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    results = results[:-1]
    settings = sorted({(r["ranker"], r["k"]) for r in results}, key=lambda s: (s[0] != "optimal", s[1]))
    columns = len({k for _, k in settings})
    figure, axes = pyplot.subplots(
        -(-len(settings) // columns),
        columns,
        figsize=(5 * columns, 4 * -(-len(settings) // columns)),
        squeeze=False,
    )
    styles = [
        ("-", "o"),
        ("--", "s"),
        ("-", "^"),
        ("-.", "v"),
        (":", "D"),
        ("-", "x"),
        ("--", "+"),
        ("-", "*"),
    ]
    for axis, (ranker, k) in zip(axes.flat, settings, strict=False):
        for r in (r for r in results if (r["ranker"], r["k"]) == (ranker, k)):
            line, marker = styles[METHODS.index(r["method"])]
            steps, values = zip(*r["curve"], strict=True)
            means = [sum(of_seeds) / len(of_seeds) for of_seeds in values]
            published = r["learning_rate"] == PUBLISHED.get(r["method"])
            name = f"{r['method']}{', published rate' if published else ''}"
            axis.plot(
                steps, means, line, marker=marker, markevery=8, markersize=5, linewidth=1.2,
                alpha=0.5 if published else 1, label=name,
            )  # fmt: skip
        axis.set(title=f"late stage {ranker}, K = {k}", xlabel="gradient steps", ylabel="policy value")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "two_stage.svg")


if __name__ == "__main__":
    main()
