"""pwiser-tf: exposure logs to a served model of CTR, CVR and CTCVR, trained with PWiseR."""

import pathlib

import setuptools

setuptools.setup(
    name="pwiser-tf",
    version="0.1.0",
    description="CTR, CVR and CTCVR models with the PWiseR loss, from raw CSV to TF Serving",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["pwiser_tf", "pwiser_tf.models"],
    install_requires=[
        "absl-py>=2.1",
        "crc32c>=2.7",
        "duckdb>=2.0",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "optuna>=5.0",
        "pandas>=2.2",
        "pyarrow>=17",
        "sqlalchemy>=2.0",
        "tensorboard>=2.18",
        "tensorflow>=2.18,<2.22",
        "tensorflow-recommenders>=0.7.3",
        "tensorflow-serving-api>=2.18,<2.22",
        "tf_keras>=2.18,<2.22",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "pyyaml>=6",
            "ruff>=0.6",
            "scikit-learn>=1.4",
            "scipy>=1.11",
        ],
        # The rivals that benchmarks/ runs beside us.
        "bench": [
            "fastapi>=0.115",
            "scikit-learn>=1.4",
            "scipy>=1.11",
            "torch>=2.4",
            "uvicorn>=0.30",
        ],
    },
)
