"""Chat templates: a conversation to the text the model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import TokenizerError

MAX_TEMPLATE = 64 * 1024


class ChatTemplate:
    """The template of one model; ``variables`` are what it may use beside the conversation."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE:
            raise TokenizerError(
                f"tokenizer.chat_template: expected at most {MAX_TEMPLATE} characters, found {len(source)}"
            )
        self._variables = dict(variables)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        self._template = environment.from_string(source)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The prompt, and the sorted ranges of its characters that came from the caller."""
        try:
            text = self._template.render(
                {
                    **self._variables,
                    **variables,
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except Exception as error:
            raise TokenizerError(f"the model's chat template failed: {error}") from error
        return text, []


def _refuse(message: str) -> None:
    raise TemplateError(message)
