"""1, 2 and 4 processes write the same store, undisturbed and after kills.

    python scripts/targets/processes.py              # four devices in all; some 2 minutes
    python scripts/targets/processes.py --kills 40

Processes are killed at a random moment while they write, and others, of another number, go on.
Prints one line; ends with status 1 if a byte was different.
"""

import argparse
import pathlib
import random
import sys
import tempfile
import time

import jax
import numpy as np
import victim
from tally import Tally

from distill_jax import models, parallel, teachers

COUNTS = (1, 2, 4)
_DEVICES = 4
_WAIT_S = 300.0


class Slow(victim.Corpus):
    """Rows that take some time, so that kills hit their writing."""

    def __getitem__(self, index):
        time.sleep(0.005)
        return super().__getitem__(index)


def write(directory: pathlib.Path) -> None:
    """What each process does: a teacher with random parameters, sharded over all devices."""
    mesh = parallel.make_mesh(parallel.MeshConfig(data=2))
    config = models.LlamaConfig(
        vocab_size=victim.VOCAB, embed=16, mlp=32, layers=2, heads=4, kv_heads=2, head_dim=8,
        tied=True,
    )  # fmt: skip
    shapes = models.abstract_params(config)
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) / 2, shapes)
    params = jax.device_put(values, parallel.shardings(mesh, models.logical_axes(config), shapes))
    teachers.write_stores(
        {name: directory / name for name in victim.SCHEMES},
        victim.SCHEMES,
        models.Model(config, params),
        Slow(rows=120),
        config=teachers.WriteConfig(batch_rows=8, rows_per_shard=10, chunk_tokens=128),
        sharding=parallel.batch_sharding(mesh),
    )


def start(directory: pathlib.Path, count: int) -> parallel.LocalProcesses:
    command = [sys.executable, __file__, "--member", str(directory)]
    return parallel.start_local(command, count, devices=_DEVICES // count)


def finishes(directory: pathlib.Path, count: int) -> dict[str, bytes]:
    """The files that so many processes leave; none if one of them failed."""
    with start(directory, count) as running:
        runs = running.wait(_WAIT_S)
    for run in runs:
        if run.returncode:
            print(run.stderr[-2000:], file=sys.stderr)
            return {}
    return victim.contents(directory)


def measure(kills: int, seed: int = 0) -> Tally:
    """Compares what 1, 2 and 4 processes write, and what others finish for those killed."""
    tally = Tally("1, 2 and 4 processes, and SIGKILL to them", note=f"{kills} kills")
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        expected = finishes(pathlib.Path(root) / "1", 1)
        for count in COUNTS[1:]:
            found = finishes(pathlib.Path(root) / str(count), count)
            tally.count(bool(expected) and found == expected, f"{count} processes")
        for number in range(kills):
            directory = pathlib.Path(root) / f"killed-{number}"
            count = rng.choice(COUNTS)
            with start(directory, count) as running:
                deadline = time.monotonic() + _WAIT_S
                while not list(directory.glob("*/.progress/plan.json")):
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 4))
                running.kill()
            other = rng.choice([c for c in COUNTS if c != count])
            survived = bool(expected) and finishes(directory, other) == expected
            tally.count(survived, f"kill {number}: {count} processes, then {other}")
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=4, help="how many are killed")
    parser.add_argument("--member", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.member:
        parallel.start()
        write(options.member)
        return 0
    tally = measure(options.kills)
    print(
        f"{', '.join(map(str, COUNTS))} processes write the same bytes: "
        f"{tally.survived} of {tally.tried} ({tally.note})"
    )
    return 1 if tally.lost else 0


if __name__ == "__main__":
    sys.exit(main())
