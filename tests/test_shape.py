"""The shape of the programs themselves: what the reader is promised about the order and the size of their parts, over the syntax tree."""

from __future__ import annotations

import ast
import asyncio
import functools
import pkgutil
import re
import symtable
import sys
import tomllib
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import pytest
from aiohttp import web
from aiohttp._websocket.reader import WebSocketDataQueue
from aiohttp.base_protocol import BaseProtocol
from plant import ROOT

import agent
import iiot

TOP = "Top of the file"
BANNER = re.compile(r"# ==== (.+) ====")
FUNCTION_LINES = 60
CLASS_LINES = 300
SECTION_LINES = 1_200
STORAGE = ("Database", "Accounts", "Devices", "Readings", "Logs", "Alerts", "Notifications", "Commands", "Removal", "Writer", "Store")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

# Statements, not English: "Select a device from the list" is none, and neither is "update".
SQL = re.compile(
    r"""\s*(
        (with\s.+?\)\s*)?select\s(?!a\b|an\b|the\b) | insert\s+(or\s+\w+\s+)?into\s | replace\s+into\s
        | update\s+\w+\s+set\s | delete\s+from\s | pragma\s+\w+
        | (create|drop|alter)\s+(virtual\s+|temp\s+|unique\s+)*(table|index|trigger|view)\s
        | begin(\s+(immediate|exclusive|deferred))?\s*;?$ | commit\s*;?$ | rollback\b(\s+to\s.*)?;?$ | (savepoint|release)\s+\w+\s*;?$
        | vacuum\b | attach\s+database\s )""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
RUNS_SQL = {"execute", "executemany", "executescript", "execute_fetchall", "execute_insert"}


@attrs.frozen
class Section:
    """A part of a file under its own banner; `start` is the banner's line."""

    name: str
    start: int
    stop: int


@attrs.frozen(eq=False)
class Program:
    """One of the files that are a house of their own."""

    module: types.ModuleType
    source: str
    lines: list[str]
    tree: ast.Module
    sections: list[Section]

    @property
    def file(self) -> str:
        return f"{self.module.__name__}.py"


def find_sections(lines: list[str]) -> list[Section]:
    """The sections of a file, what stands above the first banner among them."""
    banners = [(found[1], number) for number, line in enumerate(lines, 1) if (found := BANNER.fullmatch(line))]
    starts = [(TOP, 1), *banners]
    stops = [number for _, number in banners] + [len(lines) + 1]
    return [Section(name, start, stop) for (name, start), stop in zip(starts, stops, strict=True)]


def load(module: types.ModuleType) -> Program:
    source = (ROOT / f"{module.__name__}.py").read_text(encoding="utf-8")
    return Program(module, source, source.splitlines(), ast.parse(source), find_sections(source.splitlines()))


SERVER, AGENT = load(iiot), load(agent)
PROGRAMS = (SERVER, AGENT)
EVERY_PROGRAM = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.file)


def every_section(*without: str, first: int = 0) -> pytest.MarkDecorator:
    """Every section of every program, but for those of these names."""
    chosen = [(program, section) for program in PROGRAMS for section in program.sections[first:] if section.name not in without]
    ids = [f"{program.file}: {section.name}" for program, section in chosen]
    return pytest.mark.parametrize(("program", "section"), chosen, ids=ids)


EVERY_SECTION = every_section()


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Every function and class below a node, by its qualified name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITIONS):
            yield prefix + child.name, child
            yield from definitions(child, f"{prefix}{child.name}.")
        else:
            yield from definitions(child, prefix)


