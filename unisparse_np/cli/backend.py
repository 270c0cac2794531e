"""Which backend runs, said aloud when the user left the choice to us."""

from __future__ import annotations

import click

from ..attention import load_backend
from ..errors import BackendUnavailable


def choose_backend(name: str, quiet: bool) -> str:
    """`name` itself, or for "auto" the fastest backend of this machine, with the reason on stderr."""
    if name != "auto":
        return name
    try:
        load_backend("cupy")
        chosen, reason = "cupy", "CuPy and a GPU are here"
    except BackendUnavailable as error:
        chosen, reason = "reference", f"NumPy; not cupy, because {error}"
    if not quiet:
        click.echo(f"backend   {chosen} ({reason})", err=True)
    return chosen
