"""Import paths, entry points and the names behind them, found without running any of it: the file system and syntax trees."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

from fmray.checks.findings import closest


@dataclass(frozen=True, slots=True)
class Wrong:
    """What is wrong with a name, and the cure: `Wrong("module x has no attribute ap", "did you mean app?")`."""

    problem: str
    cure: str


def roots() -> list[str]:
    """Where modules are looked for: the working folder, what Python searches, the folder that holds `fmray`."""
    return [str(Path.cwd()), *sys.path, str(Path(__file__).parents[2])]


@cache
def check_import_path(text: str) -> Wrong | None:
    """`package.module:attribute` (or a dot): the module exists, and its top level defines or imports the attribute."""
    module, mark, attribute = text.rpartition(":" if ":" in text else ".")
    if not (mark and module and attribute) or ":" in module:
        return Wrong(f"{text!r} is no import path", "write package.module:attribute")
    source = module_source(module)
    if isinstance(source, Wrong):
        return source
    if source is None:  # a compiled module, or a package without __init__.py
        return None
    names = top_level_names(source)
    first = attribute.split(".")[0]
    if names is None or first in names:
        return None
    near = closest(first, names)
    public = sorted(name for name in names if not name.startswith("_"))[:12]
    cure = f"did you mean {module}:{near}?" if near else f"it defines {', '.join(public) or 'nothing'}"
    return Wrong(f"module {module} has no attribute {first!r}", cure)


def module_source(module: str) -> Path | Wrong | None:
    """The file of a module, no package imported on the way; None: there is one, but it is not Python source."""
    head, *rest = module.split(".")
    spec = _top(head)
    if spec is None:
        cure = "install it, or run the check in the folder that holds it"
        near = closest(head, [path.stem for path in Path.cwd().iterdir() if (path / "__init__.py").is_file()])
        return Wrong(f"there is no module {head!r}", f"did you mean {near}?" if near else cure)
    folders, origin = list(spec.submodule_search_locations or ()), spec.origin
    seen = head
    for part in rest:
        found = _submodule(folders, part)
        if found is None:
            names = {
                path.stem
                for folder in folders
                for path in Path(folder).glob("*")
                if path.suffix == ".py" or path.is_dir()
            }
            near = closest(part, names)
            cure = f"did you mean {seen}.{near}?" if near else f"look for it in {', '.join(folders) or seen}"
            return Wrong(f"{seen} has no module {part!r}", cure)
        folders, origin, seen = [str(found)] if found.is_dir() else [], None, f"{seen}.{part}"
        if found.is_dir() and (found / "__init__.py").is_file():
            origin = str(found / "__init__.py")
        elif found.is_file():
            origin = str(found)
    return Path(origin) if origin and origin.endswith(".py") else None


def _top(name: str) -> ModuleSpec | None:
    spec = PathFinder.find_spec(name, roots())
    if spec is not None:
        return spec
    try:
        return find_spec(name)  # an editable install has a finder of its own
    except (ImportError, ValueError):
        return None


def _submodule(folders: list[str], name: str) -> Path | None:
    for folder in map(Path, folders):
        if (folder / name).is_dir() and name.isidentifier():
            return folder / name
        for path in (folder / f"{name}.py", *folder.glob(f"{name}.*.so"), folder / f"{name}.so"):
            if path.is_file():
                return path
    return None


@cache
def top_level_names(source: Path) -> set[str] | None:
    """What a module's top level binds; None: it cannot be told (`import *`, a module's `__getattr__`)."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return None
    names: set[str] = set()
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        statement = waiting.pop()
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.If | ast.Try | ast.With | ast.For | ast.While):
            waiting += [child for child in ast.walk(statement) if isinstance(child, ast.stmt)][1:]
        else:
            names |= {
                node.id
                for node in ast.walk(statement)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            }
    return None if names & {"*", "__getattr__"} else names


@cache
def deployment_names(source: Path) -> set[str] | None:
    """Names of the deployments that a module's application is made of; None: it cannot be told without running it.

    It can where every `X.bind(…)` in the module is of a class or function that the module itself decorates with
    `@serve.deployment`.
    """
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return None
    named: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for decorator in node.decorator_list:
                call = decorator.func if isinstance(decorator, ast.Call) else decorator
                if ast.unparse(call) in ("serve.deployment", "deployment", "ray.serve.deployment"):
                    named[node.name] = _given_name(decorator) or node.name
    bound = [
        ast.unparse(node.func.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "bind"
    ]
    return {named[name] for name in bound} if bound and {*bound} <= {*named} else None


def _given_name(decorator: ast.expr) -> str | None:
    for keyword in getattr(decorator, "keywords", ()):
        if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
            return str(keyword.value.value)
    return None
