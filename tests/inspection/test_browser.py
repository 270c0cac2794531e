"""The report page in a real browser: it loads, pictures change, hover texts are right, keys work, nothing is logged."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unisparse_np.inspection.capture import Capture, capture
from unisparse_np.inspection.report_page import Focus, block_texts, report_page

from .small import CONFIG, model_and_tokenizer
from .test_report_page import ATTACK

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver on this machine: on Debian, apt install chromium chromium-driver"
)
FOCUS = Focus(layer=1, head=2, block=-1)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return model_and_tokenizer()[1].encode((ATTACK + " The grass is green. The sky is blue. ") * 5)


@pytest.fixture(scope="module")
def captures(ids: list[int]) -> list[Capture]:
    model = model_and_tokenizer()[0]
    other = replace(CONFIG, block_size=64, sink_blocks=0, local_blocks=0, key_anchors=0)
    return [capture(model, ids, CONFIG, label="first"), capture(model, ids, other, label=ATTACK)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, captures: list[Capture], ids: list[int], tmp_path: Path) -> Any:
    """Both configs side by side, freshly opened."""
    return opened(browser, captures, ids, tmp_path)


def opened(browser: Any, captures: list[Capture], ids: list[int], folder: Path) -> Any:
    path = folder / "report.html"
    path.write_bytes(report_page(captures, ids, model_and_tokenizer()[1], ATTACK, FOCUS))
    browser.get(path.as_uri())
    return browser


def find(page: Any, css: str) -> Any:
    return page.find_element("css selector", css)


def pixels(page: Any, figure: str) -> list[int]:
    script = """
        const canvas = document.querySelector(arguments[0] + " canvas");
        return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
    """
    return page.execute_script(script, figure)


def hover(page: Any, figure: str, i: int, j: int, blocks: int, click: bool = False) -> None:
    """Put the pointer on the cell of query block i and key block j."""
    from selenium.webdriver import ActionChains

    canvas = find(page, f"{figure} canvas")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    size = canvas.size
    across, down = ((n + 0.5) / blocks * size[side] - size[side] / 2 for n, side in ((j, "width"), (i, "height")))
    actions = ActionChains(page, duration=0).move_to_element_with_offset(canvas, int(across), int(down))
    (actions.click() if click else actions).perform()


def shown(page: Any) -> dict[str, str]:
    """The panel: row name -> the first config's value."""
    rows = page.find_elements("css selector", "#numbers tbody tr")
    return {find(row, "th").text: find(row, "td").text for row in rows}


def test_it_loads_fast_and_logs_nothing(page: Any) -> None:
    assert float(page.execute_script("return document.documentElement.dataset.ready")) < 5000
    assert page.title.startswith("What sparse attention kept: </script><script>document.title=")
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert len(page.find_elements("css selector", "article.view")) == 2


def test_the_mask_picture_is_the_mask(page: Any, captures: list[Capture]) -> None:
    kept = captures[0].layers[1].kept[2]
    blocks = len(kept)
    image = np.array(pixels(page, ".view:nth-child(1) .kept-figure")).reshape(blocks, blocks, 4)[..., :3]
    visible = np.tri(blocks, dtype=bool)
    dropped = visible & ~kept
    assert dropped.any() and len(np.unique(image[dropped], axis=0)) == 1
    assert not (image[visible & kept] == image[dropped][0]).all(axis=-1).any()


@pytest.mark.parametrize("choice", ["#layer-next", "#head-next", "#colour option[value=lost]", "#overview canvas"])
def test_a_click_changes_the_picture(page: Any, choice: str) -> None:
    figures = (".view:nth-child(1) .kept-figure", ".view:nth-child(1) .heat-figure")
    before = [pixels(page, figure) for figure in figures]
    target = find(page, choice)
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", target)
    target.click()
    assert [pixels(page, figure) for figure in figures] != before


