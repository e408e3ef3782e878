"""Examples that a report shows: a few clips with truth, replies, reasoning, likelihoods and pictures.

    chosen = choose_examples(predictions, 24, choice_of)
    browser = make_browser([card_of(p) for p in chosen], outcomes, files={uid: ClipFile(...)})

`templates/_examples.html.j2` lays an `ExampleBrowser` out. It needs no script: its filters are CSS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from itertools import cycle
from typing import Final, Literal, NamedTuple, TypeVar, get_args

from pydantic import Field

from cache.schema import Model
from eval.parse import ParseHow
from eval.predictions import ClipFacts, Prediction
from eval.results.pictures import ClipFile, ClipPictures, read_pictures
from eval.scoring.result import Item

Outcome = Literal["right", "partly right", "wrong", "off list", "empty"]
"""`right`: the true labels, all of them and nothing else; `partly right`: some of them, or others
besides; `off list`: words, but no label; `empty`: no words."""
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

MEDIA_BUDGET_BYTES: Final = 6_000_000
"""Most that pictures, waveforms and clips take in one page."""
_TAG: Final = re.compile(r"<(/?)answer>", re.IGNORECASE | re.ASCII)
_THINK: Final = re.compile(r"</?think>", re.IGNORECASE | re.ASCII)
_LANGUAGES: Final = {"en": "English", "zh": "Chinese", "de": "German"}

T = TypeVar("T")


class Bar(Model):
    """The likelihood of one offered label."""

    label: str
    share: float
    """0 to 1."""
    is_true: bool = False


class ShownReply(Model):
    """One reply about a clip."""

    asked: str
    """The task and what was masked, in words."""
    outcome: Outcome
    predicted: tuple[str, ...]
    """Labels that were read; empty if there are none."""
    reasoning: str | None = None
    """What stands outside the answer tag; None if nothing does."""
    answer: str
    """The rest: content of the answer tag, or the whole reply."""
    bars: tuple[Bar, ...] = ()
    """In the order in which labels were offered; empty if no likelihoods were computed."""


class ExampleCard(Model):
    """One clip and what was said about it."""

    id: str
    group: str
    """Corpus, or benchmark."""
    truths: tuple[str, ...]
    reply: ShownReply
    """The one that the card is filed under."""
    others: tuple[ShownReply, ...] = ()
    """Further replies about the same clip: of other tasks, or with streams masked."""
    subtitle: str | None = None
    facts: tuple[str, ...] = ()
    """Language, length, what the clip lacks: in words."""
    pictures: ClipPictures | None = None

    @property
    def label(self) -> str:
        """What the card is filed under among the true labels."""
        return ", ".join(self.truths) or "unknown"

    @property
    def replies(self) -> tuple[ShownReply, ...]:
        """All replies, the card's own first."""
        return (self.reply, *self.others)

    @property
    def bar_rows(self) -> tuple[tuple[str, bool, tuple[float | None, ...]], ...]:
        """Likelihoods as a table: label, whether it is true, a share per reply that has any."""
        columns = [{bar.label: bar for bar in r.bars} for r in self.replies if r.bars]
        labels = dict.fromkeys(label for column in columns for label in column)
        return tuple(
            (
                label,
                any(column[label].is_true for column in columns if label in column),
                tuple(column[label].share if label in column else None for column in columns),
            )
            for label in labels
        )


class ExampleBrowser(Model):
    """The examples of a page."""

    cards: tuple[ExampleCard, ...]
    outcomes: dict[Outcome, int] = Field(default_factory=dict)
    """How often each outcome occurs among all clips that the cards were chosen from."""
    notes: tuple[str, ...] = ()
    """How they were chosen, and what is left out."""

    @property
    def shown_outcomes(self) -> tuple[Outcome, ...]:
        """Outcomes among the cards, best first."""
        found = {card.reply.outcome for card in self.cards}
        return tuple(outcome for outcome in OUTCOMES if outcome in found)

    @property
    def labels(self) -> tuple[str, ...]:
        """True labels among the cards, sorted."""
        return tuple(sorted({card.label for card in self.cards}))

    @property
    def groups(self) -> tuple[str, ...]:
        """Corpora or benchmarks among the cards, in the order in which they occur."""
        return tuple(dict.fromkeys(card.group for card in self.cards))

    @property
    def media_bytes(self) -> int:
        """What pictures, waveforms and clips take in a page."""
        return sum(card.pictures.n_bytes for card in self.cards if card.pictures is not None)


class Choice(NamedTuple):
    """By what an example is chosen."""

    id: str
    label: str
    """Its class."""
    outcome: Outcome


def outcome_of(truths: Sequence[str], predicted: Sequence[str], how: ParseHow | str) -> Outcome:
    """Return how a reply compares with the truth.

    Args:
        truths: True labels.
        predicted: Labels that were read in the reply.
        how: How it was read; see `eval.parse`.
    """
    if how == "empty":
        return "empty"
    if not predicted:
        return "off list"
    if set(truths) == set(predicted):
        return "right"
    return "partly right" if set(truths) & set(predicted) else "wrong"


