"""docs/cli.md says what the program says."""

import runpy
from pathlib import Path

from click.testing import CliRunner

from unisparse_np.cli import COMMANDS, main

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_current() -> None:
    expected = runpy.run_path(str(DOCS / "make_cli_page.py"))["cli_page"]()
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == expected, "run `make docs` and commit docs/cli.md"


def test_help_lists_the_commands_in_the_order_a_newcomer_meets_them() -> None:
    shown = CliRunner().invoke(main, ["--help"]).stdout
    positions = [shown.index(f"\n  {name}") for name in COMMANDS]
    assert positions == sorted(positions)


def test_every_option_of_every_command_explains_itself() -> None:
    with main.make_context("unisparse-np", [], resilient_parsing=True) as context:
        for name in COMMANDS:
            command = main.get_command(context, name)
            assert command is not None and command.help
            for param in command.params:
                if param.param_type_name == "option":
                    assert getattr(param, "help", None), f"unisparse-np {name} {param.opts[0]} has no help text"
