"""The library behind the D3-Net book: data, losses, networks, training and experiments.

Importing `d3lib` imports nothing heavy; import the module you need, for example `from d3lib.losses import build_loss`.
"""

__version__ = "0.1.0"
