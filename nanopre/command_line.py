"""What the scripts' command lines have in common: errors of one sentence, numbers, and words that set keys of the config."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile

from nanopre import UserError
from nanopre.config import Config, whole_key
from nanopre.plugins import nearest


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one sentence. What is not an option is named before what is missing, which a misspelt option
    may be the cause of.

    sets_keys: words that are no options may set keys of the config, as "--train.steps=100"; parse_known_args returns them.
    """

    def __init__(self, *arguments, sets_keys: bool = False, **settings):
        super().__init__(*arguments, allow_abbrev=False, **settings)
        self.sets_keys = sets_keys

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        words = list(sys.argv[1:] if args is None else args)
        if self._subparsers:  # what comes after the command is for its own parser to check
            words = list(takewhile(lambda word: word.startswith("-"), words))
        known = [*self._option_string_actions, "--"]
        options = [word for word in words if word.startswith("--") or self._subparsers]
        self._check([word for word in options if word.partition("=")[0] not in known], words)
        namespace, unknown = super().parse_known_args(args, namespace)
        if not self._subparsers:
            self._check(unknown, words)
        return namespace, unknown

    def error(self, message: str):
        raise UserError(f"{message}; see --help.")

    def _check_value(self, action: argparse.Action, value):
        """argparse's own check of a choice names all of them, and not the nearest."""
        if action.choices is not None and value not in action.choices:
            name = " ".join(action.option_strings) or action.metavar
            raise UserError(f"{name} {value}: there is no such choice; {nearest(value, list(action.choices))}")

    def _check(self, unknown: Sequence[str], words: Sequence[str]) -> None:
        """Raise UserError for the first of the unknown words, unless it sets a key. words: all of the command line."""
        sections = [f.name for f in dataclasses.fields(Config)] if self.sets_keys else []
        options = [*self._option_string_actions, *(f"--{section}" for section in sections)]
        for word in unknown:
            flag, equals, value = word.partition("=")
            if not word.startswith("-") and self.sets_keys:
                raise UserError(f"{word}: one config file is enough; a key of it is set as --section.key=value.")
            if not word.startswith("-"):
                raise UserError(f"{word}: neither an option nor the value of one; see --help.")
            if self._subparsers:
                raise UserError(f"{flag}: not an option here; those of a COMMAND come after it.")
            if not self.sets_keys:
                raise UserError(f"{flag}: not an option; {nearest(flag, options)}")
            name = flag.lstrip("-")
            key = name if "." in name or name in sections else whole_key(name)
            if key is None:
                raise UserError(f"{flag}: not an option (a key is set as --section.key=value); {nearest(flag, options)}")
            if not word.startswith("--"):
                raise UserError(f"{flag}: not an option; did you mean --{key}{equals}{value}?")
            if not equals:
                following = words[words.index(word) + 1 :][:1]  # "--train.steps 5", where the 5 may pass for the config file
                value = next((v for v in following if not v.startswith("-") and not v.endswith(".toml")), "VALUE")
                raise UserError(f"{word}: no value; write --{key}={value}.")


def positive(text: str) -> float:
    """A type of argparse: a finite number above zero."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and finite")
    return value


positive.__name__ = "number"  # argparse: "invalid number value: 'x'"


def at_least(least: float):
    """A type of argparse: a finite number from `least` on, whole if that is."""
    kind = type(least)

    def parse(text: str):
        if not least <= (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}{'' if kind is int else ' and finite'}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def run_script(
    script: str, main: Callable[[list[str]], None], *expected: type[Exception], say: Callable[[str], None] | None = None
) -> None:
    """Call a script's `main` with the command line. What the user can mend, UserError and the `expected`, ends it with one
    sentence and status 2; Ctrl-C and a closed pipe with 130. say: tells the sentence, where many processes come upon it."""
    try:
        main(sys.argv[1:])
    except (UserError, *expected) as error:
        say(str(error)) if say else print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.stderr.close()  # `plan.py layout ... | head`: Python would tell of the closed pipe once more as it ends
        sys.exit(130)
