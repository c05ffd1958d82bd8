"""Safe loading of YAML configuration files.

Detectron2 loads YAML tags that call any function (``!!python/object/apply:...``), and its RetinaNet
config uses one, ``eval``, to compute the anchor sizes. Only arithmetic on numbers and lists is
allowed here.
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
    """Return the value of a formula such as ``[x * 2**(1 / 3) for x in [32, 64]]``."""
    (formula,) = loader.construct_sequence(node)
    tree = ast.parse(formula, mode="eval")
    for part in ast.walk(tree):
        if not isinstance(part, _ARITHMETIC):
            raise yaml.YAMLError(
                f"the formula {formula!r:.80} holds a {type(part).__name__}; a configuration may "
                "only do arithmetic on numbers and lists"
            )
    return eval(compile(tree, "<configuration>", "eval"), {"__builtins__": {}})


@contextlib.contextmanager
def plain_yaml() -> Iterator[None]:
    """Make ``yaml.safe_load`` accept tuples and arithmetic inside the context."""
    original = yaml.SafeLoader.yaml_constructors
    yaml.SafeLoader.yaml_constructors = {
        **original,
        f"{_TAG}object/apply:eval": _evaluate,
        f"{_TAG}tuple": yaml.FullLoader.construct_python_tuple,
    }
    try:
        yield
    finally:
        yaml.SafeLoader.yaml_constructors = original
