"""Is sparse attention safe for this model and this text? Dense against sparse, where it loses, and what would mend it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from ..config import UniSparseConfig
from ..model.llama import Attention, Llama
from .layer_statistics import HeadStatistics, SparseAttentionMeter
from .predictions import CHUNK_SIZE, Predictions, compare_predictions, whole_blocks
from .prompt import per_layer, sparse_configs
from .remedies import Remedy, remedies_for

Verdict = Literal["safe", "doubtful", "unsafe"]
Progress = Callable[[str, int, int], None]  # what is going on, tokens done, tokens in all

# Rules of thumb: below the first pair sampling noise hides the change, beyond the second the text reads differently.
SAFE_KL, SAFE_AGREEMENT = 0.01, 0.97
DOUBTFUL_KL, DOUBTFUL_AGREEMENT = 0.1, 0.9

WORST_LAYERS = 3
WORST_HEADS = 5
TRIED_ON_THE_WHOLE_MODEL = 2
LEAST_GAIN = 0.1  # a remedy that lowers the worst layers' error by less is not worth a run
FREE_DENSITY = 0.02  # added density that counts as next to nothing


@dataclass(frozen=True)
class Trial:
    """One remedy, measured on the worst layers' own q, k, v, and if promising on the whole model.

    Attributes:
        flags: what to type, such as `--sink-blocks 1`.
        why: what it does, in words.
        density, output_error, mass_kept: means over the worst layers' heads; the baseline's are in ModelAudit.
        predictions: of the whole model with the change at every sparse layer; None where not run.
    """

    flags: str
    why: str
    density: float
    output_error: float
    mass_kept: float
    predictions: Predictions | None = None


@dataclass(frozen=True)
class ModelAudit:
    """What sparse attention changes in one model on one prompt.

    Attributes:
        tokens: length of the prompt.
        attention: the config of each layer.
        predictions: dense against sparse at the model's output.
        heads: every head of every sparse layer, measured on dense attention's q, k, v.
        worst_layers: sparse layers by output error, the worst first.
        worst_density, worst_output_error, worst_mass_kept: means over their heads, to compare trials with.
        trials: the remedies tried, the most promising first.
    """

    tokens: int
    attention: tuple[UniSparseConfig | Literal["dense"], ...]
    predictions: Predictions
    heads: tuple[HeadStatistics, ...]
    worst_layers: tuple[int, ...]
    worst_density: float
    worst_output_error: float
    worst_mass_kept: float
    trials: tuple[Trial, ...]

    @property
    def verdict(self) -> Verdict:
        """By the rules of thumb at the top of this file."""
        p = self.predictions
        if p.kl_mean <= SAFE_KL and p.top1_agreement >= SAFE_AGREEMENT:
            return "safe"
        return "doubtful" if p.kl_mean <= DOUBTFUL_KL and p.top1_agreement >= DOUBTFUL_AGREEMENT else "unsafe"

    @property
    def worst_heads(self) -> list[HeadStatistics]:
        """Heads by output error, the worst first."""
        return sorted(self.heads, key=lambda head: -head.output_error)[:WORST_HEADS]

    @property
    def best_trial(self) -> Trial | None:
        """The remedy with the smallest KL on the whole model; None where none does better than no remedy."""
        run = [trial for trial in self.trials if trial.predictions is not None]
        best = min(run, key=lambda trial: _kl(trial), default=None)
        return best if best is not None and _kl(best) < self.predictions.kl_mean else None

    def of_layer(self, layer: int) -> list[HeadStatistics]:
        """The layer's heads."""
        return [head for head in self.heads if head.layer == layer]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON; NaN as None."""
        values = asdict(self) | {"verdict": self.verdict, "density": self.predictions.density}
        values["best_trial"] = None if self.best_trial is None else self.best_trial.flags
        return plain(values)


def audit_model(
    model: Llama, token_ids: Sequence[int], attention: Attention, *, chunk_size: int | None = None, progress: Progress | None = None
) -> ModelAudit:
    """Measure, find the worst layers, try what might mend them. Runs the model densely three times and sparsely three times.

    Args:
        token_ids: the prompt, more than one block (see `encode_prompt`).
        attention: what to audit: a UniSparseConfig, or a list, one a layer, with at least one sparse layer.

    Raises:
        InvalidInput: no sparse layer, or a prompt that the model cannot hold.
    """
    layers = model.config.num_hidden_layers
    configs = sparse_configs(attention, layers)
    report = progress or (lambda *_: None)
    meter = SparseAttentionMeter(model.backend, {layer: [config] for layer, config in configs.items()})
    [predictions] = compare_predictions(
        model, token_ids, [attention], chunk_size=chunk_size, dense_observer=meter,
        progress=lambda done, total: report("dense against sparse", done, total),
    )  # fmt: skip
    heads = [head for layer in configs for head in meter.statistics(layer)]
    worst = sorted(configs, key=lambda layer: -_mean("output_error", meter.statistics(layer)))[:WORST_LAYERS]
    at_worst = [head for head in heads if head.layer in worst]
    audit = ModelAudit(
        tokens=len(token_ids),
        attention=tuple(per_layer(attention, layers)),
        predictions=predictions,
        heads=tuple(heads),
        worst_layers=tuple(worst),
        worst_density=_mean("density", at_worst),
        worst_output_error=_mean("output_error", at_worst),
        worst_mass_kept=_mean("mass_kept", at_worst),
        trials=(),
    )
    return _with_trials(audit, model, token_ids, {layer: configs[layer] for layer in worst}, chunk_size, report)


def _with_trials(
    audit: ModelAudit,
    model: Llama,
    token_ids: Sequence[int],
    worst: dict[int, UniSparseConfig],
    chunk_size: int | None,
    report: Progress,
) -> ModelAudit:
    """The audit with every remedy tried on the worst layers, and the most promising on the whole model."""
    config = worst[audit.worst_layers[0]]
    remedies = remedies_for(config)
    changed = {layer: [remedy.change(own) for remedy in remedies] for layer, own in worst.items()}
    meter = SparseAttentionMeter(model.backend, changed)
    model.prefill(
        token_ids, model.new_cache(len(token_ids)), "dense", observer=meter,
        chunk_size=whole_blocks(chunk_size or CHUNK_SIZE, [audit.attention], len(audit.attention)),
        progress=lambda done, total, _: report("trying remedies on the worst layers", done, total),
    )  # fmt: skip
    tried: list[tuple[Remedy, Trial]] = []
    for number, remedy in enumerate(remedies):
        heads = [head for layer in worst for head in meter.statistics(layer, number)]
        density, output_error, mass_kept = (_mean(name, heads) for name in ("density", "output_error", "mass_kept"))
        tried.append((remedy, Trial(remedy.flags(config), remedy.why, density, output_error, mass_kept)))
    tried.sort(key=lambda pair: -_gain(pair[1], audit))
    promising = [(r, t) for r, t in tried if t.output_error <= (1 - LEAST_GAIN) * audit.worst_output_error][:TRIED_ON_THE_WHOLE_MODEL]
    runs = compare_predictions(
        model, token_ids, [remedy.everywhere(audit.attention) for remedy, _ in promising], chunk_size=chunk_size,
        progress=lambda done, total: report("trying the best on the whole model", done, total),
    ) if promising else []  # fmt: skip
    by_flags = {trial.flags: run for (_, trial), run in zip(promising, runs, strict=True)}
    return replace(audit, trials=tuple(replace(trial, predictions=by_flags.get(trial.flags)) for _, trial in tried))


def _gain(trial: Trial, audit: ModelAudit) -> float:
    """Fall of the error (in factors of e) for the density it costs."""
    fall = np.log(max(audit.worst_output_error, 1e-12) / max(trial.output_error, 1e-12))
    return float(fall / (max(0.0, trial.density - audit.worst_density) + FREE_DENSITY))


def _mean(name: str, heads: Sequence[HeadStatistics]) -> float:
    return float(np.mean([getattr(head, name) for head in heads]))


def _kl(trial: Trial) -> float:
    assert trial.predictions is not None
    return trial.predictions.kl_mean


def plain(value: Any) -> Any:
    """Nested values for JSON, which has no NaN."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
