from tokenlearner_keras.ops.vector_attention import (
    force_vector_attention_method,
    vector_attention,
    vector_attention_error_bound,
)

__all__ = [
    "force_vector_attention_method",
    "vector_attention",
    "vector_attention_error_bound",
]
