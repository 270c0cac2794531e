"""The tuner's search on made-up models whose best config is known, and its measurements against plain ones."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unisparse_np import UniSparseConfig
from unisparse_np.attention import attend
from unisparse_np.evaluation.candidates import RANGES, Kind, Trial
from unisparse_np.evaluation.cost import modelled_cost, selection_share
from unisparse_np.evaluation.divergence import divergence
from unisparse_np.evaluation.head_curves import FACTORS, HeadBalance, HeadCurves, balanced_factors, measure_head_curves
from unisparse_np.evaluation.probe import Probe, Prober, prefill_seconds, time_tells
from unisparse_np.evaluation.results import ResultsFile
from unisparse_np.evaluation.search import Search, fit_of, layer_groups
from unisparse_np.evaluation.settle import settle
from unisparse_np.evaluation.tuning_report import composites_answer, fits_table
from unisparse_np.evaluation.windows import Windows

from .small_model import TEXT, small_model

LAYERS = 12


class MadeUpModel:
    """Layers of two heads whose loss is a power of the looseness and whose density falls with its logarithm.

    sensitivities: of the layers; heads: of the two heads in each.
    """

    def __init__(
        self,
        sensitivities: list[float] | None = None,
        composites_best: tuple[int, int] = (2, 8),
        heads: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        self.sensitivities = sensitivities or [1.0] * LAYERS
        self.composites_best, self.heads = composites_best, heads
        self.probes = 0

    def __call__(self, attention: Any) -> Probe:
        self.probes += 1
        layers = attention if isinstance(attention, list) else [attention] * LAYERS
        densities, kl = [], 0.0
        for layer, sensitivity in zip(layers, self.sensitivities, strict=True):
            heads = [] if layer == "dense" else [one_head(layer, n) for n in range(2)]
            densities.append(float(np.mean([self.density(head) for head in heads])) if heads else 1.0)
            kl += sensitivity * sum(s * self.loss(head) for s, head in zip(self.heads, heads, strict=False)) / (2 * LAYERS)
        return Probe(kl, modelled_cost(attention, densities), densities, [kl])

    def curves(self, config_of: Any) -> HeadCurves:
        """Each group of layers states its errors in another unit, as in a model: only the probes' losses compare groups."""
        configs = [config_of(factor) for factor in FACTORS]
        unit = [10.0**number for number, group in enumerate(layer_groups(LAYERS)) for _ in group]
        losses = np.array([self.loss(config) for config in configs])  # [factors]
        errors = np.multiply(unit, self.sensitivities)[:, None, None] * np.array(self.heads)[:, None] * losses
        return HeadCurves(errors, np.broadcast_to([self.density(config) for config in configs], errors.shape))

    def looseness(self, config: UniSparseConfig) -> float:
        return 1 - config.top_p if config.top_p is not None else 2 * config.row_threshold  # type: ignore[operator,return-value]

    def loss(self, config: UniSparseConfig) -> float:
        worse = 1.0 if (config.q_compress, config.k_compress) == self.composites_best else 4.0
        return 0.2 * worse * (2 if config.block_size == 128 else 1) * self.looseness(config) ** 1.2

    def density(self, config: UniSparseConfig) -> float:
        return min(1.0, max(0.05, 0.3 - 0.08 * math.log(self.looseness(config) / 0.05)))


def one_head(config: UniSparseConfig, head: int) -> UniSparseConfig:
    """The config of one head of a layer."""
    values = {key: getattr(config, key) for key in ("top_p", "row_threshold")}
    return replace(config, **{key: value[head] if isinstance(value, tuple) else value for key, value in values.items()})


def search_of(model: MadeUpModel, max_kl: float = 0.02) -> Search:
    return Search(model, model.curves, max_kl, LAYERS)


def test_the_best_kind_is_found_by_few_probes() -> None:
    model = MadeUpModel()
    search = search_of(model, 0.02)
    best = search.run()[0]
    assert (best.kind.block_size, best.kind.q_compress, best.kind.k_compress) == (64, 2, 8)
    assert model.probes <= Search.planned_probes(LAYERS) + 5
    assert [fit.cost for fit in search.ranked()] == sorted(fit.cost for fit in search.fits)


def test_the_bound_is_met_on_the_dot() -> None:
    model = MadeUpModel()
    fit = search_of(model, 0.013).fit(Kind(block_size=64, q_compress=2, k_compress=8))
    assert model(fit.kind.attention(fit.looseness)).kl == pytest.approx(0.013, rel=0.02)
    assert model(fit.kind.attention(fit.looseness)).cost == pytest.approx(fit.cost, rel=0.01)
    assert fit.exponent == pytest.approx(1.2, rel=0.02)


