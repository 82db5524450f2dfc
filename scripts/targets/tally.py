"""How many faults a store was put through, and how many it bore."""

import dataclasses
import sys

_SHOWN = 10


@dataclasses.dataclass
class Tally:
    """Faults of one kind.

    Attributes:
      kind: what they are.
      tried: how many.
      survived: after how many all was as it should be.
      note: what is worth telling.
    """

    kind: str
    tried: int = 0
    survived: int = 0
    note: str = ""

    @property
    def lost(self) -> int:
        return self.tried - self.survived

    def count(self, survived: bool, what: str, faults: int = 1) -> None:
        """Counts faults; `what` they were is printed if they were not borne."""
        self.tried += faults
        self.survived += faults * survived
        if not survived and self.lost <= _SHOWN:
            print(f"lost: {self.kind}: {what}", file=sys.stderr, flush=True)
