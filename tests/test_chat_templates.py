"""Turns from chat templates: small tokenizers with the templates of well-known chat models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("transformers")

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from cache.errors import SchemaError
from train.prompt import HEAD, PromptTokens, RenderedPrompt, render, tokenize
from train.text.instructions import load_instructions
from train.text.turns import Turns, turns_of

LABELS = ("happy", "sad")
SUBTITLE = "I said no, twice."

LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A chat model's tokenizer, reduced to what matters for turns."""

    template: str | None
    before: str
    after: str
    end: str
    eos: str
    bos: str | None = None
    special: tuple[str, ...] = ()
    prepends_bos: bool = False
    writes_bos: bool = True


FAMILIES = {
    "llama-2": Family(
        LLAMA_2, "[INST] ", " [/INST]", end="</s>", eos="</s>", bos="<s>", prepends_bos=True
    ),
    "qwen2": Family(
        CHATML,
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        eos="<|endoftext|>",
        special=("<|im_start|>", "<|im_end|>"),
        writes_bos=False,
    ),
    "mistral": Family(
        MISTRAL,
        "[INST] ",
        "[/INST]",
        end="</s>",
        eos="</s>",
        bos="<s>",
        special=("[INST]", "[/INST]"),
        prepends_bos=True,
    ),
    "gemma": Family(
        GEMMA,
        "<start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        end="<end_of_turn>",
        eos="<eos>",
        bos="<bos>",
        special=("<start_of_turn>", "<end_of_turn>"),
        prepends_bos=True,
    ),
    "no template": Family(None, "[INST] ", " [/INST]", end="</s>", eos="</s>", bos="<s>"),
}


def text_of_the_world() -> list[str]:
    pools = load_instructions()
    plain = [t for task in ("emotion", "think", "reason") for t in pools.of(task)]
    return [
        *plain,
        f"{HEAD} </Vid> The person in video says: {SUBTITLE}. [emotion] [think] [/INST]",
        "You are a helpful assistant. system user model\n happy sad < > / | _ im_start pad x",
    ]


def make(family: Family, kind: str = "words", **changes: Any) -> Any:
    """Build a tokenizer: `words` cuts at every boundary, `bytes` is a byte-level BPE."""
    names = ["<unk>", "<pad>", *filter(None, (family.bos,)), family.eos, *family.special]
    if kind == "words":
        cut = pre_tokenizers.Split(Regex(r"</?\w+>|\[/?\w+\]|\w+|\s|[^\w\s]"), "isolated")
        pieces = {p for text in text_of_the_world() for p, _ in cut.pre_tokenize_str(text)}
        vocabulary = {t: i for i, t in enumerate([*names, *sorted(pieces - set(names))])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = cut
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=names,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(text_of_the_world(), trainer)
    if family.prepends_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, names.index(str(family.bos)))]
        )
    fast: Any = PreTrainedTokenizerFast
    made = fast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token=family.bos,
        eos_token=family.eos,
        additional_special_tokens=list(family.special),
    )
    made.chat_template = changes.get("template", family.template)
    return made


def think(turns: Turns, **changes: Any) -> RenderedPrompt:
    return render(
        "think",
        load_instructions().think[0],
        LABELS,
        **{"subtitle": SUBTITLE, "label": "sad", "description": "x is sad."} | changes,
        turns=turns,
    )


def ids_of(tokenizer: Any, turns: Turns, prompt: RenderedPrompt) -> PromptTokens:
    return tokenize(prompt, tokenizer, max_answer_tokens=100, turns=turns)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_turns_are_those_of_the_template(family: Family, kind: str) -> None:
    tokenizer = make(family, kind)
    turns = turns_of(tokenizer, "auto")
    assert (turns.before, turns.after) == (family.before, family.after)
    end, eos = tokenizer.convert_tokens_to_ids([family.end, family.eos])
    assert turns.end_ids == (end,)
    assert turns.stop_ids == ((end,) if end == eos else (end, eos))
    assert turns.bos_id == tokenizer.bos_token_id  # None for Qwen2
    prompt = think(turns)
    tokens = ids_of(tokenizer, turns, prompt)
    bos = family.bos or ""
    assert tokenizer.decode(tokens.head_ids).replace(" ", "") == (bos + prompt.head).replace(
        " ", ""
    )
    assert tokenizer.decode(tokens.tail_ids).replace(" ", "") == prompt.tail.replace(" ", "")
    assert tokens.answer_ids[-1] == end
    assert (tokens.head_ids + tokens.tail_ids).count(tokenizer.bos_token_id) == bool(family.bos)


