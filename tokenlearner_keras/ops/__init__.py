from tokenlearner_keras.ops.vector_attention import (
    force_vector_attention_method,
    vector_attention,
)

__all__ = ["force_vector_attention_method", "vector_attention"]
