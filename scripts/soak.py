"""What faults do to results: nothing may be lost, and nothing wrong be read.

    python scripts/soak.py targets                   # everything; some 10 minutes
    python scripts/soak.py targets --quick --json    # a sample, under 50 s; one line of JSON

Stores of targets are written by processes that are killed, on disks that are full, and read
after every bit was flipped and at every length. Ends with status 1 if anything was lost.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

import rich.console
import rich.table

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "targets"))

import damage
import full_disk
import kills
import processes
from tally import Tally

_MEMORY = "/dev/shm"


def targets(part: int) -> list[Tally]:
    """All faults of a store of targets, or one of `part` of them, about."""
    return [
        kills.random_kills(500 // part, seed=0),
        kills.boundary_kills(every=part),
        full_disk.measure(every=part),
        *damage.measure(part=part * part),
        # A process of its own starts in seconds, so a part of everything is without them.
        *([processes.measure(kills=4)] if part == 1 else []),
    ]


def show(tallies: list[Tally]) -> None:
    table = rich.table.Table("fault", "tried", "lost", "")
    for tally in tallies:
        table.add_row(tally.kind, f"{tally.tried:,}", f"{tally.lost:,}", tally.note)
    rich.console.Console(stderr=True).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["targets"], help="whose faults")
    parser.add_argument("--quick", action="store_true", help="one fault of ten, one damage of 100")
    parser.add_argument("--part", type=int, default=1, help="one fault of so many instead")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    if "TMPDIR" not in os.environ and os.path.isdir(_MEMORY):
        # What a process that is killed leaves does not depend on the disk, how long it takes does.
        tempfile.tempdir = _MEMORY
    tallies = targets(10 if options.quick else options.part)
    show(tallies)
    tried, survived = (sum(getattr(t, name) for t in tallies) for name in ("tried", "survived"))
    if options.json:
        print(json.dumps({"tried": tried, "survived": survived, "lost": tried - survived}))
    return 1 if tried != survived else 0


if __name__ == "__main__":
    sys.exit(main())
