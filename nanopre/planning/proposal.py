"""From parameters and tokens to a run: shape, batch, learning rate, layout, time, and the TOML that train.py takes."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tomli_w

from nanopre import UserError, config as configs, cost
from nanopre.accelerators import Accelerator
from nanopre.model import ModelConfig
from nanopre.planning import layouts, preview, recipe, shape
from nanopre.planning.budget import Sized, short
from nanopre.planning.laws import PUBLISHED
from nanopre.planning.scaling import Fit, plain
from nanopre.plugins import Registry

MFU = 0.4
"""Assumed where nothing is known: LLaMA 3 405B had 0.38 to 0.43 on H100s (2024, table 4), PaLM 0.46 on TPU v4 (2022)."""

SEQ_LENS = ((1e7, 256), (1e8, 512), (1e9, 1024), (7e9, 2048), (math.inf, 4096))
"""Below how many parameters how many tokens a row has. GPT-2 124M has 1,024, GPT-3 and LLaMA 2,048, LLaMA 2 4,096. Models
that are not decoders have at most 512, as BERT and T5."""

OBJECTIVES = {
    "decoder": {"name": "clm"},
    "encoder": {"name": "mlm_nsp", "nsp": False},
    "encoder-decoder": {"name": "span_corruption"},
}


@dataclass
class Machine:
    """What is known of the accelerators."""

    gpu: str  # the accelerator's name
    accelerator: Accelerator
    gpus: int = 0  # 0: not said
    mfu: float = 0.0  # 0: not said
    budget_hours: float = 0.0  # of one GPU, where the budget was said in hours


@dataclass
class Proposal:
    """A run, `table` being its TOML."""

    flops_are: str  # how the budget came about
    fit: Fit
    sized: Sized
    model: ModelConfig
    parameters: dict[str, int]
    counted: str  # which of them the law counts
    rules: dict[str, dict[str, Any]]  # by name: "lr", "batch_tokens", "source", "fitted", "covered"
    rule: str
    table: dict[str, Any]
    row_flops: float
    machine: Machine | None
    layout: layouts.Candidate | None = None
    n_layouts: int = 0  # that fit

    @property
    def tokens(self) -> int:
        train = self.table["train"]
        return train["steps"] * train["batch_size"] * train["seq_len"]

    @property
    def flops(self) -> float:
        """Of the run by nanopre.cost, attention's among them, as an MFU counts them."""
        return self.tokens / self.model.seq_len * self.row_flops

    @property
    def mfu(self) -> float:
        """With which the time is reckoned: the one that was said, or else the layout's."""
        return self.machine.mfu or (self.layout.mfu if self.layout else MFU)

    @property
    def gpu_hours(self) -> float:
        return self.flops / (self.machine.accelerator.peak_flops * self.mfu) / 3600

    def to_toml(self) -> str:
        """The config, below what decided it."""
        said = textwrap.fill(
            f"{self.sized.flops:.3g} FLOP by the law {self.fit.name}: {self.parameters['total']:,} parameters, "
            f"{self.tokens:,} tokens; batch and learning rate by {self.rule}. Written by plan.py budget.",
            width=118, initial_indent="# ", subsequent_indent="# ",
        )  # fmt: skip
        return f"{said}\n{tomli_w.dumps(self.table)}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        s = self.sized
        result = {
            "budget": {"flops": s.flops, "from": self.flops_are},
            "law": {"name": self.fit.name, "definition": self.fit.definition},
            "best": s.best._asdict(),
            "chosen": {**s.chosen._asdict(), "intervals": s.intervals, "interval_is": s.words},
            "other_laws": {name: PUBLISHED[name][0].allocate(s.flops)._asdict() for name in PUBLISHED if name != self.fit.name},
            "model": {**self.table["model"], "parameters": self.parameters, "seq_len": self.model.seq_len},
            "rules": self.rules,
            "rule": self.rule,
            "run": {"tokens": self.tokens, "steps": self.table["train"]["steps"], "flops": self.flops},
            "config": self.table,
        }
        if s.inference_tokens:
            lifetime = {"chosen": s.lifetime_flops(s.chosen), "best": s.lifetime_flops(s.best)}
            result["inference"] = {"tokens": s.inference_tokens, "training_flops": s.training_flops, "lifetime_flops": lifetime}
        if math.isfinite(s.tokens_available):
            result["data"] = {"available": s.tokens_available, "epochs": s.epochs, "worth": s.worth}
        if self.layout:
            result["layout"] = {**dataclasses.asdict(self.layout), "fit": self.n_layouts}
        if m := self.machine:
            result["time"] = {"gpu": m.gpu, "gpus": m.gpus or None, "mfu": self.mfu, "gpu_hours": self.gpu_hours}
            result["time"] |= {"days": self.gpu_hours / m.gpus / 24 if m.gpus else None}
            result["time"] |= {"dollars": self.gpu_hours * m.accelerator.price or None}
        return plain(result)


