"""AdaFocal for classifiers, against recorded outputs of its authors' code, and where it departs from that."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from detection.losses.adafocal_rows import AdaFocalRows, AdaFocalRowsConfig
from detection.losses.adafocal_table import bin_of

RECORDED = np.load(Path(__file__).parents[1] / "data/files/oracles/cls/adafocal.npz", allow_pickle=False)
META = json.loads(str(RECORDED["meta"]))
SCENARIOS = [name for name in META if name not in ("lookup_edges", "extreme")]
EPOCHS = 6


def recorded(scenario: str, name: str) -> torch.Tensor:
    return torch.from_numpy(RECORDED[f"{scenario}__{name}"])


def published(scenario: str) -> AdaFocalRows:
    options = META[scenario]
    return AdaFocalRowsConfig(
        bins=options["num_bins"],
        rate=options["adafocal_lambda"],
        gamma=options["adafocal_gamma_initial"],
        switch=options["adafocal_switch_pt"],
        gamma_max=options["adafocal_gamma_max"],
        gamma_min=options["adafocal_gamma_min"],
        compat=True,
    ).build()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_six_epochs_equal_the_authors_code(scenario: str) -> None:
    module = published(scenario)
    logits, labels = recorded(scenario, "train_logits").requires_grad_(), recorded(scenario, "train_labels")
    for epoch in range(EPOCHS + 1):
        torch.testing.assert_close(module.gamma, recorded(scenario, "gamma")[epoch], rtol=2e-6, atol=1e-8)
        torch.testing.assert_close(module.edges[1:], recorded(scenario, "upper")[epoch], rtol=1e-6, atol=1e-9)
        own = recorded(scenario, "gamma_per_sample")[epoch]
        torch.testing.assert_close(module.row_gamma(logits, labels), own, rtol=2e-6, atol=1e-8)
        loss = module(logits, labels).sum()
        torch.testing.assert_close(loss.double(), recorded(scenario, "train_loss_sum")[epoch], rtol=2e-5, atol=0)
        if epoch in (0, EPOCHS):
            (gradient,) = torch.autograd.grad(loss, logits)
            stored = recorded(scenario, "train_grad")[min(epoch, 1)]
            torch.testing.assert_close(gradient, stored, rtol=2e-5, atol=1e-5)
        if epoch < EPOCHS:
            pairs = (recorded(scenario, f"val_conf_e{epoch}"), recorded(scenario, f"val_correct_e{epoch}"))
            rows = module.adapt(*pairs)
            gap = recorded(scenario, "gap")[epoch]
            torch.testing.assert_close(torch.tensor(rows["gap"], dtype=torch.float64), gap, rtol=0, atol=2e-7)


def test_lookup_counts_the_upper_edges_passed() -> None:
    case = META["lookup_edges"]
    scores = torch.tensor([float("nan") if p is None else p for p in case["pt"]], dtype=torch.float64)
    index = bin_of(scores, torch.tensor(case["edges"], dtype=torch.float64))
    assert torch.tensor(case["gammas"])[index].tolist() == case["gamma"]


@pytest.mark.parametrize("gamma", META["extreme"]["per_gamma"])
def test_extreme_probabilities(gamma: str) -> None:
    case = META["extreme"]
    module = AdaFocalRowsConfig(gamma=float(gamma)).build()
    logits, labels = torch.tensor(case["logits"], requires_grad=True), torch.tensor(case["labels"])
    loss = module(logits, labels).sum()
    loss.backward()
    assert loss.item() == pytest.approx(case["per_gamma"][gamma]["loss"], rel=2e-5)
    torch.testing.assert_close(logits.grad, torch.tensor(case["per_gamma"][gamma]["grad"]), rtol=2e-5, atol=2e-7)


def test_the_loss_is_differentiated_exactly() -> None:
    module = AdaFocalRowsConfig(bins=3).build().double()
    module.gamma.copy_(torch.tensor([2.5, -1.5, 0.0]))
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    logits[:4, 0] += 1.5
    assert len(set(module.row_gamma(logits, labels).tolist())) == 3
    assert torch.autograd.gradcheck(lambda z: module(z, labels), logits.requires_grad_())


def saturated() -> tuple[torch.Tensor, torch.Tensor]:
    """100 scores of which 80 are exactly 1, half of them wrong."""
    scores = torch.cat([torch.linspace(0.5, 0.9, 20), torch.ones(80)])
    return scores, torch.arange(100) % 2


def test_certain_rows_follow_their_own_gap_where_the_released_code_forgets_them() -> None:
    scores, correct = saturated()
    logits, labels = torch.tensor([[60.0, 0.0]]), torch.tensor([0])
    ours, theirs = AdaFocalRowsConfig(bins=5).build(), AdaFocalRowsConfig(bins=5, compat=True).build()
    for _ in range(3):
        ours.adapt(scores, correct)
        theirs.adapt(scores, correct)
    assert theirs.row_gamma(logits, labels).item() == 1
    assert ours.row_gamma(logits, labels).item() == pytest.approx(np.exp(3 * 0.5), rel=1e-6)


def test_every_score_is_counted_and_empty_bins_take_the_gamma_below() -> None:
    ours = AdaFocalRowsConfig(bins=5).build()
    rows = ours.adapt(*saturated())
    assert rows["count"] == [20, 0, 0, 0, 80]
    filled = [b for b, n in enumerate(rows["count"]) if n]
    for b, n in enumerate(rows["count"]):
        if not n:
            assert rows["gamma"][b] == rows["gamma"][max((f for f in filled if f < b), default=filled[0])]
    theirs = AdaFocalRowsConfig(bins=5, compat=True).build()
    assert sum(theirs.adapt(torch.linspace(0.1, 0.9, 50), torch.ones(50).long())["count"]) == 49


def test_one_image_and_none() -> None:
    module = AdaFocalRowsConfig(bins=4).build()
    before = module.gamma.clone()
    assert module.adapt(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) == {}
    assert torch.equal(module.gamma, before)
    rows = module.adapt(torch.tensor([0.75]), torch.tensor([False]))
    assert sum(rows["count"]) == 1
    assert module.gamma.tolist() == pytest.approx([np.exp(0.75)] * 4)


def test_the_table_is_state() -> None:
    first, second = AdaFocalRowsConfig(bins=5).build(), AdaFocalRowsConfig(bins=5).build()
    first.adapt(*saturated())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.gamma, second.gamma)
    assert torch.equal(first.edges, second.edges)
    assert first.gamma.dtype == first.edges.dtype == torch.float64


def test_gamma_must_lie_within_its_limits() -> None:
    with pytest.raises(ValueError, match="outside gamma_min"):
        AdaFocalRowsConfig(gamma=30.0)
