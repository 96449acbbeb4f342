import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from pwiser_tf.models import MODELS, ModelConfig
from pwiser_tf.models.base import _log1mexp
from pwiser_tf.tasks import LossConfig
from tests.conftest import SCHEMA

CONFIG = ModelConfig(embedding_dim=4, bottom_units=(8, 6), tower_units=(5,), experts=3, dropout=0.0)
LOSSES = {"ctr": LossConfig(pwiser_weight=0.1), "ctcvr": LossConfig(pwiser_weight=0.1)}
RANDOM = np.random.default_rng(0)
FEATURES = {
    "categorical": tf.constant(RANDOM.integers(0, 4, (20, 3))),
    "numerical": tf.constant(RANDOM.normal(size=(20, 2)), tf.float32),
}
GRADE = tf.constant([0, 1, 2, 0] * 5, tf.int64)


def _model(name, head="direct", seed=0, **config):
    keras.utils.set_random_seed(seed)
    config = dataclasses.replace(CONFIG, conversion_head=head, **config)
    model = MODELS[name](SCHEMA, config, LOSSES)
    model(FEATURES)
    # Batch normalisation at its initial statistics would hide a mistake in them.
    for weight in model.weights:
        if weight.name.endswith(("mean:0", "beta:0")):
            weight.assign(RANDOM.normal(size=weight.shape) * 0.3)
        if weight.name.endswith(("variance:0", "gamma:0")):
            weight.assign(RANDOM.uniform(0.5, 2, size=weight.shape))
    return model


# NumPy forward passes, written from the papers' equations.


def _numpy_mlp(mlp, x):
    for block in mlp._blocks:
        x = x @ block.kernel.numpy()
        x = (x - block.mean.numpy()) / np.sqrt(block.variance.numpy() + 1e-5)
        x = np.maximum(x * block.gamma.numpy() + block.beta.numpy(), 0)
    return x


def _numpy_encode(encoder):
    table, offsets = encoder.embeddings.numpy(), [0, 7, 11]
    ids, numerical = FEATURES["categorical"].numpy(), FEATURES["numerical"].numpy()
    fields = [table[ids[:, position] + offset] for position, offset in enumerate(offsets)]
    kernel, bias = (weight.numpy() for weight in encoder._linear.weights)
    return np.concatenate([*fields, numerical @ kernel + bias], axis=1)


def _numpy_softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _numpy_tower_inputs(model, name):
    if name == "single_task":
        return {
            tower: _numpy_mlp(model._bottoms[tower], _numpy_encode(model._encoders[tower]))
            for tower in ("click", "conversion")
        }
    x = _numpy_encode(model._shared_encoder)
    if name == "shared_bottom":
        return dict.fromkeys(("click", "conversion"), _numpy_mlp(model._bottom, x))
    experts = [_numpy_mlp(expert, x) for expert in model._experts]
    inputs = {}
    for tower, gate in model._gates.items():
        kernel, bias = (weight.numpy() for weight in gate.weights)
        mix = _numpy_softmax(x @ kernel + bias)
        inputs[tower] = sum(mix[:, [e]] * expert for e, expert in enumerate(experts))
    return inputs


