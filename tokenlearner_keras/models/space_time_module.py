from collections.abc import Callable

import keras
from keras import ops

from tokenlearner_keras.layers import (
    DenseTokenizer,
    FrameConv2D,
    GridTokenizer,
    MultiHeadSelfAttention,
    PoolingTokenizer,
    PriorAttention,
    SpaceTimeAttention,
    TemporalConv1D,
    TokenFuser,
    TokenLearner,
    VectorAttention,
)
from tokenlearner_keras.layers._checks import check_choice, check_positive_int

# The rows of Tables 4 and 5, as the parts that run one after the other.
MODULES = {
    "joint": ("joint",),
    "conv2d+joint": ("conv2d", "joint"),
    "token_learner": ("token_learner",),
    "conv2d+token_learner": ("conv2d", "token_learner"),
    "conv2d+conv1d": ("conv2d", "conv1d"),
    "conv2d+mlp_mixer": ("conv2d", "mlp_mixer"),
    "conv2d+temporal": ("conv2d", "temporal"),
    "spatial+temporal": ("spatial", "temporal"),
    "conv2d+spatial+temporal": ("conv2d", "spatial", "temporal"),
    "spatial+token_learner": ("spatial", "token_learner"),
}
# The parts that end by adding their input.
RESIDUAL = ("mlp_mixer", "token_learner")
ATTENTIONS = ("multi_head", "vector", "prior")
TOKENIZERS = ("token_learner", "grid", "dense", "pooling", "mean")
FUSERS = ("token_fuser", "broadcast")
_OVER = {"joint": "space_time", "spatial": "space", "temporal": "time"}


def space_time_module(
    name: str,
    input_shape: tuple[int | None, ...] = (64, 8, 8, 432),
    num_tokens: int = 8,
    attention: str | None = None,
    tokenizer: str | Callable[[int], keras.layers.Layer] = "token_learner",
    fuser: str = "token_fuser",
    num_heads: int = 8,
    key_dim: int = 16,
    attention_method: str = "auto",
    depthwise: bool = False,
    dtype=None,
) -> keras.Model:
    """Builds one space-time module of the paper's video models, a row of its tables.

    The modules that [TokenLearner](https://arxiv.org/abs/2106.11297v1) compares in the
    last stage of `x2plus1d` (Tables 4 and 5), bare: bias-free, without the norms and
    the bottleneck around them. Parts in a name run one after the other:

    - `conv2d`: a 3 x 3 convolution of every frame.
    - `conv1d`: a convolution over 3 frames at every pixel.
    - `joint`, `spatial`, `temporal`: self-attention over all pixels of the clip, over
      the pixels of each frame, over the frames at each pixel.
    - `mlp_mixer`: the frames' spatial means, mixed by an MLP over the frames and an MLP
      over the channels, broadcast to the pixels and added.
    - `token_learner`: TokenLearner with one convolution and a linear map of every
      pixel, vector attention between all tokens of the clip, TokenFuser.

    Table 6's combinations are arguments: `"conv2d+temporal"` with `attention` (standard
    or vector transformer at each pixel), `"conv2d+token_learner"` with
    `tokenizer="mean"` and `attention`, `fuser` (attention between frames), or with
    `attention="multi_head"`.

    Args:
        name: One of the names above: `"joint"`, `"conv2d+joint"`, `"token_learner"`,
            `"conv2d+token_learner"`, `"conv2d+conv1d"`, `"conv2d+mlp_mixer"`,
            `"conv2d+temporal"`, `"spatial+temporal"`, `"conv2d+spatial+temporal"` or
            `"spatial+token_learner"`.
        input_shape: `(time, height, width, channels)`. Channels must be known; sizes
            that no weight depends on may be `None`.
        num_tokens: int. Learned tokens of each frame.
        attention: `"multi_head"`, `"vector"`, `"prior"` (weights that do not depend on
            the input) or `None`: `"vector"` between learned tokens, `"multi_head"`
            elsewhere.
        tokenizer: What makes tokens in `token_learner`: `"token_learner"`, the
            alternatives of section 5.3 `"grid"`, `"dense"` and `"pooling"`, `"mean"`
            (one token a frame, its spatial mean), or a function from `num_tokens` to a
            layer.
        fuser: What brings tokens back to the pixels in `token_learner`:
            `"token_fuser"`, or `"broadcast"` (every pixel takes the mean of its frame's
            tokens). Both add the input.
        num_heads: int. Heads of multi-head attention.
        key_dim: int. Channels of the queries and keys of each head.
        attention_method: `method` of `VectorAttention`.
        depthwise: bool. Whether the convolutions are depthwise.
        dtype: Dtype or dtype policy of the layers.

    Returns:
        A functional model from clips to tensors of the same shape.

    Raises:
        ValueError: for an unknown name, an argument out of range, or a size that is not
            known although weights depend on it.

    Example:

    >>> model = space_time_module("conv2d+token_learner")
    >>> model.count_params()
    2489984
    """
    parts = check_module(name)
    options = check_module_options(
        num_tokens=num_tokens,
        attention=attention,
        tokenizer=tokenizer,
        fuser=fuser,
        num_heads=num_heads,
        key_dim=key_dim,
        attention_method=attention_method,
        depthwise=depthwise,
        dtype=dtype,
    )
    if len(input_shape) != 4:
        raise ValueError(
            "Argument `input_shape` must be (time, height, width, channels). "
            f"Received: input_shape={input_shape}"
        )
    inputs = keras.Input(input_shape, name="inputs")
    outputs = apply_module(inputs, parts, options)
    return keras.Model(inputs, outputs, name=name.replace("+", "_"))


