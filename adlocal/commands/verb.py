"""What every verb of the command line has: an example in its help, and errors in one line."""

from __future__ import annotations

import argparse
import importlib
from typing import Any, NoReturn

from ..errors import AdlocalError
from ..llamacpp.installed import llama_cpp_python


def add_verb(verbs: Any, name: str, description: str, example: str) -> argparse.ArgumentParser:
    """A verb's parser. The module of its name in this package is imported when it runs, so that `--help` stays fast."""

    def handler(args: argparse.Namespace) -> None:
        with llama_cpp_python("this verb", AdlocalError):
            importlib.import_module(f"adlocal.commands.{name}").run(args)

    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=description[0].lower() + description[1:],
        description=f"{description}.",
        epilog=f"example:\n  {example}",
        formatter_class=_HelpFormatter,
    )
    parser.set_defaults(handler=handler)
    return parser


class Parser(argparse.ArgumentParser):
    """Tells an error in one line, as `main` does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults that there are, and the example as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)
