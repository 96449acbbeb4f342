"""A local server that answers as TensorFlow Serving does, for tests and small deployments."""
