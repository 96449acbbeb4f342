"""pwiser-serving: a client of TensorFlow Serving without TensorFlow, and a local server."""

import pathlib

import setuptools

setuptools.setup(
    name="pwiser-serving",
    version="0.1.0",
    description="Score candidates over TF Serving's gRPC API, without TensorFlow in the client",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["pwiser_serving", "pwiser_serving.protos", "pwiser_serving.server"],
    package_data={
        "pwiser_serving.protos": ["*.proto"],
        "pwiser_serving.server": ["*.proto"],
    },
    install_requires=[
        "crc32c>=2.7",
        # Older versions open a file at import, which takes the number of a closed stdin or stderr.
        "grpcio>=1.74",
        "numpy>=1.26",
        # The generated code is protoc 25's, the last that checks no version of the runtime, so
        # that one wheel stands beside every TensorFlow from 2.18 to 2.21.
        "protobuf>=4.25,<8",
        "tqdm>=4.66",
    ],
    extras_require={
        "parquet": ["pyarrow>=17"],
        "server": [
            "grpcio-health-checking>=1.60",
            "orjson>=3.10",
            "tensorflow>=2.18,<2.22",
            # TF Serving's own messages.
            "tensorflow-serving-api>=2.18,<2.22",
            "waitress>=3.0",
        ],
        "test": [
            "pandas>=2",
            "prometheus-client>=0.20",
            "pyarrow>=17",
            "pytest>=8",
            "pyyaml>=6",
            "trustme>=1.1",
        ],
    },
)
