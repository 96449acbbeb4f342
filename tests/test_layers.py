import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from pwiser_tf import layers
from pwiser_tf.schema import MISSING_INTEGER, Categorical, Schema
from tests.conftest import SCHEMA

RAW = {
    "page": np.array([0, 5, 6, -1, MISSING_INTEGER]),
    "user city": np.array(["Paris", "a,b", "Rome", "", "Köln"], object),
    "shop": np.array([70, -3, 13, MISSING_INTEGER, 12]),
    "price (€)": np.array([10, 14, np.nan, np.inf, -2], np.float32),
    "discount": np.array([0, 0.5, -np.inf, np.nan, 1], np.float32),
}


def test_raw_features_agree_with_the_schema():
    features = layers.RawFeatures(SCHEMA)({name: tf.constant(v) for name, v in RAW.items()})
    np.testing.assert_array_equal(
        features["categorical"], [[1, 1, 1], [6, 3, 2], [0, 0, 0], [0, 0, 0], [0, 2, 3]]
    )
    for position, feature in enumerate(SCHEMA.categorical):
        ids = feature.ids(RAW[feature.name])
        np.testing.assert_array_equal(features["categorical"][:, position], ids)
    for position, feature in enumerate(SCHEMA.numerical):
        found = features["numerical"][:, position].numpy()
        np.testing.assert_array_equal(found, feature.apply(RAW[feature.name]))


@pytest.mark.parametrize("dtype", ["int64", "string"])
def test_an_empty_vocabulary_gives_id_0(dtype):
    feature = Categorical("f", dtype, ())
    schema = Schema("columns", (feature,), (), "click", "buy", None)
    values = np.array(
        [3, 0] if dtype == "int64" else ["a", ""], dtype if dtype == "int64" else object
    )
    features = layers.RawFeatures(schema)({"f": tf.constant(values)})
    assert features["categorical"].dtype == tf.int64
    assert features["categorical"].numpy().tolist() == [[0], [0]]
    assert feature.ids(values).tolist() == [0, 0]


def _encoder():
    encoder = layers.Encoder(SCHEMA, embedding_dim=4)
    encoder({"categorical": tf.zeros([1, 3], tf.int64), "numerical": tf.zeros([1, 2])})
    return encoder


def test_encoder_concatenates_embeddings_and_one_numerical_field():
    encoder = _encoder()
    numerical = np.array([[1.0, 2.0]], np.float32)
    found = encoder({"categorical": tf.constant([[6, 3, 1]], tf.int64), "numerical": numerical})
    table = encoder.embeddings.numpy()
    assert table.shape == (7 + 4 + 4, 4)
    kernel, bias = (weight.numpy() for weight in encoder._linear.weights)
    expected = [table[6], table[7 + 3], table[7 + 4 + 1], (numerical @ kernel + bias)[0]]
    np.testing.assert_allclose(found[0], np.concatenate(expected), rtol=1e-6)


def test_encoder_sends_impossible_ids_to_id_0():
    encoder = _encoder()
    numerical = tf.zeros([2, 2])
    odd = tf.constant([[7, -1, 2**60], [0, 4, -(2**63)]], tf.int64)
    zero = tf.zeros([2, 3], tf.int64)
    np.testing.assert_array_equal(
        encoder({"categorical": odd, "numerical": numerical}),
        encoder({"categorical": zero, "numerical": numerical}),
    )


def test_encoder_fills_values_that_are_not_finite():
    encoder = _encoder()
    ids = tf.zeros([3, 3], tf.int64)
    odd = tf.constant([[np.nan, np.nan], [np.inf, -np.inf], [0.0, 0.3]])
    found = encoder({"categorical": ids, "numerical": odd}).numpy()
    # 0.0 is the standardized mean of the price, 0.3 the fill value of the discount.
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[2])


