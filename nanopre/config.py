"""TOML and --section.key=value to dataclasses; what is not known or not possible is refused in one sentence.

The core's sections are the dataclasses below. The sections that a plugin fills ([model], [objective], [optimizer], and
each entry of [parallel] and [loggers]) have the fields of the plugin's class.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli
import tomli_w

from nanopre import UserError
from nanopre.plugins import Registry, describe, load_plugins, nearest


def at_least(section: object, **bounds: float) -> None:
    """Raise ValueError for a field that is below its bound."""
    for name, bound in bounds.items():
        value = getattr(section, name)
        if not value >= bound:  # so that nan is refused, too
            raise ValueError(f"{name} = {value} must be at least {bound}")
        if value == math.inf:
            raise ValueError(f"{name} = {value} must be finite")


def fraction(section: object, *names: str) -> None:
    """Raise ValueError for a field that is not between 0 and 1."""
    for name in names:
        if not 0 <= getattr(section, name) <= 1:
            raise ValueError(f"{name} = {getattr(section, name)} must be between 0 and 1")


def below_one(section: object, *names: str) -> None:
    """Raise ValueError for a field that is not at least 0 and below 1."""
    for name in names:
        if not 0 <= getattr(section, name) < 1:
            raise ValueError(f"{name} = {getattr(section, name)} must be at least 0 and below 1")


@dataclass
class Data:
    corpus: str | list[str] | dict[str, Any] = "stdlib"  # a dataset plugin, file or glob, several, or {name = ..., ...}
    val_corpus: str | list[str] | dict[str, Any] = ""  # likewise; empty: a part of the corpus
    val_fraction: float = 0.05  # of the corpus's documents; 0: no validation
    text_key: str = "text"  # of a .jsonl line or .parquet column
    cache_dir: str = "cache"  # where tokenised corpora and trained tokenizers are kept

    def __post_init__(self):
        below_one(self, "val_fraction")


@dataclass
class Tokenizer:
    name: Literal["bpe", "bytes", "chars", "gpt2"] = "bpe"
    vocab_size: int = 4096  # bpe: tokens in all, with the 256 bytes and the 105 special tokens
    path: str = ""  # gpt2: a file of its ranks, for use without a network

    def __post_init__(self):
        if self.name == "bpe":
            at_least(self, vocab_size=361)


@dataclass
class Schedule:
    name: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1  # the last learning rate by the peak
    decay_fraction: float = 0.2  # wsd: the part of the run, at its end, in which the rate falls

    def __post_init__(self):
        at_least(self, warmup_steps=0)
        fraction(self, "min_lr_ratio", "decay_fraction")


@dataclass
class Train:
    steps: int = 1000
    batch_size: int = 32  # sequences in a global step
    micro_batch_size: int = 0  # sequences at a time on one rank; 0: the rank's whole share
    seq_len: int = 256  # tokens
    grad_clip: float = 1.0  # greatest norm of the gradient; 0: no limit
    eval_interval: int = 200  # steps
    eval_tokens: int = 0  # so many tokens from the start of the validation split; 0: all of it
    log_interval: int = 10  # steps between lines where the output is no terminal
    device: str = "auto"  # cpu, cuda, mps
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of products
    weights: Literal["float32", "bfloat16"] = "float32"  # and gradients; bfloat16: half of the memory, products in bfloat16
    compile: Literal["auto", "on", "off"] = "auto"
    attention: Literal["auto", "fused", "products"] = "auto"  # torch's kernel, or on a CPU plain products of matrices
    threads: int = 0  # of a CPU; 0: OMP_NUM_THREADS, or all of its cores
    keep_freed_memory: bool = True  # on a CPU, what a step frees is not given back to the system but used by the next
    timeout: float = 600.0  # seconds that one process waits for another
    max_skipped_steps: int = 10  # in a row, for a loss or gradient that is not finite, before the run stops
    samples: int = 2  # printed at the end
    prompt: str = ""  # that the samples continue; "": a new document

    def __post_init__(self):
        at_least(self, steps=1, batch_size=1, micro_batch_size=0, seq_len=1, grad_clip=0, eval_interval=1)
        if not 0 < self.timeout < 1e8:
            raise ValueError(f"timeout = {self.timeout} must be above 0 and finite")
        at_least(self, eval_tokens=0, log_interval=1, threads=0, max_skipped_steps=0, samples=0)
        if self.weights == "bfloat16" and self.precision == "float32":
            raise ValueError('weights = "bfloat16" needs precision = "bfloat16" or "auto"')


@dataclass
class Checkpoint:
    interval: int = 500  # steps; 0: at the end only
    keep_last: int = 2  # checkpoints
    keep_best: bool = True  # besides, the one with the least validation loss
    async_save: bool = False  # go on with training while files are written, from a copy of everything in the CPU's memory

    def __post_init__(self):
        at_least(self, interval=0, keep_last=1)


def plugin(kind: str, name: str) -> Any:
    """A section that a plugin of this kind fills; `name` where the section names none."""
    return field(default=None, metadata={"kind": kind, "name": name})


@dataclass
class Config:
    name: str = "run"  # of the run's folder
    seed: int = 1337
    out_dir: str = "runs"
    plugins: list[str] = field(default_factory=list)  # files and folders of plugins beside plugins/
    init_from: str = ""  # a run or one checkpoint: its model, tokenizer, seq_len and weights are where this run starts
    init_weights: bool = True  # false: not its weights; the same model from scratch, to compare with
    model: Any = plugin("model", "llama")
    objective: Any = plugin("objective", "clm")
    data: Data = field(default_factory=Data)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    optimizer: Any = plugin("optimizer", "adamw")
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    parallel: dict[str, Any] = field(default_factory=dict, metadata={"kind": "parallel"})
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    loggers: dict[str, Any] = field(default_factory=dict, metadata={"kind": "logger"})

    def __post_init__(self):
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ValueError(f'name = "{self.name}" must be the name of a folder')
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed} must be at least 0 and below 2**63")


Inherit = Callable[[str], dict[str, Any]]


def load(path: str | Path, overrides: Sequence[str] = (), inherit: Inherit | None = None) -> tuple[Config, Registry]:
    """Read a TOML file, apply overrides like "--train.steps=100", load the plugins, check and build everything.

    inherit: from `init_from` to the config of that run, whose model, tokenizer and seq_len are then the defaults
    (nanopre.checkpoint.read_config). A run's own config.toml is whole without: there `init_from` is only a note.
    Raises UserError: one sentence with the file or flag, the key, and what would be right.
    """
    return _Builder(str(path), [parse_override(text) for text in overrides]).build(read_toml(path), inherit)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The table in a TOML file. Raises UserError where there is none."""
    try:
        return tomli.loads(Path(path).read_text(encoding="utf-8-sig"))
    except tomli.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8, which TOML is.") from None
    except OSError as error:
        beside = sorted(str(file) for file in Path(path).parent.glob("*.toml") if file.name != "pyproject.toml")
        if "=" in str(path) and not str(path).endswith(".toml"):
            hint = f"a key is set as --{path}."
        else:
            hint = nearest(str(path), beside) if beside else "give the path of a TOML file."
        raise UserError(f"{path or 'a config file without a name'}: can't be read ({error.strerror}); {hint}") from None


