import dataclasses

from tokenlearner_keras.layers._checks import check_positive_int, check_sizes


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a Vision Transformer.

    Args:
        patch_size: int or pair of ints. Height and width of a patch in pixels.
        hidden_dim: int. Channels of the tokens.
        num_layers: int. Number of Transformer blocks.
        num_heads: int. Number of attention heads; must divide `hidden_dim`.
        mlp_dim: int. Hidden channels of the blocks' MLPs.

    Raises:
        ValueError: for a size that is no positive integer, or heads that do not divide
            `hidden_dim`.
    """

    patch_size: int | tuple[int, int]
    hidden_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int

    def __post_init__(self):
        check_sizes("patch_size", self.patch_size, 2)
        for name in ("hidden_dim", "num_layers", "num_heads", "mlp_dim"):
            check_positive_int(name, getattr(self, name))
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                "Argument `num_heads` must divide `hidden_dim`. Received: "
                f"num_heads={self.num_heads}, hidden_dim={self.hidden_dim}"
            )


# Sizes of [ViT](https://arxiv.org/abs/2010.11929), table 1; Ti and S are AugReg's.
VARIANTS = {
    "Ti/16": ViTConfig(16, 192, 12, 3, 768),
    "S/32": ViTConfig(32, 384, 12, 6, 1536),
    "S/16": ViTConfig(16, 384, 12, 6, 1536),
    "B/32": ViTConfig(32, 768, 12, 12, 3072),
    "B/16": ViTConfig(16, 768, 12, 12, 3072),
    "L/32": ViTConfig(32, 1024, 24, 16, 4096),
    "L/16": ViTConfig(16, 1024, 24, 16, 4096),
    "H/14": ViTConfig(14, 1280, 32, 16, 5120),
}


def resolve_variant(variant) -> ViTConfig:
    """Returns the sizes of a variant's name, or `variant` if it is a `ViTConfig`."""
    if isinstance(variant, ViTConfig):
        return variant
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise ValueError(
            f"Invalid value for argument `variant`. Expected one of {tuple(VARIANTS)} "
            f"or a `ViTConfig`. Received: variant={variant!r}"
        )
    return VARIANTS[variant]
