"""PWiseR in your own Keras model with two outputs. The loss of each is BCE + 0.1 * PWiseR.

    python examples/pwiser_in_your_keras_model.py

y_true of the loss is the grade: 0 exposure only, 1 click without conversion, 2 conversion.
"""

import pwiser_tf  # before TensorFlow: it selects the Keras 2 line for tf.keras

# isort: split

import numpy as np
import tensorflow as tf
import tf_keras as keras

PWISER = pwiser_tf.PWiseRLoss(margin_click=0.05, margin_nonclick=0.1, from_logits=True)


def bce_and_pwiser(positive_grade: int):
    """A Keras loss for the task whose label is grade >= positive_grade."""

    def loss(grade, logits):
        label = tf.cast(grade >= positive_grade, logits.dtype)
        bce = keras.losses.binary_crossentropy(label, logits, from_logits=True)  # [batch]
        return bce + 0.1 * PWISER(grade, logits)

    return loss


def main() -> None:
    # 20,000 exposures with five features. Clicks depend on the first two, purchases on the third.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 5)).astype("float32")
    click = rng.random(len(x)) < 1 / (1 + np.exp(2.5 - x[:, 0] - x[:, 1]))
    conversion = click & (rng.random(len(x)) < 1 / (1 + np.exp(2 - x[:, 2])))
    grade = (click.astype("int64") + conversion)[:, None]
    train, test = slice(0, 15_000), slice(15_000, None)

    keras.utils.set_random_seed(0)
    inputs = keras.Input([5])
    hidden = keras.layers.Dense(32, "relu")(inputs)
    outputs = {name: keras.layers.Dense(1, name=name)(hidden) for name in ("ctr", "ctcvr")}
    model = keras.Model(inputs, outputs)
    model.compile(
        keras.optimizers.Adam(1e-2),
        loss={"ctr": bce_and_pwiser(1), "ctcvr": bce_and_pwiser(2)},
    )
    labels = {"ctr": grade[train], "ctcvr": grade[train]}
    # Large batches, because PWiseR compares the rows of a batch, which needs some conversions.
    model.fit(x[train], labels, batch_size=1000, epochs=5, verbose=0)

    logits = model.predict(x[test], batch_size=5000, verbose=0)
    for name, positive_grade in (("ctr", 1), ("ctcvr", 2)):
        label = grade[test, 0] >= positive_grade
        print(f"{name} test AUC {pwiser_tf.auc(label, logits[name][:, 0]):.3f}")


if __name__ == "__main__":
    main()
