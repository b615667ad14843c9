"""Rows of which only as many images are drawn as it takes until enough are accepted.

Such a row is one of as many jobs as it has tries, each with the next seed, and of a question about
each image for every check.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pydantic import ValidationError

from sensebatch.errors import ConfigError
from sensebatch.functions import AcceptFunction
from sensebatch.jobs import AttemptAt, Job, JudgedBy, VerdictOn
from sensebatch.manifest.expand import Expanded, as_text, check_template, filled, id_of
from sensebatch.manifest.fields import ACCEPT_FIELDS, Check, JobFields, listed
from sensebatch.manifest.problems import RowErrors
from sensebatch.tasks import Output, Task

_SEEDS = frozenset({"seeds", "n"})
_OR_FUNCTION = "or a function that the configuration file names (accept), found neither"
_TRIES_FOR_EACH = 3
"""Tries for each image that is wanted, if a row does not say how many."""
_SEED_MARK = "\0"
"""Stands for the seed in an id, which never has it."""
YES, NO = "yes", "no"
"""The choices of a function, whose score is the probability of the first."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a try, which becomes a job of its own."""

    expanded: Expanded
    verdict: VerdictOn
    judged_by: JudgedBy | None
    """The function that answers it; None for the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """What the images of a row must be like, and how many are wanted."""

    checks: tuple[Check, ...]
    functions: tuple[AcceptFunction, ...]
    keep: int
    tries: int
    first_seed: int
    id: str
    """The row's, with the names that stand for values."""

    def as_try(self, job: Job) -> Job:
        """Returns a job of the row as what it is a try at."""
        # All have the id without the seed, which alone tells them apart. No id has a star.
        series = re.sub(r"-seed=\*(?=-|$)", "", id_of(self.id, job.matrix, seed="*"))
        number = job.seed - self.first_seed
        checks = len(self.checks) + len(self.functions)
        attempt_at = AttemptAt(series=series, number=number, keep=self.keep, checks=checks)
        return replace(job, attempt_at=attempt_at)

    def as_fields(self, tries: Sequence[Job]) -> dict[str, Any]:
        """Returns the fields of a row of its own that makes the tries of a series again.

        Args:
            tries: All of them, in their order.

        Raises:
            ConfigError: They start from images that no one row can name.
        """
        first = tries[0]
        texts = {name: as_text(value) for name, value in first.matrix.items()}
        texts["prompt"] = first.prompt
        checks = [
            {
                "ask": _doubled(filled(check.ask, texts)),
                "choices": list(check.choices),
                "is": check.expected,
                "at_least": check.at_least,
            }
            for check in self.checks
        ]
        own_id = _doubled(id_of(self.id, first.matrix, seed=_SEED_MARK))
        own_id = own_id.replace(_SEED_MARK, "{seed}").removesuffix("-seed={seed}")
        fields = {"id": own_id, "seed": first.seed}
        fields |= {"accept": checks} if checks else {}
        if any(image.output for image in first.images):
            fields["images"] = self._images(tries)
        return {**fields, "keep": self.keep, "tries": self.tries}

    def _images(self, tries: Sequence[Job]) -> list[str | None]:
        """Returns the names of images of other jobs that tries start from; None for files."""
        names = []
        for own in zip(*(job.images for job in tries), strict=True):
            paths = [image.path if image.output else "" for image in own]
            name = _doubled(paths[0]) if len(set(paths)) == 1 else _template(paths, tries)
            if name is None:
                raise ConfigError(
                    f"expected tries that start from images of one name, found {paths[0]} and "
                    f"{paths[1]} (job {tries[0].id})"
                )
            names.append(name or None)
        return names

    def questions(self, job: Job) -> Iterator[Question]:
        """Yields the questions about the image of a job."""
        texts = {name: as_text(value) for name, value in job.matrix.items()}
        texts["prompt"] = job.prompt
        for number, check in enumerate(self.checks, start=1):
            # The first one's name does not depend on others, which may come later.
            suffix = f"-{number}" if number > 1 else ""
            fields: dict[str, Any] = {
                "id": f"{job.id}-check{suffix}",
                "prompt": filled(check.ask, texts),
                "image": f"@{job.id}",
                "choices": list(check.choices),
            }
            verdict = VerdictOn(job=job.id, answer=check.expected, at_least=check.at_least)
            yield Question(Expanded(fields=fields, own=frozenset(fields)), verdict, None)
        for one in self.functions:
            fields = {
                "id": f"{job.id}-{one.function.replace(':', '.')}",
                "prompt": one.function,
                "image": f"@{job.id}",
                "choices": [YES, NO],
                "think": False,
            }
            yield Question(
                Expanded(fields=fields, own=frozenset(fields)),
                VerdictOn(job=job.id, answer=YES, at_least=one.at_least),
                _judged_by(one),
            )


