"""What a sweep searches: settings of the recipe by their paths, each with a distribution."""

import math
from collections.abc import Mapping
from typing import Any, Self

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import Field, model_validator

from models.settings import Settings

Whole = int
_TRIED = 64
Value = bool | int | float | str | None


class Distribution(Settings):
    """Where a setting's values are drawn from: one of these."""

    log_uniform: tuple[float, float] | None = Field(
        None, description="Numbers from the first to the second, each magnitude as likely as another."
    )
    uniform: tuple[float, float] | None = Field(None, description="Numbers from the first to the second.")
    int: tuple[Whole, Whole] | None = Field(
        None, description="Whole numbers from the first to the second, both included."
    )
    choice: tuple[Value, ...] | None = Field(None, description="Any of these.")

    @model_validator(mode="after")
    def _one_and_in_order(self) -> Self:
        given = {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ValueError(f"must be one of {', '.join(type(self).model_fields)}, for example {{uniform: [0, 0.3]}}")
        ((name, values),) = given.items()
        if name == "choice":
            if len(values) < 2 or len(set(values)) < len(values):  # As Optuna compares them: true is 1.
                raise ValueError("choice must have at least two values, none twice")
            return self
        low, high = values
        if not (math.isfinite(low) and math.isfinite(high)) or low >= high:
            raise ValueError(f"{name}: the first bound, {low:g}, must be below the second, {high:g}")
        if name == "log_uniform" and low <= 0:
            raise ValueError(f"log_uniform: the bounds must be above 0, and {low:g} is not")
        return self

    @property
    def optuna(self) -> BaseDistribution:
        """As Optuna has it."""
        if self.choice is not None:
            return CategoricalDistribution(self.choice)
        if self.int is not None:
            return IntDistribution(*self.int)
        bounds = self.log_uniform or self.uniform
        assert bounds is not None
        return FloatDistribution(*bounds, log=self.log_uniform is not None)

    @property
    def samples(self) -> tuple[Value, ...]:
        """Values that tell whether all may stand in a recipe: a choice's, first whole numbers, or ends and middle."""
        if self.choice is not None:
            return self.choice
        if self.int is not None:
            low, high = self.int
            return (*range(low, min(high, low + _TRIED)), high)
        bounds = self.log_uniform or self.uniform
        assert bounds is not None
        return (*bounds, bounds[0] + 0.37 * (bounds[1] - bounds[0]))

    def holds(self, value: Any) -> bool:
        """Whether it can give this value."""
        if self.choice is not None:
            return any(repr(value) == repr(each) for each in self.choice)
        bounds = self.int or self.log_uniform or self.uniform
        number = isinstance(value, int if self.int is not None else int | float) and not isinstance(value, bool)
        return bool(bounds and number and bounds[0] <= value <= bounds[1])


def with_values(settings: Settings, values: Mapping[str, Any], section: str) -> Any:
    """The settings of a section with the values at their paths, `section.NAME` or `section.PART.NAME`.

    Raises:
        pydantic.ValidationError: they may not stand there.
    """
    document = settings.model_dump()
    for path, value in values.items():
        *parts, name = path.removeprefix(f"{section}.").split(".")
        place = document
        for part in parts:
            place = place[part]
        place[name] = value
    return type(settings).model_validate(document)


optuna.logging.set_verbosity(optuna.logging.WARNING)
