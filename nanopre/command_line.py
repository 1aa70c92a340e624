"""What the scripts' command lines have in common: errors of one sentence, and words that set keys of the config."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

from nanopre import UserError
from nanopre.config import Config, whole_key
from nanopre.plugins import nearest


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one sentence."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help.")

    def _check_value(self, action: argparse.Action, value):
        """argparse's own check of a choice names all of them, and not the nearest."""
        if action.choices is not None and value not in action.choices:
            name = " ".join(action.option_strings) or action.metavar
            raise UserError(f"{name} {value}: there is no such choice; {nearest(value, list(action.choices))}")

    @property
    def options(self) -> list[str]:
        return list(self._option_string_actions)


def run(script: str, main: Callable[[list[str]], None], *expected: type[Exception]) -> None:
    """Call a script's `main` with the command line. What the user can mend, UserError and the `expected`, ends it with one
    sentence and status 2; Ctrl-C and a closed pipe with 130."""
    try:
        main(sys.argv[1:])
    except (UserError, *expected) as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.stderr.close()  # `plan.py layout ... | head`: Python would tell of the closed pipe once more as it ends
        sys.exit(130)


def refuse(words: Sequence[str], options: Sequence[str]) -> None:
    """Raise UserError for the first of the words that argparse left over, if there are any, with the nearest of the options."""
    if words:
        if not words[0].startswith("-"):
            raise UserError(f"{words[0]}: neither an option nor the value of one; see --help.")
        flag = words[0].partition("=")[0]
        raise UserError(f"{flag}: not an option; {nearest(flag, options)}")


def check_overrides(words: Sequence[str], argv: Sequence[str], options: Sequence[str]) -> None:
    """Raise UserError for the first of the words in `argv` that argparse left over which does not set a key, in the form of
    "--train.steps=100". options: those that the script has, for the nearest match."""
    sections = [f.name for f in dataclasses.fields(Config)]
    for word in words:
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            raise UserError(f"{word}: one config file is enough; a key of it is set as --section.key=value.")
        name = flag.lstrip("-")
        key = name if "." in name or name in sections else whole_key(name)
        if key is None:
            hint = nearest(flag, [*options, *(f"--{section}" for section in sections)])
            raise UserError(f"{flag}: not an option (a key is set as --section.key=value); {hint}")
        if not word.startswith("--"):
            raise UserError(f"{flag}: not an option; did you mean --{key}{equals}{value}?")
        if not equals:
            following = argv[argv.index(word) + 1 :][:1]  # "--train.steps 5", where the 5 may pass for the config file
            value = next((v for v in following if not v.startswith("-") and not v.endswith(".toml")), "VALUE")
            raise UserError(f"{word}: no value; write --{key}={value}.")
