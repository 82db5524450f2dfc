"""The device mesh and the one table that says which logical axis is split over it."""

from distill_jax.parallel.mesh import (
    ROW_AXES,
    RULES,
    MeshConfig,
    batch_sharding,
    make_mesh,
    shardings,
)

__all__ = ["ROW_AXES", "RULES", "MeshConfig", "batch_sharding", "make_mesh", "shardings"]
