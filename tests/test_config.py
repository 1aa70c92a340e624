"""The config: every mistake is one sentence, overrides equal the file, and what is saved builds the same config."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli
from hypothesis import given, settings, strategies as st

from nanopre import UserError, config as configs, plugins
from nanopre.config import Config, build_plugin, from_dict, load, parse_override, to_dict, to_toml

ROOT = Path(__file__).parent.parent

# Plugins that import nothing heavy: the config is tested against these, and the real ones further down.
CHECKOUT = '''
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Any, Literal
from nanopre import hookimpl

@dataclass
class Llama:
    """A model."""
    d_model: int = 64
    n_heads: int = 4
    rope_theta: float = 1e4

    def __post_init__(self):
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads} does not divide d_model = {self.d_model}")

    def build(self, vocab_size, seq_len): ...

@dataclass(frozen=True)
class GPT2:
    """Another, whose options are in part the same."""
    d_model: int = 32
    bias: bool = True

    def build(self, vocab_size, seq_len): ...

@dataclass
class Everything:
    """An objective with an option of each type."""
    whole: int = 1
    number: float = 0.5
    switch: bool = False
    text: str = ""
    choice: Literal["a", "b"] = "a"
    numbers: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=lambda: ["x"])
    table: dict[str, Any] = field(default_factory=dict)
    perhaps: int | None = None

    def rows_per_epoch(self, split, seq_len): ...
    def batch(self, split, rows, seq_len, seed): ...
    def counts(self, batch, tokenizer): ...
    def loss(self, head, h, batch): ...
    def report(self, sums, counts): ...

@dataclass
class Adam:
    """An optimizer."""
    lr: float = 1e-3

    def build(self, model): ...

@dataclass
class Files:
    """A dataset."""
    path: str = "somewhere"
    limit: int = 0

    def documents(self): ...
    def fingerprint(self): ...

@dataclass
class DDP:
    """A strategy."""
    bucket_mb: int = 25
    phase = "data"

    def apply(self, parts, layout): ...

@dataclass
class Logger:
    """A logger."""
    every: int = 1

    @hookimpl
    def nanopre_run_end(self): ...

@hookimpl
def nanopre_models(register):
    register("llama", Llama)
    register("gpt2", GPT2)

@hookimpl
def nanopre_objectives(register):
    register("clm", Everything)

@hookimpl
def nanopre_optimizers(register):
    register("adamw", Adam)

@hookimpl
def nanopre_datasets(register):
    register("files", Files)

@hookimpl
def nanopre_parallel(register):
    register("ddp", DDP)

@hookimpl
def nanopre_loggers(register):
    register("console", Logger)
    register("jsonl", Logger)
'''


@pytest.fixture(autouse=True, scope="module")
def light_checkout(tmp_path_factory):
    """The plugins above in place of the checkout's, in an empty current folder; tests of the real ones undo it."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "plugins").mkdir()
    (folder / "plugins" / "all.py").write_text(CHECKOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "CHECKOUT", folder / "plugins")
        patch.setattr(plugins, "metadata", SimpleNamespace(entry_points=lambda group: []))
        patch.chdir(folder)
        yield


def read(text: str = "", *overrides: str) -> Config:
    Path("x.toml").write_text(text, encoding="utf-8")
    return load("x.toml", overrides)[0]


