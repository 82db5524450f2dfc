"""A cut of the tiny recipe from one end to the other, undisturbed and killed."""

import html.parser
import importlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

from distill_jax import cli, data, models, parallel, posttraining, pruning, teachers
from distill_jax.recipe import load_recipe
from distill_jax.stages import students
from distill_jax.stages.context import Run
from distill_jax.training import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "tiny.py"

# What a laptop has. Hundreds of steps take longer than optimising does.
ONE_DEVICE = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "without_torch"))),
}


@pytest.fixture(scope="module")
def kill_run():
    """The module `scripts/kill_run.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield importlib.import_module("kill_run")


@pytest.fixture(scope="module")
def whole(kill_run, tmp_path_factory):
    """The directory of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    printed = kill_run.finish(out, ONE_DEVICE)
    done = json.loads(printed.splitlines()[-1])["stages"]
    assert done.keys() >= {*kill_run.MODELS, "evaluate"}
    return out


def test_killed_or_told_to_stop_it_ends_with_the_same_bits(kill_run, whole, tmp_path):
    """Killed in training and in sampling, and told to stop in training.

    What those stages neither make nor change is the undisturbed run's. `scripts/kill_run.py` does
    so at more points, and makes everything anew.
    """
    ended = ("distill/seed-0", "rejection-sample", "dpo")
    points = [one for one in kill_run.POINTS if one.stage in ended and not one.brief]
    assert [one.way for one in points] == [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for name in (*ended, "export", "report"):
        shutil.rmtree(tmp_path / name)
    kill_run.kill_and_finish(tmp_path, points, ONE_DEVICE)
    kill_run.require_same(whole, tmp_path)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "adaptive_kl"])
def test_any_divergence_trains_by_one_line(whole, divergence, monkeypatch):
    # One device, as the run had: here it is the line that is looked at.
    monkeypatch.setattr(Run, "mesh", parallel.make_mesh(devices=jax.devices()[:1]))
    overrides = ("size=test", f"divergence={divergence}", "distill.train.steps=24")
    run = Run(load_recipe(CONFIG, overrides), epath.Path(whole))
    place = run.directory / "trials" / divergence
    distill = next(stage for stage in students.stages(run) if stage.name == "distill/seed-0")
    distill.work(place)
    lines = read_metrics(place / "metrics.jsonl")
    store = "samples" if divergence == "forward_kl" else "top_k"
    assert run.recipe.store("large") == run.recipe.store("small") == store
    assert lines[0]["large"] > 0 < lines[0]["small"]
    # Six steps see every row once, so these means are of the same rows.
    first, *_, last = np.reshape([line["loss"] for line in lines], (4, 6)).mean(axis=1)
    assert last < first - 0.01


def test_a_round_on_the_way_is_cut_trained_and_cut_again(whole, tmp_path):
    """8B -> 3B -> 1B in small, by the command line, on eight devices, from what the run left."""
    for name in ("corpus", "teachers", "targets"):
        shutil.copytree(whole / name, tmp_path / "run" / name)
    config = tmp_path / "chain.py"
    config.write_text(
        "import dataclasses\n"
        "from distill_jax.recipe import Round, load_recipe\n"
        "def get_config():\n"
        f"    recipe = load_recipe({str(CONFIG)!r}, ['size=test', 'distill.train.steps=4'])\n"
        "    target = dataclasses.replace(recipe.prune.target, layers=4, embed=112, mlp=320)\n"
        "    last = dataclasses.replace(recipe.prune, repair=False)\n"
        "    first = dataclasses.replace(last, target=target)\n"
        "    rounds = (Round(prune=first, distill=recipe.distill),)\n"
        "    return dataclasses.replace(\n"
        "        recipe, rounds=rounds, prune=last, controls=(), posttraining=None\n"
        "    )\n"
    )
    for stage in ("rounds", "prune", "distill"):
        assert cli.main([stage, str(config), "--out", str(tmp_path / "run")]) == 0
    place = tmp_path / "run"
    shapes = {
        stage: models.load_config(place / stage)
        for stage in ("rounds/0/prune", "rounds/0/distill", "prune", "distill/seed-0")
    }
    assert [shape.mlp for shape in shapes.values()] == [320, 320, 256, 256]
    plan = pruning.Plan.load(place / "prune" / pruning.PLAN_FILE)
    between = models.load(place / "rounds" / "0" / "distill")
    assert plan.source == between.config
    assert plan.model == pruning.model_fingerprint(between)
    assert len(read_metrics(place / "rounds" / "0" / "distill" / "metrics.jsonl")) == 4


