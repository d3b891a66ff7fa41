"""Which settings a run may be continued with: all that is computed is the same, or the field is named."""

import dataclasses
from typing import Any

import pytest

from ban_fast.config import Config
from ban_fast.training.run_store import config_differences

MAY_CHANGE = {"data.directory", "data.loader", "teacher.cache_directory", "teacher.cache_fill", "checkpoint_seconds"}
"""Where files lie, who reads them, and when: no bit of a result depends on it."""
SAME_BITS = {"step": ("auto", "eager", "graph")}
"""Values between which a field may change."""


def leaves(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name, and its value."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        name = prefix + field.name
        found |= leaves(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def with_value(name: str, value: Any) -> Config:
    """The default configuration with another value in one field."""
    config: Any = Config()
    *sections, field = name.split(".")
    section = config
    for part in sections:
        section = getattr(section, part)
    assert hasattr(section, field)
    setattr(section, field, value)
    return config  # type: ignore[no-any-return]


def another(value: Any) -> Any:
    """No configuration's, perhaps: nothing but whether it is the same is looked at."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "-other"
    if isinstance(value, dict):
        return {**value, "other": 1}
    if isinstance(value, tuple):
        return (*value, "other")
    assert value is None
    return 1


def differences(old: Config, new: Config) -> list[str]:
    return [name for name, _, _ in config_differences(old, new)]


@pytest.mark.parametrize("name", sorted(leaves(Config()).keys() - SAME_BITS.keys() - {"compile"}))
def test_every_field_is_free_or_refused(name: str) -> None:
    changed = with_value(name, another(leaves(Config())[name]))
    for old, new in ((Config(), changed), (changed, Config())):
        assert differences(old, new) == ([] if name in MAY_CHANGE else [name])


def test_free_fields_are_fields() -> None:
    assert leaves(Config()).keys() > MAY_CHANGE | SAME_BITS.keys()


def test_ways_to_make_steps_that_give_the_same_bits() -> None:
    """torch.compile gives others, by either of its names."""
    ways = [with_value("step", way) for way in SAME_BITS["step"]]
    compiled = [with_value("step", "compile"), with_value("compile", True)]
    for group, others in ((ways, compiled), (compiled, ways)):
        for old in group:
            assert not any(differences(old, new) for new in group)
            assert all(differences(old, new) == ["step"] for new in others)
