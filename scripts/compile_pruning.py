"""Compiles the cut of a sharded Llama 3.1 8B for devices that are not there: memory of each.

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python scripts/compile_pruning.py
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python scripts/compile_pruning.py --topology v5e:4x4

The second needs the `tpu` extra (libtpu holds the compiler). Parameters are abstract and nothing is
executed: memory is what the compiler sets aside. `gathered` is the largest array that some device
is given whole; a layer of the 8B is 218 million parameters.
"""

import argparse
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "pruning"))

import tiny

from distill_jax import models, parallel, pruning
from distill_jax.models import presets
from distill_jax.parallel import tpu_cost
from distill_jax.parallel.topology import Topology

SOURCE = presets.LLAMA_3_1_8B
TARGETS = {"1b": presets.LLAMA_3_2_1B, "3b": presets.LLAMA_3_2_3B}


def make_mesh(topology: str | None, tensor: int) -> Mesh:
    devices = None if topology is None else Topology.parse(topology).devices()
    return parallel.make_mesh(parallel.MeshConfig(tensor=tensor), devices)


def compile_cut(target: models.LlamaConfig, mesh: Mesh, dtype: jnp.dtype):
    plan = pruning.make_plan(tiny.random_scores(SOURCE), SOURCE, target)

    def placed(config):
        shapes = models.abstract_params(config, dtype)
        return shapes, parallel.shardings(mesh, models.logical_axes(config), shapes)

    shapes, before = placed(SOURCE)
    _, after = placed(target)
    cut = jax.jit(
        lambda params: pruning.apply_plan(plan, params, mesh=mesh),
        in_shardings=(before,),
        out_shardings=after,
    )
    return cut.lower(shapes).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--topology", help="such as v5e:4x4; the devices of this machine if left out"
    )
    parser.add_argument("--target", default="1b", choices=sorted(TARGETS))
    parser.add_argument(
        "--tensor", type=int, default=2, help="devices that share heads and neurons"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    mesh = make_mesh(options.topology, options.tensor)
    dtype = jnp.dtype(options.dtype)
    compiled = compile_cut(TARGETS[options.target], mesh, dtype)
    stats = compiled.memory_analysis()
    layer = (SOURCE.non_embedding_parameters - SOURCE.embed) // SOURCE.layers
    figures = {
        "devices": mesh.size,
        "memory_bytes": tpu_cost.memory_bytes(stats),
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "temporary_bytes": stats.temp_size_in_bytes,
        "gathered_bytes": tpu_cost.largest_gathered(compiled.as_text()),
        "layer_bytes": layer * dtype.itemsize,
    }
    print(
        f"8B -> {options.target}, {options.dtype}, {mesh.size} devices: "
        + ", ".join(
            f"{name} {value / 1e9:.3f} GB" for name, value in figures.items() if "bytes" in name
        ),
        file=sys.stderr,
    )
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
