"""Recorded multi-agent rounds: reading them, and turning their texts into prompts of segments.

A file holds one JSON object per line, one round of one session each::

    {"workload", "session", "round", "t", "defs": [block...], "shared": [block...],
     "agents": [{"id", "segments": [{"kind", "text" | "ref", "role"?}...], "out"?}...]}

A block is ``{"id", "text"}``: ``shared`` are the outputs of the round before, handed to everybody,
``defs`` whatever else is first needed in this round. A segment holds its text or refers to one
block or a list of blocks that its session has defined so far. A prompt is its segments' texts, one
after the other with nothing between them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokendance.host.segments import Segment, private, shared

__all__ = [
    "RecordedAgent",
    "RecordedBlock",
    "RecordedRound",
    "WorkloadError",
    "find_workload",
    "parse_rounds",
    "read_rounds",
    "tokenize_round",
    "workloads_directory",
]

KINDS = ("system", "task", "private", "shared")
"""Kinds of segments in a file. Only ``shared`` is shared; `read_rounds` adds ``template``."""


class WorkloadError(ValueError):
    """A workload file that cannot be used; the message begins with ``path:line:``."""


@dataclass(frozen=True, slots=True)
class RecordedBlock:
    """One run of a prompt's text.

    Attributes:
        kind: one of `KINDS`, or ``template`` for the markers of a chat template. History that was
            once handed to everybody is ``shared``, whatever the file calls it.
        text: the text itself.
        block_id: the id that the file gives it, or None for a text that stands in one prompt only.
    """

    kind: str
    text: str
    block_id: str | None = None

    @property
    def is_shared(self) -> bool:
        """Whether other agents may reuse what was computed for it."""
        return self.kind == "shared"


@dataclass(frozen=True, slots=True)
class RecordedAgent:
    """One agent's prompt in one round: its name, its blocks in order, the id of what it wrote."""

    name: str
    blocks: tuple[RecordedBlock, ...]
    output_id: str | None = None


@dataclass(frozen=True, slots=True)
class RecordedRound:
    """One round of one session.

    Attributes:
        workload: name of the set.
        session: sessions have nothing in common; block ids hold within one.
        round: number of the round within the session, as recorded.
        time: the recording's own clock.
        agents: in the order of the file.
        source: ``path:line`` of the round, for messages.
    """

    workload: str
    session: str
    round: int
    time: str
    agents: tuple[RecordedAgent, ...]
    source: str


def workloads_directory() -> Path | None:
    """The folder of the recorded workloads: ``$TOKENDANCE_WORKLOADS``, else ``../shared/workloads``
    beside the repository; None where neither is a folder."""
    own = os.environ.get("TOKENDANCE_WORKLOADS")
    repository = Path(__file__).resolve().parent.parent
    directory = Path(own).expanduser() if own else repository.parent / "shared" / "workloads"
    return directory if directory.is_dir() else None