def outcome_of_prediction(prediction: Prediction) -> Outcome:
    """Return how a prediction compares with its truth; unread words make it partly right at best."""
    truths, predicted = truths_of(prediction), labels_of(prediction)
    found = outcome_of(truths, predicted, prediction.parse)
    return "partly right" if found == "right" and prediction.unread else found


def truths_of(prediction: Prediction) -> tuple[str, ...]:
    """Return the true labels, whether the task asks for one or for several."""
    return prediction.truths or ((prediction.truth,) if prediction.truth is not None else ())


def labels_of(prediction: Prediction) -> tuple[str, ...]:
    """Return the labels that were read, whether the task asks for one or for several."""
    return prediction.labels or ((prediction.label,) if prediction.label is not None else ())


def choice_of(prediction: Prediction) -> Choice:
    """Return by what a prediction is chosen as an example."""
    label = ", ".join(truths_of(prediction))
    return Choice(prediction.uid, label, outcome_of_prediction(prediction))


def choose_examples(
    items: Sequence[T], n: int, describe: Callable[[T], Choice], *, seed: int = 0
) -> list[T]:
    """Choose examples for variety: each outcome in turn, and of each outcome every class in turn.

    Equal items, n and seed give equal examples, in whatever order the items come.

    Args:
        items: What to choose from.
        n: How many at most.
        describe: By what an item is chosen.
        seed: Gives other examples.
    """
    classes: dict[Outcome, dict[str, list[tuple[str, int]]]] = {}
    for number, item in enumerate(items):
        choice = describe(item)
        of_outcome = classes.setdefault(choice.outcome, {})
        of_outcome.setdefault(choice.label, []).append((_draw(seed, choice.id), number))
    queues = []
    for outcome in OUTCOMES:
        of_outcome = classes.get(outcome, {})
        lists = [sorted(of_outcome[label]) for label in sorted(of_outcome, key=_drawer(seed))]
        queues.append(_in_turn(lists, n))
    return [items[number] for _, number in _in_turn(queues, n)]


def _drawer(seed: int) -> Callable[[str], str]:
    return lambda text: _draw(seed, text)


def _draw(seed: int, text: str) -> str:
    """Return a random number for a text, the same on every machine."""
    return sha256(f"{seed}:{text}".encode()).hexdigest()


def _in_turn(lists: Sequence[Sequence[T]], n: int) -> list[T]:
    """Take one of each list in turn until there are n or nothing is left."""
    waiting = [iter(entries) for entries in lists]
    found: list[T] = []
    done: set[int] = set()
    for number in cycle(range(len(waiting))) if waiting else ():
        if len(found) == n or len(done) == len(waiting):
            break
        if number not in done:
            try:
                found.append(next(waiting[number]))
            except StopIteration:
                done.add(number)
    return found


def split_reply(reply: str) -> tuple[str | None, str]:
    """Return the reasoning of a reply, None without, and its answer.

    The answer is what `eval.parse` compares: the content of the last complete answer tag, all behind
    an unclosed one, else what follows `</think>`, else the whole reply.
    """
    opened: re.Match[str] | None = None
    outer: tuple[int, int, int, int] | None = None
    for tag in _TAG.finditer(reply):
        if not tag[1]:
            opened = tag
        elif opened is not None:
            outer = opened.start(), opened.end(), tag.start(), tag.end()
            opened = None
    if outer is None and opened is not None:
        outer = opened.start(), opened.end(), len(reply), len(reply)
    if outer is None:
        *_, end = (0, *(tag.end() for tag in _THINK.finditer(reply) if tag[0][1] == "/"))
        outer = end, end, len(reply), len(reply)
    rest = _THINK.sub(" ", f"{reply[: outer[0]]} {reply[outer[3] :]}").strip()
    return rest or None, reply[outer[1] : outer[2]].strip()


def asked_of(prediction: Prediction) -> str:
    """Say what was asked: the task, and what was masked."""
    hidden = set(prediction.masked)
    words = ["picture"] if {"image", "video"} <= hidden else []
    words += sorted(hidden - {"image", "video"} if words else hidden)
    return f"{prediction.task}, {' and '.join(words)} masked" if words else prediction.task


def shown_reply(prediction: Prediction, asked: str | None = None) -> ShownReply:
    """Return a prediction as it is shown.

    Args:
        prediction: The reply.
        asked: What was asked, in words; None: task and masked streams.
    """
    reasoning, answer = split_reply(prediction.reply)
    truths = truths_of(prediction)
    return ShownReply(
        asked=asked or asked_of(prediction),
        outcome=outcome_of_prediction(prediction),
        predicted=labels_of(prediction),
        reasoning=reasoning,
        answer=answer,
        bars=tuple(
            Bar(label=label, share=share, is_true=label in truths)
            for label, share in (prediction.likelihoods or {}).items()
        ),
    )