def test_hovering_a_block_shows_its_numbers_and_the_very_texts(page: Any, captures: list[Capture], ids: list[int]) -> None:
    layer = captures[0].layers[1]
    blocks, i, j = layer.scores.shape[1], 5, 2
    hover(page, ".view:nth-child(1) .kept-figure", i, j, blocks)
    row, found = layer.scores[2, i, : i + 1], shown(page)
    order = np.argsort(-row, kind="stable")
    place = int(np.flatnonzero(order == j)[0])
    assert find(page, "#where").text == "Query block 5, key block 2"
    assert float(found["score"].rstrip("%")) / 100 == pytest.approx(row[j], rel=0.02)
    assert found["rank"] == f"{place + 1} of 6"
    assert float(found["running sum"].split()[0]) == pytest.approx(row[order[: place + 1]].sum(), abs=2e-3)
    assert found["decision"].startswith("kept" if layer.kept[2, i, j] else "dropped")
    assert layer.true_mass is not None
    assert float(found["truth"].rstrip("%")) / 100 == pytest.approx(layer.true_mass[2, i, j], rel=0.02, abs=1e-5)
    texts = block_texts(ids, 32, model_and_tokenizer()[1])
    content = "return document.getElementById(arguments[0]).textContent"
    assert page.execute_script(content, "query-text") == texts[5] and page.execute_script(content, "key-text") == texts[2]
    assert "<script>" in "".join(texts)


def test_the_other_config_shows_the_same_tokens(page: Any, captures: list[Capture]) -> None:
    hover(page, ".view:nth-child(1) .heat-figure", 5, 2, captures[0].layers[1].scores.shape[1])
    other = captures[1].layers[1]
    second = [find(row, "td:nth-child(3)").text for row in page.find_elements("css selector", "#numbers tbody tr")]
    assert second[0].startswith("kept" if other.kept[2, 2, 1] else "dropped")
    assert float(second[1].rstrip("%")) / 100 == pytest.approx(other.scores[2, 2, 1], rel=0.02)


def test_a_click_holds_and_the_keyboard_moves(page: Any, captures: list[Capture]) -> None:
    from selenium.webdriver.common.keys import Keys

    blocks = captures[0].layers[1].scores.shape[1]
    hover(page, ".view:nth-child(1) .kept-figure", 6, 3, blocks, click=True)
    hover(page, ".view:nth-child(1) .kept-figure", 2, 1, blocks)
    assert find(page, "#where").text == "Query block 2, key block 1"
    page.execute_script("document.querySelector('.view canvas').dispatchEvent(new PointerEvent('pointerleave'))")
    assert find(page, "#where").text == "Query block 6, key block 3"
    find(page, ".view:nth-child(1) .kept-figure canvas").send_keys(Keys.ARROW_UP, Keys.ARROW_RIGHT)
    assert find(page, "#where").text == "Query block 5, key block 4"
    find(page, ".view:nth-child(1) .kept-figure canvas").send_keys(*[Keys.ARROW_RIGHT] * 9)
    assert find(page, "#where").text == "Query block 5, key block 5"  # the diagonal is the end


def test_everything_can_be_reached_with_the_keyboard(page: Any) -> None:
    unreachable = """
        const parts = [...document.querySelectorAll("select, button, canvas, pre")];
        return parts.filter((part) => part.tabIndex < 0 || !(part.ariaLabel || part.id)).length;
    """
    assert page.execute_script(unreachable) == 0


@pytest.mark.parametrize("width", [1600, 900, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_width_or_scheme_cuts_anything_off(page: Any, width: int, scheme: str) -> None:
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) > 600) == (scheme == "light")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_without_truth_offers_none(browser: Any, ids: list[int], tmp_path: Path) -> None:
    bare = capture(model_and_tokenizer()[0], ids, CONFIG, layers=[1], with_truth=False)
    page = opened(browser, [bare], ids, tmp_path)
    assert not find(page, "#colour-control").is_displayed() and "truth" not in shown(page)
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
