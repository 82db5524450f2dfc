"""Compiles for devices that are not here, and reads the compiler's refusals."""

import re
from typing import Any

import jax

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([BKMGT]?)i?B?"
_FORMS = (
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
)


class OutOfMemory(Exception):
    """A program needs more memory than a chip has.

    Attributes:
      needed: bytes that the compiler found it to need; what it says of one of its two forms are
        the temporaries alone.
      available: bytes that a program may have.
      largest: what the largest arrays are, if the compiler lists them: (bytes, scope).
    """

    def __init__(self, needed: float, available: float, largest: tuple[tuple[float, str], ...]):
        super().__init__(
            f"it needs {needed / 1e9:.2f} GB of HBM a chip, there are {available / 1e9:.2f}"
        )
        self.needed, self.available, self.largest = needed, available, largest


def compile_lowered(lowered: jax.stages.Lowered) -> Any:
    """The compiled program.

    Raises:
      OutOfMemory: it does not fit.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = parse_refusal(str(error))
        if refusal is None:
            raise
        raise refusal from None


def parse_refusal(message: str) -> OutOfMemory | None:
    """The compiler's message as an exception; None if it is about something else."""
    for form in _FORMS:
        if found := re.search(form, message):
            needed, unit, available, available_unit = found.groups()
            return OutOfMemory(
                float(needed) * _UNITS[unit],
                float(available) * _UNITS[available_unit],
                _largest(message),
            )
    return None


def _largest(message: str) -> tuple[tuple[float, str], ...]:
    """The list under "Largest program allocations in hbm"."""
    listed = []
    for entry in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        size = re.match(_SIZE, entry)
        scope = re.search(r'op_name="([^"]*)"', entry)
        if size:
            listed.append((float(size[1]) * _UNITS[size[2]], scope[1] if scope else ""))
    return tuple(listed)
