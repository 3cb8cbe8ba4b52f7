import keras


# Registered, or a reloaded `Dense(activation=gelu)` would take Keras's own `gelu`.
@keras.saving.register_keras_serializable(package="tokenlearner_keras")
def gelu(x):
    """Returns gelu by its tanh approximation.

    It is the authors' and the published ViT weights' gelu; the exact one cannot be
    exported to ONNX or TensorFlow.js.
    """
    return keras.activations.gelu(x, approximate=True)
