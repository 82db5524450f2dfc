"""Records written and read one number at a time, from the description of the layout alone."""

import functools
import math
import zlib


def split(number):
    """Symbol and rest of a number, the rest as a string of bits, lowest first."""
    digits = f"{number + 1:b}"
    exponent, behind = len(digits) - 1, digits[1:]
    return 4 * exponent + int(f"{behind[:2]:0<2}", 2), behind[2:][::-1]


def join(symbol, bits):
    """The number of a symbol; its rest is taken from the front of the list of bits."""
    exponent, leading = divmod(symbol, 4)
    width = max(exponent - 2, 0)
    rest = "".join(bits[:width])[::-1]
    del bits[:width]
    return int(("1" + f"{leading:02b}" + rest)[: exponent + 1], 2) - 1


def pack(numbers):
    pairs = [split(int(number)) for number in numbers]
    deflate = zlib.compressobj(wbits=-15)
    symbols = deflate.compress(bytes(symbol for symbol, _ in pairs)) + deflate.flush()
    bits = "".join(rest for _, rest in pairs)
    chunks = (bits[i : i + 8] for i in range(0, len(bits), 8))
    return symbols + bytes(int(chunk[::-1], 2) for chunk in chunks)


def unpack(packed):
    inflate = zlib.decompressobj(wbits=-15)
    symbols = inflate.decompress(packed)
    bits = [bit for byte in inflate.unused_data for bit in f"{byte:08b}"[::-1]]
    return [join(symbol, bits) for symbol in symbols]


def runs(arrays, token, columns):
    """The slots of a token, cut where a smaller count ends."""
    counts = {column.counted_by for column in columns if column.counted_by}
    ends = sorted(int(arrays[name][token]) for name in counts)
    return [range(start, stop) for start, stop in zip([0, *ends], ends)]


@functools.cache
def ranks(codec):
    return {int(i): rank for rank, i in enumerate(codec.order)}


def in_order(codec, arrays, token):
    """Every run's slots by rising rank, equal ids as they came."""
    rank = ranks(codec)
    return [
        sorted(run, key=lambda slot: rank[int(arrays["ids"][token][slot])])
        for run in runs(arrays, token, codec.columns)
    ]


def encode(codec, arrays, key):
    """A record whose reals lie on the grid."""
    rank = ranks(codec)
    numbers = []
    for column in codec.columns:
        values = arrays[column.name]
        for token in range(codec.tokens):
            if column.counted_by is None:
                slots, kept = None, [values[token]]
            else:
                slots = in_order(codec, arrays, token)
                count = int(arrays[column.counted_by][token])
                kept = [values[token][s] for run in slots for s in run if s < count]
            if column.name == "ids":
                for run in slots:
                    before = 0
                    for slot in run:
                        here = rank[int(values[token][slot])]
                        numbers.append(here - before)
                        before = here
            elif column.steps is None:
                numbers += kept
            else:
                numbers += [2**24 - 1 if math.isinf(x) else round(x * column.steps) for x in kept]
    packed = pack(numbers)
    checksum = zlib.crc32(f"{codec.teacher}:{key}".encode() + packed)
    return checksum.to_bytes(4, "little") + packed


def decode(codec, record, key):
    """{column: [T] values, or [T] lists of values}."""
    packed = record[4:]
    assert int.from_bytes(record[:4], "little") == zlib.crc32(
        f"{codec.teacher}:{key}".encode() + packed
    )
    numbers = iter(unpack(packed))
    arrays = {}
    for column in codec.columns:
        values = []
        for token in range(codec.tokens):
            count = 1 if column.counted_by is None else arrays[column.counted_by][token]
            some = [next(numbers) for _ in range(count)]
            if column.name == "ids":
                some = _ids(codec, arrays, token, some)
            elif column.steps is not None:
                sign = math.copysign(1, column.steps)
                some = [sign * math.inf if n == 2**24 - 1 else n / column.steps for n in some]
            values.append(some if column.counted_by else some[0])
        arrays[column.name] = values
    assert next(numbers, None) is None
    return arrays


def _ids(codec, arrays, token, gaps):
    ids = []
    for run in runs(arrays, token, codec.columns):
        rank = 0
        for slot in run:
            rank += gaps[slot]
            ids.append(int(codec.order[rank]))
    return ids
