"""The codec of the completed map: which offsets beyond the next one are finished, as short text.

The text is one field of the commit metadata: printable ASCII without `:`, `"` and `\\`. Empty text
is an empty map. Otherwise its first character says version and kind, and the rest is unpadded
URL-safe base64 (base85 would save 6 %, and takes thirty times as long):

    r  run-lengths: each length as a varint, low seven bits first; the top bit says that more follow
    R  the same, as a raw deflate stream
    b  bitmap: bit n of a little-endian number is 1 where next offset + n is finished
    B  the same, as a raw deflate stream

Rules of this file: these four letters are version 1 and mean this for good. Another format takes
other letters; a letter that is not known is refused. Whatever is read is bounded before it grows,
since anybody who may commit for the group may have written it.
"""

import re
import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from typing import TypeAlias

Runs: TypeAlias = tuple[int, ...]
"""Lengths of runs of offsets, from the next offset on: unfinished, finished, unfinished, ….

Every length is at least 1, and the last run is a finished one, so their number is even. Empty:
nothing is finished beyond the next offset.
"""

SPAN_MAX = 2**31
"""How many offsets one map may reach over. No window comes near it, not even with the holes that
compaction leaves."""

RUNS_MAX = 2**16
"""How many runs one map may have. It is five times what 4,096 characters hold, except where the
runs repeat a pattern and compress well."""

PACKED_BYTES_MAX = 2**18
"""How many bytes one map may have once it is decompressed. 4 kB of text can decompress to 4 MB, so
the bound is what SPAN_MAX and RUNS_MAX allow: at most four bytes a run, nearly always three."""

TEXT_CHARS_MAX = 2**19
"""The longest text that is read, in characters. It is more than PACKED_BYTES_MAX bytes need in
base64."""

_BITMAP_GROWTH_MAX = 8
"""A bitmap that is this many times as long as the run-lengths is not tried: even compressed it is
not the shorter text."""

_VARINT_SHIFT_MAX = 28
"""The bit at which the last byte of a varint may start. It allows five bytes, which hold more than
SPAN_MAX."""

_ONE_BYTE = [bytes([length]) for length in range(128)]


class Damaged(ValueError):
    """The text is not a completed map of ours. The error's message does not quote the text."""


def encode(runs: Runs, chars_max: int) -> str:
    """The shortest text for `runs`, or for the longest prefix of them that `chars_max` holds.

    Messages whose offsets are left out are repeated after a crash, never lost. "Longest" means
    that with one more pair of runs the text would not fit (compressed sizes are not quite
    monotonic). Runs beyond RUNS_MAX or SPAN_MAX are left out too. All runs are tried first, then
    a binary search follows: about fifteen tries at most, most of them near the length that fits.
    """
    assert len(runs) % 2 == 0, "the last run is not a finished one"
    assert min(runs, default=1) >= 1, "a run is empty"
    best, fits = "", 0
    tried = too_many = _pairs_within_bounds(runs)
    while fits < tried:
        text = _shortest(runs[: 2 * tried])
        if len(text) <= chars_max:
            best, fits = text, tried
        else:
            too_many = tried
        tried = (fits + too_many) // 2
    return best


def fullness(runs: Runs, text: str, chars_max: int) -> float:
    """How near `text`, the map of `runs`, is to its limits. Near 1 some runs may be left out.

    The length of the text alone does not tell it: runs that repeat a pattern become short text.
    """
    return max(len(text) / max(chars_max, 1), len(runs) / RUNS_MAX, sum(runs) / SPAN_MAX)


def fits_for_sure(runs: Runs, chars_max: int) -> bool:
    """Whether `encode` holds all of these runs, even where nothing can be compressed.

    The answer stays true while the lowest unfinished offsets finish: the first run then becomes
    shorter or disappears, and the text with it. A compressed size gives no such promise: a map
    that just fits compressed may no longer fit once its first message has finished.
    """
    bytes_max = (chars_max - 1) * 6 // 8
    span = sum(runs)
    if span <= 8 * bytes_max:
        return True
    return span <= SPAN_MAX and len(runs) <= bytes_max and len(_varints(runs)) <= bytes_max


def decode(text: str) -> Runs:
    """The runs that `text` stands for; raises `Damaged` where it is not a map of ours.

    It takes at most some milliseconds and a few megabytes, whatever the text is.
    """
    if not text:
        return ()
    if len(text) > TEXT_CHARS_MAX:
        raise Damaged("the completed map is too long")
    kind, body = text[0], _from_base64(text[1:])
    match kind:
        case "r":
            runs = _runs_of_varints(body)
        case "R":
            runs = _runs_of_varints(_inflate(body))
        case "b":
            runs = _runs_of_bitmap(body)
        case "B":
            runs = _runs_of_bitmap(_inflate(body))
        case _:
            raise Damaged("the completed map is of an unknown version or kind")
    if not runs or len(runs) % 2 or min(runs) < 1:
        raise Damaged("the completed map has an empty run or ends with an unfinished one")
    if len(runs) > RUNS_MAX or sum(runs) > SPAN_MAX:
        raise Damaged("the completed map reaches too far")
    return runs


