"""What the JAX backend must know of a kernel to spread a batch over devices."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def batch_parallel(function, num_shared=0):
    """Returns `function`, each example of which is computed where it lies.

    XLA cannot look into a kernel. Of a batch that is spread over devices, each of them
    would else collect and compute all. `jax.vmap` makes the batch larger.

    Args:
        function: Function from arrays to a tuple of arrays. The first axis of each is
            the batch, and results of an example depend on nothing but that example and
            what is shared.
        num_shared: int. How many arrays, the first ones, have no batch.
    """

    def sharding(mesh, args):
        axes = args[num_shared].sharding.spec[:1]
        return NamedSharding(mesh, PartitionSpec(*axes))

    @custom_partitioning
    def partitioned(*args):
        return function(*args)

    def partition(mesh, args, results):
        by_batch, whole = sharding(mesh, args), NamedSharding(mesh, PartitionSpec())
        arguments = [whole] * num_shared + [by_batch] * (len(args) - num_shared)
        return mesh, function, (by_batch,) * len(results), tuple(arguments)

    partitioned.def_partition(
        partition,
        infer_sharding_from_operands=lambda mesh, args, results: tuple(
            sharding(mesh, args) for _ in results
        ),
        sharding_rule=functools.partial(_sharding_rule, num_shared),
    )

    @custom_vmap
    def batched(*args):
        return partitioned(*args)

    @batched.def_vmap
    def rule(size, are_batched, *args):
        if any(are_batched[:num_shared]):

            def one(args_here):
                rest = iter(args_here)
                return batched(
                    *(next(rest) if y else x for x, y in zip(args, are_batched))
                )

            results = jax.lax.map(one, [x for x, y in zip(args, are_batched) if y])
            return results, (True,) * len(results)
        merged = [
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in list(zip(args, are_batched))[num_shared:]
        ]
        merged = (x.reshape(-1, *x.shape[2:]) for x in merged)
        results = batched(*args[:num_shared], *merged)
        results = tuple(x.reshape(size, -1, *x.shape[1:]) for x in results)
        return results, (True,) * len(results)

    return batched


def _sharding_rule(num_shared, mesh, args, results):
    """Only the first axis of what has a batch may be spread."""
    whole = []

    def axes(x, has_batch=True):
        names = [f"a{len(whole) + i}" for i in range(len(x.shape) - has_batch)]
        whole.extend(names)
        return " ".join(["b", *names] if has_batch else names)

    operands = [axes(x, i >= num_shared) for i, x in enumerate(args)]
    rule = " -> ".join(map(", ".join, (operands, map(axes, results))))
    return rule, {"need_replication_factors": tuple(whole)}
