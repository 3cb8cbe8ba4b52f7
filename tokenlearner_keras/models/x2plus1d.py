from collections.abc import Callable, Sequence

import keras

from tokenlearner_keras.layers import FrameConv2D, TemporalConv1D
from tokenlearner_keras.layers._batch_normalization import BatchNormalization
from tokenlearner_keras.layers._checks import check_choice, check_rate
from tokenlearner_keras.models.space_time_module import (
    apply_module,
    check_module,
    check_module_options,
)
from tokenlearner_keras.models.x2plus1d_config import X2Plus1DConfig

VARIANTS = {"M": X2Plus1DConfig()}


def x2plus1d(
    variant: str | X2Plus1DConfig = "M",
    input_shape: tuple[int | None, ...] = (64, 224, 224, 3),
    num_classes: int | None = 157,
    temporal_module: str = "conv2d+token_learner",
    num_tokens: int = 8,
    attention: str | None = None,
    tokenizer: str | Callable[[int], keras.layers.Layer] = "token_learner",
    fuser: str = "token_fuser",
    num_heads: int = 8,
    key_dim: int = 16,
    attention_method: str = "auto",
    depthwise: bool | Sequence[bool] = False,
    dropout: float = 0.5,
    classifier_activation: str | None = None,
    dtype=None,
    name: str | None = None,
) -> keras.Model:
    """Builds an X(2+1)D network, with a space-time module in its last stage.

    The backbone of section 5.1 of
    [TokenLearner](https://arxiv.org/abs/2106.11297v1): the depths, widths and strides
    of [X3D](https://arxiv.org/abs/2004.04730)-M, every 3-D convolution replaced by a
    2-D and a 1-D one, without squeeze-excitation and swish. Every block of the last
    stage is figure 7's inverted bottleneck around `temporal_module`. A batch norm and a
    ReLU follow every part of a block but those that add their input themselves
    (TokenLearner with its fuser, the MLP mixer). The stem halves
    height and width, and so does each stage; frames are never strided. Where the last
    stage's module has no convolution to stride, a 2 x 2 average pool in front of its
    first block does it.

    Args:
        variant: `"M"` or an `X2Plus1DConfig`.
        input_shape: `(time, height, width, channels)`. Time may be `None`, for clips of
            any length, unless weights depend on it (TokenFuser, `conv2d+mlp_mixer` and
            prior attention); height and width may be `None` as well.
        num_classes: int, or `None` for the features behind the spatio-temporal pooling.
        temporal_module: Name of the module of the last stage's blocks, see
            `space_time_module`. `"conv2d+conv1d"` is the plain backbone.
        num_tokens: int. Learned tokens of each frame.
        attention: See `space_time_module`, as the next five arguments.
        tokenizer: What makes the tokens.
        fuser: What brings them back to the pixels.
        num_heads: int. Heads of multi-head attention.
        key_dim: int. Channels of the queries and keys of each head.
        attention_method: `method` of `VectorAttention`.
        depthwise: bool, or one for each stage. Whether the convolutions of a stage are
            depthwise. The paper's tables show full ones in the last stage.
        dropout: float. Dropout rate in front of the classifier.
        classifier_activation: `None` for logits, `"sigmoid"` for labels that may hold
            together (Charades) or `"softmax"` for one label (AViD).
        dtype: Dtype or dtype policy of the layers. The classifier computes at least in
            float32.
        name: Name of the model.

    Returns:
        A functional model from clips `(batch, time, height, width, channels)` to logits
        or probabilities `(batch, num_classes)`, or to features.

    Raises:
        ValueError: for an unknown variant or module (the error lists the names), an
            argument out of range, an unknown size that weights depend on, or more
            tokens than pixels in the last stage.

    Example:

    >>> model = x2plus1d(input_shape=(64, 224, 224, 3), num_classes=157)
    >>> model.output_shape
    (None, 157)
    """
    config = _check_variant(variant)
    parts = check_module(temporal_module)
    stages = len(config.depths)
    if isinstance(depthwise, bool):
        depthwise = (depthwise,) * stages
    if len(depthwise) != stages or not all(isinstance(d, bool) for d in depthwise):
        raise ValueError(
            f"Argument `depthwise` must be a bool or {stages} bools, one for each "
            f"stage. Received: depthwise={depthwise!r}"
        )
    if len(input_shape) != 4 or input_shape[-1] is None:
        raise ValueError(
            "Argument `input_shape` must be (time, height, width, channels), with "
            f"known channels. Received: input_shape={input_shape}"
        )
    check_rate("dropout", dropout)
    if classifier_activation is not None:
        check_choice(
            "classifier_activation", classifier_activation, ("sigmoid", "softmax")
        )
    options = check_module_options(
        num_tokens=num_tokens,
        attention=attention,
        tokenizer=tokenizer,
        fuser=fuser,
        num_heads=num_heads,
        key_dim=key_dim,
        attention_method=attention_method,
        depthwise=False,
        dtype=dtype,
    )

    inputs = keras.Input(input_shape, name="clips")
    x = FrameConv2D(config.stem_filters, strides=2, dtype=dtype, name="stem_conv2d")(
        inputs
    )
    x = TemporalConv1D(kernel_size=5, depthwise=True, dtype=dtype, name="stem_conv1d")(
        x
    )
    x = _norm_relu(x, dtype, "stem")
    for stage, (filters, depth) in enumerate(zip(config.filters, config.depths)):
        last = stage == stages - 1
        for index in range(depth):
            x = _block(
                x,
                filters,
                int(config.expansion * filters),
                strides=2 if index == 0 else 1,
                parts=parts if last else ("conv2d", "conv1d"),
                options={**options, "depthwise": depthwise[stage]},
                name=f"stage_{stage}_block_{index}_",
            )

    inner = int(config.expansion * config.filters[-1])
    x = _pointwise(inner, dtype, "head_expand")(x)
    x = _norm_relu(x, dtype, "head")
    x = keras.layers.GlobalAveragePooling3D(dtype=dtype, name="pool")(x)
    if num_classes is not None:
        x = keras.layers.Dense(
            config.head_filters,
            activation="relu",
            use_bias=False,
            dtype=dtype,
            name="head_hidden",
        )(x)
        x = keras.layers.Dropout(dropout, dtype=dtype, name="head_dropout")(x)
        x = keras.layers.Dense(
            num_classes,
            activation=classifier_activation,
            dtype=_at_least_float32(dtype),
            name="classifier",
        )(x)
    return keras.Model(inputs, x, name=name or "x2plus1d")


