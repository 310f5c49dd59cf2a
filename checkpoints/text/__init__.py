"""Text to token ids and back, and conversations as a chat template renders them."""
