"""What a sweep has found, as the fine-tuning that builds on it takes it over."""

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError
from upath import UPath

from models.settings import InputError, Settings
from pipelines.sweeping.space import with_values

BEST = "best.yaml"
"""Values by their paths in the recipe."""


def best_values(sweep: UPath) -> dict[str, Any]:
    """A finished sweep's best values, by path.

    Raises:
        InputError: there are none.
    """
    values: Any = yaml.safe_load((sweep / BEST).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise InputError(f"{sweep / BEST} must have values by their paths, as finetune.learning_rate: 1.0e-4.")
    return values


def swept(settings: Settings, values: Mapping[str, Any], section: str) -> Any:
    """The settings of a section with a sweep's best values in their place.

    Raises:
        InputError: they do not fit.
    """
    try:
        return with_values(settings, values, section)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join((section, *map(str, first["loc"])))
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"the sweep's {BEST} does not fit this recipe: {place}: {reason}") from error
    except (KeyError, TypeError) as error:
        raise InputError(
            f"the sweep's {BEST} does not fit this recipe: it has settings that {section} has not"
        ) from error
