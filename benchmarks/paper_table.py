"""The old name of `pwiser study`, which is what it runs."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pwiser_tf.study.paper_table", run_name="__main__", alter_sys=True)