def find_workload(name: str | os.PathLike[str]) -> Path:
    """The file of a workload: a path, or a name (``.jsonl`` may be left off).

    Names are looked up in `workloads_directory` and in ``recordings/`` of the repository.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    directory = workloads_directory()
    recordings = Path(__file__).resolve().parent.parent / "recordings"
    for folder in (directory, recordings):
        if folder is not None:
            for candidate in (folder / path, folder / f"{path}.jsonl"):
                if candidate.is_file():
                    return candidate
    raise FileNotFoundError(
        f"workload: expected a .jsonl file, or a name in {directory or 'TOKENDANCE_WORKLOADS'}, "
        f"got {os.fspath(name)!r}"
    )


def parse_rounds(text: str) -> tuple[int | None, int | None]:
    """``"A:B"`` as ``(A, B)``, rounds ``A <= round < B``; a side left off is None; ``"A"`` is one.

    Raises:
        ValueError: ``text`` is neither.
    """
    found = re.fullmatch(r"(\d*):(\d*)|(\d+)", text)
    if found is None:
        raise ValueError(f"rounds: expected A:B or A with whole numbers A and B, got {text!r}")
    first, end, one = found.groups()
    if one is not None:
        return int(one), int(one) + 1
    return int(first) if first else None, int(end) if end else None


def read_rounds(
    path: str | os.PathLike[str],
    *,
    session: str | None = None,
    rounds: tuple[int | None, int | None] | None = None,
    agents: int | None = None,
    max_private: int | None = None,
    chat: bool = False,
) -> list[RecordedRound]:
    """Reads and checks a workload file.

    Args:
        path: the file.
        session: only this one; all by default.
        rounds: ``(first, end)``, only the rounds ``first <= round < end``; None leaves a side open.
        agents: only the first so many agents of each round. Their prompts stay as they are, with
            the messages of the agents that are left out.
        max_private: of every list of private blocks only the last so many.
        chat: puts ChatML markers into the prompts wherever the role changes (``user`` where a
            segment has none), and ends them where the assistant's answer begins.

    Returns:
        The selected rounds in the order of the file, at least one.

    Raises:
        WorkloadError: a line is not of the format, with its number.
        ValueError: an argument is out of range or selects nothing.
        OSError: the file cannot be read.
    """
    for name, limit, least in (("agents", agents, 1), ("max_private", max_private, 0)):
        if limit is not None and limit < least:
            raise ValueError(f"{name}: expected at least {least}, got {limit}")
    first, end = rounds or (None, None)
    found: list[RecordedRound] = []
    sessions: dict[str, _Blocks] = {}
    for line in _lines(Path(path)):
        name = line.text("session")
        blocks = sessions.setdefault(name, _Blocks())
        # Every line is read whole, selected or not: later rounds refer to its blocks.
        number = line.integer("round")
        recorded = RecordedRound(
            workload=line.text("workload"),
            session=name,
            round=number,
            time=line.text("t"),
            agents=_read_agents(line, blocks, max_private, chat)[:agents],
            source=line.where,
        )
        in_range = (first is None or first <= number) and (end is None or number < end)
        if in_range and session in (None, name):
            found.append(recorded)
    if session is not None and session not in sessions:
        raise ValueError(f"session: expected one of {', '.join(sessions)}, got {session!r}")
    if not found:
        limits = ":".join("" if side is None else str(side) for side in (first, end))
        raise ValueError(f"rounds: expected rounds that are in {os.fspath(path)}, got {limits}")
    return found


def tokenize_round(
    recorded: RecordedRound,
    encode: Callable[[str], list[int]],
    *,
    namespace: bytes | str = b"",
    max_tokens: int | None = None,
) -> dict[str, list[Segment]]:
    """The round's prompts as segments, each block tokenised alone.

    Tokenised with its neighbours a block would begin and end in other tokens in every prompt, and
    no two prompts would hold the same segment.

    Args:
        recorded: the round.
        encode: text to token ids, no special tokens added, called once per distinct text; with
            transformers ``partial(tokenizer.encode, add_special_tokens=False)``.
        namespace: of the segments.
        max_tokens: the longest prompt that the model has positions for; unlimited by default.

    Returns:
        Agent name to its segments, in the round's order. Blocks without tokens are left out.

    Raises:
        WorkloadError: a prompt has no tokens, or more than ``max_tokens``.
    """
    made: dict[tuple[bool, str], Segment] = {}

    def segment(block: RecordedBlock) -> Segment:
        key = (block.is_shared, block.text)
        if key not in made:
            make = shared if block.is_shared else private
            made[key] = make(encode(block.text), namespace=namespace)
        return made[key]

    prompts: dict[str, list[Segment]] = {}
    for agent in recorded.agents:
        prompt = [one for one in map(segment, agent.blocks) if one.length]
        tokens = sum(one.length for one in prompt)
        if tokens == 0:
            raise WorkloadError(
                f"{recorded.source}: agent {agent.name!r}: expected at least one token, got none"
            )
        if max_tokens is not None and tokens > max_tokens:
            raise WorkloadError(
                f"{recorded.source}: agent {agent.name!r}: expected a prompt of at most "
                f"{max_tokens} tokens, got {tokens}"
            )
        prompts[agent.name] = prompt
    return prompts


@dataclass(slots=True)
class _Blocks:
    """What a session has defined so far."""

    texts: dict[str, str] = field(default_factory=dict)
    once_shared: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Object:
    """A JSON object of a file, with its place for messages."""

    fields: Mapping[str, Any]
    where: str

    def fail(self, name: str, wanted: str, found: object) -> WorkloadError:
        return WorkloadError(f"{self.where}: {name}: expected {wanted}, got {found!r}")

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise self.fail(name, "a string", value)
        if any("\ud800" <= character <= "\udfff" for character in value):
            # JSON has escapes for halves of a pair; no text holds one, and no tokenizer takes it.
            raise self.fail(name, "text without lone surrogates", ascii(value))
        return value

    def optional_text(self, name: str) -> str | None:
        return None if self.fields.get(name) is None else self.text(name)

    def integer(self, name: str) -> int:
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(name, "an integer", value)
        return value

    def objects(self, name: str) -> Iterator[_Object]:
        value = self.fields.get(name)
        if not isinstance(value, list):
            raise self.fail(name, "a list of objects", value)
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                raise self.fail(f"{name}[{index}]", "an object", item)
            yield _Object(item, f"{self.where}: {name}[{index}]")


def _lines(path: Path) -> Iterator[_Object]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                value = json.loads(line)
            except ValueError as error:  # of JSON or of UTF-8
                raise WorkloadError(f"{where}: expected a line of JSON, got {error}") from error
            if not isinstance(value, dict):
                raise WorkloadError(f"{where}: expected a JSON object, got {value!r:.60}")
            yield _Object(value, where)


def _read_agents(
    line: _Object, blocks: _Blocks, max_private: int | None, chat: bool
) -> tuple[RecordedAgent, ...]:
    for name in ("defs", "shared"):
        for block in line.objects(name):
            block_id, text = block.text("id"), block.text("text")
            if blocks.texts.setdefault(block_id, text) != text:
                raise block.fail("id", "an id that has no other text yet", block_id)
            if name == "shared":
                blocks.once_shared.add(block_id)
    agents: dict[str, RecordedAgent] = {}
    for agent in line.objects("agents"):
        name = agent.text("id")
        if name in agents:
            raise agent.fail("id", "a name that no other agent of the round has", name)
        parts = [
            part
            for segment in agent.objects("segments")
            for part in _read_segment(segment, blocks, max_private)
        ]
        prompt = _with_chat_markers(parts) if chat else (block for _, block in parts)
        agents[name] = RecordedAgent(name, tuple(prompt), agent.optional_text("out"))
    if not agents:
        raise line.fail("agents", "at least one agent", [])
    return tuple(agents.values())


def _read_segment(
    segment: _Object, blocks: _Blocks, max_private: int | None
) -> Iterator[tuple[str, RecordedBlock]]:
    """The blocks of one segment, each with its role."""
    kind = segment.text("kind")
    if kind not in KINDS:
        raise segment.fail("kind", f"one of {', '.join(KINDS)}", kind)
    role = segment.optional_text("role") or "user"
    if ("text" in segment.fields) == ("ref" in segment.fields):
        raise segment.fail("segment", "either text or ref", sorted(segment.fields))
    if "text" in segment.fields:
        yield role, RecordedBlock(kind, segment.text("text"))
        return
    refs = segment.fields["ref"]
    if not isinstance(refs, list):
        refs = [refs]
    elif kind == "private" and max_private is not None:
        refs = refs[max(len(refs) - max_private, 0) :]
    for ref in refs:
        if not isinstance(ref, str) or ref not in blocks.texts:
            raise segment.fail("ref", "the id of a block that the session has defined", ref)
        was_shared = kind == "private" and ref in blocks.once_shared
        yield role, RecordedBlock("shared" if was_shared else kind, blocks.texts[ref], ref)


def _with_chat_markers(parts: Iterable[tuple[str, RecordedBlock]]) -> Iterator[RecordedBlock]:
    current: str | None = None
    for role, block in parts:
        if role != current:
            if current is not None:
                yield RecordedBlock("template", "<|im_end|>\n")
            yield RecordedBlock("template", f"<|im_start|>{role}\n")
            current = role
        yield block
    if current is not None:
        yield RecordedBlock("template", "<|im_end|>\n")
    yield RecordedBlock("template", "<|im_start|>assistant\n")
