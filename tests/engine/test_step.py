"""One optimisation step against the same written out; two ranks against one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from toy_training import CLASSES, ToyCriterion, ToyModel, assign, collate, run_ranks, sample

from detection.engine.parallel import Precision
from detection.engine.step import COLUMNS, NonFiniteError, StepParts, Window, check_weights, optimisation_step
from detection.types import Batch, Predictions

CPU = torch.device("cpu")


def parts_of(model: nn.Module, clip: float = 0.0, precision: Precision = "float32") -> StepParts:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    return StepParts(model, assign, ToyCriterion(), optimiser, len(CLASSES), CPU, precision, clip)


def batch_of(first: int, count: int = 2) -> Batch:
    return collate([sample(0, first + i) for i in range(count)])


def gradients(model: nn.Module, first: int) -> dict[str, torch.Tensor]:
    batch = batch_of(first)
    predictions = model(batch.images)
    ToyCriterion()(predictions, assign(predictions.anchors, batch.targets, len(CLASSES))).total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_step_takes_the_clipped_mean_gradient_of_its_batches(clip: float) -> None:
    model = ToyModel(dropout=0.0).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one, two = gradients(model, 0), gradients(model, 4)
    mean = {name: (one[name] + two[name]) / 2 for name in one}
    norm = torch.cat([g.flatten() for g in mean.values()]).norm()
    scale = min(1.0, clip / float(norm)) if clip else 1.0
    row = optimisation_step(parts_of(model, clip), [batch_of(0), batch_of(4)])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * scale * mean[name])
        assert parameter.grad is None
    assert row[COLUMNS.index("grad_norm")] == pytest.approx(float(norm), rel=1e-5)
    assert float(row[0]) == pytest.approx(float(row[1] + row[2]), rel=1e-5)


def test_forward_runs_in_bfloat16_and_the_loss_in_float32() -> None:
    model = ToyModel(dropout=0.0)
    kinds = []

    def note(module: nn.Module, args: object, predictions: Predictions) -> None:
        kinds.append(predictions.logits[0].dtype)

    model.register_forward_hook(note)
    row = optimisation_step(parts_of(model, precision="bfloat16"), [batch_of(0)])
    assert kinds == [torch.bfloat16]
    assert row.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("empty_rank", [-1, 1])
def test_two_ranks_have_the_gradient_of_one_on_the_joined_batch(tmp_path: Path, empty_rank: int) -> None:
    """With a rank that has no objects, too: it must neither hang nor weigh differently."""
    assert run_ranks(2, "gradients", str(tmp_path), str(empty_rank)) == [0, 0]
    model = ToyModel(dropout=0.0).eval()
    joined = [sample(0, i, objects=empty_rank < 0 or i < 4) for i in range(8)]
    predictions = model(collate(joined).images)
    matches = assign(predictions.anchors, collate(joined).targets, len(CLASSES))
    ToyCriterion()(predictions, matches).total.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"2-{rank}.pt", weights_only=True)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)


def row_of(value: float) -> torch.Tensor:
    return torch.full((len(COLUMNS),), value)


def test_window_means_survive_a_checkpoint() -> None:
    whole, first, second = Window(CPU), Window(CPU), Window(CPU)
    for value in (1.0, 2.0, 6.0):
        whole.add(row_of(value), [batch_of(0)], 0.1)
    first.add(row_of(1.0), [batch_of(0)], 0.1)
    second.resume(1, first.sums, first.steps)
    for value in (2.0, 6.0):
        second.add(row_of(value), [batch_of(0)], 0.1)
    assert whole.means() == second.means() == dict.fromkeys(COLUMNS, 3.0)
    assert (whole.steps, second.steps) == (3, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_window_names_the_first_bad_step_and_its_images(bad: float) -> None:
    window = Window(CPU, first=40)
    for index, value in enumerate([1.0, bad, bad]):
        window.add(row_of(value), [batch_of(10 * index)], 0.0)
    with pytest.raises(NonFiniteError) as error:
        window.check()
    message = str(error.value)
    assert "at step 42 (total " in message
    assert "window of steps 41-43" in message
    assert "image ids of that step: 110, 111\n" in message
    assert "image ids of the window: 100, 101, 110, 111, 120, 121\n" in message


def test_window_of_finite_steps_passes() -> None:
    window = Window(CPU)
    window.check()
    window.add(row_of(1e30), [batch_of(0)], 0.0)
    window.check()


def test_check_weights_names_the_weight() -> None:
    model = ToyModel()
    check_weights(model, 1)
    with torch.no_grad():
        model.logits.bias[1] = float("inf")
    with pytest.raises(NonFiniteError, match=r"after step 7, so they are not saved: logits\.bias"):
        check_weights(model, 7)
