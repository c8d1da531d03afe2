"""The model that the ops are assembled into."""
