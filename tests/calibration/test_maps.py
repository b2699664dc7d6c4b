"""What every map of the table promises, and what each fits."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import TypeAdapter, ValidationError
from scipy.special import expit, logit

from detection.calibration.beta import BetaConfig, BetaMap
from detection.calibration.histogram import HistogramConfig, HistogramMap
from detection.calibration.isotonic import IsotonicConfig
from detection.calibration.linear import LinearConfig
from detection.calibration.logistic import element_cost
from detection.calibration.platt import PlattConfig, PlattMap
from detection.calibration.table import MAPS, FittedMap, MapConfig
from detection.calibration.temperature import TemperatureConfig, TemperatureMap

OPTIONS = [*(m() for m in MAPS), TemperatureConfig(objective="quality_focal"), PlattConfig(search="grid")]
every_map = pytest.mark.parametrize("config", OPTIONS, ids=lambda c: "-".join(map(str, c.model_dump().values())))
GRID = np.unique(np.concatenate([np.linspace(0, 1, 501), np.geomspace(1e-38, 1, 300)]))

rows = st.integers(1, 25).flatmap(
    lambda n: st.tuples(
        hnp.arrays(np.float64, n, elements=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0]))),
        hnp.arrays(np.float64, n, elements=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0]))),
    )
)


def sample(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Raw scores and outcomes whose chance is sigmoid(2 logit(score) - 1)."""
    rng = np.random.default_rng(seed)
    scores = rng.beta(1.5, 1.5, n)
    return scores, (rng.random(n) < expit(2 * logit(scores) - 1)).astype(np.float64)


@pytest.mark.parametrize("config", OPTIONS[:-1], ids=lambda c: "-".join(map(str, c.model_dump().values())))
@settings(max_examples=10, deadline=None)
@given(data=rows)
def test_any_data_give_a_rising_map_into_the_unit_interval(config: MapConfig, data: tuple) -> None:
    fitted = config.fit(*data)
    values = fitted.apply(GRID)
    assert values.dtype == np.float64
    assert values.min() >= 0
    assert values.max() <= 1
    assert np.diff(values).min() >= -4e-16