def test_both_rules_are_found_where_they_are_best() -> None:
    """A model that forgives a loose Top-P where a fine row threshold stands beside it."""

    class Forgiving(MadeUpModel):
        def loss(self, config: UniSparseConfig) -> float:
            return super().loss(config) * (0.2 if config.top_p_compress is not None and config.k_compress == 2 else 1)

    best = search_of(Forgiving(composites_best=(4, 2)), 0.02).run()[0]
    assert (best.kind.rule, best.kind.block_size, best.kind.q_compress, best.kind.k_compress) == ("both", 64, 4, 2)
    table = fits_table([best], 0.02)
    assert "both" in table and f"{(1 / 8 + 1 / 64) / 2:.3f}" in table


@pytest.mark.parametrize("model", [MadeUpModel([4.0] * 4 + [0.2] * 8), MadeUpModel(heads=(1.9, 0.1))], ids=["layers", "heads"])
def test_what_is_sensitive_gets_less_looseness_where_that_pays(model: MadeUpModel) -> None:
    search = search_of(model)
    per_head = search.run()[0]
    assert per_head.kind.heads is not None
    factors = np.array(per_head.kind.heads.factors(per_head.looseness))  # [layers, heads]
    if model.heads[0] == model.heads[1]:
        assert factors[:4].max() < factors[4:].min()
    else:
        assert factors[:, 0].max() < factors[:, 1].min()
    common = next(fit for fit in search.ranked() if fit.kind.heads is None)
    assert per_head.cost < 0.97 * common.cost


def test_alike_heads_stay_alike() -> None:
    search = search_of(MadeUpModel(), 0.02)
    settled, _ = settle(search.run(), MadeUpModel(), 0.02)
    assert settled is not None and settled.fit.kind.heads is None


def test_held_out_windows_decide() -> None:
    """On windows where everything loses half as much again, the bound still holds, and narrowly."""
    fits = search_of(MadeUpModel(), 0.02).run()
    harder = MadeUpModel([1.5] * LAYERS)
    settled, _ = settle(fits, harder, 0.02)
    assert settled is not None and 0.017 < settled.probe.kl <= 0.02
    easier, _ = settle(fits, MadeUpModel([0.5] * LAYERS), 0.02)
    assert easier is not None and 0.017 < easier.probe.kl <= 0.02 and easier.probe.cost < settled.probe.cost


def test_a_bound_that_nothing_meets() -> None:
    model = MadeUpModel([1e6] * LAYERS)
    search = search_of(model, 0.02)
    fits = search.run()
    assert not fits[0].reaches and "KL" in fits_table(fits, 0.02) and composites_answer(fits) == "No composite size keeps the bound."
    settled, closest = settle(fits, model, 0.02)
    assert settled is None and closest.probe.kl > 0.02


def test_a_cost_above_dense_is_no_result() -> None:
    class Useless(MadeUpModel):
        def density(self, config: UniSparseConfig) -> float:
            return 1.0

    settled, _ = settle(search_of(Useless(), 0.02).run(), Useless(), 0.02)
    assert settled is None


def test_a_model_that_loses_nothing_takes_the_loosest_value() -> None:
    fit = search_of(MadeUpModel([0.0] * LAYERS), 0.02).fit(Kind())
    assert fit.reaches and fit.looseness == RANGES["top_p"].highest


def test_lines_through_two_trials() -> None:
    trials = [Trial(0.02, Probe(0.01, 0.5, [0.4, 0.6], [])), Trial(0.04, Probe(0.04, 0.4, [0.3, 0.5], []))]
    fit = fit_of(Kind(), trials, 0.02)
    assert fit.exponent == pytest.approx(2) and fit.looseness == pytest.approx(0.02 * math.sqrt(2))
    assert fit.cost == pytest.approx(0.45) and fit.density == pytest.approx(0.45)
    assert fit.slopes == pytest.approx((0.1 / math.log(2),) * 2) and fit.cost_slope == pytest.approx(-0.1 / math.log(2))
    later = fit_of(Kind(key_anchors=2), [Trial(0.02, Probe(0.01, 0.6, [0.5, 0.7], []))], 0.02, fit)  # borrows both slopes
    assert later.looseness == pytest.approx(fit.looseness) and later.cost == pytest.approx(0.55) and later.density == pytest.approx(0.55)


def test_groups_of_layers() -> None:
    assert [layer for group in layer_groups(30) for layer in group] == list(range(30)) and len(layer_groups(30)) == 10
    assert layer_groups(2) == [[0], [1]] and layer_groups(1) == [[0]]


