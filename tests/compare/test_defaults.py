"""Runs on record are known by the settings that are not the default: a default that changes makes them other runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megagrow.compare.record import GENERATION
from megagrow.config import Config
from megagrow.config_file import to_dict
from megagrow.earlier_growth import EarlierGrowth

FILE = Path(__file__).with_name("defaults.json")  # {generation, defaults}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted name -> value."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: each for part, own in value.items() for key, each in flat(own, f"{name}.{part}").items()}


def current() -> dict[str, Any]:
    earlier = dataclasses.asdict(EarlierGrowth(num_layers=1))
    found = {**flat(to_dict(Config())), **flat(earlier, "earlier")}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return {name.lstrip("."): value for name, value in plain.items()}


def test_defaults_are_those_of_the_generation() -> None:
    """Remedy: raise GENERATION if a default has changed, then write what `current()` gives into the file."""
    kept = json.loads(FILE.read_text())
    assert kept["generation"] == GENERATION
    assert kept["defaults"] == current()
