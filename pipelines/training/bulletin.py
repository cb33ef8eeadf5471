"""News from a run to the command that shows it. Imports nothing heavy: its actor starts in no time."""

from typing import Any


class Bulletin:
    """Holds the latest news of a run between its workers and the command that shows them."""

    def __init__(self) -> None:
        self._news: dict[str, Any] = {}

    def post(self, values: dict[str, Any]) -> None:
        """Adds to the news."""
        self._news.update(values)

    def read(self) -> dict[str, Any]:
        """All news so far."""
        return self._news
