"""The commands that start a job in the cloud: what they are, and what they do with what it says."""

import importlib
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest

from distill_jax import parallel
from distill_jax.artifacts import InputError
from distill_jax.recipe import load_recipe

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "launching"
EXAMPLE = FOLDER / "example.toml"
GKE = {
    "platform": "gke",
    "cluster": "pods",
    "queue": "research",
    "topology": "v5p:4x4x8",
    "slices": 2,
    "spot": True,
}


@pytest.fixture(scope="module")
def launching():
    """The launcher's modules, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield SimpleNamespace(
            **{n: importlib.import_module(n) for n in ("job", "commands", "launch")}
        )


@pytest.fixture
def load(launching, tmp_path, monkeypatch):
    """The example's job with changes, read from a file; None leaves a field out."""
    monkeypatch.chdir(ROOT)

    def load(**changes):
        table = tomllib.loads(EXAMPLE.read_text()) | {"set": []} | changes
        environment = table.pop("environment")
        fields = {name: value for name, value in table.items() if value is not None}
        lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
        lines += [
            "[environment]",
            *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in environment.items()),
        ]
        path = tmp_path / "job.toml"
        path.write_text("\n".join(lines))
        return launching.job.load_job(path)

    return load


def create_command(script):
    """The words of the command that asks for machines."""
    (text,) = re.findall(r"^create\(\) \{\n(.*?)\n\}", script, re.DOTALL | re.MULTILINE)
    return text.replace("\\\n", " ").split()


@pytest.mark.parametrize(
    ("changes", "machines"),
    [
        ({"spot": False}, ["--accelerator-type=v5litepod-256", "--node-id=llama-1b"]),
        (
            {"slices": 4, "topology": "v6e:8x16"},
            [
                "--accelerator-type=v6e-128",
                "--runtime-version=v2-alpha-tpuv6e",
                "--node-count=4",
                "--node-prefix=llama-1b",
                "--spot",
            ],
        ),
        (
            {"topology": "v5p:4x4x8"},
            [
                "--type=v5p",
                "--topology=4x4x8",
                "--runtime-version=v2-alpha-tpuv5",
                "--node-id=llama-1b",
                "--spot",
            ],
        ),
    ],
)
def test_machines_are_asked_for(load, launching, changes, machines):
    found = create_command(launching.commands.script(load(**changes)))
    common = ["--project=my-project", "--zone=us-west4-a"]
    assert found[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "llama-1b"]
    assert {*common, *machines} <= set(found)
    assert ("--spot" in found) == ("--spot" in machines)
    assert not {word for word in found if word.startswith("--node")} - set(machines)


def test_the_example_is_printed_whole_and_nothing_is_run(launching, monkeypatch, capsys, tmp_path):
    """Where there is no gcloud, and nothing may be run."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "execvp", None)

    def launch(*more):
        return launching.launch.main([str(EXAMPLE), *more]), *capsys.readouterr()

    status, printed, said = launch("--dry-run")
    assert (status, said) == (0, "")
    assert create_command(printed) == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "llama-1b"),
        *("--project=my-project", "--zone=us-west4-a", "--accelerator-type=v5litepod-256"),
        *("--runtime-version=v2-alpha-tpuv5-lite", "--node-id=llama-1b", "--spot"),
        '--metadata-from-file="startup-script=$startup"',
    ]
    assert (
        "    us-docker.pkg.dev/my-project/images/distill-jax bash -c '{ mkdir -p /bucket && "
        "gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 my-bucket /bucket; } || exit 75; exec "
        "distill-jax run "
        "configs/llama3_2_1b.py --set=tokens=100B --out /bucket/runs/llama-1b'\n"
    ) in printed
    assert launch("--dry-run", "--delete")[1] == (
        "gcloud compute tpus queued-resources delete llama-1b \\\n    --project=my-project \\\n"
        "    --zone=us-west4-a \\\n    --force \\\n    --quiet\n"
    )
    missing = "scripts/launch: error: gcloud: is not installed; --dry-run prints what it would do\n"
    assert launch() == (2, "", missing)


def test_what_is_printed_is_what_is_run(launching, monkeypatch, capsys, cloud):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(cloud.place), prepend=os.pathsep)
    ran = []
    monkeypatch.setattr(os, "execvp", lambda *command: ran.append(command))
    for more in ([], ["--delete"]):
        launching.launch.main([str(EXAMPLE), *more])
        launching.launch.main([str(EXAMPLE), *more, "--dry-run"])
        assert ran.pop() == ("bash", ["bash", "-c", capsys.readouterr().out])


FAKE_GCLOUD = """\
#!/bin/bash
echo "gcloud $*" >>"$LOG"
case "$*" in
  *describe*) answers=states ;;
  *"storage cat"*) answers=outcomes ;;
  *create*)
    for word in "$@"; do
      case $word in *startup-script=*) cat "${word##*=}" >"$HERE/startup" ;; esac
    done
    exit ;;
  *"storage cp"*) cat >"$HERE/told"; exit ;;
  *) exit ;;
