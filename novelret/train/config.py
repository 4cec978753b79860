"""Settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from novelret.errors import UserError
from novelret.evaluate.metrics import RECALLS
from novelret.label.judge import Asking, check_asking

LIST_OBJECTIVES = (
    "reinforce",
    "v-pg",
    "v-pg-swr",
    "ca-pg",
    "ca-pg-loo",
    "ca-pg-swr",
    "gumbel-threshold",
    "expected-threshold",
    "pl-rank",
    "swap",
)
THRESHOLD_OBJECTIVES = ("gumbel-threshold", "swap")
"""Those of lists that draw one item more, which the list is cut off at."""

OBJECTIVES = ("supervised", "supervised-judged", "pg-ret", *LIST_OBJECTIVES)
LOSSES = ("conservative", "aggressive", "boundary", "inclusion")
TUNES = ("full", "lora", "adapter", "memory")
DRAWS = ("queries", "states", "plain")
MIRRORS = ("auto", "always", "never")
SCHEDULES = ("linear", "cosine", "constant")
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "adapter": 1e-3, "memory": 1e-3}


@dataclass(frozen=True)
class TrainConfig(Asking):
    """Settings of `novelret train`, beside those of `Asking` for its judge.

    Answers are read as for LABELS of the same judge, unless `answer` or `threshold` say how.

    Attributes:
        data: BEIR folder or Hugging Face data set.
        index: INDEX folder; or several of the same catalog, whose top-L lists are pooled into one T_L
            (Definition 1 for several deployed models). The first is the one that is finetuned against.
        split: the feedback to train on.
        labels: LABELS folder; every objective but plain `supervised` needs it. Or several: where more than
            one judged a pair, the last one's verdict counts.
        objective: "supervised", "supervised-judged", "pg-ret", or one that credits lists drawn from the
            policy: "reinforce" (item-wise), "v-pg", "v-pg-swr", "ca-pg" (published plug-in), "ca-pg-loo"
            (with leave-one-out baseline), "ca-pg-swr", "gumbel-threshold", "expected-threshold", "pl-rank",
            "swap".
        loss: how PG-Ret estimates the action's probability: "conservative", "aggressive", "boundary"
            or "inclusion".
        reward: "eq6", "eq7", "graded" or "module:function".
        trust: weigh each novel item that the judge calls relevant by the probability that it is, estimated
            from the labels alone (see `trust`); a judge that says no wrong yes is believed throughout.
        tune: "full" query encoder, "lora" on its linear layers, "adapter", a residual linear map behind
            the frozen one, or "memory", such a map with a memory of the training queries, and of
            what is relevant to them, in front of it.
        lora_rank: rank of the LoRA matrices.
        memory_size: most entries of the memory: training queries, and items relevant to them.
        init: MODEL folder to start from instead of the deployed query encoder.
        steps: optimizer steps.
        batch_size: forward passes of the query encoder per step.
        micro_batch: queries encoded at a time; the loss does not depend on it.
        learning_rate: peak learning rate; by default one per `tune`.
        schedule: how the learning rate falls after the warm-up: "linear" or "cosine" to 0, or "constant".
        warmup: share of the steps over which the learning rate rises.
        weight_decay: AdamW's.
        max_grad_norm: gradients are scaled down to this norm.
        alpha: share of states drawn from the current policy over the whole catalog (PG-Ret, §4.3).
        gamma: share of feedback pairs; the rest, β = 1 − α − γ, comes from the base model's ranks beyond L.
        draw: how base states are drawn: "queries" with all their labelled states of positive reward at once,
            "states" one such state a forward pass, "plain" any query and rank, labelled or not, as published.
            List objectives draw their lists for queries with such states, with "plain" for any query.
        per_query: with draw="queries", most states a query.
        mirror: train on items as queries, too, in half of the forward passes: each item that is known to be
            relevant to a query which is an item itself is taken as a query to which that one is relevant
            (see `mirror`). "auto" does where judged feedback is mostly relevant the other way, too, and
            never for plain `supervised`, which sees no judgements; or "always", or "never".
        negative_share: but for draw="plain", share of base states with reward < 0 where there are any.
        base_depth: L, the deployed list's length: items beyond it are novel.
        depth: how deep the deployed lists are searched: for negatives, for trust and for --draw plain; labels
            count at any rank.
        negatives: M, the base model's top items that "aggressive" contrasts with.
        catalog_negatives: pairs are contrasted with so many items, drawn at random in each step, which stand
            for the whole catalog (one of fewer items is taken whole); a few thousand hold recall better. 0:
            with the other items of the batch, as published.
        hard_negatives: the base model's top items added to the negatives of "supervised-judged".
        judged_negatives: items that labels call irrelevant to a pair's query added to these, so many drawn
            anew, with replacement, for each pair and step.
        list_size: K, items that a list objective draws per query.
        window: two multiples of L; ranks between them are contrasted with. "boundary" means ranks of the base
            model's list, by default "1,2" (L + 1 to 2L); "inclusion" the policy's own, by default "0.7,1.3".
        temperature: τ of the loss.
        sampling_temperature: τ of the policy that states are drawn from.
        support: draw policy states from the index's top items only, so many for a query; by default exactly,
            from the whole catalog.
        judge: whom to ask about drawn policy states that have no label, as for `novelret label`.
        validation_fraction: share of the split's queries held back to choose the checkpoint.
        eval_every: steps between validations; by default a tenth of all steps.
        max_recall_drop: how much of the base's recall a checkpoint may lose, relative.
        recall_of: what that recall counts: "feedback", or what is "known" to be relevant: feedback and what
            the labels call relevant. For feedback that is a log of what the deployed model itself showed.
        patience: stop after so many validations in a row below the recall budget, if recall still falls; 0
            never stops early.
        blends: the line from the starting weights to the last ones is validated at so many equal parts too,
            where there is a memory also with less of it, and the best of all points is chosen; 1 validates
            trained checkpoints alone.
        refit: once the checkpoint is chosen, train it anew on all queries, those held back too: the same
            steps, settings and blend. Not where fewer than one in twenty is held back, nor with a judge,
            which would have to be asked about new states again.
        keep: how many checkpoints to save as well, the best first, the chosen one among them.
        seed: decides every draw.
        precision: "fp32", "bf16" or "fp16" for the forward pass of an encoder that is trained.
        gradient_checkpointing: compute its activations again in the backward pass, to save memory.
        log_every: steps between log lines; validations have one anyway.
        wandb: Weights & Biases project to log to as well, where wandb is installed.
        device: "auto", "cpu" or a CUDA device.
        ignore_identical_ids: leave the item whose id is the query's own out.
    """

    data: str
    index: str | tuple[str, ...]
    split: str = "train"
    labels: str | tuple[str, ...] | None = None
    objective: str = "pg-ret"
    loss: str = "boundary"
    reward: str = "eq7"
    trust: bool = True
    tune: str = "memory"
    lora_rank: int = 16
    memory_size: int = 30_000
    init: str | None = None
    steps: int = 400
    batch_size: int = 128
    micro_batch: int | None = None
    learning_rate: float | None = None
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    alpha: float = 0.0
    gamma: float = 0.5
    draw: str = "queries"
    per_query: int = 32
    mirror: str = "auto"
    negative_share: float = 0.0
    base_depth: int = 50
    depth: int = 200  # as deep as `label` searches by default, so that one search serves both
    negatives: int = 5
    catalog_negatives: int = 0
    hard_negatives: int = 0
    judged_negatives: int = 0
    list_size: int = 50
    window: str | None = None
    temperature: float = 0.03
    sampling_temperature: float = 0.05
    support: int | None = None
    judge: str | None = None
    validation_fraction: float = 0.2
    eval_every: int | None = None
    max_recall_drop: float = 0.01
    recall_of: str = "feedback"
    patience: int = 0
    blends: int = 10
    refit: bool = True
    keep: int = 0
    seed: int = 0
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    log_every: int = 10
    wandb: str | None = None
    device: str = "auto"
    ignore_identical_ids: bool = True

    @property
    def indexes(self) -> tuple[str, ...]:
        """All INDEX folders; the first is the one that is finetuned against."""
        return (self.index,) if isinstance(self.index, str) else tuple(self.index)

    @property
    def label_folders(self) -> tuple[str, ...]:
        """All LABELS folders, the last word last."""
        return (self.labels,) if isinstance(self.labels, str) else tuple(self.labels or ())

    @property
    def beta(self) -> float:
        """Share of states drawn from the base model's ranks beyond L."""
        return round(1 - self.alpha - self.gamma, 9)

    @property
    def states_by_source(self) -> tuple[int, int, int]:
        """How many states of a batch are feedback, base and policy states (of base, the forward passes)."""
        alpha, beta = (0.0, 0.0) if self.objective == "supervised" else (self.alpha, self.beta)
        if self.objective in LIST_OBJECTIVES:
            # Every draw of a list objective comes from the policy itself.
            alpha, beta = alpha + beta, 0.0
        policy = round(alpha * self.batch_size)
        base = min(round(beta * self.batch_size), self.batch_size - policy)
        if self.gamma == 0 and alpha + beta > 0:  # what rounding leaves is no feedback
            base, policy = (self.batch_size - policy, policy) if beta > 0 else (0, self.batch_size)
        return self.batch_size - policy - base, base, policy

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after warm-up."""
        return self.learning_rate if self.learning_rate is not None else LEARNING_RATES[self.tune]

    def learning_rate_at(self, step: int) -> float:
        """Linear rise over the warm-up steps, then the schedule's fall: a function of the step alone."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.peak_learning_rate * (step + 1) / rise
        done = (step - rise) / max(1, self.steps - rise)
        scale = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
        return self.peak_learning_rate * scale[self.schedule]

    @property
    def steps_between_validations(self) -> int:
        """Steps between validations."""
        return self.eval_every if self.eval_every is not None else max(1, self.steps // 10)


def check_config(config: TrainConfig, catalog_size: int) -> None:
    """Refuse settings that cannot work, before anything is loaded onto a device.

    Raises:
        UserError: one line naming the option.
    """
    _check_choices(config)
    _check_numbers(config)
    _check_sizes(config, catalog_size)
    check_asking(config)
    if config.objective != "supervised" and not config.label_folders and config.judge is None:
        raise UserError(f"--objective {config.objective} needs --labels; make them with `novelret label`")
    if config.tune in ("adapter", "memory") and (config.precision != "fp32" or config.gradient_checkpointing):
        given = (
            "--gradient-checkpointing" if config.precision == "fp32" else f"--precision {config.precision}"
        )
        raise UserError(f"{given}: --tune {config.tune} trains no encoder; this is for --tune full and lora")
    if config.recall_of == "known" and not config.label_folders:
        raise UserError("--recall-of known counts what labels call relevant: it needs --labels")
    if config.support is not None and (config.objective != "pg-ret" or not config.alpha > 0):
        raise UserError(
            "--support narrows the draw of policy states: it needs --objective pg-ret and --alpha above 0"
        )
    if config.negative_share > 0 and config.objective != "pg-ret":
        raise UserError("--negative-share draws states to be pushed away: it needs --objective pg-ret")
    if config.negative_share > 0 and (config.draw == "plain" or not config.beta > 0):
        raise UserError(
            "--negative-share is of states drawn by their reward: it needs another --draw than plain, and "
            "--alpha and --gamma that leave room for base states"
        )
    if max(config.hard_negatives, config.judged_negatives) > 0 and config.objective != "supervised-judged":
        raise UserError(
            "--hard-negatives and --judged-negatives are of --objective supervised-judged; leave them out"
        )
    if config.alpha > 0 and config.objective == "supervised":
        raise UserError("--alpha: --objective supervised learns from feedback alone; leave it out")
    if config.keep > 0 and config.validation_fraction == 0:
        raise UserError(
            "--keep: without held-back queries no checkpoint is better than another; set "
            "--validation-fraction above 0"
        )
    if config.judge is not None and (config.objective != "pg-ret" or not config.alpha > 0):
        raise UserError(
            "--judge asks about items drawn from the policy: it needs --objective pg-ret and --alpha above 0"
        )
    _check_shares(config)


def _check_shares(config: TrainConfig) -> None:
    """Refuse a batch too small for one of its shares."""
    if config.objective == "supervised":
        return
    feedback, base, policy = config.states_by_source
    gamma, alpha = f"--gamma {config.gamma}", f"--alpha {config.alpha}"
    drawn, labelled = config.alpha, config.beta
    if config.objective in LIST_OBJECTIVES:
        # All but feedback is drawn from the policy, and labels say what of it.
        drawn, base, labelled = 0.0, policy, 1 - config.gamma
    if not config.label_folders:
        labelled = 0.0
    both = f"{gamma}, {alpha}" if drawn > 0 else gamma
    for share, count, options, what in (
        (config.gamma, feedback, gamma, "is feedback; raise one of them, or set it to 0"),
        (drawn, policy, alpha, "is drawn from the policy; raise one of them, or set it to 0"),
        (labelled, base, both, "is drawn for what --labels say; lower it, or raise --batch-size"),
    ):
        if share > 0 and count == 0:
            raise UserError(f"{options}: not one of --batch-size {config.batch_size} states {what}")


def _check_choices(config: TrainConfig) -> None:
    if not config.indexes:
        raise UserError("--index: at least one is needed")
    _one_of("--objective", config.objective, OBJECTIVES)
    _one_of("--loss", config.loss, LOSSES)
    _one_of("--tune", config.tune, TUNES)
    _one_of("--schedule", config.schedule, SCHEDULES)
    _one_of("--draw", config.draw, DRAWS)
    _one_of("--mirror", config.mirror, MIRRORS)
    _one_of("--recall-of", config.recall_of, RECALLS)
    _one_of("--precision", config.precision, ("fp32", "bf16", "fp16"))


def _check_numbers(config: TrainConfig) -> None:
    sizes = ("steps", "batch_size", "per_query", "negatives", "list_size", "base_depth", "lora_rank")
    optional = ("micro_batch", "eval_every", "support")
    positive = ("temperature", "sampling_temperature", "peak_learning_rate", "max_grad_norm")
    rules: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
        ((*sizes, "memory_size", "log_every", "blends", *optional), lambda value: value >= 1, "at least 1"),
        (("patience", "keep", "weight_decay"), lambda value: value >= 0, "at least 0"),
        (
            ("catalog_negatives", "hard_negatives", "judged_negatives"),
            lambda value: value >= 0,
            "at least 0",
        ),
        (positive, lambda value: value > 0, "above 0"),
        (("max_recall_drop", "negative_share", "warmup"), lambda value: 0 <= value <= 1, "from 0 to 1"),
        (("validation_fraction",), lambda value: 0 <= value < 1, "from 0 to below 1"),
        (("seed",), lambda value: 0 <= value < 1 << 32, f"from 0 to {(1 << 32) - 1}"),
    )
    for names, holds, says in rules:
        for name in names:
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise UserError(f"{_flag(name)} {value}: must be {says}")
    if not all(share >= 0 for share in (config.alpha, config.gamma, config.beta)):  # nor are they nan
        raise UserError(
            f"--alpha {config.alpha} --gamma {config.gamma}: neither may be below 0, nor their sum above 1"
        )
    window_multiples(config)


