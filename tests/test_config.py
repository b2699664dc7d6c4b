from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from detection.config import ConfigError, Section, describe, difference, load


class Sgd(Section):
    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Heavy-ball coefficient."""


class AdamW(Section):
    kind: Literal["adamw"] = "adamw"
    beta: float = 0.999
    """Second-moment decay."""


class Root(Section):
    epochs: int = Field(default=12, ge=1)
    """Passes over the data."""
    optim: Annotated[Sgd | AdamW, Field(discriminator="kind")] = Sgd()
    """The update rule."""
    sizes: tuple[int, ...] = (32, 64)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, 'epochs = 3\n[optim]\nkind = "adamw"\n')
    root = load(Root, path, ["optim.beta=0.5", "sizes=[1, 2]"])
    assert root == Root(epochs=3, optim=AdamW(beta=0.5), sizes=(1, 2))


def test_options_without_a_kind_are_the_default_choice(tmp_path: Path) -> None:
    assert load(Root, write(tmp_path, "[optim]\nmomentum = 0.5\n")).optim == Sgd(momentum=0.5)
    assert load(Root, None, ["optim.momentum=0.5"]).optim == Sgd(momentum=0.5)
    with pytest.raises(ConfigError, match=r"optim\.sgd\.beta"):
        load(Root, None, ["optim.beta=0.5"])


def test_override_of_a_word_needs_no_quotes() -> None:
    assert load(Root, None, ["optim.kind=adamw"]).optim == AdamW()


def test_five_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path, 'epoch = 3\nepochs = 0\nsizes = ["a"]\n[optim]\nkind = "sgd"\nmomentun = 0.5\nmomentum = 2\n'
    )
    with pytest.raises(ConfigError) as caught:
        load(Root, path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 5 problems"
    text = str(caught.value)
    assert "epoch: no such option; did you mean 'epochs'?" in text
    assert "optim.sgd.momentun: no such option; did you mean 'momentum'?" in text
    assert "greater than or equal to 1" in text
    assert "less than 1" in text
    assert "sizes.0" in text


def test_wrong_kind_is_named_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'adamw'"):
        load(Root, write(tmp_path, '[optim]\nkind = "adam"\n'))


@pytest.mark.parametrize(
    ("text", "message"),
    [("epochs = ", "not valid TOML"), ("epochs = nan", "epochs"), ("a = " + "[" * 100_000, "not valid TOML")],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(Root, write(tmp_path, text))


def test_missing_file_and_bad_override(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(Root, tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="expected name=value"):
        load(Root, None, ["epochs"])
    with pytest.raises(ConfigError, match="is a value, not a section"):
        load(Root, write(tmp_path, "epochs = 3"), ["epochs.x=1"])


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Root().epochs = 2  # type: ignore[misc]


def test_describe_lists_every_option_of_every_variant() -> None:
    rows = {name: (kind, default, doc) for name, kind, default, doc in describe(Root)}
    assert rows["epochs"] == ("int", "12", "Passes over the data.")
    assert rows["optim[sgd].momentum"] == ("float", "0.9", "Heavy-ball coefficient.")
    assert rows["optim[adamw].beta"][2] == "Second-moment decay."


def test_difference_names_each_leaf() -> None:
    old, new = Root().model_dump(), Root(epochs=3, optim=AdamW()).model_dump()
    assert difference(old, new) == [
        "epochs: 12 -> 3",
        "optim.beta: '(absent)' -> 0.999",
        "optim.kind: 'sgd' -> 'adamw'",
        "optim.momentum: 0.9 -> '(absent)'",
    ]
