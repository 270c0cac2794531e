"""The command line: flags in, text out. Each command is one file of this folder; nothing here computes."""

from __future__ import annotations

import errno
import importlib
import sys
import warnings
from typing import Any

import click

from ..errors import InvalidInput, UniSparseError
from ..version import __version__
from .ranks import end_all_ranks, hush_other_ranks, refuse_several

COMMANDS = ("generate", "convert", "audit", "explain", "inspect", "eval", "tune", "bench", "env")  # in the order a newcomer meets them
ON_SEVERAL_PROCESSES = ("generate", "env")
FAILURE, USAGE, INTERRUPTED = 1, 2, 130  # exit codes
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CommandGroup(click.Group):
    """Imports a command's file only when that command runs, and turns the project's errors into exit codes."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            hush_other_ranks()
        except UniSparseError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(FAILURE)
        try:
            return super().main(*args, **options)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            click.echo(f"Error: the output cannot be written ({error.strerror}): free some space, or send it elsewhere", err=True)
            sys.stdout = None  # what it holds back is lost; Python would try once more at its end
            sys.exit(FAILURE)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name not in ON_SEVERAL_PROCESSES:
            refuse_several(str(name))
        return name, command, rest

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f".{cmd_name}", __name__), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", UserWarning)
                warnings.showwarning = _show_note  # put back by catch_warnings
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException):
            raise
        except UniSparseError as error:
            code = USAGE if isinstance(error, InvalidInput) else FAILURE
            end_all_ranks(error, code)
            click.echo(f"Error: {error}", err=True)
            raise click.exceptions.Exit(code) from error
        except MemoryError as error:
            end_all_ranks(error, FAILURE)
            said = " ".join(str(error).split()) or type(error).__name__
            click.echo(f"Error: memory ran out ({said}): give less text at once, or end what else uses the memory", err=True)
            raise click.exceptions.Exit(FAILURE) from error
        except KeyboardInterrupt as interrupt:
            end_all_ranks(interrupt, INTERRUPTED)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except BaseException as error:  # a bug, which keeps its traceback, or a closed pipe
            end_all_ranks(error, FAILURE)
            raise


def _show_note(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    """warnings.showwarning for users: one line on stderr, and no code."""
    click.echo(f"Note: {message}" if issubclass(category, UserWarning) else f"{category.__name__}: {message}", err=True)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="unisparse-np")
def main() -> None:
    """Run Llama-family models on long prompts with UniSparse, a sparse attention that needs no training.

    Text goes to stdout, progress and statistics to stderr. Exit codes: 0 fine, 1 failure, 2 wrong usage, 130 Ctrl-C.

    Start with:  unisparse-np generate --model DIR --prompt FILE
    """
