"""Pre-train a language model, or fine-tune one.

    python train.py                                    configs/default.toml, on this machine's GPU or CPU
    python train.py CONFIG.toml --train.steps=100      any key of the TOML can be set as --section.key=value
    python train.py CONFIG.toml --init_from=runs/NAME  start from the weights of another run
    torchrun --nproc-per-node=2 train.py CONFIG.toml   the same on several processes
    python train.py --resume runs/NAME                 go on where a run stopped
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nanopre import (
    UserError,
    checkpoint,
    config as configs,
    corpus as corpora,
    cost,
    data,
    distributed,
    machine,
    optim,
    parallel,
    saving,
)
from nanopre.command_line import Parser, run_script
from nanopre.examples import prepare as prepare_examples
from nanopre.generate import EXAMPLES, generate
from nanopre.hookspecs import Run

HERE = Path(__file__).parent


def main(argv: list[str]) -> None:
    parser = Parser(
        description="Pre-train a language model.",
        epilog="Any key of the config can be set as --section.key=value, in TOML's syntax or as a bare string.",
        sets_keys=True,
    )
    parser.add_argument("config", nargs="?", help="a TOML file (default: configs/default.toml)")
    parser.add_argument("--resume", metavar="RUN", help="a run's folder, or one checkpoint's, to go on from")
    parser.add_argument("--list-plugins", action="store_true", help="list every plugin with its options, and stop")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config, and stop")
    arguments, overrides = parser.parse_known_args(argv)

    run_dir = resume_from = None
    inherit = checkpoint.read_config
    config_file = HERE / "configs" / "default.toml" if arguments.config is None else arguments.config
    if arguments.resume is not None:
        if arguments.config is not None:
            raise UserError("--resume takes the config that was saved with the run; leave out the config file.")
        for text in overrides:
            if text.startswith(("--name=", "--out_dir=")):
                raise UserError(f"{text}: a run that is resumed stays in its folder; leave this out.")
            if text.startswith(("--init_from=", "--init_weights=")):
                raise UserError(f"{text}: a run that is resumed has weights of its own; leave this out.")
        run_dir, resume_from = checkpoint.locate(arguments.resume)
        info = checkpoint.read_info(resume_from, {"config": dict})
        if "imported_from" in info:
            raise UserError(f"{run_dir}: an imported model has no training to go on with; sample.py can use it.")
        config_file, inherit = run_dir / "config.toml", None
    config, plugins = configs.load(config_file, overrides, inherit)
    is_first = distributed.place()[0] == 0
    if arguments.list_plugins or arguments.print_config:
        if is_first:
            print(plugins.describe() if arguments.list_plugins else configs.to_toml(config).rstrip())
        return
    if resume_from and (changed := changes(info["config"], config, run_dir)) and is_first:
        print(changed)
    train(config, plugins, run_dir, resume_from)


def train(config: configs.Config, plugins, run_dir: Path | None = None, resume_from: Path | None = None) -> None:
    """Run the config from its first step, or from the checkpoint `resume_from` of the run in `run_dir`."""
    c, objective = config.train, config.objective
    here = machine.choose(c)
    with distributed.start(here.device, c.timeout) as world:
        is_first = world.rank == 0
        if earlier := world.remembered_run():  # torchrun has restarted the processes: go on where the last ones were
            run_dir, resume_from = checkpoint.locate(earlier)
        layout = parallel.plan(config, plugins, world)

        # The corpus, tokenised at first use by one process, or examples for an objective that names their columns; a
        # run that starts from another keeps its tokenizer. And a model that starts the same in every layout.
        tokenizer = checkpoint.read_tokenizer(run_dir or config.init_from) if config.init_from else None
        prepare = prepare_examples if hasattr(objective, "columns") else corpora.prepare
        corpus = world.first("corpus", lambda: prepare(config, plugins, tokenizer, progress=is_first))
        tokenizer = corpus.tokenizer
        world.check_same({
            "corpus": corpus.fingerprint,
            "config": configs.to_dict(config),
            "plugins": plugins.versions(),
            "code": code_version(),
            "torch": torch.__version__,
        })  # fmt: skip
        # What can't be used is refused before anything is trained.
        for split in (corpus.train, corpus.val):
            if split.n_tokens:
                objective.rows_per_epoch(split, c.seq_len)
        try:
            tokenizer.encode(c.prompt if c.samples else "")
        except UserError as error:
            raise UserError(f"train.prompt: {error}") from None
        model = distributed.build_model(config, tokenizer)
        if config.init_from and config.init_weights and not resume_from:
            loaded = checkpoint.load_weights(config.init_from, model)
            if is_first:
                print(loaded)
        n_parameters = sum(p.numel() for p in model.parameters())

        def load_rows(split, rows: np.ndarray, seed: int | None):
            """(batch, counts): tensors on the device, and the numbers that the sums of losses are divided by."""
            arrays = objective.batch(split, rows, c.seq_len, seed)
            batch = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}
            if here.device.type == "cuda":
                batch = {key: tensor.pin_memory() for key, tensor in batch.items()}
            batch = {key: tensor.to(here.device, non_blocking=True) for key, tensor in batch.items()}
            return batch, objective.counts(arrays, tokenizer)

        if c.weights == "bfloat16":
            for p in model.parameters():  # not buffers: rotary positions need their precision
                p.data = p.data.bfloat16()

        # The parallel strategies take their parts of the model; `engine` runs batches through them.
        example, _ = load_rows(corpus.train, np.arange(1), config.seed)
        parts, engine = parallel.apply(layout, model.to(here.device), here, objective.loss, config, example)
        optimizers = [optimizer for part in parts for optimizer in optim.build(config.optimizer, part)]
        peak_rates = optim.peak_rates(optimizers)

        # The run's folder, and where the run stands.
        start_step, best_val_loss = 0, math.inf
        progress = {"tokens": 0, "seconds": 0.0, "skipped": 0}
        if resume_from:
            info = checkpoint.load(resume_from, parts, optimizers)
            start_step, best_val_loss, progress = info["step"], info["best_val_loss"] or math.inf, info["progress"]
            same_tokenizer = checkpoint.read_tokenizer(run_dir).fingerprint == tokenizer.fingerprint
            if info["corpus"] != corpus.fingerprint or not same_tokenizer:
                raise UserError(
                    f"{run_dir}: the corpus or tokenizer changed since the run began, so it can't go on; set data.corpus and "
                    f"data.val_corpus as they were, or start a new run from the weights with --init_from={run_dir}."
                )
            if start_step >= c.steps:
                raise UserError(f"{run_dir}: all {c.steps} steps are done; go on with --train.steps={2 * start_step}.")
            if is_first:
                saving.write_config(run_dir, config)  # so that what was changed now stays so the next time
        else:
            name = world.agree("name", saving.free_name(Path(config.out_dir), config.name) if is_first else "")
            run_dir = Path(config.out_dir) / name
            if is_first:
                saving.create_run(run_dir, config, tokenizer)
        world.barrier()
        world.remember_run(run_dir)

        share = c.batch_size // layout.data_size  # rows of the global batch on this rank
        peak_flops = cost.peak_flops(here.device, here.precision)

        def load_step(step: int):
            """This rank's rows of the step's global batch, which depends on the seed and the step alone."""
            first = step * c.batch_size + layout.data_rank * share
            return load_rows(corpus.train, np.arange(first, first + share), config.seed)

        @torch.no_grad()
        def evaluate() -> dict[str, float]:
            """The objective's metrics over the validation split, or its first `eval_tokens`: always the same part."""
            for part in parts:
                part.eval()
            end = objective.rows_per_epoch(corpus.val, c.seq_len)
            n_rows = min(end, -(-c.eval_tokens // c.seq_len)) if c.eval_tokens else end
            sums, counts = {}, {}
            # Every rank runs as many batches as the others; rows that are too many lie past the end: without targets.
            for first in range(0, n_rows, engine.rows * layout.data_size):
                rows = first + layout.data_rank * engine.rows + np.arange(engine.rows)
                batch, n = load_rows(corpus.val, np.where(rows < n_rows, rows, end), None)
                sums = {key: sums.get(key, 0) + value for key, value in engine.evaluate(batch).items()}
                counts = {key: counts.get(key, 0) + n[key] for key in n}
            metrics = objective.report(numbers(world.sum(layout.own(sums))), numbers(world.sum(layout.own(counts))))
            if hasattr(objective, "evaluate"):
                with torch.compiler.set_stance("force_eager"), here.autocast():  # decoding: a new length at every token
                    metrics |= objective.evaluate(parts[0], corpus.val, c.seq_len)
            for part in parts:
                part.train()
            return metrics

        def save(step: int, is_best: bool) -> None:
            info = {
                "best_val_loss": best_val_loss if best_val_loss < math.inf else None,
                "progress": dict(progress),
                "corpus": corpus.fingerprint,
                "config": configs.to_dict(config),
                "plugins": plugins.versions(),
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "git_commit": git_commit(),
            }
            saver.save(step, parts, optimizers, info, is_best)

        for name, logger in config.loggers.items():
            plugins.register_instance(logger, name)
        run = Run(
            config=config,
            dir=run_dir,
            rank=world.rank,
            world_size=world.size,
            device=str(here.device),
            n_parameters=n_parameters,
            start_step=start_step,
            steps=c.steps,
            tokenizer=tokenizer,
            model=parts[0],
            objective=objective,
        )
        saver = saving.Saver(run_dir, config.checkpoint, partial(plugins.hook.nanopre_checkpoint_saved, run=run))
        if is_first:
            epochs = c.steps * c.batch_size / objective.rows_per_epoch(corpus.train, c.seq_len)
            print(f"{run_dir}: {n_parameters:,} parameters; {here.reason}; {layout}")
            print(f"{corpus.train.n_tokens:,} tokens to train on, of which this run sees {epochs:.3g} epochs; "
                  f"{corpus.val.n_tokens:,} to validate")  # fmt: skip
        status, skipped_in_a_row = "failed", 0
        plugins.hook.nanopre_run_start(run=run)
        try:
            with distributed.StopSignal() as stop, closing(data.prefetch(load_step, start_step)) as batches:
                for step, (batch, counts) in zip(range(start_step, c.steps), batches, strict=False):
                    began = time.perf_counter()
                    factor = optim.learning_rate_factor(config.schedule, step, c.steps)
                    optim.set_rates(optimizers, peak_rates, factor)
                    distributed.seed_step(config.seed, step, layout.data_rank)

                    # How many targets the whole global batch has: what each sum of losses is divided by.
                    totals = world.sum(layout.own(counts))
                    sums = engine.forward_backward(batch, totals)
                    parallel.finish_gradients(layout, parts)
                    norm = parallel.clip_gradients(layout, parts, c.grad_clip)

                    # One look at the numbers a step. They are the same on every rank, and so is what follows from them.
                    seen = numbers(world.sum({**layout.own(sums), "stop": stop.asked, "written": saver.is_written()}))
                    stopping = seen.pop("stop") > 0
                    if seen.pop("written") == world.size:
                        saver.finish()
                    metrics = objective.report(seen, numbers(totals))
                    norm = norm.item()
                    if math.isfinite(metrics["loss"]) and math.isfinite(norm):
                        for optimizer in optimizers:
                            optimizer.step()
                        skipped_in_a_row = 0
                    else:
                        progress["skipped"] += 1
                        skipped_in_a_row += 1
                    for optimizer in optimizers:
                        optimizer.zero_grad(set_to_none=True)
                    if skipped_in_a_row > c.max_skipped_steps:
                        raise UserError(diverged(run_dir, step, skipped_in_a_row))

                    seconds = time.perf_counter() - began
                    done = step + 1
                    tokens_per_step = c.batch_size * batch["tokens"].shape[1]
                    progress["tokens"] += tokens_per_step
                    progress["seconds"] += seconds
                    metrics |= {
                        "lr": peak_rates[0][0] * factor,
                        "grad_norm": norm,
                        "tokens_per_second": tokens_per_step / seconds,
                        "epoch": done * c.batch_size / objective.rows_per_epoch(corpus.train, c.seq_len),
                        **progress,
                    }
                    if peak_flops:
                        metrics["mfu"] = cost.flops(model.config, batch) * layout.data_size / world.size / seconds / peak_flops
                    plugins.hook.nanopre_step_end(run=run, step=done, metrics=metrics)

                    last = done == c.steps or stopping
                    is_best = False
                    if corpus.val.n_tokens and (done == c.steps or done % c.eval_interval == 0):
                        evaluation = evaluate()
                        plugins.hook.nanopre_evaluation_end(run=run, step=done, metrics=evaluation)
                        is_best = config.checkpoint.keep_best and evaluation["loss"] < best_val_loss
                        best_val_loss = min(best_val_loss, evaluation["loss"])
                    due = config.checkpoint.interval and done % config.checkpoint.interval == 0
                    if due or last or is_best:
                        save(done, is_best)
                    if last:
                        saver.finish()
                        break
            status = "finished" if done == c.steps else "interrupted"
        finally:
            plugins.hook.nanopre_run_end(run=run, status=status)

    if is_first and status == "interrupted":
        print(f"Stopped after step {done} of {c.steps}; go on with: python train.py --resume {run_dir}")
    elif is_first:
        if c.samples and model.config.architecture == "decoder" and not hasattr(objective, "sample"):
            print_samples(run_dir, here.device, c.prompt, c.samples, config.seed)
        example = "TEXT" if hasattr(objective, "sample") else EXAMPLES.get(model.config.architecture, c.prompt or "TEXT")
        print(f"\nTry it: python sample.py {run_dir} --prompt {example!r}")


def numbers(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """The values of scalar tensors, read in one transfer."""
    return dict(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True))


def print_samples(run_dir: Path, device: torch.device, prompt: str, n_samples: int, seed: int) -> None:
    opened = checkpoint.open_run(run_dir)  # from the disk: a rank may have trained a part of the model only
    model, tokenizer = opened.model.to(device), opened.tokenizer
    machine.lighten(model, opened.config.train)
    start = tokenizer.encode(prompt).tolist() if prompt else [tokenizer.eot]
    with torch.compiler.set_stance("force_eager"):  # a new length at every token: nothing to compile for
        for i in range(n_samples):
            generator = torch.Generator(device).manual_seed(seed + i)
            tokens = generate(
                model, start, 200, 0.8, top_p=0.95, generator=generator, n_vocab=tokenizer.n_vocab, stop=tokenizer.eot
            )
            print(f"\n--- sample {i + 1} ---\n{prompt}{tokenizer.decode(list(tokens))}")


def changes(before: dict, config: configs.Config, run_dir: Path) -> str:
    """What a resumed run's config has other than the one that its checkpoint was trained with, in one line; "" for nothing.

    Raises UserError where the weights can't follow: for a part of the model or tokenizer, or the length of learned positions.
    """
    was, now = flatten(before), flatten(configs.to_dict(config))
    different = {key: (now[key], was[key]) for key in now if key in was and now[key] != was[key]}
    with torch.device("meta"):
        models = [config.model.build(1, seq_len) for seq_len in different.get("train.seq_len", ())]
    shapes = [[p.shape for p in model.parameters()] for model in models]
    fixed = ("model.", "tokenizer.", *(["train.seq_len"] if shapes and shapes[0] != shapes[1] else []))
    for key, (value, old) in different.items():
        if key.startswith(fixed) and key != "model.dropout":
            raise UserError(
                f"{run_dir}: {key} can't be {json.dumps(value)}, since the weights were trained with {json.dumps(old)}; leave "
                f"it out, or start a new run from the weights with --init_from={run_dir}."
            )
    # Another corpus is refused by its content, once that is known: its files may have moved.
    rows = any(key in ("seed", "train.batch_size", "train.seq_len") or key.startswith("objective.") for key in different)
    listed = ", ".join(f"{key} = {json.dumps(value)} instead of {json.dumps(old)}" for key, (value, old) in different.items())
    return listed and f"Resuming with {listed}{': its steps see other rows than they would have' if rows else ''}."


def flatten(table: dict, prefix: str = "") -> dict[str, object]:
    """{"train.steps": 1000, ...} of a config as a table of tables."""
    flat = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def diverged(run_dir: Path, step: int, skipped: int) -> str:
    saved = checkpoint.pointed(run_dir, "latest")
    rest = f"the last checkpoint is whole: {saved}" if saved else "there is no checkpoint yet"
    return (
        f"{run_dir}: the loss or its gradient was not finite in {skipped} steps in a row, up to step {step + 1}; "
        f"lower optimizer.lr or raise schedule.warmup_steps ({rest})."
    )


def code_version() -> str:
    """The start of the hash of the code that runs: this file's and nanopre/'s."""
    files = [Path(__file__), *sorted((HERE / "nanopre").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def git_commit() -> str:
    """The commit of the code that runs, "" outside of a checkout."""
    result = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character of a sample shows a question mark
    run_script("train.py", main, say=distributed.say_once)
