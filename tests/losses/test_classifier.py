"""The classifier's losses: each against the released code where there is one, and a conformance suite for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from detection.losses.classifier import ROWS, TERMS, ClassifierLossConfig, RowsConfig, TermConfig, whole_foreground
from detection.types import AnchorLevel, Matches, Predictions
from tests.test_tables import kinds

ORACLES = Path(__file__).parent.parent / "data" / "files" / "oracles" / "cls"
CASES: dict[str, Any] = json.loads((ORACLES / "classification.json").read_text())
NAMES = [name for name, case in CASES.items() if "losses" in case]
each = pytest.mark.parametrize("config", [c() for c in ROWS], ids=lambda c: c.kind)


def rows(name: str) -> tuple[Tensor, Tensor]:
    with np.load(ORACLES / "classification.npz") as arrays:
        return torch.from_numpy(arrays[f"{name}__logits"]), torch.from_numpy(arrays[f"{name}__labels"])


def loss(options: dict[str, Any], logits: Tensor, labels: Tensor) -> Tensor:
    return ClassifierLossConfig.model_validate(options).build(logits.shape[1]).batch_loss(logits, labels)


def scene(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64) * 3
    return logits.to(dtype), torch.randint(0, 4, (6,), generator=generator)


RELEASED = {
    "cross_entropy_sum": {"kind": "ce"},
    "focal_g2_sum": {"kind": "focal"},
    "focal_g5_sum": {"kind": "focal", "gamma": 5},
    "flsd53_sum": {"kind": "flsd53"},
    "brier_mean_over_batch": {"kind": "brier"},
    "label_smoothing_0p05_mbls": {"kind": "label_smoothing"},
    "label_smoothing_0p05_mdca": {"kind": "label_smoothing", "off_class": True},
}


@pytest.mark.parametrize("key", RELEASED)
@pytest.mark.parametrize("name", NAMES)
def test_released_codes_losses(name: str, key: str) -> None:
    logits, labels = rows(name)
    expected = CASES[name]["losses"][key] / (len(labels) if key.endswith("_sum") else 1)
    assert loss({"classification": RELEASED[key]}, logits, labels).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_terms_are_added_with_their_weight(name: str) -> None:
    logits, labels = rows(name)
    plain = loss({}, logits, labels)
    more = loss({"auxiliary": [{"kind": "mdca", "weight": 0.5}, {"kind": "dca"}]}, logits, labels)
    case = CASES[name]["losses"]
    dca = case["dca_total_beta1"] - case["cross_entropy_sum"] / len(labels)
    assert (more - plain).item() == pytest.approx(0.5 * case["mdca_term"] + dca, rel=2e-4, abs=2e-6)


RELEASED_TERMS = {
    "mbls_m2_margin_term": {"kind": "mbls", "margin": 2, "weight": 1},
    "mmce": {"kind": "mmce", "normalisation": "torrvision", "weight": 1},
}


@pytest.mark.parametrize("key", RELEASED_TERMS)
@pytest.mark.parametrize("name", NAMES)
def test_released_codes_terms(name: str, key: str) -> None:
    logits, labels = rows(name)
    found = loss({"auxiliary": [RELEASED_TERMS[key]]}, logits, labels) - loss({}, logits, labels)
    assert found.item() == pytest.approx(CASES[name]["losses"][key], rel=2e-4, abs=2e-6)


@pytest.mark.parametrize("kind", [c().kind for c in TERMS])
def test_every_term_has_a_finite_gradient(kind: str) -> None:
    logits, labels = scene(torch.float32)
    loss({"auxiliary": [{"kind": kind}]}, logits.requires_grad_(), labels).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_table_and_union_agree() -> None:
    assert kinds(RowsConfig) == [c().kind for c in ROWS]
    assert kinds(TermConfig) == [c().kind for c in TERMS]
    assert len({c().kind for c in ROWS}) == len(ROWS)


@each
def test_gradcheck(config: Any) -> None:
    logits, labels = scene()
    criterion = ClassifierLossConfig(classification=config).build(4)
    assert torch.autograd.gradcheck(lambda z: criterion.batch_loss(z, labels), logits.requires_grad_())


@each
@pytest.mark.parametrize("size", [50.0, 1e3])
def test_finite_at_extreme_logits(config: Any, size: float) -> None:
    logits = (torch.eye(4) * 2 - 1).mul(size).repeat(4, 1).requires_grad_()
    found = ClassifierLossConfig(classification=config).build(4).batch_loss(logits, torch.arange(16) // 4)
    found.backward()
    assert found.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@each
def test_bfloat16_is_computed_in_float32(config: Any) -> None:
    logits, labels = scene(torch.bfloat16)
    criterion = ClassifierLossConfig(classification=config).build(4)
    assert criterion.batch_loss(logits, labels).item() == criterion.batch_loss(logits.float(), labels).item()


@each
def test_state_round_trip(config: Any) -> None:
    criterion = ClassifierLossConfig(classification=config).build(4)
    other = ClassifierLossConfig(classification=config).build(4)
    other.load_state_dict(criterion.state_dict())
    logits, labels = scene()
    assert other.batch_loss(logits, labels) == criterion.batch_loss(logits, labels)


@each
def test_the_engine_sees_a_detectors_losses(config: Any) -> None:
    logits, labels = scene(torch.float32)
    box = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    level = AnchorLevel(box, box, (8, 8), (1, 1))
    predictions = Predictions((logits[:, None].requires_grad_(),), (torch.zeros(6, 1, 4),), (level,))
    gt_index = torch.zeros(6, 1, dtype=torch.int32)
    matches = Matches((labels.int()[:, None],), (gt_index,), (torch.arange(6),), (box.repeat(6, 1),), torch.tensor(6.0))
    criterion = ClassifierLossConfig(classification=config).build(4)
    losses = criterion(predictions, matches)
    assert losses.total == losses.classification == criterion.batch_loss(logits, labels)
    assert losses.box == 0
    losses.total.backward()


def test_mae_is_the_l1_distance() -> None:
    logits, labels = scene()
    expected = (logits.softmax(1) - F.one_hot(labels, 4)).abs().sum(1).mean()
    torch.testing.assert_close(loss({"classification": {"kind": "mae"}}, logits, labels), expected)


def test_inverse_focal_pulls_harder_at_right_rows() -> None:
    logits, labels = torch.tensor([[2.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    p = logits.softmax(1)[0, 0].item()
    found = loss({"classification": {"kind": "inverse_focal", "gamma": 3}}, logits, labels).item()
    assert found == pytest.approx(-((1 + p) ** 3) * np.log(p))


def test_terms_see_every_image_as_found() -> None:
    logits, labels = scene()
    rows = whole_foreground(logits, labels)
    assert rows.scores.shape == (6, 4)
    torch.testing.assert_close(rows.scores.sum(1), torch.ones(6, dtype=torch.float64))
    assert rows.iou.tolist() == [1.0] * 6
