"""The commands that a job takes, as one bash script for each platform."""

import json
import shlex
from typing import Any

from job import FINAL, Job

# What both platforms call the chips, and the image of a TPU VM's system.
_RUNTIME = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
_TYPE = {"v5e": "v5litepod", "v6e": "v6e"}
_LABEL = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
# Seconds between SIGTERM and SIGKILL; a spot machine gives no more.
_GRACE_S = 30
_HEAD = """\
#!/usr/bin/env bash
# {name}: {slices} x {topology}{spot}, with {platform}
set -euo pipefail
"""


def script(job: Job) -> str:
    """Starts the job; run again, it takes up where it was left."""
    head = _HEAD.format(
        name=job.name,
        slices=job.slices,
        topology=job.topology,
        spot=" spot" if job.spot else "",
        platform=job.platform,
    )
    body = _queued_resources(job) if job.platform == "queued-resources" else _gke(job)
    return head + body


def delete_script(job: Job) -> str:
    """Ends the job and gives its machines back; the bucket keeps what it left."""
    if job.platform == "queued-resources":
        return f"{_gcloud(job, 'delete', '--force', '--quiet')}\n"
    return f"{_credentials(job)}\nkubectl delete jobset {job.name}\n"


def _lines(words: list[str], indent: str = "") -> str:
    """A command, one option a line."""
    return f" \\\n{indent}  ".join(words)


def _gcloud(job: Job, verb: str, *options: str) -> str:
    words = [f"gcloud compute tpus queued-resources {verb} {job.name}"]
    return _lines([*words, f"--project={job.project}", f"--zone={job.zone}", *options], "  ")


def _queued_resources(job: Job) -> str:
    chip = job.slice.generation
    if chip in _TYPE:
        shape = [f"--accelerator-type={_TYPE[chip]}-{job.slice.chips}"]
    else:
        shape = [f"--type={chip}", f"--topology={job.shape}"]
    nodes = [f"--node-id={job.name}"]
    if job.slices > 1:
        nodes = [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
    create = _gcloud(
        job,
        "create",
        *shape,
        f"--runtime-version={_RUNTIME[chip]}",
        *nodes,
        *(["--spot"] if job.spot else []),
        '--metadata-from-file="startup-script=$startup"',
    )
    state = _gcloud(job, "describe", "--format='value(state.state)'")
    delete = _gcloud(job, "delete", "--force", "--quiet")
    return f"""\
outcome={job.bucket}/runs/{job.name}.exit
startup=$(mktemp)
trap 'rm -f "$startup"' EXIT
cat >"$startup" <<'STARTUP'
{_startup(job)}STARTUP

create() {{
  {create}
}}
state() {{
  {state}
}}
delete() {{
  {delete}
}}

if ! state >/dev/null 2>&1; then
  gcloud storage rm --quiet "$outcome" 2>/dev/null || true
  create
fi
restarts=0
while true; do
  sleep "${{POLL_S:-60}}"
  if status=$(gcloud storage cat "$outcome" 2>/dev/null); then
    echo "{job.name}: ended with exit status $status" >&2
    delete
    exit "$status"
  fi
  case $(state) in
    SUSPENDED)
      restarts=$((restarts + 1))
      if [ "$restarts" -gt {job.restarts} ]; then
        echo "{job.name}: taken away more than {job.restarts} times" >&2
        exit 1
      fi
      echo "{job.name}: taken away; asking again" >&2
      delete
      create
      ;;
    FAILED)
      echo "{job.name}: the request failed; gcloud describe says why" >&2
      exit 1
      ;;
  esac
done
"""


def _startup(job: Job) -> str:
    """What every host does when it starts: the container, again and again until it is done."""
    registry = job.image.partition("/")[0]
    variables = [f"--env={shlex.quote(f'{k}={v}')}" for k, v in job.variables.items()]
    run = _lines(
        [
            f"docker run --rm --name={job.name} --privileged --network=host",
            f"--stop-timeout={_GRACE_S}",
            *variables,
            f"{job.image} bash -c {shlex.quote(job.command)}",
        ],
        "  ",
    )
    final = " | ".join(map(str, FINAL))
    return f"""\
#!/usr/bin/env bash
set -uo pipefail
gcloud auth configure-docker {registry} --quiet
metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes
worker=$(curl -s -H Metadata-Flavor:Google "$metadata/agent-worker-number")
for ((runs = 0; runs <= {job.restarts}; runs++)); do
  {run}
  status=$?
  # Anything else is worth another try: 75 is a job that goes on, 128 and up a signal.
  case $status in {final}) break ;; esac
  sleep 10
done
if [ "$status" -ne 0 ] || [ "$worker" = 0 ]; then
  echo "$status" | gcloud storage cp - {job.bucket}/runs/{job.name}.exit
fi
"""


def _credentials(job: Job) -> str:
    return _lines(
        [
            f"gcloud container clusters get-credentials {job.cluster}",
            f"--project={job.project}",
            f"--location={job.zone}",
        ]
    )


def _gke(job: Job) -> str:
    return f"""\
{_credentials(job)}
kubectl apply -f - <<'JOBSET'
{json.dumps(_jobset(job), indent=2)}
JOBSET
echo "kubectl get jobset {job.name}" >&2
echo "kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name={job.name}" >&2
"""


def _jobset(job: Job) -> dict[str, Any]:
    """One Job a slice, one pod a host. Errors end the set, everything else starts it again."""
    metadata: dict[str, Any] = {
        "name": job.name,
        "annotations": {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        },
    }
    if job.queue is not None:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
    errors = [status for status in FINAL if status]
    policy = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "distill-jax", "operator": "In", "values": errors},
    }
    spec = {
        "parallelism": job.hosts,
        "completions": job.hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [policy]},
        "template": {"spec": _pod(job)},
    }
    fail = {
        "name": "errors",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    slices = {"name": "slice", "replicas": job.slices, "template": {"spec": spec}}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": job.restarts, "rules": [fail]},
            "replicatedJobs": [slices],
        },
    }


def _pod(job: Job) -> dict[str, Any]:
    chips = {"google.com/tpu": job.chips_per_host}
    container = {
        "name": "distill-jax",
        "image": job.image,
        "command": ["bash", "-c", job.command],
        "env": [{"name": name, "value": value} for name, value in job.variables.items()],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"requests": chips, "limits": chips},
        "securityContext": {"privileged": True},
    }
    selector = {
        "cloud.google.com/gke-tpu-accelerator": _LABEL[job.slice.generation],
        "cloud.google.com/gke-tpu-topology": job.shape,
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_S,
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": selector,
        "containers": [container],
    }
    if job.spot:
        spot = "cloud.google.com/gke-spot"
        selector[spot] = "true"
        pod["tolerations"] = [
            {"key": spot, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    return pod
