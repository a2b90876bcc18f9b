"""PTX text -> variables and functions."""

import re
from typing import Any

from .errors import PtxError, UnsupportedError
from .lexer import Scanner, parse_variable, split_commas, strip_comments
from .program import Function, Variable

_HEADER_LINES = (".version", ".target", ".address_size")
_IGNORED_DIRECTIVES = (".pragma", ".alias")
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_LAUNCH_DIRECTIVE = re.compile(
    r"\.(maxntid|reqntid|minnctapersm|maxnreg|noreturn|reqnctapercluster|explicitcluster"
    r"|maxclusterrank)\s*([\d, ]*)"
)
_LOCAL_VARIABLE = re.compile(r"(\.(visible|extern|weak)\s+)*\.(shared|local|global|const|param)\b")


class ParsedModule:
    """Variables and functions of one PTX text, by name."""

    def __init__(self, text: str):
        self.text = text
        self.variables: dict[str, Variable] = {}
        self.functions: dict[str, Function] = {}
        self._parse(strip_comments(text))

    def _parse(self, text: str) -> None:
        scanner = Scanner(text)
        while scanner.skip_space():
            if text.startswith(_HEADER_LINES, scanner.position):
                scanner.position = text.index("\n", scanner.position)
            elif text.startswith(".section", scanner.position):
                for bracket in "{}":
                    scanner.until(bracket)
                    scanner.position += 1
            else:
                self._parse_item(scanner)

    def _parse_item(self, scanner: Scanner) -> None:
        head = scanner.until("{;=")
        if re.search(r"\.(entry|func)\b", head):
            function = _parse_function_head(head)
            opening = scanner.text[scanner.position]
            scanner.position += 1
            if opening == "{":
                function.body = _parse_body(scanner, function.name)
                self.functions[function.name] = function
            else:
                self.functions.setdefault(function.name, function)
            return
        declaration = (head + scanner.until(";")).strip()
        scanner.position += 1
        if not declaration or declaration.startswith(_IGNORED_DIRECTIVES):
            return
        variable = parse_variable(declaration)
        if variable.name not in self.variables or self.variables[variable.name].extern:
            self.variables[variable.name] = variable


def _parse_function_head(head: str) -> Function:
    match = re.search(r"\.(entry|func)\b", head)
    assert match is not None
    entry = match.group(1) == "entry"
    rest = re.sub(r"^\.attribute\s*\([^)]*\)\s*", "", head[match.end() :].strip())
    results = ""
    if not entry and rest.startswith("("):
        results, _, rest = rest[1:].partition(")")
        rest = rest.strip()
    name = re.match(r"[\w$%.]+", rest)
    if name is None:
        raise PtxError(f"cannot parse function: {head.strip()[:200]}")
    function = Function(name.group(), entry)
    rest = rest[name.end() :].strip()
    if rest.startswith("("):
        scanner = Scanner(rest)
        scanner.position = 1
        params = scanner.until(")")
        function.params = [_parse_parameter(text) for text in split_commas(params)]
        rest = rest[scanner.position + 1 :]
    function.results = [_parse_parameter(text) for text in split_commas(results)]
    for parameter in function.params if entry else ():
        parameter.space = "kernel_param"
    for directive in _LAUNCH_DIRECTIVE.finditer(rest):
        values = [int(number) for number in re.findall(r"\d+", directive.group(2))]
        function.directives[directive.group(1)] = values
    return function


def _parse_parameter(text: str) -> Variable:
    if text.startswith(".reg"):
        raise UnsupportedError(f".reg parameters: {text}")
    return parse_variable(text)


def _parse_body(scanner: Scanner, name: str) -> list[tuple[Any, ...]]:
    """Items of a function's body, up to and with its closing brace.

    The items are ("{",), ("}",), ("label", name), ("registers", type, names),
    ("variable", Variable), ("table", labels) and ("instruction", text, line).
    """
    items: list[tuple[Any, ...]] = []
    depth = 1
    while scanner.skip_space():
        character, line = scanner.text[scanner.position], scanner.line()
        if character in "{};":
            scanner.position += 1
            if character == ";":
                continue
            depth += 1 if character == "{" else -1
            if depth == 0:
                return items
            items.append((character,))
        elif label := _LABEL.match(scanner.text, scanner.position):
            items.append(("label", label.group(1)))
            scanner.position = label.end()
        else:
            statement = scanner.until(";").strip()
            scanner.position += 1
            items += _parse_statement(statement, line)
    raise PtxError(f"unterminated body of {name}")


def _parse_statement(statement: str, line: int) -> list[tuple[Any, ...]]:
    if not statement.startswith("."):
        return [("instruction", re.sub(r"\s+", " ", statement), line)]
    if statement.startswith(".reg"):
        return [_parse_registers(statement)]
    if statement.startswith((".pragma", ".callprototype")):
        return []
    if statement.startswith(".branchtargets"):
        return [("table", split_commas(statement[len(".branchtargets") :]))]
    if _LOCAL_VARIABLE.match(statement):
        return [("variable", parse_variable(statement))]
    raise UnsupportedError(f"unsupported directive at PTX line {line}: {statement[:100]}")


def _parse_registers(statement: str) -> tuple[Any, ...]:
    match = re.match(r"\.reg\s*((?:\.\w+\s*)+)(.*)$", statement, re.S)
    if match is None:
        raise PtxError(f"cannot parse registers: {statement[:100]}")
    types = match.group(1).split(".")
    if {"v2", "v4"} & {part.strip() for part in types}:
        raise UnsupportedError(f"vector registers: {statement}")
    names = []
    for name in split_commas(match.group(2)):
        numbered = re.fullmatch(r"([\w$%]+)<(\d+)>", name)
        if numbered:
            names += [f"{numbered.group(1)}{i}" for i in range(int(numbered.group(2)))]
        else:
            names.append(name)
    return ("registers", types[-1].strip(), names)