def length(node: Definition) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def too_long(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Functions and classes beyond their bound, with their line."""
    for name, node in definitions(tree):
        if length(node) > (CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES):
            yield node.lineno, f"{name} has {length(node)} lines"


def defined_names(tree: ast.Module) -> dict[str, int]:
    """The names of the top level, and where each is first bound."""
    names: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, DEFINITIONS):
            names.setdefault(node.name, node.lineno)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for leaf in ast.walk(target):
                    if isinstance(leaf, ast.Name):
                        names.setdefault(leaf.id, node.lineno)
    return names


def global_uses(table: symtable.SymbolTable) -> Iterator[tuple[int, str]]:
    """Names of the top level used in this scope and those within it, with the scope's first line; locals are none."""
    for symbol in table.get_symbols():
        if symbol.is_global() and symbol.is_referenced():
            yield table.get_lineno(), symbol.get_name()
    for child in table.get_children():
        yield from global_uses(child)


def annotation_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names used in annotations, which the symbol table leaves out."""
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.expr):
                yield from ((leaf.lineno, leaf.id) for leaf in ast.walk(part) if isinstance(leaf, ast.Name))


@functools.cache
def forward_uses(source: str) -> tuple[tuple[int, str], ...]:
    """Uses of a top-level name by a definition that ends above that name's own."""
    tree = ast.parse(source)
    names = defined_names(tree)
    ends = {node.lineno: node.end_lineno or node.lineno for node in tree.body}
    starts = sorted(ends)
    table = symtable.symtable(source, "program", "exec")
    uses = [use for child in table.get_children() for use in global_uses(child)] + list(annotation_uses(tree))
    return tuple(
        (line, f"uses {name}, which is defined lower down, at line {names[name]}")
        for line, name in sorted(set(uses))
        if names.get(name, 0) > ends[max(start for start in starts if start <= line)]
    )


def docstrings(tree: ast.AST) -> set[int]:
    """The identities of the nodes that are docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *DEFINITIONS)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


def sql_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Strings that are SQL statements, and calls that run one."""
    prose = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose and SQL.match(node.value):
            yield node.lineno, f"holds SQL: {node.value[:60]!r}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in RUNS_SQL:
            yield node.lineno, f"runs SQL: .{node.func.attr}()"


def is_broad(kind: ast.expr | None) -> bool:
    """Whether a handler takes everything: bare, Exception or BaseException, alone or among others."""
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(one is None or (isinstance(one, ast.Name) and one.id in ("Exception", "BaseException")) for one in kinds)


def says_why(line: str) -> bool:
    """Whether a line ends with a comment that is more than an instruction to a checker."""
    _, mark, comment = line.partition("#")
    reason = re.sub(r"(noqa|type: ignore|fmt: \w+)[\w:\[\], -]*?(?=( - )|$)", "", comment)
    return bool(mark) and len(re.findall(r"[A-Za-z]{2,}", reason)) >= 3


@functools.cache
def broad_handlers(source: str) -> tuple[tuple[int, str], ...]:
    """`except Exception` and its like, neither explained on its line nor raised again."""
    return tuple(find_broad_handlers(source.splitlines(), ast.parse(source)))


def find_broad_handlers(lines: list[str], tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            broad = is_broad(node.type) and not isinstance(node.body[-1], ast.Raise)
        elif isinstance(node, ast.Call):
            broad = getattr(node.func, "id", getattr(node.func, "attr", "")) == "suppress" and any(map(is_broad, node.args))
        else:
            continue
        if broad and not says_why(lines[node.lineno - 1]):
            yield node.lineno, "takes every exception and does not say why"


def within(program: Program, section: Section, offenders: Iterable[tuple[int, str]]) -> list[str]:
    """The offenders of one section."""
    return [f"{program.file}:{line}: {text}" for line, text in sorted(offenders) if section.start <= line < section.stop]


def expect_none(program: Program, section: Section, offenders: Iterable[tuple[int, str]]) -> None:
    """Fail with every offender of a section by name."""
    found = within(program, section, offenders)
    assert not found, "\n".join(["", *found])


def promised_sections(program: Program) -> list[str]:
    """The sections that a module's own docstring names, in its order."""
    promised = (ast.get_docstring(program.tree) or "").splitlines()
    return [found[1] for line in promised if (found := re.fullmatch(r" {4}(\S.*?) {2,}\S.*", line))]


@EVERY_PROGRAM
def test_the_sections_are_those_of_the_docstring_in_its_order(program: Program) -> None:
    assert len(promised_sections(program)) >= 9
    assert [section.name for section in program.sections[1:]] == promised_sections(program)


@every_section(first=1)
def test_a_section_says_under_its_banner_what_it_owns(program: Program, section: Section) -> None:
    comment = []
    for line in program.lines[section.start :]:
        if not line.startswith("#"):
            break
        comment.append(line)
    assert 1 <= len(comment) <= 6
    assert comment[0].startswith("# Owns: ")
    assert program.lines[section.start + len(comment)] == "", "an empty line sets the comment off from the first definition"


@EVERY_SECTION
def test_nothing_uses_a_name_that_is_defined_lower_down(program: Program, section: Section) -> None:
    expect_none(program, section, forward_uses(program.source))


@every_section(*STORAGE)
def test_sql_stands_in_the_rooms_of_storage_alone(program: Program, section: Section) -> None:
    expect_none(program, section, sql_uses(program.tree))


@pytest.mark.parametrize("section", [section for section in SERVER.sections if section.name in STORAGE], ids=lambda section: section.name)
def test_the_rooms_of_storage_are_where_sql_is_found(section: Section) -> None:
    assert len(within(SERVER, section, sql_uses(SERVER.tree))) > 1


@EVERY_SECTION
def test_a_room_is_no_longer_than_a_reader_can_keep_in_mind(program: Program, section: Section) -> None:
    assert section.stop - section.start <= SECTION_LINES


@EVERY_SECTION
def test_functions_and_classes_stay_within_their_length(program: Program, section: Section) -> None:
    expect_none(program, section, too_long(program.tree))


@EVERY_SECTION
def test_a_broad_except_says_why_or_raises_again(program: Program, section: Section) -> None:
    expect_none(program, section, broad_handlers(program.source))


def owned_globals(program: Program) -> dict[str, Any]:
    """What a module binds at its top level, apart from what it imports or defines as function or class."""
    names = defined_names(program.tree)
    kinds = (type, types.FunctionType)
    return {name: value for name, value in vars(program.module).items() if name in names and not isinstance(value, kinds)}


@pytest.mark.parametrize(("program", "name"), [(program, name) for program in PROGRAMS for name in sorted(owned_globals(program))])
def test_no_global_is_mutable(program: Program, name: str) -> None:
    assert not mutable_parts(getattr(program.module, name))


def imported(program: Program) -> set[str]:
    """The modules that a program imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(program.tree):
        if isinstance(node, ast.Import):
            found.update(name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_server_and_device_meet_on_the_wire_alone() -> None:
    assert "agent" not in imported(SERVER)
    assert imported(AGENT) - sys.stdlib_module_names == {"aiohttp"}


def mutable_parts(value: object) -> list[object]:
    """Whatever in a value can be changed in place, as deep as tuples and read-only mappings go."""
    if isinstance(value, tuple | frozenset):
        return [part for item in value for part in mutable_parts(item)]
    if isinstance(value, types.MappingProxyType):
        return [part for item in value.values() for part in mutable_parts(item)]
    if attrs.has(type(value)):
        return mutable_parts(tuple(getattr(value, name) for name in names_of(value))) if is_frozen(value) else [value]
    changes = ("append", "add", "update", "extend", "__setitem__", "put_nowait", "set_result")
    return [value] if not isinstance(value, type) and any(hasattr(value, change) for change in changes) else []


def names_of(value: Any) -> list[str]:
    return [field.name for field in attrs.fields(type(value))]


def is_frozen(value: object) -> bool:
    """Whether an object of an attrs class refuses assignment."""
    try:
        for name in names_of(value):
            setattr(value, name, getattr(value, name))
    except attrs.exceptions.FrozenInstanceError:
        return True
    return not names_of(value)


@EVERY_SECTION
def test_no_function_rebinds_a_global(program: Program, section: Section) -> None:
    rebinding = ((node.lineno, f"global {', '.join(node.names)}") for node in ast.walk(program.tree) if isinstance(node, ast.Global))
    expect_none(program, section, rebinding)


STATEMENTS = [
    "select 1",
    "  SELECT id FROM device",
    "with page as (select 1) select * from page",
    "insert into t values (1)",
    "insert or replace into t values (1)",
    "update presence set seq = 1",
    "delete from {table} where id = ?",
    "delete from ",
    "pragma user_version = ",
    "create table x (y)",
    "begin immediate",
    "commit",
    "rollback to change",
    "begin",
]
PROSE = [
    "update the server before the devices",
    "Select a device from the list.",
    "delete the file",
    "insert",
    "committed",
    "beginning",
    "with care",
]


@pytest.mark.parametrize("text", STATEMENTS)
def test_the_guard_knows_a_statement(text: str) -> None:
    assert list(sql_uses(ast.parse(f"x = {text!r}")))
    assert not list(sql_uses(ast.parse(f"def f():\n    {text!r}"))), "a docstring is prose"


@pytest.mark.parametrize("text", PROSE)
def test_the_guard_knows_prose(text: str) -> None:
    assert not list(sql_uses(ast.parse(f"x = {text!r}")))


def test_the_guard_sees_sql_in_an_f_string_and_in_a_call() -> None:
    assert len(list(sql_uses(ast.parse("f'delete from {table}'")))) == 1
    assert len(list(sql_uses(ast.parse("connection.execute(text)")))) == 1


@pytest.mark.parametrize(
    ("source", "offenders"),
    [
        ("def a():\n    return b()\n\ndef b(): ...\n", 1),
        ("def b(): ...\n\ndef a():\n    return b()\n", 0),
        ("def a(b):\n    return b\n\ndef b(): ...\n", 0),
        ("def a():\n    b = 1\n    return b\n\nb = 2\n", 0),
        ("class A:\n    def f(self) -> A:\n        return A()\n", 0),
        ("def a(x: B): ...\n\nclass B: ...\n", 1),
        ("def a():\n    return [B for _ in ()]\n\nB = 1\n", 1),
        ("class A:\n    def f(self):\n        def g():\n            return B\n        return g\n\nB: int = 1\n", 1),
    ],
)
def test_the_guard_sees_forward_uses(source: str, offenders: int) -> None:
    assert len(list(forward_uses("from __future__ import annotations\n" + source))) == offenders


@pytest.mark.parametrize(
    ("handler", "offenders"),
    [
        ("except Exception:\n    pass", 1),
        ("except:\n    pass", 1),
        ("except (ValueError, BaseException) as error:\n    print(error)", 1),
        ("except Exception:  # noqa: BLE001\n    pass", 1),
        ("except Exception:  # noqa: BLE001 - whatever failed, nothing was stored\n    pass", 0),
        ("except Exception:  # the boundary: the next request is answered\n    pass", 0),
        ("except Exception:\n    undo()\n    raise", 0),
        ("except ValueError:\n    pass", 0),
    ],
)
def test_the_guard_sees_broad_handlers(handler: str, offenders: int) -> None:
    assert len(list(broad_handlers(f"try:\n    f()\n{handler}\n"))) == offenders


def test_the_guard_sees_what_is_too_long() -> None:
    assert not list(too_long(ast.parse("def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1))))
    assert list(too_long(ast.parse("def f():\n" + "    x = 1\n" * FUNCTION_LINES)))
    assert list(too_long(ast.parse("class C:\n" + "    x = 1\n" * CLASS_LINES)))


@pytest.mark.parametrize("value", [[], {}, set(), bytearray(), ([],), types.MappingProxyType({"a": []})], ids=repr)
def test_the_guard_sees_what_is_mutable(value: object) -> None:
    assert mutable_parts(value)


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def script_header(program: Program) -> dict[str, Any]:
    """The metadata in a program's first comment, as PEP 723 reads it."""
    found = re.findall(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", program.source)
    assert [kind for kind, *_ in found] == ["script"]
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in found[0][1].splitlines(keepends=True)))


def test_the_script_header_asks_for_what_the_project_asks_for() -> None:
    assert script_header(SERVER) == {"requires-python": project()["requires-python"], "dependencies": project()["dependencies"]}


def test_the_agents_script_header_asks_for_aiohttp_alone() -> None:
    """From the same version on; it uses nothing that may go with the next."""
    aiohttp = [name.partition(",")[0] for name in project()["dependencies"] if name.startswith("aiohttp>")]
    assert script_header(AGENT) == {"requires-python": project()["requires-python"], "dependencies": aiohttp}


def foreign_private_names(program: Program) -> set[str]:
    """Private attributes that the program uses and does not make itself, and what it imports from private modules."""
    used, own = set[str](), set[str]()
    for node in ast.walk(program.tree):
        if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr):
            (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, DEFINITIONS):
            own.add(node.name)
        elif isinstance(node, ast.ImportFrom) and "._" in (node.module or ""):
            used |= {alias.name for alias in node.names}
    return used - own


