"""How plugins are found, checked, registered and named: each mistake is one sentence that names the plugin."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from nanopre import UserError, config as configs, hookspecs, plugins
from nanopre.hookspecs import KINDS, METHODS, OPTIONAL_METHODS
from nanopre.plugins import Registry, load_plugins

ROOT = Path(__file__).parent.parent

HEAD = """
from __future__ import annotations
from dataclasses import dataclass, field
from nanopre import hookimpl
"""

OPTIMIZER = '''
@dataclass
class Optimizer:
    """A line of doc.

    More of it.
    """

    lr: float = 0.5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])

    def build(self, model):
        return []
'''

OFFER = """
@hookimpl
def nanopre_optimizers(register):
    register("{name}", Optimizer)
"""

LOGGER = '''
@dataclass
class Logger:
    """Remember the calls."""

    @hookimpl
    def nanopre_step_end(self, step, metrics):
        self.seen = (step, metrics)

@hookimpl
def nanopre_loggers(register):
    register("logger", Logger)
'''


@pytest.fixture(autouse=True)
def empty_checkout(tmp_path, monkeypatch):
    """A checkout without plugins and no installed ones, and the current folder is empty."""
    monkeypatch.setattr(plugins, "CHECKOUT", tmp_path / "checkout")
    monkeypatch.setattr(plugins, "metadata", SimpleNamespace(entry_points=lambda group: []))
    monkeypatch.chdir(tmp_path)


def write(path: str, *parts: str, name: str = "mine") -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(HEAD + "".join(parts or (OPTIMIZER, OFFER.format(name=name))))
    return path


def install(monkeypatch, *entries: tuple[str, str], version: str = "1.2") -> None:
    """Entry points (name, value), all of a distribution "dist" whose modules are importable from the current folder."""
    monkeypatch.syspath_prepend(Path.cwd())
    dist = SimpleNamespace(name="dist", version=version)
    found = [metadata.EntryPoint(name, value, "nanopre")._for(dist) for name, value in entries]
    matching = SimpleNamespace(entry_points=lambda group: [e for e in found if e.group == group])
    monkeypatch.setattr(plugins, "metadata", matching)  # and not the library's own, which others read: Triton as it is imported


def refused(*paths: str) -> str:
    """The sentence with which the plugins are refused."""
    with pytest.raises(UserError) as error:
        load_plugins(paths)
    text = str(error.value)
    assert text.count("\n") == 0, text
    return text


# Where plugins come from.


def test_three_sources_in_their_order(monkeypatch):
    write("checkout/b/z.py", name="second")
    write("checkout/a/y.py", name="first")
    write("zz.py", name="third")
    write("folder/deep/x.py", name="fifth")
    write("folder/deep/a.py", name="fourth")
    for word in ("seventh", "sixth"):
        write(f"module_of_{word}.py", name=word)
    install(monkeypatch, ("b", "module_of_seventh"), ("a", "module_of_sixth"))
    registry = load_plugins(["zz.py", "folder"])
    assert list(registry.offers("optimizer")) == ["first", "second", "third", "fourth", "fifth", "sixth", "seventh"]
    sources = [offer.source for offer in registry.offers("optimizer").values()]
    assert sources == [
        "checkout/a/y.py", "checkout/b/z.py", "zz.py", "folder/deep/a.py", "folder/deep/x.py", "dist 1.2", "dist 1.2",
    ]  # fmt: skip


def test_names_that_begin_with_an_underscore_are_no_plugins():
    write("checkout/_helper.py", "raise RuntimeError")
    write("checkout/__init__.py", "raise RuntimeError")
    assert not load_plugins().offers("optimizer")


def test_a_file_that_two_sources_reach_is_loaded_once():
    write("checkout/mine.py")
    Path("link.py").symlink_to("checkout/mine.py")
    assert list(load_plugins(["checkout", "checkout/../checkout/mine.py", "link.py"]).versions()) == [
        "checkout/mine.py"
    ]


def test_one_module_with_two_entry_points_is_loaded_once(monkeypatch):
    write("module_of_two_entries.py")
    install(monkeypatch, ("a", "module_of_two_entries"), ("b", "module_of_two_entries"))
    assert list(load_plugins().offers("optimizer")) == ["mine"]


def test_a_source_outside_the_current_folder_is_named_by_its_whole_path(tmp_path, monkeypatch):
    write("mine.py")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_plugins([tmp_path / "mine.py"]).offers("optimizer")["mine"].source == str(tmp_path / "mine.py")


@pytest.mark.parametrize(
    "path, sentence",
    [
        ("nowhere.py", "--plugins: no such file or folder: nowhere.py."),
        ("notes.txt", "--plugins: notes.txt is not a Python file (.py) or a folder."),
    ],
)
def test_a_path_that_is_no_plugin(path, sentence):
    Path("notes.txt").touch()
    with pytest.raises(UserError) as error:
        load_plugins([path], where="--plugins")
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "body, problem",
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("def f(:", r"SyntaxError: .*line 5"),
    ],
)
def test_a_plugin_that_fails_to_import_is_named_with_the_exception(body, problem, monkeypatch):
    write("mine.py", body)
    before = set(sys.modules)
    assert re.fullmatch(rf"mine\.py: this plugin failed to import \({problem}.*\)\.", refused("mine.py"))
    assert not [name for name in set(sys.modules) - before if "nanopre_plugin" in name]
    write("module_of_failure.py", body)
    install(monkeypatch, ("a", "module_of_failure"))
    assert re.fullmatch(rf"dist 1\.2: the plugin module_of_failure failed to import \({problem}.*\)\.", refused())


# What the registry tells.


def test_describe_lists_kind_name_source_doc_and_options():
    write("mine.py", OPTIMIZER, OFFER.format(name="mine"), LOGGER)
    assert load_plugins(["mine.py"]).describe() == (
        "optimizer mine  (mine.py)\n"
        "    A line of doc.\n"
        "    lr: float = 0.5\n"
        "    betas: list[float] = [0.9, 0.95]\n"
        "\n"
        "logger logger  (mine.py)\n"
        "    Remember the calls."
    )


def test_versions_are_hashes_of_files_and_versions_of_packages(monkeypatch):
    write("mine.py")
    write("module_of_version.py", name="packaged")
    install(monkeypatch, ("a", "module_of_version"), version="3.4")
    first = load_plugins(["mine.py"]).versions()
    assert first.keys() == {"mine.py", "dist 3.4"} and first["dist 3.4"] == "3.4"
    assert re.fullmatch("[0-9a-f]{12}", first["mine.py"])
    assert load_plugins(["mine.py"]).versions() == first
    write("mine.py", OPTIMIZER, OFFER.format(name="mine"), "# changed")
    assert load_plugins(["mine.py"]).versions()["mine.py"] != first["mine.py"]


def test_get_names_the_nearest(monkeypatch):
    write("mine.py")
    registry = load_plugins(["mine.py"])
    assert registry.get("optimizer", "mine", "x.toml").__name__ == "Optimizer"
    for kind, name, hint in (
        ("optimizer", "min", "did you mean mine?"),
        ("optimizer", "zzz", "choose from mine."),
        ("analyzer", "kaplan", "there is none to choose from."),
    ):
        with pytest.raises(UserError) as error:
            registry.get(kind, name, "x.toml: here")
        assert str(error.value) == f'x.toml: here: there is no {kind} "{name}"; {hint}'


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_offered_and_needs_its_methods(kind):
    hook, methods = KINDS[kind], METHODS[kind] or ("nanopre_run_end",)
    mark = "    @hookimpl\n" if kind == "logger" else ""
    body = "".join(f"{mark}    def {method}(self): pass\n" for method in methods)
    offer = f"@hookimpl\ndef {hook}(register):\n    register('mine', Mine)\n"
    head = '@dataclass\nclass Law:\n    a: float\n@dataclass\nclass Mine:\n    """Doc."""\n    phase = "last"\n'
    head += '    law = Law\n    definition = "all parameters"\n'
    write("mine.py", head, body, offer)
    assert load_plugins(["mine.py"]).offers(kind)["mine"].cls.__doc__ == "Doc."
    for method in METHODS[kind]:
        write("mine.py", head, body.replace(method, "other"), offer)
        assert refused("mine.py") == f'mine.py: {kind} "mine": has no method {method}, which every {kind} needs.'


def test_a_parallel_strategy_needs_a_phase_that_there_is():
    text = '@dataclass\nclass Mine:\n    """Doc."""\n    phase = "late"\n    def apply(self): pass\n'
    write("mine.py", text, "@hookimpl\ndef nanopre_parallel(register):\n    register('mine', Mine)\n")
    assert refused("mine.py") == (
        'mine.py: parallel "mine": has no phase, which must be one of pipeline, tensor, memory, data, last.'
    )


def test_an_analyzer_needs_a_law_and_its_definition():
    law = "@dataclass\nclass Law:\n    a: float\n"
    mine = '@dataclass\nclass Mine:\n    """Doc."""\n    definition = "words"\n    law = Law\n    def fit(self, runs): pass\n'
    offer = "@hookimpl\ndef nanopre_analyzers(register):\n    register('mine', Mine)\n"
    for line, said in (
        ("    law = Law\n", "has no attribute law, the dataclass of estimates that its fit returns."),
        ("    definition = \"words\"\n", "has no attribute definition, which says what counts as parameters and FLOPs."),
    ):
        write("mine.py", law, mine.replace(line, ""), offer)
        assert refused("mine.py") == f'mine.py: analyzer "mine": {said}'


# Classes that are refused.


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        ("@dataclass\n", "", "is not a dataclass, whose fields are the keys of its TOML section."),
        ("lr: float = 0.5", "lr: float", "the field lr has no default."),
        ("lr: float", "name: float", 'has a field "name", the key by which the plugin itself is chosen.'),
        (
            "lr: float = 0.5",
            "lr: tuple[int] = ()",
            r"the field lr can't be a key of TOML; its type must be made of .*\.",
        ),
        ("lr: float = 0.5", "lr: float = field(default=1, init=False)", r"the field lr can't be a key of TOML; .*"),
        ('"""A line of doc.\n\n    More of it.\n    """', "", "has no docstring; .*"),
        ('"""A line of doc.\n\n    More of it.\n    """', '"   "', "has no docstring; .*"),
        ("def build", "def builds", "has no method build, which every optimizer needs."),
        ("def build", "build = 3\n    def builds", "has no method build, which every optimizer needs."),
    ],
)
def test_a_class_that_cannot_be_configured_or_used_is_refused(old, new, sentence):
    assert old in OPTIMIZER
    write("mine.py", OPTIMIZER.replace(old, new), OFFER.format(name="mine"))
    assert re.fullmatch(rf'mine\.py: optimizer "mine": {sentence}', refused("mine.py"))


def test_a_subclass_needs_a_docstring_of_its_own():
    write(
        "mine.py", OPTIMIZER, "class Child(Optimizer): pass\n", OFFER.format(name="mine").replace("Optimizer", "Child")
    )
    assert "has no docstring" in refused("mine.py")


def test_the_same_name_twice_names_both_places():
    write("a.py", name="twice")
    write("b.py", name="twice")
    assert refused("a.py", "b.py") == (
        'b.py: offers the optimizer "twice", which a.py offers already; rename one or remove one.'
    )
    write("a.py", OPTIMIZER, OFFER.format(name="twice"), '    register("twice", Optimizer)')
    assert refused("a.py") == 'a.py: offers the optimizer "twice", which a.py offers already; rename one or remove one.'


def test_the_same_name_in_two_kinds_is_two_plugins():
    write("a.py", OPTIMIZER, OFFER.format(name="mine"), LOGGER.replace('"logger"', '"mine"'))
    registry = load_plugins(["a.py"])
    assert list(registry.offers("optimizer")) == list(registry.offers("logger")) == ["mine"]


# pluggy's traps: what it would pass over without a word.


TRAPS = {
    "misspelt": (
        "@hookimpl\ndef nanopre_step_ends(run): pass",
        r"there is no hook nanopre_step_ends; did you mean nanopre_step_end\?",
    ),
    "misspelt beyond recognition": (
        "@hookimpl\ndef when_done(run): pass",
        "there is no hook when_done; choose from nanopre_analyzers, .*, nanopre_step_end.",
    ),
    "misspelt and without its mark": (
        "def nanopre_optimiser(register): pass",
        r"there is no hook nanopre_optimiser; did you mean nanopre_optimizers\?",
    ),
    "without its mark": (
        "def nanopre_step_end(run): pass",
        r"nanopre_step_end lacks the mark @hookimpl \(from nanopre import hookimpl\).",
    ),
    "a default": (
        "@hookimpl\ndef nanopre_step_end(run, step=0): pass",
        "nanopre_step_end: the argument step has a default, so it would never be given its value; remove the default.",
    ),
    "an unknown argument": (
        "@hookimpl\ndef nanopre_step_end(run, metric): pass",
        r"nanopre_step_end: the hook has no argument metric; did you mean metrics\?",
    ),
}


@pytest.mark.parametrize("body, sentence", TRAPS.values(), ids=TRAPS)
def test_traps_in_a_module(body, sentence):
    write("mine.py", body)
    assert re.fullmatch(rf"mine\.py: {sentence}", refused("mine.py"))


@pytest.mark.parametrize("body, sentence", TRAPS.values(), ids=TRAPS)
def test_traps_in_a_logger_are_found_before_it_is_chosen(body, sentence):
    method = "\n".join("    " + line for line in body.replace("(", "(self, ", 1).splitlines())
    right = "    @hookimpl\n    def nanopre_run_end(self): pass\n"
    write(
        "mine.py",
        f'@dataclass\nclass Logger:\n    """Doc."""\n{method}\n{right}',
        LOGGER[LOGGER.index("\n@hookimpl") :],
    )
    assert re.fullmatch(rf'mine\.py: logger "logger": {sentence}', refused("mine.py"))


def test_a_logger_without_a_hook():
    write("mine.py", LOGGER.replace("    @hookimpl\n    def nanopre_step_end", "    def step_end"))
    assert re.fullmatch(r'mine\.py: logger "logger": has no lifecycle hook \(.*\)\.', refused("mine.py"))


def test_a_hook_under_another_name_is_found_by_its_specname():
    write("mine.py", "@hookimpl(specname='nanopre_step_end')\ndef note(metrics): metrics['noted'] = 1.0")
    metrics = {}
    load_plugins(["mine.py"]).hook.nanopre_step_end(run=None, step=3, metrics=metrics)
    assert metrics == {"noted": 1.0}


@pytest.mark.parametrize(
    "second",
    [
        '    register("bad", int)',
        "    raise RuntimeError('half-way')",
        "    register('bad')",
        '@hookimpl\ndef nanopre_models(register):\n    register("model", Optimizer)\n    1 / 0',
        "@hookimpl(wrapper=True)\ndef nanopre_run_end(run): pass",  # refused by pluggy itself: a wrapper must yield
    ],
)
def test_a_registration_that_fails_half_way_leaves_nothing_behind(second):
    def module(name: str, text: str) -> ModuleType:
        result = ModuleType(name)
        exec(compile(text, name, "exec", dont_inherit=True), vars(result))
        return result

    body = HEAD.replace("from __future__ import annotations\n", "") + OPTIMIZER.replace("list[float]", "list")
    steps = "steps = []\n@hookimpl\ndef nanopre_step_end(step): steps.append(step)\n"
    before, failing, after = (
        module("before", body + steps + OFFER.format(name="before")),
        module("failing", body + steps + OFFER.format(name="good") + second),
        module("after", body + steps + OFFER.format(name="good")),
    )
    registry = Registry()
    registry.add(before, "before.py", "1")
    with pytest.raises(UserError, match=r"^failing\.py: "):
        registry.add(failing, "failing.py", "1")
    registry.hook.nanopre_step_end(run=None, step=1, metrics={})
    registry.add(after, "after.py", "1")
    registry.hook.nanopre_step_end(run=None, step=2, metrics={})
    assert (before.steps, failing.steps, after.steps) == ([1, 2], [], [2])
    assert {name: offer.source for name, offer in registry.offers("optimizer").items()} == {
        "before": "before.py",
        "good": "after.py",
    }
    assert not registry.offers("model") and list(registry.versions()) == ["before.py", "after.py"]


def test_no_hook_is_firstresult():
    # The first of two answers would win in silence; what is exclusive goes by its name instead (tested above).
    specs = {name: spec.nanopre_spec for name, spec in vars(hookspecs).items() if hasattr(spec, "nanopre_spec")}
    assert set(KINDS.values()) < set(specs)
    assert not any(options["firstresult"] or options["historic"] for options in specs.values())


# Lifecycle hooks.


def test_a_chosen_logger_gets_the_hooks_by_keyword_and_an_unchosen_one_does_not():
    write("mine.py", LOGGER, "    register('other', Logger)")
    registry = load_plugins(["mine.py"])
    chosen, other = (registry.get("logger", name, "")() for name in ("logger", "other"))
    registry.register_instance(chosen, "logger")
    registry.hook.nanopre_step_end(run=None, step=7, metrics={"loss": 1.5})
    registry.hook.nanopre_run_end(run=None, status="finished")  # which the logger does not have
    assert chosen.seen == (7, {"loss": 1.5}) and not hasattr(other, "seen")
    with pytest.raises(TypeError):
        registry.hook.nanopre_step_end(None, 7, {})


def test_a_logger_may_take_any_of_the_arguments():
    write("mine.py", LOGGER.replace("self, step, metrics", "self").replace("(step, metrics)", "True"))
    registry = load_plugins(["mine.py"])
    logger = registry.get("logger", "logger", "")()
    registry.register_instance(logger, "logger")
    registry.hook.nanopre_step_end(run=None, step=7, metrics={})
    assert logger.seen


def test_tracing_goes_to_stderr():
    write("mine.py", "@hookimpl\ndef nanopre_step_end(step): pass")
    code = (
        "from nanopre import plugins; from pathlib import Path; plugins.CHECKOUT = Path('none')\n"
        "plugins.load_plugins(['mine.py']).hook.nanopre_step_end(run=None, step=41, metrics={})"
    )

    def run(**environment: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "NANOPRE_TRACE": "0"} | environment
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    traced = run(NANOPRE_TRACE="1")
    assert "nanopre_step_end" in traced.stderr and "41" in traced.stderr and traced.stdout == ""
    quiet = run()
    assert quiet.stderr == quiet.stdout == ""


def test_the_plugin_machinery_does_not_import_torch():
    # --print-config answers in seconds only as long as the core's own rooms leave the heavy imports to plugins.
    code = "import nanopre.plugins, nanopre.config, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


# docs/plugins.md against the code.


DOCUMENT = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
SPECS = {name: spec for name, spec in vars(hookspecs).items() if hasattr(spec, "nanopre_spec")}


def sections() -> dict[str, str]:
    """The document's parts by their headings."""
    parts = re.split(r"^##+ (.*)$", DOCUMENT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_document_has_every_hook_with_its_signature_and_no_other():
    signatures = {f"`{name}({', '.join(inspect.signature(spec).parameters)})`" for name, spec in SPECS.items()}
    assert {heading for heading in sections() if heading.startswith("`")} == signatures


@pytest.mark.parametrize("kind", KINDS)
def test_the_document_names_every_method_of_a_kind(kind):
    methods = METHODS[kind]
    section = sections()[f"`{KINDS[kind]}(register)`"]
    assert tuple(re.findall(r"^- `(\w+)\(", section, flags=re.MULTILINE)) == methods + OPTIONAL_METHODS.get(kind, ())
    (row,) = re.findall(rf"^\| {kind} \|.*\| (.*) \|$", DOCUMENT, flags=re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)`", row)) == methods


def test_the_document_has_every_field_of_run():
    table = re.search(r"\| field \| \|\n(.*?)\n\n", DOCUMENT, flags=re.DOTALL)[1]
    named = [name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(hookspecs.Run))


def test_the_documents_examples_of_lifecycle_hooks_work(tmp_path):
    lifecycle = [name for name in SPECS if name not in KINDS.values()]
    examples = []
    for heading, text in sections().items():
        if heading.startswith("`") and heading[1:].split("(")[0] in lifecycle:
            (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
            examples.append(textwrap.indent(example, "    "))
    assert len(examples) == len(lifecycle)
    head = '@dataclass\nclass Mine:\n    """Doc."""\n    phase = "last"\n'
    write("mine.py", head, *examples, "@hookimpl\ndef nanopre_loggers(register):\n    register('mine', Mine)\n")
    registry = load_plugins(["mine.py"])
    registry.register_instance(registry.get("logger", "mine", "")(), "mine")
    run = SimpleNamespace(dir=tmp_path, rank=0)
    registry.hook.nanopre_run_start(run=run)
    registry.hook.nanopre_step_end(run=run, step=1, metrics={"loss": 2.5})
    registry.hook.nanopre_evaluation_end(run=run, step=1, metrics={"loss": 2.0})
    registry.hook.nanopre_checkpoint_saved(run=run, step=1, path=tmp_path / "step_1")
    registry.hook.nanopre_run_end(run=run, status="finished")
    assert (tmp_path / "notes-0.txt").read_text() == f"1 2.5\nstep 1 is in {tmp_path / 'step_1'}\n"


def test_the_documents_whole_example_works(monkeypatch):
    torch = pytest.importorskip("torch")
    for path, text in re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", DOCUMENT, flags=re.DOTALL):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text)
    monkeypatch.setattr(plugins, "CHECKOUT", ROOT / "plugins")
    config, registry = configs.load("my.toml", ["--optimizer.momentum=0.95"])
    assert registry.offers("optimizer")["sgd"].source == "my_plugins/sgd.py"
    (optimizer,) = config.optimizer.build(torch.nn.Linear(2, 1))
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], len(group["params"])) == (0.05, 0.95, 2)


def test_the_sentences_in_the_document_are_those_that_are_said():
    table = sections()["Mistakes, and what is said about them"]
    sentences = dict(re.findall(r"^\| (.*?) \| `(.*)` \|$", table, flags=re.MULTILINE))
    sgd = OFFER.format(name="sgd")
    write("a.py", OPTIMIZER, sgd)
    for mistake, parts in {
        "a hook's name is misspelt": ["@hookimpl\ndef nanopre_step_ends(run): pass"],
        "`@hookimpl` is forgotten": ["def nanopre_step_end(run): pass"],
        "an argument is misspelt": ["@hookimpl\ndef nanopre_step_end(metric): pass"],
        "an argument has a default": ["@hookimpl\ndef nanopre_step_end(step=0): pass"],
        "a name is offered twice": [OPTIMIZER, sgd],
        "a method is missing": [OPTIMIZER.replace("build", "make"), sgd],
        "a field has no default": [OPTIMIZER.replace("lr: float = 0.5", "lr: float"), sgd],
        "the import fails": ["raise ModuleNotFoundError(\"No module named 'wandb'\")"],
    }.items():
        write("b.py", *parts)
        assert refused("a.py", "b.py") == f"b.py: {sentences.pop(mistake)}"
    assert not sentences
