"""Rules of fields: what the sections of a configuration check of their own values."""

import math
from typing import Any

from megagrow.errors import ConfigError

MAX_SIZE = 2**31 - 1  # of what is counted: far above any model, and small enough that checks of it take no time
MAX_DIVISORS = 32  # that a message lists


def require(holds: bool, message: str) -> None:
    """Raises ConfigError with the one-line message unless the rule holds."""
    if not holds:
        raise ConfigError(message)


def require_not_negative(section: Any, title: str, *names: str) -> None:
    """Raises ConfigError when one of these fields of a section is negative, endless, or not a number."""
    for name in names:
        value = getattr(section, name)
        require(value >= 0, f"{title}.{name}={value} must not be negative")
        require(value < math.inf, f"{title}.{name}={value} must be finite")


def require_size(section: Any, title: str, *names: str) -> None:
    """Raises ConfigError unless these fields of a section are positive and small enough to count anything."""
    for name in names:
        value = getattr(section, name)
        require(value > 0, f"{title}.{name}={value} must be positive")
        require(value <= MAX_SIZE, f"{title}.{name}={value} must be at most {MAX_SIZE}")


def divisors(n: int, limit: int | None = None) -> str:
    """The divisors of n up to `limit` as English: "1, 2, 4 or 8"; the largest of more than 32 are left out."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    both = sorted({*small, *(n // d for d in small)})
    found = [str(d) for d in both if d <= min(n, limit or n)][:MAX_DIVISORS]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " or " + found[-1]
