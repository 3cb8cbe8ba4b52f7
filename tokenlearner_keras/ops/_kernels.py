"""What the kernels of the JAX backend share: how they are differentiated."""

import jax
import jax.numpy as jnp


def with_kernels(forward, backward, plain):
    """Returns a function of which kernels compute the values and the gradients.

    A kernel cannot be differentiated, and none is: second derivatives are those of
    array operations.

    Args:
        forward: Function of a tuple of arrays, of the constants, and of `save`, which
            says whether gradients will be asked for. Returns a tuple: the output and,
            with `save`, arrays for `backward`.
        backward: Function of the same arrays and constants, of the tuple of what
            `forward` saved, and of the gradient by the output. Returns the gradients by
            the arrays, a tuple.
        plain: Function of the arrays and constants to the output, by array operations.

    Returns:
        Function of the tuple of arrays and the constants, any tree of arrays, by which
        the gradient is zero.
    """

    @jax.custom_vjp
    def gradients(args, constants, saved, upstream):
        return backward(args, constants, saved, upstream)

    def second_rule(residuals, upstreams):
        args, constants, saved, upstream = residuals

        def plain_gradients(args, upstream):
            pullback = jax.vjp(lambda *args: plain(args, constants), *args)[1]
            return pullback(upstream)

        to_args, to_upstream = jax.vjp(plain_gradients, args, upstream)[1](upstreams)
        # What the forward kernel leaves behind depends on the arguments alone, so that
        # the derivative of the gradients by the arguments is all there is.
        return to_args, _zeros(constants), _zeros(saved), to_upstream

    gradients.defvjp(lambda *args: (gradients(*args), args), second_rule)

    # A function of its own, so that the kernel itself is never differentiated.
    @jax.custom_vjp
    def outputs(args, constants):
        return forward(args, constants, save=True)

    def outputs_rule(args, constants):
        results = outputs(args, constants)
        return results, (args, constants, results[1:])

    def backward_rule(residuals, upstreams):
        return gradients(*residuals, upstreams[0]), _zeros(residuals[1])

    outputs.defvjp(outputs_rule, backward_rule)

    @jax.custom_vjp
    def function(args, constants):
        return forward(args, constants, save=False)[0]

    def function_rule(args, constants):
        results, residuals = outputs_rule(args, constants)
        return results[0], residuals

    function.defvjp(
        function_rule,
        lambda residuals, upstream: backward_rule(residuals, (upstream,)),
    )
    return function


def _zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)
