"""Content codings: what is unpacked, what is refused, and which one answers take."""

import contextlib
import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import InvalidRequest, TooLarge, Unsupported
from headrace.wire.compression import choose_encoding, compress, decompress

TEXT = b"some tensor data " * 50


def raw_deflate(data):
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", gzip.compress(TEXT, mtime=0)),
        ("x-gzip", gzip.compress(TEXT, mtime=0)),
        (" GZip ", gzip.compress(TEXT, mtime=0)),
        ("deflate", zlib.compress(TEXT)),
        ("deflate", raw_deflate(TEXT)),
        ("identity", TEXT),
        ("", TEXT),
        ("gzip, deflate", zlib.compress(gzip.compress(TEXT, mtime=0))),
        ("deflate,gzip", gzip.compress(zlib.compress(TEXT), mtime=0)),
        ("identity, gzip,, identity", gzip.compress(TEXT, mtime=0)),
    ],
)
@pytest.mark.parametrize("wrap", [bytes, memoryview])
def test_known_codings_are_undone_last_first(encoding, packed, wrap):
    unpacked = decompress(wrap(packed), encoding, len(TEXT))
    assert type(unpacked) is bytes
    assert unpacked == TEXT


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, br", "compress", "gzip;q=1"])
def test_an_unknown_coding_is_refused_with_the_known_ones(encoding):
    with pytest.raises(Unsupported, match="gzip, deflate, identity"):
        decompress(gzip.compress(TEXT, mtime=0), encoding, 10_000)


def test_layers_are_bounded():
    body = TEXT
    for _ in range(4):
        body = gzip.compress(body, mtime=0)
    assert decompress(body, "gzip,gzip,gzip,gzip", 10_000) == TEXT
    with pytest.raises(Unsupported, match="5 times"):
        decompress(gzip.compress(body, mtime=0), "gzip,gzip,gzip,gzip,gzip", 10_000)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, raw_deflate])
def test_the_limit_is_exact(pack):
    encoding = "gzip" if pack is gzip.compress else "deflate"
    assert decompress(pack(TEXT), encoding, len(TEXT)) == TEXT
    with pytest.raises(TooLarge, match=str(len(TEXT) - 1)):
        decompress(pack(TEXT), encoding, len(TEXT) - 1)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_limit_of_nothing_is_a_limit(encoding):
    with pytest.raises(TooLarge):
        decompress(compress([b"a"], encoding), encoding, 0)
    assert decompress(compress([], encoding), encoding, 0) == b""


def test_a_bomb_is_stopped_at_the_limit(monkeypatch):
    bomb = gzip.compress(bytes(50_000_000))
    sizes = []
    real = zlib.decompressobj

    class Watched:
        def __init__(self, wbits):
            self.stream = real(wbits=wbits)

        def decompress(self, data, max_length):
            unpacked = self.stream.decompress(data, max_length)
            sizes.append(len(unpacked))
            return unpacked

    monkeypatch.setattr(zlib, "decompressobj", Watched)
    with pytest.raises(TooLarge):
        decompress(bomb, "gzip", 1000)
    assert sizes == [1001]


def test_a_bomb_inside_a_layer_is_stopped_too():
    bomb = gzip.compress(gzip.compress(bytes(1_000_000)))
    with pytest.raises(TooLarge):
        decompress(bomb, "gzip, gzip", 5000)


def test_what_is_not_packed_has_the_same_limit():
    with pytest.raises(TooLarge, match="the limit is 3"):
        decompress(b"abcd", "identity", 3)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda body: body[:-1], "ends early"),
        (lambda body: body[: len(body) // 2], "ends early"),
        (lambda _: b"", "ends early"),
        (lambda body: body + b"xyz", "3 bytes after the end"),
        (lambda body: body + body, "after the end"),
        (lambda body: body[:-1] + bytes([body[-1] ^ 1]), "not a valid"),
        (lambda _: b"\xff" * 40, "not a valid"),
    ],
)
def test_a_broken_stream_is_refused(encoding, damage, words):
    with pytest.raises(InvalidRequest, match=words):
        decompress(damage(compress([TEXT], encoding)), encoding, 10_000)


@given(st.binary(max_size=60), st.sampled_from(["gzip", "deflate", "gzip,deflate"]))
def test_any_bytes_are_unpacked_or_refused(body, encoding):
    with contextlib.suppress(InvalidRequest, TooLarge):
        assert len(decompress(body, encoding, 500)) <= 500


@given(st.lists(st.binary(max_size=50), max_size=4), st.sampled_from(["gzip", "deflate"]))
def test_what_is_packed_is_unpacked_the_same(chunks, encoding):
    packed = compress([memoryview(chunk) for chunk in chunks], encoding)
    standard = gzip.decompress(packed) if encoding == "gzip" else zlib.decompress(packed)
    assert standard == b"".join(chunks) == decompress(packed, encoding, 1000)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", None),
        ("identity", None),
        ("br", None),
        ("gzip", "gzip"),
        ("x-gzip", "gzip"),
        ("deflate", "deflate"),
        ("deflate, gzip", "gzip"),
        ("gzip, deflate, br, zstd", "gzip"),
        ("gzip;q=0.2, deflate;q=0.8", "deflate"),
        ("GZIP ; Q=0.5", "gzip"),
        ("gzip;q=0", None),
        ("gzip;q=0, deflate;q=0", None),
        ("gzip;q=0.0, *", "deflate"),
        ("*", "gzip"),
        ("*;q=0", None),
        ("*;q=0, deflate", "deflate"),
        ("identity;q=0.5, gzip;q=0.4", None),
        ("identity;q=0.5, gzip;q=0.5", "gzip"),
        ("identity, gzip;q=0.9", None),
        ("identity;q=0, *;q=0.1", "gzip"),
        ("identity;q=0", None),
        ("gzip;q=much, deflate;q=0.1", "deflate"),
        ("gzip;q=nan", None),
        ("gzip;q=2", None),
        (",, gzip ,", "gzip"),
        ("gzip;level=9;q=0", None),
    ],
)
def test_the_client_s_weights_choose_the_coding(header, expected):
    assert choose_encoding(header) == expected


@given(st.text(max_size=40))
def test_any_header_chooses_something_offered(header):
    assert choose_encoding(header) in {None, "gzip", "deflate"}
