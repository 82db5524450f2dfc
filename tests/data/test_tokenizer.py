import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import data
from distill_jax.artifacts import InputError

examples = settings(derandomize=True, deadline=None, max_examples=100)


@pytest.mark.slow
@given(text=st.text())
@examples
def test_decode_of_encode_is_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text())
@examples
def test_a_stream_gives_the_text_piece_by_piece(tokenizer, text):
    text = text.replace("\ufffd", "")  # stands for a character that is not whole yet
    piece = tokenizer.stream()
    so_far = ""
    for id_ in tokenizer.encode(text):
        so_far += piece(id_)
        assert text.startswith(so_far)
    assert so_far == text


def test_special_tokens_in_text_stay_text(tokenizer):
    text = "a<|end_of_text|>b"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text
    a, b = tokenizer.token_id("a"), tokenizer.token_id("b")
    assert tokenizer.encode(text, special=True) == [a, tokenizer.eos_id, b]
    assert tokenizer.encode(text) == ids  # parsing once leaves no trace
    assert tokenizer.special_tokens == {"<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"}


def test_encode_batch_is_encode_of_each(tokenizer, passages):
    expected = [tokenizer.encode(text, bos=True) for text in passages]
    assert tokenizer.encode_batch(passages, bos=True) == expected
    assert all(ids[0] == tokenizer.bos_id for ids in expected)


def test_trained_ids_are_specials_then_bytes_then_merges():
    trained = data.train_tokenizer(["aaaa aaaa"], 261, specials=["<|x|>"])
    assert [trained.bos_id, trained.eos_id, trained.pad_id, trained.token_id("<|x|>")] == [
        0,
        1,
        2,
        3,
    ]
    assert trained.vocab_size == 261
    assert trained.encode("aa") == [260]  # the one merge there is room for
    assert trained.adds_bos


def test_training_again_gives_the_same_tokenizer(passages):
    first, second = (data.train_tokenizer(passages, 400) for _ in range(2))
    assert first.fingerprint == second.fingerprint


def test_fingerprint_tells_vocabularies_apart_and_ignores_roles(tokenizer, passages, tmp_path):
    other = data.train_tokenizer(passages[::-1][:20], 330)
    assert other.vocab_size == tokenizer.vocab_size
    assert other.fingerprint != tokenizer.fingerprint
    tokenizer.save(tmp_path)
    config_path = tmp_path / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) | {"eos_token": "<|pad|>", "chat_template": "x"}
    config_path.write_text(json.dumps(config))
    renamed = data.load_tokenizer(tmp_path)
    assert renamed.eos_id == tokenizer.pad_id
    assert renamed.fingerprint == tokenizer.fingerprint


def test_fingerprint_sees_merges_and_specials(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    specification = json.loads(path.read_text())
    seen = {tokenizer.fingerprint}
    merges = specification["model"]["merges"]
    for change in ("merges", "specials"):
        if change == "merges":
            specification["model"]["merges"] = [merges[1], merges[0], *merges[2:]]
        else:
            specification["added_tokens"][2]["special"] = False
        path.write_text(json.dumps(specification))
        seen.add(data.load_tokenizer(tmp_path).fingerprint)
    assert len(seen) == 3


def test_save_and_load_keep_everything(tokenizer, passages, tmp_path):
    tokenizer.save(tmp_path / "new")
    again = data.load_tokenizer(tmp_path / "new")
    assert again.encode_batch(passages) == tokenizer.encode_batch(passages)
    for name in ("bos_id", "eos_id", "pad_id", "adds_bos", "chat_template", "fingerprint"):
        assert getattr(again, name) == getattr(tokenizer, name), name


@pytest.mark.slow
def test_transformers_reads_what_save_writes(tokenizer, passages, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save(tmp_path)
    tokenizer.chat_template = None
    # The export's folder has a model's configuration too, which must not change the class.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*passages, "x<|end_of_text|>\n\n  y"]:
        expected = tokenizer.encode(text, bos=True, special=True)
        assert theirs(text)["input_ids"] == expected
        assert theirs.decode(expected) == "<|begin_of_text|>" + text
    assert theirs.bos_token_id == tokenizer.bos_id
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs.pad_token_id == tokenizer.pad_id
    message = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(message, tokenize=False) == "hi"


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(InputError, match=r"vocab_size: 258 is less than the 256 bytes and 3"):
        data.train_tokenizer(["a"], 258)


def test_bos_is_refused_without_one(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    bare = data.load_tokenizer(tmp_path)
    assert (bare.bos_id, bare.eos_id, bare.pad_id, bare.adds_bos) == (None, None, 0, False)
    with pytest.raises(InputError, match="no beginning-of-text token"):
        bare.encode("a", bos=True)
