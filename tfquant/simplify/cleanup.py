"""Drops ops that hand their input on, and control edges from ops that have no effect."""

from tfquant.graph.ir import Graph, is_stateful

_PASS_ON = frozenset({"Identity", "StopGradient", "PreventGradient", "CheckNumerics", "Snapshot"})


def run(graph: Graph) -> int:
    fired = 0
    for node in graph.order():
        if node.pinned:
            continue
        for before in list(node.control):
            if not before.control and not before.pinned and (before.op in _PASS_ON or not is_stateful(before.op)):
                graph.remove_control(node, before)
        if node.op in _PASS_ON and not node.control and not node.control_users:
            graph.replace(node.out, node.inputs[0])
            graph.remove(node)
            fired += 1
    return fired
