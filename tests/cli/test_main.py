"""What every command does with an error that is nobody's bug."""

import pytest
from click.testing import CliRunner

from unisparse_np.cli import main


@pytest.mark.parametrize(
    ("error", "said"), [(MemoryError("Unable to allocate\n3 GiB"), "(Unable to allocate 3 GiB)"), (MemoryError(), "(MemoryError)")]
)
def test_memory_that_ran_out_is_one_sentence(error: MemoryError, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory() -> None:
        raise error

    monkeypatch.setattr("unisparse_np.cli.env.collect", no_memory)
    result = CliRunner().invoke(main, ["env"])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == f"Error: memory ran out {said}: give less text at once, or end what else uses the memory\n"
