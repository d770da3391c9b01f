"""HALO: how a pretrained Transformer becomes a HypeNet hybrid. docs/design.md describes the rooms and their order."""

__version__ = "0.1.0"
"""The version of the whole project. A checkout that is not installed has no other record of it."""
