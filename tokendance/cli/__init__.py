"""The command line: ``python -m tokendance <command>``.

A command is a module of this package with ``SUMMARY`` (one line), ``add_arguments(parser)`` and
``run(arguments) -> int``. Only the module of the command that is called gets imported.

May import the rest of the library, inside the commands, and tqdm where it is installed.
"""

from __future__ import annotations

import argparse
import importlib
import io
import pkgutil
import sys
from collections.abc import Sequence


def main(
    argv: Sequence[str] | None = None, program: str = "tokendance", package: str = __name__
) -> int:
    """Runs a command and returns the exit status.

    Args:
        argv: defaults to the process's arguments.
        program: what is typed to run it.
        package: whose modules are the commands.
    """
    _print_what_a_terminal_cannot()
    arguments = list(sys.argv[1:] if argv is None else argv)
    found = importlib.import_module(package).__path__
    commands = sorted(module.name for module in pkgutil.iter_modules(found))
    parser = argparse.ArgumentParser(
        prog=program, usage=f"{program} {{" + ",".join(commands) + "} ..."
    )
    parser.add_argument("command", choices=commands)
    name = parser.parse_args(arguments[:1]).command
    command = importlib.import_module(f"{package}.{name}")
    command_parser = argparse.ArgumentParser(prog=f"{program} {name}", description=command.SUMMARY)
    command.add_arguments(command_parser)
    status: int = command.run(command_parser.parse_args(arguments[1:]))
    return status


def _print_what_a_terminal_cannot() -> None:
    """What an encoding lacks is printed as an escape: no command ends because of a character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
