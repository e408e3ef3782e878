"""Asking judges: many questions at once, every answer kept, and who answered noted.

`extract.annotate.endpoints` asks, retries, caps and keeps. An answer that gives no number is a result;
a question without an answer is asked again by the next run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from pydantic import Field

from cache.schema import Model
from eval.judging.results import Unread
from extract.annotate.endpoints.answers import Answer, AnswerCache
from extract.annotate.endpoints.budget import Caps
from extract.annotate.endpoints.endpoint import EndpointClient, Failure
from extract.annotate.endpoints.questions import Question
from extract.annotate.endpoints.replies import Outcome
from extract.annotate.endpoints.transport import EndpointOptions

_SHOWN = 300
"""Characters of an answer that a result keeps where no number was read."""

OnAnswers = Callable[[int], None]


class JudgeOptions(Model):
    """Who judges, and how."""

    endpoint: EndpointOptions
    model: str = Field(min_length=1)
    """As the endpoint knows it; best with its version."""
    repeats: int = Field(default=1, ge=1, le=100)
    """How often each clip is judged: with other seeds, so that no answer stands for two."""
    temperature: float | None = Field(default=0.0, ge=0.0, le=2.0)
    """None leaves it to the server."""
    prompts: Path | None = None
    """Folder of own prompt files."""
    answers: Path
    """Folder where answers are kept; any number of judgings may share one."""
    retry: tuple[str, ...] = ()
    """Outcomes of earlier answers to ask again: refused, empty, truncated, or all."""


class Said(NamedTuple):
    """What came back for one question."""

    text: str | None
    """None: nothing that can be read."""
    reason: str
    """Why not; empty if there is a text."""
    raw: str
    """What was answered, whatever it is."""
    is_cut: bool = False
    """It ended at the token limit: good for a number that stands in it, not for a list."""

    def whole(self) -> Said:
        """Return it without a text if it was cut."""
        return self._replace(text=None, reason="truncated") if self.is_cut else self

    def unread(self, clip: str, repeat: int, role: str, reason: str = "") -> Unread:
        """Note that no number was read."""
        return Unread(
            id=clip,
            repeat=repeat,
            role=role,
            reason=reason or self.reason,
            answer=self.raw[:_SHOWN],
        )


class Panel:
    """Asks one endpoint, and notes which versions of its models answered.

    Args:
        endpoint: Where and how.
        answers: Where answers are kept.
        retry: Outcomes of earlier answers to ask again.
        on_answers: Called with the number of questions that were answered since.

    Raises:
        UnauthorisedError: The key's environment variable is not set.
    """

    def __init__(
        self,
        endpoint: EndpointOptions,
        answers: AnswerCache,
        retry: Iterable[str] = (),
        on_answers: OnAnswers | None = None,
    ) -> None:
        self._client = EndpointClient(endpoint, answers)
        self._retry = tuple(retry)
        self._on_answers = on_answers
        self._versions: dict[str, set[str]] = defaultdict(set)

    def __enter__(self) -> Panel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def ask(self, questions: Iterable[Question]) -> dict[Hashable, Said]:
        """Ask all questions and return what came back, by their tags.

        Raises:
            EndpointError: The endpoint is down, refuses the key, or does not know the model; what was
                answered is kept.
            BudgetError: The cap on requests or tokens is reached; likewise.
        """
        found: dict[Hashable, Said] = {}
        for question, answer in self._client.ask_all(questions, self._retry):
            found[question.tag] = _said(answer)
            if isinstance(answer, Answer) and answer.model:
                self._versions[question.model].add(answer.model)
            if self._on_answers is not None:
                self._on_answers(1)
        return found

    def versions(self, model: str) -> tuple[str, ...]:
        """Return how the server called the model in its answers, sorted."""
        return tuple(sorted(self._versions[model]))

    def left(self, caps: Caps) -> Caps:
        """Return what of caps this panel has not used up."""
        report = self._client.report()
        spent = report.tokens_in + report.tokens_out
        return Caps(
            requests=None if caps.requests is None else max(0, caps.requests - report.requests),
            tokens=None if caps.tokens is None else max(0, caps.tokens - spent),
        )


def _said(answer: Answer | Failure) -> Said:
    if isinstance(answer, Failure):
        return Said(None, f"no answer ({answer.kind})", answer.reason)
    if answer.ok:
        return Said(answer.text, "", answer.text)
    if answer.outcome is Outcome.TRUNCATED:
        # The number stands in front of the reason: a cut there takes nothing away.
        return Said(answer.text, "", answer.text, is_cut=True)
    return Said(None, answer.outcome.value, answer.text)
