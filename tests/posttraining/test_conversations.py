import json

import pytest

from distill_jax.artifacts import InputError
from distill_jax.data import Rejects
from distill_jax.posttraining import SftConfig, encode_chat, read_examples, to_conversation

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6"},
]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
TURNS = [{"from": NAMES[one["role"]], "value": one["content"]} for one in CHAT]
FORMS = {
    "messages": {"messages": CHAT, "id": 7},
    "messages, as a table has them": {"messages": [{**one, "name": None} for one in CHAT]},
    "messages, as TFDS has them": {"messages": {k: [m[k] for m in CHAT] for k in CHAT[0]}},
    "sharegpt": {"conversations": TURNS},
    "sharegpt, system apart": {"system": "Be short.", "conversations": TURNS[1:]},
    "sharegpt, with the names of messages": {"conversations": CHAT},
    "alpaca": {
        "system": "Be short.",
        "history": [["2 + 2?", "4"]],
        "instruction": "And 3 + 3?",
        "input": "",
        "output": "6",
    },
}


ONE = {"role": "assistant", "content": "4"}


def test_a_single_message_stands_for_a_list_of_one():
    assert to_conversation({"messages": ONE}) == [ONE]
    named = {"conversations": {"from": "gpt", "value": "4", "tags": ["a", "b"]}}
    assert to_conversation(named) == [ONE]


@pytest.mark.parametrize("record", FORMS.values(), ids=FORMS)
def test_every_form_is_the_same_conversation(record):
    assert to_conversation(record) == CHAT


def test_alpacas_input_stands_below_its_instruction():
    record = {"instruction": "Add.", "input": "3 and 4", "output": "7"}
    question, answer = to_conversation(record)
    assert question == {"role": "user", "content": "Add.\n\n3 and 4"}
    assert answer == {"role": "assistant", "content": "7"}


def test_the_form_is_said_where_fields_show_two():
    record = {"messages": CHAT, "instruction": "a", "output": "b"}
    with pytest.raises(InputError, match="could be messages or alpaca, say which"):
        to_conversation(record)
    assert to_conversation(record, "messages") == CHAT
    assert len(to_conversation(record, "alpaca")) == 2


def turns(**changed):
    return {"messages": [CHAT[1], {**CHAT[2], **changed}]}


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"text": "a", "id": 1}, "the fields text, id hold no conversation"),
        ({}, "the fields - hold no conversation"),
        ({"messages": []}, "'messages' is missing, empty, or no list"),
        ({"messages": "a"}, "'messages' is missing, empty, or no list"),
        ({"messages": {}}, "'messages' is missing, empty, or no list"),
        ({"messages": {"role": [], "content": []}}, "'messages' is missing, empty, or no list"),
        ({"messages": {"role": "user", "content": "hi"}}, "no message is the assistant's"),
        ({"messages": {"role": 1}}, "messages 0: the role 1 is none of"),
        ({"messages": {"role": "user", "content": ["hi"]}}, "messages 0: not a text"),
        ({"messages": {"role": ["user"], "content": []}}, r"messages 0: the role \['user'\] is"),
        ({"messages": ["a"]}, "messages 0: not a message but str"),
        ({"messages": [{"content": "a"}]}, "messages 0: role is missing"),
        ({"messages": [{"role": "user"}]}, "messages 0: content is missing"),
        (turns(role="robot"), "messages 1: the role 'robot' is none of system, user"),
        (turns(role=["user"]), r"messages 1: the role \['user'\] is none of"),
        (turns(content=" \n"), "messages 1: empty"),
        (turns(content=4), "messages 1: not a text"),
        (turns(tool_calls=[{}]), "messages 1: tool calls and weights"),
        (turns(weight=0), "messages 1: tool calls and weights"),
        ({"messages": CHAT[:2]}, "no message is the assistant's"),
        ({"conversations": [{"from": "human", "value": ""}]}, "conversations 0: empty"),
        ({"instruction": "a"}, "output: missing"),
        ({"instruction": "a", "output": ""}, "output: empty"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "history 0: not a pair"),
        ({"instruction": "a", "output": "b", "input": 3}, "input: not a text"),
        ({"instruction": "a", "output": "b", "history": 5}, "history: not a list"),
        ({"instruction": "a", "output": "b", "history": {"c": "d"}}, "history: not a list"),
        ({"instruction": "a", "output": "b", "system": "\ud83d"}, "system: not Unicode text"),
        (turns(content="a\ud83d"), r"messages 1: not Unicode text \(surrogates not allowed\)"),
        ({"a\ud83d": 1}, r"the fields a\\ud83d hold no conversation"),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_line(record, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        to_conversation(record)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_files_become_the_tokens_of_their_conversations(tokenizer, tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.json"
    first.write_text("\n".join(json.dumps(record) for record in FORMS.values()))
    second.write_text(json.dumps([{"instruction": "Add.", "input": "3 and 4", "output": "7"}]))
    config = SftConfig(data=(str(first), "task", str(second)), sequence_length=160)
    assert config.uses_task
    examples = list(read_examples(tokenizer, config, Rejects()))
    last = [
        {"role": "user", "content": "Add.\n\n3 and 4"},
        {"role": "assistant", "content": "7"},
    ]
    assert examples == [encode_chat(tokenizer, CHAT)] * len(FORMS) + [encode_chat(tokenizer, last)]


BAD = [
    ('{"messages"', "line 2: not JSON"),
    (json.dumps(turns(content="")), "line 2: messages 1: empty"),
    (json.dumps(turns(role="robot")), "line 2: messages 1: the role 'robot'"),
    (json.dumps(turns(role=None)), "line 2: messages 1: role is missing"),
    (json.dumps(turns(content="a\ud83d")), "line 2: messages 1: not Unicode text"),
    (json.dumps(turns(content="a " * 200)), r"line 2: \d+ tokens do not fit in 64"),
    (json.dumps(turns(content="\ufdd0")), r"line 2: message: holds the noncharacter U\+FDD0"),
]


@pytest.mark.parametrize(("line", "complaint"), BAD)
def test_a_bad_row_is_refused_with_its_file_and_line(tokenizer, tmp_path, line, complaint):
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps(turns())}\n{line}\n{json.dumps(turns())}\n")
    config = SftConfig(data=str(path), sequence_length=64)
    with pytest.raises(InputError, match=rf"chats\.jsonl: {complaint}") as caught:
        list(read_examples(tokenizer, config, Rejects(config.bad_rows)))
    assert "\n" not in str(caught.value)


def test_bad_rows_are_skipped_and_counted_where_the_recipe_says_so(tokenizer, tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [json.dumps(turns()), *(line for line, _ in BAD), json.dumps(turns(content="5"))]
    path.write_text("\n".join(lines))
    config = SftConfig(data=str(path), bad_rows="skip", sequence_length=64)
    rejects = Rejects(config.bad_rows)
    said = [
        tokenizer.decode(example.tokens) for example in read_examples(tokenizer, config, rejects)
    ]
    assert ["4<|im_end|>" in said[0], "5<|im_end|>" in said[1], len(said)] == [True, True, 2]
    assert [message.split(": ")[1] for message in rejects.messages] == [
        f"line {number}" for number in range(2, 9)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"form": "openai"}, "form is 'openai'"), ({"bad_rows": "drop"}, "bad_rows is 'drop'")],
)
def test_a_config_that_cannot_be_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        SftConfig(**change)
