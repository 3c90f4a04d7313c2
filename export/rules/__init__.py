"""One rule per operator: the gradient of its inputs from `dy`, the gradient of its output (step-graphs.md, 3.3).

A rule is a function of the builder, the forward node, `dy` and which inputs are wanted, and returns one value or None per
input. In the formulas `*` is the element-wise product and `sum` runs over the axes along which an input was repeated.
Importing this package registers all of them.
"""

from export.rules import (  # noqa: F401
    convolution,
    elementwise,
    indexing,
    normalization,
    pooling,
    products,
    quantized,
    reductions,
    shape,
)