def test_encoder_works_with_one_kind_of_feature():
    import dataclasses

    ids = {"categorical": tf.ones([2, 3], tf.int64)}
    only_ids = layers.Encoder(dataclasses.replace(SCHEMA, numerical=()), 4)
    assert only_ids(ids).shape == (2, 12)
    only_numbers = layers.Encoder(dataclasses.replace(SCHEMA, categorical=()), 4)
    assert only_numbers({"numerical": tf.ones([2, 2])}).shape == (2, 4)


def _stock_block(block: layers.Block, inputs: int) -> keras.Sequential:
    """Keras's own layers with the block's weights."""
    normalization = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)
    stock = keras.Sequential(
        [
            keras.layers.Dense(block.gamma.shape[0], use_bias=False),
            normalization,
            keras.layers.ReLU(),
        ]
    )
    stock.build([None, inputs])
    kernel = block.kernel
    stock.set_weights(
        [
            kernel.numpy(),
            block.gamma.numpy(),
            block.beta.numpy(),
            block.mean.numpy(),
            block.variance.numpy(),
        ]
    )
    return stock


@pytest.fixture
def block():
    block = layers.Block(6)
    block(tf.zeros([1, 5]))
    random = np.random.default_rng(0)
    block.gamma.assign(random.normal(size=6))
    block.beta.assign(random.normal(size=6))
    return block


def test_block_without_dropout_is_the_stock_layers_forward_and_backward(block):
    stock = _stock_block(block, 5)
    x = tf.constant(np.random.default_rng(1).normal(size=(32, 5)) * 3 + 2, tf.float32)
    results = []
    for layer in (block, stock):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(tf.sin(y) * tf.range(32.0)[:, None])
        weights = sorted(layer.trainable_weights, key=lambda w: (len(w.shape), w.name))
        results.append((y, *tape.gradient(loss, [x, *weights])))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)
    # The moving statistics moved alike, so that inference agrees too.
    np.testing.assert_allclose(block(x), stock(x, training=False), rtol=1e-4, atol=1e-5)


def test_normalization_survives_a_mean_far_from_zero(block):
    """A variance by E[x^2] - E[x]^2 would lose all its digits here."""
    x = tf.constant(np.random.default_rng(1).normal(size=(256, 6)) + 1e4, tf.float32)
    one, zero = tf.ones([6]), tf.zeros([6])
    y, mean, variance = layers.blocks._forward(x, one, zero, tf.zeros([256, 0], tf.uint8), 0)
    exact = x.numpy().astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var(axis=0), rtol=1e-2)
    expected = np.maximum((exact - exact.mean(axis=0)) / exact.std(axis=0), 0)
    np.testing.assert_allclose(y, expected, atol=2e-2)


def test_mixed_precision_is_float32_to_the_digits_of_bfloat16():
    """Outputs and gradients agree to bfloat16's 8 bits; weights and inference are float32."""
    x = tf.random.stateless_normal([64, 16], [1, 1])
    results = []
    for mixed in (False, True):
        keras.utils.set_random_seed(0)
        mlp = layers.MLP((12, 8), dropout=0.2, weight_decay=0.0, mixed_precision=mixed)
        served = mlp(x)
        with tf.GradientTape() as tape:
            y = mlp(x, training=True)
            loss = tf.reduce_mean(tf.square(tf.cast(y, tf.float32)))
        gradients = tape.gradient(loss, mlp.trainable_weights)
        assert y.dtype == (tf.bfloat16 if mixed else tf.float32)
        assert {g.dtype for g in gradients} == {tf.float32}
        results.append((served, tf.cast(y, tf.float32), gradients))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert (results[0][1].numpy() != results[1][1].numpy()).any()
    np.testing.assert_allclose(results[0][1], results[1][1], atol=0.1)
    for exact, mixed in zip(results[0][2], results[1][2], strict=True):
        assert np.linalg.norm(exact - mixed) < 0.1 * np.linalg.norm(exact)


def test_dropout_drops_its_rate_and_keeps_the_mean():
    ones = tf.ones([1000, 64])
    mask = tf.random.stateless_uniform([1000, 64], [1, 2], 0, 256, tf.int32)
    kept = layers.blocks._dropout(ones, tf.cast(mask, tf.uint8), threshold=64).numpy()
    assert set(np.unique(kept)) == {0.0, np.float32(256 / 192)}
    assert abs((kept == 0).mean() - 0.25) < 0.01
    assert abs(kept.mean() - 1) < 0.02


