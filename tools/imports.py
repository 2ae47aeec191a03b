"""Reads the imports between modules of the repository, checks that none goes up, and draws docs/imports.svg.

    python tools/imports.py           # check, and draw the picture again
    python tools/imports.py --text    # check, and print every import

Exit code 1 if an import goes up, if imports form a cycle, or if a module of slowrun/ has no place in the picture.
Imports that only a type checker makes do not count.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "imports.svg"
TRACKS = ("train", "tiny.train", "two_hour.train", "unlimited.train")
LAYERS = (  # of the instrument: a module imports only from layers below its own
    ("session",),
    ("folder",),
    ("rules", "scoring", "config", "plan", "clock"),
    ("data", "machine"),
    ("world",),
)
LIBRARY = ("sharded", "kernels", "weights")  # imports the instrument, which does not import it

Graph = dict[str, set[str]]  # by module, the modules of the repository that it imports

# ======================================================================================================================
# The graph
# ======================================================================================================================


def find_modules(root: Path) -> dict[str, Path]:
    """The modules of the repository but for tests, by dotted name."""
    patterns = ("*.py", "tiny/*.py", "two_hour/*.py", "unlimited/*.py", "slowrun/*.py")
    patterns += ("records/*.py", "records/*/*.py", "tools/*.py")
    paths = [path for pattern in patterns for path in sorted(root.glob(pattern))]
    modules = {}
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


class Imports(ast.NodeVisitor):
    """Collects the names that a module imports, anywhere in it."""

    def __init__(self, package: str):
        self.package = package
        self.names: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        """Skip `if TYPE_CHECKING:`."""
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.names |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parents = self.package.split(".")
        base = parents[: len(parents) + 1 - node.level] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        self.names |= {f"{module}.{alias.name}" for alias in node.names}


def read_graph(root: Path = ROOT) -> Graph:
    """The imports of all modules, from their source."""
    modules = find_modules(root)
    graph: Graph = {}
    for name, path in modules.items():
        is_package = path.name == "__init__.py"
        found = Imports(name if is_package else name.rpartition(".")[0])
        found.visit(ast.parse(path.read_text()))
        graph[name] = set()
        for imported in found.names:
            # "slowrun.data.Split" is a name in a module, "slowrun.rules" a module
            known = next((n for n in (imported, imported.rpartition(".")[0]) if n in modules), None)
            if known is not None:
                graph[name].add(known)
    return graph


def rank(module: str) -> int:
    """The height of a module: an import must lead to a lower one, or stay among tools or records."""
    folder, _, name = module.partition(".")
    if folder != "slowrun":
        return 102 if module in TRACKS else 101 if module == "model" else 100
    if name in LIBRARY:
        return 99
    return next((len(LAYERS) - i for i, layer in enumerate(LAYERS) if name in layer), 0)


def problems(graph: Graph) -> list[str]:
    """The problems of the imports, a line each; empty if there are none."""
    found = []
    placed = {name for layer in (*LAYERS, LIBRARY) for name in layer}
    for module in sorted(graph):
        folder, _, name = module.partition(".")
        if folder == "slowrun" and name and name not in placed:
            found.append(f"{module} has no place in the picture: name it in LAYERS or LIBRARY of tools/imports.py")
        for imported in sorted(graph[module]):
            is_neighbour = folder in ("records", "tools") and imported.startswith(f"{folder}.")
            if rank(imported) >= rank(module) and not is_neighbour:
                found.append(f"{module} imports {imported}, which is not below it")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"imports form a cycle: {' -> '.join(reversed(error.args[1]))}")
    return found


def as_text(graph: Graph) -> str:
    """The imports of every module, from the top down."""
    lines = []
    for module in sorted(graph, key=lambda module: (-rank(module), module)):
        if module != "slowrun":
            lines.append(f"{module:20} {', '.join(sorted(graph[module])) or '-'}")
    return "\n".join(lines)


# ======================================================================================================================
# The picture
# ======================================================================================================================

WIDTH, HEIGHT = 10.0, 6.4  # inches
COLOURS = {"script": "#F3D9C6", "instrument": "#CFE3F2", "library": "#CDE9DC", "other": "#EEEEEE"}
INK = "#333333"
ARROW = {"arrowstyle": "-|>", "color": INK, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
HALF_HEIGHT = 0.2  # of a box
ROWS = (4.25, 3.35, 2.4, 1.45, 0.55)  # heights of LAYERS
LIBRARY_HEIGHTS = {"weights": 2.4, "kernels": 1.45, "sharded": 0.55}
PLACES = {  # x of each module
    "rules": 2.6, "scoring": 3.9, "config": 5.2, "plan": 6.5, "clock": 7.8, "folder": 5.2,
    "session": 5.2, "data": 4.16, "machine": 7.28, "world": 5.2,
    "weights": 9.15, "kernels": 9.15, "sharded": 9.15,
}  # fmt: skip
SCRIPTS = {3.0: "train.py\nmodel.py", 4.97: "tiny/train.py", 6.93: "two_hour/train.py", 8.9: "unlimited/train.py"}
OTHERS = {"records": (0.95, 4.25, 0.75), "prepare_data": (0.95, 3.6, 0.75), "tools": (0.95, 5.7, 0.75)}
LABELS = {"records": "records/", "prepare_data": "prepare_data.py", "tools": "tools/"}
CAPTION = """An arrow leads from a
module to one that it
imports. Imports that
follow from others are
left out: what imports
session may import all
below it. tools/ imports
nothing: it starts the
scripts as processes."""


def without_implied(graph: Graph) -> Graph:
    """The imports that do not follow from others: a module that imports session need not show what session imports."""
    reached: Graph = {}
    for module in TopologicalSorter(graph).static_order():
        reached[module] = set().union(*({imported} | reached[imported] for imported in graph[module]))
    return {
        module: {name for name in imported if not any(name in reached[other] for other in imported)}
        for module, imported in graph.items()
    }


def merged(graph: Graph) -> Graph:
    """The graph of the picture: one node for the scripts, for records/ and for tools/; modules of slowrun/ by name."""

    def node(module: str) -> str:
        folder, _, name = module.partition(".")
        if module in TRACKS or module == "model":
            return "scripts"
        return name if folder == "slowrun" else folder

    result: Graph = {}
    for module, imported in graph.items():
        if module != "slowrun":
            others = {node(other) for other in imported} - {node(module)}
            result.setdefault(node(module), set()).update(others)
    return without_implied(result)


def digest(graph: Graph) -> str:
    """SHA-256 of this file and of what the picture shows, so that a picture out of date is found without drawing it."""
    shown = json.dumps({node: sorted(imported) for node, imported in merged(graph).items()}, sort_keys=True)
    return hashlib.sha256(Path(__file__).read_bytes() + shown.encode()).hexdigest()


def draw(graph: Graph, path: Path) -> None:
    """Draw the graph; the same graph gives the same bytes, with the same matplotlib."""
    import matplotlib  # takes a second
    from matplotlib.figure import Figure

    heights = {name: height for layer, height in zip(LAYERS, ROWS, strict=True) for name in layer} | LIBRARY_HEIGHTS
    boxes = {name: (PLACES[name], height, 0.45) for name, height in heights.items()}  # centre, half of the width
    with matplotlib.rc_context({"svg.hashsalt": "imports", "font.size": 9}):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        axes.axis("off")
        frame(axes, (2.0, 0.15, 6.4, 4.75), "slowrun/: the instrument", "instrument")
        frame(axes, (8.6, 0.15, 1.3, 4.75), "the library", "library")
        frame(axes, (2.0, 5.35, 7.9, 0.95), "a complete experiment each", "script")
        for x, text in SCRIPTS.items():
            box(axes, x, 5.7, 0.9, text, "script")
        axes.text(0.2, 0.2, CAPTION, color=INK, va="bottom", linespacing=1.4)
        boxes |= OTHERS
        for name, (x, y, half_width) in boxes.items():
            kind = "other" if name in OTHERS else "library" if name in LIBRARY else "instrument"
            box(axes, x, y, half_width, LABELS.get(name, name), kind)
        for node, imported in merged(graph).items():
            for name in sorted(imported):
                x, y, half_width = boxes[name]
                if node != "scripts":
                    arrow(axes, boxes[node], boxes[name])
                elif name in LIBRARY:  # from the frame's lower edge, past the boxes above
                    side = x + half_width + 0.2
                    axes.plot([side, side], [5.35, y], color=INK, linewidth=0.9)
                    axes.annotate("", (x + half_width, y), (side, y), arrowprops=ARROW)
                else:
                    axes.annotate("", (x, y + HALF_HEIGHT), (x, 5.35), arrowprops=ARROW)
        metadata = {"Date": None, "Description": f"drawn from {digest(graph)}"}
        figure.savefig(path, format="svg", metadata=metadata)


def frame(axes, place: tuple[float, float, float, float], title: str, kind: str) -> None:
    """A rectangle around boxes: left, bottom, width, height."""
    from matplotlib.patches import FancyBboxPatch

    left, bottom, width, height = place
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "facecolor": COLOURS[kind], "alpha": 0.35, "linewidth": 0}
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, **style))
    axes.text(left + 0.1, bottom + height - 0.09, title, va="top", color=INK, style="italic")


def box(axes, x: float, y: float, half_width: float, text: str, kind: str) -> None:
    """A module or a folder, with its name."""
    from matplotlib.patches import FancyBboxPatch

    style = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": COLOURS[kind], "edgecolor": INK}
    corner = x - half_width, y - HALF_HEIGHT
    axes.add_patch(FancyBboxPatch(corner, 2 * half_width, 2 * HALF_HEIGHT, linewidth=0.8, zorder=3, **style))
    axes.text(x, y, text, ha="center", va="center", color=INK, zorder=4)


def arrow(axes, start: tuple[float, float, float], end: tuple[float, float, float]) -> None:
    """From one box to another: down from edge to edge, or sideways in a row."""
    (x1, y1, w1), (x2, y2, w2) = start, end
    sign = 1 if x2 > x1 else -1
    if y1 == y2:
        axes.annotate("", (x2 - sign * w2, y2), (x1 + sign * w1, y1), arrowprops=ARROW)
    elif y1 - y2 < 2 * HALF_HEIGHT + 0.1:  # from a row between: out of its side
        axes.annotate("", (x2 - sign * 0.25, y2 + HALF_HEIGHT), (x1 + sign * w1, y1), arrowprops=ARROW)
    else:
        shift = max(-0.7, min(0.7, 0.18 * (x2 - x1)))  # arrows leave and arrive apart
        leave = x1 + max(-w1, min(w1, shift)) * 0.8
        arrive = x2 - max(-w2, min(w2, shift)) * 0.8
        axes.annotate("", (arrive, y2 + HALF_HEIGHT), (leave, y1 - HALF_HEIGHT), arrowprops=ARROW)


# ======================================================================================================================
# Command line
# ======================================================================================================================


def main(argv: list[str] | None = None) -> int:
    """Check, and print or draw -> exit code: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="store_true", help="print every import instead of drawing the picture")
    as_printed = parser.parse_args(argv).text
    graph = read_graph()
    found = problems(graph)
    if as_printed:
        print(as_text(graph))
    elif not found:
        PICTURE.parent.mkdir(exist_ok=True)
        draw(graph, PICTURE)
        print(f"wrote {PICTURE.relative_to(ROOT)}")
    for problem in found:
        print(f"imports.py: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
