"""Translates the names and forms of upstream's JSONL files into ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sensebatch.manifest.fields import FOREIGN_FIELDS, IMAGE_FIELDS, JobFields
from sensebatch.manifest.problems import RowErrors, found
from sensebatch.tasks import Task, implied_task

_TASKS = {str(task): task for task in Task}
_ASKING = frozenset({"human", "user"})


def named_task(value: object) -> Task | None:
    """Returns the task of this name; None if there is none."""
    return _TASKS.get(value) if isinstance(value, str) else None


def said_task(row: Mapping[str, Any], given: Task | None, default: object) -> Task | None:
    """Returns the task that a row is given; None if it follows from the row's images."""
    names = (row.get("task"), row.get("type"), default)
    return next((task for task in (given, *map(named_task, names)) if task is not None), None)


def choose_task(
    row: Mapping[str, Any], given: Task | None, default: object, matrix: Collection[str]
) -> Task:
    """Returns the task of a row: the one asked for, the row's, the default, or by its images.

    Args:
        row: A row as it was read, possibly wrong.
        given: The task that the caller asks for.
        default: The `task` of the manifest's defaults.
        matrix: Names that the row's matrix sets.
    """
    task = said_task(row, given, default)
    if task is not None:
        return task
    has_images = any(row.get(name) or name in matrix for name in IMAGE_FIELDS)
    has_question = row.get("question") is not None or "question" in matrix
    return implied_task(has_images=has_images, has_question=has_question)


def prompt_of(fields: JobFields, errors: RowErrors, *, task: Task) -> str:
    """Returns the prompt, which upstream files may hold as a turn of a conversation.

    A question is the last one of its conversation; see `history_of`.
    """
    asked = [turn.value for turn in fields.conversations or () if turn.speaker in _ASKING]
    if fields.prompt is not None:
        name, prompt = "prompt", fields.prompt
        if fields.question is not None:
            errors.add("question", "expected either prompt or question, found both")
    elif fields.question is not None:
        name, prompt = "question", fields.question
        if asked:
            # Upstream has prompts beside conversations, and no questions.
            errors.add("conversations", "expected either question or conversations, found both")
    elif fields.conversations is not None:
        name = "conversations"
        if not asked or (len(asked) > 1 and "history" in FOREIGN_FIELDS[task]):
            hint = f"; {Task.ASK} jobs alone take earlier turns" if asked else ""
            errors.add(name, f"expected one turn from 'human' or 'user', found {len(asked)}{hint}")
            return ""
        prompt = asked[-1]
    else:
        errors.add("prompt", "expected text, found nothing")
        return ""
    if not prompt or prompt.isspace():
        errors.add(name, f"expected text, found {found(prompt)}")
    return prompt


def history_of(fields: JobFields, errors: RowErrors, *, task: Task) -> tuple[tuple[str, str], ...]:
    """Returns the questions before a question with their answers.

    What a conversation has after its last question is an answer to it, which is not read.
    """
    given = tuple((turn.question, turn.answer) for turn in fields.history or ())
    said = fields.prompt is not None or fields.question is not None
    if fields.conversations is None or said or "history" in FOREIGN_FIELDS[task]:
        return given
    turns = [turn for turn in fields.conversations if turn.speaker != "system"]
    while turns and turns[-1].speaker not in _ASKING:
        turns.pop()
    asked, answered = turns[:-1:2], turns[1::2]
    is_in_turn = all(turn.speaker in _ASKING for turn in asked) and not any(
        turn.speaker in _ASKING for turn in answered
    )
    if not is_in_turn or len(asked) != len(answered):
        speakers = ", ".join(turn.speaker for turn in turns)
        message = f"expected one answer after each question but the last, found {speakers}"
        errors.add("conversations", message)
        return given
    pairs = zip(asked, answered, strict=True)
    before = tuple((question.value, answer.value) for question, answer in pairs)
    if before and given:
        errors.add("history", "expected either history or the turns of conversations, found both")
    return before or given


def system_prompt_of(fields: JobFields, errors: RowErrors) -> str | None:
    """Returns the job's own system prompt, from its field or a conversation's system turn."""
    if fields.system_prompt is not None or fields.conversations is None:
        return fields.system_prompt
    turns = [turn.value for turn in fields.conversations if turn.speaker == "system"]
    if len(turns) > 1:
        errors.add("conversations", f"expected at most one system turn, found {len(turns)}")
    return turns[0] if turns else None


def think_of(fields: JobFields, errors: RowErrors) -> bool | None:
    """Returns whether the job thinks, from either name of the field."""
    think: bool | None = fields.given("think")
    if think is None:
        return fields.think_mode
    if fields.think_mode is not None and fields.think_mode != think:
        errors.add("think_mode", "expected the same as think, found the opposite")
    return think


def metadata_of(fields: JobFields, errors: RowErrors) -> dict[str, Any]:
    """Returns what is passed through to the log, with tags and a `type` that is not a task."""
    metadata: dict[str, Any] = dict(fields.metadata or {})
    extras: dict[str, Any] = {"tags": fields.tags}
    if fields.type is not None and named_task(fields.type) is None:
        extras["type"] = fields.type
    for name, value in extras.items():
        if value is None:
            continue
        if name in metadata:
            errors.add(("metadata", name), f"expected {name} once, found it as a field as well")
        metadata[name] = value
    return metadata
