import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from pwiser_tf.models import MODELS, ModelConfig
from pwiser_tf.models.base import CONVERSION_HEADS, TOWERS, _logit_of_product
from pwiser_tf.schema import Split
from pwiser_tf.tasks import LOSSES, LossConfig
from tests.conftest import SCHEMA

CONFIG = ModelConfig(
    embedding_dim=4, bottom_units=(8, 6), tower_units=(5,), experts=4, critics=3, dropout=0.0
)
PWISER = LossConfig()
# Every architecture with every head that it supports.
CASES = [(name, head) for name, model in MODELS.items() for head in model.conversion_heads]
every_case = pytest.mark.parametrize(("name", "head"), CASES)
RANDOM = np.random.default_rng(0)
FEATURES = {
    "categorical": tf.constant(RANDOM.integers(0, 4, (20, 3))),
    "numerical": tf.constant(RANDOM.normal(size=(20, 2)), tf.float32),
    "group": tf.constant(np.arange(20) // 4),
}
GRADE = tf.constant([0, 1, 2, 0] * 5, tf.int64)


def _model(name, head=None, seed=0, loss=PWISER, schema=SCHEMA, **config):
    """A built model with the paper's auxiliary weight."""
    keras.utils.set_random_seed(seed)
    config = {
        "name": name,
        "conversion_head": head or MODELS[name].conversion_heads[0],
        "auxiliary_weight": MODELS[name].auxiliary_weight or 0.0,
        **config,
    }
    model = MODELS[name](schema, dataclasses.replace(CONFIG, **config), loss)
    model(FEATURES)
    return model


def _shaken_model(*args, **kwargs):
    """As _model, but without weights of 0 or 1, which would hide a mistake in their use."""
    model = _model(*args, **kwargs)
    for weight in model.weights:
        if weight.name.endswith(("mean:0", "beta:0", "bias:0")):
            weight.assign(RANDOM.normal(size=weight.shape) * 0.3)
        if weight.name.endswith(("variance:0", "gamma:0")):
            weight.assign(RANDOM.uniform(0.5, 2, size=weight.shape))
    return model


# NumPy forward passes, written from the papers' equations.


def _dense(layer, x):
    kernel, bias = (weight.numpy() for weight in layer.weights)
    return x @ kernel + bias


def _mlp(mlp, x):
    for block in mlp._blocks:
        x = x @ block.kernel.numpy()
        x = (x - block.mean.numpy()) / np.sqrt(block.variance.numpy() + 1e-5)
        x = np.maximum(x * block.gamma.numpy() + block.beta.numpy(), 0)
    return x


def _encode(encoder):
    table, offsets = encoder.embeddings.numpy(), [0, 7, 11]
    ids, numerical = FEATURES["categorical"].numpy(), FEATURES["numerical"].numpy()
    fields = [table[ids[:, position] + offset] for position, offset in enumerate(offsets)]
    return np.concatenate([*fields, _dense(encoder._linear, numerical)], axis=1)


def _softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _mixture(gate, x, experts):
    weights = _softmax(_dense(gate, x))
    assert weights.shape[1] == len(experts)
    return sum(weights[:, [e]] * expert for e, expert in enumerate(experts))


def _single_task(model):
    return {t: _mlp(model._bottoms[t], _encode(model._encoders[t])) for t in TOWERS}


def _shared_bottom(model):
    return dict.fromkeys(TOWERS, _mlp(model._bottom, _encode(model._shared_encoder)))


def _omoe(model):
    x = _encode(model._shared_encoder)
    mixture = _mixture(model._gate, x, [_mlp(expert, x) for expert in model._experts])
    return {"click": mixture, "conversion": mixture}


def _mmoe(model):
    x = _encode(model._shared_encoder)
    experts = [_mlp(expert, x) for expert in model._experts]
    return {t: _mixture(model._gates[t], x, experts) for t in TOWERS}


def _ple(model):
    """Two levels written out."""
    x = _encode(model._shared_encoder)
    first, second = model._experts
    clicks = [_mlp(expert, x) for expert in first["click"]]
    conversions = [_mlp(expert, x) for expert in first["conversion"]]
    shared = [_mlp(expert, x) for expert in first["shared"]]
    gates = model._gates[0]
    click = _mixture(gates["click"], x, clicks + shared)
    conversion = _mixture(gates["conversion"], x, conversions + shared)
    (shared_gate,) = model._shared_gates
    between = _mixture(shared_gate, x, clicks + conversions + shared)

    shared = [_mlp(expert, between) for expert in second["shared"]]
    clicks = [_mlp(expert, click) for expert in second["click"]]
    conversions = [_mlp(expert, conversion) for expert in second["conversion"]]
    gates = model._gates[1]
    return {
        "click": _mixture(gates["click"], click, clicks + shared),
        "conversion": _mixture(gates["conversion"], conversion, conversions + shared),
    }


def _esmm(model):
    x = _encode(model._shared_encoder)
    return {tower: _mlp(bottom, x) for tower, bottom in model._bottoms.items()}


def _aitm(model):
    x = _encode(model._shared_encoder)
    q1, q2 = (_mlp(model._bottoms[t], x) for t in TOWERS)
    p = _mlp(model._transfer, q1)
    attention = model._attention
    scores = [
        (_dense(attention._key, u) * _dense(attention._query, u)).sum(axis=1) / np.sqrt(6)
        for u in (p, q2)
    ]
    of_p, of_q = _softmax(np.stack(scores, axis=1)).T
    z = of_p[:, None] * _dense(attention._value, p) + of_q[:, None] * _dense(attention._value, q2)
    return {"click": q1, "conversion": z}


def _stem(model):
    x = {branch: _encode(encoder) for branch, encoder in model._encoders.items()}
    experts = [
        _mlp(expert, x[branch])
        for branch in ("click", "conversion", "shared")
        for expert in model._experts[branch]
    ]
    return {t: _mixture(model._gates[t], x[t] + x["shared"], experts) for t in TOWERS}


def _metaheac_probabilities(model):
    x = _encode(model._shared_encoder)
    fields = [x[:, 4 * field : 4 * field + 4] for field in range(4)]
    probabilities = {}
    for tower in TOWERS:
        task = np.repeat(model._task_embeddings[tower].numpy(), 20, axis=0)
        gate_input = np.concatenate([task, sum(fields) / 4], axis=1)
        z = _mixture(model._expert_gate, gate_input, [_mlp(e, x) for e in model._experts])
        weights = _softmax(_dense(model._critic_weights, gate_input))
        bias = model._biases[tower].numpy()
        probabilities[tower] = sum(
            weights[:, c] * _sigmoid(_dense(head, _mlp(critic, z))[:, 0] + bias)
            for c, (critic, head) in enumerate(
                zip(model._critics, model._critic_heads, strict=True)
            )
        )
    return probabilities


TOWER_INPUTS = {
    "single_task": _single_task,
    "shared_bottom": _shared_bottom,
    "omoe": _omoe,
    "mmoe": _mmoe,
    "ple": _ple,
    "esmm": _esmm,
    "aitm": _aitm,
    "stem": _stem,
    "escm2_ips": _esmm,
    "escm2_dr": _esmm,
}


def _probabilities(model, name):
    if name == "metaheac":
        return _metaheac_probabilities(model)
    return {
        tower: _sigmoid(_dense(model._heads[tower], _mlp(model._towers[tower], x))[:, 0])
        for tower, x in TOWER_INPUTS[name](model).items()
    }


@every_case
def test_outputs_are_those_of_the_papers_equations(name, head):
    model = _shaken_model(name, head)
    probabilities = _probabilities(model, name)
    ctr, second = probabilities["click"], probabilities["conversion"]
    ctcvr = np.minimum(second, ctr) if head == "direct" else ctr * second
    found = model(FEATURES)
    np.testing.assert_allclose(found["ctr"], ctr, rtol=1e-5)
    np.testing.assert_allclose(found["ctcvr"], ctcvr, rtol=1e-5)
    np.testing.assert_allclose(found["cvr"], ctcvr / ctr, rtol=1e-5)


@every_case
def test_outputs_are_nested_even_at_extreme_logits(name, head):
    model = _shaken_model(name, head)
    heads = model._critic_heads if name == "metaheac" else model._heads.values()
    for weight in (weight for layer in heads for weight in layer.weights):
        weight.assign(weight * 1e4)
    found = {key: value.numpy() for key, value in model(FEATURES).items()}
    assert found["ctr"].shape == (20,)
    for value in found.values():
        assert value.dtype == np.float32
        assert ((value >= 0) & (value <= 1)).all()
    assert (found["ctcvr"] <= found["ctr"]).all()
    np.testing.assert_array_equal(found["ctcvr"], found["ctr"] * found["cvr"])
    with tf.GradientTape() as tape:
        loss = model.compute_loss((FEATURES, GRADE), training=True)
    for gradient in tape.gradient(loss, model.trainable_weights):
        assert np.isfinite(tf.convert_to_tensor(gradient)).all()


def test_product_heads_task_logit_is_that_of_the_product():
    model = _shaken_model("shared_bottom", "product")
    outputs = model(FEATURES)
    logits = model.tower_logits(FEATURES, training=False)
    predictions = model._task_predictions(logits, logits)
    for task, prediction in predictions.items():
        np.testing.assert_allclose(tf.sigmoid(prediction["logits"]), outputs[task], rtol=1e-5)


def test_the_logit_of_a_product_keeps_its_digits_and_gradients():
    a = tf.Variable([-90.0, -5.0, 0.0, 3.0, 20.0, 20.0, 60.0])
    b = tf.Variable([-90.0, 5.0, 0.0, -20.0, 20.0, -20.0, 2.0])
    with tf.GradientTape() as tape:
        y = _logit_of_product(a, b)
    # In float64 from 1 / p - 1 and 1 / q - 1: odds of pq are 1 / (e^-a + e^-b + e^-(a + b)).
    x, z = -a.numpy().astype(np.float64), -b.numpy().astype(np.float64)
    exact = -np.logaddexp(np.logaddexp(x, z), x + z)
    np.testing.assert_allclose(y, exact, rtol=1e-6)
    # d/da of that is (e^-a + e^-(a + b)) / (e^-a + e^-b + e^-(a + b)), and so for b.
    for gradient, own in zip(tape.gradient(y, [a, b]), (x, z), strict=True):
        wanted = np.exp(np.logaddexp(own, x + z) + exact)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-30)


