import json
import pathlib
import socket
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import cli, commands, data, models, parallel

TINY = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.py"], "nowhere.py: no such file"),
        (["run", TINY, "--set", "distill.train.step=3"], "unknown field 'step'"),
        (["run", TINY, "--set", "prune.target.layers=99"], "layers"),
        (["distill", TINY], "run the stage"),
        (["distill", TINY, "--profile", "9:3"], "--profile 9:3: write the first and the last step"),
        (["search", TINY, "--parameters", "4e5"], "corpus: this stage has not been run"),
        (["search", TINY, "--parameters", "4e5", "--rows", "0"], "rows is 0"),
        (["compile", TINY, "--topology", "v5e"], "write chip and sizes, such as v5e:16x16"),
        (["compile", TINY, "--topology", "v9z:4x4"], "'v9z' is none of v5e, v5p, v6e"),
        (["compile", TINY, "--topology", "v5e:3x5"], "sizes of v5e are"),
        (["compile", TINY, "--topology", "v5e:4x4", "--mesh", "model=2"], "'model' is none of"),
        (["compile", TINY, "--topology", "v5e:4x4", "--batch", "0"], "--batch: 0 is not positive"),
        (["compile", TINY, "--topology", "v5e:4x4", "--price", "-1"], "--price: -1 is not"),
        (["compile", "nowhere.py", "--topology", "v5e:4x4"], "nowhere.py: no such file"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere: no such file"),
        (["inspect", "nowhere"], "nowhere: no such file"),
        (["verify", "nowhere"], "nowhere"),
        (["verify", "nowhere", "--teacher", "x"], "--teacher needs --corpus"),
    ],
)
def test_wrong_input_ends_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("distill-jax: error: ")
    assert message in said[0]
    assert not list(tmp_path.rglob("*.json"))  # nothing was begun


def test_a_runner_without_beam_is_one_clear_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "apache_beam", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "distill_jax.data.on_beam", raising=False)
    command = ["corpus", TINY, "--out", str(tmp_path)]
    assert cli.main([*command, "--runner", "DirectRunner", "direct_num_workers=2"]) == 2
    assert capsys.readouterr().err == (
        "distill-jax: error: --runner: Apache Beam is not installed; `scripts/setup beam` makes "
        ".venv-beam with it\n"
    )
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_only_a_runner_writes_a_bucket(capsys):
    assert cli.main(["corpus", TINY, "--out", "gs://bucket/run"]) == 2
    assert "--out gs://bucket/run: must be a local" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "load_recipe", interrupted)
    assert cli.main(["run", TINY]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_job_without_its_first_process_says_so_and_is_to_be_tried_again(capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = f"localhost:{port}"
    for name, text in (
        ("JAX_COORDINATOR_ADDRESS", address),
        ("JAX_NUM_PROCESSES", "2"),
        ("JAX_PROCESS_ID", "1"),
        ("DISTILL_JAX_WAIT_S", "0.3"),
    ):
        monkeypatch.setenv(name, text)
    assert cli.main(["run", TINY]) == parallel.EXIT_AGAIN
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"distill-jax: error: process 0 of 2 did not answer at {address} in 0.3 s ("
    )


def small():
    """A tokenizer of three letters, and the shape of a model for it."""
    tokenizer = data.train_tokenizer(["abc abd aab bca cab"] * 4, 275)
    config = models.LlamaConfig(
        vocab_size=tokenizer.vocab_size, embed=8, mlp=8, layers=1, heads=2, kv_heads=1, head_dim=4,
        tied=False,
    )  # fmt: skip
    return tokenizer, config


def test_generate_prints_the_text_as_it_is_written(capsys, monkeypatch, tmp_path):
    tokenizer, config = small()
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype),
        models.abstract_params(config),
    )
    # Only letters and what was merged of them, so that every token is text of its own.
    letters = [*map(tokenizer.token_id, "abc"), *range(259, tokenizer.vocab_size)]
    plain = np.isin(np.arange(tokenizer.vocab_size), letters)
    params["final_norm"] = params["final_norm"] * 0 + 1
    params["unembedding"] = jnp.where(plain, params["unembedding"], 0)
    monkeypatch.setattr(models, "load", lambda _: models.Model(config, params))
    monkeypatch.setattr(data, "load_tokenizer", lambda _: tokenizer)
    command = ["generate", "model", "--prompt", "abc", "--max-new-tokens", "10", "--min-p", "0.5"]
    assert cli.main([*command, "--temperature", "0.5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tokens"] == 10
    flushed = []
    monkeypatch.setattr(
        commands, "print", lambda *text, **_: flushed.append("".join(text)), raising=False
    )
    assert cli.main([*command, "--temperature", "0.5"]) == 0
    assert "".join(flushed) == said["text"]
    assert len([piece for piece in flushed if piece]) > 2


def test_models_of_several_runs_are_averaged(capsys, tmp_path):
    tokenizer, config = small()
    random = np.random.default_rng(0)
    trees = []
    for name in "ab":
        params = jax.tree.map(
            lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32),
            models.abstract_params(config),
        )
        models.save(tmp_path / name, models.Model(config, params))
        tokenizer.save(tmp_path / name)
        trees.append(params)
    command = ["average", str(tmp_path / "a"), str(tmp_path / "b"), "--weights", "1", "3"]
    assert cli.main([*command, "--out", str(tmp_path / "mean"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == 2
    jax.tree.map(
        lambda mean, a, b: np.testing.assert_allclose(
            mean, a / 4 + b * 3 / 4, rtol=1e-5, atol=1e-6
        ),
        models.load(tmp_path / "mean").params,
        *trees,
    )
    assert data.load_tokenizer(tmp_path / "mean").fingerprint == tokenizer.fingerprint
    assert cli.main([*command, "--out", str(tmp_path / "a")]) == 2
    assert "a: holds a model" in capsys.readouterr().err
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save(tmp_path / "b")
    assert cli.main([*command, "--out", str(tmp_path / "chat")]) == 0
    assert data.load_tokenizer(tmp_path / "chat").chat_template == "{{ messages }}"
    tokenizer.chat_template = "{{ messages[0] }}"
    tokenizer.save(tmp_path / "a")
    assert cli.main([*command, "--out", str(tmp_path / "new")]) == 2
    assert "b: another chat template than" in capsys.readouterr().err
    data.train_tokenizer(["xyz xyx"] * 4, 275).save(tmp_path / "b")
    assert cli.main([*command, "--out", str(tmp_path / "new")]) == 2
    assert "b: another tokenizer than" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for word in ("corpus -> teachers", "rejection-sample", "--set size=full", "inspect"):
        assert word in said
