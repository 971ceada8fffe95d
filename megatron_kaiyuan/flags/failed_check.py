"""The source of a line that stopped a program: its condition, the conditions around it, and what they look at."""

import ast
import linecache
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["FailedCheck"]

_OBJECTS = ("args", "self", "config", "parsed_args")
"""What Megatron calls the object whose attributes are arguments."""
_BY_NAME = ("getattr", "hasattr", "_check_arg_is_not_none")
"""Functions that it gives the object and the name of an argument."""


@dataclass(frozen=True)
class FailedCheck:
    """A line of a frame at which an exception was raised."""

    frame: FrameType
    line: int

    @property
    def place(self) -> str:
        """Where it stands."""
        return f"a check of Megatron's, {Path(self.frame.f_code.co_filename).name} line {self.line}"

    @property
    def function(self) -> str:
        """Name of the function that it stands in."""
        return self.frame.f_code.co_name

    def condition(self, flags: Mapping[str, str]) -> str:
        """Return the condition of a failed assertion, with flags in place of the arguments' names."""
        if not isinstance(self._statement, ast.Assert):
            return "something else"

        def flag(match: re.Match[str]) -> str:
            return flags.get(match[1], match[0])

        return re.sub(rf"\b(?:{'|'.join(_OBJECTS)})\.(\w+)", flag, " ".join(ast.unparse(self._statement.test).split()))

    @property
    def intended_message(self) -> str:
        """Return the message of an assertion whose condition could not even be computed, empty for other lines."""
        if isinstance(self._statement, ast.Assert) and self._statement.msg is not None:
            return " ".join(_texts(self._statement.msg)).rstrip(".")
        return ""

    @property
    def text_before(self) -> str:
        """The last text in the block before the line: what is printed before `exit()`."""
        for _, body in self._blocks:
            texts = [text for statement in body if statement.lineno < self.line for text in _texts(statement)]
            if texts:
                return texts[-1].rstrip(".")
        return ""

    def arguments(self, given: Collection[str]) -> dict[str, Any]:
        """Return the arguments at fault, with their values.

        They are those of the condition itself; of the conditions around it those that were given. An argument that was
        not given and was computed from given ones is replaced by them.

        Args:
            given: Names of the arguments of the command line.
        """
        tests = [test for test, _ in self._blocks if test is not None]
        own = [self._statement.test] if isinstance(self._statement, ast.Assert) else tests[:1]
        found: dict[str, Any] = {}
        if self._statement is not None and not isinstance(
            self._statement, ast.Assert | ast.Raise
        ):  # a call that failed
            own = []
            found = {name: value for name, value in self._names(self._statement).items() if name in given}
        for test in own:
            variables = {part.id for part in ast.walk(test) if isinstance(part, ast.Name)}
            computed = {name: value for name, value in self._sources(variables).items() if name in given}
            for name, value in (self._names(test) | computed).items():
                origins = {} if name in given else self._sources({name})
                found |= {origin: old for origin, old in origins.items() if origin in given} or {name: value}
        for test in tests:
            found |= {name: value for name, value in self._names(test).items() if name in given}
        return found

    def _names(self, expression: ast.AST) -> dict[str, Any]:
        """Arguments that an expression looks at."""
        found: dict[str, Any] = {}
        for part in ast.walk(expression):
            owner, name = None, ""
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                owner, name = part.value.id, part.attr
            elif isinstance(part, ast.Call) and ast.unparse(part.func) in _BY_NAME:
                words = [word.value for word in part.args[1:2] if isinstance(word, ast.Constant)]
                owner, name = ast.unparse(part.args[0]), str(words[0]) if words else ""
            if owner in _OBJECTS and hasattr(self.frame.f_locals.get(owner), name):
                found[name] = getattr(self.frame.f_locals[owner], name)
        return found

    def _sources(self, wanted: Collection[str]) -> dict[str, Any]:
        """Arguments from which local variables, or other arguments, were computed before."""
        found: dict[str, Any] = {}
        for part in ast.walk(self._function):
            if isinstance(part, ast.Assign) and part.lineno < self.line:
                targets = [inner for target in part.targets for inner in _written_to(target)]
                if not set(wanted).isdisjoint(targets):
                    found |= self._names(part.value)
        return found

    @cached_property
    def _statement(self) -> ast.stmt | None:
        """The innermost statement of the line."""
        around = [part for part in ast.walk(self._function) if isinstance(part, ast.stmt) and self._is_in(part, part)]
        return max(around, key=lambda part: part.lineno, default=None)

    @cached_property
    def _blocks(self) -> list[tuple[ast.expr | None, list[ast.stmt]]]:
        """Condition and statements of every block around the line, the innermost first."""
        found: list[tuple[ast.expr | None, list[ast.stmt]]] = []
        for part in ast.walk(self._function):
            for body in (getattr(part, "body", []), part.orelse if isinstance(part, ast.If) else []):
                if isinstance(body, list) and body and self._is_in(body[0], body[-1]):
                    found.append((getattr(part, "test", None), body))
        return sorted(found, key=lambda block: -block[1][0].lineno)

    def _is_in(self, first: ast.stmt, last: ast.stmt) -> bool:
        return first.lineno <= self.line <= (last.end_lineno or last.lineno)

    @cached_property
    def _function(self) -> ast.AST:
        """Return the source of what the frame executes, nothing where it cannot be read."""
        code = self.frame.f_code
        for part in ast.walk(_parsed(code.co_filename)):
            if isinstance(part, ast.FunctionDef) and part.name == code.co_name:
                first = min([part.lineno, *(decorator.lineno for decorator in part.decorator_list)])
                if first == code.co_firstlineno:
                    return part
        return ast.Module(body=[], type_ignores=[])


def _written_to(target: ast.expr) -> list[str]:
    """Names of variables and of attributes that an assignment changes."""
    if isinstance(target, ast.Tuple):
        return [name for element in target.elts for name in _written_to(element)]
    return [target.id] if isinstance(target, ast.Name) else [target.attr] if isinstance(target, ast.Attribute) else []


def _texts(part: ast.AST) -> list[str]:
    return [
        " ".join(inner.value.split())
        for inner in ast.walk(part)
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
    ]


@lru_cache(maxsize=8)
def _parsed(path: str) -> ast.Module:
    try:
        return ast.parse("".join(linecache.getlines(path)))
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])
