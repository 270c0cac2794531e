"""What a refusal looks like: a code, one sentence, nothing on stdout; and a folder's contents, to see that none was lost."""

from pathlib import Path

from click.testing import CliRunner

from unisparse_np.cli import main

CHECKPOINT, USAGE = 1, 2  # exit codes


def refused(*arguments: object, code: int, words: str | tuple[str, ...], stdin: bytes | None = None) -> None:
    """The command must end with this code and one sentence on stderr that holds the words."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), f"not refused but raised: {result.exception!r}"
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    *usage, sentence = result.stderr.strip().splitlines()
    assert sentence.startswith("Error: ") and all(line.startswith(("Usage:", "Try ", "backend ")) or not line for line in usage), (
        result.stderr
    )
    for word in (words,) if isinstance(words, str) else words:
        assert word in sentence, f"{word!r} is not in: {sentence}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one_sentence(message: str, words: tuple[str, ...]) -> None:
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
