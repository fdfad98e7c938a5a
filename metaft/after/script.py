"""`predict.py` of an export: one file of code that reads pictures as metaft does, without metaft."""

from __future__ import annotations

import ast
import inspect

from metaft.after import standalone
from metaft.inputs import depth, fitting


def script() -> str:
    """The modules `depth`, `fitting` and `standalone` one after the other, without what they import of each other."""
    doc = inspect.getdoc(standalone)
    plain: set[str] = set()
    imports: dict[str, set[str]] = {}
    bodies = []
    for module in (depth, fitting, standalone):
        source = inspect.getsource(module)
        lines = source.splitlines()
        for node in reversed(ast.parse(source).body):
            is_import = isinstance(node, (ast.Import, ast.ImportFrom))
            is_doc = node.lineno == 1 and isinstance(node, ast.Expr)
            if not is_import and not is_doc:
                continue
            del lines[node.lineno - 1 : node.end_lineno]
            name = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if isinstance(node, ast.ImportFrom) and name != "__future__" and not name.startswith("metaft"):
                imports.setdefault(name, set()).update(alias.name for alias in node.names)
            elif isinstance(node, ast.Import):
                plain |= {ast.unparse(node)}
        bodies.append("\n".join(lines).strip())
    froms = [f"from {name} import {', '.join(sorted(imports[name]))}" for name in sorted(imports)]
    head = f'"""{doc}\n"""\n\nfrom __future__ import annotations\n\n' + "\n".join([*sorted(plain), "", *froms])
    return head + "\n\n" + "\n\n\n".join(bodies) + "\n"
