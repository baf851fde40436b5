"""What Ollama knows of a model: names, Modelfile, server, directory, history of tags."""
