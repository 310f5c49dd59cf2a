"""Bytes on disk: safetensors files, the formats of weights in them, and writing."""