def test_private_names_of_packages_are_told_and_used() -> None:
    told = {name.rpartition(".")[2] for name in iiot.PRIVATE}
    assert foreign_private_names(SERVER) <= told
    assert foreign_private_names(AGENT) == set()
    assert [name for name in told if len(re.findall(rf"\b{name}\b", SERVER.source)) < 2] == [], "not used"


async def test_private_names_are_there() -> None:
    """Where one is gone, see what took its place before a newer version of the package is allowed."""

    async def nothing(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response()

    made: dict[str, Callable[[], Any]] = {
        "aiohttp._websocket.reader.WebSocketDataQueue": lambda: WebSocketDataQueue(
            BaseProtocol(asyncio.get_running_loop()), 1, loop=asyncio.get_running_loop()
        ),
        "aiohttp.web.Server": lambda: web.Server(nothing),
        "aiohttp.web.AppRunner": lambda: web.AppRunner(web.Application()),
    }
    for name in iiot.PRIVATE:
        owner, _, last = name.rpartition(".")
        holder = made[owner]() if owner in made else pkgutil.resolve_name(owner)
        assert hasattr(holder, last), name


def test_a_package_whose_private_names_are_used_has_an_end() -> None:
    with_end = {re.split(r"[^\w-]", name)[0] for name in project()["dependencies"] if "<" in name}
    assert with_end == {name.partition(".")[0] for name in iiot.PRIVATE}


@EVERY_PROGRAM
def test_the_version_is_the_projects(program: Program) -> None:
    assert project()["version"] == program.module.VERSION
