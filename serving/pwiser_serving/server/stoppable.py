"""Stoppable: runs parts of a Session's graph, so that another thread can stop them.

A Session takes a time limit for a run, and has no way to cancel one. So a run here has a second
part beside the model's: it waits for a word from a queue. The model's part says "done" when it has
its results; from outside comes "stop", which is an error and so ends the run. This costs a few
microseconds. What it stops is what TensorFlow lets be stopped, as a time limit does: a loop ends
before its next turn; other ops that have begun, or could, go on to their end.

A run takes the caller's thread alone: threads that wake each other cost more than a small batch
does, and on two cores gain a tenth at most with a large one. (Each op still uses all cores.) One
thread also gives the order in which ops begin, on which the stopping rests.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2

from pwiser_serving.server.calls import Call

# Takes the arrays of a part's inputs; gives the values of its outputs, in order.
Run = Callable[[Sequence[np.ndarray], Call], list[np.ndarray]]


class StoppableSession:
    """A Session whose runs can be stopped. Methods may be called from several threads at once.

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
            # A queue goes into a run by its name in the session, as a feed.
            self._name = tf.compat.v1.placeholder(tf.string, [])
            queue = self._queue()
            say_stop = _say(queue, stop=True)
            # What a run that failed has left behind.
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
                # The session says it in the words of TF Serving.
                options = config_pb2.CallableOptions(feed=inputs, fetch=outputs)
                self._session._make_callable_from_options(options)
                raise
            queue = self._queue()
            (stop,) = tf.raw_ops.QueueDequeueV2(handle=queue, component_types=[tf.bool])
            wait = tf.raw_ops.Assert(condition=tf.logical_not(stop), data=["stopped"])
            late = {}
            if feeds:
                # In one thread ops begin in the order in which they get ready. TensorFlow expands
                # most functions into their ops; a call of another one must not begin, and keep the
                # thread, before the wait does. So one of its inputs is late.
                fed = tf.compat.v1.placeholder(feeds[0].dtype)
                with tf.control_dependencies([queue.op]):
                    late[feeds[0].name] = tf.identity(fed).name
                feeds = [fed, *feeds[1:]]
            # Copies: an op that only waits for a call does not wait for its values.
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
                # An op failed within a function: then the wait for the queue is cancelled before
                # the reason is known. The run is repeated for it.
                return without_queue()(*arrays)
            finally:
                if not good:
                    self._empty(queue.name)
                self._free.append(queue)

        return run_for

    def _new_queue(self) -> "_Queue":
        with self._growing, self._session.graph.as_default(), tf.name_scope("stoppable"):
            # Room for both words, so that nobody who says one has to wait.
            queue = tf.raw_ops.FIFOQueueV2(component_types=[tf.bool], shapes=[[]], capacity=-1)
            named = tf.raw_ops.GetSessionHandle(value=queue)
            (name,) = self._callable([], [named], [])()
        name = np.asarray(name, object)
        return _Queue(name, lambda: self._stop(name))

    def _queue(self) -> tf.Tensor:
        """The queue that `_name` is the name of, in the graph."""
        return tf.raw_ops.GetSessionTensor(handle=self._name, dtype=tf.resource)

    def _callable(
        self,
        feeds: Sequence[tf.Tensor],
        outputs: Sequence[tf.Tensor],
        targets: Sequence[tf.Operation],
        replaced: Mapping[str, str] = {},
    ) -> Callable:
        """The graph from feeds to outputs and targets, where some tensors replace others.

        Session.make_callable with feeds is a Session.run in disguise: four times slower at
        batch 1, and it converts types silently where TF Serving refuses.
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


class _Queue:
    """The queue of one run at a time: its name in the session, and what says "stop" there."""

    def __init__(self, name: np.ndarray, stop: Callable[[], object]):
        self.name, self.stop = name, stop
