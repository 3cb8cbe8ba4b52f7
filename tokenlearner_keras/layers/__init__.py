from tokenlearner_keras.layers.class_token import ClassToken
from tokenlearner_keras.layers.dense_tokenizer import DenseTokenizer
from tokenlearner_keras.layers.frame_conv2d import FrameConv2D
from tokenlearner_keras.layers.grid_tokenizer import GridTokenizer
from tokenlearner_keras.layers.multi_head_self_attention import MultiHeadSelfAttention
from tokenlearner_keras.layers.patch_embedding import PatchEmbedding
from tokenlearner_keras.layers.pooling_tokenizer import PoolingTokenizer
from tokenlearner_keras.layers.position_embedding import PositionEmbedding
from tokenlearner_keras.layers.prior_attention import PriorAttention
from tokenlearner_keras.layers.space_time_attention import SpaceTimeAttention
from tokenlearner_keras.layers.stochastic_depth import StochasticDepth
from tokenlearner_keras.layers.temporal_conv1d import TemporalConv1D
from tokenlearner_keras.layers.token_fuser import TokenFuser
from tokenlearner_keras.layers.token_learner import TokenLearner
from tokenlearner_keras.layers.transformer_block import TransformerBlock
from tokenlearner_keras.layers.tubelet_embedding import TubeletEmbedding
from tokenlearner_keras.layers.vector_attention import VectorAttention
from tokenlearner_keras.layers.vector_transformer_block import VectorTransformerBlock

__all__ = [
    "ClassToken",
    "DenseTokenizer",
    "FrameConv2D",
    "GridTokenizer",
    "MultiHeadSelfAttention",
    "PatchEmbedding",
    "PoolingTokenizer",
    "PositionEmbedding",
    "PriorAttention",
    "SpaceTimeAttention",
    "StochasticDepth",
    "TemporalConv1D",
    "TokenFuser",
    "TokenLearner",
    "TransformerBlock",
    "TubeletEmbedding",
    "VectorAttention",
    "VectorTransformerBlock",
]
