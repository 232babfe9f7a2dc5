"""`fuse(model)`: batch normalisation, ReLU and sums live inside the convolutions. See docs/fuse.md.

- `trace.py`    the network as a graph, as deep as it can be followed
- `rewrite.py`  the graph again, with layers put together
- `dense.py`    DenseNet's blocks: where the concatenations are one buffer
- `layers.py`   what the new graph calls
- `install.py`  how a module comes to run the new graph, and stops
"""

from cuda_cnn.fuse.install import fuse, unfuse, watched
from cuda_cnn.fuse.report import Report

__all__ = ["Report", "fuse", "unfuse", "watched"]
