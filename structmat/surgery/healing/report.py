"""What healing did."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field

from structmat.surgery.atomic import atomic_write


@dataclass(frozen=True)
class HealReport:
    """What :func:`heal` did, step by step.

    Attributes:
        mode: "layerwise" or "distill".
        losses: of each step, at the weights before it.
        seconds: that the steps took, those before a resumption included.
        params: how many numbers were trained.
        validations: pairs of steps done and what ``validate`` gave.
        best_step: after how many steps the weights were those that the model has now.
        layers: of layerwise healing, each layer's relative error at its first step and at its last.

    Example:
        >>> from structmat import surgery
        >>> print(surgery.HealReport("distill", (0.5, 0.25), 1.5, 1000, best_step=2))
        healed by distill: 2 steps in 1.5 s, 1,000 parameters trained; loss 0.5 -> 0.25
    """

    mode: str
    losses: tuple[float, ...]
    seconds: float
    params: int
    validations: tuple[tuple[int, float], ...] = ()
    best_step: int = 0
    layers: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many steps were done."""
        return len(self.losses)

    @property
    def first(self) -> float:
        """The loss of the first step."""
        return self.losses[0]

    @property
    def final(self) -> float:
        """The loss of the last step."""
        return self.losses[-1]

    def __str__(self) -> str:
        text = (
            f"healed by {self.mode}: {self.steps:,} step{'' if self.steps == 1 else 's'} in {self.seconds:.1f} s, "
            f"{self.params:,} parameters trained; loss {self.first:.4g} -> {self.final:.4g}"
        )
        if self.validations:
            best = dict(self.validations)[self.best_step]
            text += f"\nvalidation {self.validations[0][1]:.4g} -> {best:.4g}, kept from step {self.best_step:,}"
        return text

    def to_json(self) -> str:
        """The report as JSON text; :meth:`from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> HealReport:
        """The report that :meth:`to_json` wrote.

        Raises:
            ValueError: if the text is not such JSON.
        """
        try:
            data = json.loads(text)
            data["losses"] = tuple(data["losses"])
            data["validations"] = tuple((step, value) for step, value in data["validations"])
            data["layers"] = {name: (first, last) for name, (first, last) in data["layers"].items()}
            return cls(**data)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"this is not the JSON of a HealReport: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to a file, whole or not at all.

        Raises:
            OSError: if the file cannot be written.
        """
        with atomic_write(path) as file:
            file.write((self.to_json() + "\n").encode())
