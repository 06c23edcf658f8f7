"""Runs of a graph whose inputs and outputs lie ready: ``export/onnx_model.py`` says what they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.engines.base import Logits
from edgert.engines.onnx_caches import Buffer
from edgert.errors import EngineError


class Outputs(NamedTuple):
    """Of R rows and E states: ``hidden`` [R, dim]; by the dense head ``logits`` [R + E, vocab]; or by the
    FlashHead ``logits`` [R + E, N] of the tokens ``ids`` [R + E, N]; ``queries`` [R, width] where asked for.
    Valid until the next run of the pass."""

    hidden: Logits
    logits: Logits
    ids: npt.NDArray[np.int64] | None
    queries: Logits


class Pass:
    """Passes over ``length`` tokens. ``rows`` of them are scored and then ``more`` states of earlier ones, by
    the FlashHead if ``flash``, else by the dense head (None: the graph has no other); ``scored`` are the
    tokens that this head scores. ``queries``: floats of a row of this output, 0 where it is not wanted."""

    def __init__(
        self,
        runtime: Any,
        session: Any,
        *,
        dim: int,
        length: int,
        rows: Sequence[int],
        more: int,
        flash: bool | None,
        scored: int,
        windowed: bool,
        queries: int = 0,
    ) -> None:
        self._session, self._runtime = session, runtime
        self._binding = session.io_binding()
        self._arrays: list[npt.NDArray[Any]] = []
        self._ids = self._input("input_ids", np.zeros((1, length), np.int64))
        self._positions = self._input("positions", np.zeros((1, length), np.int64))
        self._more = self._input("more_states", np.zeros((1, more, dim), np.float32))
        self._filled = self._input("filled", np.array([-1], np.int32))
        self._input("rows", np.array(rows, np.int64))
        if flash is not None:
            self._input("flash", np.array(flash))
        if windowed:
            self._window_start = self._input("window_start", np.zeros(1, np.int32))
        self._windowed = windowed
        self._order = np.arange(length)
        n = len(rows) + more
        self._hidden = self._output("hidden", np.empty((1, len(rows), dim), np.float32))
        self._queries = np.empty((1, len(rows), queries), np.float32)
        if queries:
            self._output("queries", self._queries)
        scores = np.empty((1, n, scored), np.float32)
        self._scores = self._output("flash_logits" if flash else "logits", scores)
        self._chosen = self._output("flash_ids", np.empty((1, n, scored), np.int64)) if flash else None

    def _value(self, array: npt.NDArray[Any]) -> Any:
        self._arrays.append(array)  # before 1.24 a value did not keep the memory that it shares
        return self._runtime.OrtValue.ortvalue_from_numpy(array)

    def _input(self, name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self._binding.bind_ortvalue_input(name, self._value(array))
        return array

    def _output(self, name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if array.size:
            self._binding.bind_ortvalue_output(name, self._value(array))
        return array

    def bind(self, reads: Iterable[tuple[str, Buffer]], writes: Iterable[tuple[str, Buffer]]) -> None:
        """Caches by the names of the inputs: those that are read, and those that are written."""
        for name, buffer in reads:
            self._binding.bind_ortvalue_input(name, buffer.value)
        for name, buffer in writes:
            self._binding.bind_ortvalue_output(name.replace(".", "_out."), buffer.value)

    def run(
        self, tokens: Sequence[int], first: int, window_start: int, more: Sequence[Logits], filled: int = -1
    ) -> Outputs:
        """``tokens`` at position ``first`` and after; positions before ``window_start`` have left the
        windows; ``filled`` slots are in use, -1: as many as there are positions. Raises EngineError."""
        self._ids[0] = tokens
        self._filled[0] = filled
        np.add(self._order, first, out=self._positions[0])
        if self._windowed:
            self._window_start[0] = window_start
        for i, state in enumerate(more):
            self._more[0, i] = state
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # whatever ONNX Runtime's classes derive from
            raise EngineError(f"ONNX Runtime failed at position {first}: {error!s:.500}") from error
        chosen = self._chosen
        return Outputs(
            self._hidden[0], self._scores[0], None if chosen is None else chosen[0], self._queries[0]
        )
