"""Chat templates: a conversation to the text the model was trained on."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import TokenizerError

if TYPE_CHECKING:
    from .chat_sandbox import ChatEnvironment

MAX_TEMPLATE = 64 * 1024

# A template may build a control token from a role ("<|" + role + "|>"), so these are not user text.
_ROLES = frozenset(("assistant", "developer", "function", "ipython", "model", "system", "tool", "user"))


class ChatTemplate:
    """The template of one model; ``variables`` are what it may use beside the conversation.

    It is compiled at its first use. Threads may share it."""

    def __init__(self, source: object, variables: Mapping[str, str]) -> None:
        if not isinstance(source, str) or len(source) > MAX_TEMPLATE:
            found = f"{len(source)} characters" if isinstance(source, str) else type(source).__name__
            raise TokenizerError(
                f"tokenizer.chat_template: expected at most {MAX_TEMPLATE} characters of text, found "
                f"{found}; the model file is damaged or not meant for chat"
            )
        self._source, self._variables = source, dict(variables)
        self._lock = threading.Lock()
        self._environment: ChatEnvironment | None = None
        self._template: Any = None

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The prompt, and the sorted ranges of its characters that came from the caller.

        ``variables`` are more names for the template (``tools``, ``enable_thinking`` ...), as JSON-like
        values. Raises TokenizerError when the template fails, refuses the conversation, or
        takes more steps or makes more text than it may."""
        # jinja2 takes a twentieth of a second to import; models without a conversation do not need it.
        from .chat_limits import Budget, marked
        from .chat_sandbox import ChatEnvironment
        from .chat_text import UserText

        with self._lock:
            try:
                given = marked([dict(m) for m in messages])
                for message in given:
                    if message.get("role") in _ROLES:
                        message["role"] = str.__str__(message["role"])
                if self._environment is None:
                    environment = ChatEnvironment()
                    self._template = environment.compiled(self._source)
                    self._environment = environment
                self._environment.budget = Budget()
                text = self._template.render(
                    {
                        "tools": None,
                        "documents": None,
                        **self._variables,
                        **{name: marked(value) for name, value in variables.items()},
                        "messages": given,
                        "add_generation_prompt": add_generation_prompt,
                    }
                )
            except Exception as error:
                reason = str(error) or type(error).__name__
                raise TokenizerError(
                    f"the model's chat template cannot write this conversation: {reason}"
                ) from error
            finally:
                if self._environment is not None:
                    self._environment.budget = Budget()
        return str.__str__(text), text.spans if isinstance(text, UserText) else ()
