"""The Keras side: the only files that import it."""
