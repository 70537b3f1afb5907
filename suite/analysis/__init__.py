"""Why methods differ: what each keeps of the same activations."""
