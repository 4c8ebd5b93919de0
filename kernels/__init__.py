"""Kernels and their pure-torch references: they know tensors only and import nothing of kvlib.

Installed as `kvlib.kernels`. The version is here because transformers probes any package called
`kernels`, and this folder carries that name for whoever starts Python in the repository root.
"""

__version__ = "0.0.0"