def runs_of(next_offset: int, finished: Iterable[range]) -> Runs:
    """The runs from `next_offset` on. The ranges in `finished` lie beyond it, in ascending order,
    and two of them may touch."""
    runs: list[int] = []
    after = next_offset
    for each in finished:
        if runs and each.start == after:
            runs[-1] += len(each)
        else:
            assert each.start > after, "a finished range is not beyond the next offset, in order"
            runs += (each.start - after, len(each))
        after = each.stop
    return tuple(runs)


def finished_ranges(next_offset: int, runs: Runs) -> tuple[range, ...]:
    """The finished offsets, ascending; no two ranges touch."""
    borders = accumulate(runs, initial=next_offset)
    next(borders)
    # Each pair is the end of an unfinished run and the end of the finished one behind it.
    return tuple(range(start, stop) for start, stop in zip(borders, borders, strict=True))


# --- writing ---------------------------------------------------------------------------------


def _pairs_within_bounds(runs: Runs) -> int:
    """How many pairs of runs `decode` would take."""
    pairs = min(len(runs), RUNS_MAX) // 2
    if sum(runs) <= SPAN_MAX:
        return pairs
    ends = islice(accumulate(runs), 1, 2 * pairs, 2)
    return sum(end <= SPAN_MAX for end in ends)


def _shortest(runs: Runs) -> str:
    kind, body = min(_candidates(runs), key=lambda candidate: len(candidate[1]))
    return kind + _to_base64(body)


def _candidates(runs: Runs) -> Iterator[tuple[str, bytes]]:
    varints = _varints(runs)
    yield "r", varints
    yield "R", _deflate(varints)
    bitmap_bytes = (sum(runs) + 7) // 8
    if bitmap_bytes <= min(PACKED_BYTES_MAX, _BITMAP_GROWTH_MAX * len(varints)):
        bitmap = _bitmap(runs)
        yield "b", bitmap
        yield "B", _deflate(bitmap)


def _varints(runs: Runs) -> bytes:
    return b"".join([_ONE_BYTE[n] if n < 128 else _varint(n) for n in runs])


def _varint(length: int) -> bytes:
    groups = []
    while length >= 128:
        groups.append(length & 127 | 128)
        length >>= 7
    return bytes([*groups, length])


def _bitmap(runs: Runs) -> bytes:
    """Writes the bits as the binary digits of one number, which Python reads in linear time."""
    digits = "".join(["1" * n if index % 2 else "0" * n for index, n in enumerate(runs)])
    return int(digits[::-1], 2).to_bytes((len(digits) + 7) // 8, "little")


def _deflate(packed: bytes) -> bytes:
    """A raw deflate stream: it saves the six bytes of zlib's header and checksum.

    Z_FILTERED is zlib's strategy for small, random values. Here its output is a tenth shorter
    than that of the default strategy.
    """
    stream = zlib.compressobj(level=6, wbits=-zlib.MAX_WBITS, strategy=zlib.Z_FILTERED)
    return stream.compress(packed) + stream.flush()


def _to_base64(body: bytes) -> str:
    return urlsafe_b64encode(body).rstrip(b"=").decode("ascii")


# --- reading ---------------------------------------------------------------------------------


def _from_base64(text: str) -> bytes:
    if not text.isascii():
        raise Damaged("the completed map is not ASCII")
    try:
        body = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError as error:
        raise Damaged("the completed map is not base64") from error
    # Python's decoder skips characters outside its alphabet and ignores unused last bits.
    if _to_base64(body) != text:
        raise Damaged("the completed map is not base64 in the form that we write")
    return body


def _inflate(body: bytes) -> bytes:
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        packed = stream.decompress(body, PACKED_BYTES_MAX)
    except zlib.error as error:
        raise Damaged("the completed map does not decompress") from error
    if not stream.eof or stream.unused_data:
        raise Damaged("the completed map is cut off, has bytes behind its end or is too large")
    return packed


def _runs_of_varints(packed: bytes) -> Runs:
    if packed.isascii():  # every run has one byte, as in nearly all maps
        return tuple(packed)
    runs = []
    length = shift = 0
    for byte in packed:
        length |= (byte & 127) << shift
        if byte > 127 and shift < _VARINT_SHIFT_MAX:
            shift += 7
        elif byte > 127 or (byte == 0 and shift):
            raise Damaged("the completed map has a length that is too large or too wide")
        else:
            runs.append(length)
            length = shift = 0
    if shift:
        raise Damaged("the completed map is cut off")
    return tuple(runs)


def _runs_of_bitmap(packed: bytes) -> Runs:
    if not packed or packed[0] & 1 or not packed[-1]:
        raise Damaged("the completed map does not go from an unfinished to a finished offset")
    number = int.from_bytes(packed, "little")
    if (number ^ number >> 1).bit_count() > RUNS_MAX:  # the borders between runs
        raise Damaged("the completed map has too many runs")
    return tuple(run.end() - run.start() for run in re.finditer("0+|1+", f"{number:b}"[::-1]))
