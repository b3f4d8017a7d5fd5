"""tunesmith: fine-tune language models on the cards people can rent. Know before you run, waste nothing, lose nothing."""

__version__ = "0.1.0"