def refused(text: str = "", *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        read(text, *overrides)
    sentence = str(error.value)
    assert sentence.count("\n") == 0, sentence
    return sentence


# Mistakes.

MISTAKES = [
    ("", ["--seed=-1"], "x.toml, --seed: seed = -1 must be at least 0 and below 2**63."),
    ("", ["--plugins=sgd.py"], '--plugins: is "sgd.py"; it must be a list, each item a string.'),
    # In the file: the file, the key, the nearest valid name.
    ("[train]\nstpes = 3", [], "x.toml: train.stpes: unknown key; did you mean train.steps?"),
    ("[trian]\nsteps = 3", [], "x.toml: trian: unknown section or key; did you mean train?"),
    ("steps = 3", [], "x.toml: steps: unknown key; did you mean train.steps?"),
    ("[model]\nd_modl = 3", [], "x.toml: model.d_modl: unknown key; did you mean model.d_model?"),
    ("[model]\nzzz = 3", [], "x.toml: model.zzz: unknown key; choose from d_model, n_heads, rope_theta."),
    ('[model]\nname = "lama"', [], 'x.toml: model.name: there is no model "lama"; did you mean llama?'),
    ("[model]\nname = 3", [], "x.toml: model.name: is 3; it must be a string."),
    ("[parallel.dpp]", [], 'x.toml: parallel.dpp: there is no parallel "dpp"; did you mean ddp?'),
    (
        "[parallel.ddp]\nbucket = 1",
        [],
        "x.toml: parallel.ddp.bucket: unknown key; did you mean parallel.ddp.bucket_mb?",
    ),
    ("[parallel]\nddp = 3", [], "x.toml: parallel.ddp: is 3; it must be a section."),
    ("[loggers.consle]", [], 'x.toml: loggers.consle: there is no logger "consle"; did you mean console?'),
    ("[loggers.console]\nname = 'x'", [], "x.toml: loggers.console.name: unknown key; choose from every."),
    ("model = 3", [], "x.toml: model: is 3; it must be a section."),
    ("train = 3", [], "x.toml: train: is 3; it must be a section."),
    ("[[parallel]]", [], "x.toml: parallel: .*; it must be a section."),
    ("[train]\nsteps = 'ten'", [], 'x.toml: train.steps: is "ten"; it must be a whole number.'),
    ("[train]\nsteps = 1.5", [], "x.toml: train.steps: is 1.5; it must be a whole number."),
    ("[train]\nsteps = true", [], "x.toml: train.steps: is true; it must be a whole number."),
    ("[train]\nsteps = [1,\n 2]", [], "x.toml: train.steps: is [ 1, 2, ]; it must be a whole number."),
    ("[train.steps]", [], "x.toml: train.steps: is a section; it must be a whole number."),
    ("[train]\ngrad_clip = false", [], "x.toml: train.grad_clip: is false; it must be a number."),
    ("[train]\ngrad_clip = nan", [], "x.toml: train: grad_clip = nan must be at least 0."),
    ("[train]\nsteps = 0", [], "x.toml: train: steps = 0 must be at least 1."),
    ("[train]\ncompile = 'of'", [], 'x.toml: train.compile: is "of"; did you mean off?'),
    ("[train]\nprompt = 3", [], "x.toml: train.prompt: is 3; it must be a string."),
    ("[checkpoint]\nkeep_best = 1", [], "x.toml: checkpoint.keep_best: is 1; it must be true or false."),
    ("[schedule]\nmin_lr_ratio = 2", [], "x.toml: schedule: min_lr_ratio = 2.0 must be between 0 and 1."),
    ("[data]\nval_fraction = 1.0", [], "x.toml: data: val_fraction = 1.0 must be at least 0 and below 1."),
    (
        "[data]\ncorpus = 3",
        [],
        "x.toml: data.corpus: is 3; it must be a string or a list, each item a string or a table.",
    ),
    ("[data]\ncorpus = ['a', 3]", [], "x.toml: data.corpus.1: is 3; it must be a string."),
    (
        "[data.corpus]\npath = 'a'",
        [],
        'x.toml: data.corpus: is a table without a name; it must be like {name = "..."}.',
    ),
    ("[data.corpus]\nname = 'fils'", [], 'x.toml: data.corpus.name: there is no dataset "fils"; did you mean files?'),
    (
        "[data.corpus]\nname = 'files'\npth = ''",
        [],
        "x.toml: data.corpus.pth: unknown key; did you mean data.corpus.path?",
    ),
    ("[tokenizer]\nvocab_size = 360", [], "x.toml: tokenizer: vocab_size = 360 must be at least 361."),
    ("[model]\nn_heads = 5", [], "x.toml: model: n_heads = 5 does not divide d_model = 64."),
    ("name = 'a/b'", [], 'x.toml: name = "a/b" must be the name of a folder.'),
    ("name = '..'", [], 'x.toml: name = ".." must be the name of a folder.'),
    ("plugins = 'a.py'", [], 'x.toml: plugins: is "a.py"; it must be a list, each item a string.'),
    ("plugins = ['a.py']", [], "x.toml: plugins: no such file or folder: a.py."),
    ("[train\nsteps = 3", [], "x.toml: not valid TOML: .*line 1.*"),
    # On the command line: the flag.
    ("", ["--train.stpes=3"], "--train.stpes: unknown key; did you mean --train.steps?"),
    ("", ["--stpes.train=3"], "--stpes.train: unknown section or key; .*"),
    ("", ["--steps=3"], "--steps: unknown key; did you mean --train.steps?"),
    ("", ["--train.steps.x=3"], "--train.steps.x: is a section; it must be a whole number."),
    ("[train]\nsteps = 3", ["--train.steps.x=3"], "--train.steps.x: steps is not a section."),
    ("", ["--train.steps=6", "--train=3"], "--train: is 3; it must be a section."),
    ("", ["--train={steps = 0.5}", "--train.seq_len=3"], "--train: is 0.5; it must be a whole number."),
    ("", ["--train.steps=3", "--train={steps = 0.5}"], "--train: is 0.5; it must be a whole number."),
    ("", ["--train={steps = 3}", "--train.steps=0.5"], "--train.steps: is 0.5; it must be a whole number."),
    ("", ["--train.steps=ten"], '--train.steps: is "ten"; it must be a whole number.'),
    ("", ["--train.compile=of"], '--train.compile: is "of"; did you mean off?'),
    ("", ["--model.name=lama"], '--model.name: there is no model "lama"; did you mean llama?'),
    ("", ["--model={name='lama'}"], '--model: there is no model "lama"; did you mean llama?'),
    ("", ["--model.d_modl=3"], "--model.d_modl: unknown key; did you mean --model.d_model?"),
    ("", ["--model.n_heads=5"], "x.toml, --model.n_heads: model: n_heads = 5 does not divide d_model = 64."),
    ("", ["--name=a/b"], 'x.toml, --name: name = "a/b" must be the name of a folder.'),
    ("", ["--loggers.consle.every=2"], '--loggers.consle.every: there is no logger "consle"; did you mean console?'),
    ("", ["--parallel.dpp={}"], '--parallel.dpp: there is no parallel "dpp"; did you mean ddp?'),
    ("", ["--plugins=['a.py']"], "--plugins: no such file or folder: a.py."),
    ("", ["--data.corpus=[1, 2]"], "--data.corpus: is 1; it must be a string."),
    ("", ["--data.corpus.name=fils"], '--data.corpus.name: there is no dataset "fils"; did you mean files?'),
    (
        "[model]\nname = 'lama'",
        ["--model.name=gpt2"],
        'x.toml: model.name: there is no model "lama"; did you mean llama?',
    ),
    ("[model]\nd_modl = 3", ["--model.name=gpt2"], "x.toml: model.d_modl: unknown key; did you mean model.d_model?"),
]


@pytest.mark.parametrize("text, overrides, sentence", MISTAKES)
def test_a_mistake_is_one_sentence(text, overrides, sentence):
    pattern = ".*".join(map(re.escape, sentence.split(".*")))
    assert re.fullmatch(pattern, refused(text, *overrides)), refused(text, *overrides)


@pytest.mark.parametrize(
    "path, sentence",
    [
        ("some/x.tml", "some/x.tml: can't be read (No such file or directory); did you mean some/x.toml?"),
        ("none/x.toml", "none/x.toml: can't be read (No such file or directory); give the path of a TOML file."),
        ("some", "some: can't be read (Is a directory); choose from x.toml."),
        ("some/latin.toml", "some/latin.toml: not UTF-8, which TOML is."),
    ],
)
def test_a_file_that_cannot_be_read(path, sentence):
    Path("some").mkdir(exist_ok=True)
    Path("x.toml").touch()
    Path("some/x.toml").touch()
    Path("some/latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(UserError) as error:
        load(path)
    assert re.fullmatch(".*".join(map(re.escape, sentence.split(".*"))), str(error.value)), str(error.value)


CORE = {f.name: f.default_factory for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default_factory)}
KEYS = [f"{section}.{f.name}" for section, cls in CORE.items() for f in dataclasses.fields(cls)]
LETTERS = "abcdefghijklmnopqrstuvwxyz_"


def one_edit(word: str) -> set[str]:
    """Every word that one missing, wrong, extra or swapped letter makes of this one."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    dropped = {a + b[1:] for a, b in cuts if b}
    swapped = {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    changed = {a + letter + b[1:] for a, b in cuts if b for letter in LETTERS}
    return (dropped | swapped | changed | {a + letter + b for a, b in cuts for letter in LETTERS}) - {word, ""}


@given(key=st.sampled_from(KEYS), data=st.data(), by_flag=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_misspelt_key_is_answered_by_the_right_one(key, data, by_flag):
    section, name = key.split(".")
    others = {f.name for f in dataclasses.fields(CORE[section])} - {name}
    wrong = data.draw(st.sampled_from(sorted(word for word in one_edit(name) if not one_edit(word) & others)))
    if by_flag:
        sentence, place, prefix = refused("", f"--{section}.{wrong}=1"), f"--{section}.{wrong}", f"--{section}."
    else:
        sentence, place, prefix = refused(f"[{section}]\n{wrong} = 1"), f"x.toml: {section}.{wrong}", f"{section}."
    assert sentence == f"{place}: unknown key; did you mean {prefix}{name}?"


# Values.


def test_defaults():
    config = read()
    assert (config.name, config.seed, config.train.steps) == ("run", 1337, 1000)
    assert type(config.model).__name__ == "Llama" and config.model.d_model == 64
    assert list(config.loggers) == ["console", "jsonl"] and config.parallel == {}


def test_jsonl_is_always_among_the_loggers():
    assert list(read("[loggers]").loggers) == ["jsonl"]
    config = read("[loggers]\njsonl = {every = 3}")
    assert config.loggers["jsonl"].every == 3 and list(config.loggers) == ["jsonl"]


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--train.prompt=a bare string", "a bare string"),
        ("--train.prompt='quoted = \"TOML\"'", 'quoted = "TOML"'),
        ("--train.prompt=12", "12"),
        ("--train.prompt=1.50", "1.50"),
        ("--train.prompt=true", "true"),
        ("--train.prompt=2024-01-02", "2024-01-02"),
        ("--train.prompt=[1, 2]", "[1, 2]"),
        ("--train.prompt=", ""),
        ("--train.prompt=a = b", "a = b"),
        ("--train.prompt=two\nlines = 2", "two\nlines = 2"),
        ("--train.prompt=1\nlines = 2", "1\nlines = 2"),
        ("--train.steps=1_000", 1000),
        ("--train.grad_clip=2", 2.0),
        ("--train.grad_clip=5e-1", 0.5),
        ("--checkpoint.keep_best=false", False),
        ("--train.compile=on", "on"),
        ("--data.corpus=my/*.txt", "my/*.txt"),
        ("--data.corpus=['a.txt', 'b.txt']", ["a.txt", "b.txt"]),
        ("--data.corpus={name = 'files', limit = 2}", {"name": "files", "path": "somewhere", "limit": 2}),
        ("--objective.whole=7", 7),
        ("--objective.number=7", 7.0),
        ("--objective.numbers=[1, 2.5]", [1.0, 2.5]),
        ("--objective.perhaps=7", 7),
        ("--objective.table={a = {b = [1]}}", {"a": {"b": [1]}}),
        ("--name=7", "7"),
    ],
)
def test_the_value_of_a_flag(flag, value):
    config = read("", flag)
    for key in flag[2:].split("=")[0].split("."):
        config = getattr(config, key)
    assert config == value and type(config) is type(value)


def test_an_option_of_a_corpus_that_was_a_plain_name():
    config = read("[data]\ncorpus = 'files'", "--data.corpus.path=7")
    assert config.data.corpus == {"name": "files", "path": "7", "limit": 0}
    assert read("[data]\nval_corpus = 'files'", "--data.val_corpus.limit=7").data.val_corpus["limit"] == 7


def test_a_later_flag_wins():
    assert read("", "--train.steps=1", "--train.steps=2").train.steps == 2


# The table that TOML sees: strategies for each key of the core, and for the options of every type.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=8)
CORPUS_TABLES = st.fixed_dictionaries({"name": st.just("files"), "limit": st.integers(0, 9)})
TABLES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text("abcdef.-_ é", min_size=3, max_size=8),
        "seed": st.integers(0, 2**63 - 1),
        "model": st.one_of(
            st.fixed_dictionaries({}, optional={"d_model": st.integers(1, 9).map(lambda n: 8 * n)}),
            st.fixed_dictionaries({"name": st.just("gpt2")}, optional={"bias": st.booleans()}),
        ),
        "objective": st.fixed_dictionaries(
            {},
            optional={
                "whole": st.integers(-9, 9),
                "number": st.floats(allow_nan=False),
                "switch": st.booleans(),
                "text": TEXT,
                "choice": st.sampled_from(["a", "b"]),
                "numbers": st.lists(st.floats(-1e9, 1e9) | st.integers(-9, 9), max_size=3),
                "texts": st.lists(TEXT, max_size=3),
                "table": st.dictionaries(TEXT, st.integers(-9, 9) | TEXT | st.lists(st.booleans()), max_size=2),
                "perhaps": st.integers(-9, 9),
            },
        ),
        "data": st.fixed_dictionaries(
            {"corpus": TEXT | st.lists(TEXT, max_size=2) | CORPUS_TABLES},
            optional={"val_corpus": TEXT, "val_fraction": st.floats(0, 0.9), "text_key": TEXT},
        ),
        "schedule": st.fixed_dictionaries({"name": st.sampled_from(["constant", "linear", "cosine", "wsd"])}),
        "train": st.fixed_dictionaries(
            {}, optional={"steps": st.integers(1, 10**9), "prompt": TEXT, "grad_clip": st.integers(0, 3)}
        ),
        "parallel": st.dictionaries(st.just("ddp"), st.builds(lambda n: {"bucket_mb": n}, st.integers(1, 99))),
        "loggers": st.dictionaries(st.sampled_from(["console", "jsonl"]), st.just({})),
    },
)  # fmt: skip


@given(table=TABLES)
@settings(max_examples=60, deadline=None)
def test_what_is_saved_builds_the_same_config(table):
    config, _ = from_dict(table, "test")
    again, _ = from_dict(to_dict(config), "saved")
    assert to_dict(again) == to_dict(config)
    assert repr(again) == repr(
        config
    )  # with every plugin's instance; == compares classes, and each load makes them anew
    Path("saved.toml").write_text(to_toml(config), encoding="utf-8")
    assert repr(load("saved.toml")[0]) == repr(config)
    for section, options in table.items():  # nothing that was set got lost
        if isinstance(options, dict) and section != "data":
            for key, value in options.items():
                assert to_dict(config)[section][key] == value or section == "loggers"


def flat(table: dict, prefix: str = "") -> list[tuple[str, object]]:
    """The table's leaves by their dotted keys."""
    leaves = []
    for key, value in table.items():
        sections = isinstance(value, dict) and (not prefix or prefix in ("parallel.", "loggers."))
        leaves += flat(value, f"{prefix}{key}.") if sections and value else [(prefix + key, value)]
    return leaves


@given(table=TABLES)
@settings(max_examples=60, deadline=None)
def test_a_flag_equals_the_same_key_in_the_file(table):
    flags = []
    for key, value in flat(table):
        flags.append(f"--{key}={_inline(value)}")
    assert repr(read("", *flags)) == repr(from_dict(table, "test")[0])


def _inline(value: object) -> str:
    """A value in TOML that needs no section of its own."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_inline(k)} = {_inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(c):08x}" for c in value) + '"'
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def test_parse_override_is_toml_or_a_bare_string():
    assert parse_override("--a.b=[1]") == ("a.b", [1], "[1]")
    assert parse_override("--a=b=c") == ("a", "b=c", "b=c")


# Another plugin by flag.


def test_another_plugin_drops_the_options_that_are_the_first_ones_alone():
    text = "[model]\nname = 'llama'\nd_model = 8\nn_heads = 2"
    config = read(text, "--model.name=gpt2")
    assert to_dict(config)["model"] == {"name": "gpt2", "d_model": 8, "bias": True}
    assert to_dict(read(text, "--model.name=llama"))["model"]["n_heads"] == 2
    # The default's options too, where the file leaves the name out; never what a flag gives.
    assert to_dict(read("[model]\nn_heads = 2", "--model.name=gpt2"))["model"]["name"] == "gpt2"
    assert refused(text, "--model.name=gpt2", "--model.n_heads=2").startswith("--model.n_heads: unknown key; ")


def test_build_plugin_names_the_key():
    _, registry = from_dict({}, "test")
    assert build_plugin(registry, "dataset", {"name": "files", "limit": 3}, "data.corpus").limit == 3
    with pytest.raises(UserError, match=r'^data\.corpus\.name: there is no dataset "fils"; did you mean files\?$'):
        build_plugin(registry, "dataset", {"name": "fils"}, "data.corpus")
    with pytest.raises(UserError, match=r"^data\.corpus\.limt: unknown key; did you mean data\.corpus\.limit\?$"):
        build_plugin(registry, "dataset", {"name": "files", "limt": 3}, "data.corpus")


# The real plugins and configs.


@pytest.fixture
def real_checkout(monkeypatch):
    monkeypatch.setattr(plugins, "CHECKOUT", ROOT / "plugins")
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "configs").glob("*.toml")))
def test_the_configs_that_come_with_it_load(file, real_checkout):
    config, _ = load(ROOT / "configs" / file)
    assert tomli.loads(to_toml(config)) == to_dict(config)
    assert repr(from_dict(to_dict(config), "saved")[0]) == repr(config)


def test_every_plugin_that_comes_with_it_can_be_made_from_its_defaults(real_checkout):
    registry = plugins.load_plugins()
    for kind in ("objective", "model", "optimizer", "dataset", "parallel", "logger"):
        assert registry.offers(kind), kind
        for name in registry.offers(kind):
            build_plugin(registry, kind, {"name": name}, "test")


# Through the script.


def train(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_print_config_prints_what_loads_again():
    result = train("--print-config", "--train.steps=7", "--name=seven")
    assert (result.returncode, result.stderr) == (0, "")
    table = tomli.loads(result.stdout)
    assert table["train"]["steps"] == 7 and table["name"] == "seven" and table["model"]["name"] == "llama"


def test_list_plugins_lists_them():
    result = train("--list-plugins")
    assert (result.returncode, result.stderr) == (0, "")
    for line in ("objective clm  (plugins/objectives/clm.py)", "    lr: float = 0.0003", "logger jsonl  (plugins/"):
        assert f"\n{line}" in f"\n{result.stdout}"


def test_a_mistake_ends_the_script_with_one_line():
    result = train("configs/default.toml", "--train.stpes=7")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "train.py: --train.stpes: unknown key; did you mean --train.steps?\n"


@pytest.mark.parametrize("error", ["TypeError('no')", "KeyError('no')", "ValueError()"])
def test_a_plugin_that_fails_on_its_values_is_named(tmp_path, error):
    (tmp_path / "odd.py").write_text(
        "from dataclasses import dataclass\nfrom nanopre import hookimpl\n"
        '@dataclass\nclass Odd:\n    """Odd."""\n'
        f"    def __post_init__(self):\n        raise {error}\n"
        "    def build(self, model):\n        return []\n"
        "@hookimpl\ndef nanopre_optimizers(register):\n    register('odd', Odd)\n"
    )
    table = {"plugins": [str(tmp_path / "odd.py")], "optimizer": {"name": "odd"}}
    with pytest.raises(UserError, match=f"^test.toml: optimizer: Odd failed .{error.partition('(')[0]}: .*[.]$"):
        configs.from_dict(table, "test.toml")
