"""Text to ids and back: tokenizers, prompt formats, conversations."""
