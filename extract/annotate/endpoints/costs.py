"""What an annotation will cost, and what it did cost: requests, tokens, hours and money.

Pure functions of counts and assumptions. Every assumption is a field with its default stated, so that
an estimate can be made again with better ones once a hundred clips are done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic import Field

from cache.schema import Model
from extract.annotate.endpoints.budget import BYTES_PER_TOKEN

_MILLION = 1_000_000


class Price(Model):
    """Money per million tokens, in whatever currency the user thinks in."""

    tokens_in: float = Field(ge=0)
    tokens_out: float = Field(ge=0)

    def of(self, tokens_in: float, tokens_out: float) -> float:
        """Return the price of tokens."""
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / _MILLION


class Assumptions(Model):
    """What cannot be known before the first request."""

    bytes_per_token: float = Field(default=BYTES_PER_TOKEN, gt=0)
    """Of text in UTF-8: about 4 in English, 2 to 3 in Chinese."""

    image_tokens: float = Field(default=1000.0, ge=0)
    """Per picture; a Qwen2.5-VL takes one token per 28 x 28 pixels."""

    audio_tokens_per_s: float = Field(default=25.0, ge=0)
    """Per second of sound; the encoders of Qwen2-Audio give 25."""

    template_tokens: float = Field(default=20.0, ge=0)
    """What a chat template adds to a request."""

    request_s: float = Field(default=3.0, gt=0)
    """From a request to its answer, with as many in flight as will be."""

    in_flight: int = Field(default=8, ge=1)

    retried_share: float = Field(default=0.02, ge=0)
    """Requests that have to be sent again, as a share of all."""


class RoleWork(Model):
    """What one role has to do."""

    role: str
    n_clips: int = Field(ge=0)
    """Clips that need an answer of this role."""

    n_cached: int = Field(default=0, ge=0)
    """Of them, those whose answer is there already."""

    prompt_bytes: float = Field(ge=0)
    """Mean length of the rendered prompt, clues and schema included."""

    images: float = Field(default=0.0, ge=0)
    """Pictures per request."""

    audio_s: float = Field(default=0.0, ge=0)
    """Mean seconds of sound per request."""

    answer_tokens: float = Field(default=120.0, ge=0)
    """Mean length of an answer."""

    price: Price | None = None
    """Of the role's model."""


class RoleEstimate(Model):
    """What one role will cost."""

    role: str
    requests: int
    tokens_in: int
    tokens_out: int
    hours: float
    cost: float | None
    """None without a price."""


class Estimate(Model):
    """What an annotation will cost."""

    roles: tuple[RoleEstimate, ...]
    requests: int
    tokens_in: int
    tokens_out: int
    hours: float
    """All roles one after another, at the stated number in flight and the stated rate limits."""

    cost: float | None
    """None unless every role with requests has a price."""

    assumptions: Assumptions
    bound_by: str
    """What sets the time: "in flight", "requests per minute" or "tokens per minute"."""


def estimate(
    work: Sequence[RoleWork],
    assumptions: Assumptions | None = None,
    *,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
) -> Estimate:
    """Return what work will cost.

    Args:
        work: The roles.
        assumptions: Defaults if None.
        requests_per_minute: Rate limit that will be kept.
        tokens_per_minute: Likewise, tokens in and out.
    """
    assumed = assumptions or Assumptions()
    roles, bounds = [], Counter[str]()
    for each in work:
        requests = round(max(each.n_clips - each.n_cached, 0) * (1 + assumed.retried_share))
        per_request = (
            each.prompt_bytes / assumed.bytes_per_token
            + each.images * assumed.image_tokens
            + each.audio_s * assumed.audio_tokens_per_s
            + assumed.template_tokens
        )
        tokens_in, tokens_out = requests * per_request, requests * each.answer_tokens
        seconds = {"in flight": requests * assumed.request_s / assumed.in_flight}
        if requests_per_minute:
            seconds["requests per minute"] = requests / requests_per_minute * 60
        if tokens_per_minute:
            seconds["tokens per minute"] = (tokens_in + tokens_out) / tokens_per_minute * 60
        slowest = max(seconds, key=seconds.__getitem__)
        bounds[slowest] += round(seconds[slowest] * 1000)
        roles.append(
            RoleEstimate(
                role=each.role,
                requests=requests,
                tokens_in=round(tokens_in),
                tokens_out=round(tokens_out),
                hours=seconds[slowest] / 3600,
                cost=each.price.of(tokens_in, tokens_out) if each.price else None,
            )
        )
    costs = [role.cost for role in roles if role.requests]
    return Estimate(
        roles=tuple(roles),
        requests=sum(r.requests for r in roles),
        tokens_in=sum(r.tokens_in for r in roles),
        tokens_out=sum(r.tokens_out for r in roles),
        hours=sum(r.hours for r in roles),
        cost=None if None in costs else sum(c for c in costs if c is not None),
        assumptions=assumed,
        bound_by=bounds.most_common(1)[0][0] if bounds else "in flight",
    )


