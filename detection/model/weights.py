"""Weights from files: reading them without running code, converting torchvision's names, matching them to a model."""

from __future__ import annotations

import importlib.util
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from detection.types import DataError

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
WRAPPERS = ("ema", "model", "state_dict", "model_state_dict")
"""Keys under which a checkpoint may hold the tensors; averaged weights come before the trained ones."""
CLASS_OUTPUT = ("head.classes.output.weight", "head.classes.output.bias")
BOX_BIAS = "head.boxes.output.bias"
BATCH_COUNTER = "num_batches_tracked"

TORCHVISION_NAMES = (
    (r"^backbone\.body\.(.+)$", r"backbone.body.\1"),
    (r"^backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?\.(weight|bias)$", r"pyramid.lateral.\1.\2"),
    (r"^backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?\.(weight|bias)$", r"pyramid.output.\1.\2"),
    (r"^backbone\.fpn\.extra_blocks\.p6\.(weight|bias)$", r"pyramid.extra.0.\1"),
    (r"^backbone\.fpn\.extra_blocks\.p7\.(weight|bias)$", r"pyramid.extra.1.\1"),
    (r"^head\.classification_head\.conv\.(\d)\.0\.(weight|bias)$", r"head.classes.convs.\1.\2"),
    (r"^head\.classification_head\.conv\.(\d)\.1\.(weight|bias)$", r"head.classes.norms.\1.\2"),
    (r"^head\.classification_head\.cls_logits\.(weight|bias)$", r"head.classes.output.\1"),
    (r"^head\.regression_head\.conv\.(\d)\.0\.(weight|bias)$", r"head.boxes.convs.\1.\2"),
    (r"^head\.regression_head\.conv\.(\d)\.1\.(weight|bias)$", r"head.boxes.norms.\1.\2"),
    (r"^head\.regression_head\.bbox_reg\.(weight|bias)$", r"head.boxes.output.\1"),
)
"""torchvision's parameter names (file versions 1 and 2) and ours."""
OLD_TOWER = re.compile(r"^(head\.(?:classification|regression)_head\.conv\.)(\d)\.(weight|bias)$")


@dataclass(frozen=True, slots=True, eq=False)
class LoadReport:
    """What a load kept. `str()` of it is meant for the user's eyes."""

    source: str
    kept: int
    """Tensors copied whole."""
    kept_classes: tuple[str, ...]
    """Classes whose rows of the last class layer were copied."""
    fresh_classes: tuple[str, ...]
    """Classes whose rows stay as initialised."""
    fresh_tensors: tuple[str, ...]
    """Other tensors that stay as initialised."""

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.kept} tensors loaded"]
        if self.fresh_classes or self.fresh_tensors:
            lines.append(f"  classes kept: {', '.join(self.kept_classes) or 'none'}")
            lines.append(f"  classes initialised anew: {', '.join(self.fresh_classes) or 'none'}")
        if self.fresh_tensors:
            lines.append(f"  tensors initialised anew: {', '.join(self.fresh_tensors)}")
        return "\n".join(lines)


def read_weights(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """The tensors of a .pth or .safetensors file by name, on the CPU, and the class names where the file has them.

    Code in the file is never run. A state dict inside a checkpoint is found.
    Errors: DataError for a file that is missing, truncated, not weights, or a pickle that asks for code.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such weights file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    names = content.get("class_names")
    class_names = tuple(str(n) for n in names) if isinstance(names, list | tuple) else None
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise DataError(f"{path}: holds no tensors by name (its keys: {', '.join(map(str, list(content)[:5]))})")
    return state, class_names


def find_package_weights(package: str) -> Path:
    """The one weights file inside an installed Python package, found without importing it.

    Errors: DataError where the package is not installed or has no weights file, or more than one.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"package:{package}: no installed Python package of this name")
    roots = [Path(place) for place in spec.submodule_search_locations]
    files = sorted(f for root in roots for f in root.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    if len(files) != 1:
        raise DataError(f"package:{package}: expected one weights file ({', '.join(SUFFIXES)}), found {len(files)}")
    return files[0]


def match_tensors(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], needed: set[str], where: str
) -> dict[str, Tensor]:
    """The tensors of `state` under the names of `expected`: by name, or by order where no name agrees.

    By order means that both have the same number of tensors (batch counters aside) with the same shapes one by one.
    Only the names in `needed` have to be there. Errors: DataError with the first names and shapes that do not match.
    """
    wanted = [name for name in expected if not name.endswith(BATCH_COUNTER)]
    given = [name for name in state if not name.endswith(BATCH_COUNTER)]
    if not set(wanted) & set(given):
        pairs = list(zip(given, wanted, strict=False))
        differing = [(g, w) for g, w in pairs if state[g].shape != expected[w].shape]
        odd = [f"{g} {_shape(state[g])} for {w} {_shape(expected[w])}" for g, w in differing]
        if odd or len(given) != len(wanted):
            counts = f"no name agrees, and {len(given)} tensors cannot be matched to {len(wanted)} in order"
            raise DataError(_mismatch(where, [counts, *odd]))
        return {w: state[g] for g, w in pairs if w in needed}
    problems = [f"{n} is missing" for n in wanted if n in needed and n not in state]
    common = [n for n in wanted if n in needed and n in state]
    problems += [f"{n} is {_shape(state[n])}, the model's {_shape(expected[n])}" for n in common
                 if state[n].shape != expected[n].shape]  # fmt: skip
    if problems:
        raise DataError(_mismatch(where, problems))
    return {n: state[n] for n in common}


