"""Programs as the TPU compiler prints them, and a chip that is made up."""

from distill_jax.parallel.topology import Chip

CHIP = Chip(clock=1e9, flops=100e12, memory_rate=1e12, link_rate=50e9, ring=4)
FOUR = "replica_groups={{0,1,2,3},{4,5,6,7}}"
MIB = 2**20 * 4  # bytes of f32[1024,1024]
GATHERED = 0.75 * MIB / 100e9  # seconds of an f32[1024,1024] over a ring of 4


def cycles(count):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{count}"}}}}'


def module(entry, *others):
    """HLO text as the compiler prints it: computations first, the entry last."""
    body = "\n".join(f"  {line}" for line in entry)
    return "\n\n".join(
        [
            "HloModule jit_f, is_scheduled=true",
            *others,
            f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}",
        ]
    )