class RoleReport(Model):
    """What became of the questions of one role."""

    role: str
    questions: int = 0
    """Taken from the asker."""

    cached: int = 0
    """Answered without a request."""

    shared: int = 0
    """Equal to a question in flight, and answered along with it."""

    requests: int = 0
    """Sent, retries and repairs included."""

    tokens_in: int = 0
    tokens_out: int = 0
    """As counted by the server, failed and repaired requests included."""

    outcomes: dict[str, int] = Field(default_factory=dict)
    """Answers by outcome, cached ones included."""

    failed: int = 0
    """Questions without an answer that will be asked again by the next run."""

    cost: float | None = None


class RunReport(Model):
    """What a run did."""

    roles: tuple[RoleReport, ...]
    questions: int
    cached: int
    shared: int
    requests: int
    retried: dict[str, int]
    """Requests sent again, by reason: "429", "500", "timeout", "connection", "broken reply", …"""

    repairs: int
    """Requests that asked a model to correct an answer that did not fit its schema."""

    failures: dict[str, int]
    """Questions that failed, by reason."""

    outcomes: dict[str, int]
    tokens_in: int
    tokens_out: int
    uncounted: int
    """Requests whose tokens nobody knows, for example because the connection was cut."""

    overrun_tokens: int
    """Tokens that the server counted beyond the stated worst case of a request."""

    wall_s: float
    peak_in_flight: int
    cost: float | None
    """None unless every role that has sent something has a price."""

    notes: tuple[str, ...]
    """What the endpoint does not take, told once."""


class Tally:
    """Counts what a run does, for `RunReport`."""

    def __init__(self) -> None:
        self.roles: dict[str, RoleTally] = {}
        self.retried: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.notes: list[str] = []
        self.repairs = 0
        self.in_flight = 0
        self.peak_in_flight = 0
        self.wall_s = 0.0

    def of(self, role: str) -> RoleTally:
        """Return the counts of a role."""
        return self.roles.setdefault(role, RoleTally())

    def report(
        self, prices: Mapping[str, Price] | None = None, *, uncounted: int = 0, overrun: int = 0
    ) -> RunReport:
        """Return the counts so far, with the cost where prices by role are given."""
        roles = []
        for name, tally in sorted(self.roles.items()):
            price = (prices or {}).get(name)
            cost = price.of(tally.tokens_in, tally.tokens_out) if price else None
            roles.append(
                RoleReport(
                    role=name,
                    questions=tally.questions,
                    cached=tally.cached,
                    shared=tally.shared,
                    requests=tally.requests,
                    tokens_in=tally.tokens_in,
                    tokens_out=tally.tokens_out,
                    outcomes=dict(sorted(tally.outcomes.items())),
                    failed=tally.failed,
                    cost=cost,
                )
            )
        costs = [role.cost for role in roles if role.requests]
        outcomes: Counter[str] = Counter()
        for role in roles:
            outcomes.update(role.outcomes)
        return RunReport(
            roles=tuple(roles),
            questions=sum(r.questions for r in roles),
            cached=sum(r.cached for r in roles),
            shared=sum(r.shared for r in roles),
            requests=sum(r.requests for r in roles),
            retried=dict(sorted(self.retried.items())),
            repairs=self.repairs,
            failures=dict(sorted(self.failures.items())),
            outcomes=dict(sorted(outcomes.items())),
            tokens_in=sum(r.tokens_in for r in roles),
            tokens_out=sum(r.tokens_out for r in roles),
            uncounted=uncounted,
            overrun_tokens=overrun,
            wall_s=self.wall_s,
            peak_in_flight=self.peak_in_flight,
            cost=None if None in costs else sum(c for c in costs if c is not None),
            notes=tuple(self.notes),
        )


class RoleTally:
    """The counts of one role."""

    def __init__(self) -> None:
        self.questions = self.cached = self.shared = self.requests = self.failed = 0
        self.tokens_in = self.tokens_out = 0
        self.outcomes: Counter[str] = Counter()
