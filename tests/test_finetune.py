"""Fine-tuning: starting from another run, and classification."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import read_log, run_script
from hypothesis import given, settings, strategies as st

import sample
import train
from nanopre import UserError, checkpoint, config as configs, saving
from nanopre.examples import Examples
from nanopre.loss import IGNORE
from nanopre.plugins import load_plugins
from nanopre.tokenizer import bpe_tokenizer, bytes_tokenizer

Classify = load_plugins().get("objective", "classify", "")
WORDS = ["the", "bird", "sees", "likes", "and", "a", "small", "big", "house", "tree"]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> str:
    """A file of 300 made-up sentences, each with one of three animals, which is the label."""
    draw, animals = random.Random(0), ["cat", "dog", "horse"]
    file = tmp_path_factory.mktemp("reviews") / "train.jsonl"
    with open(file, "w") as stream:
        for i in range(300):
            words = draw.choices(WORDS, k=draw.randint(2, 8))
            words.insert(draw.randint(0, len(words)), animals[i % 3])
            stream.write(json.dumps({"sentence": " ".join(words), "kind": animals[i % 3].upper()}) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of a tiny encoder as `nanopre.hf import` makes one, with weights that no initialisation gives."""
    folder = tmp_path_factory.mktemp("pretrained") / "encoder"
    table = {
        "name": "encoder",
        "out_dir": str(folder.parent),
        "model": {"name": "bert", "d_model": 32, "n_layers": 2, "n_heads": 2},
        "objective": {"name": "mlm_nsp", "nsp": False},
        "tokenizer": {"name": "bpe", "vocab_size": 400},
        "train": {"seq_len": 64},
    }
    config, _ = configs.from_dict(table, "test")
    tokenizer = bpe_tokenizer([" ".join(WORDS) + " cat dog horse"], 400)
    model = config.model.build(vocab_size=-(-tokenizer.n_vocab // 64) * 64, seq_len=64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05, generator=generator).add_(1.0 if parameter.ndim == 1 else 0.0)
    saving.create_run(folder, config, tokenizer)
    saving.save(folder, 0, [model], [], {"config": configs.to_dict(config)})
    return folder


@pytest.fixture
def tuning(pretrained, reviews, tmp_path) -> list[str]:
    """Arguments of train.py that fine-tune the tiny encoder on the made-up sentences."""
    config = tmp_path / "tune.toml"
    config.write_text(
        f"""
        name = "tuned"
        init_from = "{pretrained}"
        out_dir = "{tmp_path}/runs"
        model = {{ dropout = 0.1 }}
        objective = {{ name = "classify", label = "kind" }}
        data = {{ corpus = "{reviews}", val_fraction = 0.2, cache_dir = "{tmp_path}/cache" }}
        optimizer = {{ name = "adamw", lr = 3e-3 }}
        schedule = {{ warmup_steps = 5 }}
        [train]
        steps = 4
        batch_size = 16
        precision = "float32"
        device = "cpu"
        compile = "off"
        """
    )
    return [str(config)]


def weights(run) -> dict[str, torch.Tensor]:
    return checkpoint.open_run(run).model.state_dict()


# ---------------------------------------------------------------------------------------------------------------------
# init_from


def test_a_run_starts_with_the_weights_of_another(pretrained, tuning, tmp_path, capsys):
    train.main([*tuning, "--optimizer.lr=0.0", "--optimizer.weight_decay=0.0", "--train.steps=1"])
    said = f"{pretrained}/checkpoints/step_00000000; new: head.outputs.label, head.pooler; left behind: head."
    assert said in capsys.readouterr().out
    old, new = weights(pretrained), weights(tmp_path / "runs" / "tuned")
    added = {f"head.{name}.{kind}" for name in ("outputs.label", "pooler") for kind in ("weight", "bias")}
    assert set(new) - set(old) == added
    assert {name.split(".")[1] for name in set(old) - set(new)} == {"proj", "dense", "dense_norm"}
    for name in set(new) & set(old):
        assert torch.equal(new[name], old[name]), name


def test_without_its_weights_a_run_has_the_same_model_and_tokenizer(pretrained, tuning, tmp_path):
    train.main([*tuning, "--init_weights=false", "--optimizer.lr=0.0", "--optimizer.weight_decay=0.0", "--train.steps=1"])
    opened = checkpoint.open_run(tmp_path / "runs" / "tuned")
    assert opened.tokenizer.fingerprint == checkpoint.read_tokenizer(pretrained).fingerprint
    old, new = weights(pretrained), opened.model.state_dict()
    assert new["embed.tokens.weight"].shape == old["embed.tokens.weight"].shape
    assert not any(torch.equal(new[name], old[name]) for name in set(new) & set(old))


def test_the_model_tokenizer_and_length_are_the_defaults(pretrained, tuning):
    config, _ = configs.load(tuning[0], [], checkpoint.read_config)
    old, _ = configs.load(pretrained / "config.toml")
    assert config.tokenizer == old.tokenizer and config.train.seq_len == 64
    assert (config.model._plugin_name, config.model.d_model, config.model.dropout) == ("bert", 32, 0.1)
    shorter, _ = configs.load(tuning[0], ["--train.seq_len=32", "--model.dropout=0.0"], checkpoint.read_config)
    assert (shorter.train.seq_len, shorter.model.dropout, shorter.train.steps) == (32, 0.0, 4)


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("--model.name=gpt2", '--model.name: is "gpt2"; init_from is a "bert"; leave the name out.'),
        ("--tokenizer.name=bytes", "--tokenizer: is set, but init_from brings its own; leave one of the two out; configs/fine"),
        ("--init_from=runs/nope", "runs/nope: no such run; "),
        ("--model.d_model=64", "init_from: embed.tokens.weight has the shape (448, 32) in "),
        ("--model.n_layers=3", "has no weights for blocks.2.attn_norm.weight, which the configured model has."),
        ("--model.n_layers=1", "has weights for blocks.1.attn.k.bias, which the configured model has not."),
        ("--train.seq_len=128", "init_from: embed.positions.weight has the shape (64, 32) in "),
    ],
)
def test_what_does_not_fit_is_refused_before_a_run_is_made(tuning, tmp_path, override, sentence):
    with pytest.raises(UserError) as error:
        train.main([*tuning, override])
    assert sentence in str(error.value).replace("--tokenizer.name", "--tokenizer")
    assert not (tmp_path / "runs").exists()


