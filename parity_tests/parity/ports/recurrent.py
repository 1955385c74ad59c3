"""Faults in recurrent layers: two biases for each gate, and the order of the gates."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
import torch
from flax import linen
from jax import lax
from jax import numpy as jnp
from torch import nn

from parity_tests.harness.pair import Pair
from parity_tests.parity.ports.registry import port, values

FEATURES, HIDDEN = 4, 6


class Recurrent(nn.Module):
    """A recurrent layer and a linear one after it."""

    def __init__(self, layer: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.rnn = layer(FEATURES, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, 3] from [batch, time, feature]."""
        states, _ = self.rnn(x)
        return self.head(states)


@port("P7-GRU", ("parameters", "rnn.bias_hh_l0"))
def bias_left_out(sound: bool) -> Pair:
    """A GRU of PyTorch has two biases for each gate, and a port has the sum of both (equinox#1003)."""

    class Net(eqx.Module):
        rnn: eqx.nn.GRUCell
        head: eqx.nn.Linear

        def __call__(self, x: jax.Array) -> jax.Array:
            def step(state: jax.Array, frame: jax.Array) -> tuple[jax.Array, jax.Array]:
                state = self.rnn(frame, state)
                return state, state

            _, states = lax.scan(step, jnp.zeros(HIDDEN, x.dtype), x)
            return jax.vmap(self.head)(states)

    keys = jax.random.split(jax.random.key(0))
    net = Net(eqx.nn.GRUCell(FEATURES, HIDDEN, key=keys[0]), eqx.nn.Linear(HIDDEN, 3, key=keys[1]))

    def load(state: dict[str, Any]) -> Net:
        """Leave out the second bias, but for the gate that has it apart."""
        tensors = [state[f"rnn.{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        return eqx.tree_at(
            lambda net: (
                net.rnn.weight_ih,
                net.rnn.weight_hh,
                net.rnn.bias,
                net.rnn.bias_n,
                net.head.weight,
                net.head.bias,
            ),
            net,
            (*tensors[:3], tensors[3][2 * HIDDEN :], state["head.weight"], state["head.bias"]),
        )

    return Pair(Recurrent(nn.GRU), net, values(2, 5, FEATURES), None if sound else load)


@port("P7-LSTM", ("outputs", "output of rnn"))
def gates_exchanged(sound: bool) -> Pair:
    """PyTorch's gates come in the order input, forget, cell, output (google/flax#3746, #5594)."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            carry = jnp.zeros((len(x), HIDDEN), x.dtype), jnp.zeros((len(x), HIDDEN), x.dtype)
            states = linen.RNN(linen.OptimizedLSTMCell(HIDDEN, name="rnn"))(x, initial_carry=carry)
            return linen.Dense(3, name="head")(states)

    def load(state: dict[str, Any]) -> Any:
        """Take the gates in another order."""
        cell: dict[str, Any] = {}
        for index, gate in enumerate("ifog"):
            rows = slice(index * HIDDEN, (index + 1) * HIDDEN)
            bias = state["rnn.bias_ih_l0"] + state["rnn.bias_hh_l0"]
            cell[f"i{gate}"] = {"kernel": state["rnn.weight_ih_l0"][rows].T}
            cell[f"h{gate}"] = {"kernel": state["rnn.weight_hh_l0"][rows].T, "bias": bias[rows]}
        return {"params": {"rnn": cell, "head": {"kernel": state["head.weight"].T, "bias": state["head.bias"]}}}

    return Pair(Recurrent(nn.LSTM), Net(), values(2, 5, FEATURES), None if sound else load)


@port("P7-scan", ("outputs", "output of rnn"))
def gates_exchanged_in_a_scan(sound: bool) -> Pair:
    """The same in a cell that the port itself calls for each step (equinox#1003)."""

    class Net(eqx.Module):
        rnn: eqx.nn.LSTMCell
        head: eqx.nn.Linear

        def __call__(self, x: jax.Array) -> jax.Array:
            def step(state: tuple[jax.Array, jax.Array], frame: jax.Array) -> tuple[Any, jax.Array]:
                hidden, cell = self.rnn(frame, state)
                return (hidden, cell), hidden

            start = jnp.zeros(HIDDEN, x.dtype), jnp.zeros(HIDDEN, x.dtype)
            return jax.vmap(self.head)(lax.scan(step, start, x)[1])

    keys = jax.random.split(jax.random.key(0))
    net = Net(eqx.nn.LSTMCell(FEATURES, HIDDEN, key=keys[0]), eqx.nn.Linear(HIDDEN, 3, key=keys[1]))

    def load(state: dict[str, Any]) -> Net:
        """Take the gates in another order."""
        order = np.r_[: 2 * HIDDEN, 3 * HIDDEN : 4 * HIDDEN, 2 * HIDDEN : 3 * HIDDEN]
        bias = state["rnn.bias_ih_l0"] + state["rnn.bias_hh_l0"]
        return eqx.tree_at(
            lambda net: (net.rnn.weight_ih, net.rnn.weight_hh, net.rnn.bias, net.head.weight, net.head.bias),
            net,
            (
                *(leaf[order] for leaf in (state["rnn.weight_ih_l0"], state["rnn.weight_hh_l0"], bias)),
                state["head.weight"],
                state["head.bias"],
            ),
        )

    return Pair(Recurrent(nn.LSTM), net, values(2, 5, FEATURES), None if sound else load)
