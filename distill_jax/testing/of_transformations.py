"""What must hold of every objective when JAX transforms it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax import losses
from distill_jax.testing import cases
from distill_jax.testing.cases import SHAPES, Case
from distill_jax.testing.properties import Properties, expect_all_close, expect_close
from distill_jax.testing.subject import Subject, evaluate, outputs

PROPERTIES = Properties()

_MIDDLE = SHAPES[1:2]


@PROPERTIES.add(
    "jit",
    "compiled and not compiled give the same",
    shapes=_MIDDLE,
    examples=2,
    one_temperature=True,
)
def _jit(subject: Subject, case: Case) -> None:
    logits, targets = jax.tree.map(jnp.asarray, (case.logits, subject.targets(case)))
    loss_N, terms = subject.objective(case)(logits, targets, step=subject.step)
    out, note = subject.run(case), " when compiled"
    expect_close(out.loss, loss_N, f"loss{note}", subject.tolerance)
    plain = {name: np.asarray(term) for name, term in terms.items()}
    expect_all_close(out.terms, plain, note, subject.tolerance)


@PROPERTIES.add(
    "vmap",
    "mapped over two batches it gives what each gives",
    shapes=_MIDDLE,
    examples=5,
    one_temperature=True,
)
def _vmap(subject: Subject, case: Case) -> None:
    targets, where = subject.targets(case), case.where.astype(np.float32)
    batches = [(case.logits, targets, where)]
    batches.append(cases.rows(batches[0], slice(None, None, -1)))

    def mapped(objective):
        def run(*arrays, step):
            def one(logits, targets, where):
                return evaluate(objective, logits, targets, where, step)

            return jax.vmap(one)(*arrays)

        return jax.jit(run)

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    both = subject.compiled("vmap", case, mapped)(*stacked)
    for index, (logits, batch, mask) in enumerate(batches):
        expected = subject.run(case, batch, logits=logits, where=mask)
        out = outputs(*cases.rows(both, index))
        note = f" of batch {index} under vmap:"
        expect_all_close(out.per_token(), expected.per_token(), note, subject.tolerance)
        expect_all_close(out.mean, expected.mean, note, subject.tolerance)


@PROPERTIES.add(
    "sharding",
    "with the tokens shared out over all devices, by jit or by shard_map, it gives what one "
    "device gives",
    shapes=((0, 4),),
    examples=2,
    one_temperature=True,
    why_not=lambda subject: "there is one device only" if jax.local_device_count() < 2 else None,
)
def _sharding(subject: Subject, case: Case) -> None:
    count = jax.local_device_count()
    mesh = jax.make_mesh(
        (count,), ("tokens",), (jax.sharding.AxisType.Auto,), devices=jax.local_devices()
    )
    by_token, everywhere = PartitionSpec("tokens"), PartitionSpec()

    def spread(objective):
        def local(logits, targets, where, step):
            return evaluate(objective, logits, targets, where, step)[0]

        specs = by_token, by_token, by_token, everywhere
        shardings = [NamedSharding(mesh, spec) for spec in specs]
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=by_token)
        both = (jax.jit(local), jax.jit(mapped))

        def run(*arrays, step):
            arrays = jax.device_put((*arrays, step), tuple(shardings))
            return [function(*arrays) for function in both]

        return run

    arrays = case.logits, subject.targets(case), np.ones(count, np.float32)
    expected = subject.run(case).per_token()
    results = subject.compiled("sharding", case, spread)(*arrays)
    for name, result in zip(("jit", "shard_map"), results, strict=True):
        note = f" on {count} devices, by {name},"
        expect_all_close(outputs(result).per_token(), expected, note, subject.tolerance)


@PROPERTIES.add(
    "fused head",
    "losses.fused_linear, in chunks, gives what the objective of whole logits gives",
    shapes=SHAPES[2:],
    examples=10,
    one_temperature=True,
)
def _fused_head(subject: Subject, case: Case) -> None:
    def whole(objective, hidden, unembedding, targets, where, step):
        loss_N, terms = objective(hidden @ unembedding, targets, step=step)
        return losses.reduce(loss_N, terms, where)

    def fused(objective, hidden, unembedding, targets, where, step):
        return losses.fused_linear(
            objective, hidden, unembedding, targets, where, step=step, chunk=3
        )

    def compiled(head):
        def make(objective):
            def loss(hidden, unembedding, targets, where, step):
                return head(objective, hidden, unembedding, targets, where, step).mean()

            return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

        return subject.compiled(f"{head.__name__} head", case, make)

    unembedding = case.rng().normal(size=(case.logits.shape[1],) * 2).astype(np.float32)
    arrays = case.logits, unembedding / 2, subject.targets(case), case.where.astype(np.float32)
    (expected, out) = (_named(compiled(head)(*arrays)) for head in (whole, fused))
    expect_all_close(out, expected, " through fused_linear", subject.tolerance)


def _named(results: Any) -> dict[str, np.ndarray]:
    (loss, terms), (hidden, unembedding) = jax.tree.map(np.asarray, results)
    terms = {f"mean term {name}": term for name, term in terms.items()}
    slopes = {"gradient of hidden": hidden, "gradient of unembedding": unembedding}
    return {"mean loss": loss, **terms, **slopes}
