"""The forms in which the model at a point, θ(c) = θ₀ + Σ cᵢ dᵢ, is computed."""

from enum import StrEnum


class Form(StrEnum):
    """How a point's weights are computed.

    MATERIALISED: θ(c) is formed on the device, one point at a time.
    STREAMED: the same, but θ₀ stays in host memory and is sent to the device one tensor at a time.
    FACTORISED: every direction but the last is added to θ₀. Each use of a weight is a product with the result and one
    with the last direction's tensor, so that points which differ in nothing but their last coordinate decode in one
    batch. If all directions are of low rank, none is added, and all points decode in one batch. Where nothing is added,
    points of several direction sets may share a batch too.
    """

    MATERIALISED = "materialised"
    FACTORISED = "factorised"
    STREAMED = "streamed"

    @property
    def batches_points(self) -> bool:
        """Whether rows of different points decode in one batch."""
        return self is Form.FACTORISED

    @property
    def keeps_weights_on_host(self) -> bool:
        """Whether θ₀ stays in host memory."""
        return self is Form.STREAMED
