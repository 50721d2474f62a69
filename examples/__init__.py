"""Short programs that show one thing each: ``python -m examples.layer_hessians``."""
