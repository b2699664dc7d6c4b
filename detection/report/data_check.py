"""The data-set check as text: one annotation file, or every split of a data set with the anchors that are to fit it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.text import Text

from detection.data.check import Finding, check_anchors, check_coco_json, check_records, check_shared_images
from detection.data.source import Source
from detection.data.transforms import TransformConfig, resized
from detection.model.anchors import anchor_levels
from detection.model.retinanet import RetinaNetConfig
from detection.report.tables import console
from detection.types import DataError, Records

STYLES = {"error": "bold red", "warning": "yellow", "info": ""}
GRID = 1024
"""Side of the image whose anchors are built for their cells; only the cells and the strides are used."""


def check_annotation_file(path: Path, images: Path | None) -> dict[str, list[Finding]]:
    """What there is to say about one COCO annotation file, under its name."""
    return {str(path): check_coco_json(path, images)}


def check_splits(
    source: Source, splits: Sequence[str], transform: TransformConfig, model: RetinaNetConfig, contents: bool
) -> dict[str, list[Finding]]:
    """What there is to say about each split, and with `contents` about the images that two of them share.

    A split that cannot be read is one error; the others are still checked.
    """
    found: dict[str, list[Finding]] = {}
    read: dict[str, Records] = {}
    strides = [8 * 2**level for level in range(model.pyramid.levels)]
    grids = [(GRID // stride, GRID // stride) for stride in strides]
    levels = anchor_levels(model.anchors, (GRID, GRID), grids, torch.device("cpu"))
    for split in dict.fromkeys(splits):
        try:
            read[split] = source.read(split)
        except DataError as error:
            found[split] = [Finding("error", str(error))]
            continue
        found[split] = check_records(read[split], contents=contents)
        found[split] += check_anchors(read[split], levels, lambda size: resized(size, transform, 1.0)[0] / size[0])
    for (a, first), (b, second) in itertools.combinations(read.items(), 2) if contents else ():
        found[f"{a} and {b}"] = check_shared_images(first, second)
    return found


def print_findings(found: dict[str, list[Finding]]) -> int:
    """Prints the findings under their headings, errors first; the number of errors."""
    terminal = console()
    order = ("error", "warning", "info")
    for heading, findings in found.items():
        terminal.print(Text(heading, style="bold"))
        for finding in sorted(findings, key=lambda f: order.index(f.severity)):
            terminal.print(Text(f"  {finding}", style=STYLES[finding.severity]))
        if not findings:
            terminal.print(Text("  nothing to report"))
    return sum(finding.severity == "error" for findings in found.values() for finding in findings)
