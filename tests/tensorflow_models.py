"""Makes TensorFlow's and Keras's models for the tests, in a process of its own, with their own answers to real inputs.

``python tensorflow_models.py FOLDER`` writes the models and, of each, ``NAME.npz`` with inputs and outputs.
"""

import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def main(folder: Path) -> None:
    import keras
    import numpy as np
    import tensorflow as tf

    keras.utils.set_random_seed(7)
    pixels = np.random.default_rng(1).random((9, 8, 8, 1), dtype=np.float32)

    image = keras.Input((8, 8, 1), name="image")
    hidden = keras.layers.Conv2D(32, 3, strides=2, activation="relu")(image)
    hidden = keras.layers.BatchNormalization()(hidden)
    hidden = keras.layers.Flatten()(hidden)
    shares = keras.layers.Dense(10, activation="softmax", name="shares")(hidden)
    net = keras.Model(image, shares)
    wanted = net.predict(pixels, verbose=0)
    for ending in ("keras", "h5"):
        net.save(folder / f"net.{ending}")
    net.export(folder / "net.savedmodel", verbose=False)
    (folder / "net.tflite").write_bytes(tf.lite.TFLiteConverter.from_keras_model(net).convert())
    np.savez(folder / "net.npz", image=pixels, shares=wanted)

    left, right = keras.Input((3,), name="left"), keras.Input((2,), name="right")
    joined = keras.layers.Concatenate(name="joined")([left, right])
    two = keras.Model({"r": right, "l": left}, [keras.layers.Dense(1, name="price")(joined), joined])
    two.save(folder / "two.keras")

    class Arithmetic(tf.Module):
        @tf.function(
            input_signature=[
                tf.TensorSpec([None, 2], tf.float32, name="minuend"),
                tf.TensorSpec([None, 2], tf.float32, name="amount"),
            ]
        )
        def minus(self, minuend, amount):
            return {"difference": minuend - amount, "first": minuend[:, 0]}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
        def twice(self, x):
            return {"y": x * 2}

    module = Arithmetic()
    tf.saved_model.save(module, str(folder / "signatures"), {"minus": module.minus, "twice": module.twice})
    tf.saved_model.save(module, str(folder / "none"), {})
    values = keras.Input((3,), name="values")
    keras.Model(values, keras.layers.Lambda(lambda x: x * 2)(values)).save(folder / "lambda.keras")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