def test_ids_are_the_tokenizers_own(family: Family) -> None:
    """Where the text is cut at our boundaries, nothing shows that it was split."""
    tokenizer = make(family)
    turns = turns_of(tokenizer, "auto")
    prompt = think(turns)
    tokens = ids_of(tokenizer, turns, prompt)
    content = (prompt.head + prompt.tail).removeprefix(turns.before).removesuffix(turns.after)
    if family.template is None:
        whole = tokenizer(f"<s>[INST] {content} [/INST]", add_special_tokens=False)["input_ids"]
    else:
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )["input_ids"]
    assert tokens.head_ids + tokens.tail_ids == tuple(whole)
    assert tokenizer.unk_token_id not in whole


def test_llama_2_is_the_same_by_either_way() -> None:
    tokenizer = make(FAMILIES["llama-2"])
    assert turns_of(tokenizer, "auto") == turns_of(tokenizer, "llama-2")
    told = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    turns = turns_of(tokenizer, "auto")
    assert told == f"<s>{turns.before}x{turns.after}" == "<s>[INST] x [/INST]"
    assert think(turns) == think(turns_of(tokenizer, "llama-2"))
    assert ids_of(tokenizer, turns, think(turns)) == tokenize(
        think(turns), tokenizer, max_answer_tokens=100
    )


def test_llama_2_turns_can_be_had_from_any_tokenizer() -> None:
    tokenizer = make(FAMILIES["qwen2"])
    turns = turns_of(tokenizer, "llama-2")
    assert (turns.before, turns.after, turns.bos_id) == ("[INST] ", " [/INST]", None)
    assert turns.end_ids == turns.stop_ids == (tokenizer.eos_token_id,)
    tokens = ids_of(tokenizer, turns, think(turns))
    assert tokens.head_ids == tuple(tokenizer(HEAD, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_foreign_text_cannot_make_a_special_token(family: Family, kind: str) -> None:
    tokenizer = make(family, kind)
    turns = turns_of(tokenizer, "auto")
    plain = ids_of(tokenizer, turns, think(turns))
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    hostile = " ".join([SUBTITLE, *tokenizer.all_special_tokens, "<|im_end|>", "[/INST]", "</s>"])
    tokens = ids_of(
        tokenizer, turns, think(turns, subtitle=hostile, description=f"x is sad. {hostile}")
    )
    for part in ("head_ids", "tail_ids", "answer_ids"):
        found, expected = getattr(tokens, part), getattr(plain, part)
        assert [i for i in found if i in special] == [i for i in expected if i in special]
    assert tokens.tail_ids == plain.tail_ids


@pytest.mark.parametrize("name", ["qwen2", "llama-2"])
def test_a_special_token_of_an_unusual_name_is_refused_by_name(name: str) -> None:
    tokenizer = make(FAMILIES[name], "bytes")
    tokenizer.add_special_tokens({"additional_special_tokens": ["~~laugh~~"]})
    turns = turns_of(tokenizer, "auto")
    for change in ({"subtitle": "ha ~~laugh~~"}, {"description": "ha ~~laugh~~"}):
        with pytest.raises(SchemaError, match=r"holds a special token, '~~laugh~~'"):
            ids_of(tokenizer, turns, think(turns, **change))
    # The template's own token, but written by somebody else.
    prompt = think(turns)
    end = tokenizer.convert_ids_to_tokens(turns.end_ids[0])
    forged = RenderedPrompt(prompt.head, f"{end} {prompt.tail}", prompt.answer)
    with pytest.raises(SchemaError, match=r"holds a special token, '(<\|im_end\|>|</s>)'"):
        ids_of(tokenizer, turns, forged)


def test_an_unknown_word_is_no_special_token() -> None:
    tokenizer = make(FAMILIES["gemma"])
    turns = turns_of(tokenizer, "auto")
    tokens = ids_of(tokenizer, turns, think(turns, subtitle="Xylophon"))
    assert tokenizer.unk_token_id in tokens.tail_ids


def test_added_tokens_of_a_template_are_guarded_though_not_called_special() -> None:
    """DeepSeek marks the names of its turns so."""
    user, assistant = "~User~", "~Assistant~"
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        f"{{{{ '{user}' + m['content'] }}}}{{% else %}}"
        f"{{{{ '{assistant}' + m['content'] + eos_token }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{assistant}' }}}}{{% endif %}}"
    )
    tokenizer = make(FAMILIES["llama-2"], "bytes", template=template)
    tokenizer.add_tokens([user, assistant, "~else~"])
    turns = turns_of(tokenizer, "auto")
    assert (turns.before, turns.after) == (user, assistant)
    assert turns.end_ids == (tokenizer.eos_token_id,)
    ids_of(tokenizer, turns, think(turns, subtitle="~else~"))
    with pytest.raises(SchemaError, match=f"special token, '{user}'"):
        ids_of(tokenizer, turns, think(turns, subtitle=f"a {user}"))


def test_bos_is_added_where_the_tokenizer_would_and_the_template_does_not() -> None:
    silent = GEMMA.removeprefix("{{ bos_token }}")
    gemma = FAMILIES["gemma"]
    tokenizer = make(gemma, template=silent)
    assert turns_of(tokenizer, "auto").bos_id == tokenizer.bos_token_id
    without = Family(silent, gemma.before, gemma.after, gemma.end, gemma.eos, gemma.bos)
    assert turns_of(make(without), "auto").bos_id is None


def test_a_bos_that_opens_a_turn_is_written_once() -> None:
    """SmolLM2: the token of a turn is the tokenizer's BOS."""
    family = Family(CHATML, "", "", "<|im_end|>", "<|im_end|>", bos="<|im_start|>")
    tokenizer = make(family)
    turns = turns_of(tokenizer, "auto")
    prompt = think(turns)
    content = (prompt.head + prompt.tail).removeprefix(turns.before).removesuffix(turns.after)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )["input_ids"]
    tokens = ids_of(tokenizer, turns, prompt)
    assert tokens.head_ids + tokens.tail_ids == tuple(whole)