def test_a_shorter_model_takes_the_first_positions(pretrained, tuning, tmp_path):
    train.main([*tuning, "--train.seq_len=16", "--optimizer.lr=0.0", "--optimizer.weight_decay=0.0", "--train.steps=1"])
    new = weights(tmp_path / "runs" / "tuned")["embed.positions.weight"]
    assert torch.equal(new, weights(pretrained)["embed.positions.weight"][:16])


def test_a_run_needs_nothing_of_the_run_that_it_started_from(pretrained, tuning, tmp_path, capsys):
    shutil.copytree(pretrained, tmp_path / "old")
    whole = [*tuning, f"--init_from={tmp_path}/old", "--train.steps=6", "--model.dropout=0.1"]
    train.main([*whole, "--name=whole"])
    train.main([*whole, "--name=halves", "--checkpoint.interval=3", "--checkpoint.keep_last=9"])
    shutil.rmtree(tmp_path / "old")
    runs = tmp_path / "runs"
    train.main(["--resume", str(runs / "halves" / "checkpoints" / "step_00000003")])
    for name, tensor in weights(runs / "whole").items():
        assert torch.equal(tensor, weights(runs / "halves")[name])
    capsys.readouterr()
    sample.main([str(runs / "halves"), "--prompt", "the cat", "--json"])
    assert json.loads(capsys.readouterr().out)["label"] in ("CAT", "DOG", "HORSE")


def test_pre_training_goes_on_with_other_text_and_the_same_tokenizer(tiny, tmp_path):
    bpe = ["--tokenizer.name=bpe", "--tokenizer.vocab_size=380"]
    train.main([*tiny, *bpe, "--train.steps=60"])
    (tmp_path / "other.txt").write_text("A dog sees a big bird and a small cat. " * 200)
    config = tmp_path / "on.toml"
    config.write_text("\n".join(line for line in open(tiny[0]) if "tokenizer =" not in line))
    train.main([str(config), f"--init_from={tmp_path}/runs/tiny", f"--data.corpus={tmp_path}/other.txt", "--name=on",
                "--data.val_fraction=0.0", "--train.steps=1"])  # fmt: skip
    (first, *_), _ = read_log(tmp_path / "runs" / "tiny")
    (on,), _ = read_log(tmp_path / "runs" / "on")
    assert on["loss"] < first["loss"] - 1
    old, new = (checkpoint.read_tokenizer(tmp_path / "runs" / name) for name in ("tiny", "on"))
    assert old.fingerprint == new.fingerprint


