"""A model's own code builds its graph, and fake quantization goes in between while it does.

`FuncGraph` has one place where ops are made. While a `Tracer` is active in a thread, ops that the thread makes in its graph pass
through it: it may hand an op other inputs than the code gave it. So variables, updates of statistics, losses, mixed precision,
distribution and gradients are the model's own; nothing is cloned.

What a model calls as a `tf.function` is built in place, as if it were none, so that its ops pass through as well; but for those
that compile themselves (`jit_compile=True`), whose ops may run in no other way.

An op is known by its name below the scope in which the model is called ("conv_1/convolution"), which is the same at each call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager.polymorphic_function.autograph_util import py_func_from_autograph
from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function as PolymorphicFunction
from tensorflow.python.framework.func_graph import FuncGraph

from tfquant.graph.paths import QUANTIZATION_AWARE

# Their gradient may be that of a composite around them, and nothing is computed: what they hand on is what they were given.
ALIASES = frozenset({"Identity", "IdentityN", "StopGradient", "PreventGradient", "Snapshot", "EnsureShape", "Cast"})
# Made or not made as the context has it: with them no two traces are alike.
_CONTEXT = ALIASES | {"Const", "NoOp", "Placeholder", "ReadVariableOp", "VarHandleOp"}
_active = threading.local()


@dataclasses.dataclass(frozen=True)
class Made:
    """An op that a model's code made: its name below the scope of the call, and its type."""

    name: str
    op: str

    @property
    def scope(self) -> str:
        return self.name.rpartition("/")[0]


class Tracer:
    """What happens to the ops of one call of a model.

    Args:
        graph: in which the call makes them.
        scope: of the call, as its ops' names begin.
        replace: called with (name of the op, its type, the marks of its inputs, its inputs); returns the inputs that it gets.
            A mark is what `mark` gave a tensor or one that repeats it, else None.
        made: called with (name, op) of each new op.
    """

    def __init__(
        self,
        graph: Any,
        scope: str,
        replace: Callable[[str, str, Sequence[Any], Sequence[tf.Tensor]], Sequence[tf.Tensor]],
        made: Callable[[str, tf.Operation], None],
    ) -> None:
        self.graph, self._scope, self._replace, self._made = graph, scope, replace, made
        self._marks: dict[int, tuple[tf.Tensor, Any]] = {}  # a tensor held keeps its id
        self._busy = False

    def mark(self, tensor: tf.Tensor, mark: Any) -> None:
        """Gives a tensor a mark that `replace` is told of wherever it is read."""
        self._marks[id(tensor)] = tensor, mark

    def mark_of(self, tensor: tf.Tensor) -> Any:
        """What `mark` gave it, or what it repeats; else None."""
        return self._marks.get(id(tensor), (None, None))[1]

    def name_of(self, name: str) -> str:
        """The name of an op, by its name in the graph, below the scope of the call."""
        return name.removeprefix(self._scope)

    def create(self, make: Callable[..., tf.Operation], op_type: str, inputs: Sequence[tf.Tensor], args: Any, kwargs: Any) -> Any:
        """Makes an op in place of the graph."""
        if self._busy:
            return make(op_type, inputs, *args, **kwargs)
        marks = [self.mark_of(tensor) for tensor in inputs]
        if op_type in ALIASES:
            op = make(op_type, inputs, *args, **kwargs)
            for tensor, mark in zip(op.outputs, marks, strict=False):
                if mark is not None:
                    self.mark(tensor, mark)
        else:
            name = self.name_of(self._name_to_be(op_type, args, kwargs))
            with self._apart():
                inputs = self._replace(name, op_type, marks, inputs)
            op = make(op_type, inputs, *args, **kwargs)
        self._made(self.name_of(op.name), op)
        return op

    def _name_to_be(self, op_type: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        name = kwargs.get("name") or (args[2] if len(args) > 2 else None) or op_type
        return name[:-1] if name.endswith("/") else str(self.graph.unique_name(name, mark_as_used=False))

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """What is made now is not the model's."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False


@contextlib.contextmanager
def tracing(tracer: Tracer) -> Iterator[None]:
    """While it is open, ops that this thread makes in the tracer's graph pass through it."""
    _install()
    before = getattr(_active, "tracer", None)
    _active.tracer = tracer
    try:
        yield
    finally:
        _active.tracer = before


@functools.cache
def _install() -> None:
    """Puts tracers between `FuncGraph`, and functions, and their callers; without an active one, all is as before."""
    original = FuncGraph._create_op_internal

    @functools.wraps(original)
    def create(self: Any, op_type: str, inputs: Sequence[tf.Tensor], *args: Any, **kwargs: Any) -> Any:
        tracer = getattr(_active, "tracer", None)
        make = functools.partial(original, self)
        if tracer is None or tracer.graph is not self:
            return make(op_type, inputs, *args, **kwargs)
        return tracer.create(make, op_type, inputs, args, kwargs)

    FuncGraph._create_op_internal = create
    called = PolymorphicFunction.__call__

    @functools.wraps(called)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        tracer = getattr(_active, "tracer", None)
        if tracer is None or self._jit_compile or tf.compat.v1.get_default_graph() is not tracer.graph:
            return called(self, *args, **kwargs)
        python_function = self._python_function
        if self._autograph:
            python_function = py_func_from_autograph(python_function, self._experimental_autograph_options)
        return python_function(*args, **kwargs)

    PolymorphicFunction.__call__ = call


def record(call: Callable[[], Any]) -> tuple[Any, list[Made]]:
    """Calls `call` in the graph that is being built, which is empty; returns its result and the ops that it made, in order."""
    ops: list[Made] = []
    tracer = Tracer(
        tf.compat.v1.get_default_graph(), "", lambda *given: given[-1], lambda name, op: ops.append(Made(name, op.type))
    )
    with tracing(tracer):
        return call(), ops


@contextlib.contextmanager
def in_scope() -> Iterator[str]:
    """A scope that no other call shares."""
    with tf.name_scope(QUANTIZATION_AWARE) as scope:
        yield scope


def aligned(ops: Sequence[Made], others: Sequence[Made]) -> dict[str, str]:
    """Which ops of a trace stand for which of another: names in `ops` to names in `others`.

    Two traces of a model differ in what training alone computes (batch statistics, dropout). Names are counted ("mul_1"), so that
    one op more gives others its name: the ops of each scope are matched in their order, by type.

    Args:
        ops: of one trace, in the order in which they were made.
        others: of another.
    """
    found: dict[str, str] = {}
    there = _by_scope(others)
    for scope, own in _by_scope(ops).items():
        if scope not in there:
            continue
        theirs = there[scope]
        if own == theirs:
            found |= {made.name: made.name for made in own}
            continue
        matcher = difflib.SequenceMatcher(None, [made.op for made in own], [made.op for made in theirs], autojunk=False)
        for block in matcher.get_matching_blocks():
            for i in range(block.size):
                found[own[block.a + i].name] = theirs[block.b + i].name
    return found


def _by_scope(ops: Sequence[Made]) -> dict[str, list[Made]]:
    found: dict[str, list[Made]] = {}
    for made in ops:
        if made.op not in _CONTEXT:
            found.setdefault(made.scope, []).append(made)
    return found
