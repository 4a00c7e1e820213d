"""How prompts become token ids: BOS, special tokens, label words in their place, Unicode forms."""

from __future__ import annotations

import json
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizers import save_tokenizer
from helpers.words import ROWS, TEMPLATE, TEXTS, VERBALIZER, _reloaded, word_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from cdt_lens.core.errors import CdtLensWarning, InputError
from cdt_lens.tasks.datasets import load_task, task_from_files
from cdt_lens.tasks.prompts import PromptFormat, build_examples, warn_of_spaces
from cdt_lens.tasks.task import Examples, Task

CHAT = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"
CHAT_ML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return word_tokenizer(tmp_path_factory.mktemp("words"), (*TEXTS, "[INST] [/INST]user"))


@pytest.fixture(scope="module")
def chat_ml(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """SmolLM2's kind: the token that starts a turn is BOS."""
    made = word_tokenizer(tmp_path_factory.mktemp("ml"), (*TEXTS, "user assistant"), bos=None)
    made.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    made.save_pretrained(tmp_path_factory.mktemp("ml2"))
    made.init_kwargs["bos_token"] = "<|im_start|>"
    return made


@pytest.fixture(scope="module")
def llama_2(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Llama 2's kind: a space is put before every text, by the normalizer Prepend."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    names = " John Mary Paul Anna Tom Peter David Susan Karen Alice teacher doctor driver he she"
    core.train_from_iterator([*TEXTS, *(row["text"] for row in ROWS), names] * 20, trainer)
    without = Tokenizer.from_str(json.dumps({**json.loads(core.to_str()), "pre_tokenizer": None}))
    folder = tmp_path_factory.mktemp("llama2")
    return _reloaded(without, folder, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def build(tokenizer: PreTrainedTokenizerBase, template: str, **options: object) -> Examples:
    given = {"verbalizer": VERBALIZER, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=CdtLensWarning)
        return build_examples(ROWS, tokenizer=tokenizer, template=template, **given)


def few_shot(tokenizer: PreTrainedTokenizerBase, folder: Path, template: str) -> Task:
    lines = [json.dumps(row) for row in (*ROWS, {"text": "a good room", "label": "neutral"})]
    (folder / "train.jsonl").write_text("\n".join(lines))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=CdtLensWarning)
        return task_from_files(
            {"train": folder / "train.jsonl"}, tokenizer=tokenizer, template=template,
            verbalizer=VERBALIZER, shots=3,
        )  # fmt: skip


# BOS


@pytest.mark.parametrize(("kind", "chat"), [("tokenizer", CHAT), ("chat_ml", CHAT_ML)])
@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_a_chat_template_gives_the_ids_of_the_tokenizer_itself(
    request: pytest.FixtureRequest, kind: str, chat: str, prepend_bos: bool | None
) -> None:
    words = request.getfixturevalue(kind)

    def asked(text: str, **options: object) -> str:
        messages = [{"role": "user", "content": text}]
        return words.apply_chat_template(messages, chat_template=chat, **options)

    for example in build(words, asked("{text}", tokenize=False), prepend_bos=prepend_bos):
        ids = asked(example.fields["text"], return_dict=False)
        assert list(example.tokens) == list(ids)
        assert example.tokens[0] == words.bos_token_id


def test_a_template_with_bos_has_the_ids_of_one_without(tokenizer: PreTrainedTokenizerBase) -> None:
    assert [e.tokens for e in build(tokenizer, "<s>" + TEMPLATE)] == [
        e.tokens for e in build(tokenizer, TEMPLATE)
    ]


@pytest.mark.parametrize("template", [TEMPLATE, "<s>" + TEMPLATE])
def test_bos_stands_once_before_the_shots(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, template: str
) -> None:
    task = few_shot(tokenizer, tmp_path, template)
    prompts = [task.prefix + task.template.format_map(e.fields) for e in task.train]
    assert prompts == [e.prompt for e in task.train]
    for example in (*task.train, *task.content_free):
        assert example.tokens[0] == 1 and example.tokens.count(1) == 1
    assert [e.tokens for e in task.train] == [
        e.tokens for e in few_shot(tokenizer, tmp_path, TEMPLATE).train
    ]


def test_a_bos_that_starts_every_turn_stays_in_every_shot(
    chat_ml: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    template = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    task = few_shot(chat_ml, tmp_path, template)
    turns = 2 * 4  # two of each shot and two of the question
    assert all(e.tokens.count(chat_ml.bos_token_id) == turns for e in task.train)
    assert all(e.prompt.startswith("<|im_start|>user") for e in task.train)


# Special tokens


@pytest.mark.parametrize("token", ["<s>", "<unk>", "</s>"])
def test_text_that_spells_a_special_token_is_refused_with_its_place(
    tmp_path: Path, token: str
) -> None:
    words = word_tokenizer(tmp_path, (*TEXTS, "<s> < > / s unk"))
    words.add_special_tokens({"eos_token": "</s>"})
    rows = [*ROWS, {"text": f"good {token}food", "label": "positive"}]
    with pytest.raises(InputError, match=rf"row 8, column 'text': the text holds '{token}'"):
        build_examples(rows, tokenizer=words, template=TEMPLATE, verbalizer=VERBALIZER)


def test_text_and_template_may_not_spell_one_together(tmp_path: Path) -> None:
    words = word_tokenizer(tmp_path, (*TEXTS, "< > s x"))
    words.add_tokens(AddedToken("<x>", special=True), special_tokens=True)
    rows = [*ROWS, {"text": "x", "label": "positive"}]
    with pytest.raises(InputError, match="row 8: the text and the template together spell"):
        build_examples(rows, tokenizer=words, template="<{text}>:", verbalizer=VERBALIZER)


def test_special_tokens_of_the_template_are_meant(chat_ml: PreTrainedTokenizerBase) -> None:
    for example in build(chat_ml, "{text}<|im_end|>\nSentiment:"):
        assert example.tokens.count(chat_ml.eos_token_id) == 1


def test_content_free_texts_that_are_special_or_leave_nothing_are_left_out(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def prompts(words: PreTrainedTokenizerBase, template: str, **options: object) -> list[str]:
        format = PromptFormat(words, template, VERBALIZER, **options)
        return [e.prompt for e in format.content_free("free")]

    assert prompts(tokenizer, "{text}", prepend_bos=False) == ["N/A", "[MASK]"]
    assert prompts(tokenizer, "{text}") == ["N/A", "", "[MASK]"]
    masked = word_tokenizer(tmp_path)
    masked.add_special_tokens({"mask_token": "[MASK]"})
    assert prompts(masked, "{text}:") == ["N/A:", ":"]


# Words in their place


def test_words_are_read_behind_a_prompt_with_llama_2s_normalizer(
    llama_2: PreTrainedTokenizerBase,
) -> None:
    assert len(llama_2.tokenize(" positive")) == 2, "alone it begins with two spaces"
    examples = build(llama_2, TEMPLATE)
    assert llama_2.convert_ids_to_tokens(list(examples[0].answers)) == ["▁positive"]
    for example in examples:
        whole = llama_2(example.prompt + VERBALIZER[example.label], add_special_tokens=False)
        assert [llama_2.bos_token_id, *whole["input_ids"]] == [*example.tokens, *example.answers]


def test_generated_tasks_read_their_words_with_llama_2s_normalizer(
    llama_2: PreTrainedTokenizerBase,
) -> None:
    task = load_task("gendered-pronoun", tokenizer=llama_2, n=(4, 2, 2))
    assert llama_2.convert_ids_to_tokens(list(task.verbalizer_ids.values())) == ["▁he", "▁she"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Words with a leading space and without one are different tokens."""
    texts = (*TEXTS, "good bad", "negative", "neutral", "positive", "\n>(\uff1a  N/A->", "好 好")
    return word_tokenizer(tmp_path_factory.mktemp("both"), texts)


@pytest.mark.parametrize(
    ("context", "word", "usual"),
    [
        ("N/A\nSentiment:", "good", "'N/A\\nSentiment: good'"),
        ("a food", "bad", "'a food bad'"),
        ("N/A->", "good", "'N/A-> good'"),
        ("N/A\nSentiment: ", " good", "'N/A\\nSentiment: good'"),
        ("N/A\nSentiment:\n", " good", "'N/A\\nSentiment:\\ngood'"),
    ],
)
def test_a_space_too_many_or_too_few_is_said_with_both_readings(
    both: PreTrainedTokenizerBase, context: str, word: str, usual: str
) -> None:
    with pytest.warns(CdtLensWarning) as told:
        warn_of_spaces(both, {"x": word}, context)
    message = str(told[0].message)
    assert usual in message and repr(context + word) in message
    (written,) = both(word, add_special_tokens=False)["input_ids"]
    assert f", {written}], but" in message


@pytest.mark.parametrize(
    ("context", "word"),
    [
        ("N/A\nSentiment:", " good"), ("N/A\nSentiment:\n", "good"), ("N/A (", "good"),
        ("N/A <x>", "good"), ("N/A\uff1a", "好"), ("a food", " unheard"),
    ],
)  # fmt: skip
def test_the_usual_space_is_no_warning(
    both: PreTrainedTokenizerBase, context: str, word: str
) -> None:
    warn_of_spaces(both, {"x": word}, context)


def test_the_warning_comes_when_the_task_is_made(both: PreTrainedTokenizerBase) -> None:
    words = {label: word.strip() for label, word in VERBALIZER.items()}
    with pytest.warns(CdtLensWarning, match="Check the space between the template and the words"):
        build_examples(ROWS, tokenizer=both, template=TEMPLATE, verbalizer=words)


# Unicode


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_labels_and_columns_are_the_same_in_both_unicode_forms(
    tokenizer: PreTrainedTokenizerBase, forms: tuple[str, str]
) -> None:
    words = {"négatif": " negative", "positif": " positive"}
    mine, theirs = (lambda x, form=form: unicodedata.normalize(form, x) for form in forms)
    rows = [{theirs("téxt"): "good", theirs("étiquette"): theirs(label)} for label in words]
    examples = build_examples(
        rows, tokenizer=tokenizer, template=mine("{téxt}\nSentiment:"),
        verbalizer={mine(label): word for label, word in words.items()},
        label_column=mine("étiquette"),
    )  # fmt: skip
    assert examples.labels == ("négatif", "positif")
    assert [e.prompt for e in examples] == ["good\nSentiment:"] * 2


def test_two_labels_that_are_one_in_composed_form_are_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    words = {"é": " negative", unicodedata.normalize("NFD", "é"): " positive"}
    with pytest.raises(InputError, match="two labels are the same in Unicode's composed form"):
        PromptFormat(tokenizer, TEMPLATE, words)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "good", "label": "p\u043esitive"},
            r"did you mean 'positive'\? \('\u043e' is U\+043E CYR",
        ),
        ({"text": "good", "label": "a\u200bb"}, r"unknown label 'a\\u200bb' \(.*U\+200B ZERO"),
        (
            {"t\u0435xt": "good", "label": "positive"},
            r"did you mean 't\u0435xt'\? \('\u0435' is U\+0435 CYRILLIC",
        ),
    ],
)
def test_letters_that_look_alike_are_shown_with_their_code(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_examples([row], tokenizer=tokenizer, template=TEMPLATE, verbalizer=VERBALIZER)


def test_a_label_of_a_million_characters_is_refused_in_a_short_line(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for row in (
        {"text": "good", "label": "positive" * 125_000},
        {"text": "good", "label": ["x"] * 300_000},
        {"text" * 300_000: "good", "label": "positive"},
    ):
        with pytest.raises(InputError) as told:
            build_examples([row], tokenizer=tokenizer, template=TEMPLATE, verbalizer=VERBALIZER)
        assert len(str(told.value)) < 400


# Words of several tokens ---------------------------------------------------------------------------

LETTERS = {"bad": " bad", "good": " g", "fine": " fi"}


def letters(kind: str, tmp_path: Path, rows: object = None, **options: object) -> tuple[Any, Task]:
    """A task whose tokenizer splits " bad" and " fi" into letters, and not " g"."""
    tokenizer = save_tokenizer(kind, tmp_path)
    rows = ROWS_OF_LETTERS if rows is None else rows
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    given = {"template": "{text} so:", "verbalizer": LETTERS, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=CdtLensWarning)
        task = task_from_files({"train": tmp_path / "rows.jsonl"}, tokenizer=tokenizer, **given)
    return tokenizer, task


ROWS_OF_LETTERS = [
    {"text": "a day", "label": "good"}, {"text": "b", "label": "bad"},
    {"text": "a b a b a b", "label": "fine"},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "gpt2 with BOS", "qwen2", "llama", "gemma"])
def test_a_word_has_the_tokens_that_follow_the_prompt(kind: str, tmp_path: Path) -> None:
    tokenizer, task = letters(kind, tmp_path)
    assert task.labels == ("bad", "fine", "good")
    pieces = [tokenizer.convert_ids_to_tokens(list(ids)) for ids in words_of(task)]
    assert [len(each) for each in pieces] == [3, 3, 1]
    for item in (*task.train, *task.content_free):
        own = tokenizer(item.prompt, add_special_tokens=False).input_ids
        before = item.tokens[: len(item.tokens) - len(own)]
        for label, ids in zip(task.labels, words_of(task), strict=True):
            whole = tokenizer(item.prompt + LETTERS[label], add_special_tokens=False).input_ids
            assert (*before, *whole) == (*item.tokens, *ids)


def words_of(task: Task) -> list[tuple[int, ...]]:
    return [w if isinstance(w, tuple) else (w,) for w in task.verbalizer_ids.values()]


def test_a_prompt_leaves_room_for_the_longest_word(tmp_path: Path) -> None:
    """The model reads all tokens of " bad" but the last behind the prompt."""
    _, task = letters("gpt2", tmp_path)
    longest = max(len(item.tokens) for item in task.train)
    assert max(item.length for item in task.train) == longest + 2
    assert letters("gpt2", tmp_path, max_length=longest + 2)[1].train == task.train
    said = f"line 3: the prompt has {longest} tokens, the limit is {longest - 1} with 2 more for"
    with pytest.raises(InputError, match=said):
        letters("gpt2", tmp_path, max_length=longest + 1)
    cut = letters("gpt2", tmp_path, max_length=longest + 1, truncate=True)[1]
    assert max(item.length for item in cut.train) == longest + 1


def test_a_prompt_that_merges_with_another_label_s_word_is_refused(tmp_path: Path) -> None:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], initial_alphabet=list("abdgox :"),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator([" good"] * 10 + [": b"] * 200, trainer)
    tokenizer = _reloaded(core, tmp_path, unk_token="<unk>")
    rows = [{"text": "a", "label": "b"}, {"text": "x:", "label": "g"}]
    with pytest.raises(InputError, match=r"row 2: .*merges.*' bad'"):
        build_examples(
            rows, tokenizer=tokenizer, template="{text}", verbalizer={"g": " good", "b": " bad"}
        )


def test_a_split_word_with_another_space_than_usual_is_warned_of(tmp_path: Path) -> None:
    tokenizer = save_tokenizer("gpt2", tmp_path)
    with pytest.warns(CdtLensWarning, match="'so:dad' ends in .* 'so: dad', as text is"):
        warn_of_spaces(tokenizer, {"x": "dad"}, "so:")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_spaces(tokenizer, {"x": " dad"}, "so:")


def test_labels_may_be_words_of_several_words(tokenizer: PreTrainedTokenizerBase) -> None:
    words = {**VERBALIZER, "neutral": " the food"}
    examples = build_examples(ROWS, tokenizer=tokenizer, template=TEMPLATE, verbalizer=words)
    (neutral,) = {item.answers[0] for item in examples if item.label == "neutral"}
    assert tokenizer.convert_ids_to_tokens(list(neutral)) == [" the", " food"]
    plain = build_examples(ROWS, tokenizer=tokenizer, template=TEMPLATE, verbalizer=VERBALIZER)
    assert [item.tokens for item in examples] == [item.tokens for item in plain]
    assert examples.hash != plain.hash
