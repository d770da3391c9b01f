"""HALO: how a pretrained Transformer becomes a HypeNet hybrid. docs/design.md describes the rooms and their order."""
