"""A small SavedModel with the signatures that pwiser_tf.export writes, and its plain arithmetic."""

import math
import pathlib

BRANDS = {"acme": 1, "zorg": 2}
MISSING_INTEGER = -(2**63)


def expected(brand: str, item: int, price: float, bias: float) -> dict[str, float]:
    """The scores of one row, worked out by hand. Each input moves them differently."""
    price = 0.25 if math.isnan(price) else price
    item = item if 0 <= item < 10 else 0
    ctr = 1 / (1 + math.exp(-(BRANDS.get(brand, 0) * 0.5 - item * 0.1 + price + bias)))
    cvr = 1 / (1 + math.exp(-(price - 1)))
    return {"ctr": ctr, "cvr": cvr, "ctcvr": ctr * cvr}


def save(folder: pathlib.Path, bias: float) -> None:
    """Writes the model into `folder`; `bias` tells versions apart."""
    import tensorflow as tf

    class Model(tf.Module):
        def __init__(self):
            super().__init__()
            self.bias = tf.Variable(bias)
            self.brands = tf.lookup.StaticHashTable(
                tf.lookup.KeyValueTensorInitializer(
                    list(BRANDS), list(BRANDS.values()), tf.string, tf.int64
                ),
                default_value=0,
            )

        def scores(self, brand_id, item, price):
            price = tf.where(tf.math.is_nan(price), 0.25, price)
            item = tf.where((item >= 0) & (item < 10), item, 0)
            ctr = tf.sigmoid(
                tf.cast(brand_id, tf.float32) * 0.5
                - tf.cast(item, tf.float32) * 0.1
                + price
                + self.bias
            )
            cvr = tf.sigmoid(price - 1)
            return {"ctr": ctr, "cvr": cvr, "ctcvr": ctr * cvr}

        @tf.function(
            input_signature=[
                tf.TensorSpec([None], tf.string, "brand"),
                tf.TensorSpec([None], tf.int64, "item"),
                tf.TensorSpec([None], tf.float32, "price"),
            ]
        )
        def predict_raw(self, brand, item, price):
            return self.scores(self.brands.lookup(brand), item, price)

        @tf.function(
            input_signature=[
                tf.TensorSpec([None, 2], tf.int64, "categorical"),
                tf.TensorSpec([None, 1], tf.float32, "numerical"),
            ]
        )
        def predict(self, categorical, numerical):
            return self.scores(categorical[:, 0], categorical[:, 1], numerical[:, 0])

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "examples")])
        def serve_examples(self, examples):
            parsed = tf.io.parse_example(
                examples,
                {
                    "brand": tf.io.FixedLenFeature([], tf.string, default_value=""),
                    "item": tf.io.FixedLenFeature([], tf.int64, default_value=MISSING_INTEGER),
                    "price": tf.io.FixedLenFeature([], tf.float32, default_value=float("nan")),
                },
            )
            return self.predict_raw(parsed["brand"], parsed["item"], parsed["price"])

    model = Model()
    tf.saved_model.save(
        model,
        str(folder),
        signatures={
            "serving_default": model.serve_examples,
            "predict_raw": model.predict_raw,
            "predict": model.predict,
        },
    )
