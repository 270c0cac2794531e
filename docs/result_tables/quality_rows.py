"""Rows of the tables on what sparse attention loses: rules of selection side by side, and what `tune` found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from result_tables.tables import Row, has_result, result_of
from unisparse_np.config import PRESETS, UniSparseConfig
from unisparse_np.evaluation.intervals import mean_estimate

OTHER_LOSSES = ("copy_8192", "needles_4096", "needles_8192", "needles_16384")  # beside the text's


def loss_rows(text: dict[str, Any]) -> list[Row]:
    """Dense attention, the paper's rule bare and with the sink block, and the presets: the loss of each on text, quotations, needles."""
    others = {name: selection_result(name) for name in OTHER_LOSSES}
    dense = {name: {"nll_over_dense": 0.0, "share_on_solved_tasks": 1.0, "density": 1.0} for name in others}
    rows: list[Row] = [{"attention": "dense", "text": {"kl": 0.0, "density": 1.0, "selection": 0.0}, **dense}]
    shown = {"paper's rule, bare": UniSparseConfig.paper(), "paper's rule, sink block kept": UniSparseConfig(key_anchors=0, local_blocks=0)}
    shown |= {f"preset {name}": preset() for name, preset in PRESETS.items() if name != "paper"}
    for label, config in shown.items():
        found = {name: row_of_config(result, config) for name, result in {"text": text, **others}.items()}
        if found["text"] is not None:
            rows.append({"attention": label, **found})
    return rows


def selection_result(name: str) -> dict[str, Any]:
    """What benchmarks/selection_rules.py wrote, or no rows."""
    file = f"selection_rules_{name}"
    return result_of(file) if has_result(file) else {"rows": []}


def row_of_config(result: dict[str, Any], config: UniSparseConfig) -> Row | None:
    """The row that was measured with this config, if there is one."""
    return next((row for row in result["rows"] if row["config"] == asdict(config)), None)


def loss_at_density(of: str, key: str, form: str, ends: str = "") -> Callable[[Row], str]:
    """A loss with its 95% interval, and the density at which it was measured; nothing where it was not."""

    def write(row: Row) -> str:
        found = row[of]
        if found is None:
            return ""
        interval = f" [{found[ends][0]:{form}}, {found[ends][1]:{form}}]" if ends in found else ""
        return f"{found[key]:{form}}{interval} at {found['density']:.3f}"

    return write


def tune_rows(result: dict[str, Any]) -> list[Row]:
    """What tune chose, and the presets, on the windows that it had not seen."""
    rows = {"tuned: " + in_words(result["tuned"]["attention"]): result["tuned"], **result["presets"]}
    return [{"config": name, "kl_interval": mean_estimate(row["kl_of_windows"], lowest=0.0)[1:], **row} for name, row in rows.items()]


def in_words(attention: dict[str, Any] | list[dict[str, Any]]) -> str:
    """A config's values; of a list, one a layer, those that all layers share."""
    each = attention if isinstance(attention, list) else [attention]
    config = each[0]
    rules = []
    for key, letter in (("top_p", "P"), ("row_threshold", "tau")):
        if config[key] is not None:
            alike = all(layer[key] == config[key] for layer in each) and not isinstance(config[key], list)
            rules.append(
                f"{letter} {config[key]:.3g}" if alike else f"{letter} of each {'head' if isinstance(config[key], list) else 'layer'}"
            )
    words = [f"blocks of {config['block_size']}", f"composites of {config['q_compress']} × {config['k_compress']}", " or ".join(rules)]
    if config["top_p_compress"] is not None:
        words.append(f"Top-P on composites of {config['top_p_compress']}")
    anchors = config["key_anchors"]
    return ", ".join([*words, f"{anchors} anchor{'' if anchors == 1 else 's'} a block"])
