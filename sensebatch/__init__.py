"""Batch generation of image datasets with SenseNova-U1."""

__version__ = "0.1.0"
