"""Reading the nodes of a method's graph."""

from torch.fx import Node


def op_arguments(node: Node) -> dict[str, object]:
    """Arguments of an op's call by name, those that it leaves out included."""
    schema = node.target._schema.arguments
    given = zip((argument.name for argument in schema), node.args, strict=False)
    return {**{a.name: a.default_value for a in schema}, **dict(given), **node.kwargs}
