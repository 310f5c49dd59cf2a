"""Text from a model: decoding, sampling, drafting with MTP modules."""
