"""Count what makes the code and the notebooks easy to read, and hold it to bars.

python scripts/style_counts.py              # the whole tree; exits with 1 past a bar
python scripts/style_counts.py NOTEBOOK...  # these notebooks alone, with each offending place
"""

import ast
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BANNED = {
    "anew": "again, re-estimated, recomputed",
    "foretold": "expected, predicted",
    "gone": "removed",
    "live and die": "coupled: removed together",
    "one's own": "custom, your own",
    "of one's own": "custom, your own",
    "rise of the loss": "increase in loss",
    "thousand million": "billion",
    "what goes": "what is removed",
    "what stays": "what is kept",
    "may go": "can be removed",
    "told": "reported, described",
}
BANNED_PATTERN = re.compile(r"\b(" + "|".join(sorted(BANNED, key=len, reverse=True)) + r")\b", re.I)
HIDDEN = re.compile(r"#\|\s*(export|exporti|hide|default_exp)\b")
EXPORTED = re.compile(r"^#\|\s*exporti?\b", re.M)


def notebook_cells(path: Path) -> list[dict]:
    """Return the cells of a notebook, each with its source as one string under `text`."""
    cells = json.loads(path.read_text())["cells"]
    for cell in cells:
        cell["text"] = "".join(cell["source"])
    return cells


def parsed_code(path: Path) -> list[tuple[str, ast.Module]]:
    """Return (source, tree) of a Python file, or of each exported cell of a notebook."""
    if path.suffix == ".py":
        sources = [path.read_text()]
    else:
        cells = notebook_cells(path)
        sources = [
            c["text"] for c in cells if c["cell_type"] == "code" and EXPORTED.search(c["text"])
        ]
    return [(source, ast.parse(source)) for source in sources]


def code_lines(source: str) -> list[str]:
    """Return the lines that are neither blank nor nbdev's marks of cells."""
    return [line for line in source.split("\n") if line.strip() and not line.startswith("# %%")]


def is_nested(comprehension: ast.AST) -> bool:
    """Tell whether a comprehension holds another one or runs over two `for`s."""
    if len(comprehension.generators) > 1:
        return True
    inner = [n for n in ast.walk(comprehension) if isinstance(n, COMPREHENSIONS)]
    return len(inner) > 1


def untyped_arguments(function: ast.AST) -> list[str]:
    """Return the names of arguments of a public function that have no annotation."""
    if function.name.startswith("_") and not function.name.startswith("__init__"):
        return []
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    named = [a for a in arguments if a.arg not in ("self", "cls")]
    return [a.arg for a in named if a.annotation is None]


def code_faults(path: Path) -> dict:
    """Return the counts of one file of code, and `places`, a line for each fault."""
    counts = dict(lines=[], nested=0, functions=[], places=[])
    for source, tree in parsed_code(path):
        lines = code_lines(source)
        counts["lines"] += [len(line) for line in lines]
        counts["places"] += [f"over 110: {line.strip()[:70]}" for line in lines if len(line) > 110]
        for node in ast.walk(tree):
            if isinstance(node, COMPREHENSIONS) and is_nested(node):
                counts["nested"] += 1
                counts["places"].append(f"nested comprehension: {ast.unparse(node)[:90]}")
            if isinstance(node, FUNCTIONS):
                length = node.end_lineno - node.lineno + 1
                public = not node.name.startswith("_")
                counts["functions"].append((length, node.name, public))
                if length > 40:
                    counts["places"].append(f"{length} lines: {node.name}")
                untyped = untyped_arguments(node)
                if untyped:
                    counts["places"].append(f"no annotation: {node.name}({', '.join(untyped)})")
    return counts


def banned_words(text: str) -> list[str]:
    """Return the banned words of a text, each with the words around it."""
    found = []
    for match in BANNED_PATTERN.finditer(text):
        around = text[max(match.start() - 30, 0) : match.end() + 30].replace("\n", " ")
        found.append(f"banned word {match[0]!r} ({BANNED[match[0].lower()]}): ...{around}...")
    return found


def notebook_counts(path: Path) -> dict:
    """Return how many cells of a notebook are exported, shown and with outputs, and its prose."""
    counts = dict(exported=0, shown=0, stored=0, words=0, places=[])
    for cell in notebook_cells(path):
        counts["places"] += banned_words(cell["text"])
        if cell["cell_type"] == "markdown":
            counts["words"] += len(cell["text"].split())
        elif cell["cell_type"] == "code":
            counts["exported"] += bool(EXPORTED.search(cell["text"]))
            if not HIDDEN.match(cell["text"].lstrip()):
                counts["shown"] += 1
                counts["stored"] += bool(cell["outputs"])
    return counts


def summary(code: list[Path], notebooks: list[Path]) -> dict:
    """Return the figures of the bars over these files of code and these notebooks."""
    faults = [code_faults(p) for p in code]
    cells = [notebook_counts(p) for p in notebooks]
    lines = [n for f in faults for n in f["lines"]]
    exported = sorted(n for f in faults for n, _, public in f["functions"] if public)
    number = {key: sum(c[key] for c in cells) for key in ("exported", "shown", "stored", "words")}
    places = [
        f"{p}: {place}"
        for p, c in zip([*code, *notebooks], faults + cells)
        for place in c["places"]
    ]
    return {
        "lines over 110": sum(n > 110 for n in lines),
        "median line": statistics.median(lines) if lines else 0,
        "nested comprehensions per 1,000 lines": 1000
        * sum(f["nested"] for f in faults)
        / max(len(lines), 1),
        "shown cells with stored output": number["stored"] / max(number["shown"], 1),
        "prose words per exported cell": number["words"] / max(number["exported"], 1),
        "median public function, lines": exported[len(exported) // 2] if exported else 0,
        "p90 public function, lines": exported[int(0.9 * len(exported))] if exported else 0,
        "public arguments without annotation": sum("no annotation" in p for p in places),
        "banned words": sum("banned word" in p for p in places),
        "places": places,
    }


BARS = {
    "lines over 110": (0, "at most"),
    "median line": (45, "at most"),
    "nested comprehensions per 1,000 lines": (1, "at most"),
    "shown cells with stored output": (0.4, "at least"),
    "prose words per exported cell": (25, "at least"),
    "median public function, lines": (8, "at most"),
    "p90 public function, lines": (25, "at most"),
    "public arguments without annotation": (0, "at most"),
    "banned words": (0, "at most"),
    "README words": (700, "at most"),
}


def report(figures: dict) -> bool:
    """Print each figure beside its bar; return whether all hold."""
    held = True
    for name, (bar, side) in BARS.items():
        if name not in figures:
            continue
        value = figures[name]
        good = value <= bar if side == "at most" else value >= bar
        held &= good
        print(f"{'  ' if good else '! '}{name}: {value:.3g} ({side} {bar})")
    return held


def main(paths: list[str]) -> bool:
    """Print the counts of the given notebooks, or of the whole tree."""
    if paths:
        given = [Path(p) for p in paths]
        figures = summary(given, [p for p in given if p.suffix == ".ipynb"])
        print("\n".join(figures["places"]))
        return report(figures)
    notebooks = sorted((ROOT / "nbs").rglob("*.ipynb"))
    figures = summary(notebooks, notebooks)
    figures["README words"] = len((ROOT / "README.md").read_text().split())
    return report(figures)


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
