"""What the docstrings of the public API must contain, read from the source with `ast`; nothing is imported.

Notation of shapes: square brackets with named, literal or computed sizes, "[tokens, hidden]"; "scalar"; "any shape";
"the shape of ..."; "unused" for an argument that an interface demands. Units are words: seconds, bytes, Hz.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_anymal"

Function = ast.FunctionDef | ast.AsyncFunctionDef

SHAPE = re.compile(
    r"(?<![\w\])])\[(?:[\w \n*+/.,'-]|\([^()]*\)|\w\[\w+(?::\w*)?\])*\]"
    r"|\bscalar\b|\bany shape\b|\bshape of\b|'s shape\b|\bunused\b"
)
ARRAY = re.compile(r"\b(?:Tensor|ndarray)\b")
# Tensors by name, such as the weights of a model, and functions of tensors have no single shape.
BY_NAME = re.compile(r"\b(?:dict|Mapping)\[str\b|\btuple\[str, |\bCallable\b")

# Numbers that are a time, a size or place in memory, or a rate.
QUANTITY = re.compile(
    r"(?:^|_)(?:timeout|duration|interval|wait|pause|elapsed|deadline|delay|age|until|since|began|begun|started|wall"
    r"|silent|waited|stalled|eta|clock|skew|memory|budget|free|space|offset|bandwidth|frequency|rate|flops)(?:_|$)"
)
NUMBER = re.compile(r"(?:Optional\[)?(?:int|float)\]?(?: \| None)?")
UNIT = re.compile(
    r"\bseconds?\b|\bns\b|\bHz\b|\bbytes?\b|\bGB\b|\bper second\b|\bsteps\b|\boperations\b|\blearning rate\b",
    re.IGNORECASE,
)
UNIT_IN_NAME = re.compile(r"(?:^|_)(?:seconds|bytes|ns|gb|steps)$")
SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Attributes):$")


@dataclass
class Docstring:
    """A docstring by sections."""

    prose: str = ""
    # Section -> name -> text; the text of Returns and Yields is under "".
    sections: dict[str, dict[str, str]] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> Docstring:
        doc, section, name = Docstring(), "", ""
        for line in inspect.cleandoc(text).splitlines():
            if heading := SECTION.match(line):
                section, name = heading[1], ""
                doc.sections.setdefault(section, {})
            elif line and not line.startswith(" ") and section:
                section = ""
            if not section:
                doc.prose += line + "\n"
            elif not heading:
                entry = re.match(r"    (\*{0,2}[\w.]+)(?: \([^)]*\))?: ?(.*)", line)
                if entry and section not in ("Returns", "Yields"):
                    name, line = entry[1].lstrip("*"), entry[2]
                doc.sections[section][name] = f"{doc.sections[section].get(name, '')} {line.strip()}".strip()
        return doc

    def joined(self, other: Docstring) -> Docstring:
        names = {*self.sections, *other.sections}
        merged = {x: {**other.sections.get(x, {}), **self.sections.get(x, {})} for x in names}
        return Docstring(f"{self.prose}\n{other.prose}", merged)

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join([self.prose, *(f"{name}: {text}" for x in self.sections.values() for name, text in x.items())])

    @property
    def returned(self) -> str:
        both = [self.sections.get(name, {}).get("", "") for name in ("Returns", "Yields")]
        return " ".join(filter(None, both))

    def about(self, name: str) -> list[str]:
        """Texts on a parameter or attribute: its entry, and sentences of the other parts that name it."""
        entries = {k: v for s in ("Args", "Attributes") for k, v in self.sections.get(s, {}).items()}
        texts = [self.prose, *(v for k, v in entries.items() if k != name)]
        sentences = [s for text in texts for s in re.split(r"(?<=[.;])\s", text)]
        return [entries.get(name, ""), *(s for s in sentences if re.search(rf"(?<![\w.]){name}\b", s))]


@dataclass
class Definition:
    """A public function, method or class with what a page shows of it."""

    module: str
    name: str
    node: Function | ast.ClassDef
    doc: Docstring
    # The documentation of fields of a dataclass, by name.
    fields: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    returns: str = ""

    @property
    def special(self) -> bool:
        """Whether it is a special method, such as `__call__`."""
        return self.node.name.startswith("__")

    def __str__(self) -> str:
        return f"{self.module}:{self.node.lineno} {self.name}"


def _returns(node: Function) -> str:
    return ast.unparse(node.returns) if node.returns else ""


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


def public(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_")


def _doc(node: Function | ast.ClassDef) -> Docstring:
    return Docstring.parse(ast.get_docstring(node) or "")


def _annotations(node: Function) -> dict[str, str]:
    a = node.args
    given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return {x.arg: ast.unparse(x.annotation) for x in given if x.annotation}


def is_record(node: ast.ClassDef) -> bool:
    """Whether the class is a dataclass or a named tuple: its fields are its arguments."""
    names = [ast.unparse(d).partition("(")[0].rpartition(".")[2] for d in node.decorator_list]
    return "dataclass" in names or any(ast.unparse(base).endswith("NamedTuple") for base in node.bases)


def _fields(node: ast.ClassDef, lines: list[str], doc: Docstring) -> tuple[dict[str, str], dict[str, str]]:
    """Documentation and annotation of each public field: the string below it, its comment, or its Attributes entry."""
    texts, annotations = {}, {}
    for x, below in zip(node.body, [*node.body[1:], None]):
        if not isinstance(x, ast.AnnAssign) or not isinstance(x.target, ast.Name) or x.target.id.startswith("_"):
            continue
        name, first, comment = x.target.id, x.lineno - 2, []
        while lines[first].strip().startswith("#"):
            comment.insert(0, lines[first].strip(" #"))
            first -= 1
        stated = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
        texts[name] = stated or " ".join(comment) or doc.sections.get("Attributes", {}).get(name, "")
        annotations[name] = ast.unparse(x.annotation)
    return texts, annotations


def definitions(module: str) -> Iterator[Definition]:
    """The public classes and functions of a module, and the classes' public and special methods."""
    lines = modules()[module].read_text().splitlines()
    for node in tree(module).body:
        if not public(node):
            continue
        if isinstance(node, ast.ClassDef):
            yield from _of_class(module, node, lines)
        else:
            yield Definition(module, node.name, node, _doc(node), {}, _annotations(node), _returns(node))


