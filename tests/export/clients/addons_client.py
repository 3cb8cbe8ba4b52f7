"""A TensorFlow 2.15 process with tensorflow-addons: rotates, predicts, fine-tunes.

Reads `saved_model` and `data.npz` in the working directory, writes `results.npz`.
"""

import sys

import keras
import numpy as np
import tensorflow as tf
import tensorflow_addons as tfa

assert tf.__version__ == "2.15.1", tf.__version__
assert tfa.__version__ == "0.23.0", tfa.__version__
assert keras.__version__.startswith("2."), keras.__version__
assert "tokenlearner_keras" not in sys.modules

with np.load("data.npz") as arrays:
    images, labels = arrays["images"], arrays["labels"]
model = tf.saved_model.load("saved_model")
serve = model.signatures["serve"]
results = {}

rotated = tfa.image.rotate(images, angles=0.3, interpolation="bilinear")
results["rotated"] = rotated
results["rotated_probabilities"] = serve(images=rotated)["probabilities"]

optimizer = tfa.optimizers.LAMB(learning_rate=0.02)
loss_fn = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
losses = []
for _ in range(3):
    with tf.GradientTape() as tape:
        logits = model.train(tf.constant(images))["outputs"]
        loss = loss_fn(labels, logits)
    gradients = tape.gradient(loss, model.trainable_variables)
    assert all(gradient is not None for gradient in gradients)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    losses.append(float(loss))
losses.append(float(loss_fn(labels, model.train(tf.constant(images))["outputs"])))

results["losses"] = losses
results["probabilities"] = serve(images=tf.constant(images))["probabilities"]
for index, variable in enumerate(model.trainable_variables):
    results[f"variable_{index}"] = variable.numpy()

# The fine-tuned model is written again, and loads again.
tf.saved_model.save(model, "fine_tuned", signatures=dict(model.signatures))
again = tf.saved_model.load("fine_tuned").signatures["serve"]
results["saved_again"] = again(images=tf.constant(images))["probabilities"]
np.savez("results.npz", **{name: np.asarray(v) for name, v in results.items()})