def _doubled(text: str) -> str:
    """Returns a text as a template of itself."""
    return re.sub(r"[{}]", r"\g<0>\g<0>", text)


def _template(texts: Sequence[str], tries: Sequence[Job]) -> str | None:
    """Returns a text that becomes each of some with the seed of its try; None if there is none."""
    first = texts[0]
    for place in re.finditer(str(tries[0].seed), first):
        begin, end = first[: place.start()], first[place.end() :]
        if all(f"{begin}{job.seed}{end}" == text for job, text in zip(tries, texts, strict=True)):
            return f"{_doubled(begin)}{{seed}}{_doubled(end)}"
    return None


@cache
def _judged_by(function: AcceptFunction) -> JudgedBy:
    """Returns the function as the questions of a process name it: as it was when first asked."""
    return JudgedBy(function=function.function, source_sha256=function.source_sha256)


def acceptance_of(
    fields: Mapping[str, Any],
    task: Task,
    default_seed: int,
    errors: RowErrors,
    *,
    own: frozenset[str],
    functions: tuple[AcceptFunction, ...],
) -> tuple[Mapping[str, Any], Acceptance | None]:
    """Returns the fields that make the tries of a row, and what they must be like.

    Args:
        fields: The row, merged with the defaults.
        task: Of the row.
        default_seed: The first seed if the row has none.
        errors: Receives what is wrong.
        own: The names in the row itself.
        functions: Those of the configuration, which judge images beside the row's questions.

    Returns:
        The fields as they are and None for a row that accepts whatever is drawn, or has mistakes.
    """
    if ACCEPT_FIELDS.isdisjoint(fields) or task.spec.output is not Output.IMAGE:
        return fields, None
    given = {name: fields[name] for name in ACCEPT_FIELDS if name in fields}
    others = {name: value for name, value in fields.items() if name not in ACCEPT_FIELDS}
    if "accept" not in given and not functions:
        # In the defaults they may be meant for other jobs.
        for name in sorted(ACCEPT_FIELDS & own):
            errors.add(name, f"expected accept beside it, which says what is kept, {_OR_FUNCTION}")
        return others, None
    try:
        checked = JobFields.model_validate(given)
    except ValidationError as error:
        errors.add_validation(error, ())
        return others, None
    keep, seed = checked.keep or 1, fields.get("seed")
    accept = Acceptance(
        checks=listed(checked.accept),
        functions=functions,
        keep=keep,
        tries=checked.tries or _TRIES_FOR_EACH * keep,
        first_seed=seed if isinstance(seed, int) else default_seed,
        id=str(fields.get("id")),
    )
    num_errors = len(errors)
    _check(accept, fields, errors, own)
    if len(errors) > num_errors:
        return {name: value for name, value in others.items() if name not in _SEEDS}, None
    return {**others, "n": accept.tries}, accept


def _check(
    accept: Acceptance, fields: Mapping[str, Any], errors: RowErrors, own: frozenset[str]
) -> None:
    matrix = fields.get("matrix")
    names = {"prompt", *(matrix if isinstance(matrix, dict) else ())}
    for check in accept.checks:
        check_template("accept", check.ask, names, errors)
        # Those in the defaults are reported there.
        if "accept" in own and check.mistake is not None:
            errors.add("accept", check.mistake)
    if accept.keep > accept.tries:
        message = f"expected at most as many as tries, {accept.tries}, found {accept.keep}"
        errors.add("keep", message)
    for name in sorted(_SEEDS & fields.keys()):
        errors.add(name, "expected none beside accept; tries says how many seeds there are")
    if "id" not in fields:
        errors.add("id", "expected an id for a job with accept, found none")