def _gradients(model):
    """{weight's name: gradient} of one loss; each weight has one, and it is finite."""
    with tf.GradientTape() as tape:
        loss = model.compute_loss((FEATURES, GRADE), training=True)
    assert loss.shape == ()
    gradients = tape.gradient(loss, model.trainable_weights)
    for weight, gradient in zip(model.trainable_weights, gradients, strict=True):
        assert gradient is not None, weight.name
        assert np.isfinite(tf.convert_to_tensor(gradient)).all(), weight.name
    return gradients


# A loss reaches the weights through the logits: each loss with one architecture, and each
# architecture with a loss that reads the logits alone, and with one that has heads of its own.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head", "loss"),
    [
        (*case, loss)
        for case in CASES
        for loss in (LOSSES if case[0] == "mmoe" else ("pwiser", "jrc"))
    ],
)
def test_every_weight_gets_a_finite_gradient_from_every_loss(name, head, loss):
    config = LossConfig(name=loss)
    _gradients(_model(name, head, loss=config, bottom_units=(6,), experts=2, critics=2))


def test_the_loss_is_the_weighted_sum_of_the_tasks():
    def loss(ctr, ctcvr):
        weights = LossConfig(name="bce", ctr_weight=ctr, ctcvr_weight=ctcvr)
        model = _model("shared_bottom", loss=weights)
        return float(model.compute_loss((FEATURES, GRADE), training=True))

    assert loss(0.5, 2.0) == pytest.approx(0.5 * loss(1, 0) + 2 * loss(0, 1), rel=1e-5)


