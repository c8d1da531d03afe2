"""The model that the ops are assembled into."""

from pathlib import Path

# A small trained Mixtral with its tokenizer: what the command line runs where no folder is given.
TINY_MIXTRAL = Path(__file__).parents[1] / "tiny_mixtral"
