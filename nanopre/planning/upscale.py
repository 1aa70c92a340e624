"""From the best of many small runs to the config of a big one, to which muP carries its learning rate over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanopre import UserError, config as configs, cost
from nanopre.planning.runs import last_loss
from nanopre.planning.shape import scaled
from nanopre.tokenizer import Tokenizer


@dataclass
class Best:
    """The run with the least validation loss at its end."""

    folder: Path
    loss: float
    of: int  # runs that were looked at
    config: configs.Config


def best(folders: Sequence[Path]) -> Best:
    """The best of the runs in these folders, at any depth. Raises UserError where there is none, or a log can't be read."""
    files = [file for folder in folders for file in sorted(folder.rglob("log.jsonl"))]
    losses = {file.parent: loss for file in files if (loss := last_loss(file)) is not None}
    if not losses:
        where = ", ".join(map(str, folders))
        raise UserError(f"{where}: no run with a validation loss is there; name folders that train.py or plan.py sweep made.")
    folder = min(losses, key=losses.get)
    config, _ = configs.load(folder / "config.toml")
    return Best(folder, losses[folder], len(losses), config)


def upscaled(small: Best, params: float, tokens: float, name: str) -> tuple[dict[str, Any], str]:
    """(the big run's config, what to know of it): the small run's, with a model of its proportions and more steps.

    Raises UserError for a model that is not wider than the small one.
    """
    config = small.config
    table = configs.to_dict(config)
    n_vocab = Tokenizer.load(small.folder / "tokenizer.json").n_vocab
    model, settings = scaled(config, params, n_vocab)
    total = cost.parameters(settings)["total"]
    base = model["mup_base_width"]
    if settings.d_model <= config.model.d_model:
        raise UserError(
            f"--params {params:g}: gives a model of width {settings.d_model}, no wider than the {config.model.d_model} of "
            f"{small.folder}; raise it."
        )
    rows = table["train"]["batch_size"]
    steps = max(1, round(tokens / (rows * table["train"]["seq_len"])))
    table |= {"name": name, "model": model, "train": {**table["train"], "steps": steps}}
    lines = [
        f"{small.folder} is the best of {small.of} runs: validation loss {small.loss:.4f}, width {config.model.d_model}.",
        f"The big model: {total:,} parameters ({total / params - 1:+.1%}), {settings.n_layers} layers of width "
        f"{settings.d_model}, {settings.n_heads} heads; {steps:,} steps of {rows * table['train']['seq_len']:,} tokens.",
        f"muP carries the learning rate, the first weights and the schedule over from width {base} (Yang et al., 2022, table "
        "1). Batch size, weight decay and dropout stay as they are: of them, and of depth, it says nothing.",
    ]
    if not config.model.mup_base_width and settings.head_dim != 64:
        lines.append(
            f"The small run had no muP, and heads of {settings.head_dim}: its scores were divided by "
            f"{settings.head_dim**0.5:.3g}, with muP they are by {settings.head_dim / 8:g}."
        )
    return table, "\n".join(lines)
