"""transformers and onnxruntime-genai behind the calls of a :class:`Runner`. Both are imported where they are
used: a machine needs only the peers it measures."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from edgert.bench.runners import Stepper

from edgert.errors import EngineError


class Transformers(Stepper):
    """A Hugging Face directory, or a GGUF file, which transformers turns into float32."""

    label = "transformers"

    def __init__(self, source: Path, threads: int) -> None:
        self._torch: Any = import_module("torch")
        hub: Any = import_module("transformers")
        self._torch.set_num_threads(threads)
        hub.logging.set_verbosity_error()
        hub.logging.disable_progress_bar()
        place: dict[str, Any] = {"pretrained_model_name_or_path": str(source), "dtype": "auto"}
        if source.is_file():
            place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
            place["dtype"] = self._torch.float32
        try:
            self._model = hub.AutoModelForCausalLM.from_pretrained(**place, local_files_only=True).eval()
        except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
            raise EngineError(f"transformers cannot load {source}: {error}") from error
        self._make_cache = hub.DynamicCache
        self._copies, self._kept = False, None
        self.clear()

    def prefill(self, tokens: Sequence[int]) -> int:
        with self._torch.inference_mode():
            ids = self._torch.tensor([list(tokens)])
            out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def step(self, token: int) -> int:
        return self.prefill((token,))

    def clear(self) -> None:
        self._cache = self._make_cache(config=self._model.config)

    def mark(self) -> None:
        self._kept = copy.deepcopy(self._cache) if self._copies else None

    def back(self) -> bool:
        if self._kept is None:  # windows cannot be cropped, and a copy doubles the memory of the cache
            self._copies = True
            return False
        self._cache = copy.deepcopy(self._kept)
        return True

    def step_bytes(self) -> None:
        return None

    def about(self) -> dict[str, Any]:
        """``isa`` is what torch's kernels chose."""
        return {
            "engine_version": f"{version('transformers')}, torch {version('torch')}",
            "isa": self._torch.backends.cpu.get_cpu_capability().lower(),
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }

    def close(self) -> None:
        del self._model, self._cache


class OnnxGenai(Stepper):
    """A directory that onnxruntime-genai's model builder wrote."""

    label = "onnxruntime-genai"

    def __init__(self, source: Path, threads: int, context: int) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it is on in the published builds
        self._genai: Any = import_module("onnxruntime_genai")
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        try:
            config = self._genai.Config(str(source))
            config.overlay(json.dumps(options))
            self._model = self._genai.Model(config)
        except RuntimeError as error:
            raise EngineError(f"onnxruntime-genai cannot load {source}: {error}") from error
        self._context = context
        self.clear()

    def prefill(self, tokens: Sequence[int]) -> int:
        self._generator.append_tokens(np.asarray(tokens, np.int32))
        self._length += len(tokens)
        logits = np.asarray(self._generator.get_logits())
        return int(logits.reshape(-1, logits.shape[-1])[-1].argmax())

    def step(self, token: int) -> int:
        return self.prefill((token,))

    def clear(self) -> None:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._context, batch_size=1)
        self._generator, self._length = self._genai.Generator(self._model, parameters), 0

    def mark(self) -> None:
        self._marked = self._length

    def back(self) -> bool:
        self._generator.rewind_to(self._marked)
        self._length = self._marked
        return True

    def step_bytes(self) -> None:
        return None

    def about(self) -> dict[str, Any]:
        return {"engine_version": version("onnxruntime-genai"), "isa": None}

    def close(self) -> None:
        del self._generator, self._model
