"""Stoppable: runs parts of a Session's graph, so that another thread can stop them.

A Session takes a time limit for a run but cannot cancel one. So each run has a second part beside
the model's, which waits for a value from a queue. The model's part puts "done" there after its
results; another thread can put "stop", which is an error and so ends the run. This costs a few
microseconds. What can be stopped is what TensorFlow stops at a time limit: a loop ends before its
next iteration; other ops that are ready or running go on to their end.

A run uses only the caller's thread: threads that wake each other cost more than a small batch, and
on two cores gain a tenth at most with a large one. (Each op still uses all cores.) With one thread
the order in which ops begin is known; stopping depends on it.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2

from pwiser_serving.server.calls import Call

# Takes the arrays of a part's inputs; gives the values of its outputs, in order.
Run = Callable[[Sequence[np.ndarray], Call], list[np.ndarray]]


class _Queue(NamedTuple):
    """A queue for one run at a time: its name in the session, and what puts "stop" there."""

    name: np.ndarray
    stop: Callable[[], object]


class StoppableSession:
    """A Session whose runs can be stopped. Thread-safe.

    Args:
      session: a TF 1 Session with its graph.
    """

    def __init__(self, session: tf.compat.v1.Session):
        self._session = session
        # Queues that no run is using now.
        self._free: list[_Queue] = []
        # Held while the graph grows.
        self._growing = threading.Lock()
        with session.graph.as_default(), tf.name_scope("stoppable"):
            # A run gets its queue as a feed, by its name in the session.
            self._name = tf.compat.v1.placeholder(tf.string, [])
            queue = self._queue()
            say_stop = _say(queue, stop=True)
            # Removes what a failed run has left.
            left = tf.raw_ops.QueueDequeueManyV2(
                handle=queue,
                n=tf.raw_ops.QueueSizeV2(handle=queue),
                component_types=[tf.bool],
            )
        self._stop = self._callable([self._name], [], [say_stop])
        self._empty = self._callable([self._name], left, [])

    def part(self, inputs: Sequence[str], outputs: Sequence[str]) -> Run:
        """A part of the graph, by the names of its tensors, ready to run.

        Raises:
          tf.errors.OpError: there is no such part.
        """
        graph = self._session.graph
        with self._growing, graph.as_default(), tf.name_scope("stoppable"):
            try:
                feeds = [graph.get_tensor_by_name(name) for name in inputs]
                results = [graph.get_tensor_by_name(name) for name in outputs]
            except (KeyError, ValueError):
                # The session raises the error that TF Serving gives.
                options = config_pb2.CallableOptions(feed=inputs, fetch=outputs)
                self._session._make_callable_from_options(options)
                raise
            queue = self._queue()
            (stop,) = tf.raw_ops.QueueDequeueV2(handle=queue, component_types=[tf.bool])
            wait = tf.raw_ops.Assert(condition=tf.logical_not(stop), data=["stopped"])
            late = {}
            if feeds:
                # In one thread, ops begin in the order in which they become ready. A call of a
                # function that TensorFlow does not inline must not take the thread before the wait
                # has begun. So one of its inputs comes late.
                fed = tf.compat.v1.placeholder(feeds[0].dtype)
                with tf.control_dependencies([queue.op]):
                    late[feeds[0].name] = tf.identity(fed).name
                feeds = [fed, *feeds[1:]]
            # Copies: a control dependency on a function call does not wait for its values.
            with tf.control_dependencies([tf.identity(result) for result in results]):
                say_done = _say(queue, stop=False)
            run = self._callable([*feeds, self._name], results, [wait, say_done], late)

        @functools.cache
        def without_queue() -> Callable:
            return self._callable([graph.get_tensor_by_name(name) for name in inputs], results, [])

        return self._stoppable(run, without_queue)

    def close(self) -> None:
        """Frees the session. Nothing may be running."""
        self._session.close()

    def _stoppable(self, run: Callable, without_queue: Callable[[], Callable]) -> Run:
        def run_for(arrays: Sequence[np.ndarray], call: Call) -> list[np.ndarray]:
            try:
                queue = self._free.pop()
            except IndexError:
                queue = self._new_queue()
            good = False
            try:
                call.begin(queue.stop)
                try:
                    results = run(*arrays, queue.name)
                finally:
                    call.finish()
                good = True
                return results
            except tf.errors.CancelledError:
                # An op failed within a function, and the wait for the queue was cancelled before
                # the reason was known. The run is repeated to get the reason.
                return without_queue()(*arrays)
            finally:
                if not good:
                    self._empty(queue.name)
                self._free.append(queue)

        return run_for

    def _new_queue(self) -> _Queue:
        with self._growing, self._session.graph.as_default(), tf.name_scope("stoppable"):
            # With room for both values, so that nobody waits to put one there.
            queue = tf.raw_ops.FIFOQueueV2(component_types=[tf.bool], shapes=[[]], capacity=-1)
            named = tf.raw_ops.GetSessionHandle(value=queue)
            (name,) = self._callable([], [named], [])()
        name = np.asarray(name, object)
        return _Queue(name, lambda: self._stop(name))

    def _queue(self) -> tf.Tensor:
        """The queue named by the feed `_name`."""
        return tf.raw_ops.GetSessionTensor(handle=self._name, dtype=tf.resource)

    def _callable(
        self,
        feeds: Sequence[tf.Tensor],
        outputs: Sequence[tf.Tensor],
        targets: Sequence[tf.Operation],
        replaced: Mapping[str, str] = {},
    ) -> Callable:
        """The graph from feeds to outputs and targets; `replaced` are tensors by their new names.

        Session.make_callable with feeds calls Session.run: four times slower at batch 1, and it
        converts types silently where TF Serving refuses.
        """
        options = config_pb2.CallableOptions(
            feed=[tensor.name for tensor in feeds],
            fetch=[tensor.name for tensor in outputs],
            target=[operation.name for operation in targets],
        )
        for old, new in replaced.items():
            options.tensor_connection.add(from_tensor=new, to_tensor=old)
        # All in the caller's thread.
        options.run_options.inter_op_thread_pool = -1
        return self._session._make_callable_from_options(options)


def _say(queue: tf.Tensor, *, stop: bool) -> tf.Operation:
    return tf.raw_ops.QueueEnqueueV2(handle=queue, components=[tf.constant(stop)])