@pytest.mark.parametrize("name", [n for n in MODELS if MODELS[n].auxiliary_weight is not None])
def test_the_auxiliary_loss_has_the_weight_of_its_paper(name):
    def loss(auxiliary_weight, weight=0.5):
        weights = LossConfig(name="bce", ctr_weight=weight, ctcvr_weight=weight)
        # A bias that makes the calibrator positive.
        model = _model(name, loss=weights, auxiliary_weight=auxiliary_weight)
        model._heads["conversion"].weights[1].assign([1.0])
        value = model.compute_loss((FEATURES, GRADE), training=True)
        logits = model.tower_logits(FEATURES, training=True)
        return float(value), float(model.auxiliary_loss(logits, GRADE))

    tasks_alone, auxiliary = loss(0.0)
    assert auxiliary > 0.01
    # Tasks of weight 1/2 are half of the paper's sum, and so the term is halved as well.
    assert loss(0.6)[0] == pytest.approx(tasks_alone + 0.6 * auxiliary / 2, rel=1e-5)
    assert loss(0.6, weight=1.0)[0] == pytest.approx(2 * loss(0.6)[0], rel=1e-5)


def _columns(**logits):
    return {tower: tf.constant(values, tf.float32)[:, None] for tower, values in logits.items()}


def test_aitms_calibrator_is_the_mean_excess_of_conversions_over_clicks():
    # Probabilities: .2 and .5, an excess of .3; .5 and .2, none.
    logits = _columns(click=[np.log(0.25), 0.0], conversion=[0.0, np.log(0.25)])
    found = _model("aitm").auxiliary_loss(logits, tf.constant([1, 2]))
    assert float(found) == pytest.approx((0.3 + 0) / 2)