def test_factors_leave_out_most_at_the_same_loss() -> None:
    """Loss a square, density a logarithm: by Lagrange every head's weighted loss is the same."""
    at = np.array(FACTORS)
    strength = np.array([[4.0, 1.0], [1.0, 0.25]])  # [layers, heads]
    curves = HeadCurves(strength[..., None] * at**2, np.broadcast_to(0.5 - 0.1 * np.log(at), (2, 2, len(FACTORS))))
    weights = [1.0, 4.0]
    factors = np.array(balanced_factors(curves, weights))
    losses = strength * np.array(weights)[:, None] * factors**2
    assert losses.sum() == pytest.approx((strength * np.array(weights)[:, None]).sum(), rel=0.05)
    assert losses.max() < 1.2 * losses.min() and (factors[0, 0] < factors[0, 1]) and factors[1, 1] == pytest.approx(factors[0, 1])
    alike = HeadCurves(np.broadcast_to(at**2, curves.errors.shape), curves.densities)
    assert np.array(balanced_factors(alike, [1.0, 1.0])) == pytest.approx(1.0)


def test_heads_are_balanced_anew_for_a_stricter_bound() -> None:
    """Two heads whose losses grow as a square and as a square root: a smaller loss tightens the second more."""
    at = np.array(FACTORS)
    densities = np.broadcast_to(0.5 - 0.1 * np.log(at), (1, 2, len(at)))
    curves = HeadCurves(np.stack([at**2, at**0.5])[None], densities)  # [1, heads, factors]
    balance = HeadBalance(curves, [1.0], looseness=0.05)
    kind = Kind(rule="row_threshold", heads=balance)
    for looseness in (0.05, 0.0125):
        common = looseness / 0.05
        (factors,) = np.array(balance.factors(looseness))
        loss, bound = factors[0] ** 2 + factors[1] ** 0.5, common**2 + common**0.5
        assert loss == pytest.approx(bound, rel=0.1) and 2 * factors[0] ** 2 == pytest.approx(0.5 * factors[1] ** 0.5, rel=0.2)  # Lagrange
        (layer,) = kind.attention(looseness)  # type: ignore[misc]
        assert layer.row_threshold == pytest.approx(0.05 * factors, rel=0.01)
        assert kind.head_values(looseness) == [layer.row_threshold]
    first, second = np.log(factors) - np.log(balance.factors(0.05)[0])
    assert second < 2 * first < 0


def test_kinds_become_configs() -> None:
    assert Kind().attention(0.05) == UniSparseConfig()
    precise = Kind(block_size=64, q_compress=2, k_compress=4, rule="row_threshold")
    assert precise.attention(0.02) == UniSparseConfig.precise()
    assert precise.head_values(0.02) is None
    assert precise.config(0.02, [0.5, 1.0]).row_threshold == (0.01, 0.02)
    of_both = Kind(64, 4, 2, rule="both").config(0.05, [1.0, 2.0])
    assert of_both.top_p == (0.95, 0.9) and of_both.row_threshold == (0.02, 0.04)
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


def test_time_tells_only_where_sparse_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = small_model()
    token_ids = tokenizer.encode(TEXT)[:64]
    assert prefill_seconds(model, token_ids, UniSparseConfig()) > 0
    for sparse, tells in ((0.5, True), (0.95, False), (1.2, False)):
        monkeypatch.setattr(
            "unisparse_np.evaluation.probe.prefill_seconds",
            lambda model, ids, attention, sparse=sparse: 1.0 if attention == "dense" else sparse,
        )
        assert time_tells(model, token_ids) is tells


# ---- what single heads lose and keep ----


@pytest.mark.parametrize("chunk", [64, 1024])
def test_head_curves_against_whole_outputs(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece and in chunks: the change of the layer's output by one head alone, and the blocks that it keeps."""
    monkeypatch.setattr("unisparse_np.evaluation.head_curves._HOST_CHUNK", chunk)
    model, tokenizer = small_model()
    length = 300
    token_ids = tokenizer.encode(TEXT)[:length]
    kind, half = Kind(32, 4, 4, key_anchors=0), length // 2
    curves = measure_head_curves(model, [token_ids], lambda factor: kind.config(0.3 * factor))
    layer, head, n = 1, 1, FACTORS.index(2.0)
    seen: dict[int, tuple] = {}
    model.prefill(token_ids, model.new_cache(length), "dense", chunk_size=length, observer=lambda at, *rest: seen.setdefault(at, rest))
    q, k, v, out, _ = seen[layer]
    sparse, trace = attend(q, k, v, kind.config(0.6), backend=model.backend)
    d = model.config.head_dim
    change = (sparse[head] - out[head])[half:] @ model.weights.layers[layer].output[:, head * d : (head + 1) * d].T
    assert curves.errors[layer, head, n] == pytest.approx((change.astype(np.float64) ** 2).sum() / half, rel=1e-3)
    visible = trace.mask.shape[1] * (trace.mask.shape[1] + 1) / 2
    assert curves.densities[layer, head, n] == pytest.approx(trace.mask[head].sum() / visible)
    assert (np.diff(curves.densities) <= 0).all() and curves.errors[..., -1].min() > 0
