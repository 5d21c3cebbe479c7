"""Chats: transformers' ids and masks, the end of a turn learnt, and nothing special from a user's text."""

import functools
import inspect
import json
import random

import numpy as np
import pytest

from jaxlm.data.chat import DEFAULT_TEMPLATE, Chat, check_messages, pack_chats
from jaxlm.data.tokenizer import HuggingFace, TokenizerConfig, train_tokenizer

TEXTS = [
    "The cat sat on the mat. What did the cat do? It sat on the mat, and then it slept.\n",
    "You are a helpful assistant. Answer the question in one sentence. user assistant system model INST\n",
    "Thank you! Was it a naïve café? Yes: it was — 100% so.\n\n" * 2,
]

# Templates in the style of well-known models. BEGIN and END stand for the tags of a generation block, or for nothing.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}BEGIN{{ m.content + '<|im_end|>' }}END"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
    "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + ns.system + m.content.strip() + ' [/INST]' }}{% set ns.system = '' %}"
    "{% else %}BEGIN{{ ' ' + m.content.strip() + ' ' + eos_token }}END{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}BEGIN{{ m.content | trim + '<|eot_id|>' }}END"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\n' }}BEGIN{{ m.content + eos_token }}END{{ '\n' }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system turn\nhere') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{% if m.role == 'assistant' %}BEGIN{{ m.content | trim + '<end_of_turn>' }}END"
    "{% else %}{{ m.content | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
STYLES = {  # template, kind of pieces, special tokens (bos first where there is one, eos last), adds its bos, ends of a turn
    "chatml": (CHATML, "bytes", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], False, {"<|im_end|>", "<|endoftext|>"}),
    "llama2": (LLAMA2, "first", ["<s>", "</s>"], True, {"</s>"}),
    "llama3": (
        LLAMA3,
        "lines",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
        True,
        {"<|eot_id|>", "<|end_of_text|>"},
    ),
    "zephyr": (ZEPHYR, "always", ["<s>", "</s>"], False, {"</s>"}),
    "gemma": (GEMMA, "never", ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"], True, {"<end_of_turn>", "<eos>"}),
}

BYTES = ("bytes", "lines")

TWO_TURNS = [
    {"role": "user", "content": "What did the cat do?"},
    {"role": "assistant", "content": "It sat on the mat."},
    {"role": "user", "content": "Thank you! And then?"},
    {"role": "assistant", "content": "Then it slept."},
]
SYSTEM = [{"role": "system", "content": "You are a helpful assistant."}]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def blocks(template):
    return template.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")


def plain(template):
    return template.replace("BEGIN", "").replace("END", "")


def huggingface(pieces, special, adds_bos=False, template=None, bos=True, **token):
    """A fast transformers tokenizer, trained here.

    `pieces`: of bytes, as GPT-2 splits them ("bytes") or with line ends together ("lines"), or SentencePiece-like,
    where a text gets a space in front "first", in "always" every part of it between special tokens, "never" none.
    """
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    of_bytes = pieces in BYTES
    rust = tokenizers.Tokenizer(models.BPE(byte_fallback=not of_bytes, unk_token=None))
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    if of_bytes:
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pieces == "bytes")
        if pieces == "lines":
            split = pre_tokenizers.Split(tokenizers.Regex(r"\s*[\r\n]+| ?[^\s]+|\s+"), "isolated")
            rust.pre_tokenizer = pre_tokenizers.Sequence([split, rust.pre_tokenizer])
        rust.decoder = decoders.ByteLevel()
        alphabet, first = pre_tokenizers.ByteLevel.alphabet(), []
    else:
        rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=pieces)
        rust.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=pieces), decoders.Fuse()])
        alphabet, first = [], byte_pieces
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*special, *first], initial_alphabet=alphabet, show_progress=False)
    rust.train_from_iterator(TEXTS, trainer)
    if first:  # the trainer calls them special; they are what an unseen character falls back to
        spec = json.loads(rust.to_str())
        spec["added_tokens"] = [one for one in spec["added_tokens"] if one["content"] not in byte_pieces]
        rust = tokenizers.Tokenizer.from_str(json.dumps(spec))
    if token:
        rust.add_special_tokens([tokenizers.AddedToken(name, **token) for name in special])
    if adds_bos:
        rust.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], rust.token_to_id(special[0]))]
        )
    names = {"eos_token": special[-1]} | ({"bos_token": special[0]} if bos else {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=rust, chat_template=template, **names)


@functools.cache
def style(name):
    """(chat, the reference tokenizer with plain template, the template with generation blocks) of a style."""
    template, pieces, special, adds_bos, _ = STYLES[name]
    make = functools.partial(huggingface, pieces, special, adds_bos, plain(template), bos=name != "chatml")
    return Chat(HuggingFace(make())), make(), blocks(template)


@pytest.fixture(params=STYLES)
def name(request):
    return request.param


def reference(hf, messages, template=None):
    """(ids, mask of the generation blocks) as transformers gives them."""
    out = hf.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], out["assistant_masks"]