def test_outputs_of_another_width_start_anew(tuning, tmp_path, capsys):
    train.main(tuning)
    two = tmp_path / "two.tsv"
    two.write_text("sentence\tkind\n" + "".join(f"cat {i}\tyes\ndog {i}\tno\n" for i in range(20)))
    again = [*tuning, f"--init_from={tmp_path}/runs/tuned", f"--data.corpus={two}", "--train.steps=1", "--name=again"]
    capsys.readouterr()
    train.main(again)
    assert "step_00000004; new: head.outputs.label\n" in capsys.readouterr().out
    assert checkpoint.open_run(tmp_path / "runs" / "again").config.objective.labels == ["no", "yes"]


# ---------------------------------------------------------------------------------------------------------------------
# classify


def test_a_task_that_can_be_learnt_is_learnt_and_the_model_labels(tuning, tmp_path, capsys):
    train.main([*tuning, "--init_weights=false", "--model.dropout=0.0", "--train.steps=300", "--train.eval_interval=150"])
    steps, evaluations = read_log(tmp_path / "runs" / "tuned")
    assert evaluations[-1]["val_accuracy"] > 0.95 and evaluations[-1]["val_macro_f1"] > 0.95
    assert {"loss", "accuracy", "macro_f1"} <= set(steps[-1])
    assert configs.load(tmp_path / "runs" / "tuned" / "config.toml")[0].objective.labels == ["CAT", "DOG", "HORSE"]
    capsys.readouterr()
    for animal in ("cat", "dog", "horse"):
        sample.main([str(tmp_path / "runs" / "tuned"), "--prompt", f"a big {animal} likes the house", "--json"])
        result = json.loads(capsys.readouterr().out)
        assert result["label"] == animal.upper() and result["probabilities"][animal.upper()] > 0.5
        assert sum(result["probabilities"].values()) == pytest.approx(1)


@pytest.mark.slow
def test_processes_report_what_one_process_does(tuning, tmp_path):
    arguments = [*tuning, "--model.dropout=0.0", "--train.steps=3", "--train.eval_interval=3"]
    train.main([*arguments, "--name=one"])
    result = run_script("train.py", *arguments, "--name=two", processes=2)
    assert result.returncode == 0, result.stderr
    (_, one), (_, two) = read_log(tmp_path / "runs" / "one"), read_log(tmp_path / "runs" / "two")
    for name in ("val_loss", "val_accuracy", "val_macro_f1"):
        assert two[-1][name] == pytest.approx(one[-1][name], abs=1e-5)


def examples(n: int, longest: int = 30) -> Examples:
    draw = np.random.default_rng(0)
    columns = {name: ["".join(chr(97 + i % 26) for i in range(draw.integers(0, longest))) for _ in range(n)] for name in "AB"}
    return Examples({**columns, "label": [str(i % 3) for i in range(n)]}, bytes_tokenizer())


def truncated(a: list[int], b: list[int], room: int) -> tuple[list[int], list[int]]:
    """The original's loop (run_classifier.py, _truncate_seq_pair)."""
    a, b = list(a), list(b)
    while len(a) + len(b) > room:
        (a if len(a) > len(b) else b).pop()
    return a, b


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(5, 80), st.integers(1, 60), st.booleans())
def test_rows_are_those_of_a_plain_loop(n, seq_len, longest, pair):
    split, objective = examples(n, longest=longest), Classify(text="A", pair="B" if pair else "", labels=["0", "1", "2"])
    t = split.tokenizer
    batch = objective.batch(split, np.arange(n), seq_len, None)
    for i in range(n):
        a, b = list(split.columns["A"][i].encode()), list(split.columns["B"][i].encode())
        if pair:
            a, b = truncated(a, b, seq_len - 3)
            row, segments = [t.cls, *a, t.sep, *b, t.sep], [0] * (len(a) + 2) + [1] * (len(b) + 1)
        else:
            row = [t.cls, *a[: seq_len - 2], t.sep]
            segments = [0] * len(row)
        visible = batch["visible"][i]
        assert batch["tokens"][i, :visible].tolist() == row and (batch["tokens"][i, visible:] == t.pad).all()
        assert batch["segments"][i, :visible].tolist() == segments and not batch["segments"][i, visible:].any()
        assert batch["classes"][i] == i % 3
    assert batch["tokens"].shape[1] <= seq_len


