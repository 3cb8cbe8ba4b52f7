"""What the image and the video Transformers share: arguments, encoder and head."""

import dataclasses
import math
from collections.abc import Callable

import keras

from tokenlearner_keras.layers import (
    ClassToken,
    PositionEmbedding,
    TokenFuser,
    TokenLearner,
    TransformerBlock,
)
from tokenlearner_keras.layers._checks import (
    check_choice,
    check_positive_int,
    check_rate,
)
from tokenlearner_keras.layers._layer_normalization import LayerNormalization
from tokenlearner_keras.models.vit_config import ViTConfig

CLASSIFIERS = ("gap", "token", None)
TOKEN_LEARNERS = ("v1", "v10", "v11")


@dataclasses.dataclass
class EncoderArguments:
    """The arguments that `vit` and `vivit` share, checked."""

    config: ViTConfig
    num_classes: int
    num_layers: int | None
    num_tokens: int | None
    tokenizer_location: float | int
    token_learner: str | Callable[[int], keras.layers.Layer]
    token_fuser: bool
    classifier: str | None
    representation_size: int | None
    dropout: float
    attention_dropout: float
    stochastic_depth: float
    classifier_activation: object
    dtype: object

    def __post_init__(self):
        if self.num_layers is None:
            self.num_layers = self.config.num_layers
        check_positive_int("num_layers", self.num_layers)
        check_choice("classifier", self.classifier, CLASSIFIERS)
        if self.classifier is not None:
            check_positive_int("num_classes", self.num_classes)
        if self.representation_size is not None:
            check_positive_int("representation_size", self.representation_size)
        for name in ("dropout", "attention_dropout", "stochastic_depth"):
            check_rate(name, getattr(self, name))
        if not callable(self.token_learner):
            check_choice("token_learner", self.token_learner, TOKEN_LEARNERS)
        # Index of the first block that sees learned tokens.
        self.location = self.num_layers
        if self.num_tokens is not None:
            check_positive_int("num_tokens", self.num_tokens)
            self.location = resolve_location(self.tokenizer_location, self.num_layers)
        elif self.token_fuser:
            raise ValueError(
                "Argument `token_fuser=True` fuses learned tokens and so needs "
                "`num_tokens`. Received: num_tokens=None"
            )

    def make_token_learner(self, name) -> keras.layers.Layer:
        """Returns a new token learner, named `name`."""
        if isinstance(self.token_learner, str):
            make = getattr(TokenLearner, self.token_learner)
            return make(self.num_tokens, name=name, dtype=self.dtype)
        layer = self.token_learner(self.num_tokens)
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(
                "Argument `token_learner` must be one of "
                f"{TOKEN_LEARNERS} or a function from `num_tokens` to a Keras layer. "
                f"Received: a function that returned {layer!r}"
            )
        # One name, so that features are found by it whatever the tokenizer.
        layer.name = name
        return layer


def resolve_location(location, num_layers: int) -> int:
    """Returns the index of the block that `tokenizer_location` stands before."""
    expected = (
        "Argument `tokenizer_location` must be an integer index or a fraction in "
        f"[0, 1) of the {num_layers} blocks. "
        f"Received: tokenizer_location={location!r}"
    )
    if isinstance(location, bool) or not isinstance(location, (int, float)):
        raise ValueError(expected)
    is_index = isinstance(location, int)
    if not 0 <= location < (num_layers if is_index else 1):
        raise ValueError(expected)
    return location if is_index else math.floor(location * num_layers)


def encode(x, grid_shape, arguments: EncoderArguments):
    """Adds the encoder to embedded patches, all layers named.

    Args:
        x: KerasTensor of shape `(batch, positions, hidden_dim)`.
        grid_shape: The grid that the positions are, `(height, width)` or
            `(time, height, width)`.
        arguments: The builder's arguments.

    Returns:
        The layer-normalised tokens, class token first if there is one.
    """
    dtype = arguments.dtype
    hidden_dim = x.shape[-1]

    # === Layers ===
    blocks = [
        TransformerBlock(
            arguments.config.num_heads,
            arguments.config.mlp_dim,
            dropout=arguments.dropout,
            attention_dropout=arguments.attention_dropout,
            # From 0 in the first block to the given rate in the last.
            stochastic_depth=arguments.stochastic_depth
            * index
            / max(arguments.num_layers - 1, 1),
            name=f"block_{index}",
            dtype=dtype,
        )
        for index in range(arguments.num_layers)
    ]
    to_grid = keras.layers.Reshape((*grid_shape, hidden_dim), name="grid", dtype=dtype)
    to_sequence = keras.layers.Reshape((-1, hidden_dim), name="sequence", dtype=dtype)

    # === Functional Model ===
    has_class_token = arguments.classifier == "token"
    if has_class_token:
        x = ClassToken(name="class_token", dtype=dtype)(x)
    x = PositionEmbedding(name="position_embedding", dtype=dtype)(x)
    x = keras.layers.Dropout(arguments.dropout, name="embedding_dropout", dtype=dtype)(
        x
    )
    for block in blocks[: arguments.location]:
        x = block(x)
    if arguments.location < arguments.num_layers:
        # The class token is no position of the grid: it goes round the tokenizer.
        class_token = None
        if has_class_token:
            class_token, x = x[:, :1], x[:, 1:]
        x = to_grid(x)
        if arguments.token_fuser:
            for index in range(arguments.location, arguments.num_layers):
                tokens = arguments.make_token_learner(f"token_learner_{index}")(x)
                tokens = blocks[index](_join(class_token, tokens))
                if has_class_token:
                    class_token, tokens = tokens[:, :1], tokens[:, 1:]
                fuser = TokenFuser(
                    mode="attention",
                    dropout=arguments.dropout,
                    name=f"token_fuser_{index}",
                    dtype=dtype,
                )
                x = fuser([tokens, x])
            x = _join(class_token, to_sequence(x))
        else:
            x = arguments.make_token_learner("token_learner")(x)
            x = _join(class_token, x)
            for block in blocks[arguments.location :]:
                x = block(x)
    return LayerNormalization(epsilon=1e-6, name="encoder_norm", dtype=dtype)(x)


def classify(x, arguments: EncoderArguments):
    """Adds the pooling and the head that `classifier` names; for `None`, nothing."""
    if arguments.classifier is None:
        return x
    if arguments.classifier == "gap":
        # A mean over many positions, and the head, in float32 whatever the policy.
        x = keras.layers.GlobalAveragePooling1D(name="pool", dtype="float32")(x)
    else:
        x = keras.layers.Identity(name="pool", dtype="float32")(x[:, 0])
    if arguments.representation_size is not None:
        x = keras.layers.Dense(
            arguments.representation_size,
            activation="tanh",
            name="pre_logits",
            dtype=arguments.dtype,
        )(x)
    return keras.layers.Dense(
        arguments.num_classes,
        activation=arguments.classifier_activation,
        # ViT's protocol: a new head starts from equal scores.
        kernel_initializer="zeros",
        name="head",
        dtype="float32",
    )(x)


def _join(class_token, tokens):
    if class_token is None:
        return tokens
    return keras.ops.concatenate([class_token, tokens], axis=1)
