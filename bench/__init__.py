"""The measurements that the README quotes, each runnable by name: `python -m bench NAME`."""
