"""The jinja2 environment in which a model file's chat template runs.

A template is a program that came with a download. jinja2's sandbox keeps it from the Python
objects around it; this environment also keeps it from eating time and memory, and follows
the user's text through it. Whatever a template can do that costs more than a constant passes here:
operators and calls through the sandbox's hooks, filters and tests through wrappers, and what jinja2
compiles straight to Python (loops, comparisons, slices, ``~``) through :mod:`edgert.chat_metering`.
Nothing is evaluated while compiling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, Undefined, nodes
from jinja2.ext import Extension
from jinja2.filters import do_indent, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace, pass_context

from .chat_limits import Budget, Counted, LimitError
from .chat_metering import CONCAT, TICK, TOUCH, WALK, metered
from .chat_text import UserText

# Methods of plain values that a template may call. Nothing that pads or formats.
_METHODS = {
    str: [
        "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha",
        "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower",
        "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
        "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
        "title", "upper",
    ],
    dict: ["copy", "get", "items", "keys", "values"],
    list: ["copy", "count", "index"],
    tuple: ["count", "index"],
}  # fmt: skip
# Filters by how they read their first operand: not at all, its top level, as text, all of it.
_CHEAP = ["attr", "count", "d", "default", "first", "items", "last", "length"]
_SHALLOW = [
    "abs", "float", "int", "list", "map", "reject", "rejectattr", "reverse", "round", "select", "selectattr",
]  # fmt: skip
_TEXT = ["capitalize", "lower", "title", "trim", "truncate", "upper"]
_DEEP = ["dictsort", "max", "min", "sort", "unique"]
_CHEAP_TESTS = [
    "boolean", "callable", "defined", "divisibleby", "even", "false", "float", "integer", "iterable",
    "mapping", "none", "number", "odd", "sameas", "sequence", "string", "true", "undefined",
]  # fmt: skip
_MAX_NUMBER = 10_000  # as an option of a filter: a width, a count, a precision


class _Generation(Extension):
    """``{% generation %}`` marks the model's part for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """A namespace can hold itself, so it does not print what it holds."""

    def __repr__(self) -> str:
        return "<namespace>"


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Runs one template at a time, against ``budget``."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=self._output,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self.budget = Budget()
        plain = self.filters
        self.filters = {name: self._metered(plain[name], self._free) for name in _CHEAP}
        self.filters |= {name: self._metered(plain[name], self._shallow) for name in _SHALLOW}
        self.filters |= {name: self._metered(plain[name], self._text) for name in _TEXT}
        self.filters |= {name: self._metered(plain[name], self._deep) for name in _DEEP}
        self.filters |= {
            "string": self._string,
            "safe": self._string,
            "join": self._join,
            "replace": self._replace,
            "format": self._format,
            "tojson": self._tojson,
            "indent": self._indent,
            TICK: self._tick,
            WALK: self._walk,
            TOUCH: self._touch,
            CONCAT: self.concat,
        }
        self.tests = {
            name: self._metered(test, self._free if name in _CHEAP_TESTS else self._deep)
            for name, test in self.tests.items()
        }
        self.globals = {
            "range": safe_range,
            "dict": dict,
            "namespace": _Namespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": self._raise_exception,
            "strftime_now": self._strftime_now,
        }

    def compiled(self, source: str) -> Any:
        """The template; raises what jinja2 raises."""
        return self.from_string(metered(self.parse(source)))

    # What compiled templates call.

    def concat(self, parts: Iterable[Any]) -> str:
        return self.budget.join(parts)

    @pass_context
    def _output(self, context: Context, value: Any) -> str:
        return self.budget.text(value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget
        if isinstance(left, str) and operator == "%":
            return budget.format(left, right)
        if isinstance(left, str) and isinstance(right, str) and operator == "+":
            return budget.join((left, right))
        user = False
        for one, other in ((left, right), (right, left)):
            budget.touch(one)
            if isinstance(one, (str, list, tuple)) and isinstance(other, int) and operator == "*":
                budget.room(len(one) * other)
                user = isinstance(one, UserText)
        if operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise LimitError(f"it computes a power of {right}")
        return budget.settled(super().call_binop(context, operator, left, right), user)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = __self.budget
        # jinja2 adds these inside loops, for functions that want the context; none of ours does.
        kwargs.pop("_loop_vars", None)
        kwargs.pop("_block_vars", None)
        budget.spend(4 + len(args) + len(kwargs))
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        for kind, methods in _METHODS.items():
            if isinstance(owner, kind):
                if name not in methods:
                    raise TemplateError(f"the method {kind.__name__}.{name} is not allowed")
                return __self._call_method(__context, __obj, owner, name, args, kwargs)
        if isinstance(owner, LoopContext) or __obj is dict:
            budget.walk(args)  # compared, or hashed
        elif not (
            isinstance(__obj, (Macro, LoopContext, Joiner, Undefined))
            or isinstance(owner, Cycler)
            or any(__obj is known for known in __self.globals.values())
        ):
            raise TemplateError(f"calling {name or type(__obj).__name__} is not allowed")
        return super().call(__context, __obj, *args, **kwargs)

    def _call_method(
        self,
        context: Context,
        method: Any,
        owner: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        budget = self.budget
        if not isinstance(owner, str):
            budget.walk((*args, kwargs))
            if name in ("count", "index"):
                budget.walk(owner)
            elif name == "copy":
                budget.touch(owner)
            return super().call(context, method, *args, **kwargs)
        user = budget.walk((owner, *args, kwargs))
        if name == "join" and len(args) == 1:
            return budget.join(args[0], owner)
        if name == "replace":
            return budget.replace(owner, *args, **kwargs)
        return budget.settled(super().call(context, method, *args, **kwargs), user)

    # Filters, tests and functions.

    def _free(self, value: Any) -> bool:
        return False

    def _shallow(self, value: Any) -> bool:
        self.budget.spend(len(value) if isinstance(value, (str, list, tuple, dict)) else 0)
        return isinstance(value, UserText)

    def _text(self, value: Any) -> bool:
        return self.budget.walk_for_text(value)[1]

    def _deep(self, value: Any) -> bool:
        self._shallow(value)
        return self.budget.walk(value)

    def _metered(self, function: Any, pay: Callable[[Any], bool]) -> Callable[..., Any]:
        """``function`` with its operands paid for before and its result after; ``pay`` does so for the
        first operand, and says whether text in the result is the user's."""
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

        def metered(*args: Any, **kwargs: Any) -> Any:
            options = (*args[skipped + 1 :], *kwargs.values())
            user = self.budget.walk(options) if options else False
            for value in options:
                if isinstance(value, int) and abs(value) > _MAX_NUMBER:
                    raise LimitError(f"it gives a filter the number {value}")
            self.budget.spend(2)
            user = any([pay(value) for value in args[skipped : skipped + 1]]) or user
            result = function(*args, **kwargs)
            if isinstance(result, Iterator):
                return Counted(result, args[skipped], self.budget)
            return self.budget.settled(result, user) if pay in (self._shallow, self._text) else result

        if skipped:
            metered.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return metered

    def _tick(self, cost: int) -> bool:
        self.budget.spend(cost)
        return True

    def _walk(self, value: Any) -> Any:
        self.budget.walk(value)
        return value

    def _touch(self, value: Any) -> Any:
        self.budget.touch(value)
        return value

    def _string(self, value: Any) -> str:
        return self.budget.text(value)

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = map(make_attrgetter(self, attribute), value)
        return self.budget.join(value, self.budget.text(d))

    def _replace(self, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        text = self.budget.text
        return self.budget.replace(text(s), text(old), text(new), -1 if count is None else count)

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        return self.budget.format(self.budget.text(value), kwargs or args)

    def _indent(self, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = self.budget.text(s)
        prefix = width if isinstance(width, str) else " " * min(width, _MAX_NUMBER)
        self.budget.room(len(text) + (1 + len(text.splitlines())) * len(prefix))
        user = isinstance(text, UserText) or isinstance(prefix, UserText)
        return str(self.budget.settled(do_indent(text, prefix, first, blank), user))

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        _, user = self.budget.walk_for_text((value, separators))
        if any(len(s) > 16 for s in separators or ()) or (
            indent and not (isinstance(indent, int) and indent <= 16)
        ):
            raise LimitError("it writes JSON with separators or indents of more than 16 characters")
        text = json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return str(self.budget.settled(text, user))

    def _raise_exception(self, message: Any) -> None:
        raise TemplateError(self.budget.text(message)[:1000])

    def _strftime_now(self, pattern: str) -> str:
        if len(pattern) > 256:
            raise LimitError(f"it formats a date with {len(pattern)} characters")
        return str(self.budget.settled(datetime.now().strftime(pattern), isinstance(pattern, UserText)))
