"""Writers that are killed, at any time and at every call that changes the disk."""

import os
import pathlib
import random
import signal
import statistics
import sys
import tempfile
import threading
import time

import victim
from tally import Tally

# Every function in C through which Python, NumPy or ArrayRecord changes a file or directory,
# and types whose methods of such a name do not.
_FILES = {"__exit__", "close", "flush", "fsync", "open", "tofile", "truncate", "write"}
_DIRECTORIES = {"mkdir", "remove", "rename", "replace", "rmdir", "unlink"}
_CALLS = _FILES | _DIRECTORIES
_HARMLESS = {"BufferedReader", "Compress", "RLock", "ScandirIterator", "deque", "lock", "str"}


def random_kills(kills: int, seed: int) -> Tally:
    """Kills writers at random moments; every other one is followed by one left in peace."""
    tally = Tally("SIGKILL at a random moment")
    expected, rng = victim.undisturbed(), random.Random(seed)
    longest = 1.1 * statistics.median(_seconds_of_a_run() for _ in range(5))
    while tally.tried < kills:
        with tempfile.TemporaryDirectory() as directory:
            died = 0
            while died < kills - tally.tried and (died == 0 or rng.random() < 0.5):
                process = victim.start(lambda: victim.write(directory))
                time.sleep(rng.uniform(0, longest))
                os.kill(process, signal.SIGKILL)
                if victim.wait(process) == 0:
                    break
                died += 1
            tally.count(_finishes(directory, expected), f"kills {tally.tried} and on", died)
    return tally


def boundary_kills(every: int = 1) -> Tally:
    """Kills a writer just before its first call that may change the disk, its second, and so on.

    Args:
      every: how many calls lie between two that are tried.
    """
    tally = Tally("SIGKILL at a write, fsync, rename or mkdir")
    expected = victim.undisturbed()
    number = 0
    while True:
        with tempfile.TemporaryDirectory() as directory:

            def work(number=number, directory=directory):
                _die_at(number)
                victim.write(directory)

            status = victim.wait(victim.start(work))
            if status == 0:
                tally.note = f"{number} calls" if every == 1 else f"every {every}th call"
                return tally
            survived = status == -signal.SIGKILL and _finishes(directory, expected)
            tally.count(survived, f"before call {number}")
        number += every


def _die_at(number: int) -> None:
    """Lets this process kill itself at its call of that number."""
    left = number

    def look(frame, event, function):
        nonlocal left
        if event == "c_call" and function.__name__ in _CALLS:
            if function.__qualname__.partition(".")[0] in _HARMLESS:
                return
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    threading.setprofile(look)
    sys.setprofile(look)


def _finishes(directory: str, expected: dict[str, bytes]) -> bool:
    """Whether a new writer ends with the bytes of an undisturbed one."""
    status = victim.wait(victim.start(lambda: victim.write(directory)))
    return status == 0 and victim.contents(directory) == expected


def _seconds_of_a_run() -> float:
    with tempfile.TemporaryDirectory() as directory:
        start = time.monotonic()
        victim.wait(victim.start(lambda: victim.write(pathlib.Path(directory))))
        return time.monotonic() - start
