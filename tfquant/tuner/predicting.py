"""The callable that stands for a model while it is evaluated, and what it was shown."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tfquant import verify
from tfquant.errors import DataError, shown

Arrays = Mapping[str, np.ndarray]
# What `evaluate` gets: an array, or {input name: array}, to an array, or {output name: array}.
Predict = Callable[[Any], Any]


class Predictor:
    """A model as `evaluate` sees it.

    A call takes {input name: array}, or of a model with one input the array alone, and returns NumPy arrays:
    {output name: array}, or of a model with one output the array alone.

    Args:
        function: the model.
        inputs: names of its inputs.
    """

    def __init__(self, function: verify.Function, inputs: tuple[str, ...]) -> None:
        self._function, self._inputs = function, inputs

    def __call__(self, inputs: Any) -> Any:
        found = self.outputs(self._named(inputs))
        return found if len(found) > 1 else next(iter(found.values()))

    def outputs(self, inputs: Arrays) -> Arrays:
        """The outputs by name."""
        return self._function(inputs)

    def _named(self, inputs: Any) -> dict[str, np.ndarray]:
        if isinstance(inputs, Mapping):
            named = {name: np.asarray(value) for name, value in inputs.items()}
        elif len(self._inputs) == 1:
            named = {self._inputs[0]: np.asarray(inputs)}
        else:
            named = {}
        if set(named) != set(self._inputs):
            wanted = ", ".join(f"{name!r}: array" for name in self._inputs)
            received = ", ".join(map(repr, inputs)) if isinstance(inputs, Mapping) else shown(type(inputs).__name__)
            raise DataError(f"evaluate must call the model with {{{wanted}}}. Received: {received}")
        return named


class Watched(Predictor):
    """A `Predictor` that remembers what tells one validation set from another.

    Attributes:
        first: the inputs of the first call, or None.
    """

    def __init__(self, function: verify.Function, inputs: tuple[str, ...]) -> None:
        super().__init__(function, inputs)
        self.first: Arrays | None = None
        self._state = hashlib.blake2b(digest_size=16)

    def outputs(self, inputs: Arrays) -> Arrays:
        if self.first is None:
            self.first = inputs
        for name in sorted(inputs):
            value = inputs[name]
            content = value.tobytes() if value.dtype != object else repr(value.tolist()).encode()
            self._state.update(f"{name} {value.dtype} {value.shape} ".encode() + content)
        return super().outputs(inputs)

    @property
    def fingerprint(self) -> str:
        """Hash of all inputs of all calls."""
        return self._state.hexdigest()