def card_of(
    prediction: Prediction, others: Sequence[Prediction] = (), *, group: str | None = None
) -> ExampleCard:
    """Return a card without pictures.

    Args:
        prediction: What the card is filed under.
        others: Further replies about the same clip.
        group: None: the corpus.
    """
    about = prediction.about or ClipFacts()
    return ExampleCard(
        id=prediction.uid,
        group=group or prediction.uid.partition("/")[0],
        truths=truths_of(prediction),
        reply=shown_reply(prediction),
        others=tuple(shown_reply(other) for other in others),
        subtitle=about.subtitle,
        facts=_facts(about),
    )


def card_of_item(item: Item, group: str, outcome: Outcome | None = None) -> ExampleCard:
    """Return a card of a scored item, without pictures.

    Args:
        item: In any format of predictions.
        group: Title of the benchmark.
        outcome: What the metric says of the item; None: as the labels compare.
    """
    reasoning, answer = split_reply(item.reply)
    about = (item.prediction.about if item.prediction else None) or ClipFacts()
    likelihoods = (item.prediction.likelihoods if item.prediction else None) or {}
    return ExampleCard(
        id=item.id,
        group=group,
        truths=item.truth,
        reply=ShownReply(
            asked=asked_of(item.prediction) if item.prediction else item.mode or group,
            outcome=outcome or outcome_of(item.truth, item.predicted, item.how),
            predicted=item.predicted,
            reasoning=reasoning,
            answer=answer,
            bars=tuple(
                Bar(label=label, share=share, is_true=label in item.truth)
                for label, share in likelihoods.items()
            ),
        ),
        subtitle=about.subtitle,
        facts=_facts(about),
    )


def _facts(about: ClipFacts) -> tuple[str, ...]:
    absent = {"audio": "no sound", "video": "no video", "image": "no picture"}
    facts = [] if about.duration_s is None else [f"{about.duration_s:.1f} s"]
    if about.language:
        facts.append(_LANGUAGES.get(about.language, about.language))
    return (*facts, *(absent.get(stream, f"no {stream}") for stream in about.absent))


def make_browser(
    cards: Sequence[ExampleCard],
    outcomes: Mapping[Outcome, int],
    *,
    files: Mapping[str, ClipFile] | None = None,
    budget_bytes: int = MEDIA_BUDGET_BYTES,
    notes: Sequence[str] = (),
    on_clip: Callable[[int], None] | None = None,
) -> ExampleBrowser:
    """Give cards their pictures, within a budget, and say how they were chosen.

    Frames and waveforms come first, in the order of the cards; what is left of the budget goes to the
    clips themselves.

    Args:
        cards: As `choose_examples` chose them.
        outcomes: Of all clips that they were chosen from.
        files: Id of a card -> its file; cards without one have no pictures.
        budget_bytes: Most that pictures, waveforms and clips take in the page.
        notes: What else a reader must know.
        on_clip: Called with 1 behind each clip that was decoded.
    """
    files = files or {}
    wanted = {card.id: files[card.id] for card in cards if card.id in files}
    found = read_pictures(wanted, on_clip=on_clip) if wanted else {}
    left = budget_bytes
    shown: dict[str, ClipPictures] = {}
    for name, pictures in found.items():
        still = pictures.model_copy(update={"clip": None, "kind": None})
        if still.n_bytes > left:
            said = (*pictures.problems, "left out: the page's limit for media is reached")
            still = ClipPictures(duration_s=pictures.duration_s, problems=said)
        left -= still.n_bytes
        shown[name] = still
    n_clips = n_unfit = 0
    for name, pictures in found.items():
        size = len(pictures.clip or "")
        n_unfit += pictures.clip is not None and size > left
        if pictures.clip is not None and size <= left:
            left -= size
            n_clips += 1
            shown[name] = shown[name].model_copy(
                update={"clip": pictures.clip, "kind": pictures.kind}
            )
    about = [_about_choice(len(cards), outcomes), *notes]
    if n_unfit:
        about.append(
            f"{n_unfit} of {n_unfit + n_clips} small clips cannot be played here: a page holds at most "
            f"{budget_bytes / 1e6:.1f} MB of media."
        )
    return ExampleBrowser(
        cards=tuple(card.model_copy(update={"pictures": shown.get(card.id)}) for card in cards),
        outcomes=dict(outcomes),
        notes=tuple(about),
    )


def _about_choice(n: int, outcomes: Mapping[Outcome, int]) -> str:
    total = sum(outcomes.values())
    if n >= total:
        return f"All {total:,} clips."
    parts = [f"{outcomes[o]:,} {o}" for o in OUTCOMES if outcomes.get(o)]
    return (
        f"{n:,} of {total:,} clips, drawn for variety over outcomes and classes, so not in the "
        f"proportions of the whole: {', '.join(parts)}."
    )