def section(cls: type, table: Any, where: str, key: str) -> Any:
    """An instance of a dataclass from a table, each value checked against its type. Messages name `where` and
    `key`."""
    builder = _Builder(where, [])
    return builder.section(cls, builder._table(table, key), key)


def from_dict(table: dict[str, Any], where: str) -> tuple[Config, Registry]:
    """As load, from a dict that `to_dict` made. `where` is what messages name."""
    return _Builder(where, []).build(table)


def build_plugin(registry: Registry, kind: str, table: dict[str, Any], where: str) -> Any:
    """A plugin's instance from {"name": ..., option: ...}. `where` is the key that messages name."""
    return _Builder("", []).plugin(registry, kind, table, where)


def parse_override(text: str) -> tuple[str, Any, str]:
    """"--train.steps=100" to (key, value, text of the value). The value is TOML; what is not is a bare string."""
    key, _, value = text.partition("=")
    try:
        table = tomli.loads(f"value = {value}")
    except tomli.TOMLDecodeError:
        return key[2:], value, value
    return key[2:], table["value"] if len(table) == 1 else value, value


def whole_key(name: str) -> str | None:
    """The key that is known by its last part alone: "train.steps" of "steps". None where no section of the core has it."""
    return next((f"{f.name}.{name}" for f in dataclasses.fields(Config) if name in _field_names(f.name)), None)


