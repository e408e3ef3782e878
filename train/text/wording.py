"""From a record to the text of a sample: which template, options, subtitle, labels and description.

Every choice is a hash of seed, uid and pass (`train.text.instructions`); the label space is the one of the
record's corpus. Training, evaluation, export and previews all get their text here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cache.clip import Record
from cache.errors import ManifestError, SchemaError
from cache.labels import LabelField, LabelSpace
from cache.manifest import Header
from train.config import Preset
from train.mixture import Ask
from train.prompt import FINE, SEPARATOR, RenderedPrompt, neutralise, render
from train.text.instructions import (
    MAX_EXAMPLES,
    NEUTRAL,
    InstructionPools,
    choose_instruction,
    choose_text,
    load_instructions,
    option_list,
    option_order,
)
from train.text.tasks import SEVERAL_LABELS, TASK_TABLE, Task, TaskRow
from train.text.turns import Turns


class Wording:
    """Renders records to text by one preset and the label spaces of a manifest."""

    def __init__(self, preset: Preset, header: Header) -> None:
        """Read the instruction pools.

        Args:
            preset: Prompt settings and seed.
            header: Holds the label spaces.

        Raises:
            SchemaError: Damaged pools.
        """
        self._config, self._seed = preset.prompt, preset.seed
        self._header = header
        self.pools: InstructionPools = load_instructions(preset.prompt.instructions)

    def space(self, record: Record, field: LabelField) -> LabelSpace:
        """Return the label space of a field of a record.

        Raises:
            ManifestError: There is none.
        """
        found = self.known_space(record, field)
        if found is None:
            known = ", ".join(sorted(self._header.label_spaces)) or "none"
            raise ManifestError(
                f"{record.uid}: there is no label space for '{field}' of corpus '{record.corpus}', so a "
                f"prompt has no options to list. Known: {known}. Index the corpus again with its labels."
            )
        return found

    def known_space(self, record: Record, field: LabelField) -> LabelSpace | None:
        """Return the label space of a field of a record; None: there is none."""
        return self._header.space(record.corpus, field)

    def render(
        self,
        record: Record,
        ask: Ask,
        *,
        with_answer: bool,
        vary: bool = True,
        asking: bool = False,
        turns: Turns | None = None,
    ) -> RenderedPrompt:
        """Render one question about a record.

        Args:
            record: About whom.
            ask: Task and pass, and the options where they are not those of the record's label space.
            with_answer: True in training and validation.
            vary: Options in another order each pass, and perhaps not all, see `PromptConfig`. False, for
                validation and evaluation, and the style `v1` always, lists all in native order.
            asking: A trained model is asked, so that the settings for that count
                (`prompt.eval_subtitle_language`).
            turns: Of the language model; None means LLaMA-2's.

        Raises:
            ManifestError: The record's corpus has no label space for the task.
            SchemaError: The record lacks what the task needs, or its label is not an option.
        """
        config, row = self._config, TASK_TABLE[ask.task]
        place = self._seed, record.uid, ask.epoch
        template, options = self.instruction(record, ask, vary=vary)
        chosen = row.texts(record, config.description_version)
        texts = chosen or row.texts(record)
        fine = config.description_version == FINE and (bool(chosen) or asking)
        return render(
            ask.task,
            template,
            options,
            subtitle=self.quoted(record, asking=asking),
            person=record.person,
            label=self._labels(record, row, ask.options),
            description=choose_text(texts, *place),
            with_answer=with_answer,
            prompt_style=config.style,
            answer_norm=config.answer_norm,
            fine=fine,
            turns=turns,
        )

    def quoted(self, record: Record, *, asking: bool = False) -> str | None:
        """Return the subtitle that a prompt about a record quotes, as the record has it; None: none.

        Args:
            record: About whom.
            asking: See `render`.
        """
        config = self._config
        language = config.language(record.corpus, asking=asking)
        return record.subtitle(language) if config.use_subtitle else None

    def instruction(
        self, record: Record, ask: Ask, *, vary: bool = True
    ) -> tuple[str, tuple[str, ...]]:
        """Return the template of a question, and the options in the order in which it lists them.

        Raises:
            ManifestError: The record's corpus has no label space for the task.
            SchemaError: The pools have no templates for the task.
        """
        place = self._seed, record.uid, ask.epoch
        vary = vary and self._config.style != "v1"  # its instruction has one list of labels
        options, examples = self._options(record, TASK_TABLE[ask.task], ask, vary=vary)
        return choose_instruction(ask.task, *place, self.pools, examples=examples), options

    def check(self, records: Iterable[Record], tasks: Sequence[Task]) -> None:
        """Refuse what could not be rendered, before anything is trained.

        Args:
            records: That may be drawn.
            tasks: That may be asked.

        Raises:
            ManifestError: A corpus has no label space for a task that its records can answer.
            SchemaError: No templates for such a task, or labels that cannot stand in an answer.
        """
        known: set[tuple[Task, str]] = set()
        for record in records:
            for task in tasks:
                row = TASK_TABLE[task]
                if not row.answerable(record):
                    continue
                if task == "open-vocabulary":
                    _check_words(record)
                if (task, record.corpus) not in known:
                    self.render(record, Ask(task, 0), with_answer=False)
                    known.add((task, record.corpus))

    def _options(
        self, record: Record, row: TaskRow, ask: Ask, *, vary: bool
    ) -> tuple[tuple[str, ...], bool]:
        """Return the options in the order to list them, and whether there are example words."""
        if row.label is None:
            return (), False
        if ask.options is not None:
            return ask.options, row.label == "emotion_ov"
        space, place = self.space(record, row.label), (self._seed, record.uid, ask.epoch)
        if ask.task == "open-vocabulary":
            words = option_order(space.labels, *place, shuffle=vary)[:MAX_EXAMPLES]
            return (words, True) if space.open else ((), False)
        labels = space.labels
        if self._config.option_list == "label_conditional" and vary:
            given = record.labels_of(row.label)
            true = NEUTRAL if NEUTRAL in given else next(iter(given), None)
            share = self._config.neutral_free_share
            labels = option_list(labels, true, *place, neutral_free_share=share)
        return option_order(labels, *place, shuffle=vary), False

    def _labels(
        self, record: Record, row: TaskRow, offered: tuple[str, ...] | None
    ) -> tuple[str, ...]:
        """Return the labels to name: several in the order of all, open ones in the record's."""
        if row.label is None:
            return ()
        given = record.labels_of(row.label)
        if row.label not in SEVERAL_LABELS or row.label == "emotion_ov":
            return tuple(dict.fromkeys(given))
        if offered is not None:
            # What was not offered stands at the end, where `render` refuses it in an answer.
            others = (label for label in given if label not in offered)
            return (*(label for label in offered if label in given), *others)
        return tuple(label for label in self.space(record, row.label).labels if label in given)


def _check_words(record: Record) -> None:
    """Refuse words of an open vocabulary that cannot stand in a list with commas."""
    for word in record.emotion_ov:
        if SEPARATOR.strip() in word or not neutralise(word):
            raise SchemaError(
                f"{record.uid}: {word!r} in 'emotion_ov' cannot be named in an answer, whose words are "
                "separated by commas. Index the corpus again with such entries taken apart."
            )
