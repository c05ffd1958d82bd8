"""Configuration files, read without running code.

Detectron2 lets a file call any function (``!!python/object/apply:...``), and one of its own, that
of RetinaNet, calls ``eval`` to write its anchors as a formula. Of all such calls arithmetic on
numbers and lists is what is admitted here.
"""

import ast
import contextlib
from collections.abc import Iterator
from typing import Any

import yaml

__all__ = ["plain_yaml"]

_TAG = "tag:yaml.org,2002:python/"
_ARITHMETIC = (
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Name, ast.Load, ast.Store),
    *(ast.ListComp, ast.comprehension, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop),
)


def _evaluate(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """The value of a formula such as ``[x * 2**(1 / 3) for x in [32, 64]]``."""
    (formula,) = loader.construct_sequence(node)
    tree = ast.parse(formula, mode="eval")
    for part in ast.walk(tree):
        if not isinstance(part, _ARITHMETIC):
            raise yaml.YAMLError(
                f"the formula {formula!r:.80} holds a {type(part).__name__}; a configuration may "
                "only do arithmetic on numbers and lists"
            )
    return eval(compile(tree, "<configuration>", "eval"), {"__builtins__": {}})


def _tuple(loader: yaml.SafeLoader, node: yaml.Node) -> tuple:
    return tuple(loader.construct_sequence(node))


@contextlib.contextmanager
def plain_yaml() -> Iterator[None]:
    """Within this context ``yaml.safe_load`` also reads tuples and arithmetic."""
    original = yaml.SafeLoader.yaml_constructors
    own = {f"{_TAG}object/apply:eval": _evaluate, f"{_TAG}tuple": _tuple}
    yaml.SafeLoader.yaml_constructors = {**original, **own}
    try:
        yield
    finally:
        yaml.SafeLoader.yaml_constructors = original
