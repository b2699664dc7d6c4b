"""Any timm network as the detector's backbone: C3, C4, C5. The only file that imports timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import timm
import torch
from jaxtyping import Float
from pydantic import Field
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureInfo
from torch import Tensor, nn

from detection.config import ConfigError, Section
from detection.model.weights import find_package_weights, match_tensors, read_weights
from detection.types import DataError

STRIDES = [8, 16, 32]


class BackboneConfig(Section):
    """The network that turns images into features of stride 8, 16 and 32."""

    name: str = "resnet50"
    """Any timm model that gives features at these strides (`timm.list_models()`)."""
    weights: str = "none"
    """`none`; `timm` for timm's pretrained ones (from the network or its cache); `package:NAME` for the weights file
    inside an installed Python package; or the path of a .pth or .safetensors file. Names must be timm's, or the
    tensors must match timm's one by one in order."""
    batch_norm: Literal["auto", "frozen", "live"] = "auto"
    """Frozen batch norms keep their statistics, scale and shift; `auto` freezes them where weights are loaded."""
    batch_norm_eps: float | None = Field(None, ge=0)
    """Replaces the network's own epsilon (torchvision's COCO v1 weights were trained with 0)."""
    frozen_stages: int = Field(0, ge=0, le=5)
    """Parameters up to stride 2 ** frozen_stages do not train: 2 freezes a ResNet's stem and first stage."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth rate, for networks that have it."""
    mean: tuple[float, float, float] | None = None
    """Mean colour (0..1) that images are normalised with; that of timm's weights where not given."""
    std: tuple[float, float, float] | None = None
    """Deviation (0..1) likewise."""

    def build(self) -> Backbone:
        """The backbone with its weights loaded.

        Errors: ConfigError for a network that does not fit or weights that cannot be had; DataError for a bad file.
        """
        return Backbone(self)


class Backbone(nn.Module):
    """Normalised images (N, 3, H, W) -> C3, C4, C5."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.body = _create(config)
        info = _feature_info(self.body)
        if info.reduction() != STRIDES:
            raise ConfigError(f"backbone {config.name!r} has features of stride {info.reduction()}, needed: {STRIDES}")
        self.channels: list[int] = info.channels()
        self.last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        colours = timm.get_pretrained_cfg(config.name)
        self.mean = config.mean or (colours.mean if colours else IMAGENET_DEFAULT_MEAN)
        self.std = config.std or (colours.std if colours else IMAGENET_DEFAULT_STD)
        _load(self.body, config)
        self.frozen_norms = _batch_norms(self.body) if _freezes_norms(config) else []
        if config.batch_norm_eps is not None:
            for norm in _batch_norms(self.body):
                norm.eps = config.batch_norm_eps
        self.frozen_stages = _modules_up_to_stride(self.body, 2**config.frozen_stages)
        self._freeze()

    def forward(self, images: Float[Tensor, "N 3 H W"]) -> list[Float[Tensor, "N _ _ _"]]:
        """C3, C4, C5."""
        features: list[Tensor] = self.body(images)
        return [f.permute(0, 3, 1, 2) for f in features] if self.last else features

    def train(self, mode: bool = True) -> Backbone:
        """Training mode, with the frozen norms left in evaluation mode."""
        super().train(mode)
        for norm in self.frozen_norms:
            norm.eval()
        for module in self.frozen_stages:
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def _freeze(self) -> None:
        for module in [*self.frozen_norms, *self.frozen_stages]:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        self.train(self.training)


def create_classifier(
    name: str, num_classes: int, pretrained: bool
) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """timm's image classifier, and the mean and deviation of colour (0..1) that its images are normalised with.

    Errors: ConfigError for a network that cannot be built or weights that cannot be had.
    """
    try:
        network: nn.Module = timm.create_model(name, num_classes=num_classes, pretrained=pretrained)
    except Exception as error:  # as in _create
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"classifier {name!r} cannot be built: {reason}") from error
    colours = timm.get_pretrained_cfg(name)
    if colours is None:
        return network, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return network, colours.mean, colours.std


def _create(config: BackboneConfig) -> nn.Module:
    options: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    try:
        body: nn.Module = timm.create_model(
            config.name, features_only=True, out_indices=(-3, -2, -1), pretrained=config.weights == "timm", **options
        )
    except Exception as error:  # a hub client raises what it likes; timm itself RuntimeError, AttributeError, TypeError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = " (weights = 'timm' needs the network or timm's cache)" if config.weights == "timm" else ""
        raise ConfigError(f"backbone {config.name!r} cannot be built{hint}: {reason}") from error
    return body


def _load(body: nn.Module, config: BackboneConfig) -> None:
    """Loads a file's weights. They are those of the whole network, of which `body` is the part up to C5."""
    if config.weights in ("none", "timm"):
        return
    package = config.weights.removeprefix("package:")
    path = find_package_weights(package) if package != config.weights else Path(config.weights)
    state, _ = read_weights(path)
    own = body.state_dict()
    if set(own) <= set(state):
        expected = own
    else:
        with torch.device("meta"):
            expected = timm.create_model(config.name).state_dict()
    by_flat_name = {_flat(name): name for name in own}
    needed = {name for name in expected if _flat(name) in by_flat_name}
    if len(needed) != len(own):
        raise DataError(f"{path}: timm's {config.name!r} renames its tensors as a feature extractor; cannot load")
    matched = match_tensors(state, expected, needed, str(path))
    with torch.no_grad():
        for name, value in matched.items():
            own[by_flat_name[_flat(name)]].copy_(value)


def _flat(name: str) -> str:
    """timm's feature extractors join the first levels of a name by underscores."""
    return name.replace(".", "_")


def _freezes_norms(config: BackboneConfig) -> bool:
    return config.batch_norm == "frozen" or (config.batch_norm == "auto" and config.weights != "none")


def _feature_info(body: nn.Module) -> FeatureInfo:
    info = body.feature_info
    assert isinstance(info, FeatureInfo)
    return info


def _batch_norms(body: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in body.modules() if isinstance(module, nn.BatchNorm2d)]


def _modules_up_to_stride(body: nn.Module, stride: int) -> list[nn.Module]:
    """The modules, in the order of execution, up to the end of the last stage whose stride is at most `stride`."""
    info = _feature_info(body)
    ends = [_flat(stage["module"]) for stage in info.info if stage["reduction"] <= stride]
    if stride < 2 or not ends:
        return []
    named = [(_flat(name) + "_", module) for name, module in body.named_modules()]
    end = max(i for i, (name, _) in enumerate(named) if name.startswith(ends[-1] + "_"))
    return [module for _, module in named[1 : end + 1]]
