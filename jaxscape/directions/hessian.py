"""The directions in which the loss of refusal is most curved: leading eigenvectors of its Hessian."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxscape.directions.base import as_number, recipe_name, split_options
from jaxscape.directions.objective import OfLoss, RefusalLoss, Refusals, added, norm, positive_norm, scaled_vector
from jaxscape.directions.storage import Direction, inner
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.progress import note

TOLERANCE = 0.02  # the largest residual ‖Hv − λv‖ of an eigenpair that is accepted, in units of |λ|
MAX_PRODUCTS = 60  # products with the Hessian; each takes about as long as two gradients


class Eigenpair(NamedTuple):
    """An approximate eigenvalue λ and unit eigenvector v of a symmetric matrix H, and the residual ‖Hv − λv‖."""

    value: float
    vector: Any
    residual: float


def leading_eigenpair(
    product: Callable[[Any], Any], start: Any, number: int, tolerance: float = TOLERANCE, most: int = MAX_PRODUCTS
) -> Eigenpair:
    """The eigenpair of a symmetric matrix with the `number`-th largest eigenvalue.

    This is the Lanczos method with full reorthogonalisation. It keeps a basis of 8 + 2 × `number` vectors. When the
    basis is full, the method restarts from the half of its Ritz vectors that have the largest values (Wu and Simon,
    "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl. 22, 2000).

    Arguments:
        product: the product of the matrix with a tree of float32 arrays.
        start: the first vector of the basis, before it is normalised.
        number: from 1.
        tolerance: the method ends when the residual is at most this part of the eigenvalue's size.
        most: the method also ends when a basis is full after this many products, whatever the residual is.

    Returns:
        The pair. Its vector has a positive inner product with `start`.

    Raises:
        UserError: a product is not finite, or the vectors that `product` can reach from `start` have fewer dimensions.
    """
    size, products = 8 + 2 * number, 0
    basis = [scaled_vector(start, 1 / norm(start))]
    matrix = np.zeros((size, size))  # the products of the basis with its images
    along_start = np.eye(1, size)[0]  # the inner product of each vector of the basis with the first start
    while True:
        # 1. Extend the basis by what is new in the image of its last vector.
        for used in range(len(basis), size + 1):
            image, column = _orthogonalised(product(basis[-1]), basis)
            matrix[:used, used - 1] = matrix[used - 1, :used] = column
            products, rest = products + 1, norm(image)
            is_invariant = rest <= 1e-5 * np.abs(matrix).max()
            if is_invariant or used == size:
                break
            basis.append(scaled_vector(image, 1 / rest))

        # 2. The Ritz pairs of the basis, those with the largest values first.
        values, vectors = np.linalg.eigh(matrix[:used, :used])
        values, vectors = values[::-1], vectors[:, ::-1]
        if number > used:
            raise UserError(f"The Hessian of the refusal likelihood has only {used} eigenvectors that can be found.")
        value, chosen = float(values[number - 1]), vectors[:, number - 1]
        residual = 0.0 if is_invariant else float(rest * abs(chosen[-1]))
        if is_invariant or residual <= tolerance * abs(value) or products >= most:
            sign = 1 if chosen @ along_start[:used] >= 0 else -1
            (vector,) = _combined(basis, sign * chosen[:, None])
            return Eigenpair(value, vector, residual)

        # 3. Restart from the leading Ritz vectors and what the basis does not hold.
        kept = size // 2
        along_start = np.pad(along_start @ vectors[:, :kept], (0, size - kept))
        basis = [*_combined(basis, vectors[:, :kept]), scaled_vector(image, 1 / rest)]
        matrix = np.diag(np.pad(values[:kept], (0, size - kept)))


def _orthogonalised(vector: Any, basis: Sequence[Any]) -> tuple[Any, Float[np.ndarray, " basis"]]:
    """The part of a vector that is orthogonal to a basis, and its inner products with the basis.

    It is made orthogonal twice, because once leaves rounding errors of the size of what was subtracted.
    """
    products = np.zeros(len(basis))
    for _ in range(2):
        for i, other in enumerate(basis):
            along = inner(other, vector)
            vector = added(vector, other, -along)
            products[i] += along
    return vector, products


def _combined(basis: list[Any], factors: Float[np.ndarray, "basis count"]) -> list[Any]:
    """The combinations of a basis with each column of factors. The basis is emptied, tensor by tensor, so that no more
    vectors than it has are in memory."""
    names = list(basis[0])
    combined: list[Any] = [{} for _ in range(factors.shape[1])]
    for name in names:
        tensors = _combined_tensors([vector.pop(name) for vector in basis], factors.astype(np.float32))
        for vector, tensor in zip(combined, tensors, strict=True):
            vector[name] = tensor
    basis.clear()
    return combined


@jax.jit
def _combined_tensors(tensors: list[Any], factors: Any) -> list[Any]:
    return [sum(f * tensor for f, tensor in zip(column, tensors, strict=True)) for column in factors.T]


@dataclass(frozen=True)
class Hessian(OfLoss):
    """`hessian`: the eigenvector of the Hessian of the loss of refusal with the `number`-th largest eigenvalue.

    The Hessian is taken at the model's weights, without rows and columns for norm parameters. The eigenvector is scaled
    to the norm of the weights without norm parameters, as a random direction. The Lanczos method starts from the
    gradient, whose largest part lies along few leading eigenvectors (Gur-Ari et al., arXiv 1812.04754), and the loss
    rises where the coordinate is positive and small.

    In memory are 8 + 2 × `number` vectors of the size of the float32 weights, the weights, and what a product needs:
    about three more.
    """

    number: int = 1
    refusals: Refusals = field(default_factory=Refusals)

    kind: ClassVar[str] = "hessian"
    usage: ClassVar[str] = "hessian[:K[:PROMPTS[:N[:REFUSAL[:TARGET]]]]]"

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UserError(f"Eigenvectors of the Hessian are numbered from 1, so there is no number {self.number}.")

    @classmethod
    def parse(cls, option: str) -> "Hessian":
        number, *refusals = split_options(option, 5)
        return cls(as_number(number, "number of an eigenvector", cls.number), Refusals.parse(*refusals))

    def __str__(self) -> str:
        options, defaults = ((str(recipe.number), *recipe.refusals.options) for recipe in (self, Hessian()))
        return recipe_name(self.kind, options, defaults)

    def make(self, model: Model) -> list[Direction]:
        loss = RefusalLoss(model, self.refusals)
        _, gradient = loss.value_and_gradient(loss.weights)
        positive_norm(gradient)
        value, vector, residual = leading_eigenpair(loss.hessian_product, gradient, self.number)
        found = f"{self}: the eigenvalue is {value:.4g} nats per token, with a residual of {residual:.2g}"
        if residual > TOLERANCE * abs(value):
            warnings.warn(
                f"{found}, which is more than {100 * TOLERANCE:g} % of it after {MAX_PRODUCTS} products with the "
                f"Hessian: the direction is strongly curved, but it is not an eigenvector.",
                stacklevel=2,
            )
        else:
            note(f"{found}.")
        return [loss.direction(vector, norm(loss.weights) / norm(vector))]
