"""A room imports only rooms below it, so that no two depend on each other."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "dynamic_detr"
ROOMS = [  # from the ground up; one line imports nothing of its own line
    {"_require_detectron2", "compat", "config", "errors", "version"},
    {"detectron2_keys", "ops", "structures"},
    {"files", "layers", "runtime"},
    {"backbones", "data", "losses"},
    {"decoders", "encoders", "visualization"},
    {"detector"},
    {"engine"},
    {"inference"},
    {"cli"},
]
HEIGHT = {room: height for height, rooms in enumerate(ROOMS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    """Return the other rooms of the package that a file imports anywhere in it."""
    package = ("dynamic_detr", *path.relative_to(PACKAGE).parts[:-1])
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            found = [".".join(filter(None, base))]
            if not node.module:
                found = [f"{found[0]}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        names = [name.split(".") for name in found]
        rooms |= {name[1] for name in names if name[0] == "dynamic_detr" and len(name) > 1}
    return rooms


def test_a_room_imports_only_rooms_below_it():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        room = name.parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for other in sorted(imported_rooms(path) - {room}):
            if HEIGHT[other] >= HEIGHT[room]:
                wrong.append(f"{name} imports {other}")
    assert not wrong, wrong
