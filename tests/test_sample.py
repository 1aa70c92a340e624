"""sample.py as a user runs it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, ROOT

import sample
import train
from nanopre import UserError, checkpoint, config as configs, distributed, saving
from nanopre.generate import fill_masks, fill_sentinels, generate
from nanopre.tokenizer import bpe_tokenizer, bytes_tokenizer


@pytest.fixture
def trained(tiny, tmp_path, capsys):
    train.main([*tiny, "--train.steps=40"])
    capsys.readouterr()
    return tmp_path / "runs" / "tiny"


def test_samples_are_those_of_generate(trained, capsys):
    sample.main([str(trained), "--prompt", "The cat", "--tokens", "30", "--top-k", "5", "--seed", "7", "--num-samples", "2"])
    output = capsys.readouterr().out
    opened = checkpoint.open_run(trained)
    expected = ""
    for i in range(2):
        tokens = generate(
            opened.model, list(b"The cat"), 30, 0.8, top_k=5, generator=torch.Generator().manual_seed(7 + i),
            n_vocab=opened.tokenizer.n_vocab, stop=opened.tokenizer.eot,
        )  # fmt: skip
        expected += f"--- sample {i + 1} ---\nThe cat{opened.tokenizer.decode(list(tokens))}\n"
    assert output == expected


def test_characters_of_several_tokens_are_streamed_whole(trained, capsys, monkeypatch):
    # Bytes of "é" and "漢" as separate tokens, then a character that stays unfinished.
    made = [*"é漢x".encode(), "漢".encode()[0]]
    monkeypatch.setattr(sample, "generate", lambda *_, **__: iter(made))
    sample.main([str(trained)])
    assert capsys.readouterr().out == "é漢x\N{REPLACEMENT CHARACTER}\n"


def test_the_prompt_from_stdin(trained):
    command = [sys.executable, "sample.py", str(trained), "--prompt", "-", "--tokens", "5", "--temperature", "0"]
    result = subprocess.run(command, input="A dog", capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("A dog")
    missing = subprocess.run(
        [sys.executable, "sample.py", str(trained.parent / "nope")],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert missing.returncode == 2
    assert missing.stderr == f"sample.py: {trained.parent / 'nope'}: no such run; there are {trained}.\n"


def test_an_output_that_cannot_hold_a_character(trained):
    def ask(*arguments):
        command = [sys.executable, "sample.py", str(trained), "--tokens", "1", "--prompt", "café", *arguments]
        env = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True, text=True).stdout

    assert ask().startswith("caf?")
    assert json.loads(ask("--json"))["prompt"] == "café"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--top-p", "1.5"], "^argument --top-p: 1.5 is not above 0 and at most 1; see --help.$"),
        (["--tokens", "0"], "^argument --tokens: 0 must be at least 1; see --help.$"),
        (["--temperature", "-1"], "^argument --temperature: .*; see --help.$"),
        (["--top-k", "x"], "^argument --top-k: .*; see --help.$"),
        (["--tokns", "3"], "^--tokns: not an option; did you mean --tokens.$"),
        (["--train.steps=3"], "^--train.steps: not an option; choose from --device, "),
        (["again"], "^again: neither an option nor the value of one; see --help.$"),
    ],
)
def test_impossible_options_name_themselves(trained, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        sample.main([str(trained), *arguments])


def test_a_run_without_a_checkpoint(trained):
    shutil.rmtree(trained / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet"):
        sample.main([str(trained)])


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff\xfe", b"step_00000099\n", b"..", b"\0", b"s" * 999])
def test_a_damaged_pointer_hides_no_checkpoint(trained, content):
    pointer = trained / "checkpoints" / "latest"
    pointer.unlink()
    if content is not None:
        pointer.write_bytes(content)
    whole = sorted(trained.glob("checkpoints/step_*"))[-1]
    with pytest.raises(UserError) as error:
        sample.main([str(trained)])
    assert str(error.value) == f"{pointer}: missing or damaged; name a checkpoint instead: {whole}"


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "a\udcff"], "--prompt: not UTF-8."),
    (["--device", "foo"], '--device = "foo": no such device here'),
    (["--device", "meta"], '--device = "meta": no such device here'),
])  # fmt: skip
def test_odd_arguments_get_one_sentence(trained, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        sample.main([str(trained), *arguments])


# ---------------------------------------------------------------------------------------------------------------------
# Filling in


TEXTS = ["The small cat sat on the mat. The big dog sees a small bird in the tree. A house likes the cat."]


OBJECTIVES = {"llama": {"name": "clm"}, "bert": {"name": "mlm_nsp", "nsp": False}, "t5": {"name": "span_corruption"}}


def random_run(tmp_path, model: dict, tokenizer, objective: dict | None = None):
    """A run of a tiny model with random weights, as `nanopre.hf import` makes one."""
    table = {"name": "tiny", "model": {"d_model": 32, "n_heads": 2, "n_layers": 2, **model}, "train": {"seq_len": 48}}
    config, _ = configs.from_dict({**table, "objective": objective or OBJECTIVES[model["name"]]}, "test")
    built = distributed.build_model(config, tokenizer)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    saving.create_run(tmp_path / "tiny", config, tokenizer)
    saving.save(tmp_path / "tiny", 0, [built], [], {"config": configs.to_dict(config)})
    return checkpoint.open_run(tmp_path / "tiny")


@pytest.mark.parametrize("make", [bytes_tokenizer, lambda: bpe_tokenizer(TEXTS, 420)])
def test_masks_are_filled_with_the_likeliest_tokens(tmp_path, make, capsys):
    run = random_run(tmp_path, {"name": "bert"}, t := make())
    words = t.n_vocab > 361
    # A space before [MASK] belongs to the word behind it, where tokens can be words.
    first, *rest = ("The small", " sat on", ".") if words else ("The small ", " sat on ", ".")
    encode = lambda text: t.encode(text).tolist()  # noqa: E731
    tokens = [t.cls, *encode(first), t.mask, *encode(rest[0]), t.mask, *encode(rest[1]), t.sep]
    with torch.no_grad():
        p = run.model(torch.tensor([tokens]))[0, :, : t.n_vocab].softmax(dim=-1)
    expected = []
    for position in (i for i, token in enumerate(tokens) if token == t.mask):
        order = sorted(range(t.n_vocab), key=lambda i: -p[position, i])[:3]
        expected.append([(t.decode([i]), pytest.approx(p[position, i].item(), rel=1e-4)) for i in order])
    prompt = "The small [MASK] sat on [MASK]."
    assert fill_masks(run.model, t, prompt, 3) == expected

    sample.main([str(tmp_path / "tiny"), "--prompt", prompt, "--top-k", "3", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert [[(best["token"], best["probability"]) for best in mask] for mask in result["masks"]] == expected
    sample.main([str(tmp_path / "tiny"), "--prompt", prompt])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0].split()[:2] == ["[MASK]", "1"] and lines[9].split()[:2] == ["[MASK]", "2"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.n_layers=1"],
        ["--model={name = 'bert', d_model = 32, n_layers = 1, n_heads = 2}", "--objective={name = 'mlm_nsp', nsp = false}"],
        ["--model={name = 't5', d_model = 32, n_layers = 1, n_heads = 2}", "--objective.name=span_corruption"],
    ],
    ids=["llama", "bert", "t5"],
)
def test_the_command_that_train_py_ends_with_works(tiny, capsys, flags):
    train.main([*tiny, *flags, "--train.steps=1", "--train.prompt=The cat"])
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("Try it: "))
    assert command[:2] == ["python", "sample.py"]
    sample.main([*command[2:], "--tokens=5"])
    assert capsys.readouterr().out.strip()


def test_sentinels_are_filled_with_what_the_decoder_writes(tmp_path, capsys):
    t = bpe_tokenizer(TEXTS, 420)
    run = random_run(tmp_path, {"name": "t5"}, t)
    parts = [t.encode("The"), t.sentinels[:1], t.encode(" sat on"), t.sentinels[10:11], t.encode(" mat."), [t.eot]]
    source = [int(token) for part in parts for token in part]
    written = [t.pad]
    with torch.no_grad():
        for _ in range(12):
            logits = run.model(torch.tensor([source]), decoder_tokens=torch.tensor([written]))
            written.append(int(logits[0, -1, : t.n_vocab].argmax()))
    prompt = "The <extra_id_0> sat on <extra_id_10> mat."
    made = []

    def spy(*arguments, **options):
        for token in generate(*arguments, **options):
            made.append(token)
            yield token

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanopre.generate.generate", spy)
        fill_sentinels(run.model, t, prompt, temperature=0, max_tokens=12, stop=None)
    assert made == written[1:]

    # What a model that has learnt its task writes; a sentinel that was not asked for, and tokens before the first.
    a, b, c = t.sentinels[[0, 10, 3]].tolist()
    script = [*t.encode(" no"), a, *t.encode(" small cat"), c, *t.encode(" dog"), b, *t.encode(" the")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanopre.generate.generate", lambda *_, **__: iter(script))
        spans = {"<extra_id_0>": " small cat", "<extra_id_10>": " the"}
        assert fill_sentinels(run.model, t, prompt) == spans
        assert fill_sentinels(run.model, t, "A <extra_id_1>.") == {"<extra_id_1>": ""}
        sample.main([str(tmp_path / "tiny"), "--prompt", prompt, "--json"])
    assert json.loads(capsys.readouterr().out)["spans"] == spans


@pytest.mark.parametrize("model, name", [("bert", "[MASK]"), ("t5", "<extra_id_0>")])
def test_prompts_that_can_not_be_filled_are_refused(tmp_path, model, name):
    random_run(tmp_path, {"name": model}, bytes_tokenizer())
    with pytest.raises(UserError, match="the prompt has no "):
        sample.main([str(tmp_path / "tiny"), "--prompt", "The cat"])
    with pytest.raises(UserError, match=r"the prompt is \d+ tokens long; the model reads 48."):
        sample.main([str(tmp_path / "tiny"), "--prompt", name + "a" * 48])


@pytest.fixture
def asked(monkeypatch) -> list[tuple[list[int], dict]]:
    """What `generate` is asked: (prompt, options) of each call, which makes no token."""
    calls = []
    monkeypatch.setattr("nanopre.generate.generate", lambda model, prompt, **o: calls.append((prompt, o)) or iter([]))
    return calls


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_ul2_reads_a_mode_and_the_end_of_text_as_in_training(tmp_path, family, asked, capsys):
    t = bytes_tokenizer()
    random_run(tmp_path, {"name": family}, t, {"name": "ul2"})
    a, regular, suffix = t.sentinels[[0, 97, 99]].tolist()
    for prompt, expected in (
        ("A <extra_id_0>.", [regular, *b"A ", a, *b".", t.eot]),
        ("A cat", [suffix, *b"A cat", t.eot]),
        ("", [suffix, t.eot]),
        ("a" * 60, [suffix, *b"a" * 46, t.eot]),
    ):
        sample.main([str(tmp_path / "tiny"), "--prompt", prompt, "--json"])
        start, options = asked.pop()
        if family == "t5":
            assert (start, options["source"]) == ([t.pad], expected)
        else:
            assert start == expected and options["bidirectional_prompt"]
        assert ("spans" in json.loads(capsys.readouterr().out)) == ("<extra_id_0>" in prompt)


def test_bart_reads_masks_and_writes_the_whole_text(tmp_path, asked, monkeypatch, capsys):
    t = bytes_tokenizer()
    random_run(tmp_path, {"name": "t5"}, t, {"name": "bart"})
    sample.main([str(tmp_path / "tiny"), "--prompt", "A [MASK]."])
    start, options = asked.pop()
    assert (start, options["source"], options["stop"]) == ([t.pad], [*b"A ", t.mask, *b".", t.eot], t.eot)
    monkeypatch.setattr("nanopre.generate.generate", lambda *_, **__: iter(b"A cat."))
    capsys.readouterr()
    sample.main([str(tmp_path / "tiny"), "--prompt", "A [MASK]."])
    assert capsys.readouterr().out == "A cat.\n"
    with pytest.raises(UserError, match=r"the prompt has no \[MASK\] to fill"):
        sample.main([str(tmp_path / "tiny"), "--prompt", "A cat."])


def test_electra_tells_which_tokens_are_fake(tmp_path, capsys):
    t = bytes_tokenizer()
    run = random_run(tmp_path, {"name": "bert"}, t, {"name": "electra"})
    tokens = torch.tensor([[t.cls, *b"A cat", t.sep]])
    with torch.no_grad():
        (h,) = run.model.embed(tokens)
        for block in run.model.blocks.values():
            (h,) = block(h)
        right = torch.sigmoid(run.model.head.outputs["fake"](h))[0, 1:-1, 0]
    sample.main([str(tmp_path / "tiny"), "--prompt", "A cat", "--json"])
    fakes = json.loads(capsys.readouterr().out)["fakes"]
    assert "".join(fake["token"] for fake in fakes) == "A cat"
    assert [fake["fake"] for fake in fakes] == pytest.approx(right.tolist(), rel=1e-4)
    for prompt, message in (("", "the prompt is empty"), ("a" * 47, "the prompt is 49 tokens long; the model reads 48")):
        with pytest.raises(UserError, match=message):
            sample.main([str(tmp_path / "tiny"), "--prompt", prompt])


def test_an_objective_may_say_what_a_prompt_is_for(tmp_path, capsys, monkeypatch):
    asked = []

    def answer(self, run, prompt, options):
        asked.append((run.checkpoint.name, prompt, options["max_tokens"], options["generator"].initial_seed()))
        return {"text": iter(["an ", "answer"]), "score": 0.5}

    run = random_run(tmp_path, {"name": "bert"}, bytes_tokenizer())
    monkeypatch.setattr(checkpoint, "open_run", lambda path: run)
    monkeypatch.setattr(type(run.config.objective), "sample", answer, raising=False)
    sample.main(["a run", "--prompt", "why", "--tokens", "7", "--seed", "3"])
    assert capsys.readouterr().out == "an answer\n"
    sample.main(["a run", "--prompt", "why", "--tokens", "7", "--seed", "3", "--json"])
    assert json.loads(capsys.readouterr().out) == {"prompt": "why", "text": "an answer", "score": 0.5}
    assert asked == [("step_00000000", "why", 7, 3)] * 2


def test_json_is_a_line_a_sample(tmp_path, capsys):
    random_run(tmp_path, {"name": "llama"}, bytes_tokenizer())
    arguments = [str(tmp_path / "tiny"), "--prompt", "A dög", "--tokens", "9", "--num-samples", "2"]
    sample.main(arguments)
    plain = capsys.readouterr().out
    sample.main([*arguments, "--json"])
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["prompt"] for result in results] == ["A dög"] * 2
    assert "".join(f"--- sample {i} ---\n{result['text']}\n" for i, result in enumerate(results, 1)) == plain
