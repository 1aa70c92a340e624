"""From measured runs and a budget to the next run.

    python plan.py COMMAND --help        what a command takes; every command has --json
"""

from __future__ import annotations

import argparse
import json
import sys

from nanopre import UserError


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one sentence."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help.")


def main(argv: list[str]) -> None:
    parser = Parser(prog="plan.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in ():
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    a = parser.parse_args(argv)
    result, text = a.run(a)
    print(json.dumps(result, indent=1) if a.json else text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"plan.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