def window_multiples(config: TrainConfig) -> tuple[float, float]:
    """The two multiples of L that `window` names, or the loss's own.

    Raises:
        UserError: it names something else.
    """
    window = config.window
    if window is None:
        return (0.7, 1.3) if config.loss == "inclusion" else (1.0, 2.0)
    try:
        first, last = (float(part) for part in window.split(","))
    except ValueError:
        raise UserError(f"--window {window}: expected two multiples of L such as 1,2") from None
    if not 0 <= first < last < math.inf:
        raise UserError(f"--window {window}: the first must be at least 0 and below the second")
    return first, last


def _check_sizes(config: TrainConfig, catalog_size: int) -> None:
    if config.depth <= config.base_depth:
        raise UserError(
            f"--depth {config.depth}: must exceed --base-depth {config.base_depth}; novel items lie beyond it"
        )
    sizes = ["base_depth", "depth", "negatives", "hard_negatives", "support"]
    for name in [*sizes, "list_size"] if config.objective in LIST_OBJECTIVES else sizes:
        value = getattr(config, name)
        if value is not None and value > catalog_size:
            raise UserError(f"{_flag(name)} {value}: the catalog holds {catalog_size} items; lower it")
    of_list = {
        "negatives": config.objective == "pg-ret" and config.loss == "aggressive",
        "hard_negatives": config.objective == "supervised-judged",
    }
    for name, is_used in of_list.items():
        value = getattr(config, name)
        if is_used and value > config.depth:
            raise UserError(f"{_flag(name)} {value}: more than --depth {config.depth}; raise that")


def check_list_size(config: TrainConfig, catalog_size: int, longest: int) -> None:
    """Refuse lists longer than what there is to a query that leaves `longest` items out.

    Raises:
        UserError: one line naming the option.
    """
    if config.objective not in LIST_OBJECTIVES or config.objective == "reinforce":  # draws with replacement
        return
    one_more = config.objective in THRESHOLD_OBJECTIVES
    most = catalog_size - longest - one_more
    if config.list_size > most:
        also = f", and --objective {config.objective} draws one more" if one_more else ""
        raise UserError(
            f"--list-size {config.list_size}: of {catalog_size} items a query leaves out {longest}{also}; "
            f"at most {most}"
        )


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{option} {value}: unknown; choose from {', '.join(known)}")


def _flag(name: str) -> str:
    return "--" + name.removeprefix("peak_").replace("_", "-")