@every_map
@pytest.mark.parametrize("target", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("scores", [[0.7], [0.0], [1.0], [0.5, 0.5, 0.5], [0.1, 0.4, 0.9]])
def test_equal_targets_are_fitted_within_the_clamps(config: MapConfig, target: float, scores: list[float]) -> None:
    values = config.fit(np.array(scores), np.full(len(scores), target)).apply(np.array(scores))
    assert np.all((values >= 0) & (values <= 1))
    if config.kind in ("isotonic", "histogram", "linear"):
        assert values == pytest.approx(np.full(len(scores), target))


@every_map
def test_states_survive_json_and_a_checkpoint(config: MapConfig) -> None:
    fitted = config.fit(*sample(200))
    state = fitted.model_dump(mode="json")
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for copy in (json.loads(json.dumps(state)), torch.load(file, weights_only=True)):
        assert np.array_equal(TypeAdapter(FittedMap).validate_python(copy).apply(GRID), fitted.apply(GRID))


@every_map
def test_weights_count_as_repeats(config: MapConfig) -> None:
    if config.kind == "histogram":
        config = HistogramConfig(bins=1)  # equal counts are of detections, not of weight
    scores, targets = sample(60)
    times = np.random.default_rng(1).integers(0, 4, 60)
    weighted = config.fit(scores, targets, times.astype(np.float64)).apply(GRID)
    repeated = config.fit(np.repeat(scores, times), np.repeat(targets, times)).apply(GRID)
    assert weighted == pytest.approx(repeated, abs=1e-5)


@every_map
def test_the_order_of_detections_is_no_matter(config: MapConfig) -> None:
    scores, targets = sample(80)
    order = np.random.default_rng(2).permutation(80)
    assert config.fit(scores[order], targets[order]).apply(GRID) == pytest.approx(
        config.fit(scores, targets).apply(GRID), abs=1e-5
    )


def test_logistic_maps_find_the_law_that_made_the_data() -> None:
    scores, _ = sample(2000)
    platt = PlattConfig().fit(scores, expit(2 * logit(scores) - 1))
    assert (platt.a, platt.b) == pytest.approx((2, -1), abs=1e-4)
    beta = BetaConfig().fit(scores, expit(3 * np.log(scores) - 0.5 * np.log1p(-scores) + 1))
    assert (beta.a, beta.b, beta.c) == pytest.approx((3, 0.5, 1), abs=1e-3)
    soft = expit(logit(scores) / 1.7)
    assert TemperatureConfig().fit(scores, soft).temperature == pytest.approx(1.7, abs=1e-5)


def test_wrong_or_flat_data_stop_at_the_clamps() -> None:
    scores = np.array([0.6, 0.7, 0.8])
    assert TemperatureConfig().fit(scores, np.ones(3)).temperature == pytest.approx(0.05)
    assert TemperatureConfig().fit(scores, np.zeros(3)).temperature == pytest.approx(20)
    assert TemperatureConfig().fit(np.full(3, 0.5), np.ones(3)).temperature == 1
    backwards = PlattConfig().fit(np.array([0.2, 0.8]), np.array([0.9, 0.1]))
    assert backwards.a == 0
    assert 0 <= PlattConfig().fit(scores, np.ones(3)).b <= 20


@pytest.mark.parametrize("objective", ["nll", "quality_focal"])
def test_cost_slopes_equal_finite_differences(objective: str) -> None:
    logits, step = np.linspace(-6, 6, 41), 1e-6
    targets = np.random.default_rng(3).random(41)
    rise = element_cost(logits + step, targets, objective)[0] - element_cost(logits - step, targets, objective)[0]
    assert element_cost(logits, targets, objective)[1] == pytest.approx(rise / (2 * step), abs=1e-7)


def test_isotonic_pools_violators_and_draws_lines() -> None:
    fitted = IsotonicConfig().fit(np.array([0.1, 0.2, 0.4, 0.4]), np.array([0.5, 0.1, 1.0, 0.6]))
    assert fitted.x == (0.1, 0.2, 0.4)
    assert fitted.y == pytest.approx((0.3, 0.3, 0.8))
    assert fitted.apply(np.array([0.0, 0.15, 0.3, 1.0])) == pytest.approx([0.3, 0.3, 0.55, 0.8])


def test_histogram_takes_means_of_equal_counts() -> None:
    scores, targets = np.array([0.1, 0.2, 0.3, 0.5, 0.6, 0.9]), np.array([0.0, 0.4, 0.9, 0.5, 0.6, 1.0])
    fitted = HistogramConfig().fit(scores, targets)
    assert fitted.upper == pytest.approx((0.25, 0.55))
    assert fitted.values == pytest.approx((0.2, 0.7, 0.8))
    wild = HistogramConfig(monotone=False).fit(scores, targets[::-1].copy())
    assert wild.values == pytest.approx((0.8, 0.7, 0.2))
    assert HistogramConfig().fit(scores, targets[::-1].copy()).values == pytest.approx((1.7 / 3,) * 3)
    assert HistogramConfig().fit(np.full(6, 0.5), targets).upper == ()


def test_linear_is_least_squares_and_rises_by_default() -> None:
    scores, targets = sample(50)
    slope, intercept = np.polyfit(scores, targets, 1)
    fitted = LinearConfig().fit(scores, targets)
    assert (fitted.slope, fitted.intercept) == pytest.approx((slope, intercept))
    assert LinearConfig().fit(scores, 1 - targets).slope == 0
    assert LinearConfig(monotone=False).fit(scores, 1 - targets).slope == pytest.approx(-slope)


@pytest.mark.parametrize(
    "state",
    [
        {"kind": "isotonic", "x": [], "y": []},
        {"kind": "isotonic", "x": [0.1, 0.2], "y": [0.5]},
        {"kind": "isotonic", "x": [0.2, 0.1], "y": [0.1, 0.5]},
        {"kind": "isotonic", "x": [0.1, 0.2], "y": [0.5, 0.1]},
        {"kind": "isotonic", "x": [0.1], "y": [1.5]},
        {"kind": "isotonic", "x": [float("nan")], "y": [0.5]},
        {"kind": "histogram", "upper": [0.5], "values": [0.1]},
        {"kind": "histogram", "upper": [0.5, 0.5], "values": [0.1, 0.2, 0.3]},
        {"kind": "histogram", "upper": [], "values": [-0.1]},
        {"kind": "platt", "a": -1.0, "b": 0.0},
        {"kind": "platt", "a": 1.0, "b": float("inf")},
        {"kind": "temperature", "temperature": 0.0},
        {"kind": "temperature"},
        {"kind": "beta", "a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0},
        {"kind": "magic"},
    ],
)
def test_malformed_maps_are_refused(state: dict) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(FittedMap).validate_python(state)


def test_weights_that_weigh_nothing_are_refused() -> None:
    for weights in ([0.0, 0.0], [-1.0, 2.0], [np.inf, 1.0]):
        with pytest.raises(ValueError, match="weights"):
            PlattConfig().fit(np.array([0.1, 0.9]), np.array([0.0, 1.0]), np.array(weights))


def test_apply_is_what_the_formula_says() -> None:
    score = np.array([0.8])
    assert TemperatureMap(temperature=2.0).apply(score) == pytest.approx(expit(logit(0.8) / 2))
    assert PlattMap(a=2.0, b=0.5).apply(score) == pytest.approx(expit(2 * logit(0.8) + 0.5))
    assert BetaMap(a=2.0, b=1.0, c=0.5).apply(score) == pytest.approx(expit(2 * np.log(0.8) - np.log(0.2) + 0.5))
    assert HistogramMap(upper=(0.5,), values=(0.1, 0.9)).apply(np.array([0.0, 0.5, 0.51])).tolist() == [0.1, 0.1, 0.9]
