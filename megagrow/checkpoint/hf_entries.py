"""Single entries of config.json, read strictly: of the right type, in range, and without contradiction."""

from collections.abc import Mapping
from typing import Any

from megagrow.errors import CheckpointError


def positive(value: Any, wanted: type, key: str, where: str, above: int = 0) -> Any:
    """A number of the wanted type that is larger than `above`, small enough for a float to hold exactly."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not above < value < 2**53 or wanted(value) != value:
        kind = "whole number" if wanted is int else "number"
        rule = f"a {kind} greater than {above}" if above else f"a positive {kind}"
        raise CheckpointError(f"{where}: {key}={value!r} must be {rule}; correct it")
    return wanted(value)


def switch(value: Any, key: str, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key}={value!r} must be true or false; correct it")
    return value


def agreed(stated: Mapping[str, Any], where: str) -> Any:
    """The one value that several entries state."""
    values = list(stated.values())
    if any(value != values[0] for value in values):
        conflict = ", ".join(f"{key}={value}" for key, value in stated.items())
        raise CheckpointError(f"{where}: {conflict} contradict each other; make them equal")
    return values[0]


def unsupported(key: str, value: Any, remedy: str, where: str) -> CheckpointError:
    """What to raise for an entry that cannot be honoured."""
    return CheckpointError(
        f"{where}: {key}={value!r} is not supported, and without it the logits would change; {remedy}"
    )
