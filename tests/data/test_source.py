"""The table of data sources: chosen by kind, splits known by name."""

from __future__ import annotations

import pytest

from detection.config import ConfigError, Section, parse
from detection.data.source import CocoSource, CocoSplit, DigitsSource, Source, VocSource


class Holder(Section):
    data: Source


def test_kind_chooses_the_section() -> None:
    assert isinstance(parse(Holder, {"data": {"kind": "digits", "seed": 3}}, "x").data, DigitsSource)
    assert isinstance(parse(Holder, {"data": {"kind": "voc", "root": "a"}}, "x").data, VocSource)
    splits = {"train": {"annotations": "a.json", "images": "b"}}
    assert isinstance(parse(Holder, {"data": {"kind": "coco", "splits": splits}}, "x").data, CocoSource)


def test_options_survive_a_round_trip_through_json() -> None:
    for source in (
        DigitsSource(seed=4, contrast=(50.0, 60.0)),
        VocSource(root="a", classes=("x",), one_based=False),
        CocoSource(splits={"train": CocoSplit(annotations="a", images="b")}),
    ):
        again = Holder.model_validate_json(Holder(data=source).model_dump_json())
        assert again.data == source


def test_unknown_options_are_reported() -> None:
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        parse(Holder, {"data": {"kind": "digits", "sed": 3}}, "x")
    with pytest.raises(ConfigError, match="root"):
        parse(Holder, {"data": {"kind": "voc"}}, "x")
    with pytest.raises(ConfigError, match="splits"):
        parse(Holder, {"data": {"kind": "coco", "splits": {}}}, "x")


@pytest.mark.parametrize(
    "source",
    [
        DigitsSource(folder="/nonexistent"),
        VocSource(root="/nonexistent"),
        CocoSource(splits={"train": CocoSplit(annotations="a", images="b")}),
    ],
    ids=lambda s: s.kind,
)
def test_an_unknown_split_names_the_known_ones(source: DigitsSource | VocSource | CocoSource) -> None:
    with pytest.raises(ConfigError, match=r"'dev'.*known: train"):
        source.read("dev")
