"""Tests of the ignored scope: what its entries name, and how entries that name nothing are refused."""

import types

import pytest

from tfquant.errors import ConfigError
from tfquant.plan.scope import IgnoredScope, held, resolve

NODES = [
    ("image", "Placeholder"),
    ("net/block1/conv/Conv2D", "Conv2D"),
    ("net/block1/conv/BiasAdd", "BiasAdd"),
    ("net/block10/conv/Conv2D", "Conv2D"),
    ("net/block2/net/dense/MatMul", "MatMul"),
    ("net/head/MatMul", "MatMul"),
    ("net/head/Softmax", "Softmax"),
    ("net/a.b/Relu", "Relu"),
    ("Identity", "Identity"),
]


def named(*entries, nodes=NODES):
    """{node: entry} of what the entries name."""
    found = resolve(IgnoredScope.parse(entries), nodes)
    return {name: entry for name, op in nodes if (entry := found(name, op))}


def test_parse():
    scope = IgnoredScope.parse(["block1", "re:a{1,2}", "type:Conv2D", "re:type:x"])
    assert scope == IgnoredScope(("block1",), ("a{1,2}", "type:x"), ("Conv2D",))
    assert scope
    assert not IgnoredScope.parse([])
    assert IgnoredScope(names=["a"]).names == ("a",)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("net/block1", [1, 2]),
        ("block1", [1, 2]),
        ("block1/", [1, 2]),
        ("block1/conv/Conv2D", [1]),
        ("net/block1/conv/Conv2D", [1]),
        ("net", [1, 2, 3, 4, 5, 6, 7]),
        ("head", [5, 6]),
        ("Identity", [8]),
        ("a.b", [7]),
        ("re:block1", [1, 2]),
        (r"re:block\d+", [1, 2, 3, 4]),
        (r"re:net/block\d", [1, 2, 4]),
        (r"re:.*/conv/Conv2D", [1, 3]),
        ("re:.*/MatMul", [4, 5]),
        ("re:(head|block2/net)/MatMul|image", [0, 5]),
        ("type:MatMul", [4, 5]),
        ("type:Placeholder", [0]),
    ],
)
def test_what_an_entry_names(entry, expected):
    assert named(entry) == {NODES[index][0]: entry for index in expected}


def test_the_first_entry_counts_of_paths_then_patterns_then_types():
    assert named("type:MatMul", "re:head/.*", "head/MatMul") == {
        "net/block2/net/dense/MatMul": "type:MatMul",
        "net/head/MatMul": "head/MatMul",
        "net/head/Softmax": "re:head/.*",
    }
    assert named("block1/conv", "block1")["net/block1/conv/Conv2D"] == "block1"


def test_only_the_name_of_the_model_may_be_left_out():
    """A frozen graph without a top scope: "Relu" is no layer of all its scopes."""
    nodes = [("conv1/Conv2D", "Conv2D"), ("conv1/Relu", "Relu"), ("conv2/Conv2D", "Conv2D"), ("conv2/Relu", "Relu")]
    assert named("conv1", nodes=nodes) == {"conv1/Conv2D": "conv1", "conv1/Relu": "conv1"}
    with pytest.raises(ConfigError, match="Received: 'Relu'"):
        named("Relu", nodes=nodes)


def test_an_empty_scope_names_nothing():
    assert named() == {}
    assert resolve([], [])("a", "Conv2D") is None


@pytest.mark.parametrize(
    ("entry", "what", "hint"),
    [
        ("blok1", "a layer or node", "the nearest are block1, block10, block2"),
        ("Block2", "a layer or node", "the nearest are block2, block1, block10"),
        ("type:conv2d", "an op type", "the nearest are Conv2D"),
        ("type:LSTM", "an op type", "the model has Placeholder, Conv2D, BiasAdd and others"),
        ("qqqqqq", "a layer or node", "the model has image, net, net/block1 and others"),
        ("re:qq.*", "a layer or node", "the model has image, net, net/block1 and others"),
        # No whole parts of a path, or not at its start.
        ("conv", "a layer or node", None),
        ("dense", "a layer or node", None),
        ("block", "a layer or node", None),
        ("et/block1", "a layer or node", None),
        ("Conv2D", "a layer or node", None),
        ("re:lock1", "a layer or node", None),
    ],
)
def test_an_entry_that_names_nothing(entry, what, hint):
    with pytest.raises(ConfigError) as error:
        named("head", entry)
    message = str(error.value)
    assert message.startswith(f"ignored_scope must name {what} of the model; the ")
    assert message.endswith(f". Received: {entry!r}")
    if hint is not None:
        assert message == f"ignored_scope must name {what} of the model; {hint}. Received: {entry!r}"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["re:a(b"], "missing ), unterminated subpattern at position 1. Received: 'a(b'"),
        (["re:*"], "nothing to repeat at position 0. Received: '*'"),
        (["re:[z-a]"], "bad character range z-a at position 1. Received: '[z-a]'"),
        (["re:"], "takes strings that are not empty. Received: ''"),
        (["type:"], "takes strings that are not empty. Received: ''"),
        (["a", None], "takes strings that are not empty. Received: None"),
        ("block1", "must be a list of strings. Received: 'block1'"),
    ],
)
def test_entries_that_cannot_be(entries, message):
    with pytest.raises(ConfigError) as error:
        IgnoredScope.parse(entries)
    assert str(error.value).endswith(message)


def test_nodes_that_are_held():
    found = resolve(["block1/conv/BiasAdd", "type:Softmax"], NODES)

    def reason(index):
        return held(found, types.SimpleNamespace(name=NODES[index][0], op=NODES[index][1]))

    assert reason(1) is None
    assert reason(2) == "the ignored scope names it (block1/conv/BiasAdd)"
    assert [reason(5), reason(6)].count("the ignored scope names it (type:Softmax)") == 1
