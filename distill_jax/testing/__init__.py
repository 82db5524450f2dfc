"""Puts a loss of your own through what the losses of this package go through.

    from distill_jax import losses, testing

    def my_divergence(student_logits, teacher, *, temperature=1.0): ...

    print(testing.check_divergence(my_divergence, kinds=("dense",)))
    print(testing.check_objective(my_objective, teachers=("8b", "70b")))

Either prints which properties hold, or raises one `PropertyError` that names each property which
does not, in plain words, with the smallest case found on which it fails. What is tried:

    for prop in testing.PROPERTIES.values():
        print(f"{prop.name}: {prop.says}")

Needs hypothesis (`pip install hypothesis`).
"""

from distill_jax.testing.checks import PROPERTIES, check_divergence, check_objective
from distill_jax.testing.report import PropertyError, Report, Result

__all__ = [
    "PROPERTIES",
    "PropertyError",
    "Report",
    "Result",
    "check_divergence",
    "check_objective",
]