def _check_variant(variant):
    if isinstance(variant, X2Plus1DConfig):
        if len(variant.filters) != len(variant.depths) or not variant.depths:
            raise ValueError(
                "Argument `variant` must have as many `filters` as `depths`. "
                f"Received: variant={variant}"
            )
        return variant
    if variant not in VARIANTS:
        raise ValueError(
            f"Argument `variant` must be one of {tuple(VARIANTS)} or an "
            f"`X2Plus1DConfig`. Received: variant={variant!r}"
        )
    return VARIANTS[variant]


def _block(x, filters, inner, strides, parts, options, name):
    """Figure 7: expand, module, project, residual."""
    dtype = options["dtype"]
    shortcut = x
    if strides > 1 or x.shape[-1] != filters:
        shortcut = FrameConv2D(
            filters, 1, strides, dtype=dtype, name=f"{name}shortcut"
        )(x)
        if x.shape[-1] != filters:
            shortcut = _norm(dtype, f"{name}shortcut_norm")(shortcut)
    if strides > 1 and "conv2d" not in parts:
        x = keras.layers.AveragePooling3D(
            (1, strides, strides), padding="same", dtype=dtype, name=f"{name}pool"
        )(x)
    x = _pointwise(inner, dtype, f"{name}expand")(x)
    x = _norm_relu(x, dtype, f"{name}expand")
    x = apply_module(
        x,
        parts,
        options,
        strides=strides,
        between=lambda x, part: _norm_relu(x, dtype, part),
        prefix=name,
    )
    x = _pointwise(filters, dtype, f"{name}project")(x)
    # Starting at zero, as X3D does: a new block is the identity.
    x = _norm(dtype, f"{name}project_norm", gamma_initializer="zeros")(x)
    x = keras.layers.Add(dtype=dtype, name=f"{name}add")([x, shortcut])
    return keras.layers.ReLU(dtype=dtype, name=f"{name}relu")(x)


def _pointwise(filters, dtype, name):
    """A convolution of one pixel and frame."""
    return keras.layers.Dense(filters, use_bias=False, dtype=dtype, name=name)


def _norm(dtype, name, **arguments):
    return BatchNormalization(
        momentum=0.9, epsilon=1e-5, dtype=dtype, name=name, **arguments
    )


def _norm_relu(x, dtype, name):
    x = _norm(dtype, f"{name}_norm")(x)
    return keras.layers.ReLU(dtype=dtype, name=f"{name}_relu")(x)


def _at_least_float32(dtype):
    """float32, unless the layers compute in float64."""
    policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
    return "float64" if policy.compute_dtype == "float64" else "float32"