GRADES_HALF_CLICKED = tf.constant([0, 1, 2, 0], tf.int64)


def test_escm2s_inverse_propensity_risk_by_hand():
    # With a propensity of 1/2 each of the two clicks counts as two rows.
    logits = _columns(click=[0.0] * 4, conversion=[0.0] * 4)
    model = _model("escm2_ips")
    found = model.auxiliary_loss(logits, GRADES_HALF_CLICKED)
    assert float(found) == pytest.approx(np.log(2))
    # cvr 1/4: the conversion's error is log 4, the other click's log 4/3.
    logits = _columns(click=[0.0] * 4, conversion=[-np.log(3)] * 4)
    found = model.auxiliary_loss(logits, GRADES_HALF_CLICKED)
    assert float(found) == pytest.approx(2 * (np.log(4) + np.log(4 / 3)) / 4)


def test_escm2s_doubly_robust_risk_by_hand():
    model = _model("escm2_dr")
    # softplus(log(e - 1)) = 1: an imputed error of 1, where it is log 2.
    logits = _columns(click=[0.0] * 4, conversion=[0.0] * 4, imputation=[np.log(np.e - 1)] * 4)
    found = model.auxiliary_loss(logits, GRADES_HALF_CLICKED)
    missed = np.log(2) - 1
    risk = 1 + 2 * (missed + missed) / 4
    imputation_risk = 2 * (missed**2 + missed**2) / 4
    assert float(found) == pytest.approx(risk + imputation_risk)


