"""Drops ops that hand their input on, and control edges from ops that have no effect."""

from tfquant.graph.ir import Graph, Tensor, is_stateful

_PASS_ON = frozenset({"Identity", "StopGradient", "PreventGradient", "CheckNumerics", "Snapshot"})


def run(graph: Graph) -> int:
    fired = 0
    for node in graph.order():
        if node.pinned:
            continue
        for before in list(node.control):
            if not before.control and not before.pinned and (before.op in _PASS_ON or not is_stateful(before.op)):
                graph.remove_control(node, before)
        if (node.op in _PASS_ON or node.op == "IdentityN") and not node.control and not node.control_users:
            for index, given in enumerate(node.inputs if node.op == "IdentityN" else node.inputs[:1]):
                graph.replace(Tensor(node, index), given)
            graph.remove(node)
            fired += 1
    return fired
