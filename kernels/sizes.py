"""Sizes of launches, from plain integers: Triton's own functions take 6 µs a call on the host, these less than 0.1."""


def ceil_div(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The least power of 2 that is not less than `count`."""
    return 1 << (count - 1).bit_length()
