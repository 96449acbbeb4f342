"""Generated logs with a planted truth, in the layouts of real data, without TensorFlow."""
