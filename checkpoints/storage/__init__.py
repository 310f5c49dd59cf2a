"""Bytes on disk: safetensors files, the formats weights are stored in, and writing."""
