"""What a layer's conversion may know of the calibration text; filled by whoever runs the model (`attnzoo.hf`).

Layers are converted one after the other. A layer's inputs are those that it gets behind the layers converted before it,
so that it sees, and can make up for, what they do to the text.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from attnzoo.conversion.errors import ConversionError
from attnzoo.conversion.moments import Moments

# Of which outputs of the original attention a method wants to come near:
# same: on the inputs that the new attention gets; own: on the original's own inputs, behind its own layers;
# stream: own, and what brings the sum behind the layer back to the original's.
Target = Literal["same", "own", "stream"]


class LayerData(ABC):
    """One layer's calibration data.

    number: of the layer; moments: of the attention's inputs `[tokens, dim]`; attended: the same, each token counted by
    the attention that it receives (evenly, where a class does not let that be seen), for that is how much its key and
    value matter; batches: how many there are; device, dtype: where and in what the layer computes.
    """

    number: int
    moments: Moments
    attended: Moments
    batches: int
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def inputs(self, batch: int) -> Tensor:
        """The attention's inputs `[rows, S, dim]`, behind the layers that are converted already."""

    @abstractmethod
    def target(self, batch: int) -> Tensor:
        """The outputs `[rows, S, dim]` that the method's `target` names; raises ValueError where it names none."""

    @abstractmethod
    def attend(self, tensors: Mapping[str, Tensor], batch: int) -> Tensor:
        """The new attention with `tensors` (by their names inside the module) on inputs: outputs `[rows, S, dim]`.

        It is the module of the new model's class itself; gradients flow to the tensors.
        """

    @abstractmethod
    def inside(self, tensors: Mapping[str, Tensor], batch: int, module: str) -> Tensor:
        """As `attend`, but what goes into the submodule `module`: into o_proj the heads' outputs `[rows, S, H * D]`."""


class LayerMethod(ABC):
    """Turns one layer's tensors into the new ones; the machinery calls it once a layer, in order.

    name: what records and reports call it; target: see `Target`, None gathers no outputs; settings: numbers that
    change the result, so that a conversion is resumed with the same ones only.
    """

    name: str
    target: Target | None = None

    @property
    def settings(self) -> Mapping[str, object]:
        return {}

    @abstractmethod
    def __call__(self, number: int, tensors: Mapping[str, Tensor], data: LayerData | None) -> dict[str, Tensor]:
        """New tensors, by their full names in the new checkpoint.

        Args:
            number: of the layer.
            tensors: the original attention's, by their names inside its module.
            data: None where there is no calibration text.

        Raises:
            ConversionError: where the method needs data and gets none.
        """


Progress = Callable[[int, int], None]  # (layers done, layers in all)


def need(data: LayerData | None, name: str) -> LayerData:
    """The data; raises ConversionError where there is none."""
    if data is None:
        raise ConversionError(
            f"method {name!r} needs calibration text and got none; pass calibration=, or take a method that needs none"
        )
    return data
