"""The prefill bar and the bar that counts: on a terminal only, with what is done, speed and time left."""

import io

import pytest

from unisparse_np.cli.progress import CountBar, PrefillBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def read_a_prompt(quiet: bool) -> None:
    with PrefillBar(quiet) as bar:
        for done in (1024, 2048, 2500):
            bar(done, 2500, 0.25)


def test_a_terminal_sees_tokens_speed_and_density(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    read_a_prompt(quiet=False)
    shown = terminal.getvalue()
    assert "Reading" in shown and "2500/2500" in shown and "tokens/s, 0 s left, density 0.25" in shown


@pytest.mark.parametrize(("stream", "quiet"), [(io.StringIO, False), (Terminal, True)])
def test_files_and_quiet_users_see_nothing(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], quiet: bool) -> None:
    target = stream()
    monkeypatch.setattr("sys.stderr", target)
    read_a_prompt(quiet)
    assert target.getvalue() == ""


def count(quiet: bool) -> None:
    with CountBar("Probing", quiet) as bar:
        for done, total in ((1, 3), (2, 3), (3, 5)):  # a plan may grow
            bar(done, total)


def test_the_count_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    count(quiet=False)
    assert "Probing" in terminal.getvalue() and "3/5" in terminal.getvalue()


@pytest.mark.parametrize(("stream", "quiet"), [(io.StringIO, False), (Terminal, True)])
def test_the_count_is_shown_nowhere_else(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], quiet: bool) -> None:
    target = stream()
    monkeypatch.setattr("sys.stderr", target)
    count(quiet)
    assert target.getvalue() == ""
