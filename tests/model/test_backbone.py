"""Backbones: any timm network with strides 8, 16, 32; weights from files; what is frozen stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from detection.config import ConfigError
from detection.model.backbone import Backbone, BackboneConfig
from detection.types import DataError

SMALL = "resnet10t"
IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def full_state(name: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    state: dict[str, Tensor] = timm.create_model(name).state_dict()
    return state


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0", "convnext_atto", "mobilenetv3_small_050"])
def test_networks_give_strides_8_16_32(name: str) -> None:
    backbone = BackboneConfig(name=name).build()
    features = backbone(IMAGES)
    assert [tuple(f.shape[2:]) for f in features] == [(8, 12), (4, 6), (2, 3)]
    assert [f.shape[1] for f in features] == backbone.channels


def test_channels_come_second_where_the_network_puts_them_last() -> None:
    backbone = BackboneConfig(name="swin_tiny_patch4_window7_224").build()
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, 224, 224))
    assert [tuple(f.shape[1:]) for f in features] == [(192, 28, 28), (384, 14, 14), (768, 7, 7)]


def test_unsuitable_networks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"stride \[16, 16, 16\], needed: \[8, 16, 32\]"):
        BackboneConfig(name="vit_tiny_patch16_224").build()
    with pytest.raises(ConfigError, match="'resnet_fifty' cannot be built"):
        BackboneConfig(name="resnet_fifty").build()


def test_pretrained_weights_without_a_network_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_args: object, **_options: object) -> None:
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ConfigError, match=r"needs the network or timm's cache\): cannot reach the hub"):
        BackboneConfig(name=SMALL, weights="timm").build()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_with_timms_names_loads(tmp_path: Path, suffix: str) -> None:
    state = full_state("convnext_atto")  # timm renames stages.0 to stages_0 in its feature extractor
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state}, path)
    else:
        safetensors.torch.save_file(state, path)
    own = BackboneConfig(name="convnext_atto", weights=str(path)).build().body.state_dict()
    assert torch.equal(own["stages_1.blocks.0.conv_dw.weight"], state["stages.1.blocks.0.conv_dw.weight"])
    assert torch.equal(own["stem_0.weight"], state["stem.0.weight"])


def test_a_file_with_other_names_loads_in_order(tmp_path: Path) -> None:
    state = full_state(SMALL)
    renamed = {f"t{i}": v for i, (n, v) in enumerate(state.items()) if "num_batches" not in n}
    torch.save(renamed, tmp_path / "weights.pth")
    own = BackboneConfig(name=SMALL, weights=str(tmp_path / "weights.pth")).build().body.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in own.items())


def test_a_file_in_an_installed_package_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "boxed_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    state = full_state(SMALL)
    torch.save(state, package / "some.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = BackboneConfig(name=SMALL, weights="package:boxed_weights").build().body.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in own.items())
    with pytest.raises(DataError, match="no installed Python package"):
        BackboneConfig(name=SMALL, weights="package:no_such_package").build()


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(full_state("resnet18"), tmp_path / "weights.pth")
    with pytest.raises(DataError, match=r"another architecture[\s\S]*conv1\.0\.weight is missing"):
        BackboneConfig(name=SMALL, weights=str(tmp_path / "weights.pth")).build()
    torch.save({f"t{i}": v for i, v in enumerate(full_state("resnet18").values())}, tmp_path / "renamed.pth")
    with pytest.raises(DataError, match="cannot be matched"):
        BackboneConfig(name=SMALL, weights=str(tmp_path / "renamed.pth")).build()


def norms(backbone: Backbone) -> list[nn.BatchNorm2d]:
    return [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize(("batch_norm", "frozen"), [("frozen", True), ("live", False), ("auto", False)])
def test_frozen_norms_ignore_the_batch(batch_norm: str, frozen: bool) -> None:
    backbone = BackboneConfig.model_validate({"name": SMALL, "batch_norm": batch_norm}).build().train()
    before = [n.running_mean.clone() for n in norms(backbone) if n.running_mean is not None]
    sum(f.sum() for f in backbone(IMAGES)).backward()  # type: ignore[union-attr]
    after = [n.running_mean for n in norms(backbone) if n.running_mean is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == frozen
    assert all((n.weight.grad is None) == frozen for n in norms(backbone))
    assert all(n.training != frozen for n in norms(backbone.eval().train()))


def test_auto_freezes_norms_of_loaded_weights(tmp_path: Path) -> None:
    torch.save(full_state(SMALL), tmp_path / "weights.pth")
    backbone = BackboneConfig(name=SMALL, weights=str(tmp_path / "weights.pth")).build().train()
    assert not any(n.training for n in norms(backbone))


@pytest.mark.parametrize(
    ("name", "stages", "first_trained"),
    [
        ("resnet10t", 0, "conv1.0.weight"),
        ("resnet10t", 1, "layer1.0.conv1.weight"),
        ("resnet10t", 2, "layer2.0.conv1.weight"),
        ("resnet10t", 5, None),
        ("tf_efficientnet_lite0", 2, "blocks.2.0.conv_pw.weight"),
        ("convnext_atto", 2, "stages_1.downsample.0.weight"),
    ],
)
def test_frozen_stages_are_the_first_ones(name: str, stages: int, first_trained: str | None) -> None:
    backbone = BackboneConfig(name=name, frozen_stages=stages).build()
    trained = [n for n, p in backbone.body.named_parameters() if p.requires_grad]
    frozen = [n for n, p in backbone.body.named_parameters() if not p.requires_grad]
    assert (trained[0] if trained else None) == first_trained
    assert [*frozen, *trained] == [n for n, _ in backbone.body.named_parameters()]


def test_layers_behind_c5_are_dropped() -> None:
    names = BackboneConfig(name="tf_efficientnet_lite0").build().state_dict()
    assert not any("conv_head" in n or "classifier" in n for n in names)


def test_colours_are_the_weights_own_or_the_users() -> None:
    assert BackboneConfig(name="tf_efficientnet_lite0").build().mean == (0.5, 0.5, 0.5)
    assert BackboneConfig(name=SMALL, mean=(0.1, 0.2, 0.3)).build().mean == (0.1, 0.2, 0.3)
