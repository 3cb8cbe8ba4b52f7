from collections.abc import Callable

import keras

from tokenlearner_keras.layers import TubeletEmbedding
from tokenlearner_keras.layers._checks import check_shape
from tokenlearner_keras.models._encoder import EncoderArguments, classify, encode
from tokenlearner_keras.models.vit_config import ViTConfig, resolve_variant


def vivit(
    variant: str | ViTConfig,
    input_shape: tuple[int, ...] = (32, 224, 224, 3),
    tubelet_size: int | tuple[int, int, int] = (2, 16, 16),
    num_classes: int = 1000,
    num_layers: int | None = None,
    num_tokens: int | None = None,
    tokenizer_location: float | int = 0.5,
    token_learner: str | Callable[[int], keras.layers.Layer] = "v1",
    token_fuser: bool = False,
    classifier: str | None = "gap",
    representation_size: int | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    classifier_activation=None,
    dtype=None,
    name: str | None = None,
) -> keras.Model:
    """Builds a video Transformer on tubelets, with learned tokens for each frame.

    The authors' released video encoder: all tokens of all frames attend to each other
    ([ViViT](https://arxiv.org/abs/2103.15691), model 1); the TokenLearner works frame
    by frame, where a frame is one step of the grid of tubelets.

    Args:
        variant: A variant of `vit` or a `ViTConfig`; its patch size is ignored.
        input_shape: `(time, height, width, channels)`.
        tubelet_size: Frames, height and width of a tubelet; they must divide the
            video's.
        num_classes: int. Number of classes. Ignored without `classifier`.
        num_layers: int or `None`. Number of blocks, if not the variant's (the paper's
            20, 21 and 22).
        num_tokens: int or `None`. Number of learned tokens for each frame. `None`
            builds a plain ViViT.
        tokenizer_location: float in [0, 1) or int. The TokenLearner stands before
            block `floor(tokenizer_location * num_layers)`; an int is that index.
        token_learner: `"v1"`, `"v10"` or `"v11"`, the class methods of `TokenLearner`,
            or a function from `num_tokens` to a layer that maps
            `(batch, time, height, width, hidden_dim)` to `(batch, tokens, hidden_dim)`.
            The layer is renamed `"token_learner"`.
        token_fuser: bool. Whether every block from the location on has a TokenLearner
            before and a `TokenFuser(mode="attention")` after it, which restores all
            positions and adds what the TokenLearner saw. A class token skips both
            and meets the learned tokens in the blocks; it does not see the last fuser.
        classifier: `"gap"` (mean over the tokens), `"token"` (a class token, which
            goes round the TokenLearner) or `None` (features).
        representation_size: int or `None`. Units of a tanh layer before the head.
        dropout: float. Dropout rate of embeddings and blocks.
        attention_dropout: float. Dropout rate of the attention weights.
        stochastic_depth: float. Rate at which the last block's branches are skipped;
            it grows linearly from 0 in the first.
        classifier_activation: Activation of the head. `None` returns logits.
        dtype: Dtype policy of the layers, or `None` for the global one. Pooling and
            head are float32.
        name: string or `None`. Name of the model.

    Returns:
        A functional `keras.Model`. Output: `(batch, num_classes)`, or for
        `classifier=None` the layer-normalised tokens `(batch, tokens, hidden_dim)`.
        Its layers have stable names, so that
        `keras.Model(model.input, model.get_layer("token_learner").output)` gives
        features: `tubelet_embedding`, `class_token`, `position_embedding`,
        `block_0`..., `token_learner` (with `token_fuser`: `token_learner_6`,
        `token_fuser_6`, ... by block), `encoder_norm`, `pool`, `pre_logits`, `head`.

    Raises:
        ValueError: for an argument out of range, an unknown variant, or an input
            size that the tubelet size does not divide.

    Example:

    >>> model = vivit("S/16", input_shape=(16, 64, 64, 3), num_tokens=8)
    """
    # === Config ===
    config = resolve_variant(variant)
    arguments = EncoderArguments(
        config=config,
        num_classes=num_classes,
        num_layers=num_layers,
        num_tokens=num_tokens,
        tokenizer_location=tokenizer_location,
        token_learner=token_learner,
        token_fuser=token_fuser,
        classifier=classifier,
        representation_size=representation_size,
        dropout=dropout,
        attention_dropout=attention_dropout,
        stochastic_depth=stochastic_depth,
        classifier_activation=classifier_activation,
        dtype=dtype,
    )
    input_shape = check_shape(
        "input_shape", input_shape, ("time", "height", "width", "channels")
    )
    if name is None and isinstance(variant, str):
        name = "vivit_" + variant.lower().replace("/", "_")

    # === Layers ===
    embedding = TubeletEmbedding(
        config.hidden_dim, tubelet_size, name="tubelet_embedding", dtype=dtype
    )

    # === Functional Model ===
    inputs = keras.Input(input_shape, name="videos")
    x = embedding(inputs)
    x = encode(x, embedding.compute_grid_shape(inputs.shape), arguments)
    outputs = classify(x, arguments)
    return keras.Model(inputs, outputs, name=name or "vivit")
