"""Which backend runs, said aloud when the user left the choice to us."""

from __future__ import annotations

import click

from .. import attention
from ..errors import BackendUnavailable


def choose_backend(name: str, quiet: bool, device: int | None = None) -> str:
    """`name` itself, or for "auto" the fastest backend of this machine, with the reason on stderr.

    Raises:
        BackendUnavailable: a GPU was picked with --device, and none can be used.
    """
    if name != "auto":
        return name
    chosen, reason = attention.choose_backend()
    if device is not None and chosen == "reference":
        raise BackendUnavailable(f"--device {device} picks a GPU, but none can be used here ({reason}): leave it out to run without one")
    if not quiet:
        click.echo(f"backend   {chosen} ({reason})", err=True)
    return chosen
