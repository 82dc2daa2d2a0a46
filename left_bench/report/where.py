"""`--where 'choices.quantization == "nf4" and exact_match > 0.5'`: a condition on records, parsed and never evaluated.

Python's own parser reads it; what is not a comparison, `and`, `or`, `not`, a field or a literal is refused, so the
text of a condition can do nothing but choose records.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from left_bench.core.errors import UserError, nearest

_LONGEST = 4000
_DEEPEST = 100
"""Conditions within each other; what Python's own parser takes differs between its versions."""
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}
_ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_WORDS = {"true": True, "false": False, "null": None}  # as they are written on the command line


@dataclass(frozen=True, kw_only=True)
class Where:
    """A condition on a flat record, as `load_records` has them for columns.

    A field may be named without its first part: `peft` is `choices.peft`, `training.steps` is `config.training.steps`.
    What a record has not is None: `exact_match == None` finds what was not scored, `exact_match < 0.5` does not.
    """

    text: str
    tree: ast.expr
    fields: Mapping[str, int]
    """Dotted names that the condition asks for, and the column where each begins."""

    def check(self, known: Iterable[str]) -> None:
        """Refuse a field that no record has.

        Raises:
            UserError: naming the position, the field and the nearest that there is.
        """
        known = set(known)
        for name, column in self.fields.items():
            if not any(spelling in known for spelling in _spellings(name)):
                short = {key.removeprefix("choices.").removeprefix("config.") for key in known}
                raise _error(self.text, column, f"no record has a field '{name}'{nearest(name, known | short)}")

    def matches(self, record: Mapping[str, Any]) -> bool:
        """Whether a flat record fulfils the condition.

        Raises:
            UserError: a field is compared with what it cannot be compared with.
        """
        return bool(self._value(self.tree, record))

    def _value(self, node: ast.expr, record: Mapping[str, Any]) -> Any:
        match node:
            case ast.BoolOp(op=ast.And()):
                return all(self._value(part, record) for part in node.values)
            case ast.BoolOp():
                return any(self._value(part, record) for part in node.values)
            case ast.UnaryOp(op=ast.Not()):
                return not self._value(node.operand, record)
            case ast.Compare():
                values = [self._value(part, record) for part in (node.left, *node.comparators)]
                pairs = zip(node.ops, values, values[1:], strict=False)
                return all(self._compare(node, op, left, right) for op, left, right in pairs)
            case ast.Name() | ast.Attribute():
                name = _dotted(node)
                return next((record[key] for key in _spellings(name) if key in record), _WORDS.get(name))
            case _:
                return ast.literal_eval(node)

    def _compare(self, node: ast.Compare, op: ast.cmpop, left: Any, right: Any) -> bool:
        if isinstance(op, _ORDER) and (left is None or right is None):
            return False  # what was not measured is neither small nor large
        if isinstance(op, (ast.In, ast.NotIn)) and right is None:
            return isinstance(op, ast.NotIn)
        try:
            return bool(_COMPARISONS[type(op)](left, right))
        except TypeError as error:
            raise _error(self.text, node.col_offset, f"{left!r} and {right!r} cannot be compared so") from error


def parse_where(text: str) -> Where:
    """A condition from its text.

    Raises:
        UserError: it is no condition, or asks for more than comparing; the message names the position.
    """
    if len(text) > _LONGEST:
        raise UserError(f"--where: {len(text)} characters are more than the {_LONGEST} a condition may have")
    text = text.strip()
    try:
        tree = ast.parse(text, mode="eval").body
        fields: dict[str, int] = {}
        _check(tree, text, fields)
    except SyntaxError as error:
        raise _error(text, (error.offset or 1) - 1, error.msg) from error
    except (RecursionError, MemoryError, ValueError) as error:
        raise UserError(f"--where: the condition cannot be read ({type(error).__name__}); make it simpler") from error
    return Where(text=text, tree=tree, fields=fields)


def _check(node: ast.expr, text: str, fields: dict[str, int], *, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise _error(text, node.col_offset, f"more than {_DEEPEST} conditions within each other; make it simpler")
    match node:
        case ast.BoolOp():
            for part in node.values:
                _check(part, text, fields, depth=depth + 1)
        case ast.UnaryOp(op=ast.Not()):
            _check(node.operand, text, fields, depth=depth + 1)
        case ast.Compare():
            for part in (node.left, *node.comparators):
                _check(part, text, fields, depth=depth + 1)
        case ast.Name() | ast.Attribute():
            name = _dotted(node)
            if name is None:
                raise _error(text, node.col_offset, "a field is words with dots between them, as config.peft.config.r")
            if name not in _WORDS:
                fields.setdefault(name, node.col_offset)
        case ast.Constant() if isinstance(node.value, (str, int, float, bool, type(None))):
            pass
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float())):
            pass
        case ast.Tuple() | ast.List() | ast.Set():
            for part in node.elts:
                if isinstance(part, (ast.Name, ast.Attribute)):
                    raise _error(text, part.col_offset, f"'{ast.unparse(part)}' in a list wants quotation marks")
                _check(part, text, fields, depth=depth + 1)
        case _:
            allowed = "comparisons, and, or, not, in, fields, numbers and quoted text"
            raise _error(text, node.col_offset, f"'{ast.unparse(node)[:40]}' is not allowed; there are {allowed}")


def _dotted(node: ast.expr) -> Any:
    """`a.b.c` of nested attributes; None where something else than a name is at the bottom."""
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return None if owner is None else f"{owner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def _spellings(name: str) -> tuple[str, ...]:
    return name, f"choices.{name}", f"config.{name}"


def _error(text: str, column: int, message: str) -> UserError:
    return UserError(f"--where, column {column + 1} ({text[column : column + 20]!r}): {message}")
