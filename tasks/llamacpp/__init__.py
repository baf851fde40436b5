"""What loads a GGUF in llama.cpp and asks it."""
