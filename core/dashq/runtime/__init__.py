"""The runtime of a result: packed layers, and how transformers opens them."""
