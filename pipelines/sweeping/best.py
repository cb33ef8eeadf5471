"""What a sweep has found, as the fine-tuning that builds on it takes it over."""

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError
from upath import UPath

from models.settings import InputError, Settings, first_line
from pipelines.sweeping.space import with_values

BEST = "best.yaml"
"""Values by their paths in the recipe."""


def best_values(sweep: UPath) -> dict[str, Any]:
    """A finished sweep's best values, by path."""
    values: dict[str, Any] = yaml.safe_load((sweep / BEST).read_text(encoding="utf-8"))
    return values


def swept(settings: Settings, values: Mapping[str, Any], section: str) -> Any:
    """The settings of a section with a sweep's best values in their place.

    Raises:
        InputError: they do not fit.
    """
    try:
        return with_values(settings, values, section)
    except (ValidationError, KeyError, TypeError) as error:
        raise InputError(f"the sweep's {BEST} does not fit {section}: {first_line(error)}") from error