esac
answer=$(head -n 1 "$HERE/$answers")
sed -i 1d "$HERE/$answers"
[ "$answer" != none ] && echo "$answer"
"""
FAKE_DOCKER = """\
#!/bin/bash
echo "docker $*" >>"$LOG"
status=$(head -n 1 "$HERE/statuses")
sed -i 1d "$HERE/statuses"
exit "$status"
"""


class Cloud:
    """A machine whose gcloud, docker, curl and sleep only say what they were asked."""

    def __init__(self, place):
        self.place = place
        fakes = {"gcloud": FAKE_GCLOUD, "docker": FAKE_DOCKER}
        fakes |= {"sleep": "#!/bin/bash\n", "curl": "#!/bin/bash\necho 0\n"}
        for name, text in fakes.items():
            path = place / name
            path.write_text(text)
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(self, script, **answers):
        """The exit status of a script, and the verbs that it asked for."""
        for name, lines in answers.items():
            (self.place / name).write_text("".join(f"{line}\n" for line in lines))
        log = self.place / "log"
        log.write_text("")
        environment = os.environ | {
            "PATH": f"{self.place}:{os.environ['PATH']}",
            "HERE": str(self.place),
            "LOG": str(log),
        }
        done = subprocess.run(
            ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60
        )
        asked = re.findall(r"queued-resources (\w+)|(docker run)", log.read_text())
        return done.returncode, ["".join(words) for words in asked], done.stderr


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def test_spot_machines_are_asked_for_again_until_the_job_says_how_it_ended(load, launching, cloud):
    script = launching.commands.script(load(restarts=2))
    status, asked, said = cloud.run(
        script,
        states=["none", "PROVISIONING", "ACTIVE", "SUSPENDED", "ACTIVE", "SUSPENDED", "ACTIVE"],
        outcomes=["none"] * 6 + ["0"],
    )
    again = ["describe", "describe", "delete", "create"]
    assert asked == ["describe", "create", "describe", *again, *again, "describe", "delete"]
    assert status == 0
    assert said.count("taken away; asking again") == 2
    # Once more than the job allows; and a job that failed.
    suspended = {"states": ["none", *["SUSPENDED"] * 3], "outcomes": ["none"] * 3}
    status, asked, said = cloud.run(script, **suspended)
    assert (status, asked.count("create")) == (1, 3)
    assert "taken away more than 2 times" in said
    status, asked, said = cloud.run(script, states=["ACTIVE"], outcomes=["2"])
    assert (status, asked) == (2, ["describe", "delete"])
    status, asked, said = cloud.run(script, states=["none", "FAILED"], outcomes=["none"])
    assert (status, asked) == (1, ["describe", "create", "describe"])
    assert "the request failed" in said


@pytest.mark.parametrize(
    ("statuses", "runs", "told"),
    [
        ([parallel.EXIT_AGAIN, 134, 137, 0], 4, "0"),
        ([parallel.EXIT_AGAIN, 2], 2, "2"),
        ([1], 1, "1"),
        ([parallel.EXIT_AGAIN] * 9, 5, str(parallel.EXIT_AGAIN)),
    ],
)
def test_hosts_begin_again_unless_the_run_ended(load, launching, cloud, statuses, runs, told):
    script = launching.commands.script(load(restarts=4))
    cloud.run(script, states=["none"], outcomes=["0"])
    _, asked, _ = cloud.run((cloud.place / "startup").read_text(), statuses=statuses)
    assert asked == ["docker run"] * runs
    assert (cloud.place / "told").read_text() == f"{told}\n"


def test_a_job_set_has_a_pod_for_every_host_and_ends_at_errors(load, launching):
    job = load(**GKE)
    script = launching.commands.script(job)
    assert (
        "gcloud container clusters get-credentials pods \\\n  --project=my-project \\\n"
        "  --location=us-west4-a\nkubectl apply -f - <<'JOBSET'\n"
    ) in script
    (text,) = re.findall(r"<<'JOBSET'\n(.*)\nJOBSET\n", script, re.DOTALL)
    found = json.loads(text)
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    (slices,) = found["spec"]["replicatedJobs"]
    spec = slices["template"]["spec"]
    assert (slices["replicas"], spec["parallelism"], spec["completions"]) == (2, 32, 32)
    assert found["spec"]["failurePolicy"] == {
        "maxRestarts": 100,
        "rules": [
            {
                "name": "errors",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
            }
        ],
    }
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["values"] == [1, 2, 130]
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert container["command"] == ["bash", "-c", job.command]
    assert {"name": "CORPUS", "value": "gs://my-bucket/corpus"} in container["env"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_all_scripts_pass_shellcheck(load, launching, cloud):
    shellcheck = shutil.which(
        "shellcheck",
        path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]),
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    scripts = [ROOT / "scripts" / name for name in ("launch", "run", "setup", "test", "lock")]
    # Words that bash would take apart or replace.
    odd = {"environment": {"ODD": 'it\'s $HOME `x` "y"'}}
    texts = [
        launching.commands.script(load(**odd)),
        launching.commands.script(load(**odd, **GKE)),
        launching.commands.delete_script(load(**GKE)),
    ]
    cloud.run(texts[0], states=["none"], outcomes=["0"])
    texts.append((cloud.place / "startup").read_text())
    for number, text in enumerate(texts):
        path = cloud.place / f"{number}.sh"
        path.write_text(text)
        scripts.append(path)
    command = [shellcheck, "--shell=bash", *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bucket": None}, "bucket: field required"),
        ({"bucket": "my-bucket"}, "bucket: 'my-bucket' is not gs://NAME"),
        ({"topology": "v9z:4x4"}, "chip 'v9z' is none of v5e, v5p, v6e"),
        ({"topology": "v5e:4x12"}, "topology v5e:4x12: Google Cloud offers 1x1, 2x2, 2x4, 4x4"),
        ({"topology": "v5p:8x4x4"}, "and rising multiples of 4"),
        ({"topology": "v5e:2x4", "slices": 2}, "slices: 2 of v5e:2x4, one host each"),
        ({"slices": 0}, "slices: 0 is less than 1"),
        ({"slices": "two"}, "slices: input should be a valid integer"),
        ({"platform": "aws"}, "platform: input should be 'queued-resources' or 'gke'"),
        ({"platform": "gke"}, "cluster: is missing; gke needs one"),
        ({"cluster": "pods"}, "cluster: is of gke alone"),
        ({"queue": "q"}, "queue: is of gke alone"),
        ({"name": "My Run"}, "name: 'My Run' is not of at most 39"),
        ({"project": "a b"}, "project: 'a b' is no name"),
        ({"zonne": "x"}, "unknown field 'zonne'; did you mean 'zone'?"),
        ({"recipe": "configs/none.py"}, "configs/none.py: no such file"),
        ({"set": ["tokens=2B"]}, "--set tokens=2B"),
        ({"environment": {"A B": "x"}}, "environment: 'A B' is no name of a variable"),
    ],
)
def test_a_job_that_cannot_be_is_told_in_one_line(load, changes, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load(**changes)
    assert "job.toml: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_job_that_is_not_there_is_named(launching, tmp_path):
    with pytest.raises(InputError, match=r"nothing\.toml: No such file or directory"):
        launching.job.load_job(tmp_path / "nothing.toml")


def test_the_example_has_rows_for_every_chip(load):
    job = load()
    recipe = load_recipe(job.recipe, job.set)
    rows = [recipe.targets.write.batch_rows, recipe.evaluation.batch_rows]
    trained = [recipe.distill.train, *recipe.posttraining.trainings.values()]
    rows += [train.batch_rows // train.accumulation for train in trained]
    assert len(rows) == 6
    assert not any(count % (job.slices * job.slice.chips) for count in rows)


def test_workers_have_the_beam_of_the_environment_that_starts_them():
    requirements = ROOT / "scripts" / "requirements"
    image = re.search(r"beam_python.*:(\S+)", (FOLDER / "beam.Dockerfile").read_text())
    for name in ("beam.txt", "beam_worker.txt"):
        assert f"apache-beam=={image[1]} " in (requirements / name).read_text()