@pytest.mark.parametrize("name", ["escm2_ips", "escm2_dr"])
def test_escm2s_risk_is_that_of_a_loop_over_rows(name):
    """At a click rate of 4 percent propensities are no less than .4 percent."""
    split = Split(999, 39, 5, 0, ())
    model = _model(name, schema=dataclasses.replace(SCHEMA, splits={"train": split}))
    click, conversion, imputation = RANDOM.normal(size=(3, 20)) * 2
    click[:3] = -7.0
    grade = GRADE.numpy()
    risk = 0.0
    for row in range(20):
        cvr = _sigmoid(conversion[row])
        error = -np.log(cvr if grade[row] == 2 else 1 - cvr)
        inverse = (grade[row] > 0) / max(_sigmoid(click[row]), 0.1 * 39.5 / 1000)
        imputed = np.log1p(np.exp(imputation[row]))
        if name == "escm2_ips":
            risk += inverse * error / 20
        else:
            risk += (imputed + inverse * (error - imputed)) / 20
            risk += inverse * (error - imputed) ** 2 / 20
    logits = _columns(click=click, conversion=conversion, imputation=imputation)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        found = model.auxiliary_loss(logits, GRADE)
    assert float(found) == pytest.approx(risk, rel=1e-5)
    of_click, of_conversion = tape.gradient(found, [logits["click"], logits["conversion"]])
    assert of_click is None
    assert (of_conversion.numpy()[:, 0] != 0).tolist() == (grade > 0).tolist()


@pytest.mark.parametrize(("task", "own"), [("ctr", "click"), ("ctcvr", "conversion")])
def test_a_task_of_stem_does_not_train_the_other_tower(task, own):
    weights = {"ctr_weight": 0.0, "ctcvr_weight": 0.0, f"{task}_weight": 1.0}
    model = _model("stem", "direct", loss=LossConfig(name="bce", **weights))
    with tf.GradientTape() as tape:
        loss = model.compute_loss((FEATURES, GRADE), training=True)
    branches = {
        branch: [model._encoders[branch].embeddings, model._experts[branch][0]._blocks[0].kernel]
        for branch in ("click", "conversion", "shared")
    }
    gradients = tape.gradient(loss, branches)
    for branch, (embeddings, kernel) in gradients.items():
        if branch in (own, "shared"):
            assert np.abs(tf.convert_to_tensor(embeddings)).max() > 0
            assert np.abs(kernel).max() > 0
        else:
            assert not np.any(tf.convert_to_tensor(embeddings))
            assert not np.any(kernel)


def test_metaheac_can_predict_any_probability():
    model = _model("metaheac")
    for tower, bias in (("click", 12.0), ("conversion", -12.0)):
        model._biases[tower].assign(bias)
    found = model(FEATURES)
    assert found["ctr"].numpy().min() > 0.999
    assert found["ctcvr"].numpy().max() < 0.001


