"""What quantization costs a real model: every method on SmolLM2-135M and on a MiniLM encoder."""