@pytest.mark.parametrize("head", ["direct", "product"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_papers_equations(name, head):
    model = _model(name, head)
    logits = {}
    for tower, x in _numpy_tower_inputs(model, name).items():
        kernel, bias = (weight.numpy() for weight in model._heads[tower].weights)
        logits[tower] = (_numpy_mlp(model._towers[tower], x) @ kernel + bias)[:, 0]
    ctr, second = (1 / (1 + np.exp(-logits[tower])) for tower in ("click", "conversion"))
    ctcvr = np.minimum(second, ctr) if head == "direct" else ctr * second
    found = model(FEATURES)
    np.testing.assert_allclose(found["ctr"], ctr, rtol=1e-5)
    np.testing.assert_allclose(found["ctcvr"], ctcvr, rtol=1e-5)
    np.testing.assert_allclose(found["cvr"], ctcvr / ctr, rtol=1e-5)


@pytest.mark.parametrize("head", ["direct", "product"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_nested_even_at_extreme_logits(name, head):
    model = _model(name, head)
    for weight in model.weights:
        if "dense" in weight.name and weight.shape[-1] == 1:
            weight.assign(weight * 1e4)
    found = {key: value.numpy() for key, value in model(FEATURES).items()}
    assert found["ctr"].shape == (20,)
    for value in found.values():
        assert value.dtype == np.float32
        assert ((value >= 0) & (value <= 1)).all()
    assert (found["ctcvr"] <= found["ctr"]).all()
    np.testing.assert_array_equal(found["ctcvr"], found["ctr"] * found["cvr"])


def test_product_heads_task_logit_is_that_of_the_product():
    model = _model("shared_bottom", "product")
    outputs = model(FEATURES)
    predictions = model._task_predictions(model.tower_logits(FEATURES, training=False))
    for task, prediction in predictions.items():
        np.testing.assert_allclose(tf.sigmoid(prediction["logits"]), outputs[task], rtol=1e-5)


def test_log1mexp_agrees_with_float64_and_has_finite_gradients():
    x = tf.Variable([-1e-6, -0.1, -0.69, -0.7, -5.0, -80.0, -1e4])
    with tf.GradientTape() as tape:
        y = _log1mexp(x)
    exact = np.log(-np.expm1(x.numpy().astype(np.float64)))
    np.testing.assert_allclose(y, exact, rtol=2e-6, atol=1e-30)
    assert np.isfinite(tape.gradient(y, x)).all()


@pytest.mark.parametrize("head", ["direct", "product"])
@pytest.mark.parametrize("name", MODELS)
def test_every_weight_gets_a_finite_gradient(name, head):
    model = _model(name, head)
    with tf.GradientTape() as tape:
        loss = model.compute_loss((FEATURES, GRADE), training=True)
    assert loss.shape == ()
    for weight, gradient in zip(
        model.trainable_weights, tape.gradient(loss, model.trainable_weights), strict=True
    ):
        assert gradient is not None, weight.name
        assert np.isfinite(tf.convert_to_tensor(gradient)).all(), weight.name


def test_the_loss_is_the_weighted_sum_of_the_tasks():
    def loss(ctr, ctcvr):
        keras.utils.set_random_seed(0)
        losses = {"ctr": LossConfig(weight=ctr), "ctcvr": LossConfig(weight=ctcvr)}
        model = MODELS["shared_bottom"](SCHEMA, CONFIG, losses)
        return float(model.compute_loss((FEATURES, GRADE), training=True))

    assert loss(0.5, 2.0) == pytest.approx(0.5 * loss(1, 0) + 2 * loss(0, 1), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_one_seed_one_initialisation(name):
    first, same, other = (_model(name, seed=seed) for seed in (1, 1, 2))
    kernels = [[w.numpy() for w in m.weights if "kernel" in w.name] for m in (first, same, other)]
    for a, b, c in zip(*kernels, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()


def test_experts_and_towers_start_different():
    model = _model("mmoe")
    kernels = [expert._blocks[0].kernel.numpy() for expert in model._experts]
    kernels_of_towers = [tower._blocks[0].kernel.numpy() for tower in model._towers.values()]
    for group in (kernels, kernels_of_towers):
        for i, a in enumerate(group):
            for b in group[:i]:
                assert (a != b).any()


def test_unknown_head_is_refused():
    with pytest.raises(ValueError, match="conversion_head: sideways"):
        ModelConfig(conversion_head="sideways")


def test_tower_inputs_is_for_subclasses():
    from pwiser_tf.models import ClickConversionModel

    with pytest.raises(NotImplementedError):
        ClickConversionModel(SCHEMA, CONFIG).tower_inputs(FEATURES, training=False)
