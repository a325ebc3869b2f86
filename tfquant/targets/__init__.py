"""What a plan and a float graph become."""

from tfquant.graph.ir import Graph
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import QuantPlan


def returns_float(graph: Graph, unit: Unit, plan: QuantPlan) -> bool:
    """Whether a unit's result leaves the kernel in float32: it can do no other, nobody reads 8 bits, or the model shows it."""
    return unit.only_float or (unit.gives_float and (unit.output.name not in plan.tensors or graph.is_shown(unit.output)))
