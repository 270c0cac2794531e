"""Draw the README's pictures of audit, explain and inspect: docs/pictures/{audit,explain,inspect}.png.

audit.png from benchmarks/results/audit_smollm2_{paper,default}.json, explain.png from needle-llama reading a prompt, inspect.png
from SmolLM2 reading prose (`make smollm2`). Needs matplotlib, and for inspect.png selenium with Chromium and its driver. Name
pictures to draw only these.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from unisparse_np import UniSparseConfig
from unisparse_np.inspection.capture import capture
from unisparse_np.inspection.pictures import COLOURS, DROPPED
from unisparse_np.inspection.reasons import NAMES, Reason
from unisparse_np.inspection.report_page import Focus, report_page
from unisparse_np.inspection.walkthrough import Walkthrough, walk
from unisparse_np.model.loading import load

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import SMOLLM2, prose  # noqa: E402
from smollm2_audit import FIRST_TOKEN  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
RESULTS = ROOT / "benchmarks" / "results"
MODEL = ROOT / "examples" / "needle-llama"
PROMPT = MODEL / "prompts" / "needle-8k.txt"
NEEDLE = Focus(layer=1, head=7, block=-1)  # the head that fetches the needle, where the question is
SINK = Focus(layer=25, head=7, block=-1)  # a head whose sink the paper's rule loses
CHOOSE_LOST = "const menu = document.getElementById('colour'); menu.value = 'lost'; menu.dispatchEvent(new Event('change'))"


def draw_audit() -> None:
    """Per layer: true attention on the first block and how much of it is kept; output error. Paper beside default."""
    audits = {name: json.loads((RESULTS / f"audit_smollm2_{name}.json").read_text(encoding="utf-8")) for name in ("paper", "default")}
    figure = Figure(figsize=(12, 6.2), dpi=110, layout="constrained")
    for (name, audit), column in zip(audits.items(), figure.subplots(2, 2, sharex=True, sharey="row").T, strict=True):
        draw_sink(column[0], audit)
        draw_error(column[1], audit)
        p = audit["predictions"]
        column[0].set_title(
            f"{name}: KL {p['kl_mean']:.3f} nats, top-1 agreement {p['top1_agreement']:.1%}, density {audit['density']:.2f}"
        )
    figure.axes[0].legend(loc="upper left", frameon=False)
    figure.suptitle(f"SmolLM2-135M reads {audits['paper']['tokens']:,} tokens of prose: what each layer loses")
    figure.savefig(PICTURES / "audit.png")


def draw_sink(axes: Axes, audit: dict[str, Any]) -> None:
    layers, on_first, kept = by_layer(audit, "sink_mass"), by_layer(audit, "sink_mass"), by_layer(audit, "sink_mass_kept")
    axes.bar(range(len(layers)), 100 * on_first, color="#D3D9DF", label="true attention on the first block")
    axes.bar(range(len(layers)), 100 * kept, color="#E69F00", label="of it kept by sparse attention")
    axes.set_ylabel("% of all attention")
    axes.set_ylim(0, 75)


def draw_error(axes: Axes, audit: dict[str, Any]) -> None:
    error = by_layer(audit, "output_error")
    axes.bar(range(len(error)), 100 * error, color="#0072B2")
    axes.set_ylabel("output error, %")
    axes.set_xlabel("layer")


def by_layer(audit: dict[str, Any], name: str) -> np.ndarray:
    """Mean over the heads of each layer."""
    layers = sorted({head["layer"] for head in audit["heads"]})
    return np.array([np.mean([head[name] for head in audit["heads"] if head["layer"] == layer]) for layer in layers])


def draw_explain() -> None:
    """The ranking of one query block: scores in order, their running sum, P, and the true masses."""
    model, tokenizer = load(MODEL, backend="reference")
    token_ids = tokenizer.encode_prompt(PROMPT.read_text(encoding="utf-8"), raw=True)
    walked = walk(model, token_ids, UniSparseConfig(), layer=NEEDLE.layer, head=NEEDLE.head, block=NEEDLE.block)
    figure = Figure(figsize=(12, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    draw_ranking(axes, walked)
    figure.savefig(PICTURES / "explain.png")


def draw_ranking(axes: Axes, walked: Walkthrough) -> None:
    places = np.arange(1, len(walked.order) + 1)
    colours = [next((c for r, c in COLOURS.items() if walked.reasons[j] & r), DROPPED) for j in walked.order]
    axes.bar(places, walked.scores[walked.order], color=colours, width=0.8)
    [truth] = axes.plot(places, walked.true_mass[walked.order], "k_", markersize=7, label="what dense attention gives the block")
    [running] = axes.plot(places, walked.running, color="#1b1f24", linewidth=1.5, label="running sum of the scores")
    limit = axes.axhline(float(walked.config.top_p), color="#d00060", linestyle="--", linewidth=1.2, label=f"P = {walked.config.top_p}")
    used = int(np.bitwise_or.reduce(walked.reasons))
    patches = [Patch(color=colour, label=f"kept, {NAMES[reason]}") for reason, colour in COLOURS.items() if used & Reason(reason)]
    axes.legend(handles=[*patches, Patch(color=DROPPED, label="dropped"), running, limit, truth], loc="center right", frameon=False)
    axes.set_xlabel("key blocks in order of their score")
    axes.set_ylabel("share of the attention")
    axes.set_title(
        f"Layer {walked.layer}, head {walked.head}, query block {walked.block}: "
        f"{int(walked.kept.sum())} of {len(walked.scores)} blocks kept, {walked.mass_kept.mean():.1%} of the true attention",
        loc="left",
    )  # fmt: skip


def draw_inspect() -> None:
    """The page of `inspect --compare`, as Chromium shows it."""
    model, tokenizer = load(SMOLLM2, backend="reference")
    token_ids = tokenizer.encode(prose())[FIRST_TOKEN : FIRST_TOKEN + 4096]
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    configs = {"the default preset": UniSparseConfig(), "--preset paper": UniSparseConfig.paper()}
    captures = [capture(model, token_ids, config, label=label) for label, config in configs.items()]
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_bytes(report_page(captures, token_ids, tokenizer, SMOLLM2.name, SINK))
        browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            browser.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride", {"width": 1500, "height": 1320, "deviceScaleFactor": 1, "mobile": False}
            )
            browser.get(page.as_uri())
            browser.execute_script(CHOOSE_LOST)
            browser.save_screenshot(str(PICTURES / "inspect.png"))
        finally:
            browser.quit()


def main() -> None:
    pictures = {"audit": draw_audit, "explain": draw_explain, "inspect": draw_inspect}
    for name in sys.argv[1:] or pictures:
        pictures[name]()


if __name__ == "__main__":
    main()