def bytes_chat(template=None):
    return Chat(train_tokenizer(TokenizerConfig("bytes"), []), template)


def text_of(chat, ids):
    """The whole text of some ids, special tokens too."""
    return chat._rust.decode(list(ids), skip_special_tokens=False)


# --- by hand ----------------------------------------------------------------------------------


def test_two_turns_by_hand():
    # Bytes: u = 117, a = 97; the end of text, 256, is the only special token.
    chat = bytes_chat("{% for m in messages %}{{ m.role[0] + m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}")
    ids, trained = chat.encode([user("AB"), assistant("CD"), user("E"), assistant("F")])
    assert ids.tolist() == [117, 65, 66, 97, 67, 68, 256, 117, 69, 97, 70, 256]
    assert trained.tolist() == [bool(x) for x in [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]]
    assert (ids.dtype, trained.dtype) == (np.int32, np.bool_)
    assert chat.stop_ids == {256}


def test_the_default_template_by_hand():
    chat = bytes_chat()
    messages = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Yo"), user("Why?"), assistant("So.")]
    end = "<|endoftext|>"
    assert chat.render(messages) == f"{end}System: Be brief.\nUser: Hi\nAssistant: Yo{end}User: Why?\nAssistant: So.{end}"
    assert chat.render(messages[:2], generate=True) == f"{end}System: Be brief.\nUser: Hi\nAssistant:"
    ids, trained = chat.encode(messages[1:3])
    assert ids.tolist() == [256, *b"User: Hi\nAssistant: Yo", 256]
    assert ids[trained].tolist() == [*b" Yo", 256]  # all that a model has to write after the prompt
    assert chat.prompt(messages[1:2]).tolist() == [256, *b"User: Hi\nAssistant:"]
    assert chat.template == DEFAULT_TEMPLATE and chat.stop_ids == {256}


@pytest.mark.parametrize("kind", ["characters", "bpe", "gpt2"])
def test_the_default_template_serves_every_tokenizer_of_ours_and_one_without_a_template(kind):
    if kind == "gpt2":
        tokenizer = HuggingFace(huggingface("bytes", ["<|endoftext|>"]))
    else:
        tokenizer = train_tokenizer(TokenizerConfig(kind, vocab_size=290), [*TEXTS, "User: System:"])
    chat = Chat(tokenizer)
    ids, trained = chat.encode(TWO_TURNS)
    assert (ids == tokenizer.eos_id).tolist().count(True) == 3  # in front and after each answer
    assert ids[0] == tokenizer.bos_id and not trained[0]
    assert tokenizer.decode(ids[trained]) == " It sat on the mat. Then it slept."
    assert trained[ids == tokenizer.eos_id].tolist() == [False, True, True]


def test_packing_by_hand():
    # Three conversations of 4, 7 and 3 tokens; rows of 5 pairs. The second has 6 pairs, so its last is cut.
    encoded = [
        (np.array([1, 2, 3, 4], np.int32), np.array([0, 0, 1, 1], bool)),
        (np.array([10, 11, 12, 13, 14, 15, 16], np.int32), np.array([0, 0, 1, 1, 0, 0, 1], bool)),
        (np.array([7, 8, 9], np.int32), np.array([0, 1, 1], bool)),
    ]
    rows = pack_chats(encoded, 5, pad_id=99)
    assert (len(rows), rows.cut, rows.dropped) == (2, 1, 0)
    first, second = rows[0], rows[1]
    assert first["tokens"].tolist() == [10, 11, 12, 13, 14]
    assert first["targets"].tolist() == [11, 12, 13, 14, 15]
    assert first["weights"].tolist() == [0, 1, 1, 0, 0]
    assert first["segments"].tolist() == [1, 1, 1, 1, 1]
    assert second["tokens"].tolist() == [1, 2, 3, 7, 8]
    assert second["targets"].tolist() == [2, 3, 4, 8, 9]
    assert second["weights"].tolist() == [0, 1, 1, 1, 1]
    assert second["segments"].tolist() == [1, 1, 1, 2, 2]
    assert second["positions"].tolist() == [0, 1, 2, 0, 1]

    alone = pack_chats(encoded, 5, pad_id=99, packed=False)
    assert (len(alone), alone.cut) == (3, 1)
    assert alone[2]["tokens"].tolist() == [7, 8, 99, 99, 99]
    assert alone[2]["targets"].tolist() == [8, 9, 99, 99, 99]
    assert alone[2]["weights"].tolist() == [1, 1, 0, 0, 0]
    assert alone[2]["segments"].tolist() == [1, 1, 0, 0, 0]
    assert alone[2]["positions"].tolist() == [0, 1, 0, 0, 0]
    for name, value in alone.blank().items():
        assert value.tolist() == [99 if name in ("tokens", "targets") else 0] * 5
        assert value.dtype == alone[0][name].dtype == (np.float32 if name == "weights" else np.int32)


