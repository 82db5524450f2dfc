"""Whole numbers in few bytes: a Huffman-coded size for each, and its other bits as they are.

A number n >= 0 is written as a little floating-point number. Let e = floor(log2(n + 1)), the
place of the leading one of n + 1. The *symbol* of n is 4 e + the two bits behind the leading one
(0 for those that are not there), its *rest* the e - 2 bits behind those (none if e < 2). Symbols
are few and some are frequent; rests are as good as random:

    packed = raw deflate stream (RFC 1951) of all symbols, a byte each
             | all rests, a number's first bit lowest, into bytes from their lowest bit up

Numbers of one kind stand together, and each kind has Huffman tables of its own: that is the
encoder's choice of deflate blocks, of which a decoder need not know.
"""

import zlib
from collections.abc import Iterable

import numpy as np

LARGEST = (1 << 32) - 2
"""The largest number that can be packed."""
_LEADING = 2
"""Bits behind the leading one that belong to the symbol."""
_SYMBOLS = 32 << _LEADING
_MANTISSA = 52
_WORD = 32


class Unreadable(ValueError):
    """Bytes that no numbers were packed into."""


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """The width of the rest, and the number whose rest is 0, of every symbol."""
    symbols = np.arange(_SYMBOLS)
    exponent = symbols >> _LEADING
    width = np.maximum(exponent - _LEADING, 0)
    leading = (1 << _LEADING) + symbols % (1 << _LEADING)
    return width, (leading << width >> np.maximum(_LEADING - exponent, 0)) - 1


_WIDTHS, _FIRST = _tables()


def pack(kinds: Iterable[np.ndarray]) -> tuple[bytes, list[float]]:
    """Packs arrays of whole numbers, [n] each, from 0 to `LARGEST`.

    Returns:
      The bytes, and how many of them each array takes.

    Raises:
      ValueError: a number is not in this range.
    """
    deflate = zlib.compressobj(level=9, wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    parts, sizes, rests, widths = [], [], [], []
    for numbers in kinds:
        symbols, rest, width = _split(numbers)
        # The end of a block lets the next kind have its own Huffman table.
        parts.append(deflate.compress(symbols.tobytes()) + deflate.flush(zlib.Z_BLOCK))
        sizes.append(len(parts[-1]) + int(width.sum()) / 8)
        rests.append(rest)
        widths.append(width)
    parts.append(deflate.flush())
    parts.append(_pack_bits(np.concatenate(rests), np.concatenate(widths)))
    return b"".join(parts), sizes


def unpack(packed: bytes | memoryview, at_most: int) -> np.ndarray:
    """The numbers of all arrays one after another, int64.

    Args:
      packed: what `pack` returned.
      at_most: how many numbers there may be.

    Raises:
      Unreadable: `packed` is not what `pack` returns for so many numbers.
    """
    inflate = zlib.decompressobj(wbits=-15)
    try:
        symbols = np.frombuffer(inflate.decompress(packed, at_most + 1), np.uint8)
    except zlib.error as error:
        raise Unreadable(f"its symbols are damaged ({error})") from error
    if not inflate.eof or len(symbols) > at_most:
        raise Unreadable("its symbols have no end")
    if symbols.size and symbols.max() >= _SYMBOLS:
        raise Unreadable(f"it has a symbol {symbols.max()}")
    return _FIRST[symbols] + _unpack_bits(inflate.unused_data, _WIDTHS[symbols])


def _split(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Symbols uint8 [n], rests and their widths int64 [n]."""
    if numbers.size and not 0 <= numbers.min() <= numbers.max() <= LARGEST:
        raise ValueError(f"numbers from {numbers.min()} to {numbers.max()}, not to {LARGEST}")
    plus_one = numbers.astype(np.int64) + 1
    # A float64 has exponent and leading bits side by side, and holds all of these numbers.
    bits = plus_one.astype(np.float64).view(np.int64) >> (_MANTISSA - _LEADING)
    symbols = bits - (1023 << _LEADING)
    return symbols.astype(np.uint8), plus_one - 1 - _FIRST[symbols], _WIDTHS[symbols]


def _pack_bits(values: np.ndarray, widths: np.ndarray) -> bytes:
    """`widths` bits of every value; they fit."""
    stops = np.cumsum(widths)
    total = int(stops[-1]) if stops.size else 0
    starts = stops - widths
    word, shift = starts // _WORD, (starts % _WORD).astype(np.uint64)
    shifted = values.astype(np.uint64) << shift
    words = -(-total // _WORD) + 2
    # No two values share a bit, so that adding is joining, exact in float64 up to 2^53.
    low = np.bincount(word, (shifted & 0xFFFFFFFF).astype(np.float64), words)
    high = np.bincount(word + 1, (shifted >> _WORD).astype(np.float64), words)
    return (low + high).astype("<u4").tobytes()[: -(-total // 8)]


def _unpack_bits(data: bytes, widths: np.ndarray) -> np.ndarray:
    stops = np.cumsum(widths)
    total = int(stops[-1]) if stops.size else 0
    if len(data) != -(-total // 8):
        raise Unreadable(f"it has {len(data)} bytes of rests, its symbols want {-(-total // 8)}")
    starts = stops - widths
    padded = data + bytes(8)
    # The eight bytes from every byte on: whatever starts in a byte ends inside them.
    windows = np.ndarray((len(data) + 1,), "<u8", padded, strides=(1,))
    bits = windows[starts >> 3] >> (starts & 7).astype(np.uint64)
    return (bits & ((np.uint64(1) << widths.astype(np.uint64)) - np.uint64(1))).astype(np.int64)
