"""Runs a recipe on TPU slices of Google Cloud, as a job says."""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence

from commands import delete_script, script
from job import load_job

from distill_jax.artifacts import InputError

TOOLS = {"queued-resources": ("gcloud",), "gke": ("gcloud", "kubectl")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/launch", description=__doc__)
    parser.add_argument("job", help="a TOML file; scripts/launching/example.toml is one")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    parser.add_argument("--delete", action="store_true", help="end the job, keep its bucket")
    options = parser.parse_args(arguments)
    try:
        job = load_job(options.job)
        text = delete_script(job) if options.delete else script(job)
        if options.dry_run:
            print(text, end="")
            return 0
        for tool in TOOLS[job.platform]:
            if shutil.which(tool) is None:
                raise InputError(f"{tool}: is not installed; --dry-run prints what it would do")
    except InputError as error:
        print(f"scripts/launch: error: {error}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    os.execvp("bash", ["bash", "-c", text])


if __name__ == "__main__":
    sys.exit(main())
