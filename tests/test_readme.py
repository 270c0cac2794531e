"""What README.md and the pages of docs promise: two commands, code that runs, links that lead somewhere, tables of the results."""

import importlib.util
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_it_opens_with_the_two_commands() -> None:
    first = re.search(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\ndemo:" in makefile and "\ntest:" in makefile


@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_its_code_runs(code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


PAGES = ["README.md", "CONTRIBUTING.md", "ALGORITHM.md", "examples/needle-llama/README.md"]
PAGES += [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The names that a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", path.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file = path.parent / target if target else path
        assert file.exists(), f"{page} links to {target}, which is not there"
        assert not anchor or anchor in anchors(file), f"{page} links to {target}#{anchor}, and there is no such heading"


@pytest.fixture(scope="module")
def results_table() -> Iterator[dict[str, Any]]:
    path = list(sys.path)
    yield runpy.run_path(str(ROOT / "docs" / "make_results_table.py"))
    sys.path[:] = path


def test_the_tables_are_those_of_the_results(results_table: dict[str, Any]) -> None:
    assert results_table["with_results"](README) == README, "run `make docs`"
    assert results_table["page"]() == (ROOT / "docs" / "measured.md").read_text(encoding="utf-8"), "run `make docs`"


@pytest.mark.parametrize(
    "values, less_is_better, verdict",
    [
        ((1.2, 1.3), False, "goal"),
        ((1.2, 1.05), False, "yes"),
        ((1.2, 0.9), False, "**no**"),
        ((0.9, 1.0), True, "goal"),
        ((1.0, 1.3), True, "**no**"),
        ((1.2, None), False, "not measured"),
    ],
)
def test_a_figure_reaches_what_was_asked_of_all_its_cases(
    results_table: dict[str, Any], values: tuple[float | None, ...], less_is_better: bool, verdict: str
) -> None:
    figures = sys.modules["result_tables.figures"]
    asked, goal = ((1.1, 1.1), (1.0, 1.0)) if less_is_better else ((1.0, 1.0), (1.1, 1.1))
    figure = figures.Figure("work", (), lambda: values, asked, goal, less_is_better=less_is_better)
    assert figures.reached({"figure": figure, "values": values}) == verdict


def test_the_picture_of_the_masks_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs" / "make_pictures.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    prompt = script.PROMPT.with_name("needle-2k.txt")
    [needle] = json.loads(prompt.with_name("answers.json").read_text(encoding="utf-8"))[prompt.stem]["answers"]
    monkeypatch.setattr(script, "PROMPT", prompt)
    monkeypatch.setattr(script, "NEEDLE", needle)
    monkeypatch.setattr(script, "PICTURE", tmp_path / "block-mask.png")
    script.main()
    assert script.PICTURE.stat().st_size > 10_000
