"""Compiles the loss head of a 1B student for a TPU slice, without one, and shows its cost.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python scripts/compile_head.py --batch 1 4 --json

needs the `tpu` extra (libtpu holds the compiler). Nothing is executed: memory is what the compiler
sets aside, time is modelled (`distill_jax.parallel.tpu_cost`). The head is D = 2048, V = 128256 in
bfloat16, its float32 parameters are shared with the embedding [V, D]; the loss is cross-entropy and
forward KL to two teachers of 64 ids. A row has 4096 tokens.
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax import losses, parallel
from distill_jax.parallel import tpu_cost
from distill_jax.parallel.topology import Topology

V, D, K, T = 128256, 2048, 64, 4096
ROWS = P(("data", "fsdp"))


def make_mesh(topology: Topology, tensor: int) -> Mesh:
    config = parallel.MeshConfig(data=16, tensor=tensor)
    return parallel.make_mesh(config, topology.devices())


def make_targets(kinds: list[str], tokens: int) -> dict:
    ids = jax.ShapeDtypeStruct((tokens, K), jnp.int32)
    values = jax.ShapeDtypeStruct((tokens, K), jnp.float32)
    tail = jax.ShapeDtypeStruct((tokens,), jnp.float32)
    make = {
        "sampled": lambda: losses.SampledTargets(ids, values),
        "top_k": lambda: losses.TopKTargets(ids, values, tail),
    }
    teachers = {f"teacher{i}": make[kind]() for i, kind in enumerate(kinds)}
    return {"labels": jax.ShapeDtypeStruct((tokens,), jnp.int32), **teachers}


def compile_head(mesh: Mesh, batch: int, chunk: int | None, kinds: list[str]):
    weight = 0.9 / max(len(kinds), 1)
    names = [f"teacher{i}" for i in range(len(kinds))]
    objective = losses.weighted_sum(
        hard=(0.1, losses.hard_labels()),
        **{name: (weight, losses.distill(name, losses.forward_kl)) for name in names},
    )

    def loss(embedding_VD, hidden_ND, targets):
        return losses.sharded_fused_linear(
            objective,
            hidden_ND,
            embedding_VD,
            targets,
            transposed=True,
            mesh=mesh,
            chunk=chunk,
            least_chunk=parallel.least_chunk(mesh),
        ).loss

    def place(spec, tree):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    tokens = batch * T * mesh.shape["data"] * mesh.shape["fsdp"]
    parameters = P("tensor", "fsdp")
    arguments = (
        place(parameters, jax.ShapeDtypeStruct((V, D), jnp.float32)),
        place(ROWS, jax.ShapeDtypeStruct((tokens, D), jnp.bfloat16)),
        place(ROWS, make_targets(kinds, tokens)),
    )
    shardings = NamedSharding(mesh, parameters), NamedSharding(mesh, ROWS)
    step = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1)),
        out_shardings=(NamedSharding(mesh, P()), shardings),
    )
    return step.lower(*arguments).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:16x16", help="such as v5p:4x4x8")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share the vocabulary")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="rows a device")
    parser.add_argument("--chunk", type=int, help="tokens at a time; the default one if left out")
    parser.add_argument(
        "--teachers", nargs="*", default=["sampled", "sampled"], choices=["sampled", "top_k"]
    )
    parser.add_argument("--text", type=pathlib.Path, help="where to write the compiled text")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    topology = Topology.parse(options.topology)
    mesh = make_mesh(topology, options.tensor)
    for batch in options.batch:
        compiled = compile_head(mesh, batch, options.chunk, options.teachers)
        if options.text:
            options.text.write_text(compiled.as_text())
        cost = tpu_cost.estimate(compiled, topology.chip)
        if options.json:
            print(json.dumps({"batch": batch, "seconds": cost.seconds, **dataclasses.asdict(cost)}))
            continue
        print(
            f"batch {batch}: {cost.hbm_bytes / 1e9:.2f} GB a chip "
            f"(the compiler's peak: {cost.peak_bytes / 1e9:.2f}), {1e3 * cost.seconds:.1f} ms = "
            f"{1e3 * cost.compute_seconds:.1f} compute + "
            f"{1e3 * cost.collective_seconds:.1f} collectives; "
            f"not counted: {1e3 * cost.unpriced_seconds:.1f} ms or more for {cost.unpriced}"
        )
    if not options.json:
        print("\n".join(cost.assumptions))


if __name__ == "__main__":
    main()
