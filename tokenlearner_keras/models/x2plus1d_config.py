import dataclasses


@dataclasses.dataclass(frozen=True)
class X2Plus1DConfig:
    """Sizes of an X(2+1)D network. The defaults are X3D-M's.

    Attributes:
        stem_filters: int. Channels of the stem.
        filters: Channels of each stage.
        depths: Number of blocks of each stage.
        expansion: float. Inner channels of a block, relative to its output channels.
        head_filters: int. Channels of the last hidden layer.
    """

    stem_filters: int = 24
    filters: tuple[int, ...] = (24, 48, 96, 192)
    depths: tuple[int, ...] = (3, 5, 11, 7)
    expansion: float = 2.25
    head_filters: int = 2048
