"""Pascal VOC annotations (a devkit, or plain folders of XML files and images) -> Records."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from detection.data.coco import choose_classes, clip_with_notes
from detection.data.faults import Faults
from detection.data.image_files import MAX_SIDE, check_names, header_size, join_paths
from detection.types import DataError, Records

MAX_XML_BYTES = 8 << 20
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")
EVERYTHING = "all"
"""The split name that means every annotation file, for folders without lists."""


@dataclass(frozen=True, slots=True)
class VocLayout:
    """Where the parts of a VOC data set are, below its root."""

    annotations_dir: str = "Annotations"
    images_dir: str = "JPEGImages"
    lists_dir: str = "ImageSets/Main"
    one_based: bool = True
    """VOC counts pixels from 1 and includes the last one; False for tools that write 0-based, continuous corners."""


@dataclass(slots=True)
class _Page:
    """What one XML file says: its image's size as declared, and its objects."""

    size: tuple[int, int] = (0, 0)
    names: list[str] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)


def read_voc(root: Path, split: str, classes: Sequence[str] | None = None, layout: VocLayout | None = None) -> Records:
    """The records of one split of a VOC data set; image ids are 1..R in the order of the split's list.

    Classes are those of the whole annotations folder sorted by name, so that every split has the same labels, unless
    `classes` names them; category ids are label + 1. `difficult` objects are crowd. Objects of classes that are not
    named are left out, with a note. An image is found by its name in the list; the XML's own path is not followed.
    Units: VOC's pixel (xmin..xmax), counted from 1 and inclusive, covers xmin - 1 to xmax in continuous coordinates.
    A box with xmin = xmax would be one pixel wide by that rule; annotation tools leave such boxes by accident, so they
    are dropped, with a note.
    Errors: DataError that lists every kind of fault of the split at once.
    Source: VOC 2012 devkit, section 3.4 (the top left pixel has coordinates (1, 1)); `one_based` of the layout.
    """
    layout = layout or VocLayout()
    annotations = root / layout.annotations_dir
    faults = Faults(f"{root} ({split})")
    names = _split_names(root, split, layout)
    files = _image_files(root / layout.images_dir)
    pages: list[_Page] = []
    paths: list[str] = []
    check_names(names, faults)
    faults.stop_if_any()
    for name in names:
        found = files.get(name)
        if found is None:
            faults.add(f"image files missing in {root / layout.images_dir}", name)
        pages.append(_read_page(annotations / f"{name}.xml", faults))
        paths.append(found or "")
    _check_sizes(root / layout.images_dir, paths, pages, faults)
    _check_corners(names, pages, faults)
    faults.stop_if_any()
    known = _class_names(annotations, names, pages)
    chosen = known if classes is None else [known[i] for i in choose_classes(known, classes, str(root))]
    return _assemble(root, split, layout, names, paths, pages, chosen)


def voc_splits(root: Path, layout: VocLayout | None = None) -> tuple[str, ...]:
    """The splits that a data set's image-set lists name, or ("all",) where it has none."""
    folder = root / (layout or VocLayout()).lists_dir
    return tuple(sorted(path.stem for path in folder.glob("*.txt"))) or (EVERYTHING,)


def _split_names(root: Path, split: str, layout: VocLayout) -> list[str]:
    """Image names of a split. A one-class list ("name 1", "name -1", "name 0") names all its images: those without
    the class are images without objects, and the XML files say the rest."""
    if split == EVERYTHING and not (root / layout.lists_dir / f"{split}.txt").is_file():
        names = sorted(p.stem for p in (root / layout.annotations_dir).glob("*.xml"))
        if not names:
            raise DataError(f"{root / layout.annotations_dir}: no XML files")
        return names
    path = root / layout.lists_dir / f"{split}.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        known = ", ".join(voc_splits(root, layout))
        raise DataError(f"{path}: no readable image-set list; splits of this data set: {known}") from None
    faults = Faults(str(path))
    names = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) > 2 or (len(words) == 2 and words[1] not in ("1", "-1", "0")):
            faults.add("lines that are neither 'NAME' nor 'NAME 1|-1|0'", f"line {number}: {line[:60]!r}")
        elif words:
            names.append(words[0])
    if not names:
        faults.add("no image is named")
    faults.add_all("images named more than once", (name for name, count in Counter(names).items() if count > 1))
    faults.stop_if_any()
    return names