def _of_class(module: str, node: ast.ClassDef, lines: list[str]) -> Iterator[Definition]:
    doc = own = _doc(node)
    fields, annotations = _fields(node, lines, doc) if is_record(node) else ({}, {})
    for method in node.body:
        if not isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if method.name == "__init__":
            # The page shows both as one.
            doc, annotations = doc.joined(_doc(method)), annotations | _annotations(method)
        elif public(method) or method.name.startswith("__"):
            # A special method without a docstring is not on the page: the class docstring speaks for it.
            shown = _doc(method) if public(method) else _doc(method).joined(own)
            name = f"{node.name}.{method.name}"
            yield Definition(module, name, method, shown, {}, _annotations(method), _returns(method))
    yield Definition(module, node.name, node, doc, fields, annotations)


def undocumented(item: Definition) -> Iterator[str]:
    """A definition, or fields of a record, without documentation."""
    if not item.doc.text.strip() and not item.special:
        yield f"{item}: no docstring"
    for name, text in item.fields.items():
        if not text.strip():
            yield f"{item}: field {name} has neither a comment above it nor an entry in Attributes"


def without_shape(item: Definition) -> Iterator[str]:
    """Parameters, fields and results that are arrays and whose shape is not stated."""
    arrays = [name for name, hint in item.annotations.items() if ARRAY.search(hint) and not BY_NAME.search(hint)]
    for name in arrays:
        # A single array need not be named.
        texts = [item.fields.get(name, ""), *item.doc.about(name), item.doc.prose if len(arrays) == 1 else ""]
        if not any(map(SHAPE.search, texts)):
            yield f"{item}: {name}: {item.annotations[name]} has no shape"
    is_array = ARRAY.search(item.returns) and not BY_NAME.search(item.returns)
    if is_array and not SHAPE.search(f"{item.doc.prose} {item.doc.returned}"):
        yield f"{item}: the result, {item.returns}, has no shape"


def without_unit(item: Definition) -> Iterator[str]:
    """Parameters, fields and results that are a time, a size or a rate and whose unit is not stated."""
    for name, hint in item.annotations.items():
        if QUANTITY.search(name) and NUMBER.fullmatch(hint) and not UNIT_IN_NAME.search(name):
            texts = [item.fields.get(name, ""), *item.doc.about(name), item.doc.prose if item.fields else ""]
            if not any(map(UNIT.search, texts)):
                yield f"{item}: {name} has no unit"
    name = item.name.rpartition(".")[2]
    is_quantity = QUANTITY.search(name) and NUMBER.fullmatch(item.returns) and not UNIT_IN_NAME.search(name)
    if is_quantity and not UNIT.search(item.doc.text):
        yield f"{item}: the result has no unit"