# --- as transformers has it -------------------------------------------------------------------


def test_ids_and_masks_are_those_of_transformers(name):
    chat, hf, with_blocks = style(name)
    chats = [TWO_TURNS, TWO_TURNS[:2], [*TWO_TURNS, user("Yes")], [user("Hi\n\n there"), assistant("naïve café\n\nYes: —")]]
    if name != "gemma":
        chats.append(SYSTEM + TWO_TURNS)
    for messages in chats:
        ids, trained = chat.encode(messages)
        assert chat.render(messages) == hf.apply_chat_template(messages, tokenize=False)
        reference_ids, mask = reference(hf, messages, with_blocks)
        assert ids.tolist() == hf.apply_chat_template(messages)["input_ids"] == reference_ids
        assert trained.tolist() == [bool(x) for x in mask]
        assert 0 < trained.sum() < len(ids)


def test_a_template_with_generation_blocks_says_what_is_trained(name):
    chat, hf, with_blocks = style(name)
    told = Chat(chat.tokenizer, with_blocks)
    ids, trained = told.encode(TWO_TURNS)
    reference_ids, mask = reference(hf, TWO_TURNS, with_blocks)
    assert ids.tolist() == reference_ids and trained.tolist() == [bool(x) for x in mask]
    assert told.stop_ids == chat.stop_ids

    # A block around the second answer's content alone: neither the first answer nor any end of a turn.
    odd = plain(CHATML).replace("{{ m.content + ", "{% if loop.index0 == 3 %}{% generation %}{{ m.content }}{% endgeneration %}", 1)
    odd = odd.replace("'<|im_end|>' }}", "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}", 1)
    ids, trained = Chat(style("chatml")[0].tokenizer, odd).encode(TWO_TURNS)
    assert text_of(chat=style("chatml")[0], ids=ids[trained]) == "Then it slept."


def test_a_last_character_of_several_tokens_is_trained_whole():
    """Every byte of the last character is trained on; some versions of transformers leave out all but its first."""
    chat, hf, _ = style("chatml")
    template = blocks(CHATML).replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|im_end|>"
    )
    messages = [user("Yes?"), assistant("Yes 🎉")]
    ids, trained = Chat(chat.tokenizer, template).encode(messages)
    assert text_of(chat, ids[trained]) == "Yes 🎉"
    mask = np.array(reference(hf, messages, template)[1], bool)
    assert mask.any() and not (mask & ~trained).any()


def test_the_prompt_ends_with_the_header_and_begins_the_training_text(name):
    chat, hf, _ = style(name)
    prompt = chat.prompt(TWO_TURNS[:3])
    assert prompt.dtype == np.int32
    assert prompt.tolist() == hf.apply_chat_template(TWO_TURNS[:3], add_generation_prompt=True)["input_ids"]
    ids, trained = chat.encode(TWO_TURNS)
    first = np.flatnonzero(trained[len(prompt) - 2 :])[0] + len(prompt) - 2
    assert first == len(prompt) and ids[:first].tolist() == prompt.tolist()


def test_stop_ids_are_trained_after_every_answer(name):
    chat, hf, _ = style(name)
    assert chat.stop_ids == set(hf.convert_tokens_to_ids(sorted(STYLES[name][4])))
    ids, trained = chat.encode(TWO_TURNS)
    ends = np.flatnonzero(trained & ~np.append(trained[1:], False))  # the last trained token of each answer
    assert len(ends) == 2 and set(ids[ends].tolist()) <= chat.stop_ids


# --- one beginning ----------------------------------------------------------------------------


