"""The shipped tiny chat model: its files, its tokenizer at the splice, what it knows, its seed."""

from __future__ import annotations

import json
import random
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402

from train.prompt import HEAD, RenderedPrompt, render, tokenize  # noqa: E402
from train.text.instructions import load_instructions  # noqa: E402
from train.tiny import pretrain as tiny  # noqa: E402
from train.tiny import world  # noqa: E402

FOLDER = Path(tiny.__file__).with_name("llm")
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(FOLDER).eval()


def reply(model: Any, tokenizer: Any, chat: world.Chat, evidence: list[int]) -> str:
    tokens = chat.tokens(tokenizer, with_answer=False)
    ids = torch.tensor([[*tokens.head_ids, *evidence, *tokens.tail_ids]])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def held_out(task: str, n_chats: int, *, n_cues: int = 2) -> list[world.Chat]:
    """Draw chats from a seed that no training run uses, with the six plain labels."""
    rng = random.Random("held out")
    drawn = (world.draw_chat(rng, p_one_cue=0.0 if n_cues == 2 else 1.0) for _ in iter(int, 1))
    fitting = (c for c in drawn if c.task == task and set(c.options) == set(world.EMOTIONS))
    return list(islice(fitting, n_chats))


# --- files --------------------------------------------------------------------------------------


def test_folder_is_complete_and_small() -> None:
    assert {path.name for path in FOLDER.iterdir()} == FILES
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1.9e6
    assert not re.search(r"/(home|tmp|root|work)/", (FOLDER / "tokenizer_config.json").read_text())


def test_weights_are_half_on_disk_and_float_when_loaded(model: Any) -> None:
    stored = load_file(FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config = model.config
    assert config.model_type == "llama"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 4, 4)
    assert config.max_position_embeddings >= 2048
    assert config.vocab_size <= 1024


# --- tokenizer ----------------------------------------------------------------------------------


