"""The house as text: `python -m tests.floors` draws the rooms of the package by floor, counts arrows, circles and upward arrows.

A room is a package of `evolve_ray/`, or a file that stands directly in it. A room may import from lower floors only, and no two
rooms and no two files may import each other, at the top of a file or inside its functions.
"""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "evolve_ray"
# From the top down.
FLOORS = (
    ("driver", "audit", "bench", "benchmarks", "compare", "preview", "serve", "study"),
    ("iterate",),
    ("stages",),
    ("inputs",),
    ("plan", "toy"),
    ("generate", "train"),
    ("score",),
    ("pools",),
    ("watch",),
    ("report",),
    ("evaluate", "models"),
    ("data", "refine", "select"),
    ("store",),
    ("config",),
    ("errors",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
Graph = dict[str, set[str]]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    return {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def file_graph() -> Graph:
    """Which module imports which, wherever the import stands."""
    known = files()
    graph: Graph = {}
    for module, path in known.items():
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
            graph[module] |= {name for name in names if name in known and name not in (module, "evolve_ray")}
        packages = {name for name in graph[module] if known[name].name == "__init__.py"}
        graph[module] -= packages  # an __init__ holds a docstring alone
    return graph


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "evolve_ray"


def room_graph() -> Graph:
    graph: Graph = {room: set() for room in FLOOR_OF}
    for module, others in file_graph().items():
        graph.setdefault(room_of(module), set())
        graph[room_of(module)] |= {room_of(other) for other in others} - {room_of(module)}
    graph.pop("evolve_ray", None)
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """The groups of members that all lead to each other (Tarjan's strongly connected components of two and more)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return groups


def upward() -> list[tuple[str, str]]:
    """Arrows between rooms that do not lead to a lower floor."""
    return [
        (room, other)
        for room, others in sorted(room_graph().items())
        for other in sorted(others)
        if room not in FLOOR_OF or other not in FLOOR_OF or FLOOR_OF[other] <= FLOOR_OF[room]
    ]


def draw() -> str:
    """The floors from the top down; behind each room what it imports, and its lines."""
    graph, lines = room_graph(), {}
    for module, path in files().items():
        lines[room_of(module)] = lines.get(room_of(module), 0) + len(path.read_text(encoding="utf-8").splitlines())
    out = []
    for number, rooms in enumerate(FLOORS):
        for place, room in enumerate(rooms):
            targets = " ".join(sorted(graph[room], key=lambda other: (FLOOR_OF.get(other, -1), other)))
            floor = f"{len(FLOORS) - number:2d}" if place == 0 else "  "
            out.append(f"{floor}  {room:<10} {lines.get(room, 0):>5}  -> {targets}".rstrip(" ->"))
    arrows = sum(map(len, graph.values()))
    rings = circles(graph) + circles(file_graph())
    out += ["", f"rooms {len(graph)}, arrows {arrows}, circles {len(rings)}, upward arrows {len(upward())}"]
    out += [f"circle: {' '.join(ring)}" for ring in rings]
    out += [f"upward: {room} -> {other}" for room, other in upward()]
    return "\n".join(out)


if __name__ == "__main__":
    print(draw())
    sys.exit(bool(upward() or circles(room_graph()) or circles(file_graph())))
