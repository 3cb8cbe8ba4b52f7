"""What keras.ops has no backend-neutral form of, or none that compiles quickly.

A function with a hand-written gradient, a loop that XLA can differentiate, a switch.
"""

import keras
from keras import ops


def unconverted(function):
    """Keeps AutoGraph from rewriting a function and all that it calls.

    Reading and rewriting the source takes time, and there is nothing to convert.
    """
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.autograph.experimental.do_not_convert(function)


def with_gradient(forward, backward):
    """Returns a function of float tensors whose gradient is `backward`.

    Args:
        forward: Function from tensors to a pair, the output and a tuple of residuals.
        backward: Function `(args, residuals, upstream)` that returns the gradient with
            respect to each argument, `None` where it is zero.

    Returns:
        Function from the tensors to the output. Second derivatives are those of
        `forward` and `backward` by automatic differentiation.
    """
    name = keras.backend.backend()
    if name == "tensorflow":
        return _tensorflow_gradient(forward, backward)
    if name == "jax":
        return _jax_gradient(forward, backward)
    if name == "torch":
        return _torch_gradient(forward, backward)
    return lambda *args: forward(*args)[0]


def _jax_gradient(forward, backward):
    import jax

    @jax.custom_vjp
    def function(*args):
        return forward(*args)[0]

    def forward_rule(*args):
        output, residuals = forward(*args)
        return output, (args, residuals)

    def backward_rule(saved, upstream):
        args, residuals = saved
        gradients = backward(args, residuals, upstream)
        return tuple(
            ops.zeros_like(a) if g is None else g for a, g in zip(args, gradients)
        )

    function.defvjp(forward_rule, backward_rule)
    return function


def _tensorflow_gradient(forward, backward):
    import tensorflow as tf

    @tf.custom_gradient
    def function(*args):
        output, residuals = forward(*args)

        # The residuals are constants to TensorFlow. So the second derivative, which
        # needs what they depend on, starts from the arguments once more.
        @tf.custom_gradient
        def gradient(upstream, *args):
            gradients = backward(args, residuals, upstream)
            gradients = tuple(
                tf.zeros_like(a) if g is None else g for a, g in zip(args, gradients)
            )

            def second_gradient(*second_upstream):
                variables = (upstream, *args)
                with tf.GradientTape() as tape:
                    tape.watch(variables)
                    _, again = forward(*args)
                    outputs = backward(args, again, upstream)
                kept = [i for i, g in enumerate(outputs) if g is not None]
                return tape.gradient(
                    [outputs[i] for i in kept],
                    variables,
                    [second_upstream[i] for i in kept],
                    unconnected_gradients="zero",
                )

            return gradients, second_gradient

        return output, lambda upstream: gradient(upstream, *args)

    return function


def _torch_gradient(forward, backward):
    import torch

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(context, number, upstream, *saved):
            context.number = number
            args, residuals = saved[:number], saved[number:]
            context.save_for_backward(upstream, *args)
            gradients = backward(args, residuals, upstream)
            return tuple(
                torch.zeros_like(a) if g is None else g for a, g in zip(args, gradients)
            )

        @staticmethod
        def backward(context, *second_upstream):
            with torch.enable_grad():
                variables = [
                    x.detach().requires_grad_(True) for x in context.saved_tensors
                ]
                upstream, *args = variables
                _, residuals = forward(*args)
                outputs = backward(args, residuals, upstream)
                kept = [i for i, g in enumerate(outputs) if g is not None]
                gradients = torch.autograd.grad(
                    [outputs[i] for i in kept],
                    variables,
                    [second_upstream[i] for i in kept],
                    allow_unused=True,
                )
            saved = context.needs_input_grad[2 + context.number :]
            return (None, *gradients, *(None for _ in saved))

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(context, *args):
            output, residuals = forward(*args)
            context.number = len(args)
            context.save_for_backward(*args, *residuals)
            return output

        @staticmethod
        def backward(context, upstream):
            return Gradient.apply(context.number, upstream, *context.saved_tensors)

    return Function.apply


def loop(count, body, init):
    """Returns the result of `carry = body(index, carry)` for every index below `count`.

    Args:
        count: int, or integer tensor on the TensorFlow backend.
        body: Function from an index and a tuple of tensors to a tuple of tensors.
        init: Tuple of tensors.
    """
    name = keras.backend.backend()
    if name == "jax":
        import jax

        return jax.lax.fori_loop(0, count, body, init)
    if name == "tensorflow":
        import tensorflow as tf

        return tf.while_loop(
            lambda i, _: i < count,
            lambda i, carry: (i + 1, body(i, carry)),
            (tf.constant(0), init),
            # XLA can only differentiate a loop of known length.
            maximum_iterations=count,
        )[1]
    for index in range(count):
        init = body(index, init)
    return init


def stored(x):
    """Returns a tensor that XLA on JAX keeps in memory, whoever uses it.

    On a GPU it would join a softmax and the sum that its weights are for in one Triton
    kernel, and compile that for minutes.
    """
    if keras.backend.backend() != "jax":
        return x
    import jax

    return jax.lax.optimization_barrier(x)


def switch(index, branches, like):
    """Returns the result of one of the branches.

    Args:
        index: int32 scalar tensor.
        branches: Functions without arguments, to tuples of tensors.
        like: Tuple of tensors of the results' shapes and dtypes.
    """
    if keras.backend.backend() != "tensorflow":
        return ops.switch(index, branches)
    import tensorflow as tf

    # Not `switch_case`: TensorFlow's bridge to XLA asks whether its index is constant,
    # and walks for minutes through what a series was computed from.
    def choose(first):
        if first == len(branches) - 1:
            return branches[first]()
        return tf.cond(index <= first, branches[first], lambda: choose(first + 1))

    results = choose(0)
    for result, shape in zip(results, like):
        result.set_shape(shape.shape)
    return results