def test_a_second_run_does_nothing_and_another_recipe_is_refused(whole, capsys):
    # The run was made with one device; only stages that are not done would care.
    command = ["run", str(CONFIG), "--set", "size=test", "--out", str(whole)]
    assert cli.main([*command, "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.count("done before") == len(list(whole.rglob("manifest.json")))
    assert cli.main([*command, "--set", "distill.hard_weight=0.5"]) == 2
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert "distill/seed-0 holds the result of another recipe" in refusal
    assert "hard_weight: 0.1 -> 0.5" in refusal


def test_the_report_stands_alone_and_shows_every_model(whole):
    page = (whole / "report" / "index.html").read_text()

    found = []

    class Links(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.extend(v for k, v in attributes if k in ("src", "href") and v)

    Links().feed(page)
    assert not [link for link in found if not link.startswith(("#", "data:"))]
    for name in ("small", "large", "pruned", "distilled", "random start", "+ DPO"):
        assert name in page
    later = page[page.index('<section id="posttraining">') : page.index('<section id="models">')]
    assert re.findall("<figcaption>(.*?)</figcaption><svg", later) == [
        "SFT: loss",
        "Rejection sampling: loss",
        "DPO: loss",
        "DPO: log-probabilities",
        "DPO: rewards",
        "DPO: pairs in which chosen is ahead",
    ]
    look = teachers.describe(whole / "targets" / "large" / "samples")
    for name in ("mean_entropy", "teacher_cross_entropy"):
        assert f"<td>{look[name]:.3f}</td>" in page


def test_transformers_reads_the_export(whole):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(whole / "export").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "export")
    ours = models.load(whole / "dpo")
    ids = tokenizer("The capital of France is the city", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(ids).logits.numpy()
        text = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    actual = np.asarray(models.logits(ours.config, ours.params, ids.numpy()))
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
    (completion,) = models.generate(
        ours,
        [ids[0].tolist()],
        max_new_tokens=16,
        sampling=models.Sampling(temperature=0.0),
        seeds=[0],
    )
    assert completion.tokens == text[0, ids.shape[1] :].tolist()


def test_post_training_replays_text_and_keeps_its_template(whole):
    recipe = load_recipe(CONFIG, ["size=test"])
    tokenizer = data.load_tokenizer(whole / "corpus")
    problems = posttraining.load_task(recipe.posttraining.task).train[
        : recipe.posttraining.problems
    ]
    answers = posttraining.demonstrations(problems)
    rows = len(posttraining.sft_rows(tokenizer, answers, recipe.posttraining.sft))
    figures = json.loads((whole / "sft" / "manifest.json").read_text())["figures"]
    assert figures["rows"] == rows + math.ceil(rows / 3)  # a quarter of all rows is text
    assert tokenizer.chat_template is None
    for stage in ("sft", "rejection-sample", "dpo", "export"):
        assert data.load_tokenizer(whole / stage).chat_template == posttraining.CHATML


def test_ones_own_conversations_and_preferences_are_learnt_by_the_command_line(
    whole, tmp_path, capsys
):
    run, chats, pairs = tmp_path / "run", tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    for name in ("corpus", "teachers", "targets", "prune", "distill"):
        shutil.copytree(whole / name, run / name)
    asked = {"instruction": "Which is larger, 3 or 9?", "output": "9"}
    chats.write_text("\n".join(map(json.dumps, [asked, {**asked, "output": ""}])))
    pair = {"prompt": "Which is larger, 3 or 9?", "chosen": "9", "rejected": "3"}
    pairs.write_text(json.dumps(pair))
    settings = ("task=null", "rejection_train=null", "sft_train.steps=2", "dpo_train.steps=2")
    settings += (f"sft.data={chats}", f"dpo.pairs={pairs}")
    command = [str(CONFIG), "--set=size=test", "--out", str(run), "--json"]
    command += [f"--set=posttraining.{setting}" for setting in settings]
    assert cli.main(["sft", *command]) == 2
    refusal = capsys.readouterr().err.splitlines()
    assert refusal == [f"distill-jax: error: {chats}: line 2: output: empty"]
    assert not (run / "sft").exists()
    command.append("--set=posttraining.sft.bad_rows=skip")
    for stage in ("sft", "dpo"):
        assert cli.main([stage, *command]) == 0
        (printed,) = capsys.readouterr().out.splitlines()
        figures = json.loads(printed)["stages"][stage]
        assert (figures["used"], figures["skipped"]) == (1, stage == "sft")
    assert cli.main(["reward-model", *command]) == 2
    assert "the recipe has no stage 'reward-model'" in capsys.readouterr().err


def test_a_teacher_corrects_what_the_student_writes(whole, tmp_path, capsys):
    """By the command line; the stages that follow know of it."""
    run = shutil.copytree(whole, tmp_path / "run")
    command = [str(CONFIG), "--set", "size=test", "--set", "on_policy=minillm", "--out", str(run)]
    program = [sys.executable, "-m", "distill_jax.cli", "on-policy", *command, "--json"]
    ended = subprocess.run(program, env=ONE_DEVICE, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    figures = json.loads(ended.stdout)["stages"]["on-policy"]
    assert figures["student_sampled"] == 1
    assert 1 <= figures["answer_length"] <= 12
    assert figures["text"] > 0
    assert cli.main(["rejection-sample", *command]) == 2
    assert "on-policy" in capsys.readouterr().err


def test_the_report_lists_the_stages_of_its_own_recipe(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(run / "distill" / "seed-0", run / "distill" / "seed-77")
    shutil.rmtree(run / "report")
    command = ["report", str(CONFIG), "--set", "size=test", "--out", str(run)]
    assert cli.main(command) == 0
    pages = [(out / "report" / "index.html").read_text() for out in (whole, run)]
    assert pages[0].count("distill/seed-0") == pages[1].count("distill/seed-0") > 0


def test_generate_inspect_and_verify(whole, capsys):
    def run(*arguments):
        assert cli.main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    said = run("generate", str(whole / "sft"), "--prompt", "Hello", "--max-new-tokens", "4")
    assert 1 <= said["tokens"] <= 4
    store, corpus = str(whole / "targets" / "large" / "samples"), str(whole / "corpus")
    shown = run("inspect", store, "--row", "3", "--tokens", "5")
    assert len(shown["row"]["tokens"]) == 5
    assert (
        shown["row"]
        == run("inspect", store, "--row", "3", "--tokens", "5", "--corpus", corpus)["row"]
    )
    row = data.open_corpus(corpus, "train")[3]
    texts = [data.load_tokenizer(corpus).decode([int(id_)]) for id_ in row["tokens"][:5]]
    assert [one["token"] for one in shown["row"]["tokens"]] == texts
    assert cli.main(["inspect", store]) == 0
    assert "likeliest, as stored" in capsys.readouterr().out
    found = run("verify", store, "--corpus", corpus, "--sample", "2")
    assert found["rows"] == 48
    exported = run("inspect", str(whole / "export"))
    assert exported["figures"]["parameters"] == models.load_config(whole / "dpo").parameters
    assert run("inspect", str(whole / "prune" / "plan.json"))["kept"]["layers"]
    assert cli.main(["inspect", str(whole / "prune" / "plan.json")]) == 0
    shown = capsys.readouterr().out
    assert "query heads" in shown
    assert "█" in shown


def test_search_ranks_shapes_of_the_recipes_teacher(whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    teacher = models.load_config(run / "teachers" / "large")
    budgets = [str(0.5 * teacher.parameters), str(0.7 * teacher.parameters)]
    command = ["search", str(CONFIG), "--set", "size=test", "--out", str(run), "--rows", "8"]
    command += ["--parameters", *budgets]
    assert cli.main([*command, "--steps", "4", "--repair-best", "1", "--json"]) == 0
    front = json.loads(capsys.readouterr().out.splitlines()[-1])["front"]
    losses = [one["loss"] for one in front]
    assert losses == sorted(losses, reverse=True)
    found = json.loads((run / "search" / "parameters.json").read_text())
    assert min(one["loss"] for one in found) == losses[-1]
    assert (run / "search" / "parameters.png").read_bytes().startswith(b"\x89PNG")
    # A person is shown a table; fewer shapes will do.
    assert cli.main([*command, "--steps", "2"]) == 0
    assert "no other shape is both smaller and better" in capsys.readouterr().out
