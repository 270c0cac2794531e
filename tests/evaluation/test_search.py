"""The tuner's search on made-up models whose best config is known, and its measurements against plain ones."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unisparse_np import UniSparseConfig
from unisparse_np.evaluation.candidates import RANGES, Kind, Trial
from unisparse_np.evaluation.cost import modelled_cost, selection_share
from unisparse_np.evaluation.divergence import divergence
from unisparse_np.evaluation.probe import Probe, Prober
from unisparse_np.evaluation.results import ResultsFile
from unisparse_np.evaluation.search import Search, fit_of, group_factors, layer_groups
from unisparse_np.evaluation.settle import settle
from unisparse_np.evaluation.tuning_report import composites_answer, fits_table
from unisparse_np.evaluation.windows import Windows

from .small_model import TEXT, small_model

LAYERS = 12


class MadeUpModel:
    """Layers whose loss is a power of the looseness and whose density falls with its logarithm."""

    def __init__(self, sensitivities: list[float] | None = None, composites_best: tuple[int, int] = (2, 8)) -> None:
        self.sensitivities = sensitivities or [1.0] * LAYERS
        self.composites_best = composites_best
        self.probes = 0

    def __call__(self, attention: Any) -> Probe:
        self.probes += 1
        layers = attention if isinstance(attention, list) else [attention] * LAYERS
        densities = [1.0 if layer == "dense" else self.density(layer) for layer in layers]
        kl = sum(0.0 if layer == "dense" else self.loss(layer) * s for layer, s in zip(layers, self.sensitivities, strict=True)) / LAYERS
        return Probe(kl, modelled_cost(attention, densities), densities, [kl])

    def looseness(self, config: UniSparseConfig) -> float:
        return 1 - config.top_p if config.top_p is not None else 2 * config.row_threshold  # type: ignore[operator,return-value]

    def loss(self, config: UniSparseConfig) -> float:
        worse = 1.0 if (config.q_compress, config.k_compress) == self.composites_best else 4.0
        return 0.2 * worse * (2 if config.block_size == 128 else 1) * self.looseness(config) ** 1.2

    def density(self, config: UniSparseConfig) -> float:
        return min(1.0, max(0.05, 0.3 - 0.08 * math.log(self.looseness(config) / 0.05)))


def test_the_best_kind_is_found_by_few_probes() -> None:
    model = MadeUpModel()
    search = Search(model, 0.02, LAYERS)
    best = search.run()[0]
    assert (best.kind.block_size, best.kind.q_compress, best.kind.k_compress) == (64, 2, 8)
    assert model.probes <= Search.planned_probes(LAYERS) + 5
    assert [fit.cost for fit in search.ranked()] == sorted(fit.cost for fit in search.fits)


def test_the_bound_is_met_on_the_dot() -> None:
    model = MadeUpModel()
    fit = Search(model, 0.013, LAYERS).fit(Kind(block_size=64, q_compress=2, k_compress=8))
    assert model(fit.kind.attention(fit.looseness)).kl == pytest.approx(0.013, rel=0.02)
    assert model(fit.kind.attention(fit.looseness)).cost == pytest.approx(fit.cost, rel=0.01)
    assert fit.exponent == pytest.approx(1.2, rel=0.02)


def test_both_rules_are_found_where_they_are_best() -> None:
    """A model that forgives a loose Top-P where a fine row threshold stands beside it."""

    class Forgiving(MadeUpModel):
        def loss(self, config: UniSparseConfig) -> float:
            return super().loss(config) * (0.2 if config.top_p_compress is not None and config.k_compress == 2 else 1)

    best = Search(Forgiving(composites_best=(4, 2)), 0.02, LAYERS).run()[0]
    assert (best.kind.rule, best.kind.block_size, best.kind.q_compress, best.kind.k_compress) == ("both", 64, 4, 2)
    table = fits_table([best], 0.02)
    assert "both" in table and f"{(1 / 8 + 1 / 64) / 2:.3f}" in table


def test_sensitive_layers_get_less_looseness_where_that_pays() -> None:
    search = Search(MadeUpModel([4.0] * 4 + [0.2] * 8), 0.02, LAYERS)
    per_layer = search.run()[0]
    assert per_layer.kind.factors is not None and max(per_layer.kind.factors[:4]) < min(per_layer.kind.factors[4:])
    common = next(fit for fit in search.ranked() if fit.kind.factors is None)
    assert per_layer.cost < 0.97 * common.cost


def test_alike_layers_stay_alike() -> None:
    search = Search(MadeUpModel(), 0.02, LAYERS)
    settled, _ = settle(search.run(), MadeUpModel(), 0.02)
    assert settled is not None and settled.fit.kind.factors is None


def test_held_out_windows_decide() -> None:
    """On windows where everything loses half as much again, the bound still holds, and narrowly."""
    fits = Search(MadeUpModel(), 0.02, LAYERS).run()
    harder = MadeUpModel([1.5] * LAYERS)
    settled, _ = settle(fits, harder, 0.02)
    assert settled is not None and 0.017 < settled.probe.kl <= 0.02
    easier, _ = settle(fits, MadeUpModel([0.5] * LAYERS), 0.02)
    assert easier is not None and 0.017 < easier.probe.kl <= 0.02 and easier.probe.cost < settled.probe.cost


def test_a_bound_that_nothing_meets() -> None:
    model = MadeUpModel([1e6] * LAYERS)
    search = Search(model, 0.02, LAYERS)
    fits = search.run()
    assert not fits[0].reaches and "KL" in fits_table(fits, 0.02) and composites_answer(fits) == "No composite size keeps the bound."
    settled, closest = settle(fits, model, 0.02)
    assert settled is None and closest.probe.kl > 0.02


def test_a_cost_above_dense_is_no_result() -> None:
    class Useless(MadeUpModel):
        def density(self, config: UniSparseConfig) -> float:
            return 1.0

    settled, _ = settle(Search(Useless(), 0.02, LAYERS).run(), Useless(), 0.02)
    assert settled is None


def test_a_model_that_loses_nothing_takes_the_loosest_value() -> None:
    fit = Search(MadeUpModel([0.0] * LAYERS), 0.02, LAYERS).fit(Kind())
    assert fit.reaches and fit.looseness == RANGES["top_p"].highest


def test_lines_through_two_trials() -> None:
    trials = [Trial(0.02, Probe(0.01, 0.5, [0.4, 0.6], [])), Trial(0.04, Probe(0.04, 0.4, [0.3, 0.5], []))]
    fit = fit_of(Kind(), trials, 0.02)
    assert fit.exponent == pytest.approx(2) and fit.looseness == pytest.approx(0.02 * math.sqrt(2))
    assert fit.cost == pytest.approx(0.45) and fit.density == pytest.approx(0.45)
    assert fit.slopes == pytest.approx((0.1 / math.log(2),) * 2) and fit.cost_slope == pytest.approx(-0.1 / math.log(2))
    later = fit_of(Kind(key_anchors=2), [Trial(0.02, Probe(0.01, 0.6, [0.5, 0.7], []))], 0.02, fit)  # borrows both slopes
    assert later.looseness == pytest.approx(fit.looseness) and later.cost == pytest.approx(0.55) and later.density == pytest.approx(0.55)


def test_groups_and_factors() -> None:
    assert [layer for group in layer_groups(30) for layer in group] == list(range(30)) and len(layer_groups(30)) == 6
    assert layer_groups(2) == [[0], [1]] and layer_groups(1) == [[0]]
    assert group_factors([1.0, 1.0], [1.0, 1.0], 1.3) == [1.0, 1.0]
    loss, savings, exponent = np.array([4.0, 1.0]), np.array([1.0, 1.0]), 2.0
    factors = np.array(group_factors(list(loss), list(savings), exponent))
    new_loss = loss * factors**exponent
    assert new_loss[0] == pytest.approx(new_loss[1], rel=0.01) and new_loss.sum() == pytest.approx(5.0, rel=0.01)
    assert group_factors([1.0, 1.0], [1.0, 0.0], 1.0)[1] == 0.25 and group_factors([1e-9, 1.0], [1.0, 1.0], 1.0)[0] == 4.0


def test_kinds_become_configs() -> None:
    assert Kind().attention(0.05) == UniSparseConfig()
    precise = Kind(block_size=64, q_compress=2, k_compress=4, rule="row_threshold")
    assert precise.attention(0.02) == UniSparseConfig.precise()
    layers = precise.with_factors([0.5, 2.0]).attention(0.02)
    assert [layer.row_threshold for layer in layers] == [0.01, 0.04]  # type: ignore[union-attr]
    both = Kind(64, 4, 2, rule="both")
    assert both.attention(0.05) == UniSparseConfig(64, 4, 2, top_p=0.95, row_threshold=0.02, top_p_compress=8)
    assert Kind(128, 16, 16, rule="both").config(0.1) == UniSparseConfig(128, 16, 16, top_p=0.9, row_threshold=0.04)
    assert Kind(128, 2, 16, rule="both").top_p_compress == 16 and Kind(128, 2, 16).top_p_compress is None
    assert Kind().value(0.9) == 0.5 and precise.value(1e-9) == 0.0005  # inside their ranges


def test_the_cost_model_is_that_of_the_algorithm_page() -> None:
    assert selection_share(UniSparseConfig()) == 1 / 128 and selection_share(UniSparseConfig.precise()) == 1 / 16
    both = UniSparseConfig(q_compress=4, k_compress=2, row_threshold=0.02, top_p_compress=8, head_compress=2)
    assert selection_share(both) == (1 / 8 + 1 / 64) / 4
    assert modelled_cost("dense", [1.0, 1.0]) == 1.0
    assert modelled_cost(UniSparseConfig(), [0.2, 0.4]) == pytest.approx(0.3 + 1 / 128)
    assert modelled_cost(["dense", UniSparseConfig.precise()], [1.0, 0.5]) == pytest.approx((1 + 0.5 + 1 / 16) / 2)


# ---- probes of a model ----

SPARSE = UniSparseConfig(block_size=32, q_compress=4, k_compress=4, top_p=0.3, key_anchors=0, sink_blocks=0, local_blocks=0)


def prober(path: Path, **options: Any) -> Prober:
    model, tokenizer = small_model()
    return Prober(model, Windows(tokenizer, TEXT, 300, count=2), ResultsFile(path, {}), **options)


@pytest.mark.parametrize("attention", [SPARSE, [SPARSE, "dense"], ["dense", UniSparseConfig(block_size=64, top_p=0.3, key_anchors=0)]])
def test_a_probe_is_what_whole_windows_give(tmp_path: Path, attention: Any) -> None:
    model, tokenizer = small_model()
    probe = prober(tmp_path / "r.jsonl")(attention, [0, 1])
    windows = Windows(tokenizer, TEXT, 300, count=2)
    for n in range(2):
        token_ids = windows[n]
        dense, sparse = (model.logits(token_ids[:-1], a) for a in ("dense", attention))
        kl = divergence(dense[150:], sparse[150:], np.array(token_ids[151:])).kl.mean()
        assert kl > 1e-3 and probe.kl_of_windows[n] == pytest.approx(kl, rel=1e-3, abs=2e-6)  # dense side kept as float16
    assert probe.kl == pytest.approx(np.mean(probe.kl_of_windows)) and probe.cost == pytest.approx(
        modelled_cost(attention, probe.densities)
    )


def test_dense_loses_nothing(tmp_path: Path) -> None:
    assert prober(tmp_path / "r.jsonl")(["dense", "dense"], [0]).kl < 2e-6


def test_what_the_file_holds_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = small_model()
    windows = Windows(tokenizer, TEXT, 300, count=2)
    with ResultsFile(tmp_path / "r.jsonl", {}) as results:
        first = Prober(model, windows, results)(SPARSE, [0, 1])
    content = (tmp_path / "r.jsonl").read_bytes()
    again = Prober(model, windows, ResultsFile(tmp_path / "r.jsonl", {}))
    monkeypatch.setattr(Prober, "_measure", lambda *_: pytest.fail("measured again"))
    assert again(SPARSE, [0, 1]) == first and (tmp_path / "r.jsonl").read_bytes() == content


def test_time_is_a_share_of_the_dense_prefill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prober, "_seconds", lambda self, token_ids, attention: 4.0 if attention == "dense" else 1.0)
    measure = prober(tmp_path / "r.jsonl", cost_kind="time")
    assert measure(SPARSE, [0, 1]).cost == 0.25 and measure("dense", [0]).cost == 1.0


def test_seconds_are_measured(tmp_path: Path) -> None:
    assert 0 < prober(tmp_path / "r.jsonl", cost_kind="time")(SPARSE, [0]).cost < 100