def check_module(name: str) -> tuple[str, ...]:
    """Returns the parts of the module of this name, else raises `ValueError`."""
    if name not in MODULES:
        raise ValueError(
            f"Unknown space-time module. Expected one of {tuple(MODULES)}. "
            f"Received: {name!r}"
        )
    return MODULES[name]


def check_module_options(**options) -> dict:
    """Returns the arguments of `space_time_module` after `input_shape`, checked."""
    check_positive_int("num_tokens", options["num_tokens"])
    if options["attention"] is not None:
        check_choice("attention", options["attention"], ATTENTIONS)
    if not callable(options["tokenizer"]):
        check_choice("tokenizer", options["tokenizer"], TOKENIZERS)
    check_choice("fuser", options["fuser"], FUSERS)
    return options


def apply_module(x, parts, options, strides=1, between=None, prefix=""):
    """Applies the parts of a module to a symbolic tensor.

    Args:
        x: Symbolic tensor `(batch, time, height, width, channels)`.
        parts: A value of `MODULES`.
        options: What `check_module_options` returned.
        strides: int. Spatial stride of the 2-D convolution.
        between: Function from `(x, name)` to a tensor, applied after every part that
            does not end by adding its input.
        prefix: Start of the layers' names.
    """
    for part in parts:
        name = prefix + part
        if part == "conv2d":
            x = FrameConv2D(
                strides=strides,
                depthwise=options["depthwise"],
                dtype=options["dtype"],
                name=name,
            )(x)
        elif part == "conv1d":
            x = TemporalConv1D(
                depthwise=options["depthwise"], dtype=options["dtype"], name=name
            )(x)
        elif part == "mlp_mixer":
            x = _mlp_mixer(x, options["dtype"], name)
        elif part == "token_learner":
            x = _token_learner(x, options, prefix)
        else:
            attention = _attention(options, "multi_head", f"{name}_attention")
            if options["attention"] == "prior":
                axes = {"joint": [1, 2, 3], "spatial": [2, 3], "temporal": [1]}[part]
                _check_known(x, axes, "prior attention")
            x = SpaceTimeAttention(
                attention, _OVER[part], dtype=options["dtype"], name=name
            )(x)
        if between is not None and part not in RESIDUAL:
            x = between(x, name)
    return x


def _attention(options, default, name):
    kind = options["attention"] or default
    common = {"dtype": options["dtype"], "name": name}
    if kind == "multi_head":
        return MultiHeadSelfAttention(
            options["num_heads"], options["key_dim"], **common
        )
    if kind == "vector":
        return VectorAttention(method=options["attention_method"], **common)
    return PriorAttention(**common)


def _token_learner(x, options, prefix):
    channels = x.shape[-1]
    num_tokens, dtype = options["num_tokens"], options["dtype"]
    tokenizer = options["tokenizer"]
    common = {"dtype": dtype, "name": f"{prefix}token_learner"}
    if options["fuser"] == "token_fuser":
        _check_known(x, [1], "TokenFuser")
    if options["attention"] == "prior":
        _check_known(x, [1], "prior attention")
    if callable(tokenizer):
        tokens = tokenizer(num_tokens)(x)
    elif tokenizer == "mean":
        tokens = ops.mean(x, axis=(2, 3))
    elif tokenizer == "token_learner":
        tokens = TokenLearner.video(num_tokens, value_dim=channels, **common)(x)
    else:
        layer = {
            "grid": GridTokenizer,
            "dense": DenseTokenizer,
            "pooling": PoolingTokenizer,
        }[tokenizer]
        tokens = layer(num_tokens, **common)(x)
    tokens = _attention(options, "vector", f"{prefix}token_attention")(tokens)
    if options["fuser"] == "token_fuser":
        fuser = TokenFuser("broadcast", dtype=dtype, name=f"{prefix}token_fuser")
        return fuser([tokens, x])
    if tokenizer != "mean":
        # Tokens are frame-major: each pool is a frame.
        tokens = keras.layers.AveragePooling1D(
            num_tokens, dtype=dtype, name=f"{prefix}token_mean"
        )(tokens)
    return x + ops.expand_dims(tokens, (2, 3))


def _mlp_mixer(x, dtype, name):
    """MLPs over the frames and over the channels, of the frames' spatial means."""
    _check_known(x, [1], "MLPMixer")
    time, channels = x.shape[1], x.shape[-1]
    frames = ops.mean(x, axis=(2, 3))
    for axis, equation in (("frames", "btc,ts->bsc"), ("channels", "btc,cd->btd")):
        y = frames
        for index in range(2):
            y = keras.layers.EinsumDense(
                equation,
                output_shape=(time, channels),
                dtype=dtype,
                name=f"{name}_{axis}_{index}",
            )(y)
            if index == 0:
                y = keras.activations.gelu(y, approximate=True)
        frames = frames + y
    return x + ops.expand_dims(frames, (2, 3))


def _check_known(x, axes, what):
    """Raises `ValueError` unless these sizes, on which weights depend, are known."""
    if None in [x.shape[axis] for axis in axes]:
        sizes = [("batch", "time", "height", "width")[axis] for axis in axes]
        raise ValueError(
            f"Argument `input_shape` must fix {', '.join(sizes)}: the weights of "
            f"{what} depend on it. Received: input_shape={tuple(x.shape[1:])}. Choose "
            "another module or fuser for clips of any length."
        )
