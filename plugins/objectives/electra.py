"""ELECTRA: a small generator fills in masked tokens, and the model tells which tokens of the row it has replaced."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanopre import UserError, hookimpl, masking
from nanopre.config import at_least, fraction
from nanopre.data import Split, random32, row_keys
from nanopre.generate import check_length
from nanopre.loss import IGNORE
from nanopre.model import ModelConfig, Transformer, make_norm
from nanopre.tokenizer import Tokenizer


@dataclass
class Electra:
    """Replaced-token detection (Clark et al., 2020): every token of a row is a target, not only the masked ones.

    A token is fake if it was masked and the generator's sample differs from it; a sample that hits the original is real.
    """

    mask_fraction: float = 0.15  # of a row's tokens
    generator_size: float = 0.25  # the generator's width by the model's, in whole heads
    discriminator_weight: float = 50.0  # of its loss, beside the generator's (section 2)

    architectures = ("encoder",)

    def __post_init__(self):
        fraction(self, "mask_fraction")
        at_least(self, generator_size=0)
        if not self.discriminator_weight > 0:
            raise ValueError(f"discriminator_weight = {self.discriminator_weight} must be greater than 0")

    def adapt(self, model: Transformer) -> Discriminator:
        return Discriminator(model.config, self.generator_size)

    def rows_per_epoch(self, split: Split, seq_len: int) -> int:
        return -(-split.n_tokens // (seq_len - 2))

    def batch(self, split: Split, rows: np.ndarray, seq_len: int, seed: int | None) -> dict[str, np.ndarray]:
        """Rows of running text, [CLS] text [SEP]: tokens (R, T), in which [MASK] stands at the targets' positions; visible
        (R,); positions and targets (R, K), IGNORE beyond the row's own number; uniform (R, K) numbers in [0, 1), from which the
        generator's samples follow, so that neither the layout nor torch's generators have a part in them."""
        rows = np.asarray(rows, dtype=np.int64)
        tokens, lengths, maskable = masking.full_sentences(split, rows, seq_len, seed)
        n = masking.target_counts(self.mask_fraction, lengths, maskable)
        k = masking.most_targets(self.mask_fraction, seq_len)
        random = random32(row_keys(seed, rows, 2), seq_len + k)
        positions = masking.choose_positions(random[:, :seq_len], maskable, k)
        positions, targets = masking.mask_tokens(tokens, positions, n, split.tokenizer.mask)
        uniform = (random[:, seq_len:] >> 8).astype(np.float32) / np.float32(2**24)
        return {"tokens": tokens, "visible": lengths, "positions": positions, "targets": targets, "uniform": uniform}

    def counts(self, batch: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        """How many masked tokens, and how many tokens of rows that have such."""
        is_target = batch["targets"] != IGNORE
        real = int(batch["visible"][is_target.any(axis=1)].sum())
        return {"generator": int(is_target.sum()), "discriminator": real, "correct": real, "fakes": real}

    def loss(self, head, h: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`batch` also has what Discriminator.forward adds to it: "generator", the generator's sum, and "fake" (R, T)."""
        scored = torch.arange(h.shape[1], device=h.device) < batch["visible"][:, None]
        scored &= (batch["targets"] != IGNORE).any(dim=1, keepdim=True)
        logits, fake = head.output("fake", h).squeeze(-1), batch["fake"]
        losses = F.binary_cross_entropy_with_logits(logits, fake.float(), reduction="none")
        return {
            "generator": batch["generator"],
            "discriminator": self.discriminator_weight * (losses * scored).sum(),
            "correct": (((logits > 0) == fake) & scored).sum().float(),
            "fakes": fake.sum().float(),
        }

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The weighted sum of both losses, each alone in nats, and of the discriminator's tokens how many it judged right
        and how many were fake."""
        mean = {name: total / max(1, counts[name]) for name, total in sums.items()}
        return {
            "loss": mean["generator"] + mean["discriminator"],
            "generator_loss": mean["generator"],
            "discriminator_loss": mean["discriminator"] / self.discriminator_weight,
            "discriminator_accuracy": mean["correct"],
            "fakes": mean["fakes"],
        }

    @torch.inference_mode()
    def sample(self, run, prompt: str, options: dict) -> dict:
        """How likely each token of the prompt is to be fake."""
        tokenizer, text = run.tokenizer, run.tokenizer.encode(prompt.rstrip("\n")).tolist()
        if not text:
            raise UserError("the prompt is empty; give a text, of whose tokens the model tells which are likely to be fake.")
        tokens = [tokenizer.cls, *text, tokenizer.sep]
        check_length(tokens, run.model)
        inputs = torch.tensor([tokens], device=next(run.model.parameters()).device)
        p = run.model.fakes(inputs)[0, 1:-1].sigmoid().tolist()
        fakes = [{"token": tokenizer.decode([i]), "fake": probability} for i, probability in zip(text, p, strict=True)]
        return {"fakes": fakes, "text": "\n".join(f"{fake['fake']:7.1%}  {fake['token']}" for fake in fakes)}


class Discriminator(Transformer):
    """The model, whose parameters keep their names, and the generator beside it.

    They share the token embedding, from which the generator learns most (section 3.2): it reads it through a projection
    down to its width, and writes to it through one up. What is kept for fine-tuning is the model alone.
    """

    def __init__(self, config: ModelConfig, size: float):
        super().__init__(config)
        self.head.drop_projection()
        self.head.add_output("fake", 1)
        heads = max(1, round(config.n_heads * size))
        width = heads * config.head_dim
        small = replace(
            config, d_model=width, n_heads=heads, n_kv_heads=heads, d_ff=max(1, config.d_ff * width // config.d_model),
            d_head=config.head_dim, transform=True, tie_embeddings=False,
        )  # fmt: skip
        self.generator = Transformer(small)
        shared, head = self.embed.tokens, self.generator.head
        self.generator.embed.tokens = nn.Sequential(shared, nn.Linear(config.d_model, width, bias=False))
        head.dense, head.dense_norm = nn.Linear(width, config.d_model), make_norm(config)
        head.proj = nn.Linear(config.d_model, config.vocab_size)
        head.proj.weight = shared.weight

    def forward(self, tokens: Tensor, loss=None, **batch) -> dict[str, Tensor]:
        made = self.generator(tokens, loss=self.generate, **batch)
        positions, targets = batch["positions"], batch["targets"]
        is_target, there = targets != IGNORE, tokens.gather(1, positions)
        filled = tokens.scatter(1, positions, torch.where(is_target, made["samples"], there))
        fake = filled != tokens.scatter(1, positions, torch.where(is_target, targets, there))
        return super().forward(filled, loss=loss, fake=fake, generator=made["generator"], **batch)

    def fakes(self, tokens: Tensor) -> Tensor:
        """Logits (R, T) of each token's being fake, of a text as it is."""
        return super().forward(tokens, loss=lambda head, h, _: head.output("fake", h).squeeze(-1))

    def generate(self, head, h: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The generator's sum of losses, and a token drawn from what it predicts at each position, (R, K)."""
        h = h.gather(1, batch["positions"].unsqueeze(-1).expand(-1, -1, h.shape[-1]))
        return {"generator": head.cross_entropy(h, batch["targets"]), "samples": self.sample(head, h, batch["uniform"])}

    @torch.no_grad()
    def sample(self, head, h: Tensor, uniform: Tensor) -> Tensor:
        """The token (R, K) in which each uniform number falls, where tokens divide 0 .. 1 by their probabilities."""
        rows, samples = max(1, 2**24 // head.proj.out_features), []  # 64 MiB of logits at a time, as in the loss
        h = head.before_projection(h.flatten(0, 1))
        for part, u in zip(h.split(rows), uniform.reshape(-1, 1).split(rows), strict=True):
            ends = head.proj(part).float().softmax(dim=-1).cumsum(dim=-1)
            samples.append(torch.searchsorted(ends, u * ends[:, -1:], right=True).clamp(max=ends.shape[1] - 1))
        return torch.cat(samples).view(uniform.shape)

    def init_std(self, name: str) -> float | None:
        part, _, rest = name.partition(".")
        return self.generator.init_std(rest) if part == "generator" else super().init_std(name)


@hookimpl
def nanopre_objectives(register):
    register("electra", Electra)
