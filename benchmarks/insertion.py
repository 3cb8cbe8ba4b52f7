"""FLOPs and CPU time of KerasHub's ViT-B/16 with and without an inserted TokenLearner.

    python benchmarks/insertion.py
    python benchmarks/insertion.py --sizes 224 --rounds 3

Needs keras-hub (`pip install --no-deps -r tests/requirements-hub.txt`). The weights are
random: neither FLOPs nor time depends on them. Writes results/insertion.json and
results/insertion.md.
"""

import argparse
import tempfile
import time
from pathlib import Path

import keras
import keras_hub
import numpy as np
from common import RESULTS, median, time_in_turns, write_results

import tokenlearner_keras as tlk

B16 = dict(patch_size=16, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072)


def compare(size, batch_size, rounds):
    """One row: a backbone at one image size, without and with the TokenLearner."""
    keras.utils.set_random_seed(0)
    model = keras_hub.models.ViTBackbone(image_shape=(size, size, 3), **B16)
    start = time.perf_counter()
    faster = tlk.insert_token_learner(model, location=0.5, num_tokens=8)
    insertion_seconds = time.perf_counter() - start
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (batch_size, size, size, 3)).astype("float32")

    # What comes before is the same, bit for bit.
    tokens = model.layers[1](images)
    for block in model.layers[-1].encoder_layers[:6]:
        tokens = block(tokens)
    before = keras.Model(faster.inputs, faster.get_layer("token_learner").input)
    same = np.array_equal(np.asarray(before(images)), np.asarray(tokens)[:, 1:])

    outputs = np.asarray(faster(images))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        faster.save(path)
        reloaded = keras.saving.load_model(path)
    round_trip = np.array_equal(np.asarray(reloaded(images)), outputs)
    removed = tlk.remove_token_learner(faster, share_weights=True)
    restored = np.array_equal(np.asarray(removed(images)), np.asarray(model(images)))

    flops = {"without": model, "with": faster}
    flops = {name: tlk.count_flops(m).total for name, m in flops.items()}
    seconds = time_in_turns(
        {
            "without": lambda: model.predict_on_batch(images),
            "with": lambda: faster.predict_on_batch(images),
        },
        repeats=rounds,
    )
    without, with_learner = median(seconds["without"]), median(seconds["with"])
    return {
        "image size": size,
        "batch": batch_size,
        "GMACs without": round(flops["without"] / 1e9, 2),
        "GMACs with": round(flops["with"] / 1e9, 2),
        "FLOPs ratio": round(flops["without"] / flops["with"], 2),
        "ms without": round(1e3 * without, 1),
        "ms with": round(1e3 * with_learner, 1),
        "speed-up": round(without / with_learner, 2),
        "same before": bool(same),
        ".keras round trip": bool(round_trip),
        "removed = original": bool(restored),
        "insertion, s": round(insertion_seconds, 1),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default=str(RESULTS), help="folder")
    arguments = parser.parse_args()
    rows = []
    for size in arguments.sizes:
        rows.append(compare(size, arguments.batch_size, arguments.rounds))
        write_results(
            "insertion",
            "KerasHub's ViT-B/16 with a TokenLearner inserted in its middle",
            rows,
            notes=[
                "8 tokens before block 6 of 12; random weights; float32",
                f"medians of {arguments.rounds} calls of `predict_on_batch`, in turns",
                "FLOPs ratio: multiply-adds without by those with the TokenLearner",
                f"keras-hub {keras_hub.__version__}",
            ],
            folder=arguments.output,
        )


if __name__ == "__main__":
    main()
