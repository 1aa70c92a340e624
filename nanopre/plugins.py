"""Find, check, register and name plugins.

Sources, in this order: the checkout's plugins/ (sorted, so that every rank has one order), the files and folders that
the config names, and installed packages with the entry-point group "nanopre".
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import os
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pluggy

from nanopre import UserError, hookspecs
from nanopre.hookspecs import KINDS, METHODS, PHASES

CHECKOUT = Path(__file__).parent.parent / "plugins"


def nearest(word: str, words: Sequence[str], prefix: str = "") -> str:
    """A hint to end a message with: the nearest of the valid words, with a prefix, or all of them."""
    if not words:
        return "there is none to choose from."
    match = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"did you mean {prefix}{match[0]}?" if match else f"choose from {', '.join(sorted(words))}."


@dataclass
class Offer:
    """A class that a plugin offers under a name."""

    name: str
    cls: type
    source: str  # the plugin's file, or its distribution and version


class Registry:
    """The loaded plugins: `hook` calls the lifecycle hooks, `get` finds a class by kind and name."""

    def __init__(self):
        self._manager = pluggy.PluginManager("nanopre")
        self._manager.add_hookspecs(hookspecs)
        self._offers: dict[str, dict[str, Offer]] = {kind: {} for kind in KINDS}
        self._versions: dict[str, str] = {}
        self.hook = self._manager.hook
        if os.environ.get("NANOPRE_TRACE") == "1":
            self._manager.trace.root.setwriter(sys.stderr.write)
            self._manager.enable_tracing()

    def offers(self, kind: str) -> dict[str, Offer]:
        """The plugins of a kind by name, in the order of their sources."""
        return self._offers[kind]

    def get(self, kind: str, name: str, where: str) -> type:
        """The class of this name. Raises UserError, which starts with `where`, the file or flag that names it."""
        if name not in self._offers[kind]:
            raise UserError(f'{where}: there is no {kind} "{name}"; {nearest(name, list(self._offers[kind]))}')
        return self._offers[kind][name].cls

    def add(self, plugin: ModuleType, source: str, version: str) -> None:
        """Check a plugin's module and take what it offers: all of it, or nothing and a UserError with its `source`."""
        check_implementations(plugin, source)
        offered: list[tuple[str, Offer]] = []
        try:
            self._manager.register(plugin)
            self._manager.check_pending()
            implementations = self._manager.get_hookcallers(plugin) or []
            for kind, hook_name in KINDS.items():
                if any(caller.name == hook_name for caller in implementations):
                    # Only this plugin's implementation runs: the others were asked when they were added.
                    others = [p for p in self._manager.get_plugins() if p is not plugin]
                    collect = self._manager.subset_hook_caller(hook_name, others)
                    collect(register=lambda name, cls, kind=kind: offered.append((kind, Offer(name, cls, source))))
            for i, (kind, offer) in enumerate(offered):
                check_class(kind, offer)
                earlier = [o for k, o in offered[:i] if k == kind and o.name == offer.name]
                earlier += [self._offers[kind][offer.name]] if offer.name in self._offers[kind] else []
                if earlier:
                    raise UserError(
                        f'{source}: offers the {kind} "{offer.name}", which {earlier[0].source} offers already; '
                        "rename one or remove one."
                    )
        except Exception as error:
            # pluggy keeps what it had registered before an error: take it back.
            if self._manager.is_registered(plugin):
                self._manager.unregister(plugin)
            if isinstance(error, UserError):
                raise
            raise UserError(f"{source}: can't be registered as a plugin ({describe(error)}).") from error
        for kind, offer in offered:
            self._offers[kind][offer.name] = offer
        self._versions[source] = version

    def register_instance(self, instance: object, name: str) -> None:
        """Let a chosen logger's methods take part in the lifecycle hooks."""
        self._manager.register(instance, f"logger:{name}")

    def versions(self) -> dict[str, str]:
        """Each plugin's version: of a file the start of its sha256, of a package its version."""
        return dict(self._versions)

    def describe(self) -> str:
        """All plugins for a reader: kind, name, source, a line of doc, and the options with their defaults."""
        lines = []
        for kind, offers in self._offers.items():
            for offer in sorted(offers.values(), key=lambda offer: offer.name):
                lines.append(f"{kind} {offer.name}  ({offer.source})")
                lines.append(f"    {(offer.cls.__doc__ or '').strip().splitlines()[0]}")
                for field in dataclasses.fields(offer.cls):
                    lines.append(f"    {field.name}: {type_name(field.type)} = {default(field)!r}")
                lines.append("")
        return "\n".join(lines).rstrip()


