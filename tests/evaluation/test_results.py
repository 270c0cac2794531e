"""The results file: grows by whole lines, goes on after a kill, and refuses what is not its own."""

from pathlib import Path

import pytest

from unisparse_np import InvalidInput
from unisparse_np.evaluation.results import ResultsFile

RUN = {"suite": "text", "seed": 1, "configs": {"a": {"top_p": 0.95, "anchors": 1}}}


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ResultsFile(path, RUN) as file:
        file.append({"n": 1})
        assert len(path.read_text().splitlines()) == 2  # on disk before the file is closed
        file.append({"n": 2})
    with ResultsFile(path, RUN) as file:
        assert file.records == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("kept", [3, 40, 10_000])
def test_a_line_cut_short_is_dropped_and_written_anew(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "r.jsonl"
    with ResultsFile(path, RUN) as file:
        file.append({"n": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"n": 2, "text": "abc"'[:kept])
    with ResultsFile(path, RUN) as file:
        assert file.records == [{"n": 1}]
        file.append({"n": 2})
    assert path.read_bytes() == whole + b'{"n": 2}\n'


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 2}, "seed was 1, now 2"),
        ({"suite": "copy"}, 'suite was "text", now "copy"'),
        ({"more": 1}, "more was null, now 1"),
        ({"configs": {"a": {"top_p": 0.9, "anchors": 1}}}, "configs.a.top_p was 0.95, now 0.9"),
        ({"configs": {"a": {"top_p": 0.95, "anchors": 1}, "b": "dense"}}, 'configs.b was null, now "dense"'),
    ],
)
def test_another_run_is_refused_and_nothing_touched(tmp_path: Path, changes: dict, words: str) -> None:
    path = tmp_path / "r.jsonl"
    with ResultsFile(path, RUN) as file:
        file.append({"n": 1})
    path.write_bytes(path.read_bytes() + b'{"n"')
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match="belongs to another run") as error:
        ResultsFile(path, RUN | changes)
    assert words in str(error.value) and "\n" not in str(error.value) and path.read_bytes() == before


@pytest.mark.parametrize("content", [b"a text of mine", b"a text of mine\n", b'{"n": 1}\n', b"[1]\n", b"\xff\n"])
def test_other_files_are_refused_and_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="is not a results file"):
        ResultsFile(path, RUN)
    assert path.read_bytes() == content


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be written"):
        ResultsFile(tmp_path / "nowhere" / "r.jsonl", RUN)


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ResultsFile(path, RUN) as file:
        file.append({"n": 1})
        with pytest.raises(InvalidInput, match="is in use by another run"):
            ResultsFile(path, RUN)
        file.append({"n": 2})
    with ResultsFile(path, RUN) as file:
        assert file.records == [{"n": 1}, {"n": 2}]