def test_dropout_has_its_mask_in_the_gradient():
    block = layers.Block(16, dropout=0.5)
    x = tf.random.stateless_normal([64, 8], [1, 1])
    block(x)
    block.beta.assign_add(tf.fill([16], 5.0))  # All units are active: zeros are dropout's.
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = block(x, training=True)
        loss = tf.reduce_sum(y)
    dropped = (y.numpy() == 0).mean()
    assert 0.4 < dropped < 0.6
    # The gradient of beta is the sum of the mask: twice the number of rows kept.
    gradient = tape.gradient(loss, block.beta).numpy()
    np.testing.assert_allclose(gradient, 2 * (y.numpy() != 0).sum(axis=0), rtol=1e-6)


def test_dropout_masks_differ_by_step_and_layer_and_follow_the_count():
    def two_blocks():
        keras.utils.set_random_seed(3)
        first, second = layers.Block(12, dropout=0.5), layers.Block(12, dropout=0.5)
        first(tf.ones([1, 3])), second(tf.ones([1, 3]))
        return first, second

    first, second = two_blocks()
    masks = [first._random_bytes(8).numpy(), first._random_bytes(8).numpy()]
    assert masks[0].shape == (8, 12)
    assert (masks[0] != masks[1]).any()
    assert (masks[0] != second._random_bytes(8).numpy()).any()
    again, _ = two_blocks()
    again.salt_and_count.assign_add([0, 1])
    np.testing.assert_array_equal(again._random_bytes(8), masks[1])


def test_dropout_rate_must_be_a_rate():
    with pytest.raises(ValueError, match="expected a rate"):
        layers.Block(4, dropout=1.0)


def test_gate_mixes_experts_with_softmax_weights():
    gate = layers.Gate(experts=3, weight_decay=0.0)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    experts = np.random.default_rng(1).normal(size=(5, 3, 2)).astype(np.float32)
    found = gate(x, list(np.moveaxis(experts, 1, 0)))
    kernel, bias = (weight.numpy() for weight in gate.weights)
    logits = np.exp(x @ kernel + bias)
    weights = logits / logits.sum(axis=1, keepdims=True)
    expected = sum(weights[:, e : e + 1] * experts[:, e] for e in range(3))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    trained = gate(x, list(np.moveaxis(experts, 1, 0)), training=True)
    np.testing.assert_allclose(trained, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_weight_decay_is_proportional_to_the_weight():
    block = layers.Block(4, weight_decay=0.3)
    block(tf.zeros([1, 2]))
    with tf.GradientTape() as tape:
        loss = tf.add_n(block.losses)
    kernel = block.kernel
    np.testing.assert_allclose(tape.gradient(loss, kernel), 0.3 * kernel.numpy(), rtol=1e-6)


def test_head_gives_the_logit_and_beside_it_an_energy_that_starts_at_0():
    keras.utils.set_random_seed(0)
    plain = layers.Head(-2.0, weight_decay=0.3)
    x = tf.constant([[1.0, 2.0], [3.0, -1.0]])
    logit = plain(x)
    kernel = plain.weights[0].numpy()
    np.testing.assert_allclose(logit, x.numpy() @ kernel - 2.0, rtol=1e-6)
    assert float(plain.losses[0]) == pytest.approx(0.15 * (kernel**2).sum())

    keras.utils.set_random_seed(0)
    wide = layers.Head(-2.0, weight_decay=0.3, energy=True)
    np.testing.assert_array_equal(wide(x), np.concatenate([logit, np.zeros([2, 1])], axis=1))
    wide.weights[2].assign([[1.0], [10.0]])
    wide.weights[3].assign([5.0])
    np.testing.assert_array_equal(wide(x)[:, 1], [26.0, -2.0])
    np.testing.assert_array_equal(wide(x)[:, :1], logit)