def _image_files(folder: Path) -> dict[str, str]:
    """File name of each stem in the image folder; the first of IMAGE_SUFFIXES wins where a stem has several."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such image folder")
    rank = {suffix: i for i, suffix in enumerate(IMAGE_SUFFIXES)}
    found: dict[str, str] = {}
    for name in sorted(os.listdir(folder), key=lambda n: rank.get(os.path.splitext(n)[1].lower(), 99), reverse=True):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in rank:
            found[stem] = name
    return found


def _read_page(path: Path, faults: Faults) -> _Page:
    try:
        if path.stat().st_size > MAX_XML_BYTES:
            faults.add(f"annotation files larger than {MAX_XML_BYTES} bytes", path.name)
            return _Page()
        tree = fromstring(path.read_bytes())
    except FileNotFoundError:
        faults.add(f"annotation files missing in {path.parent}", path.name)
    except DefusedXmlException as error:
        faults.add("annotation files refused: they define entities", f"{path.name} ({type(error).__name__})")
    except (ParseError, ValueError, LookupError) as error:
        faults.add("annotation files that are not valid XML", f"{path.name} ({str(error)[:60]})")
    except OSError as error:
        faults.add("annotation files that cannot be read", f"{path.name} ({error.strerror})")
    else:
        return _parse_page(tree, path.name, faults)
    return _Page()


def _parse_page(tree: Element, where: str, faults: Faults) -> _Page:
    page = _Page()
    if tree.tag != "annotation":
        faults.add("XML files that are not VOC annotations", f"{where} (top element <{tree.tag[:40]}>)")
        return page
    height, width = (_number(tree.findtext(f"size/{key}")) or 0 for key in ("height", "width"))
    page.size = (int(height), int(width)) if min(height, width) > 0 and max(height, width) <= MAX_SIDE else (0, 0)
    for index, item in enumerate(tree.findall("object"), 1):
        place = f"{where}, object {index}"
        name = (item.findtext("name") or "").strip()
        corners = [_number(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
        difficult = (item.findtext("difficult") or "0").strip()
        if not name:
            faults.add("objects without a name", place)
        if difficult.lower() not in ("0", "1", "true", "false"):
            faults.add("'difficult' values other than 0 and 1", f"{place}: {difficult[:20]!r}")
        if None in corners:
            faults.add("boxes without four finite numbers", place)
            continue
        x1, y1, x2, y2 = (float(value) for value in corners if value is not None)
        page.names.append(name)
        page.boxes.append((x1, y1, x2, y2))
        page.difficult.append(difficult.lower() in ("1", "true"))
    return page


def _number(text: str | None) -> float | None:
    """A finite number, None where the text is none."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _check_sizes(folder: Path, paths: Sequence[str], pages: Sequence[_Page], faults: Faults) -> None:
    """Takes the size from the image's header where the XML file declares none."""
    for path, page in zip(paths, pages, strict=True):
        if page.size != (0, 0) or not path:
            continue
        size = header_size(folder / path)
        if size is None:
            faults.add("images without a declared size whose header cannot be read", path)
        else:
            page.size = size


def _check_corners(names: Sequence[str], pages: Sequence[_Page], faults: Faults) -> None:
    """Refuses inverted corners; many of them together are xywh in a field that must be xyxy."""
    inverted = [
        f"{name}: ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
        for name, page in zip(names, pages, strict=True)
        for x1, y1, x2, y2 in page.boxes
        if x2 < x1 or y2 < y1
    ]
    total = sum(len(page.boxes) for page in pages)
    looks = "; they look like xywh in a field that must be xyxy" if len(inverted) > 0.1 * total else ""
    faults.add_all(f"boxes whose corners are in the wrong order (max below min){looks}", inverted)


def _class_names(annotations: Path, names: Sequence[str], pages: Sequence[_Page]) -> list[str]:
    """Every class of the annotations folder, sorted. Files outside the split are read leniently: only for names."""
    found = {name for page in pages for name in page.names}
    lenient = Faults(str(annotations))
    read = set(names)
    for path in sorted(annotations.glob("*.xml")):
        if path.stem not in read:
            found.update(_read_page(path, lenient).names)
    return sorted(found - {""})


def _assemble(
    root: Path,
    split: str,
    layout: VocLayout,
    names: Sequence[str],
    paths: Sequence[str],
    pages: Sequence[_Page],
    classes: Sequence[str],
) -> Records:
    where = f"{root} ({split})"
    flat = [name for page in pages for name in page.names]
    image_rows = np.repeat(np.arange(len(pages)), [len(page.names) for page in pages])
    position = {name: i for i, name in enumerate(classes)}
    labels = np.array([position.get(name, -1) for name in flat], dtype=np.int64)
    if not (labels >= 0).any():
        counts = ", ".join(f"{name}: {flat.count(name)}" for name in sorted(set(flat))) or "none"
        raise DataError(f"{where}: no object belongs to a chosen class; objects per class: {counts}")
    boxes = np.array([box for page in pages for box in page.boxes], dtype=np.float64).reshape(-1, 4)
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    boxes[:, :2] -= float(layout.one_based)
    boxes[empty, :2] = boxes[empty, 2:]
    sizes = np.array([page.size for page in pages], dtype=np.int64)
    mine = np.flatnonzero(labels >= 0)
    places = [names[row] for row in image_rows[mine]]
    clipped, keep, notes = clip_with_notes(boxes[mine], sizes[image_rows[mine]], places, "in", where)
    if len(mine) < len(flat):
        notes.append(f"objects of classes that were not chosen, left out: {len(flat) - len(mine)}")
    rows = mine[keep]
    kept = clipped[keep]
    counts_per_image = np.bincount(image_rows[rows], minlength=len(pages))
    return Records(
        class_names=tuple(classes),
        category_ids=tuple(range(1, len(classes) + 1)),
        paths=join_paths(root / layout.images_dir, paths),
        image_ids=np.arange(1, len(pages) + 1, dtype=np.int64),
        sizes=sizes,
        offsets=np.concatenate([[0], np.cumsum(counts_per_image)]).astype(np.int64),
        boxes=kept,
        labels=labels[rows],
        crowd=np.array([d for page in pages for d in page.difficult], dtype=bool)[rows],
        area=(kept[:, 2] - kept[:, 0]) * (kept[:, 3] - kept[:, 1]),
        notes=tuple(f"{where}: {note}" for note in notes),
    )
