"""The old name of `python -m pwiser_tf.study.agreement`, which is what it runs."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pwiser_tf.study.agreement", run_name="__main__", alter_sys=True)