class _Builder:
    """Builds a Config from a table, and knows which file or flag set each key, to name it where it is wrong."""

    def __init__(self, where: str, overrides: list[tuple[str, Any, str]]):
        self.where = where
        self.overrides = overrides
        self.flags = {key: text for key, _, text in overrides}  # the text, for a string that looks like a number

    def build(self, table: dict[str, Any], inherit: Inherit | None = None) -> tuple[Config, Registry]:
        in_file = table
        for key, value, _ in self.overrides:
            table = self._override(table, key.split("."), value, key)
        if inherit and table.get("init_from"):
            table = self._inherited(table, inherit(self.value(str, table["init_from"], "init_from")))
        paths = self.value(list[str], table.get("plugins", []), "plugins")
        registry = load_plugins(paths, where=self.place("plugins"))

        fields = {f.name: f for f in dataclasses.fields(Config)}
        self._check_keys(table, list(fields), "")
        values: dict[str, Any] = {}
        for name, f in fields.items():
            kind = f.metadata.get("kind")
            section = table.get(name, {})
            if kind and not isinstance(section, dict):
                raise self.error(name, f"is {_toml(section)}", "it must be a section.")
            if kind in ("parallel", "logger"):
                chosen = {"console": {}} if kind == "logger" and name not in table else section
                keys = {n: f"{name}.{n}" for n in chosen}
                values[name] = {n: self._build(registry, kind, n, chosen[n], keys[n], keys[n]) for n in chosen}
            elif kind:
                section = {"name": f.metadata["name"], **section}
                if f"{name}.name" in self.flags:
                    chosen_in_file = in_file.get(name, {}).get("name", f.metadata["name"])
                    section = self._drop_foreign(registry, kind, name, section, chosen_in_file)
                values[name] = self.plugin(registry, kind, section, name)
            elif name in table:
                values[name] = self.value(typing.get_type_hints(Config)[name], table[name], name)
        values["loggers"].setdefault("jsonl", registry.get("logger", "jsonl", self.where)())
        config = self._instance(Config, values, "")
        for key in ("corpus", "val_corpus"):
            corpus = getattr(config.data, key)
            if isinstance(corpus, dict):  # checked here, built where the corpus is prepared
                setattr(config.data, key, _table(self.plugin(registry, "dataset", corpus, f"data.{key}")))
        return config, registry

    def plugin(self, registry: Registry, kind: str, table: dict[str, Any], key: str) -> Any:
        """The instance that {"name": ..., option: ...} describes."""
        options = dict(table)
        if "name" not in options:
            raise self.error(key, "is a table without a name", 'it must be like {name = "..."}.')
        name = self.value(str, options.pop("name"), f"{key}.name")
        return self._build(registry, kind, name, options, key, f"{key}.name")

    def section(self, cls: type, table: dict[str, Any], key: str) -> Any:
        """An instance of the dataclass, each field checked against its type."""
        hints = typing.get_type_hints(cls)
        self._check_keys(table, [f.name for f in dataclasses.fields(cls)], key)
        return self._instance(cls, {n: self.value(hints[n], v, f"{key}.{n}") for n, v in table.items()}, key)

    def value(self, hint: Any, value: Any, key: str) -> Any:
        """The value if it is of the type; a whole number is also a float. Raises UserError that names the key."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            return self.section(hint, self._table(value, key), key)
        if hint is Any:
            return value
        if origin is Literal:
            if value not in arguments:
                raise self.error(key, f"is {_toml(value)}", nearest(str(value), [str(a) for a in arguments]))
            return value
        for one in arguments if origin in (typing.Union, types.UnionType) else (hint,):
            one_origin, one_arguments = typing.get_origin(one), typing.get_args(one)
            if one is float and isinstance(value, int) and not isinstance(value, bool):
                return float(value)
            if one_origin is list and isinstance(value, list):
                return [self.value(one_arguments[0], item, f"{key}.{i}") for i, item in enumerate(value)]
            if isinstance(value, one_origin or one) and not (one is int and isinstance(value, bool)):
                return value
        if key in self.flags and (hint is str or (origin is not list and str in arguments)):
            return self.flags[key]
        raise self.error(key, f"is {_toml(value)}", f"it must be {_words(hint)}.")

    def place(self, key: str) -> str:
        """Where the key was set: the last flag that set it or a whole with it, else a part of it, else the file and the key."""
        flags = [flag for flag, *_ in reversed(self.overrides)]
        wholes = [flag for flag in flags if f"{key}.".startswith(f"{flag}.")]
        parts = [flag for flag in flags if flag.startswith(f"{key}.")]
        return next((f"--{flag}" for flag in wholes + parts), _sentence(self.where, key))

    def error(self, key: str, problem: str, remedy: str) -> UserError:
        return UserError(f"{self.place(key)}: {problem}; {remedy}")

    def _build(self, registry: Registry, kind: str, name: str, options: Any, key: str, name_key: str) -> Any:
        cls = registry.get(kind, name, self.place(name_key))
        instance = self.section(cls, self._table(options, key), key)
        object.__setattr__(instance, "_plugin_name", name)  # for to_dict; also where the dataclass is frozen
        return instance

    def _override(self, table: dict[str, Any], parts: list[str], value: Any, key: str) -> dict[str, Any]:
        first, *rest = parts
        if rest:
            inner = table.get(first, {})
            if first in ("corpus", "val_corpus") and isinstance(inner, str):
                inner = {"name": inner}  # --data.corpus.path=... beside corpus = "shakespeare"
            if not isinstance(inner, dict):
                raise UserError(f"--{key}: {first} is not a section.")
            value = self._override(inner, rest, value, key)
        return {**table, first: value}

    def _inherited(self, table: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
        """The table with the model, tokenizer and seq_len of the run that this one starts from."""
        if "tokenizer" in table:
            raise self.error("tokenizer", "is set, but init_from brings its own",
                             "leave one of the two out; configs/finetune-*.toml have none.")  # fmt: skip
        model, train = (self._table(table.get(name, {}), name) for name in ("model", "train"))
        if model.get("name", name := old["model"]["name"]) != name:
            raise self.error("model.name", f"is {_toml(model['name'])}", f'init_from is a "{name}"; leave the name out.')
        train = {"seq_len": old["train"]["seq_len"], **train}
        return {**table, "model": {**old["model"], **model}, "tokenizer": old["tokenizer"], "train": train}

    def _drop_foreign(self, registry: Registry, kind: str, section: str, table: dict[str, Any], in_file: str) -> dict:
        """The table without the options of the plugin in the file that the plugin of the flag does not have."""
        old = registry.get(kind, str(in_file), f"{self.where}: {section}.name")
        new = registry.get(kind, str(table["name"]), f"--{section}.name")
        foreign = {f.name for f in dataclasses.fields(old)} - {f.name for f in dataclasses.fields(new)}
        return {k: v for k, v in table.items() if k not in foreign or f"{section}.{k}" in self.flags}

    def _check_keys(self, table: dict[str, Any], known: list[str], section: str) -> None:
        for name in table:
            if name not in known:
                key = _join(section, name)
                is_flag = self.place(key).startswith("--")
                prefix = ("--" if is_flag else "") + (f"{section}." if section else "")
                whole = None if section else whole_key(name)
                hint = f"did you mean {prefix}{whole}?" if whole else nearest(name, known, prefix)
                raise self.error(key, "unknown key" if section or whole else "unknown section or key", hint)

    def _instance(self, cls: type, values: dict[str, Any], key: str) -> Any:
        try:
            return cls(**values)
        except UserError:
            raise
        except Exception as error:
            said = isinstance(error, ValueError) and str(error)  # anything else is a mistake in a plugin
            problem = said or f"{cls.__name__} failed ({describe(error)})"
            # The file and all flags that had a part in it: which of the values is wrong, the user knows.
            fields = [_join(key, f.name) for f in dataclasses.fields(cls)]
            flags = [f"--{flag}" for flag in self.flags if flag in (key, *fields)]
            raise UserError(_sentence(", ".join([self.where, *flags]), key, f"{problem}.")) from error

    def _table(self, value: Any, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(key, f"is {_toml(value)}", "it must be a section.")
        return value


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _sentence(*parts: str) -> str:
    return ": ".join(filter(None, parts))


def _field_names(section: str) -> list[str]:
    hint = typing.get_type_hints(Config)[section]
    return [f.name for f in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else []


def _toml(value: Any) -> str:
    """A value as it would stand in TOML."""
    return " ".join(tomli_w.dumps({"v": value})[4:].split()) if not isinstance(value, dict) else "a section"


def _words(hint: Any) -> str:
    """A type in words."""
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", type(None): ""}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(filter(None, map(_words, typing.get_args(hint))))
    if typing.get_origin(hint) is list:
        return "a list, each item " + _words(typing.get_args(hint)[0])
    return names.get(hint, "a table")


def to_dict(config: Config) -> dict[str, Any]:
    """The config as a table, every default filled in, a plugin's name beside its options: builds an equal one."""
    result = _table(config)
    for name, value in result.items():
        if dataclasses.is_dataclass(value):
            result[name] = _table(value)
        elif isinstance(value, dict):  # parallel and loggers: the key is the plugin's name
            result[name] = {key: {k: v for k, v in _table(p).items() if k != "name"} for key, p in value.items()}
    return result


def _table(instance: Any) -> dict[str, Any]:
    named = {"name": instance._plugin_name} if hasattr(instance, "_plugin_name") else {}
    values = {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}
    return named | {name: value for name, value in values.items() if value is not None}  # TOML has no null


def to_toml(config: Config) -> str:
    """The resolved config as a TOML file."""
    return tomli_w.dumps(to_dict(config))