def is_torchvision(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of torchvision's RetinaNet."""
    return any(name.startswith("head.classification_head.") for name in state)


def convert_torchvision(state: Mapping[str, Tensor], where: str = "state dict") -> dict[str, Tensor]:
    """The tensors of torchvision's `retinanet_resnet50_fpn` or `_v2` under our names.

    Errors: DataError for a name that neither has.
    """
    converted = {}
    for name, value in state.items():
        new_name = _convert_name(name)
        if new_name is None:
            raise DataError(f"{where}: {name!r} is not a tensor of torchvision's RetinaNet")
        converted[new_name] = value
    return converted


def load_weights(model: nn.Module, path: Path, class_names: Sequence[str]) -> LoadReport:
    """Loads a whole detector's weights, ours or torchvision's, into `model`; the report of what was kept.

    Classes are matched by name where the file has class names; without them their number has to agree, or all classes
    are initialised anew.
    """
    state, old_names = read_weights(path)
    if is_torchvision(state):
        state = convert_torchvision(state, str(path))
    return load_matching(model, state, class_names, old_names, str(path))


def load_matching(
    model: nn.Module,
    state: Mapping[str, Tensor],
    class_names: Sequence[str],
    old_class_names: Sequence[str] | None,
    where: str = "state dict",
) -> LoadReport:
    """Loads `state` into `model`; only the last class layer may differ. The report of what was kept.

    Rows of classes with the same name are kept, the others stay as the model has initialised them. Without old names
    the layer is taken whole if it fits.
    Errors: DataError that lists the first tensors that do not fit (another architecture); the model is then untouched.
    """
    own = model.state_dict()
    needed = {n for n in own if n not in CLASS_OUTPUT}
    loaded = match_tensors(state, own, needed, where) if needed & set(state) else {}
    if not loaded:
        raise DataError(_mismatch(where, [f"it has no tensor {n}" for n in list(own)[:5]]))
    whole = len(loaded)
    same_names = old_class_names is None or list(old_class_names) == list(class_names)
    if same_names and all(n in state and state[n].shape == own[n].shape for n in CLASS_OUTPUT):
        loaded |= {n: state[n] for n in CLASS_OUTPUT}
        kept, whole = tuple(class_names), whole + len(CLASS_OUTPUT)
    else:
        rows, kept = _class_rows(own, state, class_names, old_class_names or ())
        loaded |= rows
    with torch.no_grad():
        for name, value in loaded.items():
            own[name].copy_(value)
    fresh = tuple(n for n in class_names if n not in kept)
    return LoadReport(where, whole, kept, fresh, tuple(CLASS_OUTPUT) if not kept else ())


def _class_rows(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], class_names: Sequence[str], old_names: Sequence[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The last class layer with the rows of the classes that both have (and the background's) taken from `state`."""
    kept = tuple(name for name in class_names if name in old_names)
    per_cell = len(own[BOX_BIAS]) // 4
    new_width = len(own[CLASS_OUTPUT[1]]) // per_cell
    extra = new_width - len(class_names)
    old_width = len(old_names) + extra
    if not kept or any(n not in state or len(state[n]) != per_cell * old_width for n in CLASS_OUTPUT):
        return {}, ()
    to = [class_names.index(n) for n in kept] + [len(class_names)] * extra
    source = [old_names.index(n) for n in kept] + [len(old_names)] * extra
    rows = {}
    for name in CLASS_OUTPUT:
        new = own[name].clone().reshape(per_cell, new_width, *own[name].shape[1:])
        old = state[name].to(new).reshape(per_cell, old_width, *state[name].shape[1:])
        if new.shape[2:] != old.shape[2:]:
            return {}, ()
        new[:, to] = old[:, source]
        rows[name] = new.flatten(0, 1)
    return rows, kept


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a safetensors file, or damaged ({error})") from None


def _read_pickle(path: Path) -> Mapping[str, Any]:
    _refuse_compressed(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise DataError(f"{path}: not plain weights; it may hold code, which is never run ({reason})") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: not a weights file, or damaged ({str(error).strip()[:200]})") from None
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected tensors by name")
    return content


def _refuse_compressed(path: Path) -> None:
    """A small archive may unpack to more than the memory; torch itself never compresses."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > path.stat().st_size:
        raise DataError(f"{path}: not a weights file (compressed; would unpack to {unpacked} bytes)")


def _convert_name(name: str) -> str | None:
    old = OLD_TOWER.match(name)
    if old is not None:
        name = f"{old[1]}{int(old[2]) // 2}.0.{old[3]}"
    for pattern, replacement in TORCHVISION_NAMES:
        new_name, count = re.subn(pattern, replacement, name)
        if count:
            return new_name
    return None


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _mismatch(where: str, problems: Sequence[str], shown: int = 6) -> str:
    rest = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
    return "\n  ".join([f"{where}: these weights are of another architecture", *problems[:shown], *rest])