@pytest.mark.parametrize(("writes", "adds"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_beginning_of_text_stands_where_the_template_writes_one(writes, adds):
    """One was put before templates that write none, because the tokenizer puts one before other texts."""
    template = plain(GEMMA) if writes else plain(GEMMA).replace("{{ bos_token }}", "")
    hf = huggingface("never", STYLES["gemma"][2], adds, template)
    chat = Chat(HuggingFace(hf))
    for ids, messages, generate in (
        (chat.encode(TWO_TURNS)[0], TWO_TURNS, False),
        (chat.prompt(TWO_TURNS[:1]), TWO_TURNS[:1], True),
    ):
        assert ids.tolist() == hf.apply_chat_template(messages, add_generation_prompt=generate)["input_ids"]
        assert ids.tolist().count(hf.bos_token_id) == writes == (ids[0] == hf.bos_token_id)
    assert not chat.encode(TWO_TURNS)[1][0]
    ids = chat.encode([user("<bos> hi"), assistant("Yes")])[0]
    assert ids.tolist().count(hf.bos_token_id) == writes + 1 and chat.spelled == 1


# --- special tokens in a content --------------------------------------------------------------


@pytest.mark.parametrize("name", STYLES)
def test_a_content_that_spells_special_tokens_gets_the_ids_of_transformers(name):
    chat, hf, _ = style(name)
    for special in STYLES[name][2]:
        messages = [user(f"the {special} cat"), assistant(f"It sat {special} on")]
        assert chat.encode(messages)[0].tolist() == hf.apply_chat_template(messages)["input_ids"]
        ids = hf.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
        assert chat.prompt(messages[:1]).tolist() == ids
    assert chat.spelled == 2 * len(STYLES[name][2])


@pytest.mark.parametrize("name", STYLES)
def test_other_keys_of_messages_reach_the_template_as_in_transformers(name):
    chat, hf, _ = style(name)
    messages = [{**user("the cat"), "name": "Ada", "tool_calls": None}, {**assistant("sat"), "reasoning_content": "well"}]
    looks = "{% for m in messages %}{{ m.role + (m.name or '') + m.content + (m.reasoning_content or '') + eos_token }}{% endfor %}"
    ids = Chat(chat.tokenizer, looks).encode(messages)[0].tolist()
    assert ids == hf.apply_chat_template(messages, chat_template=looks)["input_ids"]


def split(chat):
    """The same conversations with special tokens in contents read as text."""
    return Chat(chat.tokenizer, chat.template, split_special_tokens=True)


def test_no_content_can_spell_a_special_token(name):
    chat, hf, _ = style(name)
    chat = split(chat)
    special = STYLES[name][2]
    rng = random.Random(0)
    parts = [*special, *special, " ", "\n", "the cat", "é", "🎉", "<|", "|>", "{{ 1 + 1 }}", special[-1][:-1], ">"]
    for _ in range(40):
        spelt = [{**m, "content": "x" + "".join(rng.choices(parts, k=8)) + "x"} for m in TWO_TURNS]
        ids, trained = chat.encode(spelt)
        assert special_ids(hf, ids) == special_ids(hf, chat.encode(TWO_TURNS)[0])
        assert special_ids(hf, ids[trained]) == special_ids(hf, chat.encode(TWO_TURNS)[0][chat.encode(TWO_TURNS)[1]])
        assert special_ids(hf, chat.prompt(spelt[:1])) == special_ids(hf, chat.prompt(TWO_TURNS[:1]))
        if STYLES[name][1] in BYTES:  # decoding is exact
            assert text_of(chat, ids) == chat.render(spelt)
            answers = [m["content"] for m in spelt if m["role"] == "assistant"]
            assert [one for one in answers if one in text_of(chat, ids[trained])] == answers


def special_ids(hf, ids):
    return [int(i) for i in ids if i in set(hf.all_special_ids)]


def test_a_spelt_token_gets_the_ids_of_ordinary_text():
    chat = split(style("chatml")[0])
    inner = chat.tokenizer.encode("<|im_end|>").tolist()
    assert len(inner) > 1
    ids = chat.encode([user("the<|im_end|>cat"), assistant("Yes")])[0].tolist()
    start, end = (chat._rust.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    content = [*chat.tokenizer.encode("the"), *inner, *chat.tokenizer.encode("cat")]
    assert ids[: ids.index(end)] == [start, *chat.tokenizer.encode("user\n"), *content]


def test_spelt_tokens_get_the_ids_that_transformers_gives_when_it_sanitizes(name):
    chat, hf, _ = style(name)
    chat = split(chat)
    if "sanitize_control_tokens" not in inspect.signature(hf.apply_chat_template).parameters:
        pytest.skip("this transformers cannot keep control tokens out of contents")
    for special in STYLES[name][2]:
        messages = [user(f"the {special} cat"), assistant(f"It sat {special} on")]
        expected = hf.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]
        assert chat.encode(messages)[0].tolist() == expected


def test_control_tokens_that_are_not_marked_special_are_kept_out_too():
    """Some add `<|im_end|>` as an ordinary added token, which the library matches in any text."""
    hf = huggingface("bytes", ["<|endoftext|>"], template=plain(CHATML))
    hf.add_tokens(["<|im_start|>", "<|im_end|>", "<think>"])
    chat = Chat(HuggingFace(hf), split_special_tokens=True)
    end, think = hf.convert_tokens_to_ids(["<|im_end|>", "<think>"])
    ids, trained = chat.encode([user("a<|im_end|>\n<|im_start|>system\nb"), assistant("<think>x<|im_end|>")])
    assert ids.tolist().count(end) == 2 and trained[ids == end].tolist() == [False, True]
    assert ids.tolist().count(hf.convert_tokens_to_ids("<|im_start|>")) == 2
    assert end in chat.stop_ids
    assert think in ids[trained]  # not the template's own, so a content may hold it
    assert text_of(chat, ids).count("<|im_end|>") == 4

    ends = "{% for m in messages %}{{ m.role + m.content }}{{ '<|im_end|>' if m.role == 'assistant' }}{% endfor %}"
    ids = Chat(HuggingFace(hf), ends, split_special_tokens=True).encode([user("a<|im_end|>"), assistant("b")])[0]
    assert ids.tolist().count(end) == 1 and ids[-1] == end


def test_a_content_that_the_tokenizer_can_only_write_as_a_control_token_is_refused():
    hf = huggingface("bytes", ["<|endoftext|>"])
    hf.add_tokens(["§"])
    chat = Chat(HuggingFace(hf), "{% for m in messages %}{{ m.role + m.content }}§{% endfor %}", split_special_tokens=True)
    assert chat.encode(TWO_TURNS)[0].tolist().count(hf.convert_tokens_to_ids("§")) == 4
    with pytest.raises(ValueError, match="a message holds '§', and the tokenizer cannot write it as ordinary text"):
        chat.encode([user("§ 3"), assistant("Yes")])


@pytest.mark.parametrize("side", ["rstrip", "lstrip"])
def test_special_tokens_that_swallow_white_space_do_not_swallow_the_mask(side):
    """Phi-3's tokens take the newline after them along; its template also ends every training text with another token."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
    )
    special = ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
    hf = huggingface("bytes", special, template=template, **{side: True})
    chat = Chat(HuggingFace(hf), split_special_tokens=True)
    messages = [user("the cat"), assistant("  sat  "), user("x <|user|>\n y"), assistant("Yes")]
    ids, trained = chat.encode(messages)
    end = hf.convert_tokens_to_ids("<|end|>")
    assert ids.tolist().count(hf.convert_tokens_to_ids("<|user|>")) == 2
    assert ids.tolist().count(end) == 4 and trained[ids == end].tolist() == [False, True, False, True]
    assert not trained[-1] and ids[-1] == hf.eos_token_id
    assert not trained[ids == hf.convert_tokens_to_ids("<|assistant|>")].any()
    assert chat.stop_ids == {end, hf.eos_token_id}


def test_an_unknown_character_stays_unknown_and_is_no_spelling():
    tokenizer = train_tokenizer(TokenizerConfig("characters"), ["User: Assistant: hello\n"])
    ids, trained = Chat(tokenizer).encode([user("日"), assistant("日o")])
    assert ids.tolist().count(tokenizer.unknown_id) == 2 and ids[trained][1] == tokenizer.unknown_id


def test_an_encoders_tokenizer_begins_with_its_own_token_and_keeps_unknown_words():
    """[UNK] is a special token that any unknown word gets: it is no spelling of one, and must not be an error."""
    import tokenizers
    import transformers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    words = ["[UNK]", "[CLS]", "[SEP]", "[", "]", "sep", "user", "assistant", ":", "yes", "no"]
    rust = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    rust.normalizer, rust.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    rust.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    chat = Chat(HuggingFace(transformers.PreTrainedTokenizerFast(tokenizer_object=rust, **names)), split_special_tokens=True)
    ids, trained = chat.encode([user("日本 [SEP] no [UNK]"), assistant("日本 yes")])
    read = [words[i] for i in ids]
    assert " ".join(read) == "[CLS] user : [UNK] [ sep ] no [UNK] assistant : [UNK] yes [SEP]"
    assert [words[i] for i in ids[trained]] == ["[UNK]", "yes", "[SEP]"]


# --- templates that move, drop and refuse -----------------------------------------------------


def trained_text(template, messages):
    chat = style("chatml")[0]
    chat = Chat(chat.tokenizer, template)
    ids, trained = chat.encode(messages)
    return text_of(chat, ids[trained])


ANSWERS = "It sat on the mat.<|im_end|>Then it slept.<|im_end|>"


def test_a_system_prompt_of_the_templates_own_does_not_matter():
    own = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nIt sat on the mat.<|im_end|>\n' }}{% endif %}" + plain(
        CHATML
    )
    assert trained_text(own, TWO_TURNS) == ANSWERS


def test_a_system_prompt_moved_to_the_last_user_turn_does_not_matter():
    """No earlier rendering is a prefix of the whole one here."""
    moved = (
        "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ messages[0].content if loop.revindex == 2 SYSTEM }}{{ m.content + '<|im_end|>' }}{% endfor %}"
    )
    assert trained_text(moved.replace("SYSTEM", "and messages[0].role == 'system'"), SYSTEM + TWO_TURNS) == ANSWERS
    assert trained_text(moved.replace("SYSTEM", ""), SYSTEM + TWO_TURNS) == ANSWERS


def test_equal_contents_are_told_apart():
    same = [user("It sat."), assistant("It sat."), user("It sat."), assistant("It sat.")]
    chat, _, _ = style("chatml")
    ids, trained = chat.encode(same)
    assert text_of(chat, ids[trained]) == "It sat.<|im_end|>" * 2
    assert np.flatnonzero(trained)[0] > len(ids) // 4


THINKING = (  # in the style of models that reason: earlier turns lose it, the last gets an empty block where it has none
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set c = m.content %}{% if m.role == 'assistant' %}"
    "{% set r = '' %}{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}{% endif %}{{ c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_what_the_template_puts_before_an_answer_is_learnt_with_it():
    empty = "<think>\n\n</think>\n\n"
    assert trained_text(THINKING, TWO_TURNS) == "It sat on the mat.<|im_end|>" + empty + "Then it slept.<|im_end|>"
    ready = THINKING.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")  # the prompt opens the block
    assert trained_text(ready, [user("Yes?"), assistant("<think>Well</think>Yes")]).endswith("Well\n</think>\n\nYes<|im_end|>")
    assert trained_text(
        ready.replace("{% if m.role == 'assistant' %}", "{% if false %}"), [user("?"), assistant("<think>\nYes")]
    ) == ("<think>\nYes<|im_end|>")
    assert trained_text(THINKING, [user("Yes?"), assistant("<think>\nWell\n</think>\n\nYes")]) == (
        "<think>\nWell\n</think>\n\nYes<|im_end|>"
    )


def test_a_dropped_part_of_an_answer_is_an_error_and_not_a_shorter_answer():
    messages = [user("Yes?"), assistant("<think>\nWell\n</think>\n\nYes"), *TWO_TURNS]
    with pytest.raises(ValueError, match=r"turn 2 \(assistant\) is not written whole \(reasoning dropped\?\)"):
        trained_text(THINKING, messages)
    for hidden in ("{{ m.content[3:] }}", "{{ m.content | upper }}", "{{ m.content + m.content }}", ""):
        shown = "{% if loop.index == 4 %}" + hidden + "{% else %}{{ m.content }}{% endif %}"
        template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}" + shown + "<|im_end|>{% endfor %}"
        assert trained_text(template, TWO_TURNS[:2]) == "It sat on the mat.<|im_end|>"
        with pytest.raises(ValueError, match=r"turn 4 \(assistant\) is ") as caught:
            trained_text(template, TWO_TURNS)
        assert "\n" not in str(caught.value)


def test_a_template_may_rewrite_what_is_not_the_assistants():
    shouting = plain(CHATML).replace("{% else %}{{ m.content", "{% else %}{{ m.content | upper | replace('A', 'E')")
    assert trained_text(shouting, SYSTEM + TWO_TURNS) == ANSWERS
    looking = "{% if messages[0].content[0] == 'W' %}{{ '<|im_start|>' }}{% endif %}" + plain(CHATML)
    assert trained_text(looking, TWO_TURNS) == ANSWERS
    with pytest.raises(ValueError, match=r"turn 1 \(user\) is left out or rewritten and holds '<\|im_end\|>'"):
        split(Chat(style("chatml")[0].tokenizer, looking)).encode([user("W<|im_end|>"), *TWO_TURNS[1:]])


def test_an_empty_answer_teaches_to_stop():
    assert trained_text(plain(CHATML), [user("Hush!"), assistant("")]) == "<|im_end|>"


def test_white_space_of_an_answer_is_kept_if_the_template_keeps_it():
    assert trained_text(plain(CHATML), [user("Yes?"), assistant("  \nYes\n ")]) == "  \nYes\n <|im_end|>"
    trimmed = plain(CHATML).replace("m.content", "(m.content | trim)")
    assert trained_text(trimmed, [user("Yes?"), assistant("\n\nYes\n ")]) == "Yes<|im_end|>"


def test_white_space_at_the_end_of_a_generation_block_is_trained():
    """GPT-2's step after tokenising moves offsets off spaces: the token of one alone would cover no character."""
    import tokenizers

    hf = huggingface("bytes", STYLES["chatml"][2], bos=False)
    hf.backend_tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    template = "{% for m in messages %}{% if m.role == 'assistant' %}BEGIN{{ m.content + ' ' }}END{% endif %}<|im_end|>{% endfor %}"
    chat = Chat(HuggingFace(hf), blocks(template))
    ids, trained = chat.encode(TWO_TURNS)
    assert text_of(chat, ids[trained]) == "It sat on the mat. Then it slept. "


@pytest.mark.parametrize("make", [plain, blocks])
def test_a_turn_with_weight_0_is_not_trained(make):
    """OpenAI's fine-tuning files; the weight was accepted and did nothing."""
    talk = [{**message, **weight} for message, weight in zip(TWO_TURNS, [{}, {"weight": 0}, {}, {"weight": 1}], strict=True)]
    assert trained_text(make(CHATML), talk) == "Then it slept.<|im_end|>"
    with pytest.raises(ValueError, match="nothing to train"):
        trained_text(make(CHATML), talk[:2])


def test_two_answers_in_a_row_and_an_answer_first():
    assert trained_text(plain(CHATML), [assistant("It sat on the mat."), assistant("Then it slept.")]) == ANSWERS


def test_a_template_without_a_generation_prompt_gets_its_header_from_the_turn():
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    chat = Chat(style("chatml")[0].tokenizer, template)
    assert chat.prompt(TWO_TURNS[:3]).tolist() == style("chatml")[0].prompt(TWO_TURNS[:3]).tolist()
    assert trained_text(template, TWO_TURNS) == ANSWERS


def test_a_turn_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"writes '\\n' after the assistant's content, which holds no special token") as caught:
        trained_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", TWO_TURNS)
    assert "{{ eos_token }}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Only\nfor tools') }}", "chat template: Only for tools"),
        ("{% for m in messages %}", "chat template: Unexpected end of template"),
        ("{{ messages[7].content }}", "chat template: list object has no element 7"),
        ("{{ messages[0].content + 1 }}", "chat template: can only concatenate str"),
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "chat template: access to attribute '__class__' of 'str' object is unsafe",
        ),
        ("{{ messages.append(1) }}", "chat template: .*unsafe"),
        ("{{ messages[0].content }}", "chat template: writes the assistant's content 0 times"),
    ],
)
def test_a_template_is_data_and_its_errors_are_one_line(template, message):
    with pytest.raises(ValueError, match=message) as caught:
        bytes_chat(template)
    assert "\n" not in str(caught.value)


