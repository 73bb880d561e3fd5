"""Safety landscapes of large language models, in JAX.

The public names are listed in `__init__.pyi`. Each is imported when it is first used, so that `import jaxscape` and
`jaxscape --help` do not wait for JAX and transformers.
"""

import os

import lazy_loader

# Without PyTorch, transformers prints at import that it has no models; jaxscape uses none of its models.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
