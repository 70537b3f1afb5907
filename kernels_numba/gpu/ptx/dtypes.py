"""Types of weights and tokens that the kernels take."""

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def elements(dtype: str) -> int:
    """Elements of a 16-byte piece: what one load brings."""
    return 16 // BYTES[dtype]
