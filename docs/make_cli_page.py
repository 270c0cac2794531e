"""Write docs/cli.md from the command line's own help, so that the page cannot say anything else than the program."""

from __future__ import annotations

from pathlib import Path

from unisparse_np.cli import main as cli

PAGE = Path(__file__).parent / "cli.md"
WIDTH = 110
HEADER = """# The command line

Written by `make docs` from the help texts of the program; a test keeps it current.
"""


def cli_page() -> str:
    """The whole page: the help of `unisparse-np` and of each of its commands, in the order of its list."""
    with cli.make_context("unisparse-np", [], resilient_parsing=True, terminal_width=WIDTH) as top:
        sections = [HEADER, section("unisparse-np", cli.get_help(top))]
        for name in cli.list_commands(top):
            command = cli.get_command(top, name)
            assert command is not None
            with command.make_context(name, [], parent=top, resilient_parsing=True) as context:
                sections.append(section(f"unisparse-np {name}", command.get_help(context)))
    return "\n".join(sections)


def section(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(cli_page(), encoding="utf-8")