def load_plugins(paths: Sequence[str] = (), where: str = "plugins") -> Registry:
    """Load every plugin there is. `paths` are further files and folders; `where` is the key or flag that names them.

    Raises UserError for a path that is not there, and for a plugin that fails to import or is not right.
    """
    registry = Registry()
    files = list(plugin_files(CHECKOUT)) if CHECKOUT.is_dir() else []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{where}: no such file or folder: {path}.")
        if path.is_file() and path.suffix != ".py":
            raise UserError(f"{where}: {path} is not a Python file (.py) or a folder.")
        files += [path] if path.is_file() else plugin_files(path)
    for file in dict.fromkeys(file.resolve() for file in files):
        source = os.path.relpath(file) if file.is_relative_to(Path.cwd()) else str(file)
        registry.add(import_file(file, source), source, hashlib.sha256(file.read_bytes()).hexdigest()[:12])
    entries = {entry.value: entry for entry in metadata.entry_points(group="nanopre")}.values()
    for entry in sorted(entries, key=lambda entry: (entry.name, entry.value)):
        source = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        try:
            module = entry.load()
        except (Exception, SystemExit) as error:
            raise UserError(f"{source}: the plugin {entry.value} failed to import ({describe(error)}).") from error
        registry.add(module, source, entry.dist.version if entry.dist else "")
    return registry


def plugin_files(folder: Path) -> Iterator[Path]:
    """The folder's plugin files at any depth, sorted; names that begin with "_" are no plugins."""
    return (file for file in sorted(folder.rglob("*.py")) if not file.name.startswith("_"))


def import_file(file: Path, source: str) -> ModuleType:
    # A module name of its own for each file, the same on every rank; dataclasses and pickle look it up in sys.modules.
    name = f"nanopre_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{source}: this plugin failed to import ({describe(error)}).") from error
    return module


def check_implementations(plugin: object, source: str) -> None:
    """Refuse what pluggy would ignore without a word: a hook's name misspelt or without its mark, and arguments with
    defaults, which never receive the value; and arguments that the hook does not have."""
    specs = [name for name, spec in vars(hookspecs).items() if hasattr(spec, "nanopre_spec")]
    for name, function in inspect.getmembers(plugin, callable):
        marked = inspect.isroutine(function) and hasattr(function, "nanopre_impl")
        if not marked and not name.startswith("nanopre_"):
            continue
        name = (marked and function.nanopre_impl["specname"]) or name
        if name not in specs:
            raise UserError(f"{source}: there is no hook {name}; {nearest(name, specs)}")
        if not marked:
            raise UserError(f"{source}: {name} lacks the mark @hookimpl (from nanopre import hookimpl).")
        known = list(inspect.signature(getattr(hookspecs, name)).parameters)
        parameters = list(inspect.signature(function).parameters.values())
        for parameter in parameters[1:] if isinstance(plugin, type) else parameters:  # a class's methods have self
            if parameter.name not in known:
                hint = nearest(parameter.name, known)
                raise UserError(f"{source}: {name}: the hook has no argument {parameter.name}; {hint}")
            if parameter.default is not parameter.empty:
                raise UserError(
                    f"{source}: {name}: the argument {parameter.name} has a default, so it would never be given its "
                    "value; remove the default."
                )


def check_class(kind: str, offer: Offer) -> None:
    """Refuse a class that the core could not configure or use."""
    where = f'{offer.source}: {kind} "{offer.name}"'
    if not (isinstance(offer.cls, type) and dataclasses.is_dataclass(offer.cls)):
        raise UserError(f"{where}: is not a dataclass, whose fields are the keys of its TOML section.")
    for field in dataclasses.fields(offer.cls):
        if field.name == "name":
            raise UserError(f'{where}: has a field "name", the key by which the plugin itself is chosen.')
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: the field {field.name} has no default.")
        if not (field.init and is_toml_type(typing.get_type_hints(offer.cls)[field.name])):
            raise UserError(
                f"{where}: the field {field.name} can't be a key of TOML; its type must be made of int, float, bool, "
                "str, Literal, list, dict and None."
            )
    doc = (offer.cls.__doc__ or "").strip()
    if not doc or doc.startswith(f"{offer.cls.__name__}("):  # the second is what dataclass fills in
        raise UserError(f"{where}: has no docstring; its first line is shown by --list-plugins.")
    for method in METHODS[kind]:
        if not callable(getattr(offer.cls, method, None)):
            raise UserError(f"{where}: has no method {method}, which every {kind} needs.")
    if kind == "parallel" and getattr(offer.cls, "phase", None) not in PHASES:
        raise UserError(f'{where}: has no phase, which must be one of {", ".join(PHASES)}.')
    if kind == "analyzer" and not dataclasses.is_dataclass(getattr(offer.cls, "law", None)):
        raise UserError(f"{where}: has no attribute law, the dataclass of estimates that its fit returns.")
    if kind == "analyzer" and not hasattr(offer.cls, "definition"):
        raise UserError(f"{where}: has no attribute definition, which says what counts as parameters and FLOPs.")
    if kind == "logger":
        check_implementations(offer.cls, where)
        if not any(hasattr(getattr(offer.cls, name), "nanopre_impl") for name in dir(offer.cls)):
            raise UserError(f"{where}: has no lifecycle hook (a method nanopre_step_end, say, marked @hookimpl).")


def is_toml_type(hint: Any) -> bool:
    """Whether the config can read a field of this type from TOML and write it back."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, typing.Union, types.UnionType):
        return all(map(is_toml_type, arguments))
    return hint in (int, float, bool, str, list, dict, type(None), Any) or origin in (Literal, dict)


def describe(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def default(field: dataclasses.Field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def type_name(annotation) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
