"""`python -m unisparse_np` is `unisparse-np`."""

from .cli import main

main(prog_name="unisparse-np")
