"""Several processes on this machine's CPU, to try here what several hosts do."""

import dataclasses
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any


@dataclasses.dataclass(frozen=True)
class LocalProcesses:
    """Processes that `start_local` started; `wait`, or leave the `with` block, to end them."""

    processes: Sequence[subprocess.Popen]
    outputs: Sequence[tuple[IO[str], IO[str]]]

    def __enter__(self) -> "LocalProcesses":
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()
        for output in self.outputs:
            for file in output:
                file.close()

    def wait(self, seconds: float = 300.0) -> list[subprocess.CompletedProcess]:
        """What became of each: return code, standard output and error.

        Raises:
          subprocess.TimeoutExpired: one still runs; all are killed.
        """
        deadline = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.wait(max(deadline - time.monotonic(), 0))
        finally:
            self.kill()
        return [
            subprocess.CompletedProcess(process.args, process.returncode, *map(_read, output))
            for process, output in zip(self.processes, self.outputs)
        ]

    def kill(self) -> None:
        """Sends SIGKILL to those that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def start_local(arguments: Sequence[str], count: int, *, devices: int = 1) -> LocalProcesses:
    """Starts `count` copies of a command that make one job of `devices` CPU devices each.

    The command's program calls `start`. Whoever may talk to a proxy is told not to.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {name: text for name, text in os.environ.items() if "_proxy" not in name.lower()}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if count > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    outputs = [
        (tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+"))  # noqa: SIM115
        for _ in range(count)
    ]
    processes = [
        subprocess.Popen(
            arguments,
            env=environment | {"JAX_PROCESS_ID": str(process)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
        )
        for process, (output, errors) in enumerate(outputs)
    ]
    return LocalProcesses(processes, outputs)
