"""What autograd keeps for a backward pass is counted to the byte, and counting changes nothing."""

from __future__ import annotations

import torch

from left_bench.measure.activations import Activations
from left_bench.worker.stages import account_for_peak


def small_net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))


def gradients(net: torch.nn.Module, inputs: torch.Tensor, watched: Activations | None) -> list[torch.Tensor]:
    net.zero_grad()
    if watched is None:
        loss = net(inputs).sum()
    else:
        with watched.of_pass({"x": inputs}):
            loss = net(inputs).sum()
    loss.backward()
    return [parameter.grad.clone() for parameter in net.parameters()]


def test_saved_tensors_are_counted_once_and_weights_are_not_among_them():
    net, inputs = small_net(), torch.ones(3, 4)
    watched = Activations(net)
    gradients(net, inputs, watched)
    assert watched.bytes == 4 * (3 * 4 + 3 * 8)  # the input, and the hidden layer that two layers saved


def test_gradients_are_the_same_whether_or_not_a_pass_is_watched():
    net, inputs = small_net(), torch.randn(3, 4)
    for plain, watched in zip(gradients(net, inputs, None), gradients(net, inputs, Activations(net)), strict=True):
        assert torch.equal(plain, watched)


def test_the_largest_pass_counts():
    net = small_net()
    watched = Activations(net)
    for rows in (3, 5, 4):
        gradients(net, torch.ones(rows, 4), watched)
    assert watched.bytes == 4 * (5 * 4 + 5 * 8)


def test_a_graph_that_is_gone_has_left_nothing_counted():
    net = small_net()
    watched = Activations(net)
    with watched.of_pass({"x": torch.ones(3, 4)}):
        net(torch.ones(3, 4)).sum()  # let go of before the end
    assert watched.bytes == 0


def test_a_sparse_tensor_is_passed_by_and_its_gradient_flows():
    net = small_net()
    watched = Activations(net)
    matrix = torch.eye(3).to_sparse()
    with watched.of_pass({"x": torch.ones(3, 4)}):
        loss = torch.sparse.mm(matrix, net(torch.ones(3, 4))).sum()
    loss.backward()
    assert watched.bytes == 4 * (3 * 4 + 3 * 8) and net[0].weight.grad is not None


def test_a_record_tells_activations_and_workspace_apart(tiny_cell, work_in_process):
    parts = work_in_process(tiny_cell("training.steps=2", "eval=loss"))["memory_breakdown"]
    assert parts["activations"] > 0 and "workspace" in parts  # none where freed memory served again
    assert "activations_and_workspace" not in parts


def test_where_activations_are_not_counted_they_are_one_with_the_workspace():
    parts = {"weights": 10}
    account_for_peak(parts, {"peak_memory_bytes": 25.0})
    assert parts == {"weights": 10, "activations_and_workspace": 15}
    parts = {"weights": 10, "activations": 6}
    account_for_peak(parts, {"peak_memory_bytes": 25.0})
    assert parts == {"weights": 10, "activations": 6, "workspace": 9}
