"""The main-model function: a transformers model whose experts are split into local and remote."""
