"""Bounds of settings, beside their defaults: `epochs: Positive = 4`."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from .errors import UserError


@dataclass(frozen=True)
class AtLeast:
    """A bound of a number, or of how many items a tuple has."""

    least: float


Positive = Annotated[int, AtLeast(1)]
NotNegative = Annotated[int, AtLeast(0)]
Amount = Annotated[float, AtLeast(0)]


def check(settings: Any) -> None:
    """Raises UserError where a field of a dataclass is below its bound, or none of the values that it may have."""
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        value, flag = getattr(settings, name), f"--{name.replace('_', '-')}"
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise UserError(f"{flag} {value}: must be one of {', '.join(get_args(kind))}")
        for bound in (one for one in getattr(kind, "__metadata__", ()) if isinstance(one, AtLeast)):
            if isinstance(value, tuple) and len(value) < bound.least:
                raise UserError(f"{flag}: give at least one")
            if not isinstance(value, tuple) and not value >= bound.least:
                raise UserError(f"{flag} {value}: must be at least {bound.least:g}")
