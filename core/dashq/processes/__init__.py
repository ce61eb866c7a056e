"""The processes of a run: what they say to each other, and the balance of work among them."""