def test_an_epoch_visits_each_example_once_in_an_order_of_its_own():
    split, objective = examples(50), Classify(text="A", labels=["0", "1", "2"])
    split.columns["A"] = [chr(200 + i) for i in range(50)]
    seen = objective.batch(split, np.arange(150), 16, 7)["tokens"][:, 2].reshape(3, 50)
    for epoch in seen:
        assert sorted(epoch) == sorted(seen[0]) and len(set(epoch)) == 50
    assert not (seen[0] == seen[1]).all() and not (seen[1] == seen[2]).all()
    rows = np.array([149, 3, 77])
    together = objective.batch(split, rows, 16, 7)
    for i, row in enumerate(rows):
        alone = objective.batch(split, np.array([row]), 16, 7)
        for key, array in together.items():
            assert (alone[key][0] == array[i]).all()
    beyond = objective.batch(split, np.array([49, 50, 50]), 16, None)
    assert beyond["classes"].tolist() == [49 % 3, IGNORE, IGNORE]
    assert objective.counts(beyond, split.tokenizer)["loss"] == 1


class Given:
    """A head whose output is what the test wants."""

    def __init__(self, logits):
        self.logits = logits

    def output(self, name, h, pooled):
        assert (name, pooled) == ("label", True)
        return self.logits


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 3)), min_size=1, max_size=40), st.integers(1, 5))
def test_the_metrics_are_those_of_the_formulas(pairs, n_parts):
    """Summed over parts of any size, as over micro-batches and ranks; a class of -1 is a row without one."""
    objective = Classify(labels=list("abcd"))
    torch.manual_seed(0)
    true, given_ = (torch.tensor(column) for column in zip(*pairs, strict=True))
    logits = torch.randn(len(true), 4)
    logits[torch.arange(len(true)), given_] += 20
    sums, counts = {}, {}
    for rows in torch.arange(len(true)).chunk(n_parts):
        classes = torch.where(true[rows] < 0, IGNORE, true[rows])
        batch = {"classes": classes}
        for total, part in (
            (sums, objective.loss(Given(logits[rows].requires_grad_()), None, batch)),
            (counts, objective.counts({"classes": classes.numpy()}, None)),
        ):
            for key, value in part.items():
                total[key] = total.get(key, 0) + (value.item() if torch.is_tensor(value) else value)
    assert set(sums) == set(counts)
    report = objective.report(sums, counts)

    scored = [(t, g) for t, g in pairs if t >= 0]
    if not scored:
        assert report == {"loss": 0, "accuracy": 0, "macro_f1": 0}
        return
    f1 = []
    for c in {x for pair in scored for x in pair}:
        tp = sum(t == g == c for t, g in scored)
        precision = tp / max(1, sum(g == c for _, g in scored))
        recall = tp / max(1, sum(t == c for t, _ in scored))
        f1.append(2 * precision * recall / (precision + recall) if tp else 0)
    log_p = logits.log_softmax(dim=1)
    assert report["macro_f1"] == pytest.approx(sum(f1) / len(f1))
    assert report["accuracy"] == pytest.approx(sum(t == g for t, g in scored) / len(scored))
    loss = -sum(float(log_p[i, t]) for i, (t, _) in enumerate(pairs) if t >= 0) / len(scored)
    assert report["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)


def test_only_the_loss_has_a_gradient():
    objective = Classify(labels=["a", "b"])
    parts = objective.loss(Given(torch.randn(3, 2, requires_grad=True)), None, {"classes": torch.tensor([0, 1, IGNORE])})
    assert [name for name, part in parts.items() if part.requires_grad] == ["loss"]


def test_labels_that_no_class_has_are_refused():
    part = Examples({"sentence": ["x", "y"], "label": ["good", "bad"]}, bytes_tokenizer())
    other = Examples({"sentence": ["x"], "label": ["goood"]}, bytes_tokenizer())
    objective = Classify()
    with pytest.raises(UserError, match=r'validation examples: the label "goood" is not among .*; did you mean good\? Or name'):
        objective.prepare(part, other)
    given_ = Classify(labels=["good", "bad", "mixed"])
    given_.prepare(part, part)
    assert given_.labels == ["good", "bad", "mixed"]
    with pytest.raises(UserError, match='of the examples to train on, the column "label" has "goood" only'):
        Classify().prepare(other, other)
    for labels in (["a"], ["a", "b", "a"]):
        with pytest.raises(ValueError, match="labels = "):
            Classify(labels=labels)


def test_a_decoder_is_refused(reviews, tiny):
    message = "objective.name = classify is for an encoder; model.name = llama is a decoder; --init_from=runs/NAME starts with"
    with pytest.raises(UserError, match=message):
        train.main([*tiny, "--objective.name=classify", "--objective.label=kind", f"--data.corpus={reviews}"])


def test_causal_lm_of_an_encoder_which_sees_its_targets_is_refused(tiny):
    with pytest.raises(UserError, match="objective.name = clm is for a decoder; model.name = bert is an encoder"):
        train.main([*tiny, "--model={name = 'bert', d_model = 32, n_layers = 1, n_heads = 2}"])
