"""Weights files: whole detectors, fine-tuning to other classes, and files that are not what they claim."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detection.config import parse
from detection.model.retinanet import RetinaNet, RetinaNetConfig
from detection.model.weights import convert_torchvision, load_matching, load_weights, read_weights
from detection.types import DataError

OLD, NEW = ("cat", "dog", "owl"), ("owl", "yak", "cat", "emu")
WEIGHT, BIAS = "head.classes.output.weight", "head.classes.output.bias"


def build(num_classes: int, seed: int, **changes: Any) -> RetinaNet:
    torch.manual_seed(seed)
    tree = {"backbone": {"name": "resnet10t"}, "pyramid": {"width": 16}, "head": {"depth": 1}, **changes}
    return parse(RetinaNetConfig, tree, "test").build(num_classes)


def rows(state: dict[str, Tensor], name: str, num_outputs: int) -> Tensor:
    return state[name].reshape(9, num_outputs, *state[name].shape[1:])


class Malice:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('code was run')",))


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    source, model = build(3, seed=0), build(3, seed=1)
    torch.save({"model": source.state_dict(), "class_names": OLD, "step": 7}, tmp_path / "last.pt")
    report = load_weights(model, tmp_path / "last.pt", OLD)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), model.state_dict().values(), strict=True)
               if a.is_floating_point())  # fmt: skip
    assert (report.kept_classes, report.fresh_classes) == (OLD, ())
    assert str(report).endswith("tensors loaded")


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    trained, averaged = build(3, seed=0).state_dict(), build(3, seed=1).state_dict()
    for ema, expected in ((averaged, averaged), (None, trained)):
        torch.save({"model": trained, "ema": ema}, tmp_path / "last.pt")
        state, _ = read_weights(tmp_path / "last.pt")
        assert torch.equal(state[WEIGHT], expected[WEIGHT])


@pytest.mark.parametrize("background", [False, True])
def test_rows_of_classes_with_the_same_name_are_kept(background: bool) -> None:
    options: dict[str, Any] = {"head": {"depth": 1, "background": background}}
    if background:
        options["decode"] = {"activation": "softmax"}
    source, model = build(3, 0, **options).state_dict(), build(4, 1, **options)
    source[BIAS] += torch.arange(len(source[BIAS]))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    report = load_matching(model, source, NEW, OLD)
    after = model.state_dict()
    assert torch.equal(after["pyramid.lateral.0.weight"], source["pyramid.lateral.0.weight"])
    for name in (WEIGHT, BIAS):
        new, fresh = rows(after, name, 4 + background), rows(before, name, 4 + background)
        old = rows(source, name, 3 + background)
        assert torch.equal(new[:, [0, 2]], old[:, [2, 0]])
        assert torch.equal(new[:, [1, 3]], fresh[:, [1, 3]])
        assert torch.equal(new[:, 4:], old[:, 3:])
    assert (report.kept_classes, report.fresh_classes) == (("owl", "cat"), ("yak", "emu"))
    assert "classes kept: owl, cat" in str(report)
    assert "initialised anew: yak, emu" in str(report)


def test_the_same_number_of_other_classes_is_not_taken_for_the_same() -> None:
    source, model = build(3, 0).state_dict(), build(3, 1)
    before = model.state_dict()[WEIGHT].clone()
    report = load_matching(model, source, ("x", "y", "z"), OLD)
    assert torch.equal(model.state_dict()[WEIGHT], before)
    assert report.fresh_tensors == (WEIGHT, BIAS)
    assert load_matching(model, source, ("x", "y", "z"), None).fresh_classes == ()


def test_unnamed_classes_of_another_number_start_anew() -> None:
    report = load_matching(build(4, 1), build(3, 0).state_dict(), NEW, None)
    assert report.fresh_classes == NEW


def test_another_architecture_is_refused_and_the_model_untouched() -> None:
    model = build(3, 1)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(DataError, match=r"architecture\n  pyramid\.lateral\.0\.weight is 24x128x1x1, the model"):
        load_matching(model, build(3, 0, pyramid={"width": 24}).state_dict(), OLD, OLD)
    with pytest.raises(DataError, match=r"is missing[\s\S]*and \d+ more"):
        load_matching(model, build(3, 0, backbone={"name": "resnet18"}).state_dict(), OLD, OLD)
    with pytest.raises(DataError, match="another architecture"):
        load_matching(model, {"something": torch.zeros(3)}, OLD, OLD)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": Malice()}, path)
    with pytest.raises(DataError, match="may hold code, which is never run"):
        read_weights(path)
    path.write_bytes(pickle.dumps({"model": Malice()}))
    with pytest.raises(DataError, match=r"weights\.pth"):
        read_weights(path)


def test_files_that_are_not_weights_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    torch.save(build(1, 0).state_dict(), whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:-2000])
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(b"\x99" * 40)
    for name in ("cut.pth", "text.pth", "empty.pth", "cut.safetensors"):
        with pytest.raises(DataError, match=name):
            read_weights(tmp_path / name)
    with pytest.raises(DataError, match="no such weights file"):
        read_weights(tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DataError, match="holds a list"):
        read_weights(tmp_path / "list.pth")
    torch.save({"step": 3}, tmp_path / "numbers.pth")
    with pytest.raises(DataError, match="holds no tensors by name"):
        read_weights(tmp_path / "numbers.pth")


def test_an_archive_that_would_unpack_to_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10_000_000))
    with pytest.raises(DataError, match="would unpack to 10000000 bytes"):
        read_weights(path)


def test_unknown_torchvision_names_are_refused() -> None:
    with pytest.raises(DataError, match=r"'rpn\.head\.conv\.weight'"):
        convert_torchvision({"rpn.head.conv.weight": torch.zeros(1)})