def propose(
    flops_are: str,
    fit: Fit,
    sized: Sized,
    plugins: Registry,
    machine: Machine | None = None,
    family: str = "llama",
    rule: str = "deepseek",
    seq_len: int = 0,
    vocab_size: int = 0,
    corpus: str = "stdlib",
    plugin_paths: Sequence[str] = (),
) -> Proposal:
    """The whole run. Zeros: by the model's size. Raises UserError where no model or no layout is possible.

    plugin_paths: what the config needs in `plugins`.
    """
    cls, n = plugins.get("model", family, "--family"), sized.chosen.params
    if not seq_len:
        seq_len = shape.below(SEQ_LENS, n)
        seq_len = seq_len if shape.build(family, cls, n, seq_len)[2].architecture == "decoder" else min(seq_len, 512)

    counted = "total" if fit.options.get("embeddings", True) else "blocks"

    def build(multiple: int) -> tuple[dict[str, Any], int, ModelConfig]:
        return shape.build(family, cls, n, seq_len, vocab_size, multiple, counted)

    options, n_tokens, model = build(64)
    parameters = cost.parameters(model)
    # The budget is spent whatever the model's size turns out to be.
    tokens = sized.training_flops / (6 * parameters[counted])
    run = recipe.Run(sized.training_flops, parameters["blocks"], tokens, sized.chosen.loss)
    rules = {name: advice(known, run) for name, known in recipe.RULES.items()}
    lr, batch_tokens = rules[rule]["lr"], rules[rule]["batch_tokens"]
    if lr is None or batch_tokens is None:
        why = (
            "its batch follows from the loss, which --law does not give"
            if lr
            else "it has no learning rate beyond 1e10 parameters"
        )
        raise UserError(f"--rule {rule}: {why}; take {' or '.join(name for name in rules if name != rule)}.")
    batch = divisible(min(batch_tokens, tokens) / seq_len, machine.gpus if machine else 1)
    steps = max(1, round(tokens / (batch * seq_len)))
    table = {
        "name": f"{family}-{short(parameters['total'])}-{short(tokens)}".lower(),
        **({"plugins": list(plugin_paths)} if plugin_paths else {}),
        "model": {"name": family, **options},
        "objective": OBJECTIVES[model.architecture],
        "data": {"corpus": corpus},
        "tokenizer": {"name": "bytes"} if n_tokens == shape.BYTES else {"name": "bpe", "vocab_size": n_tokens},
        "optimizer": {"name": "adamw", "lr": float(f"{lr:.3g}"), "weight_decay": recipe.WEIGHT_DECAY},
        "schedule": {
            "name": "cosine",
            "warmup_steps": min(recipe.WARMUP_STEPS, steps // 20),
            "min_lr_ratio": float(f"{recipe.RULES[rule].last_lr(lr) / lr:.3g}"),
        },
        "train": {
            "steps": steps,
            "batch_size": batch,
            "micro_batch_size": max(k for k in layouts.divisors(batch) if k * seq_len <= 2**14 or k == 1),
            "seq_len": seq_len,
            "eval_interval": max(1, steps // 20),
            "eval_tokens": round(min(1e7, max(seq_len, tokens / 300))),  # all evaluations together: 2% of the run
        },
        "checkpoint": {"interval": max(100, steps // 100)},
    }
    config, _ = configs.from_dict(table, "the plan")
    row_flops = cost.flops(model, preview.example(config))
    made = Proposal(flops_are, fit, sized, model, parameters, counted, rules, rule, table, row_flops, machine)
    if machine and machine.gpus:
        lay_out(made, config, plugins, build)
    return made


def advice(rule: recipe.Rule, run: recipe.Run) -> dict[str, Any]:
    """What a rule says of a run; None for what it does not."""
    said = {"lr": rule.lr(run), "batch_tokens": rule.batch_tokens(run)}
    said = {key: number if math.isfinite(number) else None for key, number in said.items()}
    return {**said, "source": rule.source, "fitted": rule.fitted, "covered": rule.covers(run)}


def divisible(rows: float, gpus: int) -> int:
    """About so many rows, at least one: where that moves them by less than a sixteenth a multiple of powers of 2 and of the
    odd part of the GPUs, so that many layouts can share them out."""
    odd = max(gpus, 1) // (max(gpus, 1) & -max(gpus, 1))
    unit = odd if 8 * odd <= rows else 1
    while 16 * unit <= rows:
        unit *= 2
    return max(1, round(rows / unit)) * unit


def lay_out(
    made: Proposal,
    config: configs.Config,
    plugins: Registry,
    build: Callable[[int], tuple[dict[str, Any], int, ModelConfig]],
) -> None:
    """Give the run the fastest layout, and its vocabulary a multiple of 128 rows on each of the tensor ranks."""
    machine, train = made.machine, made.table["train"]
    found = layouts.search(config, plugins, machine.accelerator, machine.gpus)
    if not found.ranked:
        reasons = "; ".join(f"{reason.rstrip('.')} ({count:,})" for reason, count in found.reasons()[:3])
        raise UserError(
            f"--gpus {machine.gpus}: no layout of {short(made.parameters['total'])} parameters fits on so many "
            f"{machine.gpu}; of those that were tried: {reasons}."
        )
    made.layout, made.n_layouts = found.ranked[0], len(found.ranked)
    made.table["parallel"], train["micro_batch_size"] = made.layout.parallel, made.layout.micro_batch_size
    tensor = made.layout.sizes["tensor"]
    if tensor > 1 and made.model.vocab_size % (128 * tensor):
        options, _, made.model = build(128 * tensor)
        made.table["model"] |= options
        made.parameters = cost.parameters(made.model)


# ---------------------------------------------------------------------------------------------------------------------
# In words


def text(p: Proposal) -> str:
    """The proposal for a reader, a paragraph a question."""
    paragraphs = [
        ("budget", [p.flops_are]),
        ("law", [f"{p.fit.name}: {p.fit.definition}"]),
        ("best", best_lines(p)),
        ("limits", limit_lines(p.sized)),
        ("model", model_lines(p)),
        ("batch, rate", rule_lines(p)),
        ("run", run_lines(p)),
        ("layout", layout_lines(p)),
        ("time", time_lines(p)),
    ]
    lines = []
    for name, said in paragraphs:
        for i, line in enumerate(said):
            start = f"{'' if i else name:<13}"
            lines.append(textwrap.fill(line, 118, initial_indent=start, subsequent_indent=" " * 13, break_on_hyphens=False))
    return "\n".join(lines)


def best_lines(p: Proposal) -> list[str]:
    s, law = p.sized, p.fit.name

    def number(name: str, show: Callable[[float], str]) -> str:
        ends = s.intervals.get(name)
        return show(getattr(s.chosen, name)) + (f" ({show(ends[0])} to {show(ends[1])})" if ends else "")

    loss = "not known to this law" if math.isnan(s.chosen.loss) else f"{number('loss', '{:.4g}'.format)} nats a token"
    small, large = s.runs_flops
    far = f", here {s.flops / large:,.3g} times the largest" if s.flops > large else ""
    far = f", here {small / s.flops:,.3g} times smaller than the smallest" if s.flops < small else far
    others = {name: known.allocate(s.flops) for name, (known, _) in PUBLISHED.items() if name != law}
    lines = [f"{number('params', short)} parameters on {number('tokens', short)} tokens, loss {loss}"]
    if s.chosen.loss > math.log(p.model.vocab_size):
        lines.append(
            f"No such loss exists: guessing among {p.model.vocab_size} tokens costs {math.log(p.model.vocab_size):.3g}."
        )
    return [
        *lines,
        f"interval: {s.words}. It covers neither a law of the wrong form, nor other data, nor how far from its runs it is "
        f"taken{far}.",
        "other laws: " + ", ".join(f"{name} {short(a.params)} on {short(a.tokens)}" for name, a in others.items()),
    ]


def limit_lines(s: Sized) -> list[str]:
    lines = []
    if s.inference_tokens:
        here, there = s.lifetime_flops(s.chosen), s.lifetime_flops(s.best)
        lines.append(
            f"inference of {short(s.inference_tokens)} tokens, 2 N FLOP each: the loss is that of {short(s.best.params)} on "
            f"{short(s.best.tokens)}, which the budget would train best. Training takes {s.training_flops / s.flops - 1:.0%} "
            f"more than the budget; with inference it is {1 - here / there:.0%} less, {here:.3g} instead of {there:.3g} FLOP "
            "(Sardana et al., 2023)."
        )
    if s.epochs > 1:
        lines.append(
            f"{short(s.tokens_available)} tokens, each seen {s.epochs:.3g} times: {short(s.best.tokens)} new ones would be "
            f"best, for {short(s.best.params)} parameters and a loss of {s.best.loss:.4g}. Repeating costs as much as "
            f"{1 - s.worth:.0%} of the budget (Muennighoff et al., 2023)."
        )
    elif math.isfinite(s.tokens_available):
        lines.append(f"{short(s.tokens_available)} tokens are enough for {short(s.chosen.tokens)}: none is repeated.")
    return lines


def model_lines(p: Proposal) -> list[str]:
    options, counted = p.table["model"], p.parameters
    sizes = ", ".join(f"{key} {value:,}" for key, value in options.items() if type(value) is int)
    tied = ", tied embeddings" if options.get("tie_embeddings") else ""
    off = counted[p.counted] / p.sized.chosen.params - 1
    lines = [
        f"{options['name']}: {sizes}{tied}; {counted['total']:,} parameters ({off:+.1%}), "
        f"{counted['blocks'] / counted['total']:.0%} of them in the blocks; rows of {p.model.seq_len:,} tokens",
        shape.RULE,
    ]
    if p.model.architecture != "decoder":
        lines.append(f"laws and rules are of decoders that predict every token; for an {p.model.architecture} they are a guess")
    return lines


def rule_lines(p: Proposal) -> list[str]:
    lines = []
    for name, said in p.rules.items():
        lr = f"{said['lr']:.2e}" if said["lr"] else "none"
        batch = f"{short(said['batch_tokens'])} tokens" if said["batch_tokens"] else "none without a loss"
        outside = "" if said["covered"] else ", this run lies outside"
        mark = "*" if name == p.rule else "-"
        lines.append(f"{mark} {name}: rate {lr}, batch {batch} ({said['source']}; fitted to {said['fitted']}{outside})")
    return lines


def run_lines(p: Proposal) -> list[str]:
    train, schedule = p.table["train"], p.table["schedule"]
    return [
        f"{train['steps']:,} steps of {train['batch_size']:,} rows, {p.tokens:,} tokens; warm-up {schedule['warmup_steps']:,} "
        f"steps, then a cosine to {schedule['min_lr_ratio']:.2g} of the rate; AdamW, weight decay {recipe.WEIGHT_DECAY}",
        f"{p.flops:.3g} FLOP with attention's, {p.flops / p.sized.training_flops:.2f} times 6 N D",
    ]


def layout_lines(p: Proposal) -> list[str]:
    if not (best := p.layout):
        return [f"one process, {p.table['train']['micro_batch_size']:,} rows at a time (--gpu and --gpus look for the fastest)"]
    ranks = " x ".join(f"{n} {name}" for name, n in best.sizes.items() if n > 1) or "one process"
    options = [name + "".join(f" {k} {v}" for k, v in table.items() if k != "degree") for name, table in best.parallel.items()]
    memory, most = best.memory_bytes / 1e9, p.machine.accelerator.memory_bytes / 1e9
    return [
        f"{ranks} ({', '.join(options) or 'no strategy'}), {best.micro_batch_size:,} rows at a time; predicted: "
        f"{best.seconds:.3g} s a step, MFU {best.mfu:.2f}, {memory:.1f} of {most:.1f} GB; the best of {p.n_layouts:,} that fit"
    ]


def time_lines(p: Proposal) -> list[str]:
    if not (m := p.machine):
        return []
    source = "as said" if m.mfu else "as the layout predicts" if p.layout else "an assumption"
    days = f"{p.gpu_hours / m.gpus / 24:,.3g} days on {m.gpus:,} {m.gpu}, " if m.gpus else ""
    price = m.accelerator.price
    dollars = f", {p.gpu_hours * price:,.3g} US dollars at {price:g} an hour ({m.accelerator.priced})" if price else ""
    against = (
        f" ({p.gpu_hours / m.budget_hours - 1:+.0%} against the budget, which took {m.mfu or MFU:.2f} and 6 N D)"
        if m.budget_hours
        else ""
    )
    return [f"{days}{p.gpu_hours:,.4g} hours of {m.gpu}{against} at an MFU of {p.mfu:.2f}, {source}{dollars}"]