# MetaHeac's outputs are its own; all others are the base's.
@pytest.mark.parametrize("name", ["mmoe", "metaheac"])
@pytest.mark.parametrize("head", CONVERSION_HEADS)
def test_models_start_at_the_training_splits_rates(name, head):
    schema = dataclasses.replace(SCHEMA, splits={"train": Split(10_000, 300, 30, 0, ())})
    found = _model(name, head, schema=schema)(FEATURES)
    assert found["ctr"].numpy().mean() == pytest.approx(0.03, rel=0.7)
    assert found["ctcvr"].numpy().mean() == pytest.approx(0.003, rel=0.7)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_equal_seeds_give_equal_initialisation(name):
    first, same, other = (_model(name, seed=seed) for seed in (1, 1, 2))
    names = ("kernel", "embedding")
    kernels = [
        [w.numpy() for w in m.weights if any(part in w.name for part in names)]
        for m in (first, same, other)
    ]
    for a, b, c in zip(*kernels, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()


@pytest.mark.parametrize("name", MODELS)
def test_experts_critics_and_towers_start_different(name):
    model = _model(name)
    parts = ("_experts", "_critics", "_towers", "_bottoms")
    for group in (vars(model)[part] for part in parts if part in vars(model)):
        kernels = [mlp._blocks[0].kernel.numpy() for mlp in tf.nest.flatten(group)]
        for i, a in enumerate(kernels):
            for b in kernels[:i]:
                assert a.shape != b.shape or (a != b).any()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ctr", "ctcvr"])
@pytest.mark.parametrize("name", MODELS)
def test_an_energy_is_there_for_jrc_and_changes_no_output(name, task):
    tower = {"ctr": "click", "ctcvr": "conversion"}[task]
    expected = _model(name)(FEATURES)
    model = _model(name, loss=LossConfig(name="jrc", loss_tasks=(task,)))
    heads = model._critic_heads if name == "metaheac" else [model._heads[tower]]
    kernels = [layer._columns[1].kernel for layer in heads]
    # A model with the same seed has the same outputs with and without energy, at any weights of it.
    for shift in (0.0, 1.0):
        for kernel in kernels:
            kernel.assign(kernel + shift)
        for key, value in model(FEATURES).items():
            np.testing.assert_array_equal(value, expected[key])
    with tf.GradientTape() as tape:
        logits = model.tower_logits(FEATURES, training=False)
        predictions = model._task_predictions(logits, logits)
        energy = tf.reduce_sum(predictions[task]["energy"])
    assert {t: logits[t].shape[1] for t in TOWERS} == {t: 1 + (t == tower) for t in TOWERS}
    assert [other for other in predictions if "energy" in predictions[other]] == [task]
    assert float(energy) != 0
    for gradient in tape.gradient(energy, kernels):
        assert np.abs(gradient).max() > 0


def test_metaheacs_energy_is_the_critics_mixture():
    model = _model("metaheac", loss=LossConfig(name="jrc", loss_tasks=("ctr",)))
    for critic, layer in enumerate(model._critic_heads):
        layer._columns[1].kernel.assign(tf.zeros([5, 1]))
        layer._columns[1].bias.assign([float(critic)])
    model._critic_weights.kernel.assign(tf.zeros([8, 3]))
    model._critic_weights.bias.assign(np.log([0.5, 0.3, 0.2]))
    energy = model.tower_logits(FEATURES, training=False)["click"][:, 1]
    np.testing.assert_allclose(energy, np.full(20, 0.3 * 1 + 0.2 * 2), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision_trains_every_architecture(name):
    model = _model(name, mixed_precision=True)
    assert {tf.convert_to_tensor(gradient).dtype for gradient in _gradients(model)} == {tf.float32}


def test_an_unsupported_head_is_refused():
    refused = [
        (name, head) for name in MODELS for head in CONVERSION_HEADS if (name, head) not in CASES
    ]
    assert refused == [
        ("esmm", "direct"),
        ("aitm", "product"),
        ("escm2_ips", "direct"),
        ("escm2_dr", "direct"),
    ]
    for name, head in refused:
        with pytest.raises(ValueError, match=f"conversion_head={head}"):
            _model(name, head)


def test_unknown_head_is_refused():
    with pytest.raises(ValueError, match="conversion_head=sideways"):
        ModelConfig(conversion_head="sideways")


def test_an_auxiliary_weight_without_such_a_loss_is_refused():
    with pytest.raises(ValueError, match="--model=mmoe has no auxiliary loss"):
        _model("mmoe", auxiliary_weight=0.5)


@pytest.mark.parametrize("name", ["ple", "stem"])
@pytest.mark.parametrize("experts", [1, 3])
def test_experts_that_cannot_be_halved_are_refused(name, experts):
    with pytest.raises(ValueError, match=f"experts={experts}: expected an even number"):
        _model(name, experts=experts)


def test_tower_inputs_is_for_subclasses():
    from pwiser_tf.models import ClickConversionModel

    with pytest.raises(NotImplementedError):
        ClickConversionModel(SCHEMA, CONFIG).tower_inputs(FEATURES, training=False)