def test_a_template_refuses_a_conversation_in_one_line():
    with pytest.raises(ValueError, match=r"^chat template: No system turn here$"):
        style("gemma")[0].render(SYSTEM + TWO_TURNS)


def test_of_several_templates_the_default_one_is_taken():
    hf = huggingface("bytes", STYLES["chatml"][2], bos=False, template={"default": plain(CHATML), "tool_use": "x"})
    assert Chat(HuggingFace(hf)).encode(TWO_TURNS)[0].tolist() == style("chatml")[0].encode(TWO_TURNS)[0].tolist()
    hf.chat_template = {"tool_use": "x", "rag": "y"}
    with pytest.raises(ValueError, match="chat templates named tool_use, rag and none named 'default'"):
        Chat(HuggingFace(hf))


# --- messages and rows ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"f:3: expected a list of messages"),
        ({"role": "user", "content": "x"}, r"f:3: expected a list of messages"),
        (["x"], r"f:3, turn 1: expected a message with role and content, got 'x'"),
        ([user("x"), {"from": "gpt", "value": "y"}], r"f:3, turn 2: has no 'role', only 'from', 'value'"),
        ([{"role": "assistent", "content": "y"}], r"unknown role in f:3, turn 1: 'assistent': did you mean 'assistant'\?"),
        ([{"role": "assistant", "content": None}], r"f:3, turn 1 \(assistant\): content must be text, got None"),
        ([user("x")], r"f:3: no turn is the assistant's"),
    ],
)
def test_messages_are_checked(messages, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_messages(messages, "f:3")
    assert "\n" not in str(caught.value)


def test_checked_messages_are_plain_and_have_utf8():
    given = [{"role": "user", "content": "a\ud800b", "id": 7}, assistant("c")]
    assert check_messages(given, "f") == [{**user("a?b"), "id": 7}, assistant("c")]
    assert check_messages(given[:1], "f", training=False) == [{**user("a?b"), "id": 7}]
    assert bytes_chat().render(given[:1]) == "<|endoftext|>User: a?b\n"


def test_marks_are_not_taken_for_a_users_text():
    odd = "".join(chr(code) for code in range(0xFDD0, 0xFDED)) + "0" + "\ufdd2"
    ids, trained = bytes_chat().encode([user(odd), assistant(odd)])
    assert bytes(ids[trained][1:-1].tolist()).decode() == odd
    with pytest.raises(ValueError, match="noncharacters"):
        bytes_chat().encode([user(odd + "\ufded"), assistant("x")])


def test_every_trained_target_of_a_conversation_lies_in_exactly_one_row():
    rng = np.random.default_rng(0)
    encoded = []
    for at in range(40):
        n = int(rng.integers(2, 30))
        encoded.append((np.arange(n, dtype=np.int32) + 100 * at, np.arange(n) >= rng.integers(1, n)))
    encoded[7] = (np.array([700, 701], np.int32), np.array([True, False]))  # a first token is no target
    for packed in (True, False):
        rows = pack_chats(encoded, 16, pad_id=-1, packed=packed)
        got = sorted(int(t) for row in map(rows.__getitem__, range(len(rows))) for t in row["targets"][row["weights"] > 0])
        assert got == sorted(int(t) for ids, trained in encoded for t in ids[1:17][trained[1:17]])
        assert rows.cut == sum(len(ids) > 17 for ids, _ in encoded) > 0
        assert rows.dropped == sum(not trained[1:17].any() for _, trained in encoded) > 0
        for row in map(rows.__getitem__, range(len(rows))):
            filled = row["segments"] > 0
            np.testing.assert_array_equal(row["targets"][filled], row["tokens"][filled] + 1)  # never across two
            np.testing.assert_array_equal(row["positions"][filled], row["tokens"][filled] % 100)
            np.testing.assert_array_equal(row["tokens"][~filled], -1)
            assert packed or row["segments"].max() == 1
        assert len(rows) < 30 if packed else len(rows) == 40 - rows.dropped


def test_rows_too_short_for_any_answer_are_refused():
    ids, trained = np.arange(9, dtype=np.int32), np.arange(9) >= 7
    with pytest.raises(ValueError, match="none of 1 conversations has a trained token within a row of 4"):
        pack_chats([(ids, trained)], 4, pad_id=0)
    assert len(pack_chats([], 4, pad_id=0)) == 0


# --- real conversations -----------------------------------------------------------------------


def conversations(data):
    """100 of them: tasks with their answers, threads of a message tree, dialogues."""
    chats = []
    for line in (data / "ref-sft-instructions" / "seed_tasks.jsonl").read_text(encoding="utf8").splitlines()[:30]:
        task = json.loads(line)
        one = task["instances"][0]
        chats.append([user("\n\n".join(filter(None, [task["instruction"], one["input"]]))), assistant(one["output"])])
    nodes = json.loads((data / "ref-sft-instructions" / "oasst_realistic_seed_data.json").read_text(encoding="utf8"))
    by_id = {node["user_message_id"]: node for node in nodes}
    for leaf in [node for node in nodes if node["role"] == "assistant"][:30]:
        thread = []
        while leaf is not None:
            thread.append((user if leaf["role"] == "prompter" else assistant)(leaf["text"]))
            leaf = by_id.get(leaf["parent_message_id"])
        chats.append(thread[::-1])
    for line in (data / "dialogue-xdailydialog" / "zh_test.txt").read_text(encoding="utf8").splitlines()[:40]:
        turns = [turn for turn in line.split("\t")[0].split("__eou__") if turn.strip()]
        chats.append([(assistant if i % 2 else user)(turn) for i, turn in enumerate(turns)])
    return chats


@pytest.mark.realdata
def test_a_hundred_real_conversations(data, name):
    chat, hf, with_blocks = style(name)
    chats = conversations(data)
    assert len(chats) == 100 and sum(len(one) for one in chats) > 400
    for messages in chats:
        ids, trained = chat.encode(messages)
        reference_ids, mask = reference(hf, messages, with_blocks)
        assert ids.tolist() == reference_ids
        assert trained.tolist() == [bool(x) for x in mask]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        learnt = text_of(chat, ids[trained])
        assert "".join(learnt.replace(STYLES[name][2][-1], "").split()).startswith("".join(answers[0].split()))
        assert sum(trained[ids == end].sum() for end in chat.stop_ids) == len(answers)
