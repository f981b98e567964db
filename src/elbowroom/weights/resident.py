"""ResidentWeights: every matrix dense, in one dtype, in memory for the whole run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elbowroom.weights.base import LinearDescriptor, StepInfo


class DenseLinear:
    """A dense matrix; the parameters may view an arena."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T + b``."""
        if out is None:
            return F.linear(x, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)

    def descriptor(self) -> LinearDescriptor | None:
        """Return addresses and strides of the resident matrix; None where its columns do not lie side by side."""
        weight = self.weight
        if weight.stride(1) != 1:
            return None
        return LinearDescriptor(
            weight_address=weight.data_ptr(),
            bias=self.bias,
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            row_stride_bytes=weight.stride(0) * weight.element_size(),
            format=str(weight.dtype).removeprefix("torch."),
        )


class GatedFFN:
    """``down(act(gate(x)) * up(x))`` with dense matrices."""

    def __init__(self, gate: DenseLinear, up: DenseLinear, down: DenseLinear, activation: str) -> None:
        self.gate, self.up, self.down = gate, up, down
        self._gelu = activation == "gelu_tanh"

    def __call__(self, x: Tensor, gate: Tensor | None = None, up: Tensor | None = None) -> Tensor:
        """Return the block's output ``[M, d]``."""
        g, u = self.gate(x, gate), self.up(x, up)
        if torch.is_grad_enabled():
            g = F.gelu(g, approximate="tanh") if self._gelu else F.silu(g)
            return self.down(g * u)
        if self._gelu:
            g = torch.ops.aten.gelu_(g, approximate="tanh")
        else:
            F.silu(g, inplace=True)
        return self.down(g.mul_(u))

    def descriptors(self) -> tuple[LinearDescriptor | None, ...]:
        """Return the plain facts of gate, up and down."""
        return self.gate.descriptor(), self.up.descriptor(), self.down.descriptor()


class ResidentWeights(nn.Module):
    """Holds all weights of a model as parameters and serves them to the decoder.

    Args:
        tensors: every tensor of ``ModelConfig.tensor_shapes`` by name.
        activation: ``silu`` or ``gelu_tanh``.
    """

    def __init__(self, tensors: Mapping[str, Tensor], activation: str, requires_grad: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self._names = list(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(tensor, requires_grad=requires_grad))

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """Return every parameter by its file name."""
        return {name: self._parameter(name) for name in self._names}

    def _parameter(self, name: str) -> nn.Parameter:
        return self.get_parameter(name.replace(".", "/"))

    def linear(self, name: str) -> DenseLinear:
        """Return the handle of matrix ``name``."""
        bias = self._parameter(f"{name}.bias") if f"{name}.bias" in self._names else None
        return DenseLinear(self._parameter(f"{name}.weight"), bias)

    def ffn(self, layer: int) -> GatedFFN:
        """Return the feed-forward block of ``layer``."""
        gate, up, down = (self.linear(f"layers.{layer}.mlp.{part}_proj") for part in ("gate", "up", "down"))
        return GatedFFN(gate, up, down, self.activation)

    def vector(self, name: str) -> Tensor:
        """Return the small tensor ``name``."""
        return self._parameter(name)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return embeddings ``[N, d]``."""
        return F.embedding(tokens, self._parameter("embed_tokens.weight"))

    def head(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return logits ``[M, vocab]``."""
        return self.linear("lm_head" if "lm_head.weight" in self._names else "embed_tokens")(x, out)

    def begin(self, step: StepInfo) -> None:
        """Nothing to move: all weights are resident."""

    def end(self) -> None:
        """Nothing to settle."""

    def prefetch(self, layer: int) -> None:
        """Nothing to fetch."""

    def resize(self, target_bytes: int) -> int:
        """Return the bytes held: resident weights do not shrink."""
        return self.resident_bytes()

    def resident_bytes(self) -> int:
        """Return the bytes of all parameters."""
        return sum(parameter.nbytes for parameter in self.parameters())
