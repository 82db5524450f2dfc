"""What a person is shown of a store, held against the teacher itself."""

import collections
import io

import numpy as np
import pytest
import rich.console
import scipy.special
import scipy.stats

from distill_jax import teachers
from distill_jax.artifacts import InputError

from .known import TIME, ListCorpus, make_corpus, make_teacher

ROWS = 6


class Tokenizer:
    fingerprint = "tokenizer-a"

    @staticmethod
    def decode(ids):
        return "".join(f" {id_}" for id_ in ids)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A top-k and a threshold store of one teacher: their directories."""
    place = tmp_path_factory.mktemp("inspected")
    schemes = {"top_k": teachers.TopK(k=5), "threshold": teachers.Threshold(tau=0.1)}
    directories = {name: place / name for name in schemes}
    teacher = make_teacher()
    teachers.write_stores(
        directories,
        schemes,
        teacher.model,
        make_corpus(ROWS),
        config=teachers.WriteConfig(batch_rows=2, rows_per_shard=4),
        hidden_states=teacher.hidden_states,
    )
    return directories


def probabilities():
    """The teacher's, after each id, [V, V]."""
    return scipy.special.softmax(make_teacher().table.astype(np.float64), axis=-1)


def real_tokens():
    return [tokens[segments > 0] for tokens, segments in make_corpus(ROWS).rows]


def test_figures_are_the_teachers(stores):
    found = teachers.describe(stores["threshold"])
    p = probabilities()
    rows = real_tokens()
    said = np.concatenate([p[row] for row in rows])
    surprise = np.concatenate([-np.log(p[row[:-1], row[1:]]) for row in rows])
    assert found["tokens"] == len(said)
    assert found["mean_entropy"] == pytest.approx(scipy.stats.entropy(said, axis=-1).mean(), 0.02)
    assert found["teacher_cross_entropy"] == pytest.approx(surprise.mean(), 0.01)
    assert found["mean_ids"] == pytest.approx(np.minimum(said / 0.1, 1).sum(-1).mean(), 0.05)

    stored = [teachers.open_store(stores["threshold"])[row]["targets"] for row in range(ROWS)]
    counts = collections.Counter(
        int(count)
        for row, arrays in zip(rows, stored)
        for count in np.count_nonzero(arrays["weights"][: len(row)], axis=-1)
    )
    assert found["ids_per_token"] == pytest.approx({n: c / len(said) for n, c in counts.items()})
    records = sum(size for part, size in found["bytes_per_token"].items() if part != "on_disk")
    assert 1 < records < found["bytes_per_token"]["on_disk"] == found["bytes"] / len(said)


def test_a_row_is_shown_with_its_runners_up(stores):
    # Of another corpus that has only some of the rows: found by content.
    corpus = ListCorpus(make_corpus(ROWS).rows[3:5])
    found = teachers.describe_row(
        stores["top_k"], corpus, Tokenizer(), 1, tokens=TIME, runners_up=3
    )
    row, p = real_tokens()[4], probabilities()
    assert found["key"] == corpus[1]["key"]
    assert [one["token"] for one in found["tokens"]] == [f" {id_}" for id_ in row]
    assert [one["next"] for one in found["tokens"]] == [*(f" {id_}" for id_ in row[1:]), None]
    for place, one in enumerate(found["tokens"]):
        said = p[row[place]]
        best = np.argsort(-said)[:3]
        assert [text for text, _ in one["likeliest"]] == [f" {id_}" for id_ in best]
        assert [share for _, share in one["likeliest"]] == pytest.approx(said[best], rel=3e-4)
        assert one["entropy"] == pytest.approx(scipy.stats.entropy(said), abs=1 / 32)
    # Stored on a grid of 1/32 nat.
    for place, one in enumerate(found["tokens"][:-1]):
        wanted = np.log(p[row[place], row[place + 1]])
        assert np.log(one["next_probability"]) == pytest.approx(wanted, abs=1 / 32)
    assert found["tokens"][-1]["next_probability"] is None
    few = teachers.describe_row(stores["threshold"], corpus, Tokenizer(), 1, tokens=2)
    assert len(few["tokens"]) == 2
    assert all(share > 0 for one in few["tokens"] for _, share in one["likeliest"])


def test_a_row_that_is_not_there_is_refused(stores):
    store = stores["top_k"]
    ask = lambda corpus, tokenizer, row: teachers.describe_row(store, corpus, tokenizer, row)  # noqa: E731
    with pytest.raises(InputError, match="row 6: the corpus has rows 0 to 5"):
        ask(make_corpus(ROWS), Tokenizer(), 6)
    with pytest.raises(InputError, match=r"has no row of content .* \(row 2\)"):
        ask(make_corpus(ROWS, seed=9), Tokenizer(), 2)
    other = Tokenizer()
    other.fingerprint = "tokenizer-b"
    with pytest.raises(InputError, match="has tokenizer tokenizer-a, the given one is tokenizer-b"):
        ask(make_corpus(ROWS), other, 0)
    corpus = make_corpus(ROWS)
    corpus.tokenizer_fingerprint = "tokenizer-c"
    with pytest.raises(InputError, match="the corpus one is tokenizer-c"):
        ask(corpus, Tokenizer(), 0)


def test_a_person_reads_it(stores):
    class Hostile(Tokenizer):
        @staticmethod
        def decode(ids):
            return f"[red]{ids[0]}\x1b"

    found = teachers.describe(stores["threshold"])
    wide = dict.fromkeys(range(1, 51), 0.02)
    row = teachers.describe_row(stores["threshold"], make_corpus(ROWS), Hostile(), 0)
    out = io.StringIO()
    console = rich.console.Console(file=out, width=200, markup=False, highlight=False)
    teachers.show({**found, "row": row}, console)
    said = out.getvalue()
    for text in ("threshold, tau 0.1", f"{found['mean_ids']:.2f}", "label_log_prob", "on_disk"):
        assert text in said
    assert f"{found['teacher_cross_entropy']:.3f} nats" in said
    assert f"'[red]{real_tokens()[0][0]}\\x1b'" in said
    assert "\x1b" not in said
    # A bar for every number of ids, the longest 40 wide.
    bars = [line for line in said.splitlines() if "█" in line]
    assert max(line.count("█") for line in bars) == 40
    assert sum(float(line.split()[-2].rstrip("%")) for line in bars) == pytest.approx(100, abs=1)

    out.truncate(0)
    teachers.show({**found, "ids_per_token": wide}, console)
    bars = [line.split() for line in out.getvalue().splitlines() if "█" in line]
    assert [line[:3] for line in bars[:2]] == [["1", "to", "4"], ["5", "to", "8"]]
    assert len(bars) == 13
    assert bars[-1][:4] == ["49", "to", "50", "4.0%"]
