"""Which backend runs, said aloud when the user left the choice to us."""

from __future__ import annotations

import click

from .. import attention


def choose_backend(name: str, quiet: bool) -> str:
    """`name` itself, or for "auto" the fastest backend of this machine, with the reason on stderr."""
    if name != "auto":
        return name
    chosen, reason = attention.choose_backend()
    if not quiet:
        click.echo(f"backend   {chosen} ({reason})", err=True)
    return chosen
