"""What a run's numbers depend on besides its config: processor, cores, threads, versions."""

import os
import platform


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2] for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def describe() -> dict[str, object]:
    """The processor's name, the cores and threads in use, and the versions of Python and
    TensorFlow, which is imported here."""
    import tensorflow as tf

    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        # 0: TensorFlow chooses.
        "intra_op_threads": tf.config.threading.get_intra_op_parallelism_threads(),
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
    }
