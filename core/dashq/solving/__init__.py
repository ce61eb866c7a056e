"""The toolkit of solver authors: arithmetic on the numbers that a file can hold."""
