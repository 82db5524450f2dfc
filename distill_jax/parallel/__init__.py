"""The device mesh and the one table that says which logical axis is split over it."""

from distill_jax.parallel.mesh import RULES, MeshConfig, batch_sharding, make_mesh, shardings

__all__ = ["RULES", "MeshConfig", "batch_sharding", "make_mesh", "shardings"]
