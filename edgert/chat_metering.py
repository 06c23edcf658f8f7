"""Meters for what jinja2 compiles straight to Python: filters put into a template's syntax tree.

Loops and macros pay for the size of their body each time round, operands of comparisons, keys and
slices for the work done on them, and ``~`` becomes a call. The sandbox's environment supplies the
filters.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.visitor import NodeTransformer

# Names of the filters put into the syntax tree; no template can spell them.
TICK, WALK, TOUCH, CONCAT = " tick", " walk", " touch", " concat"
_NODES_A_STEP = 8
_MAX_NODES = 10_000  # of a whole template; more would take too long to compile

# They load other templates, or are evaluated while compiling.
_FORBIDDEN = (
    nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block, nodes.EvalContextModifier,
)  # fmt: skip


def metered(tree: nodes.Template) -> nodes.Template:
    """``tree`` with its meters. Raises TemplateError for statements a chat template may not use."""
    cost = _size(tree)
    if cost > _MAX_NODES // _NODES_A_STEP:
        raise TemplateError(f"the template has more than {_MAX_NODES} parts")
    _Meters().visit(tree)
    tree.body.insert(0, nodes.ExprStmt(_tick(cost)))
    return tree


class _Meters(NodeTransformer):
    """Puts the meters into a template's syntax tree."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, _FORBIDDEN):
            raise TemplateError(f"{type(node).__name__} statements are not allowed")
        return super().generic_visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        cost = _size(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_tick(cost)))
        if node.test is not None:
            node.test = nodes.And(_tick(cost), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._callable(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._callable(node)

    def _callable(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        cost = _size(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_tick(cost)))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter(node.expr, WALK)
        for operand in node.ops:
            operand.expr = _filter(operand.expr, WALK)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _filter(node.key, WALK)  # it is hashed
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), CONCAT)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, TOUCH)
        else:
            node.arg = _filter(node.arg, WALK)
        return node


def _size(node: nodes.Node) -> int:
    return 1 + sum(1 for _ in node.find_all(nodes.Node)) // _NODES_A_STEP


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _tick(cost: int) -> nodes.Filter:
    return _filter(nodes.Const(cost, lineno=1), TICK)