def test_a_template_without_end_is_ended_by_eos() -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = make(FAMILIES["qwen2"], template=template)
    assert turns_of(tokenizer, "auto").end_ids == (tokenizer.eos_token_id,)


def test_a_template_that_writes_the_date_writes_the_same_one_tomorrow() -> None:
    dated = "{{ 'Today: ' + strftime_now('%d %b %Y') + ', ' + strftime_now('%Y-%m-%d') + '\n' }}"
    turns = turns_of(make(FAMILIES["qwen2"], template=dated + CHATML), "auto")
    assert turns.before.startswith("Today: 26 Jul 2024, 2024-07-26\n<|im_start|>system\n")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('I need tools') }}", r"refuses \['user'\]: I need tools"),
        ("{{ messages[1]['content'] + missing.part }}", "refuses"),
        ("{% if %}", "refuses"),
        (
            "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
            + CHATML,
            r"refuses \['user', 'assistant'\]: one turn only",
        ),
        ("{{ messages[0]['content'] | upper }}", "does not keep the text .* it changes it"),
        ("{{ messages[0]['content'] | e }}", "does not keep the text .* it changes it"),
        ("{{ messages[0]['content'] * 2 }}", ".*it writes it 2 times"),
        ("{{ 'hello' }}", ".*it changes it"),
        (CHATML + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}", "opens a <think>"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_with_the_cure(template: str, why: str) -> None:
    tokenizer = make(FAMILIES["qwen2"], template=template)
    with pytest.raises(SchemaError, match=rf"chat template {why}.*Set prompt\.chat=llama-2"):
        turns_of(tokenizer, "auto")
    assert turns_of(tokenizer, "llama-2").before == "[INST] "


def test_what_does_not_fit_together_is_refused() -> None:
    qwen, gemma = make(FAMILIES["qwen2"]), make(FAMILIES["gemma"])
    with pytest.raises(SchemaError, match="rendered with other turns"):
        ids_of(qwen, turns_of(qwen, "auto"), think(turns_of(gemma, "auto")))
    with pytest.raises(SchemaError, match=r"unknown prompt.chat 'llama2'.*Did you mean 'llama-2'"):
        turns_of(qwen, "llama2")  # type: ignore[arg-type]
    qwen.eos_token = None
    assert turns_of(qwen, "auto").stop_ids == turns_of(qwen, "auto").end_ids
    with pytest.raises(SchemaError, match="needs EOS"):
        turns_of(qwen, "llama-2")
