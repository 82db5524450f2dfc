import json

import pytest

from distill_jax.artifacts import InputError
from distill_jax.data import Rejects, train_tokenizer
from distill_jax.posttraining import (
    CHATML,
    LLAMA3,
    DpoConfig,
    Pair,
    Preference,
    RewardModelConfig,
    encode_pair,
    encode_prompt,
    read_pairs,
    to_preference,
)

ASKED = {"role": "user", "content": "2 + 2?"}
SYSTEM = {"role": "system", "content": "Be short."}
RIGHT, WRONG = ({"role": "assistant", "content": text} for text in ("4", "5"))
EARLIER = [ASKED, RIGHT, {"role": "user", "content": "Really?"}]
# The record, and the conversation before its answers "4" and "5".
FORMS = {
    "texts": ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, [ASKED]),
    "messages": ({"prompt": [SYSTEM, ASKED], "chosen": [RIGHT], "rejected": [WRONG]}, None),
    "conversations": ({"chosen": [SYSTEM, ASKED, RIGHT], "rejected": [SYSTEM, ASKED, WRONG]}, None),
    "conversations and their prompt, as a text": (
        {"prompt": "2 + 2?", "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
        [ASKED],
    ),
    "conversations and their prompt, as messages": (
        {
            "prompt": [SYSTEM, ASKED],
            "chosen": [SYSTEM, ASKED, RIGHT],
            "rejected": [SYSTEM, ASKED, WRONG],
        },
        None,
    ),
    "conversations behind a system's message": (
        {"prompt": [SYSTEM], "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
        None,
    ),
    "a system's message apart, prompt as a text": (
        {"system": "Be short.", "prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        None,
    ),
    "a system's message apart, conversations": (
        {"system": "Be short.", "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
        None,
    ),
    "a system's message apart and in the conversations": (
        {
            "system": "Be short.",
            "chosen": [SYSTEM, ASKED, RIGHT],
            "rejected": [SYSTEM, ASKED, WRONG],
        },
        None,
    ),
    "a system's message with the answers": (
        {"prompt": "2 + 2?", "chosen": [SYSTEM, RIGHT], "rejected": [SYSTEM, WRONG]},
        None,
    ),
    "a system's message with the prompt, and conversations without": (
        {"prompt": [SYSTEM, ASKED], "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
        None,
    ),
    "conversations that go on behind an answer": (
        {
            "prompt": "2 + 2?",
            "chosen": [RIGHT, EARLIER[2], RIGHT],
            "rejected": [RIGHT, EARLIER[2], WRONG],
        },
        EARLIER,
    ),
    "a prompt that is one message": ({"prompt": ASKED, "chosen": "4", "rejected": "5"}, [ASKED]),
    "several turns": ({"chosen": [*EARLIER, RIGHT], "rejected": [*EARLIER, WRONG]}, EARLIER),
    "sharegpt, answers apart": (
        {
            "system": "Be short.",
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        None,
    ),
    "alpaca": ({"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5"}, [ASKED]),
    "by column": (
        {
            "chosen": {"role": ["user", "assistant"], "content": ["2 + 2?", "4"]},
            "rejected": {"role": ["user", "assistant"], "content": ["2 + 2?", "5"]},
        },
        [ASKED],
    ),
}


@pytest.mark.parametrize(("record", "prompt"), FORMS.values(), ids=FORMS)
def test_every_form_is_the_same_preference(record, prompt):
    assert to_preference(record) == Preference(prompt or [SYSTEM, ASKED], "4", "5")


BAD = [
    ({"prompt": "a", "chosen": "b"}, "'rejected' is missing, empty, or no list"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen 0: empty"),
    ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt 0: empty"),
    ({"prompt": 5, "chosen": "a", "rejected": "b"}, "'prompt' is missing, empty, or no list"),
    ({"chosen": "a", "rejected": "b"}, "the fields chosen, rejected hold no conversation"),
    ({"chosen": [RIGHT], "rejected": [WRONG]}, "the fields chosen, rejected hold no conv"),
    ({"chosen": [ASKED, RIGHT], "rejected": [ASKED]}, "rejected: not one message of the assis"),
    ({"chosen": [ASKED, RIGHT], "rejected": [ASKED, SYSTEM]}, "rejected: not one message"),
    ({"chosen": [ASKED, RIGHT, ASKED, RIGHT], "rejected": [ASKED, WRONG]}, "chosen: not one"),
    ({"prompt": [ASKED, WRONG], "chosen": [RIGHT], "rejected": [WRONG]}, "has been answered"),
    ({"prompt": "a", "chosen": [RIGHT, RIGHT], "rejected": [RIGHT, WRONG]}, "has been answered"),
    ({"chosen": [SYSTEM, RIGHT], "rejected": [SYSTEM, WRONG]}, "hold no conversation"),
    ({"prompt": [SYSTEM], "chosen": "a", "rejected": "b"}, "nothing is asked"),
    (
        {
            "prompt": [{**SYSTEM, "content": "Be long."}, ASKED],
            "chosen": [SYSTEM, RIGHT],
            "rejected": [SYSTEM, WRONG],
        },
        "another system message",
    ),
    ({"system": 5, "prompt": "a", "chosen": "b", "rejected": "c"}, "system: not a text"),
    ({"prompt": "a", "chosen": {"role": 1, "content": "b"}, "rejected": "c"}, "the role 1 is none"),
    ({"prompt": "a", "chosen": "b\ud83d", "rejected": "c"}, "chosen 0: not Unicode text"),
    ({"a\ud83d": "a", "chosen": "b", "rejected": "c"}, r"the fields a\\ud83d, chosen, rejected"),
    ({"prompt": "a", "chosen": [{"role": "robot", "content": "b"}], "rejected": "c"}, "'robot'"),
]


@pytest.mark.parametrize(("record", "complaint"), BAD)
def test_what_is_no_preference_is_refused_in_one_line(record, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        to_preference(record)
    assert "\n" not in str(caught.value)


def test_files_become_pairs_and_bad_rows_are_refused_or_skipped(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    long = {"prompt": "2 + 2?", "chosen": "a " * 100, "rejected": "5"}
    records = [record for record, _ in (*FORMS.values(), *BAD)] + [long]
    path.write_text("\n".join(map(json.dumps, records)))
    skipping = DpoConfig(pairs=(str(path), "samples"), bad_rows="skip", sequence_length=100)
    assert skipping.uses_samples
    rejects = Rejects(skipping.bad_rows)
    assert list(read_pairs(tokenizer, skipping, None, rejects)) == [
        encode_pair(tokenizer, prompt or [SYSTEM, ASKED], "4", "5") for _, prompt in FORMS.values()
    ]
    assert len(rejects.messages) == len(BAD) + 1
    "".join(rejects.messages).encode()  # they can be written to a file
    last = f"line {len(records)}: prompt and chosen answer are "
    assert last in rejects.messages[-1]
    refusing = DpoConfig(pairs=str(path), sequence_length=100)
    with pytest.raises(InputError, match=rf"pairs\.jsonl: line {len(FORMS) + 1}: 'rejected' is"):
        list(read_pairs(tokenizer, refusing, None, Rejects(refusing.bad_rows)))


@pytest.mark.parametrize("config", [DpoConfig, RewardModelConfig])
def test_answers_are_written_as_the_template_writes_them(tmp_path, config):
    """Llama 3's template trims; a reward model reads the end of the turn too."""
    specials = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = train_tokenizer(["What is 2 + 2?", "4 user assistant"], 300, specials=specials)
    path = tmp_path / "pairs.jsonl"
    records = [
        {"prompt": "2 + 2?", "chosen": " 4\n", "rejected": "\n5 or 6 "},
        {"prompt": "2 + 2?", "chosen": " 4\n", "rejected": "4"},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    rejects = Rejects("skip")
    pairs = read_pairs(tokenizer, config(pairs=str(path)), LLAMA3, rejects)
    end = [tokenizer.token_id("<|eot_id|>")] if config is RewardModelConfig else []
    answers = ([*tokenizer.encode(text), *end] for text in ("4", "5 or 6"))
    assert list(pairs) == [Pair(encode_prompt(tokenizer, [ASKED], LLAMA3), *answers)]
    assert [message.split(": ")[-1] for message in rejects.messages] == [
        "chosen and rejected are the same"
    ]


def test_only_a_special_token_is_taken_from_an_answers_end(tokenizer):
    prompt = [SYSTEM, *EARLIER]
    kept = encode_pair(tokenizer, prompt, " 4\n", "4<|im_end|>", CHATML)
    assert kept[1:] == (tokenizer.encode(" 4\n"), tokenizer.encode("4<|im_end|>"))
    lines = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    lines += "{% if add_generation_prompt %}assistant: {% endif %}"
    for ended in (False, True):
        pair = encode_pair(tokenizer, prompt, "4", "5", lines, ended=ended)
        assert pair[1:] == (tokenizer.encode("4\n"), tokenizer.encode("5\n"))
    silent = CHATML.replace("{{ message['content'] + '<|im_end|>' }}{% endgen", "{% endgen")
    assert encode_pair(tokenizer, [ASKED], "4", "5", silent)[1:] == ([], [])


def test_a_template_that_writes_the_prompt_anew_is_refused(tokenizer):
    thinking = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    with pytest.raises(InputError, match="what stands before it is written anew"):
        encode_pair(tokenizer, [ASKED], "4", "5", thinking)