def test_special_tokens(model: Any, tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<unk>", "<s>", "</s>", "<pad>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    assert len(tokenizer) == model.config.vocab_size


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    for text in (" Café 你好 🙂 [x] {y}", " <think>a</think>\n\tb"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


# The tokens around the splice, written by hand; Ġ is the blank in front of a word.
HEAD_TOKENS = "<s> Ġ[ INST ] Ġ< Vid >"
TAIL_TOKENS = (
    "Ġ</ Vid > ĠThe Ġperson Ġin Ġvideo Ġsays : ĠThe Ġtrain Ġis Ġhere . "
    "Ġ[ emotion ] ĠP i ck Ġa Ġs ing le Ġlabel Ġfrom : Ġhappy , Ġsad , Ġangry . Ġ[/ INST ]"
)


def test_ids_around_the_splice(tokenizer: Any) -> None:
    prompt = render(
        "emotion",
        "Pick a single label from: {labels}.",
        ("happy", "sad", "angry"),
        subtitle="The train is here",
        label="sad",
    )
    tokens = tokenize(prompt, tokenizer, max_answer_tokens=8)
    vocabulary = json.loads((FOLDER / "tokenizer.json").read_text())["model"]["vocab"]

    def by_hand(text: str) -> tuple[int, ...]:
        return tuple(vocabulary[token] for token in text.split(" "))

    assert tokens.head_ids == by_hand(HEAD_TOKENS)
    assert tokens.tail_ids == by_hand(TAIL_TOKENS)
    assert tokens.answer_ids == by_hand("Ġsad </s>")
    everything = tokens.head_ids + tokens.tail_ids + tokens.answer_ids
    assert (everything.count(1), everything.count(2)) == (1, 1)


def test_long_reasoning_is_cut_before_its_label(tokenizer: Any) -> None:
    prompt = render(
        "think",
        "Why? {labels}",
        ("happy", "sad"),
        label="sad",
        description="the voice is low " * 40,
    )
    answer = tokenize(prompt, tokenizer, max_answer_tokens=50).answer_ids
    assert 40 < len(answer) <= 50
    text = tokenizer.decode(answer)
    assert re.fullmatch(r" <think>(the voice is low ?)+.*</think><answer>sad</answer></s>", text)


def test_a_special_token_in_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="holds a special token"):
        tokenize(RenderedPrompt(HEAD, "x </s>", None), tokenizer, max_answer_tokens=8)


# --- what it knows ------------------------------------------------------------------------------


def test_it_names_the_emotion_from_two_cues(model: Any, tokenizer: Any) -> None:
    sampler = tiny.Sampler(tokenizer, random.Random("layout"))
    chats = held_out("emotion", 200)
    right = [
        reply(model, tokenizer, chat, sampler.evidence(chat, 10 + i)) == chat.label
        for i, chat in enumerate(chats)
    ]
    assert sum(right) / len(right) >= 0.97


def test_one_cue_leaves_two_emotions(model: Any, tokenizer: Any) -> None:
    sampler = tiny.Sampler(tokenizer, random.Random("layout"))
    replies = []
    for chat in held_out("emotion", 60, n_cues=1):
        said = reply(model, tokenizer, chat, sampler.evidence(chat, 60))
        possible = {
            name
            for name, (look, sound) in world.EMOTIONS.items()
            if chat.look in (None, look) and chat.sound in (None, sound)
        }
        assert len(possible) == 2
        replies.append((said in possible, said == chat.label))
    assert sum(fits for fits, _ in replies) / len(replies) >= 0.95
    assert 0.3 <= sum(true for _, true in replies) / len(replies) <= 0.7


def test_its_reasoning_parses_and_quotes_the_cues(model: Any, tokenizer: Any) -> None:
    sampler = tiny.Sampler(tokenizer, random.Random("layout"))
    chats = held_out("think", 16)
    exact = []
    for chat in chats:
        said = reply(model, tokenizer, chat, sampler.evidence(chat, 60))
        assert re.fullmatch(r"<think>[^<>]+</think><answer>[a-z]+</answer>", said)
        exact.append(said == f"<think>{chat.reasoning}</think><answer>{chat.label}</answer>")
    assert sum(exact) / len(exact) >= 0.9


# --- seed and tuning ----------------------------------------------------------------------------


def test_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny.pretrain(tmp_path / name, seed=3, n_steps=2, batch_size=4)
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


# peft asks transformers for a property under its deprecated name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_lora_and_a_soft_prefix_learn_the_cues(tokenizer: Any) -> None:
    """One linear map from noisy codes of look and sound to 16 prefix tokens, LoRA r=8 on q, v."""
    torch.manual_seed(0)
    rng = random.Random(0)
    base = transformers.LlamaForCausalLM.from_pretrained(FOLDER)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, lora)
    embed = base.get_input_embeddings()
    adapter = torch.nn.Linear(6, 16 * 128)
    tuned = [*adapter.parameters(), *(p for p in model.parameters() if p.requires_grad)]
    optimizer = torch.optim.AdamW(tuned, lr=5e-3)
    template = load_instructions().emotion[0]

    def step(n_samples: int) -> tuple[Any, float]:
        """Return loss and accuracy of a batch; all rows have equal length by construction."""
        rows, truth = [], []
        options = rng.sample(list(world.EMOTIONS), 6)
        for _ in range(n_samples):
            label = rng.choice(options)
            look, sound = world.EMOTIONS[label]
            code = torch.zeros(6)
            code[[look, 3 + sound]] = 1.0
            prefix = adapter(code + 0.2 * torch.randn(6)).view(16, 128)
            tokens = tokenize(
                render("emotion", template, options, label=label), tokenizer, max_answer_tokens=4
            )
            assert len(tokens.answer_ids) == 2
            head, tail = (embed(torch.tensor(i)) for i in (tokens.head_ids, tokens.tail_ids))
            rows.append(torch.cat([head, prefix, tail]))
            truth.append(tokens.answer_ids[0])
        logits = model(inputs_embeds=torch.stack(rows)).logits[:, -1]
        target = torch.tensor(truth)
        right = (logits.argmax(-1) == target).float().mean()
        return torch.nn.functional.cross_entropy(logits, target), float(right)

    for _ in range(40):
        loss, _ = step(12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = sum(step(12)[1] for _ in range(5)) / 5
    assert right >= 0.9
