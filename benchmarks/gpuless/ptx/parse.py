"""Parse PTX text into functions made of statements, and variables of the module."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

SIZES = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4,
    "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8,
}  # fmt: skip
VARIABLE = re.compile(
    r"(?P<qual>(?:\.(?:visible|extern|weak|common)\s+)*)\.(?P<space>shared|local|global|const|param)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$%]+)\s*(?P<dims>(?:\[\d*\])*)\s*"
    r"(?:=\s*(?P<init>.*))?$",
    re.DOTALL,
)
PARAM = re.compile(
    r"\s*\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\s*(?:\.(?!align)\w+\s*)?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[\w$]+)(?:\[(?P<count>\d+)\])?\s*$"
)
FUNCTION = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(?P<kind>entry|func)\s*(?:\((?P<ret>[^)]*)\))?\s*"
    r"(?P<name>[\w$.]+)\s*(?:\((?P<par>[^)]*)\))?[^{;]*"
)


class PtxError(Exception):
    """The PTX cannot be translated; the message names the line and the instruction."""


@dataclass(frozen=True)
class Statement:
    """A statement of a function.

    Args:
        kind: `open`, `close`, `label` or `code`.
        text: the label or the code, without colon, semicolon and surrounding white space.
        line: line number in the PTX text.
        source: `file.py:12`, or empty without line information.
    """

    kind: str
    text: str
    line: int
    source: str


@dataclass(frozen=True)
class Param:
    """A parameter: `count` is the length of an array, 0 for a scalar; `offset` is in bytes."""

    name: str
    type: str
    count: int
    offset: int

    @property
    def size(self) -> int:
        """The size in bytes."""
        return SIZES[self.type] * (self.count or 1)


@dataclass
class Function:
    """A function; its statements are None where it is only declared."""

    name: str
    is_entry: bool
    params: list[Param]
    returns: list[Param]
    statements: list[Statement] | None = None


@dataclass
class Variable:
    """A variable; `space` is shared, local, global, const, param, or `dynamic` for extern shared memory.

    `align` and `size` are in bytes.
    """

    space: str
    name: str
    align: int
    size: int
    init: bytes | None = None


@dataclass
class Module:
    """All that a PTX text defines."""

    functions: dict[str, Function] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)


def parse(ptx: str) -> Module:
    """Parse a PTX text.

    Raises:
        PtxError: the text is not understood.
    """
    return _Scanner(ptx).module()


def split_operands(text: str) -> list[str]:
    """Split at commas that are outside brackets."""
    out, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += letter
    return out + [current.strip()] if current.strip() else out


def parse_variable(text: str) -> Variable:
    """Parse the declaration of a variable.

    Raises:
        PtxError: it is not understood.
    """
    found = VARIABLE.match(text.strip())
    if not found or found["type"] not in SIZES:
        raise PtxError(f"declaration not understood: {text[:120]}")
    size, dims = SIZES[found["type"]], re.findall(r"\[(\d*)\]", found["dims"])
    space = "dynamic" if found["space"] == "shared" and dims[:1] == [""] else found["space"]
    total = size
    for each in dims:
        total *= int(each or 0)
    init = parse_initial(found["init"], found["type"], total) if found["init"] else None
    return Variable(space, found["name"], int(found["align"] or size), total, init)


def parse_initial(text: str, kind: str, total: int) -> bytes:
    """Return the initial value of a variable, padded with zeros to `total` bytes.

    Raises:
        PtxError: it is not understood.
    """
    out = bytearray()
    for x in re.sub(r"[{}\s]", "", text).split(","):
        float_bits = re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", x)
        if not float_bits and not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", x):
            raise PtxError(f"initial value not understood: {x}")
        value = int(float_bits[1], 16) if float_bits else int(x.rstrip("U"), 0)
        out += (value & ((1 << 8 * SIZES[kind]) - 1)).to_bytes(SIZES[kind], "little")
    return bytes(out).ljust(total, b"\0")


def parse_params(text: str) -> list[Param]:
    """Parse a list of parameters, and place each at its offset.

    Raises:
        PtxError: one is not understood.
    """
    out: list[Param] = []
    offset = 0
    for part in split_operands(text):
        found = PARAM.match(part)
        if not found or found["type"] not in SIZES:
            raise PtxError(f"parameter not understood: {part.strip()}")
        count, size = int(found["count"] or 0), SIZES[found["type"]]
        align = int(found["align"] or size)
        offset = -(-offset // align) * align
        out.append(Param(found["name"], found["type"], count, offset))
        offset += out[-1].size
    return out


class _Scanner:
    """Read a PTX text from its beginning to its end."""

    def __init__(self, ptx: str) -> None:
        # Comments go, and their line breaks stay, so that line numbers hold.
        text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), ptx, flags=re.DOTALL)
        self.text = re.sub(r"//[^\n]*", "", text)
        files = re.findall(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', ptx)
        self.files = {number: os.path.basename(b or a) for number, a, b in files}
        self.pos, self.line_pos, self.line = 0, 0, 1

    def skip(self, pattern: str) -> re.Match[str] | None:
        """Skip a pattern if it matches at the current position."""
        found = re.compile(pattern).match(self.text, self.pos)
        if found:
            self.pos = found.end()
        return found

    def here(self) -> int:
        """Return the line number of the current position."""
        self.line += self.text.count("\n", self.line_pos, self.pos)
        self.line_pos = self.pos
        return self.line

    def until(self, end: str) -> str:
        """Skip the text up to and including `end`, and return the text before `end`."""
        at = self.text.find(end, self.pos)
        if at < 0:
            raise PtxError(f'line {self.here()}: no "{end}" after {self.text[self.pos : self.pos + 60]!r}')
        found = self.text[self.pos : at]
        self.pos = at + len(end)
        return found

    def body(self) -> list[Statement]:
        """Return the statements up to the brace that closes the function."""
        out: list[Statement] = []
        source, depth = "", 1
        while True:
            self.skip(r"\s+")
            line = self.here()
            if found := self.skip(r"\.loc\s+(\d+)\s+(\d+)[^\n]*"):
                source = f"{self.files.get(found[1], '?')}:{found[2]}"
            elif self.skip(r"\{"):
                depth += 1
                out.append(Statement("open", "", line, source))
            elif self.skip(r"\}"):
                depth -= 1
                if not depth:
                    return out
                out.append(Statement("close", "", line, source))
            elif found := self.skip(r"([$\w.%]+)\s*:(?!:)"):
                out.append(Statement("label", found[1], line, source))
            else:
                text = " ".join(self.until(";").split())
                if text and not text.startswith(".pragma"):
                    out.append(Statement("code", text, line, source))

    def module(self) -> Module:
        """Return everything that the text defines."""
        found = Module()
        while True:
            self.skip(r"\s+")
            if self.pos >= len(self.text):
                return found
            if self._ignored():
                continue
            if head := self.skip(FUNCTION.pattern):
                function = self._function(head)
                if function.statements is not None or function.name not in found.functions:
                    found.functions[function.name] = function
            else:
                found.variables.append(parse_variable(self.until(";")))

    def _ignored(self) -> bool:
        directives = (
            r"\.section[^{]*\{[^}]*\}",
            r"\.(version|target|address_size|file|loc)\b[^\n]*",
            r"\.(pragma|alias)\b[^;]*;",
        )
        return any(self.skip(each) for each in directives)

    def _function(self, head: re.Match[str]) -> Function:
        params, returns = parse_params(head["par"] or ""), parse_params(head["ret"] or "")
        function = Function(head["name"], head["kind"] == "entry", params, returns)
        defined = self.text[self.pos] == "{"
        self.pos += 1
        if defined:
            function.statements = self.body()
        return function
