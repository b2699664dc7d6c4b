"""The one config system: frozen pydantic sections, a TOML file with what differs from the defaults, `--set` on top.

No component's schema lives here. Three steps and no more: no inheritance of files, no interpolation, no code.
"""

from __future__ import annotations

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticUndefined

MAX_CONFIG_BYTES = 1 << 20


class ConfigError(ValueError):
    """The user's configuration is wrong. The message lists every problem found, one a line."""


class Section(BaseModel):
    """A group of options. The string below a field documents it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _name_default_kinds(cls, tree: Any) -> Any:
        """A choice whose options are given without its `kind` is the default one."""
        if not isinstance(tree, dict):
            return tree
        named = dict(tree)
        for name, field in cls.model_fields.items():
            given, default = named.get(name), field.default
            if field.discriminator and isinstance(given, dict) and isinstance(default, Section):
                named[name] = {field.discriminator: default.model_dump()[str(field.discriminator)], **given}
        return named


S = TypeVar("S", bound=Section)


def load(schema: type[S], path: str | Path | None = None, overrides: Sequence[str] = ()) -> S:
    """The validated configuration: defaults, then the TOML file, then each `a.b=value` override.

    Errors: ConfigError with every problem of the file and the overrides at once.
    """
    tree: dict[str, Any] = {}
    where = "defaults"
    if path is not None:
        where = str(path)
        tree = _read_toml(Path(path))
    for text in overrides:
        _apply_override(tree, text)
    return parse(schema, tree, where)


def override(schema: type[S], tree: dict[str, Any], overrides: Sequence[str], where: str) -> S:
    """The validated configuration of a resolved tree (a checkpoint's, say) with `a.b=value` overrides on top."""
    tree = json.loads(json.dumps(tree))
    for text in overrides:
        _apply_override(tree, text)
    return parse(schema, tree, where)


def parse(schema: type[S], tree: dict[str, Any], where: str) -> S:
    """The validated configuration of a nested dictionary that came from `where` (a file's name, say)."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(schema, detail) for detail in error.errors(include_url=False)]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n".join([f"{where}: {count}", *(f"  {p}" for p in problems)])) from None


def describe(schema: type[Section]) -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, documentation) of every option, depth first. Variants of a union are all listed."""
    yield from _describe(schema, "")


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for every leaf in which two resolved configurations differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{prefix}{key}"
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference(a, b, f"{name}.")
        elif a != b:
            lines.append(f"{name}: {a!r} -> {b!r}")
    return lines


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes, so not a configuration")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _apply_override(tree: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {text}: expected name=value, with dots for sections (optim.lr=0.01)")
    for key in keys[:-1]:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {text}: {key!r} is a value, not a section")
        tree = child
    tree[keys[-1]] = _parse_value(value.strip())


def _parse_value(text: str) -> Any:
    """A TOML value where the text is one (1e-3, true, [1, 2], "x"), else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(schema: type[Section], detail: ErrorDetails) -> str:
    location = tuple(str(part) for part in detail["loc"])
    name = ".".join(location) or "(top level)"
    if detail["type"] == "extra_forbidden":
        known = _fields_at(schema, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{name}: no such option; {hint}"
    if detail["type"] == "missing":
        return f"{name}: required, and not given"
    message = detail["msg"]
    value = detail.get("input")
    allowed = detail.get("ctx", {}).get("expected_tags") or detail.get("ctx", {}).get("expected")
    given = value.get("kind") if isinstance(value, dict) and "kind" in value else value
    if isinstance(given, str) and isinstance(allowed, str):
        near = difflib.get_close_matches(given, [a.strip(" '") for a in allowed.replace(" or ", ",").split(",")], n=1)
        if near:
            message += f"; did you mean {near[0]!r}?"
    return f"{name}: {message} (given: {json.dumps(value, default=str)[:80]})"


def _fields_at(schema: type[Section], location: tuple[str, ...]) -> list[str]:
    """Field names of the section that a pydantic error location points into; union tags are location parts too."""
    candidates: list[type[Section]] = [schema]
    for part in location:
        following: list[type[Section]] = []
        for section in candidates:
            if part in section.model_fields:
                following += _sections_in(section.model_fields[part].annotation)
            elif part in _kinds(section) or part == section.__name__ or part.isdigit():
                following.append(section)
        candidates = following or candidates
    return [name for section in candidates for name in section.model_fields]


def _kinds(section: type[Section]) -> tuple[str, ...]:
    field = section.model_fields.get("kind")
    return tuple(str(a) for a in typing.get_args(field.annotation)) if field is not None else ()


def _sections_in(annotation: Any) -> list[type[Section]]:
    """Every section class that a type annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for arg in typing.get_args(annotation) for section in _sections_in(arg)]


def _describe(schema: type[Section], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in schema.model_fields.items():
        dotted = f"{prefix}{name}"
        inner = _sections_in(field.annotation)
        doc = " ".join((field.description or "").split())
        default = "(required)" if field.is_required() else _show_default(field.get_default(call_default_factory=True))
        yield dotted, _show_type(field.annotation), default, doc
        for section in inner:
            kind = _kinds(section)
            label = f"{dotted}[{kind[0]}]." if kind and len(inner) > 1 else f"{dotted}."
            yield from _describe(section, label)


def _show_default(value: Any) -> str:
    if isinstance(value, Section):
        return f"kind={value.kind!r}" if hasattr(value, "kind") else "(section)"
    if value is PydanticUndefined:
        return "(required)"
    return json.dumps(value, default=str)


def _show_type(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _show_type(args[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_show_type(a) for a in args)
    if origin is typing.Literal:
        return " | ".join(json.dumps(a) for a in args)
    if origin is not None:
        inside = ", ".join("..." if a is Ellipsis else _show_type(a) for a in args)
        return f"{origin.__name__}[{inside}]"
    if annotation is type(None):
        return "none"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
